"""Decoded frames on disk, so that a video is decoded once and not every run.

`FrameCache` reads as `decoding.Decoder` does, and gives the same bits. What it
keeps is named by a hash of the file's bytes and of all that decides about the
frames: which ones, their size and kernel, the version of this code, of OpenCV
and of Pillow. So nothing has to be emptied by hand, and a file that changes is
another file.

One entry holds frames of one video at one size, uncompressed, each with a
checksum that is compared at every read. Entries are written whole or not at all
(`disk.write`); an entry that is not as it was written is made again. Processes
may share a folder: the worst that two of them do is to decode the same twice.

Of every path the hash is kept with the file's size, times and inode, so that a
file is hashed once; where these are as they were, its bytes count as unchanged.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import PIL
from absl import logging

from cf_jax import disk
from cf_jax.data import decoding, frame_size, picture_folder, video
from cf_jax.data.footage import Footage

Mode = Literal["off", "prefer", "only"]
MODES = ("off", "prefer", "only")

_VERSION = 1  # of the form of an entry
_MAGIC = b"cfjaxfc1"
_HEAD = struct.Struct(">8sII")  # magic, bytes of the header, its checksum
_GIB = 2**30
# An entry's time of last use is this exact.
_USED_S = 3600.0
# A process looks through the folder after writing such a share of the limit,
# and makes room down to the other.
_LOOK, _ROOM = 0.05, 0.9
# Files of a writer that was killed are this old before they are removed.
_LEFT_S = 3600.0


class _DamagedError(Exception):
  """An entry is not as it was written."""


class _Entry(NamedTuple):
  """An entry's header.

  Attributes:
    key: what it is of.
    about: the rest, as it was given to `_write`.
    number: numbers of its frames, ascending.
    crc: a checksum of each.
    shape: (height, width) of them.
    start: where the frames begin in the file.
  """

  key: dict[str, Any]
  about: dict[str, Any]
  number: list[int]
  crc: list[int]
  shape: tuple[int, int]
  start: int


def around(
  decoder: decoding.Decoder, *, mode: Mode, folder: str, max_gib: float
) -> "decoding.Decoder | FrameCache":
  """The decoder with a cache before it; alone where the mode is "off".

  Args:
    decoder: reads what is not there.
    mode: "off", "prefer" (decodes and keeps what is not there), or "only"
      (what is not there is an error; nothing is decoded, nothing written).
    folder: of the entries.
    max_gib: how large it may become; what was used longest ago goes.

  Raises:
    ValueError: another mode, or no room.
  """
  if mode not in MODES:
    raise ValueError(
      f"mode must be one of {', '.join(MODES)}, got {mode!r}; change"
      " data.frame_cache.mode"
    )
  if mode == "off":
    return decoder
  if not max_gib > 0:
    raise ValueError(
      f"max_gib must be positive, got {max_gib}; change"
      " data.frame_cache.max_gib"
    )
  return FrameCache(
    decoder, folder=folder, max_gib=max_gib, only=mode == "only"
  )


class FrameCache:
  """Reads as a Decoder does; made by `around`.

  Attributes:
    hits: requests that were answered from the folder.
    misses: requests that were not.
    remade: entries that were not as they had been written.
    evicted_used_s: when the newest of the entries that had to go was used last,
      seconds since 1970; 0 while none had to.
  """

  def __init__(
    self,
    decoder: decoding.Decoder,
    *,
    folder: str | os.PathLike,
    max_gib: float,
    only: bool,
  ):
    self._decoder, self._only = decoder, only
    self._folder = pathlib.Path(folder).expanduser().absolute()
    self._max_bytes = max_gib * _GIB
    self._start()

  def _start(self) -> None:
    self._lock = threading.Lock()
    self._hashes: dict[str, tuple[list[int], str]] = {}
    self._size: int | None = None  # of the folder, when it was looked through
    self._written = 0  # since then, by this process
    self._full = False
    self.hits = self.misses = self.remade = 0
    self.evicted_used_s = 0.0

  def __getstate__(self):
    names = ("_decoder", "_only", "_folder", "_max_bytes")
    return {name: getattr(self, name) for name in names}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._start()

  @property
  def processes(self) -> int:
    """Of the decoder."""
    return self._decoder.processes

  def close(self) -> None:
    """Ends the decoder's processes."""
    self._decoder.close()

  # ---- reading, as a Decoder does

  def probe(self, footage: Footage) -> video.VideoInfo:
    """See `footage.probe`.

    Raises:
      video.VideoError: it cannot be read.
      ValueError: mode "only", and it is not there.
    """
    path, key = self._named(footage, kind="probe", clip=footage.clip)
    entry = self._entry(path, key, footage)
    if entry is None:
      info = self._make(path, key, footage, self._decoder.probe, footage)
      self._write(path, key, {"info": list(info)})
      return info
    self._count_hit()
    return video.VideoInfo(*entry.about["info"])

  def scan_frames(
    self,
    footage: Footage,
    num_frames: int,
    size_px: tuple[int, int],
    within: Sequence[tuple[float, float]] = (),
  ) -> video.Scan:
    """See `footage.scan_frames`.

    Raises:
      video.VideoError: it cannot be read.
      ValueError: mode "only", and it is not there.
    """
    parts = (within,) if within else ()  # the keys of whole scans stay
    path, key = self._named(
      footage,
      kind="scan",
      clip=footage.clip,
      frames=num_frames,
      size_px=list(size_px),
      **({"within": within} if within else {}),
    )
    entry = self._entry(path, key, footage)
    if entry is not None:
      with self._damage_noticed(path, footage):
        frames = np.zeros((num_frames, *size_px, 3), np.uint8)
        self._read(path, entry, range(len(entry.number)), frames)
        self._count_hit()
        return _to_scan(entry, frames)
    scan = self._make(
      path,
      key,
      footage,
      self._decoder.scan_frames,
      footage,
      num_frames,
      size_px,
      *parts,
    )
    real = int(scan.mask.sum())
    about = {
      "time_s": scan.time_s[:real].tolist(),
      "num_frames": scan.num_frames,
    }
    self._write(
      path, key, about, scan.frame_index[:real].tolist(), scan.frames[:real]
    )
    return scan

  def read_frames(
    self,
    footage: Footage,
    index: np.ndarray,
    size_px: tuple[int, int],
    *,
    resize: frame_size.Resize = "area",
  ) -> np.ndarray:
    """See `footage.read_frames`: uint8[n, h, w, 3].

    Frames that are not there are decoded, and the entry holds them too then.

    Raises:
      video.VideoError: it cannot be read.
      ValueError: mode "only", and one of them is not there.
    """
    path, key = self._named(
      footage, kind="frames", size_px=list(size_px), resize=resize
    )
    index = np.asarray(index)
    wanted, back = np.unique(index, return_inverse=True)
    found = np.empty((len(wanted), *size_px, 3), np.uint8)
    entry = self._entry(path, key, footage)
    row_of = {} if entry is None else {n: k for k, n in enumerate(entry.number)}
    known = np.array([n in row_of for n in wanted.tolist()], bool)
    if known.any():
      whole = False
      with self._damage_noticed(path, footage):
        some = np.empty((int(known.sum()), *size_px, 3), np.uint8)
        self._read(
          path, entry, [row_of[n] for n in wanted[known].tolist()], some
        )
        found[known], whole = some, True
        if known.all():
          self._count_hit()
          return found[back]
      if not whole:  # others may have written it again by now
        entry, known = None, np.zeros_like(known)
    missing = wanted[~known]
    found[~known] = self._make(
      path,
      key,
      footage,
      self._decoder.read_frames,
      footage,
      missing,
      size_px,
      what=f"frame {missing[0] if len(missing) else ''} ",
      resize=resize,
    )
    self._join(path, key, entry, missing, found[~known])
    return found[back]

  # ---- entries

  def _count_hit(self) -> None:
    with self._lock:
      self.hits += 1

  def _entry(self, path, key, footage) -> _Entry | None:
    """An entry's header; None where there is none that serves.

    Raises:
      video.VideoError: mode "only", and it says that the file is unreadable.
      ValueError: mode "only", and it is damaged.
    """
    with self._damage_noticed(path, footage):
      try:
        with path.open("rb") as file:
          entry = _read_header(file)
      except FileNotFoundError:
        return None
      except OSError as error:
        raise _DamagedError(str(error)) from error
      if entry.key != key:
        raise _DamagedError("it is of something else")
      if "unreadable" in entry.about:
        if self._only:
          raise video.VideoError(footage.path, entry.about["unreadable"])
        return None  # another time it may be
      if self._decoder.listens and not entry.about["listened"]:
        return None
      with contextlib.suppress(OSError):  # gone, or not ours
        if time.time() - path.stat().st_mtime > _USED_S:
          os.utime(path)
      return entry
    return None

  @contextlib.contextmanager
  def _damage_noticed(self, path, footage):
    """An entry that is damaged is removed; in mode "only" it is an error."""
    try:
      yield
    except _DamagedError as error:
      if self._only:
        raise ValueError(
          f"{footage.path}: its entry in the frame cache is damaged ({error}:"
          f" {path}); fill it again with configs/cache_frames.py, or set"
          " data.frame_cache.mode to 'prefer'"
        ) from error
      logging.warning("made again: %s, %s", path, error)
      with self._lock:
        self.remade += 1
      path.unlink(missing_ok=True)

  def _make(self, path, key, footage, decode, *args, what="", **how):
    """Decodes what is not there."""
    with self._lock:
      self.misses += 1
    if self._only:
      raise ValueError(
        f"{footage.path}: {what}is not in the frame cache {self._folder}"
        f" ({json.dumps(key)}); fill it with configs/cache_frames.py and the"
        " same settings, or set data.frame_cache.mode to 'prefer'"
      )
    try:
      return decode(*args, **how)
    except video.VideoError as error:
      if not path.exists():  # so that mode "only" skips it as well
        self._write(path, key, {"unreadable": error.args[1]})
      raise

  def _join(self, path, key, entry, number, frames) -> None:
    """Writes the frames of an entry, and others besides."""
    if entry is not None:
      held = np.empty((len(entry.number), *frames.shape[1:]), np.uint8)
      try:
        self._read(path, entry, range(len(held)), held)
      except _DamagedError:
        held, entry = held[:0], entry._replace(number=[])
      number = np.concatenate([np.array(entry.number, np.int64), number])
      order = np.argsort(number)
      number = number[order]
      frames = np.concatenate([held, frames])[order]
    self._write(path, key, {}, number.tolist(), frames)

  def _write(self, path, key, about, number=(), frames=None) -> None:
    """Writes an entry; says once where there is no room for any."""
    if self._full:
      return
    if frames is None:
      frames = np.zeros((0, 0, 0, 3), np.uint8)
    frames = np.ascontiguousarray(frames)
    header = json.dumps(
      dict(
        key=key,
        about=about | {"listened": self._decoder.listens},
        number=list(number),
        crc=[zlib.crc32(frame) for frame in frames],
        shape=frames.shape[1:3],
      )
    ).encode()

    def fill(file) -> None:
      file.write(_HEAD.pack(_MAGIC, len(header), zlib.crc32(header)))
      file.write(header)
      if frames.size:
        file.write(memoryview(frames).cast("B"))

    try:
      disk.write(path, fill)
    except OSError as error:
      self._full = True
      logging.warning(
        "the frame cache takes no more in this process: %s", error
      )
      return
    with self._lock:
      self._written += frames.nbytes + len(header)
      if (
        self._size is None
        or self._size + self._written > self._max_bytes
        or self._written > _LOOK * self._max_bytes
      ):
        self._make_room()

  def _read(self, path, entry, rows, out) -> None:
    """Reads frames into uint8[n, h, w, 3], from its first row on.

    Raises:
      _DamagedError: they are not as they were written.
    """
    rows = list(rows)
    if tuple(entry.shape) != out.shape[1:3] and rows:
      raise _DamagedError("frames of another size")
    size = int(np.prod(out.shape[1:]))
    try:
      with path.open("rb", buffering=0) as file:
        for slot, row in enumerate(rows):
          file.seek(entry.start + row * size)
          view = memoryview(out[slot]).cast("B")
          if file.readinto(view) != size:
            raise _DamagedError("it ends too early")
          if zlib.crc32(view) != entry.crc[row]:
            raise _DamagedError("a frame's checksum is another")
    except OSError as error:
      raise _DamagedError(str(error)) from error

  def _make_room(self) -> None:
    """Looks through the folder, and removes what was used longest ago."""
    with (self._folder / "lock").open("w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      found = []
      for file in (self._folder / "entries").glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
          about = file.stat()
          if file.name.startswith("."):  # being written
            if time.time() - about.st_mtime > _LEFT_S:
              file.unlink()
          else:
            found.append((about.st_mtime, about.st_size, file))
      total = sum(size for _, size, _ in found)
      if total > self._max_bytes:
        for used_s, size, file in sorted(found):
          if total <= _ROOM * self._max_bytes:
            break
          file.unlink(missing_ok=True)
          total -= size
          self.evicted_used_s = max(self.evicted_used_s, used_s)
    self._size, self._written = total, 0

  # ---- names

  def _named(self, footage: Footage, **key) -> tuple[pathlib.Path, dict]:
    """Where an entry lies, and what it is of."""
    key |= dict(
      version=[_VERSION, video.VERSION, cv2.__version__, PIL.__version__],
      content=self._content(footage),
      fps=footage.fps,
    )
    key = json.loads(json.dumps(key))  # as it is read again
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return self._folder / "entries" / name[:2] / name[2:], key

  def _content(self, footage: Footage) -> str:
    """A hash of what is in the file.

    Raises:
      video.VideoError: there is no such file; in mode "only" one that was there
        when the cache was filled will do.
    """
    path = os.path.abspath(footage.path)
    try:
      files = [pathlib.Path(path)]
      if os.path.isdir(path):
        files = picture_folder.pictures(path)
      marks = [mark for file in files for mark in _marks(file)]
    except (OSError, video.VideoError) as error:
      known = self._known(path) if self._only else None
      if known is None:
        what = error.strerror if isinstance(error, OSError) else error.args[1]
        raise video.VideoError(footage.path, what) from error
      return known[1]
    with self._lock:
      known = self._hashes.get(path)
    known = known or self._known(path)
    if known is None or known[0] != marks:
      digest = hashlib.sha256()
      for file in files:
        if len(files) > 1:
          digest.update(file.name.encode() + b"\0")
        with file.open("rb") as opened:
          digest.update(hashlib.file_digest(opened, "sha256").digest())
      known = marks, digest.hexdigest()
      if not self._only and not self._full:
        said = dict(path=path, marks=marks, content=known[1])
        with contextlib.suppress(OSError):  # then it is hashed again
          disk.write_text(self._note(path), json.dumps(said))
    with self._lock:
      self._hashes[path] = known
    return known[1]

  def _note(self, path: str) -> pathlib.Path:
    name = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
    return self._folder / "names" / name[:2] / f"{name[2:]}.json"

  def _known(self, path: str) -> tuple[list[int], str] | None:
    try:
      said = json.loads(self._note(path).read_text("utf-8"))
      return said["marks"], said["content"]
    except (OSError, ValueError, KeyError, TypeError):
      return None


def _marks(file: pathlib.Path) -> list[int]:
  """What changes when somebody writes to a file."""
  about = file.stat()
  return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _read_header(file) -> _Entry:
  """The header of an open entry.

  Raises:
    _DamagedError: it is not as it was written.
  """
  head = file.read(_HEAD.size)
  if len(head) < _HEAD.size:
    raise _DamagedError("it ends too early")
  magic, size, crc = _HEAD.unpack(head)
  if magic != _MAGIC:
    raise _DamagedError("it is no entry")
  text = file.read(size)
  if len(text) != size or zlib.crc32(text) != crc:
    raise _DamagedError("its header's checksum is another")
  said = json.loads(text)
  return _Entry(start=_HEAD.size + size, **said)


def _to_scan(entry: _Entry, frames: np.ndarray) -> video.Scan:
  real, pad = len(entry.number), len(frames) - len(entry.number)
  return video.Scan(
    frames=frames,
    mask=np.arange(len(frames)) < real,
    time_s=np.pad(np.array(entry.about["time_s"], np.float64), (0, pad)),
    frame_index=np.pad(np.array(entry.number, np.int32), (0, pad)),
    num_frames=entry.about["num_frames"],
  )
