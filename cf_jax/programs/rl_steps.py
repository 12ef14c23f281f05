"""The jitted steps of reinforcement: pure functions bound to an experiment.

Scores under other views, the reference's scores, saliency by deletion, rewards
and advantages, the loss and its update. What differs between KF-GRPO and its
neighbours is in the config alone.

Axes: `B` videos, `G` completions per video, `M` draws of a view, `K` keyframe
slots, `C` completion slots.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from cf_jax import grpo, masked, policy, rewards
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import sft
from cf_jax.runtime import sharding
from cf_jax.types import Experience, Rollout, Verdict, View

# Metrics of an update that are no means: the largest of its parts counts.
LARGEST = ("ratio_max", "mismatch_max")
# Where what the reward step gives lies: rows with their batch, the rest whole.
_SCORED_RULES = (
  (r"^(main|correct|reward|bonus|advantage|spread)$", sharding.BATCH),
  (r"", jax.sharding.PartitionSpec()),
)


def make_score_step(experiment: experiment_lib.Experiment):
  """Teacher-forced scores of the same completions under other views.

  params, views, encoded frames, Rollout -> arm -> log-probabilities
  [B, M, G, C]: M of the shuffled arm (`shuffled`, `shuffled_1`, ...), else 1.
  """
  banned = jnp.asarray(experiment.banned)
  by_row = sharding.batch_sharding(experiment.mesh)  # as the update wants it

  @functools.partial(jax.jit, out_shardings=by_row)
  def score_step(params, view: dict[str, View], encoded, rollout):
    draws = {}
    with jax.named_scope("score"):
      for name in sorted(view):
        logprob = policy.completion_logprobs(
          experiment.model, params, view[name], encoded, rollout, banned
        )[0]
        draws.setdefault(name.partition("_")[0], []).append(logprob)
    return {arm: jnp.stack(each, axis=1) for arm, each in draws.items()}

  return score_step


def make_reference_step(experiment: experiment_lib.Experiment):
  """The reference policy's scores under one view.

  params, View, pixel, encoded frames, Rollout -> log-probabilities [B, G, C].
  Of the two, one is None, as in Experience: where the tower is trained, the
  reference has its own; where it is frozen, they share it.
  """
  model, grid = experiment.model, experiment.grid
  banned = jnp.asarray(experiment.banned)
  by_row = sharding.batch_sharding(experiment.mesh)

  @functools.partial(jax.jit, out_shardings=by_row)
  def reference_step(params, view: View, pixel, encoded, rollout):
    with jax.named_scope("reference"):
      if encoded is None:
        encoded = policy.encode_frames(model, params, pixel, grid=grid)
      return policy.completion_logprobs(
        model, params, view, encoded, rollout, banned
      )[0]

  return reference_step


def make_deletion_step(experiment: experiment_lib.Experiment):
  """Saliency by deletion: what an answer loses without the frames it cites.

  A deleted frame's slot shows the blank frame, the last of those encoded; its
  time label stays. With `contrast.saliency` "weighted_deletion" a video has one
  view for each keyframe; else every completion has two views of its own.

  params, View, encoded frames [B, N, P, D], Rollout, its log-probabilities,
  answer span, cited bool[B, G, K], TAD saliency [B, K], keyframes bool[B, K] ->
  float32[B, G].
  """
  model, banned = experiment.model, jnp.asarray(experiment.banned)
  kind = experiment.config.contrast.saliency
  by_row = sharding.batch_sharding(experiment.mesh)

  def answer_logprob(params, view, encoded, rollout, span):
    logprob = policy.completion_logprobs(
      model, params, view, encoded, rollout, banned
    )[0]
    return rewards.answer_logprob(logprob, span)

  @functools.partial(jax.jit, out_shardings=by_row)
  def deletion_step(
    params, view, encoded, rollout, span, cited, saliency, mask
  ):
    blank = encoded.shape[1] - 1

    def without(drop):
      """[B, G, K] frames left out -> float32[B, G], a completion at a time."""

      def one(row):
        rollout, span, drop = row
        shown = view.replace(frame=jnp.where(drop, blank, view.frame))
        rollout, span = jax.tree.map(lambda x: x[:, None], (rollout, span))
        return answer_logprob(params, shown, encoded, rollout, span)[:, 0]

      rows = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0), (rollout, span, drop)
      )
      return jnp.moveaxis(jax.lax.map(one, rows), 0, 1)

    def without_frame(k):
      shown = view.replace(frame=view.frame.at[:, k].set(blank))
      return answer_logprob(params, shown, encoded, rollout, span)

    with jax.named_scope("deletion"):
      if kind != "weighted_deletion":
        uncited = rewards.salient_uncited(cited, saliency, mask)
        return rewards.deletion_saliency(
          without(cited & mask[:, None]), without(uncited), cited, mask
        )
      each = jax.lax.map(without_frame, jnp.arange(mask.shape[1]))
      return rewards.weighted_deletion_saliency(
        rewards.answer_logprob(rollout.logprob, span),
        jnp.moveaxis(each, 0, -1),
        cited,
        saliency,
        mask,
      )

  return deletion_step


@flax.struct.dataclass
class Evidence:
  """What the reward step knows beside the verdict.

  Attributes:
    scored: arm -> float32[B, M, G, C], the keyframes' completions under it.
    sampled: arm -> float32[B, G'], main component of its own completions.
    ref_logprob: float32[B, G, C] of the reference, or None.
    saliency: float32[B, G] of the rollouts' citations.
    top: bool[B, K] the keyframe that TAD finds most salient, where it does.
    can_shuffle: bool[B] two keyframes or more.
    has_apex: bool[B] the keyframes are not the uniform frames.
    kind: int32[B] number of the question's kind.
    task: int32[B] number of its task.
    rng: key of the placebo.
  """

  scored: dict[str, jax.Array]
  sampled: dict[str, jax.Array]
  ref_logprob: jax.Array | None
  saliency: jax.Array
  top: jax.Array
  can_shuffle: jax.Array
  has_apex: jax.Array
  kind: jax.Array
  task: jax.Array
  rng: jax.Array


class Scored(NamedTuple):
  """What the reward step gives.

  Attributes:
    main: float32[B, G] what decides whether a rollout is right.
    correct: bool[B, G].
    reward: float32[B, G], bonus included.
    bonus: float32[B, G] of the contrast.
    advantage: float32[B, G] or [B, G, C].
    spread: bool[B] groups whose rewards differ.
    moments: running squared deviations and degrees of freedom, by kind.
    component_mean: name -> float32[] mean over the videos that have the
      component, and int32[] how many they are.
    task_mean: float32[tasks] mean main component, and int32[tasks] videos.
    task_reward: the same of the reward.
    metrics: name -> float32[].
  """

  main: jax.Array
  correct: jax.Array
  reward: jax.Array
  bonus: jax.Array
  advantage: jax.Array
  spread: jax.Array
  moments: tuple[jax.Array, jax.Array]
  component_mean: dict[str, tuple[jax.Array, jax.Array]]
  task_mean: tuple[jax.Array, jax.Array]
  task_reward: tuple[jax.Array, jax.Array]
  metrics: dict[str, jax.Array]


def make_reward_step(
  experiment: experiment_lib.Experiment, *, num_kinds: int, num_tasks: int
):
  """Verdict, Rollout, Evidence, moments -> Scored, all by the config."""
  config = experiment.config
  weight, products = dict(config.reward.weight), dict(config.reward.products)
  length, overlong, kl_settings = (
    dict(config.reward[name]) for name in ("length", "overlong", "kl")
  )
  kind, placebo = config.contrast.kind, config.contrast.placebo
  tau, over = config.contrast.tau, config.contrast.span
  by_rollout = dict(config.contrast.rollout)
  by_threshold = dict(config.contrast.threshold)
  advantage_settings = dict(config.advantage)
  reinforce_settings = dict(config.reinforce)
  estimator, decay = config.rl.advantage, config.rl.std_decay
  max_tokens = config.sampling.max_tokens
  asks_length = "length" in {
    *weight,
    *(name for factors in products.values() for name in factors),
  }
  if placebo == "other_prompt" and config.rl.prompts_per_step < 2:
    raise ValueError(
      "config.contrast.placebo='other_prompt' takes another prompt of the"
      " batch, got config.rl.prompts_per_step=1; raise it"
    )

  def contrast_bonus(verdict, rollout, evidence, main, correct, metrics):
    """The bonus of `contrast.kind`, float32[B, G]; adds to the metrics."""
    applies = {
      "shuffled": evidence.can_shuffle,
      "uniform": evidence.has_apex,
    }

    def elsewhere(value):
      """The placebo's: what belongs to the next prompt of the batch."""
      if placebo == "other_prompt":
        return jnp.roll(value, 1, axis=0)
      return value

    if kind == "rollout":
      zero = jnp.zeros_like(main)
      gain = {"shuffled": zero, "uniform": zero}
      span = verdict.answer_span
      if over == "text":
        span = span | verdict.reasoning_span
      for arm, logprob in evidence.scored.items():
        gain[arm] = rewards.rollout_contrast(
          rollout.logprob, logprob, span, tau=tau
        )
        for name, which in (("correct", correct), ("wrong", ~correct)):
          metrics[f"bonus/g_{arm}_{name}"] = masked.masked_mean(
            gain[arm], which
          )
      metrics["bonus/saliency"] = jnp.mean(evidence.saliency)
      bonus = rewards.contrast_bonus(
        correct,
        elsewhere(gain["shuffled"]),
        elsewhere(gain["uniform"]),
        evidence.saliency,
        shuffled_mask=evidence.can_shuffle,
        uniform_mask=evidence.has_apex,
        **by_rollout,
      )
    elif kind == "threshold":
      bonus = rewards.threshold_bonus(
        main,
        elsewhere(evidence.sampled["shuffled"]),
        evidence.can_shuffle,
        **by_threshold,
      )
    elif kind == "margin":
      bonus = jnp.zeros_like(main)
      for arm, value in evidence.sampled.items():
        alpha = {"shuffled": "alpha_t", "uniform": "alpha_c"}[arm]
        margin = rewards.margin_bonus(
          correct,
          rewards.is_correct(elsewhere(value)),
          alpha=by_rollout[alpha],
        )
        bonus += jnp.where(applies[arm][:, None], margin, 0)
    else:
      return jnp.zeros_like(main)
    if placebo == "random":
      bonus = rewards.permuted_bonus(bonus, correct, evidence.rng)
    metrics["bonus/mean"] = jnp.mean(bonus)
    metrics["bonus/share_of_correct"] = masked.masked_mean(bonus > 0, correct)
    return bonus

  @jax.jit
  def reward_step(
    verdict: Verdict, rollout: Rollout, evidence: Evidence, moments
  ) -> Scored:
    component = dict(verdict.component)
    if asks_length:
      component["length"] = rewards.length_inside(
        verdict.length, low=length["low"], high=length["high"]
      )
    for name, factors in sorted(products.items()):
      component = rewards.with_product(component, name=name, factors=factors)
    main = rewards.main_component(component, verdict.applies)
    correct = rewards.is_correct(main)
    metrics = {}
    bonus = contrast_bonus(verdict, rollout, evidence, main, correct, metrics)
    reward = bonus + rewards.combine(component, verdict.applies, weight=weight)
    if length["bonus"]:
      reward += rewards.length_bonus(verdict.length, correct, **length)
    if overlong["weight"]:
      reward += overlong["weight"] * rewards.overlong_penalty(
        verdict.length, max_tokens=max_tokens, buffer=overlong["buffer"]
      )
    spread = grpo.spread_mask(reward)
    metrics |= {
      "reward/mean": jnp.mean(reward),
      "reward/correct": jnp.mean(correct),
      "reward/zero_spread_groups": jnp.mean(~spread),
      "length/mean": jnp.mean(verdict.length),
      "length/reasoning": jnp.mean(
        verdict.length - jnp.sum(verdict.answer_span, axis=-1)
      ),
      "length/unfinished": jnp.mean(~rollout.finished),
    }
    # What a policy may learn in place of looking: to cite, whatever it sees.
    count = jnp.sum(verdict.cited, axis=-1)
    metrics |= {
      "cited/any": jnp.mean(count > 0),
      "cited/keyframes": jnp.mean(count),
      "cited/top": masked.masked_mean(
        jnp.any(verdict.cited & evidence.top[:, None], axis=-1),
        jnp.any(evidence.top, axis=-1)[:, None],
      ),
    }
    for arm, value in evidence.sampled.items():
      metrics[f"arm/{arm}"] = jnp.mean(value)

    kl = jnp.zeros_like(rollout.logprob)
    if evidence.ref_logprob is not None:
      kl = grpo.kl_divergence(
        rollout.logprob, evidence.ref_logprob, kind=kl_settings["kind"]
      )
    if estimator == "reinforce":
      advantage = grpo.reinforce_advantages(
        reward, kl, rollout.mask, **reinforce_settings
      )
    else:
      if kl_settings["weight"]:
        reward += grpo.kl_penalty(
          kl, rollout.mask, kl_weight=kl_settings["weight"]
        )
      batch_std = None
      if advantage_settings["scale"] == "batch":
        fresh = grpo.spread_moments(
          reward,
          kind=evidence.kind,
          ddof=advantage_settings["ddof"],
          num_kinds=num_kinds,
        )
        moments, std = grpo.running_std(moments, fresh, decay=decay)
        batch_std = std[evidence.kind]
      advantage = grpo.group_advantages(
        reward, batch_std=batch_std, **advantage_settings
      )
    scored = Scored(
      main=main,
      correct=correct,
      reward=reward,
      bonus=bonus,
      advantage=advantage,
      spread=spread,
      moments=moments,
      component_mean=rewards.component_means(component, verdict.applies),
      task_mean=rewards.group_means(main, evidence.task, num_groups=num_tasks),
      task_reward=rewards.group_means(
        reward, evidence.task, num_groups=num_tasks
      ),
      metrics=metrics,
    )
    return sharding.constrain(scored, experiment.mesh, _SCORED_RULES)

  return reward_step


def grpo_loss(
  params: Any,
  batch: Experience,
  *,
  model,
  grid,
  banned,
  loss: Mapping[str, Any],
  contrastive: Mapping[str, Any] | None = None,
  entropy_weight: float = 0.0,
  importance_cap: float = 0.0,
  whole: Experience | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Clipped policy loss, KL to the reference, and what the config adds.

  Where `batch` is a part of the batch `whole`, the loss is that part's summand,
  and so is every metric that is not in `LARGEST`.

  Args:
    params: all parameters.
    batch: Experience; completions left out of the loss have an empty mask.
    model: shape of the policy.
    grid: (height, width) of a frame in patches.
    banned: bool[V].
    loss: of `grpo.policy_loss`.
    contrastive: weight, margin, tau, form and kl_weight of the contrastive
      loss [ours]; read where the batch has `other`.
    entropy_weight: nats of mean token entropy to loss; above 0 it explores.
    importance_cap: of the weights that repair the sampler's log-probabilities;
      read where the batch has `old_logprob`.
    whole: the batch of which `batch` is a part.
  """
  whole = whole or batch
  mask = batch.rollout.mask
  counted = whole.rollout.mask & whole.group_mask[:, None, None]
  num_tokens = jnp.sum(counted)
  encoded = batch.encoded
  if encoded is None:
    encoded = policy.encode_frames(model, params, batch.pixel, grid=grid)
  logprob, entropy = policy.completion_logprobs(
    model, params, batch.view, encoded, batch.rollout, banned
  )
  old, weight = batch.rollout.logprob, None
  if batch.old_logprob is not None:
    old = batch.old_logprob
    weight = grpo.truncated_importance(
      old, batch.rollout.logprob, cap=importance_cap
    )
  reference = batch.ref_logprob
  value, metrics = grpo.policy_loss(
    logprob,
    old,
    jax.lax.stop_gradient(logprob) if reference is None else reference,
    batch.advantage,
    mask,
    batch.group_mask,
    weight=weight,
    total=grpo.denominator(counted, aggregate=loss["aggregate"]),
    num_tokens=num_tokens,
    **loss,
  )
  if reference is None:
    del metrics["kl"]  # of a policy with itself
  mean_entropy = masked.masked_mean(
    entropy, mask, total=jnp.sum(whole.rollout.mask)
  )
  if entropy_weight:
    value -= entropy_weight * masked.masked_mean(
      entropy, mask & batch.group_mask[:, None, None], total=num_tokens
    )
  if batch.other is not None:
    added, more = _contrastive_loss(
      params, batch, whole, encoded, logprob, model, banned, **contrastive
    )
    value, metrics = value + added, metrics | more
  return value, metrics | {
    "loss": value,
    "entropy": mean_entropy,
  } | grpo.mismatch(
    logprob,
    batch.rollout.logprob,
    mask,
    cap=importance_cap or 2.0,
    num_tokens=jnp.sum(whole.rollout.mask),
  )


def _contrastive_loss(
  params,
  batch,
  whole,
  encoded,
  logprob,
  model,
  banned,
  *,
  weight,
  kl_weight,
  kl_kind,
  **settings,
):
  """The contrastive loss and its leash on the other view [ours]."""
  other = batch.other
  under = policy.completion_logprobs(
    model, params, other.view, encoded, batch.rollout, banned
  )[0]
  gain, view_gain = (
    rewards.answer_logprob(ours - theirs, other.answer_span)
    for ours, theirs in (
      (logprob, batch.ref_logprob),
      (under, other.ref_logprob),
    )
  )
  group = (batch.group_mask & other.moved)[:, None]
  whole_group = (whole.group_mask & whole.other.moved)[:, None]
  contrast = grpo.contrastive_loss(
    gain,
    view_gain,
    other.select & group,
    total=jnp.sum(whole.other.select & whole_group),
    **settings,
  )
  leash = grpo.kl_loss(
    under,
    other.ref_logprob,
    batch.rollout.mask & group[..., None],
    kind=kl_kind,
    num_tokens=jnp.sum(whole.rollout.mask & whole_group[..., None]),
  )
  return weight * contrast + kl_weight * leash, {
    "contrastive_loss": contrast,
    "kl_other_view": leash,
  }


def make_update_step(
  experiment: experiment_lib.Experiment, stage: experiment_lib.Stage
):
  """The jitted update: state (donated), frozen, Experience -> new, metrics."""
  config = experiment.config
  banned = jnp.asarray(experiment.banned)
  settings = dict(
    loss=dict(config.loss),
    contrastive=dict(config.contrastive),
    entropy_weight=config.rl.entropy_weight,
    importance_cap=config.rl.importance_cap,
  )

  def loss(params, batch, whole):
    return grpo_loss(
      params,
      batch,
      model=experiment.model,
      grid=experiment.grid,
      banned=banned,
      whole=whole,
      **settings,
    )

  return sft.make_update(
    experiment,
    stage,
    loss,
    micro_batches=config.rl.micro_batches,
    largest=LARGEST,
  )
