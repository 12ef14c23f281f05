"""The keyframe command against the bare decode of the same file.

  python -m benchmarks.decode --videos=FOLDER [--seconds=15] [--rounds=3] \
    [--out=FILE.json] [--tiny]

Each .mp4 file of the folder (those named by --only, or all) is made long by
repeating its coded frames as they are (the table of samples is repeated, so
nothing is encoded anew) until its bare decode takes about --seconds. Then, in
turns: `bare`, `cv2.VideoCapture(file)` and `read()` to the end with OpenCV's
own choice of threads, the loop alone; and `command`, the whole process of
configs/keyframes.py, with the start of Python and jax, the compiled programs in
their cache, 16 full-size pictures, film strip and page. `inside` is the
command's own count, without the start and the page. The last row is a folder of
all of them, against the sum of their bare loops. `--tiny` repeats a video twice
and runs each once, compiling included: is all in order?
"""

import os
import pathlib
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time

import cv2
from absl import app, flags

from cf_jax.data import json_file
from cf_jax.runtime import telemetry

_VIDEOS = flags.DEFINE_string("videos", None, "folder", required=True)
_ONLY = flags.DEFINE_list("only", [], "names in it; none are all")
_SECONDS = flags.DEFINE_float("seconds", 15.0, "of a bare decode, about")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "of each, in turns")
_OUT = flags.DEFINE_string("out", "", "results as JSON")
_TINY = flags.DEFINE_bool("tiny", False, "one short round of each: a check")


# ------------------------------------------------------ a longer file of a file


def _boxes(data: bytes, start: int, end: int):
  """(kind, start of the content, end) of every box in a stretch of MP4."""
  while start + 8 <= end:
    size, kind = struct.unpack_from(">I4s", data, start)
    head = 8
    if size == 1:
      (size,) = struct.unpack_from(">Q", data, start + 8)
      head = 16
    yield kind, start + head, start + (size or end - start)
    start += size or end - start


def _box(kind: bytes, content: bytes) -> bytes:
  return struct.pack(">I4s", 8 + len(content), kind) + content


def repeat(source: pathlib.Path, target: pathlib.Path, times: int) -> None:
  """Writes an MP4 whose first video track is that of `source`, repeated."""
  data = source.read_bytes()
  top = {kind: (start, end) for kind, start, end in _boxes(data, 0, len(data))}
  moov = list(_boxes(data, *top[b"moov"]))
  traks = [
    (start, end)
    for kind, start, end in moov
    if kind == b"trak" and b"vide" in data[start:end]
  ]
  header = next(data[a:b] for kind, a, b in moov if kind == b"mvhd")

  def build(shift: int) -> bytes:
    track = _repeat_box(data, *traks[0], times, shift)
    whole = _longer(header, (16, 24), times)
    return _box(b"moov", _box(b"mvhd", whole) + _box(b"trak", track))

  start, end = top[b"ftyp"]
  ftyp = _box(b"ftyp", data[start:end])
  # The old file lies whole in the new one's mdat: all its offsets move by that.
  shift = len(ftyp) + len(build(0)) + 16
  mdat = struct.pack(">I4sQ", 1, b"mdat", 16 + len(data)) + data
  target.write_bytes(ftyp + build(shift) + mdat)


def _longer(content: bytes, places: tuple[int, int], times: int) -> bytes:
  """Multiplies a duration, at one place in version 0 and one in version 1."""
  long = content[0] == 1
  form, place = (">Q", places[1]) if long else (">I", places[0])
  (value,) = struct.unpack_from(form, content, place)
  value = min(value * times, 2 ** (64 if long else 32) - 1)
  return (
    content[:place]
    + struct.pack(form, value)
    + content[place + struct.calcsize(form) :]
  )


def _repeat_box(data, start, end, times, shift) -> bytes:
  """The content of a box, with the tables below it repeated."""
  made = b""
  inside = {kind: data[a:b] for kind, a, b in _boxes(data, start, end)}
  for kind, a, b in _boxes(data, start, end):
    content = data[a:b]
    if kind == b"edts":
      continue  # it would end the track where it ended
    if kind in (b"mdia", b"minf", b"stbl"):
      content = _repeat_box(data, a, b, times, shift)
    elif kind == b"mdhd":
      content = _longer(content, (16, 24), times)
    elif kind == b"tkhd":
      content = _longer(content, (20, 28), times)
    elif kind in (b"stts", b"ctts"):
      (count,) = struct.unpack_from(">I", content, 4)
      rows = content[8 : 8 + 8 * count] * times
      content = content[:4] + struct.pack(">I", count * times) + rows
    elif kind == b"stsz":
      size, count = struct.unpack_from(">II", content, 4)
      rows = content[12 : 12 + 4 * count] * times if not size else b""
      content = content[:4] + struct.pack(">II", size, count * times) + rows
    elif kind in (b"stco", b"co64", b"stsc", b"stss"):
      kind, content = _repeat_numbers(kind, content, inside, times, shift)
    elif kind in (b"sdtp", b"sbgp", b"sgpd", b"cslg"):
      continue  # hints
    made += _box(kind, content)
  return made


