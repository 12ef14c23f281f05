"""Paired differences: by hand, by brute force, against scipy's own."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from cf_jax.evals import differences


@pytest.mark.parametrize(
  ("gained", "lost", "p"),
  [
    (0, 0, 1.0),
    (5, 5, 1.0),
    (6, 0, 2 / 2**6),  # six heads of six
    # At most one of ten, twice: 2 (1 + 10) / 1024.
    (1, 9, 22 / 1024),
  ],
)
def test_mcnemar_by_hand(gained, lost, p):
  assert differences.mcnemar(gained, lost) == pytest.approx(p)
  assert differences.mcnemar(lost, gained) == pytest.approx(p)


def _interval(value, units, **settings):
  found = differences.compare(np.zeros(len(value)), value, units, **settings)
  return found.low, found.high


def test_whole_videos_are_drawn():
  """All 27 equally likely draws of three videos, with 1, 2 and 3 questions."""
  value, units = [1.0, 0, 1, 0, 0, 1], list("abbccc")
  sums, counts = [1.0, 1, 1], [1, 2, 3]
  means = [
    sum(sums[u] for u in drawn) / sum(counts[u] for u in drawn)
    for drawn in itertools.product(range(3), repeat=3)
  ]
  # Of 27 means the ends of 50 %: enough draws find the same.
  expected = np.quantile(means, [0.25, 0.75], method="inverted_cdf")
  np.testing.assert_allclose(
    _interval(value, units, level=0.5, draws=20_000), expected
  )


def test_the_interval_against_scipys():
  value = np.random.default_rng(1).normal(size=60)
  theirs = stats.bootstrap(
    (value,), np.mean, method="percentile", rng=np.random.default_rng(2)
  ).confidence_interval
  np.testing.assert_allclose(_interval(value, range(60)), theirs, atol=0.02)


def test_questions_of_one_video_count_as_one():
  """The same answers four times over make no interval narrower."""
  value = np.random.default_rng(3).normal(size=30)
  once = _interval(value, range(30))
  again = _interval(np.repeat(value, 4), np.repeat(range(30), 4))
  assert again == pytest.approx(once)
  apart = _interval(np.repeat(value, 4), range(120))
  assert apart[1] - apart[0] < 0.7 * (once[1] - once[0])


def test_right_and_wrong_of_one_question_a_video():
  first, second = [0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1]
  found = differences.compare(first, second, range(6))
  assert (found.first, found.second) == (0.5, pytest.approx(5 / 6))
  assert (found.gained, found.lost, found.count, found.units) == (3, 1, 6, 6)
  assert found.test == differences.MCNEMAR
  assert found.p == pytest.approx(2 * (1 + 4) / 2**4)  # at least 3 heads of 4
  assert found.mean == pytest.approx(1 / 3)
  assert found.low <= found.mean <= found.high


@pytest.mark.parametrize(
  ("first", "second", "units"),
  [
    ([0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1], "aabbcd"),
    ([0.1, 0.5, 0.9, 0.3], [0.3, 0.4, 1.0, 0.8], "abcd"),
  ],
)
def test_the_t_test_is_over_videos(first, second, units):
  found = differences.compare(first, second, units)
  change = np.subtract(second, first)
  sums = [
    sum(c for c, u in zip(change, units) if u == unit)
    for unit in dict.fromkeys(units)
  ]
  assert found.test == differences.PAIRED_T
  assert found.p == pytest.approx(stats.ttest_1samp(sums, 0).pvalue)
  assert found.units == len(sums)


def test_one_video_has_no_interval():
  found = differences.compare([0, 1, 0], [1, 1, 0], "aaa")
  assert found.mean == pytest.approx(1 / 3)
  assert math.isnan(found.low) and math.isnan(found.p)


@pytest.mark.parametrize(
  ("first", "second", "units"),
  [([], [], ""), ([1], [1, 0], "a"), ([1], [1], "ab")],
)
def test_what_cannot_be_paired(first, second, units):
  with pytest.raises(ValueError, match="got"):
    differences.compare(first, second, units)
