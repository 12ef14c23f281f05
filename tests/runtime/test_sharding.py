"""Every parameter has a rule, and eight devices give the numbers of one."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from cf_jax.models import config as model_config
from cf_jax.models import vlm
from cf_jax.runtime import optim, sharding


class FakeMesh:
  """`spec_for` and divisibility, without devices."""

  shape = {"data": 2, "fsdp": 8, "tensor": 4, "context": 1}


def _shapes(size):
  config = model_config.SIZES[size]()
  return jax.eval_shape(lambda: vlm.init(config, jax.random.key(0)))


@pytest.mark.parametrize("size", model_config.SIZES)
def test_every_parameter_matches_a_rule(size):
  for path, leaf in jax.tree_util.tree_leaves_with_path(_shapes(size)):
    name = sharding.path_of(path)
    spec = sharding.spec_for(name, leaf.shape, sharding.PARTITION_RULES)
    assert len(spec) <= leaf.ndim, name
    if name.endswith("kernel") or name.endswith("embedding"):
      assert any(spec), f"{name} {leaf.shape} is whole on every device"


@pytest.mark.parametrize(
  "size", [name for name in model_config.SIZES if name != "tiny"]
)
def test_large_models_split_evenly(size):
  """On fsdp 8 x tensor 4, all but norms and biases is a 32nd a device."""
  whole = split = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(_shapes(size)):
    spec = sharding.spec_for(
      sharding.path_of(path), leaf.shape, sharding.PARTITION_RULES
    )
    parts = 1
    for length, axis in zip(leaf.shape, spec, strict=False):
      ways = FakeMesh.shape[axis] if axis else 1
      parts *= ways if length % ways == 0 else 1
    whole += leaf.size
    split += leaf.size / parts
  assert split < 1.1 * whole / 32


def test_optimizer_state_follows_its_parameters():
  params = _shapes("tiny")
  optimizer = optim.make_optimizer(
    params,
    learning_rate=1.0,
    schedule="constant",
    warmup_steps=1,
    total_steps=2,
    weight_decay=0.1,
    max_grad_norm=1.0,
    b1=0.9,
    b2=0.9,
    eps=1e-8,
    no_decay=(),
  )
  state = jax.eval_shape(optimizer.init, params)
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1, context=1)
  made = sharding.tree_shardings(state, mesh, sharding.STATE_RULES)
  assert jax.tree.structure(made) == jax.tree.structure(state)
  found = {
    sharding.path_of(path): leaf.spec
    for path, leaf in jax.tree_util.tree_leaves_with_path(made)
  }
  moment = [p for p in found if p.endswith("mu/decoder/embed/embedding")]
  assert [found[p] for p in moment] == [P("tensor", "fsdp")]


def test_first_rule_wins_and_no_rule_raises():
  rules = ((r"kernel$", P("fsdp")), (r"a/kernel$", P("tensor")))
  assert sharding.spec_for("a/kernel", (4, 4), rules) == P("fsdp")
  assert sharding.spec_for("a/anything", (), rules) == P()
  with pytest.raises(ValueError, match=r"'adapter/down'.*PARTITION_RULES"):
    sharding.spec_for("adapter/down", (4,), rules)
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1, context=1)
  with pytest.raises(ValueError, match="'decoder/lora/a'"):
    sharding.tree_shardings(
      {"decoder": {"lora": {"a": jnp.ones((2, 2))}}},
      mesh,
      sharding.PARTITION_RULES,
    )


def test_mesh_sizes():
  count = jax.device_count()
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1, context=1)
  assert dict(mesh.shape) == {
    "data": count,
    "fsdp": 1,
    "tensor": 1,
    "context": 1,
  }
  mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1, context=1)
  assert mesh.shape["fsdp"] == count
  for sizes in (
    dict(data=2 * count, fsdp=1),
    dict(data=-1, fsdp=count + 1),
    dict(data=-1, fsdp=-1),
    dict(data=0, fsdp=1),
    dict(data=-1, fsdp=0),
  ):
    with pytest.raises(ValueError, match=f"got {count}; change config.mesh"):
      sharding.make_mesh(**sizes, tensor=1, context=1)


_EQUAL = """
import types
import jax, jax.numpy as jnp, numpy as np, optax
from cf_jax.models import config as model_config
from cf_jax.models import vlm
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import rl_steps, sft
from cf_jax.runtime import sharding
from cf_jax.types import Experience, Prompt, Rollout, TrainState, View

