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


# -- many kinds of questions in one batch

# A choice, a grounded question, an interval and a caption; two rollouts each.
MIXED = {
  "accuracy": jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
  "iou": jnp.array([[0.0, 0.0], [0.5, 0.25], [0.8, 0.0], [0.0, 0.0]]),
  "event_recall": jnp.array([[0.0] * 2, [0.0] * 2, [0.0] * 2, [0.75, 0.5]]),
  "format": jnp.array([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]),
}
APPLIES = {
  "accuracy": jnp.array([True, True, False, False]),
  "iou": jnp.array([False, True, True, False]),
  "event_recall": jnp.array([False, False, False, True]),
  "format": jnp.ones(4, bool),
}


def test_videochat_sums_by_hand():
  """R_qa, R_gqa, R_st, R_cap of arXiv 2504.06958 in one batch."""
  weight = dict.fromkeys(MIXED, 1.0)
  want = [[2, 1], [2.5, 0.25], [1.8, 1], [0.75, 1.5]]
  close(rewards.combine(MIXED, APPLIES, weight=weight), want)
  # What stands where a component does not apply counts nowhere.
  dirty = {
    name: jnp.where(APPLIES[name][:, None], value, 9.0)
    for name, value in MIXED.items()
  }
  close(rewards.combine(dirty, APPLIES, weight=weight), want)
  for name, (value, count) in rewards.component_means(dirty, APPLIES).items():
    assert count == np.sum(APPLIES[name])
    close(
      value,
      {
        "accuracy": 0.5,
        "iou": 1.55 / 4,
        "event_recall": 0.625,
        "format": 0.75,
      }[name],
    )


@pytest.mark.parametrize(
  ("accuracy", "iou", "want"), [(0.5, 0.5, 0.75), (0.9, 0.1, 0.95)]
)
def test_dual_reward_by_hand(accuracy, iou, want):
  """arXiv 2506.01908: right, and half of the interval."""
  made = rewards.combine(
    MIXED, APPLIES, weight=dict(accuracy=accuracy, iou=iou)
  )
  close(made[1, 0], want)


def test_one_kind_alone_is_as_in_a_mixture():
  weight = dict.fromkeys(MIXED, 1.0)
  mixed = rewards.combine(MIXED, APPLIES, weight=weight)
  for b in range(4):
    own = {n: v[b : b + 1] for n, v in MIXED.items() if APPLIES[n][b]}
    alone = rewards.combine(own, weight=dict.fromkeys(own, 1.0))
    close(mixed[b : b + 1], alone)


def test_component_means_of_a_kind_that_is_absent():
  means = rewards.component_means(MIXED, {"iou": jnp.zeros(4, bool)})
  assert means["iou"] == (0, 0)
  close(means["accuracy"][0], 0.25)  # no mask: all
  assert means["accuracy"][1] == 4


def test_main_component_by_hand():
  want = [[1, 0], [1, 0], [0.8, 0], [0.75, 0.5]]
  close(rewards.main_component(MIXED, APPLIES), want)
  close(rewards.main_component({"accuracy": jnp.ones((1, 2))}), [[1, 1]])
  close(
    rewards.main_component(MIXED, APPLIES, order=("iou", "accuracy")),
    [[1, 0], [0.5, 0.25], [0.8, 0], [0, 0]],
  )
  with pytest.raises(ValueError, match="config.answers.components"):
    rewards.main_component({"format": jnp.ones((1, 1))})


def test_group_means_by_hand():
  mean, count = rewards.group_means(
    jnp.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]),
    jnp.array([2, 0, 2]),
    num_groups=3,
  )
  close(mean, [0, 0, 0.75])
  np.testing.assert_array_equal(count, [1, 0, 2])


def test_viarl_composition_by_hand():
  """arXiv 2505.15447: 2 acc index + index + format + 0.2 length."""
  component = {
    "accuracy": jnp.array([[1.0, 1.0, 0.0, 1.0]]),  # a stride may be lucky
    "index": jnp.array([[1.0, 0.0, 1.0, 1.0]]),
    "format": jnp.array([[1.0, 1.0, 1.0, 0.0]]),
    "length": rewards.length_inside(jnp.array([[80, 512, 79, 513]])),
  }
  component = rewards.with_product(
    component, name="selected_accuracy", factors=("accuracy", "index")
  )
  weight = dict(selected_accuracy=2.0, index=1.0, format=1.0, length=0.2)
  made = rewards.combine(component, weight=weight)
  close(made, [[4.2, 1.2, 2.0, 3.0]])
  with pytest.raises(ValueError, match="config.reward.products"):
    rewards.with_product(component, name="x", factors=("acuracy",))


