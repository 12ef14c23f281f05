"""Reductions over the real entries of an array.

Masks are bool and True means real. Every reduction is float32 or wider, gives
0 (never NaN) where nothing is real, and has a finite gradient there.
"""

import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...] | None


def _widen(value: jax.Array) -> jax.Array:
  return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def masked_sum(
  value: jax.Array, mask: jax.Array, axis: Axis = None
) -> jax.Array:
  """Sum of the real entries; `mask` broadcasts against `value`."""
  return jnp.sum(jnp.where(mask, _widen(value), 0), axis=axis)


def masked_mean(
  value: jax.Array,
  mask: jax.Array,
  axis: Axis = None,
  *,
  total: jax.Array | None = None,
) -> jax.Array:
  """Mean of the real entries: `sum / max(count, 1)`.

  Args:
    value: what is averaged.
    mask: bool, broadcasts against `value`.
    axis: reduced axes; None reduces all.
    total: count of the real entries of the whole array where this is a part of
      it: the parts' results then add up to the mean of the whole.
  """
  if total is None:
    total = jnp.sum(jnp.broadcast_to(mask, value.shape), axis=axis)
  return masked_sum(value, mask, axis) / jnp.maximum(total, 1)


def masked_std(
  value: jax.Array, mask: jax.Array, axis: Axis = None, *, ddof: int
) -> jax.Array:
  """Standard deviation of the real entries with `count - ddof` below.

  The gradient is zero, not NaN, where all real entries are equal.
  """
  mask = jnp.broadcast_to(mask, value.shape)
  count = jnp.sum(mask, axis=axis)
  mean = masked_sum(value, mask, axis) / jnp.maximum(count, 1)
  if axis is not None:
    mean = jnp.expand_dims(mean, axis)
  # Cut off before squaring: 0 * NaN of a padded slot is NaN in the gradient.
  deviation = jnp.where(mask, _widen(value) - mean, 0)
  var = jnp.sum(deviation**2, axis=axis) / jnp.maximum(count - ddof, 1)
  positive = var > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, var, 1)), 0)
