"""Fused kernels against XLA's form, and what their programs hold elsewhere.

Splash runs in Pallas' interpreter. cuDNN's kernel is nowhere here: a
stand-in with its interface is, and programs are lowered for both platforms.
"""

import collections
import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.experimental.pallas.ops.tpu import splash_attention

from cf_jax.models import kernels, layers, vlm

B, S, G, C, N, M, H = 2, 100, 2, 40, 4, 2, 16
PROMPT = np.arange(S) < np.array([100, 60])[:, None]
OWN = np.arange(C) < np.array([[40, 7], [1, 33]])[:, :, None]
REAL = np.concatenate([PROMPT, OWN.reshape(B, -1)], axis=1)


def draw(slots, width=H, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return tuple(
    jnp.asarray(rng.normal(size=(B, slots, heads, width)), dtype)
    for heads in (N, M, M)
  )


def packed(query, key, value, implementation):
  out = layers.attend_packed(
    query,
    key,
    value,
    jnp.asarray(PROMPT),
    jnp.asarray(OWN),
    implementation=implementation,
  )
  return jnp.where(REAL[:, :, None, None], out, 0)


def with_gradients(function, args):
  """Outputs, and the gradients of a sum of sines of them, in one program."""

  def total(*args):
    out = function(*args)
    return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

  grad = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
  (_, out), grads = jax.jit(grad)(*args)
  return jax.tree.map(lambda x: np.asarray(x, np.float32), (out, *grads))


@pytest.fixture
def anywhere(monkeypatch):
  monkeypatch.setattr(kernels, "_on_its_platform", lambda name, x: x)


@pytest.fixture
def interpreted(anywhere, monkeypatch):
  make = functools.partial(splash_attention.make_splash_mha, interpret=True)
  monkeypatch.setattr(splash_attention, "make_splash_mha", make)


def assert_close(ours, expected, atol):
  for mine, other in zip(ours, expected, strict=True):
    np.testing.assert_allclose(mine, other, atol=atol)


def test_splash_packed_equals_xla(interpreted):
  args = draw(S + G * C)
  ours = with_gradients(lambda *x: packed(*x, "splash"), args)
  assert_close(ours, with_gradients(lambda *x: packed(*x, "xla"), args), 2e-5)


def test_several_sequences_in_a_row(interpreted):
  """Each as in a row of its own, by XLA; splash has the same numbers."""
  length, slots = (37, 50, 41), 140
  segment = np.zeros((B, slots), np.int32)
  segment[:] = np.repeat([1, 2, 3, 0], [*length, slots - sum(length)])
  real = (segment > 0)[:, :, None, None]

  def shared(implementation):
    def function(*args):
      out = layers.attend_segments(
        *args, jnp.asarray(segment), implementation=implementation
      )
      return jnp.where(real, out, 0)

    return function

  def apart(*args):
    ends = np.cumsum(length)
    parts = [jnp.split(x, ends, axis=1) for x in args]
    outs = [
      layers.attend(*part, None, implementation="xla", causal=True)
      for part in zip(*parts, strict=True)
    ]
    return jnp.concatenate([*outs[:-1], jnp.zeros_like(outs[-1])], axis=1)

  args = draw(slots)
  ours = with_gradients(shared("xla"), args)
  assert_close(ours, with_gradients(apart, args), 2e-5)
  assert_close(with_gradients(shared("splash"), args), ours, 2e-5)


def test_cudnn_has_no_masks_of_sequences():
  args = draw(8, dtype=jnp.bfloat16)
  segment = jnp.ones((B, 8), jnp.int32)
  with pytest.raises(ValueError, match="'cudnn' takes masks of keys.*'xla'"):
    layers.attend_segments(*args, segment, implementation="cudnn")


@pytest.mark.parametrize("causal", [True, False])
def test_splash_rows_equal_xla(interpreted, causal):
  """200 slots fill two blocks, with some added; heads of 80 are widened."""
  slots = 200
  mask = np.arange(slots) < np.array([200, 131])[:, None]

  def attend(implementation):
    def function(*args):
      out = layers.attend(
        *args,
        jnp.asarray(mask[:, None]),
        implementation=implementation,
        causal=causal,
      )
      return jnp.where(mask[:, :, None, None], out, 0)

    return with_gradients(function, draw(slots, width=80))

  assert_close(attend("splash"), attend("xla"), 2e-5)


def allowed_by(kind, rows, queries, keys, lengths):
  """bool[rows, queries, keys] as cuDNN's mask types say."""
  mask = np.ones((rows, queries, keys), bool)
  if "CAUSAL" in kind:
    mask &= np.tri(queries, keys, dtype=bool)
  if "PADDING" in kind:
    mask = mask & (jnp.arange(keys) < lengths[:, None, None])
  return mask


def scores(query, key, mask_type, lengths, scale):
  key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
  score = scale * jnp.einsum("bqnh,bsnh->bnqs", query, key)
  mask = allowed_by(
    mask_type.name, len(query), query.shape[1], key.shape[1], lengths
  )
  return jnp.where(mask[:, None], score, -jnp.inf)


def stand_in_forward(*args, is_training, mask_type, scale, **_):
  query, key, value, _, _, lengths = args[:6]
  score = scores(query, key, mask_type, lengths, scale)
  value = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)
  weight = jax.nn.softmax(score, axis=-1)
  out = jnp.einsum("bnqs,bsnh->bqnh", weight, value)
  return out, jax.scipy.special.logsumexp(score, axis=-1)


