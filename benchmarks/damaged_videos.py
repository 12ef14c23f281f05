"""Damaged videos by the thousand: does one of them hurt the run?

  python -m benchmarks.damaged_videos --videos=FOLDER --out=FILE.jsonl \
    [--count=2400] [--seed=0] [--processes=1] [--seconds=0] [--tiny]

Video n is one of the folder's files, damaged in one of the ways below, both
drawn from (seed, n). It is scanned by `decoding.Decoder` in a process of its
own (20 s, 1 GiB), and what was scanned is read a second time. Then it is

  refused    a VideoError that names the file; by reason
  intact     the frames and times of the whole file, bit for bit: what was hit
             is not needed for them
  different  other frames or times, and the decoder does not complain. A changed
             clock or rate makes another video that is as good as the first, and
             few changed bits of a picture decode as any others would: nothing
             but a checksum of the file tells

and lost where none of that: another exception, times that do not ascend, frames
that a second reading does not give again, a process that outlives its clock.
`different` is told apart by what differs. One line a video goes to FILE.jsonl;
started again, the command goes on behind the last. `--tiny` tries each way
once.
"""

import collections
import concurrent.futures
import json
import pathlib
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags, logging

from cf_jax.data import decoding, video
from cf_jax.data.footage import Footage
from cf_jax.runtime import telemetry

_VIDEOS = flags.DEFINE_string("videos", None, "folder", required=True)
_OUT = flags.DEFINE_string("out", None, "a row a video", required=True)
_COUNT = flags.DEFINE_integer("count", 2400, "how many, over all starts")
_SEED = flags.DEFINE_integer("seed", 0, "of the damage")
_PROCESSES = flags.DEFINE_integer("processes", 1, "that decode")
_SECONDS = flags.DEFINE_float("seconds", 0.0, "then it stops; 0: at the end")
_TINY = flags.DEFINE_bool("tiny", False, "each way once: a check")

