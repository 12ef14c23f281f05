"""Goldens worked by hand for advantages, KL and losses."""

import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax import grpo

WRAP = pytest.mark.parametrize(
  "wrap", [lambda f: f, jax.jit], ids=["plain", "jit"]
)
ADVANTAGE = dict(scale="none", baseline="mean", ddof=1, eps=0.0)
LOSS = dict(
  clip_low=0.2,
  clip_high=0.2,
  aggregate="sequence_mean",
  kl_weight=0.0,
  kl_kind="k3",
)


def advantages(reward, mask=None, **settings):
  reward = jnp.asarray(reward, jnp.float32)
  mask = None if mask is None else jnp.asarray(mask)
  return np.asarray(
    grpo.group_advantages(reward, mask, **(ADVANTAGE | settings))
  )


# -- token log-probabilities


@WRAP
def test_token_logprobs_by_hand(wrap):
  # Of weights 1, 3 and a banned 1000: probabilities 1/4, 3/4, 0.
  logits = jnp.log(jnp.array([[1.0, 3.0, 1000.0]] * 2))
  banned = jnp.array([False, False, True])
  logprob, entropy = wrap(grpo.token_logprobs)(
    logits, jnp.array([0, 1]), banned
  )
  np.testing.assert_allclose(logprob, np.log([0.25, 0.75]), rtol=1e-5)
  want = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
  np.testing.assert_allclose(entropy, [want] * 2, rtol=1e-5)


def test_banned_ids_have_no_probability_and_no_gradient():
  banned = jnp.array([False, True, False])
  logits = jnp.array([0.5, 80.0, -0.5])

  def total(logits):
    logprob, entropy = grpo.token_logprobs(logits, jnp.int32(0), banned)
    return logprob + entropy

  grad = jax.grad(total)(logits)
  assert np.all(np.isfinite(grad))
  assert grad[1] == 0
  assert jax.nn.softmax(grpo.ban(logits, banned))[1] == 0


def test_logprobs_are_float32_from_bfloat16():
  logprob, entropy = grpo.token_logprobs(
    jnp.zeros((1, 4), jnp.bfloat16), jnp.array([2]), jnp.zeros(4, bool)
  )
  assert logprob.dtype == entropy.dtype == jnp.float32
  np.testing.assert_allclose(logprob, -math.log(4), rtol=1e-6)


# -- advantages


def test_advantages_without_scale():
  np.testing.assert_allclose(
    advantages([[1, 0, 0, 1], [3, 1, 1, 1]]),
    [[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]],
  )


def test_group_std_by_both_ddof():
  # std of [1, 0, 0, 1] is 0.57735 by torch (ddof 1) and 0.5 by numpy (ddof 0).
  np.testing.assert_allclose(
    advantages([[1, 0, 0, 1]], scale="group", ddof=1)[0, 0],
    0.5 / 0.5773503,
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    advantages([[1, 0, 0, 1]], scale="group", ddof=0)[0, 0], 1.0, rtol=1e-6
  )
  # Video-R1's constants: eps stands beside the std.
  np.testing.assert_allclose(
    advantages([[1, 0, 0, 1]], scale="group", ddof=1, eps=1e-4)[0, 0],
    0.5 / (0.5773503 + 1e-4),
    rtol=1e-6,
  )


def test_batch_std_is_pooled_within_groups():
  # Squares around the groups' means: 1 + 1 and 4 + 4; ddof 1 leaves 1 + 1.
  reward = [[1.0, -1.0], [12.0, 8.0]]
  np.testing.assert_allclose(
    grpo.pooled_std(jnp.array(reward), ddof=1), math.sqrt(10 / 2), rtol=1e-6
  )
  np.testing.assert_allclose(
    grpo.pooled_std(jnp.array(reward), ddof=0), math.sqrt(10 / 4), rtol=1e-6
  )
  np.testing.assert_allclose(
    advantages(reward, scale="batch", ddof=1),
    np.array([[1, -1], [2, -2]]) / math.sqrt(5),
    rtol=1e-6,
  )
  made = grpo.group_advantages(
    jnp.array(reward),
    batch_std=jnp.array([2.0, 4.0]),
    **(ADVANTAGE | dict(scale="batch")),
  )
  np.testing.assert_allclose(made, [[0.5, -0.5], [0.5, -0.5]])


def test_leave_one_out():
  # Others of 3 are 0, 0: baseline 0; others of a 0 are 3, 0: baseline 1.5.
  np.testing.assert_allclose(
    advantages([[3, 0, 0]], baseline="leave_one_out"),
    [[3, -1.5, -1.5]],
    rtol=1e-6,
  )
  np.testing.assert_array_equal(
    advantages([[3, 9]], [[True, False]], baseline="leave_one_out"), [[0, 0]]
  )


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_masked_completions_change_nothing(scale, baseline):
  settings = dict(scale=scale, baseline=baseline, eps=1e-4)
  alone = advantages([[1, 0, 0.5], [0, 0, 1]], **settings)
  padded = advantages(
    [[1, 0, 99, 0.5], [0, 0, -99, 1]],
    [[True, True, False, True]] * 2,
    **settings,
  )
  np.testing.assert_allclose(padded[:, [0, 1, 3]], alone, rtol=1e-6)
  np.testing.assert_array_equal(padded[:, 2], 0)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_equal_rewards_give_zero_not_nan(scale):
  np.testing.assert_array_equal(
    advantages([[0.7] * 4, [0] * 4], scale=scale, eps=1e-4), np.zeros((2, 4))
  )


