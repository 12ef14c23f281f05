"""All frames of a file, small and in chunks, however long it is.

Decoders in threads of their own, each at a part of the file, work ahead of the
one that iterates; `pick_frames` then decodes some of the frames at full size.

Axes: `T` frames taken, `n` frames; pixels are [..., height, width, 3].
"""

import bisect
import contextlib
import math
import pathlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from cf_jax.data import frame_size, video

# Seeking by key frames: OpenCV starts at one that many frames before the wanted
# frame, and a seek that saves fewer frames than the second is not worth it.
_SEEK_MARGIN, _SEEK_GAIN = 16, 32
# Of a file in parts: so long before the place where the next one is to start, a
# decoder waits for word of where it did start.
_JOINT_S = 2.0


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


class FrameStream:
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
    limits: what the file may be.
  """

  info: video.VideoInfo
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
    limits: video.Limits = video.LIMITS,
  ):
    """Opens nothing yet.

    Args:
      path: file.
      size_px: (height, width) to resize to by `frame_size.shrink_frame`.
      chunk: frames at a time; the last chunk of a part may have fewer.
      fps: frames a second to take: the first one in every 1 / fps seconds;
        None takes all.
      num_threads: of each decoder.
      parts: decoders.
      limits: what the file may be.
    """
    self._path, self._size_px, self._chunk = path, size_px, chunk
    self.limits = limits
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
      video.VideoError: missing, empty, not a video, or without any frame.
    """
    if len(self._parts) > 1:
      count = video.probe(self._path, limits=self.limits).num_frames
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
      raise video.VideoError(self._path, "no frame can be decoded")

  def _run(self, here: int, ready: queue.Queue, stop: threading.Event) -> None:
    """Decodes a part into the queue; its last item is None."""

    def offer(item) -> None:
      while not stop.is_set():
        with contextlib.suppress(queue.Full):
          return ready.put(item, timeout=0.1)

    part = self._parts[here]
    try:
      how = self._num_threads, self.limits
      with video.open_file(self._path, *how) as capture:
        self._decode(here, capture, offer, stop)
    except Exception as error:  # raised again where the frames are used
      part.error = error
    part.placed.set()
    offer(None)

  def _decode(self, here, capture, offer, stop) -> None:
    reader = video.Reader(capture, self._path, self.limits)
    part = self._parts[here]
    later, frames = self._parts[here + 1 :], []
    if part.start:
      reader.jump(part.start, reader.now_s)

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
      if reader.is_key():
        part.key.append(reader.position - 1)
      slot = self._slot(now_s)
      if slot < part.due:
        continue
      part.due = slot + (self._fps is not None)
      picture = reader.picture()
      small = frame_size.shrink_frame(picture, self._size_px)
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

  def _meet(self, reader: video.Reader, later: list[_Part]) -> _Part | None:
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
          small = frame_size.shrink_frame(reader.picture(), self._size_px)
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
    self.info = video.info_of(capture, picture)
    self.start_s = max(0, capture.get(cv2.CAP_PROP_PTS)) / self.info.fps


def pick_frames(
  path: str | pathlib.Path,
  number: Sequence[int],
  stream: FrameStream,
  *,
  num_threads: int = 1,
) -> Iterator[np.ndarray]:
  """Decodes some frames of a file that a FrameStream has gone through.

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
    video.VideoError: a frame that was there cannot be decoded any more.
  """
  time_s, seekable, done = np.asarray(stream.time_s), stream.seekable, 0
  while done < len(number):
    try:
      with video.open_file(path, num_threads, stream.limits) as capture:
        reader = video.Reader(capture, path, stream.limits)
        while done < len(number):
          wanted = number[done]
          place = bisect.bisect_right(stream.key, wanted - _SEEK_MARGIN)
          start = stream.key[place - 1] if place else 0
          if seekable and start - reader.position >= _SEEK_GAIN:
            _seek(reader, wanted, time_s)
          while reader.position <= wanted:
            if not reader.step():
              raise video.VideoError(
                path,
                f"frame {wanted} cannot be decoded a second time; has the file"
                " changed?",
              )
          yield cv2.cvtColor(reader.picture(), cv2.COLOR_BGR2RGB)
          done += 1
    except _Moved:
      seekable = False  # through the whole file, from the start


def _seek(reader: video.Reader, number: int, time_s: np.ndarray) -> None:
  """Goes to a frame at or before `number`, found by its stamp."""
  # OpenCV counts frames as if their rate were constant.
  target = round(time_s[number] * reader.fps) - 1
  reader.jump(max(target, 0), -1 / reader.fps)
  if not reader.step() or not reader.stamped:
    raise _Moved
  found = int(np.argmin(np.abs(time_s - reader.now_s)))
  if abs(time_s[found] - reader.now_s) > 1e-4 or found > number:
    raise _Moved
  reader.position = found + 1
