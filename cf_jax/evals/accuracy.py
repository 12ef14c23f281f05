"""Accuracy per task with an interval.

The interval is Wilson's score interval (1927): it stays inside [0, 1] and is
right near both ends, where the normal interval is not.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Accuracy(NamedTuple):
  """Share of right answers among `count`, with its interval [low, high]."""

  accuracy: float
  count: int
  low: float
  high: float


def wilson(right: int, count: int, *, z: float = 1.959964) -> Accuracy:
  """The Wilson score interval of `right` out of `count` (95 % by default).

  Raises:
    ValueError: nothing was counted, or more right than counted.
  """
  if count < 1 or not 0 <= right <= count:
    raise ValueError(f"got {right} right of {count}; expected 0..count >= 1")
  share = right / count
  scale = 1 + z * z / count
  centre = (share + z * z / (2 * count)) / scale
  half = (
    z
    / scale
    * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
  )
  # At 0 and 1 rounding would put the share itself just outside.
  return Accuracy(
    share,
    count,
    min(max(centre - half, 0.0), share),
    max(min(centre + half, 1.0), share),
  )


def relative_accuracy(score: float) -> float:
  """Mean relative accuracy of one number, as VSI-Bench counts it.

  The share of the ten limits 0.50, 0.55, ..., 0.95 for which the relative error
  is below one minus the limit (arXiv 2412.14171).

  Args:
    score: 1 less the relative error, at least 0.
  """
  limits = 0.5 + 0.05 * np.arange(10)
  # A score of exactly a limit is an error that is not below: not counted.
  return float(np.mean(score > limits + 1e-9))


def by_task(correct: np.ndarray, tasks: Sequence[str]) -> dict[str, Accuracy]:
  """Accuracy of each task, and of `all` together.

  Args:
    correct: bool[n] or {0, 1}[n].
    tasks: the task of each of the n questions.
  """
  correct = np.asarray(correct).astype(bool)
  names = np.asarray(tasks)
  made = {}
  for task in sorted(set(tasks)):
    answered = correct[names == task]
    made[task] = wilson(int(answered.sum()), len(answered))
  made["all"] = wilson(int(correct.sum()), len(correct))
  return made
