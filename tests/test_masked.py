"""Goldens worked by hand for `masked`, and gradients where nothing is real."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax import masked

VALUE = [[1.0, 2.0, 6.0], [5.0, 7.0, 9.0]]
MASK = [[True, True, False], [False, False, False]]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_reductions_by_hand(wrap):
  value, mask = jnp.array(VALUE), jnp.array(MASK)
  total = wrap(lambda v, m: masked.masked_sum(v, m, axis=1))(value, mask)
  mean = wrap(lambda v, m: masked.masked_mean(v, m, axis=1))(value, mask)
  # 1 and 2: mean 1.5, squares 0.25 + 0.25; over 2 or over 1.
  std0 = wrap(lambda v, m: masked.masked_std(v, m, axis=1, ddof=0))(value, mask)
  std1 = wrap(lambda v, m: masked.masked_std(v, m, axis=1, ddof=1))(value, mask)
  np.testing.assert_allclose(total, [3, 0])
  np.testing.assert_allclose(mean, [1.5, 0])
  np.testing.assert_allclose(std0, [0.5, 0], rtol=1e-6)
  np.testing.assert_allclose(std1, [0.5**0.5, 0], rtol=1e-6)


def test_ddof_of_torch_and_of_numpy():
  reward = jnp.array([1.0, 0.0, 0.0, 1.0])
  real = jnp.ones(4, dtype=bool)
  np.testing.assert_allclose(
    masked.masked_std(reward, real, ddof=1), 0.5773503, rtol=1e-6
  )
  np.testing.assert_allclose(
    masked.masked_std(reward, real, ddof=0), 0.5, rtol=1e-6
  )


@pytest.mark.parametrize(
  ("reduce", "padding"),
  [
    (masked.masked_sum, jnp.nan),
    (masked.masked_mean, jnp.nan),
    (lambda v, m: masked.masked_std(v, m, ddof=1), -7.0),
  ],
  ids=["sum", "mean", "std"],
)
@pytest.mark.parametrize("real", [0, 1, 3])
def test_gradient_is_finite_and_padding_gets_none(reduce, padding, real):
  value = jnp.array([2.0, 2.0, 2.0, padding])
  mask = jnp.arange(4) < real
  made, grad = jax.value_and_grad(reduce)(value, mask)
  assert np.isfinite(made)
  assert np.all(np.isfinite(grad))
  np.testing.assert_array_equal(grad[real:], 0)


def test_masks_broadcast_and_bfloat16_is_widened():
  value = jnp.ones((2, 300), jnp.bfloat16)  # bfloat16 rounds 257 to 256
  made = masked.masked_sum(value, jnp.array([[True], [False]]), axis=1)
  assert made.dtype == jnp.float32
  np.testing.assert_array_equal(made, [300, 0])
  np.testing.assert_array_equal(
    masked.masked_mean(value, jnp.array([[True], [False]]), axis=1), [1, 0]
  )
