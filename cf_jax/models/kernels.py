"""Fused attention: cuDNN's on NVIDIA GPUs and splash on TPUs.

`layers.attend` and `layers.attend_packed` are the doors to them; how they are
chosen is `VLMConfig.attention`. Both work through the scores block by block and
never hold them; their backward passes make them again from the log-sum-exp of
each query's scores.

A program may be lowered for another platform than the one it is lowered on, so
that a kernel on the wrong platform is refused when it is lowered, not before.

Axes: `B` rows, `G` completions per row, `Q` query slots, `S` key slots, `C`
completion slots, `T` all slots of a packed row, `N` query heads, `M` key/value
heads, `H` head width.
"""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.interpreters import batching, mlir
from jax.sharding import PartitionSpec as P

from cf_jax.models import config
from cf_jax.runtime import sharding

# Slots of splash's smallest block; head widths are padded to multiples of it.
SPLASH_BLOCK = 128

# Splash that is given each device's part.
_DIVIDED = "splash over a mesh"
_PLATFORM = {"cudnn": "cuda", "splash": "tpu", _DIVIDED: "tpu"}
_SETTING = "change config.model.attention"


def check_mask(name: str, shape: tuple[int, ...]) -> None:
  """Raises a ValueError for a mask that differs between queries."""
  if shape[1] != 1:
    raise ValueError(
      f"attention {name!r} takes masks of keys, bool[B, 1, S], besides the"
      f" causal one, got {shape}; {_SETTING} to 'xla'"
    )


def choose(
  name: str,
  dtype: jnp.dtype,
  head_dim: int,
  mesh: jax.sharding.Mesh | None = None,
) -> str:
  """The kernel to use: "xla", "cudnn" or "splash".

  "auto" looks at the devices of this process: a program that is compiled ahead
  of time for others names its kernel.

  Args:
    name: see `VLMConfig.attention`.
    dtype: of queries, keys and values.
    head_dim: width of a head.
    mesh: see `VLMConfig.mesh`.

  Raises:
    ValueError: an unknown name, or a kernel that cannot serve.
  """
  if name not in config.ATTENTION:
    raise ValueError(
      f"attention must be one of {config.ATTENTION}, got {name!r}; {_SETTING}"
    )
  if name == "auto":
    return _automatic(str(dtype), head_dim, mesh is not None)
  problem = _problem(name, str(dtype), head_dim)
  if problem:
    raise ValueError(f"attention {name!r} {problem}; {_SETTING} to 'xla'")
  return name


def _problem(name, dtype, head_dim):
  """Why a kernel cannot serve, or an empty string."""
  if name == "cudnn" and dtype != "bfloat16":
    return f"takes bfloat16, got config.model.dtype {dtype}"
  if name == "cudnn" and (head_dim % 8 or head_dim > 128):
    return f"takes heads of a multiple of 8 up to 128, got {head_dim}"
  if name == "cudnn" and jax.default_backend() == "gpu":
    device = jax.local_devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    # A ROCm device says "gfx...".
    if not capability[:1].isdigit() or float(capability) < 8.0:
      return (
        "takes an NVIDIA GPU of compute capability 8.0 or more, got"
        f" {device.device_kind} ({capability})"
      )
  if name == "splash" and dtype not in ("bfloat16", "float32"):
    return f"takes bfloat16 or float32, got config.model.dtype {dtype}"
  return ""


@functools.cache
def _automatic(dtype, head_dim, has_mesh):
  platform = jax.default_backend()
  name = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "xla")
  reason = _problem(name, dtype, head_dim)
  # XLA does not split a Mosaic kernel over a mesh; `_splash` does.
  if name == "splash" and jax.device_count() > 1 and not has_mesh:
    reason = f"serves one device, got {jax.device_count()}"
  if reason:
    logging.warning("attention 'auto': %s %s; it is 'xla'", name, reason)
    return "xla"
  logging.info("attention 'auto' on %s, %s: %r", platform, dtype, name)
  return name


# The identity where a kernel can run; lowering it for another platform is an
# error that says so.
_guard = jax.extend.core.Primitive("attention_platform")


@_guard.def_abstract_eval
def _guard_shape(x, *, name):
  del name
  return x


@_guard.def_impl
def _guard_now(x, *, name):
  return jax.jit(lambda x: _guard.bind(x, name=name))(x)


