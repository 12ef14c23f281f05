"""A run's life: one at a time in a workdir, stopped without loss, followed.

Files of a workdir written here:
  run.lock        who runs here: host, process, start; there while one does
  heartbeat.json  what the run is at, when it last got on, what it expects

How to read a heartbeat: `written` is older than a few `every_s`: the process is
gone or frozen. It is fresh and `late` is true: hung; false: slow at most.

Two kinds of time are told apart. In a training loop (`Guard.loop`) a signal
waits for the end of the update, which is then saved. Everywhere else there is
nothing to save that is not on disk already, and it ends the run at once.
"""

import collections
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from cf_jax import disk, report

LOCK_FILE = "run.lock"
HEARTBEAT_FILE = "heartbeat.json"
# EX_TEMPFAIL: everything is saved; the same command goes on from there.
EXIT_STOPPED = 75

# Late is what takes so many times as long as the longest of the last steps, and
# this longer: a step that compiles or evaluates is not hung.
_LATE_TIMES, _LATE_S = 10.0, 120.0
_NUM_PACES = 20
_REPORT_TIMES = 19.0  # a report's time to that until the next
_MOST_S = 1e9  # 31 years; the system's timers end at some point


class Stopped(BaseException):
  """The run was asked to stop, and everything that it did is saved.

  No error, so that `except Exception` does not take it for one.
  """


