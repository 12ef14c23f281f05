"""What each term of KF-GRPO changes, from the runs of configs/terms.py.

  python -m launch.sweep --config=configs/terms.py --out=runs/contrasts
  python -m benchmarks.terms --runs=runs/contrasts --out=docs/results/terms.json

--beside=docs/results/terms.json puts those of an earlier file beside them.

Descriptive: few seeds, no test; arms are compared on the same seeds. For every
arm the held-out accuracy, where order is used (ordered and reversed keyframes
of the order task) and what would show a policy that learns something else than
to look: the tokens before its answer, how often it cites a keyframe and how
often TAD's most salient one, and how much its wrong answers are held by the
order of the frames.
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks import contrasts, peers
from configs import terms

# Column -> metric of training, its mean over the last updates.
WATCHED = {
  "tokens before the answer": "length/reasoning",
  "cites": "cited/any",
  "cites the top": "cited/top",
  "g, right": "bonus/g_shuffled_correct",
  "g, wrong": "bonus/g_shuffled_wrong",
}
# Column -> view and task of the held-out videos; None is the mean of tasks.
HELD_OUT = {
  "right, %": ("keyframes", None),
  "order, ordered": ("keyframes", "order_two"),
  "order, reversed": ("reversed", "order_two"),
}
# Arms that are compared with each other: of a seed that has all of a group.
GROUPS = (
  ("cold_start", *terms.ARMS, "tad_tgrpo"),
  ("cited_cold_start", "cited_none", "cited_evidence"),
  ("cited_cold_start", "cited_none", "cited_deletion"),
)
_LAST = 20  # updates


def whole_seeds(runs: pathlib.Path, arms: Sequence[str]) -> list[pathlib.Path]:
  """The folders of the seeds in which every one of the arms is finished."""
  return [
    folder
    for folder in sorted(runs.glob("seed_*"))
    if all((folder / arm / "results.json").is_file() for arm in arms)
  ]


def columns(folder: pathlib.Path) -> dict[str, float]:
  """What a finished run says; without what it does not measure."""
  run = contrasts.read(folder)
  made = {}
  for name, (view, task) in HELD_OUT.items():
    if task is None:
      made[name] = 100 * contrasts.outcome(run, view)
    elif (view, task) in run:
      made[name] = 100 * run[view, task]
  for name, key in WATCHED.items():
    curve = contrasts.curve(folder, key)[-_LAST:]
    if curve:
      made[name] = float(np.mean(curve))
  return made


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
  """Markdown: arm -> seed -> `columns`; mean and spread (ddof 1)."""
  names = [*HELD_OUT, *WATCHED]
  rows = []
  for arm, seeds in found.items():
    row = [arm, len(seeds)]
    for name in names:
      each = [seed[name] for seed in seeds.values() if name in seed]
      row.append(contrasts.mean_sd(each, 1 if name in HELD_OUT else 2))
    rows.append(row)
  return peers.table(["arm", "seeds", *names], rows)


def main() -> None:
  """Prints the table of what there is; writes it as JSON where asked."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--runs", type=pathlib.Path, required=True)
  parser.add_argument("--out", type=pathlib.Path)
  parser.add_argument(
    "--beside", type=contrasts.load, default={}, metavar="FILE"
  )
  args = parser.parse_args()
  known = [arm for arms in GROUPS for arm in arms]
  contrasts.check_beside(parser, args.beside, known)
  found: dict[str, dict] = {}
  for arms in GROUPS:
    for folder in whole_seeds(args.runs, arms):
      for arm in arms:
        found.setdefault(arm, {})[folder.name] = columns(folder / arm)
  found = contrasts.beside(args.beside, found)
  if not found:
    parser.error(f"{args.runs} has no seed with all arms of configs/terms.py")
  print(table(found))
  if args.out:
    contrasts.write_json(args.out, found)


if __name__ == "__main__":
  main()
