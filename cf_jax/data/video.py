"""Video files -> RGB frames and their times, by OpenCV.

A frame's number counts the frames that can be decoded, from 0, whatever the
header says. Its time is the container's, in seconds from the start of the
stream. Files with rotation metadata come out upright; of several video streams
the first one is read, as OpenCV does.

What a file may be is checked before it is decoded (`Limits`), by what its
header says, and again by what decoding finds. Only containers of video are
opened, and nothing but the file itself: a playlist that names other files or
addresses is refused.

Axes: `T` sampled frames, `n` frames; pixels are [..., height, width, 3].
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from cf_jax.data import frame_size

# Of what this module returns for the same file: caches are of one version.
VERSION = 1

# Farther than the longest way between two key frames by so many frames, the
# next wanted frame is sought: OpenCV starts at least 16 frames ahead of it, at
# a key frame, and opening the decoder anew takes the time of some more.
_SEEK_GAIN = 64
# Of the duration in the header, or of a clip, how much must be decodable.
_MIN_DECODABLE = 0.9
# Seconds by which an annotated clip may end behind the video: many are rounded.
_ROUNDED_S = 0.5
# FFmpeg's names of the containers that are opened. Not among them: playlists
# (hls, concat, dash, sdp), pictures (`images` reads them) and text.
_FORMATS = (
  "mov,mp4,m4a,3gp,3g2,mj2",
  "matroska,webm",
  "avi",
  "mpegts",
  "mpeg",
  "mpegvideo",
  "asf",
  "flv",
  "ogg",
  "rm",
  "mxf",
  "nut",
  "dv",
  "wtv",
  "ivf",
  "m4v",
  "h264",
  "hevc",
  "obu",
)
_OPENING = f"protocol_whitelist;file|format_whitelist;{','.join(_FORMATS)}"


class VideoError(ValueError):
  """A video that cannot be read; the message begins with its name.

  Attributes:
    path: of the file.
  """

  def __init__(self, path: str | os.PathLike, what: str):
    super().__init__(str(path), what)
    self.path = str(path)

  def __str__(self) -> str:
    return ": ".join(self.args)


class Limits(NamedTuple):
  """What a file may be; anything above is refused before it is decoded.

  Attributes:
    max_file_mib: bytes of the file, 2**20 each.
    max_pixels: height times width of a frame; 8192 x 4320.
    max_duration_s: seconds.
    max_frames: frames.
  """

  max_file_mib: float = 16384.0
  max_pixels: int = 35389440
  max_duration_s: float = 43200.0
  max_frames: int = 2592000

  def check(self, path: str | os.PathLike, **found: float) -> None:
    """Compares what is known of a file.

    Args:
      path: of the file.
      **found: file_mib, pixels, duration_s or frames.

    Raises:
      VideoError: above a limit; names it.
    """
    for name, value in found.items():
      limit = getattr(self, f"max_{name}")
      if value > limit:
        raise VideoError(
          path,
          f"{name} is {value:.12g}, above the limit of {limit:.12g}; if that is"
          f" right, raise limits.max_{name}",
        )


LIMITS = Limits()  # of files that nobody set others for


class VideoInfo(NamedTuple):
  """What the header of a video says.

  Attributes:
    num_frames: frames; decoding may find more or fewer.
    fps: mean frames a second.
    width: pixels, after rotation.
    height: pixels, after rotation.
    duration_s: seconds.
  """

  num_frames: int
  fps: float
  width: int
  height: int
  duration_s: float


class Scan(NamedTuple):
  """T frames spread over a video; slots beyond its end are masked.

  Attributes:
    frames: uint8[T, h, w, 3], 0 where masked.
    mask: bool[T] True for real frames, which come first.
    time_s: float64[T] seconds, 0 where masked.
    frame_index: int32[T] numbers of the decoded frames, 0 where masked.
    num_frames: how many frames can be decoded; of a clip, how many it has.
  """

  frames: np.ndarray
  mask: np.ndarray
  time_s: np.ndarray
  frame_index: np.ndarray
  num_frames: int


class _Moved(Exception):
  """A seek did not end at the wanted frame."""


def probe(path: str | os.PathLike, *, limits: Limits = LIMITS) -> VideoInfo:
  """Reads the header and the first frame.

  Args:
    path: file.
    limits: what it may be.

  Raises:
    VideoError: missing, empty, not a video, or above a limit.
  """
  with open_file(path, 1, limits) as capture:
    found, picture = capture.read()
    if not found:
      raise VideoError(path, "no frame can be decoded")
    return info_of(capture, picture)


def read_frames(
  path: str | os.PathLike,
  index: np.ndarray | None = None,
  size_px: tuple[int, int] | None = None,
  *,
  resize: frame_size.Resize = "area",
  num_threads: int = 1,
  limits: Limits = LIMITS,
  may_seek: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes frames by their numbers.

  Args:
    path: file.
    index: int[n] numbers in any order, repeats allowed; None reads all.
    size_px: (height, width) to resize to; None keeps the video's.
    resize: kernel, see `frame_size.resize_frame`.
    num_threads: of the decoder. One is fastest for small videos and for many
      files at a time.
    limits: what the file may be.
    may_seek: False decodes all that comes before a wanted frame.

  Returns:
    uint8[n, h, w, 3] RGB and float64[n] seconds.

  Raises:
    VideoError: missing, empty, not a video, above a limit, or too short for
      `index`.
  """
  how = dict(
    num_threads=num_threads, resize=resize, limits=limits, may_seek=may_seek
  )
  if index is None:
    frames, time_s, _ = _decode(path, None, size_px, **how)
    return stack(path, frames), np.asarray(time_s)
  index = np.asarray(index)
  if index.ndim != 1 or (index.size and index.min() < 0):
    raise VideoError(
      path, f"frame numbers must be one row, at least 0, got {index.tolist()}"
    )
  wanted, back = np.unique(index, return_inverse=True)
  frames, time_s, _ = _decode(path, wanted, size_px, **how)
  if len(frames) < len(wanted):
    raise VideoError(
      path,
      f"frame {wanted[len(frames)]} cannot be decoded; the file is shorter or"
      " cut short",
    )
  if not frames:
    raise VideoError(path, "no frame was asked for")
  return stack(path, frames)[back], np.asarray(time_s)[back]


