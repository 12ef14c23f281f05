"""Folders of still pictures as videos, at a rate that the annotation gives.

Frame n is the picture n, in the order of the numbers in their names ("2.jpg"
before "10.jpg"), at n / fps seconds. Other files in the folder do not count.
The functions are those of `video`, of the same names.
"""

import math
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from cf_jax.data import frame_size, images, video


def pictures(path: str | os.PathLike) -> list[pathlib.Path]:
  """The pictures of a folder, in order.

  Raises:
    video.VideoError: no folder, or none in it.
  """
  folder = pathlib.Path(path)
  try:
    found = [file for file in folder.iterdir() if images.is_image(file)]
  except OSError as error:
    raise video.VideoError(path, f"{error.strerror}; expected a folder") from (
      error
    )
  if not found:
    raise video.VideoError(
      path,
      f"a folder without pictures ({', '.join(images.SUFFIXES)}); expected a"
      " video, or a folder of its frames",
    )
  return sorted(found, key=_in_order)


def _in_order(file: pathlib.Path) -> list:
  parts = re.split(r"(\d+)", file.name)
  return [int(part) if n % 2 else part for n, part in enumerate(parts)]


def probe(
  path: str | os.PathLike,
  *,
  fps: float,
  limits: video.Limits = video.LIMITS,
) -> video.VideoInfo:
  """How many, and the size of the first one.

  Args:
    path: folder.
    fps: pictures a second.
    limits: what it may be.

  Raises:
    video.VideoError: as `pictures`, above a limit, or the first is none.
  """
  files = _checked(path, fps, limits)
  height, width = images.read_image(files[0], limits=limits).shape[:2]
  return video.VideoInfo(len(files), fps, width, height, len(files) / fps)


def read_frames(
  path: str | os.PathLike,
  index: np.ndarray,
  size_px: tuple[int, int] | None = None,
  *,
  fps: float,
  resize: frame_size.Resize = "area",
  limits: video.Limits = video.LIMITS,
) -> tuple[np.ndarray, np.ndarray]:
  """Pictures by their numbers.

  Args:
    path: folder.
    index: int[n] numbers in any order, repeats allowed.
    size_px: (height, width) to resize to; None keeps the pictures'.
    fps: pictures a second.
    resize: kernel, see `frame_size.resize_frame`.
    limits: what the folder may be.

  Returns:
    uint8[n, h, w, 3] RGB and float64[n] seconds.

  Raises:
    video.VideoError: as `probe`, or a number that there is none of.
  """
  files, index = _checked(path, fps, limits), np.asarray(index)
  if index.ndim != 1 or not index.size or index.min() < 0:
    raise video.VideoError(
      path, f"frame numbers must be one row, at least 0, got {index.tolist()}"
    )
  if index.max() >= len(files):
    raise video.VideoError(
      path, f"frame {index.max()} is not there; it has {len(files)} pictures"
    )
  wanted, back = np.unique(index, return_inverse=True)
  frames = []
  for number in wanted:
    frame = images.read_image(files[number], limits=limits)
    frames.append(
      frame_size.resize_frame(frame, size_px or frame.shape[:2], resize)
    )
  return video.stack(path, frames)[back], index / fps


def scan_frames(
  path: str | os.PathLike,
  num_frames: int,
  size_px: tuple[int, int],
  *,
  fps: float,
  clip: tuple[float, float] | None = None,
  within: Sequence[tuple[float, float]] = (),
  limits: video.Limits = video.LIMITS,
) -> video.Scan:
  """T pictures spread evenly over a folder, as `video.scan_frames`.

  Args:
    path: folder.
    num_frames: T.
    size_px: (height, width) to resize to.
    fps: pictures a second.
    clip: (start, end) in seconds; None is all of it.
    within: as in `video.scan_frames`.
    limits: what the folder may be.

  Raises:
    video.VideoError: as `read_frames`, or a clip without pictures.
  """
  first, stop = 0, len(_checked(path, fps, limits))
  start_s = 0.0
  if clip is not None:
    start_s = clip[0]
    first, end = (math.ceil(t * fps - 1e-3) for t in clip)
    if not 0 <= first < min(end, stop):
      raise video.VideoError(
        path, f"no picture lies in its clip {clip}; it lasts {stop / fps:.2f} s"
      )
    stop = min(end, stop)
  wanted = first + frame_size.spread(stop - first, num_frames)
  if within:
    shown_s = np.arange(first, stop) / fps - start_s
    wanted = first + frame_size.spread_within(shown_s, within, num_frames)
  frames, time_s = read_frames(path, wanted, size_px, fps=fps, limits=limits)
  pad = num_frames - len(frames)
  return video.Scan(
    frames=np.pad(frames, [(0, pad)] + [(0, 0)] * 3),
    mask=np.arange(num_frames) < len(frames),
    time_s=np.pad(np.maximum(time_s - start_s, 0), (0, pad)),
    frame_index=np.pad(wanted, (0, pad)).astype(np.int32),
    num_frames=stop - first,
  )


def _checked(path, fps, limits) -> list[pathlib.Path]:
  if not 0 < fps < math.inf:
    raise video.VideoError(
      path, f"a folder of pictures needs a positive fps, got {fps}"
    )
  files = pictures(path)
  limits.check(path, frames=len(files), duration_s=len(files) / fps)
  return files
