"""Attention and norm by hand, and where nothing may be attended to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax.models import layers

JIT = pytest.mark.parametrize(
  "transform", [jax.jit, lambda f: f], ids=["jit", "no_jit"]
)


def attend(query, key, value, mask):
  return layers.attend(query, key, value, mask, implementation="xla")


@JIT
def test_rms_norm(transform):
  norm = layers.RMSNorm(eps=1.0, param_dtype="float32")
  scale = {"params": {"scale": jnp.array([1.0, 10.0])}}
  # mean square of (1, 7) is 25, with eps 26
  out = transform(norm.apply)(scale, jnp.array([[1.0, 7.0]]))
  np.testing.assert_allclose(out, [[26**-0.5, 70 * 26**-0.5]], rtol=1e-6)


def test_rms_norm_averages_bfloat16_in_float32():
  norm = layers.RMSNorm(eps=1e-6, param_dtype="bfloat16")
  x = jnp.full((1, 1000), 3.0, jnp.bfloat16).at[0, ::2].set(-3.0)
  out = norm.apply({"params": {"scale": jnp.ones(1000, jnp.bfloat16)}}, x)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(jnp.abs(out.astype(jnp.float32)), 1.0)


@JIT
@pytest.mark.parametrize("shape", [(3,), (1, 1), (2, 4), (5, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_times_table(transform, shape, dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(*shape, 6)), dtype)
  table = jnp.asarray(rng.normal(size=(9, 6)), dtype)
  out = transform(lambda x, t: layers.times_table(x, t, jnp.float32))(x, table)
  assert out.dtype == jnp.float32
  expected = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
  np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_turned_layer_is_the_same(rows):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, rows, 6)), jnp.float32)
  params, expected = {}, {}
  for name, into, features in (("query", 1, (3, 2)), ("out", 2, (5,))):
    shape = (6,) if into == 1 else (3, 2)
    kernel = rng.normal(size=(*shape, *features)).astype(np.float32)
    bias = rng.normal(size=features).astype(np.float32)
    params[name] = {"kernel": kernel, "bias": bias}
    product = np.tensordot(np.reshape(x, (2, rows, *shape)), kernel, into)
    expected[name] = product + bias
  turned = layers.turn(params)
  for name, axis, features in (("query", -1, (3, 2)), ("out", (-2, -1), 5)):
    assert "kernel" not in turned[name]
    linear = layers.linear(
      features,
      use_bias=True,
      std=1.0,
      dtype="float32",
      param_dtype="float32",
      axis=axis,
    )
    given = x if name == "query" else x.reshape(2, rows, 3, 2)
    out = linear.apply({"params": turned[name]}, given)
    np.testing.assert_allclose(out, expected[name], atol=1e-5)


@JIT
def test_attend_by_hand(transform):
  # Width 4, so scores are q k / 2; 2 query heads share 1 key head.
  query = jnp.zeros((1, 1, 2, 4)).at[0, 0, 1, 0].set(2 * np.log(3.0))
  key = jnp.zeros((1, 3, 1, 4)).at[0, 0, 0, 0].set(1.0)
  value = jnp.array([[8.0], [4.0], [100.0]]).reshape(1, 3, 1, 1)
  value = jnp.broadcast_to(value, (1, 3, 1, 4))
  mask = jnp.array([[[True, True, False]]])
  out = transform(attend)(query, key, value, mask)
  np.testing.assert_allclose(out[0, 0, 0], 6.0, rtol=1e-6)  # (1, 1) / 2
  np.testing.assert_allclose(out[0, 0, 1], 7.0, rtol=1e-6)  # (3, 1) / 4


def test_query_heads_read_neighbouring_key_heads():
  query = jnp.ones((1, 1, 6, 2))
  key = jnp.ones((1, 1, 3, 2))
  value = jnp.arange(3.0)[None, None, :, None] * jnp.ones((1, 1, 3, 2))
  out = attend(query, key, value, None)
  np.testing.assert_allclose(out[0, 0, :, 0], [0, 0, 1, 1, 2, 2])


@JIT
def test_no_allowed_key_gives_zero_and_a_finite_gradient(transform):
  rng = np.random.default_rng(0)
  query, key, value = rng.normal(size=(3, 2, 3, 2, 4)).astype(np.float32)
  mask = jnp.ones((2, 3, 3), bool).at[0, 1].set(False)

  def total(query, key, value):
    return jnp.sum(attend(query, key, value, mask) ** 2)

  out = transform(attend)(query, key, value, mask)
  np.testing.assert_array_equal(out[0, 1], 0)
  grads = transform(jax.grad(total, argnums=(0, 1, 2)))(query, key, value)
  assert all(np.isfinite(grad).all() for grad in grads)
  np.testing.assert_array_equal(grads[0][0, 1], 0)


def test_huge_scores_do_not_overflow():
  query = jnp.full((1, 1, 1, 4), 1e4)
  key = jnp.stack([query[0, 0], -query[0, 0]])[None]
  out = attend(query, key, key, None)
  np.testing.assert_allclose(out, query)


@JIT
@pytest.mark.parametrize("empty_prompt", [False, True])
def test_shared_prefix_equals_one_long_row(transform, empty_prompt):
  rng = np.random.default_rng(0)
  rows, group, slots, num, heads, kv, width = 2, 3, 5, 4, 4, 2, 6

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  query = draw(rows, group, num, heads, width)
  prefix = draw(2, rows, slots, kv, width)
  own = draw(2, rows, group, num, kv, width)
  prefix_mask = jnp.array([[True] * 5, [True] * 2 + [False] * 3])
  if empty_prompt:
    prefix_mask = prefix_mask.at[1].set(False)
  own_mask = jnp.tril(jnp.ones((num, num), bool))[None, None]
  # one completion has an empty row as well
  own_mask = jnp.broadcast_to(own_mask, (rows, group, num, num))
  own_mask = own_mask.at[1, 2, 0].set(False)

  def shared(query, prefix, own):
    return layers.attend_shared(
      query,
      prefix[0],
      prefix[1],
      prefix_mask,
      own[0],
      own[1],
      own_mask,
    )

  def copied(query, prefix, own):
    def join(a, b):
      a = jnp.broadcast_to(a[:, None], (rows, group, *a.shape[1:]))
      return jnp.concatenate([a, b], axis=2).reshape(-1, slots + num, kv, width)

    mask = jnp.concatenate(
      [
        jnp.broadcast_to(prefix_mask[:, None, None], (rows, group, num, slots)),
        own_mask,
      ],
      axis=-1,
    )
    out = attend(
      query.reshape(-1, num, heads, width),
      join(prefix[0], own[0]),
      join(prefix[1], own[1]),
      mask.reshape(-1, num, slots + num),
    )
    return out.reshape(query.shape)

  args = (query, prefix, own)
  np.testing.assert_allclose(
    transform(shared)(*args), jax.jit(copied)(*args), atol=1e-6
  )

  def grads(f):
    return jax.jit(jax.grad(lambda args: jnp.sum(jnp.sin(f(*args)))))(args)

  for ours, expected in zip(grads(shared), grads(copied), strict=True):
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_unknown_kernel():
  x = jnp.zeros((1, 1, 1, 2))
  with pytest.raises(ValueError, match=r"config\.model\.attention"):
    layers.attend(x, x, x, None, implementation="magic")


def _weighed(function, *args):
  """Value, and gradients of a weighted sum of what the function gives."""

  def total(*args):
    y = function(*args)
    weight = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype)
    return jnp.sum((weight * y).astype(jnp.float32))

  every = tuple(range(len(args)))
  return function(*args), jax.jit(jax.grad(total, argnums=every))(*args)


def _assert_same(left, right, atol):
  for ours, expected in zip(
    jax.tree.leaves(left), jax.tree.leaves(right), strict=True
  ):
    assert ours.dtype == expected.dtype
    scale = float(jnp.max(jnp.abs(expected.astype(jnp.float32))))
    np.testing.assert_allclose(
      ours.astype(jnp.float32),
      expected.astype(jnp.float32),
      atol=atol * max(scale, 1e-3),
    )


@pytest.mark.parametrize(
  ("dtype", "atol"), [("float32", 1e-6), ("bfloat16", 2e-2)]
)
@pytest.mark.parametrize("part", ["norm", "mlp", "out"])
def test_gradients_are_those_of_jax(part, dtype, atol):
  """Rules of our own for norm, SwiGLU and linear layers of two input axes."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  settings = dict(use_bias=False, std=1.0, dtype=dtype, param_dtype=dtype)
  if part == "norm":
    module = layers.RMSNorm(eps=1e-2, param_dtype=dtype)
    x, params = draw(2, 3, 6), {"scale": draw(6)}

    def plain(x, params):
      wide = x.astype(jnp.float32)
      wide /= jnp.sqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-2)
      return wide.astype(x.dtype) * params["scale"]

  elif part == "mlp":
    module = layers.SwiGLU(width=5, **settings)
    x = draw(2, 3, 6)
    params = {
      name: {"kernel": draw(*shape)}
      for name, shape in (("gate", (6, 5)), ("up", (6, 5)), ("down", (5, 6)))
    }

    def plain(x, params):
      gate, up, down = (params[n]["kernel"] for n in ("gate", "up", "down"))
      return (jax.nn.silu(x @ gate) * (x @ up)) @ down

  else:
    module = layers.linear(7, axis=(-2, -1), **settings)
    x, params = draw(2, 3, 4, 5), {"kernel": draw(4, 5, 7)}

    def plain(x, params):
      return jnp.einsum("bsnh,nho->bso", x, params["kernel"])

  def ours(x, params):
    return module.apply({"params": params}, x)

  _assert_same(_weighed(ours, x, params), _weighed(plain, x, params), atol)


