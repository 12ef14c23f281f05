"""Video files -> RGB frames and their times, by OpenCV.

A frame's number counts the frames that can be decoded, from 0, whatever the
header says. Its time is the container's, in seconds from the start of the
stream. Files with rotation metadata come out upright; of several video streams
the first one is read, as OpenCV does.

Frames are resized to the wanted size without keeping the aspect ratio, by one
of two kernels (`resize_frame`). The sizes at which Qwen2.5-VL sees a picture or
a video, and which frames of a video, are worked out before anything is decoded:
`smart_resize`, `fit_size`, `sample_index`.

Axes: `T` sampled frames, `n` frames; pixels are [..., height, width, 3].
"""

import bisect
import contextlib
import math
import os
import pathlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image

Resize = Literal["area", "bicubic"]

# A longer way to the next wanted frame is a seek, a shorter one is decoded
# through: one seek costs a few hundred frames of decoding.
_SEEK_FRAMES = 512
# The code of FFmpeg's decoder of text.
_TEXT = int.from_bytes(b"ansi", "little")
# Of the duration in the header, how much must be decodable.
_MIN_DECODABLE = 0.9
# Seeking by key frames: OpenCV starts at one that many frames before the wanted
# frame, and a seek that saves fewer frames than the second is not worth it.
_SEEK_MARGIN, _SEEK_GAIN = 16, 32
# Of a file in parts: so long before the place where the next one is to start, a
# decoder waits for word of where it did start.
_JOINT_S = 2.0


class VideoError(ValueError):
  """A video that cannot be read; the message names the file."""


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
    num_frames: how many frames can be decoded.
  """

  frames: np.ndarray
  mask: np.ndarray
  time_s: np.ndarray
  frame_index: np.ndarray
  num_frames: int


class Chunk(NamedTuple):
  """Frames in a row, resized.

  Attributes:
    frames: uint8[n, h, w, 3] RGB.
    part: which part of the file they are of; 0 where it is not divided.
    number: int64[n] numbers of the decoded frames, counted in the part.
    num_decoded: frames decoded so far of all parts, those not taken included.
  """

  frames: np.ndarray
  part: int
  number: np.ndarray
  num_decoded: int


class _Part:
  """A stretch of a file that one decoder goes through.

  Attributes:
    start: number of its first frame, if the header is right.
    placed: is it settled where it starts, or that it does not?
    first: its first frame, shrunk; None where it does not start.
    first_s: seconds of that frame.
    time_s: seconds of its frames.
    key: numbers of the frames that are coded on their own.
    number: numbers of the frames that are taken.
    due: the first slot of time of which no frame is taken yet.
    stamped: do the container's stamps tell all its frames apart?
    next: the part whose first frame it met; None if it went to the file's end.
    error: what ended it.
  """

  def __init__(self, start: int):
    self.start = start
    self.placed = threading.Event()
    self.first: np.ndarray | None = None
    self.first_s = 0.0
    self.time_s: list[float] = []
    self.key: list[int] = []
    self.number: list[int] = []
    self.due = 0
    self.stamped = True
    self.next: _Part | None = None
    self.error: Exception | None = None


class _Moved(Exception):
  """A seek did not end at the wanted frame."""


def probe(path: str | pathlib.Path) -> VideoInfo:
  """Reads the header and the first frame.

  Raises:
    VideoError: missing, empty, or not a video.
  """
  with _capture(path, 1) as capture:
    found, picture = capture.read()
    if not found:
      raise VideoError(f"{path}: no frame can be decoded")
    return _info(capture, picture)


def read_frames(
  path: str | pathlib.Path,
  index: np.ndarray | None = None,
  size_px: tuple[int, int] | None = None,
  *,
  resize: Resize = "area",
  num_threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes frames by their numbers.

  Args:
    path: file.
    index: int[n] numbers in any order, repeats allowed; None reads all.
    size_px: (height, width) to resize to; None keeps the video's.
    resize: kernel, see `resize_frame`.
    num_threads: of the decoder. One is fastest for small videos and for many
      files at a time.

  Returns:
    uint8[n, h, w, 3] RGB and float64[n] seconds.

  Raises:
    VideoError: missing, empty, not a video, or too short for `index`.
  """
  if index is None:
    frames, time_s, _ = _decode(path, None, size_px, num_threads, resize)
    return np.stack(frames), np.asarray(time_s)
  index = np.asarray(index)
  if index.ndim != 1 or (index.size and index.min() < 0):
    raise VideoError(
      f"{path}: frame numbers must be one row, at least 0, got {index.tolist()}"
    )
  wanted, back = np.unique(index, return_inverse=True)
  frames, time_s, _ = _decode(path, wanted, size_px, num_threads, resize)
  if len(frames) < len(wanted):
    raise VideoError(
      f"{path}: frame {wanted[len(frames)]} cannot be decoded; the file is"
      " shorter or cut short"
    )
  if not frames:
    raise VideoError(f"{path}: no frame was asked for")
  return np.stack(frames)[back], np.asarray(time_s)[back]


