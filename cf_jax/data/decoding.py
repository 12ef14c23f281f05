"""Decoding where a bad file cannot hurt: in processes of their own.

`Decoder(processes=0)` decodes in the process that asks, the fast path for files
that are known to be good. With processes, a file that hangs the decoder, makes
it crash or eats up memory costs one file: its process is killed and another one
started, and the file is a `video.VideoError` like any other unreadable one. The
frames are the same bits.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from cf_jax.data import decode_worker, frame_size, video
from cf_jax.data import footage as footage_lib
from cf_jax.data.footage import Footage

_START_S = 120.0  # for importing OpenCV, on a busy machine or a slow disk
_ROOT = pathlib.Path(__file__).parents[2]


# What Python, OpenCV and FFmpeg read of their surroundings. The rest stays
# here: who takes over a decoder by a file finds no key of anything in it.
_PASSED = re.compile(
  r"PATH|HOME|TMPDIR|TZ|LANG|LANGUAGE|VIRTUAL_ENV|SYSTEMROOT"
  r"|PYTHON\w+|(?:LC|LD|OPENCV|OMP|OPENBLAS|MKL|MALLOC|COVERAGE)_\w+"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL")


def _environment() -> dict[str, str]:
  """The variables that a process for files of strangers gets."""
  return {
    name: value
    for name, value in os.environ.items()
    if _PASSED.fullmatch(name) and not _SECRET.search(name)
  }


class DecoderDied(Exception):
  """A process that decodes has ended; the message says how."""


class _Worker:
  """One process, and the connection to it."""

  def __init__(self, settings: dict[str, Any]):
    self._settings = settings
    self._log = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, closed in kill
    log = self._log.fileno()  # the process empties it after every file
    flags = fcntl.fcntl(log, fcntl.F_GETFL)
    fcntl.fcntl(log, fcntl.F_SETFL, flags | os.O_APPEND)
    self._connection, theirs = socket.socketpair()
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    with theirs:
      self._process = subprocess.Popen(
        [
          sys.executable,
          "-m",
          "cf_jax.data.decode_worker",
          str(theirs.fileno()),
          json.dumps(settings),
        ],
        stdin=subprocess.DEVNULL,
        stdout=self._log,  # where FFmpeg's complaints go
        stderr=self._log,
        pass_fds=[theirs.fileno()],
        env=_environment()
        | {
          "PYTHONPATH": os.pathsep.join(filter(None, paths)),
          "OPENCV_FFMPEG_LOGLEVEL": "16",  # errors; it listens for them
          "OPENBLAS_NUM_THREADS": "1",
          "OMP_NUM_THREADS": "1",
        },
      )
    try:
      self._receive(_START_S)
    except (DecoderDied, TimeoutError) as error:
      log = self._last_words(2000)
      self.kill()
      raise RuntimeError(
        f"a process that decodes videos cannot be started ({error}): {log}"
      ) from error

  def ask(self, request: dict[str, Any]) -> tuple[dict, list[np.ndarray]]:
    """The answer to a request.

    Raises:
      DecoderDied: the process has ended.
      TimeoutError: it took too long; the process has to be killed.
    """
    try:
      self._connection.settimeout(self._settings["timeout_s"])
      decode_worker.send(self._connection, request)
    except OSError as error:
      raise DecoderDied(self._how_it_ended()) from error
    return self._receive(self._settings["timeout_s"])

  def _receive(self, timeout_s: float):
    try:
      return decode_worker.receive(
        self._connection,
        deadline_s=time.monotonic() + timeout_s,
        max_bytes=8 * self._settings["max_memory_mib"] * 2**20,
      )
    except decode_worker.BrokenError as error:
      raise DecoderDied(str(error)) from error
    except decode_worker.GoneError as error:
      raise DecoderDied(self._how_it_ended()) from error

  def _how_it_ended(self) -> str:
    try:
      code = self._process.wait(timeout=2.0)
    except subprocess.TimeoutExpired:
      return "it has closed the connection"
    if code < 0:
      with contextlib.suppress(ValueError):  # a real-time signal has no name
        code = signal.Signals(-code).name
      how = f"it was killed by {code}"
    else:
      how = f"it ended with code {code}"
    said = self._last_words(200)
    return f"{how}: {said}" if said else how

  def _last_words(self, size: int) -> str:
    end = os.fstat(self._log.fileno()).st_size
    told = os.pread(self._log.fileno(), size, max(0, end - size))
    return " ".join(told.decode("utf-8", "replace").split())

  def kill(self) -> None:
    """Ends the process, whatever it does."""
    self._connection.close()
    self._process.kill()
    self._process.wait()
    self._log.close()


class Decoder:
  """Reads footage, in this process or in others; any thread may ask.

  Processes start when they are first needed and end with this object. With
  none, only `limits` hold: there is no clock, no memory of its own, and nobody
  listens to what the decoder complains of.

  Args:
    processes: that decode, at most, however many threads ask; 0 decodes in this
      one.
    timeout_s: seconds that one request about one file may take.
    max_memory_mib: of each process.
    accept_damaged: True takes what the decoder makes of files it complains of.
    limits: keyword arguments of `video.Limits`.
  """

  def __init__(
    self,
    *,
    processes: int = 0,
    timeout_s: float = 300.0,
    max_memory_mib: int = 4096,
    accept_damaged: bool = False,
    limits: Mapping[str, float] | None = None,
  ):
    if processes < 0:
      raise ValueError(
        f"processes must be at least 0, got {processes}; change"
        " data.decode.processes"
      )
    if not timeout_s > 0:
      raise ValueError(
        f"timeout_s must be positive, got {timeout_s}; change"
        " data.decode.timeout_s"
      )
    if max_memory_mib < 256:
      raise ValueError(
        f"max_memory_mib is {max_memory_mib}, and a process that decodes needs"
        " 256; change data.decode.max_memory_mib"
      )
    self.processes = processes
    self.limits = video.Limits(**(limits or {}))
    self._settings = dict(
      timeout_s=timeout_s,
      max_memory_mib=max_memory_mib,
      accept_damaged=accept_damaged,
      limits=self.limits._asdict(),
    )
    self._start()

  def _start(self) -> None:
    self._idle = queue.LifoQueue()  # the warmest first
    for _ in range(self.processes):
      self._idle.put(None)  # one that is not started
    self._lock, self._alive = threading.Lock(), set()
    self._end = weakref.finalize(self, _kill_all, self._alive)

  def __getstate__(self):  # other processes start workers of their own
    return {
      name: getattr(self, name) for name in ("processes", "limits", "_settings")
    }

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._start()

  @property
  def listens(self) -> bool:
    """Are files refused of which the decoder complains?"""
    return bool(self.processes) and not self._settings["accept_damaged"]

  def probe(self, footage: Footage) -> video.VideoInfo:
    """See `footage.probe`.

    Raises:
      video.VideoError: it cannot be read.
    """
    if not self.processes:
      return footage_lib.probe(footage, limits=self.limits)
    said, _ = self._ask(footage, "probe")
    value = said.get("value")
    if (
      not isinstance(value, list)
      or len(value) != len(video.VideoInfo._fields)
      or any(type(number) not in (int, float) for number in value)
    ):
      raise video.VideoError(footage.path, "the decoder gave no header")
    return video.VideoInfo(*value)

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
    """
    if not self.processes:
      return footage_lib.scan_frames(
        footage, num_frames, size_px, within, limits=self.limits
      )
    said, arrays = self._ask(
      footage,
      "scan_frames",
      num_frames=num_frames,
      size_px=list(size_px),
      within=[list(interval) for interval in within],
    )
    slots = (num_frames,)
    self._expect(footage, arrays, (*slots, *size_px, 3), slots, slots, slots)
    if type(said.get("num_frames")) is not int:
      raise video.VideoError(footage.path, "the decoder counts no frames")
    return video.Scan(*arrays, said["num_frames"])

  def read_frames(
    self,
    footage: Footage,
    index: np.ndarray,
    size_px: tuple[int, int],
    *,
    resize: frame_size.Resize = "area",
  ) -> np.ndarray:
    """See `footage.read_frames`: uint8[n, h, w, 3].

    Raises:
      video.VideoError: it cannot be read.
    """
    if not self.processes:
      return footage_lib.read_frames(
        footage, index, size_px, resize=resize, limits=self.limits
      )
    index = np.asarray(index)
    _, arrays = self._ask(
      footage,
      "read_frames",
      index=index.tolist(),
      size_px=list(size_px),
      resize=resize,
    )
    self._expect(footage, arrays, (*index.shape, *size_px, 3))
    return arrays[0]

  def _expect(self, footage, arrays, *shapes) -> None:
    if tuple(array.shape for array in arrays) != shapes:
      raise video.VideoError(footage.path, "the decoder gave other frames")

  def _ask(self, footage: Footage, operation: str, **how):
    """One request; a process that dies has another chance with a new one.

    It may have been killed by somebody who meant the whole group.
    """
    request = dict(footage=list(footage), operation=operation, how=how)
    for last in (False, True):
      worker = self._idle.get()
      try:
        if worker is None:
          worker = _Worker(self._settings)
          with self._lock:
            self._alive.add(worker)
        said, arrays = worker.ask(request)
      except DecoderDied as error:
        self._bury(worker)
        worker = None
        logging.warning("%s: the decoder has died; %s", footage.path, error)
        if last:
          raise video.VideoError(
            footage.path, f"the decoder died of it twice; {error}"
          ) from error
      except TimeoutError as error:
        self._bury(worker)
        worker = None
        raise video.VideoError(
          footage.path,
          f"not decoded within {self._settings['timeout_s']:g} s; if that is"
          " too short for it, raise data.decode.timeout_s",
        ) from error
      except BaseException:  # interrupted: what it says next is no answer
        self._bury(worker)
        worker = None
        raise
      else:
        return self._understood(footage, said), arrays
      finally:
        self._idle.put(worker)
    raise AssertionError

  def _understood(self, footage: Footage, said: dict) -> dict:
    if "unreadable" in said:
      raise video.VideoError(footage.path, said["unreadable"])
    if "no_memory" in said:
      raise video.VideoError(
        footage.path,
        "decoding it takes more than"
        f" {self._settings['max_memory_mib']} MiB of memory; if that is right,"
        " raise data.decode.max_memory_mib",
      )
    if "refused" in said:
      raise ValueError(said["refused"])
    if "bug" in said:
      raise RuntimeError(f"{footage.path}: {said['bug']}")
    return said

  def _bury(self, worker: _Worker | None) -> None:
    if worker is not None:
      with self._lock:
        self._alive.discard(worker)
      worker.kill()

  def close(self) -> None:
    """Ends the processes; the next request starts new ones."""
    self._end()
    self._start()


def _kill_all(workers: set[_Worker]) -> None:
  for worker in list(workers):
    worker.kill()
  workers.clear()
