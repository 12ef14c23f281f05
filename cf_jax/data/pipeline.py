"""Samples -> batches of scanned videos, by grain, with exact resume.

A still picture is a video of one frame (`images`); a batch may mix them.

Two caches, both in memory, bounded, and of bytes: the loader keeps the small
scan frames of as many videos as fit, `FrameReader` the latest frames at the
policy's resolution. A second epoch then decodes nothing.

Axes: `B` videos, `T` scanned frames, `N` frames read for a video; pixels are
[..., height, width, 3], RGB.
"""

import collections
import concurrent.futures
import os
import threading
import types
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np
from absl import flags, logging

from cf_jax.data import images, records, video


class Batch(NamedTuple):
  """B scanned videos and their questions.

  Attributes:
    sample_index: int32[B] numbers of the samples in the loader's list.
    samples: the B samples.
    scan: uint8[B, T, h, w, 3] small frames, 0 where masked.
    scan_mask: bool[B, T] real frames, which come first.
    scan_time_s: float32[B, T] seconds, 0 where masked.
    frame_index: int32[B, T] numbers of the decoded frames, 0 where masked.
  """

  sample_index: np.ndarray
  samples: list[records.Sample]
  scan: np.ndarray
  scan_mask: np.ndarray
  scan_time_s: np.ndarray
  frame_index: np.ndarray


def decoder_of(path: str) -> types.ModuleType:
  """What reads a file: `images` for still pictures, else `video`."""
  return images if images.is_image(path) else video


class _Unreadable(NamedTuple):
  """In place of a scan: why there is none."""

  reason: str


def make_loader(
  samples: Sequence[records.Sample],
  *,
  batch_size: int,
  seed: int,
  shuffle: bool = True,
  num_epochs: int | None = None,
  shard_index: int = 0,
  shard_count: int = 1,
  num_workers: int = 0,
  num_threads: int = 2,
  scan_frames: int = 96,
  scan_size_px: tuple[int, int] = (32, 32),
  scan_cache_mib: int = 1024,
  max_skip_fraction: float = 0.01,
) -> "Loader":
  """An iterator over batches of one host's share of the samples.

  Args:
    samples: all samples, the same on every host.
    batch_size: B, of this host.
    seed: of the order; every epoch has another one.
    shuffle: False keeps the order of the list.
    num_epochs: passes over the share; None never ends. The last batch of a
      finite loader may be smaller.
    shard_index: number of this host.
    shard_count: hosts; each gets as many samples, what remains is left out.
    num_workers: processes that decode; 0 decodes in this one.
    num_threads: that decode, in each process.
    scan_frames: T.
    scan_size_px: (height, width) of the scan.
    scan_cache_mib: memory for scans of earlier epochs, over all processes.
    max_skip_fraction: of the share, how many videos may be unreadable.

  Returns:
    Loader, an iterator of Batch.

  Raises:
    ValueError: fewer samples than hosts, or a batch larger than the share.
  """
  share = len(samples) // shard_count
  if not 0 <= shard_index < shard_count or share < 1:
    raise ValueError(
      f"got shard {shard_index} of {shard_count} for {len(samples)} samples;"
      " expected at least one sample a host"
    )
  if not 1 <= batch_size <= share:
    raise ValueError(
      f"batch_size is {batch_size}, and a host has {share} samples; lower the"
      " batch size or give more samples"
    )
  scanner = _Scanner(
    list(samples),
    scan_frames,
    tuple(scan_size_px),
    scan_cache_mib * 2**20 // max(num_workers, 1),
  )
  dataset = grain.MapDataset.range(
    shard_index, share * shard_count, shard_count
  )
  if shuffle:
    dataset = dataset.shuffle(seed=seed)
  stream = (
    dataset.repeat(num_epochs)
    .map(scanner)
    .to_iter_dataset(
      grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=4 * num_threads
      )
    )
  )
  if num_workers:
    if not flags.FLAGS.is_parsed():  # grain reads flags of its own
      flags.FLAGS.mark_as_parsed()
    stream = stream.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=num_workers)
    )
  order = [seed, shuffle, num_epochs, shard_index, shard_count, num_workers]
  names = "\n".join([*map(str, order), *(sample.id for sample in samples)])
  return Loader(
    iter(stream),
    list(samples),
    batch_size=batch_size,
    max_skipped=int(max_skip_fraction * share),
    share=share,
    fingerprint=zlib.crc32(names.encode()),
  )


