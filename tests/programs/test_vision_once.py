"""Frames are encoded once a step; a frozen tower serves every later phase.

The same update is taken from pixels, which encodes them again, and from the
visual tokens that sampling has made.
"""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cf_jax import policy
from cf_jax.models import flops, lora
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import reinforce, rl_steps, sft
from cf_jax.runtime import checkpoint, optim, sharding, telemetry
from cf_jax.types import Experience, Rollout, TrainState
from tests.conftest import init_params, load_config

FROZEN_TOWER = (r"^vision/",)
LOSS = dict(
  clip_low=0.2,
  clip_high=0.2,
  aggregate="sequence_mean",
  kl_weight=0.1,
  kl_kind="k3",
)
ROWS, G, C = 2, 3, 5


@pytest.fixture(scope="module")
def batch(scene):
  """Two videos, completions of unequal lengths, from pixels."""
  rng = np.random.default_rng(3)
  shape = (ROWS, G, C)
  logprob = jnp.asarray(-3 - rng.random(shape), jnp.float32)
  return Experience(
    view=jax.tree.map(lambda leaf: leaf[:ROWS], scene.view),
    rollout=Rollout(
      token=jnp.asarray(rng.integers(1, 7, shape), jnp.int32),
      mask=jnp.arange(C) < jnp.asarray(rng.integers(1, C + 1, (ROWS, G, 1))),
      logprob=logprob,
      finished=jnp.ones(shape[:2], bool),
    ),
    advantage=jnp.asarray(rng.normal(size=shape[:2]), jnp.float32),
    ref_logprob=logprob - 0.5,
    group_mask=jnp.ones(ROWS, bool),
    pixel=scene.pixel[:ROWS, :2],
  )


def _reuse(scene, batch):
  """The same batch with the tokens that `make_encode_step` would give."""
  encode = jax.jit(
    lambda params, pixel: policy.encode_frames(
      scene.config, params, pixel, grid=scene.grid
    )
  )
  return batch.replace(pixel=None, encoded=encode(scene.params, batch.pixel))


def _make(scene, *, frozen, micro_batches=1, remat="none", rank=0):
  """An update whose optimizer keeps the gradient: update, Stage."""
  params = scene.params
  if rank:
    adapters = lora.init(
      params,
      jax.random.key(5),
      rank=rank,
      alpha=4.0,
      modules=(r"^decoder/layers/",),
    )
    # B starts at zero; noise in it makes A's gradient count.
    adapters = jax.tree.map(
      lambda leaf: (
        leaf + 0.05 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape)
      ),
      adapters,
    )
    params = optim.join(params, adapters)
  trained, rest = optim.split(params, frozen)
  optimizer = optax.trace(decay=0.0)
  state = TrainState(
    step=jnp.int32(0),
    params=trained,
    opt_state=optimizer.init(trained),
    rng=jax.random.key_data(jax.random.key(0)),
  )
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, context=1)
  stage = experiment_lib.Stage(
    state,
    rest,
    sharding.tree_shardings(state, mesh, sharding.STATE_RULES),
    sharding.tree_shardings(rest, mesh, sharding.PARTITION_RULES),
    optimizer,
  )
  settings = load_config("configs/kfgrpo_cpu.py", "smoke")
  settings.loss = LOSS
  settings.rl.micro_batches = micro_batches
  experiment = types.SimpleNamespace(
    config=settings,
    model=dataclasses.replace(scene.config, remat=remat),
    grid=scene.grid,
    banned=scene.banned,
    mesh=mesh,
  )
  return rl_steps.make_update_step(experiment, stage), stage


def _copy(state):
  return jax.tree.map(jnp.copy, state)  # updates take their state's buffers


@pytest.mark.parametrize(
  ("micro_batches", "remat", "rank"),
  [(1, "none", 0), (2, "full", 2)],
)
def test_reused_tokens_give_the_loss_and_gradient_of_encoding_again(
  scene, batch, micro_batches, remat, rank
):
  frozen = (lora.ALL_BUT_ADAPTERS,) if rank else FROZEN_TOWER
  update, stage = _make(
    scene, frozen=frozen, micro_batches=micro_batches, remat=remat, rank=rank
  )
  assert not stage.trains_vision
  again, wanted = update(_copy(stage.state), stage.frozen, batch)
  # Whatever the tower would say: nobody asks it.
  deaf = stage.frozen | {
    "vision": jax.tree.map(
      lambda leaf: jnp.full_like(leaf, jnp.nan), stage.frozen["vision"]
    )
  }
  once, found = update(_copy(stage.state), deaf, _reuse(scene, batch))
  assert abs(wanted["loss"]) > 1e-2 and wanted["grad_norm"] > 1e-2
  np.testing.assert_allclose(found["loss"], wanted["loss"], atol=1e-6)
  gradient, expected = once.opt_state.trace, again.opt_state.trace
  assert jax.tree.structure(gradient) == jax.tree.structure(expected)
  for (path, left), right in zip(
    jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected)
  ):
    scale = max(float(jnp.max(jnp.abs(right))), 1e-3)
    np.testing.assert_allclose(
      left, right, atol=1e-5 * scale, err_msg=sharding.path_of(path)
    )


