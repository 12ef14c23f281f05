"""Other frames before the policies of configs/contrasts.py, and other tasks.

  python -m benchmarks.controls --runs=runs/contrasts --out=runs/controls

The policy of each finished seed answers fresh held-out videos with eight frames
by every selector, or with all that were scanned: on the tasks it was trained on
(needle, order_two) and on tasks on which TAD should tie or lose (evidence as
long as the video: long; many more cuts than keyframes: many_cuts; a gradual
onset: ramp). Blind, one-frame and times-only answers are among the results of
the sweep itself. A finished evaluation is not made again.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import contrasts, peers

SELECTORS = (
  "tad",
  "uniform",
  "random",
  "k_center",
  "all_frames",
  "oracle",
)
TASKS = ("needle", "order_two", "long", "many_cuts", "ramp")


def ask(
  policy: pathlib.Path, workdir: pathlib.Path, settings: Mapping[str, Any]
) -> pathlib.Path:
  """A run's policy on built-in videos: the folder of what it answered.

  Args:
    policy: workdir of the run.
    workdir: of the evaluation; one of this policy that is finished is read.
    settings: of configs/evaluate.py, dotted name -> value.

  Raises:
    subprocess.CalledProcessError: the evaluation failed.
    ValueError: the workdir holds other evaluations, too.
  """
  manifest = json.loads((policy / "manifest.json").read_text("utf-8"))
  command = [
    sys.executable,
    "-m",
    "cf_jax.main",
    "--config=configs/evaluate.py",
    "--config.benchmark=synthetic",
    f"--config.policy={policy.absolute()}",
    f"--config.data.seed={manifest['config']['data']['seed']}",
    *(f"--config.{name}={value}" for name, value in settings.items()),
    f"--workdir={workdir.absolute()}",
  ]

  def finished():
    return list(workdir.glob("synthetic/*/scores.json"))

  trained_s = (policy / "results.json").stat().st_mtime
  if not any(path.stat().st_mtime >= trained_s for path in finished()):
    subprocess.run(command, check=True)
  if len(finished()) > 1:
    raise ValueError(
      f"{workdir} holds {len(finished())} evaluations, expected one; remove"
      " those of earlier policies"
    )
  return finished()[0].parent


def evaluate(
  policy: pathlib.Path, select: str, workdir: pathlib.Path, *, count: int
) -> dict[str, float]:
  """Task -> accuracy of a run's policy with one selector.

  Args:
    policy: workdir of the run.
    select: of `SELECTORS`.
    workdir: as of `ask`.
    count: videos of each task.
  """
  settings = {
    "select": select,
    "data.synthetic.tasks": TASKS,
    "data.synthetic.num_test": count * len(TASKS),
  }
  folder = ask(policy, workdir, settings)
  scores = json.loads((folder / "scores.json").read_text("utf-8"))
  return {
    figure["group"].removeprefix("task: "): figure["value"]
    for figure in scores["figures"]
    if figure["group"].startswith("task: ")
  }


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
  """Markdown: selector -> seed -> task -> accuracy; mean, sd (ddof 1)."""
  return peers.table(
    ["frames", *TASKS],
    [
      [select]
      + [
        contrasts.mean_sd([100 * seed[task] for seed in seeds.values()])
        for task in TASKS
      ]
      for select, seeds in found.items()
    ],
  )


def main() -> None:
  """Evaluates what is missing, prints the table, keeps it as JSON."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--runs", type=pathlib.Path, required=True)
  parser.add_argument("--arm", default="tad_kfgrpo", help="whose policy")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--count", type=int, default=256, help="videos a task")
  parser.add_argument("--seeds", type=int, help="the first so many; all")
  args = parser.parse_args()
  runs = sorted(args.runs.glob(f"seed_*/{args.arm}/results.json"))[: args.seeds]
  if not runs:
    parser.error(f"{args.runs} has no finished {args.arm}")
  found: dict[str, dict] = {select: {} for select in SELECTORS}
  for results in runs:
    policy = results.parent.absolute()
    for select in SELECTORS:
      kept = f"{select}_{args.count}"
      seed = policy.parent.name
      found[select][seed] = evaluate(
        policy, select, args.out / seed / args.arm / kept, count=args.count
      )
  print(f"{args.arm}, {len(runs)} seeds, {args.count} videos a task\n")
  print(table(found))
  contrasts.write_json(args.out / f"{args.arm}.json", found)


if __name__ == "__main__":
  main()
