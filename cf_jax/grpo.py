"""Group relative policy optimisation: advantages, KL, clipped losses.

Axes: `B` videos, `G` completions per video, `C` completion slots, `V`
vocabulary. Everything is float32; a mask is True where real.

GRPO is arXiv 2402.03300; the repairs are named where they stand. Every loss
divides by a denominator that can be handed in, so that shards and
micro-batches add up to the loss of the global batch.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from cf_jax import masked

# Not -inf: 0 * inf is NaN in an entropy and in its gradient.
_BANNED_LOGIT = -1e30

Aggregate = Literal["sequence_mean", "token_mean", "constant"]
Baseline = Literal["mean", "leave_one_out"]
KLKind = Literal["k1", "k2", "k3"]
Ratio = Literal["token", "sequence"]
Scale = Literal["none", "group", "batch"]


def ban(logits: jax.Array, banned: jax.Array) -> jax.Array:
  """Logits in float32 with the banned ids out of reach.

  Args:
    logits: float[..., V].
    banned: bool[V].

  Returns:
    float32[..., V]; a banned id has probability 0 exactly.
  """
  return jnp.where(banned, _BANNED_LOGIT, logits.astype(jnp.float32))


def token_logprobs(
  logits: jax.Array, token: jax.Array, banned: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each token and entropy of its distribution, in nats.

  Args:
    logits: float[..., V] of the slots that predict the tokens.
    token: int32[...].
    banned: bool[V] ids left out of the softmax, as in the sampler.

  Returns:
    float32[...] and float32[...].
  """
  logits = ban(logits, banned)
  norm = jax.nn.logsumexp(logits, axis=-1)
  chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
  prob = jnp.exp(logits - norm[..., None])
  entropy = norm - jnp.sum(prob * jnp.where(banned, 0, logits), axis=-1)
  return chosen - norm, entropy


def pooled_std(
  reward: jax.Array, mask: jax.Array | None = None, *, ddof: int
) -> jax.Array:
  """Within-group standard deviation, pooled over the groups of a batch.

  `sqrt(sum_bg (r_bg - mean_b)^2 / sum_b (n_b - ddof))`.

  Args:
    reward: float[B, G].
    mask: bool[B, G]; None means all real.
    ddof: 0 or 1 degrees of freedom taken from every group.

  Returns:
    float32[]; 0 where no group varies.
  """
  mask = jnp.ones_like(reward, dtype=bool) if mask is None else mask
  mean = masked.masked_mean(reward, mask, axis=1)[:, None]
  count = jnp.maximum(jnp.sum(mask, axis=1) - ddof, 0)
  var = masked.masked_sum((reward - mean) ** 2, mask)
  var = var / jnp.maximum(jnp.sum(count), 1)
  return jnp.where(var > 0, jnp.sqrt(jnp.where(var > 0, var, 1)), 0)


def group_advantages(
  reward: jax.Array,
  mask: jax.Array | None = None,
  *,
  scale: Scale,
  baseline: Baseline,
  ddof: int,
  eps: float,
  batch_std: jax.Array | None = None,
) -> jax.Array:
  """Advantage of each completion within its group.

      A_bg = (r_bg - baseline_b) / (scale_b + eps)

  `scale="group"` is arXiv 2402.03300 (torch's std has ddof 1), "none" is
  arXiv 2503.20783. With rewards of two values, dividing by the group's std
  cancels a bonus that is equal for all correct completions, up to eps:
  KF-GRPO's default is therefore "none".

  Args:
    reward: float[B, G].
    mask: bool[B, G] completions that count; None means all.
    scale: "none" (divides by 1, no eps), "group" or "batch" (pooled
      within-group std).
    baseline: the group's "mean", or the mean of the others ("leave_one_out",
      arXiv 2402.14740; a completion alone in its group gets 0).
    ddof: of the standard deviations.
    eps: added to the standard deviation.
    batch_std: float[] or float[B] for scale "batch": a running std (one per
      reward type, say) in place of this batch's own.

  Returns:
    float32[B, G], 0 where masked. No gradient flows through it.

  Raises:
    ValueError: an unknown scale or baseline.
  """
  chex.assert_rank(reward, 2)
  mask = jnp.ones_like(reward, dtype=bool) if mask is None else mask
  chex.assert_equal_shape([reward, mask])
  reward = jax.lax.stop_gradient(reward.astype(jnp.float32))
  advantage = reward - masked.masked_mean(reward, mask, axis=1)[:, None]
  if baseline == "leave_one_out":
    count = jnp.sum(mask, axis=1)[:, None]
    advantage = advantage * count / jnp.maximum(count - 1, 1)
  elif baseline != "mean":
    raise ValueError(
      f"baseline must be 'mean' or 'leave_one_out', got {baseline!r}; change"
      " config.advantage.baseline"
    )
  if scale == "group":
    std = masked.masked_std(reward, mask, axis=1, ddof=ddof)
    advantage = advantage / (std[:, None] + eps)
  elif scale == "batch":
    if batch_std is None:
      batch_std = pooled_std(reward, mask, ddof=ddof)
    std = jnp.broadcast_to(batch_std, reward.shape[:1])
    advantage = advantage / (std[:, None] + eps)
  elif scale != "none":
    raise ValueError(
      f"scale must be 'none', 'group' or 'batch', got {scale!r}; change"
      " config.advantage.scale"
    )
  return jnp.where(mask, advantage, 0)


