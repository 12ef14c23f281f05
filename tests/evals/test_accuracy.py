"""Wilson's interval against printed values, and accuracies per task."""

import numpy as np
import pytest

from cf_jax.evals import accuracy


@pytest.mark.parametrize(
  ("right", "count", "low", "high"),
  [
    # (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), by hand
    (5, 10, 0.236593, 0.763407),
    (0, 10, 0.0, 0.277533),
    (10, 10, 0.722467, 1.0),
    (1, 1, 0.206549, 1.0),
    (81, 263, 0.255289, 0.366200),  # Newcombe 1998, table I
    (15, 148, 0.062390, 0.160504),  # the same
  ],
)
def test_wilson(right, count, low, high):
  found = accuracy.wilson(right, count)
  assert found.accuracy == right / count and found.count == count
  np.testing.assert_allclose([found.low, found.high], [low, high], atol=3e-4)
  assert 0 <= found.low <= found.accuracy <= found.high <= 1


def test_the_share_lies_inside_its_interval():
  for count in range(1, 200):
    for right in (0, 1, count - 1, count):
      found = accuracy.wilson(right, count)
      assert 0 <= found.low <= found.accuracy <= found.high <= 1


@pytest.mark.parametrize(
  ("error", "expected"), [(0.0, 1.0), (0.12, 0.8), (0.5, 0.0), (0.49, 0.1)]
)
def test_relative_accuracy(error, expected):
  """An error of 0.12 is below 1 - limit for .50 to .85: 8 of ten limits."""
  assert accuracy.relative_accuracy(1 - error) == pytest.approx(expected)


def test_intervals_shrink_and_follow_z():
  wide, narrow = accuracy.wilson(50, 100), accuracy.wilson(500, 1000)
  assert narrow.high - narrow.low < wide.high - wide.low
  assert accuracy.wilson(50, 100, z=1.0).high < wide.high


@pytest.mark.parametrize(("right", "count"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_errors(right, count):
  with pytest.raises(ValueError, match=f"got {right} right of {count}"):
    accuracy.wilson(right, count)


@pytest.mark.parametrize("dtype", [bool, float, int])
def test_by_task(dtype):
  correct = np.array([1, 0, 1, 1, 0, 1], dtype)
  tasks = ["order", "order", "needle", "needle", "needle", "count"]
  found = accuracy.by_task(correct, tasks)
  assert list(found) == ["count", "needle", "order", "all"]
  assert {task: (row.accuracy, row.count) for task, row in found.items()} == {
    "count": (1.0, 1),
    "needle": (2 / 3, 3),
    "order": (0.5, 2),
    "all": (4 / 6, 6),
  }
