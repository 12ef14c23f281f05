"""Answers that point: intervals in seconds, boxes, frame numbers.

Part of the string door of `answers.py`, with its rules: text that is not
exactly what was asked for is None, any str is read without an exception, in
linear time (bounded repeats on ASCII, and a limit on the length of what goes to
the JSON parser).
"""

import json
import math
import re
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]
Box = tuple[float, float, float, float]

_SECONDS = r"(\d{1,7}(?:\.\d{1,6})?) ?(?:s|sec|seconds)?"
_INTERVAL = re.compile(rf"{_SECONDS} ?(?:to|and|,|-) ?{_SECONDS}", re.ASCII)
# The published pattern `\d+\.?\d* (to|and) \d+\.?\d*`, but with bounded
# repeats that start at a number's first digit: the original is cubic.
_LOOSE_INTERVAL = re.compile(
  r"(?<![\d.])(\d{1,7}(?:\.\d{0,6})?) (?:to|and) (\d{1,7}(?:\.\d{0,6})?)"
  r"(?!\.?\d)",
  re.ASCII | re.IGNORECASE,
)
_SECONDS_TEXT = re.compile(r"\d{1,7}(?:\.\d{1,6})?", re.ASCII)
_INDEX = re.compile(r"\d{1,6}", re.ASCII)
# Pairs in round brackets; JSON knows only square ones.
_BRACKETS = str.maketrans("()", "[]")

# Characters of an answer that are looked at. The longest proper answer, eight
# boxes with 15 decimals, has 600.
_MAX_CHARS = 4000


def _reject(name: str):
  raise ValueError(name)


def _distinct(pairs):
  made = dict(pairs)
  if len(made) < len(pairs):
    raise ValueError("a key stands twice")
  return made


def _read_json(text: str):
  """What strict JSON says; None where it is none, or too long.

  NaN, Infinity and a key that stands twice are not JSON here.
  """
  if len(text) > _MAX_CHARS:
    return None
  try:
    return json.loads(text, parse_constant=_reject, object_pairs_hook=_distinct)
  except (ValueError, RecursionError):
    return None


