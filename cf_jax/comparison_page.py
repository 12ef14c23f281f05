"""Evaluations side by side as one HTML page, which opens offline."""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.axes
import numpy as np

from cf_jax import pages

_COLORS = ("#1f5fa8", "#c8553d", "#3f8f6b", "#8a5fa8", "#e8a33d")
_MANY_GROUPS = 24  # bars of a panel; the table has all


def write(
  path: str | os.PathLike,
  *,
  title: str,
  words: Sequence[str],
  evaluations: Sequence[Mapping[str, Any]],
  differences: Sequence[Mapping[str, Any]],
  figures: Sequence[Mapping[str, Any]],
  settings: Sequence[Mapping[str, Any]],
  changed: Sequence[Mapping[str, Any]],
) -> pathlib.Path:
  """Writes the page.

  Args:
    path: of the page.
    title: heading.
    words: how the numbers came about, a paragraph each.
    evaluations: name, key, policy, weights, unreadable of each; the first is
      what the others are compared with.
    differences: rows of `programs/compare.py`.
    figures: metric, group, and the value of each evaluation by name.
    settings: setting, and its value in each evaluation by name.
    changed: questions, with the answers and film strips of a pair.

  Returns:
    The path.
  """
  names = [row["name"] for row in evaluations]
  sections = [
    ("", "Evaluations", _evaluations(evaluations)),
    ("", "Paired differences", _differences(differences, names)),
    ("", "Official figures", _figures(figures, names)),
    ("left", "Settings that differ", _settings(settings, names)),
    ("", "Questions that changed", _changed(changed)),
  ]
  body = "".join(
    f'<section class="{kind}"><h2>{heading}</h2>{content}</section>'
    for kind, heading, content in sections
    if content
  )
  head = f"<h1>{pages.escape(title)}</h1>" + "".join(
    f"<p class='quiet'>{pages.escape(word)}</p>" for word in words
  )
  return pages.write_page(path, title, head, body)


def _evaluations(rows: Sequence[Mapping[str, Any]]) -> str:
  cells = [
    [
      f"<b>{pages.escape(row['name'])}</b> {pages.escape(row['key'])}",
      pages.escape(row["policy"]),
      f"<code>{pages.escape(row['weights'])}</code>",
      pages.escape(row["unreadable"]),
    ]
    for row in rows
  ]
  head = ("evaluation", "policy", "weights", "videos not read")
  return pages.html_table(head, cells)


def _points(value: float | None) -> str:
  return "–" if value is None else f"{100 * value:+.1f}"


def _differences(rows: Sequence[Mapping[str, Any]], names) -> str:
  """A panel for each pair, and every row as a table."""
  panels = []
  for name in names[1:]:
    mine = [
      row
      for row in rows
      if row["second_name"] == name and row["main"] and row["low"] is not None
    ]
    if mine:
      mine = mine[:_MANY_GROUPS]
      panels.append(
        pages.svg_panel(
          f"Differences of {name} and {names[0]} with their intervals",
          lambda axes, mine=mine, name=name: _draw(axes, mine, name, names[0]),
          height=0.9 + 0.24 * len(mine),
        )
      )
  cells = []
  for row in rows:
    interval = "–"
    if row["low"] is not None:
      interval = f"{_points(row['low'])} to {_points(row['high'])}"
    p = "–" if row["p"] is None else f"{row['p']:.2g}"
    adjusted = "–" if row["p_holm"] is None else f"{row['p_holm']:.2g}"
    kind = ""
    if row["low"] is not None and row["low"] * row["high"] > 0:
      kind = ' class="ok"' if row["mean"] > 0 else ' class="bad"'
    cells.append(
      [
        pages.escape(row["group"]),
        pages.escape(f"{row['first_name']} → {row['second_name']}"),
        pages.escape(row["metric"]),
        f"{pages.percent(row['first'])} → {pages.percent(row['second'])}",
        f"<span{kind}>{_points(row['mean'])}</span>",
        interval,
        f'<span title="{pages.escape(row["test"])}">{p}</span>',
        adjusted,
        f"{row['gained']} / {row['lost']}",
        f"{row['count']} / {row['units']}",
      ]
    )
  head = (
    "of",
    "pair",
    "metric",
    "first → second",
    "points",
    "interval",
    "p",
    "p, Holm",
    "gained / lost",
    "questions / videos",
  )
  narrow = " narrow" if len(panels) == 1 else ""
  return (
    f'<div class="grid{narrow}">{"".join(panels)}</div>'
    f"{pages.html_table(head, cells)}"
  )


