"""Dots of sliding windows: the forms of the platforms, by brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax import windows


def by_hand(feature, count, scales, median):
  """Window by window, in float64."""
  rows = feature.astype(np.float64)
  size, lead = len(rows), max(scales)
  if median:
    rows = rows.copy()
    for t in range(1, count - 1):
      rows[t] = np.median(feature[t - 1 : t + 2].astype(np.float64), axis=0)

  def window(start, scale):
    inside = [rows[t] for t in range(start, start + scale) if 0 <= t < size]
    return np.sum(inside, axis=0) if inside else np.zeros(rows.shape[1])

  starts = range(-lead, size)
  squares = [[np.sum(window(t, s) ** 2) for t in starts] for s in scales]
  dots = [[window(t, s) @ window(t - s, s) for t in starts] for s in scales]
  return squares, dots


@pytest.mark.parametrize(
  ("scales", "median"), [((2, 4), True), ((1,), False), ((3,), True)]
)
@pytest.mark.parametrize("count", [40, 33])
def test_dots_of_whole_videos_and_of_blocks(monkeypatch, scales, median, count):
  """Also in the blocks of a TPU: of 7 rows, the last one moved back."""
  feature = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
  feature[count:] = 0
  want = by_hand(feature, count, scales, median)
  how = dict(scales=scales, median=median)
  found = jax.jit(functools.partial(windows.window_dots, **how))(feature, count)
  for got, right in zip(jax.tree.leaves(found), sum(want, [])):
    np.testing.assert_allclose(got, right, rtol=2e-5, atol=2e-5)

  monkeypatch.setattr(windows, "_BLOCK", 6 * 7)
  forms = (windows._inner_dots_at_once, windows._inner_dots_in_blocks)
  whole, blocks = (
    jax.jit(functools.partial(form, **how))(jnp.asarray(feature), count)
    for form in forms
  )
  for got, right in zip(jax.tree.leaves(blocks), jax.tree.leaves(whole)):
    np.testing.assert_allclose(got, right, rtol=1e-6, atol=1e-6)
