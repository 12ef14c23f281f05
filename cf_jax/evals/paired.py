"""Paired comparisons over seeds: t-intervals, and Holm's correction."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Paired(NamedTuple):
  """Mean of paired differences with its t-interval and two-sided p-value."""

  mean: float
  low: float
  high: float
  p: float
  count: int


def paired(differences: Sequence[float], *, level: float = 0.95) -> Paired:
  """Student's interval of the mean of differences, one a seed.

  Args:
    differences: n >= 2 numbers, each of one seed under two conditions.
    level: coverage of the interval.

  Raises:
    ValueError: fewer than two differences.
  """
  values = np.asarray(differences, np.float64)
  if values.ndim != 1 or len(values) < 2:
    raise ValueError(
      f"got {values.size} differences, an interval takes at least 2 seeds"
    )
  mean = float(values.mean())
  error = float(values.std(ddof=1)) / math.sqrt(len(values))
  free = len(values) - 1
  half = float(stats.t.ppf(0.5 + level / 2, free)) * error
  if error:
    p = 2 * float(stats.t.sf(abs(mean) / error, free))
  else:
    p = 1.0 if mean == 0 else 0.0
  return Paired(mean, mean - half, mean + half, p, len(values))


def holm(p: Sequence[float]) -> list[float]:
  """Holm's adjusted p-values (1979), in the order given.

  The k-th smallest of m is multiplied by m + 1 - k; none is below a smaller
  one's, none above 1.
  """
  order = np.argsort(p, kind="stable")
  adjusted, least = [0.0] * len(p), 0.0
  for rank, place in enumerate(order):
    least = max(least, min(1.0, (len(p) - rank) * p[place]))
    adjusted[place] = least
  return adjusted
