"""The process that decodes files from strangers, and the words spoken with it.

  python -m cf_jax.data.decode_worker FD SETTINGS

Started by `decoding.Decoder`. It answers one request at a time over a socket
until that is closed: whatever a file does to the decoder, it does it here. It
imports numpy, OpenCV and Pillow, nothing of jax.

A message is a length (4 bytes), that many bytes of JSON, and the bytes of the
arrays that the JSON describes. Frames go through the socket rather than through
shared memory: copying them takes a few milliseconds a video, where decoding
takes from tens of them to minutes, and a process that is killed leaves nothing
behind in /dev/shm, which containers keep small.
"""

import ctypes
import json
import math
import os
import re
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from cf_jax.data import footage as footage_lib
from cf_jax.data import video

# What FFmpeg says of a stream that it cannot follow, as OpenCV passes it on.
_COMPLAINT = re.compile(
  rb"^\[OPENCV:FFMPEG:(?:0|8|16)\] ([^\n]*)", re.MULTILINE
)
# It says so of healthy files too: about chapters, tracks that are not decoded,
# and reference pictures that are let go of twice.
_HARMLESS = (b"chapter track not found", b"timescale not set", b"mmco:")
# Longer than the parent waits: should that be gone, the process ends all the
# same.
_GRACE_S = 10.0
# Of what FFmpeg writes about a file.
_MAX_LOG_BYTES = 2**26
_MAX_JSON_BYTES = 2**24
_MAX_AXES = 4
_DTYPES = ("|u1", "|b1", "<i4", "<i8", "<f8")


class GoneError(Exception):
  """The other side has closed the connection."""


class BrokenError(Exception):
  """The other side says what it never should."""


def send(
  connection: socket.socket, said: dict[str, Any], arrays: Sequence = ()
) -> None:
  """Sends a message; `said` is JSON."""
  arrays = [np.ascontiguousarray(array) for array in arrays]
  about = [[array.dtype.str, array.shape] for array in arrays]
  text = json.dumps(said | {"arrays": about}).encode()
  connection.sendall(struct.pack(">I", len(text)) + text)
  for array in arrays:
    if array.nbytes:
      connection.sendall(memoryview(array).cast("B"))


def receive(
  connection: socket.socket,
  *,
  deadline_s: float = math.inf,
  max_bytes: int = 2**40,
) -> tuple[dict[str, Any], list[np.ndarray]]:
  """Waits for a message.

  Args:
    connection: to the other side.
    deadline_s: until when, of `time.monotonic`.
    max_bytes: that its arrays may have.

  Raises:
    TimeoutError: nothing came, or not all of it.
    GoneError: the other side has closed the connection.
    BrokenError: it is no message.
  """
  (length,) = struct.unpack(">I", _exactly(connection, 4, deadline_s))
  if length > _MAX_JSON_BYTES:
    raise BrokenError("it says what it never should")
  try:
    said = json.loads(bytes(_exactly(connection, length, deadline_s)))
    about = [(dtype, tuple(shape)) for dtype, shape in said.pop("arrays")]
  except (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
  ) as error:
    raise BrokenError("it says what it never should") from error
  arrays = []
  for dtype, shape in about:
    sizes = dtype in _DTYPES and len(shape) <= _MAX_AXES
    sizes = sizes and all(type(n) is int and 0 <= n < 2**40 for n in shape)
    size = math.prod(shape) if sizes else 0
    max_bytes -= size * 8
    if not sizes or max_bytes < 0:
      raise BrokenError("it says what it never should")
    array = np.empty(shape, dtype)
    if size:
      _fill(connection, memoryview(array).cast("B"), deadline_s)
    arrays.append(array)
  return said, arrays


def _exactly(connection, size: int, deadline_s: float) -> bytearray:
  data = bytearray(size)
  _fill(connection, memoryview(data), deadline_s)
  return data


def _fill(connection, view: memoryview, deadline_s: float) -> None:
  while view:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
      raise TimeoutError
    connection.settimeout(None if math.isinf(left_s) else left_s)
    try:
      count = connection.recv_into(view)
    except ConnectionError:
      count = 0
    if not count:
      raise GoneError
    view = view[count:]


def _complaints() -> list[str]:
  """What FFmpeg has said of the file since the last call."""
  ctypes.CDLL(None).fflush(None)  # OpenCV prints it, to standard output
  size = os.fstat(1).st_size
  told = os.pread(1, min(size, 2**20), 0)
  os.ftruncate(1, 0)
  return [
    line.decode("utf-8", "replace")
    for line in _COMPLAINT.findall(told)
    if not any(words in line for words in _HARMLESS)
  ]


def _answer(
  asked: dict[str, Any], limits: video.Limits, accept_damaged: bool
) -> tuple[dict[str, Any], list[np.ndarray]]:
  """What is asked for.

  Raises:
    video.VideoError: the file cannot be read, or the decoder complains of it.
  """
  path, clip, fps = asked["footage"]
  footage = footage_lib.Footage(path, clip and tuple(clip), fps)
  operation, how = asked["operation"], asked["how"]
  _complaints()
  if operation == "probe":
    return {"value": footage_lib.probe(footage, limits=limits)}, []

  def run(**more) -> list[np.ndarray]:
    if operation == "scan_frames":
      return footage_lib.scan_frames(footage, **how, limits=limits, **more)
    return [footage_lib.read_frames(footage, **how, limits=limits, **more)]

  found = run()
  told = [] if accept_damaged else _complaints()
  if told:
    # A seek may end where pictures refer to some that come before it.
    found = run(may_seek=False)
    told = _complaints()
  if told:
    raise video.VideoError(
      path,
      f"damaged; the decoder complains {len(told)} times, first of {told[0]!r};"
      " data.decode.accept_damaged=True takes what it makes of such files",
    )
  if operation == "scan_frames":
    return {"num_frames": found.num_frames}, list(found[:4])
  return {}, found


def serve(
  connection: socket.socket,
  *,
  timeout_s: float,
  limits: dict[str, float],
  accept_damaged: bool,
) -> None:
  """Answers requests until the connection is closed."""
  limits = video.Limits(**limits)
  send(connection, {"ready": True})
  while True:
    try:
      asked, _ = receive(connection)
    except GoneError:
      return
    # Ends the process even where it hangs in the decoder.
    signal.setitimer(signal.ITIMER_REAL, timeout_s + _GRACE_S)
    try:
      said, arrays = _answer(asked, limits, accept_damaged)
    except video.VideoError as error:
      said, arrays = {"unreadable": error.args[1]}, []
    except MemoryError:
      said, arrays = {"no_memory": True}, []
    except ValueError as error:
      said, arrays = {"refused": str(error)}, []
    except Exception:  # shown where the frames are wanted
      said, arrays = {"bug": traceback.format_exc()}, []
    send(connection, said, arrays)
    signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
  """Limits what the process may take, and serves."""
  settings = json.loads(sys.argv[2])
  # The parent decides when to end; it is told the signals itself.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  memory = settings.pop("max_memory_mib") * 2**20
  resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_LOG_BYTES,) * 2)
  cv2.setNumThreads(0)  # it is one of several
  serve(socket.socket(fileno=int(sys.argv[1])), **settings)


if __name__ == "__main__":
  main()
