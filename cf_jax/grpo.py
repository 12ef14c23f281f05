"""Group relative policy optimisation: advantages, KL, clipped losses.

Axes: `B` videos, `G` completions per video, `C` completion slots, `V`
vocabulary, `N` kinds of reward. Everything is float32 (or float64, where it is
given such); a mask is True where real.

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
Baseline = Literal["mean", "leave_one_out", "none"]
ContrastForm = Literal["plain", "stop_gradient"]
KLKind = Literal["k1", "k2", "k3"]
Ratio = Literal["token", "sequence"]
Scale = Literal["none", "group", "batch"]


def _widen(value: jax.Array) -> jax.Array:
  return value.astype(jnp.promote_types(value.dtype, jnp.float32))


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


def spread_moments(
  reward: jax.Array,
  mask: jax.Array | None = None,
  kind: jax.Array | None = None,
  *,
  ddof: int,
  num_kinds: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Squared deviations within groups and their degrees of freedom, by kind.

      S_n = sum over groups b of kind n of sum_g (r_bg - mean_b)^2
      D_n = sum over groups b of kind n of max(count_b - ddof, 0)

  Both add up over shards, micro-batches and steps.

  Args:
    reward: float[B, G].
    mask: bool[B, G]; None means all real.
    kind: int32[B] in [0, num_kinds), the kind of reward; None means one kind.
    ddof: 0 or 1 degrees of freedom taken from every group.
    num_kinds: N.

  Returns:
    float32[N] and float32[N].
  """
  mask = jnp.ones_like(reward, dtype=bool) if mask is None else mask
  reward = jax.lax.stop_gradient(_widen(reward))
  mean = masked.masked_mean(reward, mask, axis=1)[:, None]
  square = masked.masked_sum((reward - mean) ** 2, mask, axis=1)
  free = jnp.maximum(jnp.sum(mask, axis=1) - ddof, 0).astype(square.dtype)
  kind = jnp.zeros(reward.shape[0], jnp.int32) if kind is None else kind
  member = (kind == jnp.arange(num_kinds)[:, None]).astype(square.dtype)
  return member @ square, member @ free


def running_std(
  state: tuple[jax.Array, jax.Array],
  moments: tuple[jax.Array, jax.Array],
  *,
  decay: float,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
  """Pooled within-group std over the batches so far, forgetting old ones.

      S <- decay * S + S_batch,  D <- decay * D + D_batch,  std = sqrt(S / D)

  Args:
    state: S and D, float32[N] each; zeros at the start. It has to survive a
      restart.
    moments: `spread_moments` of the batch, before it is used.
    decay: in [0, 1]; 0 takes this batch alone, 1 never forgets.

  Returns:
    The new state; float32[N] std, 0 where nothing has varied. `std[kind]` is
    the `batch_std` of `group_advantages`.
  """
  square, free = (decay * old + new for old, new in zip(state, moments))
  var = square / jnp.where(free > 0, free, 1)
  std = jnp.where(var > 0, jnp.sqrt(jnp.where(var > 0, var, 1)), 0)
  return (square, free), std


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
  moments = spread_moments(reward, mask, ddof=ddof)
  start = (jnp.zeros_like(moments[0]), jnp.zeros_like(moments[1]))
  return running_std(start, moments, decay=0.0)[1][0]


def _minus_baseline(
  reward: jax.Array, mask: jax.Array, *, baseline: Baseline
) -> jax.Array:
  """float32[B, G]: reward minus what its group leads one to expect."""
  if baseline == "none":
    return reward
  advantage = reward - masked.masked_mean(reward, mask, axis=1)[:, None]
  if baseline == "leave_one_out":
    count = jnp.sum(mask, axis=1)[:, None]
    return advantage * count / jnp.maximum(count - 1, 1)
  if baseline != "mean":
    raise ValueError(
      "baseline must be 'mean', 'leave_one_out' or 'none', got"
      f" {baseline!r}; change config.advantage.baseline"
    )
  return advantage


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
    baseline: the group's "mean", the mean of the others ("leave_one_out",
      arXiv 2402.14740; a completion alone in its group gets 0), or "none".
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
  reward = jax.lax.stop_gradient(_widen(reward))
  advantage = _minus_baseline(reward, mask, baseline=baseline)
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


