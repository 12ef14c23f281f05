"""Which frames of a video are looked at, and how large they are seen.

Both are worked out before anything is decoded: `spread`, `spread_within`,
`sample_index`, `smart_resize`, `fit_size`. Frames are then resized without
keeping the aspect ratio, by one of two kernels (`resize_frame`), or roughly
(`shrink_frame`).

Pixels are [..., height, width, 3].
"""

import math
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
from PIL import Image

Resize = Literal["area", "bicubic"]


def spread(count: int, num: int) -> np.ndarray:
  """int64[min(count, num)]: `floor((k + 0.5) count / num)`, or all numbers."""
  if count <= num:
    return np.arange(count)
  return (2 * np.arange(num) + 1) * count // (2 * num)


def num_shown(
  duration_s: float, fps: float, *, most: int, multiple: int = 1
) -> int:
  """Frames of a video at `fps`: ceil(duration fps), a multiple, `most` at most.

  Args:
    duration_s: of the video or clip.
    fps: frames a second.
    most: K, a multiple itself.
    multiple: frames that share a slice.
  """
  # Seconds that were computed from frames may lie a hair above their number.
  wanted = max(1, math.ceil(duration_s * fps - 1e-6))
  return min(-(-wanted // multiple) * multiple, most)


def spread_within(
  time_s: np.ndarray, intervals: Sequence[tuple[float, float]], num: int
) -> np.ndarray:
  """Frames spread evenly over those that lie in any of some intervals.

  `spread` over the frames inside, so that intervals that overlap count once.
  Where fewer than `num` lie inside, all of these and the nearest others, of
  equally near ones the earlier.

  Args:
    time_s: float[n] seconds of all frames, ascending.
    intervals: (start, end) seconds, both included; at least one.
    num: frames wanted.

  Returns:
    int64[min(n, num)] numbers of the frames, ascending.
  """
  away_s = np.full(len(time_s), np.inf)
  for start, end in intervals:
    np.minimum(away_s, np.maximum(start - time_s, time_s - end), out=away_s)
  # In microseconds: 2.7 - 1.0 is later than 1.7.
  away_s = np.round(np.maximum(away_s, 0), 6)
  inside = np.flatnonzero(away_s == 0)
  if len(inside) >= num:
    return inside[spread(len(inside), num)]
  return np.sort(np.argsort(away_s, kind="stable")[:num])


def sample_index(
  count: int,
  fps: float,
  *,
  sample_fps: float | None = None,
  num_frames: int | None = None,
  temporal: int = 2,
  min_frames: int = 4,
  max_frames: int = 768,
) -> np.ndarray:
  """Which frames Qwen2.5-VL's video processor takes from a video.

  Their number n is a multiple of `temporal`: `num_frames` rounded to the
  nearest one (halves to even), or `count / fps * sample_fps` within the limits,
  rounded down. Frame k is number `floor(k count / n)`.

  transformers 5.2.0 counts in float32: for some lengths (103 frames, n = 30) it
  asks for one frame more, behind the end, and of thousands of frames some are
  one lower.

  Args:
    count: frames of the video.
    fps: its frames a second.
    sample_fps: frames a second to take; or
    num_frames: frames to take.
    temporal: frames that one temporal slice holds.
    min_frames: fewest, with `sample_fps`.
    max_frames: most, with `sample_fps`.

  Returns:
    int64[n], ascending.

  Raises:
    ValueError: both or none of `sample_fps` and `num_frames`, or more frames
      wanted than there are, or none.
  """
  if (sample_fps is None) == (num_frames is None):
    raise ValueError(
      f"got sample_fps={sample_fps} and num_frames={num_frames}; give one of"
      " them"
    )
  if num_frames is not None:
    num = round(num_frames / temporal) * temporal
  else:
    most = min(max_frames, count) // temporal * temporal
    num = min(max(count / fps * sample_fps, min_frames), most)
    num = math.floor(num / temporal) * temporal
  if not 0 < num <= count:
    raise ValueError(
      f"{num} frames (a multiple of {temporal}) cannot be taken from a video of"
      f" {count}; change num_frames or sample_fps"
    )
  return np.arange(num) * count // num


def smart_resize(
  height: int,
  width: int,
  *,
  factor: int = 28,
  min_pixels: int = 4 * 28 * 28,
  max_pixels: int = 16384 * 28 * 28,
) -> tuple[int, int]:
  """The size at which Qwen2.5-VL (arXiv 2502.13923) sees a picture.

  Both sides become the nearest multiples of `factor` (halves to even); where
  that area is outside the limits, the picture is scaled to the limit first and
  rounded inwards. A side may round to 0 on the way: such a picture is scaled as
  one that is too small.

  Args:
    height: pixels.
    width: pixels.
    factor: patch size times merge size.
    min_pixels: smallest area; the defaults are those of the released models.
    max_pixels: largest area.

  Returns:
    (height, width) in pixels.

  Raises:
    ValueError: a side ratio above 200, which no such grid shows, or limits
      that leave no area.
  """
  if min_pixels > max_pixels:
    raise ValueError(
      f"min_pixels is {min_pixels}, max_pixels {max_pixels}; lower the first"
      " or raise the second"
    )
  if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
    raise ValueError(
      f"got a picture of {height} x {width} px, expected positive sides with"
      " a ratio of at most 200"
    )
  rows = round(height / factor) * factor
  columns = round(width / factor) * factor
  if rows * columns > max_pixels:
    scale = math.sqrt(height * width / max_pixels)
    rows = max(factor, math.floor(height / scale / factor) * factor)
    columns = max(factor, math.floor(width / scale / factor) * factor)
  elif rows * columns < min_pixels:
    scale = math.sqrt(min_pixels / (height * width))
    rows = math.ceil(height * scale / factor) * factor
    columns = math.ceil(width * scale / factor) * factor
  return rows, columns


def fit_size(
  height: int,
  width: int,
  *,
  num_frames: int,
  factor: int = 28,
  min_pixels: int = 128 * 28 * 28,
  max_pixels: int = 768 * 28 * 28,
  total_pixels: int | None = None,
  frames_per_slice: int = 2,
) -> tuple[int, int]:
  """The size at which the frames of one video are seen.

  `smart_resize` within the limits of a frame; and where the video has a budget,
  its frames share it: a frame gets at most `total_pixels / num_frames *
  frames_per_slice`, but 5 % above `min_pixels` in any case, so that a rounding
  fits between the limits.

  Args:
    height: of the file's frames, pixels.
    width: of the file's frames, pixels.
    num_frames: how many of them are shown.
    factor: patch size times merge size.
    min_pixels: smallest area of a frame.
    max_pixels: largest area of a frame.
    total_pixels: area of all temporal slices together, `factor**2` for every
      visual token that the video may cost; None sets no such limit.
    frames_per_slice: frames that share the tokens of one temporal slice: 2
      where neighbours are paired, 1 where each keyframe is a slice.

  Returns:
    (height, width) in pixels.

  Raises:
    ValueError: as `smart_resize`.
  """
  if total_pixels is not None:
    share = total_pixels / num_frames * frames_per_slice
    max_pixels = min(max_pixels, max(share, int(min_pixels * 1.05)))
  return smart_resize(
    height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels
  )


def resize_frame(
  frame: np.ndarray, size_px: tuple[int, int], kernel: Resize
) -> np.ndarray:
  """Resizes one picture.

  - "area", OpenCV: the mean of the covered pixels where both sides shrink, else
    bicubic without antialiasing. The faster one.
  - "bicubic", Pillow: antialiased, bitwise as Qwen2.5-VL's image processor
    does it; two to three times slower.

  On frames of real videos, shrunk by 1.3 to 30, they differ by 0.2 to 0.8 of
  255 levels on average and by up to 41 at sharp edges.

  Args:
    frame: uint8[height, width, 3].
    size_px: (height, width) wanted; that of the frame leaves it as it is.
    kernel: one of the above.

  Raises:
    ValueError: an unknown kernel.
  """
  if kernel not in ("area", "bicubic"):
    raise ValueError(
      f"resize must be 'area' or 'bicubic', got {kernel!r}; change"
      " config.data.reader.resize"
    )
  if frame.shape[:2] == tuple(size_px):
    return frame
  height, width = size_px
  if kernel == "bicubic":
    picture = Image.fromarray(frame)
    return np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
  shrinks = height <= frame.shape[0] and width <= frame.shape[1]
  return cv2.resize(
    frame,
    (width, height),
    interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC,
  )


def shrink_frame(frame: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
  """Resizes one picture for looking at many: bilinear, then means of 2 x 2.

  Sixteen pixels of the frame go into one of the result, whatever its size, so
  it takes a tenth of the time of "area" or less. Curves of variation differ by
  about 1 % from those of "area" on real videos.

  Args:
    frame: uint8[height, width, 3].
    size_px: (height, width) wanted.
  """
  height, width = size_px
  twice = cv2.resize(
    frame, (2 * width, 2 * height), interpolation=cv2.INTER_LINEAR
  )
  return cv2.resize(twice, (width, height), interpolation=cv2.INTER_AREA)
