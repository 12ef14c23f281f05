"""The page of an iterated amplification (`programs/amplify.py`)."""

import os
import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cf_jax import figures, pages, report

COLUMNS = (
  "after",
  "task",
  "chosen frames",
  "uniform frames",
  "lists that hit",
  "lists readable",
)


def write(
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
    "accuracy, chosen frames": ("accuracy/chosen", figures.BLUE),
    "accuracy, uniform frames": ("accuracy/uniform", figures.GREY),
    "chosen frames with evidence": ("evidence/chosen", figures.AMBER),
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
  for task in tasks:
    shown = [row for row in rows if row["task"] == task]
    panels.append(
      pages.svg_panel(
        f"{task} over the stages",
        lambda axes, s=shown, t=task: draw(axes, s, t),
        height=3.2,
      )
    )
  cells = []
  for row in rows:
    stage = pages.escape(row["after"])
    pair = (row["accuracy/chosen"], row["accuracy/uniform"])
    found = [each["accuracy"] for each in pair]
    found += [row["lists/hit"], row["lists/readable"]]
    address = urllib.parse.quote(f"{row['after']}/{report.REPORT_FILE}")
    linked = f'<a href="{pages.escape(address)}">{stage}</a>'
    if not (path.parent / row["after"] / report.REPORT_FILE).exists():
      linked = stage
    cells.append(
      [linked, pages.escape(row["task"]), *map(pages.percent, found)]
    )
  table = pages.html_table(COLUMNS, cells)
  body = (
    "<section><h2>Answers on held-out videos</h2>"
    "<p>The answerer sees the frames that the selector names, or uniform ones."
    " Bands are 95 % intervals. A list hits where it can be read and names a"
    " frame of the evidence.</p>"
    f'<div class="grid">{"".join(panels)}</div>{table}</section>'
  )
  return pages.write_page(path, title, f"<h1>{pages.escape(title)}</h1>", body)
