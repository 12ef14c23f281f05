"""The order and values of patches."""

import numpy as np
import pytest

from cf_jax.data import patches

MEAN, STD = np.array(patches.MEAN), np.array(patches.STD)


def _reference(slots, patch, merge):
  """float[slices, temporal, h, w, 3] -> patches, one pixel at a time."""
  slices, temporal, height, width, _ = slots.shape
  rows = []
  for n in range(slices):
    for block_row in range(height // patch // merge):
      for block_column in range(width // patch // merge):
        for row in range(merge):
          for column in range(merge):
            top = (block_row * merge + row) * patch
            left = (block_column * merge + column) * patch
            rows.append(
              [
                slots[n, t, top + y, left + x, c]
                for c in range(3)
                for t in range(temporal)
                for y in range(patch)
                for x in range(patch)
              ]
            )
  return np.array(rows).reshape(slices, -1, 3 * temporal * patch * patch)


def _frames(count, height, width):
  pixels = np.arange(count * height * width * 3) * 37 % 251
  return pixels.reshape(count, height, width, 3).astype(np.uint8)


def test_matches_the_definition():
  frames = _frames(2, 8, 12)
  found = patches.frames_to_patches(frames, patch=2, merge=2)
  level = (frames / 255 - MEAN) / STD
  expected = _reference(np.stack([level, level], axis=1), 2, 2)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pairs_match_the_definition():
  frames = _frames(3, 4, 4)
  found = patches.frames_to_patches(frames, patch=2, merge=2, pair=True)
  level = (frames[[0, 1, 2, 2]] / 255 - MEAN) / STD
  expected = _reference(level.reshape(2, 2, 4, 4, 3), 2, 2)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_size_of_the_small_policy():
  frames = np.zeros((3, 56, 56, 3), np.uint8)
  assert patches.frames_to_patches(frames).shape == (3, 16, 1176)
  grid = patches.grid_of(56, 56)
  assert grid == (4, 4) and patches.num_tokens(grid) == 4


def test_merge_blocks_come_first():
  """Patch order of a 4 x 4 grid: the top left square, then its right one."""
  frames = np.zeros((1, 56, 56, 3), np.uint8)
  for patch in range(16):
    row, column = divmod(patch, 4)
    frames[0, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14] = patch
  found = patches.frames_to_patches(frames, mean=(0, 0, 0), std=(1, 1, 1))
  np.testing.assert_array_equal(
    np.rint(found[0, :, 0] * 255),
    [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15],
  )


def test_bad_sizes_and_types():
  with pytest.raises(ValueError, match="60 x 56 px.*data.reader.size_px"):
    patches.grid_of(60, 56)
  with pytest.raises(ValueError, match="uint8"):
    patches.frames_to_patches(np.zeros((0, 56, 56, 3), np.uint8), pair=True)
  with pytest.raises(ValueError, match="uint8"):
    patches.frames_to_patches(np.zeros((1, 56, 56, 3), np.float32))
