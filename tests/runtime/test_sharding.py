"""Every parameter has a rule, and eight devices give the numbers of one."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from cf_jax.models import config as model_config
from cf_jax.models import lora, vlm
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


_EIGHT = """
import dataclasses, functools, sys, types
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding
from cf_jax import policy, sampling, tad
from cf_jax.models import config as model_config
from cf_jax.models import layers, vlm
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import rl_steps, sft
from cf_jax.runtime import checkpoint, sharding
from cf_jax.types import Experience, Prompt, Rollout, TrainState, View
from tests import conftest

assert jax.device_count() == 8
model = model_config.make(
    size="tiny", vocab_size=40, hidden_size=32, intermediate_size=48,
    num_hidden_layers=1, mrope_section=(1, 2, 1),
    vision=dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=4,
                out_hidden_size=32, patch_size=2, window_size=8,
                fullatt_block_indexes=(0,)))
rng = np.random.default_rng(0)
B, G, C, S = 8, 2, 4, 8
params = conftest.fill_params(model, rng)
view = View(
    prompt=Prompt(
        token=rng.integers(0, 40, (B, S)).astype(np.int32),
        mask=np.arange(S) < rng.integers(4, S + 1, (B, 1)),
        position=np.tile(np.arange(S, dtype=np.int32), (B, 3, 1)),
        visual=np.tile([-1, 0, 1, -1, -1, -1, -1, -1], (B, 1))),
    frame=np.tile(np.arange(2, dtype=np.int32), (B, 1)))
batch = Experience(
    view=view,
    pixel=rng.normal(size=(B, 2, 4, model.vision.patch_dim)).astype(
        np.float32),
    rollout=Rollout(
        token=rng.integers(0, 40, (B, G, C)).astype(np.int32),
        mask=np.arange(C) < rng.integers(1, C + 1, (B, G, 1)),
        logprob=-rng.random((B, G, C)).astype(np.float32),
        finished=np.ones((B, G), bool)),
    advantage=rng.normal(size=(B, G)).astype(np.float32),
    ref_logprob=-rng.random((B, G, C)).astype(np.float32),
    group_mask=np.ones(B, bool))
seed = np.asarray(sampling.row_seeds(jax.random.key(1), jnp.arange(B)))
scan = rng.normal(size=(B, 4, 6)).repeat(6, axis=1).astype(np.float32)
seen = np.arange(24) < rng.integers(15, 25, (B, 1))
banned = jnp.zeros(40, bool)
settings = dict(clip_low=0.2, clip_high=0.2, aggregate="sequence_mean",
                kl_weight=0.04, kl_kind="k3")
optimizer = optax.adam(1e-2)
# Adam's first step is a sign where a gradient is small: start from a moment.
start = TrainState(
    step=jnp.int32(0), params=params, rng=jnp.zeros(2, jnp.uint32),
    opt_state=jax.tree.map(lambda x: x + 1 if x.ndim else x,
                           optimizer.init(params)))
start = jax.device_get(start)  # updates donate what lies on devices

def step_of(model):
  def step(state, batch):
    (loss, metrics), grad = jax.value_and_grad(
        rl_steps.grpo_loss, has_aux=True)(
            state.params, batch, model=model, grid=(2, 2), banned=banned,
            loss=settings)
    new, _ = sft.apply_gradient(state, grad, metrics, optimizer)
    return loss, grad, new.params
  return step

EOS = (36, 37, 38, 39)

def draw_whole(params, view, encoded, seed, temperature):
  # Layers in their stack, on one device.
  how = dict(eos_id=EOS, temperature=temperature)
  begun = sampling.start(
      model, params, view.prompt, policy.show(encoded, view.frame), seed,
      banned, num_completions=G, max_tokens=C, **how)
  return sampling.advance(model, params, begun, C, banned, **how).rollout