def _draw(axes: matplotlib.axes.Axes, rows, second, first) -> None:
  place = np.arange(len(rows))[::-1]
  mean, low, high = (
    100 * np.array([row[key] for row in rows])
    for key in ("mean", "low", "high")
  )
  axes.axvline(0, color="#8b97a3", linewidth=0.8)
  axes.errorbar(
    mean,
    place,
    # The mean may lie a rounding outside its own interval.
    xerr=np.maximum([mean - low, high - mean], 0),
    fmt="o",
    color=_COLORS[0],
    markersize=4,
    linewidth=1.2,
  )
  labels = [row["group"] for row in rows]
  axes.set_yticks(place, labels, fontsize=7)
  axes.set_xlabel(f"points, {second} less {first}")
  axes.set_ylim(-0.6, len(rows) - 0.4)


def _figures(rows: Sequence[Mapping[str, Any]], names) -> str:
  cells = [
    [
      pages.escape(row["metric"]),
      pages.escape(row["group"]),
      *(pages.percent(row["value"].get(name), 2) for name in names),
    ]
    for row in rows
  ]
  return pages.html_table(["metric", "of", *map(pages.escape, names)], cells)


def _settings(rows: Sequence[Mapping[str, Any]], names) -> str:
  if not rows:
    return "<p>None: they differ in nothing that is written down.</p>"
  cells = [
    [
      f"<code>{pages.escape(row['setting'])}</code>",
      *(f"<code>{pages.escape(row['value'][name])}</code>" for name in names),
    ]
    for row in rows
  ]
  return pages.html_table(["setting", *map(pages.escape, names)], cells)


def _changed(rows: Sequence[Mapping[str, Any]]) -> str:
  if not rows:
    return "<p>None.</p>"
  made, heading = [], None
  for row in rows:
    if row["heading"] != heading:
      heading = row["heading"]
      made.append(f"<h3>{pages.escape(heading)}</h3>")
    made.append(_one_question(row))
  return "".join(made)


def _one_question(row: Mapping[str, Any]) -> str:
  options = "".join(f"\n{option}" for option in row["options"])
  said = "".join(_one_answer(answer) for answer in row["answers"])
  return (
    "<article><p class='quiet'>"
    f"{pages.escape(row['id'])}, {pages.escape(row['task'])},"
    f" {pages.escape(row['video'])}</p>"
    f"<pre class='prompt'>{pages.escape(row['question'] + options)}</pre>"
    f"<p class='quiet'>truth: {pages.escape(row['truth'])}</p>"
    f"{said}</article>"
  )


def _one_answer(answer: Mapping[str, Any]) -> str:
  kind = "ok" if answer["better"] else "bad"
  score = answer["score"]
  value = "–" if score is None or math.isnan(score) else f"{score:.3g}"
  frames = "".join(
    f"<figure{' class=evidence' if frame['evidence'] else ''}>"
    f'<img loading="lazy" src="{frame["uri"]}"'
    f' alt="frame at {frame["time_s"]:.1f} s">'
    f"<figcaption>{frame['time_s']:.1f} s</figcaption></figure>"
    for frame in answer["frames"]
  )
  note = answer["note"]
  return (
    f"<p class='parts'><b class='{kind}'>{pages.escape(answer['name'])}</b>"
    f" <span>read <b>{pages.escape(answer['read'])}</b></span>"
    f" <span>score <b>{value}</b></span></p>"
    f"<pre>{pages.escape(answer['response'])}</pre>"
    + (f"<p class='quiet'>{pages.escape(note)}</p>" if note else "")
    + (f'<div class="film">{frames}</div>' if frames else "")
  )
