"""Adapters: where they go, what they add, and that merging changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax.models import lora, vlm
from cf_jax.runtime import optim, sharding

RANK, ALPHA = 3, 6.0


def _adapters(params, modules, *, filled=True):
  made = lora.init(
    params, jax.random.key(1), rank=RANK, alpha=ALPHA, modules=modules
  )
  rng = np.random.default_rng(2)

  def fill(path, leaf):
    if path[-1].key == "lora_scale":
      return leaf
    return jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(fill, made) if filled else made


def _paths(tree):
  return {
    sharding.path_of(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.fixture(scope="module")
def inputs(config):
  """Two prompts that show a slice of 4 visual tokens, and patches of it."""
  rng = np.random.default_rng(3)
  visual = np.full((2, 9), -1)
  visual[:, 2:6] = np.arange(4)
  return dict(
    token=jnp.asarray(rng.integers(0, 40, (2, 9)), jnp.int32),
    position=jnp.asarray(np.tile(np.arange(9), (2, 3, 1)), jnp.int32),
    mask=jnp.asarray(np.arange(9) < np.array([[9], [7]])),
    visual=jnp.asarray(visual),
    pixel=jnp.asarray(rng.normal(size=(2, 16, config.vision.patch_dim))),
  )


def _logits(config, params, inputs):
  visual = vlm.encode_vision(config, params, inputs["pixel"], (4, 4))
  return vlm.sequence_logits(
    config,
    params,
    inputs["token"],
    inputs["position"],
    inputs["mask"],
    inputs["visual"],
    visual,
  )


def test_shapes(params):
  found = _paths(_adapters(params, ("decoder/layers/(query|out)$", "merger/")))
  assert {path: leaf.shape for path, leaf in found.items()} == {
    "decoder/layers/query/lora_a": (2, 32, RANK),
    "decoder/layers/query/lora_b": (2, RANK, 4, 8),
    "decoder/layers/query/lora_scale": (2,),
    "decoder/layers/out/lora_a": (2, 4, 8, RANK),
    "decoder/layers/out/lora_b": (2, RANK, 32),
    "decoder/layers/out/lora_scale": (2,),
    "vision/merger/up/lora_a": (64, RANK),
    "vision/merger/up/lora_b": (RANK, 64),
    "vision/merger/up/lora_scale": (),
    "vision/merger/down/lora_a": (64, RANK),
    "vision/merger/down/lora_b": (RANK, 32),
    "vision/merger/down/lora_scale": (),
  }
  np.testing.assert_array_equal(
    found["decoder/layers/query/lora_scale"], ALPHA / RANK
  )


def test_fresh_adapters_change_nothing(config, params, inputs):
  fresh = _adapters(params, (".",), filled=False)
  for path, leaf in _paths(fresh).items():
    if path.endswith("lora_b"):
      assert not np.any(leaf)
    if path.endswith("query/lora_a"):
      bound = 1 / np.sqrt(leaf.shape[1])
      assert 0.9 * bound < np.abs(leaf).max() <= bound
      assert not np.array_equal(leaf[0], leaf[1])  # layers differ
  run = jax.jit(_logits, static_argnums=0)
  np.testing.assert_array_equal(
    run(config, params, inputs),
    run(config, optim.join(params, fresh), inputs),
  )


@pytest.mark.parametrize(
  "modules", [(".",), (r"^decoder/layers/(query|value)$",), (r"^vision/",)]
)
def test_merged_equals_unmerged(config, params, inputs, modules):
  adapted = optim.join(params, _adapters(params, modules))
  merged = lora.merge(adapted)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  assert lora.has_adapters(adapted) and not lora.has_adapters(merged)
  run = jax.jit(_logits, static_argnums=0)
  with jax.default_matmul_precision("highest"):
    plain = run(config, params, inputs)
    found = run(config, adapted, inputs)
    expected = run(config, merged, inputs)
  assert np.abs(found - plain).max() > 0.1  # they do something
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_linear_layer_by_hand(params):
  """W + (alpha / rank) A B, written out with loops over one layer's kernel."""
  adapters = _adapters(params, ("decoder/layers/out$",))
  merged = lora.merge(optim.join(params, adapters))
  w = np.asarray(params["decoder"]["layers"]["out"]["kernel"][1], np.float64)
  a, b, scale = (
    np.asarray(adapters["decoder"]["layers"]["out"][name][1], np.float64)
    for name in lora.LEAVES
  )
  for head in range(w.shape[0]):
    for channel in range(w.shape[1]):
      w[head, channel] += scale * sum(
        a[head, channel, r] * b[r] for r in range(RANK)
      )
  np.testing.assert_allclose(
    merged["decoder"]["layers"]["out"]["kernel"][1], w, rtol=1e-5, atol=1e-6
  )


def test_merge_keeps_the_kernels_dtype(params):
  half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  merged = lora.merge(optim.join(half, _adapters(half, (".",))))
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(merged))
  wide = lora.merge(optim.join(half, _adapters(half, (".",))), "float32")
  for path, leaf in _paths(wide).items():
    adapted = path.endswith("kernel")
    assert leaf.dtype == (jnp.float32 if adapted else jnp.bfloat16), path


def test_only_adapters_are_trained(config, params):
  whole = optim.join(params, _adapters(params, (".",)))
  trained, frozen = optim.split(whole, (lora.ALL_BUT_ADAPTERS,))
  assert {path.split("/")[-1] for path in _paths(trained)} == {
    "lora_a",
    "lora_b",
  }
  assert len(_paths(trained)) + len(_paths(frozen)) == len(_paths(whole))


def test_gradient_of_adapters_is_finite_and_flows_to_each(
  config, params, inputs
):
  whole = optim.join(params, _adapters(params, (".",)))
  trained, frozen = optim.split(whole, (lora.ALL_BUT_ADAPTERS,))

  @jax.jit
  def gradient(trained):
    return jax.grad(
      lambda t: jnp.mean(
        jax.nn.logsumexp(_logits(config, optim.join(frozen, t), inputs), -1)
      )
    )(trained)

  for path, leaf in _paths(gradient(trained)).items():
    assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), path


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(modules=("decodr/",)), r"\['decodr/'\] match no linear layer"),
    (dict(modules=()), "config.lora.modules"),
    (dict(modules=("(",)), r"config\.lora\.modules has the broken regex '\('"),
    (dict(modules="vision"), "config.lora.modules must be a tuple.*'vision'"),
    (dict(modules=(7,)), r"config.lora.modules must be a tuple.*\(7,\)"),
    (dict(rank=-1), "at least 0, got -1; change config.lora.rank"),
  ],
)
def test_bad_settings(params, changes, said):
  settings = dict(rank=2, alpha=4.0, modules=(".",)) | changes
  with pytest.raises(ValueError, match=said):
    lora.init(params, jax.random.key(0), **settings)


def test_rank_zero_is_the_plain_model(params):
  none = lora.init(params, jax.random.key(0), rank=0, alpha=1.0, modules=(".",))
  assert none == {}
  assert lora.merge(params).keys() == params.keys()
