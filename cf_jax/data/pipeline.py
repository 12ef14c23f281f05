"""Samples -> batches of scanned videos, by grain, with exact resume.

A still picture is a video of one frame (`images`); a batch may mix them.

Files are read by a `decoding.Decoder`, or a `frame_cache.FrameCache` around one
(`make_decoder`); without one, by this process. Two caches in memory, bounded
and of bytes, stand before it: the loader keeps the small scan frames of as many
videos as fit, `FrameReader` the latest frames at the policy's resolution. A
second epoch then reads nothing.

Axes: `B` videos, `T` scanned frames, `N` frames read for a video; pixels are
[..., height, width, 3], RGB.
"""

import collections
import concurrent.futures
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np
from absl import flags, logging

from cf_jax.data import decoding, frame_size, records, video
from cf_jax.data import footage as footage_lib
from cf_jax.data import frame_cache as frame_cache_lib
from cf_jax.data.footage import Footage

Decoder = decoding.Decoder | frame_cache_lib.FrameCache


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


def make_decoder(
  *,
  decode: Mapping[str, Any],
  limits: Mapping[str, float],
  frame_cache: Mapping[str, Any],
  contained: bool = True,
) -> Decoder:
  """What reads the files of a run; its loaders and readers share it.

  Args:
    decode: keyword arguments of `decoding.Decoder`.
    limits: keyword arguments of `video.Limits`.
    frame_cache: keyword arguments of `frame_cache.around`.
    contained: False decodes in this process, whatever `decode` says: for files
      that were written a moment ago.
  """
  decoder = decoding.Decoder(
    **{**decode} | ({} if contained else {"processes": 0}), limits=limits
  )
  return frame_cache_lib.around(decoder, **frame_cache)


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
  mix: str = "",
  max_skip_fraction: float = 0.01,
  decoder: Decoder | None = None,
) -> "Loader":
  """An iterator over batches of one host's share of the samples.

  All samples stand in one order, epoch after epoch, each shuffled as a whole;
  of n hosts each takes every n-th of that order. So they share every epoch
  without overlap, and none is left out.

  Args:
    samples: all samples, the same on every host.
    batch_size: B, of this host.
    seed: of the order; every epoch has another one.
    shuffle: False keeps the order of the list.
    num_epochs: passes over all samples; None never ends. The last batch of a
      finite loader may be smaller, and a host may have one sample less.
    shard_index: number of this host.
    shard_count: hosts.
    num_workers: grain's worker processes; 0 reads in this one.
    num_threads: that read, in each process; as many as the decoder has
      processes, where those are more.
    scan_frames: T.
    scan_size_px: (height, width) of the scan.
    scan_cache_mib: memory for scans of earlier epochs, over all processes.
    mix: "" takes every sample once an epoch. "a=3,b=1" takes samples whose
      `source` is a three times as often as those of b, however many there are
      of each, over and over, each source in an order of its own.
    max_skip_fraction: of the videos, how many may be unreadable.
    decoder: from `make_decoder`; None reads in this process.

  Returns:
    Loader, an iterator of Batch.

  Raises:
    ValueError: fewer samples than hosts, a batch larger than the share, or a
      mix of other sources than there are.
  """
  decoder = decoder or decoding.Decoder()
  share = len(samples) // max(shard_count, 1)
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
    decoder,
  )
  order = _in_order(
    samples, seed=seed, shuffle=shuffle, num_epochs=num_epochs, mix=mix
  )
  num_threads = max(num_threads, decoder.processes)
  stream = (
    order[shard_index::shard_count]
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

  def fingerprint(index: int, count: int) -> int:
    said = [seed, shuffle, num_epochs, index, count, num_workers]
    said += [mix] if mix else []
    names = "\n".join([*map(str, said), *(sample.id for sample in samples)])
    return zlib.crc32(names.encode())

  return Loader(
    iter(stream),
    list(samples),
    batch_size=batch_size,
    max_skip_fraction=max_skip_fraction,
    share=share,
    shard=(shard_index, shard_count),
    fingerprint=fingerprint,
  )


def _in_order(
  samples: Sequence[records.Sample],
  *,
  seed: int,
  shuffle: bool,
  num_epochs: int | None,
  mix: str,
) -> grain.MapDataset:
  """Numbers of samples in the order in which all hosts together take them.

  Raises:
    ValueError: `mix` does not fit the samples.
  """

  def epochs(numbers: Sequence[int], seed: int) -> grain.MapDataset:
    dataset = grain.MapDataset.source(numbers)
    return (dataset.shuffle(seed=seed) if shuffle else dataset).repeat(
      num_epochs
    )

  if not mix:
    return epochs(range(len(samples)), seed)
  weight = _parse_mix(mix)
  of_source = collections.defaultdict(list)
  for number, sample in enumerate(samples):
    of_source[sample.source].append(number)
  if of_source.keys() != weight.keys():
    raise ValueError(
      f"mix gives weights to {sorted(weight)}, the samples are of the sources"
      f" {sorted(of_source)}; name each of them in data.loader.mix"
    )
  if num_epochs is not None:
    raise ValueError(
      f"a mix of sources has no end, and num_epochs is {num_epochs}; leave out"
      " data.loader.mix or num_epochs"
    )
  return grain.MapDataset.mix(
    [epochs(of_source[name], seed + k) for k, name in enumerate(weight)],
    list(weight.values()),
  )


def _parse_mix(mix: str) -> dict[str, float]:
  weight = {}
  for part in mix.split(","):
    name, equals, number = part.rpartition("=")
    try:
      value = float(number)
    except ValueError:
      value = 0.0
    if not equals or not 0 < value < float("inf") or name in weight:
      raise ValueError(
        f"mix must be like 'a=3,b=1', every source once with a positive weight,"
        f" got {mix!r}; change data.loader.mix"
      )
    weight[name.strip()] = value
  return weight


class Loader:
  """Iterator of Batch; made by `make_loader`.

  Attributes:
    skipped: path -> reason of every unreadable video met so far, once however
      many epochs met it.
  """

  def __init__(
    self,
    scans,
    samples,
    *,
    batch_size,
    max_skip_fraction,
    share,
    shard,
    fingerprint,
  ):
    self._scans = scans
    self._samples = samples
    self._batch_size = batch_size
    self._max_skip_fraction = max_skip_fraction
    self._share = share
    self._shard = shard
    self._fingerprint_of = fingerprint
    self._num_videos = len({sample.video for sample in samples})
    self._drawn = 0
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
    return self._filled([], [])

  def without(self, batch: Batch, path: str, reason: str) -> Batch:
    """The batch with other samples in place of those of a video.

    For a video that was scanned, and whose frames then could not be read.

    Args:
      batch: the newest one.
      path: of the video; it counts as skipped.
      reason: why it cannot be read.

    Raises:
      ValueError: more videos are unreadable than may be skipped.
    """
    rows = [n for n, row in enumerate(batch.samples) if row.video != path]
    self._skip(path, reason)
    return self._filled(
      batch.sample_index[rows].tolist(),
      [_Row(*(field[n] for field in batch[2:])) for n in rows],
    )

  def _filled(self, index: list[int], scans: list) -> Batch:
    """These scans, and new ones up to a batch."""
    while len(index) < self._batch_size:
      try:
        number, scan = next(self._scans)
      except StopIteration:
        if not index:
          raise
        break
      self._drawn += 1
      path = self._samples[number].video
      if isinstance(scan, _Unreadable):
        self._skip(path, scan.reason)
      elif path not in self.skipped:
        index.append(number)
        scans.append(scan)
    return _stack([self._samples[n] for n in index], index, scans)

  def _skip(self, path: str, reason: str) -> None:
    if path not in self.skipped:
      logging.warning("skipped: %s", reason)
    self.skipped[path] = reason
    # Of the videos met so far; until the first epoch is over, of a share.
    met = max(self._share, min(self._drawn, len(self._samples)))
    of = met * self._num_videos // len(self._samples)
    most = int(self._max_skip_fraction * of)
    if len(self.skipped) > most or len(self.skipped) == self._num_videos:
      listed = "; ".join(list(self.skipped.values())[:5])
      raise ValueError(
        f"{len(self.skipped)} of {of} videos cannot be read, at most {most} may"
        f" be skipped (data.max_skip_fraction): {listed}"
      )

  def get_state(self) -> dict[str, Any]:
    """What `set_state` needs to go on after the last batch; plain JSON."""
    return {
      "fingerprint": self._fingerprint_of(*self._shard),
      "skipped": dict(self.skipped),
      "drawn": self._drawn,
      "scans": self._scans.get_state(),
    }

  def close(self) -> None:
    """Ends the decoding threads or processes."""
    self._scans.close()

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on after the batch at which the state was taken.

    Args:
      state: from `get_state`, or {"hosts": those of all hosts}. Of another
        number of hosts, all go on where the one that was farthest stood.

    Raises:
      ValueError: the state is of other samples or of another order.
    """
    index, count = self._shard
    states = state.get("hosts", [state])
    if len(states) != count:
      return self._take_over(states)
    state = states[index]
    if state["fingerprint"] != self._fingerprint_of(index, count):
      raise ValueError(
        "the saved loader state is of other samples, or of another seed,"
        " shuffle, number of hosts or of workers; go on with the settings it"
        " was saved under, or start in a new workdir"
      )
    self.skipped = dict(state["skipped"])
    self._drawn = state["drawn"]
    self._scans.set_state(state["scans"])

  def _take_over(self, states: list[dict[str, Any]]) -> None:
    """Goes on where another number of hosts stopped."""
    index, count = self._shard
    known = states[0]["fingerprint"] == self._fingerprint_of(0, len(states))
    places = [host["scans"].get("next_index") for host in states]
    if not known or None in places:
      raise ValueError(
        f"the saved loader state is of {len(states)} hosts, and of other"
        " samples, another seed, shuffle or number of workers, or its worker"
        f" processes do not say how far they were; go on with {len(states)}"
        " hosts and the settings it was saved under, or start in a new workdir"
      )
    if len(set(places)) > 1:
      logging.warning(
        "hosts skipped different numbers of videos: of %d hosts, those behind"
        " leave out up to %d samples",
        len(states),
        max(places) - min(places),
      )
    for host in states:
      self.skipped |= host["skipped"]
    # This host's share of so many samples of the common order.
    self._drawn = -((index - max(places) * len(states)) // count)
    fresh = self._scans.get_state()
    self._scans.set_state(fresh | {"next_index": self._drawn})


def collate(
  samples: Sequence[records.Sample],
  sample_index: np.ndarray,
  *,
  scan_frames: int,
  scan_size_px: tuple[int, int],
  decoder: Decoder | None = None,
) -> Batch:
  """Scans the videos of a fixed list of samples into one batch.

  Args:
    samples: B samples.
    sample_index: int[B] their numbers.
    scan_frames: T.
    scan_size_px: (height, width) of the scan.
    decoder: from `make_decoder`; None reads in this process.

  Raises:
    video.VideoError: a video cannot be read; nothing is skipped here (see
      `readable`).
  """
  wanted = [_Look(footage_lib.of_sample(sample)) for sample in samples]
  scans = _scan_all(wanted, scan_frames, scan_size_px, decoder)
  for found in scans.values():
    if isinstance(found, video.VideoError):
      raise found
  return _stack(list(samples), sample_index, [scans[one] for one in wanted])


def collate_readable(
  samples: Sequence[records.Sample],
  sample_index: np.ndarray,
  *,
  batch_size: int,
  scan_frames: int,
  scan_size_px: tuple[int, int],
  decoder: Decoder | None = None,
  within: Sequence[Sequence[tuple[float, float]]] | None = None,
) -> tuple[Batch | None, dict[str, str]]:
  """Scans what can be read of a list of samples into a batch of a fixed size.

  Args:
    samples: at most `batch_size` samples.
    sample_index: int[n] their numbers.
    batch_size: B; the last readable sample is repeated to fill the batch up.
    scan_frames: T.
    scan_size_px: (height, width) of the scan.
    decoder: from `make_decoder`; None reads in this process.
    within: of each sample the intervals over which its frames are spread, as in
      `video.scan_frames`; None takes all of every video.

  Returns:
    The batch (None where nothing can be read), and path -> reason of every
    unreadable video.
  """
  wanted = [
    _Look(footage_lib.of_sample(sample), tuple(intervals))
    for sample, intervals in zip(
      samples, within or [()] * len(samples), strict=True
    )
  ]
  scans = _scan_all(wanted, scan_frames, scan_size_px, decoder)
  skipped = _unreadable(scans)
  rows = [
    n for n, one in enumerate(wanted) if isinstance(scans[one], video.Scan)
  ]
  if not rows:
    return None, skipped
  rows += rows[-1:] * (batch_size - len(rows))
  batch = _stack(
    [samples[n] for n in rows],
    np.asarray(sample_index)[rows],
    [scans[wanted[n]] for n in rows],
  )
  return batch, skipped


def readable(
  samples: Sequence[records.Sample],
  *,
  max_skip_fraction: float,
  scan_frames: int = 1,
  scan_size_px: tuple[int, int] = (28, 28),
  decoder: Decoder | None = None,
) -> tuple[list[records.Sample], dict[str, str]]:
  """Leaves out samples whose video does not decode to its end.

  Args:
    samples: of a held-out split, few enough to decode once more.
    max_skip_fraction: of the samples, how many may be left out.
    scan_frames: T; as later scans, so that a decoder's cache has them.
    scan_size_px: (height, width) of the scan.
    decoder: from `make_decoder`; None reads in this process.

  Returns:
    The others, and path -> reason of the videos left out.

  Raises:
    ValueError: more are unreadable than may be skipped, or all are.
  """
  wanted = [_Look(footage_lib.of_sample(sample)) for sample in samples]
  scans = _scan_all(
    wanted,
    scan_frames,
    scan_size_px,
    decoder,
    keep=False,
  )
  skipped = _unreadable(scans)
  kept = [
    sample for sample, look in zip(samples, wanted) if scans[look] is None
  ]
  lost = len(samples) - len(kept)
  if lost > max_skip_fraction * len(samples) or not kept:
    listed = "; ".join(list(skipped.values())[:5])
    raise ValueError(
      f"the videos of {lost} of {len(samples)} samples cannot be read, at most"
      f" {max_skip_fraction:.1%} may be skipped (data.max_skip_fraction):"
      f" {listed}"
    )
  return kept, skipped


class _Look(NamedTuple):
  """What is scanned.

  Attributes:
    footage: of which video.
    within: of which seconds of it, see `video.scan_frames`.
  """

  footage: Footage
  within: tuple[tuple[float, float], ...] = ()


def _scan_all(
  wanted: Sequence[_Look],
  scan_frames: int,
  scan_size_px: tuple[int, int],
  decoder: Decoder | None,
  *,
  keep: bool = True,
) -> dict[_Look, video.Scan | video.VideoError | None]:
  """Scans each once, as many at a time as the decoder has processes.

  Returns:
    The scan (None with `keep` False), or why there is none.
  """
  decoder = decoder or decoding.Decoder()

  def scan(one: _Look):
    parts = (one.within,) if one.within else ()
    try:
      found = decoder.scan_frames(
        one.footage, scan_frames, tuple(scan_size_px), *parts
      )
    except video.VideoError as error:
      return error
    return found if keep else None

  distinct = list(dict.fromkeys(wanted))
  if decoder.processes < 2 or len(distinct) < 2:
    return {one: scan(one) for one in distinct}
  with concurrent.futures.ThreadPoolExecutor(decoder.processes) as pool:
    return dict(zip(distinct, pool.map(scan, distinct), strict=True))


def _unreadable(scans: dict[_Look, Any]) -> dict[str, str]:
  """path -> reason, each said once."""
  skipped = {}
  for one, found in scans.items():
    if isinstance(found, video.VideoError):
      logging.warning("skipped: %s", found)
      skipped[one.footage.path] = str(found)
  return skipped


class _Row(NamedTuple):
  """What a batch holds of one scan, named as in `video.Scan`."""

  frames: np.ndarray
  mask: np.ndarray
  time_s: np.ndarray
  frame_index: np.ndarray


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

  def __init__(self, samples, num_frames, size_px, cache_bytes, decoder):
    self._samples = samples
    self._decoder = decoder
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
    wanted = footage_lib.of_sample(self._samples[number])
    try:
      status = os.stat(wanted.path)
      key = (wanted, status.st_mtime_ns, status.st_size)
    except OSError:
      key = (wanted, 0, 0)  # a disk cache may have it all the same
    scan = self._cache.get(key)
    if scan is None:
      try:
        scan = self._decoder.scan_frames(
          wanted, self._num_frames, self._size_px
        )
      except video.VideoError as error:
        return number, _Unreadable(str(error))
      self._keep(key, scan)
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
    resize: kernel of the resizing, see `frame_size.resize_frame`.
    cache_mib: memory for decoded frames; 0 keeps none.
    num_threads: videos read at a time; as many as the decoder has processes,
      where those are more.
    decoder: from `make_decoder`; None reads in this process.
  """

  def __init__(
    self,
    size_px: tuple[int, int],
    *,
    resize: frame_size.Resize = "area",
    cache_mib: int,
    num_threads: int,
    decoder: Decoder | None = None,
  ):
    self.size_px = tuple(size_px)
    self._decoder = decoder or decoding.Decoder()
    self._resize = resize
    height, width = self.size_px
    self._capacity = cache_mib * 2**20 // (height * width * 3)
    self._cache = collections.OrderedDict()
    self._lock = threading.Lock()
    self._pool = concurrent.futures.ThreadPoolExecutor(
      max(num_threads, self._decoder.processes)
    )

  def durations_s(self, samples: Sequence[records.Sample]) -> list[float]:
    """Seconds of the B samples' videos or clips, as their files say.

    Raises:
      video.VideoError: one of them cannot be read.
    """
    footage = [footage_lib.of_sample(sample) for sample in samples]
    return [i.duration_s for i in self._pool.map(self._decoder.probe, footage)]

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
      self._pool.submit(self._fill, footage_lib.of_sample(sample), row, frames)
      for sample, row, frames in zip(samples, index, out)
    ]
    concurrent.futures.wait(jobs)  # none writes on when one has failed
    for job in jobs:
      job.result()
    return out

  def _fill(self, footage: Footage, index: np.ndarray, out: np.ndarray) -> None:
    """Puts the frames of one video into uint8[N, h, w, 3]."""
    path = footage.path
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
    frames = self._decoder.read_frames(
      footage, np.array(numbers), self.size_px, resize=self._resize
    )
    for number, frame in zip(numbers, frames):
      out[missing[number]] = frame
    with self._lock:
      for number, frame in zip(numbers, frames):
        self._cache[path, number] = frame.copy()  # not the whole stack
        self._cache.move_to_end((path, number))
      while len(self._cache) > self._capacity:
        self._cache.popitem(last=False)
