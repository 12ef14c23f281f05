"""Sampling: prefill a prompt once, share its cache, decode G completions.

Axes: `B` videos, `G` completions per video, `S` prompt slots, `C` completion
slots, `V` vocabulary, `D` model width.

The prompt's keys and values are computed once per video and read by its G
completions in place; only the completions' own slots are written. Decoding is
one `lax.while_loop` that ends when every row has ended. Temperature, top-p,
top-k and the banned ids are arguments, so that changing one never recompiles
and a trace never keeps an old one.

`generate` is `start` and one `advance` to the end. A program that shows tokens
as they come jits the two itself, donates the state, and gives `advance` a limit
that grows: the tokens are those of `generate`.
"""

import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from cf_jax import grpo
from cf_jax.models import config as model_config
from cf_jax.models import decoder, vlm
from cf_jax.types import Prompt, Rollout


def filter_logits(
  logits: jax.Array, *, top_p: jax.Array, top_k: jax.Array
) -> jax.Array:
  """Keeps the nucleus and the k best; everything else becomes -inf.

  Args:
    logits: float32[..., V], already divided by the temperature.
    top_p: float32[] mass in (0, 1] of the smallest set that is kept.
    top_k: int32[] how many ids are kept; 0 keeps all.

  Returns:
    float32[..., V]. The best id always stays; equal logits stay together.
  """

  def keep(logits):
    ranked = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    prob = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(prob, axis=-1) - prob  # mass ahead of each rank
    rank = jnp.arange(logits.shape[-1])
    limit = jnp.where(top_k > 0, top_k, logits.shape[-1])
    kept = (before < top_p) & (rank < limit)
    kept = kept.at[..., 0].set(True)
    floor = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= floor, logits, -jnp.inf)

  # The sort over the vocabulary is paid only where a filter is on.
  return jax.lax.cond(
    (top_p < 1) | (top_k > 0), keep, lambda logits: logits, logits
  )


@flax.struct.dataclass
class Decoding:
  """Completions half-way: what `advance` takes and gives back.

  Attributes:
    slot: int32[] tokens that every row has; rows that ended hold end tokens.
    token: int32[B, G, C] completion ids.
    logprob: float32[B, G, C], see `Rollout`.
    mask: bool[B, G, C] True up to and including the end token.
    done: bool[B, G] rows that have ended.
    last: int32[B, G] the newest tokens, not yet fed to the model.
    position: int32[B] M-RoPE position of a video's first completion token.
    key: uint32[B, G, 2] raw keys; a draw folds its slot number in.
    prefix_mask: bool[B, S] real prompt slots.
    prefix_cache: keys and values of the prompts, each L float[B, M, S, H].
    cache: keys and values of the completions, each L float[B, G, M, C, H].
  """

  slot: jax.Array
  token: jax.Array
  logprob: jax.Array
  mask: jax.Array
  done: jax.Array
  last: jax.Array
  position: jax.Array
  key: jax.Array
  prefix_mask: jax.Array
  prefix_cache: decoder.PrefixCache
  cache: decoder.CompletionCache

  @property
  def rollout(self) -> Rollout:
    """The completions so far."""
    return Rollout(
      token=self.token,
      mask=self.mask,
      logprob=self.logprob,
      finished=self.done,
    )


def check_settings(
  *,
  max_tokens: int,
  temperature: float,
  top_p: float,
  top_k: int,
  num_completions: int = 1,
) -> None:
  """Raises a ValueError for a value of config.sampling that is out of range."""
  for name, value, fits, what in (
    ("max_tokens", max_tokens, max_tokens >= 1, "at least 1"),
    ("num_completions", num_completions, num_completions >= 1, "at least 1"),
    ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
    ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
    ("top_k", top_k, top_k >= 0, "0 (off) or more"),
  ):
    if not fits:
      raise ValueError(f"config.sampling.{name} must be {what}, got {value!r}")


def _ends(token: jax.Array, eos_id: int | Sequence[int]) -> jax.Array:
  """bool[...]: is it one of the end tokens?"""
  return jnp.isin(token, jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32)))


def _filler(eos_id: int | Sequence[int]) -> jax.Array:
  """int32[]: the (first) end token, which fills what follows an end."""
  return jnp.asarray(eos_id, jnp.int32).reshape(-1)[0]


