"""From numbers to rewards: components, bonuses and their sum, in pure JAX.

Axes: `B` videos, `G` completions per video, `M` permutations of a view, `K`
keyframes, `C` completion slots.

What the completions say was turned into numbers by `data/answers.py`. The
formulas of the contrast bonus and of saliency are ours; they are not taken from
the ChronoForge-RL paper.
"""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp

from cf_jax import masked


def combine(
  component: Mapping[str, jax.Array], *, weight: Mapping[str, float]
) -> jax.Array:
  """`sum_j weight_j * component_j`.

  Args:
    component: name -> float[B, G]; one without a weight is only logged.
    weight: name -> factor.

  Returns:
    float32[B, G].

  Raises:
    ValueError: a weight for a component that is not there, or no weight.
  """
  unknown = sorted(set(weight) - set(component))
  if unknown or not weight:
    raise ValueError(
      f"weights for {unknown or 'nothing'}, but the components are"
      f" {sorted(component)}; change config.reward.weight"
    )
  return sum(
    factor * component[name].astype(jnp.float32)
    for name, factor in sorted(weight.items())
  )


def is_correct(accuracy: jax.Array, *, min_accuracy: float = 0.1) -> jax.Array:
  """bool[B, G]: accuracy above 0.1 counts as right (arXiv 2503.21776)."""
  return accuracy > min_accuracy


def answer_logprob(logprob: jax.Array, answer_span: jax.Array) -> jax.Array:
  """Mean log-probability of the answer's tokens, in nats a token.

  Args:
    logprob: float32[..., C] of the completion's tokens under one view.
    answer_span: bool[..., C] tokens inside the answer tag.

  Returns:
    float32[...]; 0 where there is no answer.
  """
  return masked.masked_mean(logprob, answer_span, axis=-1)


def rollout_contrast(
  logprob: jax.Array,
  view_logprob: jax.Array,
  answer_span: jax.Array,
  *,
  tau: float,
  low: float = 0.0,
  high: float = 1.0,
) -> jax.Array:
  """How much likelier a rollout's answer is with the keyframes in order [ours].

      g_i = clip(mean over answer tokens of
                 (log pi(o_i | K) - logmeanexp_m log pi(o_i | V_m)) / tau,
                 low, high)

  The tokens are rollout i's own: nothing is generated under the other view. No
  gradient flows through g.

  Args:
    logprob: float32[B, G, C] of the completions under the keyframes in order.
    view_logprob: float32[B, M, G, C] of the same under M draws of the view.
    answer_span: bool[B, G, C] tokens inside the answer tag.
    tau: nats at which the contrast saturates.
    low: lower clip.
    high: upper clip.

  Returns:
    float32[B, G]; 0 where the rollout has no answer.
  """
  chex.assert_rank([logprob, view_logprob], [3, 4])
  chex.assert_equal_shape([logprob, answer_span, view_logprob[:, 0]])
  count = view_logprob.shape[1]
  view = jax.nn.logsumexp(view_logprob, axis=1) - jnp.log(count)
  gain = masked.masked_mean(logprob - view, answer_span, axis=-1) / tau
  return jax.lax.stop_gradient(jnp.clip(gain, low, high))


def contrast_bonus(
  correct: jax.Array,
  g_shuffled: jax.Array,
  g_uniform: jax.Array,
  saliency: jax.Array | None = None,
  *,
  alpha_t: float,
  alpha_c: float,
  gamma: float,
  shuffled_mask: jax.Array | None = None,
  uniform_mask: jax.Array | None = None,
) -> jax.Array:
  """KF-GRPO's bonus of a correct rollout [ours].

      c_i * (alpha_t * g_i^S + alpha_c * g_i^U) * (1 + gamma * s_i)

  Args:
    correct: bool[B, G] c.
    g_shuffled: float32[B, G] contrast to the shuffled keyframes.
    g_uniform: float32[B, G] contrast to uniform frames.
    saliency: float32[B, G] s in [0, 1]; None means 0.
    alpha_t: weight of temporal order.
    alpha_c: weight of frame content.
    gamma: weight of the cited evidence.
    shuffled_mask: bool[B] False where there are fewer than 2 keyframes.
    uniform_mask: bool[B] False where the selector itself was uniform.

  Returns:
    float32[B, G].
  """
  chex.assert_equal_shape([correct, g_shuffled, g_uniform])
  if shuffled_mask is not None:
    g_shuffled = jnp.where(shuffled_mask[:, None], g_shuffled, 0)
  if uniform_mask is not None:
    g_uniform = jnp.where(uniform_mask[:, None], g_uniform, 0)
  bonus = alpha_t * g_shuffled + alpha_c * g_uniform
  if saliency is not None:
    bonus = bonus * (1 + gamma * saliency)
  return jnp.where(correct, bonus, 0)


def threshold_bonus(
  accuracy: jax.Array,
  view_accuracy: jax.Array,
  *,
  mu: float,
  bonus: float = 0.3,
  min_accuracy: float = 0.1,
) -> jax.Array:
  """T-GRPO's bonus (arXiv 2503.21776): one rule for the whole group.

  `bonus` for every correct rollout of a group whose mean accuracy is at least
  `mu` times that of its shuffled rollouts.

  Args:
    accuracy: float[B, G] of the ordered rollouts.
    view_accuracy: float[B, G'] of rollouts sampled under the other view.
    mu: 0.8 in the public code, 1.0 in the later paper.
    bonus: 0.3 in both.
    min_accuracy: above it a rollout is correct.

  Returns:
    float32[B, G].
  """
  better = jnp.mean(accuracy, axis=1) >= mu * jnp.mean(view_accuracy, axis=1)
  correct = is_correct(accuracy, min_accuracy=min_accuracy)
  return jnp.where(correct & better[:, None], jnp.float32(bonus), 0)


