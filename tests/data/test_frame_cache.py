"""Frames from disk are those of the decoder, whatever happens to the disk."""

import multiprocessing
import os
import pathlib

import cv2
import numpy as np
import pytest
from PIL import Image

from cf_jax.data import decoding, frame_cache, video
from cf_jax.data.footage import Footage


class _Counting(decoding.Decoder):
  """Counts what it is asked."""

  def __init__(self):
    super().__init__()
    self.asked = []

  def probe(self, *args):
    self.asked.append("probe")
    return super().probe(*args)

  def scan_frames(self, *args):
    self.asked.append("scan")
    return super().scan_frames(*args)

  def read_frames(self, footage, index, *args, **how):
    self.asked.append(list(index))
    return super().read_frames(footage, index, *args, **how)


@pytest.fixture
def clip(tmp_path):
  """30 frames of noise at 10 a second."""
  path = tmp_path / "noise.avi"
  writer = cv2.VideoWriter(
    str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (64, 48)
  )
  rng = np.random.default_rng(0)
  for picture in rng.integers(0, 256, (30, 48, 64, 3), dtype=np.uint8):
    writer.write(picture)
  writer.release()
  return path


def _cache(tmp_path, mode="prefer", max_gib=1.0):
  decoder = _Counting()
  how = dict(mode=mode, folder=str(tmp_path / "cache"), max_gib=max_gib)
  return frame_cache.around(decoder, **how), decoder.asked


def _entries(tmp_path):
  return sorted((tmp_path / "cache" / "entries").glob("*/*"))


def _equal(left, right):
  return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def test_identical_with_and_without(clip, tmp_path):
  here = decoding.Decoder()
  pictures = tmp_path / "folder"
  pictures.mkdir()
  for n in range(12):
    Image.new("RGB", (40, 30), (20 * n, 0, 0)).save(pictures / f"{n}.png")
  for one in (
    Footage(str(clip)),
    Footage(str(clip), clip=(0.5, 1.7)),
    Footage(str(pictures), fps=4.0),
    Footage(str(pictures / "3.png")),
  ):
    index = (
      np.zeros(3, int) if one.path.endswith("png") else np.array([7, 2, 7])
    )
    for mode, decoded in (("prefer", True), ("prefer", False), ("only", False)):
      cache, asked = _cache(tmp_path, mode)
      assert cache.probe(one) == here.probe(one)
      for frames in (8, 40):  # some of them, and more than there are
        scan = cache.scan_frames(one, frames, (24, 32))
        expected = here.scan_frames(one, frames, (24, 32))
        assert _equal(scan, expected)
        for left, right in zip(scan[:4], expected[:4], strict=True):
          assert left.dtype == right.dtype
      for resize in ("area", "bicubic"):
        np.testing.assert_array_equal(
          cache.read_frames(one, index, (28, 56), resize=resize),
          here.read_frames(one, index, (28, 56), resize=resize),
        )
      assert bool(asked) == decoded, (one, mode)
      # Frames are those of the file, of a part of it too.
      expected = ((2, 3) if one.clip else (0, 5)) if decoded else (5, 0)
      assert (cache.hits, cache.misses) == expected


def test_parts_are_entries_of_their_own(clip, tmp_path):
  one, here = Footage(str(clip)), decoding.Decoder()
  cache, asked = _cache(tmp_path)
  for within in ((), ((0.5, 0.8),), ((0.5, 0.8), (2.0, 2.2))):
    expected = here.scan_frames(one, 4, (24, 32), within)
    for _ in range(2):
      assert _equal(cache.scan_frames(one, 4, (24, 32), within), expected)
  assert asked == ["scan"] * 3 and len(_entries(tmp_path)) == 3


def test_an_entry_grows(clip, tmp_path):
  cache, asked = _cache(tmp_path)
  one, here = Footage(str(clip)), decoding.Decoder()
  cache.read_frames(one, np.array([9, 3]), (24, 32))
  wanted = np.array([3, 20, 9, 1, 20])
  found = cache.read_frames(one, wanted, (24, 32))
  np.testing.assert_array_equal(found, here.read_frames(one, wanted, (24, 32)))
  assert asked == [[3, 9], [1, 20]] and len(_entries(tmp_path)) == 1
  cache.read_frames(one, np.array([1, 3, 9, 20]), (24, 32))
  assert len(asked) == 2
  cache.read_frames(one, np.array([1]), (32, 24))  # of another size
  assert len(asked) == 3 and len(_entries(tmp_path)) == 2