def test_group_std_cancels_a_bonus_equal_for_all_correct():
  """docs/method.md: two-valued rewards, and an affine map of them."""
  accuracy = np.array([[1, 0, 0, 1, 1, 0, 0, 0]], np.float32)
  plain = accuracy + 0.2  # a constant format reward beside it
  bonus = plain + 0.3 * accuracy
  # One side: divided by the group's std, the bonus leaves no trace ...
  np.testing.assert_allclose(
    advantages(bonus, scale="group"),
    advantages(plain, scale="group"),
    rtol=1e-6,
  )
  # ... but O(eps) where eps stands beside the std.
  trace = advantages(bonus, scale="group", eps=1e-4) - advantages(
    plain, scale="group", eps=1e-4
  )
  assert 0 < np.abs(trace).max() < 1e-3
  # The other side: without the scale it is 30 % more of the same advantage,
  np.testing.assert_allclose(
    advantages(bonus), 1.3 * advantages(plain), rtol=1e-6
  )
  # and a bonus that differs between correct rollouts survives both.
  unequal = plain + accuracy * np.array([[0.3, 0, 0, 0, 0.1, 0, 0, 0]])
  for scale in ("none", "group"):
    made = advantages(unequal, scale=scale)[0]
    assert made[0] > made[4] > made[3] > made[1]


def test_batch_scale_keeps_the_bonus():
  plain = np.array([[1, 0, 0, 1], [1, 0, 0, 0]], np.float32)
  bonus = plain + [[0.3 * x for x in plain[0]], [0.0] * 4]
  made, base = (advantages(r, scale="batch") for r in (bonus, plain))
  assert made[0, 0] > base[0, 0]


def test_jitted_advantages_equal_the_plain_ones():
  reward = [[1, 0, 0.5, 0], [0, 0, 0, 0]]
  settings = (
    dict(scale=scale, baseline="leave_one_out", ddof=1, eps=1e-4)
    for scale in ("none", "group", "batch")
  )
  for chosen in settings:
    made = jax.jit(lambda r, chosen=chosen: grpo.group_advantages(r, **chosen))(
      jnp.array(reward)
    )
    np.testing.assert_allclose(made, advantages(reward, **chosen), rtol=1e-6)


def test_no_gradient_through_advantages():
  grad = jax.grad(
    lambda r: jnp.sum(grpo.group_advantages(r, **ADVANTAGE) ** 2)
  )(jnp.array([[1.0, 0.0]]))
  np.testing.assert_array_equal(grad, 0)


def test_unknown_settings_name_themselves():
  with pytest.raises(ValueError, match="config.advantage.scale"):
    advantages([[1, 0]], scale="std")
  with pytest.raises(ValueError, match="config.advantage.baseline"):
    advantages([[1, 0]], baseline="loo")
  one = jnp.zeros((1, 1, 1))
  for setting, bad in (
    ("aggregate", "mean"),
    ("kl_kind", "k4"),
    ("ratio", "group"),
  ):
    with pytest.raises(ValueError, match=f"config.loss.{setting}"):
      grpo.policy_loss(
        one, one, one, one[..., 0], one == 0, **(LOSS | {setting: bad})
      )


def test_spread_mask():
  reward = jnp.array([[1.0, 1.0, 0.0], [0.4, 0.4, 9.0], [0.0, 0.0, 0.0]])
  mask = jnp.array([[True] * 3, [True, True, False], [False] * 3])
  np.testing.assert_array_equal(
    grpo.spread_mask(reward, mask), [True, False, False]
  )
  np.testing.assert_array_equal(grpo.spread_mask(reward[:1]), [True])


def test_overlong_filter():
  mask = jnp.ones((1, 2, 2), bool)
  np.testing.assert_array_equal(
    grpo.overlong_filter(mask, jnp.array([[True, False]])),
    [[[True, True], [False, False]]],
  )


# -- KL


@WRAP
def test_kl_by_hand(wrap):
  # d = ref - policy = ln 2, so exp(d) - 1 - d = 1 - ln 2.
  logprob, ref = jnp.array([-1.0]), jnp.array([-1.0 + math.log(2)])
  for kind, want in (
    ("k1", -math.log(2)),
    ("k2", math.log(2) ** 2 / 2),
    ("k3", 1 - math.log(2)),
  ):
    made = wrap(lambda a, b, kind=kind: grpo.kl_divergence(a, b, kind=kind))
    np.testing.assert_allclose(made(logprob, ref), [want], rtol=1e-5)


