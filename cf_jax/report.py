"""A run as one HTML page, made of the files in its workdir.

It shows what it finds: a run that is not finished has a page without results.
"""

import collections
import datetime
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.ticker
import numpy as np

from cf_jax import figures, pages
from cf_jax.runtime import telemetry

REPORT_FILE = "report.html"
RESULTS_FILE = "results.json"
STRIPS_FOLDER = "film_strips"

_ROWS_AT_ONCE = 256  # of metrics, as dicts in memory
_MOST_POINTS = 2000  # of a curve

# stage -> name -> float64[rows], NaN where a row has none of it.
Metrics = dict[str, dict[str, np.ndarray]]

# What pays a rollout besides its rewards -> what that is called.
_METHODS = {
  "rollout": "KF-GRPO",
  "threshold": "T-GRPO",
  "margin": "GRPO with a margin bonus",
  "none": "GRPO",
}
_BESIDE = {"video": "video (read ahead, beside the rest)"}
_UNITS = {"video": "frames"}  # of the others: tokens
_VIEWS = {
  "keyframes": "{select} keyframes",
  "tad": "TAD keyframes",
  "uniform": "uniform frames",
  "shuffled": "keyframes, shuffled",
  "reversed": "keyframes, reversed",
  "single": "one frame",
  "times": "times only",
  "blind": "no frames",
}

# One panel each: title, axis label, whether it is a share, and (stage, pattern
# of the metric's name, what the series is called; \1 is the pattern's group,
# {stage} the stage's name).
_PANELS = (
  (
    "Accuracy",
    "right answers (%)",
    True,
    (
      ("sft", r"dev_accuracy|accuracy/dev", "{stage}, greedy on dev"),
      ("rl", r"dev_accuracy|accuracy/dev", "{stage}, greedy on dev"),
      ("rl", r"reward/accuracy", "{stage}, sampled in training"),
    ),
  ),
  (
    "Accuracy by task, in training",
    "right answers (%)",
    True,
    (("rl", r"accuracy/(?!dev)(.+)", r"\1"),),
  ),
  ("Reward", "mean reward", False, (("rl", r"reward/mean", "total"),)),
  (
    "Reward parts",
    "mean, unweighted",
    False,
    (("rl", r"reward/(?!mean|std|total)(.+)", r"\1"),),
  ),
  (
    "Contrast bonus",
    "mean bonus",
    False,
    (("rl", r"bonus/(.+)", r"\1"), ("rl", r"bonus", "bonus")),
  ),
  (
    "Distance to the reference",
    "KL (nats per token)",
    False,
    (("rl", r"(?:loss/)?kl", "KL"),),
  ),
  (
    "Entropy",
    "nats per token",
    False,
    (("rl", r"(?:loss/)?entropy", "entropy"),),
  ),
  (
    "Completion length",
    "tokens",
    False,
    (("rl", r"(?:completion/)?length(?:/mean)?", "length"),),
  ),
  (
    "Loss of the cold start",
    "nats per token",
    False,
    (("sft", r"loss", "loss"),),
  ),
)


def method_name(config: Mapping[str, Any]) -> str:
  """What the stage after the cold start is: "KF-GRPO", "T-GRPO", "GRPO", ...

  Args:
    config: of a run, or what its manifest has of it.
  """
  if not {"contrast", "rl"} <= set(config):
    return "reinforcement"
  selector = config.get("selector", {})
  if selector.get("learn") and not selector.get("train_policy"):
    return "TSPO"
  name = _METHODS.get(config["contrast"].get("kind"), "reinforcement")
  if config["rl"].get("advantage") == "reinforce":
    name = "REINFORCE++" if name == "GRPO" else f"{name} by REINFORCE++"
  if config["contrast"].get("placebo", "none") != "none":
    name += " (placebo)"
  if selector.get("learn"):
    name += " and a learned selection"
  return name


def selector_name(config: Mapping[str, Any]) -> str:
  """What a run's keyframes were chosen by: "TAD", "uniform", ..."""
  name = config.get("scan", {}).get("select", "tad")
  return "TAD" if name == "tad" else name