def spread_mask(
  reward: jax.Array, mask: jax.Array | None = None, *, tol: float = 1e-6
) -> jax.Array:
  """bool[B]: groups whose rewards differ; the others teach nothing.

  Args:
    reward: float[B, G].
    mask: bool[B, G]; None means all real.
    tol: differences up to this are rounding.
  """
  mask = jnp.ones_like(reward, dtype=bool) if mask is None else mask
  high = jnp.max(jnp.where(mask, reward, -jnp.inf), axis=1)
  low = jnp.min(jnp.where(mask, reward, jnp.inf), axis=1)
  return high - low > tol


def overlong_filter(mask: jax.Array, finished: jax.Array) -> jax.Array:
  """Takes completions that the length limit cut off out of the loss.

  DAPO (arXiv 2503.14476), 3.4.

  Args:
    mask: bool[B, G, C].
    finished: bool[B, G].

  Returns:
    bool[B, G, C].
  """
  return mask & finished[..., None]


def kl_divergence(
  logprob: jax.Array,
  ref_logprob: jax.Array,
  *,
  kind: KLKind,
  max_log_ratio: float = 10.0,
) -> jax.Array:
  """Estimate of KL(policy || reference) at every token.

  With `d = clip(ref_logprob - logprob, -max_log_ratio, max_log_ratio)`:
  k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d
  (http://joschu.net/blog/kl-approx.html).

  Args:
    logprob: float32[...] of the policy.
    ref_logprob: float32[...] of the frozen reference.
    kind: "k1", "k2" or "k3".
    max_log_ratio: nats beyond which the log-ratio is clamped.

  Returns:
    float32[...].

  Raises:
    ValueError: an unknown kind.
  """
  diff = jnp.clip(ref_logprob - logprob, -max_log_ratio, max_log_ratio)
  if kind == "k1":
    return -diff
  if kind == "k2":
    return 0.5 * diff**2
  if kind == "k3":
    return jnp.expm1(diff) - diff
  raise ValueError(
    f"kind must be 'k1', 'k2' or 'k3', got {kind!r}; change config.loss.kl_kind"
  )


def truncated_importance(
  logprob: jax.Array, sampler_logprob: jax.Array, *, cap: float
) -> jax.Array:
  """`min(exp(logprob - sampler_logprob), cap)`, a constant of the loss.

  Repairs a sampler whose log-probabilities differ from the trainer's.

  Args:
    logprob: float32[...] of the trainer, at the sampled parameters.
    sampler_logprob: float32[...] at which the tokens were drawn.
    cap: largest weight.
  """
  ratio = jnp.exp(jnp.minimum(logprob - sampler_logprob, jnp.log(cap)))
  return jax.lax.stop_gradient(ratio)


def denominator(mask: jax.Array, *, aggregate: Aggregate) -> jax.Array:
  """What `policy_loss` divides by; sums over shards and micro-batches.

  Args:
    mask: bool[B, G, C] tokens of the loss, left-out groups excluded.
    aggregate: as in `policy_loss`.

  Returns:
    float32[]: completions ("sequence_mean"), tokens ("token_mean"), or
    completions times C ("constant").

  Raises:
    ValueError: an unknown aggregate.
  """
  if aggregate == "token_mean":
    return jnp.sum(mask, dtype=jnp.float32)
  completions = jnp.sum(jnp.any(mask, axis=-1), dtype=jnp.float32)
  if aggregate == "sequence_mean":
    return completions
  if aggregate == "constant":
    return completions * mask.shape[-1]
  raise ValueError(
    "aggregate must be 'sequence_mean', 'token_mean' or 'constant', got"
    f" {aggregate!r}; change config.loss.aggregate"
  )


