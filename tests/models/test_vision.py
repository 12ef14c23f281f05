"""Windows, slices and odd grids of the vision tower."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax.models import layers, rope, vision, vlm


def draw_patches(config, num_slices, grid, seed=0):
  shape = (num_slices, grid[0] * grid[1], config.vision.patch_dim)
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def with_full_blocks(config, blocks):
  tower = dataclasses.replace(config.vision, fullatt_block_indexes=blocks)
  return dataclasses.replace(config, vision=tower)


@functools.partial(jax.jit, static_argnums=(0, 3))
def encode(config, params, patches, grid):
  return vlm.encode_vision(config, params, patches, grid)


def test_windows_by_hand():
  # 3 x 3 visual tokens of one patch, windows of 2 x 2:
  #   0 1 | 2
  #   3 4 | 5
  #   6 7 | 8
  cut = vision.windows((3, 3), merge=1, units=2)
  np.testing.assert_array_equal(cut.order, [0, 1, 3, 4, 2, 5, 6, 7, 8])
  np.testing.assert_array_equal(cut.inverse, [0, 1, 4, 2, 3, 5, 6, 7, 8])
  np.testing.assert_array_equal(cut.mask.sum(axis=1), [4, 2, 2, 1])
  np.testing.assert_array_equal(
    cut.slot, [[0, 1, 2, 3], [4, 5, 0, 0], [6, 7, 0, 0], [8, 0, 0, 0]]
  )
  np.testing.assert_array_equal(cut.place, [0, 1, 2, 3, 4, 5, 8, 9, 12])


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (6, 10), (10, 2), (14, 6)])
def test_windows_hold_every_patch_once(grid):
  cut = vision.windows(grid, merge=2, units=2)
  number = grid[0] * grid[1]
  np.testing.assert_array_equal(np.sort(cut.order), np.arange(number))
  np.testing.assert_array_equal(
    cut.slot.reshape(-1)[cut.place], np.arange(number)
  )
  position = rope.patch_positions(grid, merge=2)[cut.order] // 4
  for slot, mask in zip(cut.slot, cut.mask, strict=True):
    assert len(np.unique(position[slot[mask]], axis=0)) == 1
  assert len(cut.slot) == -(-grid[0] // 4) * -(-grid[1] // 4)


@pytest.mark.parametrize("grid", [(4, 8), (6, 10)], ids=["whole", "ragged"])
def test_window_attention_equals_a_dense_mask(config, params, grid):
  tower = config.vision
  cut = vision.windows(grid, merge=2, units=tower.window_units)
  angle = rope.vision_angles(
    grid, merge=2, head_dim=tower.head_dim, theta=tower.rope_theta
  )[cut.order]
  window = rope.patch_positions(grid, merge=2)[cut.order] // (
    2 * tower.window_units
  )
  same = (window[:, None] == window[None]).all(axis=-1)[None]
  rng = np.random.default_rng(0)
  x = jnp.asarray(
    rng.normal(size=(3, len(angle), tower.hidden_size)), jnp.float32
  )
  layer = jax.tree.map(lambda p: p[0], params["vision"]["layers"])

  class Dense(vision.VisionLayer):
    def _attend_window(self, cut, query, key, value):
      del cut
      return layers.attend(query, key, value, same, implementation="xla")

  def run(kind):
    return jax.jit(
      lambda x: kind(config).apply(
        {"params": layer}, x, jnp.cos(angle), jnp.sin(angle), False, cut
      )
    )(x)

  np.testing.assert_allclose(run(vision.VisionLayer), run(Dense), atol=1e-5)


@pytest.mark.parametrize("grid", [(8, 8), (6, 10)])
def test_windowed_blocks_do_not_see_beyond_their_window(config, params, grid):
  # 4 x 4 patches a window, 2 x 2 visual tokens.
  patches = draw_patches(config, 1, grid)
  changed = patches.at[0, 0].add(1.0)

  def touched(config):
    before = encode(config, params, patches, grid)
    after = encode(config, params, changed, grid)
    moved = np.abs(after - before).max(axis=-1) > 1e-6
    return moved.reshape(grid[0] // 2, grid[1] // 2)

  expected = np.zeros((grid[0] // 2, grid[1] // 2), bool)
  expected[:2, :2] = True
  np.testing.assert_array_equal(touched(with_full_blocks(config, ())), expected)
  assert touched(with_full_blocks(config, (1,))).all()
  assert touched(with_full_blocks(config, (0,))).all()


@pytest.mark.parametrize("grid", [(4, 4), (6, 10), (2, 14)])
def test_slices_are_independent(config, params, grid):
  patches = draw_patches(config, 3, grid)
  token = encode(config, params, patches, grid)
  assert token.shape == (3, grid[0] * grid[1] // 4, config.hidden_size)
  for i in range(3):
    np.testing.assert_allclose(
      encode(config, params, patches[i : i + 1], grid)[0],
      token[i],
      atol=1e-5,
    )
  order = jnp.array([2, 0, 1])
  np.testing.assert_allclose(
    encode(config, params, patches[order], grid), token[order], atol=1e-5
  )


def test_vmap_and_no_jit_equal_the_batch(config, params):
  patches = draw_patches(config, 4, (6, 4)).reshape(2, 2, 24, -1)
  batch = encode(config, params, patches.reshape(4, 24, -1), (6, 4))
  mapped = jax.vmap(lambda x: vlm.encode_vision(config, params, x, (6, 4)))(
    patches
  )
  np.testing.assert_allclose(mapped.reshape(batch.shape), batch, atol=1e-5)


def test_tokens_come_out_row_by_row(config, params):
  # Equal pixels everywhere but in one merged square, no attention across.
  tower = dataclasses.replace(
    config.vision, fullatt_block_indexes=(), window_size=4
  )
  config = dataclasses.replace(config, vision=tower)
  patches = jnp.zeros((1, 24, tower.patch_dim)).at[0, 4 * 4 : 4 * 5].set(1.0)
  token = encode(config, params, patches, (6, 4))[0]
  np.testing.assert_array_equal(
    np.abs(token - token[0]).max(axis=-1) > 1e-4,
    [False, False, False, False, True, False],
  )


def test_remat_changes_no_gradient(config, params):
  patches = draw_patches(config, 2, (6, 10))

  def grads(**change):
    run = dataclasses.replace(config, **change)
    return jax.jit(
      jax.grad(
        lambda params: jnp.sum(
          jnp.sin(vision.encode(run, params, patches, (6, 10)))
        )
      )
    )(params["vision"])

  expected = grads()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(expected))
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    grads(remat="full", scan_unroll=2),
    expected,
  )


@pytest.mark.parametrize("grid", [(5, 4), (4, 3), (0, 4)])
def test_a_grid_that_does_not_merge(config, params, grid):
  patches = draw_patches(config, 1, grid)
  with pytest.raises(ValueError, match="multiples of 2"):
    vlm.encode_vision(config, params, patches, grid)


def test_patches_that_do_not_fit_the_grid(config, params):
  patches = draw_patches(config, 1, (4, 4))
  with pytest.raises(ValueError, match=r"\[N, 24, 24\].*\(6, 4\)"):
    vlm.encode_vision(config, params, patches, (6, 4))