def test_kl_clamps_the_log_ratio():
  made = grpo.kl_divergence(
    jnp.array([-1000.0, 0.0]), jnp.array([0.0, -1000.0]), kind="k3"
  )
  np.testing.assert_allclose(
    made, [math.exp(10) - 11, math.exp(-10) + 9], rtol=1e-5
  )


def test_kl_estimates_have_the_right_mean():
  policy, ref = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
  exact = np.sum(policy * np.log(policy / ref))
  for kind in ("k1", "k3"):
    made = grpo.kl_divergence(
      jnp.log(jnp.array(policy)), jnp.log(jnp.array(ref)), kind=kind
    )
    np.testing.assert_allclose(np.sum(policy * made), exact, rtol=1e-5)


def test_truncated_importance():
  made = grpo.truncated_importance(
    jnp.log(jnp.array([0.2, 0.8, 1.0])),
    jnp.log(jnp.array([0.4, 0.1, 0.9])),
    cap=2.0,
  )
  np.testing.assert_allclose(made, [0.5, 2.0, 1 / 0.9], rtol=1e-5)
  huge = grpo.truncated_importance(jnp.zeros(1), jnp.full(1, -1e4), cap=2.0)
  np.testing.assert_allclose(huge, [2.0], rtol=1e-6)


# -- losses

# Two completions of one video, two slots, the second's last one padded.
RATIO = np.array([[[1.1, 1.5], [0.5, 1.0]]], np.float32)
MASK = np.array([[[True, True], [True, False]]])


def run(ratio=RATIO, advantage=((1.0, -1.0),), mask=MASK, ref=None, **settings):
  old = np.full(ratio.shape, -1.0, np.float32)
  logprob = jnp.asarray(old + np.log(ratio))
  ref = logprob if ref is None else ref
  return grpo.policy_loss(
    logprob,
    jnp.asarray(old),
    jnp.asarray(ref),
    jnp.asarray(advantage),
    jnp.asarray(mask),
    **(LOSS | settings),
  )


def test_clipped_loss_by_hand():
  # A = 1: min(1.1, 1.1) and min(1.5, 1.2); A = -1: min(-0.5, -0.8).
  # Tokens: -1.1, -1.2, 0.8.
  for aggregate, want in (
    ("sequence_mean", (-1.15 + 0.8) / 2),
    ("token_mean", (-1.1 - 1.2 + 0.8) / 3),
    ("constant", (-1.1 - 1.2 + 0.8) / 4),  # 2 completions, C = 2
  ):
    loss, metrics = run(aggregate=aggregate)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_fraction"], 2 / 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_max"], 1.5, rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_mean"], 3.1 / 3, rtol=1e-5)


def test_clip_higher():
  loss, _ = run(aggregate="token_mean", clip_high=0.28)
  np.testing.assert_allclose(loss, (-1.1 - 1.28 + 0.8) / 3, rtol=1e-5)


def test_clipping_is_pessimistic():
  # A fallen ratio with A > 0 and a risen one with A < 0 are not clipped.
  ratio = np.array([[[0.5], [1.5]]], np.float32)
  loss, metrics = run(ratio, mask=np.ones((1, 2, 1), bool))
  np.testing.assert_allclose(loss, (-0.5 + 1.5) / 2, rtol=1e-5)
  assert metrics["clip_fraction"] == 0


def test_sequence_ratio_is_the_geometric_mean():
  old = np.full(RATIO.shape, -1.0, np.float32)
  logprob = jnp.asarray(old + np.log(RATIO))
  settings = LOSS | dict(clip_high=9.0, clip_low=0.9, ratio="sequence")
  made, metrics = grpo.policy_loss(
    logprob,
    old,
    logprob,
    jnp.array([[1.0, -1.0]]),
    jnp.asarray(MASK),
    **settings,
  )
  np.testing.assert_allclose(made, (-math.sqrt(1.1 * 1.5) + 0.5) / 2, rtol=1e-5)
  np.testing.assert_allclose(metrics["ratio_max"], math.sqrt(1.65), rtol=1e-5)


def test_first_update_is_plain_policy_gradient():
  """At ratio 1 the gradient is -A / tokens, whatever the clip."""
  logprob = jnp.full((1, 2, 2), -1.0)
  grad = jax.jit(
    jax.grad(
      lambda x: grpo.policy_loss(
        x,
        logprob,
        logprob,
        jnp.array([[2.0, -1.0]]),
        jnp.asarray(MASK),
        **LOSS,
      )[0]
    )
  )(logprob)
  np.testing.assert_allclose(grad, [[[-0.5, -0.5], [0.5, 0.0]]], atol=1e-6)


def test_kl_joins_with_its_weight():
  old = np.full(RATIO.shape, -1.0, np.float32)
  logprob = old + np.log(RATIO)
  ref = logprob + np.float32(math.log(2))
  bare, _ = run()
  loss, metrics = run(ref=ref, kl_weight=0.04)
  np.testing.assert_allclose(metrics["kl"], 1 - math.log(2), rtol=1e-4)
  np.testing.assert_allclose(loss, bare + 0.04 * (1 - math.log(2)), rtol=1e-4)