_TIMEOUT_S, _MEMORY_MIB = 20.0, 1024
_SCAN = 8, (32, 32)
# Larger files take so long that they come so seldom.
_LARGE_BYTES, _SELDOM = 1_260_000, 12
_SIZES = (0, 1, 7, 0x7FFF, 0xFFFF)
_COUNTS = (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


# ----------------------------------------------------------- ways of damaging


def _flip(data: bytearray, rng, start: int, stop: int, count: int) -> bytearray:
  for place in rng.integers(start, max(stop, start + 1), count):
    data[place % len(data)] ^= 1 << int(rng.integers(8))
  return data


def bits(data, rng):
  """Flips 1 to 300 bits anywhere."""
  return _flip(data, rng, 0, len(data), int(10 ** rng.uniform(0, 2.5)))


def bits_of_header(data, rng):
  """Flips bits in what says how to read the rest."""
  start = max(data.find(b"moov"), 0)
  return _flip(data, rng, start, start + 4000, int(rng.integers(1, 40)))


def cut(data, rng):
  """Ends early."""
  return data[: int(rng.integers(0, len(data)))]


def head_gone(data, rng):
  """Begins late."""
  return data[int(rng.integers(1, len(data))) :]


def hole(data, rng):
  """A stretch of zeros, or of noise."""
  start = int(rng.integers(len(data)))
  size = int(10 ** rng.uniform(1, 5))
  size = len(data[start : start + size])
  noise = rng.bytes(size) if rng.random() < 0.5 else bytes(size)
  data[start : start + size] = noise
  return data


def swapped(data, rng):
  """Two stretches change places."""
  size = int(10 ** rng.uniform(1, 4))
  one, two = sorted(rng.integers(0, max(len(data) - size, 1), 2).tolist())
  if one + size <= two:
    first, second = data[one : one + size], data[two : two + size]
    data[one : one + size], data[two : two + size] = second, first
  return data


def stretch_gone(data, rng):
  """A piece in the middle is left out; all places behind it are wrong."""
  start = int(rng.integers(len(data)))
  del data[start : start + int(10 ** rng.uniform(0, 4.5))]
  return data


def _places(data: bytearray, *kinds: bytes) -> list[int]:
  """Where the contents of boxes of these kinds begin."""
  places = []
  for kind in kinds:
    place = data.find(kind)
    while place >= 0:
      places.append(place + len(kind))
      place = data.find(kind, place + 1)
  return places


def _put(data, rng, places, offsets, form, values):
  """Writes a value at one or several of some places."""
  for place in places:
    for offset in offsets:
      if rng.random() < 0.7 and place + offset + 8 <= len(data):
        value = values[int(rng.integers(len(values)))]
        struct.pack_into(form, data, place + offset, value)
  return data


def absurd_sizes(data, rng):
  """Pictures of no or of billions of pixels, in all headers."""
  _put(data, rng, _places(data, b"avc1", b"mp4v"), (24, 26), ">H", _SIZES)
  _put(data, rng, _places(data, b"tkhd"), (76, 80), ">H", _SIZES)
  _put(data, rng, _places(data, b"strf"), (8, 12), "<I", _COUNTS)
  return _put(data, rng, _places(data, b"avih"), (36, 40), "<I", _COUNTS)


def absurd_sizes_in_stream(data, rng):
  """What the codec itself says of the pictures' size."""
  for place in _places(data, b"avcC", b"esds", b"\0\0\1\x20", b"\0\0\1\0"):
    if rng.random() < 0.7:
      _flip(data, rng, place, place + 30, int(rng.integers(1, 12)))
  return data


def absurd_durations(data, rng):
  """Clocks that stand or race, videos of centuries."""
  _put(data, rng, _places(data, b"mvhd", b"mdhd"), (12, 16), ">I", _COUNTS)
  _put(data, rng, _places(data, b"stts"), (12,), ">I", _COUNTS)
  return _put(
    data, rng, _places(data, b"avih", b"strh"), (4, 24), "<I", _COUNTS
  )


def no_frames(data, rng):
  """Tables that list nothing."""
  kinds = (b"stsz", b"stts", b"stco", b"stsc", b"co64", b"idx1")
  wanted = [k for k in kinds if rng.random() < 0.6] or [b"stsz"]
  for place in _places(data, *wanted):
    offset = 8 if data[place - 4 : place] == b"stsz" else 4
    if place + offset + 4 <= len(data):
      struct.pack_into(">I", data, place + offset, 0)
  _put(data, rng, _places(data, b"avih"), (20,), "<I", (0,))
  return _put(data, rng, _places(data, b"strh"), (36,), "<I", (0,))


def huge_counts(data, rng):
  """Tables that promise billions of rows."""
  _put(data, rng, _places(data, b"stsz"), (4, 8), ">I", _COUNTS)
  _put(data, rng, _places(data, b"stts", b"ctts"), (4, 8), ">I", _COUNTS)
  kinds = b"stco", b"stsc", b"stss", b"elst"
  _put(data, rng, _places(data, *kinds), (4, 8, 12), ">I", _COUNTS)
  _put(data, rng, _places(data, b"avih"), (20,), "<I", _COUNTS)
  return _put(data, rng, _places(data, b"strh"), (36,), "<I", _COUNTS)


def wrong_places(data, rng):
  """Frames said to lie elsewhere: in the header, in each other, behind."""
  for place in _places(data, b"stco"):
    (count,) = struct.unpack_from(">I", data, place + 4)
    for row in range(min(count, 5000)):
      if place + 12 + 4 * row <= len(data) and rng.random() < 0.2:
        where = int(rng.integers(2 * len(data)))
        struct.pack_into(">I", data, place + 8 + 4 * row, where)
  return _put(data, rng, _places(data, b"idx1"), (8, 12, 24), "<I", _COUNTS)


def wrong_box_sizes(data, rng):
  """Boxes that end before they begin, or behind the file."""
  kinds = b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"mdat", b"udta"
  for place in _places(data, *kinds, b"LIST", b"strl", b"movi"):
    if rng.random() < 0.25 and place >= 8:
      value = int(rng.choice([0, 1, 7, 8, len(data), 2**31, 2**32 - 1]))
      struct.pack_into(">I", data, place - 8, value)
  return data


def nested(data, rng):
  """Containers in containers, some of them without end."""
  way = rng.integers(6)

  def box(kind: bytes, inside: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(inside), kind) + inside

  if way == 0:  # a whole file as another one's frames
    return box(b"ftyp", b"isom\0\0\2\0isom") + box(b"mdat", bytes(data))
  if way == 1:
    return data + data
  if way == 2:  # boxes that hold each other, 3000 deep
    inside = b""
    for _ in range(3000):
      inside = box(rng.choice([b"moov", b"trak", b"mdia", b"udta"]), inside)
    return box(b"ftyp", b"isom\0\0\2\0isom") + inside + bytes(data)
  if way == 3:
    return b"RIFF" + struct.pack("<I", len(data)) + b"AVI " + bytes(data)
  if way == 4:  # the header twice, the second one damaged
    place = data.find(b"moov")
    (size,) = struct.unpack_from(">I", data, max(place - 4, 0))
    moov = bytearray(data[max(place - 4, 0) : max(place - 4, 0) + size])
    return data + (_flip(moov, rng, 8, len(moov), 20) if moov else b"")
  return b"\x1aE\xdf\xa3" + bytes(data)  # as Matroska begins


def another_head(data, rng):
  """The first bytes of another kind of file."""
  heads = (
    b"RIFF\xff\xff\xff\xffAVI LIST",
    b"\0\0\0\x18ftypmp42",
    b"\x1aE\xdf\xa3\x01\0\0\0\0\0\0#",
    b"OggS\0\2",
    b"FLV\1\5\0\0\0\t",
    b"\0\0\1\xba",
    b"G@\0\x10",
    b"#EXTM3U\n",
    b"\x89PNG\r\n\x1a\n",
    b"%PDF-1.7\n",
  )
  head = heads[int(rng.integers(len(heads)))]
  data[: len(head)] = head
  return data


def codec_renamed(data, rng):
  """The frames are said to be of another codec."""
  names = b"avc1", b"hvc1", b"vp09", b"av01", b"mp4v", b"mjpa", b"png ", b"raw "
  for place in _places(data, b"avc1", b"mp4v", b"MJPG", b"H264", b"cvid"):
    data[place - 4 : place] = names[int(rng.integers(len(names)))]
  for place in _places(data, b"strh"):
    data[place + 8 : place + 12] = names[int(rng.integers(len(names)))]
  return data


def no_video(data, rng):
  """The track of pictures is said to be one of sound, or of nothing."""
  for place in _places(data, b"vide", b"vids"):
    data[place - 4 : place] = b"soun" if rng.random() < 0.5 else rng.bytes(4)
  return data


def noise(data, rng):
  """Nothing but noise behind the first bytes."""
  head = int(10 ** rng.uniform(0, 3))
  return data[:head] + rng.bytes(int(rng.integers(1, 50000)))


WAYS: tuple[Callable, ...] = (
  bits,
  bits_of_header,
  cut,
  head_gone,
  hole,
  swapped,
  stretch_gone,
  absurd_sizes,
  absurd_sizes_in_stream,
  absurd_durations,
  no_frames,
  huge_counts,
  wrong_places,
  wrong_box_sizes,
  nested,
  another_head,
  codec_renamed,
  no_video,
  noise,
)


# ------------------------------------------------------------- what comes of it


REASONS = {
  "within": "took too long",
  "died of it": "killed the decoder",
  "MiB of memory": "too much memory",
  "above the limit": "above a limit",
  "damaged; the decoder": "the decoder complains",
  "cut short; it should": "cut short",
  "not a video": "not a video",
  "empty": "not a video",
  "no frame can be": "no frames",
  "cannot be decoded": "a frame is missing",
}


def tried(decoder, path: pathlib.Path, whole: video.Scan) -> tuple[str, str]:
  """What a file comes to, and why."""
  one = Footage(str(path))
  try:
    scan = decoder.scan_frames(one, *_SCAN)
    real = scan.mask.sum()
    if not (
      real
      and scan.mask[:real].all()
      and np.all(np.diff(scan.time_s[:real]) > 0)
      and np.all(np.diff(scan.frame_index[:real]) > 0)
      and scan.frame_index.max() < scan.num_frames
    ):
      return "lost", "times or numbers do not ascend"
    index = scan.frame_index[:real]
    again = decoder.read_frames(one, index, _SCAN[1])
    if not np.array_equal(again, scan.frames[:real]):
      return "lost", "a second reading gives other frames"
  except video.VideoError as error:
    said = str(error)
    if not said.startswith(f"{path}: "):
      return "lost", f"the file is not named: {said}"
    known = [short for part, short in REASONS.items() if part in said]
    return "refused", known[0] if known else said.removeprefix(f"{path}: ")
  except Exception as error:  # this is what is looked for
    return "lost", repr(error)
  if np.array_equal(scan.frames, whole.frames):
    same = np.array_equal(scan.time_s, whole.time_s)
    return ("intact", "") if same else ("different", "times")
  if scan.num_frames != whole.num_frames:
    return "different", "number of frames"
  return "different", "pictures"


def main(_) -> None:
  logging.set_verbosity(logging.ERROR)
  folder, out = pathlib.Path(_VIDEOS.value), pathlib.Path(_OUT.value)
  files = sorted(
    file for file in folder.iterdir() if file.suffix in (".mp4", ".avi")
  )
  small = [f for f in files if f.stat().st_size <= _LARGE_BYTES] or files
  decoder = decoding.Decoder(
    processes=_PROCESSES.value,
    timeout_s=_TIMEOUT_S,
    max_memory_mib=_MEMORY_MIB,
  )
  wholes = {}
  for file in small if _TINY.value else files:
    wholes[file] = decoder.scan_frames(Footage(str(file)), *_SCAN)
  rows = telemetry.read_rows(out)
  done = {row["number"] for row in rows}
  count = len(WAYS) if _TINY.value else _COUNT.value

  def one(number: int) -> dict:
    rng = np.random.default_rng([_SEED.value, number])
    way = WAYS[number % len(WAYS)]
    seldom = not _TINY.value and rng.integers(_SELDOM) == 0
    source = (files if seldom else small)[
      int(rng.integers(len(files if seldom else small)))
    ]
    data = way(bytearray(source.read_bytes()), rng)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
      path = pathlib.Path(place) / source.name
      path.write_bytes(data)
      outcome, why = tried(decoder, path, wholes[source])
    spent_s = time.perf_counter() - begin
    if spent_s > 6 * _TIMEOUT_S:
      outcome, why = "lost", f"took {spent_s:.0f} s"
    return dict(
      number=number,
      video=source.name,
      damage=way.__name__,
      outcome=outcome,
      why=why,
      seconds=round(spent_s, 3),
    )

  with (
    out.open("a") as file,
    concurrent.futures.ThreadPoolExecutor(_PROCESSES.value) as pool,
    telemetry.progress("damage", count, unit="video") as bar,
  ):
    bar.advance(len(done))
    todo = [number for number in range(count) if number not in done]
    end_s = time.monotonic() + (_SECONDS.value or float("inf"))

    def in_time(number: int) -> dict | None:
      return one(number) if time.monotonic() < end_s else None

    for row in filter(None, pool.map(in_time, todo)):
      file.write(json.dumps(row) + "\n")
      file.flush()
      rows.append(row)
      bar.advance(1)
  decoder.close()
  if show(rows):
    sys.exit(1)


def show(rows: list[dict]) -> int:
  """Two tables, and the line; how many were lost."""
  counts = collections.Counter((row["outcome"], row["why"]) for row in rows)
  telemetry.closing_table(
    "what became of them",
    ("outcome", "why", "videos"),
    [(*key, f"{n}") for key, n in sorted(counts.items(), key=lambda c: -c[1])],
  )
  outcomes = ("refused", "intact", "different", "lost")
  by_way = collections.Counter((row["damage"], row["outcome"]) for row in rows)
  telemetry.closing_table(
    "by damage",
    ("damage", *outcomes),
    [
      (way.__name__, *(f"{by_way[way.__name__, kind]}" for kind in outcomes))
      for way in WAYS
    ],
  )
  seconds = sorted(row["seconds"] for row in rows)
  mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
  own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
  print(
    f"seconds: median {seconds[len(seconds) // 2]:.2f}, most {seconds[-1]:.1f};"
    f" memory: a decoder at most {mib:.0f} MiB, this process {own:.0f} MiB"
  )
  lost = sum(row["outcome"] == "lost" for row in rows)
  print(f"tried {len(rows)}, survived {len(rows) - lost}, lost {lost}")
  return lost


if __name__ == "__main__":
  app.run(main)
