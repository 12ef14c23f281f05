"""The pixel descriptor: what it weighs, and what it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax import descriptor

describe = jax.jit(descriptor.pixel_descriptor)


def scene(seed, size=64):
  """A moving texture, and a coloured square that can be put on it."""
  rng = np.random.default_rng(seed)
  coarse = rng.uniform(60, 180, (24, 24, 3))
  coarse = 0.7 * coarse.mean(2, keepdims=True) + 0.3 * coarse
  return np.kron(coarse, np.ones((8, 8, 1)))[: size * 2, : size * 2]


def distance(left, right):
  return 1 - np.sum(left * right) / np.linalg.norm(left) / np.linalg.norm(right)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_descriptor_weighs_a_shape_above_motion_and_light(seed):
  texture = scene(seed)
  plain = texture[:64, :64]
  shape = plain.copy()
  shape[16:48, 20:52] = (225, 35, 35)
  frames = {
    "plain": plain,
    "moved": texture[3:67, 2:66],
    "darker": 0.8 * plain,
    "brighter": 1.2 * plain,
    "shape": shape,
    "moved shape": np.roll(shape, (4, -6), (0, 1)),
    "noisy": plain + np.random.default_rng(0).normal(0, 5, plain.shape),
  }
  stack = np.stack(list(frames.values())).clip(0, 255).astype(np.uint8)
  found = np.asarray(describe(stack))
  found = dict(zip(frames, found, strict=True))
  small = [
    distance(found["plain"], found[name])
    for name in ("moved", "darker", "brighter", "noisy")
  ]
  large = [
    distance(found["plain"], found[name]) for name in ("shape", "moved shape")
  ]
  assert min(large) > 3 * max(small), (small, large)


def test_descriptor_tells_light_from_dark_places():
  """Grey pictures have one chromaticity; the layout tells them apart."""
  left = np.full((32, 32, 3), 40, np.uint8)
  left[:, :16] = 220
  found = describe(np.stack([left, left[:, ::-1]]))
  assert distance(np.asarray(found[0]), np.asarray(found[1])) > 0.05


@pytest.mark.parametrize("shape", [(4, 4), (31, 47), (64, 64), (90, 160)])
def test_descriptor_shapes(shape):
  frames = np.random.default_rng(0).integers(
    0, 256, (2, 3, *shape, 3), dtype=np.uint8
  )
  found = describe(frames)
  assert found.shape == (2, 3, 98) and found.dtype == jnp.float32
  assert np.all(np.isfinite(found))
  alone = describe(frames[1, 2])
  np.testing.assert_allclose(found[1, 2], alone, atol=1e-5)


@pytest.mark.parametrize("level", [0, 255])
def test_descriptor_of_blank_frames(level):
  frame = np.full((16, 16, 3), level, np.uint8)
  assert np.all(np.isfinite(describe(frame)))


def test_descriptor_of_too_small_frames():
  with pytest.raises(ValueError, match="3 x 9 px, expected at least 4"):
    descriptor.pixel_descriptor(np.zeros((3, 9, 3), np.uint8))
