"""The seam: the whole model as pure functions of a dict of parameters.

Everything above this file sees functions and pytrees. Nothing here is jitted;
the call site does that, with `config` and `grid` static.

Axes: `B` videos, `G` completions per video, `N` slices, `P` visual tokens per
slice, `S` prompt slots, `C` completion slots, `V` vocabulary, `D` model width.
"""

import jax
import jax.numpy as jnp

from cf_jax.models import decoder, vision
from cf_jax.models.config import VLMConfig


def init(config: VLMConfig, rng: jax.Array) -> dict:
  """Fresh parameters: {"vision": ..., "decoder": ...}, layers stacked."""
  vision_rng, decoder_rng = jax.random.split(rng)
  return {
    "vision": vision.init(config, vision_rng),
    "decoder": decoder.init(config, decoder_rng),
  }


def encode_vision(
  config: VLMConfig, params: dict, patches: jax.Array, grid: tuple[int, int]
) -> jax.Array:
  """Visual tokens of independent slices.

  Args:
    config: the model.
    params: the model's parameters.
    patches: float[N, 4P, patch_dim] in the processor's order.
    grid: static (height, width) of a slice in patches.

  Returns:
    float[N, P, D].

  Raises:
    ValueError: the patches do not fit the grid or the model.
  """
  with jax.named_scope("vision"):
    return vision.encode(config, params["vision"], patches, grid)


def embed(
  config: VLMConfig,
  params: dict,
  token: jax.Array,
  visual_index: jax.Array,
  visual_tokens: jax.Array,
) -> jax.Array:
  """Embeddings of a prompt, with visual tokens put in by index.

  Media are never recognised by a token's id: text may spell any id.

  Args:
    config: the model.
    params: the model's parameters.
    token: int32[B, S].
    visual_index: int32[B, S] row of `visual_tokens`, -1 for a text slot.
    visual_tokens: float[B, rows, D]; no rows for a prompt without media.

  Returns:
    float[B, S, D].
  """
  text = embed_text(config, params, token)
  if visual_tokens.shape[1] == 0:
    return text
  visual = jnp.take_along_axis(
    visual_tokens.astype(text.dtype),
    jnp.maximum(visual_index, 0)[:, :, None],
    axis=1,
  )
  return jnp.where(visual_index[:, :, None] >= 0, visual, text)


def embed_text(config: VLMConfig, params: dict, token: jax.Array) -> jax.Array:
  """Rows of the embedding table, int32[...] -> float[..., D]."""
  table = params["decoder"]["embed"]["embedding"]
  return jnp.take(table, token, axis=0).astype(config.dtype)


def prefill(
  config: VLMConfig,
  params: dict,
  embedded: jax.Array,
  position: jax.Array,
  mask: jax.Array,
) -> tuple[jax.Array, decoder.PrefixCache]:
  """Runs prompts and keeps their keys and values.

  Args:
    config: the model.
    params: the model's parameters.
    embedded: float[B, S, D] from `embed`.
    position: int32[B, 3, S].
    mask: bool[B, S].

  Returns:
    float[B, S, D] hidden states after the last norm, and the prompts' cache.
  """
  return decoder.run(
    config,
    params["decoder"],
    embedded,
    position,
    decoder.causal_mask(mask),
    with_cache=True,
  )


def init_completion_cache(
  config: VLMConfig, num_videos: int, num_completions: int, max_tokens: int
) -> decoder.CompletionCache:
  """Empty cache of G completions of at most C tokens for each of B prompts."""
  return decoder.init_completion_cache(
    config, num_videos, num_completions, max_tokens
  )


def decode_step(
  config: VLMConfig,
  params: dict,
  token: jax.Array,
  position: jax.Array,
  prefix_cache: decoder.PrefixCache,
  prefix_mask: jax.Array,
  completion_cache: decoder.CompletionCache,
  step: jax.Array,
) -> tuple[jax.Array, decoder.CompletionCache]:
  """Feeds token number `step` of G completions of each of B prompts.

  Args:
    config: the model.
    params: the model's parameters.
    token: int32[B, G].
    position: int32[B, 3, G].
    prefix_cache: from `prefill`; shared by the G completions, never copied.
    prefix_mask: bool[B, S].
    completion_cache: holds the `step` tokens before; slot `step` is written.
    step: int32[], below C.

  Returns:
    float[B, G, D] hidden states after the last norm, and the updated cache.
  """
  return decoder.decode(
    config,
    params["decoder"],
    embed_text(config, params, token),
    position,
    prefix_cache,
    prefix_mask,
    completion_cache,
    step,
  )


def packed(
  config: VLMConfig,
  params: dict,
  embedded: jax.Array,
  position: jax.Array,
  mask: jax.Array,
  token: jax.Array,
  token_mask: jax.Array,
) -> jax.Array:
  """Hidden states that predict the tokens of G completions of one prompt.

  The prompt is run once. Completion token c sits on all three axes at the
  largest prompt position plus 1 + c.

  Args:
    config: the model.
    params: the model's parameters.
    embedded: float[B, S, D] prompts from `embed`, padded on the right.
    position: int32[B, 3, S].
    mask: bool[B, S].
    token: int32[B, G, C] completions.
    token_mask: bool[B, G, C].

  Returns:
    float[B, G, C, D]: slot c holds the state that predicts token c, so slot 0
    is the prompt's last real slot.
  """
  group, slots = token.shape[1:]
  last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
  if slots == 1:
    prompt_hidden, _ = decoder.run(
      config,
      params["decoder"],
      embedded,
      position,
      decoder.causal_mask(mask),
      with_cache=False,
    )
    return _repeat_slot(prompt_hidden, last, group)
  fed = token[:, :, :-1]  # the last token predicts nothing
  start = 1 + jnp.max(jnp.where(mask[:, None], position, 0), axis=(1, 2))
  fed_position = start[:, None, None, None] + jnp.arange(slots - 1)
  prompt_hidden, hidden = decoder.run_packed(
    config,
    params["decoder"],
    embedded,
    position,
    mask,
    embed_text(config, params, fed),
    jnp.broadcast_to(fed_position, (fed.shape[0], 3, *fed.shape[1:])),
    token_mask[:, :, :-1],
  )
  first = _repeat_slot(prompt_hidden, last, group)
  return jnp.concatenate([first, hidden], axis=2)


def _repeat_slot(hidden, slot, group):
  """[B, S, D], [B] -> [B, G, 1, D]."""
  chosen = jnp.take_along_axis(hidden, slot[:, None, None], axis=1)
  return jnp.repeat(chosen[:, None], group, axis=1)


def logits(config: VLMConfig, params: dict, hidden: jax.Array) -> jax.Array:
  """Scores of the next token, float[..., D] -> float32[..., V]."""
  return decoder.logits(config, params["decoder"], hidden)


def sequence_logits(
  config: VLMConfig,
  params: dict,
  token: jax.Array,
  position: jax.Array,
  mask: jax.Array,
  visual_index: jax.Array,
  visual_tokens: jax.Array,
) -> jax.Array:
  """Logits of whole sequences, padded on either side.

  Args:
    config: the model.
    params: the model's parameters.
    token: int32[B, S].
    position: int32[B, 3, S].
    mask: bool[B, S].
    visual_index: int32[B, S], see `embed`.
    visual_tokens: float[B, rows, D].

  Returns:
    float32[B, S, V].
  """
  embedded = embed(config, params, token, visual_index, visual_tokens)
  hidden, _ = decoder.run(
    config,
    params["decoder"],
    embedded,
    position,
    decoder.causal_mask(mask),
    with_cache=False,
  )
  return logits(config, params, hidden)