def test_advantage_may_be_one_per_token():
  loss, _ = run(advantage=[[[1.0, 0.0], [-1.0, 5.0]]], aggregate="token_mean")
  np.testing.assert_allclose(loss, (-1.1 + 0.8) / 3, rtol=1e-5)


def test_importance_weight_multiplies():
  loss, _ = run(
    weight=jnp.array([[[1.0, 0.5], [0.0, 7.0]]]), aggregate="token_mean"
  )
  np.testing.assert_allclose(loss, (-1.1 - 0.6) / 3, rtol=1e-5)


@pytest.mark.parametrize(
  "aggregate", ["sequence_mean", "token_mean", "constant"]
)
def test_micro_batches_add_up_to_the_global_loss(aggregate):
  ratio = np.array(
    [[[1.1, 1.5], [0.5, 1.0]], [[0.9, 0.7], [1.3, 1.2]]], np.float32
  )
  mask = np.array(
    [[[True, True], [True, False]], [[True, False], [False, False]]]
  )
  advantage = np.array([[1.0, -1.0], [0.5, 2.0]], np.float32)
  settings = dict(aggregate=aggregate, kl_weight=0.1)
  ref = np.log(ratio) - 1.2
  whole, _ = run(ratio, advantage, mask, ref, **settings)
  total = grpo.denominator(jnp.asarray(mask), aggregate=aggregate)
  parts = sum(
    run(
      ratio[b : b + 1],
      advantage[b : b + 1],
      mask[b : b + 1],
      ref[b : b + 1],
      total=total,
      **settings,
    )[0]
    for b in range(2)
  )
  np.testing.assert_allclose(parts, whole, rtol=1e-5)


@pytest.mark.parametrize(
  ("aggregate", "ratio"),
  [
    ("sequence_mean", "token"),
    ("token_mean", "sequence"),
    ("constant", "token"),
  ],
)
def test_left_out_groups_and_padding_are_as_if_absent(aggregate, ratio):
  slot = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  logprob, old, ref = (-np.abs(np.sin(slot * k)) for k in (1, 2, 3))
  mask = jnp.arange(4) < jnp.array([[2, 4, 1], [3, 3, 3]])[..., None]
  advantage = jnp.array([[1.0, -0.5, -0.5], [2.0, -1.0, -1.0]])
  settings = LOSS | dict(aggregate=aggregate, kl_weight=0.1, ratio=ratio)

  @jax.jit
  @jax.value_and_grad
  def loss(logprob, old, ref, advantage, mask, group_mask):
    return grpo.policy_loss(
      logprob, old, ref, advantage, mask, group_mask, **settings
    )[0]

  alone, alone_grad = loss(
    logprob[:1], old[:1], ref[:1], advantage[:1], mask[:1], None
  )
  # Padded slots of the group that stays hold the worst there is.
  bad = [
    jnp.where(mask, value, worst)
    for value, worst in ((logprob, jnp.nan), (old, jnp.inf), (ref, -jnp.inf))
  ]
  both, grad = loss(*bad, advantage, mask, jnp.array([True, False]))
  np.testing.assert_allclose(both, alone, rtol=1e-6)
  np.testing.assert_allclose(grad[:1], alone_grad, rtol=1e-6)
  np.testing.assert_array_equal(grad[1:], 0)
  nothing, grad = loss(*bad, advantage, mask, jnp.array([False, False]))
  assert nothing == 0
  np.testing.assert_array_equal(grad, 0)


def test_jitted_loss_equals_the_plain_one():
  jitted = jax.jit(lambda *args: grpo.policy_loss(*args, **LOSS))
  old = jnp.full(RATIO.shape, -1.0)
  args = (
    old + jnp.log(RATIO),
    old,
    old,
    jnp.array([[1.0, -1.0]]),
    jnp.asarray(MASK),
  )
  np.testing.assert_allclose(
    jitted(*args)[0], grpo.policy_loss(*args, **LOSS)[0], rtol=1e-6
  )


def test_extreme_ratios_stay_finite():
  logprob = jnp.array([[[0.0, -500.0]]])
  old = jnp.array([[[-500.0, 0.0]]])
  loss, grad = jax.jit(
    jax.value_and_grad(
      lambda x: grpo.policy_loss(
        x,
        old,
        old,
        jnp.array([[-1.0]]),
        jnp.ones((1, 1, 2), bool),
        **(LOSS | dict(kl_weight=0.1)),
      )[0]
    )
  )(logprob)
  assert np.isfinite(loss)
  assert np.all(np.isfinite(grad))


def test_contrastive_loss_by_hand():
  # Gains 1.5 and 0.5, margin 0.5, tau 0.5: scores 1 and (unselected) -1.
  made = grpo.contrastive_loss(
    jnp.array([[1.5, 0.5]]),
    jnp.array([[0.5, 0.5]]),
    jnp.array([[True, False]]),
    margin=0.5,
    tau=0.5,
  )
  np.testing.assert_allclose(made, math.log(1 + math.exp(-1)), rtol=1e-5)
  none = grpo.contrastive_loss(
    jnp.ones((1, 2)),
    jnp.ones((1, 2)),
    jnp.zeros((1, 2), bool),
    margin=0.0,
    tau=1.0,
  )
  assert none == 0


