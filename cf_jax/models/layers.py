"""What both towers are made of: norm, linear, SwiGLU, and all attention.

Axes: `B` rows, `G` completions per row, `Q` query slots, `S` key slots (of a
shared prompt, where there is one), `C` completion slots, `N` query heads, `M`
key/value heads, `R = N // M`, `H` head width, `D` model width, `F` mlp width,
`L` layers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cf_jax.models import kernels, lora

# Below every real score, and finite: -inf - -inf is NaN.
_LOWEST = -1e30

# The leaf that stands for a kernel, see `turn`.
TURNED = "table"

# Up to so many rows `times_table` puts the table first on CPUs; measured.
_FEW_ROWS = 32

# Queries of causal attention are worked through in at most so many strips of
# multiples of a chunk. Strips with more scores than `_MANY` for a row and head
# go chunk by chunk.
_STRIPS = 16
_CHUNK = 128
_MANY = 2**20


def _made_first(x):
  """`x`; on CPUs it is made, in the order of its axes, before it is read.

  The CPU's compiler may make it anew for a matmul over leading axes: transposed
  and element by element, which costs several times the matmul.
  """
  return jax.lax.platform_dependent(
    x, cpu=jax.lax.optimization_barrier, default=lambda x: x
  )


def _along_last(x, weight):
  """Sum of `x * weight` over the last axis, [..., D] and [D] -> [...].

  On CPUs a matmul: a product is summed there without vectors.
  """

  def matmul(x, weight):
    return jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST)

  return jax.lax.platform_dependent(
    x, weight, cpu=matmul, default=lambda x, weight: jnp.sum(x * weight, -1)
  )


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
    return _normalize(x, scale, self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normalize(x, scale, eps):
  return _normalize_forward(x, scale, eps)[0]


def _normalize_forward(x, scale, eps):
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(
    jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps
  )
  y = (wide * inverse).astype(x.dtype) * scale.astype(x.dtype)
  return y, (x, scale, inverse)


def _normalize_backward(eps, saved, grad):
  del eps
  x, scale, inverse = saved
  wide_scale = scale.astype(jnp.float32)
  grad = grad.astype(jnp.float32)
  unit = x.astype(jnp.float32) * inverse
  product = _made_first(grad * unit)
  grad_scale = jnp.sum(product, axis=tuple(range(x.ndim - 1)))
  along = _along_last(product, wide_scale)[..., None] / x.shape[-1]
  grad_x = inverse * (grad * wide_scale - unit * along)
  return grad_x.astype(x.dtype), grad_scale.astype(scale.dtype)


_normalize.defvjp(_normalize_forward, _normalize_backward)


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
    return dense(x.shape[-1], "down")(_gated(gate, up))


@jax.custom_vjp
def _gated(gate, up):
  """`silu(gate) * up`; the backward pass keeps the two and nothing between."""
  return nn.silu(gate) * up


def _gated_forward(gate, up):
  return _gated(gate, up), (gate, up)


def _gated_backward(saved, grad):
  gate, up = saved
  open_ = nn.sigmoid(gate)
  slope = open_ * (1 + gate * (1 - open_))  # d silu(gate) / d gate
  return grad * up * slope, grad * gate * open_


_gated.defvjp(_gated_forward, _gated_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _times_kernel(x, kernel, inputs):
  """[..., I...] times [I..., O...] -> [..., O...], I of `inputs` axes.

  The numbers and gradients of `jnp.tensordot`, whose rule makes a kernel's
  gradient transposed, [O, I], and on CPUs the output's gradient for it.
  """
  return _product(x, kernel, inputs)


def _product(x, kernel, inputs):
  last = tuple(range(x.ndim - inputs, x.ndim))
  return jax.lax.dot_general(
    x, kernel, ((last, tuple(range(inputs))), ((), ()))
  )


def _times_kernel_forward(x, kernel, inputs):
  # What is not asked for needs nothing kept: adapters beside a frozen kernel.
  saved = (
    x.value if kernel.perturbed else None,
    kernel.value if x.perturbed else None,
  )
  # Not `_times_kernel`: a policy of `jax.checkpoint` looks for matmuls.
  return _product(x.value, kernel.value, inputs), saved


def _times_kernel_backward(inputs, saved, grad):
  x, kernel = saved
  grad = _made_first(grad)
  grad_x = grad_kernel = None
  if kernel is not None:
    outputs = kernel.ndim - inputs
    grad_x = jax.lax.dot_general(
      grad,
      kernel,
      (
        (
          tuple(range(grad.ndim - outputs, grad.ndim)),
          tuple(range(inputs, kernel.ndim)),
        ),
        ((), ()),
      ),
    )
  if x is not None:
    rows = tuple(range(x.ndim - inputs))
    grad_kernel = jax.lax.dot_general(x, grad, ((rows, rows), ((), ())))
  return grad_x, grad_kernel


_times_kernel.defvjp(
  _times_kernel_forward, _times_kernel_backward, symbolic_zeros=True
)


def _dot_general(x, kernel, dimension_numbers, precision=None):
  """What `nn.DenseGeneral` calls: last axes of x with the first of a kernel."""
  (_, contracted), _ = dimension_numbers
  del precision  # `linear` has no such setting
  return _times_kernel(x, kernel, len(contracted))


class _Linear(nn.DenseGeneral):
  """A linear layer that adds the adapters that lie beside its kernel.

  See `models/lora.py`. The kernel may lie turned, see `turn`.
  """

  def __call__(self, x):
    if self.has_variable("params", TURNED):
      y = self._turned(x)
    else:
      y = super().__call__(x)
    if not self.has_variable("params", "lora_a"):
      return y
    a, b, scale = (self.get_variable("params", name) for name in lora.LEAVES)
    inputs = 1 if isinstance(self.axis, int) else len(self.axis)
    low = jnp.tensordot(x.astype(self.dtype), a.astype(self.dtype), inputs)
    high = jnp.tensordot(low, b.astype(self.dtype), 1)
    return y + high * scale.astype(self.dtype)

  def _turned(self, x):
    table = self.get_variable("params", TURNED).astype(self.dtype)
    features = self.features
    if isinstance(features, int):
      features = (features,)
    inputs = 1 if isinstance(self.axis, int) else len(self.axis)
    shape = x.shape[: x.ndim - inputs]
    x = x.astype(self.dtype).reshape(*shape, table.shape[1])
    y = times_table(x, table).reshape(*shape, *features)
    if self.use_bias:
      y += self.get_variable("params", "bias").astype(self.dtype)
    return y


def turn(layer: dict) -> dict:
  """A layer's parameters with kernels as tables [outputs, inputs].

  A copy for few rows a call, as in decoding, see `times_table`. `linear` takes
  either. Outputs and inputs of several axes become one.

  Args:
    layer: parameters of one decoder layer, {"query": {"kernel": ...}, ...}.
  """
  turned = {}
  for path, leaf in traverse_util.flatten_dict(layer).items():
    if path[-1] == "kernel":
      width = math.prod(leaf.shape[: lora.num_inputs(path[-2])])
      path, leaf = (*path[:-1], TURNED), leaf.reshape(width, -1).T
    turned[path] = leaf
  return traverse_util.unflatten_dict(turned)


def are_few(rows: int) -> bool:
  """Is a matmul of so many rows one that tables are for?"""
  return 1 < rows <= _FEW_ROWS


def times_table(
  x: jax.Array, table: jax.Array, dtype: jnp.dtype | None = None
) -> jax.Array:
  """[..., I] times a table [O, I] -> [..., O], accumulated in `dtype`.

  The CPU's matmul of two to some tens of rows is faster where the table is its
  first operand: read where it lies, not packed anew in every call.
  """
  wide = dict(preferred_element_type=dtype)

  def plain(x, table):
    return jnp.einsum("...I,OI->...O", x, table, **wide)

  def table_first(x, table):
    y = jnp.einsum("OI,BI->OB", table, x.reshape(-1, x.shape[-1]), **wide)
    # Without the barrier the compiler swaps the operands back.
    y = jax.lax.optimization_barrier(y)
    return y.T.reshape(*x.shape[:-1], -1)

  if not are_few(math.prod(x.shape[:-1])):
    return plain(x, table)
  return jax.lax.platform_dependent(x, table, cpu=table_first, default=plain)


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
    dot_general=_dot_general,
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


def _scores(query, key, mask, first):
  """float32[B,M,R,Q,S], `_LOWEST` where a query may not see a key."""
  # In float32: a bfloat16 score of 20 is off by 0.06, its exponential by 6 %.
  score = jnp.einsum(
    "BMRQH,BMSH->BMRQS", query, key, preferred_element_type=jnp.float32
  ) * (query.shape[-1] ** -0.5)
  allowed = None if mask is None else mask[:, None, None]  # [B, 1, 1, Q, S]
  if first is not None:
    place = first + jnp.arange(query.shape[3])
    earlier = place[:, None] >= jnp.arange(key.shape[2])
    allowed = earlier if allowed is None else allowed & earlier
  return score if allowed is None else jnp.where(allowed, score, _LOWEST)


@jax.custom_vjp
def _weigh(query, key, value, mask, first):
  """Unnormalised attention: sum of e^(s-top) v, sum of e^(s-top), and top.

  [B,M,R,Q,H], [B,M,S,H], [B,M,S,H], bool[B,Q,S] or [B,1,S] or None, and the
  place among the keys of the first query, where no query sees a later key ->
  float32 [B,M,R,Q,H], [B,M,R,Q,1], [B,M,R,Q,1].

  `top` is a constant: the three stand for one result, which it does not change.
  The backward pass makes the scores again, and holds those of one call.
  """
  score = _scores(query, key, mask, first)
  top = jnp.max(score, axis=-1, keepdims=True)
  # Not below half of the lowest: a query without keys then weighs each with
  # e^(_LOWEST / 2) = 0.
  top = jnp.maximum(top, _LOWEST / 2)
  weight = jnp.exp(score - top)
  total = jnp.sum(weight, axis=-1, keepdims=True)
  mixed = jnp.einsum(
    "BMRQS,BMSH->BMRQH",
    weight.astype(value.dtype),
    value,
    preferred_element_type=jnp.float32,
  )
  return mixed, total, top


def _weigh_forward(query, key, value, mask, first):
  result = _weigh(query, key, value, mask, first)
  return result, (query, key, value, mask, first, result[2])


def _weigh_backward(saved, grad):
  query, key, value, mask, first, top = saved
  grad_mixed, grad_total, _ = grad
  # What is multiplied is rounded as the arguments are; sums are in float32.
  grad_mixed = grad_mixed.astype(value.dtype)
  wide = dict(preferred_element_type=jnp.float32)
  with jax.named_scope("again"):
    weight = jnp.exp(_scores(query, key, mask, first) - top)
  grad_weight = jnp.einsum("BMRQH,BMSH->BMRQS", grad_mixed, value, **wide)
  grad_score = weight * (grad_weight + grad_total) * (query.shape[-1] ** -0.5)
  grad_score = grad_score.astype(query.dtype)
  grad_query = jnp.einsum("BMRQS,BMSH->BMRQH", grad_score, key, **wide)

  def over_queries(x, score):
    # [.., H, S] and not [.., S, H]: only the narrow one is then transposed.
    # R and Q as one axis: as two, einsum would swap them.
    x, score = (y.reshape(*y.shape[:2], -1, y.shape[-1]) for y in (x, score))
    made = jnp.einsum("BMTH,BMTS->BMHS", x, score, **wide)
    return _made_first(made).swapaxes(2, 3)

  grad_key = over_queries(query, grad_score)
  grad_value = over_queries(grad_mixed, weight.astype(value.dtype))
  return (
    grad_query.astype(query.dtype),
    grad_key.astype(key.dtype),
    grad_value.astype(value.dtype),
    None,
    None,
  )


_weigh.defvjp(_weigh_forward, _weigh_backward)


def _weigh_in_turn(query, key, value, mask, first):
  """`_weigh`, `_CHUNK` queries at a time, so that few scores exist at once."""
  count = -(-query.shape[3] // _CHUNK)
  pad = count * _CHUNK - query.shape[3]

  def chunk(x, axis):  # the axis of queries -> [count, ..., _CHUNK, ...]
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, pad)
    x = jnp.pad(x, widths)
    x = x.reshape(*x.shape[:axis], count, _CHUNK, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)

  def join(x):  # [count, B, M, R, _CHUNK, ...] -> [B, M, R, Q, ...]
    x = jnp.moveaxis(x, 0, 3)
    x = x.reshape(*x.shape[:3], count * _CHUNK, x.shape[-1])
    return x[:, :, :, : query.shape[3]]

  differs = mask is not None and mask.shape[1] > 1

  def body(args):
    query, own_mask, offset = args
    return _weigh(
      query,
      key,
      value,
      own_mask if differs else mask,
      None if first is None else first + offset,
    )

  chunks = (
    chunk(query, 3),
    chunk(mask, 1) if differs else None,
    jnp.arange(count) * _CHUNK,
  )
  return tuple(map(join, jax.lax.map(body, chunks)))


def _partial(query, key, value, mask, causal, first=None):
  """`_weigh` for [B,Q,N,H], [B,S,M,H], [B,S,M,H] -> [B,Q,M,R,H or 1].

  Causal queries go in strips, each with the keys up to its end: half the work.
  Not so where `first` is the place of the first query, which tracing does not
  know: later keys are computed and masked.
  """
  rows, num_queries, num_heads, width = query.shape
  num_kv = key.shape[2]
  # The axes of the matmuls innermost: anything else makes XLA transpose scores.
  query = query.reshape(rows, num_queries, num_kv, num_heads // num_kv, width)
  query = query.transpose(0, 2, 3, 1, 4)
  key = key.transpose(0, 2, 1, 3)
  value = value.transpose(0, 2, 1, 3)
  size = num_queries
  if causal:
    # No more than so many strips: each is compiled.
    size = -(-num_queries // (_STRIPS * _CHUNK)) * _CHUNK
  strips = []
  for start in range(0, num_queries, size):
    end = min(start + size, num_queries)
    keys = end if causal else key.shape[2]
    strip_mask = mask
    if mask is not None:
      strip_mask = mask[..., :keys]
      if mask.shape[1] > 1:
        strip_mask = strip_mask[:, start:end]
    many = end - start > _CHUNK and (end - start) * keys > _MANY
    strips.append(
      (_weigh_in_turn if many else _weigh)(
        query[:, :, :, start:end],
        key[:, :, :keys],
        value[:, :, :keys],
        strip_mask,
        start if causal else first,
      )
    )
  return tuple(
    jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4)
    for parts in zip(*strips, strict=True)
  )


@jax.custom_vjp
def _divide(mixed, total):
  """`mixed / total`, [..., H] by [..., 1]; 0 / 0 is 0."""
  return _divide_forward(mixed, total)[0]


def _divide_forward(mixed, total):
  total = jnp.where(total > 0, total, 1)
  shared = mixed / total
  return shared, (shared, total)


def _divide_backward(saved, grad):
  shared, total = saved
  ones = jnp.ones(shared.shape[-1:], shared.dtype)
  along = _along_last(grad * shared, ones)[..., None]
  return grad / total, -along / total


_divide.defvjp(_divide_forward, _divide_backward)


def _middle(key):
  """What the keys of a row share, [B, S, M, H] -> float32[B, 1, M, H], or None.

  The softmax does not see it. In bfloat16 a query's gradient does: its weights'
  gradients are rounded and no longer add up to 0, and what is left multiplies
  what all keys share, which the biases of Qwen2.5's keys make large.
  """
  if key.dtype != jnp.bfloat16:
    return None
  return jax.lax.stop_gradient(
    jnp.mean(key.astype(jnp.float32), axis=1, keepdims=True)
  )


def _without(key, middle):
  """Keys less what they share."""
  if middle is None:
    return key
  return (key.astype(jnp.float32) - middle).astype(key.dtype)


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None,
  *,
  implementation: str,
  causal: bool = False,
  mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  """Grouped-query attention, `softmax(q k / sqrt(H)) v`.

  Args:
    query: float[B, Q, N, H].
    key: float[B, S, M, H]; query head n reads key head n // R.
    value: float[B, S, M, H].
    mask: bool[B, Q, S] (1 broadcasts for B and Q), or None: all are allowed.
      The kernels take [B, 1, S] only; cuDNN takes the allowed slots to be the
      first of their row.
    implementation: which kernel, see `VLMConfig.attention`.
    mesh: see `VLMConfig.mesh`.
    causal: no query sees a later slot; Q must equal S.

  Returns:
    float[B, Q, N, H] in value's dtype; 0, with a finite gradient, where a
    query may attend to no key. (Kernels: any finite numbers there, and where
    the query's own slot is masked.)

  Raises:
    ValueError: an unknown kernel, or one that cannot serve.
  """
  kernel = kernels.choose(implementation, query.dtype, query.shape[-1], mesh)
  # Splash works on blocks of 128 slots: the tower's windows are smaller.
  if kernel == "splash" and key.shape[1] < kernels.SPLASH_BLOCK:
    kernel = "xla"
  if kernel == "xla":
    key = _without(key, _middle(key))
    mixed, total, _ = _partial(query, key, value, mask, causal)
    return _divide(mixed, total).reshape(query.shape).astype(value.dtype)
  if mask is not None:
    kernels.check_mask(kernel, mask.shape)
    mask = jnp.broadcast_to(mask[:, 0], (len(key), key.shape[1]))
  if kernel == "cudnn":
    return kernels.cudnn(query, key, value, mask, causal=causal)
  return kernels.splash(query, key, value, mask, causal=causal, mesh=mesh)


def attend_shared(
  query: jax.Array,
  prefix_key: jax.Array,
  prefix_value: jax.Array,
  prefix_mask: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  *,
  causal: bool = False,
) -> jax.Array:
  """Attention of G completions to their common prompt and to themselves.

  The two parts are joined by their softmax sums, so that the prompt's keys and
  values are read once per row and never copied to the completions.

  It is XLA's form whatever the setting: a decode step has one query for each
  completion and is bound by the bandwidth, not by its scores. Whole completions
  go through `attend_packed`.

  Args:
    query: float[B, G, Q, N, H].
    prefix_key: float[B, S, M, H] of the prompt.
    prefix_value: float[B, S, M, H].
    prefix_mask: bool[B, S].
    key: float[B, G, C, M, H] of each completion.
    value: float[B, G, C, M, H].
    mask: bool[B, G, Q, C] (1 broadcasts).
    causal: no query sees a later slot of its completion; Q must equal C.

  Returns:
    float[B, G, Q, N, H] in value's dtype.
  """
  rows, group, num_queries, num_heads, width = query.shape
  if causal:  # whole completions, whose gradient is taken
    middle = _middle(prefix_key)
    prefix_key = _without(prefix_key, middle)
    key = _without(key, None if middle is None else middle[:, None])

  def merge(x):  # [B, G, ...] -> [B * G, ...]
    return x.reshape(-1, *x.shape[2:])

  def align(x):  # -> [B, G, Q, M, R, H or 1]
    return x.reshape(rows, group, num_queries, *x.shape[2:])

  prefix = _partial(
    query.reshape(rows, -1, num_heads, width),
    prefix_key,
    prefix_value,
    prefix_mask[:, None],
    causal=False,
  )
  own = _partial(
    merge(query),
    merge(key),
    merge(value),
    merge(jnp.broadcast_to(mask, (rows, group, *mask.shape[2:]))),
    causal,
  )
  mixed_a, total_a, top_a = map(align, prefix)
  mixed_b, total_b, top_b = map(align, own)
  top = jnp.maximum(top_a, top_b)
  scale_a, scale_b = jnp.exp(top_a - top), jnp.exp(top_b - top)
  total = scale_a * total_a + scale_b * total_b
  mixed = scale_a * mixed_a + scale_b * mixed_b
  return _divide(mixed, total).reshape(query.shape).astype(value.dtype)


def attend_packed(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  prompt_mask: jax.Array,
  completion_mask: jax.Array,
  *,
  implementation: str,
  mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  """Causal attention of a prompt and of G completions that continue it.

  A prompt slot sees the real ones before it, a completion's slot the real slots
  of the prompt and its own completion's before it, and both themselves.

  Args:
    query: float[B, S + G * C, N, H]: the prompt, then one completion after
      another.
    key: float[B, S + G * C, M, H].
    value: float[B, S + G * C, M, H].
    prompt_mask: bool[B, S], True first: padding at the end.
    completion_mask: bool[B, G, C], True first.
    implementation: which kernel, see `VLMConfig.attention`.
    mesh: see `VLMConfig.mesh`.

  Returns:
    float[B, S + G * C, N, H] in value's dtype; finite and without meaning in
    padded slots.

  Raises:
    ValueError: an unknown kernel, or one that cannot serve.
  """
  kernel = kernels.choose(implementation, query.dtype, query.shape[-1], mesh)
  if kernel == "splash":
    return kernels.splash_packed(
      query, key, value, prompt_mask, completion_mask, mesh=mesh
    )
  rows, slots = prompt_mask.shape
  group, length = completion_mask.shape[1:]

  def split(x):
    own = x[:, slots:].reshape(rows, group, length, *x.shape[2:])
    return x[:, :slots], own

  prompt_query, own_query = split(query)
  prompt_key, own_key = split(key)
  prompt_value, own_value = split(value)
  prompt = attend(
    prompt_query,
    prompt_key,
    prompt_value,
    prompt_mask[:, None],
    implementation=kernel,
    causal=True,
  )
  if kernel == "cudnn":
    own = kernels.cudnn_shared(
      own_query, prompt_key, prompt_value, prompt_mask, own_key, own_value
    )
  else:
    own = attend_shared(
      own_query,
      prompt_key,
      prompt_value,
      prompt_mask,
      own_key,
      own_value,
      completion_mask[:, :, None],
      causal=True,
    )
  own = own.reshape(rows, group * length, *query.shape[2:])
  return jnp.concatenate([prompt, own], axis=1)


def attend_segments(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment: jax.Array,
  *,
  implementation: str,
  mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  """Causal attention in rows of several sequences, each to itself alone.

  Where "auto" stands for cuDNN, whose masks know no sequences, it is XLA's.

  Args:
    query: float[B, S, N, H].
    key: float[B, S, M, H].
    value: float[B, S, M, H].
    segment: int32[B, S] number of a slot's sequence, 0 for padding.
    implementation: which kernel, see `VLMConfig.attention`.
    mesh: see `VLMConfig.mesh`.

  Returns:
    float[B, S, N, H] in value's dtype; finite and without meaning in padded
    slots.

  Raises:
    ValueError: an unknown kernel, or one that cannot serve.
  """
  kernel = kernels.choose(implementation, query.dtype, query.shape[-1], mesh)
  if kernel == "splash":
    return kernels.splash(query, key, value, segment, causal=True, mesh=mesh)
  if kernel == "cudnn" and implementation != "auto":
    kernels.check_mask(kernel, (len(query), query.shape[1], key.shape[1]))
  allowed = segment[:, :, None] == segment[:, None]
  allowed &= (segment > 0)[:, None]
  return attend(query, key, value, allowed, implementation="xla", causal=True)


# ------------------------------------------------- slots split over devices


def _along_slots(mesh, body, *args):
  """`body` of each device's part of [B, slots, ...] along the context axis.

  Other axes stay with the compiler.
  """
  spec = P(None, "context")
  return jax.shard_map(
    body,
    mesh=mesh,
    in_specs=(spec,) * len(args),
    out_specs=spec,
    axis_names={"context"},
  )(*args)


def _gathered(x):
  """[B, slots of this device, ...] -> [B, slots of all, ...]."""
  return jax.lax.all_gather(x, "context", axis=1, tiled=True)


def _attend_from(query, key, value, mask, first):
  """Causal attention of some of a row's queries, the first at place `first`."""
  key = _without(key, _middle(key))
  mixed, total, _ = _partial(query, key, value, mask, False, first)
  return _divide(mixed, total).reshape(query.shape).astype(value.dtype)


def _first_slot(slots):
  """Place in the row of this device's first slot."""
  return jax.lax.axis_index("context") * slots


def _check_split(implementation, query, mesh):
  kernel = kernels.choose(implementation, query.dtype, query.shape[-1], mesh)
  if kernel != "xla" and implementation != "auto":
    raise ValueError(
      f"attention {kernel!r} does not split slots over config.mesh.context;"
      " change config.model.attention to 'xla'"
    )


def attend_packed_split(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  prompt_mask: jax.Array,
  completion_mask: jax.Array,
  *,
  mesh: Mesh,
  implementation: str,
) -> jax.Array:
  """`attend_packed` with slots over the devices of the context axis.

  Each device has its part of the prompt's queries and gathers all of the
  prompt's keys and values, once a layer; in the backward pass their gradients
  are summed and scattered. (Not a ring: with grouped queries the keys are a
  small part of a layer's activations, and are needed again at once.)
  Completions are whole on a device.

  Args:
    query: float[B, T, N, H] in the order of `weave`.
    key: float[B, T, M, H].
    value: float[B, T, M, H].
    prompt_mask: bool[B, S], True first: padding at the end.
    completion_mask: bool[B, G, C], True first; G may be 0.
    mesh: has the axis; it divides S and G.
    implementation: which kernel, see `VLMConfig.attention`.

  Returns:
    float[B, T, N, H] in value's dtype; finite and without meaning in padded
    slots.

  Raises:
    ValueError: a kernel that cannot serve.
  """
  _check_split(implementation, query, mesh)

  def body(query, key, value, prompt_mask, completion_mask):
    rows, slots = prompt_mask.shape
    group, length = completion_mask.shape[1:]
    prefix_key, prefix_value, prefix_mask = map(
      _gathered, (key[:, :slots], value[:, :slots], prompt_mask)
    )
    prompt = _attend_from(
      query[:, :slots],
      prefix_key,
      prefix_value,
      prefix_mask[:, None],
      _first_slot(slots),
    )
    if not group:
      return prompt

    def own(x):
      return x[:, slots:].reshape(rows, group, length, *x.shape[2:])

    mixed = attend_shared(
      own(query),
      prefix_key,
      prefix_value,
      prefix_mask,
      own(key),
      own(value),
      completion_mask[:, :, None],
      causal=True,
    )
    mixed = mixed.reshape(rows, group * length, *query.shape[2:])
    return jnp.concatenate([prompt, mixed], axis=1)

  return _along_slots(
    mesh, body, query, key, value, prompt_mask, completion_mask
  )


def attend_segments_split(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment: jax.Array,
  *,
  mesh: Mesh,
  implementation: str,
) -> jax.Array:
  """`attend_segments` with slots over the devices of the context axis.

  Args:
    query: and all that follow as there; the axis divides S.
    key: float[B, S, M, H].
    value: float[B, S, M, H].
    segment: int32[B, S].
    mesh: has the axis.
    implementation: which kernel.

  Raises:
    ValueError: a kernel that cannot serve.
  """
  _check_split(implementation, query, mesh)

  def body(query, key, value, segment):
    key, value, every = map(_gathered, (key, value, segment))
    allowed = segment[:, :, None] == every[:, None]
    allowed &= (every > 0)[:, None]
    return _attend_from(
      query, key, value, allowed, _first_slot(segment.shape[1])
    )

  return _along_slots(mesh, body, query, key, value, segment)


def weave(prompt: jax.Array, completion: jax.Array, parts: int) -> jax.Array:
  """[B, S, ...] and [B, G * C, ...] -> [B, S + G * C, ...] in `parts` turns.

  A turn is a part of the prompt and the part of the completions that lies on
  the same device.
  """
  rows = prompt.shape[0]
  woven = jnp.concatenate(
    [x.reshape(rows, parts, -1, *x.shape[2:]) for x in (prompt, completion)],
    axis=2,
  )
  return woven.reshape(rows, -1, *woven.shape[3:])


def unweave(
  x: jax.Array, slots: int, parts: int
) -> tuple[jax.Array, jax.Array]:
  """What `weave` had: [B, S, ...] and [B, G * C, ...].

  Args:
    x: woven.
    slots: S.
    parts: turns.
  """
  rows = x.shape[0]
  turns = x.reshape(rows, parts, -1, *x.shape[2:])
  own = slots // parts
  return tuple(
    turn.reshape(rows, -1, *x.shape[2:])
    for turn in (turns[:, :, :own], turns[:, :, own:])
  )


def split_slots(x: jax.Array, mesh: Mesh) -> jax.Array:
  """[B, slots, ...] that lies with its slots along the context axis."""
  free = P.UNCONSTRAINED
  spec = P(free, "context", *(free,) * (x.ndim - 2))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