def draw_of(model, mesh):
  # As in a run: layers apart and turned, laid out for decoding.
  steps = experiment_lib.make_sample_steps(
      types.SimpleNamespace(
          model=model, mesh=mesh, tokenizer=types.SimpleNamespace(eos_id=EOS),
          banned=np.zeros(40, bool)),
      num_completions=G, max_tokens=C)
  def draw(params, view, encoded, seed, temperature):
    how = dict(temperature=temperature)
    apart = steps.unstack(params, rows=B * G)
    table = apart["decoder"]["layers"][0]["query"][layers.TURNED]
    tensor = sharding.decoding_mesh(mesh, 2).shape["tensor"]
    assert table.sharding.shard_shape(table.shape) == (32 // tensor, 32)
    begun = steps.prefill.func(params, view, encoded, seed, how)
    rollout = steps.decode.func(apart, begun, how).rollout
    assert {s.data.shape[0] for s in rollout.token.addressable_shards} == {
        B // (mesh.shape["data"] * mesh.shape["fsdp"])}
    return rollout
  return draw

def same(found, expected):
  for path, a in jax.tree_util.tree_leaves_with_path(found):
    b = expected
    for key in path:
      b = b[getattr(key, "idx", getattr(key, "key", None))]
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=4e-4, err_msg=str(path))

encoded = np.zeros((B, 2, 1, 32), np.float32)
expected = jax.jit(step_of(model))(start, batch)
draw = jax.jit(draw_whole)
drawn = {t: draw(params, view, encoded, seed, t) for t in (1.0, 0.0)}
assert len(np.unique(np.asarray(drawn[1.0].token)[:, :, 0])) > 4
assert np.asarray(drawn[1.0].mask).sum(-1).min() < C
chosen = tad.select_videos(scan, seen, num_keyframes=3)

# The mesh, and the one that decoding makes of it: two key heads.
for (data, fsdp, tensor, context), decoding in (
    ((8, 1, 1, 1), (8, 1, 1, 1)), ((1, 8, 1, 1), (1, 4, 2, 1)),
    ((2, 1, 4, 1), (2, 1, 4, 1)), ((1, 2, 2, 2), (1, 2, 2, 2))):
  mesh = sharding.make_mesh(
      data=data, fsdp=fsdp, tensor=tensor, context=context)
  assert sharding.decoding_mesh(
      mesh, model.num_key_value_heads).devices.shape == decoding
  sharding.check_model(model, mesh)
  own = dataclasses.replace(model, mesh=mesh)
  shardings = sharding.tree_shardings(start, mesh, sharding.STATE_RULES)
  state = jax.device_put(start, shardings)
  assert (fsdp * tensor == 1) == all(
      x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params))
  put = functools.partial(sharding.put_batch, mesh=mesh)
  same(jax.jit(step_of(own), in_shardings=(
      shardings, sharding.batch_sharding(mesh)))(state, put(batch)), expected)
  draw = draw_of(own, mesh)
  for temperature, want in drawn.items():
    found = draw(state.params, put(view), put(encoded), put(seed),
                 temperature)
    np.testing.assert_array_equal(found.token, want.token)
    np.testing.assert_array_equal(found.mask, want.mask)
    np.testing.assert_allclose(found.logprob, want.logprob, atol=4e-5)
  if context > 1:  # which divides groups, and must not divide the scores
    reference = rl_steps.make_reference_step(types.SimpleNamespace(
        model=own, mesh=mesh, grid=(2, 2), banned=np.zeros(40, bool)))
    scores = reference(
        state.params, put(view), None, put(encoded), put(batch.rollout))
    assert scores.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)
  found = tad.select_videos(put(scan), put(seen), num_keyframes=3)
  np.testing.assert_array_equal(found.index, chosen.index)
  np.testing.assert_allclose(found.weight, chosen.weight, atol=1e-5)

# Rows of several sequences, and a group that the context axis does not divide.
mesh = sharding.make_mesh(data=1, fsdp=2, tensor=1, context=4)
query, key, value = (
    rng.normal(size=(B, S, n, 8)).astype(np.float32) for n in (4, 2, 2))
segment = np.tile([1, 1, 1, 2, 2, 2, 2, 0], (B, 1)).astype(np.int32)
def of_rows(attend, **how):
  def total(query, key, value):
    mixed = attend(query, key, value, segment, implementation="xla", **how)
    mixed = jnp.where(segment[:, :, None, None] > 0, mixed, 0)
    return jnp.sum(jnp.sin(mixed)), mixed
  return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(
      query, key, value)
jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5),
    of_rows(layers.attend_segments_split, mesh=mesh),
    of_rows(layers.attend_segments))
three = rng.integers(0, 40, (B, 3, C)).astype(np.int32)
def states(model):
  made = jax.jit(lambda params: vlm.packed(
      model, params, vlm.embed_text(model, params, view.prompt.token),
      view.prompt.position, view.prompt.mask, three,
      np.ones((B, 3, C), bool)))(params)
  return np.where(view.prompt.mask[..., None], made[0], 0), made[1]
jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4),
    states(dataclasses.replace(model, mesh=mesh)), states(model))

# The same in two parts, each of a row of every device of the batch.
mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, context=1)
shardings = sharding.tree_shardings(start, mesh, sharding.STATE_RULES)
state = jax.device_put(start, shardings)
def loss(params, batch, whole):
  return rl_steps.grpo_loss(params, batch, model=model, grid=(2, 2),
                         banned=banned, loss=settings, whole=whole)

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
same(new.params, expected[2])