# -- reward scales that remember, by kind


def test_spread_moments_by_kind():
  # Squares around the groups' means: 1 + 1, 4 + 4, and 0 of a group of one.
  reward = jnp.array([[1.0, -1.0], [12.0, 8.0], [5.0, 99.0]])
  mask = jnp.array([[True, True], [True, True], [True, False]])
  square, free = grpo.spread_moments(
    reward, mask, jnp.array([1, 0, 1]), ddof=1, num_kinds=3
  )
  np.testing.assert_allclose(square, [8, 2, 0])
  np.testing.assert_allclose(free, [1, 1, 0])
  # They add up over parts.
  parts = [
    grpo.spread_moments(
      reward[b : b + 1], mask[b : b + 1], kind, ddof=1, num_kinds=3
    )
    for b, kind in enumerate(([1], [0], [1]))
    for kind in (jnp.array(kind),)
  ]
  np.testing.assert_allclose(sum(p[0] for p in parts), square)
  np.testing.assert_allclose(sum(p[1] for p in parts), free)


def test_running_std_by_hand():
  state = (jnp.zeros(2), jnp.zeros(2))
  state, std = grpo.running_std(
    state, (jnp.array([8.0, 0.0]), jnp.array([2.0, 3.0])), decay=0.5
  )
  np.testing.assert_allclose(std, [2, 0])
  state, std = grpo.running_std(
    state, (jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0])), decay=0.5
  )
  np.testing.assert_allclose(std, [math.sqrt(5 / 2), 0])  # (4 + 1) / (1 + 1)
  np.testing.assert_allclose(state[1], [2, 1.5])
  # Each sample is divided by the std of its kind.
  made = grpo.group_advantages(
    jnp.array([[1.0, -1.0], [3.0, 1.0]]),
    batch_std=jnp.array([2.0, 4.0])[jnp.array([1, 0])],
    **(ADVANTAGE | dict(scale="batch")),
  )
  np.testing.assert_allclose(made, [[0.25, -0.25], [0.5, -0.5]])


def test_no_baseline():
  np.testing.assert_allclose(
    advantages([[3, 0, 9]], [[True, True, False]], baseline="none"), [[3, 0, 0]]
  )


# -- REINFORCE++ and KL in the reward


@WRAP
def test_token_returns_by_hand(wrap):
  # KL costs 0.1 a nat. The first completion ends in its second slot.
  kl = jnp.array([[[1.0, 2.0, 99.0], [0.0, -1.0, 1.0]]])
  mask = jnp.array([[[True, True, False], [True, True, True]]])
  made = wrap(
    lambda r, k, m: grpo.token_returns(r, k, m, kl_weight=0.1, discount=0.5)
  )(jnp.array([[1.0, 2.0]]), kl, mask)
  # 1 - 0.2 and -0.1 + 0.4; 2 - 0.1, 0.1 + 0.95, 0 + 0.525.
  np.testing.assert_allclose(
    made, [[[0.3, 0.8, 0], [0.525, 1.05, 1.9]]], rtol=1e-5
  )


def test_whiten_by_hand():
  # Real: 1, 3, 5; mean 3, squares 8; ddof 0: 8 / 3, ddof 1: 4.
  value = jnp.array([[1.0, 3.0], [5.0, 99.0]])
  mask = jnp.array([[True, True], [True, False]])
  made = grpo.whiten(value, mask, ddof=1, eps=0.0)
  np.testing.assert_allclose(made, [[-1, 0], [1, 0]], rtol=1e-6)
  made = grpo.whiten(value, mask, ddof=0, eps=0.0)
  np.testing.assert_allclose(made[0, 0], -2 / math.sqrt(8 / 3), rtol=1e-6)
  same = grpo.whiten(jnp.ones((1, 2)), jnp.ones((1, 2), bool), ddof=1, eps=1e-8)
  np.testing.assert_array_equal(same, [[0, 0]])


def test_reinforce_advantages_by_hand():
  # Without KL and discount every token holds its completion's reward: 2 and 0.
  reward, mask = jnp.array([[2.0, 0.0]]), jnp.ones((1, 2, 2), bool)
  settings = dict(kl_weight=0.0, discount=1.0, ddof=0, eps=0.0)
  for baseline in ("none", "mean", "leave_one_out"):
    made = grpo.reinforce_advantages(
      reward, jnp.zeros((1, 2, 2)), mask, baseline=baseline, **settings
    )
    np.testing.assert_allclose(made, [[[1, 1], [-1, -1]]], rtol=1e-6)
  # The two groups' baselines of 1 and 4 take away what only prompts differ in.
  made = grpo.reinforce_advantages(
    jnp.array([[2.0, 0.0], [5.0, 3.0]]),
    jnp.zeros((2, 2, 1)),
    jnp.ones((2, 2, 1), bool),
    baseline="mean",
    **settings,
  )
  np.testing.assert_allclose(made[..., 0], [[1, -1], [1, -1]], rtol=1e-6)
  with pytest.raises(ValueError, match="config.advantage.baseline"):
    grpo.reinforce_advantages(
      reward, jnp.zeros((1, 2, 2)), mask, baseline="loo", **settings
    )