def scan_frames(
  path: str | pathlib.Path,
  num_frames: int,
  size_px: tuple[int, int],
  *,
  num_threads: int = 1,
) -> Scan:
  """Decodes T frames spread evenly over a video, resized by area.

  Frame `k` is number `floor((k + 0.5) n / T)` of the n decodable ones; where
  n < T, all of them are taken and the remaining slots masked.

  Args:
    path: file.
    num_frames: T.
    size_px: (height, width) to resize to.
    num_threads: of the decoder.

  Raises:
    VideoError: missing, empty, not a video, or cut short.
  """
  with _capture(path, num_threads) as capture:
    fps, count = _header(capture)
  duration_s = count / fps
  may_seek = True
  while True:
    wanted = spread(max(count, 1), num_frames)
    frames, time_s, found = _decode(
      path, wanted, size_px, num_threads, to_the_end=True, may_seek=may_seek
    )
    if found is None and len(frames) == len(wanted):
      break  # read by seeking, up to the last part
    if found == count:
      break
    # The header was wrong: count, and spread the frames anew.
    may_seek = False
    count = count if found is None else found
  if time_s[-1] + duration_s / len(wanted) < _MIN_DECODABLE * duration_s:
    raise VideoError(
      f"{path}: cut short; it should last {duration_s:.1f} s, and"
      f" {time_s[-1]:.1f} s can be decoded"
    )
  real = len(frames)
  pad = num_frames - real
  return Scan(
    frames=np.pad(np.stack(frames), [(0, pad)] + [(0, 0)] * 3),
    mask=np.arange(num_frames) < real,
    time_s=np.pad(np.asarray(time_s), (0, pad)),
    frame_index=np.pad(wanted, (0, pad)).astype(np.int32),
    num_frames=count,
  )


