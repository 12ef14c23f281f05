"""N processes on this machine against one: small runs, deaths, a restore.

  python -m benchmarks.processes run --count=4 --folder=runs/processes
  python -m benchmarks.processes damaged --count=2 --folder=runs/processes
  python -m benchmarks.processes mesh --folder=runs/processes
  python -m benchmarks.processes pod --count=2 --folder=runs/processes
  python -m benchmarks.processes end --count=2
  python -m benchmarks.processes restore --count=4 --mib=1024

The first three train a very small run (tests/runtime/small_run.py: cold start,
KF-GRPO, evaluation). `run` does it alone and in N processes, and goes on from
the middle of each with the other number of processes (not so with
`--straight`); what follows the run's
command as `rl.steps=6` changes a setting of all. `damaged` has `--bad`
videos that cannot be read, and asks that some processes meet more of them than
others. `mesh`
does it on one device and on eight of one process. They print the largest
difference of every metric and how far the trained parameters are from one
process's, measured by how far training moved them; exit code 1 where a metric
differs by more than 1e-3 of its value, the parameters by more than 1e-3 of
their way, or a held-out answer at all.

`pod` starts launch/local_pod.sh, kills one of its processes in the middle, and
shows what the others said and what the restarted run came to. `end` kills one
process of a loop of collectives and prints how long the others lived. `restore`
writes a tree and reads it back in N processes, each with its part, and prints
by how much each process grew.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
# Seconds of the clock or shares of them: no numbers that processes agree on.
_CLOCK = re.compile("wall_s|time/|rate/|mfu/|share/|work/")
_LIMIT = 1e-3
# Such programs run for a moment: compiling them well costs more.
_QUICK = (
  "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
  " --xla_cpu_parallel_codegen_split_count=1"
)
# Of the run that a pod makes, beside those of benchmarks/kills.py.
_POD = (
  "--config.model.scan_unroll=1",
  "--config.contrast.kind=none",
  "--config.loss.kl_weight=0.0",
  "--config.sft.max_steps=2",
  "--config.evaluation.arms=('keyframes',)",
  "--config.report.stages=('rl',)",
)
# Meshes of eight devices, as the tests' (tests/runtime/test_sharding.py).
_MESHES = (
  {"data": 8},
  {"data": 1, "fsdp": 8},
  {"data": 2, "tensor": 4},
  {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
)


def start(
  count: int, command: list[str], *, log: pathlib.Path | None = None
) -> list[subprocess.Popen]:
  """Processes of one run, told where the first one listens.

  Args:
    count: how many.
    command: behind `python`.
    log: what each says goes there, with its number behind; None: is seen.
  """
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  running = []
  for number in range(count):
    said = None if log is None else open(f"{log}_{number}.log", "wb")  # noqa: SIM115
    running.append(
      subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=said,
        stderr=said and subprocess.STDOUT,
        env=os.environ
        | {
          "JAX_PLATFORMS": "cpu",
          "JAX_COORDINATOR_ADDRESS": address,
          "JAX_NUM_PROCESSES": str(count),
          "JAX_PROCESS_ID": str(number),
        },
      )
    )
  return running


def train(folder: pathlib.Path, name: str, count: int, changed: list[str]):
  """The small run, or what is left of it, in FOLDER/NAME; its folder."""
  began = time.perf_counter()
  workdir = folder / name
  if (workdir / "results.json").exists():  # the benchmark was interrupted
    return workdir
  command = ["-m", "tests.runtime.small_run", str(folder / "cache")]
  running = start(count, [*command, str(workdir), *changed], log=folder / name)
  codes = [process.wait() for process in running]
  print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
  if any(codes):
    sys.exit(f"exit codes {codes}: see {folder / name}_*.log")
  return workdir


def _rows(workdir: pathlib.Path) -> list[dict]:
  text = (workdir / "metrics.jsonl").read_text("utf-8")
  return [json.loads(line) for line in text.splitlines()]


def _params(workdir: pathlib.Path):
  """Parameters of the newest checkpoint and of the run's start, as float64."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax
  import numpy as np

  from cf_jax.programs import policies
  from cf_jax.runtime import sharding

  mesh = sharding.make_mesh(
    data=1, fsdp=1, tensor=1, context=1, devices=jax.devices()[:1]
  )
  found = policies.load_policy(str(workdir), mesh)
  start = policies.initial_params(
    policies.run_config(workdir), found.model, mesh
  )
  return tuple(
    np.concatenate(
      [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    )
    for tree in (found.params, start)
  )


def compare(
  one: pathlib.Path, other: pathlib.Path, *, idle: bool = False
) -> bool:
  """Prints how far two runs are from each other; are they the same?

  Args:
    one: a run's folder.
    other: another one's.
    idle: some updates may have no gradient.
  """
  import numpy as np

  rows, others = _rows(one), _rows(other)
  worst = {}
  for row, there in zip(rows, others, strict=True):
    for name, value in row.items():
      if not _CLOCK.match(name) and isinstance(value, float):
        away = abs(there[name] - value) / max(abs(value), 1e-3)
        worst[name] = max(worst.get(name, 0.0), away)
  print(f"{other.name} against {one.name}, {len(rows)} rows of metrics:")
  for name, away in sorted(worst.items(), key=lambda item: -item[1])[:6]:
    print(f"  {away:.1e}  {name}")
  (trained, begun), (there, _) = _params(one), _params(other)
  moved = float(np.linalg.norm(trained - begun))
  apart = float(np.linalg.norm(there - trained))
  print(f"  parameters: moved by {moved:.3g}, apart by {apart:.3g}")
  texts = [
    (run / "predictions.jsonl").read_text("utf-8") for run in (one, other)
  ]
  print(f"  held-out answers equal: {texts[0] == texts[1]}", flush=True)
  norms = [row["grad_norm"] for row in rows]
  assert idle or min(norms) > 0, f"an update without a gradient: {norms}"
  return (
    max(worst.values()) <= _LIMIT
    and apart <= _LIMIT * moved
    and texts[0] == texts[1]
  )


def _from_the_middle(workdir: pathlib.Path, name: str) -> None:
  """FOLDER/NAME: a copy of a run as it was in the middle of its last stage."""
  copied = workdir.parent / name
  shutil.copytree(workdir, copied)
  steps = sorted(int(p.name) for p in (copied / "checkpoints" / "rl").iterdir())
  shutil.rmtree(copied / "checkpoints" / "rl" / str(steps[-1]))
  for file in ("results.json", "predictions.jsonl", "report.html"):
    (copied / file).unlink()


def run(
  count: int, folder: pathlib.Path, changed: list[str], *, straight: bool
) -> None:
  """One process and N; unless `straight`, each going on where the other was."""
  one = train(folder, "of_1", 1, changed)
  same = []
  runs = [
    (f"of_{count}", count, None),
    (f"of_{count}_then_1", 1, f"of_{count}"),
    (f"of_1_then_{count}", count, "of_1"),
  ]
  for name, processes, after in runs[:1] if straight else runs:
    if after and not (folder / name).exists():
      _from_the_middle(folder / after, name)
    same.append(compare(one, train(folder, name, processes, changed)))
  if not all(same):
    sys.exit("they are not one")


def mesh(folder: pathlib.Path, changed: list[str]) -> None:
  """One device, and the meshes of eight."""
  changed = [
    *changed,
    *("rl.prompts_per_step=8", "sft.batch_size=8"),
    "model.vision.num_heads=4",  # over tensor=4
  ]
  one = train(folder, "device", 1, changed)
  os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
  same = []
  for sizes in _MESHES:
    axes = [f"mesh.{name}={size}" for name, size in sizes.items()]
    name = "_".join(f"{axis}{size}" for axis, size in sizes.items())
    there = train(folder, name, 1, [*changed, *axes])
    same.append(compare(one, there))
  if not all(same):
    sys.exit("they are not one")


def damaged(
  count: int, folder: pathlib.Path, changed: list[str], *, bad: int
) -> None:
  """N processes that meet different numbers of unreadable videos."""
  from cf_jax.data import records, synthetic
  from tests import conftest

  config = conftest.shrink(
    conftest.load_config("configs/kfgrpo_cpu.py", "smoke"), folder / "cache"
  )
  root = synthetic.ensure(
    config.data.cache_dir, seed=config.data.seed, **config.data.synthetic
  )
  made = folder / f"damaged_set_{bad}"
  for split in ("train", "dev", "test"):
    samples = []
    for number, sample in enumerate(synthetic.load(root, split)):
      path = made / split / pathlib.Path(sample.video).name
      path.parent.mkdir(parents=True, exist_ok=True)
      content = pathlib.Path(sample.video).read_bytes()
      # The first of training are cut off; their order is shuffled.
      cut = split == "train" and number < bad
      path.write_bytes(content[:200] if cut else content)
      samples.append(sample._replace(video=str(path)))
    (made / f"{split}.jsonl").write_text(records.to_jsonl(samples), "utf-8")
  changed = [
    *changed,
    f"data.source='jsonl:{made}'",
    "data.max_skip_fraction=0.5",
  ]
  workdir = train(folder, f"damaged_{bad}_of_{count}", count, changed)
  met = []
  for number in range(count):
    file = workdir / (f"skipped_{number}.json" if number else "skipped.json")
    lost = json.loads(file.read_text("utf-8")) if file.exists() else {}
    met.append(len(lost))
    print(f"process {number} could not read {len(lost)} videos")
  last = _rows(workdir)[-1]
  print(
    f"{last['stage']} update {last['step']}: all together"
    f" {last['data/skipped_total']}, gradient norm {last['grad_norm']:.3g};"
    " parameters equal on all at every checkpoint"
  )
  if len(set(met)) == 1:
    sys.exit(f"all met {met[0]}: that shows little; take another --bad")


def _errors(log: pathlib.Path) -> list[str]:
  lines = log.read_text("utf-8", "replace").splitlines()
  return [line for line in lines if line.startswith("error:")]


def pod(count: int, folder: pathlib.Path, victim: int) -> None:
  """launch/local_pod.sh with a process that is killed."""
  from benchmarks import kills

  victim %= count
  command = [
    *kills.SETTINGS,
    *_POD,
    f"--config.data.cache_dir={folder / 'cache'}",
  ]
  straight, killed = folder / "pod_straight", folder / f"pod_of_{count}"
  began = time.perf_counter()
  if not (straight / "results.json").exists():
    subprocess.run(
      [sys.executable, "-m", "cf_jax.main", *command, f"--workdir={straight}"],
      cwd=ROOT,
      check=True,
      capture_output=True,
    )
  print(f"one process: {time.perf_counter() - began:.0f} s", flush=True)
  began = time.perf_counter()
  logs = folder / f"pod_of_{count}_logs"
  running = subprocess.Popen(
    [
      "bash",
      "launch/local_pod.sh",
      str(count),
      *command,
      f"--workdir={killed}",
    ],
    cwd=ROOT,
    env=os.environ
    | {"RESTARTS": "1", "RESTART_AFTER_S": "1", "LOGS": str(logs)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  beat = killed / (f"heartbeat_{victim}.json" if victim else "heartbeat.json")
  while not (killed / "checkpoints" / "rl" / "2").is_dir():
    assert running.poll() is None, running.communicate()[0][-3000:]
    time.sleep(0.2)
  os.kill(json.loads(beat.read_text("utf-8"))["process"], signal.SIGKILL)
  died = time.perf_counter()
  print(f"process {victim} killed after {died - began:.0f} s", flush=True)
  ended = None
  while running.poll() is None:
    if ended is None and any(_errors(log) for log in logs.iterdir()):
      ended = time.perf_counter()
      print(f"  the first sentence {ended - died:.1f} s after the death")
    time.sleep(0.2)
  for log in sorted(logs.iterdir()):
    for line in _errors(log):
      print(f"  process {log.stem}: {line[:300]}")
  for line in running.communicate()[0].splitlines():
    if line.startswith("exit code"):
      print(f"  {line}")
  for line in (logs / "0.log").read_text("utf-8", "replace").splitlines():
    if "continu" in line:
      print(f"  {line.partition('] ')[2]}")
  print(
    f"exit code {running.returncode} after {time.perf_counter() - began:.0f} s",
    flush=True,
  )
  if running.returncode or not compare(straight, killed, idle=True):
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
  parser.add_argument(
    "what",
    choices=("run", "damaged", "mesh", "pod", "end", "restore", "save", "load"),
  )
  parser.add_argument("--count", type=int, default=4)
  parser.add_argument("--folder", default="runs/processes")
  parser.add_argument("--victim", type=int, default=-1)
  parser.add_argument("--mib", type=int, default=1024)
  parser.add_argument("--bad", type=int, default=1)
  parser.add_argument("--straight", action="store_true")
  parser.add_argument("changed", nargs="*")
  asked = parser.parse_intermixed_args()
  folder = pathlib.Path(asked.folder).absolute()
  if asked.what in ("run", "damaged", "mesh", "pod"):
    folder.mkdir(parents=True, exist_ok=True)
    # A program is compiled once for all runs that have it.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
    os.environ.setdefault("XLA_FLAGS", _QUICK)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
  if asked.what == "run":
    run(asked.count, folder, asked.changed, straight=asked.straight)
  elif asked.what == "damaged":
    damaged(asked.count, folder, asked.changed, bad=asked.bad)
  elif asked.what == "mesh":
    mesh(folder, asked.changed)
  elif asked.what == "pod":
    pod(asked.count, folder, asked.victim)
  elif asked.what == "end":
    end(asked.count, asked.victim)
  elif asked.what == "restore":
    restore(asked.count, asked.mib)
  else:
    save_or_load(asked.what, asked.mib, asked.folder)


if __name__ == "__main__":
  main()