class Guard:
  """Stands around a run. Used as a context, in the main thread.

  Without a workdir it only keeps count: for stages that are run by themselves.

  Args:
    workdir: of the run; it is locked.
    time_limit_s: seconds after which the run stops as if by SIGTERM; 0: none.
      An update and a checkpoint are still to be finished then.
    heartbeat_s: seconds between two writings of heartbeat.json.
    report_every_s: seconds between two rebuildings of report.html in training
      loops, at least; 0: at the end alone. A long run's takes longer, and all
      of them together a twentieth of the time at most.
  """

  def __init__(
    self,
    workdir: str | os.PathLike | None = None,
    *,
    time_limit_s: float = 0.0,
    heartbeat_s: float = 10.0,
    report_every_s: float = 0.0,
  ):
    for name, value, least in (
      ("time_limit_s", time_limit_s, 0.0),
      ("heartbeat_s", heartbeat_s, 0.1),
      ("report_every_s", report_every_s, 0.0),
    ):
      if not least <= value <= _MOST_S:
        raise ValueError(
          f"{name} must be {least} to {_MOST_S:g} seconds, got {value}; change"
          f" config.runtime.{name}"
        )
    self._workdir = workdir and pathlib.Path(workdir)
    self._time_limit_s = time_limit_s
    self._heartbeat_s = heartbeat_s
    self._report_every_s = report_every_s
    self._report_at: float | None = None
    self._reason = ""  # to stop
    self._in_loop = False
    self._asked = 0  # times that all processes were asked, the same on each
    self._paces = collections.deque(maxlen=_NUM_PACES)
    self._progress = self._stepped = time.time()
    self._about = {"state": "running", "stage": "start", "step": 0, "of": None}

  # -- what the run says

  def enter(self, stage: str) -> None:
    """The run is at something else now, outside of loops.

    Raises:
      Stopped: a signal came that nothing has heeded.
    """
    self._at(stage, 0, None)
    self._heed()

  @contextlib.contextmanager
  def loop(self, stage: str, total: int, *, start: int = 0) -> Iterator[None]:
    """Around a training loop: signals wait for `advance`.

    Args:
      stage: what the heartbeat calls it.
      total: updates when it is done.
      start: updates already done.
    """
    self._at(stage, start, total)
    self._in_loop = True
    try:
      yield
    finally:
      self._in_loop = False

  def advance(self, step: int, folder: pathlib.Path) -> str:
    """An update is done. Every process of a run calls it after each one.

    Args:
      step: updates done.
      folder: of the stage, whose report.html is rebuilt at intervals.

    Returns:
      Why the run has to stop: save, then raise `Stopped`. "": it goes on.
    """
    self._progress = time.time()
    self._paces.append(self._progress - self._stepped)
    self._stepped = self._progress
    self._about["step"] = step
    begin = time.monotonic()
    if self._report_at is None:  # nothing is written of the first update yet
      self._report_at = begin + self._report_every_s
    if _is_first() and begin > self._report_at and self._report_every_s:
      try:
        report.write_report(folder)
      except Exception:  # no picture is worth an update
        logging.exception("report.html of %s could not be rebuilt", folder)
      end = time.monotonic()
      wait_s = max(self._report_every_s, _REPORT_TIMES * (end - begin))
      self._report_at = end + wait_s
    return self._agree()

  def progress(self) -> None:
    """Something is done that is no update: a batch of an evaluation.

    Raises:
      Stopped: outside of a loop, if a signal came that nothing has heeded.
    """
    self._progress = time.time()
    self._heed()

  # -- stopping

  def _agree(self) -> str:
    """Every process's answer is the same, or one would wait for another."""
    self._asked += 1
    if not jax.distributed.is_initialized():
      return self._reason
    reason = self._reason
    if _serves_preemption() and multihost_utils.reached_preemption_sync_point(
      self._asked
    ):
      reason = "a preemption notice"
    if jax.process_count() > 1:
      asked = multihost_utils.process_allgather(np.bool_(reason))
      if np.any(asked) and not reason:
        reason = "another process's signal"
    return reason

  def _heed(self) -> None:
    if self._reason and not self._in_loop:
      raise Stopped(self._message())

  def _message(self) -> str:
    return f"{self._reason} while at: {self._about['stage']}"

  def _signal(self, number: int, _) -> None:
    if number == signal.SIGALRM:
      name = f"the time limit of {self._time_limit_s:g} s"
    else:
      name = signal.Signals(number).name
    if number == signal.SIGINT:
      # The next one is not for Python to handle: it may be inside XLA.
      signal.signal(signal.SIGINT, signal.SIG_DFL)
    if self._reason:
      return
    self._reason = name
    again = "; again: at once" if number == signal.SIGINT else ""
    when = "after this update, which is saved" if self._in_loop else "now"
    # Logging could wait for a lock that the interrupted code holds.
    os.write(2, f"{name}: the run stops {when}{again}\n".encode())
    self._heed()

  # -- following

  def _at(self, stage: str, step: int, total: int | None) -> None:
    self._paces.clear()
    self._progress = self._stepped = time.time()
    self._about |= {"stage": stage, "step": step, "of": total}
    self._write_heartbeat()

  def heartbeat(self) -> dict[str, Any]:
    """What heartbeat.json holds.

    Returns:
      `state` ("running", "stopped", "failed" or "complete"), `stage`, `step`,
      `of` how many or None; `progress` the time of the last step, `age_s` the
      seconds since, `expected_s` the longest of the last steps or None, `late`;
      `written` the time of this, `every_s`; `host`, `process`, `why` it ended.
    """
    age_s = time.time() - self._progress
    paces = list(self._paces)  # the run's thread may add one
    expected_s = max(paces) if paces else None
    limit_s = _LATE_TIMES * (expected_s or _LATE_S) + _LATE_S
    return self._about | {
      "progress": _clock(self._progress),
      "age_s": round(age_s, 3),
      "expected_s": expected_s and round(expected_s, 3),
      "late": self._about["state"] == "running" and age_s > limit_s,
      "written": _clock(time.time()),
      "every_s": self._heartbeat_s,
      "host": socket.gethostname(),
      "process": os.getpid(),
    }

  def _write_heartbeat(self) -> None:
    if self._workdir is None or not self._workdir.is_dir():
      return
    number = 0 if _is_first() else jax.process_index()
    name = f"heartbeat_{number}.json" if number else HEARTBEAT_FILE
    text = json.dumps(self.heartbeat(), indent=2) + "\n"
    disk.write_text(self._workdir / name, text)

  def _beat(self) -> None:
    while not self._ended.wait(self._heartbeat_s):
      # What the run itself cannot write, it says itself.
      with contextlib.suppress(OSError):
        self._write_heartbeat()

  # -- the context

  def __enter__(self) -> "Guard":
    with contextlib.ExitStack() as stack:
      if self._workdir is not None and _is_first():
        stack.enter_context(locked(self._workdir))
      if threading.current_thread() is threading.main_thread():
        stack.enter_context(self._signals())
      if self._workdir is not None and not jax.distributed.is_initialized():
        for folder in (self._workdir, self._workdir / report.STRIPS_FOLDER):
          disk.sweep(folder)  # else other processes may be writing
      self._ended = threading.Event()
      self._thread = threading.Thread(target=self._beat, daemon=True)
      self._thread.start()
      stack.callback(self._thread.join)
      stack.callback(self._ended.set)
      self._write_heartbeat()
      self._stack = stack.pop_all()
    return self

  def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
    with self._stack:
      if error is None:
        self._about |= {"state": "complete"}
      else:
        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        said = str(error) or kind.__name__
        self._about |= {
          "state": "stopped" if stopped else "failed",
          "why": said[:2000],
        }
      self._ended.set()
      self._thread.join()  # or its "running" could be the last that is written
      # A full disk is an error already, and this must not take its place.
      with contextlib.suppress(OSError):
        self._write_heartbeat()

  @contextlib.contextmanager
  def _signals(self) -> Iterator[None]:
    numbers = [signal.SIGINT, signal.SIGALRM]
    if not _serves_preemption():  # else the service has SIGTERM
      numbers.append(signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
      for number in numbers:
        signal.signal(number, self._signal)
      if self._time_limit_s:
        signal.setitimer(signal.ITIMER_REAL, self._time_limit_s)
      yield
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)
      for number, handler in before.items():
        signal.signal(number, handler)