assert jax.device_count() == 8
config = model_config.make(
    size="tiny", vocab_size=40, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, mrope_section=(1, 2, 1),
    vision=dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2,
                out_hidden_size=32, patch_size=2, window_size=8,
                fullatt_block_indexes=(0,)))
rng = np.random.default_rng(0)
B, G, C, S = 8, 2, 4, 7
position = np.tile(np.arange(S), (B, 3, 1))
batch = Experience(
    view=View(
        prompt=Prompt(
            token=rng.integers(0, 40, (B, S)).astype(np.int32),
            mask=np.arange(S) < rng.integers(4, S + 1, (B, 1)),
            position=position.astype(np.int32),
            visual=np.tile([-1, 0, 1, -1, -1, -1, -1], (B, 1))),
        frame=np.tile(np.arange(2, dtype=np.int32), (B, 1))),
    pixel=rng.normal(size=(B, 2, 4, config.vision.patch_dim)).astype(
        np.float32),
    rollout=Rollout(
        token=rng.integers(0, 40, (B, G, C)).astype(np.int32),
        mask=np.arange(C) < rng.integers(1, C + 1, (B, G, 1)),
        logprob=-rng.random((B, G, C)).astype(np.float32),
        finished=np.ones((B, G), bool)),
    advantage=rng.normal(size=(B, G)).astype(np.float32),
    ref_logprob=-rng.random((B, G, C)).astype(np.float32),
    group_mask=np.ones(B, bool))
settings = dict(clip_low=0.2, clip_high=0.2, aggregate="sequence_mean",
                kl_weight=0.04, kl_kind="k3")
optimizer = optax.adam(1e-2)

def step(state, batch):
  (loss, metrics), grad = jax.value_and_grad(rl_steps.grpo_loss, has_aux=True)(
      state.params, batch, model=config, grid=(2, 2),
      banned=jnp.zeros(40, bool), loss=settings)
  new, _ = sft.apply_gradient(state, grad, metrics, optimizer)
  return loss, grad, new.params

def init():
  params = vlm.init(config, jax.random.key(0))
  # Adam's first step is a sign where a gradient is small: start from a moment.
  moments = optimizer.init(params)
  moments = jax.tree.map(lambda x: x + 1 if x.ndim else x, moments)
  return TrainState(step=jnp.int32(0), params=params, opt_state=moments,
                    rng=jnp.zeros(2, jnp.uint32))

start = jax.jit(init)()
expected = jax.jit(step)(start, batch)
for sizes in (dict(data=8, fsdp=1, tensor=1), dict(data=2, fsdp=2, tensor=2)):
  mesh = sharding.make_mesh(**sizes, context=1)
  shardings = sharding.tree_shardings(
      jax.eval_shape(init), mesh, sharding.STATE_RULES)
  state = jax.device_put(start, shardings)
  split = [x for x in jax.tree.leaves(state.params)
           if not x.sharding.is_fully_replicated]
  assert bool(split) == (sizes["data"] == 2), sizes
  found = jax.jit(step, in_shardings=(
      shardings, sharding.batch_sharding(mesh)))(
          state, sharding.put_batch(batch, mesh))
  for path, a in jax.tree_util.tree_leaves_with_path(found):
    b = expected
    for key in path:
      b = b[getattr(key, "idx", getattr(key, "key", None))]
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4, err_msg=str(path))

# The same on four of the batch's devices, in two parts of a row each.
def loss(params, batch, whole):
  return rl_steps.grpo_loss(params, batch, model=config, grid=(2, 2),
                         banned=jnp.zeros(40, bool), loss=settings, whole=whole)

stage = experiment_lib.Stage(state, {}, shardings, {}, optimizer)
update = sft.make_update(types.SimpleNamespace(mesh=mesh), stage, loss,
                         micro_batches=2, largest=rl_steps.LARGEST)
parts = jax.jit(lambda batch: sharding.split_batch(batch, mesh, 2))(
    sharding.put_batch(batch, mesh))
assert {s.data.shape for s in parts.advantage.addressable_shards} == {(2, 1, G)}
rows = np.asarray(parts.advantage).reshape(2, 4, G).swapaxes(0, 1)
assert (rows.reshape(B, G) == batch.advantage).all()
new, metrics = update(state, {}, sharding.put_batch(batch, mesh))
np.testing.assert_allclose(metrics["loss"], expected[0], rtol=2e-4)
for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(expected[2])):
  np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4)
