"""The seam: the whole model as pure functions of a dict of parameters.

Everything above this file sees functions and pytrees. Nothing here is jitted;
the call site does that, with `config` and `grid` static. Only `forward`, the
door for batches of a transformers processor, reads its numpy arguments on the
host and jits the two pieces between.

Axes: `B` videos, `G` completions per video, `N` slices, `P` visual tokens per
slice, `S` prompt slots, `C` completion slots, `V` vocabulary, `D` model width.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cf_jax.models import decoder, kernels, layers, rope, vision
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
    mask,
    with_cache=True,
  )


def init_completion_cache(
  config: VLMConfig, num_videos: int, num_completions: int, max_tokens: int
) -> decoder.CompletionCache:
  """Empty cache of G completions of at most C tokens for each of B prompts."""
  return decoder.init_completion_cache(
    config, num_videos, num_completions, max_tokens
  )


def cache_bytes(config: VLMConfig, slots: int, dtype: str | None = None) -> int:
  """Size of the keys and values of so many slots, over all devices.

  Args:
    config: the model.
    slots: of prompts and completions together.
    dtype: what they are stored in; None: `config.dtype`.
  """
  width = config.num_key_value_heads * config.head_dim
  size = jnp.dtype(dtype or config.dtype).itemsize
  return 2 * config.num_hidden_layers * slots * width * size


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


def unstack(params: dict) -> dict:
  """The same parameters for `prefill` and `decode_step`, layers apart.

  See `layers.unstack`; the decoder's part of `params` is used up.
  """
  apart = layers.unstack(params["decoder"]["layers"])
  return params | {"decoder": params["decoder"] | {"layers": apart}}


def unstacked(
  config: VLMConfig, params: dict, *, rows: int, platform: str | None = None
) -> dict:
  """A copy of the decoder for `decode_step`, layers apart; to be jitted.

  In the dtype that matmuls run in: each token would cast them all otherwise.
  Where memory is short and the stack is not needed again, see `unstack`.

  Args:
    config: the model.
    params: the model's parameters.
    rows: completions that are decoded side by side. For a few on a CPU the
      kernels are turned, see `layers.turn`.
    platform: that will decode; None: this process's own.
  """
  ours = jax.tree.map(lambda leaf: leaf.astype(config.dtype), params["decoder"])
  count = len(jax.tree.leaves(ours["layers"])[0])
  apart = [layers.take_layer(ours["layers"], i) for i in range(count)]
  platform = platform or jax.default_backend()
  if layers.are_few(rows) and platform == "cpu":
    apart = [layers.turn(layer) for layer in apart]
  return {"decoder": ours | {"layers": apart}}


def packed(
  config: VLMConfig,
  params: dict,
  embedded: jax.Array,
  position: jax.Array,
  mask: jax.Array,
  token: jax.Array,
  token_mask: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Hidden states of a prompt and of G completions that continue it.

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
    float[B, S, D] of the prompt: slot s holds the state that predicts what
    follows it. float[B, G, C, D] of the completions: slot c holds the state
    that predicts token c, so slot 0 is the prompt's last real slot.
  """
  group, slots = token.shape[1:]
  last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
  if slots == 1:
    prompt_hidden, _ = decoder.run(
      config,
      params["decoder"],
      embedded,
      position,
      mask,
      with_cache=False,
    )
    return prompt_hidden, _repeat_slot(prompt_hidden, last, group)
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
  return prompt_hidden, jnp.concatenate([first, hidden], axis=2)


def segmented(
  config: VLMConfig,
  params: dict,
  embedded: jax.Array,
  position: jax.Array,
  segment: jax.Array,
) -> jax.Array:
  """Hidden states of rows that hold several sequences, one behind another.

  No slot sees one of another sequence: the numbers and gradients of the
  sequences each in a row of its own.

  Args:
    config: the model.
    params: the model's parameters.
    embedded: float[B, S, D] from `embed`.
    position: int32[B, 3, S], each sequence's own.
    segment: int32[B, S] number of a slot's sequence in its row, from 1 on; 0
      is padding.

  Returns:
    float[B, S, D]: slot s holds the state that predicts what follows it.

  Raises:
    ValueError: a kernel that cannot serve.
  """
  return decoder.run_segments(
    config, params["decoder"], embedded, position, segment
  )


