"""What differs between two evaluations of the same questions.

Questions about one video are answered from the same frames: they are no
independent draws. So intervals resample videos, each with all its questions,
and where a video has several of them the test is over videos too.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from cf_jax.evals import bootstrap, paired

MCNEMAR = "McNemar, exact"
PAIRED_T = "paired t over videos"

DRAWS = 4000  # of videos, behind an interval


class Difference(NamedTuple):
  """Second less first, over the questions that both have.

  Attributes:
    first: mean of the first evaluation.
    second: mean of the second.
    mean: of the differences.
    low: end of the bootstrap interval of the mean; NaN for a single video.
    high: its other end.
    p: two-sided; NaN for a single video with several questions.
    test: what `p` is of, `MCNEMAR` or `PAIRED_T`.
    gained: questions with more in the second.
    lost: questions with less in the second.
    count: questions.
    units: videos, which are resampled.
  """

  first: float
  second: float
  mean: float
  low: float
  high: float
  p: float
  test: str
  gained: int
  lost: int
  count: int
  units: int


def mcnemar(gained: int, lost: int) -> float:
  """Two-sided exact p of McNemar's test (1947): a fair coin's, for the pairs.

  Args:
    gained: pairs that are wrong first and right second.
    lost: pairs that are right first and wrong second.
  """
  if not gained + lost:
    return 1.0
  return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def compare(
  first: Sequence[float],
  second: Sequence[float],
  units: Sequence[Hashable],
  *,
  draws: int = DRAWS,
  level: float = 0.95,
  seed: int = 0,
) -> Difference:
  """Two evaluations, question by question.

  McNemar's test where values are 0 or 1 and every video has one question; else
  Student's over the sums of the videos' differences.

  Args:
    first: float[n] scores.
    second: float[n] scores of the same questions.
    units: the video of each question.
    draws: of as many videos as there are, with replacement.
    level: coverage of the interval.
    seed: of the draws.

  Raises:
    ValueError: no questions, or lengths that differ.
  """
  first, second = (np.asarray(x, np.float64) for x in (first, second))
  if not len(first) == len(second) == len(units) or not len(units):
    raise ValueError(
      f"got {len(first)} and {len(second)} scores of {len(units)} questions;"
      " expected one of each for every question, and at least one question"
    )
  number = {unit: n for n, unit in enumerate(dict.fromkeys(units))}
  video = np.asarray([number[unit] for unit in units])
  change = second - first
  ends = bootstrap.mean_interval(
    change,
    np.ones(len(change)),
    video,
    np.zeros(len(change), int),
    bootstrap.draw(len(number), seed=seed, draws=draws),
    level=level,
  )
  gained, lost = int(np.sum(change > 0)), int(np.sum(change < 0))
  binary = bool(np.all(np.isin(first, (0, 1)) & np.isin(second, (0, 1))))
  if binary and len(number) == len(change):
    test, p = MCNEMAR, mcnemar(gained, lost)
  else:
    sums = np.bincount(video, weights=change)
    test = PAIRED_T
    p = paired.paired(sums).p if len(sums) > 1 else math.nan
  return Difference(
    first=float(first.mean()),
    second=float(second.mean()),
    mean=float(change.mean()),
    low=ends[0] if ends else math.nan,
    high=ends[1] if ends else math.nan,
    p=p,
    test=test,
    gained=gained,
    lost=lost,
    count=len(change),
    units=len(number),
  )