class Stream:
  """All frames of a file, small and in chunks, however long it is.

  Decoders in threads of their own, each at a part of the file, work ahead of
  the one that iterates; they leave Python's lock alone while they do. A part
  ends at the first frame of the next one, told by its stamp and its pixels.
  Where that does not come (a seek ended elsewhere, the header is wrong), it
  goes on, and the next one counts for nothing: the answer is one decoder's.
  Iterate once; the attributes are whole when that is over.

  Attributes:
    time_s: seconds of every frame decoded, from the start of the stream.
    number: numbers of the frames that were taken.
    start_s: when the container starts the stream, seconds; of its own stamps
      OpenCV tells this one to the nearest frame only.
    seekable: do the container's stamps tell all frames apart?
    key: numbers of the frames that are coded on their own, as far as known.
    info: what the header says.
    rotation: degrees clockwise that the frames are turned by.
    codec: the four letters by which FFmpeg knows it.
  """

  info: VideoInfo
  rotation: int
  codec: str

  def __init__(
    self,
    path: str | pathlib.Path,
    size_px: tuple[int, int],
    *,
    chunk: int,
    fps: float | None = None,
    num_threads: int = 1,
    parts: int = 1,
  ):
    """Opens nothing yet.

    Args:
      path: file.
      size_px: (height, width) to resize to by `shrink_frame`.
      chunk: frames at a time; the last chunk of a part may have fewer.
      fps: frames a second to take: the first one in every 1 / fps seconds;
        None takes all.
      num_threads: of each decoder.
      parts: decoders.
    """
    self._path, self._size_px, self._chunk = path, size_px, chunk
    self._fps, self._num_threads = fps, num_threads
    self._parts = [_Part(0) for _ in range(parts)]
    self._rows: list[tuple[int, int]] = []
    self.time_s: list[float] = []
    self.number: list[int] = []
    self.start_s = 0.0
    self.seekable = True
    self.key: list[int] = []

  def __iter__(self) -> Iterator[Chunk]:
    """Decodes the file; the chunks of one part come in order.

    Raises:
      VideoError: missing, empty, not a video, or without any frame.
    """
    if len(self._parts) > 1:
      count = probe(self._path).num_frames
      for n, part in enumerate(self._parts):
        part.start = n * count // len(self._parts)
    ready, stop = queue.Queue(2 * len(self._parts)), threading.Event()
    threads = [
      threading.Thread(
        target=self._run, args=(n, ready, stop), name="decode", daemon=True
      )
      for n in range(len(self._parts))
    ]
    for thread in threads:
      thread.start()
    try:
      running = len(threads)
      while running:
        item = ready.get()
        if item is None:
          running -= 1
        else:
          yield item
    finally:
      stop.set()
      for part in self._parts:
        part.placed.set()
      with contextlib.suppress(queue.Empty):
        while True:
          ready.get_nowait()
      for thread in threads:
        thread.join()
    self._connect()

  def join(self, rows: Mapping[int, Sequence[np.ndarray]]) -> np.ndarray:
    """What was made of the frames, in order of time and each one once.

    Args:
      rows: part -> what was made of each of its chunks, [n, ...].

    Returns:
      [T, ...], a row for each of `number`.
    """
    return np.concatenate(
      [np.concatenate(rows[n])[first:] for n, first in self._rows if n in rows]
    )

  def _connect(self) -> None:
    """Follows the parts from the first one to the end of the file."""
    part, due = self._parts[0], 0
    while part is not None:
      if part.error is not None:
        raise part.error
      first, place = 0, len(self.time_s)
      if part.number and self._slot(part.time_s[part.number[0]]) < due:
        first = 1  # the part before took a frame of that slot
      self._rows.append((self._parts.index(part), first))
      self.time_s += part.time_s
      self.key += [place + n for n in part.key]
      self.number += [place + n for n in part.number[first:]]
      self.seekable &= part.stamped
      part, due = part.next, part.due
    if not self.time_s:
      raise VideoError(f"{self._path}: no frame can be decoded")

  def _run(self, here: int, ready: queue.Queue, stop: threading.Event) -> None:
    """Decodes a part into the queue; its last item is None."""

    def offer(item) -> None:
      while not stop.is_set():
        with contextlib.suppress(queue.Full):
          return ready.put(item, timeout=0.1)

    part = self._parts[here]
    try:
      with _capture(self._path, self._num_threads) as capture:
        self._decode(here, capture, offer, stop)
    except Exception as error:  # raised again where the frames are used
      part.error = error
    part.placed.set()
    offer(None)

  def _decode(self, here, capture, offer, stop) -> None:
    reader, part = _Reader(capture), self._parts[here]
    later, frames = self._parts[here + 1 :], []
    if part.start:
      capture.set(cv2.CAP_PROP_POS_FRAMES, part.start)

    def hand_over() -> None:
      if frames:
        number = np.array(part.number[-len(frames) :])
        num_decoded = sum(len(part.time_s) for part in self._parts)
        offer(Chunk(np.stack(frames), here, number, num_decoded))
        frames.clear()

    while not stop.is_set() and reader.step():
      part.next = self._meet(reader, later)
      if part.next is not None:
        break
      now_s = reader.now_s
      part.time_s.append(now_s)
      if capture.get(cv2.CAP_PROP_FRAME_TYPE) == ord("I"):
        part.key.append(reader.position - 1)
      slot = self._slot(now_s)
      if slot < part.due:
        continue
      part.due = slot + (self._fps is not None)
      picture = reader.picture()
      small = shrink_frame(picture, self._size_px)
      frames.append(cv2.cvtColor(small, cv2.COLOR_BGR2RGB))
      part.number.append(reader.position - 1)
      if reader.position == 1:  # taken at any rate
        if not here:
          self._describe(capture, picture)
        part.first, part.first_s = frames[0], now_s
        part.placed.set()
      if len(frames) == self._chunk:
        hand_over()
    part.stamped = reader.stamped
    hand_over()

  def _meet(self, reader: "_Reader", later: list[_Part]) -> _Part | None:
    """The part of which this is the first frame; drops those that are past."""
    while later:
      part = later[0]
      if not part.placed.is_set():
        if reader.now_s < part.start / reader.fps - _JOINT_S:
          return None
        part.placed.wait()
      if part.first is not None:
        if reader.now_s < part.first_s:
          return None
        # A video without stamps, or at rest, has no place to meet.
        if reader.now_s == part.first_s > 0 and reader.stamped:
          small = shrink_frame(reader.picture(), self._size_px)
          small = cv2.cvtColor(small, cv2.COLOR_BGR2RGB)
          if np.array_equal(small, part.first):
            return part
      later.pop(0)
    return None

  def _slot(self, time_s: float) -> int:
    """Which of the stretches of 1 / fps seconds; 0 where all are taken."""
    if self._fps is None:
      return 0
    return math.floor(time_s * self._fps + 1e-6)  # a rounding below is on it

  def _describe(self, capture: cv2.VideoCapture, picture: np.ndarray) -> None:
    """What the file says of itself, at its first frame."""
    four = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little")
    self.codec = four.decode("latin-1").strip("\0 ")
    self.rotation = int(capture.get(cv2.CAP_PROP_ORIENTATION_META)) % 360
    self.info = _info(capture, picture)
    self.start_s = max(0, capture.get(cv2.CAP_PROP_PTS)) / self.info.fps


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