def margin_bonus(
  correct: jax.Array, view_correct: jax.Array, *, alpha: float
) -> jax.Array:
  """`c_i * alpha * (p_K without i - p_V)`, unclipped [ours].

  Leaving rollout i out keeps its own luck out of its bonus; like every bonus
  that is equal within a group, it only re-weights prompts.

  Args:
    correct: bool[B, G] rollouts under the keyframes, G >= 2.
    view_correct: bool[B, G'] rollouts under the other view.
    alpha: weight.

  Returns:
    float32[B, G].
  """
  right = correct.astype(jnp.float32)
  others = (jnp.sum(right, axis=1, keepdims=True) - right) / (
    right.shape[1] - 1
  )
  view = jnp.mean(view_correct.astype(jnp.float32), axis=1, keepdims=True)
  return right * alpha * (others - view)


def length_bonus(
  length: jax.Array,
  correct: jax.Array,
  *,
  low: int = 320,
  high: int = 512,
  bonus: float = 0.2,
) -> jax.Array:
  """Video-R1's length bonus (arXiv 2503.21776).

  For correct rollouts of `low` to `high` tokens, where more than one rollout of
  the group is correct.

  Args:
    length: int32[B, G] completion tokens.
    correct: bool[B, G].
    low: fewest tokens.
    high: most tokens.
    bonus: its size.

  Returns:
    float32[B, G].
  """
  several = jnp.sum(correct, axis=1, keepdims=True) > 1
  inside = (length >= low) & (length <= high)
  return jnp.where(correct & several & inside, jnp.float32(bonus), 0)


def overlong_penalty(
  length: jax.Array, *, max_tokens: int, buffer: int
) -> jax.Array:
  """DAPO's soft penalty (arXiv 2503.14476, eq. 13), in [-1, 0].

  0 up to `max_tokens - buffer`, then linear down to -1 at `max_tokens`.

  Args:
    length: int32[B, G] completion tokens.
    max_tokens: the limit.
    buffer: tokens before the limit in which the penalty grows.
  """
  over = (length - (max_tokens - buffer)) / buffer
  return -jnp.clip(over, 0, 1).astype(jnp.float32)


def evidence_saliency(cited: jax.Array, evidence: jax.Array) -> jax.Array:
  """F1 between the keyframes a rollout cites and the annotated ones [ours].

  Neither "cite the best one" nor "cite all" beats citing the evidence.

  Args:
    cited: bool[B, G, K].
    evidence: bool[B, K] keyframes inside the annotated evidence.

  Returns:
    float32[B, G] in [0, 1]; 0 where nothing is cited or annotated.
  """
  evidence = evidence[:, None]
  both = jnp.sum(cited & evidence, axis=-1)
  either = jnp.sum(cited, axis=-1) + jnp.sum(evidence, axis=-1)
  return 2.0 * both / jnp.maximum(either, 1)


def salient_uncited(
  cited: jax.Array, saliency: jax.Array, mask: jax.Array
) -> jax.Array:
  """The most salient keyframes a rollout does not cite, as many as it cites.

  Args:
    cited: bool[B, G, K].
    saliency: float[B, K] of the keyframes, by TAD.
    mask: bool[B, K] keyframes that exist.

  Returns:
    bool[B, G, K]; fewer are chosen where not enough are left. Of equally
    salient ones the earliest are.
  """
  free = mask[:, None] & ~cited
  score = jnp.where(free, saliency[:, None], -jnp.inf)
  rank = jnp.argsort(jnp.argsort(-score, axis=-1, stable=True), axis=-1)
  count = jnp.sum(cited & mask[:, None], axis=-1, keepdims=True)
  return free & (rank < count)


def deletion_saliency(
  without_cited: jax.Array,
  without_uncited: jax.Array,
  cited: jax.Array,
  mask: jax.Array,
) -> jax.Array:
  """What the cited keyframes are worth to the answer, by deletion [ours].

      clip((l_K - l_{K minus cited}) - (l_K - l_{K minus uncited}), 0, 1)

  with equally many of the most salient uncited (`salient_uncited`); l_K
  cancels and is not asked for. More than K / 2 citations earn 0, and so does
  none.

  Args:
    without_cited: float32[B, G] `answer_logprob` without the cited keyframes.
    without_uncited: float32[B, G] the same without the uncited ones.
    cited: bool[B, G, K].
    mask: bool[B, K] keyframes that exist.

  Returns:
    float32[B, G] in [0, 1]; no gradient flows through it.
  """
  count = jnp.sum(cited & mask[:, None], axis=-1)
  allowed = (count > 0) & (2 * count <= jnp.sum(mask, axis=-1)[:, None])
  gain = jnp.clip(without_uncited - without_cited, 0, 1)
  return jax.lax.stop_gradient(jnp.where(allowed, gain, 0))
