"""Frames -> the patches that Qwen2.5-VL's vision tower reads.

A frame is cut into patches of `patch` pixels. The merger joins squares of
`merge * merge` of them, so patches are listed square by square, row by row
inside each. A patch is flattened channel first: (channel, temporal slot, row,
column).

Axes: `n` frames or clips, `L = (h / patch) * (w / patch)` patches of one.
"""

from typing import NamedTuple

import einops
import numpy as np

# Mean and standard deviation of CLIP's pixels, per RGB channel in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Grid(NamedTuple):
  """A frame's size in patches."""

  height: int
  width: int


def grid_of(
  height: int, width: int, *, patch: int = 14, merge: int = 2
) -> Grid:
  """The grid of a frame of that many pixels.

  Raises:
    ValueError: a side is not a multiple of `patch * merge`.
  """
  side = patch * merge
  if height % side or width % side or min(height, width) < side:
    raise ValueError(
      f"frames of {height} x {width} px do not divide into squares of"
      f" {side} px (patch {patch} x merge {merge}); change"
      " data.reader.size_px (or data.loader.scan_size_px) to multiples"
    )
  return Grid(height // patch, width // patch)


def num_tokens(grid: Grid, *, merge: int = 2) -> int:
  """Visual tokens of one frame after the merger."""
  return grid.height * grid.width // merge**2


def check_frames(frames: np.ndarray) -> None:
  """Raises ValueError for what is not uint8[n, h, w, 3] with n > 0."""
  if (
    frames.ndim != 4
    or not len(frames)
    or frames.shape[-1] != 3
    or frames.dtype != np.uint8
  ):
    raise ValueError(
      f"frames must be RGB, uint8[n, h, w, 3], got {frames.dtype}"
      f"{list(frames.shape)}"
    )


def frames_to_patches(
  frames: np.ndarray,
  *,
  patch: int = 14,
  merge: int = 2,
  temporal: int = 2,
  pair: bool = False,
  mean: tuple[float, float, float] = MEAN,
  std: tuple[float, float, float] = STD,
) -> np.ndarray:
  """Cuts frames into normalised patches.

  Args:
    frames: uint8[n, h, w, 3] RGB.
    patch: side of a patch, pixels.
    merge: side of a square that the merger joins, patches.
    temporal: frames that one temporal slice holds.
    pair: False makes every frame a slice of its own, shown in all `temporal`
      slots. True puts `temporal` neighbouring frames into a slice; the last
      frame is repeated where their number is not a multiple.
    mean: of the channels, pixels in [0, 1].
    std: of the channels, pixels in [0, 1].

  Returns:
    float32[slices, L, 3 * temporal * patch * patch]; slices is n, or
    ceil(n / temporal) with `pair`.

  Raises:
    ValueError: not uint8 RGB frames, or a size that does not divide.
  """
  check_frames(frames)
  grid = grid_of(*frames.shape[1:3], patch=patch, merge=merge)
  # A byte has 256 values: normalise them, not the pixels.
  level = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
  table = (level - np.float32(mean)) / np.float32(std)
  if pair:
    missing = -len(frames) % temporal
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    slots = temporal
  else:
    slots = 1
  ordered = einops.rearrange(
    frames,
    "(n t) (gh mh ph) (gw mw pw) c -> n (gh gw mh mw) c t (ph pw)",
    t=slots,
    gh=grid.height // merge,
    gw=grid.width // merge,
    mh=merge,
    mw=merge,
    ph=patch,
    pw=patch,
  )
  count, length = ordered.shape[:2]
  pixel = np.empty((count, length, 3, temporal, patch * patch), np.float32)
  for channel in range(3):
    pixel[:, :, channel] = table[:, channel][ordered[:, :, channel]]
  return pixel.reshape(count, length, -1)
