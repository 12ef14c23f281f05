"""Boxes over time."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from cf_jax.evals import tracking


def test_read_track():
  text = "[[0, 0, .5, 1], [0.1, -0.2,\n 5e-1, 1.],]"
  assert tracking.read_track(text, count=2) == (
    (0, 0, 0.5, 1),
    (0.1, -0.2, 0.5, 1),
  )


@pytest.mark.parametrize(
  "text",
  [
    "[[0, 0, 1, 1]]",
    "[[0, 0, 1], [0, 0, 1, 1]]",
    "[(0, 0, 1, 1), (0, 0, 1, 1)]",
    "[[n, n, n, n], [n, n, n, n]]",
    "boxes: [[0, 0, 1, 1], [0, 0, 1, 1]]",
    "",
  ],
)
def test_no_track(text):
  assert tracking.read_track(text, count=2) is None


def test_overlaps():
  truth = [(0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5), (0, 0, 0.2, 0.2)]
  said = [(0, 0, 0.5, 0.5), (0, 0, 0.5, 0.25), (0.5, 0.5, 1, 1)]
  assert tracking.mean_overlap(said, truth) == pytest.approx(0.5)
  found = tracking.toolkit_ious(said, truth)
  np.testing.assert_allclose(found, [0.5, 0], atol=1e-12)


def test_the_toolkit_moves_boxes_into_the_frame():
  """Width .3 from -.1 becomes 0 to .3: IoU with 0 to .2 is 2/3."""
  truth = [(0, 0, 1, 1), (0, 0, 0.2, 1)]
  said = [(0, 0, 1, 1), (-0.1, 0, 0.2, 1)]
  found = tracking.toolkit_ious(said, truth)
  np.testing.assert_allclose(found, [2 / 3])


def test_boxes_without_end_overlap_nothing():
  said = tracking.read_track("[[0, 0, 1e999, 1]]", count=1)
  assert tracking.mean_overlap(said, [(0, 0, 1, 1)]) == 0


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(strategies.text(alphabet="[]1.,e- n", max_size=80))
def test_any_text_is_read(text):
  track = tracking.read_track(text, count=1)
  if track is not None:
    assert 0 <= tracking.mean_overlap(track, [(0.1, 0.1, 0.4, 0.4)]) <= 1