def token_returns(
  reward: jax.Array,
  kl: jax.Array,
  mask: jax.Array,
  *,
  kl_weight: float,
  discount: float,
) -> jax.Array:
  """Returns-to-go of rewards that come with the last token (arXiv 2501.03262).

      r_t = reward [t is the last token] - kl_weight * kl_t
      R_t = r_t + discount * R_{t + 1}

  Args:
    reward: float[B, G].
    kl: float[B, G, C] `kl_divergence` of every token; k1 in the literature.
    mask: bool[B, G, C] completion tokens: a run of True, then False.
    kl_weight: nats to reward; 0 leaves the KL out.
    discount: of the next token, in [0, 1].

  Returns:
    float32[B, G, C], 0 where masked. No gradient flows through it.
  """
  chex.assert_rank([reward, kl, mask], [2, 3, 3])
  chex.assert_equal_shape([kl, mask])
  reward, kl = (jax.lax.stop_gradient(_widen(x)) for x in (reward, kl))
  following = jnp.pad(mask, ((0, 0), (0, 0), (0, 1)))[..., 1:]
  value = jnp.where(mask & ~following, reward[..., None], 0)
  value = value - jnp.where(mask, kl_weight * kl, 0)

  def step(after, now):
    now = now + discount * after
    return now, now

  start = jnp.zeros_like(value[..., 0])
  _, returns = jax.lax.scan(
    step, start, jnp.moveaxis(value, -1, 0), reverse=True
  )
  return jnp.where(mask, jnp.moveaxis(returns, 0, -1), 0)


def whiten(
  value: jax.Array, mask: jax.Array, *, ddof: int, eps: float
) -> jax.Array:
  """`(value - mean) / sqrt(var + eps)` over all real entries of the batch.

  Mean and variance are those of the array given: whiten the global batch before
  it is cut into micro-batches.

  Args:
    value: float[...].
    mask: bool[...].
    ddof: degrees of freedom taken from the variance (1 in trl, as in ViaRL).
    eps: added to the variance.

  Returns:
    float32[...], 0 where masked.
  """
  value = _widen(value)
  centred = jnp.where(mask, value - masked.masked_mean(value, mask), 0)
  count = jnp.sum(jnp.broadcast_to(mask, value.shape))
  var = masked.masked_sum(centred**2, mask) / jnp.maximum(count - ddof, 1)
  return centred / jnp.sqrt(var + eps)


def reinforce_advantages(
  reward: jax.Array,
  kl: jax.Array,
  mask: jax.Array,
  *,
  kl_weight: float,
  discount: float,
  baseline: Baseline,
  ddof: int,
  eps: float,
) -> jax.Array:
  """REINFORCE++ (arXiv 2501.03262): whitened returns-to-go of every token.

  The reward, less its group's baseline ("none" in REINFORCE++ and in ViaRL,
  "mean" in its variant with one), joins the last token; every token pays
  `kl_weight` times its KL; the returns are whitened over the batch's tokens.

  Args:
    reward: float[B, G].
    kl: float[B, G, C] as in `token_returns`.
    mask: bool[B, G, C] completion tokens. A completion without one is no part
      of its group's baseline.
    kl_weight: as in `token_returns` (1e-3 in ViaRL).
    discount: as in `token_returns`.
    baseline: as in `group_advantages`.
    ddof: as in `whiten`.
    eps: as in `whiten`.

  Returns:
    float32[B, G, C], 0 where masked. No gradient flows through it.

  Raises:
    ValueError: an unknown baseline.
  """
  reward = jax.lax.stop_gradient(_widen(reward))
  real = jnp.any(mask, axis=-1)
  returns = token_returns(
    _minus_baseline(reward, real, baseline=baseline),
    kl,
    mask,
    kl_weight=kl_weight,
    discount=discount,
  )
  return whiten(returns, mask, ddof=ddof, eps=eps)


