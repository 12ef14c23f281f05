"""A frame embedding without weights: which colours a picture has, and where.

What `tad` scores where no vision tower is at hand: a picture goes in, float32
comes out.
"""

import chex
import jax
import jax.numpy as jnp

Array = jax.Array

_BINS = 7  # of each colour axis of the histogram
_GRID = 4  # cells per side of the layout
_FINE_PX = 32  # the histogram counts about so many averaged pixels per side


def pixel_descriptor(frames: Array) -> Array:
  """A cheap embedding of small frames: which colours, and where.

  Two parts, made for cosine distances between frames:

  - a histogram of chromaticity (red against green and both against blue, each
    over the pixel's sum), in 7 x 7 soft bins, as square roots, so that the dot
    product of two histograms is their overlap. A texture that moves keeps its
    histogram, and light of any strength keeps its chromaticities, but a
    coloured thing that appears takes its share of the picture away from the
    rest;
  - at half that weight, the layout: log luminance less the frame's mean, and
    two log colour ratios, in 4 x 4 cells. It tells apart what has the same
    colours elsewhere, and grey pictures. A constant beside it keeps the noise
    of a flat frame from counting as a picture.

  Args:
    frames: uint8[..., h, w, 3] RGB, 4 px or more a side; 64 is plenty.

  Returns:
    float32[..., 98].
  """
  chex.assert_axis_dimension(frames, -1, 3)
  *lead, height, width, _ = frames.shape
  if min(height, width) < _GRID:
    raise ValueError(
      f"frames of {height} x {width} px, expected at least {_GRID} px a side:"
      " scan larger frames"
    )
  flat = frames.reshape((-1, height, width, 3))
  # Blocks of frames that stay in cache: the soft bins take 14 floats a pixel.
  feature = jax.lax.map(_describe, flat, batch_size=32)
  return feature.reshape((*lead, -1))


def _describe(frame: Array) -> Array:
  """float32[98] of one frame uint8[h, w, 3]."""
  height, width, _ = frame.shape
  block = max(1, min(height, width) // _FINE_PX)
  rows, columns = height // block, width // block
  frame = frame[: rows * block, : columns * block].astype(jnp.float32)
  fine = frame.reshape((rows, block, columns, block, 3)).mean((1, 3))
  return jnp.concatenate([_histogram(fine), 0.5 * _layout(fine)])


def _histogram(fine: Array) -> Array:
  """float32[49]: square roots of the shares of the chromaticities."""
  red, green, blue = jnp.moveaxis(fine.reshape((-1, 3)), -1, 0)
  total = red + green + blue + 30  # the colour of near-black is noise
  across = _soft_bins((red - green) / total, 0.6)
  along = _soft_bins(((red + green) / 2 - blue) / total, 0.5)
  share = jnp.matmul(across, along.T) / red.size
  return jnp.sqrt(share + 1e-4).reshape(-1)


def _soft_bins(value: Array, reach: float) -> Array:
  """[bins, n]: each value shared between the two bins beside it."""
  centre = jnp.arange(_BINS, dtype=jnp.float32)[:, None]
  place = (jnp.clip(value / reach, -1, 1) + 1) * ((_BINS - 1) / 2)
  return jnp.maximum(0, 1 - jnp.abs(place[None, :] - centre))


def _layout(fine: Array) -> Array:
  """float32[49]: light and colours of the cells, and a constant."""
  rows = _cell_average(fine.shape[0])
  columns = _cell_average(fine.shape[1])
  cell = jnp.einsum("gh,hwc,kw->gkc", rows, fine, columns)
  red, green, blue = jnp.moveaxis(jnp.log(cell / 255 + 0.08), -1, 0)
  light = (red + green + blue) / 3
  light = 0.5 * (light - jnp.mean(light))
  picture = jnp.stack([light, red - green, (red + green) / 2 - blue])
  return jnp.append(picture.reshape(-1) / _GRID, 0.25)


def _cell_average(size: int) -> Array:
  """float32[4, size] averaging matrix of nearly equal cells."""
  cell = jnp.arange(size) * _GRID // size
  member = (cell[None, :] == jnp.arange(_GRID)[:, None]).astype(jnp.float32)
  return member / jnp.sum(member, axis=1, keepdims=True)
