"""Runs are stopped without loss, followed while they go, and never doubled."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from benchmarks import soak
from cf_jax.runtime import lifecycle
from tests.conftest import ROOT


def _beat(workdir):
  return json.loads((workdir / lifecycle.HEARTBEAT_FILE).read_text())


def _guard(workdir, **settings):
  return lifecycle.Guard(workdir, **{"heartbeat_s": 60.0} | settings)


# --------------------------------------------------------------------- signals


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_an_update(sent, tmp_path):
  before = signal.getsignal(sent)
  with (
    pytest.raises(lifecycle.Stopped, match="at the end"),
    _guard(tmp_path) as guard,
    guard.loop("cold start", 4),
  ):
    assert guard.advance(1, tmp_path) == ""
    os.kill(os.getpid(), sent)
    guard.progress()  # in an update: still nothing
    assert guard.advance(2, tmp_path) == sent.name
    raise lifecycle.Stopped("at the end")
  assert signal.getsignal(sent) == before
  beat = _beat(tmp_path)
  assert (beat["state"], beat["why"]) == ("stopped", "at the end")
  assert (beat["stage"], beat["step"], beat["of"]) == ("cold start", 2, 4)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_has_nothing_to_save_at_once(sent, tmp_path):
  match = f"{sent.name}.*evaluation"
  with pytest.raises(lifecycle.Stopped, match=match), _guard(tmp_path) as guard:
    guard.enter("evaluation")
    os.kill(os.getpid(), sent)
    time.sleep(10)
    pytest.fail("not reached")


def test_a_signal_that_someone_swallowed_is_heeded_later(tmp_path):
  with pytest.raises(lifecycle.Stopped), _guard(tmp_path) as guard:
    with pytest.raises(lifecycle.Stopped):
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(10)
    guard.progress()


def test_the_second_interrupt_ends_the_process(tmp_path):
  """Of a process that is stuck where Python hears nothing."""
  script = """
import os, signal, sys
from cf_jax.runtime import lifecycle
with lifecycle.Guard(sys.argv[1]) as guard, guard.loop("stuck", 1):
  os.kill(os.getpid(), signal.SIGINT)
  guard.progress()
  print("goes on", flush=True)
  os.kill(os.getpid(), signal.SIGINT)
  while True: pass
"""
  ran = subprocess.run(
    [sys.executable, "-c", script, str(tmp_path)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert ran.returncode == -signal.SIGINT and ran.stdout == "goes on\n"
  assert "SIGINT: the run stops after this update" in ran.stderr


def test_the_time_limit_is_a_signal(tmp_path):
  guard = _guard(tmp_path, time_limit_s=0.05)
  with pytest.raises(lifecycle.Stopped, match="time limit of 0.05 s"), guard:
    time.sleep(10)
  assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_thread_that_is_not_the_main_one_has_no_signals(tmp_path):
  done = []

  def run():
    with _guard(tmp_path) as guard:
      done.append(guard.advance(1, tmp_path))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert done == [""]


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("time_limit_s", -1.0),
    ("heartbeat_s", 0.0),
    ("report_every_s", float("inf")),
    ("time_limit_s", float("nan")),
    ("time_limit_s", 1e300),  # more than the system's timer takes
  ],
)
def test_settings_that_mean_nothing(name, value):
  with pytest.raises(ValueError, match=f"config.runtime.{name}"):
    lifecycle.Guard(**{name: value})


_SERVICE = """
import os, pathlib, signal, sys, time
import jax
port, number = map(int, sys.argv[2:])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
from cf_jax.runtime import lifecycle
folder = pathlib.Path(sys.argv[1])
for sent in (signal.SIGINT, signal.SIGTERM):
  with lifecycle.Guard(folder) as guard, guard.loop("rl", 10**6):
    for step in range(1, 10**6):
      if step == 3 and number == 1:
        os.kill(os.getpid(), sent)
      reason = guard.advance(step, folder)
      if reason:
        print(step, reason, flush=True)
        break
      time.sleep(0.02)
