"""N processes on this machine against one: a small run, a death, a restore.

  python -m benchmarks.processes run --count=4 --folder=runs/processes
  python -m benchmarks.processes end --count=2
  python -m benchmarks.processes restore --count=4 --mib=1024

`run` trains a very small run (tests/runtime/small_run.py) alone and in N
processes and prints the largest difference of every metric; exit code 1 above
1e-4, or where a held-out answer differs. `end` kills one process and prints how
long the others lived. `restore` writes a tree and reads it back in N processes,
each with its part, and prints by how much each process grew.
"""

import argparse
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
# Seconds of the clock or shares of them: no numbers that processes agree on.
_CLOCK = ("time", "rate", "mfu", "share", "work")


def start(count: int, command: list[str]) -> list[subprocess.Popen]:
  """Processes of one run, told where the first one listens."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  return [
    subprocess.Popen(
      [sys.executable, *command],
      cwd=ROOT,
      env=os.environ
      | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
      },
    )
    for number in range(count)
  ]


def run(count: int, folder: str) -> None:
  """Prints how far the metrics of N processes are from those of one."""
  folder = pathlib.Path(folder).absolute()
  command = ["-m", "tests.runtime.small_run", str(folder / "cache")]
  for processes in (1, count):
    began = time.perf_counter()
    running = start(processes, [*command, str(folder / f"of_{processes}")])
    codes = [process.wait() for process in running]
    assert not any(codes), codes
    print(f"{processes} processes: {time.perf_counter() - began:.0f} s")
  one, many = (
    [
      json.loads(line)
      for line in (folder / f"of_{n}" / "metrics.jsonl").open(encoding="utf-8")
    ]
    for n in (1, count)
  )
  worst = {}
  for row, other in zip(one, many, strict=True):
    for name, value in row.items():
      if name.partition("/")[0] not in _CLOCK and isinstance(value, float):
        away = abs(other[name] - value) / max(abs(value), 1e-3)
        worst[name] = max(worst.get(name, 0.0), away)
  for name, away in sorted(worst.items(), key=lambda item: -item[1])[:12]:
    print(f"{away:.1e}  {name}")
  texts = [
    (folder / f"of_{n}" / "predictions.jsonl").read_text("utf-8")
    for n in (1, count)
  ]
  print("held-out answers equal:", texts[0] == texts[1])
  if max(worst.values()) > 1e-4 or texts[0] != texts[1]:
    sys.exit("they are not one")


_WAIT = """
import jax, numpy as np, os, time
from jax.experimental import multihost_utils
from cf_jax import main
from cf_jax.runtime import processes
processes.start()
try:
  while True:
    multihost_utils.process_allgather(np.float32(1))
    time.sleep(0.1)
except Exception as error:
  main.leave_together(error)
"""


def end(count: int, victim: int) -> None:
  """Kills one of N processes in a loop of collectives."""
  running = start(count, ["-c", _WAIT])
  time.sleep(15)
  began = time.perf_counter()
  running[victim].send_signal(signal.SIGKILL)
  for number, process in enumerate(running):
    code = process.wait()
    print(f"process {number}: {code} after {time.perf_counter() - began:.1f} s")


def restore(count: int, mib: int) -> None:
  """Writes and reads a tree of N processes."""
  with tempfile.TemporaryDirectory() as folder:
    for action in ("save", "load"):
      command = ["-m", "benchmarks.processes", action]
      running = start(count, [*command, f"--mib={mib}", f"--folder={folder}/x"])
      codes = [process.wait() for process in running]
      assert not any(codes), codes


def _grown_mib() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def save_or_load(action: str, mib: int, folder: str) -> None:
  """One process of `restore`."""
  import jax
  import jax.numpy as jnp

  from cf_jax.runtime import checkpoint, processes, sharding
  from cf_jax.types import TrainState

  processes.start()
  mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1, context=1)
  width = mib * 2**20 // 4 // 8 // 1024
  shapes = {
    "mlp": {
      "layers": {
        "mlp": {"up": {"kernel": jax.ShapeDtypeStruct((8, 1024, width), "f4")}}
      }
    }
  }
  state = TrainState(
    step=jax.ShapeDtypeStruct((), "i4"),
    params=shapes,
    opt_state=(),
    rng=jax.ShapeDtypeStruct((2,), "u4"),
  )
  places = sharding.tree_shardings(state, mesh, sharding.STATE_RULES)
  whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(state)) / 2**20
  with checkpoint.Checkpoints(pathlib.Path(folder), keep=1) as store:
    if action == "save":
      made = jax.jit(
        lambda: jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), state),
        out_shardings=places,
      )()
      store.save(1, made, {})
      return
    before = _grown_mib()
    template = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=place
      ),
      state,
      places,
    )
    state, _ = store.restore(template)
    jax.block_until_ready(state)
    print(
      f"process {jax.process_index()}: a tree of {whole:.0f} MiB,"
      f" {whole / mesh.size:.0f} of them here; the peak of its memory rose by"
      f" {_grown_mib() - before:.0f} MiB",
      flush=True,
    )


def main() -> None:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("what", choices=("run", "end", "restore", "save", "load"))
  parser.add_argument("--count", type=int, default=4)
  parser.add_argument("--folder", default="runs/processes")
  parser.add_argument("--victim", type=int, default=-1)
  parser.add_argument("--mib", type=int, default=1024)
  asked = parser.parse_args()
  if asked.what == "run":
    run(asked.count, asked.folder)
  elif asked.what == "end":
    end(asked.count, asked.victim)
  elif asked.what == "restore":
    restore(asked.count, asked.mib)
  else:
    save_or_load(asked.what, asked.mib, asked.folder)


if __name__ == "__main__":
  main()