def pick_frames(
  path: str | pathlib.Path,
  number: Sequence[int],
  stream: Stream,
  *,
  num_threads: int = 1,
) -> Iterator[np.ndarray]:
  """Decodes some frames of a file that a Stream has gone through.

  From key frame to key frame where that saves decoding, told by the stamps of
  the frames where a seek has ended; frames in between are not turned into
  pictures.

  Args:
    path: the stream's file.
    number: ascending numbers of frames.
    stream: what is known of the file.
    num_threads: of the decoder.

  Yields:
    uint8[height, width, 3] RGB, at full size and upright.

  Raises:
    VideoError: a frame that was there cannot be decoded any more.
  """
  time_s, seekable, done = np.asarray(stream.time_s), stream.seekable, 0
  while done < len(number):
    try:
      with _capture(path, num_threads) as capture:
        reader = _Reader(capture)
        while done < len(number):
          wanted = number[done]
          place = bisect.bisect_right(stream.key, wanted - _SEEK_MARGIN)
          start = stream.key[place - 1] if place else 0
          if seekable and start - reader.position >= _SEEK_GAIN:
            _seek(reader, wanted, time_s)
          while reader.position <= wanted:
            if not reader.step():
              raise VideoError(
                f"{path}: frame {wanted} cannot be decoded a second time; has"
                " the file changed?"
              )
          yield cv2.cvtColor(reader.picture(), cv2.COLOR_BGR2RGB)
          done += 1
    except _Moved:
      seekable = False  # through the whole file, from the start


def spread(count: int, num: int) -> np.ndarray:
  """int64[min(count, num)]: `floor((k + 0.5) count / num)`, or all numbers."""
  if count <= num:
    return np.arange(count)
  return (2 * np.arange(num) + 1) * count // (2 * num)


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


@contextlib.contextmanager
def _capture(
  path: str | pathlib.Path, num_threads: int
) -> Iterator[cv2.VideoCapture]:
  """An open file; OpenCV's own errors become VideoErrors."""
  # The sentence below says what FFmpeg would print into the progress bar. Read
  # when the first file is opened.
  os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
  file = pathlib.Path(path)
  if not file.is_file():
    what = "is a folder" if file.is_dir() else "there is no such file"
    raise VideoError(f"{path}: {what}; expected a video file")
  if not file.stat().st_size:
    raise VideoError(f"{path}: the file is empty; expected a video")
  capture = cv2.VideoCapture(
    str(file), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, num_threads]
  )
  try:
    if not capture.isOpened():
      raise VideoError(
        f"{path}: not a video that OpenCV can open, or cut short"
      )
    # FFmpeg draws .txt and the like as a terminal would show them.
    if int(capture.get(cv2.CAP_PROP_FOURCC)) == _TEXT:
      raise VideoError(f"{path}: a text file; expected a video")
    yield capture
  except cv2.error as error:
    raise VideoError(f"{path}: cannot be decoded ({error})") from error
  finally:
    capture.release()


