"""The contrasts of docs/contrasts.md, from the runs of a sweep.

  python -m launch.sweep --config=configs/contrasts.py --out=runs/contrasts
  python -m benchmarks.contrasts --runs=runs/contrasts --plots=docs/images

and those of the second study with configs/shortcut.py, --study=shortcut and
--runs=runs/shortcut. Reads what is there: seeds with all arms count, the others
are named. The table of frames and methods, which is descriptive, takes the
seeds it finds. With --beside=docs/results/contrasts.json the contrasts are that
file's, and so are the seeds of the table that it has; others come beside them.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import peers
from cf_jax.evals import paired
from configs import contrasts as configured

# Contrast -> arm, and the arms whose mean it is compared with.
Contrasts = Mapping[str, tuple[str, tuple[str, ...]]]


class Study(NamedTuple):
  """What is compared, and what its figure shows.

  Attributes:
    contrasts: tested together.
    shown: arm -> title of its panel.
    task: about order, of which the figure is.
    short_cut: what a completion that does not look has in it; "" where there
      is no such thing.
  """

  contrasts: Contrasts
  shown: Mapping[str, str]
  task: str
  short_cut: str = ""

  @property
  def arms(self) -> tuple[str, ...]:
    """All that a whole seed has beside its cold start."""
    compared = (
      arm for high, low in self.contrasts.values() for arm in (high, *low)
    )
    return tuple(dict.fromkeys((*compared, *self.shown)))


STUDIES = {
  "contrasts": Study(
    {
      "a) TAD - uniform frames, GRPO": ("tad_grpo", ("uniform_grpo",)),
      "b) KF-GRPO - T-GRPO, TAD": ("tad_kfgrpo", ("tad_tgrpo",)),
      "c) KF-GRPO - placebo, TAD": (
        "tad_kfgrpo",
        ("tad_placebo", "tad_placebo_prompt"),
      ),
    },
    {
      "tad_grpo": "GRPO",
      "tad_tgrpo": "T-GRPO",
      "tad_placebo": "placebo",
      "tad_kfgrpo": "KF-GRPO",
    },
    "order_two",
  ),
  "shortcut": Study(
    {
      "d) KF-GRPO (text) - T-GRPO": ("kfgrpo_text", ("tgrpo",)),
      "e) KF-GRPO (text) - placebo": ("kfgrpo_text", ("placebo",)),
      "f) KF-GRPO (text) - KF-GRPO (answer)": ("kfgrpo_text", ("kfgrpo",)),
    },
    {
      "grpo": "GRPO",
      "tgrpo": "T-GRPO",
      "placebo": "placebo",
      "kfgrpo": "KF-GRPO (answer)",
      "kfgrpo_text": "KF-GRPO (text)",
    },
    "order_skewed",
    short_cut="<think>A</think>",
  ),
}
CONTRASTS, SHOWN = STUDIES["contrasts"].contrasts, STUDIES["contrasts"].shown
VIEWS = ("keyframes", "shuffled", "reversed", "blind")
# Rows and columns of the descriptive table; "sft" is the cold start, looked at
# through these frames.
FRAMES = ("uniform", "tad", "learned")
METHODS = ("sft", "grpo", "tgrpo", "kfgrpo")
# Of a result file.
PARTS = (
  *("seeds", "contrasts", "views", "bonuses"),  # `summary`
  *("cells", "hits", "own"),
  "habits",  # of the second study
)
_COLD = {"uniform": "uniform", "tad": "keyframes"}

# (view, task) -> accuracy of the policy that a run ends with.
Run = Mapping[tuple[str, str], float]


def read(folder: pathlib.Path) -> Run:
  """The accuracies of a finished run's last policy."""
  results = json.loads((folder / "results.json").read_text("utf-8"))
  rows = results["evaluations"]
  last = rows[-1]["stage"]
  return {
    (row["view"], row["task"]): row["accuracy"]
    for row in rows
    if row["stage"] == last
  }


