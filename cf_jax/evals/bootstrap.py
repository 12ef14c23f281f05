"""Intervals of means by drawing videos anew.

Questions about one video are not independent, so videos are drawn, with all of
their questions. One matrix of draws serves every figure of a table.

Axes: `D` draws; `V` videos; `S` strata, whose means are averaged.
"""

from collections.abc import Sequence

import numpy as np

DRAWS = 1000


def draw(num_videos: int, *, seed: int, draws: int = DRAWS) -> np.ndarray:
  """float32[D, V] how often each video is drawn, V of them a draw."""
  rng = np.random.default_rng(seed)
  chosen = rng.integers(num_videos, size=(draws, num_videos))
  counts = np.zeros((draws, num_videos), np.float32)
  for row, videos in zip(counts, chosen, strict=True):
    row += np.bincount(videos, minlength=num_videos)
  return counts


def mean_interval(
  values: np.ndarray,
  weights: np.ndarray,
  videos: np.ndarray,
  strata: Sequence[int],
  drawn: np.ndarray,
  *,
  shares: Sequence[float] = (1.0,),
  level: float = 0.95,
) -> tuple[float, float] | None:
  """Percentile interval of a mean, or of the mean of several strata's means.

  Args:
    values: float[n] of the questions, times their weights.
    weights: float[n].
    videos: int[n] the video of each question.
    strata: int[n] the stratum of each question, 0 where there is only one.
    drawn: float32[D, V] from `draw`.
    shares: of the S strata in their mean; they need not sum to 1.
    level: coverage.

  Returns:
    (low, high); None with fewer than two videos, which say nothing.
  """
  if len(np.unique(videos)) < 2:
    return None
  strata = np.asarray(strata)
  shape = (drawn.shape[1], len(shares))
  sums, counts = np.zeros(shape), np.zeros(shape)
  np.add.at(sums, (videos, strata), values)
  np.add.at(counts, (videos, strata), weights)
  total = drawn @ counts  # [D, S]
  mean = np.divide(drawn @ sums, total, out=0 * total, where=total > 0)
  # A draw may miss a small stratum, or all of a small group.
  share = np.where(total > 0, np.asarray(shares), 0.0)
  whole = share.sum(axis=1)
  found = (share * mean).sum(axis=1)[whole > 0] / whole[whole > 0]
  tail = (1 - level) / 2
  low, high = np.quantile(found, [tail, 1 - tail])
  return float(low), float(high)
