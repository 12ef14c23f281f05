"""Goldens worked by hand for rewards, bonuses and saliency."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax import grpo, rewards

BONUS = dict(alpha_t=0.3, alpha_c=0.2, gamma=0.5)


def close(made, want):
  np.testing.assert_allclose(made, want, rtol=1e-5, atol=1e-6)


def test_combine_by_hand():
  component = {
    "accuracy": jnp.array([[1.0, 0.0]]),
    "format": jnp.array([[1.0, 1.0]]),
    "logged_only": jnp.array([[9.0, 9.0]]),
  }
  close(
    rewards.combine(component, weight={"accuracy": 1.0, "format": 0.2}),
    [[1.2, 0.2]],
  )


@pytest.mark.parametrize("weight", [{"acuracy": 1.0}, {}])
def test_combine_refuses_what_is_not_there(weight):
  with pytest.raises(ValueError, match="config.reward.weight"):
    rewards.combine({"accuracy": jnp.ones((1, 1))}, weight=weight)


def test_answer_logprob_is_the_mean_over_the_answer():
  logprob = jnp.array([[-5.0, -1.0, -3.0], [-1.0, -1.0, -1.0]])
  span = jnp.array([[False, True, True], [False] * 3])
  close(rewards.answer_logprob(logprob, span), [-2.0, 0.0])


def test_rollout_contrast_by_hand():
  # One answer token each; two permutations of 0.1 and 0.3 have the mean 0.2.
  logprob = jnp.log(jnp.array([[[0.4], [0.1], [0.9]]]))
  view = jnp.log(jnp.array([[[[0.1], [0.3], [0.01]], [[0.3], [0.1], [0.01]]]]))
  span = jnp.ones((1, 3, 1), bool)
  made = rewards.rollout_contrast(logprob, view, span, tau=1.0)
  close(made, [[math.log(2), 0.0, 1.0]])  # in range, clipped to 0, to 1
  made = rewards.rollout_contrast(logprob, view, span, tau=2.0, low=-1.0)
  close(made, [[math.log(2) / 2, -math.log(2) / 2, 1.0]])
  none = rewards.rollout_contrast(logprob, view, ~span, tau=1.0)
  np.testing.assert_array_equal(none, [[0, 0, 0]])


def test_rollout_contrast_averages_over_the_answer_alone():
  # Gains of 0.2 and 0.6 nats in the answer, 9 outside it.
  logprob = jnp.array([[[-1.0, -0.5, -0.1]]])
  view = jnp.array([[[[-10.0, -0.7, -0.7]]]])
  span = jnp.array([[[False, True, True]]])
  close(rewards.rollout_contrast(logprob, view, span, tau=1.0), [[0.4]])


def test_contrast_bonus_by_hand():
  correct = jnp.array([[True, True, False]])
  g_shuffled = jnp.array([[1.0, 0.5, 1.0]])
  g_uniform = jnp.array([[0.0, 1.0, 1.0]])
  close(
    rewards.contrast_bonus(correct, g_shuffled, g_uniform, **BONUS),
    [[0.3, 0.35, 0.0]],
  )
  saliency = jnp.array([[1.0, 0.0, 1.0]])
  close(
    rewards.contrast_bonus(correct, g_shuffled, g_uniform, saliency, **BONUS),
    [[0.45, 0.35, 0.0]],
  )
  close(
    rewards.contrast_bonus(
      correct,
      g_shuffled,
      g_uniform,
      **BONUS,
      shuffled_mask=jnp.array([False]),
      uniform_mask=jnp.array([True]),
    ),
    [[0.0, 0.2, 0.0]],
  )
  close(
    rewards.contrast_bonus(
      correct,
      g_shuffled,
      g_uniform,
      **BONUS,
      shuffled_mask=jnp.array([True]),
      uniform_mask=jnp.array([False]),
    ),
    [[0.3, 0.15, 0.0]],
  )


def test_per_rollout_bonus_ranks_correct_rollouts_the_group_bonus_does_not():
  """What the threshold rule loses to the group's std, the contrast keeps."""
  accuracy = jnp.array([[1.0, 1.0, 0.0, 0.0]])
  settings = dict(scale="group", baseline="mean", ddof=1, eps=0.0)
  plain = grpo.group_advantages(accuracy, **settings)
  group = accuracy + rewards.threshold_bonus(
    accuracy, jnp.zeros((1, 4)), mu=0.8
  )
  close(grpo.group_advantages(group, **settings), plain)
  single = accuracy + rewards.contrast_bonus(
    accuracy > 0,
    jnp.array([[1.0, 0.0, 1.0, 1.0]]),
    jnp.zeros((1, 4)),
    **BONUS,
  )
  made = grpo.group_advantages(single, **settings)[0]
  assert made[0] > made[1] > made[2]