class Loader:
  """Iterator of Batch; made by `make_loader`.

  Attributes:
    skipped: path -> reason of every unreadable video met so far.
  """

  def __init__(
    self, scans, samples, *, batch_size, max_skipped, share, fingerprint
  ):
    self._scans = scans
    self._samples = samples
    self._batch_size = batch_size
    self._max_skipped = max_skipped
    self._share = share
    self._fingerprint = fingerprint
    self.skipped: dict[str, str] = {}

  @property
  def skipped_total(self) -> int:
    """How many videos could not be read."""
    return len(self.skipped)

  def __iter__(self) -> "Loader":
    return self

  def __next__(self) -> Batch:
    """The next batch.

    Raises:
      ValueError: more videos are unreadable than may be skipped.
    """
    index, scans = [], []
    while len(index) < self._batch_size:
      try:
        number, scan = next(self._scans)
      except StopIteration:
        if not index:
          raise
        break
      if isinstance(scan, _Unreadable):
        self._skip(self._samples[number].video, scan.reason)
        continue
      index.append(number)
      scans.append(scan)
    return _stack([self._samples[n] for n in index], index, scans)

  def _skip(self, path: str, reason: str) -> None:
    if path not in self.skipped:
      logging.warning("skipped: %s", reason)
    self.skipped[path] = reason
    if len(self.skipped) > self._max_skipped:
      listed = "; ".join(list(self.skipped.values())[:5])
      raise ValueError(
        f"{len(self.skipped)} of {self._share} videos cannot be read, at most"
        f" {self._max_skipped} may be skipped (data.max_skip_fraction):"
        f" {listed}"
      )

  def get_state(self) -> dict[str, Any]:
    """What `set_state` needs to go on after the last batch; plain JSON."""
    return {
      "fingerprint": self._fingerprint,
      "skipped": dict(self.skipped),
      "scans": self._scans.get_state(),
    }

  def close(self) -> None:
    """Ends the decoding threads or processes."""
    self._scans.close()

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on after the batch at which the state was taken.

    Raises:
      ValueError: the state is of other samples or of another order.
    """
    if state["fingerprint"] != self._fingerprint:
      raise ValueError(
        "the saved loader state is of other samples, or of another seed,"
        " shuffle, number of hosts or of workers; go on with the settings it"
        " was saved under, or start in a new workdir"
      )
    self.skipped = dict(state["skipped"])
    self._scans.set_state(state["scans"])


def collate(
  samples: Sequence[records.Sample],
  sample_index: np.ndarray,
  *,
  scan_frames: int,
  scan_size_px: tuple[int, int],
) -> Batch:
  """Scans the videos of a fixed list of samples into one batch.

  Args:
    samples: B samples.
    sample_index: int[B] their numbers.
    scan_frames: T.
    scan_size_px: (height, width) of the scan.

  Raises:
    video.VideoError: a video cannot be read; nothing is skipped here (see
      `readable`).
  """
  scans = {}
  for sample in samples:
    if sample.video not in scans:
      scans[sample.video] = decoder_of(sample.video).scan_frames(
        sample.video, scan_frames, tuple(scan_size_px)
      )
  return _stack(
    list(samples), sample_index, [scans[sample.video] for sample in samples]
  )


def collate_readable(
  samples: Sequence[records.Sample],
  sample_index: np.ndarray,
  *,
  batch_size: int,
  scan_frames: int,
  scan_size_px: tuple[int, int],
) -> tuple[Batch | None, dict[str, str]]:
  """Scans what can be read of a list of samples into a batch of a fixed size.

  Args:
    samples: at most `batch_size` samples.
    sample_index: int[n] their numbers.
    batch_size: B; the last readable sample is repeated to fill the batch up.
    scan_frames: T.
    scan_size_px: (height, width) of the scan.

  Returns:
    The batch (None where nothing can be read), and path -> reason of every
    unreadable video.
  """
  scans, skipped = {}, {}
  for path in dict.fromkeys(sample.video for sample in samples):
    try:
      scans[path] = decoder_of(path).scan_frames(
        path, scan_frames, tuple(scan_size_px)
      )
    except video.VideoError as error:
      logging.warning("skipped: %s", error)
      skipped[path] = str(error)
  rows = [n for n, sample in enumerate(samples) if sample.video in scans]
  if not rows:
    return None, skipped
  rows += rows[-1:] * (batch_size - len(rows))
  chosen = [samples[n] for n in rows]
  batch = _stack(
    chosen,
    np.asarray(sample_index)[rows],
    [scans[sample.video] for sample in chosen],
  )
  return batch, skipped


def readable(
  samples: Sequence[records.Sample], *, max_skip_fraction: float
) -> tuple[list[records.Sample], dict[str, str]]:
  """Leaves out samples whose video does not decode to its end.

  Args:
    samples: of a held-out split, few enough to decode once more.
    max_skip_fraction: of the samples, how many may be left out.

  Returns:
    The others, and path -> reason of the videos left out.

  Raises:
    ValueError: more are unreadable than may be skipped, or all are.
  """
  skipped, fine = {}, set()
  for path in dict.fromkeys(sample.video for sample in samples):
    try:
      decoder_of(path).scan_frames(path, 1, (28, 28))
      fine.add(path)
    except video.VideoError as error:
      logging.warning("skipped: %s", error)
      skipped[path] = str(error)
  kept = [sample for sample in samples if sample.video in fine]
  lost = len(samples) - len(kept)
  if lost > max_skip_fraction * len(samples) or not kept:
    listed = "; ".join(list(skipped.values())[:5])
    raise ValueError(
      f"the videos of {lost} of {len(samples)} samples cannot be read, at most"
      f" {max_skip_fraction:.1%} may be skipped (data.max_skip_fraction):"
      f" {listed}"
    )
  return kept, skipped


def _stack(samples, index, scans) -> Batch:
  return Batch(
    sample_index=np.asarray(index, np.int32),
    samples=samples,
    scan=np.stack([scan.frames for scan in scans]),
    scan_mask=np.stack([scan.mask for scan in scans]),
    scan_time_s=np.stack([scan.time_s for scan in scans]).astype(np.float32),
    frame_index=np.stack([scan.frame_index for scan in scans]),
  )


class _Scanner:
  """Sample number -> (number, video.Scan or _Unreadable), with a cache.

  A full cache keeps what it has: an epoch meets every video once in random
  order, so throwing one out for another gains nothing.
  """

  def __init__(self, samples, num_frames, size_px, cache_bytes):
    self._samples = samples
    self._num_frames = num_frames
    self._size_px = size_px
    self._cache_bytes = cache_bytes
    self._start()

  def _start(self):
    self._cache, self._room = {}, self._cache_bytes
    self._lock = threading.Lock()

  def __getstate__(self):  # workers start with an empty cache
    kept = dict(self.__dict__)
    del kept["_cache"], kept["_room"], kept["_lock"]
    return kept

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._start()
    cv2.setNumThreads(0)  # a worker is one of several

  def __call__(self, number: int) -> tuple[int, video.Scan | _Unreadable]:
    number = int(number)
    path = self._samples[number].video
    try:
      status = os.stat(path)
      key = (path, status.st_mtime_ns, status.st_size)
      scan = self._cache.get(key)
      if scan is None:
        scan = decoder_of(path).scan_frames(
          path, self._num_frames, self._size_px
        )
        self._keep(key, scan)
    except video.VideoError as error:
      return number, _Unreadable(str(error))
    except OSError as error:
      return number, _Unreadable(f"{path}: {error.strerror}")
    return number, scan

  def _keep(self, key, scan):
    size = sum(array.nbytes for array in scan[:4])
    with self._lock:
      if key not in self._cache and size <= self._room:
        self._cache[key] = scan
        self._room -= size


class FrameReader:
  """Reads chosen frames at one size, with a cache of the latest ones.

  Args:
    size_px: (height, width) of the frames.
    resize: kernel of the resizing, see `video.resize_frame`.
    cache_mib: memory for decoded frames; 0 keeps none.
    num_threads: videos decoded at a time.
  """

  def __init__(
    self,
    size_px: tuple[int, int],
    *,
    resize: video.Resize = "area",
    cache_mib: int,
    num_threads: int,
  ):
    self.size_px = tuple(size_px)
    self._resize = resize
    height, width = self.size_px
    self._capacity = cache_mib * 2**20 // (height * width * 3)
    self._cache = collections.OrderedDict()
    self._lock = threading.Lock()
    self._pool = concurrent.futures.ThreadPoolExecutor(num_threads)

  def read(
    self, samples: Sequence[records.Sample], index: np.ndarray
  ) -> np.ndarray:
    """Frames of several videos.

    Args:
      samples: B samples.
      index: int[B, N] numbers of decoded frames, in any order.

    Returns:
      uint8[B, N, h, w, 3] RGB.

    Raises:
      video.VideoError: a video or one of the frames cannot be read.
    """
    index = np.asarray(index)
    if index.ndim != 2 or len(index) != len(samples):
      raise ValueError(
        f"index must be int[{len(samples)}, N], got {list(index.shape)}"
      )
    out = np.empty((*index.shape, *self.size_px, 3), np.uint8)
    jobs = [
      self._pool.submit(self._fill, sample.video, row, frames)
      for sample, row, frames in zip(samples, index, out)
    ]
    for job in jobs:
      job.result()
    return out

  def _fill(self, path: str, index: np.ndarray, out: np.ndarray) -> None:
    """Puts the frames of one video into uint8[N, h, w, 3]."""
    missing = collections.defaultdict(list)
    with self._lock:
      for slot, number in enumerate(index.tolist()):
        frame = self._cache.get((path, number))
        if frame is None:
          missing[number].append(slot)
        else:
          self._cache.move_to_end((path, number))
          out[slot] = frame
    if not missing:
      return
    numbers = sorted(missing)
    frames, _ = decoder_of(path).read_frames(
      path, np.array(numbers), self.size_px, resize=self._resize
    )
    for number, frame in zip(numbers, frames):
      out[missing[number]] = frame
    with self._lock:
      for number, frame in zip(numbers, frames):
        self._cache[path, number] = frame.copy()  # not the whole stack
        self._cache.move_to_end((path, number))
      while len(self._cache) > self._capacity:
        self._cache.popitem(last=False)
