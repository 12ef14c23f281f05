"""The vision tower: patches of single slices to visual tokens.

Every temporal slice is on its own: attention never crosses one. Most blocks
attend within square windows, a few to the whole slice. The grid is static, so
windows, their order and the rotary angles are tables made in numpy.

Axes: `N` slices (in shapes of activations; heads are written `heads`), `P`
visual tokens per slice (4P patches), `D` tower width, `H` head width, `L`
blocks.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cf_jax.models import layers, rope
from cf_jax.models.config import VLMConfig
from cf_jax.runtime import sharding


class Windows(NamedTuple):
  """How one slice is cut into attention windows.

  Attributes:
    order: int32[4P] patches (merge-block order) listed window by window.
    inverse: int32[P] where each visual token went in the list of windows.
    slot: int32[windows, slots] places in the list of windows; the tail of a
      window that the edge of the grid cuts off repeats place 0.
    mask: bool[windows, slots] False on such a tail.
    place: int32[4P] for each place its number in `slot`, flattened.
  """

  order: np.ndarray
  inverse: np.ndarray
  slot: np.ndarray
  mask: np.ndarray
  place: np.ndarray


def windows(grid: tuple[int, int], *, merge: int, units: int) -> Windows:
  """Cuts a slice into windows, those at the far edges possibly smaller.

  Args:
    grid: (height, width) of the slice in patches.
    merge: side of a visual token, in patches.
    units: side of a window, in visual tokens.

  Raises:
    ValueError: the grid does not divide into visual tokens.
  """
  if grid[0] % merge or grid[1] % merge or min(grid) < merge:
    raise ValueError(
      f"a grid must be (height, width) in patches, multiples of {merge}, got"
      f" {grid}; change the frame size"
    )
  height, width = grid[0] // merge, grid[1] // merge
  unit = np.arange(height * width, dtype=np.int32).reshape(height, width)
  members = [
    unit[top : top + units, left : left + units].reshape(-1)
    for top in range(0, height, units)
    for left in range(0, width, units)
  ]
  token = np.concatenate(members)
  area = merge * merge
  order = (token[:, None] * area + np.arange(area, dtype=np.int32)).reshape(-1)
  count = np.array([len(member) * area for member in members])
  offset = np.arange(count.max())
  mask = offset < count[:, None]
  slot = np.where(mask, (np.cumsum(count) - count)[:, None] + offset, 0)
  return Windows(
    order=order,
    inverse=np.argsort(token).astype(np.int32),
    slot=slot.astype(np.int32),
    mask=mask,
    place=np.flatnonzero(mask).astype(np.int32),
  )


class VisionLayer(nn.Module):
  """One block; its parameters are stacked over the blocks by the caller."""

  config: VLMConfig

  @nn.compact
  def __call__(self, x, cos, sin, full, cut: Windows):
    """[N, 4P, D], [4P, H / 2] twice, bool[] -> [N, 4P, D]."""
    tower = self.config.vision
    settings = dict(
      use_bias=True,
      std=tower.initializer_range,
      dtype=self.config.dtype,
      param_dtype=self.config.param_dtype,
    )

    def norm(name):
      return layers.RMSNorm(
        tower.rms_norm_eps, self.config.param_dtype, name=name
      )

    def project(name):
      return layers.linear(
        (tower.num_heads, tower.head_dim), name=name, **settings
      )

    x = sharding.over_batch(x, self.config.mesh)
    y = norm("attention_norm")(x)
    query = rope.rotate(project("query")(y), cos, sin)
    key = rope.rotate(project("key")(y), cos, sin)
    value = project("value")(y)
    mixed = jax.lax.cond(
      full,
      self._attend_slice,
      lambda *qkv: self._attend_window(cut, *qkv),
      query,
      key,
      value,
    )
    x = x + layers.linear(
      tower.hidden_size, axis=(-2, -1), name="out", **settings
    )(mixed)
    mlp = layers.SwiGLU(width=tower.intermediate_size, name="mlp", **settings)
    x = x + mlp(norm("mlp_norm")(x))
    return sharding.over_batch(x, self.config.mesh)

  def _attend_slice(self, query, key, value):
    return layers.attend(
      query,
      key,
      value,
      None,
      implementation=self.config.attention,
      mesh=self.config.mesh,
    )

  def _attend_window(self, cut, query, key, value):
    num_slices, num_patches = query.shape[:2]
    num_windows, num_slots = cut.slot.shape
    whole = cut.mask.all()

    def split(x):
      if not whole:
        x = x[:, cut.slot.reshape(-1)]
      return x.reshape(num_slices * num_windows, num_slots, *x.shape[2:])

    mask = None
    if not whole:
      mask = jnp.tile(cut.mask, (num_slices, 1))[:, None]
    mixed = layers.attend(
      split(query),
      split(key),
      split(value),
      mask,
      implementation=self.config.attention,
      mesh=self.config.mesh,
    )
    mixed = mixed.reshape(num_slices, num_windows * num_slots, *query.shape[2:])
    return mixed if whole else mixed[:, cut.place]


class PatchEmbed(nn.Module):
  """A patch's pixels to the tower's width, without a bias."""

  config: VLMConfig

  @nn.compact
  def __call__(self, patches):
    tower = self.config.vision
    return layers.linear(
      tower.hidden_size,
      use_bias=False,
      std=tower.initializer_range,
      dtype=self.config.dtype,
      param_dtype=self.config.param_dtype,
      name="proj",
    )(patches)


class Merger(nn.Module):
  """Joins the patches of a merged square into one visual token."""

  config: VLMConfig

  @nn.compact
  def __call__(self, x):
    """[N, 4P, D] -> [N, P, out_hidden_size]."""
    tower = self.config.vision
    settings = dict(
      use_bias=True,
      std=tower.initializer_range,
      dtype=self.config.dtype,
      param_dtype=self.config.param_dtype,
    )
    area = tower.spatial_merge_size**2
    x = layers.RMSNorm(
      tower.rms_norm_eps, self.config.param_dtype, name="norm"
    )(x)
    x = x.reshape(x.shape[0], -1, area * x.shape[-1])
    x = layers.linear(x.shape[-1], name="up", **settings)(x)
    x = nn.gelu(x, approximate=False)
    return layers.linear(tower.out_hidden_size, name="down", **settings)(x)


def init(config: VLMConfig, rng: jax.Array) -> dict:
  """Fresh parameters of the tower."""
  tower = config.vision
  merge = tower.spatial_merge_size
  cut = windows((merge, merge), merge=merge, units=tower.window_units)
  patches = jnp.zeros((1, merge**2, tower.patch_dim), config.dtype)
  x = jnp.zeros((1, merge**2, tower.hidden_size), config.dtype)
  angle = jnp.zeros((merge**2, tower.head_dim // 2))
  embed_rng, layer_rng, merger_rng = jax.random.split(rng, 3)
  return {
    "patch_embed": PatchEmbed(config).init(embed_rng, patches)["params"],
    "layers": layers.init_stack(
      # One visual token shows no kernel what it is made for.
      VisionLayer(dataclasses.replace(config, attention="xla")),
      layer_rng,
      tower.depth,
      x,
      angle,
      angle,
      True,
      cut,
    ),
    "merger": Merger(config).init(merger_rng, x)["params"],
  }


def encode(
  config: VLMConfig,
  params: dict,
  patches: jax.Array,
  grid: tuple[int, int],
) -> jax.Array:
  """Visual tokens of independent temporal slices.

  Args:
    config: the model.
    params: the tower's parameters.
    patches: float[N, 4P, patch_dim] normalised pixels in the processor's
      order: merged squares row by row, and row by row within each; a patch is
      (colour, frame, row, column).
    grid: static (height, width) of a slice in patches.

  Returns:
    float[N, P, out_hidden_size], visual tokens row by row.

  Raises:
    ValueError: the patches do not fit the grid or the model.
  """
  return run(config, params, patches, grid, with_hidden=False)[0]


def run(
  config: VLMConfig,
  params: dict,
  patches: jax.Array,
  grid: tuple[int, int],
  *,
  with_hidden: bool,
) -> tuple[jax.Array, jax.Array | None]:
  """Visual tokens, and what each block made of the patches.

  Args:
    config: as in `encode`.
    params: as in `encode`.
    patches: as in `encode`.
    grid: as in `encode`.
    with_hidden: also return every block's output.

  Returns:
    float[N, P, out_hidden_size], and float[L, N, 4P, D] in the order of the
    patches, or None.

  Raises:
    ValueError: the patches do not fit the grid or the model.
  """
  tower = config.vision
  cut = windows(grid, merge=tower.spatial_merge_size, units=tower.window_units)
  expected = (grid[0] * grid[1], tower.patch_dim)
  if patches.ndim != 3 or patches.shape[1:] != expected:
    raise ValueError(
      f"patches must be [N, {expected[0]}, {expected[1]}] for a grid of"
      f" {grid} patches, got {patches.shape}; change the frame size or"
      " config.model.vision.patch_size"
    )
  angle = rope.vision_angles(
    grid,
    merge=tower.spatial_merge_size,
    head_dim=tower.head_dim,
    theta=tower.rope_theta,
  )[cut.order]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  full = np.isin(np.arange(tower.depth), tower.fullatt_block_indexes)
  x = PatchEmbed(config).apply(
    {"params": params["patch_embed"]}, patches.astype(config.dtype)
  )
  x = x[:, cut.order]

  def body(x, layer):
    layer_params, is_full = layer
    x = VisionLayer(config).apply(
      {"params": layer_params}, x, cos, sin, is_full, cut
    )
    return x, x if with_hidden else None

  x, hidden = layers.scan_stack(
    body,
    x,
    (params["layers"], jnp.asarray(full)),
    remat=config.remat,
    unroll=config.scan_unroll,
  )
  token = Merger(config).apply({"params": params["merger"]}, x)
  if with_hidden:
    hidden = hidden[:, :, np.argsort(cut.order)]
  return token[:, cut.inverse], hidden
