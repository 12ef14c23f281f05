"""Still pictures as videos of one frame, by Pillow.

FFmpeg would open them as well, but it leaves a photograph as the camera was
held, and takes what there is of a file that was cut short for the whole.

Pictures come out upright (EXIF), in RGB: grey ones with three equal channels,
transparent ones on white, as Qwen2.5-VL's own tools show them. Of an animation
the first picture counts. The functions are those of `video`, of the same names.
"""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from cf_jax.data import frame_size, video

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Pillow goes by the content: EPS under another name would start Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")


def is_image(path: str | os.PathLike) -> bool:
  """Does a file's name say that it is a still picture?"""
  return pathlib.Path(path).suffix.lower() in SUFFIXES


def read_image(
  path: str | os.PathLike, *, limits: video.Limits = video.LIMITS
) -> np.ndarray:
  """uint8[height, width, 3] RGB of a whole picture.

  Args:
    path: file.
    limits: what it may be.

  Raises:
    video.VideoError: missing, not a picture, above a limit, or cut short.
  """
  try:
    limits.check(path, file_mib=os.path.getsize(path) / 2**20)
    if not os.path.isfile(path):  # a pipe would be waited for
      raise video.VideoError(path, "not a whole picture, and no file")
    with Image.open(path, formats=_FORMATS) as file:  # the header alone
      limits.check(path, pixels=file.width * file.height)
      picture = ImageOps.exif_transpose(file)  # decodes it, to its end
  except video.VideoError:
    raise
  except Exception as error:  # every format has errors of its own
    raise video.VideoError(
      path, f"not a whole picture that Pillow can read ({error})"
    ) from error
  if picture.mode.startswith("I;16"):  # converted, all but black were white
    high = np.asarray(picture) >> 8
    picture = Image.fromarray(high.astype(np.uint8))
  if picture.has_transparency_data:
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture)
  return np.array(picture.convert("RGB"))


def probe(
  path: str | os.PathLike, *, limits: video.Limits = video.LIMITS
) -> video.VideoInfo:
  """One frame at 0 s.

  Raises:
    video.VideoError: as `read_image`.
  """
  height, width = read_image(path, limits=limits).shape[:2]
  return video.VideoInfo(
    num_frames=1, fps=1.0, width=width, height=height, duration_s=0.0
  )


def read_frames(
  path: str | os.PathLike,
  index: np.ndarray | None = None,
  size_px: tuple[int, int] | None = None,
  *,
  resize: frame_size.Resize = "area",
  limits: video.Limits = video.LIMITS,
) -> tuple[np.ndarray, np.ndarray]:
  """The picture, as often as `index` asks for frame 0.

  Args:
    path: file.
    index: int[n] zeros; None is one of them.
    size_px: (height, width) to resize to; None keeps the picture's.
    resize: kernel, see `frame_size.resize_frame`.
    limits: what the file may be.

  Returns:
    uint8[n, h, w, 3] RGB and float64[n] seconds, all 0.

  Raises:
    video.VideoError: as `read_image`, or another frame is asked for.
  """
  index = np.zeros(1, np.int64) if index is None else np.asarray(index)
  if index.ndim != 1 or not index.size or np.any(index != 0):
    raise video.VideoError(
      path, f"a picture has frame 0 alone, got {index.tolist()}"
    )
  picture = read_image(path, limits=limits)
  picture = frame_size.resize_frame(
    picture, size_px or picture.shape[:2], resize
  )
  return np.repeat(picture[None], len(index), 0), np.zeros(len(index))


def scan_frames(
  path: str | os.PathLike,
  num_frames: int,
  size_px: tuple[int, int],
  *,
  clip: tuple[float, float] | None = None,
  within: Sequence[tuple[float, float]] = (),
  limits: video.Limits = video.LIMITS,
) -> video.Scan:
  """The picture in the first of T slots, the others masked.

  Args:
    path: file.
    num_frames: T.
    size_px: (height, width) to resize to.
    clip: None; a picture has no time.
    within: (), too.
    limits: what the file may be.

  Raises:
    video.VideoError: as `read_image`, or a part is asked for.
  """
  if clip is not None or within:
    raise video.VideoError(path, f"a picture has no clip, got {clip or within}")
  frame, _ = read_frames(path, None, size_px, limits=limits)
  return video.Scan(
    frames=np.pad(frame, [(0, num_frames - 1)] + [(0, 0)] * 3),
    mask=np.arange(num_frames) < 1,
    time_s=np.zeros(num_frames),
    frame_index=np.zeros(num_frames, np.int32),
    num_frames=1,
  )