def scan_frames(
  path: str | os.PathLike,
  num_frames: int,
  size_px: tuple[int, int],
  *,
  clip: tuple[float, float] | None = None,
  within: Sequence[tuple[float, float]] = (),
  num_threads: int = 1,
  limits: Limits = LIMITS,
  may_seek: bool = True,
) -> Scan:
  """Decodes T frames spread evenly over a video, resized by area.

  Frame `k` is number `floor((k + 0.5) n / T)` of the n decodable ones; where
  n < T, all of them are taken and the remaining slots masked.

  Args:
    path: file.
    num_frames: T.
    size_px: (height, width) to resize to.
    clip: (start, end) in seconds: only frames at or after the first and before
      the second count; times are given from its start. None is the whole file.
    within: (start, end) in seconds of such times: the frames are spread over
      those inside, see `frame_size.spread_within`; () is everything.
    num_threads: of the decoder.
    limits: what the file may be.
    may_seek: False decodes all that comes before a wanted frame.

  Raises:
    VideoError: missing, empty, not a video, above a limit, or cut short.
  """
  how = dict(num_threads=num_threads, limits=limits)
  if clip is None and not within:
    wanted, count, frames, time_s = _spread(
      path, num_frames, size_px, may_seek, how
    )
  else:
    wanted, count, frames, time_s = _spread_part(
      path, clip, within, num_frames, size_px, may_seek, how
    )
  real = len(frames)
  pad = num_frames - real
  return Scan(
    frames=np.pad(stack(path, frames), [(0, pad)] + [(0, 0)] * 3),
    mask=np.arange(num_frames) < real,
    time_s=np.pad(np.asarray(time_s), (0, pad)),
    frame_index=np.pad(wanted, (0, pad)).astype(np.int32),
    num_frames=count,
  )


