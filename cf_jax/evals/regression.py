"""Numbers that are estimated: mean relative accuracy (arXiv 2412.14171)."""

import numpy as np

# 0.50, 0.55, ..., 0.95; 1 - limit in float64 as the benchmark's script has it.
_ERRORS = 1 - np.linspace(0.5, 0.95, 10)


def mean_relative_accuracy(value: float | None, truth: float) -> float:
  """Share of ten limits that the relative error of a number keeps.

  `mean over c of [ |value - truth| / truth <= 1 - c ]`, c = .50, .55, ..., .95;
  VSI-Bench's script has `<=` where its paper has `<`.

  Args:
    value: what was said; None for no number.
    truth: not 0.

  Raises:
    ValueError: the truth is 0.
  """
  if truth == 0:
    raise ValueError("a relative error needs a truth that is not 0")
  if value is None:
    return 0.0
  return float(np.mean(abs(value - truth) / truth <= _ERRORS))