def stand_in_backward(*args, mask_type, scale, **_):
  """FlashAttention-2 (arXiv:2307.08691), algorithm 2, in one block."""
  query, key, value, _, _, lengths = args[:6]
  spread, out, grad = args[-3:]
  times = query.shape[2] // key.shape[2]
  weight = jnp.exp(
    scores(query, key, mask_type, lengths, scale) - spread[..., None]
  )
  wide_key, wide_value = (jnp.repeat(x, times, axis=2) for x in (key, value))
  drop = jnp.einsum("bqnh,bqnh->bnq", grad, out)[..., None]
  slope = weight * (jnp.einsum("bqnh,bsnh->bnqs", grad, wide_value) - drop)

  def narrow(x):
    return x.reshape(*x.shape[:2], -1, times, x.shape[-1]).sum(axis=3)

  return (
    scale * jnp.einsum("bnqs,bsnh->bqnh", slope, wide_key),
    narrow(scale * jnp.einsum("bnqs,bqnh->bsnh", slope, query)),
    narrow(jnp.einsum("bnqs,bqnh->bsnh", weight, grad)),
  )


@pytest.fixture
def cudnn_stand_in(anywhere, monkeypatch):
  monkeypatch.setattr(kernels, "_problem", lambda *_: "")
  for direction, function in (
    ("fwd", stand_in_forward),
    ("bwd", stand_in_backward),
  ):
    monkeypatch.setattr(
      fused,
      f"_dot_product_attention_{direction}_p_wrapper",
      mock.Mock(bind=function),
    )


def test_cudnn_parts_join_to_xla(cudnn_stand_in):
  """The two parts' backward passes take the joint output and log-sum-exp."""
  args = draw(S + G * C)
  ours = with_gradients(lambda *x: packed(*x, "cudnn"), args)
  assert_close(ours, with_gradients(lambda *x: packed(*x, "xla"), args), 2e-5)


def test_cudnn_windows_equal_xla(cudnn_stand_in):
  mask = jnp.arange(40) < jnp.array([40, 9])[:, None, None]

  def attend(implementation):
    return with_gradients(
      lambda *x: layers.attend(*x, mask, implementation=implementation),
      draw(40),
    )

  assert_close(attend("cudnn"), attend("xla"), 2e-5)


@pytest.mark.parametrize(
  ("name", "platform", "forward", "backward"),
  [
    ("splash", "tpu", "splash_mha_fwd", "splash_mha_dkv"),
    ("cudnn", "cuda", "fmhaSoftmax", "fmhaSoftmaxBackward"),
  ],
)
def test_an_update_lowers_for_its_platform(
  config, name, platform, forward, backward
):
  config = dataclasses.replace(
    config, attention=name, dtype="bfloat16", remat="full"
  )
  shapes = jax.eval_shape(lambda rng: vlm.init(config, rng), jax.random.key(0))
  batch = dict(
    embedded=((B, S, config.hidden_size), jnp.bfloat16),
    position=((B, 3, S), jnp.int32),
    mask=((B, S), bool),
    token=((B, G, C), jnp.int32),
    token_mask=((B, G, C), bool),
  )
  batch = {key: jax.ShapeDtypeStruct(*value) for key, value in batch.items()}

  def loss(params, batch):
    _, hidden = vlm.packed(config, params, **batch)
    return jnp.sum(hidden.astype(jnp.float32))

  program = export.export(
    jax.jit(jax.grad(loss)),
    platforms=[platform],
    disabled_checks=[
      export.DisabledSafetyCheck.custom_call(target)
      for target in (
        "CustomSPMDPartitioning",
        "tpu_custom_call",
        "__cudnn$fmhaSoftmax",
        "__cudnn$fmhaSoftmaxBackward",
      )
    ],
  )(shapes, batch)
  text = program.mlir_module()
  found = collections.Counter(re.findall(r"splash_mha_\w+|fmha\w+", text))
  assert any(key.startswith(forward) for key in found), found
  assert any(key.startswith(backward) for key in found), found