def _spread(path, num_frames, size_px, may_seek, how):
  """Numbers of the frames that a scan takes, how many there are, both decoded.

  Raises:
    VideoError: among others, the file ends long before its header says.
  """
  with open_file(path, how["num_threads"], how["limits"]) as capture:
    fps, count = header(capture)
  duration_s = count / fps
  while True:
    wanted = frame_size.spread(max(count, 1), num_frames)
    frames, time_s, found = _decode(
      path, wanted, size_px, to_the_end=True, may_seek=may_seek, **how
    )
    if found == count:
      break
    # The header was wrong: spread the frames over those that there are.
    count, may_seek = found, False
  if time_s[-1] + duration_s / len(wanted) < _MIN_DECODABLE * duration_s:
    raise VideoError(
      path,
      f"cut short; it should last {duration_s:.1f} s, and {time_s[-1]:.1f} s"
      " can be decoded",
    )
  return wanted, count, frames, time_s


def _spread_part(path, clip, within, num_frames, size_px, may_seek, how):
  """As `_spread`, of a part; times count from the start of the clip."""
  with open_file(path, how["num_threads"], how["limits"]) as capture:
    fps, count = header(capture)
  start_s, end_s = clip = clip or (0.0, max(count, 1) / fps)
  if not 0 <= start_s < end_s < math.inf:
    raise VideoError(
      path, f"a clip is from a second to a later one, got {clip}"
    )

  def spread_parts(stamp_s):
    return frame_size.spread_within(stamp_s - start_s, within, num_frames)

  # Where all frames lie at number / fps; an end of a clip is often rounded.
  first, stop = (math.ceil(t * fps - 1e-3) for t in clip)
  if within:
    last = max(min(stop, count), first + 1)
    wanted = first + spread_parts(np.arange(first, last) / fps)
  else:
    wanted = first + frame_size.spread(max(stop - first, 1), num_frames)
  frames, time_s, _ = _decode(path, wanted, size_px, may_seek=may_seek, **how)
  steady = len(frames) == len(wanted) and np.all(
    np.abs(np.asarray(time_s) - wanted / fps) < 0.5 / fps
  )
  if not steady:
    stamp_s = _stamps(path, end_s, **how)
    first, stop = np.searchsorted(stamp_s, np.asarray(clip) - 1e-3 / fps)
    missing_s = end_s - start_s
    if len(stamp_s):
      missing_s = min(missing_s, end_s - stamp_s[-1] - 1 / fps)
    allowed_s = max((1 - _MIN_DECODABLE) * (end_s - start_s), _ROUNDED_S)
    if missing_s > allowed_s or stop == first:
      raise VideoError(
        path,
        f"its clip is from {start_s:.2f} to {end_s:.2f} s, and"
        f" {stop - first} frames of it can be decoded, the last frame before"
        f" its end at {stamp_s[-1] if len(stamp_s) else 0:.2f} s",
      )
    if within:
      wanted = first + spread_parts(stamp_s[first:stop])
    else:
      wanted = first + frame_size.spread(stop - first, num_frames)
    frames, time_s, _ = _decode(path, wanted, size_px, may_seek=False, **how)
  shown_s = np.maximum(np.asarray(time_s) - start_s, 0)  # rounding
  return wanted, int(stop - first), frames, shown_s