def _number(value) -> float | None:
  """A finite number of parsed JSON; True and huge numbers are none."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return None
  try:
    value = float(value)
  except OverflowError:
    return None
  return value if math.isfinite(value) else None


# -- intervals


def read_interval(answer: str) -> Interval | None:
  """(start, end) in seconds where an answer is one interval, or None.

  Read are `1.5 to 4`, `1.5s - 4.0s`, `[1.5, 4]` and the like. A reversed or
  empty interval is None.
  """
  answer = answer.strip()
  if answer.startswith("[") and answer.endswith("]"):
    answer = answer[1:-1]
  if len(answer) > 1000:
    return None
  match = _INTERVAL.fullmatch(" ".join(answer.split()))
  if match is None:
    return None
  start, end = float(match[1]), float(match[2])
  return (start, end) if start < end else None


def read_last_interval(text: str) -> Interval | None:
  """The last `number to number` or `number and number` of a text, or None.

  The lenient reading of arXiv 2504.06958: of several intervals the last one
  counts, and it alone. Reversed or empty ones are None.
  """
  last = None
  for match in _LOOSE_INTERVAL.finditer(text):
    last = match
  if last is None:
    return None
  start, end = float(last[1]), float(last[2])
  return (start, end) if start < end else None


def read_json_interval(answer: str) -> Interval | None:
  """(start, end) of `{"start_time": "1.5", "end_time": "4"}`, or None.

  The form of arXiv 2506.01908; plain numbers are read too. Nothing else may
  stand in the object. Reversed or empty intervals are None.
  """
  made = _read_json(answer)
  if not isinstance(made, dict) or made.keys() != {"start_time", "end_time"}:
    return None
  seconds = []
  for name in ("start_time", "end_time"):
    value = made[name]
    if isinstance(value, str) and _SECONDS_TEXT.fullmatch(value.strip()):
      value = float(value)
    seconds.append(_number(value))
  start, end = seconds
  if start is None or end is None or not 0 <= start < end:
    return None
  return start, end


def read_intervals(
  text: str, *, max_intervals: int = 100
) -> tuple[Interval, ...] | None:
  """Intervals of `[(1.5, 4), (6, 7)]`, or None; `[]` is no interval at all.

  The form of arXiv 2504.06958's glue. Square brackets may stand for round ones.

  Args:
    text: what stands between the glue tags.
    max_intervals: a longer list is None.
  """
  text = text.strip()
  if "(" in text or ")" in text:
    if text.count("[") != 1 or text.count("]") != 1:
      return None  # `[(1, 2]]` and the like
    if not (text.startswith("[") and text.endswith("]")):
      return None
    text = text.translate(_BRACKETS)
  made = _read_json(text)
  if not isinstance(made, list) or len(made) > max_intervals:
    return None
  found = []
  for pair in made:
    if not isinstance(pair, list) or len(pair) != 2:
      return None
    start, end = _number(pair[0]), _number(pair[1])
    if start is None or end is None or not 0 <= start < end:
      return None
    found.append((start, end))
  return tuple(found)


def interval_iou(first: Interval, second: Interval) -> float:
  """Intersection over union of two intervals; 0 if either has no length."""
  overlap = min(first[1], second[1]) - max(first[0], second[0])
  union = max(first[1], second[1]) - min(first[0], second[0])
  if not (first[0] < first[1] and second[0] < second[1] and overlap > 0):
    return 0.0
  return overlap / union


def _merge(intervals: Sequence[Interval]) -> list[Interval]:
  merged = []
  for start, end in sorted(i for i in intervals if i[0] < i[1]):
    if merged and start <= merged[-1][1]:
      merged[-1] = (merged[-1][0], max(merged[-1][1], end))
    else:
      merged.append((start, end))
  return merged


def interval_set_iou(
  first: Sequence[Interval], second: Sequence[Interval]
) -> float:
  """Intersection over union of two sets of intervals (arXiv 2504.06958).

  Intervals of a set that overlap count once. Two empty sets are equal: 1.
  """
  first, second = _merge(first), _merge(second)
  length = sum(end - start for start, end in first + second)
  shared, i, j = 0.0, 0, 0
  while i < len(first) and j < len(second):
    start = max(first[i][0], second[j][0])
    end = min(first[i][1], second[j][1])
    shared += max(0.0, end - start)
    if first[i][1] < second[j][1]:
      i += 1
    else:
      j += 1
  if not length:
    return 1.0
  return shared / (length - shared)


# -- boxes


def read_boxes(answer: str, *, count: int) -> tuple[Box, ...] | None:
  """Exactly `count` boxes `[x0, y0, x1, y1]` in a list, or None.

  Coordinates are fractions of width and height, in [0, 1], the first corner
  above and left of the second.

  Args:
    answer: what stands between the answer tags.
    count: boxes asked for (8 in arXiv 2504.06958).
  """
  made = _read_json(answer)
  if not isinstance(made, list) or len(made) != count:
    return None
  boxes = []
  for box in made:
    if not isinstance(box, list) or len(box) != 4:
      return None
    corners = [_number(value) for value in box]
    if any(value is None or not 0 <= value <= 1 for value in corners):
      return None
    if not (corners[0] < corners[2] and corners[1] < corners[3]):
      return None
    boxes.append(tuple(corners))
  return tuple(boxes)


def box_iou(first: Box, second: Box) -> float:
  """Intersection over union of two boxes; 0 if either has no area."""
  width = min(first[2], second[2]) - max(first[0], second[0])
  height = min(first[3], second[3]) - max(first[1], second[1])
  areas = [
    (box[2] - box[0]) * (box[3] - box[1])
    for box in (first, second)
    if box[0] < box[2] and box[1] < box[3]
  ]
  if len(areas) < 2 or width <= 0 or height <= 0:
    return 0.0
  return width * height / (sum(areas) - width * height)


def mean_box_iou(first: Sequence[Box], second: Sequence[Box]) -> float:
  """Mean of `box_iou` over two tracks of the same length."""
  return sum(map(box_iou, first, second)) / len(second)


# -- frame numbers


def read_indices(
  text: str, *, count: int, num_candidates: int
) -> tuple[int, ...] | None:
  """`count` different frame numbers in a list, ascending, or None.

  The form of arXiv 2505.15447: `[3, 17, 40]`, with or without the brackets,
  numbers from 0 to `num_candidates - 1`, in any order.

  Args:
    text: what stands between the index tags.
    count: numbers asked for (8).
    num_candidates: frames that were shown (128).
  """
  text = text.strip()
  if len(text) > _MAX_CHARS:
    return None
  if text.startswith("[") and text.endswith("]"):
    text = text[1:-1]
  parts = [part.strip() for part in text.split(",")]
  if len(parts) != count or not all(map(_INDEX.fullmatch, parts)):
    return None
  found = sorted(map(int, parts))
  if len(set(found)) < count or found[-1] >= num_candidates:
    return None
  return tuple(found)


def uniform_stride(*, count: int, num_candidates: int) -> np.ndarray:
  """int32[count]: what an unreadable list shows instead (arXiv 2505.15447).

  Raises:
    ValueError: fewer candidates than frames asked for.
  """
  if num_candidates < count:
    raise ValueError(
      f"cannot choose {count} of {num_candidates} candidate frames; lower"
      " config.amplify.num_frames or raise config.tad.num_keyframes"
    )
  return np.arange(count, dtype=np.int32) * (num_candidates // count)
