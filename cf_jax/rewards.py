"""From numbers to rewards: components, bonuses and their sum, in pure JAX.

Axes: `B` videos, `G` completions per video, `M` permutations of a view, `K`
keyframes, `C` completion slots.

What the completions say was turned into numbers by `data/answers.py`. The
formulas of the contrast bonus and of saliency are ours; they are not taken from
the ChronoForge-RL paper.

A batch may hold questions of different kinds. Each has its own components: what
does not apply to a sample is no part of its reward and of no mean.
"""

from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp

from cf_jax import masked


def combine(
  component: Mapping[str, jax.Array],
  applies: Mapping[str, jax.Array] | None = None,
  *,
  weight: Mapping[str, float],
) -> jax.Array:
  """`sum_j weight_j * component_j` over the components a sample has.

  The sums of the neighbouring systems are weights: 1 for format, iou, accuracy
  and event_recall (arXiv 2504.06958), 0.5 for accuracy and iou (2506.01908),
  2 for selected_accuracy, 1 for index and format, 0.2 for length (2505.15447).

  Args:
    component: name -> float[B, G]; one without a weight is only logged.
    applies: name -> bool[B] samples that have the component; None means all,
      and so does a name that is not there.
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

  def term(name):
    value = component[name].astype(jnp.float32)
    if applies is None or name not in applies:
      return value
    return jnp.where(applies[name][:, None], value, 0)

  return sum(factor * term(name) for name, factor in sorted(weight.items()))


def component_means(
  component: Mapping[str, jax.Array],
  applies: Mapping[str, jax.Array] | None = None,
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """The mean of every component over the samples that have it.

  Args:
    component: name -> float[B, G].
    applies: as in `combine`.

  Returns:
    name -> float32[], 0 where no sample of the batch has it; int32[] samples
    that do.
  """
  made = {}
  for name, value in component.items():
    has = jnp.ones(len(value), bool)
    if applies is not None and name in applies:
      has = applies[name]
    made[name] = masked.masked_mean(value, has[:, None]), jnp.sum(has)
  return made


def group_means(
  value: jax.Array, group: jax.Array, *, num_groups: int
) -> tuple[jax.Array, jax.Array]:
  """The mean of a number within every kind of question: reward by task.

  Args:
    value: float[B, G].
    group: int32[B] in [0, num_groups).
    num_groups: kinds of a run.

  Returns:
    float32[num_groups], 0 where a kind is not in the batch; int32[num_groups]
    samples of each kind.
  """
  member = group == jnp.arange(num_groups)[:, None]
  every = jnp.broadcast_to(value, (num_groups, *value.shape))
  mean = masked.masked_mean(every, member[..., None], axis=(1, 2))
  return mean, jnp.sum(member, axis=1)


def main_component(
  component: Mapping[str, jax.Array],
  applies: Mapping[str, jax.Array] | None = None,
  *,
  order: Sequence[str] = ("accuracy", "iou", "event_recall"),
) -> jax.Array:
  """What decides whether a rollout is right: a sample's first component.

  Args:
    component: name -> float[B, G].
    applies: as in `combine`.
    order: names, the most telling first; those not in `component` are skipped.

  Returns:
    float32[B, G]; 0 where a sample has none of them.

  Raises:
    ValueError: none of the names is there.
  """
  names = [name for name in order if name in component]
  if not names:
    raise ValueError(
      f"none of {list(order)} is among the components {sorted(component)};"
      " change config.answers.components"
    )
  made = jnp.zeros_like(component[names[0]])
  for name in reversed(names):
    value = component[name]
    if applies is not None and name in applies:
      made = jnp.where(applies[name][:, None], value, made)
    else:
      made = value
  return made


def with_product(
  component: Mapping[str, jax.Array], *, name: str, factors: Sequence[str]
) -> dict[str, jax.Array]:
  """The components and the product of some of them.

  ViaRL's accuracy counts only with a readable frame list: name
  "selected_accuracy", factors ("accuracy", "index") (arXiv 2505.15447).

  Args:
    component: name -> float[B, G].
    name: of the product.
    factors: names of what is multiplied.

  Raises:
    ValueError: a factor that is not there.
  """
  unknown = sorted(set(factors) - set(component))
  if unknown or not factors:
    raise ValueError(
      f"factors {unknown or 'none'}, but the components are"
      f" {sorted(component)}; change config.reward.products"
    )
  product = 1.0
  for factor in factors:
    product = product * component[factor]
  return {**component, name: product}


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
  span: jax.Array,
  *,
  tau: float,
  low: float = 0.0,
  high: float = 1.0,
) -> jax.Array:
  """How much likelier a rollout's words are with the keyframes in order [ours].

      g_i = clip(mean over the span's tokens of
                 (log pi(o_i | K) - logmeanexp_m log pi(o_i | V_m)) / tau,
                 low, high)

  The tokens are rollout i's own: nothing is generated under the other view. No
  gradient flows through g.

  Args:
    logprob: float32[B, G, C] of the completions under the keyframes in order.
    view_logprob: float32[B, M, G, C] of the same under M draws of the view.
    span: bool[B, G, C] tokens that are compared: those of the answer, or of
      the reasoning too. After a reasoning that says what was seen, the answer
      follows from the text, and its tokens alone say nothing.
    tau: nats at which the contrast saturates.
    low: lower clip.
    high: upper clip.

  Returns:
    float32[B, G]; 0 where the span is empty.
  """
  chex.assert_rank([logprob, view_logprob], [3, 4])
  chex.assert_equal_shape([logprob, span, view_logprob[:, 0]])
  count = view_logprob.shape[1]
  view = jax.nn.logsumexp(view_logprob, axis=1) - jnp.log(count)
  gain = masked.masked_mean(logprob - view, span, axis=-1) / tau
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
  applies: jax.Array | None = None,
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
    applies: bool[B] False for images and where nothing can be shuffled; None
      means all.
    mu: 0.8 in the public code, 1.0 in the later paper.
    bonus: 0.3 in both.
    min_accuracy: above it a rollout is correct.

  Returns:
    float32[B, G].
  """
  better = jnp.mean(accuracy, axis=1) >= mu * jnp.mean(view_accuracy, axis=1)
  if applies is not None:
    better = better & applies
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


