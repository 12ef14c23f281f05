"""Dot products of sliding windows over a video, in one pass over its frames.

Axes: `T` frames, `E` numbers a frame. What `tad` scores by: sums over the `s`
frames from `t` on, their squared norms, and their dots with the sums over the
`s` frames before `t`. A median of three may come first.

The same numbers come in the form that each platform does in one pass:

- XLA on CPU vectorises static slices and one reduction with several results;
- XLA on TPU fetches an operand once for every shifted slice of it, and keeps
  what lies between two passes in VMEM only where it fits. There the frames go
  by in blocks, each of which is fetched once and stays;
- elsewhere, plain sums.

Each has the derivatives, forward and backward, of the plain form.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array

_FOLD = 10  # so many rows of a sum are unrolled on CPU, the rest is vectors
_BLOCK = 5 * 2**15  # numbers of one video that a block on TPU holds, at most


# The median -------------------------------------------------------------------


@jax.custom_jvp
def _middle(before: Array, own: Array, after: Array) -> Array:
  low, high = jnp.minimum(before, after), jnp.maximum(before, after)
  return jnp.maximum(low, jnp.minimum(high, own))


@_middle.defjvp
def _middle_jvp(primals, tangents):
  """The tangent of the chosen one; the frame's own among equals."""
  before, own, _ = primals
  median = _middle(*primals)
  from_before, from_own, from_after = tangents
  other = jnp.where(median == before, from_before, from_after)
  return median, jnp.where(median == own, from_own, other)


def _inner_medians(feature: Array, count: Array, start: int = 0) -> Array:
  """[n - 2, E]: the medians of rows that have a row on either side.

  `feature[0]` is the frame with number `start`. With slices alone, nothing
  padded, XLA makes this one pass.
  """
  own = feature[1:-1]
  median = _middle(feature[:-2], own, feature[2:])
  time = start + jnp.arange(own.shape[0])[:, None]
  return jnp.where(time >= count - 2, own, median)


def median_of_three(feature: Array, count: Array) -> Array:
  """Median over a frame and its two neighbours; the end frames stay.

  Args:
    feature: float[T, E], of which the first `count` rows are frames.
    count: int32[].

  Returns:
    float[T, E].
  """
  if feature.shape[0] < 3:
    return feature
  inner = _inner_medians(feature, count)
  return jnp.concatenate([feature[:1], inner, feature[-1:]])


# Dots of rows -----------------------------------------------------------------


@jax.custom_jvp
def row_dots(left: Sequence[Array], right: Sequence[Array]) -> list[Array]:
  """[n] sums of left * right over the last axis, for pairs of [n, E]."""
  return jax.lax.platform_dependent(
    left, right, cpu=_row_dots_at_once, default=_row_dots_one_by_one
  )


@row_dots.defjvp
def _row_dots_jvp(primals, tangents):
  slope = [
    a + b
    for a, b in zip(
      _row_dots_one_by_one(tangents[0], primals[1]),
      _row_dots_one_by_one(primals[0], tangents[1]),
    )
  ]
  return row_dots(*primals), slope


def _row_dots_one_by_one(left, right):
  return [jnp.sum(a * b, axis=-1) for a, b in zip(left, right)]


