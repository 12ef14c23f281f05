"""A run as one HTML page, and the film strip of one video.

The page is self-contained (pictures are data URIs, the style is inline, there
is no script), so it opens offline and can be mailed. It shows what it finds: a
run that is not finished has a page without results.

Axes: `T` scanned frames, `K` frames shown.
"""

import base64
import collections
import datetime
import html
import io
import itertools
import json
import os
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.axes
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
import matplotlib.figure
import matplotlib.gridspec
import matplotlib.patches
import matplotlib.ticker
import numpy as np

from cf_jax import disk
from cf_jax.runtime import telemetry

REPORT_FILE = "report.html"
RESULTS_FILE = "results.json"
STRIPS_FOLDER = "film_strips"

_INK = "#1c2733"
_MUTED = "#66727f"
_RULE = "#dfe4ea"
_BLUE = "#1f5fa8"  # TAD, and the policy after RL
_GREY = "#8b97a3"  # uniform, and the policy before RL
_AMBER = "#e8a33d"  # what is true: events
_PARTS = (_BLUE, "#c3cad1", _GREY, _AMBER)  # kept, and what was not
_SERIES = (_BLUE, "#c8553d", "#3f8f6b", "#8a5fa8", _AMBER, _GREY)

_STYLE = {
  "axes.edgecolor": _MUTED,
  "axes.labelcolor": _MUTED,
  "axes.linewidth": 0.8,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlecolor": _INK,
  "axes.titlelocation": "left",
  "axes.titlesize": 10.5,
  "axes.titleweight": "bold",
  "figure.facecolor": "white",
  "font.family": "DejaVu Sans",
  "font.size": 9,
  "legend.frameon": False,
  "svg.hashsalt": "cf_jax",
  "text.parse_math": False,  # "$" in a name of others begins no formula
  "text.color": _INK,
  "xtick.color": _MUTED,
  "ytick.color": _MUTED,
}

_ROWS_AT_ONCE = 256  # of metrics, as dicts in memory
_MOST_POINTS = 2000  # of a curve
_STRIP_COLUMNS = 8  # keyframes side by side; more go into further rows

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


# ---------------------------------------------------------------- film strip