@contextlib.contextmanager
def open_file(
  path: str | os.PathLike, num_threads: int, limits: Limits = LIMITS
) -> Iterator[cv2.VideoCapture]:
  """An open file within the limits; OpenCV's errors become VideoErrors."""
  # The sentence below says what FFmpeg would print into the progress bar. Read
  # when the first file is opened.
  os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
  own = os.environ.get("OPENCV_FFMPEG_CAPTURE_OPTIONS", "")
  # Of two values of an option the last one holds.
  if not own.endswith(_OPENING):
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = (
      f"{own}|{_OPENING}" if own else _OPENING
    )
  file = pathlib.Path(path)
  if not file.is_file():
    what = "is a folder" if file.is_dir() else "there is no such file"
    raise VideoError(path, f"{what}; expected a video file")
  size = file.stat().st_size
  if not size:
    raise VideoError(path, "the file is empty; expected a video")
  limits.check(path, file_mib=size / 2**20)
  capture = cv2.VideoCapture(
    str(file), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, num_threads]
  )
  try:
    if not capture.isOpened():
      raise VideoError(path, "not a video that OpenCV can open, or cut short")
    fps, count = header(capture)
    pixels = capture.get(cv2.CAP_PROP_FRAME_WIDTH) * capture.get(
      cv2.CAP_PROP_FRAME_HEIGHT
    )
    limits.check(path, pixels=pixels, frames=count, duration_s=count / fps)
    yield capture
  except cv2.error as error:
    raise VideoError(path, f"cannot be decoded ({error})") from error
  finally:
    capture.release()


def info_of(capture: cv2.VideoCapture, picture: np.ndarray) -> VideoInfo:
  """The header, and the size of the first picture."""
  fps, num_frames = header(capture)
  height, width = picture.shape[:2]
  num_frames = max(num_frames, 1)
  return VideoInfo(num_frames, fps, width, height, num_frames / fps)


def header(capture: cv2.VideoCapture) -> tuple[float, int]:
  """Frames a second (25 where the file does not say) and frames."""
  fps = capture.get(cv2.CAP_PROP_FPS)
  count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
  fps = fps if math.isfinite(fps) and fps > 0 else 25.0
  return fps, int(count) if math.isfinite(count) and count > 0 else 0


class Reader:
  """Steps through an open file.

  Attributes:
    position: number of the next frame.
    now_s: time of the last one, seconds.
    stamped: have all times so far been the container's own?
    gap: most frames from one key frame to the next, as far as seen; 0 before a
      second one.
  """

  def __init__(
    self,
    capture: cv2.VideoCapture,
    path: str | os.PathLike = "",
    limits: Limits = LIMITS,
  ):
    self.capture, self._path, self._limits = capture, path, limits
    self.fps, self.count = header(capture)
    self.position, self.now_s, self.stamped = 0, -1 / self.fps, True
    self.gap, self._key = 0, None

  def step(self) -> bool:
    """Goes to the next frame; False behind the last one.

    Raises:
      VideoError: there is more of the file than the limits allow.
    """
    if not self.capture.grab():
      return False
    stamp_s = self.capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
    # Raw streams have no stamps, and broken ones go back: one frame on.
    if stamp_s > self.now_s:
      self.now_s = stamp_s
    else:
      self.now_s, self.stamped = self.now_s + 1 / self.fps, False
    if self.is_key():
      if self._key is not None:
        self.gap = max(self.gap, self.position - self._key)
      self._key = self.position
    self.position += 1
    # The header may have promised less.
    self._limits.check(self._path, frames=self.position, duration_s=self.now_s)
    return True

  def jump(self, number: int, at_s: float) -> None:
    """Lets OpenCV seek; the next step gives the frame where that ended.

    Args:
      number: of a frame, as OpenCV counts them: by time, at a constant rate.
      at_s: what comes is later than this.
    """
    self.capture.set(cv2.CAP_PROP_POS_FRAMES, number)
    self.now_s, self._key = at_s, None

  def is_key(self) -> bool:
    """Is the frame stepped to coded on its own?"""
    return self.capture.get(cv2.CAP_PROP_FRAME_TYPE) == ord("I")

  def picture(self) -> np.ndarray:
    """uint8[height, width, 3] BGR of the frame stepped to."""
    found, picture = self.capture.retrieve()
    if not found:
      raise cv2.error(f"frame {self.position - 1}")
    height, width = picture.shape[:2]
    self._limits.check(self._path, pixels=height * width)  # it may change
    return picture