def kl_penalty(
  kl: jax.Array, mask: jax.Array, *, kl_weight: float
) -> jax.Array:
  """`-kl_weight * sum over tokens of kl`: KL as a part of the reward.

  Args:
    kl: float[B, G, C] `kl_divergence` of every token.
    mask: bool[B, G, C] completion tokens.
    kl_weight: nats to reward.

  Returns:
    float32[B, G], to be added to the reward. No gradient flows through it.
  """
  return jax.lax.stop_gradient(
    -kl_weight * masked.masked_sum(kl, mask, axis=-1)
  )


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


def mismatch(
  logprob: jax.Array,
  sampler_logprob: jax.Array,
  mask: jax.Array,
  *,
  cap: float,
  num_tokens: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """How far the sampler's log-probabilities are from the trainer's.

  At the sampled parameters both should be the same.

  Args:
    logprob: float32[B, G, C] of the trainer, at the sampled parameters.
    sampler_logprob: float32[B, G, C] at which the tokens were drawn.
    mask: bool[B, G, C] completion tokens.
    cap: of `truncated_importance`.
    num_tokens: float32[] tokens of the GLOBAL batch where this is a part.

  Returns:
    float32[] each: mismatch_abs (mean |difference|, nats), mismatch_kl (k3
    estimate of KL(sampler || trainer)), mismatch_capped (share of tokens whose
    weight is cut), which add up over the parts of a batch; and mismatch_max,
    which does not.
  """
  logprob, sampler_logprob = (
    jnp.where(mask, jax.lax.stop_gradient(x), 0)
    for x in (logprob, sampler_logprob)
  )
  diff = logprob - sampler_logprob

  def mean(value):
    return masked.masked_mean(value, mask, total=num_tokens)

  return {
    "mismatch_abs": mean(jnp.abs(diff)),
    "mismatch_kl": mean(kl_divergence(sampler_logprob, logprob, kind="k3")),
    "mismatch_capped": mean(diff > jnp.log(cap)),
    "mismatch_max": jnp.max(jnp.abs(diff)),
  }


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


def kl_loss(
  logprob: jax.Array,
  ref_logprob: jax.Array,
  mask: jax.Array,
  *,
  kind: KLKind,
  num_tokens: jax.Array | None = None,
) -> jax.Array:
  """Mean KL to the reference over tokens, by itself: the leash of a view.

  Args:
    logprob: float32[..., C] of the policy under the view.
    ref_logprob: float32[..., C] of the reference under the same view.
    mask: bool[..., C] tokens that count.
    kind: as in `kl_divergence`.
    num_tokens: float32[] tokens of the GLOBAL batch where this is a part.

  Returns:
    float32[].
  """
  logprob, ref_logprob = (
    jnp.where(mask, x, 0) for x in (logprob, jax.lax.stop_gradient(ref_logprob))
  )
  kl = kl_divergence(logprob, ref_logprob, kind=kind)
  return masked.masked_mean(kl, mask, total=num_tokens)


def contrastive_loss(
  gain: jax.Array,
  view_gain: jax.Array,
  select: jax.Array,
  *,
  margin: float,
  tau: float,
  form: ContrastForm = "plain",
  total: jax.Array | None = None,
) -> jax.Array:
  """Pushes an answer up under one view against another [ours].

      mean over selected of -log sigmoid((gain - view_gain - margin) / tau)

  The formula is ours, not the ChronoForge-RL paper's. Beside it belongs a
  `kl_loss` on the other view: the plain form can be had by unlearning it.

  Args:
    gain: float32[B, G] answer log-probability of the policy minus that of the
      reference, under the keyframes.
    view_gain: float32[B, G] the same under the other view.
    select: bool[B, G] correct completions of groups where the keyframes help.
    margin: nats.
    tau: temperature, nats.
    form: "plain", or "stop_gradient" where the other view only measures.
    total: float32[] selected completions of the GLOBAL batch where this is a
      part of it.

  Returns:
    float32[].

  Raises:
    ValueError: an unknown form.
  """
  chex.assert_equal_shape([gain, view_gain, select])
  if form == "stop_gradient":
    view_gain = jax.lax.stop_gradient(view_gain)
  elif form != "plain":
    raise ValueError(
      f"form must be 'plain' or 'stop_gradient', got {form!r}; change"
      " config.contrastive.form"
    )
  score = (gain - view_gain - margin) / tau
  return masked.masked_mean(-jax.nn.log_sigmoid(score), select, total=total)
