"""QVHighlights' metrics on cases worked by hand."""

import numpy as np
import pytest

from cf_jax.evals import highlights


def test_average_precision_by_hand():
  """Right, wrong, right of two true windows: 1/2 * 1 + 1/2 * 2/3."""
  truths = [(0, 10), (20, 30)]
  predicted = [(0, 10, 0.9), (50, 60, 0.8), (20, 30, 0.7)]
  made = highlights.moments(predicted, truths)
  np.testing.assert_allclose(made.ap, np.full(10, 5 / 6))
  assert made.iou == 1


def test_a_window_is_taken_once_and_scores_rank():
  """The better score comes first; the second window finds nothing left."""
  predicted = [(1, 10, 0.1), (0, 10, 0.9)]
  made = highlights.moments(predicted, [(0, 10)])
  np.testing.assert_allclose(made.ap, np.ones(10))
  # Recall at one looks at the window that is listed first: IoU 9/10.
  assert made.iou == pytest.approx(0.9)


def test_limits_of_iou():
  """IoU 0.72 reaches the limits 0.5 to 0.7."""
  made = highlights.moments([(0, 18, 1.0)], [(0, 25)])
  np.testing.assert_allclose(made.ap, [1] * 5 + [0] * 5)
  assert highlights.LIMITS[2] == 0.6


def test_only_ten_windows_count():
  wrong = [(100, 110, 1.0)] * 10
  made = highlights.moments([*wrong, (0, 10, 2.0)], [(0, 10)])
  assert not made.ap.any()


def test_no_window_is_wrong():
  made = highlights.moments([], [(0, 10)])
  assert not made.ap.any() and made.iou == 0


def test_lengths():
  windows = [(0, 10), (0, 12), (0, 30), (0, 32)]
  assert highlights.of_length(windows, "short") == [(0, 10)]
  assert highlights.of_length(windows, "middle") == [(0, 12), (0, 30)]
  assert highlights.of_length(windows, "long") == [(0, 32)]
  assert highlights.of_length(windows, "full") == windows


def test_clips_by_hand():
  """Ranking 2, 0, 1: the only salient clip, 0, comes second: AP 1/2."""
  ratings = highlights.saliency([(0, (4, 4, 0)), (1, (1, 1, 1))], 6)
  assert ratings.shape == (3, 3)
  made = highlights.clips([0.5, 0.1, 0.9], ratings, 4)
  # The third annotator has no salient clip: 0.
  assert made.ap == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
  assert made.hit == 0
  assert highlights.clips([0.5, 0.1, 0.2], ratings, 4).hit == 1


def test_equal_scores_are_one_threshold():
  """All clips at once: precision 1/3, whatever their order."""
  ratings = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
  assert highlights.clips([0, 0, 0], ratings, 1).ap == pytest.approx(1 / 3)


def test_scores_of_another_length():
  ratings = np.array([[1] * 3, [0] * 3])
  # The top score lies past the end: no hit; a missing score is 0.
  assert highlights.clips([0.1, 0.2, 0.9], ratings, 1).hit == 0
  assert highlights.clips([-1], ratings, 1).ap == pytest.approx(0.5)


def test_a_clip_outside_the_video():
  with pytest.raises(ValueError, match="clip 9 of a video of 3 clips"):
    highlights.saliency([(9, (1, 1, 1))], 6)