def _decode(
  path: str | os.PathLike,
  wanted: np.ndarray | None,
  size_px: tuple[int, int] | None,
  *,
  num_threads: int,
  limits: Limits,
  resize: frame_size.Resize = "area",
  to_the_end: bool = False,
  may_seek: bool = True,
) -> tuple[list[np.ndarray], list[float], int]:
  """The wanted frames (ascending numbers), their times, and how many exist.

  Gaps between wanted frames are sought over where that is cheaper than decoding
  them, and where the times show that frames have a constant rate and that the
  seek ended at the right one; else the file is decoded through. The count is
  what was gone through where neither `to_the_end` is asked for nor frames are
  missing.
  """
  how = size_px, resize, to_the_end
  try:
    with open_file(path, num_threads, limits) as capture:
      reader = Reader(capture, path, limits)
      found = _walk(reader, wanted, *how, may_seek)
  except _Moved:
    with open_file(path, num_threads, limits) as capture:
      found = _walk(Reader(capture, path, limits), wanted, *how, False)
  if found[2] == 0:
    raise VideoError(path, "no frame can be decoded")
  return found


def _walk(reader, wanted, size_px, resize, to_the_end, may_seek):
  frames, time_s, sought = [], [], False

  def keep() -> None:
    # Kernels do not mix channels, and a small picture is faster to turn.
    picture = reader.picture()
    picture = frame_size.resize_frame(
      picture, size_px or picture.shape[:2], resize
    )
    frames.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
    time_s.append(reader.now_s)

  if wanted is None:
    while reader.step():
      keep()
    return frames, time_s, reader.position
  for number in wanted.tolist():
    while reader.position <= number:
      ahead = number - reader.position
      # Not before two key frames are seen: there may be one alone.
      if may_seek and reader.gap and ahead > reader.gap + _SEEK_GAIN:
        if not sought:
          _check_rate(reader)
        _seek(reader, number)
        sought = True
      elif not reader.step():
        if sought:
          raise _Moved
        return frames, time_s, reader.position
    keep()
  if sought:
    return frames, time_s, reader.count  # which `_check_rate` has seen
  while to_the_end and reader.step():
    pass
  return frames, time_s, reader.position


def _check_rate(reader: Reader) -> None:
  """Goes to the end of the file: is frame n at n / fps there, and the last?

  Frames that are left out somewhere, or come twice, would show.
  """
  last = reader.count - 1
  reader.jump(last, -1)
  if (
    last < reader.position
    or not reader.step()
    or abs(reader.now_s - last / reader.fps) > 0.5 / reader.fps
    or reader.capture.grab()
  ):
    raise _Moved


def _seek(reader: Reader, number: int) -> None:
  """Steps to a frame, and is sure that it is the one."""
  reader.jump(number, -1)
  reader.position = number
  due_s = number / reader.fps
  if (
    number >= reader.count
    or not reader.step()
    or not reader.stamped
    or abs(reader.now_s - due_s) > 0.5 / reader.fps
  ):
    raise _Moved


def _stamps(path, end_s, *, num_threads, limits) -> np.ndarray:
  """float64[n] seconds of the frames before a time, decoded through."""
  stamp_s = []
  with open_file(path, num_threads, limits) as capture:
    reader = Reader(capture, path, limits)
    while reader.step() and reader.now_s < end_s:
      stamp_s.append(reader.now_s)
  return np.asarray(stamp_s)


def stack(path: str | os.PathLike, frames: list[np.ndarray]) -> np.ndarray:
  """uint8[n, h, w, 3] of pictures of one size."""
  sizes = {frame.shape[:2] for frame in frames}
  if len(sizes) > 1:
    raise VideoError(
      path, f"frames are of several sizes, {sorted(sizes)}; give one to read at"
    )
  return np.stack(frames)
