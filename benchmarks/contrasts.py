"""The three contrasts of docs/contrasts.md, from the runs of the sweep.

  python -m launch.sweep --config=configs/contrasts.py --out=runs/contrasts
  python -m benchmarks.contrasts --runs=runs/contrasts --plots=docs/images

Reads what is there: seeds with all arms count, the others are named.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from cf_jax.evals import paired

# Contrast -> arm, and the arms whose mean it is compared with.
CONTRASTS = {
  "a) TAD - uniform frames, GRPO": ("tad_grpo", ("uniform_grpo",)),
  "b) KF-GRPO - T-GRPO, TAD": ("tad_kfgrpo", ("tad_tgrpo",)),
  "c) KF-GRPO - placebo, TAD": (
    "tad_kfgrpo",
    ("tad_placebo", "tad_placebo_prompt"),
  ),
}
ARMS = tuple(
  dict.fromkeys(arm for high, low in CONTRASTS.values() for arm in (high, *low))
)
SHOWN = {
  "tad_grpo": "GRPO",
  "tad_tgrpo": "T-GRPO",
  "tad_placebo": "placebo",
  "tad_kfgrpo": "KF-GRPO",
}
VIEWS = ("keyframes", "shuffled", "reversed", "blind")

# (view, task) -> accuracy, of one run after reinforcement.
Run = Mapping[tuple[str, str], float]


def read(folder: pathlib.Path) -> Run:
  """The accuracies of a finished run."""
  results = json.loads((folder / "results.json").read_text("utf-8"))
  return {
    (row["view"], row["task"]): row["accuracy"]
    for row in results["evaluations"]
    if row["stage"] == "rl"
  }


def outcome(run: Run) -> float:
  """Accuracy under the keyframes view, mean over tasks."""
  return float(
    np.mean(
      [
        value
        for (view, task), value in run.items()
        if view == "keyframes" and task != "all"
      ]
    )
  )


def contrasts(seeds: Sequence[Mapping[str, Run]]) -> dict[str, dict]:
  """Every contrast over seeds: differences, interval, p, Holm's p.

  Args:
    seeds: arm -> Run, one for every seed; at least two.
  """
  made = {}
  for name, (high, low) in CONTRASTS.items():
    each = [
      outcome(seed[high]) - float(np.mean([outcome(seed[a]) for a in low]))
      for seed in seeds
    ]
    made[name] = paired.paired(each)._asdict() | {"each": each}
  for row, p in zip(
    made.values(), paired.holm([r["p"] for r in made.values()]), strict=True
  ):
    row["p_holm"] = p
  return made


def table(found: Mapping[str, Mapping]) -> str:
  """Markdown of `contrasts`, in points."""
  lines = [
    "| contrast | difference, points | 95 % interval | p (Holm) | each seed |",
    "|---|---|---|---|---|",
  ]
  for name, row in found.items():
    each = ", ".join(f"{100 * value:.1f}" for value in row["each"])
    lines.append(
      f"| {name} | {100 * row['mean']:.1f} | {100 * row['low']:.1f} to"
      f" {100 * row['high']:.1f} | {row['p_holm']:.3g} | {each} |"
    )
  return "\n".join(lines) + "\n"


def draw(
  seeds: Sequence[Mapping[str, Run]], path: pathlib.Path, *, task: str
) -> None:
  """The figure: one line a seed over views, a panel for each method."""
  figure, panels = plt.subplots(
    1, len(SHOWN), figsize=(3 * len(SHOWN), 3.2), sharey=True, squeeze=False
  )
  for panel, (arm, title) in zip(panels[0], SHOWN.items(), strict=True):
    for seed in seeds:
      share = [100 * seed[arm][view, task] for view in VIEWS]
      panel.plot(share, marker="o", alpha=0.7)
    panel.axhline(50, color="0.6", linestyle=":")
    panel.set_title(title)
    panel.set_xticks(range(len(VIEWS)), ["ordered", *VIEWS[1:]], rotation=30)
    panel.set_ylim(0, 100)
  panels[0][0].set_ylabel(f"{task}: right, %")
  figure.tight_layout()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main() -> None:
  """Prints the table; writes JSON and the figure where asked."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--runs", type=pathlib.Path, required=True)
  parser.add_argument("--out", type=pathlib.Path)
  parser.add_argument("--plots", type=pathlib.Path)
  args = parser.parse_args()
  seeds = []
  for folder in sorted(args.runs.glob("seed_*")):
    missing = [
      arm for arm in ARMS if not (folder / arm / "results.json").is_file()
    ]
    if missing:
      print(f"{folder.name} is left out: no results of {', '.join(missing)}")
      continue
    seeds.append({arm: read(folder / arm) for arm in ARMS})
  if len(seeds) < 2:
    parser.error(
      f"{args.runs} has {len(seeds)} whole seeds, expected 2 or more"
    )
  found = contrasts(seeds)
  print(table(found))
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
  if args.plots:
    draw(seeds, args.plots / "contrasts_order.png", task="order_two")


if __name__ == "__main__":
  main()
