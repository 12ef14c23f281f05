"""Sampling: prefill a prompt once, share its cache, decode G completions.

Axes: `B` videos, `G` completions per video, `S` prompt slots, `C` completion
slots, `V` vocabulary, `D` model width.

The prompt's keys and values are computed once per video and read by its G
completions in place; only the completions' own slots are written. Decoding is
one `lax.while_loop` that ends when every row has ended. Temperature, top-p,
top-k and the banned ids are arguments, so that changing one never recompiles
and a trace never keeps an old one.
"""

import jax
import jax.numpy as jnp

from cf_jax import grpo
from cf_jax.models import config as model_config
from cf_jax.models import vlm
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
  eos_id: int,
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
    eos_id: the id that ends a completion (it is kept in the rollout).
    temperature: 0 is greedy.
    top_p: nucleus mass; 1 is off.
    top_k: 0 is off.

  Returns:
    Rollout; `logprob` is the policy's own (temperature 1, banned ids left out).
  """
  num_videos = prompt.token.shape[0]
  temperature = jnp.asarray(temperature, jnp.float32)
  top_p = jnp.asarray(top_p, jnp.float32)
  top_k = jnp.asarray(top_k, jnp.int32)

  with jax.named_scope("prefill"):
    embedded = vlm.embed(config, params, prompt.token, prompt.visual, visual)
    hidden, cache = vlm.prefill(
      config, params, embedded, prompt.position, prompt.mask
    )
    last = jnp.sum(prompt.mask, axis=1) - 1  # [B]
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)  # [B,1,D]
    start = 1 + jnp.max(
      jnp.where(prompt.mask[:, None], prompt.position, 0), axis=(1, 2)
    )

  shape = (num_videos, num_completions)
  # Row keys: [B, G] typed keys, folded with the slot number at every draw.
  key = jax.vmap(
    lambda raw: jax.vmap(
      lambda g: jax.random.fold_in(jax.random.wrap_key_data(raw), g)
    )(jnp.arange(num_completions))
  )(seed)

  def draw(hidden, slot):
    """[B, G, D] -> token int32[B, G] and its log-probability."""
    logits = vlm.logits(config, params, hidden)
    logprobs = jax.nn.log_softmax(grpo.ban(logits, banned), axis=-1)
    scaled = logprobs / jnp.where(temperature > 0, temperature, 1)
    scaled = filter_logits(scaled, top_p=top_p, top_k=top_k)
    noise = jax.vmap(
      jax.vmap(
        lambda k: jax.random.gumbel(
          jax.random.fold_in(k, slot), scaled.shape[-1:]
        )
      )
    )(key)
    noisy = jnp.where(temperature > 0, scaled + noise, logprobs)
    token = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    logprob = jnp.take_along_axis(logprobs, token[..., None], axis=-1)
    return token, logprob[..., 0]

  def write(buffer, value, slot):
    return jax.lax.dynamic_update_slice_in_dim(
      buffer, value[..., None].astype(buffer.dtype), slot, axis=2
    )

  first_token, first_logprob = draw(
    jnp.broadcast_to(hidden, (*shape, hidden.shape[-1])), 0
  )
  token = write(
    jnp.full((*shape, max_tokens), eos_id, jnp.int32), first_token, 0
  )
  logprob = write(
    jnp.zeros((*shape, max_tokens), jnp.float32), first_logprob, 0
  )
  mask = write(jnp.zeros((*shape, max_tokens), bool), jnp.ones(shape, bool), 0)
  carry = dict(
    slot=jnp.int32(1),
    token=token,
    logprob=logprob,
    mask=mask,
    done=first_token == eos_id,
    last=first_token,
    cache=vlm.init_completion_cache(
      config, num_videos, num_completions, max_tokens
    ),
  )

  def body(carry):
    slot = carry["slot"]
    position = jnp.broadcast_to(
      (start + slot - 1)[:, None, None], (num_videos, 3, num_completions)
    )
    hidden, completion_cache = vlm.decode_step(
      config,
      params,
      carry["last"],
      position,
      cache,
      prompt.mask,
      carry["cache"],
      slot - 1,
    )
    drawn, drawn_logprob = draw(hidden, slot)
    alive = ~carry["done"]
    drawn = jnp.where(alive, drawn, eos_id)
    return dict(
      slot=slot + 1,
      token=write(carry["token"], drawn, slot),
      logprob=write(carry["logprob"], jnp.where(alive, drawn_logprob, 0), slot),
      mask=write(carry["mask"], alive, slot),
      done=carry["done"] | (drawn == eos_id),
      last=drawn,
      cache=completion_cache,
    )

  with jax.named_scope("decode"):
    carry = jax.lax.while_loop(
      lambda carry: (carry["slot"] < max_tokens) & ~jnp.all(carry["done"]),
      body,
      carry,
    )
  return Rollout(
    token=carry["token"],
    mask=carry["mask"],
    logprob=carry["logprob"],
    finished=carry["done"],
  )


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