def test_kl_penalty_by_hand():
  kl = jnp.array([[[1.0, 2.0], [4.0, 99.0]]])
  mask = jnp.array([[[True, True], [True, False]]])
  made = grpo.kl_penalty(kl, mask, kl_weight=0.1)
  np.testing.assert_allclose(made, [[-0.3, -0.4]], rtol=1e-6)


# -- sampler and trainer


def test_mismatch_by_hand():
  logprob = jnp.log(jnp.array([[[0.4, 0.5, 0.9]]]))
  sampler = jnp.log(jnp.array([[[0.1, 0.5, 0.2]]]))
  mask = jnp.array([[[True, True, False]]])
  made = grpo.mismatch(logprob, sampler, mask, cap=2.0)
  np.testing.assert_allclose(made["mismatch_abs"], math.log(4) / 2, rtol=1e-5)
  np.testing.assert_allclose(made["mismatch_max"], math.log(4), rtol=1e-5)
  np.testing.assert_allclose(made["mismatch_capped"], 0.5)
  # k3 of the first token: 4 - 1 - ln 4; the second is 0.
  np.testing.assert_allclose(
    made["mismatch_kl"], (3 - math.log(4)) / 2, rtol=1e-5
  )
  worst = grpo.mismatch(
    jnp.where(mask, logprob, jnp.nan), sampler, mask, cap=2.0
  )
  assert all(np.isfinite(value) for value in worst.values())


def test_kl_loss_by_hand():
  logprob = jnp.array([[-1.0, -1.0, -9.0]])
  ref = logprob + math.log(2)
  mask = jnp.array([[True, True, False]])
  made = grpo.kl_loss(logprob, ref, mask, kind="k3")
  np.testing.assert_allclose(made, 1 - math.log(2), rtol=1e-5)
  part = grpo.kl_loss(logprob, ref, mask, kind="k3", num_tokens=jnp.array(8.0))
  np.testing.assert_allclose(part, (1 - math.log(2)) / 4, rtol=1e-5)


def test_contrastive_forms_and_parts():
  gain = jnp.array([[1.5, 0.5, -1.0]])
  view = jnp.array([[0.5, 0.5, 0.2]])
  select = jnp.array([[True, False, True]])
  settings = dict(margin=0.5, tau=0.5)

  def loss(gain, view, form="plain", **more):
    return grpo.contrastive_loss(
      gain, view, select, form=form, **(settings | more)
    )

  # d(-log sigmoid(x)) = -(1 - sigmoid(x)), over tau and 2 selected.
  slope = -(1 - 1 / (1 + math.exp(-1))) / 0.5 / 2
  plain = jax.grad(loss, argnums=(0, 1))(gain, view)
  stopped = jax.grad(lambda g, v: loss(g, v, "stop_gradient"), (0, 1))(
    gain, view
  )
  np.testing.assert_allclose(plain[0][0, 0], slope, rtol=1e-5)
  np.testing.assert_allclose(plain[1], -plain[0], rtol=1e-5)
  np.testing.assert_allclose(stopped[0], plain[0], rtol=1e-5)
  np.testing.assert_array_equal(stopped[1], 0)
  np.testing.assert_allclose(
    loss(gain, view), loss(gain, view, "stop_gradient"), rtol=1e-6
  )
  whole = loss(gain, view)
  total = jnp.sum(select)
  parts = sum(
    grpo.contrastive_loss(
      gain[:, i : i + 1],
      view[:, i : i + 1],
      select[:, i : i + 1],
      total=total,
      **settings,
    )
    for i in range(3)
  )
  np.testing.assert_allclose(parts, whole, rtol=1e-6)
  with pytest.raises(ValueError, match="config.contrastive.form"):
    loss(gain, view, "detach")


# -- every option against its definition, in float64

AGGREGATES = ("sequence_mean", "token_mean", "constant")


def scene64(rng, shape=(3, 4, 5)):
  """logprob, old, reference [B, G, C], advantage [B, G], mask, group mask."""
  logprob, old, ref = -rng.uniform(0.1, 2.0, (3, *shape))
  mask = (
    np.arange(shape[2]) < rng.integers(1, shape[2] + 1, shape[:2])[..., None]
  )
  advantage = rng.normal(size=shape[:2])
  return logprob, old, ref, advantage, mask, np.array([True, False, True])


