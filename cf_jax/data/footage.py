"""What a question looks at: a video, a part of one, a picture, or a folder.

One door to the three kinds of files, for a process that decodes.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cf_jax.data import frame_size, images, picture_folder, records, video


class Footage(NamedTuple):
  """Where frames come from.

  Attributes:
    path: a video, a picture, or a folder of pictures.
    clip: (start, end) in seconds: the part that counts; None is all of it.
    fps: pictures a second of a folder, else None.
  """

  path: str
  clip: tuple[float, float] | None = None
  fps: float | None = None


def of_sample(sample: records.Sample) -> Footage:
  """What a question is about."""
  return Footage(sample.video, sample.clip, sample.fps)


def probe(footage: Footage, *, limits: video.Limits) -> video.VideoInfo:
  """What the file says of itself; `duration_s` and `num_frames` of the clip.

  Raises:
    video.VideoError: it cannot be read.
  """
  module, how = _kind(footage)
  info = module.probe(footage.path, **how, limits=limits)
  if footage.clip is None:
    return info
  start_s, end_s = footage.clip
  duration_s = max(min(end_s, info.duration_s) - start_s, 0.0)
  return info._replace(
    duration_s=duration_s, num_frames=max(round(duration_s * info.fps), 1)
  )


def scan_frames(
  footage: Footage,
  num_frames: int,
  size_px: tuple[int, int],
  within: Sequence[tuple[float, float]] = (),
  *,
  limits: video.Limits,
  may_seek: bool = True,
) -> video.Scan:
  """T frames spread evenly over it or some parts, see `video.scan_frames`.

  Raises:
    video.VideoError: it cannot be read.
  """
  module, how = _kind(footage)
  return module.scan_frames(
    footage.path,
    num_frames,
    size_px,
    clip=footage.clip,
    within=within,
    **how,
    **_going(module, may_seek),
    limits=limits,
  )


def read_frames(
  footage: Footage,
  index: np.ndarray,
  size_px: tuple[int, int],
  *,
  resize: frame_size.Resize,
  limits: video.Limits,
  may_seek: bool = True,
) -> np.ndarray:
  """uint8[n, h, w, 3] frames by their numbers in the file, clip or not.

  Raises:
    video.VideoError: it cannot be read.
  """
  module, how = _kind(footage)
  frames, _ = module.read_frames(
    footage.path,
    index,
    size_px,
    resize=resize,
    **how,
    **_going(module, may_seek),
    limits=limits,
  )
  return frames


def _going(module, may_seek: bool) -> dict[str, bool]:
  return {"may_seek": may_seek} if module is video else {}


def _kind(footage: Footage):
  """The module that reads it, and what that one wants to know besides."""
  if images.is_image(footage.path):
    return images, {}
  if footage.fps is not None:
    return picture_folder, {"fps": footage.fps}
  if os.path.isdir(footage.path):
    raise video.VideoError(
      footage.path,
      "is a folder; expected a video file, or a folder of pictures with the"
      " field fps in its annotation",
    )
  return video, {}
