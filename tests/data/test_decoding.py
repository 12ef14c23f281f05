"""Decoding in processes: the same bits, and bad files cost themselves alone."""

import json
import os
import pathlib
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time

import cv2
import numpy as np
import pytest
from PIL import Image

from cf_jax.data import decode_worker, decoding, video
from cf_jax.data.footage import Footage

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data" / "videos"

# What files of these names do to the process that opens them; it is read when
# Python starts, by nobody else.
_HOSTILE = """
import ctypes, os, pathlib, sys
if "cf_jax.data.decode_worker" in " ".join(sys.orig_argv):
  import numpy as np
  from cf_jax.data import video
  open_file = video.open_file
  def hostile(path, *args, **how):
    stem = pathlib.Path(path).stem
    if stem == "hang":
      ctypes.PyDLL(None).pause()  # and Python's lock is held
    if stem == "crash":
      ctypes.string_at(0)
    if stem == "leave":
      os._exit(3)
    if stem == "corrupt":
      os.write(2, b"malloc(): corrupted top size")
      os.abort()
    if stem == "big":
      np.ones(2**33)
    if stem == "babble":
      os.write(int(sys.argv[1]), b"x" * 100)
    if stem == "once":
      mark = pathlib.Path(path).with_suffix(".mark")
      if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), 9)
    return open_file(path, *args, **how)
  video.open_file = hostile
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """30 frames of noise at 10 a second."""
  path = tmp_path_factory.mktemp("decoding") / "noise.avi"
  writer = cv2.VideoWriter(
    str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (64, 48)
  )
  rng = np.random.default_rng(0)
  for picture in rng.integers(0, 256, (30, 48, 64, 3), dtype=np.uint8):
    writer.write(picture)
  writer.release()
  return path


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("site")
  (folder / "sitecustomize.py").write_text(_HOSTILE)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PYTHONPATH", str(folder))
    made = decoding.Decoder(processes=1, timeout_s=1.5, max_memory_mib=1024)
    yield made
    made.close()


def _equal(left, right):
  return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def _files(decoder):
  return sum(1 for _ in pathlib.Path("/proc/self/fd").iterdir())


def test_the_same_bits(clip, decoder, tmp_path):
  Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
  here = decoding.Decoder()
  whole = [Footage(str(clip)), Footage(str(clip), clip=(0.5, 1.7))]
  for one in [*whole, Footage(str(tmp_path / "a.png"))]:
    assert decoder.probe(one) == here.probe(one)
    expected = here.scan_frames(one, 8, (24, 32))
    assert _equal(decoder.scan_frames(one, 8, (24, 32)), expected)
    if one in whole:
      parts = 4, (24, 32), ((0.2, 0.5), (0.8, 1.1))
      expected = here.scan_frames(one, *parts)
      assert _equal(decoder.scan_frames(one, *parts), expected)
    index = expected.frame_index[expected.mask][::-1]
    for resize in ("area", "bicubic"):
      how = index, (56, 28)
      frames = decoder.read_frames(one, *how, resize=resize)
      assert frames.flags.writeable
      expected = here.read_frames(one, *how, resize=resize)
      np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("hang", r"not decoded within 1\.5 s.*data\.decode\.timeout_s"),
    ("crash", "died of it twice; it was killed by SIGSEGV"),
    ("leave", "died of it twice; it ended with code 3"),
    ("corrupt", r"killed by SIGABRT: malloc\(\): corrupted top size"),
    ("big", r"more than 1024 MiB of memory.*data\.decode\.max_memory_mib"),
    ("babble", "died of it twice; it says what it never should"),
  ],
)
def test_a_hostile_file_costs_itself(clip, decoder, tmp_path, name, message):
  path = tmp_path / f"{name}.avi"
  path.write_bytes(clip.read_bytes())
  with pytest.raises(video.VideoError, match=message) as caught:
    decoder.scan_frames(Footage(str(path)), 8, (24, 32))
  assert caught.value.path == str(path)
  assert str(caught.value).startswith(f"{path}: ")
  assert decoder.scan_frames(Footage(str(clip)), 8, (24, 32)).mask.all()


@pytest.mark.parametrize(
  "text",
  [
    *(
      json.dumps({"arrays": [["|u1", shape]]})
      for shape in (
        [1.5],
        ["a"],
        [True],
        [-1, -1],
        [0] * 70,
        [2**70, 0],
        [2**39],
      )
    ),
    '{"arrays": [["O", [1]]]}',
    '{"arrays": 3}',
    "[]",
    '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}",
  ],
  ids=range(11),
)
def test_what_is_no_message_ends_the_one_who_sent_it(text):
  there, here = socket.socketpair()
  with there, here:
    raw = text.encode()
    sender = threading.Thread(
      target=lambda: there.sendall(struct.pack(">I", len(raw)) + raw)
    )
    sender.start()
    with pytest.raises(decode_worker.BrokenError):
      decode_worker.receive(here, max_bytes=2**38)
    here.close()
    there.close()
    sender.join()


@pytest.mark.parametrize(
  "value",
  [None, "abc", [1, 2.0, 3, 4], [1, 2.0, "3", 4, 5.0], [1, 2, 3, 4, True]],
)
def test_a_decoder_that_gives_no_header(monkeypatch, value):
  decoder = decoding.Decoder(processes=1)
  monkeypatch.setattr(decoder, "_ask", lambda *_: ({"value": value}, []))
  with pytest.raises(video.VideoError, match="gave no header"):
    decoder.probe(Footage("a.mp4"))


def test_nothing_is_left_of_dead_processes(clip, decoder, tmp_path):
  path = tmp_path / "leave.avi"
  path.write_bytes(clip.read_bytes())
  decoder.probe(Footage(str(clip)))
  before = _files(decoder), threading.active_count()
  for _ in range(2):
    with pytest.raises(video.VideoError, match="code 3"):
      decoder.probe(Footage(str(path)))
  decoder.probe(Footage(str(clip)))
  assert (_files(decoder), threading.active_count()) == before


def test_who_is_killed_from_outside_has_another_chance(clip, decoder, tmp_path):
  path = tmp_path / "once.avi"
  path.write_bytes(clip.read_bytes())
  assert decoder.scan_frames(Footage(str(path)), 4, (24, 32)).num_frames == 30
  assert path.with_suffix(".mark").exists()


def test_unreadable_files_and_wrong_settings_are_told_apart(clip, decoder):
  with pytest.raises(video.VideoError, match="gone.mp4: there is no such"):
    decoder.probe(Footage("gone.mp4"))
  with pytest.raises(video.VideoError, match="frame 30 cannot be decoded"):
    decoder.read_frames(Footage(str(clip)), np.array([1, 30]), (24, 32))
  with pytest.raises(
    ValueError, match=r"config\.data\.reader\.resize"
  ) as found:
    decoder.read_frames(
      Footage(str(clip)), np.array([1]), (24, 32), resize="nearest"
    )
  assert not isinstance(found.value, video.VideoError)


def test_what_the_decoder_complains_of_is_refused(decoder, tmp_path):
  if not DATA.is_dir():
    pytest.skip(f"real videos are not at {DATA}")
  data = bytearray((DATA / "bikes.mp4").read_bytes())
  path = tmp_path / "flipped.mp4"
  for place in range(150000, 350000, 20000):
    data[place] ^= 0x10
  path.write_bytes(data)
  one = Footage(str(path))
  with pytest.raises(video.VideoError, match="damaged; the decoder complains"):
    decoder.scan_frames(one, 4, (24, 32))
  # In this process nobody listens: all frames are there, some of them wrong.
  assert decoding.Decoder().scan_frames(one, 4, (24, 32)).num_frames == 250


def test_a_copy_starts_processes_of_its_own(clip, decoder):
  copy = pickle.loads(pickle.dumps(decoder))
  try:
    assert copy.processes == 1 and copy.limits == decoder.limits
    assert copy.probe(Footage(str(clip))).num_frames == 30
  finally:
    copy.close()


def test_the_process_ends_with_its_parent():
  """Even while it waits for work; and it knows nothing of jax."""
  script = """