def _row_dots_at_once(left, right):
  """One pass over all pairs.

  XLA on CPU writes a product to memory before it sums its rows, and sums a row
  one number after the other. It does neither for one reduction with several
  results over an axis that is not the last and short enough to be unrolled.
  """
  width = left[0].shape[-1]
  fold = next(n for n in range(min(_FOLD, width), 0, -1) if width % n == 0)
  shape = (-1, fold, width // fold)
  product = [(a * b).reshape(shape) for a, b in zip(left, right)]
  zero = [jnp.zeros((), value.dtype) for value in product]
  partial = jax.lax.reduce(
    product, zero, lambda x, y: [a + b for a, b in zip(x, y)], (1,)
  )
  return [jnp.sum(value, axis=-1) for value in partial]


# Dots of windows --------------------------------------------------------------


def window_sums(value: Array, scale: int) -> Array:
  """Sum of rows t to t + scale - 1, by doubling; `scale - 1` rows fewer.

  A running total would lose the digits of a window late in a long video, and
  would make the score of a chunk depend on what came before it.
  """
  size = value.shape[0] - scale + 1
  total, offset, width, block = None, 0, 1, value
  while True:
    if scale & width:
      part = block[offset : offset + size]
      total = part if total is None else total + part
      offset += width
    if 2 * width > scale:
      return total
    block = block[:-width] + block[width:]
    width *= 2


def _dots(
  frame: Array, scales: tuple[int, ...]
) -> tuple[list[Array], list[Array]]:
  """Squared norms of the windows of `frame`, and their dots with those before.

  For rows `max(scales)` to `len(frame) - max(scales)`, for each scale.
  """
  lead = max(scales)
  size = frame.shape[0] - 2 * lead + 1
  left, right = [], []
  for scale in scales:
    window = window_sums(frame, scale)
    after = window[lead : lead + size]
    left += [after, after]
    right += [after, window[lead - scale : lead - scale + size]]
  value = row_dots(left, right)
  return value[::2], value[1::2]


def _inner(feature: Array, count: Array, median: bool, start: int = 0) -> Array:
  return _inner_medians(feature, count, start) if median else feature


def _inner_dots_at_once(feature, count, scales, median):
  return _dots(_inner(feature, count, median), scales)


def _inner_dots_in_blocks(feature, count, scales, median):
  """Block after block, the last one moved back so that it is a whole one."""
  reach = 2 * max(scales) - 1 + 2 * median
  size = feature.shape[0] - reach
  blocks = -(-size * feature.shape[1] // _BLOCK)
  rows = -(-size // blocks)

  def add(found, number):
    start = jnp.minimum(number * rows, size - rows)
    block = jax.lax.dynamic_slice_in_dim(feature, start, rows + reach)
    # Fetched here and nowhere else, not by each of its readers for itself.
    block = jax.lax.optimization_barrier(block)
    dots = _dots(_inner(block, count, median, start), scales)
    found = jax.tree.map(
      lambda whole, part: jax.lax.dynamic_update_slice(whole, part, (start,)),
      found,
      dots,
    )
    return found, None

  empty = [jnp.zeros(size, feature.dtype) for _ in scales]
  return jax.lax.scan(add, (empty, empty), jnp.arange(blocks))[0]


def _inner_dots(feature, count, scales, median):
  """`_dots` of the inner medians, or of the rows themselves."""
  form = dict(scales=scales, median=median)
  return jax.lax.platform_dependent(
    feature,
    count,
    tpu=functools.partial(_inner_dots_in_blocks, **form),
    default=functools.partial(_inner_dots_at_once, **form),
  )


def _all_dots(inner_dots, feature, count, scales, median):
  """`window_dots`; but for a few rows at the ends nothing is copied."""
  lead = max(scales)
  reach = 2 * lead - 1
  size, border = feature.shape[0], int(median)

  def padded(before, *rows, after):
    joined = jnp.concatenate(rows)
    return jnp.pad(joined, ((before, after), (0, 0)))

  first, last = feature[:border], feature[size - border :]
  if size - 2 * border < 2 * reach:
    inner = _inner(feature, count, median)
    whole = padded(2 * lead, first, inner, last, after=lead - 1)
    return _dots(whole, scales)
  edge = reach + 2 * border
  inner = _inner(feature[:edge], count, median)
  parts = [
    _dots(padded(2 * lead, first, inner, after=0), scales),
    inner_dots(feature, count, scales, median),
  ]
  if lead - 1 + border:
    inner = _inner(feature[size - edge :], count, median, size - edge)
    end = padded(0, inner, last, after=lead - 1)
    parts.append(_dots(end, scales))
  return jax.tree.map(lambda *value: jnp.concatenate(value), *parts)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _window_dots(feature, count, scales, median):
  return _all_dots(_inner_dots, feature, count, scales, median)


@_window_dots.defjvp
def _window_dots_jvp(scales, median, primals, tangents):
  """The slope of the form that is no loop."""
  feature, count = primals
  _, slope = jax.jvp(
    lambda feature: _all_dots(
      _inner_dots_at_once, feature, count, scales, median
    ),
    (feature,),
    tangents[:1],
  )
  return _window_dots(feature, count, scales, median), slope


def window_dots(
  feature: Array, count: Array, *, scales: tuple[int, ...], median: bool
) -> tuple[list[Array], list[Array]]:
  """Squared norms of windows, and their dots with the windows before them.

  A window of scale `s` at `t` is the sum of rows `t` to `t + s - 1`; there are
  zeros beyond both ends.

  Args:
    feature: float[T, E], of which the first `count` rows are frames.
    count: int32[].
    scales: window lengths.
    median: take the median of three first.

  Returns:
    For each scale the squares and the dots, float[max(scales) + T] of the
    windows at -max(scales) to T - 1.
  """
  return _window_dots(feature, count, scales, median and feature.shape[0] > 2)
