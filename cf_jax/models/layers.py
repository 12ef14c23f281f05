"""What both towers are made of: norm, linear, SwiGLU, and all attention.

Axes: `B` rows, `G` completions per row, `Q` query slots, `S` key slots (of a
shared prompt, where there is one), `C` completion slots, `N` query heads, `M`
key/value heads, `R = N // M`, `H` head width, `D` model width, `F` mlp width,
`L` layers.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cf_jax.models import lora

# Below every real score, and finite: -inf - -inf is NaN.
_LOWEST = -1e30


class RMSNorm(nn.Module):
  """`x / sqrt(mean(x^2) + eps) * scale`, the mean in float32.

  Squares of bfloat16 activations lose the digits that the mean needs.
  """

  eps: float
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    scale = self.param(
      "scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype
    )
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(
      jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps
    )
    return (wide * inverse).astype(x.dtype) * scale.astype(x.dtype)


class SwiGLU(nn.Module):
  """`down(silu(gate(x)) * up(x))`."""

  width: int
  use_bias: bool
  std: float
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x):
    def dense(features, name):
      return linear(
        features,
        use_bias=self.use_bias,
        std=self.std,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    gate = dense(self.width, "gate")(x)
    up = dense(self.width, "up")(x)
    return dense(x.shape[-1], "down")(nn.silu(gate) * up)


class _Linear(nn.DenseGeneral):
  """A linear layer that adds the adapters that lie beside its kernel.

  See `models/lora.py`.
  """

  def __call__(self, x):
    y = super().__call__(x)
    if not self.has_variable("params", "lora_a"):
      return y
    a, b, scale = (self.get_variable("params", name) for name in lora.LEAVES)
    inputs = 1 if isinstance(self.axis, int) else len(self.axis)
    low = jnp.tensordot(x.astype(self.dtype), a.astype(self.dtype), inputs)
    high = jnp.tensordot(low, b.astype(self.dtype), 1)
    return y + high * scale.astype(self.dtype)


def linear(
  features: int | tuple[int, ...],
  *,
  use_bias: bool,
  std: float,
  dtype: str,
  param_dtype: str,
  name: str | None = None,
  axis: int | tuple[int, ...] = -1,
) -> nn.Module:
  """Every matmul with a kernel of the model; kernels are [in..., out...]."""
  return _Linear(
    features,
    axis=axis,
    use_bias=use_bias,
    dtype=dtype,
    param_dtype=param_dtype,
    kernel_init=nn.initializers.normal(std),
    name=name,
  )


def init_stack(layer: nn.Module, rng: jax.Array, depth: int, *args: Any) -> Any:
  """Parameters of `depth` equal layers, stacked on a leading axis `L`."""
  return jax.vmap(lambda key: layer.init(key, *args)["params"])(
    jax.random.split(rng, depth)
  )


def scan_stack(
  body: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
  x: jax.Array,
  stacked: Any,
  *,
  remat: str,
  unroll: int,
) -> tuple[jax.Array, Any]:
  """Runs `x, out = body(x, layer)` over stacked layers.

  Args:
    body: one layer.
    x: what flows through the layers.
    stacked: pytree with a leading axis `L`: parameters and what else differs
      between layers. Or a list of one pytree a layer, see `unstack`.
    remat: see `VLMConfig.remat`.
    unroll: layers per iteration; a list is a loop written out.

  Returns:
    x after the last layer, and the layers' outputs stacked on `L`.
  """
  if remat == "full":
    body = jax.checkpoint(body, prevent_cse=False)
  elif remat == "dots":
    body = jax.checkpoint(
      body,
      prevent_cse=False,
      policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    )
  if not isinstance(stacked, list):
    return jax.lax.scan(body, x, stacked, unroll=unroll)
  outs = []
  for layer in stacked:
    x, out = body(x, layer)
    outs.append(out)
  return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def unstack(stacked: Any) -> list:
  """One tree a layer, from a tree with a leading axis `L`, which is freed.

  A loop over tokens that takes layers out of a stack keeps a copy of all of
  them while it runs, and makes it anew each time. What answers one question has
  no use for the stack, and may not have the memory for both.
  """
  leaves, tree = jax.tree.flatten(stacked)
  size = leaves[0].shape[0]
  split = []
  for leaf in leaves:
    split.append(jax.block_until_ready([leaf[i] for i in range(size)]))
    leaf.delete()
  return [tree.unflatten(column) for column in zip(*split, strict=True)]


def take_layer(stacked: Any, layer: int) -> Any:
  """Parameters of one layer of a stack or of a list."""
  if isinstance(stacked, list):
    return stacked[layer]
  return jax.tree.map(lambda leaf: leaf[layer], stacked)


def _attend_xla(query, key, value, mask):
  """Unnormalised attention: sum of e^(s-top) v, sum of e^(s-top), and top.

  [B,Q,N,H], [B,S,M,H], [B,S,M,H], bool[B,Q,S] or [B,1,S] or None ->
  float32 [B,Q,M,R,H], [B,Q,M,R,1], [B,Q,M,R,1].
  """
  rows, num_queries, num_heads, width = query.shape
  num_kv = key.shape[2]
  query = query.reshape(rows, num_queries, num_kv, num_heads // num_kv, width)
  # Scores and softmax in float32: a bfloat16 score of 20 is off by 0.06, and
  # its exponential by 6 %.
  score = jnp.einsum(
    "BQMRH,BSMH->BMRQS", query, key, preferred_element_type=jnp.float32
  ) * (width**-0.5)
  if mask is not None:
    mask = mask[:, None, None]  # [B, 1, 1, Q, S]
    score = jnp.where(mask, score, _LOWEST)
  top = jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True))
  weight = jnp.exp(score - top)
  if mask is not None:
    weight = jnp.where(mask, weight, 0)  # a row without keys has top = _LOWEST
  total = jnp.sum(weight, axis=-1, keepdims=True)
  mixed = jnp.einsum(
    "BMRQS,BSMH->BQMRH",
    weight.astype(value.dtype),
    value,
    preferred_element_type=jnp.float32,
  )
  return mixed, total.transpose(0, 3, 1, 2, 4), top.transpose(0, 3, 1, 2, 4)


def _partial(query, key, value, mask, implementation):
  if implementation == "xla":
    return _attend_xla(query, key, value, mask)
  raise ValueError(
    f"attention must be 'xla', got {implementation!r}; change"
    " config.model.attention"
  )


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None,
  *,
  implementation: str,
) -> jax.Array:
  """Grouped-query attention, `softmax(q k / sqrt(H)) v`.

  Args:
    query: float[B, Q, N, H].
    key: float[B, S, M, H]; query head n reads key head n // R.
    value: float[B, S, M, H].
    mask: bool[B, Q, S] (1 broadcasts for B and Q), or None: all are allowed.
    implementation: which kernel, see `VLMConfig.attention`.

  Returns:
    float[B, Q, N, H] in value's dtype; 0, with a finite gradient, where a
    query may attend to no key.
  """
  mixed, total, _ = _partial(query, key, value, mask, implementation)
  mixed = mixed / jnp.where(total > 0, total, 1)
  return mixed.reshape(query.shape).astype(value.dtype)


def attend_shared(
  query: jax.Array,
  prefix_key: jax.Array,
  prefix_value: jax.Array,
  prefix_mask: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  *,
  implementation: str,
) -> jax.Array:
  """Attention of G completions to their common prompt and to themselves.

  The two parts are joined by their softmax sums, so that the prompt's keys and
  values are read once per row and never copied to the completions.

  Args:
    query: float[B, G, Q, N, H].
    prefix_key: float[B, S, M, H] of the prompt.
    prefix_value: float[B, S, M, H].
    prefix_mask: bool[B, S].
    key: float[B, G, C, M, H] of each completion.
    value: float[B, G, C, M, H].
    mask: bool[B, G, Q, C] (1 broadcasts).
    implementation: which kernel, see `VLMConfig.attention`.

  Returns:
    float[B, G, Q, N, H] in value's dtype.
  """
  rows, group, num_queries, num_heads, width = query.shape

  def merge(x):  # [B, G, ...] -> [B * G, ...]
    return x.reshape(-1, *x.shape[2:])

  def align(x):  # -> [B, G, Q, M, R, H or 1]
    return x.reshape(rows, group, num_queries, *x.shape[2:])

  prefix = _partial(
    query.reshape(rows, -1, num_heads, width),
    prefix_key,
    prefix_value,
    prefix_mask[:, None],
    implementation,
  )
  own = _partial(
    merge(query),
    merge(key),
    merge(value),
    merge(jnp.broadcast_to(mask, (rows, group, *mask.shape[2:]))),
    implementation,
  )
  mixed_a, total_a, top_a = map(align, prefix)
  mixed_b, total_b, top_b = map(align, own)
  top = jnp.maximum(top_a, top_b)
  scale_a, scale_b = jnp.exp(top_a - top), jnp.exp(top_b - top)
  total = scale_a * total_a + scale_b * total_b
  mixed = scale_a * mixed_a + scale_b * mixed_b
  mixed = mixed / jnp.where(total > 0, total, 1)
  return mixed.reshape(query.shape).astype(value.dtype)