def film_strip(
  path: str | os.PathLike,
  *,
  uniform_frames: np.ndarray,
  uniform_s: Sequence[float],
  tad_frames: np.ndarray,
  tad_s: Sequence[float],
  score: np.ndarray,
  time_s: np.ndarray,
  apex: np.ndarray,
  events: Sequence[tuple[float, float, str]] = (),
  label: str = "TAD",
  score_name: str = "variation score",
  about: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Draws uniform frames against keyframes over their score curve.

  A frame taken while an event was to be seen has an amber frame around it.

  Args:
    path: of the PNG.
    uniform_frames: uint8[K, height, width, 3] RGB.
    uniform_s: [K] their times in seconds.
    tad_frames: uint8[K', height, width, 3] RGB; K' <= K where a video is short.
    tad_s: [K'] their times in seconds, ascending.
    score: float[T] curve.
    time_s: float[T] times of the scanned frames in seconds.
    apex: bool[T] inflections.
    events: (start_s, end_s, label) of what really happened, if known.
    label: what chose the keyframes.
    score_name: label of the curve's axis.
    about: question, options, answer, caption, ...: kept as JSON beside the PNG
      and shown by the page.

  Returns:
    The path.

  Raises:
    ValueError: frames and times, or the curve's arrays, differ in length.
  """
  path = pathlib.Path(path)
  score, time_s = np.asarray(score, float), np.asarray(time_s, float)
  apex = np.asarray(apex, bool)
  _check_lengths(uniform_frames=len(uniform_frames), uniform_s=len(uniform_s))
  _check_lengths(tad_frames=len(tad_frames), tad_s=len(tad_s))
  _check_lengths(score=len(score), time_s=len(time_s), apex=len(apex))
  columns = max(len(uniform_frames), len(tad_frames), 1)
  height, width = np.shape(uniform_frames)[1:3]
  cell = 10.6 / columns  # inches
  row = min(cell * height / width, 2.4)
  page = 2 * row + 0.40 + 2.35 + 0.24 + 0.46  # with the margins below
  with matplotlib.rc_context(_STYLE):
    figure = matplotlib.figure.Figure(figsize=(11.6, page))
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    rows = matplotlib.gridspec.GridSpec(
      4,
      1,
      figure=figure,
      height_ratios=[row, 0.40, row, 2.35],
      left=0.085,
      right=0.995,
      top=1 - 0.24 / page,
      bottom=0.46 / page,
      hspace=0.0,
    )
    _frame_row(
      figure,
      rows[0],
      columns,
      uniform_frames,
      uniform_s,
      events,
      "uniform",
      _GREY,
    )
    shown = _frame_row(
      figure, rows[2], columns, tad_frames, tad_s, events, label, _BLUE
    )
    lower = matplotlib.gridspec.GridSpecFromSubplotSpec(
      2, 1, rows[3], height_ratios=[0.4, 1.95], hspace=0
    )
    axes = figure.add_subplot(lower[1])
    marks = [
      (f"{label} keyframe", tad_s, _BLUE),
      ("uniform frame", uniform_s, _GREY),
    ]
    _curve(axes, score, time_s, apex, events, marks, score_name)
    _connect(shown, axes, tad_s)
    disk.write(path, lambda file: figure.savefig(file, dpi=110, format="png"))
  if about is not None:
    telemetry.write_json(path.with_suffix(".json"), about)
  return path


def keyframe_strip(
  path: str | os.PathLike,
  *,
  frames: np.ndarray,
  frame_s: Sequence[float],
  score: np.ndarray,
  time_s: np.ndarray,
  apex: np.ndarray,
  label: str = "TAD",
  score_name: str = "variation score",
) -> pathlib.Path:
  """Draws the keyframes of one video over its score curve.

  Args:
    path: of the PNG.
    frames: uint8[K, height, width, 3] RGB.
    frame_s: [K] their times in seconds, ascending.
    score: float[T] curve.
    time_s: float[T] times of the scanned frames in seconds.
    apex: bool[T] inflections.
    label: what chose the frames.
    score_name: label of the curve's axis.

  Returns:
    The path.

  Raises:
    ValueError: frames and times, or the curve's arrays, differ in length.
  """
  path = pathlib.Path(path)
  score, time_s = np.asarray(score, float), np.asarray(time_s, float)
  apex = np.asarray(apex, bool)
  _check_lengths(frames=len(frames), frame_s=len(frame_s))
  _check_lengths(score=len(score), time_s=len(time_s), apex=len(apex))
  columns = min(len(frames), _STRIP_COLUMNS)
  lines = -(-len(frames) // columns)
  height, width = np.shape(frames)[1:3]
  # Inches: each line of pictures has its times above, and a gap below.
  cell = min(10.6 / columns, 3.2)
  line = min(cell * height / width, 3.2) + 0.24
  page = lines * line + 2.35 + 0.46
  with matplotlib.rc_context(_STYLE):
    figure = matplotlib.figure.Figure(figsize=(11.6, page))
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    rows = matplotlib.gridspec.GridSpec(
      lines + 1,
      1,
      figure=figure,
      height_ratios=[line] * lines + [2.35],
      left=0.085,
      right=0.995,
      top=1 - 0.24 / page,
      bottom=0.46 / page,
      hspace=0.0,
    )
    for n in range(lines):
      part = slice(n * columns, (n + 1) * columns)
      shown = _frame_row(
        figure,
        matplotlib.gridspec.GridSpecFromSubplotSpec(
          2, 1, rows[n], height_ratios=[line - 0.24, 0.24], hspace=0
        )[0],
        columns,
        frames[part],
        frame_s[part],
        (),
        label if n == 0 else "",
        _BLUE,
      )
    lower = matplotlib.gridspec.GridSpecFromSubplotSpec(
      2, 1, rows[lines], height_ratios=[0.4, 1.95], hspace=0
    )
    axes = figure.add_subplot(lower[1])
    marks = [(f"{label} keyframe", frame_s, _BLUE)]
    _curve(axes, score, time_s, apex, (), marks, score_name)
    if lines == 1:  # lines would cross the pictures of further rows
      _connect(shown, axes, frame_s)
    disk.write(path, lambda file: figure.savefig(file, dpi=110, format="png"))
  return path


# ---------------------------------------------------------------- histograms


class Histogram(NamedTuple):
  """One panel of `histograms`.

  Attributes:
    title: of the panel.
    label: of the horizontal axis.
    edges: float[bins + 1].
    parts: name -> values; the parts are stacked, the first one at the bottom.
    limit: where a line is drawn, or None.
  """

  title: str
  label: str
  edges: np.ndarray
  parts: dict[str, Sequence[float]]
  limit: float | None


def histograms(
  path: str | os.PathLike, panels: Sequence[Histogram], *, count_label: str
) -> pathlib.Path:
  """Draws stacked histograms side by side.

  Args:
    path: of the PNG.
    panels: at least one.
    count_label: what is counted.

  Returns:
    The path.
  """
  path = pathlib.Path(path)
  with matplotlib.rc_context(_STYLE):
    figure = matplotlib.figure.Figure(
      figsize=(5.4 * len(panels), 3.2), layout="constrained"
    )
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    for number, panel in enumerate(panels, start=1):
      axes = figure.add_subplot(1, len(panels), number)
      axes.hist(
        list(panel.parts.values()),
        bins=panel.edges,
        stacked=True,
        rwidth=0.9,
        color=[_PARTS[n % len(_PARTS)] for n in range(len(panel.parts))],
        label=[f"{name} ({len(v)})" for name, v in panel.parts.items()],
      )
      if panel.limit is not None:
        axes.axvline(panel.limit, color=_INK, linewidth=1, linestyle=":")
      axes.set_title(panel.title)
      axes.set_xlabel(panel.label)
      axes.set_ylabel(count_label)
      axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
      axes.legend(fontsize=8)
    disk.write(path, lambda file: figure.savefig(file, dpi=110, format="png"))
  return path


def _check_lengths(**lengths: int) -> None:
  if len(set(lengths.values())) > 1:
    found = ", ".join(f"{name} {size}" for name, size in lengths.items())
    raise ValueError(f"film_strip: expected equal lengths, got {found}")


def _frame_row(
  figure, spec, columns, frames, seconds, events, label, color
) -> list[matplotlib.axes.Axes]:
  grid = matplotlib.gridspec.GridSpecFromSubplotSpec(
    1, columns, spec, wspace=0.06
  )
  made = []
  for column, (frame, second) in enumerate(zip(frames, seconds, strict=True)):
    axes = figure.add_subplot(grid[column])
    axes.imshow(frame, interpolation="bilinear")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(
      f"{second:.2f} s",
      loc="center",
      fontsize=8.5,
      color=color,
      pad=3,
      fontweight="normal",
    )
    hit = any(
      start <= second < max(end, start + 1e-9) for start, end, _ in events
    )
    for spine in axes.spines.values():
      spine.set_visible(True)
      spine.set_edgecolor(_AMBER if hit else _RULE)
      spine.set_linewidth(3.0 if hit else 0.8)
    made.append(axes)
  if made:
    made[0].set_ylabel(
      label,
      rotation=0,
      ha="right",
      va="center",
      fontsize=10,
      fontweight="bold",
      color=color,
      labelpad=8,
    )
  return made


def _connect(shown, axes, seconds) -> None:
  """A line from each frame down to its time on the curve."""
  for cell_axes, second in zip(shown, seconds, strict=True):
    axes.add_artist(
      matplotlib.patches.ConnectionPatch(
        (0.5, 0.0),
        (second, 1.0),
        "axes fraction",
        axes.get_xaxis_transform(),
        axesA=cell_axes,
        axesB=axes,
        color=_BLUE,
        linewidth=0.8,
        alpha=0.55,
        clip_on=False,
      )
    )


def _curve(axes, score, time_s, apex, events, marks, score_name) -> None:
  """The score over time; `marks` are (label, seconds, color) below it."""
  label = "true event"
  for start, end, name in events:
    axes.axvspan(start, end, color=_AMBER, alpha=0.28, linewidth=0, label=label)
    axes.annotate(
      name,
      ((start + end) / 2, 1),
      xycoords=axes.get_xaxis_transform(),
      xytext=(0, -2),
      textcoords="offset points",
      ha="center",
      va="top",
      fontsize=8,
      color="#8a5a0a",
    )
    label = None
  axes.plot(time_s, score, color=_INK, linewidth=1.3)
  axes.plot(
    time_s[apex],
    score[apex],
    linestyle="none",
    marker="^",
    markersize=6,
    color="#c8553d",
    markeredgecolor="white",
    markeredgewidth=0.6,
    label="apex",
    zorder=4,
  )
  strip = {"linestyle": "none", "clip_on": False, "zorder": 5}
  # Rounding of a constant curve is no shape.
  top = max(float(np.nanmax(score, initial=0.0)), 1e-3)
  axes.set_ylim(-0.14 * top, 1.22 * top)
  for row, (label, seconds, color) in enumerate(marks, start=1):
    axes.plot(
      seconds,
      [-0.05 * row * top] * len(seconds),
      marker="|",
      markersize=9,
      markeredgewidth=2.2,
      color=color,
      label=label,
      **strip,
    )
  if len(time_s) > 1:
    axes.set_xlim(time_s[0], time_s[-1])
  axes.set_xlabel("time (s)")
  axes.set_ylabel(score_name)
  axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3, prune="lower"))
  axes.legend(
    loc="upper right",
    bbox_to_anchor=(1.0, -0.08),
    ncols=4,
    fontsize=8,
    handletextpad=0.4,
    columnspacing=1.4,
    borderaxespad=0.2,
  )


# ---------------------------------------------------------------------- page


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
  with matplotlib.rc_context(_STYLE):
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
  return write_page(workdir / REPORT_FILE, name, head, body)


def keyframe_page(
  path: str | os.PathLike,
  *,
  title: str,
  records: Mapping[str, dict],
  failed: Mapping[str, str],
  settings: Mapping[str, Any],
) -> pathlib.Path:
  """Writes the page over the keyframes of some videos.

  Pictures are linked, not held: the page moves together with its folder.

  Args:
    path: of the page; the files of a video lie beside it, in a folder of the
      video's name.
    title: heading.
    records: name of a video -> its keyframes.json.
    failed: name of a video -> what went wrong.
    settings: of all of them.

  Returns:
    The path.
  """
  path = pathlib.Path(path)
  sections = [
    ("", name, _one_video(name, row)) for name, row in records.items()
  ]
  if failed:
    rows = [[escape(cell) for cell in row] for row in failed.items()]
    table = html_table(["video", "what went wrong"], rows)
    sections.insert(0, ("left", "Failed", table))
  rows = [
    [f"<code>{escape(cell)}</code>" for cell in row]
    for row in _leaves(dict(settings))
  ]
  sections.append(("left", "Settings", html_table(["setting", "value"], rows)))
  body = "".join(
    f'<section class="{kind}"><h2>{escape(heading)}</h2>{content}</section>'
    for kind, heading, content in sections
  )
  count = sum(len(record["keyframes"]) for record in records.values())
  videos = "video" if len(records) == 1 else "videos"
  head = (
    f"<h1>{escape(title)}</h1><p class='quiet'>{count} keyframes of"
    f" {len(records)} {videos}</p>"
  )
  return write_page(path, title, head, body)


def _one_video(name: str, record: dict) -> str:
  """Facts, film strip and keyframes of one video."""
  about = record["video"]
  changes = ", variable" if about["variable_fps"] else ""
  turned = f", turned by {about['rotation']}°" if about["rotation"] else ""
  facts = {
    "frames": f"{about['num_frames']}, {record['num_scanned']} scanned",
    "length": f"{about['duration_s']:.2f} s",
    "frames a second": f"{about['fps']:.4g}{changes}",
    "size": f"{about['width']} × {about['height']} px{turned}",
    "codec": about["codec"],
    "apexes": len(record["apexes"]),
  }
  caption = "".join(
    f"<span><b>{escape(key)}</b> {escape(value)}</span>"
    for key, value in facts.items()
  )
  problem = about["problem"]

  def link(file: str) -> str:
    return escape(urllib.parse.quote(f"{name}/{file}"))

  strip = link(record["film_strip"])
  rows = [
    [
      f'<a href="{link(row["file"])}">frame {row["frame_index"]}</a>',
      f"{row['timestamp']:.3f}",
      f"{row['segment']['start']:.2f} – {row['segment']['end']:.2f}",
      f"{row['apex']['timestamp']:.3f}" if row["apex"] else "–",
      f"{row['score']:.2f}",
      f"{row['saliency']:.2f}",
    ]
    for row in record["keyframes"]
  ]
  head = ("keyframe", "time (s)", "segment (s)", "opened by the apex at (s)")
  table = html_table([*head, "score", "saliency"], rows)
  return (
    (f'<p class="bad">{escape(problem)}</p>' if problem else "")
    + f'<figure><a href="{strip}"><img loading="lazy" src="{strip}"'
    f' alt="Keyframes of {escape(name)} over the score curve"></a>'
    f"<figcaption>{caption}</figcaption></figure>"
    f"<details><summary>Keyframes</summary>{table}</details>"
  )


def amplify_page(
  path: str | os.PathLike, title: str, rows: Sequence[Mapping[str, Any]]
) -> pathlib.Path:
  """Writes the page of an iterated amplification.

  Args:
    path: of the page; the folders of the stages lie beside it.
    title: heading.
    rows: of `programs/amplify.py`, for every stage and task.

  Returns:
    The path.
  """
  path = pathlib.Path(path)
  stages = list(dict.fromkeys(row["after"] for row in rows))
  tasks = list(dict.fromkeys(row["task"] for row in rows))
  lines = {
    "accuracy, chosen frames": ("accuracy/chosen", _BLUE),
    "accuracy, uniform frames": ("accuracy/uniform", _GREY),
    "chosen frames with evidence": ("evidence/chosen", _AMBER),
  }

  def draw(axes, shown, task):
    place = np.arange(len(stages))
    for name, (key, color) in lines.items():
      share = [row[key] for row in shown]
      middle = np.array([100 * each["accuracy"] for each in share])
      low, high = (
        np.array([100 * each[end] for each in share]) for end in ("low", "high")
      )
      axes.plot(place, middle, "o-", color=color, label=name, markersize=4)
      axes.fill_between(place, low, high, color=color, alpha=0.12, lw=0)
    axes.set_xticks(place, [stage.replace("/", "\n") for stage in stages])
    axes.set_ylim(0, 100)
    axes.set_ylabel("%")
    axes.set_title(task)
    axes.legend(fontsize=7)

  panels = []
  with matplotlib.rc_context(_STYLE):
    for task in tasks:
      shown = [row for row in rows if row["task"] == task]
      panels.append(
        svg_panel(
          f"{task} over the stages",
          lambda axes, s=shown, t=task: draw(axes, s, t),
          height=3.2,
        )
      )
  cells = []
  for row in rows:
    stage = escape(row["after"])
    pair = (row["accuracy/chosen"], row["accuracy/uniform"])
    found = [each["accuracy"] for each in pair]
    found += [row["lists/hit"], row["lists/readable"]]
    linked = f'<a href="{stage}/{REPORT_FILE}">{stage}</a>'
    if not (path.parent / row["after"] / REPORT_FILE).exists():
      linked = stage
    cells.append([linked, escape(row["task"]), *map(percent, found)])
  table = html_table(
    [
      "after",
      "task",
      "chosen frames",
      "uniform frames",
      "lists that hit",
      "lists readable",
    ],
    cells,
  )
  body = (
    "<section><h2>Answers on held-out videos</h2>"
    "<p>The answerer sees the frames that the selector names, or uniform ones."
    " Bands are 95 % intervals. A list hits where it can be read and names a"
    " frame of the evidence.</p>"
    f'<div class="grid">{"".join(panels)}</div>{table}</section>'
  )
  return write_page(path, title, f"<h1>{escape(title)}</h1>", body)


# What pages are made of; other modules make theirs of it too ----------------


def write_page(
  path: str | os.PathLike, title: str, head: str, body: str
) -> pathlib.Path:
  """A whole page; `head` and `body` are HTML."""
  path = pathlib.Path(path)
  page = _PAGE.format(title=escape(title), style=_CSS, head=head, body=body)
  disk.write_text(path, page)
  return path


def _read_json(path: pathlib.Path) -> dict:
  return json.loads(path.read_text("utf-8")) if path.exists() else {}


def escape(value: Any) -> str:
  """Text as HTML that shows it."""
  return html.escape(str(value), quote=True)


def percent(value: float | None, digits: int = 1) -> str:
  """`0.123` as `12.3 %`, nothing as a dash."""
  return "–" if value is None else f"{100 * value:.{digits}f} %"


def _number(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.4g}"
  return str(value)


def data_uri(data: bytes, kind: str) -> str:
  """A file as an address, so that a page needs none beside it."""
  return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Cells are HTML already; the first column is text, the rest numbers."""
  top = "".join(f"<th>{cell}</th>" for cell in head)
  lines = "".join(
    "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
    for row in rows
  )
  return (
    f'<div class="scroll"><table><thead><tr>{top}</tr></thead>'
    f"<tbody>{lines}</tbody></table></div>"
  )


def svg_panel(
  alt: str,
  draw: Callable[[matplotlib.axes.Axes], None],
  *,
  width: float = 5.4,
  height: float = 2.7,
) -> str:
  """One small figure as an image tag; panels stack on a narrow screen."""
  memory = io.BytesIO()
  with matplotlib.rc_context(_STYLE):
    figure = matplotlib.figure.Figure(
      figsize=(width, height), layout="constrained"
    )
    matplotlib.backends.backend_svg.FigureCanvasSVG(figure)
    draw(figure.add_subplot())
    figure.savefig(memory, format="svg", metadata={"Date": None})
  uri = data_uri(memory.getvalue(), "image/svg+xml")
  return f'<img alt="{escape(alt)}" src="{uri}">'


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
    f"<b>{goal['value']:+.1f}</b><span>points, {escape(goal['name'])}</span>"
    f"<i>{'goal met' if goal['met'] else 'goal missed'}:"
    f" at least {goal['goal']:+g}</i></div>"
    for goal in results.get("goals", [])
  )
  return (
    f"<h1>{escape(name)}</h1><p class='quiet'>{escape(' · '.join(about))}</p>"
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
        svg_panel(
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
  return found[: len(_SERIES)]


def _curves(axes, series, offset, names, *, title, label, share) -> None:
  used = {stage for _, stage, _, _ in series}
  start = min(offset[stage] for stage in used)
  for color, (name, stage, step, value) in zip(_SERIES, series, strict=False):
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
        color=_MUTED,
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
        color=_MUTED,
        va="top",
      )
  axes.set_title(title)
  axes.set_ylabel(label)
  told = [names.get(stage, stage) for stage in offset if stage in used]
  axes.set_xlabel(f"updates ({', then '.join(told)})")
  axes.grid(axis="y", color=_RULE, linewidth=0.8)
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
    svg_panel(
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
      percent(found.get((task, view, stage), {}).get("accuracy"))
      for stage in stages
    ]
    return " → ".join(share.removesuffix(" %") for share in shares)

  counts = {
    task: max(row.get("count", 0) for row in rows if row["task"] == task)
    for task in tasks
  }
  table = html_table(
    ["view", *(f"{escape(task)} (n = {counts[task]})" for task in tasks)],
    [
      *(
        [escape(names.get(view, view)), *(cell(t, view) for t in tasks)]
        for view in views
      ),
      [
        "<i>chance</i>",
        *(f"<i>{percent(chance.get(t)).removesuffix(' %')}</i>" for t in tasks),
      ],
    ],
  )
  order = " → ".join(names.get(stage, stage) for stage in stages)
  return (
    "<p>Bars are 95 % intervals over the videos; the dashed line is chance."
    f'</p><div class="grid">{panels}</div>'
    f"<p>Accuracy in percent, {escape(order)}.</p>{table}"
  )


def _dumbbells(axes, task, views, stages, found, chance, names) -> None:
  """Accuracy of each view before (hollow) and after RL (filled)."""
  if chance is not None:
    axes.axvline(
      100 * chance, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1
    )
  spread = 0.13 if len(stages) > 1 else 0.0
  for place, stage in enumerate(stages):
    last = place == len(stages) - 1
    color = _BLUE if last else _GREY
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
  axes.tick_params(axis="y", length=0, labelcolor=_INK)
  axes.set_ylim(len(views) - 0.5, -0.5)
  axes.set_xlim(0, 100)
  axes.set_xlabel("right answers (%)")
  axes.set_title("all tasks" if task == "all" else task)
  axes.spines["left"].set_visible(False)
  axes.grid(axis="x", color=_RULE, linewidth=0.8)
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
  figures = []
  for path in paths:
    about = _read_json(path.with_suffix(".json"))
    caption = "".join(
      f"<span><b>{escape(key.replace('_', ' '))}</b> {escape(_flat(value))}"
      "</span>"
      for key, value in about.items()
      if value not in (None, "", [])
    )
    uri = data_uri(path.read_bytes(), "image/png")
    figures.append(
      f'<figure><div class="scroll wide"><img src="{uri}" alt="Uniform'
      f' frames and keyframes of {escape(path.stem)} over the score curve">'
      f"</div><figcaption>{caption}</figcaption></figure>"
    )
  if not figures:
    return ""
  return (
    "<p>Uniform frames against keyframes of the same number. A frame"
    " with an amber border was taken while the event was to be seen.</p>"
    + "".join(figures)
  )


def _flat(value: Any) -> str:
  if isinstance(value, (list, tuple)):
    return " | ".join(_number(item) for item in value)
  return _number(value)


def _probes(probes: dict) -> str:
  if not probes:
    return ""
  rows = []
  for name, probe in probes.items():
    half = probe.get("half_interval") or 0.0
    fair = abs(probe["accuracy"] - probe["chance"]) <= half
    rows.append(
      [
        escape(name.replace("_", " ")),
        f"{percent(probe['accuracy'])} ± {100 * half:.1f}",
        percent(probe["chance"]),
        '<span class="ok">at chance</span>'
        if fair
        else '<span class="bad">not at chance</span>',
      ]
    )
  return (
    "<p>What can be answered without seeing the video as it was. A fair set"
    " of questions keeps each of these within its interval of chance.</p>"
    + html_table(["probe", "accuracy", "chance", "verdict"], rows)
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
    f"<pre>{escape(_cut(row.get('completion', '')))}</pre><p class='parts'>"
    + "".join(
      f"<span>{escape(name)} <b>{escape(_number(value))}</b></span>"
      for name, value in (row.get("rewards") or {}).items()
    )
    + "</p>"
    for row in shown
  )
  return (
    '<article><p class="quiet">'
    f"{escape(names.get(stage, stage))}, update {step},"
    f" {escape(first.get('task', ''))}, group of {size}</p>"
    f'<pre class="prompt">{escape(_cut(first.get("prompt", "")))}</pre>'
    + (
      f"<p class='quiet'>answer: {escape(answer)}</p>"
      if answer is not None
      else ""
    )
    + (
      "<p class='quiet'>keyframes at"
      f" {escape(', '.join(f'{s:.1f}' for s in seconds))} s</p>"
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
    labels = {phase: escape(_BESIDE.get(phase, phase)) for phase in order}
    if "step" in seconds:
      labels["step"] = "<i>whole update</i>"
    if shares:
      made.append(
        svg_panel(
          f"What each phase of an update takes, {title}",
          lambda axes, t=title, s=shares: _stacked(axes, s, title=t),
          width=10.0,
          height=1.0 + 0.4 * len(shares),
        )
      )
    made.append(
      html_table(
        [escape(title), *columns],
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
      html_table(
        ["run", ""],
        [
          [
            escape(name.removesuffix("_s").replace("_", " ")),
            telemetry.clock(value)
            if name.endswith("_s")
            else escape(value if isinstance(value, str) else _number(value)),
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
  bright = ("#2f93a8", *_SERIES[1:-1], _BLUE)
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
  axes.tick_params(axis="y", length=0, labelcolor=_INK)
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
  config = html_table(
    ["setting", "value"],
    [
      [f"<code>{escape(key)}</code>", f"<code>{escape(value)}</code>"]
      for key, value in _leaves(manifest.get("config", {}))
    ],
  )
  begun = html_table(
    ["start", "revision", "command"],
    [
      [
        escape(start["time"]),
        escape((start.get("git") or "–")[:12]),
        f"<code>{escape(' '.join(start.get('argv', [])))}</code>",
      ]
      for start in starts
    ],
  )
  versions = ", ".join(
    f"{name} {version}"
    for name, version in (starts[-1]["versions"] if starts else {}).items()
  )
  return (
    f"<p>Data {escape(manifest.get('data_hash', '–'))}, seed"
    f" {escape(manifest.get('seed', '–'))}. {escape(versions)}.</p>"
    f'{begun}<details class="left"><summary>All settings</summary>{config}'
    "</details>"
  )


def _leaves(tree: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
  if isinstance(tree, dict) and tree:
    for key, value in tree.items():
      yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
  else:
    yield prefix, json.dumps(tree, ensure_ascii=False)


# --------------------------------------------------------------------- style

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>{head}</header>
{body}
</body>
</html>
"""

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1120px;
  background: #fff; color: #1c2733;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
    "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .3rem; padding-top: .9rem;
  border-top: 1px solid #dfe4ea; }
p { margin: .3rem 0 .8rem; max-width: 46rem; }
.quiet { color: #66727f; font-size: .88rem; margin: 0 0 .4rem; }
.tiles { display: grid; gap: .8rem; margin-top: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
.tile { border: 1px solid #dfe4ea; border-radius: 8px; padding: .8rem 1rem; }
.tile b { font-size: 1.7rem; line-height: 1.1; display: block; }
.tile span { display: block; }
.tile i { font-style: normal; font-size: .85rem; }
.met i, .ok { color: #23704d; }
.missed i, .bad { color: #a8402a; }
.grid { display: grid; gap: 1.2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.grid > * { min-width: 0; }
img { max-width: 100%; height: auto; display: block; }
.grid img { width: 100%; }
.scroll { overflow-x: auto; }
.wide img { width: 100%; min-width: 46rem; }
figure { margin: 1.2rem 0 2rem; }
figcaption { margin-top: .5rem; font-size: .88rem; overflow-wrap: anywhere; }
figcaption span { margin-right: 1.2rem; display: inline-block; }
figcaption b { color: #66727f; font-weight: 500; }
table { border-collapse: collapse; margin: .4rem 0 1rem; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: #66727f; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #dfe4ea;
  text-align: right; white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td i { color: #66727f; }
article { border: 1px solid #dfe4ea; border-radius: 8px; padding: .9rem 1rem; }
pre { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
section > article { margin: .8rem 0; }
article pre:not(.prompt) { background: #f5f7f9; border-radius: 4px;
  padding: .5rem .6rem; }
.parts { font-size: .82rem; color: #66727f; margin: .2rem 0 .6rem; }
.parts span { margin-right: .9rem; display: inline-block; }
.parts b { color: #1c2733; font-weight: 600; }
.parts b.ok { color: #23704d; }
.parts b.bad { color: #a8402a; }
.narrow { max-width: 34rem; }
code { font: .85rem ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
details summary { cursor: pointer; margin: .6rem 0; }
.left td:last-child, .left th:last-child { text-align: left;
  white-space: normal; overflow-wrap: anywhere; }
.film { display: flex; gap: 3px; overflow-x: auto; margin: .2rem 0 .5rem; }
.film figure { margin: 0; flex: 0 0 auto; }
.film img { height: 84px; width: auto; border-radius: 3px; }
.film figcaption { margin: 0; font-size: .75rem; color: #66727f; }
.film .evidence img { outline: 3px solid #e8a33d; outline-offset: -3px; }
@media print { .scroll { overflow: visible; } section { break-inside: auto; } }
"""
