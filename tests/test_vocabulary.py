"""Chunks of the vocabulary against all of it at once.

Axes: `N` tokens, `V` vocabulary, `D` model width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax import grpo, vocabulary

WRAP = pytest.mark.parametrize(
  "wrap", [lambda f: f, jax.jit], ids=["plain", "jit"]
)
N, D = 7, 16
# Words and chunk: every so-many-th word (40 in fours, twos and ones), one
# chunk, and runs of neighbours of which the last overlaps the one before.
SPLITS = pytest.mark.parametrize(
  ("size", "chunk"), [(40, 16), (40, 20), (6, 1), (40, 99), (41, 16), (43, 42)]
)


def make(size, *, scale=1.0, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  token = rng.integers(3, size, N)
  # The ends, and the words that the last of several runs sees again.
  token[:4] = 3, size - 1, 27 % size, 21 % size
  banned = np.zeros(size, bool)
  banned[:3] = True  # a whole chunk where a chunk is one word
  hidden, table = rng.normal(size=(N, D)), rng.normal(size=(size, D))
  return (
    jnp.asarray(scale * hidden / 2, dtype),
    jnp.asarray(table / 2, dtype),
    jnp.asarray(token, jnp.int32),
    jnp.asarray(banned),
  )


def plain(hidden, table, token, banned):
  logits = jnp.einsum(
    "...D,VD->...V", hidden, table, preferred_element_type=jnp.float32
  )
  return grpo.token_logprobs(logits, token, banned)


def chunked(chunk):
  return lambda *args: vocabulary.token_logprobs(*args, chunk=chunk)


def grads(function, hidden, table, token, banned):
  """Gradients of one loss of both results by hidden and table."""
  slot = np.arange(token.size, dtype=np.float32).reshape(token.shape)

  def loss(hidden, table):
    logprob, entropy = function(hidden, table, token, banned)
    return jnp.sum(np.cos(slot) * logprob + np.sin(1 + slot) * entropy)

  return jax.grad(loss, argnums=(0, 1))(hidden, table)


def assert_near(found, wanted, tolerance):
  """Up to `tolerance` of the largest entry."""
  wanted = np.asarray(wanted, np.float64)
  np.testing.assert_allclose(
    np.asarray(found, np.float64), wanted, atol=tolerance * np.abs(wanted).max()
  )


@WRAP
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_by_hand(wrap, chunk):
  # Of weights 1, 3 and a banned 1000: probabilities 1/4, 3/4, 0.
  table = jnp.log(jnp.array([[1.0], [3.0], [1000.0]]))
  logprob, entropy = wrap(chunked(chunk))(
    jnp.ones((2, 1)),
    table,
    jnp.array([0, 1]),
    jnp.array([False, False, True]),
  )
  np.testing.assert_allclose(logprob, np.log([0.25, 0.75]), rtol=1e-5)
  want = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
  np.testing.assert_allclose(entropy, [want] * 2, rtol=1e-5)


@WRAP
@SPLITS
def test_equals_the_plain_form(wrap, size, chunk):
  args = make(size)
  found = wrap(chunked(chunk))(*args)
  for left, right in zip(found, plain(*args), strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-6)
  found = wrap(lambda *args: grads(chunked(chunk), *args))(*args)
  for left, right in zip(found, grads(plain, *args), strict=True):
    assert_near(left, right, 1e-5)
  assert not np.any(found[1][:3])  # banned words


def test_a_banned_token_teaches_nothing():
  hidden, table, token, banned = make(41)
  banned = banned.at[token[3]].set(True)
  found = chunked(16)(hidden, table, token, banned)
  np.testing.assert_allclose(
    found[0], plain(hidden, table, token, banned)[0], rtol=1e-6
  )
  _, grad = grads(chunked(16), hidden, table, token, banned)
  np.testing.assert_array_equal(grad[token[3]], 0)
  assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("size", [40, 41])
def test_gradients_equal_differences_in_float64(size):
  hidden, table, token, banned = make(size)
  slot = np.arange(N)

  def loss(hidden, table):
    logits = (hidden @ table.T)[:, 3:]
    logprob = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    entropy = -np.sum(np.exp(logprob) * logprob, axis=1)
    chosen = logprob[slot, np.asarray(token) - 3]
    return np.sum(np.cos(slot) * chosen + np.sin(1 + slot) * entropy)

  exact = [np.asarray(x, np.float64) for x in (hidden, table)]
  found = grads(chunked(16), hidden, table, token, banned)
  step = 1e-6
  for which, entries in (
    (0, ((0, 0), (6, 15), (3, 7))),
    (1, ((3, 0), (size - 1, 5), (size - 2, 5), (20, 9), (0, 0))),
  ):
    for entry in entries:
      sides = []
      for sign in (1, -1):
        moved = [x.copy() for x in exact]
        moved[which][entry] += sign * step
        sides.append(loss(*moved))
      np.testing.assert_allclose(
        found[which][entry], (sides[0] - sides[1]) / (2 * step), atol=2e-6
      )


@pytest.mark.parametrize("size", [40, 41])
def test_large_logits_keep_their_digits(size):
  """Logits of hundreds, all far below 0 in the first token."""
  hidden, table, token, banned = make(size, scale=60.0)
  table = table.at[:, 0].set(jnp.abs(table[:, 0]) + 3)
  hidden = hidden.at[0, 0].set(-300.0)
  exact = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
  exact = exact[:, 3:] - exact[:, 3:].max(axis=1, keepdims=True)
  logprob = exact - np.log(np.sum(np.exp(exact), axis=1, keepdims=True))
  entropy = -np.sum(np.exp(logprob) * logprob, axis=1)
  chosen = logprob[np.arange(N), np.asarray(token) - 3]
  found = chunked(16)(hidden, table, token, banned)
  np.testing.assert_allclose(found[0], chosen, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(found[1], entropy, atol=1e-4)
  for grad in grads(chunked(16), hidden, table, token, banned):
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("size", [40, 41])
def test_bfloat16_is_summed_in_float32(size):
  short = make(size, dtype=jnp.bfloat16)
  wide = [x.astype(jnp.float32) for x in short[:2]] + list(short[2:])
  found = jax.jit(chunked(16))(*short)
  for left, right in zip(found, plain(*wide), strict=True):
    assert left.dtype == jnp.float32
    np.testing.assert_allclose(left, right, atol=1e-5)
  found = jax.jit(lambda *args: grads(chunked(16), *args))(*short)
  for left, right in zip(found, grads(plain, *wide), strict=True):
    assert left.dtype == jnp.bfloat16
    assert_near(left, right, 0.01)


def test_a_float32_table_is_cast_in_chunks():
  hidden, table, *rest = make(40, dtype=jnp.bfloat16)
  found = chunked(16)(hidden, table.astype(jnp.float32), *rest)
  for left, right in zip(found, chunked(16)(hidden, table, *rest)):
    np.testing.assert_array_equal(left, right)
  _, grad = grads(chunked(16), hidden, table.astype(jnp.float32), *rest)
  assert grad.dtype == jnp.float32


@pytest.mark.parametrize("size", [40, 41])
def test_unused_slots_may_hold_anything(size):
  hidden, table, token, banned = make(size)
  used = np.arange(N) < 4

  def loss(hidden, table):
    found = chunked(16)(hidden, table, token, banned)
    return sum(jnp.sum(jnp.where(used, value, 0)) for value in found)

  wanted, wanted_grad = jax.value_and_grad(loss, (0, 1))(hidden, table)
  for junk in (1e30, jnp.inf, jnp.nan):
    filled = jnp.where(used[:, None], hidden, junk)
    found, grad = jax.value_and_grad(loss, (0, 1))(filled, table)
    assert found == wanted
    for left, right in zip(grad, wanted_grad):
      np.testing.assert_array_equal(left, right)
  np.testing.assert_array_equal(wanted_grad[0][4:], 0)


@pytest.mark.parametrize("size", [40, 41])
def test_a_batch_is_its_rows(size):
  """vmap, leading axes and a loop are the same."""
  rows = [make(size, seed=seed) for seed in range(3)]
  hidden, _, token, _ = (jnp.stack(x) for x in zip(*rows, strict=True))
  _, table, _, banned = rows[0]
  joined = chunked(16)(hidden, table, token, banned)
  mapped = jax.vmap(chunked(16), (0, None, 0, None))(
    hidden, table, token, banned
  )
  for b in range(3):
    alone = chunked(16)(hidden[b], table, token[b], banned)
    for left, middle, right in zip(joined, mapped, alone, strict=True):
      np.testing.assert_allclose(left[b], right, rtol=1e-6)
      np.testing.assert_allclose(middle[b], right, rtol=1e-6)

  def vmapped(hidden, table, token, banned):
    return jax.vmap(chunked(16), (0, None, 0, None))(
      hidden, table, token, banned
    )

  for left, right in zip(
    grads(vmapped, hidden, table, token, banned),
    grads(plain, hidden, table, token, banned),
  ):
    assert_near(left, right, 1e-5)


@pytest.mark.parametrize("size", [40, 41])
def test_nothing_is_tokens_by_vocabulary(size):
  def text(function):
    return str(
      jax.make_jaxpr(lambda *args: grads(function, *args))(*make(size))
    )

  shape = f"[{N},{size}]"
  assert shape in text(plain)
  assert shape not in text(chunked(16))


def test_eight_devices_equal_one(with_devices):
  """And no device gathers a table that is split along its words."""
  with_devices(
    8,
    """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from cf_jax.runtime import sharding
from tests import test_vocabulary as here

mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, context=1)
rules = sharding.PARTITION_RULES
split_table = sharding.spec_for("decoder/embed/embedding", (1, 1), rules)
for size, chunk in ((64, 16), (41, 16)):
  hidden, head, token, banned = here.make(size)
  hidden, token = (np.concatenate([x, x[:1]]) for x in (hidden, token))
  args = hidden, head, token, banned
  wanted = (here.plain(*args), here.grads(here.plain, *args))
  places = tuple(
    NamedSharding(mesh, spec)
    for spec in (
      sharding.BATCH,
      split_table if size == 64 else P(None, "fsdp"),
      sharding.BATCH,
      P(),
    )
  )
  split = jax.device_put(args, places)
  ours = here.chunked(chunk)
  run = jax.jit(
    lambda *args: (ours(*args), here.grads(ours, *args)),
    out_shardings=((places[2],) * 2, places[:2]),
  ).lower(*split).compile()
  for left, right in zip(jax.tree.leaves(run(*split)), jax.tree.leaves(wanted)):
    here.assert_near(left, right, 1e-5)
  if size == 64:
    assert "all-gather" in run.as_text() and "f32[64," not in run.as_text()
""",
  )
