"""GOT-10k: boxes of one object over frames (arXiv 1810.11981).

Boxes are (x0, y0, x1, y1) as fractions of width and height; the first of a
track is given in the question.
"""

import re
from collections.abc import Sequence

import numpy as np

from cf_jax.data import grounding_answers

Box = tuple[float, float, float, float]

_NUMBER = re.compile(r"[+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d++)?")
# An answer that is longer than this is no list of boxes.
_MAX_CHARS = 10_000


def read_track(text: str, *, count: int) -> tuple[Box, ...] | None:
  """`count` boxes of a list of lists of four numbers, or None.

  Numbers of any size are read, boxes may lie outside of the frame.

  Args:
    text: `[[x0, y0, x1, y1], ...]`, nothing else.
    count: boxes asked for.
  """
  if len(text) > _MAX_CHARS:
    return None
  shape = "".join(_NUMBER.sub("n", text).split()).replace(",]", "]")
  box = "[" + ",".join("n" * 4) + "]"
  if shape != "[" + ",".join([box] * count) + "]":
    return None
  numbers = [float(number) for number in _NUMBER.findall(text)]
  if len(numbers) != 4 * count:
    return None  # an `n` that stood in the text
  return tuple(
    tuple(numbers[start : start + 4]) for start in range(0, 4 * count, 4)
  )


def mean_overlap(said: Sequence[Box], truth: Sequence[Box]) -> float:
  """Mean IoU over all frames, the given one included (arXiv 2504.06958)."""
  if not np.all(np.isfinite(said)):
    return 0.0
  return grounding_answers.mean_box_iou(said, truth)


def toolkit_ious(said: Sequence[Box], truth: Sequence[Box]) -> np.ndarray:
  """float[T - 1] IoU of each frame after the first, as GOT-10k's toolkit.

  Corners are clipped to the frame before their widths are: a box that begins
  outside keeps its width, and so moves in.

  Args:
    said: T boxes.
    truth: T boxes.
  """
  boxes = []
  for track in (said, truth):
    box = np.nan_to_num(np.asarray(track, np.float64)[1:])
    corner, size = box[:, :2], box[:, 2:] - box[:, :2]
    corner = np.clip(corner, 0, 1)
    boxes.append((corner, np.clip(size, 0, 1 - corner)))
  (corner, size), (true_corner, true_size) = boxes
  low = np.maximum(corner, true_corner)
  high = np.minimum(corner + size, true_corner + true_size)
  shared = np.prod(np.maximum(high - low, 0), axis=1)
  union = np.prod(size, axis=1) + np.prod(true_size, axis=1) - shared
  return np.clip(shared / (union + np.finfo(float).eps), 0, 1)
