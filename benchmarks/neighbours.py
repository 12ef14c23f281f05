"""What the neighbouring systems' small runs came to, before and after.

  python -m launch.sweep --config=configs/neighbours.py --out=runs/neighbours
  python -m cf_jax.main --config=configs/viarl.py:small --workdir=runs/viarl
  python -m benchmarks.neighbours --runs=runs/neighbours --viarl=runs/viarl \
    --asked=runs/asked --plots=docs/images --out=docs/results/neighbours.json

Descriptive: few seeds, no test. A row is a run's last policy on the held-out
videos of one task: right answers, mean IoU of the times it gives, the share of
IoUs from 0.3, 0.5 and 0.7 on, and of a learned selection the share of
annotated events that got a frame. Of ViaRL, after each stage: right answers to
chosen and to uniform frames, and how many lists hit the evidence. Reads the
runs that are there; --beside=docs/results/neighbours.json puts those of an
earlier file beside them, in the table. Curves are of the runs that are there.

An arm that was trained on one task has held-out videos of its own, so the
policies of VideoChat-R1's arms answer those of the joint arm, in the folder
--asked (half a minute each, once); these answers are what the table shows.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import contrasts, controls, peers
from configs import neighbours

LIMITS = ("0.3", "0.5", "0.7")
COLUMNS = ("right", "IoU", *(f"from {limit}" for limit in LIMITS), "hits")

ARMS = tuple(
  f"{system}_{variant}"
  for system, variants in neighbours.ARMS.items()
  for variant in ("cold", *variants)
)

# System -> metric of training that its figure shows, and what that is.
CURVES = {
  "videochat": ("reward/iou", "IoU of sampled times"),
  "temporal": ("reward/mean", "reward"),
  "tspo": ("selector/reward", "reward of selections"),
}

# task -> column -> value, of one run
Run = Mapping[str, Mapping[str, float]]


def read(folder: pathlib.Path) -> Run:
  """What a finished run's last policy gets with its own frames."""
  results = json.loads((folder / "results.json").read_text("utf-8"))
  last = results["evaluations"][-1]["stage"]
  hits = results["hit_rates"].get(last, {}).get("keyframes")
  made = {}
  for row in results["evaluations"]:
    if (row["stage"], row["view"]) != (last, "keyframes"):
      continue
    found = {"right": row["accuracy"]}
    if "iou" in row.get("component", {}):
      found["IoU"] = row["component"]["iou"]
    found |= {
      f"from {limit}": share for limit, share in row.get("recall", {}).items()
    }
    if row["task"] == "all" and hits is not None:
      found["hits"] = hits
    made[row["task"]] = found
  return made


def ask(policy: pathlib.Path, workdir: pathlib.Path) -> Run:
  """The joint arm's held-out questions, put to an arm of VideoChat-R1.

  Args:
    policy: workdir of the arm.
    workdir: as of `controls.ask`.
  """
  joint = neighbours.get_config("videochat_joint").data.synthetic
  settings = {
    f"data.synthetic.{name}": joint[name]
    for name in ("tasks", "num_test", "num_frames")
  }
  folder = controls.ask(policy, workdir, settings)
  return read_answers(folder / "questions.jsonl")