def policy_loss(
  logprob: jax.Array,
  old_logprob: jax.Array,
  ref_logprob: jax.Array,
  advantage: jax.Array,
  mask: jax.Array,
  group_mask: jax.Array | None = None,
  *,
  clip_low: float,
  clip_high: float,
  aggregate: Aggregate,
  kl_weight: float,
  kl_kind: KLKind,
  ratio: Ratio = "token",
  max_log_ratio: float = 10.0,
  weight: jax.Array | None = None,
  total: jax.Array | None = None,
  num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Clipped policy loss plus KL to the reference.

      l_t = -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)
            + kl_weight * KL_t

  `rho_t = exp(logprob_t - old_logprob_t)`; with ratio "sequence" it is the
  exponential of the mean over the completion's tokens, for every token alike
  (GSPO, arXiv 2507.18071). clip_high > clip_low is DAPO's clip-higher.

  Aggregates: "sequence_mean" is the mean over completions of their token
  means (GRPO), "token_mean" the mean over all tokens (DAPO), "constant" the
  sum over completions * C (arXiv 2503.20783).

  Args:
    logprob: float32[B, G, C] of the policy being trained.
    old_logprob: float32[B, G, C] of the policy that sampled.
    ref_logprob: float32[B, G, C] of the reference.
    advantage: float32[B, G], or [B, G, C] for one per token.
    mask: bool[B, G, C] completion tokens.
    group_mask: bool[B] groups in the loss; None means all.
    clip_low: how far a ratio may fall below 1.
    clip_high: how far it may rise above 1.
    aggregate: how tokens become one number.
    kl_weight: beta.
    kl_kind: as in `kl_divergence`.
    ratio: "token" or "sequence".
    max_log_ratio: nats beyond which log-ratios are clamped.
    weight: float32[B, G, C] constants in front of the policy term
      (`truncated_importance`); None means 1.
    total: float32[] `denominator` of the GLOBAL batch where this is a shard or
      micro-batch; None takes it from this call.
    num_tokens: the same for the metrics that are means over tokens.

  Returns:
    float32[] and metrics: policy_loss, kl, clip_fraction, ratio_mean,
    ratio_max, log_ratio_abs (all as float32[]). With `total` and `num_tokens`
    all but ratio_max add up over the parts of a batch.

  Raises:
    ValueError: an unknown ratio, aggregate or kl_kind.
  """
  chex.assert_rank(logprob, 3)
  chex.assert_equal_shape([logprob, old_logprob, ref_logprob, mask])
  if group_mask is not None:
    mask = mask & group_mask[:, None, None]
  if advantage.ndim == 2:
    advantage = advantage[..., None]
  advantage = jax.lax.stop_gradient(advantage)
  # Padded slots may hold anything: cut them off before exp, or 0 * inf is NaN.
  logprob, old_logprob, ref_logprob = (
    jnp.where(mask, value, 0) for value in (logprob, old_logprob, ref_logprob)
  )
  log_ratio = logprob - jax.lax.stop_gradient(old_logprob)
  if ratio == "sequence":
    log_ratio = masked.masked_mean(log_ratio, mask, axis=-1)[..., None]
    log_ratio = jnp.broadcast_to(log_ratio, logprob.shape)
  elif ratio != "token":
    raise ValueError(
      f"ratio must be 'token' or 'sequence', got {ratio!r}; change"
      " config.loss.ratio"
    )
  rho = jnp.exp(jnp.clip(log_ratio, -max_log_ratio, max_log_ratio))
  clipped = jnp.clip(rho, 1 - clip_low, 1 + clip_high)
  surrogate = -jnp.minimum(rho * advantage, clipped * advantage)
  if weight is not None:
    surrogate = surrogate * jax.lax.stop_gradient(weight)
  kl = kl_divergence(
    logprob,
    jax.lax.stop_gradient(ref_logprob),
    kind=kl_kind,
    max_log_ratio=max_log_ratio,
  )
  if total is None:
    total = denominator(mask, aggregate=aggregate)

  def mean(value):
    return masked.masked_mean(value, mask, total=num_tokens)

  def reduce(value):
    if aggregate == "sequence_mean":
      summed = jnp.sum(masked.masked_mean(value, mask, axis=-1))
    else:
      summed = masked.masked_sum(value, mask)
    return summed / jnp.maximum(total, 1)

  loss = reduce(surrogate)
  divergence = reduce(kl)
  cut = jnp.where(advantage > 0, rho > 1 + clip_high, rho < 1 - clip_low)
  metrics = {
    "policy_loss": loss,
    "kl": divergence,
    "clip_fraction": mean(cut & (advantage != 0)),
    "ratio_mean": mean(rho),
    "ratio_max": jnp.max(jnp.where(mask, rho, 0)),
    "log_ratio_abs": mean(jnp.abs(log_ratio)),
  }
  return loss + kl_weight * divergence, jax.lax.stop_gradient(metrics)


def contrastive_loss(
  gain: jax.Array,
  view_gain: jax.Array,
  select: jax.Array,
  *,
  margin: float,
  tau: float,
) -> jax.Array:
  """Pushes an answer up under one view against another [ours].

      mean over selected of -log sigmoid((gain - view_gain - margin) / tau)

  The formula is ours, not the ChronoForge-RL paper's.

  Args:
    gain: float32[B, G] answer log-probability of the policy minus that of the
      reference, under the keyframes.
    view_gain: float32[B, G] the same under the other view.
    select: bool[B, G] correct completions of groups where the keyframes help.
    margin: nats.
    tau: temperature, nats.

  Returns:
    float32[].
  """
  chex.assert_equal_shape([gain, view_gain, select])
  score = (gain - view_gain - margin) / tau
  return masked.masked_mean(-jax.nn.log_sigmoid(score), select)
