"""Clue inference: a question is asked twice (arXiv 2504.06958).

The first pass puts it in the form of a grounded question: an answer, and the
seconds that show it, `<glue>[(start, end), ...]</glue>`. The second pass shows
`config.clue.frames` frames of these seconds and puts it in its own form; that
answer counts. Where the first pass names nothing that can be shown, its own
answer stands.

A line of predictions.jsonl says how far its question is:
  "clue"             the intervals of the first pass; the second is to come
  "clue", "first"    answered twice; "first" is what the first pass gave
  "no_clue"          why the answer of the first pass stands
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from cf_jax.data import answers, grounding_answers, records
from cf_jax.programs import questions

# The kind of question as which the first pass puts every question.
FORM = "grounded_qa"
# Those that have the options that this form takes.
KINDS = ("multiple_choice", "grounded_qa")
_UNREADABLE = "its frames cannot be read"
_MOST_APART_S = 1e-3  # of a rounded time and an interval's end


def check(
  config: ml_collections.ConfigDict, samples: Sequence[records.Sample]
) -> None:
  """Makes sure that questions can be asked twice.

  Args:
    config: settled, with `clue.frames` above 0.
    samples: the questions.

  Raises:
    ValueError: questions of another kind, or a policy whose training had no
      words for the first pass.
  """
  others = sorted({sample.kind for sample in samples} - {*KINDS})
  if others:
    raise ValueError(
      f"config.clue.frames={config.clue.frames} asks {' and '.join(KINDS)}"
      f" questions twice, and there are {', '.join(others)} questions; set it"
      " to 0, or ask those apart"
    )
  if (
    config.prompt.style == "run"
    and any(sample.kind != FORM for sample in samples)
    and FORM not in questions.run_config(config)["prompt"]["templates"]
  ):
    raise ValueError(
      f"config.clue.frames={config.clue.frames} asks for intervals first, and"
      f" {config.policy} was trained without a template of {FORM} questions;"
      " set config.prompt.style='direct', or config.clue.frames=0"
    )


def second_pass(
  config: ml_collections.ConfigDict, *, frames: int
) -> ml_collections.ConfigDict:
  """The settings of the second pass: all frames of its scan, which is the clue.

  Args:
    config: settled; as in the first pass.
    frames: shown then.
  """
  config = config.copy_and_resolve_references()
  config.update(select="uniform", num_keyframes=frames)
  config.fps = None
  return config


def read(response: str, duration_s: float) -> dict[str, Any]:
  """What a row of the first pass gets: "clue", or "no_clue" and why.

  Args:
    response: completion of the first pass.
    duration_s: of the video, which intervals are clipped to.
  """
  glue = answers.parse_completion(response).glue
  if glue is None:
    return dict(no_clue="no glue behind one answer")
  found = grounding_answers.read_intervals(glue)
  if found is None:
    return dict(no_clue="a glue that cannot be read")
  if not found:
    return dict(no_clue="an empty glue")
  shown = [
    [start, min(end, duration_s)] for start, end in found if start < duration_s
  ]
  return dict(clue=shown) if shown else dict(no_clue="all outside the video")


def waits(row: Mapping[str, Any]) -> bool:
  """Is the second pass of this row to come?"""
  return "clue" in row and not ("first" in row or "no_clue" in row)


def intervals(
  row: Mapping[str, Any],
) -> tuple[grounding_answers.Interval, ...]:
  """(start, end) seconds of a row that waits."""
  return tuple((start, end) for start, end in row["clue"])


def answered_twice(
  first: Mapping[str, Any], second: Mapping[str, Any]
) -> dict[str, Any]:
  """The row of a question from those of its passes."""
  kept = {k: v for k, v in first.items() if k not in ("id", "clue")}
  return dict(second) | dict(clue=first["clue"], first=kept)


def stands(first: Mapping[str, Any], reason: str) -> dict[str, Any]:
  """The row of a question whose clue cannot be decoded."""
  return dict(first) | dict(no_clue=f"{_UNREADABLE}: {reason}")


def account(
  rows: Sequence[Mapping[str, Any]], num_frames: int
) -> dict[str, Any]:
  """What became of the two passes.

  Args:
    rows: of all questions; those about unreadable videos are passed over.
    num_frames: asked for in the second pass.

  Returns:
    Counts: twice (answered); once, by reason; fewer_frames (of those answered
    twice: the video has no more) and beside (frames outside the clue are shown,
    as it has too few).
  """
  twice = [row for row in rows if "first" in row]
  once = collections.Counter(
    row["no_clue"].split(":")[0] for row in rows if "no_clue" in row
  )

  def is_inside(time_s, row):
    return any(
      start - _MOST_APART_S <= time_s <= end + _MOST_APART_S
      for start, end in row["clue"]
    )

  return dict(
    twice=len(twice),
    once=dict(sorted(once.items())),
    fewer_frames=sum(len(row["time_s"]) < num_frames for row in twice),
    beside=sum(
      not all(is_inside(time_s, row) for time_s in row["time_s"])
      for row in twice
    ),
  )


def notes(counts: Mapping[str, Any], num_frames: int) -> list[str]:
  """What a reader of the table has to know.

  Args:
    counts: of `account`.
    num_frames: as there.
  """
  once = counts["once"]
  reasons = ", ".join(f"{count} {reason}" for reason, count in once.items())
  told = [
    f"clue inference, {num_frames} frames (config.clue.frames):"
    f" {counts['twice']} questions were asked twice; of {sum(once.values())}"
    " the first answer stands, as it names no clue that can be shown"
    + (f" ({reasons})" if once else "")
  ]
  if counts["beside"]:
    told.append(
      f"{counts['beside']} clues have fewer than {num_frames} frames, and the"
      " nearest others are shown with them"
    )
  if counts["fewer_frames"]:
    told.append(
      f"{counts['fewer_frames']} second passes show fewer than {num_frames}"
      " frames: their videos have no more"
    )
  return told