def test_threshold_bonus_is_for_videos():
  accuracy = jnp.ones((2, 2))
  made = rewards.threshold_bonus(
    accuracy, accuracy, jnp.array([True, False]), mu=1.0
  )
  close(made, [[0.3, 0.3], [0, 0]])


@pytest.mark.parametrize(("mu", "passes"), [(0.8, True), (1.0, False)])
def test_the_two_presets_of_mu(mu, passes):
  """0.8 in the public code, 1.0 in the later paper: 0.9 passes the first."""
  accuracy = jnp.array([[0.9] * 8])
  made = rewards.threshold_bonus(accuracy, jnp.ones((1, 4)), mu=mu)
  close(made, [[0.3 if passes else 0.0] * 8])


# -- citing for the sake of it

K = 6
EVERY = np.array([[bool(c >> k & 1) for k in range(K)] for c in range(2**K)])
TOP = np.array([True] + [False] * (K - 1))


def additive_scenes():
  """Frames of worth e_k, 0 off the evidence: (evidence, e, TAD saliency)."""
  draw = np.random.default_rng(0)
  for chosen in EVERY[(EVERY.sum(1) > 0) & (EVERY.sum(1) <= K // 2)]:
    worth = np.where(chosen, draw.uniform(0.05, 0.4, K), 0)
    # Descending, so that frame 0 is the selector's favourite.
    yield chosen, worth, np.sort(draw.uniform(0.1, 1, K))[::-1].copy()


def earned_by(kind, cited, worth, saliency):
  """Saliency of many citing policies; l of a set is minus what is missing."""
  cited = jnp.asarray(cited)[None]
  mask = jnp.ones((1, K), bool)
  saliency = jnp.asarray(saliency, jnp.float32)[None]
  worth = jnp.asarray(worth, jnp.float32)
  if kind == "joint":
    uncited = rewards.salient_uncited(cited, saliency, mask)
    return rewards.deletion_saliency(
      -(cited @ worth), -(uncited @ worth), cited, mask
    )[0]
  count = cited.shape[1]
  return rewards.weighted_deletion_saliency(
    jnp.zeros((1, count)),
    jnp.broadcast_to(-worth, (1, count, K)),
    cited,
    saliency,
    mask,
  )[0]


@pytest.mark.parametrize("kind", ["joint", "weighted"])
def test_no_citing_policy_beats_the_evidence_by_deletion(kind):
  for evidence, worth, saliency in additive_scenes():
    made = np.asarray(
      earned_by(kind, np.vstack([evidence, EVERY]), worth, saliency)
    )
    assert made[0] > 0
    assert made[1:].max() <= made[0] + 1e-6  # any policy, "top" among them
    assert made[-1] == 0  # cite all
    assert made[1] == 0  # cite none
    if not evidence[0]:
      top = earned_by(kind, TOP[None], worth, saliency)
      np.testing.assert_array_equal(top, 0)  # the top frame alone


def test_weighted_deletion_saliency_by_hand():
  # Weights 1, 0.5, 0.25; worths 0.4, 0.6, 0 (a gain by deletion is no worth).
  made = rewards.weighted_deletion_saliency(
    jnp.full((1, 4), -1.0),
    jnp.broadcast_to(jnp.array([-1.4, -1.6, -0.2, 0.0]), (1, 4, 4)),
    jnp.array(
      [
        [
          [True, False, False, False],  # 0.4 - 0.3 of the next in line
          [False, True, False, False],  # 0.3 - 0.4 of the first
          [True, True, False, False],  # 2 of 3: too many
          [False, False, False, True],  # not there
        ]
      ]
    ),
    jnp.array([[0.8, 0.4, 0.2, 1.0]]),
    jnp.array([[True, True, True, False]]),
  )
  close(made, [[0.1, 0, 0, 0]])


def test_weighted_deletion_saliency_without_any_saliency():
  made = rewards.weighted_deletion_saliency(
    jnp.zeros((1, 1)),
    jnp.full((1, 1, 4), -1.0),
    jnp.array([[[True, False, False, False]]]),
    jnp.zeros((1, 4)),
    jnp.ones((1, 4), bool),
  )
  np.testing.assert_array_equal(made, 0)
