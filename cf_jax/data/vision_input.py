"""Pictures and videos -> what Qwen2.5-VL's processor makes of them.

The arrays have the names, shapes and order that transformers' processor gives,
so that they fit the reference-shaped door `vlm.forward`. A picture is resized
(`frame_size.smart_resize`, antialiased bicubic), scaled to [0, 1], normalised
per channel and cut into patches; the frames of a video are taken in pairs, the
last one repeated where their number is odd.

Against transformers 5.2.0: the values of the image processor that uses Pillow,
bit for bit. The image processor that uses torchvision, and the video processor,
which has no other form, have the same kernel with coarser weights: over frames
of real videos up to 5 of 255 levels away, 0.01 on average.

Axes: `n` pictures, videos or frames; pixels are [..., height, width, 3].
"""

import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from cf_jax.data import frame_size, json_file, patches

# What a preprocessor's file may say only in one way.
_FIXED = {
  "do_resize": True,
  "do_rescale": True,
  "do_normalize": True,
  "rescale_factor": 1 / 255,
  "resample": 3,  # bicubic
}
# Areas where a file names none: those of transformers' classes.
_PIXELS = {
  "image": (4 * 28 * 28, 1280 * 28 * 28),
  "video": (128 * 28 * 28, 768 * 28 * 28),
}


class Preprocessor(NamedTuple):
  """How pictures become patches; the released models' values for images.

  Attributes:
    patch: side of a patch, pixels.
    merge: side of a square that the merger joins, patches.
    temporal: frames that one temporal slice holds.
    min_pixels: smallest area of a picture or frame.
    max_pixels: largest area of a picture or frame.
    mean: of the channels, pixels in [0, 1].
    std: of the channels, pixels in [0, 1].
  """

  patch: int = 14
  merge: int = 2
  temporal: int = 2
  min_pixels: int = 4 * 28 * 28
  max_pixels: int = 16384 * 28 * 28
  mean: tuple[float, float, float] = patches.MEAN
  std: tuple[float, float, float] = patches.STD


def find_preprocessor(
  folder: str | pathlib.Path, media: Literal["image", "video"]
) -> tuple[pathlib.Path, dict[str, Any]] | None:
  """A Qwen2.5-VL directory's settings for `media`, as they are written.

  They are the part for `media` in `processor_config.json` (transformers 5), or
  `video_preprocessor_config.json` for videos, or `preprocessor_config.json`:
  the first that is there, as transformers reads them.

  Returns:
    The file that holds them and its object (of `processor_config.json`: the
    part for `media`); None where there is none.

  Raises:
    ValueError: a file that is not JSON, or holds another thing than an object.
  """
  folder = pathlib.Path(folder)
  path = folder / "processor_config.json"
  if path.is_file():
    part = f"{media}_processor"
    spec = json_file.field(
      json_file.read_object(path), part, "an object", prefix=f"{path}: "
    )
    if spec is not None:
      return path, spec
  names = ("video_preprocessor_config.json",) * (media == "video")
  for name in (*names, "preprocessor_config.json"):
    path = folder / name
    if path.is_file():
      return path, json_file.read_object(path)
  return None


