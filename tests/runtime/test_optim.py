"""Schedule by hand, frozen and undecayed parameters, finite checks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cf_jax.models import config as model_config
from cf_jax.models import vlm
from cf_jax.runtime import optim, sharding

SETTINGS = dict(
  learning_rate=0.1,
  schedule="constant",
  warmup_steps=0,
  total_steps=10,
  weight_decay=0.0,
  max_grad_norm=1e9,
  b1=0.9,
  b2=0.99,
  eps=1e-8,
  no_decay=(),
)


def _params():
  return {
    "vision": {
      "dense": {"kernel": jnp.full((2, 2), 2.0)},
      "norm": {"scale": jnp.ones(2)},
    },
    "decoder": {
      "dense": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.ones(2)}
    },
  }


def _update(params, grad, **settings):
  optimizer = optim.make_optimizer(params, **(SETTINGS | settings))
  state = optimizer.init(params)
  updates, state = jax.jit(optimizer.update)(grad, state, params)
  return optax.apply_updates(params, updates), state


def test_path_of():
  paths = [
    sharding.path_of(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(_params())
  ]
  assert paths == [
    "decoder/dense/bias",
    "decoder/dense/kernel",
    "vision/dense/kernel",
    "vision/norm/scale",
  ]
  # Optimizer states are tuples and named tuples of trees.
  state = optax.adam(1.0).init({"a": jnp.ones(2)})
  assert {
    sharding.path_of(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(state)
  } == {"0/count", "0/mu/a", "0/nu/a"}


@pytest.mark.parametrize(
  ("schedule", "warmup_steps", "expected"),
  [
    ("constant", 0, {0: 2.0, 5: 2.0, 99: 2.0}),
    ("constant", 4, {0: 0.0, 1: 0.5, 2: 1.0, 4: 2.0, 50: 2.0}),
    ("linear", 0, {0: 2.0, 5: 1.0, 10: 0.0, 11: 0.0}),
    ("linear", 2, {0: 0.0, 1: 1.0, 2: 2.0, 6: 1.0, 10: 0.0}),
    # 2 * (1 + cos(pi * (step - 2) / 8)) / 2
    ("cosine", 2, {1: 1.0, 2: 2.0, 4: 1.7071068, 6: 1.0, 10: 0.0}),
  ],
)
def test_schedule_by_hand(schedule, warmup_steps, expected):
  made = optim.make_schedule(
    learning_rate=2.0,
    schedule=schedule,
    warmup_steps=warmup_steps,
    total_steps=10,
  )
  for step, value in expected.items():
    np.testing.assert_allclose(made(step), value, atol=1e-6, err_msg=str(step))


def test_unknown_schedule():
  with pytest.raises(ValueError, match="'constant', 'cosine'.*got 'step'"):
    optim.make_schedule(
      learning_rate=1.0, schedule="step", warmup_steps=0, total_steps=1
    )


def test_first_update_by_hand():
  """Adam's first step is the learning rate times the gradient's sign."""
  params = _params()
  grad = jax.tree.map(lambda x: jnp.full_like(x, -3.0), params)
  new, _ = _update(params, grad)
  for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(new)):
    np.testing.assert_allclose(after, before + 0.1, rtol=1e-5)


def test_weight_decay_spares_no_decay():
  params = _params()
  grad = jax.tree.map(jnp.zeros_like, params)
  new, _ = _update(params, grad, weight_decay=0.5, no_decay=(r"(bias|scale)$",))
  # theta - lr * decay * theta = 0.95 theta
  np.testing.assert_allclose(new["vision"]["dense"]["kernel"], 1.9)
  np.testing.assert_allclose(new["decoder"]["dense"]["kernel"], 2.85)
  np.testing.assert_array_equal(new["decoder"]["dense"]["bias"], 1)
  np.testing.assert_array_equal(new["vision"]["norm"]["scale"], 1)


def test_split_and_join():
  params = _params()
  trained, frozen = optim.split(params, ("^vision/", "bias$"))
  assert trained == {"decoder": {"dense": {"kernel": trained_kernel(params)}}}
  assert sorted(
    sharding.path_of(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(frozen)
  ) == ["decoder/dense/bias", "vision/dense/kernel", "vision/norm/scale"]
  whole = optim.join(frozen, trained)
  assert jax.tree.structure(whole) == jax.tree.structure(params)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params)):
    assert a is b  # nothing is copied
  newer = {"decoder": {"dense": {"kernel": 7}}}
  assert optim.join(params, newer)["decoder"]["dense"]["kernel"] == 7
  assert optim.split(params, ())[1] == {}


def trained_kernel(params):
  return params["decoder"]["dense"]["kernel"]


def test_fingerprint_sees_every_bit_and_every_place():
  tree = {
    "a": jnp.arange(6.0).reshape(2, 3),
    "b": jnp.asarray([1.0, -2.0, 3.0], jnp.bfloat16),
  }
  first = optim.fingerprint(tree)
  assert len(first) == 16 and first == optim.fingerprint(dict(tree))
  changed = [
    tree | {"a": tree["a"].at[1, 2].set(jnp.nextafter(5.0, 6.0))},
    tree | {"a": tree["a"][::-1]},
    tree | {"a": tree["a"].at[0, 0].set(-0.0)},
    tree | {"b": tree["b"][jnp.asarray([1, 0, 2])]},
    {"a": tree["a"], "c": tree["b"]},
  ]
  found = {optim.fingerprint(other) for other in changed}
  assert first not in found and len(found) == len(changed)
  assert optim.fingerprint({}) == ""


def test_clipping_by_global_norm():
  params = _params()
  grad = jax.tree.map(lambda x: jnp.full_like(x, 10.0), params)
  _, state = _update(params, grad, max_grad_norm=1.0)
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if "mu/" in sharding.path_of(path)
  ]
  assert len(moments) == 4
  for leaf in moments:  # 12 equal entries
    np.testing.assert_allclose(leaf, 0.1 / np.sqrt(12), rtol=1e-5)


def _with(name, patterns):
  if name == "frozen":
    return optim.split(_params(), patterns)
  return optim.make_optimizer(_params(), **(SETTINGS | {name: patterns}))


@pytest.mark.parametrize("name", ["frozen", "no_decay"])
def test_a_pattern_that_matches_nothing(name):
  with pytest.raises(
    ValueError,
    match=rf"\['vison/'\] match no parameter path; .*\.optim\.{name}$",
  ):
    _with(name, ("kernel$", "vison/"))


@pytest.mark.parametrize("name", ["frozen", "no_decay"])
@pytest.mark.parametrize(
  ("patterns", "says"),
  [
    (("kernel$", "("), r"has the broken regex '\('"),
    (("*bias",), r"has the broken regex '\*bias'"),
    ("bias$", r"must be a tuple of regexes, got 'bias\$'"),
  ],
)
def test_a_broken_pattern(name, patterns, says):
  with pytest.raises(ValueError, match=rf"config\.\*\.optim\.{name} {says}"):
    _with(name, patterns)


def test_everything_frozen():
  with pytest.raises(ValueError, match="match every parameter"):
    _with("frozen", (".",))


def test_no_decay_of_the_configs_is_norms_and_biases():
  config = model_config.tiny()
  shapes = jax.eval_shape(lambda: vlm.init(config, jax.random.key(0)))
  spared = optim.matches(shapes, (r"(bias|scale)$",), "no_decay")
  for path, hit in jax.tree_util.tree_leaves_with_path(spared):
    assert hit == (path[-1].key in ("bias", "scale"))


def test_all_finite():
  tree = {"a": jnp.ones(3), "b": (jnp.zeros(()), jnp.ones((2, 2)))}
  assert bool(optim.all_finite(tree))
  for bad in (jnp.nan, jnp.inf, -jnp.inf):
    spoilt = tree | {"a": tree["a"].at[1].set(bad)}
    assert not bool(jax.jit(optim.all_finite)(spoilt))