def outcome(run: Run, view: str = "keyframes") -> float:
  """Accuracy under a view, mean over tasks."""
  return float(
    np.mean(
      [
        value
        for (seen, task), value in run.items()
        if seen == view and task != "all"
      ]
    )
  )


def cells(
  seeds: Mapping[str, Mapping[str, Run]],
) -> dict[str, dict[str, float]]:
  """Frames and method -> seed -> accuracy, of what there is.

  Args:
    seeds: name -> arm -> Run, "cold_start" among the arms.
  """
  made: dict[str, dict[str, float]] = {}
  for name, runs in seeds.items():
    for frames in FRAMES:
      for method in METHODS:
        arm, view = f"{frames}_{method}", "keyframes"
        if method == "sft":
          arm, view = "cold_start", _COLD.get(frames)
        if arm in runs and any(seen == view for seen, _ in runs[arm]):
          key = f"{frames} {method}"
          made.setdefault(key, {})[name] = outcome(runs[arm], view)
  return made


def own(
  seeds: Mapping[str, Mapping[str, Run]],
) -> dict[str, dict[str, float]]:
  """Arm that never saw other than uniform frames -> seed -> accuracy."""
  made: dict[str, dict[str, float]] = {}
  for name, runs in seeds.items():
    for arm in (configured.UNIFORM_COLD, configured.UNIFORM_OWN):
      if arm in runs:
        made.setdefault(arm, {})[name] = outcome(runs[arm])
  return made


def hits(runs: pathlib.Path) -> dict[str, dict[str, float]]:
  """Arm with learned frames -> seed -> share of events that got one."""
  made: dict[str, dict[str, float]] = {}
  for path in sorted(runs.glob("seed_*/learned_*/results.json")):
    rates = json.loads(path.read_text("utf-8"))["hit_rates"]["rl"]
    seed, arm = path.parent.parent.name, path.parent.name
    made.setdefault(arm.replace("_", " "), {})[seed] = rates["keyframes"]
  return made


def mean_sd(values: Sequence[float], digits: int = 1) -> str:
  """The mean, and where there are several their spread (ddof 1); "" of none."""
  if not values:
    return ""
  text = f"{np.mean(values):.{digits}f}"
  if len(values) > 1:
    text += f" (sd {np.std(values, ddof=1):.{digits}f})"
  return text


def describe(found: Mapping[str, Mapping[str, float]]) -> str:
  """Markdown of `cells`, %: mean, and how far seeds lie apart (ddof 1)."""
  rows = []
  for frames in FRAMES:
    row = [frames]
    for method in METHODS:
      each = [100 * v for v in found.get(f"{frames} {method}", {}).values()]
      row.append(f"{mean_sd(each)}, n={len(each)}" if each else "")
    rows.append(row)
  return peers.table(["frames", *METHODS], rows)


def curve(folder: pathlib.Path, key: str) -> list[float]:
  """A metric of every update of reinforcement."""
  with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  return [row[key] for row in rows if row["stage"] == "rl" and key in row]


def draw_smooth(
  panel: matplotlib.axes.Axes,
  curves: Mapping[str, Sequence[Sequence[float]]],
  *,
  window: int,
  scale: float = 1,
  alpha: float = 0.3,
) -> None:
  """Moving means over updates: each seed thin, the mean thick.

  Args:
    panel: where.
    curves: arm -> one curve a seed, equally long.
    window: updates of the moving mean.
    scale: what values are multiplied by.
    alpha: how much of a seed's line is seen.
  """
  kernel = np.ones(window) / window
  for number, (arm, each) in enumerate(curves.items()):
    smooth = [scale * np.convolve(one, kernel, "valid") for one in each]
    update = np.arange(len(smooth[0])) + window
    for line in smooth:
      panel.plot(update, line, color=f"C{number}", alpha=alpha, linewidth=0.8)
    panel.plot(update, np.mean(smooth, axis=0), color=f"C{number}", label=arm)
  panel.set_xlabel("update")
  panel.legend(fontsize=8)
  panel.grid(alpha=0.3)