"""


def test_two_processes_stop_at_the_same_update(tmp_path):
  """SIGTERM belongs to JAX's preemption service; the rest they agree upon."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  started = [
    subprocess.Popen(
      [sys.executable, "-c", _SERVICE, tmp_path, str(port), str(number)],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  said = [process.communicate(timeout=100) for process in started]
  first, second = (
    [x.split(" ", 1) for x in out.splitlines() if x[:1].isdigit()]
    for out, _ in said  # Gloo talks there too
  )
  notice = "a preemption notice"
  assert [why for _, why in first] == ["another process's signal", notice], said
  assert [why for _, why in second] == ["SIGINT", notice]
  assert [step for step, _ in first] == [step for step, _ in second]
  assert (tmp_path / "heartbeat_1.json").exists()


# ------------------------------------------------------------------------ lock


def test_two_runs_in_one_workdir(tmp_path):
  with _guard(tmp_path):
    with pytest.raises(ValueError, match="is in use by") as caught:
      _guard(tmp_path).__enter__()
    said = str(caught.value)
    assert f"process {os.getpid()} on {socket.gethostname()}" in said
    assert str(tmp_path) in said and "--workdir" in said
    with _guard(tmp_path / ".."):  # another one is free
      pass
  with _guard(tmp_path):  # and this one, now
    pass


_HOLDER = """
import sys, time
from cf_jax.runtime import lifecycle
with lifecycle.Guard(sys.argv[1]):
  print("holds", flush=True)
  time.sleep(100)
"""


def test_a_dead_run_keeps_nobody_out(tmp_path, caplog):
  with subprocess.Popen(
    [sys.executable, "-c", _HOLDER, str(tmp_path)],
    stdout=subprocess.PIPE,
    cwd=ROOT,
  ) as process:
    assert process.stdout.readline() == b"holds\n"
    with pytest.raises(ValueError, match=f"in use by process {process.pid} on"):
      _guard(tmp_path).__enter__()
    process.kill()
  with caplog.at_level("INFO", logger="absl"), _guard(tmp_path):
    pass
  assert f"process {process.pid} on" in caplog.text
  assert "was cut off" in caplog.text


def test_what_a_killed_writer_left_is_taken_away(tmp_path):
  left = tmp_path / ".heartbeat.json.12.13.tmp"
  (tmp_path / "another_run").mkdir()
  folder = tmp_path / ".folder.1.2.tmp"
  folder.mkdir()
  others = (
    tmp_path / "another_run" / ".results.json.1.2.tmp",
    tmp_path / "notes.tmp",
    tmp_path / ".notes.tmp",
  )
  for path in (left, *others):
    path.touch()
  with lifecycle.Guard(tmp_path):
    assert not left.exists()
  assert folder.is_dir() and all(path.exists() for path in others)


def test_a_lock_with_any_text_is_a_lock(tmp_path):
  (tmp_path / lifecycle.LOCK_FILE).write_bytes(b'{"process": []')
  with _guard(tmp_path):
    pass


# ------------------------------------------------------------------- heartbeat


def test_a_heartbeat_tells_hung_from_slow(tmp_path, monkeypatch):
  now = 1e9
  monkeypatch.setattr(lifecycle.time, "time", lambda: now)
  guard = lifecycle.Guard(heartbeat_s=60.0)
  with guard.loop("reinforcement", 100, start=10):
    assert guard.heartbeat()["expected_s"] is None  # it compiles
    for step in range(11, 14):
      now += 30.0
      guard.advance(step, tmp_path)
    now += 40.0
    slow = guard.heartbeat()
    assert (slow["step"], slow["of"], slow["age_s"]) == (13, 100, 40.0)
    assert slow["expected_s"] == 30.0 and not slow["late"]
    now += 1000.0
    assert guard.heartbeat()["late"]
  assert slow["process"] == os.getpid() and slow["state"] == "running"
  assert slow["written"].startswith("2001-09-09T01:48:50")


def test_a_hung_run_still_writes(tmp_path):
  with _guard(tmp_path, heartbeat_s=0.1) as guard, guard.loop("rl", 5):
    first = _beat(tmp_path)
    time.sleep(0.5)  # hangs
    later = _beat(tmp_path)
  assert later["progress"] == first["progress"]
  assert later["written"] > first["written"]
  assert _beat(tmp_path)["state"] == "complete"


def test_the_last_heartbeat_is_that_of_the_end(tmp_path, monkeypatch):
  """Also where the thread is just writing that the run goes on."""
  write, writing = lifecycle.disk.write_text, threading.Event()

  def slow(path, text):
    if threading.current_thread() is not threading.main_thread():
      writing.set()
      time.sleep(0.3)
    write(path, text)

  monkeypatch.setattr(lifecycle.disk, "write_text", slow)
  with _guard(tmp_path, heartbeat_s=0.1):
    assert writing.wait(30)
  assert _beat(tmp_path)["state"] == "complete"


def test_a_failure_is_in_the_heartbeat(tmp_path):
  with pytest.raises(FloatingPointError), _guard(tmp_path):
    raise FloatingPointError("non-finite gradient")
  beat = _beat(tmp_path)
  assert (beat["state"], beat["why"]) == ("failed", "non-finite gradient")


def test_the_report_is_rebuilt_while_the_run_goes(tmp_path, monkeypatch):
  built, now = [], [0.0]
  monkeypatch.setattr(lifecycle.report, "write_report", built.append)
  monkeypatch.setattr(lifecycle.time, "monotonic", lambda: now[0])
  guard = lifecycle.Guard(report_every_s=60.0)
  for step, now[0] in enumerate((500.0, 561.0, 562.0, 620.0, 622.0)):
    guard.advance(step, tmp_path / f"{step}")
  assert built == [tmp_path / "1", tmp_path / "4"]


def test_reports_take_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
  built, now = [], [0.0]

  def slow(folder):
    built.append(now[0])
    now[0] += 10.0

  monkeypatch.setattr(lifecycle.report, "write_report", slow)
  monkeypatch.setattr(lifecycle.time, "monotonic", lambda: now[0])
  guard = lifecycle.Guard(report_every_s=60.0)
  while now[0] < 1000.0:
    guard.advance(1, tmp_path)
    now[0] += 1.0
  assert built == [61.0, 262.0, 463.0, 664.0, 865.0]


# ------------------------------------------------------------------- endurance


@pytest.mark.parametrize(
  ("name", "value", "grew"),
  [
    ("rss_mib", 700.0, False),
    ("rss_mib", 720.0, False),  # 3 %
    ("rss_mib", 740.0, True),  # 6 %
    ("files", 12, False),
    ("files", 13, True),
    ("threads", 94, False),  # a pool's, when all its others were busy
    ("threads", 95, True),
    ("live_arrays", 189, True),
    ("live_mib", 0.9, True),
  ],
)
def test_the_soak_tells_what_grew(name, value, grew):
  flat = dict(rss_mib=700.0, live_arrays=188, live_mib=0.8, threads=90)
  flat |= {"files": 12}
  busy = flat | {"files": 14, "threads": 95}  # a checkpoint is written
  seen = [flat, busy] * soak.WINDOW
  assert soak.growth(seen[1:]) is None  # too short to tell
  found = soak.growth([*seen, *[flat | {name: value}] * soak.WINDOW])
  start = {"growth": found, "second half": None}
  assert soak.what_grew(start) == [name] * grew
  if value != flat[name]:  # whatever grows goes on to grow where it leaks
    start = {"growth": dict.fromkeys(found, 0.0), "second half": found}
    assert soak.what_grew(start) == [name]
