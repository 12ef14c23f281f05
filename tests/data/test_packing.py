"""Which samples share a row, by hand."""

import numpy as np
import pytest

from cf_jax.data import packing
from cf_jax.types import Prompt, Rollout


def test_first_fit_by_hand():
  """Ten slots and three pictures a row."""
  size = np.array([[3, 1], [7, 1], [4, 1], [6, 2], [2, 3]])
  rows = packing.fit(size, np.array([10, 3]))
  # By slots: 7, 6 and 4 behind it, 3 behind 7. The last brings three pictures.
  assert rows == [[1, 0], [3, 2], [4]]
  used = [size[row].sum(axis=0).tolist() for row in rows]
  assert used == [[10, 2], [10, 3], [2, 3]]


def _batch(read, told, pictures):
  """Prompts of a text slot, pictures of one slot each, and text."""
  count, slots, length = len(read), 6, 3
  place = np.arange(slots)
  mask = place < np.array(read)[:, None]
  shown = (place > 0) & (place <= np.array(pictures)[:, None])
  prompt = Prompt(
    token=10 * (1 + np.arange(count))[:, None] + place,
    mask=mask,
    position=np.where(mask[:, None], 2 * place, 99).repeat(3, axis=1),
    visual=np.where(shown, place - 1, -1),
  )
  target = Rollout(
    token=100 * (1 + np.arange(count))[:, None, None] + np.arange(length),
    mask=np.arange(length) < np.array(told)[:, None, None],
    logprob=None,
    finished=None,
  )
  frame = np.tile(np.arange(4)[::-1], (count, 1))
  return prompt, frame, target


@pytest.mark.parametrize("on_prompt", [False, True])
def test_a_row_by_hand(on_prompt):
  """Two samples fill 3 + 2 - 1 and 4 + 3 - 1 of 16 slots."""
  made = packing.lay(
    *_batch([3, 4], [2, 3], [1, 2]), room=2, num_visual=1, on_prompt=on_prompt
  )
  assert made.token.shape == (1, 16) and made.sample.shape == (1, 8)
  np.testing.assert_array_equal(
    made.token[0, :10], [20, 21, 22, 23, 200, 201, 10, 11, 12, 100]
  )
  np.testing.assert_array_equal(made.segment[0], [1] * 6 + [2] * 4 + [0] * 6)
  for axis in range(3):
    np.testing.assert_array_equal(
      made.position[0, axis, :10], [0, 2, 4, 6, 7, 8, 0, 2, 4, 5]
    )
  np.testing.assert_array_equal(
    made.visual[0, :10], [-1, 0, 1, -1, -1, -1, -1, 2, -1, -1]
  )
  np.testing.assert_array_equal(made.sample[0, :3], [1, 1, 0])
  np.testing.assert_array_equal(made.frame[0, :3], [3, 2, 3])
  real = made.scored[0]
  expected = [(3, 200), (4, 201), (5, 202), (8, 100), (9, 101)]
  if on_prompt:  # the text slots behind a picture
    expected = [(2, 23), *expected[:3], (7, 12), *expected[3:]]
  found = zip(made.state[0][real], made.label[0][real], strict=True)
  assert list(found) == expected
  assert real.shape == (2 * (3 + 6 * on_prompt),)


def test_never_more_rows_than_padded():
  """Full samples, and a room that longest-first would fill worse."""
  rng = np.random.default_rng(0)
  for _ in range(50):
    count = rng.integers(1, 12)
    read = rng.integers(4, 7, count)
    batch = _batch(read, rng.integers(1, 4, count), rng.integers(0, 3, count))
    for room in (1, 2, 3):
      made = packing.lay(*batch, room=room, num_visual=1, on_prompt=False)
      assert len(made.token) <= -(-count // room)
      assert made.scored.sum() == batch[2].mask.sum()
      filled = packing.fill_up(made, 15)
      assert len(filled.token) == 15 and not filled.segment[-1].any()
