"""Moments in time: overlap with annotated intervals, and how texts name them.

Intervals are (start, end) in seconds.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from cf_jax.data import grounding_answers

Interval = tuple[float, float]

LIMITS = (0.3, 0.5, 0.7)

# The published pattern `\d+\.?\d* (to|and) \d+\.?\d*` (arXiv 2504.06958);
# started at a number's first digit and without its ambiguity it finds the same
# in linear time.
_PAIR = re.compile(r"(?<!\d)(\d++(?:\.\d*+)?) (?:to|and) (\d++(?:\.\d*+)?)")
_GLUE_NUMBER = r"\d+(?:\.\d+)?"
_GLUE_PAIR = rf"\({_GLUE_NUMBER},\s*+{_GLUE_NUMBER}\)"
_GLUE = re.compile(rf"\[(?:{_GLUE_PAIR}(?:,\s*+{_GLUE_PAIR})*+,?)?\]")
_LISTED = re.compile(
  r"(?<![\d.])(\d{1,7}(?:\.\d{1,6})?) ?(?:seconds|sec|s)?"
  r" ?(?:to|and|,|-|\u2013) ?(\d{1,7}(?:\.\d{1,6})?)"
)
# An answer that is longer than this is no list of intervals.
_MAX_CHARS = 10_000


class Overlap(NamedTuple):
  """Largest overlaps of one interval with several annotated ones.

  Attributes:
    iou: intersection over the hull of both.
    iop: intersection over the prediction.
  """

  iou: float
  iop: float


def read_moment(text: str, answer: str | None = None) -> Interval | None:
  """The last `a to b` or `a and b` of a text, in seconds.

  Two further forms are read [ours]: before it, an answer that is the JSON
  object of arXiv 2506.01908; where there is none, an answer that is one
  interval and nothing else (`[3, 7.5]`, `3 - 7.5s`).

  Args:
    text: all of it.
    answer: what stands between its answer tags; None is the whole text.
  """
  answer = text if answer is None else answer
  said = grounding_answers.read_json_interval(answer)
  if said is not None:
    return said
  pairs = [match.groups() for match in _PAIR.finditer(text)]
  if not pairs:
    return grounding_answers.read_interval(answer)
  start, end = (
    float(number) if len(number) < 400 else float("inf") for number in pairs[-1]
  )
  return start, end


def hull_iou(said: Interval, truth: Interval) -> float:
  """`(min of ends - max of starts) / (max of ends - min of starts)`, or 0.

  For two that overlap this is their intersection over union.
  """
  length = max(said[1], truth[1]) - min(said[0], truth[0])
  shared = min(said[1], truth[1]) - max(said[0], truth[0])
  if not 0 < length < float("inf") or shared <= 0:
    return 0.0
  return shared / length


def read_glue(text: str) -> tuple[Interval, ...] | None:
  """Intervals of `[(1.5, 4), (6, 7)]` (arXiv 2504.06958), or None.

  `[]` is no interval at all. One that ends before it starts makes it None.
  """
  text = text.removesuffix("\n")
  if len(text) > _MAX_CHARS or _GLUE.fullmatch(text) is None:
    return None
  numbers = [float(number) for number in re.findall(_GLUE_NUMBER, text)]
  pairs = tuple(zip(numbers[::2], numbers[1::2], strict=True))
  return pairs if all(start <= end for start, end in pairs) else None


def read_windows(text: str) -> tuple[Interval, ...]:
  """All intervals that a text names, in its order, none of them empty."""
  pairs = (
    (float(match[1]), float(match[2])) for match in _LISTED.finditer(text)
  )
  return tuple(pair for pair in pairs if pair[0] < pair[1])


def best_overlap(said: Interval, truths: Sequence[Interval]) -> Overlap:
  """Largest IoU and largest IoP with any annotated interval (NExT-GQA).

  A prediction without length has IoU 0, and IoP 1 where it lies inside.

  Args:
    said: the predicted interval.
    truths: the annotated ones.
  """
  iou = iop = 0.0
  for start, end in truths:
    if said[0] == said[1]:
      iop = max(iop, float(start <= said[0] <= end))
      continue
    shared = min(end, said[1]) - max(start, said[0])
    hull = max(end, said[1]) - min(start, said[0])
    if hull > 0:
      iou = max(iou, shared / hull)
    if said[1] > said[0]:
      iop = max(iop, shared / (said[1] - said[0]))
  return Overlap(iou, iop)