def write_report(
  workdir: str | os.PathLike, *, num_rollouts: int = 8
) -> pathlib.Path:
  """Writes report.html of a run from the files of its workdir.

  Reads metrics.jsonl, results.json, rollouts.jsonl, manifest.json and
  film_strips/*.png with their *.json; whatever is missing is left out.

  Args:
    workdir: folder of the run.
    num_rollouts: completions shown, spread over the updates.

  Returns:
    Path of the page.

  Raises:
    ValueError: the workdir holds none of these files.
  """
  workdir = pathlib.Path(workdir)
  metrics = _columns(telemetry.each_row(workdir / telemetry.METRICS_FILE))
  rollouts = _spread_groups(
    workdir / telemetry.ROLLOUTS_FILE, max(num_rollouts // 2, 1)
  )
  results = _read_json(workdir / RESULTS_FILE)
  manifest = _read_json(workdir / telemetry.MANIFEST_FILE)
  strips = sorted((workdir / STRIPS_FOLDER).glob("*.png"))
  if not (metrics or rollouts or results or manifest or strips):
    raise ValueError(f"{workdir} holds no run to report on; change --workdir")
  config = manifest.get("config", {})
  name = config.get("name") or workdir.resolve().name
  select = selector_name(config)
  names = {"sft": "cold start", "rl": method_name(config)}
  names |= {view: said.format(select=select) for view, said in _VIEWS.items()}
  sections = [
    ("Training", _training(metrics, names)),
    ("Accuracy on held-out videos", _accuracy(results, names)),
    ("What the policy saw", _strips(strips)),
    ("Shortcuts", _probes(results.get("probes", {}))),
    ("Rollouts", _rollouts(rollouts, num_rollouts, names)),
    ("Where the time goes", _times(metrics, results, manifest, names)),
    ("Settings", _settings(manifest)),
  ]
  body = "".join(
    f"<section><h2>{title}</h2>{content}</section>"
    for title, content in sections
    if content
  )
  head = _head(name, results, manifest)
  return pages.write_page(workdir / REPORT_FILE, name, head, body)


def _read_json(path: pathlib.Path) -> dict:
  return json.loads(path.read_text("utf-8")) if path.exists() else {}


def _head(name: str, results: dict, manifest: dict) -> str:
  starts = manifest.get("starts", [])
  about = []
  if starts:
    about.append(starts[-1]["time"].replace("T", " ").replace("+00:00", " UTC"))
    if len(starts) > 1:
      about.append(f"{len(starts)} starts")
    about.append(", ".join(sorted(set(starts[-1].get("devices", [])))))
  if "seed" in manifest:
    about.append(f"seed {manifest['seed']}")
  if not about:
    now = datetime.datetime.now(datetime.UTC)
    about.append(now.isoformat(" ", "minutes").replace("+00:00", " UTC"))
  tiles = "".join(
    f'<div class="tile {"met" if goal["met"] else "missed"}">'
    f"<b>{goal['value']:+.1f}</b>"
    f"<span>points, {pages.escape(goal['name'])}</span>"
    f"<i>{'goal met' if goal['met'] else 'goal missed'}:"
    f" at least {goal['goal']:+g}</i></div>"
    for goal in results.get("goals", [])
  )
  return (
    f"<h1>{pages.escape(name)}</h1>"
    f"<p class='quiet'>{pages.escape(' · '.join(about))}</p>"
    + (f'<div class="tiles">{tiles}</div>' if tiles else "")
  )


# ------------------------------------------------------------------ sections


def _columns(rows: Iterator[dict]) -> Metrics:
  """Metrics by name: a row of a long run is 8 bytes a number, no dict."""
  stages: dict[str, dict[str, list[np.ndarray]]] = {}
  length = collections.Counter()
  while block := list(itertools.islice(rows, _ROWS_AT_ONCE)):
    for stage in dict.fromkeys(row["stage"] for row in block):
      part = [row for row in block if row["stage"] == stage]
      columns = stages.setdefault(stage, {})
      for name in dict.fromkeys(name for row in part for name in row):
        if name != "stage":
          columns.setdefault(name, [np.full(length[stage], np.nan)])
      for name, column in columns.items():
        found = (row.get(name) for row in part)
        column.append(
          np.array(
            [x if isinstance(x, (int, float)) else np.nan for x in found]
          )
        )
      length[stage] += len(part)
  return {
    stage: {name: np.concatenate(column) for name, column in columns.items()}
    for stage, columns in stages.items()
  }


def _training(metrics: Metrics, names: dict[str, str]) -> str:
  if not metrics:
    return ""
  offset, updates = {}, 0
  for stage, columns in metrics.items():
    offset[stage] = updates
    updates += int(columns["step"].max())
  panels = []
  for title, label, share, sources in _PANELS:
    series = _series(metrics, sources, names)
    if series:
      panels.append(
        pages.svg_panel(
          f"{title} over the updates",
          lambda axes, s=series, t=title, y=label, p=share: _curves(
            axes, s, offset, names, title=t, label=y, share=p
          ),
        )
      )
  return (
    "<p>Thin: every logged update. Thick: their running mean.</p>"
    f'<div class="grid">{"".join(panels)}</div>'
  )


def _series(
  metrics: Metrics,
  sources: Sequence[tuple[str, str, str]],
  names: dict[str, str],
) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
  """(label, stage, step[n], value[n]) of every metric a panel shows."""
  found = []
  for stage, pattern, label in sources:
    columns = metrics.get(stage, {})
    for name, value in columns.items():
      match = re.fullmatch(pattern, name)
      measured = ~np.isnan(value)
      if match and measured.any():
        label_of = label.replace("{stage}", names.get(stage, stage))
        step = columns["step"][measured]
        found.append((match.expand(label_of), stage, step, value[measured]))
  return found[: len(figures.SERIES)]


def _curves(axes, series, offset, names, *, title, label, share) -> None:
  used = {stage for _, stage, _, _ in series}
  start = min(offset[stage] for stage in used)
  for color, (name, stage, step, value) in zip(
    figures.SERIES, series, strict=False
  ):
    x = step + offset[stage] - start
    y = 100 * value if share else value
    window = max(len(y) // 20, 1)
    alpha = 0.35 if window > 1 else 1
    axes.plot(*_outline(x, y), color=color, linewidth=0.7, alpha=alpha)
    few = {"marker": "o", "markersize": 3.5} if len(y) <= 30 else {}
    axes.plot(
      *_outline(x, _running_mean(y, window)),
      color=color,
      linewidth=1.8,
      label=name,
      **few,
    )
  for stage in used:
    if offset[stage] > start:
      axes.axvline(
        offset[stage] - start,
        color=figures.MUTED,
        linewidth=0.8,
        linestyle=(0, (2, 2)),
      )
      axes.annotate(
        f"{names.get(stage, stage)} ",
        (offset[stage] - start, 1.0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(3, 0),
        textcoords="offset points",
        fontsize=8,
        color=figures.MUTED,
        va="top",
      )
  axes.set_title(title)
  axes.set_ylabel(label)
  told = [names.get(stage, stage) for stage in offset if stage in used]
  axes.set_xlabel(f"updates ({', then '.join(told)})")
  axes.grid(axis="y", color=figures.RULE, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
  if share:
    axes.set_ylim(-2, 102)
  if len(series) > 1:
    axes.legend(fontsize=8, loc="best", handlelength=1.4)


def _outline(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """What a curve of any length looks like in a panel, in a few points.

  Of each of `_MOST_POINTS` / 2 stretches, the lowest and the highest point: a
  panel has fewer columns of pixels, and a page does not grow with its run.
  """
  if len(y) <= _MOST_POINTS:
    return x, y
  kept = [
    part[[np.argmin(y[part]), np.argmax(y[part])]]
    for part in np.array_split(np.arange(len(y)), _MOST_POINTS // 2)
  ]
  index = np.unique([0, *np.concatenate(kept), len(y) - 1])
  return x[index], y[index]


def _running_mean(value: np.ndarray, window: int) -> np.ndarray:
  """Centred mean over up to `window` neighbours; shorter at the ends."""
  total = np.concatenate([[0.0], np.cumsum(value)])
  index = np.arange(len(value))
  low = np.maximum(index - window // 2, 0)
  high = np.minimum(index + (window + 1) // 2, len(value))
  return (total[high] - total[low]) / np.maximum(high - low, 1)


def _accuracy(results: dict, names: dict[str, str]) -> str:
  rows = results.get("evaluations", [])
  if not rows:
    return ""
  chance = results.get("chance", {})
  found = {(row["task"], row["view"], row["stage"]): row for row in rows}
  tasks = sorted({row["task"] for row in rows} - {"all"})
  tasks += ["all"] if any(row["task"] == "all" for row in rows) else []
  views = list(dict.fromkeys(row["view"] for row in rows))
  stages = list(dict.fromkeys(row["stage"] for row in rows))
  panels = "".join(
    pages.svg_panel(
      f"Accuracy on {task} before and after RL",
      lambda axes, t=task: _dumbbells(
        axes, t, views, stages, found, chance.get(t), names
      ),
      height=0.8 + 0.34 * len(views),
    )
    for task in tasks
  )

  def cell(task, view):
    shares = [
      pages.percent(found.get((task, view, stage), {}).get("accuracy"))
      for stage in stages
    ]
    return " → ".join(share.removesuffix(" %") for share in shares)

  counts = {
    task: max(row.get("count", 0) for row in rows if row["task"] == task)
    for task in tasks
  }
  table = pages.html_table(
    ["view", *(f"{pages.escape(task)} (n = {counts[task]})" for task in tasks)],
    [
      *(
        [pages.escape(names.get(view, view)), *(cell(t, view) for t in tasks)]
        for view in views
      ),
      [
        "<i>chance</i>",
        *(
          f"<i>{pages.percent(chance.get(t)).removesuffix(' %')}</i>"
          for t in tasks
        ),
      ],
    ],
  )
  order = " → ".join(names.get(stage, stage) for stage in stages)
  return (
    "<p>Bars are 95 % intervals over the videos; the dashed line is chance."
    f'</p><div class="grid">{panels}</div>'
    f"<p>Accuracy in percent, {pages.escape(order)}.</p>{table}"
  )


def _dumbbells(axes, task, views, stages, found, chance, names) -> None:
  """Accuracy of each view before (hollow) and after RL (filled)."""
  if chance is not None:
    axes.axvline(
      100 * chance,
      color=figures.MUTED,
      linewidth=0.9,
      linestyle=(0, (4, 3)),
      zorder=1,
    )
  spread = 0.13 if len(stages) > 1 else 0.0
  for place, stage in enumerate(stages):
    last = place == len(stages) - 1
    color = figures.BLUE if last else figures.GREY
    points = [
      (row, found[task, view, stage])
      for row, view in enumerate(views)
      if (task, view, stage) in found
    ]
    y = [row + (spread if last else -spread) for row, _ in points]
    x = [100 * result["accuracy"] for _, result in points]
    for height, at, (_, result) in zip(y, x, points, strict=True):
      low, high = (100 * result.get(key, at / 100) for key in ("low", "high"))
      axes.plot(
        [low, high],
        [height] * 2,
        color=color,
        linewidth=1.6,
        alpha=0.5,
        solid_capstyle="butt",
      )
    axes.plot(
      x,
      y,
      linestyle="none",
      marker="o",
      markersize=5.5,
      color=color,
      markerfacecolor=color if last else "white",
      markeredgewidth=1.5,
      label=names.get(stage, stage),
      zorder=3,
    )
  axes.set_yticks(range(len(views)), [names.get(view, view) for view in views])
  axes.tick_params(axis="y", length=0, labelcolor=figures.INK)
  axes.set_ylim(len(views) - 0.5, -0.5)
  axes.set_xlim(0, 100)
  axes.set_xlabel("right answers (%)")
  axes.set_title("all tasks" if task == "all" else task)
  axes.spines["left"].set_visible(False)
  axes.grid(axis="x", color=figures.RULE, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.legend(
    fontsize=8,
    loc="lower right",
    bbox_to_anchor=(1.0, 1.0),
    ncols=len(stages),
    handletextpad=0.2,
    columnspacing=1.2,
    borderaxespad=0.3,
  )


def _strips(paths: list[pathlib.Path]) -> str:
  strips = []
  for path in paths:
    about = _read_json(path.with_suffix(".json"))
    caption = "".join(
      f"<span><b>{pages.escape(key.replace('_', ' '))}</b>"
      f" {pages.escape(_flat(value))}</span>"
      for key, value in about.items()
      if value not in (None, "", [])
    )
    uri = pages.data_uri(path.read_bytes(), "image/png")
    strips.append(
      f'<figure><div class="scroll wide"><img src="{uri}" alt="Uniform frames'
      f' and keyframes of {pages.escape(path.stem)} over the score curve">'
      f"</div><figcaption>{caption}</figcaption></figure>"
    )
  if not strips:
    return ""
  return (
    "<p>Uniform frames against keyframes of the same number. A frame"
    " with an amber border was taken while the event was to be seen.</p>"
    + "".join(strips)
  )


def _flat(value: Any) -> str:
  if isinstance(value, (list, tuple)):
    return " | ".join(pages.number(item) for item in value)
  return pages.number(value)


def _probes(probes: dict) -> str:
  if not probes:
    return ""
  rows = []
  for name, probe in probes.items():
    half = probe.get("half_interval") or 0.0
    fair = abs(probe["accuracy"] - probe["chance"]) <= half
    rows.append(
      [
        pages.escape(name.replace("_", " ")),
        f"{pages.percent(probe['accuracy'])} ± {100 * half:.1f}",
        pages.percent(probe["chance"]),
        '<span class="ok">at chance</span>'
        if fair
        else '<span class="bad">not at chance</span>',
      ]
    )
  return (
    "<p>What can be answered without seeing the video as it was. A fair set"
    " of questions keeps each of these within its interval of chance.</p>"
    + pages.html_table(["probe", "accuracy", "chance", "verdict"], rows)
  )


def _spread_groups(path: pathlib.Path, count: int) -> dict[tuple, list[dict]]:
  """The rollouts of at most `count` groups, spread over the updates.

  Two readings of the file, as it may be larger than what memory is for.
  """

  def key(row):
    return row["stage"], row["step"], row.get("sample_id"), row.get("prompt")

  # Of a prompt, its hash: a group is told by it in this process alone.
  seen = list(dict.fromkeys(hash(key(r)) for r in telemetry.each_row(path)))
  places = np.linspace(0, len(seen) - 1, min(count, len(seen)))
  wanted = {seen[place] for place in places.round().astype(int)}
  groups: dict[tuple, list[dict]] = {}
  for row in telemetry.each_row(path):
    if hash(key(row)) in wanted:
      groups.setdefault(key(row), []).append(row)
  return groups


def _rollouts(
  groups: dict[tuple, list[dict]], limit: int, names: dict[str, str]
) -> str:
  """The best and the worst completion of some groups."""
  if not groups or limit < 1:
    return ""
  cards = []
  for key, rows in groups.items():
    ranked = sorted(rows, key=_total, reverse=True)
    shown = [ranked[0]]
    if _total(ranked[-1]) < _total(ranked[0]) and limit > 1:
      shown.append(ranked[-1])
    cards.append(_card(key, len(ranked), shown, names))
  return (
    "<p>Of some groups, the completion with the most and the one with the"
    f' least reward.</p><div class="grid">{"".join(cards)}</div>'
  )


def _total(row: dict) -> float:
  rewards = row.get("rewards") or {}
  if rewards.get("total") is not None:
    return rewards["total"]
  return sum(value or 0.0 for value in rewards.values())


def _card(
  key: tuple, size: int, shown: list[dict], names: dict[str, str]
) -> str:
  stage, step = key[:2]
  first = shown[0]
  seconds = first.get("keyframe_s") or []
  answer = first.get("answer")
  completions = "".join(
    f"<pre>{pages.escape(_cut(row.get('completion', '')))}</pre>"
    "<p class='parts'>"
    + "".join(
      f"<span>{pages.escape(name)}"
      f" <b>{pages.escape(pages.number(value))}</b></span>"
      for name, value in (row.get("rewards") or {}).items()
    )
    + "</p>"
    for row in shown
  )
  return (
    '<article><p class="quiet">'
    f"{pages.escape(names.get(stage, stage))}, update {step},"
    f" {pages.escape(first.get('task', ''))}, group of {size}</p>"
    f'<pre class="prompt">{pages.escape(_cut(first.get("prompt", "")))}</pre>'
    + (
      f"<p class='quiet'>answer: {pages.escape(answer)}</p>"
      if answer is not None
      else ""
    )
    + (
      "<p class='quiet'>keyframes at"
      f" {pages.escape(', '.join(f'{s:.1f}' for s in seconds))} s</p>"
      if seconds
      else ""
    )
    + completions
    + "</article>"
  )


def _cut(text: str, limit: int = 1500) -> str:
  if len(text) <= limit:
    return text
  return f"{text[:limit]} … ({len(text) - limit} more characters)"


def _times(
  metrics: Metrics, results: dict, manifest: dict, names: dict[str, str]
) -> str:
  """Medians over the updates, which compiling does not move.

  Seconds of each phase and, where they were counted, its share of the
  operations, its rate and its utilisation.
  """
  made = []
  timing = results.get("timing", {})
  for stage, columns_of in metrics.items():
    seconds = _medians(columns_of, "time/", "_s")
    if not max(seconds.values(), default=0.0) > 0:
      continue
    title = names.get(stage, stage)
    shares = {
      "of the seconds": _time_shares(columns_of),
      "of the operations": _medians(columns_of, "work/", ""),
    }
    shares = {name: share for name, share in shares.items() if share}
    columns = {
      "median of an update": {
        phase: f"{value:.3f} s" for phase, value in seconds.items()
      },
      **{
        name: {phase: f"{value:.1%}" for phase, value in share.items()}
        for name, share in shares.items()
      },
      "a second": {
        phase: f"{value:,.0f} {_UNITS.get(phase, 'tokens')}"
        for phase, value in _medians(columns_of, "rate/", "_per_s").items()
      },
      "of the peak (MFU)": {
        phase: f"{value:.1%}"
        for phase, value in _medians(columns_of, "mfu/", "").items()
      },
    }
    columns = {name: cells for name, cells in columns.items() if cells}
    order = sorted(seconds.keys() - {"step"}, key=lambda name: -seconds[name])
    labels = {phase: pages.escape(_BESIDE.get(phase, phase)) for phase in order}
    if "step" in seconds:
      labels["step"] = "<i>whole update</i>"
    if shares:
      made.append(
        pages.svg_panel(
          f"What each phase of an update takes, {title}",
          lambda axes, t=title, s=shares: _stacked(axes, s, title=t),
          width=10.0,
          height=1.0 + 0.4 * len(shares),
        )
      )
    made.append(
      pages.html_table(
        [pages.escape(title), *columns],
        [
          [label, *(cells.get(phase, "") for cells in columns.values())]
          for phase, label in labels.items()
        ],
      )
    )
  peak = (manifest.get("starts") or [{}])[-1].get("peak")
  if made and peak:
    timing = timing | {
      "peak": f"{peak['flops_per_s'] / 1e12:.3g} TFLOP/s ({peak['source']})"
    }
  if timing:
    made.append(
      pages.html_table(
        ["run", ""],
        [
          [
            pages.escape(name.removesuffix("_s").replace("_", " ")),
            telemetry.clock(value)
            if name.endswith("_s")
            else pages.escape(
              value if isinstance(value, str) else pages.number(value)
            ),
          ]
          for name, value in timing.items()
          if value is not None
        ],
      )
    )
  if not made:
    return ""
  return (
    "<p>Operations are those of the matmuls that real tokens need, each pass"
    " once. Seconds that no phase has are between the phases.</p>"
    + "".join(made)
  )


def _time_shares(columns: dict[str, np.ndarray]) -> dict[str, float]:
  """Median share of a step's seconds of every phase that is part of it."""
  whole = columns.get("time/step_s", np.empty(0))
  timed = whole > 0
  divided = {
    name: column[timed] / whole[timed]
    for name, column in columns.items()
    if name.startswith("time/") and timed.any()
  }
  shares = _medians(divided, "time/", "_s")
  return {
    phase: share
    for phase, share in shares.items()
    if phase != "step" and phase not in _BESIDE
  }


def _stacked(axes, bars: dict[str, dict[str, float]], *, title: str) -> None:
  """A bar of 100 % for each entry, cut into phases."""
  phases = list(dict.fromkeys(phase for bar in bars.values() for phase in bar))
  # Phases with counted operations first, in the loop's order, in colours.
  counted = [phase for phase in phases if phase in [*bars.values()][-1]]
  others = [phase for phase in phases if phase not in counted]
  bright = ("#2f93a8", *figures.SERIES[1:-1], figures.BLUE)
  colors = dict(zip(counted, itertools.cycle(bright), strict=False))
  greys = ("#5f6b77", "#a3adb7", "#c3cad2")
  colors |= dict(zip(others, itertools.cycle(greys), strict=False))
  for row, bar in enumerate(bars.values()):
    start = 0.0
    for phase in [*counted, *others]:
      width = 100 * bar.get(phase, 0.0)
      axes.barh(
        row,
        width,
        left=start,
        height=0.62,
        color=colors[phase],
        edgecolor="white",
        linewidth=0.8,
        label=phase if row == 0 else None,
      )
      if width >= 5:
        axes.text(
          start + width / 2,
          row,
          f"{width:.0f}",
          ha="center",
          va="center",
          color="white",
          fontsize=8.5,
        )
      start += width
  axes.set_yticks(range(len(bars)), list(bars))
  axes.tick_params(axis="y", length=0, labelcolor=figures.INK)
  axes.set_ylim(len(bars) - 0.5, -0.5)
  axes.set_xlim(0, 100)
  axes.set_xlabel("share of an update (%)")
  axes.set_title(title)
  axes.spines["left"].set_visible(False)
  axes.legend(
    fontsize=8.5,
    loc="lower right",
    bbox_to_anchor=(1.0, 1.0),
    ncols=len(phases),
    handlelength=0.9,
    handletextpad=0.4,
    columnspacing=1.2,
    borderaxespad=0.3,
  )


def _medians(
  columns: dict[str, np.ndarray], prefix: str, suffix: str
) -> dict[str, float]:
  """Medians of the metrics named so, without prefix and suffix."""
  return {
    name[len(prefix) : len(name) - len(suffix)]: float(np.nanmedian(column))
    for name, column in columns.items()
    if name.startswith(prefix)
    and name.endswith(suffix)
    and not np.isnan(column).all()
  }


def _settings(manifest: dict) -> str:
  if not manifest:
    return ""
  starts = manifest.get("starts", [])
  config = pages.html_table(
    ["setting", "value"],
    [
      [
        f"<code>{pages.escape(key)}</code>",
        f"<code>{pages.escape(value)}</code>",
      ]
      for key, value in pages.leaves(manifest.get("config", {}))
    ],
  )
  begun = pages.html_table(
    ["start", "revision", "command"],
    [
      [
        pages.escape(start["time"]),
        pages.escape((start.get("git") or "–")[:12]),
        f"<code>{pages.escape(' '.join(start.get('argv', [])))}</code>",
      ]
      for start in starts
    ],
  )
  versions = ", ".join(
    f"{name} {version}"
    for name, version in (starts[-1]["versions"] if starts else {}).items()
  )
  return (
    f"<p>Data {pages.escape(manifest.get('data_hash', '–'))}, seed"
    f" {pages.escape(manifest.get('seed', '–'))}. {pages.escape(versions)}.</p>"
    f'{begun}<details class="left"><summary>All settings</summary>{config}'
    "</details>"
  )