def defined_loss(logprob, old, ref, advantage, mask, group, weight, settings):
  """The loss token by token, in loops."""
  total, tokens, rows = 0.0, 0, 0
  width = logprob.shape[2]
  for b, g in np.ndindex(*advantage.shape):
    if not group[b]:
      continue
    slots = np.flatnonzero(mask[b, g])
    rows += 1
    tokens += len(slots)
    ratio = np.exp(logprob[b, g, slots] - old[b, g, slots])
    if settings["ratio"] == "sequence":
      ratio = np.full(len(slots), np.prod(ratio) ** (1 / len(slots)))
    terms = []
    for t, rho in zip(slots, ratio):
      low, high = 1 - settings["clip_low"], 1 + settings["clip_high"]
      cut = min(max(rho, low), high)
      term = -min(rho * advantage[b, g], cut * advantage[b, g])
      term *= weight[b, g, t]
      d = ref[b, g, t] - logprob[b, g, t]
      kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}
      terms.append(term + settings["kl_weight"] * kl[settings["kl_kind"]])
    per_row = settings["aggregate"] == "sequence_mean"
    total += np.mean(terms) if per_row else np.sum(terms)
  below = {
    "sequence_mean": rows,
    "token_mean": tokens,
    "constant": rows * width,
  }
  return total / below[settings["aggregate"]]


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kl_kind", ["k1", "k2", "k3"])
def test_policy_loss_is_its_definition(aggregate, ratio, kl_kind):
  rng = np.random.default_rng(0)
  clip = (0.2, 0.28) if ratio == "token" else (3e-4, 4e-4)
  settings = dict(
    clip_low=clip[0],
    clip_high=clip[1],
    aggregate=aggregate,
    kl_weight=0.3,
    kl_kind=kl_kind,
    ratio=ratio,
  )
  with jax.enable_x64(True):
    *arrays, mask, group = scene64(rng)
    weight = rng.uniform(0, 2, mask.shape)
    made, _ = grpo.policy_loss(
      *map(jnp.asarray, (*arrays, mask, group)),
      weight=jnp.asarray(weight),
      **settings,
    )
    assert made.dtype == jnp.float64
    want = defined_loss(*arrays, mask, group, weight, settings)
    np.testing.assert_allclose(made, want, rtol=1e-12)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "none"])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_advantages_are_their_definition(baseline, scale, ddof):
  rng = np.random.default_rng(1)
  reward = rng.normal(size=(3, 5))
  mask = np.arange(5) < np.array([5, 3, 4])[:, None]
  eps = 1e-4
  groups = [row[real] for row, real in zip(reward, mask)]
  pooled = math.sqrt(
    sum(((r - r.mean()) ** 2).sum() for r in groups)
    / sum(len(r) - ddof for r in groups)
  )
  want = np.zeros_like(reward)
  for b, row in enumerate(groups):
    for g, value in enumerate(row):
      others = {
        "mean": row,
        "leave_one_out": np.delete(row, g),
        "none": np.zeros(1),
      }[baseline]
      std = {
        "none": 1,
        "group": row.std(ddof=ddof) + eps,
        "batch": pooled + eps,
      }
      want[b, g] = (value - others.mean()) / std[scale]
  with jax.enable_x64(True):
    made = grpo.group_advantages(
      jnp.asarray(reward),
      jnp.asarray(mask),
      scale=scale,
      baseline=baseline,
      ddof=ddof,
      eps=eps,
    )
    assert made.dtype == jnp.float64
    np.testing.assert_allclose(made, want, rtol=1e-12)


@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_reinforce_is_its_definition(baseline):
  rng = np.random.default_rng(2)
  _, _, _, reward, mask, _ = scene64(rng)
  kl = rng.normal(size=mask.shape)
  want = np.zeros(mask.shape)
  for b, g in np.ndindex(*reward.shape):
    slots = np.flatnonzero(mask[b, g])
    end = reward[b, g] - (reward[b].mean() if baseline == "mean" else 0)
    for t in slots:
      later = slots[slots >= t]
      paid = sum(0.9 ** (u - t) * -0.1 * kl[b, g, u] for u in later)
      want[b, g, t] = paid + 0.9 ** (slots[-1] - t) * end
  real = want[mask]
  want = (want - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8) * mask
  with jax.enable_x64(True):
    made = grpo.reinforce_advantages(
      *map(jnp.asarray, (reward, kl, mask)),
      kl_weight=0.1,
      discount=0.9,
      baseline=baseline,
      ddof=1,
      eps=1e-8,
    )
    np.testing.assert_allclose(made, want, rtol=1e-10, atol=1e-12)