def _is_first() -> bool:
  """Asks for no device where there is one process."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def _serves_preemption() -> bool:
  return (
    jax.distributed.is_initialized()
    and jax.config.jax_enable_preemption_service
  )


def _clock(seconds: float) -> str:
  moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
  return moment.isoformat("T", "milliseconds")


# ------------------------------------------------------------------------ lock


@contextlib.contextmanager
def locked(workdir: pathlib.Path, name: str = LOCK_FILE) -> Iterator[None]:
  """Holds the workdir's lock, which the system lets go with the process.

  The file's text only names the holder: what a killed run left there keeps
  nobody out. At the end the file is taken away, and so are folders that were
  made for it and hold nothing else.

  Args:
    workdir: made if missing.
    name: of the file, where several processes share a folder by design.

  Raises:
    ValueError: another run has it.
  """
  made = [path for path in (workdir, *workdir.parents) if not path.exists()]
  path = workdir / name
  with contextlib.ExitStack() as stack:
    while True:
      workdir.mkdir(parents=True, exist_ok=True)
      file = stack.enter_context(open(path, "a+", encoding="utf-8"))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise ValueError(
          f"{workdir} is in use by {_holder(file) or 'another process'}; wait"
          " for that run or stop it, or give another --workdir"
        ) from None
      except OSError as error:
        logging.warning(
          "%s cannot be locked (%s); see to it that nothing else runs there",
          path,
          error.strerror,
        )
        break
      if _is_at(file, path):  # else its holder took it away meanwhile
        break
    if before := _holder(file):
      logging.info("the last run in %s, by %s, was cut off", workdir, before)
    file.truncate(0)
    json.dump(
      {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": _clock(time.time()),
      },
      file,
    )
    file.flush()
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        if _is_at(file, path):
          path.unlink()
        for folder in made:
          folder.rmdir()  # not where something lies in it


def _is_at(file: TextIO, path: pathlib.Path) -> bool:
  """Is it this file that lies there?"""
  try:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())
  except FileNotFoundError:
    return False


def _holder(file: TextIO) -> str:
  """Who the lock's text says has it; "" for nobody."""
  file.seek(0)
  try:
    said = json.loads(file.read())
    return f"process {said['process']} on {said['host']} since {said['since']}"
  except (ValueError, LookupError, TypeError):
    return ""
