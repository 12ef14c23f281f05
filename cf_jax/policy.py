"""The policy seen from above: frames and prompts in, log-probabilities out.

Axes: `B` videos, `G` completions per video, `N` encoded frames per video, `K`
keyframe slots, `P` visual tokens per frame, `S` prompt slots, `C` completion
slots, `V` vocabulary, `D` model width.

Frames are encoded once per video; a view (ordered keyframes, shuffled,
uniform, ...) only re-indexes the visual tokens, because attention in the
vision tower never crosses a temporal slice and every keyframe is its own slice.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cf_jax import grpo, vocabulary
from cf_jax.data import patches
from cf_jax.models import config as model_config
from cf_jax.models import vlm
from cf_jax.types import Prompt, Rollout, View


def encode_frames(
  config: model_config.VLMConfig,
  params: dict,
  pixel: jax.Array,
  *,
  grid: tuple[int, int],
) -> jax.Array:
  """Visual tokens of every frame of every view, each frame encoded once.

  Args:
    config: the model's shape.
    params: the policy's parameters.
    pixel: float[B, N, 4P, patch] patches of single-frame temporal slices.
    grid: (height, width) in patches.

  Returns:
    float[B, N, P, D].
  """
  batch, num_frames = pixel.shape[:2]
  with jax.named_scope("vision"):
    token = vlm.encode_vision(
      config,
      params,
      pixel.reshape(batch * num_frames, *pixel.shape[2:]),
      grid,
    )
  return token.reshape(batch, num_frames, *token.shape[1:])


def make_frame_embedder(
  config: model_config.VLMConfig,
  params: dict,
  size_px: tuple[int, int],
) -> Callable[[np.ndarray], jax.Array]:
  """uint8[n, h, w, 3] RGB -> float[n, D], the mean of a frame's visual tokens.

  Args:
    config: the model's shape.
    params: parameters, of which those of the vision tower are enough.
    size_px: (h, w), multiples of patch times merge.

  Raises:
    ValueError: the size does not divide.
  """
  vision = config.vision
  cut = dict(patch=vision.patch_size, merge=vision.spatial_merge_size)
  grid = patches.grid_of(*size_px, **cut)

  @jax.jit
  def encode(params, pixel):
    token = encode_frames(config, params, pixel[None], grid=grid)[0]
    return jnp.mean(token, axis=1)

  def embed(frames):
    pixel = patches.frames_to_patches(
      frames, temporal=vision.temporal_patch_size, **cut
    )
    return encode(params, pixel)

  return embed


def show(encoded: jax.Array, frame: jax.Array) -> jax.Array:
  """Puts frames into a view's slots: [B, N, P, D], [B, K] -> [B, K * P, D]."""
  shown = jnp.take_along_axis(encoded, frame[:, :, None, None], axis=1)
  return shown.reshape(frame.shape[0], -1, encoded.shape[-1])


def completion_logprobs(
  config: model_config.VLMConfig,
  params: dict,
  view: View,
  encoded: jax.Array,
  rollout: Rollout,
  banned: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Teacher-forced log-probabilities of completions under one view.

  The prompt is run once and the G completions of a video attend to it, which
  gives the numbers (and gradients) of the repeated-prompt form.

  Args:
    config: the model's shape.
    params: parameters of the policy or of the reference.
    view: View of B videos.
    encoded: float[B, N, P, D] from `encode_frames`.
    rollout: Rollout whose tokens are scored.
    banned: bool[V] ids that cannot be sampled, left out of the softmax.

  Returns:
    float32[B, G, C] log-probabilities and float32[B, G, C] entropies (nats),
    0 where the rollout's mask is False.
  """
  visual = show(encoded, view.frame)
  prompt = view.prompt
  embedded = vlm.embed(config, params, prompt.token, prompt.visual, visual)
  _, hidden = vlm.packed(
    config,
    params,
    embedded,
    prompt.position,
    prompt.mask,
    rollout.token,
    rollout.mask,
  )
  return slot_logprobs(
    config, params, hidden, rollout.token, rollout.mask, banned
  )


def sequence_logprobs(
  config: model_config.VLMConfig,
  params: dict,
  view: View,
  encoded: jax.Array,
  rollout: Rollout,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """What `completion_logprobs` gives, for the prompts' text too.

  The softmax is over the whole vocabulary: prompts have tokens that no policy
  samples.

  Args:
    config: the model's shape.
    params: the policy's parameters.
    view: View of B videos.
    encoded: float[B, N, P, D] from `encode_frames`.
    rollout: Rollout whose tokens are scored.

  Returns:
    Log-probabilities and entropies (nats) of the prompts' tokens, float32[B, S]
    each, 0 where `text_mask` is False; and of the completions', float32[B, G,
    C] each.
  """
  prompt = view.prompt
  visual = show(encoded, view.frame)
  prompt_hidden, hidden = vlm.packed(
    config,
    params,
    vlm.embed(config, params, prompt.token, prompt.visual, visual),
    prompt.position,
    prompt.mask,
    rollout.token,
    rollout.mask,
  )
  none = jnp.zeros(config.vocab_size, bool)
  # Slot s is predicted by the state before it.
  of_prompt = slot_logprobs(
    config,
    params,
    jnp.roll(prompt_hidden, 1, axis=1),
    prompt.token,
    text_mask(prompt),
    none,
  )
  return of_prompt, slot_logprobs(
    config, params, hidden, rollout.token, rollout.mask, none
  )


def text_mask(prompt: Prompt) -> jax.Array:
  """bool[B, S] the slots that can be predicted: no pictures, no first slot."""
  later = jnp.arange(prompt.token.shape[1]) > 0
  return prompt.mask & (prompt.visual < 0) & later


def slot_logprobs(
  config: model_config.VLMConfig,
  params: dict,
  hidden: jax.Array,
  token: jax.Array,
  mask: jax.Array,
  banned: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Log-probabilities and entropies (nats) of tokens, float32[...] each.

  Args:
    config: the model's shape.
    params: parameters of the head.
    hidden: float[..., D] states that predict the tokens.
    token: int32[...].
    mask: bool[...]; both are 0 where it is False.
    banned: bool[V] ids left out of the softmax.
  """
  with jax.named_scope("vocabulary"):
    if 0 < config.vocab_chunk < config.vocab_size:
      logprob, entropy = vocabulary.token_logprobs(
        hidden,
        vlm.head(config, params),
        token,
        banned,
        chunk=config.vocab_chunk,
      )
    else:
      logits = vlm.logits(config, params, hidden)
      logprob, entropy = grpo.token_logprobs(logits, token, banned)
  zero = jnp.zeros_like(logprob)
  return jnp.where(mask, logprob, zero), jnp.where(mask, entropy, zero)