def _equations(jaxpr, scope="", times=1):
  """(equation, its scopes, how often it runs), those inside others too."""
  for equation in jaxpr.eqns:
    inside = f"{scope}/{equation.source_info.name_stack}"
    yield equation, inside, times
    count = times
    if equation.primitive.name == "scan":
      count *= equation.params["length"]
    for value in equation.params.values():
      several = value if isinstance(value, tuple | list) else (value,)
      bodies = [getattr(one, "jaxpr", one) for one in several]
      bodies = [body for body in bodies if hasattr(body, "eqns")]
      if equation.primitive.name == "cond":
        bodies = bodies[:1]  # either branch: here they cost the same
      for body in bodies:
        yield from _equations(body, inside, count)


def _dots(update, *args):
  """Operations of all matmuls of a traced function: whole, in the tower."""
  whole = tower = 0
  for equation, scope, times in _equations(jax.make_jaxpr(update)(*args).jaxpr):
    # Attention's backward pass makes the scores again: that does not count.
    if equation.primitive.name != "dot_general" or "again" in scope:
      continue
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = equation.invars[0].aval, equation.outvars[0].aval
    depth = math.prod(left.shape[axis] for axis in contracted)
    whole += 2 * times * math.prod(result.shape) * depth
    if "vision" in scope:
      tower += 2 * times * math.prod(result.shape) * depth
  return whole, tower


@pytest.mark.parametrize(
  ("frozen", "reused", "passes"),
  [(FROZEN_TOWER, True, 0), (FROZEN_TOWER, False, 1), ((), False, 3)],
)
def test_the_traced_update_has_the_tower_that_is_counted(
  scene, batch, frozen, reused, passes
):
  """None with reused tokens; forward alone where it is frozen."""
  update, stage = _make(scene, frozen=frozen)
  assert stage.trains_vision == (frozen == ())
  given = _reuse(scene, batch) if reused else batch
  whole, tower = _dots(update, stage.state, stage.frozen, given)
  slots = scene.view.prompt.token.shape[1]
  counted = flops.grpo_step(
    scene.config,
    stage.state.params,
    stage.frozen,
    grid=scene.grid,
    num_frames=3 * ROWS,
    num_shown=2 * ROWS,
    prompt={"keyframes": np.full(ROWS, slots)},
    completion=np.full((ROWS, G), C),
  )
  forward = flops.vision(scene.config, 2 * ROWS, scene.grid)
  # The patches need no gradient, so the third pass is a little shorter.
  np.testing.assert_allclose(tower, passes * forward, rtol=0.05)
  if passes == 1:
    counted["update"] += forward  # the form that no step takes
  np.testing.assert_allclose(whole, counted["update"], rtol=0.02)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_cold_start_runs_a_frozen_tower_forward_alone(scene, batch, remat):
  """Nor does recomputation take it again."""
  trained, frozen = optim.split(scene.params, FROZEN_TOWER)
  config = dataclasses.replace(scene.config, remat=remat)
  targets = sft.Targets(
    batch.view, batch.pixel, jax.tree.map(lambda x: x[:, :1], batch.rollout)
  )

  def loss(trained):
    return sft.sft_loss(
      optim.join(frozen, trained),
      targets,
      model=config,
      grid=scene.grid,
      banned=scene.banned,
    )[0]

  _, tower = _dots(jax.grad(loss), trained)
  forward = flops.vision(config, 2 * ROWS, scene.grid)
  np.testing.assert_allclose(tower, forward, rtol=1e-6)


def test_a_step_encodes_each_frame_once(tiny_config, tmp_path, monkeypatch):
  """Two updates with two shuffled views, watched where frames are encoded."""
  tiny_config.rl.steps = 2
  tiny_config.contrast.num_shuffles = 2
  tiny_config.rl.optim.frozen = FROZEN_TOWER
  experiment = experiment_lib.build(tiny_config.lock(), tmp_path)
  seen = []
  encode_frames = policy.encode_frames

  def watch(config, params, pixel, *, grid):
    seen.append(pixel.shape[:2])  # once for each program that has a tower
    return encode_frames(config, params, pixel, grid=grid)

  monkeypatch.setattr(policy, "encode_frames", watch)
  store = checkpoint.Checkpoints(tmp_path / "rl", keep=1)
  with telemetry.MetricWriter(tmp_path, resume={}) as writer:
    reinforce.train_policy(
      experiment, init_params(experiment.model), writer, store
    )
  store.close()
  # Four videos of four keyframes and four uniform frames; the blank one that
  # no view shows is left out.
  assert seen == [(4, 8)]
  rows = telemetry.read_rows(tmp_path / telemetry.METRICS_FILE)
  assert [row["recompiles"] for row in rows] == [0, 0]
  phases = ("vision", "prefill", "decode", "score", "reference", "update")
  for row in rows:
    assert row["mismatch_max"] < 1e-4
    share = {name: row[f"share/{name}"] for name in phases}
    work = {name: row[f"work/{name}"] for name in phases}
    assert min(share.values()) > 0
    assert sum(share.values()) < 1
    assert sum(work.values()) == pytest.approx(1)
    # Under each of three views what sampling was: its prompts are as long.
    sampled = work["prefill"] + work["decode"]
    assert work["score"] == pytest.approx(3 * sampled, rel=0.2)
    assert work["reference"] == pytest.approx(sampled)
    assert work["update"] == pytest.approx(3 * sampled)
