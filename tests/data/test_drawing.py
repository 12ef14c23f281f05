"""Numbers on frames: where they stand, and that they differ."""

import numpy as np
import pytest

from cf_jax.data import drawing


@pytest.mark.parametrize("size_px", [(112, 112), (56, 112), (56, 56)])
def test_numbers_stand_at_the_bottom_right_and_differ(size_px):
  height, width = size_px
  frames = np.full((128, height, width, 3), 90, np.uint8)
  before = frames.copy()
  drawn = drawing.draw_numbers(frames, np.arange(128))
  np.testing.assert_array_equal(frames, before)
  changed = np.any(drawn != frames, axis=-1)
  assert not changed[:, : height // 2].any()
  assert not changed[:10, :, : width // 2].any()  # one digit
  red = (drawn[..., 0] > 150) & (drawn[..., 1] < 100) & (drawn[..., 2] < 100)
  assert red.any(axis=(1, 2)).all()
  assert len({frame.tobytes() for frame in drawn}) == 128


def test_any_leading_axes():
  frames = np.zeros((2, 3, 56, 56, 3), np.uint8)
  numbers = np.arange(6).reshape(2, 3)
  drawn = drawing.draw_numbers(frames, numbers)
  for place in np.ndindex(2, 3):
    one = drawing.draw_numbers(frames[place], numbers[place])
    np.testing.assert_array_equal(drawn[place], one)
  with pytest.raises(ValueError, match="one number a frame"):
    drawing.draw_numbers(frames, np.arange(6))
