"""Many small updates in a row: nothing may grow, and nothing compile again.

  python -m benchmarks.soak --out=/tmp/soak --steps=10000

The smallest policy goes through whole updates of KF-GRPO (videos, selection,
sampling, rewards, update, metrics, checkpoints, reports). Every few updates the
process is looked at: resident memory, arrays on devices and their bytes,
threads, open files. Prints one line: steps, growth, recompiles, lost.

It is resumable (the run is in OUT/run, what was seen in OUT/soak.jsonl), and
`--seconds` after the first update it ends early. What is held is compared
within one start, after a warm-up: some looks, and the first rebuilding of the
report, which draws with fonts that matplotlib then keeps open. OUT/soak.jsonl
has the memory over the whole start, to tell what flattens from what climbs.
"""

import argparse
import collections
import contextlib
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

from cf_jax import disk, report
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import policies, reinforce
from cf_jax.runtime import checkpoint, lifecycle, telemetry
from configs import kfgrpo_cpu

EVERY = 5  # updates between two looks
# Looks of a start that fill caches, and those that are compared as one.
WARM_UP, WINDOW = 10, 10
CURVE = 20  # points of the memory's curve
# What the least of the last window may lie above that of the first, over a
# whole start and over its second half: a checkpoint being written holds files
# and threads for a while, and a pool starts a thread when all others are busy.
MAX_GROWTH = {
  "rss_mib": 0.05,  # the heap's fragments
  "live_arrays": 0.0,
  "live_mib": 0.0,
  "threads": 0.05,
  "files": 0.0,
}
MAX_LATE_GROWTH = dict.fromkeys(MAX_GROWTH, 0.0) | {"rss_mib": 0.02}


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


def open_files() -> collections.Counter[str]:
  """name -> how many times the process has it open."""
  found = collections.Counter()
  for link in pathlib.Path("/proc/self/fd").iterdir():
    with contextlib.suppress(FileNotFoundError):  # the listing's own
      found[str(link.readlink())] += 1
  return found


class Watch(lifecycle.Guard):
  """Looks at the process now and then, and stops in time."""

  def __init__(self, workdir: pathlib.Path, seconds: float, **settings: Any):
    super().__init__(workdir, **settings)
    self._seconds, self._begin = seconds, 0.0
    self._looks = 0
    self.seen: list[dict[str, float]] = []  # after the warm-up
    self.files: collections.Counter[str] | None = None  # open then

  def advance(self, step: int, folder: pathlib.Path) -> str:
    reason = super().advance(step, folder)
    self._begin = self._begin or time.monotonic()  # it compiles before
    if step % EVERY == 0:
      gc.collect()  # what is only waiting for it has not leaked
      self._looks += 1
      if self._looks > WARM_UP and (folder / report.REPORT_FILE).exists():
        self.files = self.files or open_files()
        self.seen.append({"step": step} | look())
    spent = time.monotonic() - self._begin > self._seconds
    return reason or ("--seconds" if spent else "")


def growth(seen: list[dict[str, float]]) -> dict[str, float] | None:
  """name -> share by which it grew; None of looks too few to tell."""
  if len(seen) < 2 * WINDOW:
    return None
  first, last = seen[:WINDOW], seen[-WINDOW:]
  return {
    name: min(row[name] for row in last) / min(row[name] for row in first) - 1
    for name in MAX_GROWTH
  }


def what_grew(start: dict[str, Any]) -> list[str]:
  """Names that grew more than they may in a start, a row of soak.jsonl."""
  return [
    name
    for part, limits in (
      ("growth", MAX_GROWTH),
      ("second half", MAX_LATE_GROWTH),
    )
    for name, share in (start[part] or {}).items()
    if share > limits[name]
  ]


def curve(seen: list[dict[str, float]]) -> list[tuple[int, float]]:
  """(update, least MiB resident) of equal stretches of the looks."""
  size = -(-len(seen) // CURVE) or 1
  stretches = [seen[n : n + size] for n in range(0, len(seen), size)]
  return [
    (part[-1]["step"], round(min(row["rss_mib"] for row in part), 1))
    for part in stretches
  ]


def train(config, out: pathlib.Path, seconds: float) -> Watch:
  """Goes on with the run; who watched it."""
  workdir = out / "run"
  workdir.mkdir(parents=True, exist_ok=True)
  # An earlier start's; the warm-up waits for one of this start.
  (workdir / report.REPORT_FILE).unlink(missing_ok=True)
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
  return watch


def main() -> int:
  """The exit code is 1 where something grew, compiled again, or is untold."""
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
  watch = train(make_config(args.steps, out), out, args.seconds)
  seen, spent_s = watch.seen, time.monotonic() - begin
  steps, recompiles = [], 0
  for row in telemetry.each_row(out / "run" / telemetry.METRICS_FILE):
    steps.append(row["step"])
    recompiles += row["recompiles"] > 0
  holes = steps != list(range(1, len(steps) + 1))
  found = growth(seen)
  starts = telemetry.read_rows(out / "soak.jsonl")
  starts.append(
    {
      "looks": len(seen),
      "seconds": spent_s,
      "growth": found,
      "second half": growth(seen[len(seen) // 2 :]),
      "curve": curve(seen),
      "opened": dict(open_files() - watch.files) if watch.files else {},
    }
  )
  disk.write_text(
    out / "soak.jsonl", "".join(json.dumps(row) + "\n" for row in starts)
  )
  told = [start["growth"] for start in starts if start["growth"]]
  most = {n: max(g[n] for g in told) for n in MAX_GROWTH} if told else {}
  grew = sorted({name for start in starts for name in what_grew(start)})
  lost = bool(grew) + bool(recompiles) + bool(holes) + (not told)
  print(
    f"soak: {len(steps)} steps in {sum(s['seconds'] for s in starts):.0f} s and"
    f" {len(starts)} starts; growth at most "
    + (
      ", ".join(f"{n} {100 * v:+.1f} %" for n, v in most.items())
      or "untold: the starts were too short"
    )
    + f"; too much of {grew or 'nothing'};"
    + f" now {json.dumps(seen[-1]) if seen else '{}'};"
    f" steps with recompiles {recompiles}; lost {lost}"
  )
  return 1 if lost else 0


if __name__ == "__main__":
  sys.exit(main())
