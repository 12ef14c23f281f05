"""Log-probabilities over a large vocabulary that is never held as a whole.

What `grpo.token_logprobs` makes of [tokens, V] logits, made of the hidden
states and the head instead: a loop over chunks of the vocabulary carries the
running maximum, sum and first moment of the softmax, and the backward pass
makes each chunk's logits again. Beside the arguments and their gradients no
array is larger than [tokens, chunk].

The loop goes over words and not over tokens: a chunk's rows of the head's
gradient are then finished in one go, whereas a loop over tokens reads and
writes the gradient of the whole table in every round.

Axes: `N` tokens, `W` words of a chunk, `V` vocabulary, `D` model width.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from cf_jax import grpo

# Below every real logit, and finite: -inf - -inf is NaN.
_LOWEST = -1e30


def token_logprobs(
  hidden: jax.Array,
  table: jax.Array,
  token: jax.Array,
  banned: jax.Array,
  *,
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each token and entropy of its distribution, in nats.

  The numbers and gradients of `grpo.token_logprobs(hidden @ table.T, token,
  banned)`. Logits are float32 whatever the arguments are; their gradient is
  rounded to the dtype of `hidden` before it is multiplied, products are summed
  in float32. A slot of which neither result is used may hold anything.

  Args:
    hidden: float[..., D] states that predict the tokens; its dtype is what the
      matmuls run in.
    table: float[V, D] the head; rows are cast chunk by chunk.
    token: int32[...].
    banned: bool[V] ids left out of the softmax.
    chunk: static, words that are looked at together at most. The work is cut
      into equal chunks: where a count of chunks up to twice the least divides
      V, a chunk is every so-many-th word, so that each shard of a table that
      is split along V has its share of every chunk. Where none does, it is a
      run of neighbours, which gathers such a table.

  Returns:
    float32[...] and float32[...].
  """
  chex.assert_equal_shape_prefix([hidden, token], token.ndim)
  logprob, entropy = _logprobs(
    _num_chunks(len(table), chunk),
    hidden.reshape(-1, hidden.shape[-1]),
    table,
    token.reshape(-1),
    banned,
  )
  return logprob.reshape(token.shape), entropy.reshape(token.shape)


def _num_chunks(vocab_size: int, chunk: int) -> int:
  least = -(-vocab_size // chunk)
  for num in range(least, min(2 * least, vocab_size) + 1):
    if vocab_size % num == 0:
      return num
  return least


def _take(array, num, index):
  """Chunk number `index` of the leading axis, [V, ...] -> [W, ...]."""
  size = len(array)
  if size % num == 0:
    rows = array.reshape(size // num, num, *array.shape[1:])
    return jax.lax.dynamic_index_in_dim(rows, index, axis=1, keepdims=False)
  width = -(-size // num)
  # The last chunk is moved back to end with the axis.
  start = jnp.minimum(index * width, size - width)
  return jax.lax.dynamic_slice_in_dim(array, start, width)


def _put(array, rows, num, index, seen):
  """Writes what `_take` would read, but for rows of an earlier chunk."""
  size, width = len(array), len(rows)
  if size % num == 0:
    split = array.reshape(width, num, *array.shape[1:])
    split = jax.lax.dynamic_update_index_in_dim(split, rows, index, axis=1)
    return split.reshape(array.shape)
  rows = jnp.where(seen[:, None], _take(array, num, index), rows)
  start = jnp.minimum(index * width, size - width)
  return jax.lax.dynamic_update_slice_in_dim(array, rows, start, axis=0)


def _chunk(num, index, hidden, table, token, banned):
  """One chunk: rows [W, D], logits [N, W], what to leave out, and hits.

  `seen` bool[W] are words of an earlier chunk, `left_out` bool[W] these and
  the banned ones, `hit` bool[N, W] where a word is the token.
  """
  word = _take(jnp.arange(len(table)), num, index)
  if len(table) % num == 0:
    seen = jnp.zeros(word.shape, bool)
  else:
    seen = word < index * len(word)
  rows = _take(table, num, index).astype(hidden.dtype)
  logits = jnp.einsum(
    "ND,WD->NW", hidden, rows, preferred_element_type=jnp.float32
  )
  left_out = _take(banned, num, index) | seen
  hit = (token[:, None] == word) & ~seen
  return rows, grpo.ban(logits, left_out), seen, left_out, hit


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(num, hidden, table, token, banned):
  return _forward(num, hidden, table, token, banned)[0]


def _forward(num, hidden, table, token, banned):
  """Results, and what the backward pass reads.

  With x = logit - top: total = sum e^x, moment = sum e^x x.
  """

  def body(carry, index):
    top, total, moment, chosen = carry
    _, logits, _, _, hit = _chunk(num, index, hidden, table, token, banned)
    new = jnp.maximum(top, jnp.max(logits, axis=-1))
    shift = top - new
    shrink = jnp.exp(shift)
    diff = logits - new[:, None]
    weight = jnp.exp(diff)
    moment = shrink * (moment + shift * total) + jnp.sum(weight * diff, axis=-1)
    total = shrink * total + jnp.sum(weight, axis=-1)
    chosen = chosen + jnp.sum(jnp.where(hit, logits, 0), axis=-1)
    return (new, total, moment, chosen), None

  zero = jnp.zeros(token.shape, jnp.float32)
  (top, total, moment, chosen), _ = jax.lax.scan(
    body, (zero + _LOWEST, zero, zero, zero), jnp.arange(num)
  )
  norm = top + jnp.log(total)
  entropy = jnp.log(total) - moment / total
  saved = hidden, table, token, banned, norm, entropy
  return (chosen - norm, entropy), saved


def _backward(num, saved, grad):
  """With d = [word is token] and H the entropy:

  d logprob / d logit = d - p, d entropy / d logit = -p (log p + H).
  """
  hidden, table, token, banned, norm, entropy = saved
  grad_logprob, grad_entropy = grad
  # An unused slot may hold NaN, and 0 * NaN would reach the table.
  used = (grad_logprob != 0) | (grad_entropy != 0)
  hidden = jnp.where(used[:, None], hidden, 0)
  norm, entropy = jnp.where(used, norm, 0), jnp.where(used, entropy, 0)

  def body(carry, index):
    grad_hidden, grad_table = carry
    rows, logits, seen, left_out, hit = _chunk(
      num, index, hidden, table, token, banned
    )
    logprob = logits - norm[:, None]
    prob = jnp.exp(logprob)
    by_logprob = grad_logprob[:, None] * (hit - prob)
    by_entropy = grad_entropy[:, None] * prob * (logprob + entropy[:, None])
    grad_logits = jnp.where(left_out, 0, by_logprob - by_entropy)
    grad_logits = grad_logits.astype(hidden.dtype)
    grad_hidden = grad_hidden + jnp.einsum(
      "NW,WD->ND", grad_logits, rows, preferred_element_type=jnp.float32
    )
    grad_rows = jnp.einsum(
      "NW,ND->WD", grad_logits, hidden, preferred_element_type=jnp.float32
    )
    grad_table = _put(
      grad_table, grad_rows.astype(table.dtype), num, index, seen
    )
    return (grad_hidden, grad_table), None

  start = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(table)
  (grad_hidden, grad_table), _ = jax.lax.scan(body, start, jnp.arange(num))
  return grad_hidden.astype(hidden.dtype), grad_table, None, None


_logprobs.defvjp(_forward, _backward)