def read_preprocessor(
  folder: str | pathlib.Path, media: Literal["image", "video"]
) -> Preprocessor:
  """The preprocessor of a Qwen2.5-VL directory; see `find_preprocessor`.

  Raises:
    ValueError: none is there, a broken one, or one that asks for another kind
      of work.
  """
  found = find_preprocessor(folder, media)
  if found is None:
    raise ValueError(
      f"no preprocessor in {str(folder)!r}: expected preprocessor_config.json"
      " or processor_config.json; copy it from the model's repository"
    )
  path, spec = found
  for key, expected in _FIXED.items():
    if spec.get(key, expected) != expected:
      raise ValueError(
        f"{path}: {key} is {spec[key]}, expected {expected}; no other"
        " preprocessing than Qwen2.5-VL's is supported"
      )
  # Older files name the areas so, newer ones as edges; both may be there.
  where = f"{path}: "
  size = json_file.field(spec, "size", "an object", prefix=where, default={})
  smallest, largest = _PIXELS[media]

  def count(key, default):
    return json_file.field(
      spec, key, "a positive integer", prefix=where, default=default
    )

  def area(key, edge, default):
    kind = "a number of at least 0"
    return json_file.field(spec, key, kind, prefix=where) or json_file.field(
      size, edge, kind, prefix=f"{where}size.", default=default
    )

  def colours(key, default):
    kind = "a list of three numbers"
    return tuple(
      json_file.field(spec, key, kind, prefix=where, default=default)
    )

  return Preprocessor(
    patch=count("patch_size", 14),
    merge=count("merge_size", 2),
    temporal=count("temporal_patch_size", 2),
    min_pixels=area("min_pixels", "shortest_edge", smallest),
    max_pixels=area("max_pixels", "longest_edge", largest),
    mean=colours("image_mean", patches.MEAN),
    std=colours("image_std", patches.STD),
  )


def image_inputs(
  images: Sequence[np.ndarray], settings: Preprocessor
) -> dict[str, np.ndarray]:
  """Patches of pictures, each at its own size.

  Args:
    images: n times uint8[h, w, 3] RGB.
    settings: see `read_preprocessor`.

  Returns:
    pixel_values float32[patches of all pictures, 3 * temporal * patch**2] and
    image_grid_thw int64[n, 3], (1, height, width) in patches.

  Raises:
    ValueError: no picture, not uint8 RGB, or a side ratio above 200.
  """
  made = [_patches(np.asarray(image)[None], settings) for image in images]
  return {
    "pixel_values": np.concatenate([values for values, _ in made]),
    "image_grid_thw": np.array([grid for _, grid in made]),
  }


def video_inputs(
  videos: Sequence[np.ndarray],
  fps: Sequence[float],
  settings: Preprocessor,
) -> dict[str, np.ndarray]:
  """Patches of videos, frames in pairs, each video at its own size.

  Args:
    videos: n times uint8[frames, h, w, 3] RGB.
    fps: n; frames a second of those frames, not of the file they are from.
    settings: see `read_preprocessor`.

  Returns:
    pixel_values_videos float32[patches of all videos, 3 * temporal *
    patch**2], video_grid_thw int64[n, 3] and second_per_grid_ts float64[n]
    seconds from one temporal slice to the next.

  Raises:
    ValueError: no video or frame, not uint8 RGB, or a side ratio above 200.
  """
  if len(fps) != len(videos):
    raise ValueError(
      f"got {len(videos)} videos and fps of {len(fps)}; give one for each"
    )
  made = [_patches(np.asarray(frames), settings) for frames in videos]
  return {
    "pixel_values_videos": np.concatenate([values for values, _ in made]),
    "video_grid_thw": np.array([grid for _, grid in made]),
    "second_per_grid_ts": np.array([settings.temporal / rate for rate in fps]),
  }


def _patches(frames, settings) -> tuple[np.ndarray, tuple[int, int, int]]:
  """uint8[n, h, w, 3] -> patches of all slices, and the grid."""
  patches.check_frames(frames)
  size_px = frame_size.smart_resize(
    *frames.shape[1:3],
    factor=settings.patch * settings.merge,
    min_pixels=settings.min_pixels,
    max_pixels=settings.max_pixels,
  )
  resized = np.stack(
    [frame_size.resize_frame(frame, size_px, "bicubic") for frame in frames]
  )
  slices = patches.frames_to_patches(
    resized,
    patch=settings.patch,
    merge=settings.merge,
    temporal=settings.temporal,
    pair=True,
    mean=settings.mean,
    std=settings.std,
  )
  height, width = (side // settings.patch for side in size_px)
  return slices.reshape(-1, slices.shape[-1]), (len(slices), height, width)
