"""Rotary angles by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from cf_jax.models import rope


def test_patch_positions_are_in_merge_block_order():
  np.testing.assert_array_equal(
    rope.patch_positions((2, 4), merge=2),
    [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]],
  )
  np.testing.assert_array_equal(
    rope.patch_positions((3, 2), merge=1),
    [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]],
  )


def test_vision_angles():
  # Head width 8: two frequencies for the row, two for the column.
  angle = rope.vision_angles((2, 4), merge=2, head_dim=8, theta=10_000.0)
  assert angle.shape == (8, 4) and angle.dtype == np.float32
  np.testing.assert_allclose(angle[7], [1, 0.01, 3, 0.03], rtol=1e-6)


def test_mrope_frequencies_follow_their_axis():
  position = jnp.array([[[7, 1], [0, 2], [0, 3]]])  # [B, 3, S]
  cos, sin = rope.mrope(position, section=(1, 1, 1), theta=1e6)
  angle = np.array([[7, 0, 0], [1, 2e-2, 3e-4]])
  assert cos.shape == (1, 2, 3)
  np.testing.assert_allclose(cos[0], np.cos(angle), rtol=1e-6)
  np.testing.assert_allclose(sin[0], np.sin(angle), rtol=1e-6, atol=1e-9)


def test_mrope_keeps_large_positions_apart_in_bfloat16():
  position = jnp.broadcast_to(jnp.array([256, 257]), (1, 3, 2))
  cos, sin = rope.mrope(position, section=(1, 1, 1), theta=1e6)
  assert cos.dtype == sin.dtype == jnp.float32
  x = jnp.ones((1, 2, 1, 6), jnp.bfloat16)
  turned = rope.rotate(x, cos, sin)
  assert turned.dtype == jnp.bfloat16
  assert not np.array_equal(turned[0, 0], turned[0, 1])


def test_rotate_by_a_right_angle():
  x = jnp.array([[[[1.0, 2.0, 3.0, 4.0]]]])  # pairs (1, 3) and (2, 4)
  cos = jnp.array([[[0.0, 1.0]]])
  sin = jnp.array([[[1.0, 0.0]]])
  np.testing.assert_allclose(rope.rotate(x, cos, sin), [[[[-3, 2, 1, 4]]]])


def test_scores_depend_on_relative_position_only():
  rng = np.random.default_rng(0)
  query, key = rng.normal(size=(2, 1, 1, 1, 12)).astype(np.float32)

  @jax.jit
  def score(at_query, at_key):
    def turn(x, at):
      at = jnp.broadcast_to(jnp.asarray(at)[None, :, None], (1, 3, 1))
      return rope.rotate(x, *rope.mrope(at, section=(2, 2, 2), theta=1e4))

    return jnp.sum(turn(query, at_query) * turn(key, at_key))

  near = score(jnp.array([5, 4, 9]), jnp.array([3, 3, 1]))
  far = score(jnp.array([105, 54, 29]), jnp.array([103, 53, 21]))
  np.testing.assert_allclose(near, far, rtol=1e-4)
