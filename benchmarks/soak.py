"""Many small updates in a row: nothing may grow, and nothing compile again.

  python -m benchmarks.soak --out=/tmp/soak --steps=10000

The smallest policy goes through whole updates of KF-GRPO (videos, selection,
sampling, rewards, update, metrics, checkpoints, reports). Every few updates the
process is looked at: resident memory, arrays on devices and their bytes,
threads, open files. Prints one line: steps, growth, recompiles, lost.

It is resumable (the run is in OUT/run, what was seen in OUT/soak.jsonl), and
`--seconds` after the first update it ends early. Memory is compared within one
start, after a warm-up.
"""

import argparse
import dataclasses
import gc
import json
import os
import pathlib
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import ml_collections

from cf_jax import disk
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import policies, reinforce
from cf_jax.runtime import checkpoint, lifecycle, telemetry
from configs import kfgrpo_cpu

EVERY = 5  # updates between two looks
# Looks of a start that fill caches, and those that are compared as one.
WARM_UP, WINDOW = 10, 10
# What the least of the last window may lie above that of the first: a
# checkpoint that is being written holds files and threads for a while.
MAX_GROWTH = {
  "rss_mib": 0.05,  # the heap's fragments
  "live_arrays": 0.0,
  "live_mib": 0.0,
  "threads": 0.0,
  "files": 0.0,
}


def make_config(steps: int, out: pathlib.Path) -> ml_collections.ConfigDict:
  """The smoke run at the smallest size, reinforcement alone."""
  config = kfgrpo_cpu.get_config("smoke")
  config.name = "soak"
  config.data.cache_dir = str(out / "data")
  config.data.synthetic.update(
    num_train=32, num_dev=8, num_test=8, num_frames=64
  )
  config.data.loader.scan_frames = 64
  config.data.reader.update(size_px=(28, 56), num_threads=1)
  config.tad.num_keyframes = 4
  config.prompt.max_tokens = 96
  config.model = dict(
    size="tiny",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    mrope_section=(1, 2, 1),
    vision=dict(
      depth=1,
      hidden_size=16,
      intermediate_size=24,
      num_heads=2,
      out_hidden_size=32,
      fullatt_block_indexes=(0,),
    ),
  )
  config.sft.max_steps = 0
  config.rl.update(steps=steps, prompts_per_step=4, checkpoint_every=50)
  config.rl.optim.learning_rate = 1e-5
  config.sampling.update(num_completions=2, max_tokens=4)
  config.contrast.num_shuffles = 1
  config.runtime.update(report_every_s=60.0, heartbeat_s=5.0)
  return config.lock()


def look() -> dict[str, float]:
  """What the process holds now."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  arrays = jax.live_arrays()
  return {
    "rss_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    "live_arrays": len(arrays),
    "live_mib": sum(array.nbytes for array in arrays) / 2**20,
    "threads": len(os.listdir("/proc/self/task")),
    "files": len(os.listdir("/proc/self/fd")),
  }


class Watch(lifecycle.Guard):
  """Looks at the process now and then, and stops in time."""

  def __init__(self, workdir: pathlib.Path, seconds: float, **settings: Any):
    super().__init__(workdir, **settings)
    self._seconds, self._begin = seconds, 0.0
    self.seen: list[dict[str, float]] = []

  def advance(self, step: int, folder: pathlib.Path) -> str:
    reason = super().advance(step, folder)
    self._begin = self._begin or time.monotonic()  # it compiles before
    if step % EVERY == 0:
      gc.collect()  # what is only waiting for it has not leaked
      self.seen.append({"step": step} | look())
    spent = time.monotonic() - self._begin > self._seconds
    return reason or ("--seconds" if spent else "")


def growth(seen: list[dict[str, float]]) -> dict[str, float] | None:
  """name -> share by which it grew; None of a start too short to tell."""
  if len(seen) < WARM_UP + 2 * WINDOW:
    return None
  first, last = seen[WARM_UP : WARM_UP + WINDOW], seen[-WINDOW:]
  return {
    name: min(row[name] for row in last) / min(row[name] for row in first) - 1
    for name in MAX_GROWTH
  }


def train(config, out: pathlib.Path, seconds: float) -> list[dict]:
  """Goes on with the run; what was seen of it."""
  workdir = out / "run"
  workdir.mkdir(parents=True, exist_ok=True)
  watch = Watch(workdir, seconds, **config.runtime)
  store = checkpoint.Checkpoints(
    workdir / "checkpoints" / "rl", **config.checkpoint
  )
  with watch, store:
    experiment = dataclasses.replace(
      experiment_lib.build(config, workdir), guard=watch
    )
    params = policies.initial_params(config, experiment.model, experiment.mesh)
    resume = {"rl": store.latest_step()} if store.latest_step() else {}
    try:
      with telemetry.MetricWriter(workdir, resume=resume) as writer:
        reinforce.train_policy(experiment, params, writer, store)
    except lifecycle.Stopped as stopped:
      print(stopped, flush=True)
  return watch.seen


def main() -> int:
  """The exit code is 1 where something grew or compiled again."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", required=True, type=pathlib.Path)
  parser.add_argument("--steps", type=int, default=10_000)
  parser.add_argument("--seconds", type=float, default=1e9, help="ends early")
  args = parser.parse_args()
  out = args.out.absolute()
  jax.config.update("jax_compilation_cache_dir", str(out / "xla"))
  begin = time.monotonic()
  seen = train(make_config(args.steps, out), out, args.seconds)
  spent_s = time.monotonic() - begin
  rows = telemetry.read_rows(out / "run" / telemetry.METRICS_FILE)
  steps = [row["step"] for row in rows]
  holes = steps != list(range(1, len(steps) + 1))
  recompiles = sum(row["recompiles"] > 0 for row in rows)
  found = growth(seen)
  starts = telemetry.read_rows(out / "soak.jsonl")
  starts.append({"looks": len(seen), "seconds": spent_s, "growth": found})
  disk.write_text(
    out / "soak.jsonl", "".join(json.dumps(row) + "\n" for row in starts)
  )
  told = [start["growth"] for start in starts if start["growth"]]
  most = {n: max(g[n] for g in told) for n in MAX_GROWTH} if told else {}
  grew = [name for name, share in most.items() if share > MAX_GROWTH[name]]
  lost = bool(grew) + bool(recompiles) + bool(holes)
  print(
    f"soak: {len(steps)} steps in {sum(s['seconds'] for s in starts):.0f} s and"
    f" {len(starts)} starts; growth at most "
    + (", ".join(f"{n} {100 * v:+.1f} %" for n, v in most.items()) or "untold")
    + f"; now {json.dumps(seen[-1]) if seen else '{}'};"
    f" steps with recompiles {recompiles}; lost {lost}"
  )
  return 1 if lost else 0


if __name__ == "__main__":
  sys.exit(main())
