"""QVHighlights: moments that are ranked, and clips whose saliency is rated.

The published metrics (arXiv 2107.09609), written afresh and unrounded. Windows
are [start, end] in seconds, a prediction's with a score.

Axes: `N` predicted windows; `W` annotated windows; `C` clips of two seconds;
`A` = 3 annotators; `L` = 10 limits of IoU.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# 0.5, 0.55, ..., 0.95, as written: np.linspace has 0.6000000000000001.
LIMITS = tuple(round(0.5 + 0.05 * n, 2) for n in range(10))
# Annotated windows no longer than the second and longer than the first, in s.
LENGTHS = {
  "full": (0, 150),
  "short": (0, 10),
  "middle": (10, 30),
  "long": (30, 150),
}
RATINGS = {"Fair": 2, "Good": 3, "VeryGood": 4}
CLIP_S = 2
_MAX_WINDOWS = 10


class Moments(NamedTuple):
  """How well the windows of one query are found.

  Attributes:
    ap: float[L] average precision at each limit.
    iou: of the first predicted window with the annotated one it fits best.
  """

  ap: np.ndarray
  iou: float


class Clips(NamedTuple):
  """How well the salient clips of one query are ranked.

  Attributes:
    ap: average precision, mean over annotators.
    hit: 1 where any annotator rates the top clip high enough.
  """

  ap: float
  hit: float


def window_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """float[N, W] intersection over union; 0 where both have no length.

  Args:
    first: float[N, 2].
    second: float[W, 2].
  """
  lengths = (first[:, 1] - first[:, 0])[:, None] + (second[:, 1] - second[:, 0])
  start = np.maximum(first[:, None, 0], second[:, 0])
  end = np.minimum(first[:, None, 1], second[:, 1])
  shared = np.clip(end - start, 0, None)
  union = lengths - shared
  return np.divide(shared, union, out=np.zeros_like(shared), where=union != 0)


def of_length(
  windows: Sequence[tuple[float, float]], name: str
) -> list[tuple[float, float]]:
  """The annotated windows of a length; all of them for "full"."""
  low, high = LENGTHS[name]
  if name == "full":
    return list(windows)
  return [pair for pair in windows if low < pair[1] - pair[0] <= high]


def moments(
  predicted: Sequence[Sequence[float]], truths: Sequence[Sequence[float]]
) -> Moments:
  """Average precision at ten limits, and the IoU of the first window.

  The first ten windows are ranked by score, equals in their order. At each
  limit a window takes the annotated one that it fits best of those not yet
  taken, if the IoU reaches the limit. Precision is interpolated as in VOC 2011.

  Args:
    predicted: N windows (start, end, score); none counts as wrong.
    truths: W >= 1 annotated windows (start, end).
  """
  if not len(predicted):
    return Moments(np.zeros(len(LIMITS)), 0.0)
  truth = np.asarray(truths, np.float64)
  first = np.asarray(predicted[0][:2], np.float64)
  # Of the first window alone the overlap counts over the hull of both.
  best = truth[np.argmax(window_iou(first[None], truth)[0])]
  shared = max(0.0, min(first[1], best[1]) - max(first[0], best[0]))
  hull = max(first[1], best[1]) - min(first[0], best[0])
  iou = shared / hull if hull else 0.0

  window = np.asarray(predicted[:_MAX_WINDOWS], np.float64)
  window = window[np.argsort(-window[:, 2], kind="stable")]
  overlap = window_iou(window[:, :2], truth)  # [N, W]
  ap = np.zeros(len(LIMITS))
  for n, limit in enumerate(LIMITS):
    right = np.zeros(len(window))
    taken = np.zeros(len(truth), bool)
    for rank, row in enumerate(overlap):
      for place in np.argsort(row)[::-1]:
        if row[place] < limit:
          break
        if not taken[place]:
          taken[place] = right[rank] = True
          break
    ap[n] = _interpolated_ap(right, len(truth))
  return Moments(ap, float(iou))


def _interpolated_ap(right: np.ndarray, count: int) -> float:
  """Area under the precision that only falls with recall."""
  found = np.cumsum(right)
  precision = found / np.arange(1, len(right) + 1)
  precision = np.maximum.accumulate(precision[::-1])[::-1]
  # Each window that is right adds 1 / count to the recall.
  return float(np.sum(precision * right) / count)


def saliency(
  rated: Sequence[tuple[int, Sequence[int]]], duration_s: float
) -> np.ndarray:
  """int[C, A] ratings of all clips, 0 where a clip is not rated.

  Args:
    rated: (clip number, ratings of the annotators).
    duration_s: of the video.

  Raises:
    ValueError: a clip outside the video.
  """
  full = np.zeros((int(duration_s / CLIP_S), 3), int)
  for number, ratings in rated:
    if not 0 <= number < len(full):
      raise ValueError(f"clip {number} of a video of {len(full)} clips")
    full[number] = ratings
  return full


def clips(
  predicted: Sequence[float], ratings: np.ndarray, at_least: int
) -> Clips:
  """Average precision and hit of clips by predicted saliency.

  Scores past the video's last clip are left out; missing ones are 0.

  Args:
    predicted: saliency of each clip, C >= 1 of them.
    ratings: int[C, A] from `saliency`.
    at_least: a rating from which a clip is salient.
  """
  positive = ratings >= at_least  # [C, A]
  top = int(np.argmax(predicted))
  hit = bool(top < len(positive) and positive[top].any())
  score = np.zeros(len(positive))
  part = np.asarray(predicted, np.float64)[: len(score)]
  score[: len(part)] = part
  ap = [_saliency_ap(column, score) for column in positive.T]
  return Clips(float(np.mean(ap)), float(hit))


def _saliency_ap(positive: np.ndarray, score: np.ndarray) -> float:
  """Mean precision at the recalls that are reached, equal scores together."""
  if positive.all() or not positive.any():
    return float(positive.any())
  order = np.argsort(-score, kind="stable")
  found = np.cumsum(positive[order])
  ends = np.flatnonzero(np.diff(score[order], append=-np.inf))
  found, shown = found[ends], ends + 1
  precision = np.maximum.accumulate((found / shown)[::-1])[::-1]
  # Of points with one recall the first has the highest threshold.
  rises = np.diff(found, prepend=0) > 0
  return float(np.mean(precision[rises]))
