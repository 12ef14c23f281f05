"""Rotary position embedding: two axes for patches, three for the decoder.

A head of width H rotates H / 2 pairs, channel i with channel i + H / 2, by the
angle `position * theta ** (-2 i / H)`. Angles are float32 whatever the model
runs in: bfloat16 rounds the position 257 to 256.

Axes: `B` videos, `P` visual tokens per frame (4P patches), `S` sequence slots,
`N` heads, `H` head width.
"""

import jax
import jax.numpy as jnp
import numpy as np


def _frequencies(width: int, theta: float) -> np.ndarray:
  """float32[width / 2], from 1 down to about 1 / theta."""
  exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  return np.float32(1) / np.float32(theta) ** exponent


def patch_positions(grid: tuple[int, int], merge: int) -> np.ndarray:
  """int32[4P, 2] row and column of every patch, in merge-block order.

  The processor lists the patches of a merged square together: squares row by
  row, and row by row within a square.
  """
  height, width = grid
  row, column = np.meshgrid(
    np.arange(height, dtype=np.int32),
    np.arange(width, dtype=np.int32),
    indexing="ij",
  )
  position = np.stack([row, column], axis=-1)
  position = position.reshape(
    height // merge, merge, width // merge, merge, 2
  ).transpose(0, 2, 1, 3, 4)
  return position.reshape(-1, 2)


def vision_angles(
  grid: tuple[int, int], *, merge: int, head_dim: int, theta: float
) -> np.ndarray:
  """Rotary angles of the patches of one slice.

  The first half of the angles follows the row, the second the column.

  Args:
    grid: (height, width) of the slice in patches.
    merge: side of a merged square, in patches.
    head_dim: H.
    theta: base of the frequencies.

  Returns:
    float32[4P, H / 2] in merge-block order, a compile-time constant.
  """
  position = patch_positions(grid, merge).astype(np.float32)
  frequency = _frequencies(head_dim // 2, theta)
  angle = position[:, :, None] * frequency  # [4P, 2, H / 4]
  return angle.reshape(len(position), -1)


def mrope(
  position: jax.Array, *, section: tuple[int, int, int], theta: float
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of multimodal RoPE (Qwen2-VL, arXiv 2409.12191, 2.1).

  Frequency i follows the time position for i < section[0], the height position
  for the next section[1], the width position for the last section[2].

  Args:
    position: int32[B, 3, S] time, height and width positions.
    section: how many of the H / 2 frequencies follow each axis.
    theta: base of the frequencies.

  Returns:
    cos, sin: float32[B, S, H / 2].
  """
  axis = np.repeat(np.arange(3), section)
  frequency = _frequencies(2 * len(axis), theta)
  chosen = position[:, axis].astype(jnp.float32)  # [B, H / 2, S]
  angle = jnp.swapaxes(chosen, 1, 2) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates queries or keys, in float32.

  Args:
    x: float[..., S, N, H].
    cos: float32[..., S, H / 2].
    sin: float32[..., S, H / 2].

  Returns:
    float[..., S, N, H] in x's dtype.
  """
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[..., None, :], sin[..., None, :]
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)