@pytest.mark.parametrize(
  ("name", "dtype", "width", "mask", "says"),
  [
    ("flash", "float32", 16, None, "one of"),
    ("cudnn", "float32", 16, None, "bfloat16"),
    ("cudnn", "bfloat16", 12, None, "multiple of 8"),
    ("cudnn", "bfloat16", 136, None, "128"),
    ("cudnn", "bfloat16", 16, (B, 160, 160), r"\[B, 1, S\]"),
    ("cudnn", "bfloat16", 16, None, "runs on cuda"),
    ("splash", "bfloat16", 16, None, "runs on tpu"),
  ],
)
def test_what_a_kernel_cannot_serve(name, dtype, width, mask, says):
  args = draw(160, width, dtype)
  mask = mask and jnp.ones(mask, bool)
  with pytest.raises(ValueError, match=says) as error:
    jax.jit(
      lambda *x: layers.attend(*x, mask, implementation=name, causal=True)
    )(*args)
  assert "config.model.attention" in str(error.value)


@pytest.mark.parametrize("name", ["cudnn", "splash"])
@pytest.mark.parametrize("axis", [0, 2])
def test_the_check_of_the_platform_survives_vmap(name, axis):
  """Under vmap, of gradients too; and where it passes it is the identity."""
  guard = functools.partial(kernels._on_its_platform, name)
  x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 4)))

  def loss(x):
    return jnp.sum(jnp.sin(guard(x)))

  mapped = jax.vmap(jax.value_and_grad(loss), in_axes=axis)
  with pytest.raises(ValueError, match=f"{name!r} runs on"):
    jax.jit(mapped)(x)
  platform = {"cudnn": "cuda", "splash": "tpu"}[name]
  export.export(jax.jit(mapped), platforms=[platform])(x)
  moved = jax.vmap(guard, in_axes=axis, out_axes=axis)
  assert "attention_platform" in str(jax.make_jaxpr(moved)(x))
  assert jax.eval_shape(moved, x).shape == x.shape


def test_auto_is_xla_on_a_cpu():
  args = draw(S + G * C)
  ours = with_gradients(lambda *x: packed(*x, "auto"), args)
  expected = with_gradients(lambda *x: packed(*x, "xla"), args)
  for mine, other in zip(ours, expected, strict=True):
    np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("mask_rows", [None, 1, 700])
@pytest.mark.parametrize("causal", [True, False])
def test_strips_and_chunks_equal_one_block(monkeypatch, causal, mask_rows):
  """Long rows go piece by piece: against the softmax written out."""
  monkeypatch.setattr(layers, "_STRIPS", 2)
  monkeypatch.setattr(layers, "_MANY", 2**14)
  slots = 700
  rng = np.random.default_rng(1)
  mask = None
  if mask_rows:
    mask = jnp.asarray(rng.random((B, mask_rows, slots)) < 0.5)
    mask = mask.at[:, :, 0].set(True)

  def plain(query, key, value):
    key, value = (jnp.repeat(x, N // M, axis=2) for x in (key, value))
    score = jnp.einsum("bqnh,bsnh->bnqs", query, key) / H**0.5
    allowed = jnp.ones((1, slots, slots), bool) if mask is None else mask
    if causal:
      allowed = allowed & jnp.tri(slots, dtype=bool)
    score = jnp.where(allowed[:, None], score, -jnp.inf)
    return jnp.einsum("bnqs,bsnh->bqnh", jax.nn.softmax(score, axis=-1), value)

  def ours(*args):
    return layers.attend(*args, mask, implementation="xla", causal=causal)

  args = draw(slots)
  assert_close(with_gradients(ours, args), with_gradients(plain, args), 2e-5)


def test_cudnn_takes_padding_before(config, params, cudnn_stand_in):
  """Whole sequences may be padded on either side."""
  rng = np.random.default_rng(2)
  mask = jnp.asarray([[False] * 3 + [True] * 6, [True] * 8 + [False]])
  args = (
    jnp.asarray(rng.integers(0, config.vocab_size, mask.shape)),
    jnp.broadcast_to(jnp.arange(9), (2, 3, 9)),
    mask,
    jnp.full(mask.shape, -1),
    jnp.zeros((2, 0, config.hidden_size)),
  )
  ours, expected = (
    jax.jit(vlm.sequence_logits, static_argnums=0)(
      dataclasses.replace(config, attention=name), params, *args
    )
    for name in ("cudnn", "xla")
  )
  np.testing.assert_allclose(ours[mask], expected[mask], atol=2e-5)