def test_the_other_terms_are_their_definitions():
  rng = np.random.default_rng(4)
  logprob, other, _, gain, mask, _ = scene64(rng)
  view, select = rng.normal(size=gain.shape), gain > 0
  d = other - logprob
  # exp(d) - 1 - d as written loses digits where d is small: hence 1e-9.
  kl = {"k1": -d, "k2": d * d / 2, "k3": np.exp(d) - 1 - d}
  real = d[mask]
  sigmoid = 1 / (1 + np.exp(-(gain - view - 0.3) / 0.7))
  with jax.enable_x64(True):
    old, new, real_mask = map(jnp.asarray, (other, logprob, mask))
    for kind, want in kl.items():
      made = grpo.kl_divergence(new, old, kind=kind)
      np.testing.assert_allclose(made, want, rtol=1e-9)
      made = grpo.kl_loss(new, old, real_mask, kind=kind)
      np.testing.assert_allclose(made, want[mask].mean(), rtol=1e-9)
      made = grpo.kl_penalty(jnp.asarray(want), real_mask, kl_weight=0.2)
      np.testing.assert_allclose(made, -0.2 * (want * mask).sum(-1), rtol=1e-9)
    np.testing.assert_allclose(
      grpo.truncated_importance(new, old, cap=1.5),
      np.minimum(np.exp(-d), 1.5),
      rtol=1e-9,
    )
    for name, want in (
      ("abs", np.abs(real).mean()),
      ("max", np.abs(real).max()),
      ("capped", (-real > math.log(1.5)).mean()),
      ("kl", (np.exp(-real) - 1 + real).mean()),  # of the old from the new
    ):
      # A share of tokens is a mean of bools, which is float32.
      made = grpo.mismatch(new, old, real_mask, cap=1.5)[f"mismatch_{name}"]
      np.testing.assert_allclose(made, want, rtol=1e-7)
    made = grpo.contrastive_loss(
      *map(jnp.asarray, (gain, view, select)), margin=0.3, tau=0.7
    )
    np.testing.assert_allclose(made, -np.log(sigmoid[select]).mean(), rtol=1e-9)


# -- eight devices, and parts of a batch

SHARDED = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from cf_jax import grpo

assert jax.device_count() == 8
rng = np.random.default_rng(0)
shape = (8, 4, 6)
logprob, old, ref = -rng.uniform(0.1, 2.0, (3, *shape)).astype(np.float32)
mask = np.arange(6) < rng.integers(1, 7, shape[:2])[..., None]
reward = rng.normal(size=shape[:2]).astype(np.float32)
kind = np.arange(8) % 3
select = reward > 0
group = np.arange(8) != 5

def numbers(logprob, old, ref, mask, reward, kind, select, group):
  made = {}
  for aggregate in ("sequence_mean", "token_mean", "constant"):
    def loss(x):
      return grpo.policy_loss(
        x, old, ref, reward, mask, group, clip_low=0.2, clip_high=0.28,
        aggregate=aggregate, kl_weight=0.1, kl_kind="k3")[0]
    value, grad = jax.value_and_grad(loss)(logprob)
    made[aggregate] = value, jnp.sum(grad * ref)
  kl = grpo.kl_divergence(logprob, ref, kind="k1")
  made["reinforce"] = grpo.reinforce_advantages(
    reward, kl, mask, kl_weight=0.1, discount=0.9, baseline="mean", ddof=1,
    eps=1e-8)
  made["moments"] = grpo.spread_moments(reward, kind=kind, ddof=1, num_kinds=3)
  made["batch"] = grpo.group_advantages(
    reward, scale="batch", baseline="leave_one_out", ddof=1, eps=1e-4)
  made["contrast"] = grpo.contrastive_loss(
    reward, reward[::-1], select, margin=0.1, tau=1.0)
  made["kl_loss"] = grpo.kl_loss(logprob, ref, mask, kind="k3")
  made["mismatch"] = grpo.mismatch(logprob, old, mask, cap=2.0)
  return made

args = (logprob, old, ref, mask, reward, kind, select, group)
one = jax.jit(numbers)(*args)
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
split = jax.jit(numbers, in_shardings=rows)(*args)
for path, value in jax.tree_util.tree_leaves_with_path(one):
  other = split
  for key in path:
    other = other[getattr(key, "key", getattr(key, "idx", None))]
  np.testing.assert_allclose(
    other, value, rtol=1e-5, atol=1e-6, err_msg=str(path))
print("equal")
"""


def test_eight_devices_equal_one():
  flags = "--xla_force_host_platform_device_count=8"
  ran = subprocess.run(
    [sys.executable, "-c", SHARDED],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[1],
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
  )
  assert ran.returncode == 0, ran.stderr[-3000:]
  assert ran.stdout == "equal\n"


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_micro_batches_give_the_global_gradient(aggregate):
  """Equal parts of the prompts, with groups left out and uneven lengths."""
  rng = np.random.default_rng(3)
  *arrays, mask, _ = scene64(rng, (4, 3, 5))
  arrays = [jnp.asarray(value, jnp.float32) for value in arrays]
  mask = jnp.asarray(mask)
  group = jnp.array([True, True, False, True])
  settings = LOSS | dict(aggregate=aggregate, kl_weight=0.1)
  counted = mask & group[:, None, None]
  total = grpo.denominator(counted, aggregate=aggregate)

  def loss(x, rows, total):
    old, ref, advantage = (value[rows] for value in arrays[1:])
    return grpo.policy_loss(
      x, old, ref, advantage, mask[rows], group[rows], total=total, **settings
    )[0]

  step = jax.value_and_grad(loss)
  whole, grad = step(arrays[0], slice(0, 4), None)
  parts = [
    step(arrays[0][rows], rows, total) for rows in (slice(0, 2), slice(2, 4))
  ]
  np.testing.assert_allclose(sum(p[0] for p in parts), whole, rtol=1e-5)
  np.testing.assert_allclose(
    np.concatenate([p[1] for p in parts]), grad, rtol=1e-5, atol=1e-7
  )