def read_answers(path: pathlib.Path) -> Run:
  """What `questions.jsonl` of an evaluation comes to, by task and for all."""
  with path.open(encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  groups = {"all": rows}
  for row in rows:
    groups.setdefault(row["task"], []).append(row)
  made = {}
  for task, some in groups.items():
    right = [row["score"]["accuracy"] for row in some]
    made[task] = {"right": float(np.mean(right))}
    iou = np.array([r["score"]["iou"] for r in some if "iou" in r["score"]])
    if iou.size:
      made[task]["IoU"] = float(iou.mean())
      for limit in LIMITS if task != "all" else ():
        made[task][f"from {limit}"] = float(np.mean(iou >= float(limit)))
  return made


def table(found: Mapping[str, Mapping[str, Run]]) -> str:
  """Markdown: arm and task -> columns in %, mean and spread (ddof 1).

  Args:
    found: arm -> seed -> Run.
  """
  rows = []
  for arm, seeds in found.items():
    runs = list(seeds.values())
    for task in runs[0]:
      each = [
        [100 * run[task][name] for run in runs if name in run[task]]
        for name in COLUMNS
      ]
      rows.append([arm, len(runs), task, *map(contrasts.mean_sd, each)])
  return peers.table(["arm", "seeds", "task", *COLUMNS], rows)


def draw(
  curves: Mapping[str, Sequence[Sequence[float]]],
  path: pathlib.Path,
  *,
  what: str,
) -> None:
  """A metric of a system's arms over updates, as a moving mean of a tenth.

  Args:
    curves: arm -> one curve a seed, equally long.
    path: of the picture.
    what: the metric.
  """
  window = max(1, len(next(iter(curves.values()))[0]) // 10)
  figure, panel = plt.subplots(figsize=(5.5, 3.4))
  contrasts.draw_smooth(panel, curves, window=window)
  panel.set_ylabel(f"{what}, mean of {window}")
  contrasts.save(figure, path)


def read_cycles(folder: pathlib.Path) -> dict[str, dict[str, float]]:
  """Stage of configs/viarl.py -> shares of all held-out questions."""
  results = json.loads((folder / "results.json").read_text("utf-8"))
  return {
    row["after"]: {
      "right, chosen frames": row["accuracy/chosen"]["accuracy"],
      "right, uniform frames": row["accuracy/uniform"]["accuracy"],
      "lists that hit": row["lists/hit"],
    }
    for row in results["evaluations"]
    if row["task"] == "all"
  }


def cycles_table(found: Mapping[str, Mapping[str, float]]) -> str:
  """Markdown of `read_cycles`, %."""
  names = list(next(iter(found.values())))
  return peers.table(
    ["after", *names],
    [
      [stage, *(f"{100 * row[name]:.1f}" for name in names)]
      for stage, row in found.items()
    ],
  )


def draw_cycles(
  found: Mapping[str, Mapping[str, float]], path: pathlib.Path
) -> None:
  """`read_cycles` over the stages, a line each."""
  figure, panel = plt.subplots(figsize=(8, 3.4))
  for name in next(iter(found.values())):
    panel.plot(
      list(found), [100 * r[name] for r in found.values()], "o-", label=name
    )
  panel.set_xlabel("after")
  panel.set_ylabel("%")
  panel.legend(fontsize=8)
  panel.grid(alpha=0.3)
  contrasts.save(figure, path)


def main() -> None:
  """Prints the table; writes JSON and the figure where asked."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--runs", type=pathlib.Path, required=True)
  parser.add_argument("--viarl", type=pathlib.Path, help="run of viarl.py")
  parser.add_argument("--asked", type=pathlib.Path, help="of evaluations")
  parser.add_argument("--out", type=pathlib.Path)
  parser.add_argument("--plots", type=pathlib.Path)
  parser.add_argument(
    "--beside", type=contrasts.load, default={}, metavar="FILE"
  )
  args = parser.parse_args()
  contrasts.check_beside(parser, args.beside, (*ARMS, "viarl"))
  found, curves = {}, {}
  for arm in ARMS:
    system, _, variant = arm.partition("_")
    folders = [
      path.parent
      for path in sorted(args.runs.glob(f"seed_*/{arm}/results.json"))
    ]
    if not folders:
      continue
    if system == "videochat" and not args.asked:
      parser.error(f"{args.runs} has {arm}: --asked must name a folder")
    found[arm] = {
      folder.parent.name: (
        ask(folder, args.asked / folder.parent.name / arm)
        if system == "videochat"
        else read(folder)
      )
      for folder in folders
    }
    each = [contrasts.curve(folder, CURVES[system][0]) for folder in folders]
    if all(each):
      curves.setdefault(system, {})[variant] = each
  if args.viarl:
    manifest = json.loads((args.viarl / "manifest.json").read_text("utf-8"))
    found["viarl"] = {f"seed_{manifest['seed']}": read_cycles(args.viarl)}
  found = contrasts.beside(args.beside, found)
  if not found:
    parser.error(f"{args.runs} has no finished run of configs/neighbours.py")
  found = {arm: found[arm] for arm in (*ARMS, "viarl") if arm in found}
  print(table({arm: runs for arm, runs in found.items() if arm != "viarl"}))
  for seed, cycles in found.get("viarl", {}).items():
    print(f"\nviarl, {seed}\n\n" + cycles_table(cycles))
    if args.plots:
      draw_cycles(cycles, args.plots / f"viarl_{seed}.png")
  if args.out:
    contrasts.write_json(args.out, found)
  if args.plots:
    for system, arms in curves.items():
      path = args.plots / f"{system}_curves.png"
      draw(arms, path, what=CURVES[system][1])


if __name__ == "__main__":
  main()
