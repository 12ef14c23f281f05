"""Targets, loss and the guarded update of the cold start."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cf_jax import policy
from cf_jax.data import packing
from cf_jax.models import vlm
from cf_jax.programs import rl_steps, sft
from cf_jax.runtime import sharding
from cf_jax.types import Experience, Rollout, TrainState
from tests.conftest import LENGTH


def test_loss_is_over_the_targets_tokens(scene):
  rng = np.random.default_rng(0)
  mask = np.arange(5) < np.array([5, 2, 3])[:, None, None]
  target = Rollout(
    token=jnp.asarray(rng.integers(1, 7, (3, 1, 5)), jnp.int32),
    mask=jnp.asarray(mask),
    logprob=jnp.zeros((3, 1, 5)),
    finished=jnp.ones((3, 1), bool),
  )
  batch = sft.Targets(scene.view, scene.pixel[:, :2], target)
  run = jax.jit(
    lambda batch: sft.sft_loss(
      scene.params,
      batch,
      model=scene.config,
      grid=scene.grid,
      banned=scene.banned,
    )
  )

  @jax.jit
  def each():
    encoded = policy.encode_frames(
      scene.config, scene.params, scene.pixel, grid=scene.grid
    )
    return policy.completion_logprobs(
      scene.config, scene.params, scene.view, encoded, target, scene.banned
    )[0]

  loss, metrics = run(batch)
  np.testing.assert_allclose(loss, -np.asarray(each())[mask].mean(), rtol=1e-5)
  assert metrics["loss"] == loss and 0 < metrics["entropy"] < np.log(40)
  # What fills the slots behind a target does not shift it.
  junk = target.replace(token=jnp.where(target.mask, target.token, 9))
  np.testing.assert_allclose(
    run(batch._replace(target=junk))[0], loss, rtol=1e-6
  )


TARGETS = np.random.default_rng(3).integers(1, 7, (3, 1, 5))
TOLD = (5, 2, 3)  # their lengths


@pytest.fixture(scope="module")
def batch(scene):
  mask = np.arange(5) < np.array(TOLD)[:, None, None]
  target = Rollout(
    token=np.asarray(TARGETS, np.int32),
    mask=mask,
    logprob=np.zeros((3, 1, 5), np.float32),
    finished=np.ones((3, 1), bool),
  )
  return jax.device_get(sft.Targets(scene.view, scene.pixel[:, :2], target))


@pytest.fixture(scope="module")
def plain(scene, batch):
  """Cross-entropy of whole sequences without anything of `sft`.

  Returns:
    float64 logits, labels (-1: none) of both ways, and the gradient of the mean
    over the labels of "all".
  """
  prompt, width = batch.view.prompt, 14 + 5
  token, visual = (np.full((3, width), fill) for fill in (0, -1))
  position, mask = np.zeros((3, 3, width), int), np.zeros((3, width), bool)
  labels = {name: np.full((3, width), -1) for name in ("all", "completion")}
  for b, (p, c) in enumerate(zip(LENGTH, TOLD, strict=True)):
    token[b, : p + c] = [*prompt.token[b, :p], *TARGETS[b, 0, :c]]
    visual[b, :p] = prompt.visual[b, :p]
    position[b, :, :p] = prompt.position[b, :, :p]
    position[b, :, p : p + c] = position[b].max() + 1 + np.arange(c)
    mask[b, : p + c] = True
    labels["completion"][b, p - 1 : p + c - 1] = TARGETS[b, 0, :c]
    # A state predicts what stands behind it, unless that is a picture's token.
    for s in range(p + c - 1):
      if visual[b, s + 1] < 0:
        labels["all"][b, s] = token[b, s + 1]

  def loss(params):
    encoded = policy.encode_frames(
      scene.config, params, batch.pixel, grid=scene.grid
    )
    logits = vlm.sequence_logits(
      scene.config,
      params,
      token,
      position,
      mask,
      visual,
      encoded.reshape(3, -1, encoded.shape[-1]),
    )
    each = optax.softmax_cross_entropy_with_integer_labels(
      logits, np.maximum(labels["all"], 0)
    )
    real = labels["all"] >= 0
    return jnp.sum(each * real) / real.sum(), logits

  grad, logits = jax.jit(jax.grad(loss, has_aux=True))(scene.params)
  return np.asarray(logits, np.float64), labels, grad


def _cross_entropy(logits, label, banned=()):
  logits = logits.copy()
  logits[..., list(banned)] = -np.inf
  real = label >= 0
  norm = np.log(np.exp(logits).sum(-1))[real]
  return np.mean(norm - logits[real, label[real]])


def _settings(scene, loss_on):
  return dict(
    model=scene.config, grid=scene.grid, banned=scene.banned, loss_on=loss_on
  )


def _packed(batch, *, room, on_prompt):
  rows = packing.lay(
    batch.view.prompt,
    batch.view.frame,
    batch.target,
    room=room,
    num_visual=4,
    on_prompt=on_prompt,
  )
  rows = packing.fill_up(rows, 3)  # one of padding alone
  return sft.PackedTargets(rows, batch.pixel[rows.sample, rows.frame])


def test_loss_on_all_is_plain_cross_entropy(scene, batch, plain):
  logits, labels, _ = plain
  expected = _cross_entropy(logits, labels["all"])
  loss, metrics = jax.jit(
    lambda batch: sft.sft_loss(scene.params, batch, **_settings(scene, "all"))
  )(batch)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert metrics["loss"] == loss and 0 < metrics["entropy"] < np.log(40)
  assert (labels["all"] >= 0).sum() == sum(LENGTH) - 3 * (8 + 1) + sum(TOLD)


def test_packed_rows_are_the_same_update(scene, batch, plain):
  """Loss and gradient of samples that share rows, against whole sequences."""
  logits, labels, expected = plain
  packed = _packed(batch, room=2, on_prompt=True)
  # 18 and 14 slots of 36 share a row, 12 have one of their own.
  shared = [set(row) for row in packed.rows.segment]
  assert shared == [{0, 1, 2}, {0, 1}, {0}]

  def loss(params):
    return sft.packed_loss(params, packed, **_settings(scene, "all"))

  (found, _), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    scene.params
  )
  np.testing.assert_allclose(
    found, _cross_entropy(logits, labels["all"]), rtol=1e-6
  )
  largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  assert largest > 0.1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * largest),
    grad,
    expected,
  )


def test_packed_rows_score_the_targets_alone(scene, batch, plain):
  logits, labels, _ = plain
  banned = np.flatnonzero(scene.banned)
  packed = _packed(batch, room=2, on_prompt=False)
  loss, _ = jax.jit(
    lambda packed: sft.packed_loss(
      scene.params, packed, **_settings(scene, "completion")
    )
  )(packed)
  np.testing.assert_allclose(
    loss, _cross_entropy(logits, labels["completion"], banned), rtol=1e-6
  )


def _rollout(rng, shape):
  """Completions of unequal lengths."""
  length = rng.integers(1, shape[-1] + 1, (*shape[:-1], 1))
  return Rollout(
    token=jnp.asarray(rng.integers(1, 7, shape), jnp.int32),
    mask=jnp.asarray(np.arange(shape[-1]) < length),
    logprob=jnp.asarray(-3 - rng.random(shape), jnp.float32),
    finished=jnp.ones(shape[:-1], bool),
  )


def _assert_parts_add_up(loss, params, batch, largest=()):
  """Three parts of a row each against the whole batch."""
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, context=1)

  @jax.jit
  def whole(params, batch):
    (_, metrics), grad = jax.value_and_grad(loss, has_aux=True)(
      params, batch, batch
    )
    return grad, metrics

  @jax.jit
  def in_parts(params, batch):
    return sft.accumulate(
      lambda part: jax.value_and_grad(loss, has_aux=True)(params, part, batch),
      jax.tree.map(jnp.zeros_like, params),
      sharding.split_batch(batch, mesh, 3),
      largest=largest,
    )

  expected, found = whole(params, batch), in_parts(params, batch)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  largest_gradient = max(np.abs(x).max() for x in jax.tree.leaves(expected[0]))
  assert largest_gradient > 0.03
  for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
    other = found
    for key in path:
      other = other[getattr(key, "idx", getattr(key, "key", None))]
    np.testing.assert_allclose(other, leaf, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
  ("aggregate", "ratio"),
  [
    ("sequence_mean", "token"),
    ("token_mean", "sequence"),
    ("constant", "token"),
  ],
)
def test_micro_batches_of_grpo_add_up(scene, aggregate, ratio):
  rng = np.random.default_rng(1)
  rollout = _rollout(rng, (3, 2, 5))
  # One prompt lies out of the loss, and one of its neighbours is short.
  batch = Experience(
    view=scene.view,
    pixel=scene.pixel,
    rollout=rollout.replace(mask=rollout.mask.at[2, 1, 1:].set(False)),
    advantage=jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
    ref_logprob=rollout.logprob - 0.5,
    group_mask=jnp.array([True, False, True]),
  )

  # What is after the layers shows it as well, and compiles sooner.
  decoder = scene.params["decoder"]

  def loss(norm, batch, whole):
    return rl_steps.grpo_loss(
      scene.params | {"decoder": decoder | {"norm": norm}},
      batch,
      model=scene.config,
      grid=scene.grid,
      banned=scene.banned,
      loss=dict(
        clip_low=0.2,
        clip_high=0.3,
        aggregate=aggregate,
        kl_weight=0.1,
        kl_kind="k3",
        ratio=ratio,
      ),
      whole=whole,
    )

  _assert_parts_add_up(loss, decoder["norm"], batch, rl_steps.LARGEST)


def test_micro_batches_of_the_cold_start_add_up(scene):
  target = _rollout(np.random.default_rng(2), (3, 1, 6))
  batch = sft.Targets(scene.view, scene.pixel[:, :2], target)

  def loss(params, batch, whole):
    return sft.sft_loss(
      params,
      batch,
      model=scene.config,
      grid=scene.grid,
      banned=scene.banned,
      whole=whole,
    )

  _assert_parts_add_up(loss, scene.params, batch)


def _state():
  params = {"a": jnp.array([1.0, 2.0]), "b": {"c": jnp.array(3.0)}}
  optimizer = optax.adam(0.1)
  return TrainState(
    step=jnp.int32(4),
    params=params,
    opt_state=optimizer.init(params),
    rng=jnp.zeros(2, jnp.uint32),
  ), optimizer


@pytest.mark.parametrize("jitted", [True, False])
def test_apply_gradient_by_hand(jitted):
  state, optimizer = _state()
  grad = {"a": jnp.array([3.0, 0.0]), "b": {"c": jnp.array(-4.0)}}

  def update(state, grad):
    return sft.apply_gradient(state, grad, {"loss": jnp.float32(7)}, optimizer)

  new, metrics = (jax.jit(update) if jitted else update)(state, grad)
  # Adam's first step: the learning rate times the sign.
  np.testing.assert_allclose(new.params["a"], [0.9, 2.0], rtol=1e-5)
  np.testing.assert_allclose(new.params["b"]["c"], 3.1, rtol=1e-5)
  assert int(new.step) == 5 and metrics["loss"] == 7
  assert metrics["grad_norm"] == 5 and metrics["nonfinite"] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
  state, optimizer = _state()
  grad = {"a": jnp.array([3.0, bad]), "b": {"c": jnp.array(-4.0)}}
  new, metrics = jax.jit(
    lambda state, grad: sft.apply_gradient(state, grad, {}, optimizer)
  )(state, grad)
  assert metrics["nonfinite"] == 1
  for before, after in zip(
    jax.tree.leaves((state.params, state.opt_state, state.rng)),
    jax.tree.leaves((new.params, new.opt_state, new.rng)),
    strict=True,
  ):
    np.testing.assert_array_equal(before, after)


def test_a_bfloat16_state_stays_so_under_float32_gradients():
  """Parts of a batch add up in float32; the next update must not recompile."""
  params = {"kernel": jnp.ones(3, jnp.bfloat16)}
  optimizer = optax.adam(1e-2)
  state = TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(params),
    rng=jnp.zeros(2, jnp.uint32),
  )
  grad = {"kernel": jnp.ones(3, jnp.float32)}
  new, metrics = sft.apply_gradient(state, grad, {}, optimizer)
  assert metrics["nonfinite"] == 0 and new.params["kernel"][0] < 1
  assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
  for old, now in zip(jax.tree.leaves(state), jax.tree.leaves(new)):
    assert old.dtype == now.dtype