def test_nothing_is_kept_for_a_frozen_kernel():
  """Adapters train beside it: its inputs would fill the memory for nothing."""
  x, kernel = jnp.ones((32, 16)), jnp.ones((16, 8))
  linear = layers.linear(
    8, use_bias=False, std=1.0, dtype="float32", param_dtype="float32"
  )

  def shapes_kept(wanted):
    def pull(*args):
      return jax.vjp(
        lambda *given: linear.apply(
          {"params": {"kernel": given[-1] if "kernel" in wanted else kernel}},
          given[0] if "x" in wanted else x,
        ),
        *args,
      )[1]

    args = [{"x": x, "kernel": kernel}[name] for name in wanted]
    kept = jax.eval_shape(pull, *args)
    return sorted(leaf.shape for leaf in jax.tree.leaves(kept))

  assert shapes_kept(["x"]) == [kernel.shape]
  assert shapes_kept(["kernel"]) == [x.shape]
  assert shapes_kept(["x", "kernel"]) == sorted([x.shape, kernel.shape])


@pytest.mark.parametrize(
  ("remat", "dots"),
  # Forward 3, backward 6; in full, gate and up once more.
  [("none", 9), ("dots", 9), ("full", 11)],
)
def test_matmuls_of_a_gradient(remat, dots):
  """The policy "dots" finds the matmuls inside rules of our own."""
  module = layers.SwiGLU(
    width=3, use_bias=False, std=1.0, dtype="float32", param_dtype="float32"
  )
  x = jnp.ones((1, 2, 4))
  stacked = layers.init_stack(module, jax.random.key(0), 2, x)

  def loss(stacked):
    def body(x, layer):
      return x + module.apply({"params": layer}, x), None

    return jnp.sum(
      layers.scan_stack(body, x, stacked, remat=remat, unroll=1)[0]
    )

  assert (
    str(jax.make_jaxpr(jax.grad(loss))(stacked)).count("dot_general[") == dots
  )


