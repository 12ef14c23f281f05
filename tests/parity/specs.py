"""The small Qwen2.5-VL checkpoints of the parity tests and their batches.

Nothing here is square or even where the real model is not: grids do not divide
the window, heads share keys unevenly, the three axes of the rotary embedding
have different widths. No torch: `reference` adds weights and outputs.
"""

import dataclasses
from typing import Any

import numpy as np

# Of transformers, as in the `parity` extra.
VERSION = "5.2.0"

# Ids of the small vocabularies.
VISION_START, VISION_END, VIDEO, IMAGE = 1, 2, 3, 4
FIRST_TEXT = 5
NUM_GENERATED = 64
PIXEL_UNIT = 1 / 64  # pixels are small integers times this
# Between the patches whose hidden states are compared.
PATCH_STEP = 5


@dataclasses.dataclass(frozen=True)
class Media:
  """An image, or a video with seconds between its slices."""

  grid: tuple[int, int, int]
  seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Spec:
  """One checkpoint and one batch for it.

  Attributes:
    text: of the text config.
    vision: of the vision config.
    tied: is the head the embedding table?
    side: where the batch is padded.
    rows: of the batch; a number stands for that many text tokens.
  """

  text: dict[str, Any]
  vision: dict[str, Any]
  tied: bool
  side: str
  rows: tuple[tuple[int | Media, ...], ...]


SPECS = {
  # One key head for five query heads; windows of 3 x 3 visual tokens.
  "tied": Spec(
    text=dict(
      vocab_size=83,
      hidden_size=40,
      intermediate_size=36,
      num_hidden_layers=2,
      num_attention_heads=5,
      num_key_value_heads=1,
      rms_norm_eps=1e-6,
      rope_parameters=dict(
        rope_type="default", rope_theta=1e6, mrope_section=[1, 2, 1]
      ),
    ),
    vision=dict(
      depth=3,
      hidden_size=12,
      intermediate_size=20,
      num_heads=3,
      patch_size=4,
      temporal_patch_size=2,
      spatial_merge_size=2,
      window_size=24,
      fullatt_block_indexes=[2],
      tokens_per_second=2,
    ),
    tied=True,
    side="left",
    rows=(
      (5, Media((1, 6, 10)), 3, Media((3, 4, 14), 4.0), 6),
      (2, Media((2, 10, 6), 2.0), 4, Media((1, 6, 10)), Media((1, 10, 6)), 5),
      (11,),
    ),
  ),
  # Merges of 3 x 3 patches of single frames; the time outruns the width.
  "merge3": Spec(
    text=dict(
      vocab_size=71,
      hidden_size=48,
      intermediate_size=36,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      rms_norm_eps=1e-5,
      rope_parameters=dict(
        rope_type="default", rope_theta=5e5, mrope_section=[3, 1, 2]
      ),
    ),
    vision=dict(
      depth=4,
      hidden_size=16,
      intermediate_size=20,
      num_heads=2,
      patch_size=2,
      temporal_patch_size=1,
      spatial_merge_size=3,
      window_size=12,
      fullatt_block_indexes=[0, 3],
      tokens_per_second=4,
    ),
    tied=False,
    side="right",
    rows=(
      (3, Media((3, 9, 15), 5.0), 7),
      (4, Media((1, 15, 9)), 2, Media((2, 3, 9), 1.0), 9),
      (1, Media((1, 3, 9)), 1, Media((1, 15, 9)), 4),
    ),
  ),
  # No block sees a whole slice; the window's side is rounded down to 4.
  "windowed": Spec(
    text=dict(
      vocab_size=97,
      hidden_size=48,
      intermediate_size=44,
      num_hidden_layers=2,
      num_attention_heads=6,
      num_key_value_heads=3,
      rms_norm_eps=1e-6,
      rope_parameters=dict(
        rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]
      ),
    ),
    vision=dict(
      depth=2,
      hidden_size=16,
      intermediate_size=20,
      num_heads=2,
      patch_size=5,
      temporal_patch_size=2,
      spatial_merge_size=2,
      window_size=44,
      fullatt_block_indexes=[],
      tokens_per_second=2,
    ),
    tied=False,
    side="left",
    rows=(
      (6, Media((1, 10, 14)), 8),
      (2, Media((2, 10, 6), 30.0), 3, Media((2, 6, 10), 1.0), 1),
    ),
  ),
}


def draw_batch(spec: Spec, seed: int) -> dict[str, np.ndarray]:
  """What a processor would return for the spec's rows."""
  rng = np.random.default_rng(seed)
  merge = spec.vision["spatial_merge_size"]
  ids, images, videos, seconds = [], [], [], []
  for row in spec.rows:
    token = []
    for part in row:
      if isinstance(part, int):
        token += rng.integers(
          FIRST_TEXT, spec.text["vocab_size"], part
        ).tolist()
        continue
      count = int(np.prod(part.grid)) // merge**2
      pad = IMAGE if part.seconds is None else VIDEO
      token += [VISION_START, *[pad] * count, VISION_END]
      if part.seconds is None:
        images.append(part.grid)
      else:
        videos.append(part.grid)
        seconds.append(part.seconds)
    ids.append(token)
  length = max(map(len, ids))
  patch_dim = (
    3 * spec.vision["temporal_patch_size"] * spec.vision["patch_size"] ** 2
  )

  def pixels(grids):
    # Steps of 1 / 64 within +-2, stored as small integers.
    number = int(sum(np.prod(grid) for grid in grids))
    return rng.integers(-127, 128, (number, patch_dim)) * np.float32(PIXEL_UNIT)

  def pad(values, fill):
    short = length - len(values)
    padding = [fill] * short
    return padding + values if spec.side == "left" else values + padding

  batch = dict(
    input_ids=np.array([pad(token, 0) for token in ids], np.int64),
    attention_mask=np.array([pad([1] * len(token), 0) for token in ids]),
  )
  if images:
    batch |= dict(
      pixel_values=pixels(images), image_grid_thw=np.array(images, np.int64)
    )
  if videos:
    batch |= dict(
      pixel_values_videos=pixels(videos),
      video_grid_thw=np.array(videos, np.int64),
      second_per_grid_ts=np.array(seconds, np.float32),
    )
  return batch