def _guard_lowering(context, x, *, name):
  platforms = context.module_context.platforms
  if tuple(platforms) != (_PLATFORM[name],):
    raise ValueError(
      f"attention {name!r} runs on {_PLATFORM[name]}, got a program for"
      f" {' and '.join(platforms)}; {_SETTING} to 'auto' or 'xla'"
    )
  # XLA does not split a Mosaic kernel over a mesh.
  count = getattr(context.module_context.axis_context, "num_devices", 1)
  if name == "splash" and count > 1:
    raise ValueError(
      f"attention 'splash' serves one device, got a program for {count};"
      f" {_SETTING} to 'xla'"
    )
  return [x]


mlir.register_lowering(_guard, _guard_lowering)


def _guard_batching(args, axes, *, name):
  return _guard.bind(*args, name=name), axes[0]


batching.primitive_batchers[_guard] = _guard_batching


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _on_its_platform(name: str, x: jax.Array) -> jax.Array:
  """x; an error in a program for a platform without this kernel."""
  return _guard.bind(x, name=name)


@_on_its_platform.defjvp
def _on_its_platform_jvp(name, primals, tangents):
  return _on_its_platform(name, *primals), tangents[0]


# -- cuDNN. Its primitives are bound directly: the public function rounds the
# log-sum-exp to bfloat16, gives it no gradient, and cannot be traced where
# there is no cuDNN.


def _cudnn_settings(width, causal, count):
  from jax._src.cudnn import fused_attention_stablehlo as fused

  kind = fused.MaskType.NO_MASK
  if causal:
    kind = fused.MaskType.CAUSAL
  elif count is not None:
    kind = fused.MaskType.PADDING
  return fused, dict(
    scale=width**-0.5,
    seed=0,
    dropout_rate=0.0,
    variadic_args=(False, False),  # no bias, no gradient of one
    mask_type=kind,
    layout=fused.AttentionLayout.BTNH.value,
    sliding_window_length=None,
  )


def _cudnn_lists(query, count):
  """Lengths of queries and of keys, then what is not used: pages, offsets."""
  unused = jnp.zeros(0, query.dtype)
  lengths = (unused, unused)
  if count is not None:
    lengths = (jnp.full(len(query), query.shape[1], jnp.int32), count)
  return unused, *lengths, *(unused,) * 4


def _cudnn_forward(query, key, value, count, causal):
  """float[B, Q, N, H], and float32[B, N, Q] the log-sum-exp of the scores."""
  fused, settings = _cudnn_settings(query.shape[-1], causal, count)
  return fused._dot_product_attention_fwd_p_wrapper.bind(
    _on_its_platform("cudnn", query),
    key,
    value,
    *_cudnn_lists(query, count),
    **settings,
    is_training=True,
  )


def _cudnn_backward(query, key, value, count, causal, out, spread, grad):
  """Gradients of a part of the keys.

  With `out` and `spread` of all keys: a part's weights are e^(s - spread), and
  what is subtracted, the sum of `grad` times `out`, is the whole's.
  """
  fused, settings = _cudnn_settings(query.shape[-1], causal, count)
  grads = fused._dot_product_attention_bwd_p_wrapper.bind(
    query,
    key,
    value,
    *_cudnn_lists(query, count),
    spread,
    out,
    grad.astype(query.dtype),
    **settings,
  )
  if count is None:
    return tuple(grads)
  # cuDNN does not say what it writes beyond a row's length.
  real = (jnp.arange(key.shape[1]) < count[:, None])[:, :, None, None]
  return grads[0], *(jnp.where(real, grad, 0) for grad in grads[1:])


def _count(mask):
  # A row without keys has no log-sum-exp; it reads one slot.
  return jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)


