"""The default run over several seeds: what docs/results.md reports.

  python -m benchmarks.seeds --seeds=5 --out=runs/seeds

Each seed is the default command with another `config.seed` (parameters,
sampling, order) and `config.data.seed` (videos), in its own workdir. A finished
seed is not run again, an interrupted one goes on from its checkpoint. The table
and `seeds.json` are rewritten after every seed.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import time

import numpy as np

from cf_jax.programs import train

# Two-sided 95 % quantiles of Student's t for 1 to 9 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_interval(values: list[float]) -> tuple[float, float]:
  """Mean and half of its 95 % t-interval over seeds (ddof 1)."""
  values = np.asarray(values, float)
  if len(values) < 2:
    return float(values.mean()), math.nan
  half = _T[len(values) - 2] * values.std(ddof=1) / math.sqrt(len(values))
  return float(values.mean()), float(half)


def show(values: list[float]) -> str:
  """`61.2 ± 3.4` of shares, in points."""
  mean, half = mean_interval(values)
  return f"{100 * mean:.1f} ± {100 * half:.1f}"


def table(runs: list[dict]) -> str:
  """Markdown of everything the runs measured, mean ± 95 % over seeds."""
  at = [
    {(r["stage"], r["view"], r["task"]): r for r in run["evaluations"]}
    for run in runs
  ]
  chance = runs[0]["chance"]
  tasks = list(chance)
  lines = [
    f"{len(runs)} seeds, mean ± half a 95 % t-interval over seeds, points.",
    "",
    "| gap | measured | goal | each seed |",
    "|---|---|---|---|",
  ]
  for name, goal, high, low in train.GAPS:
    gaps = [a[high]["accuracy"] - a[low]["accuracy"] for a in at]
    each = ", ".join(f"{100 * gap:.1f}" for gap in gaps)
    name = name.format(method="KF-GRPO", select="TAD")
    lines.append(f"| {name} | {show(gaps)} | ≥ {goal:g} | {each} |")
  lines += [
    "",
    "| stage | view | " + " | ".join(tasks) + " |",
    "|---|---|" + "---|" * len(tasks),
  ]
  lines.append(
    "| | chance | "
    + " | ".join(f"{100 * chance[task]:.1f}" for task in tasks)
    + " |"
  )
  for stage in ("sft", "rl"):
    for view in dict.fromkeys(key[1] for key in at[0] if key[0] == stage):
      cells = [
        show([a[stage, view, task]["accuracy"] for a in at]) for task in tasks
      ]
      lines.append(f"| {stage} | {view} | " + " | ".join(cells) + " |")
  lines += ["", "| shortcut probe | accuracy | chance |", "|---|---|---|"]
  for name, probe in runs[0]["probes"].items():
    cells = show([run["probes"][name]["accuracy"] for run in runs])
    lines.append(f"| {name} | {cells} | {100 * probe['chance']:.1f} |")
  return "\n".join(lines) + "\n"


def main() -> None:
  """Runs what is missing, then writes seeds.json and seeds.md."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--config", default="configs/kfgrpo_cpu.py")
  parser.add_argument("--out", default="runs/seeds")
  parser.add_argument(
    "overrides",
    nargs="*",
    help="further flags, e.g. --config.rl.steps=10",
  )
  args, extra = parser.parse_known_args()
  out = pathlib.Path(args.out)
  runs = []
  for seed in range(args.seeds):
    workdir = out / f"seed_{seed}"
    if not (workdir / "results.json").exists():
      command = [
        sys.executable,
        "-m",
        "cf_jax.main",
        f"--config={args.config}",
        f"--workdir={workdir}",
        f"--config.seed={seed}",
        f"--config.data.seed={seed}",
        *args.overrides,
        *extra,
      ]
      print("+", " ".join(command), flush=True)
      begin = time.monotonic()
      subprocess.run(command, check=True)
      print(f"seed {seed}: {time.monotonic() - begin:.0f} s", flush=True)
    runs.append(json.loads((workdir / "results.json").read_text()))
    made = table(runs)
    (out / "seeds.md").write_text(made)
    (out / "seeds.json").write_text(json.dumps(runs, indent=1) + "\n")
  print(made)


if __name__ == "__main__":
  main()