import os, sys
from cf_jax.data import decoding, footage
decoder = decoding.Decoder(processes=1)
try:
  decoder.probe(footage.Footage("gone.mp4"))
except ValueError:
  pass
(worker,) = decoder._alive
print(worker._process.pid, flush=True)
modules = open(f"/proc/{worker._process.pid}/maps").read()
assert "cv2" in modules and "jax" not in modules
os.kill(os.getpid(), 9)
"""
  ran = subprocess.run(
    [sys.executable, "-c", script],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert ran.returncode == -9, ran.stderr
  pid = int(ran.stdout)
  for _ in range(100):
    try:
      state = pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
      return
    if state == "Z":  # ended; nobody has asked for it yet
      return
    time.sleep(0.05)
  os.kill(pid, 9)
  pytest.fail("it goes on")


@pytest.mark.parametrize(
  ("settings", "name"),
  [
    (dict(processes=-1), r"data\.decode\.processes"),
    (dict(timeout_s=0.0), r"data\.decode\.timeout_s"),
    (dict(max_memory_mib=100), r"data\.decode\.max_memory_mib"),
  ],
)
def test_settings_that_cannot_work(settings, name):
  with pytest.raises(ValueError, match=name):
    decoding.Decoder(**settings)


def test_a_process_that_cannot_start_is_no_unreadable_file(monkeypatch):
  monkeypatch.setenv("PYTHONHOME", "/nowhere")
  with pytest.raises(RuntimeError, match="cannot be started"):
    decoding.Decoder(processes=1).probe(Footage("a.mp4"))


def test_messages_are_not_believed():
  ours, theirs = decode_worker.socket.socketpair()
  with ours, theirs:
    decode_worker.send(ours, {"a": 1}, [np.arange(6).reshape(2, 3)])
    said, (array,) = decode_worker.receive(theirs)
    assert said == {"a": 1} and array.tolist() == [[0, 1, 2], [3, 4, 5]]
    for bad in (
      b"\xff\xff\xff\xff",
      b"\0\0\0\x02{}",
      b'\0\0\0\x1b{"arrays": [["|O8", [3]]]} ',
      b'\0\0\0\x20{"arrays": [["<f8", [99999999]]]}',
    ):
      ours.sendall(bad)
      with pytest.raises(decode_worker.BrokenError):
        decode_worker.receive(theirs, max_bytes=2**20)
    with pytest.raises(TimeoutError):
      decode_worker.receive(theirs, deadline_s=time.monotonic() + 0.01)
