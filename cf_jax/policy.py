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
from cf_jax.types import Rollout, View


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
  hidden = vlm.packed(
    config,
    params,
    embedded,
    prompt.position,
    prompt.mask,
    rollout.token,
    rollout.mask,
  )
  with jax.named_scope("vocabulary"):
    if 0 < config.vocab_chunk < config.vocab_size:
      logprob, entropy = vocabulary.token_logprobs(
        hidden,
        vlm.head(config, params),
        rollout.token,
        banned,
        chunk=config.vocab_chunk,
      )
    else:
      logits = vlm.logits(config, params, hidden)
      logprob, entropy = grpo.token_logprobs(logits, rollout.token, banned)
  zero = jnp.zeros_like(logprob)
  return (
    jnp.where(rollout.mask, logprob, zero),
    jnp.where(rollout.mask, entropy, zero),
  )