def _repeat_numbers(kind, content, inside, times, shift):
  """Tables that speak of places, chunks or samples by their numbers."""
  (count,) = struct.unpack_from(">I", content, 4)

  def table(form, columns, source=content):
    (rows,) = struct.unpack_from(">I", source, 4)
    return struct.unpack_from(f">{rows * columns}{form}", source, 8)

  if kind in (b"stco", b"co64"):
    at = [place + shift for place in table("IQ"[kind == b"co64"], 1)] * times
    return b"co64", content[:4] + struct.pack(f">I{len(at)}Q", len(at), *at)
  if kind == b"stss":
    (samples,) = struct.unpack_from(">I", inside[b"stsz"], 8)
    at = [i * samples + n for i in range(times) for n in table("I", 1)]
    return kind, content[:4] + struct.pack(f">I{len(at)}I", len(at), *at)
  offsets = inside[b"stco"] if b"stco" in inside else inside[b"co64"]
  (chunks,) = struct.unpack_from(">I", offsets, 4)
  row = table("I", 3)
  rows = [
    (i * chunks + row[k], *row[k + 1 : k + 3])
    for i in range(times)
    for k in range(0, 3 * count, 3)
  ]
  flat = [number for entry in rows for number in entry]
  return kind, content[:4] + struct.pack(f">I{len(flat)}I", len(rows), *flat)


# -------------------------------------------------------------------- measured


def bare(path: pathlib.Path) -> tuple[int, float]:
  """Frames, and the seconds that reading them all takes."""
  capture, count = cv2.VideoCapture(str(path)), 0
  begin = time.perf_counter()
  while capture.read()[0]:
    count += 1
  return count, time.perf_counter() - begin


def command(path: pathlib.Path, workdir: pathlib.Path) -> tuple[float, float]:
  """Seconds of the whole process, and of the videos as it counts them."""
  shutil.rmtree(workdir, ignore_errors=True)
  begin = time.perf_counter()
  subprocess.run(
    [
      sys.executable,
      "-m",
      "cf_jax.main",
      "--config=configs/keyframes.py",
      f"--config.video={path}",
      f"--workdir={workdir}",
    ],
    check=True,
    capture_output=True,
  )
  took_s = time.perf_counter() - begin
  held = json_file.read_object(workdir / "videos.json")
  return took_s, held["this_start"]["seconds"]


def measure(paths: list[pathlib.Path], target: pathlib.Path, folder) -> dict:
  """Both, in turns; `target` is what the command is given."""
  if not _TINY.value:
    command(target, folder / "warm")  # fills the cache of compiled programs
  bare_s, whole_s, inside_s = [], [], []
  for _ in range(1 if _TINY.value else _ROUNDS.value):
    loops = [bare(path) for path in paths]
    bare_s.append(sum(seconds for _, seconds in loops))
    whole, inside = command(target, folder / "out")
    whole_s.append(whole)
    inside_s.append(inside)
  frames = sum(count for count, _ in loops)
  return dict(
    frames=frames,
    bare_s=bare_s,
    command_s=whole_s,
    inside_s=inside_s,
    bare_fps=frames / statistics.median(bare_s),
    command_fps=frames / statistics.median(whole_s),
    ratio=statistics.median(
      b / c for b, c in zip(bare_s, whole_s, strict=True)
    ),
    ratio_inside=statistics.median(
      b / c for b, c in zip(bare_s, inside_s, strict=True)
    ),
  )


def main(_) -> None:
  rows = {}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / "in").mkdir()
    made = []
    for source in sorted(pathlib.Path(_VIDEOS.value).glob("*.mp4")):
      if _ONLY.value and source.name not in _ONLY.value:
        continue
      count, once_s = bare(source)
      times = 2 if _TINY.value else max(1, round(_SECONDS.value / once_s))
      path = folder / "in" / source.name
      repeat(source, path, times)
      found = bare(path)[0]
      if found != count * times:
        raise ValueError(
          f"{source.name} repeated {times} times has {found} frames, expected"
          f" {count * times}; leave it out with --only"
        )
      made.append(path)
      rows[source.name] = measure([path], path, folder) | dict(times=times)
    if len(made) > 1:
      rows["all, one folder"] = measure(made, folder / "in", folder)
  about = dict(
    cores=cv2.getNumberOfCPUs(),
    load=os.getloadavg(),
    versions=telemetry.versions(),
    opencv=cv2.__version__,
  )
  if _OUT.value:
    telemetry.write_json(_OUT.value, about | dict(rows=rows))
  telemetry.closing_table(
    "frames a second",
    ("video", "frames", "bare", "command", "ratio", "ratio inside"),
    [
      (
        name,
        row["frames"],
        f"{row['bare_fps']:.0f}",
        f"{row['command_fps']:.0f}",
        f"{row['ratio']:.2f}",
        f"{row['ratio_inside']:.2f}",
      )
      for name, row in rows.items()
    ],
  )


if __name__ == "__main__":
  app.run(main)