# A batch over two axes, and one that does not divide.
whole = np.arange(24).reshape(8, 3)
made = sharding.put_batch({"a": whole, "b": whole[:, 0]}, mesh)
assert (sharding.local(made)["a"] == whole).all()
assert {s.data.shape for s in made["a"].addressable_shards} == {(2, 3)}
try:
  sharding.put_batch(whole[:6], mesh)
except ValueError as error:
  assert "batch of 6" in str(error) and "config.mesh" in str(error)
else:
  raise AssertionError("6 rows over 4 devices")

# A checkpoint of 8 devices on 4, of these on 8, of these on 1: bit for bit.
def lies(devices):
  many = len(devices)
  mesh = sharding.make_mesh(data=1, fsdp=max(many // 2, 1),
                            tensor=min(many, 2), context=1, devices=devices)
  return sharding.tree_shardings(start, mesh, sharding.STATE_RULES)

state = jax.device_put(start, lies(jax.devices()))
for number, many in enumerate((4, 8, 1)):
  store = checkpoint.Checkpoints(f"{sys.argv[1]}/{number}", keep=1)
  store.save(4, state, {"x": 1})
  wanted = lies(jax.devices()[:many])
  state, host = store.restore(jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=place), start, wanted))
  store.close()
  assert host == {"x": 1}
  for leaf, place, want in zip(*map(jax.tree.leaves, (state, wanted, start))):
    assert leaf.sharding.is_equivalent_to(place, leaf.ndim), place
    np.testing.assert_array_equal(leaf, want)
