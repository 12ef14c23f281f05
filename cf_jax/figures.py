"""Figures as files: film strips of keyframes, histograms; and their style.

Axes: `T` scanned frames, `K` frames shown.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.axes
import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.gridspec
import matplotlib.patches
import matplotlib.ticker
import numpy as np

from cf_jax import disk
from cf_jax.runtime import telemetry

INK = "#1c2733"
MUTED = "#66727f"
RULE = "#dfe4ea"
BLUE = "#1f5fa8"  # TAD, and the policy after RL
GREY = "#8b97a3"  # uniform, and the policy before RL
AMBER = "#e8a33d"  # what is true: events
SERIES = (BLUE, "#c8553d", "#3f8f6b", "#8a5fa8", AMBER, GREY)
_PARTS = (BLUE, "#c3cad1", GREY, AMBER)  # kept, and what was not

STYLE = {
  "axes.edgecolor": MUTED,
  "axes.labelcolor": MUTED,
  "axes.linewidth": 0.8,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlecolor": INK,
  "axes.titlelocation": "left",
  "axes.titlesize": 10.5,
  "axes.titleweight": "bold",
  "figure.facecolor": "white",
  "font.family": "DejaVu Sans",
  "font.size": 9,
  "legend.frameon": False,
  "svg.hashsalt": "cf_jax",
  "text.parse_math": False,  # "$" in a name of others begins no formula
  "text.color": INK,
  "xtick.color": MUTED,
  "ytick.color": MUTED,
}

_STRIP_COLUMNS = 8  # keyframes side by side; more go into further rows


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
  score, time_s, apex = _curve_arrays(score, time_s, apex)
  _check_lengths(uniform_frames=len(uniform_frames), uniform_s=len(uniform_s))
  _check_lengths(tad_frames=len(tad_frames), tad_s=len(tad_s))
  columns = max(len(uniform_frames), len(tad_frames), 1)
  height, width = np.shape(uniform_frames)[1:3]
  cell = 10.6 / columns  # inches
  row = min(cell * height / width, 2.4)
  page = 2 * row + 0.40 + 2.35 + 0.24 + 0.46  # with the margins below
  with matplotlib.rc_context(STYLE):
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
      GREY,
    )
    shown = _frame_row(
      figure, rows[2], columns, tad_frames, tad_s, events, label, BLUE
    )
    lower = matplotlib.gridspec.GridSpecFromSubplotSpec(
      2, 1, rows[3], height_ratios=[0.4, 1.95], hspace=0
    )
    axes = figure.add_subplot(lower[1])
    marks = [
      (f"{label} keyframe", tad_s, BLUE),
      ("uniform frame", uniform_s, GREY),
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
  score, time_s, apex = _curve_arrays(score, time_s, apex)
  _check_lengths(frames=len(frames), frame_s=len(frame_s))
  columns = min(len(frames), _STRIP_COLUMNS)
  lines = -(-len(frames) // columns)
  height, width = np.shape(frames)[1:3]
  # Inches: each line of pictures has its times above, and a gap below.
  cell = min(10.6 / columns, 3.2)
  line = min(cell * height / width, 3.2) + 0.24
  page = lines * line + 2.35 + 0.46
  with matplotlib.rc_context(STYLE):
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
        BLUE,
      )
    lower = matplotlib.gridspec.GridSpecFromSubplotSpec(
      2, 1, rows[lines], height_ratios=[0.4, 1.95], hspace=0
    )
    axes = figure.add_subplot(lower[1])
    marks = [(f"{label} keyframe", frame_s, BLUE)]
    _curve(axes, score, time_s, apex, (), marks, score_name)
    if lines == 1:  # lines would cross the pictures of further rows
      _connect(shown, axes, frame_s)
    disk.write(path, lambda file: figure.savefig(file, dpi=110, format="png"))
  return path


def _check_lengths(**lengths: int) -> None:
  if len(set(lengths.values())) > 1:
    found = ", ".join(f"{name} {size}" for name, size in lengths.items())
    raise ValueError(f"a film strip wants equal lengths, got {found}")


def _curve_arrays(score, time_s, apex):
  """The curve's arrays, of the same length."""
  _check_lengths(score=len(score), time_s=len(time_s), apex=len(apex))
  return (
    np.asarray(score, float),
    np.asarray(time_s, float),
    np.asarray(apex, bool),
  )


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
      spine.set_edgecolor(AMBER if hit else RULE)
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
        color=BLUE,
        linewidth=0.8,
        alpha=0.55,
        clip_on=False,
      )
    )


def _curve(axes, score, time_s, apex, events, marks, score_name) -> None:
  """The score over time; `marks` are (label, seconds, color) below it."""
  label = "true event"
  for start, end, name in events:
    axes.axvspan(start, end, color=AMBER, alpha=0.28, linewidth=0, label=label)
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
  axes.plot(time_s, score, color=INK, linewidth=1.3)
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
  with matplotlib.rc_context(STYLE):
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
        axes.axvline(panel.limit, color=INK, linewidth=1, linestyle=":")
      axes.set_title(panel.title)
      axes.set_xlabel(panel.label)
      axes.set_ylabel(count_label)
      axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
      axes.margins(y=0.35)  # the legend stands above the highest bar
      axes.legend(loc="upper right", fontsize=8)
    disk.write(path, lambda file: figure.savefig(file, dpi=110, format="png"))
  return path