def test_content_counts_and_not_the_name(clip, tmp_path):
  cache, asked = _cache(tmp_path)
  first = cache.scan_frames(Footage(str(clip)), 4, (24, 32))
  copy = tmp_path / "copy.avi"
  copy.write_bytes(clip.read_bytes())
  assert _equal(cache.scan_frames(Footage(str(copy)), 4, (24, 32)), first)
  assert asked == ["scan"]
  # Another video under the name: the same size, and the old time of writing.
  about = clip.stat()
  data = bytearray(clip.read_bytes())
  assert data[20000:20002] != b"\x55\x55"
  data[20000:20002] = b"\x55\x55"
  clip.write_bytes(data)
  os.utime(clip, ns=(about.st_atime_ns, about.st_mtime_ns))
  for again in (cache, _cache(tmp_path)[0]):
    again.scan_frames(Footage(str(clip)), 4, (24, 32))
  assert asked == ["scan", "scan"]


def test_code_of_another_version_is_asked_again(clip, tmp_path, monkeypatch):
  cache, asked = _cache(tmp_path)
  cache.probe(Footage(str(clip)))
  monkeypatch.setattr(video, "VERSION", -1)
  cache.probe(Footage(str(clip)))
  assert asked == ["probe", "probe"]


def _flip(data, place):
  return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
  "spoil",
  [
    lambda data: b"",
    lambda data: data[:10],
    lambda data: data[:-1],
    lambda data: _flip(data, 0),
    lambda data: _flip(data, 9),
    lambda data: _flip(data, 40),
    lambda data: _flip(data, len(data) - 1),
    lambda data: bytes(len(data)),
  ],
)
@pytest.mark.parametrize("kind", ["scan", "frames"])
def test_damage_is_noticed_and_made_again(clip, tmp_path, spoil, kind):
  one, here = Footage(str(clip)), decoding.Decoder()

  def ask(decoder):
    if kind == "scan":
      return decoder.scan_frames(one, 4, (24, 32)).frames
    return decoder.read_frames(one, np.arange(4), (24, 32))

  ask(_cache(tmp_path)[0])
  (entry,) = _entries(tmp_path)
  whole = entry.read_bytes()
  entry.write_bytes(spoil(whole))
  with pytest.raises(ValueError, match="is damaged.*configs/cache_frames.py"):
    ask(_cache(tmp_path, "only")[0])
  cache, asked = _cache(tmp_path)
  np.testing.assert_array_equal(ask(cache), ask(here))
  assert cache.remade == 1 and len(asked) == 1
  assert entry.read_bytes() == whole


def test_only_decodes_and_writes_nothing(clip, tmp_path):
  cache, asked = _cache(tmp_path, "only")
  one = Footage(str(clip))
  for ask in (
    lambda: cache.probe(one),
    lambda: cache.scan_frames(one, 4, (24, 32)),
    lambda: cache.read_frames(one, np.array([5]), (24, 32)),
  ):
    with pytest.raises(ValueError, match="not in the frame cache") as error:
      ask()
    assert "noise.avi" in str(error.value) and "'prefer'" in str(error.value)
    assert not isinstance(error.value, video.VideoError)
  assert not asked and not (tmp_path / "cache").exists()
  _cache(tmp_path)[0].read_frames(one, np.array([5]), (24, 32))
  with pytest.raises(ValueError, match="noise.avi: frame 6 is not in"):
    cache.read_frames(one, np.array([5, 6]), (24, 32))