def test_threshold_bonus_by_hand():
  accuracy = jnp.array([[1.0, 0.05, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
  shuffled = jnp.array([[0.5, 0.5], [1.0, 0.0]])  # means 0.5 and 0.5
  # Means 0.5125 and 0.25: the first group passes, the second does not.
  close(
    rewards.threshold_bonus(accuracy, shuffled, mu=1.0),
    [[0.3, 0, 0, 0.3], [0, 0, 0, 0]],
  )
  close(
    rewards.threshold_bonus(accuracy, shuffled, mu=0.5),
    [[0.3, 0, 0, 0.3], [0.3, 0, 0, 0]],
  )


def test_margin_bonus_by_hand():
  # Of 4: the others of a correct one hold 1 of 3; the view has 1 of 2.
  made = rewards.margin_bonus(
    jnp.array([[True, True, False, False]]),
    jnp.array([[True, False]]),
    alpha=0.6,
  )
  close(made, [[0.6 * (1 / 3 - 0.5)] * 2 + [0.0] * 2])


def test_length_bonus_by_hand():
  length = jnp.array([[319, 320, 512, 513], [400, 400, 400, 400]])
  correct = jnp.array([[True] * 4, [True, False, False, False]])
  close(
    rewards.length_bonus(length, correct),
    [[0, 0.2, 0.2, 0], [0, 0, 0, 0]],  # the second group has one correct
  )


def test_overlong_penalty_by_hand():
  length = jnp.array([[80, 90, 95, 100, 120]])
  close(
    rewards.overlong_penalty(length, max_tokens=100, buffer=20),
    [[0, -0.5, -0.75, -1, -1]],
  )


def test_evidence_saliency_by_hand():
  evidence = jnp.array([[True, True, False, False]])
  cited = jnp.array(
    [
      [
        [True, True, False, False],  # the evidence: 1
        [True, False, False, False],  # half of it: 2 / 3
        [True, True, True, True],  # everything: 4 / 6
        [False, False, True, False],  # the wrong one: 0
        [False] * 4,
      ]
    ]
  )
  close(rewards.evidence_saliency(cited, evidence), [[1, 2 / 3, 2 / 3, 0, 0]])
  close(rewards.evidence_saliency(cited, jnp.zeros((1, 4), bool)), [[0.0] * 5])


@pytest.mark.parametrize("bits", range(1, 16))
def test_no_citing_policy_beats_citing_the_evidence(bits):
  evidence = jnp.array([[bool(bits >> k & 1) for k in range(4)]])
  every = jnp.array([[[bool(c >> k & 1) for k in range(4)] for c in range(16)]])
  made = np.asarray(rewards.evidence_saliency(every, evidence))[0]
  assert made[bits] == 1
  assert np.all(np.delete(made, bits) < 1)


def test_salient_uncited_takes_as_many_of_the_best():
  saliency = jnp.array([[0.9, 0.1, 0.5, 0.5, 1.0]])
  mask = jnp.array([[True, True, True, True, False]])
  cited = jnp.array(
    [
      [
        [True, False, False, False, False],
        [False, True, True, False, False],
        [True, True, True, False, False],
        [False] * 5,
      ]
    ]
  )
  np.testing.assert_array_equal(
    rewards.salient_uncited(cited, saliency, mask),
    [
      [
        [False, False, True, False, False],  # a tie goes to the earlier
        [True, False, False, True, False],
        [False, False, False, True, False],  # only one is left
        [False] * 5,
      ]
    ],
  )


def test_deletion_saliency_by_hand():
  mask = jnp.array([[True, True, True, True, False]])
  cited = jnp.array(
    [
      [
        [True, False, False, False, False],
        [True, False, False, False, False],
        [True, True, True, False, False],  # 3 of 4: too many
        [False] * 5,
        [True, True, False, False, False],
      ]
    ]
  )
  without_cited = jnp.array([[-1.5, -0.1, -9.0, -9.0, -9.0]])
  without_uncited = jnp.array([[-1.0, -1.0, -1.0, -1.0, -1.0]])
  close(
    rewards.deletion_saliency(without_cited, without_uncited, cited, mask),
    [[0.5, 0, 0, 0, 1]],
  )


def test_all_of_it_runs_jitted():
  @jax.jit
  def total(logprob, view, span, accuracy):
    contrast = rewards.rollout_contrast(logprob, view, span, tau=1.0)
    correct = rewards.is_correct(accuracy)
    bonus = rewards.contrast_bonus(correct, contrast, contrast, **BONUS)
    return rewards.combine({"accuracy": accuracy}, weight={"accuracy": 1.0}) + (
      bonus
    )

  made = total(
    jnp.full((1, 2, 3), -1.0),
    jnp.full((1, 4, 2, 3), -1.5),
    jnp.ones((1, 2, 3), bool),
    jnp.array([[1.0, 0.0]]),
  )
  close(made, [[1.25, 0.0]])