def _repeat_slot(hidden, slot, group):
  """[B, S, D], [B] -> [B, G, 1, D]."""
  chosen = jnp.take_along_axis(hidden, slot[:, None, None], axis=1)
  return jnp.repeat(chosen[:, None], group, axis=1)


def head(config: VLMConfig, params: dict) -> jax.Array:
  """The table behind `logits`, float[V, D] in the dtype it is stored in.

  For those who look at the vocabulary in chunks; a whole cast copy of it would
  be what they avoid.
  """
  return decoder.head(config, params["decoder"])


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
  kernel = kernels.choose(
    config.attention, jnp.dtype(config.dtype), config.head_dim
  )
  if kernel == "cudnn":
    # It takes no padding before: real slots first, in their order.
    first = jnp.argsort(~mask, axis=1, stable=True)
    embedded = jnp.take_along_axis(embedded, first[:, :, None], axis=1)
    position = jnp.take_along_axis(position, first[:, None], axis=2)
    mask = jnp.take_along_axis(mask, first, axis=1)
  hidden, _ = decoder.run(
    config, params["decoder"], embedded, position, mask, with_cache=False
  )
  if kernel == "cudnn":
    back = jnp.argsort(first, axis=1)
    hidden = jnp.take_along_axis(hidden, back[:, :, None], axis=1)
  return logits(config, params, hidden)


_encode_jit = jax.jit(encode_vision, static_argnums=(0, 3))
_sequence_logits_jit = jax.jit(sequence_logits, static_argnums=0)


def forward(
  config: VLMConfig,
  params: dict,
  input_ids: np.ndarray,
  attention_mask: np.ndarray | None,
  pixel_values: np.ndarray | None = None,
  image_grid_thw: np.ndarray | None = None,
  pixel_values_videos: np.ndarray | None = None,
  video_grid_thw: np.ndarray | None = None,
  second_per_grid_ts: Sequence[float] | None = None,
) -> jax.Array:
  """Logits of what a Qwen2.5-VL processor of transformers returns.

  A door for comparisons and for people who come from transformers; the rest of
  the project makes its prompts with `data.prompts`. All but `params` is read on
  the host, so jit and grad can go through `params` alone. A new grid or shape
  compiles anew.

  Args:
    config: the model.
    params: the model's parameters.
    input_ids: int[B, S].
    attention_mask: [B, S], nonzero for real slots, padding on either side;
      None: all are real.
    pixel_values: float[sum of t * h * w over images, patch_dim].
    image_grid_thw: int[images, 3]; grids of one batch may differ, and a row
      may have several media.
    pixel_values_videos: float[sum of t * h * w over videos, patch_dim].
    video_grid_thw: int[videos, 3].
    second_per_grid_ts: float[videos], see `rope.rope_index` for the rule.

  Returns:
    float32[B, S, V]; finite and without meaning in padded slots.

  Raises:
    ValueError: ids, grids and patches do not match each other or the model.
  """
  return _sequence_logits_jit(
    config,
    params,
    **read_processor(
      config,
      params,
      input_ids,
      attention_mask,
      pixel_values,
      image_grid_thw,
      pixel_values_videos,
      video_grid_thw,
      second_per_grid_ts,
    ),
  )