"""


def test_eight_devices_equal_one(with_devices):
  """Loss, gradients and updated parameters of one KF-GRPO update.

  On other devices, and in micro-batches.
  """
  with_devices(8, _EQUAL)


_PUT = """
import jax, numpy as np
from cf_jax.runtime import sharding
mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, context=1)
whole = np.arange(24).reshape(8, 3)
made = sharding.put_batch({"a": whole, "b": whole[:, 0]}, mesh)
assert (np.asarray(made["a"]) == whole).all()
assert {s.data.shape for s in made["a"].addressable_shards} == {(2, 3)}
try:
  sharding.put_batch(whole[:6], mesh)
except ValueError as error:
  assert "batch of 6" in str(error) and "config.mesh" in str(error)
else:
  raise AssertionError("6 rows over 4 devices")
shapes = {"mlp": {"layers": {"mlp": {"down": {"kernel": np.zeros((2, 7, 6))}}}}}
made = sharding.tree_shardings(shapes, mesh, sharding.PARTITION_RULES)
(spec,) = [s.spec for s in jax.tree.leaves(made)]
assert tuple(spec) == (None, None, "fsdp"), spec  # 7 does not halve
"""


@pytest.mark.parametrize(("rows", "parts"), [(32, 3), (32, 0), (24, 1)])
def test_batches_that_do_not_divide_name_their_settings(rows, parts):
  check = functools.partial(
    sharding.check_batch, mesh=FakeMesh, setting="config.rl.prompts_per_step"
  )
  check(32, micro_batches=2)
  with pytest.raises(ValueError) as caught:
    check(rows, micro_batches=parts)
  said = str(caught.value)
  assert f"a batch of {rows}" in said and f"{parts} micro-batches" in said
  assert "config.rl.prompts_per_step, config.rl.micro_batches" in said


def test_put_batch_and_lengths_that_do_not_divide(with_devices):
  with_devices(8, _PUT)


_DECODE = """
import functools
import jax, jax.numpy as jnp, numpy as np
from cf_jax import sampling
from cf_jax.models import layers, vlm
from cf_jax.runtime import sharding
from cf_jax.types import Prompt
from tests import conftest

rng = np.random.default_rng(0)
config = conftest.make_small_model()
params = {"decoder": conftest.fill_params(config, rng)["decoder"]}
B, G, C, S = 8, 2, 6, 7
mask = np.arange(S) < rng.integers(3, S + 1, (B, 1))
batch = (
    Prompt(token=rng.integers(0, 40, (B, S)).astype(np.int32), mask=mask,
           position=np.tile(np.arange(S, dtype=np.int32), (B, 3, 1)),
           visual=np.full((B, S), -1, np.int32)),
    np.zeros((B, 1, config.hidden_size), np.float32),
    np.asarray(sampling.row_seeds(jax.random.key(1), jnp.arange(B))))
banned = jnp.zeros(40, bool)
drawing = dict(eos_id=(36, 37, 38, 39), temperature=1.0)
sizes = dict(num_completions=G, max_tokens=C)
expected = jax.jit(lambda params, batch: sampling.generate(
    config, params, *batch, banned, **sizes, **drawing))(params, batch)
ends = np.asarray(expected.mask).sum(-1)
assert ends.min() < C == ends.max(), ends
assert len(np.unique(np.asarray(expected.token)[:, :, 0])) > 4

mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, context=1)
split = jax.device_put(params, sharding.tree_shardings(
    params, mesh, sharding.PARTITION_RULES))
begun = jax.jit(lambda params, batch: sampling.start(
    config, params, *batch, banned, **sizes, **drawing))(
        split, sharding.put_batch(batch, mesh))
assert layers.are_few(B * G)
apart = jax.jit(functools.partial(vlm.unstacked, config, rows=B * G))(split)
tables = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(apart)
          if sharding.path_of(path).endswith(layers.TURNED)]
assert len(tables) == 7 * config.num_hidden_layers
assert not any(table.sharding.is_fully_replicated for table in tables)
found = jax.jit(lambda params, begun: sampling.advance(
    config, params, begun, C, banned, **drawing), donate_argnums=1)(
        apart, begun).rollout
assert not found.token.sharding.is_fully_replicated
np.testing.assert_array_equal(found.token, expected.token)
np.testing.assert_array_equal(found.mask, expected.mask)
np.testing.assert_allclose(found.logprob, expected.logprob, atol=2e-5)
"""


def test_eight_devices_draw_what_one_draws(with_devices):
  """Decoding with turned kernels, split, against the stack on one device."""
  with_devices(8, _DECODE)
