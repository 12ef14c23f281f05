"""Several processes of one run share its batches and end together.

That they train as one is shown by `python -m benchmarks.processes run`.
"""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from cf_jax.data import pipeline, records, video
from cf_jax.runtime import processes
from tests import conftest

# ------------------------------------------------------------------- loaders


class _Decoder:
  """Frames without files; some videos are damaged."""

  processes = 0

  def __init__(self, *damaged):
    self._damaged = damaged

  def scan_frames(self, wanted, num_frames, size_px):
    if os.path.basename(wanted.path) in self._damaged:
      raise video.VideoError(wanted.path, "damaged")
    return video.Scan(
      np.zeros((num_frames, *size_px, 3), np.uint8),
      np.ones(num_frames, bool),
      np.arange(num_frames, dtype=np.float64),
      np.arange(num_frames, dtype=np.int32),
      num_frames,
    )


_SAMPLES = [
  records.Sample(
    id=str(n),
    video=f"/v/{n}.mp4",
    question="?",
    options=(),
    answer="A",
    kind="free_form",
    task="t",
    start_s=None,
    end_s=None,
    evidence=(),
    reasoning="",
    source="",
  )
  for n in range(24)
]


def _hosts(count, *damaged, batch_size=4):
  """Loaders of `count` hosts whose batches together have `batch_size`."""
  return [
    pipeline.make_loader(
      _SAMPLES,
      batch_size=batch_size // count,
      seed=3,
      shard_index=n,
      shard_count=count,
      num_threads=1,
      scan_frames=2,
      scan_size_px=(4, 4),
      max_skip_fraction=0.5,
      decoder=_Decoder(*damaged),
    )
    for n in range(count)
  ]


def _next(hosts):
  """The samples of one batch of all hosts."""
  return sorted(int(n) for host in hosts for n in next(host).sample_index)


def _close(*loaders):
  for host in loaders:
    host.close()


def test_hosts_share_batches_and_go_on_with_any_number_of_them():
  (alone,) = _hosts(1)
  expected = [_next([alone]) for _ in range(12)]  # two epochs
  hosts = _hosts(2)
  assert [_next(hosts) for _ in range(3)] == expected[:3]
  state = {"hosts": [host.get_state() for host in hosts]}
  state = json.loads(json.dumps(state))
  for count in (2, 4, 1):
    again = _hosts(count)
    for host in again:
      host.set_state(state)
    assert [_next(again) for _ in range(9)] == expected[3:], count
    _close(*again)
  _close(alone, *hosts)


def test_damaged_videos_are_replaced_in_the_share_of_their_host():
  (alone,) = _hosts(1)
  order = np.concatenate([next(alone).sample_index for _ in range(12)])
  damaged = [f"{n}.mp4" for n in order[1:8:2]]  # all of the second host's
  hosts = _hosts(2, *damaged)
  batches = [
    [next(host).sample_index.tolist() for host in hosts] for _ in range(3)
  ]
  assert all(len(part) == 2 for batch in batches for part in batch)
  assert [n for one, _ in batches for n in one] == order[:12:2].tolist()
  assert [n for _, two in batches for n in two] == order[9:21:2].tolist()
  state = {"hosts": [host.get_state() for host in hosts]}
  (one,) = _hosts(1, *damaged)
  one.set_state(state)  # where the second host was: 10 samples of each
  assert (
    next(one).sample_index.tolist()
    == [n for n in order[20:] if f"{n}.mp4" not in damaged][:4]
  )
  assert len(one.skipped) == 4
  _close(alone, one, *hosts)


def test_a_loader_state_of_other_hosts_and_data_is_refused():
  hosts = _hosts(2)
  states = [host.get_state() for host in hosts]
  states[0]["fingerprint"] += 1
  (alone,) = _hosts(1)
  with pytest.raises(ValueError, match="2 hosts.*new workdir"):
    alone.set_state({"hosts": states})
  _close(alone, *hosts)


# --------------------------------------------------------------------- ends


def _start(count, command):
  """`count` processes of a command that find each other."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  return [
    subprocess.Popen(
      [sys.executable, *command],
      cwd=conftest.ROOT,
      env=os.environ
      | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
      },
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(count)
  ]


class _Store:
  """Of jax's coordination service: keys that are not there yet time out."""

  def __init__(self, early):
    self.key, self.asked, self._early = {}, [], early

  def key_value_set(self, key, value):
    self.key[key] = value

  def blocking_key_value_get(self, key, _):
    self.asked.append(key)
    if self.asked.count(key) <= self._early.get(key, 0):
      raise RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
    if self._early.get(key) is None:
      raise RuntimeError("UNAVAILABLE: connection refused")
    return ""


def test_who_is_done_waits_for_who_is_not(monkeypatch):
  """The first process may write for longer than jax's own wait at the end."""
  store = _Store({"cf_jax/done/0": 3, "cf_jax/done/1": 0})
  monkeypatch.setattr(processes, "count", lambda: 2)
  monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes.jax, "process_index", lambda: 1)
  monkeypatch.setattr(processes.distributed.global_state, "client", store)
  processes.part()
  assert store.key == {"cf_jax/done/1": ""}
  assert store.asked == ["cf_jax/done/1"] + 4 * ["cf_jax/done/0"]
  store = _Store({"cf_jax/done/1": 0})  # the service went with process 0
  monkeypatch.setattr(processes.distributed.global_state, "client", store)
  with pytest.raises(RuntimeError, match="UNAVAILABLE"):
    processes.part()


def test_a_lost_process_is_found_behind_other_errors():
  gone = "INTERNAL: Barrier failed because: Task 1 heartbeat timeout. This\nx"
  try:
    try:
      raise RuntimeError(gone)
    except RuntimeError as error:
      raise OSError("a checkpoint could not be written") from error
  except OSError as error:
    assert processes.lost(error) == gone.partition("\n")[0]
  assert processes.lost(RuntimeError("UNAVAILABLE: Connection reset by peer"))
  assert processes.lost(OSError("a checkpoint could not be written")) == ""
  assert processes.lost(ValueError("INTERNAL: shapes differ")) == ""


_ENDS = """
import os, signal, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from cf_jax import main
from cf_jax.runtime import processes

processes.start()
number = jax.process_index()
try:
  assert processes.exchange([number, "x"]) == [[0, "x"], [1, "x"]]
  found = multihost_utils.process_allgather(np.float32(number))
  assert found.tolist() == [0, 1]
  if number and sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
  if number:
    raise ValueError("3 of 9 videos cannot be read")
  multihost_utils.process_allgather(np.float32(number))
except Exception as error:
  main.leave_together(error)
"""


@pytest.mark.parametrize("how", ["killed", "failed"])
def test_a_process_that_ends_ends_the_others(how):
  running = _start(2, ["-c", _ENDS, how])
  said = [process.communicate(timeout=90)[1] for process in running]
  codes = [process.returncode for process in running]
  if how == "killed":
    assert codes[1] == -9
    assert "another process of this run is gone" in said[0], said[0]
    assert "newest checkpoint" in said[0]
    assert codes[0] == 76
  else:  # starting again would not help: no process asks for it
    assert codes[1] == 2 and "3 of 9 videos" in said[1]
    assert "process 1 of 2 failed: 3 of 9 videos" in said[0], said[0]
    assert codes[0] == 2