def read_processor(
  config: VLMConfig,
  params: dict,
  input_ids: np.ndarray,
  attention_mask: np.ndarray | None,
  pixel_values: np.ndarray | None = None,
  image_grid_thw: np.ndarray | None = None,
  pixel_values_videos: np.ndarray | None = None,
  video_grid_thw: np.ndarray | None = None,
  second_per_grid_ts: Sequence[float] | None = None,
) -> dict[str, np.ndarray | jax.Array]:
  """What a processor returns as the arguments of `sequence_logits`.

  Media are found by their token ids, as transformers does: the ids of a
  processor are trusted, and text of a user must not have become one of them.

  Args:
    config: as all others here, see `forward`.
    params: of the tower that encodes the media.
    input_ids: and all that follow, see `forward`.

  Returns:
    token int32[B, S], position int32[B, 3, S], mask bool[B, S], visual_index
    int32[B, S], visual_tokens float[B, rows, D].

  Raises:
    ValueError: as `forward`.
  """
  position = rope.rope_index(
    config,
    input_ids,
    attention_mask,
    image_grid_thw,
    video_grid_thw,
    second_per_grid_ts,
  )
  input_ids = np.asarray(input_ids)
  mask = np.ones(input_ids.shape, bool)
  if attention_mask is not None:
    mask = np.asarray(attention_mask) != 0
  # Padded slots may hold anything; a row of NaN would reach the real ones.
  token = np.where(mask, input_ids, 0).astype(np.int32)
  if np.any((token < 0) | (token >= config.vocab_size)):
    raise ValueError(
      f"input_ids must lie in [0, {config.vocab_size}), got"
      f" {int(token.min())} to {int(token.max())}; change the tokenizer or"
      " config.model.vocab_size"
    )
  merge = config.vision.spatial_merge_size
  patches, grids = [], []
  for name, pixel_name, pixels, grid_thw in (
    ("image", "pixel_values", pixel_values, image_grid_thw),
    ("video", "pixel_values_videos", pixel_values_videos, video_grid_thw),
  ):
    checked = rope.grid_list(name, grid_thw, merge)
    expected = (sum(t * h * w for t, h, w in checked), config.vision.patch_dim)
    got = (0, expected[1]) if pixels is None else np.shape(pixels)
    if got != expected:
      raise ValueError(
        f"{pixel_name} must be {expected}, a row for each of the t * h * w"
        f" patches of {name}_grid_thw, got {got}"
      )
    grids += checked
    if pixels is not None:
      patches.append(np.asarray(pixels, np.float32))
  if not grids:
    return dict(
      token=token,
      position=position,
      mask=mask,
      visual_index=np.full(token.shape, -1, np.int32),
      visual_tokens=jnp.zeros((len(token), 0, config.hidden_size)),
    )
  encoded = _encode_media(config, params, np.concatenate(patches), grids)

  # Row of `encoded` of each slot: images in their order, then videos.
  row = np.full(token.shape, -1)
  num_tokens = 0
  for token_id in (config.image_token_id, config.video_token_id):
    if token_id is not None:
      slots = mask & (token == token_id)
      row[slots] = num_tokens + np.arange(np.sum(slots))
      num_tokens += np.sum(slots)
  count = np.sum(row >= 0, axis=1)
  shown = np.zeros((len(row), count.max()), np.int32)
  visual_index = np.full(token.shape, -1, np.int32)
  for b, slots in enumerate(row >= 0):
    shown[b, : count[b]] = row[b, slots]
    visual_index[b, slots] = np.arange(count[b])
  return dict(
    token=token,
    position=position,
    mask=mask,
    visual_index=visual_index,
    visual_tokens=encoded[shown],
  )


def _encode_media(config, params, patches, grids):
  """[all patches, patch_dim] of media -> float[all visual tokens, D].

  Slices of equal height and width are encoded together.
  """
  area = config.vision.spatial_merge_size**2
  slices = {}  # (height, width) -> first patch of every such slice
  first = 0
  for slice_count, height, width in grids:
    for _ in range(slice_count):
      slices.setdefault((height, width), []).append(first)
      first += height * width
  encoded, place = [], []
  for grid, starts in slices.items():
    size = grid[0] * grid[1]
    index = np.array(starts)[:, None] + np.arange(size)
    tokens = _encode_jit(config, params, patches[index], grid)
    encoded.append(tokens.reshape(-1, tokens.shape[-1]))
    place.append((index[:, ::area] // area).reshape(-1))
  return jnp.concatenate(encoded)[np.argsort(np.concatenate(place))]