def cudnn(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None,
  *,
  causal: bool,
) -> jax.Array:
  """`layers.attend` by cuDNN.

  Args:
    query: bfloat16[B, Q, N, H].
    key: bfloat16[B, S, M, H].
    value: bfloat16[B, S, M, H].
    mask: bool[B, S], True first, or None. Not needed where it is causal: no
      real slot sees the padding after it.
    causal: no query sees a later slot.
  """
  count = None if causal or mask is None else _count(mask)
  return _cudnn(causal, query, key, value, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cudnn(causal, query, key, value, count):
  return _cudnn_forward(query, key, value, count, causal)[0]


def _cudnn_fwd(causal, query, key, value, count):
  out, spread = _cudnn_forward(query, key, value, count, causal)
  return out, (query, key, value, count, out, spread)


def _cudnn_bwd(causal, kept, grad):
  query, key, value, count, out, spread = kept
  grads = _cudnn_backward(query, key, value, count, causal, out, spread, grad)
  return *grads, None


_cudnn.defvjp(_cudnn_fwd, _cudnn_bwd)


def cudnn_shared(
  query: jax.Array,
  prefix_key: jax.Array,
  prefix_value: jax.Array,
  prefix_mask: jax.Array,
  key: jax.Array,
  value: jax.Array,
) -> jax.Array:
  """Causal completions that also see their common prompt, by cuDNN.

  Args:
    query: bfloat16[B, G, C, N, H].
    prefix_key: bfloat16[B, S, M, H].
    prefix_value: bfloat16[B, S, M, H].
    prefix_mask: bool[B, S], True first; an empty prompt counts as one slot.
    key: bfloat16[B, G, C, M, H].
    value: bfloat16[B, G, C, M, H].

  Returns:
    bfloat16[B, G, C, N, H].
  """
  return _cudnn_shared(
    query, prefix_key, prefix_value, _count(prefix_mask), key, value
  )


@jax.custom_vjp
def _cudnn_shared(*args):
  return _cudnn_shared_fwd(*args)[0]


def _long(x):  # [B, G, C, ...] -> [B, G * C, ...]
  return x.reshape(len(x), -1, *x.shape[3:])


def _apart(x):  # [B, G, C, ...] -> [B * G, C, ...]
  return x.reshape(-1, *x.shape[2:])


def _cudnn_shared_fwd(query, prefix_key, prefix_value, count, key, value):
  rows, group, length, heads, _ = query.shape
  prefix, prefix_spread = _cudnn_forward(
    _long(query), prefix_key, prefix_value, count, causal=False
  )
  own, own_spread = _cudnn_forward(
    _apart(query), _apart(key), _apart(value), None, causal=True
  )
  prefix_spread = prefix_spread.reshape(rows, heads, group, length)
  prefix_spread = prefix_spread.transpose(0, 2, 3, 1)  # [B, G, C, N]
  own_spread = own_spread.reshape(rows, group, heads, length)
  own_spread = own_spread.transpose(0, 1, 3, 2)
  spread = jnp.logaddexp(prefix_spread, own_spread)

  def share(part, part_spread):
    weight = jnp.exp(part_spread - spread)[..., None]
    return weight * part.reshape(query.shape).astype(jnp.float32)

  out = share(prefix, prefix_spread) + share(own, own_spread)
  out = out.astype(query.dtype)
  kept = (query, prefix_key, prefix_value, count, key, value, out, spread)
  return out, kept


def _cudnn_shared_bwd(kept, grad):
  query, prefix_key, prefix_value, count, key, value, out, spread = kept
  prefix_grads = _cudnn_backward(
    _long(query),
    prefix_key,
    prefix_value,
    count,
    False,
    _long(out),
    _long(spread).transpose(0, 2, 1),
    _long(grad),
  )
  own_grads = _cudnn_backward(
    _apart(query),
    _apart(key),
    _apart(value),
    None,
    True,
    _apart(out),
    _apart(spread).transpose(0, 2, 1),
    _apart(grad),
  )
  query_grad = prefix_grads[0].reshape(query.shape) + own_grads[0].reshape(
    query.shape
  )
  return (
    query_grad,
    *prefix_grads[1:],
    None,
    *(
      g.reshape(x.shape)
      for g, x in zip(own_grads[1:], (key, value), strict=True)
    ),
  )


_cudnn_shared.defvjp(_cudnn_shared_fwd, _cudnn_shared_bwd)


# -- splash


def splash(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None,
  *,
  causal: bool,
  mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  """`layers.attend` of slots to themselves by splash; Q equals S.

  Args:
    query: float[B, S, N, H].
    key: float[B, S, M, H].
    value: float[B, S, M, H].
    mask: bool[B, S] or None. Masked slots attend to masked slots. Or int32:
      slots attend to those of their own number.
    causal: no query sees a later slot.
    mesh: see `VLMConfig.mesh`; each device is given its rows, and its heads.
  """

  if query.shape[1] != key.shape[1]:
    raise ValueError(
      "attention 'splash' takes as many queries as keys, got"
      f" {query.shape[1]} and {key.shape[1]}; {_SETTING} to 'xla'"
    )

  def allowed(query_slot, key_slot):
    # The second is everywhere, and of the shape that is asked for.
    return query_slot >= key_slot if causal else query_slot + key_slot >= 0

  if mask is None:
    mask = jnp.ones(key.shape[:2], bool)
  return _splash(query, key, value, mask, allowed, lambda slot: slot, mesh)


def splash_packed(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  prompt_mask: jax.Array,
  completion_mask: jax.Array,
  *,
  mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  """`layers.attend_packed` by splash, in one pass over prompt and completions.

  Args:
    query: float[B, T, N, H], T = S + G * C.
    key: float[B, T, M, H].
    value: float[B, T, M, H].
    prompt_mask: bool[B, S].
    completion_mask: bool[B, G, C].
    mesh: as in `splash`.
  """
  slots, length = prompt_mask.shape[1], completion_mask.shape[2]

  bits = (length - 1).bit_length()
  if query.shape[1] + 512 >= 2 ** (31 - bits):
    raise ValueError(
      f"attention 'splash' takes fewer than {2 ** (31 - bits) - 512} slots with"
      f" completions of {length}, got {query.shape[1]}; {_SETTING} to 'xla'"
    )

  # A query's slot and its place in its completion in one number: the kernel
  # does not divide.
  def describe(slot):
    return (slot << bits) + np.maximum(slot - slots, 0) % length

  def allowed(described, key_slot):
    slot = described >> bits
    start = slot - (described & (2**bits - 1))
    return (slot >= key_slot) & ((key_slot < slots) | (key_slot >= start))

  mask = completion_mask.reshape(len(query), -1)
  mask = jnp.concatenate([prompt_mask, mask], axis=1)
  return _splash(query, key, value, mask, allowed, describe, mesh)


def _axis_of_heads(mesh, num_rows, num_kv):
  """The mesh axis that divides heads, "" for none; None: nothing is divided.

  Heads are, where the key heads divide; the sequence is whole.
  """
  if mesh is None or mesh.size == 1:
    return None
  if num_rows % (mesh.shape["data"] * mesh.shape["fsdp"]):
    return None
  tensor = mesh.shape["tensor"]
  return "tensor" if tensor > 1 and num_kv % tensor == 0 else ""


def _splash(query, key, value, mask, allowed, describe, mesh):
  """Attention where `allowed(describe(query slot), key slot)`.

  Real slots do not attend to masked ones. Both functions are called with numpy
  arrays, and `allowed` in the kernel.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask,
  )

  class Allowed(splash_attention_mask._ComputableMask):
    """Computed in the kernel; all heads have the same one."""

    def __eq__(self, other):
      return self is other

    def __hash__(self):
      return id(self)

  slots, heads, width = query.shape[1:]
  # Blocks of 512 where few slots are added to fill them.
  block = next(
    size
    for size in (512, 256, SPLASH_BLOCK)
    if size == SPLASH_BLOCK or -slots % size <= slots // 8
  )
  padded = slots + -slots % block

  def prepare(x):  # [B, S, heads, H] -> [B, heads, padded, multiple of 128]
    pad = ((0, 0), (0, padded - slots), (0, 0), (0, -width % SPLASH_BLOCK))
    return jnp.pad(x, pad).transpose(0, 2, 1, 3)

  # Slots attend to those of their own number only: real ones to real ones, and
  # each of the others at least to itself.
  number = jnp.pad(mask, ((0, 0), (0, padded - slots))).astype(jnp.int32)
  one_head = Allowed((padded, padded), allowed)
  one_head.q_sequence = describe(one_head.q_sequence)
  axis = _axis_of_heads(mesh, len(query), key.shape[2])
  if axis:
    heads //= mesh.shape[axis]
  kernel = splash_attention.make_splash_mha(
    splash_attention_mask.MultiHeadMask([one_head] * heads),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=splash_attention.BlockSizes(
      **dict.fromkeys(
        (
          "block_q",
          "block_kv",
          "block_q_dkv",
          "block_kv_dkv",
          "block_q_dq",
          "block_kv_dq",
        ),
        block,
      )
    ),
  )

  def rows(query, key, value, number):
    segments = splash_attention.SegmentIds(number, number)
    return kernel(query, key, value, segments)

  scaled = query * jnp.asarray(width**-0.5, query.dtype)
  scaled = _on_its_platform("splash" if axis is None else _DIVIDED, scaled)
  attend = jax.vmap(rows)
  if axis is not None:
    parts = P(*sharding.BATCH, axis or None)
    attend = jax.shard_map(
      attend,
      mesh=mesh,
      in_specs=(parts, parts, parts, sharding.BATCH),
      out_specs=parts,
      check_vma=False,
    )
  out = attend(prepare(scaled), prepare(key), prepare(value), number)
  return out.transpose(0, 2, 1, 3)[:, :slots, :, :width]