def permuted_bonus(
  bonus: jax.Array, correct: jax.Array, rng: jax.Array
) -> jax.Array:
  """A placebo: the bonuses of a batch, dealt anew to its correct rollouts.

  Their number, their sizes and who can get one stay; what is lost is the link
  between a bonus and how its rollout came to its answer.

  Args:
    bonus: float32[B, G]; only that of correct rollouts counts.
    correct: bool[B, G].
    rng: key.

  Returns:
    float32[B, G], 0 where not correct.
  """
  flat, right = bonus.reshape(-1), correct.reshape(-1)
  drawn = jax.random.uniform(rng, flat.shape)
  # Both orders put the correct ones first: one as they stand, one shuffled.
  order = jnp.argsort(~right, stable=True)
  shuffled = jnp.argsort(jnp.where(right, drawn, 2.0))
  dealt = jnp.zeros_like(flat).at[order].set(flat[shuffled])
  return jnp.where(correct, dealt.reshape(bonus.shape), 0)


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
  inside = length_inside(length, low=low, high=high) > 0
  return jnp.where(correct & several & inside, jnp.float32(bonus), 0)


def length_inside(
  length: jax.Array, *, low: int = 80, high: int = 512
) -> jax.Array:
  """ViaRL's length reward, as a component: right or wrong (arXiv 2505.15447).

  Args:
    length: int32[B, G] completion tokens.
    low: fewest tokens.
    high: most tokens.

  Returns:
    float32[B, G]: 1 inside, else 0; its weight there is 0.2.
  """
  return ((length >= low) & (length <= high)).astype(jnp.float32)


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


def weighted_deletion_saliency(
  logprob: jax.Array,
  without_frame: jax.Array,
  cited: jax.Array,
  saliency: jax.Array,
  mask: jax.Array,
) -> jax.Array:
  """The same by single deletions, each weighted by TAD's saliency [ours].

      e_k = max(l_K - l_{K minus k}, 0)        w_k = saliency_k / max saliency
      clip(sum over cited of w_k e_k - sum over uncited of w_k e_k, 0, 1)

  with equally many of the most salient uncited. Sums, not means: with a mean,
  citing the best frame alone would beat citing all the evidence. What a sum
  invites, citing everything, is ruled out: more than K / 2 citations earn 0.

  Args:
    logprob: float32[B, G] `answer_logprob` under all keyframes.
    without_frame: float32[B, G, K] the same without one keyframe.
    cited: bool[B, G, K].
    saliency: float[B, K] of the keyframes, by TAD.
    mask: bool[B, K] keyframes that exist.

  Returns:
    float32[B, G] in [0, 1]; no gradient flows through it.
  """
  cited = cited & mask[:, None]
  count = jnp.sum(cited, axis=-1)
  allowed = (count > 0) & (2 * count <= jnp.sum(mask, axis=-1)[:, None])
  largest = jnp.max(jnp.where(mask, saliency, 0), axis=-1, keepdims=True)
  weight = saliency / jnp.where(largest > 0, largest, 1)
  worth = jnp.maximum(logprob[..., None] - without_frame, 0) * weight[:, None]
  gain = masked.masked_sum(worth, cited, axis=-1) - masked.masked_sum(
    worth, salient_uncited(cited, saliency, mask), axis=-1
  )
  gain = jnp.where(allowed, jnp.clip(gain, 0, 1), 0)
  return jax.lax.stop_gradient(gain)