def _draw(
  config, params, hidden, key, slot, banned, *, temperature, top_p, top_k
):
  """[B, G, D] -> token int32[B, G] and its log-probability."""
  temperature = jnp.asarray(temperature, jnp.float32)
  logits = grpo.ban(vlm.logits(config, params, hidden), banned)
  top = jnp.max(logits, axis=-1, keepdims=True)
  log_total = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))

  def perturbed():
    """The largest of logits plus Gumbel noise is a sample of their softmax."""
    scaled = filter_logits(
      (logits - top - log_total) / temperature,
      top_p=jnp.asarray(top_p, jnp.float32),
      top_k=jnp.asarray(top_k, jnp.int32),
    )
    noise = jax.vmap(
      jax.vmap(
        lambda raw: jax.random.gumbel(
          jax.random.fold_in(jax.random.wrap_key_data(raw), slot),
          scaled.shape[-1:],
        )
      )
    )(key)
    return _first_best(scaled + noise)

  # Greedy decoding pays for no noise, and for no log-probability but its own.
  token = jax.lax.cond(temperature > 0, perturbed, lambda: _first_best(logits))
  drawn = jnp.take_along_axis(logits, token[..., None], axis=-1)
  return token, (drawn - top - log_total)[..., 0]


def _first_best(value: jax.Array) -> jax.Array:
  """int32[...]: `argmax` over the last axis of float[..., V] without NaN.

  XLA's own compares values and ids in one scalar loop on CPUs.
  """
  size = value.shape[-1]
  best = value == jnp.max(value, axis=-1, keepdims=True)
  return jnp.min(jnp.where(best, jnp.arange(size), size - 1), axis=-1)


def _write(buffer, value, slot):
  """Puts [B, G] into slot number `slot` of [B, G, C]."""
  return jax.lax.dynamic_update_slice_in_dim(
    buffer, value[..., None].astype(buffer.dtype), slot, axis=2
  )


def start(
  config: model_config.VLMConfig,
  params: dict,
  prompt: Prompt,
  visual: jax.Array,
  seed: jax.Array,
  banned: jax.Array,
  *,
  num_completions: int,
  max_tokens: int,
  eos_id: int | Sequence[int],
  temperature: jax.Array | float = 1.0,
  top_p: jax.Array | float = 1.0,
  top_k: jax.Array | int = 0,
) -> Decoding:
  """Runs the prompts and draws the first token of every completion.

  Args and Raises: see `generate`.

  Returns:
    Decoding with one token in every row.
  """
  num_videos = prompt.token.shape[0]
  with jax.named_scope("prefill"):
    embedded = vlm.embed(config, params, prompt.token, prompt.visual, visual)
    hidden, prefix_cache = vlm.prefill(
      config, params, embedded, prompt.position, prompt.mask
    )
    last = jnp.sum(prompt.mask, axis=1) - 1  # [B]
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)  # [B,1,D]
    position = 1 + jnp.max(
      jnp.where(prompt.mask[:, None], prompt.position, 0), axis=(1, 2)
    )

  shape = (num_videos, num_completions)
  key = jax.vmap(
    lambda raw: jax.vmap(
      lambda g: jax.random.key_data(
        jax.random.fold_in(jax.random.wrap_key_data(raw), g)
      )
    )(jnp.arange(num_completions))
  )(seed)
  first, logprob = _draw(
    config,
    params,
    jnp.broadcast_to(hidden, (*shape, hidden.shape[-1])),
    key,
    0,
    banned,
    temperature=temperature,
    top_p=top_p,
    top_k=top_k,
  )
  slots = (*shape, max_tokens)
  return Decoding(
    slot=jnp.int32(1),
    token=_write(jnp.full(slots, _filler(eos_id)), first, 0),
    logprob=_write(jnp.zeros(slots, jnp.float32), logprob, 0),
    mask=_write(jnp.zeros(slots, bool), jnp.ones(shape, bool), 0),
    done=_ends(first, eos_id),
    last=first,
    position=position,
    key=key,
    prefix_mask=prompt.mask,
    prefix_cache=prefix_cache,
    cache=vlm.init_completion_cache(config, *slots),
  )