"""


def test_eight_devices_equal_one(with_devices, tmp_path):
  """Update, sampling, greedy answers, TAD, micro-batches, checkpoints.

  On data 8, fsdp 8, tensor 4 x data 2, context 2 x fsdp 2 x tensor 2.
  """
  with_devices(8, _EIGHT, str(tmp_path))


def _mesh(**sizes):
  """A mesh of a pod, without its devices."""
  whole = dict.fromkeys(sharding.AXES, 1) | sizes
  return AbstractMesh(
    tuple(whole.values()), sharding.AXES, axis_types=(AxisType.Auto,) * 4
  )


# What a rule would split and `tensor` does not divide, by size of the model.
_KEYS = {
  f"decoder/layers/{name}/{leaf}"
  for name in ("key", "value")
  for leaf in ("kernel", "bias", "lora_b")
}
_TOWER = {
  f"vision/layers/mlp/{name}"
  for name in (
    *(f"{name}/{leaf}" for name in ("gate", "up") for leaf in ("kernel",)),
    *("gate/bias", "up/bias", "gate/lora_b", "up/lora_b"),
    *("down/kernel", "down/lora_a"),
  )
}
_WHOLE = {
  ("qwen2_5_vl_3b", 4): _KEYS,  # 2 heads of keys
  ("qwen2_5_vl_3b", 8): _KEYS | _TOWER,  # and 3,420 numbers in the tower's mlp
  ("qwen2_5_vl_7b", 8): None,  # 28 heads: refused
}


def _adapters(shapes, modules):
  """Shapes of adapters of these modules, at every size alike."""
  return jax.eval_shape(
    lambda: lora.init(
      shapes, jax.random.key(0), rank=16, alpha=32.0, modules=(modules,)
    )
  )


@pytest.mark.parametrize(
  "size", [name for name in model_config.SIZES if name != "tiny"]
)
def test_pods_divide_every_parameter(size):
  """With adapters, fsdp 8 to 256, tensor 1 to 8: all, or by the rule."""
  model = model_config.SIZES[size]()
  shapes = _shapes(size)
  adapters = _adapters(shapes, r"^(decoder|vision)/layers/")
  whole = optim.join(shapes, adapters)
  for fsdp in (8, 16, 64, 256):
    for tensor in (1, 2, 4, 8):
      mesh = _mesh(fsdp=fsdp, tensor=tensor)
      expected = _WHOLE.get((size, tensor), set())
      if expected is None:
        with pytest.raises(
          ValueError, match=r"tensor=8 .* 28 heads .*\[1, 2, 4\]"
        ):
          sharding.check_model(model, mesh)
        continue
      sharding.check_model(model, mesh)
      found = sharding.left_whole(whole, mesh, sharding.PARTITION_RULES)
      assert set(found) == expected, mesh


@pytest.mark.parametrize(
  "size", [name for name in model_config.SIZES if name != "tiny"]
)
def test_the_copy_to_decode_with_lies_over_the_key_heads(size):
  """All but norms and biases is an equal part of each device; none is moved
  for a token but over `tensor`."""
  model = model_config.SIZES[size]()
  shapes = _shapes(size)
  adapters = _adapters(shapes, r"^decoder/layers/")
  heads = model.num_key_value_heads
  mesh = _mesh(fsdp=64 // heads, tensor=heads)
  apart = jax.eval_shape(
    lambda params: vlm.unstacked(model, params, rows=512, platform="tpu"),
    optim.join(shapes, adapters),
  )
  assert not sharding.left_whole(apart, mesh, sharding.COPY_RULES)
  placed = sharding.tree_shardings(apart, mesh, sharding.COPY_RULES)
  whole = split = 0
  for leaf, place in zip(
    jax.tree.leaves(apart), jax.tree.leaves(placed), strict=True
  ):
    assert set(jax.tree.leaves(tuple(place.spec))) <= {"tensor", None}
    whole += leaf.size
    split += np.prod(place.shard_shape(leaf.shape))
  assert split < 1.02 * whole / heads


@pytest.mark.parametrize(
  ("size", "tensors"),
  [
    ("qwen2_5_vl_3b", [1, 2, 4, 8, 16]),
    ("qwen2_5_vl_7b", [1, 2, 4]),
    ("qwen2_5_vl_32b", [1, 2, 4, 8]),
    ("qwen2_5_vl_72b", [1, 2, 4, 8, 16]),
  ],
)
def test_what_the_message_offers_is_taken(size, tensors):
  """The heads of both towers, or following it leads to the next refusal."""
  model = model_config.SIZES[size]()
  words = rf"set it to one of \{str(tensors)[:-1]}\]"
  with pytest.raises(ValueError, match=words):
    sharding.check_model(model, _mesh(tensor=3))
  for tensor in range(1, 65):
    if tensor in tensors:
      sharding.check_model(model, _mesh(tensor=tensor))
    else:
      with pytest.raises(ValueError, match="set it to one of"):
        sharding.check_model(model, _mesh(tensor=tensor))


def test_caches_lie_over_rows_heads_and_slots():
  config = model_config.SIZES["qwen2_5_vl_7b"]()
  rows, group = 32, 8
  view = jax.eval_shape(
    lambda: {
      "prefix_cache": {"key": (jnp.zeros((rows, 4, 16_384, 128)),)},
      "cache": vlm.init_completion_cache(config, rows, group, 768),
      "token": jnp.zeros((rows, group, 768), jnp.int32),
      "slot": jnp.int32(0),
    }
  )
  mesh = _mesh(data=2, fsdp=8, tensor=2, context=2)
  found = sharding.tree_shardings(view, mesh, sharding.DECODING_RULES)
  both = ("data", "fsdp")
  assert found["prefix_cache"]["key"][0].spec == P(both, "tensor", "context")
  assert found["cache"]["value"][27].spec == P(both, None, "tensor")
  assert (found["token"].spec, found["slot"].spec) == (P(both), P())
  with pytest.raises(ValueError, match="'other'"):
    sharding.tree_shardings(
      {"other": jnp.ones(4)}, mesh, sharding.DECODING_RULES
    )


@pytest.mark.parametrize(
  ("sizes", "each", "shares"),
  [
    (dict(data=8), 4, [(0, 2), (1, 2)]),
    (dict(data=2, fsdp=2, tensor=2), 2, [(n, 4) for n in range(4)]),
    # Two processes have the halves of the same rows.
    (dict(fsdp=2, tensor=4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    (dict(tensor=4, context=2), 4, [(0, 1), (0, 1)]),
  ],
)
def test_processes_share_a_batch(monkeypatch, sizes, each, shares):
  whole = dict.fromkeys(sharding.AXES, 1) | sizes
  devices = np.empty(8, object)
  devices[:] = [
    types.SimpleNamespace(process_index=n // each) for n in range(8)
  ]

  class Stand:
    shape = whole
    devices = None

  Stand.devices = devices.reshape(tuple(whole.values()))
  for process, expected in enumerate(shares):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    assert sharding.batch_share.__wrapped__(Stand) == expected
  Stand.devices = devices[[0, 2, 4, 6, 1, 3, 5, 7]].reshape(8, 1, 1, 1)
  Stand.shape = dict.fromkeys(sharding.AXES, 1) | {"data": 8}
  if each == 4:
    with pytest.raises(ValueError, match="no block"):
      sharding.batch_share.__wrapped__(Stand)