def save(figure: matplotlib.figure.Figure, path: pathlib.Path) -> None:
  """Writes a figure, and closes it."""
  figure.tight_layout()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def write_json(path: pathlib.Path, made: Mapping) -> None:
  """Writes a result file that docs/results keeps."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(made, indent=1) + "\n")


def load(path: str) -> dict:
  """A result file, as an option of the command line."""
  try:
    return json.loads(pathlib.Path(path).read_text("utf-8"))
  except OSError as error:
    raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from error


def check_beside(
  parser: argparse.ArgumentParser, old: Mapping, known: Sequence[str]
) -> None:
  """An error where a result file is of something else."""
  unknown = sorted(set(old) - set(known))
  if unknown:
    parser.error(
      f"--beside has {', '.join(unknown)}; expected a file with"
      f" {', '.join(known)}"
    )


def beside(old: Mapping[str, Mapping], new: Mapping[str, Mapping]) -> dict:
  """What a result file has of runs elsewhere, and what those here came to.

  Args:
    old: arm -> seed -> numbers, of the file.
    new: the same of the runs. Where both have a seed, the file's stands, as it
      is compared with others there; where they differ, this is said.
  """
  made = {}
  for arm in dict.fromkeys((*old, *new)):
    kept, found = old.get(arm, {}), new.get(arm, {})
    for seed in sorted(kept.keys() & found.keys()):
      if kept[seed] != found[seed]:
        print(f"{arm}, {seed}: the file's numbers stand, other ones were found")
    made[arm] = dict(sorted({**found, **kept}.items()))
  return made


def draw_curves(
  curves: Mapping[str, Sequence[Sequence[float]]],
  path: pathlib.Path,
  *,
  window: int = 10,
) -> None:
  """Accuracy of sampled answers over updates: each seed thin, the mean thick.

  Args:
    curves: arm -> one curve a seed, equally long.
    path: of the picture.
    window: updates of the moving mean.
  """
  figure, panel = plt.subplots(figsize=(7, 4))
  draw_smooth(panel, curves, window=window, scale=100, alpha=0.2)
  panel.set_ylabel(f"right, % (mean of {window} updates)")
  save(figure, path)


def contrasts(
  seeds: Sequence[Mapping[str, Run]], of: Contrasts = CONTRASTS
) -> dict[str, dict]:
  """Every contrast over seeds: differences, interval, p, Holm's p.

  Args:
    seeds: arm -> Run, one for every seed; at least two.
    of: which ones.
  """
  made = {}
  for name, (high, low) in of.items():
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
  return peers.table(
    [
      "contrast",
      "difference, points",
      "95 % interval",
      "p (Holm)",
      "each seed",
    ],
    [
      [
        name,
        f"{100 * row['mean']:.1f}",
        f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
        f"{row['p_holm']:.3g}",
        ", ".join(f"{100 * value:.1f}" for value in row["each"]),
      ]
      for name, row in found.items()
    ],
  )


def views_table(views: Mapping[str, Mapping], task: str) -> str:
  """Markdown: arm -> accuracy under every view, %, mean and spread (ddof 1).

  Args:
    views: arm -> "view task" -> accuracies; arms without the task are left out.
    task: which one.
  """
  return peers.table(
    [task, "ordered", *VIEWS[1:]],
    [
      [arm]
      + [mean_sd([100 * v for v in seen[f"{view} {task}"]]) for view in VIEWS]
      for arm, seen in views.items()
      if f"{VIEWS[0]} {task}" in seen
    ],
  )


def bonuses(folder: pathlib.Path) -> dict[str, float]:
  """How the bonuses of right rollouts differ, in the groups that a run kept.

  Groups of one right rollout or none are left out; a run keeps one of every
  update.

  Returns:
    mean, within (groups: standard deviation, ddof 0), between (their means) and
    texts (different completions of a group).
  """
  groups: dict[tuple, list[dict]] = {}
  with (folder / "rollouts.jsonl").open(encoding="utf-8") as file:
    for row in map(json.loads, file):
      if row["stage"] == "rl" and row["rewards"]["accuracy"] > 0.1:
        groups.setdefault((row["step"], row["sample_id"]), []).append(row)
  several = [rows for rows in groups.values() if len(rows) > 1]
  each = [[row["rewards"]["bonus"] for row in rows] for rows in several]
  means = [np.mean(bonus) for bonus in each]
  return {
    "mean": float(np.mean(means)),
    "within": float(np.sqrt(np.mean([np.var(bonus) for bonus in each]))),
    "between": float(np.std(means)),
    "texts": float(
      np.mean([len({row["completion"] for row in rows}) for rows in several])
    ),
  }


def bonus_table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
  """Markdown of `bonuses`: arm -> one a seed; mean and spread (ddof 1)."""
  names = ("mean", "within", "between", "texts")
  return peers.table(
    ["bonus of right rollouts", *names],
    [
      [arm] + [mean_sd([seed[name] for seed in seeds], 3) for name in names]
      for arm, seeds in found.items()
    ],
  )


def habits(folder: pathlib.Path, text: str) -> dict[str, float]:
  """Held-out answers before keyframes: by a short cut, or by looking.

  Args:
    folder: of a finished run, questions with options.
    text: what a completion has in it that takes the short cut.

  Returns:
    Shares: right; short_cut (of all); right_looking (of the others); and right
    where an option is the right one (right_A, right_B, ...).
  """
  with (folder / "predictions.jsonl").open(encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  shown = [row for row in rows if row["view"] == "keyframes"]

  def right(some):
    return float(np.mean([row["correct"] for row in some])) if some else 0.0

  taken = [text in row["completion"] for row in shown]
  looked = [row for row, short in zip(shown, taken, strict=True) if not short]
  letters = sorted({row["answer"] for row in shown})
  return {
    "right": right(shown),
    "short_cut": float(np.mean(taken)),
    "right_looking": right(looked),
  } | {
    f"right_{letter}": right([row for row in shown if row["answer"] == letter])
    for letter in letters
  }


def habit_table(found: Mapping[str, Mapping[str, float]]) -> str:
  """Markdown of `habits`, %: run -> shares."""
  names = list(next(iter(found.values())))
  return peers.table(
    ["run", *names],
    [
      [run] + [f"{100 * shares[name]:.1f}" for name in names]
      for run, shares in found.items()
    ],
  )


def draw(
  seeds: Sequence[Mapping[str, Run]],
  path: pathlib.Path,
  *,
  task: str,
  shown: Mapping[str, str] = SHOWN,
) -> None:
  """The figure: one line a seed over views, a panel for each method."""
  figure, panels = plt.subplots(
    1, len(shown), figsize=(3 * len(shown), 3.2), sharey=True, squeeze=False
  )
  for panel, (arm, title) in zip(panels[0], shown.items(), strict=True):
    for seed in seeds:
      share = [100 * seed[arm][view, task] for view in VIEWS]
      panel.plot(share, marker="o", alpha=0.7)
    panel.axhline(50, color="0.6", linestyle=":")
    panel.set_title(title)
    panel.set_xticks(range(len(VIEWS)), ["ordered", *VIEWS[1:]], rotation=30)
    panel.set_ylim(0, 100)
  panels[0][0].set_ylabel(f"{task}: right, %")
  save(figure, path)


def read_seeds(runs: pathlib.Path) -> dict[str, dict[str, Run]]:
  """Seed -> arm -> Run, of all that is finished."""
  return {
    folder.name: {
      run.parent.name: read(run.parent)
      for run in sorted(folder.glob("*/results.json"))
    }
    for folder in sorted(runs.glob("seed_*"))
  }


def summary(
  study: Study,
  runs: pathlib.Path,
  seeds: Mapping[str, Mapping[str, Run]],
  whole: Sequence[str],
) -> dict:
  """What the whole seeds say.

  Args:
    study: what is compared.
    runs: folder of the seeds.
    seeds: from `read_seeds`.
    whole: names of the seeds with all arms of the study, two or more.

  Returns:
    seeds, contrasts (`contrasts`), views (arm -> "view task" -> accuracies)
    and bonuses (arm -> `bonuses` of each seed, where there are any).
  """
  compared = [seeds[name] for name in whole]
  bonus = {
    arm: [bonuses(runs / name / arm) for name in whole] for arm in study.arms
  }
  return {
    "seeds": list(whole),
    "contrasts": contrasts(compared, study.contrasts),
    "views": {
      arm: {
        f"{view} {task}": [run[arm][view, task] for run in compared]
        for view, task in compared[0][arm]
      }
      for arm in ("cold_start", *study.arms)
      if arm in compared[0]
    },
    "bonuses": {
      arm: each for arm, each in bonus.items() if any(x["mean"] for x in each)
    },
  }


def write_figures(
  study: Study,
  runs: pathlib.Path,
  seeds: Mapping[str, Mapping[str, Run]],
  whole: Sequence[str],
  plots: pathlib.Path,
  name: str,
) -> None:
  """NAME_order.png and NAME_curves.png; arguments as of `summary`."""
  draw(
    [seeds[seed] for seed in whole],
    plots / f"{name}_order.png",
    task=study.task,
    shown=study.shown,
  )
  draw_curves(
    {
      arm: [curve(runs / seed / arm, "reward/correct") for seed in whole]
      for arm in study.arms
    },
    plots / f"{name}_curves.png",
  )


def main() -> None:
  """Prints the tables; writes JSON and the figures where asked."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--runs", type=pathlib.Path, required=True)
  parser.add_argument("--study", choices=STUDIES, default="contrasts")
  parser.add_argument("--out", type=pathlib.Path)
  parser.add_argument("--plots", type=pathlib.Path)
  parser.add_argument("--beside", type=load, default={}, metavar="FILE")
  args = parser.parse_args()
  check_beside(parser, args.beside, PARTS)
  study, whole, made = STUDIES[args.study], [], dict(args.beside)
  seeds = read_seeds(args.runs)
  for name, arms in seeds.items():
    missing = [arm for arm in study.arms if arm not in arms]
    if missing:
      print(f"{name} is left out: no results of {', '.join(missing)}")
    else:
      whole.append(name)
  taken = {
    f"{path.parent.parent.name}/{path.parent.name}": habits(
      path.parent, study.short_cut
    )
    for path in sorted(args.runs.glob("seed_*/*/predictions.jsonl"))
    if study.short_cut
  }
  if len(whole) < 2 and not taken and not made:
    parser.error(
      f"{args.runs} has {len(whole)} whole seeds, expected 2 or more"
    )
  if len(whole) >= 2 and "contrasts" not in made:  # else a pilot
    made |= summary(study, args.runs, seeds, whole)
    if args.plots:
      write_figures(study, args.runs, seeds, whole, args.plots, args.study)
  if args.study == "contrasts":
    made["cells"] = beside(made.get("cells", {}), cells(seeds))
    made["hits"] = beside(made.get("hits", {}), hits(args.runs))
    made["own"] = beside(made.get("own", {}), own(seeds))
    print(describe(made["cells"]), end="\n\n")
  if "contrasts" in made:
    print(table(made["contrasts"]), end="\n\n")
    print(views_table(made["views"], study.task), end="\n\n")
    print(bonus_table(made["bonuses"]))
  if taken:
    print(habit_table(taken))
    made["habits"] = taken
  if args.out:
    write_json(args.out, made)


if __name__ == "__main__":
  main()