def test_what_all_keys_share_is_not_in_the_gradient_of_queries():
  """In bfloat16, operation by operation, against float32 in one program.

  Qwen2.5's keys have large biases.
  """
  rng = np.random.default_rng(0)
  shape = (2, 24, 2, 8)
  query, key, value, grad = (rng.normal(size=shape) for _ in range(4))
  key = key + 100 * rng.normal(size=(1, 1, 2, 8))
  own_mask = jnp.ones((1, 1, 8, 8), bool)

  def alone(query, key, value):
    return layers.attend(
      query, key, value, None, implementation="xla", causal=True
    )

  def shared(query, key, value):
    """The first 8 slots are the prompt, two completions of 8 follow."""
    rest = (2, 2, 8, 2, 8)
    return layers.attend_shared(
      query[:, 8:].reshape(rest),
      key[:, :8],
      value[:, :8],
      jnp.ones((2, 8), bool),
      key[:, 8:].reshape(rest),
      value[:, 8:].reshape(rest),
      own_mask,
      causal=True,
    ).reshape(2, 16, 2, 8)

  for attend, slots in ((alone, slice(None)), (shared, slice(8, None))):

    def gradient(dtype, attend=attend, slots=slots):
      args = [
        jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in (query, key, value)
      ]
      wanted = jnp.asarray(grad[:, slots], jnp.float32)
      return jax.grad(
        lambda q: jnp.sum(attend(q, *args[1:]).astype(jnp.float32) * wanted)
      )(args[0]).astype(jnp.float32)

    exact = jax.jit(gradient, static_argnums=0)("float32")
    off = jnp.linalg.norm(gradient("bfloat16") - exact)
    assert off < 0.02 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
  ("dtype", "atol"), [("float32", 2e-6), ("bfloat16", 3e-2)]
)
def test_gradient_of_attention(monkeypatch, causal, dtype, atol):
  """By strips, and chunk by chunk, against the softmax of jax."""
  monkeypatch.setattr(layers, "_CHUNK", 4)
  rng = np.random.default_rng(0)
  query, key, value = (
    jnp.asarray(rng.normal(size=(2, 11, heads, 6)), dtype)
    for heads in (4, 2, 2)
  )
  mask = jnp.ones((2, 1, 11), bool).at[1, :, 7:].set(False)

  def plain(query, key, value):
    key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
    wide = dict(preferred_element_type=jnp.float32)
    score = jnp.einsum("bqnh,bsnh->bnqs", query, key, **wide) * 6**-0.5
    allowed = mask[:, None]
    if causal:
      allowed = allowed & jnp.tril(jnp.ones((11, 11), bool))
    prob = jax.nn.softmax(jnp.where(allowed, score, -jnp.inf))
    mixed = jnp.einsum("bnqs,bsnh->bqnh", prob.astype(value.dtype), value)
    return mixed.astype(value.dtype)

  expected = _weighed(plain, query, key, value)
  for strips, many in ((16, 2**20), (1, 1)):
    monkeypatch.setattr(layers, "_STRIPS", strips)
    monkeypatch.setattr(layers, "_MANY", many)
    ours = _weighed(
      lambda *qkv: layers.attend(
        *qkv, mask, implementation="xla", causal=causal
      ),
      query,
      key,
      value,
    )
    _assert_same(ours, expected, atol)