def advance(
  config: model_config.VLMConfig,
  params: dict,
  decoding: Decoding,
  limit: jax.Array | int,
  banned: jax.Array,
  *,
  eos_id: int | Sequence[int],
  temperature: jax.Array | float = 1.0,
  top_p: jax.Array | float = 1.0,
  top_k: jax.Array | int = 0,
) -> Decoding:
  """Goes on until the completions have `limit` tokens or all have ended.

  Args:
    config: the model's shape.
    params: the policy's parameters.
    decoding: from `start` or `advance`; donate it, its caches are the memory.
    limit: int32[] tokens, those before counted; C where it is more.
    banned: as in `generate`, as all that follows.
    eos_id: ends a completion.
    temperature: 0 is greedy.
    top_p: nucleus mass.
    top_k: 0 is off.

  Returns:
    Decoding; unchanged where nothing was left to do.
  """
  num_videos, num_completions, max_tokens = decoding.token.shape
  limit = jnp.minimum(jnp.asarray(limit, jnp.int32), max_tokens)

  def body(moving):
    slot = moving.slot
    position = jnp.broadcast_to(
      (decoding.position + slot - 1)[:, None, None],
      (num_videos, 3, num_completions),
    )
    hidden, cache = vlm.decode_step(
      config,
      params,
      moving.last,
      position,
      decoding.prefix_cache,
      decoding.prefix_mask,
      moving.cache,
      slot - 1,
    )
    drawn, logprob = _draw(
      config,
      params,
      hidden,
      decoding.key,
      slot,
      banned,
      temperature=temperature,
      top_p=top_p,
      top_k=top_k,
    )
    alive = ~moving.done
    drawn = jnp.where(alive, drawn, _filler(eos_id))
    return moving.replace(
      slot=slot + 1,
      token=_write(moving.token, drawn, slot),
      logprob=_write(moving.logprob, jnp.where(alive, logprob, 0), slot),
      mask=_write(moving.mask, alive, slot),
      done=moving.done | _ends(drawn, eos_id),
      last=drawn,
      cache=cache,
    )

  # What stays the same is read from outside the loop, not carried through it.
  fixed = dict(
    position=decoding.position,
    key=decoding.key,
    prefix_mask=decoding.prefix_mask,
    prefix_cache=decoding.prefix_cache,
  )
  with jax.named_scope("decode"):
    moved = jax.lax.while_loop(
      lambda moving: (moving.slot < limit) & ~jnp.all(moving.done),
      body,
      decoding.replace(**dict.fromkeys(fixed)),
    )
  return moved.replace(**fixed)


def generate(
  config: model_config.VLMConfig,
  params: dict,
  prompt: Prompt,
  visual: jax.Array,
  seed: jax.Array,
  banned: jax.Array,
  *,
  num_completions: int,
  max_tokens: int,
  eos_id: int | Sequence[int],
  temperature: jax.Array | float = 1.0,
  top_p: jax.Array | float = 1.0,
  top_k: jax.Array | int = 0,
) -> Rollout:
  """Samples G completions of every prompt.

  Args:
    config: the model's shape.
    params: the policy's parameters.
    prompt: Prompt of B rows.
    visual: float[B, K * P, D] visual tokens of the view.
    seed: uint32[B, 2] one raw key a video. A completion's draws depend on its
      row's key and its number in the group alone, not on the batch around it.
    banned: bool[V] ids that are never sampled.
    num_completions: G.
    max_tokens: C, the length limit.
    eos_id: the id that ends a completion (it is kept in the rollout), or
      several of which any does; the first fills the slots after an end.
    temperature: 0 is greedy.
    top_p: nucleus mass; 1 is off.
    top_k: 0 is off.

  Returns:
    Rollout; `logprob` is the policy's own (temperature 1, banned ids left out).
  """
  drawing = dict(
    eos_id=eos_id, temperature=temperature, top_p=top_p, top_k=top_k
  )
  begun = start(
    config,
    params,
    prompt,
    visual,
    seed,
    banned,
    num_completions=num_completions,
    max_tokens=max_tokens,
    **drawing,
  )
  return advance(config, params, begun, max_tokens, banned, **drawing).rollout


def row_seeds(rng: jax.Array, sample: jax.Array) -> jax.Array:
  """One raw key a video: `rng` (typed key) folded with its sample number.

  Args:
    rng: typed key of this step.
    sample: int32[B] dataset numbers of the videos.

  Returns:
    uint32[B, 2].
  """
  return jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(rng, i)))(
    sample
  )