def _info(capture: cv2.VideoCapture, picture: np.ndarray) -> VideoInfo:
  """The header, and the size of the first picture."""
  fps, num_frames = _header(capture)
  height, width = picture.shape[:2]
  num_frames = max(num_frames, 1)
  return VideoInfo(num_frames, fps, width, height, num_frames / fps)


def _header(capture: cv2.VideoCapture) -> tuple[float, int]:
  """Frames a second (25 where the file does not say) and frames."""
  fps = capture.get(cv2.CAP_PROP_FPS)
  count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
  fps = fps if math.isfinite(fps) and fps > 0 else 25.0
  return fps, int(count) if math.isfinite(count) and count > 0 else 0


def _decode(
  path: str | pathlib.Path,
  wanted: np.ndarray | None,
  size_px: tuple[int, int] | None,
  num_threads: int,
  resize: Resize = "area",
  *,
  to_the_end: bool = False,
  may_seek: bool = True,
) -> tuple[list[np.ndarray], list[float], int | None]:
  """The wanted frames (ascending numbers), their times, and how many exist.

  Long gaps are seeked over where the times show that the seek ended at the
  right frame; else the file is decoded through. The count is None where the
  file was not decoded to its end.
  """
  try:
    with _capture(path, num_threads) as capture:
      found = _walk(capture, wanted, size_px, resize, to_the_end, may_seek)
  except _Moved:
    with _capture(path, num_threads) as capture:
      found = _walk(capture, wanted, size_px, resize, to_the_end, False)
  if found[2] == 0:
    raise VideoError(f"{path}: no frame can be decoded")
  return found


class _Reader:
  """Steps through an open file.

  Attributes:
    position: number of the next frame.
    now_s: time of the last one, seconds.
    stamped: have all times so far been the container's own?
  """

  def __init__(self, capture: cv2.VideoCapture):
    self.capture = capture
    self.fps, self.count = _header(capture)
    self.position, self.now_s, self.stamped = 0, -1 / self.fps, True

  def step(self) -> bool:
    """Goes to the next frame; False behind the last one."""
    if not self.capture.grab():
      return False
    stamp_s = self.capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
    # Raw streams have no stamps, and broken ones go back: one frame on.
    if stamp_s > self.now_s:
      self.now_s = stamp_s
    else:
      self.now_s, self.stamped = self.now_s + 1 / self.fps, False
    self.position += 1
    return True

  def picture(self) -> np.ndarray:
    """uint8[height, width, 3] BGR of the frame stepped to."""
    found, picture = self.capture.retrieve()
    if not found:
      raise cv2.error(f"frame {self.position - 1}")
    return picture


def _seek(reader: _Reader, number: int, time_s: np.ndarray) -> None:
  """Goes to a frame at or before `number`, found by its stamp."""
  # OpenCV counts frames as if their rate were constant.
  target = round(time_s[number] * reader.fps) - 1
  reader.capture.set(cv2.CAP_PROP_POS_FRAMES, max(target, 0))
  reader.now_s = -1 / reader.fps
  if not reader.step() or not reader.stamped:
    raise _Moved
  found = int(np.argmin(np.abs(time_s - reader.now_s)))
  if abs(time_s[found] - reader.now_s) > 1e-4 or found > number:
    raise _Moved
  reader.position = found + 1


def _walk(capture, wanted, size_px, resize, to_the_end, may_seek):
  reader = _Reader(capture)
  frames, time_s, seeked = [], [], False

  def keep() -> None:
    # Kernels do not mix channels, and a small picture is faster to turn.
    picture = reader.picture()
    picture = resize_frame(picture, size_px or picture.shape[:2], resize)
    frames.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
    time_s.append(reader.now_s)

  if wanted is None:
    while reader.step():
      keep()
    return frames, time_s, reader.position
  for number in wanted.tolist():
    gap = number - reader.position
    if may_seek and gap > _SEEK_FRAMES and number < reader.count:
      capture.set(cv2.CAP_PROP_POS_FRAMES, number)
      reader.position, seeked = number, True
      due_s = number / reader.fps
      if not reader.step() or abs(reader.now_s - due_s) > 0.5 / reader.fps:
        raise _Moved
    while reader.position <= number:
      if not reader.step():
        return frames, time_s, None if seeked else reader.position
    keep()
  if to_the_end and not seeked:
    while reader.step():
      pass
    return frames, time_s, reader.position
  return frames, time_s, None