def test_only_needs_no_video(clip, tmp_path):
  one = Footage(str(clip))
  expected = _cache(tmp_path)[0].scan_frames(one, 4, (24, 32))
  clip.unlink()
  cache, asked = _cache(tmp_path, "only")
  assert _equal(cache.scan_frames(one, 4, (24, 32)), expected) and not asked
  with pytest.raises(video.VideoError, match="No such file"):
    _cache(tmp_path)[0].scan_frames(one, 4, (24, 32))
  with pytest.raises(video.VideoError, match="No such file"):
    cache.probe(Footage(str(tmp_path / "never.avi")))


def test_unreadable_files_stay_unreadable(tmp_path):
  path = tmp_path / "text.mp4"
  path.write_text("this is not a video\n" * 50)
  cache, asked = _cache(tmp_path)
  for _ in range(2):  # asked anew: it may have been the machine's fault
    with pytest.raises(video.VideoError, match=r"text.mp4: not a video"):
      cache.scan_frames(Footage(str(path)), 4, (24, 32))
  assert asked == ["scan", "scan"]
  with pytest.raises(video.VideoError, match=r"text.mp4: not a video"):
    _cache(tmp_path, "only")[0].scan_frames(Footage(str(path)), 4, (24, 32))


def test_what_was_used_longest_ago_goes(clip, tmp_path):
  frame = 64 * 48 * 3
  cache, asked = _cache(tmp_path, max_gib=10 * frame / 2**30)
  one, here = Footage(str(clip)), decoding.Decoder()
  for start in range(4):
    cache.scan_frames(one, 2 + start, (48, 64))  # 2 to 5 frames
    for age, entry in enumerate(_entries(tmp_path)):
      os.utime(entry, (1e9 - age, 1e9 - age))
  sizes = [entry.stat().st_size for entry in _entries(tmp_path)]
  assert sum(sizes) <= 10 * frame and cache.evicted_used_s > 0
  for count in range(2, 6):
    found = cache.scan_frames(one, count, (48, 64))
    assert _equal(found, here.scan_frames(one, count, (48, 64)))


def test_a_full_disk_stops_nothing(clip, tmp_path, monkeypatch):
  def full(path, data):
    raise OSError(28, "No space left on device", str(path))

  monkeypatch.setattr(frame_cache.disk, "write", full)
  monkeypatch.setattr(frame_cache.disk, "write_text", full)
  cache, asked = _cache(tmp_path)
  one = Footage(str(clip))
  for _ in range(2):
    cache.scan_frames(one, 4, (24, 32))
  assert asked == ["scan", "scan"]


def _use(path, folder, seed, rounds):
  rng = np.random.default_rng(seed)
  how = dict(mode="prefer", folder=folder, max_gib=120 * 24 * 32 * 3 / 2**30)
  cache = frame_cache.around(decoding.Decoder(), **how)
  here, one = decoding.Decoder(), Footage(path)
  for _ in range(rounds):
    index = rng.integers(0, 30, 3)
    size = [(24, 32), (32, 24), (12, 64)][rng.integers(3)]
    assert np.array_equal(
      cache.read_frames(one, index, size), here.read_frames(one, index, size)
    )
    if rng.random() < 0.2:
      count = int(rng.integers(1, 30))
      cache.scan_frames(one, count, size)


def test_several_processes_at_a_time(clip, tmp_path):
  """And less room than they would take."""
  fork = multiprocessing.get_context("fork")
  folder = str(tmp_path / "cache")
  jobs = [
    fork.Process(target=_use, args=(str(clip), folder, seed, 25))
    for seed in range(3)
  ]
  for job in jobs:
    job.start()
  for job in jobs:
    job.join()
  assert [job.exitcode for job in jobs] == [0, 0, 0]
  _use(str(clip), folder, 9, 10)
  assert not list(pathlib.Path(folder).rglob("*.tmp"))


def test_settings(tmp_path):
  how = dict(folder=str(tmp_path), max_gib=1.0)
  decoder = decoding.Decoder()
  assert frame_cache.around(decoder, mode="off", **how) is decoder
  with pytest.raises(ValueError, match=r"data\.frame_cache\.mode"):
    frame_cache.around(decoder, mode="on", **how)
  with pytest.raises(ValueError, match=r"data\.frame_cache\.max_gib"):
    frame_cache.around(decoder, mode="only", folder="a", max_gib=0)
