"""Intervals from drawing videos anew."""

import numpy as np
import pytest

from cf_jax.evals import bootstrap


def test_every_draw_has_as_many_videos():
  drawn = bootstrap.draw(7, seed=1, draws=50)
  assert drawn.shape == (50, 7)
  assert np.all(drawn.sum(axis=1) == 7) and drawn.std() > 0
  np.testing.assert_array_equal(drawn, bootstrap.draw(7, seed=1, draws=50))


def test_the_interval_of_a_mean_is_the_normal_one():
  """400 independent questions: mean -+ 1.96 std / sqrt(n)."""
  values = np.random.default_rng(0).normal(0.5, 0.1, 400)
  low, high = bootstrap.mean_interval(
    values,
    np.ones(400),
    np.arange(400),
    np.zeros(400, int),
    bootstrap.draw(400, seed=0),
  )
  half = 1.96 * values.std() / 20
  assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
  assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_questions_of_one_video_are_not_independent():
  """Ten equal questions a video: as wide as one question a video."""
  values = np.repeat(np.random.default_rng(1).normal(size=60), 10)
  videos = np.repeat(np.arange(60), 10)
  drawn = bootstrap.draw(60, seed=0)
  low, high = bootstrap.mean_interval(
    values, np.ones(600), videos, np.zeros(600, int), drawn
  )
  one = bootstrap.mean_interval(
    values[::10], np.ones(60), np.arange(60), np.zeros(60, int), drawn
  )
  assert (low, high) == pytest.approx(one)


def test_strata_are_averaged_with_their_shares():
  """Constant strata of 1 and 0 at shares 3 and 1: 0.75 in every draw."""
  values = np.array([1.0, 1, 0, 0, 0, 0])
  found = bootstrap.mean_interval(
    values,
    np.ones(6),
    np.array([0, 1, 0, 1, 0, 1]),
    np.array([0, 0, 1, 1, 1, 1]),
    bootstrap.draw(2, seed=0),
    shares=(3.0, 1.0),
  )
  assert found == pytest.approx((0.75, 0.75))


def test_one_video_says_nothing():
  assert (
    bootstrap.mean_interval(
      np.ones(3),
      np.ones(3),
      np.zeros(3, int),
      np.zeros(3, int),
      bootstrap.draw(1, seed=0),
    )
    is None
  )
