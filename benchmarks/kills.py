"""A run that is killed again and again must end as if nothing had happened.

  python -m benchmarks.kills --out=/tmp/kills --kills=30

One run is left alone. Others with the same settings are killed in every part of
their life, at random within it, by SIGKILL or by a signal that asks them to
stop, and started again until they are complete. Then everything is compared,
bit by bit: videos, parameters, optimizer, metrics (but what was measured),
rollouts, predictions, results. Prints one line: tried, survived, lost.

It is resumable: what is done is in OUT/kills.json, and `--seconds` ends early.
"""

import argparse
import importlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np

SETTINGS = (
  "--config=configs/kfgrpo_cpu.py:smoke",
  "--config.data.synthetic.num_train=16",
  "--config.data.synthetic.num_dev=8",
  "--config.data.synthetic.num_test=10",
  "--config.data.synthetic.num_frames=64",
  "--config.data.loader.scan_frames=64",
  "--config.data.reader.size_px=(28, 56)",
  "--config.tad.num_keyframes=4",
  "--config.sft.max_steps=4",
  "--config.sft.batch_size=4",
  "--config.sft.eval_every=2",
  "--config.sft.checkpoint_every=2",
  "--config.rl.steps=4",
  "--config.rl.checkpoint_every=2",
  "--config.rl.eval_every=3",
  "--config.sampling.num_completions=2",
  "--config.contrast.num_shuffles=1",
  "--config.report.probe_videos=0",
  "--config.report.num_film_strips=2",
  "--config.runtime.heartbeat_s=0.5",
  "--config.runtime.report_every_s=1",
)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Measured, not computed: free to differ between equal runs.
MEASURED = re.compile("wall_s|time/|rate/|mfu/|share/|recompiles")


class Moment(NamedTuple):
  """A part of a run's life.

  Attributes:
    name: of it.
    module: of the function that begins it.
    function: its name, of a class "Class.method".
    times: it is killed in one of the first so many calls.
    delay_s: at most so long after the call.
  """

  name: str
  module: str
  function: str
  times: int
  delay_s: float


# Delays are as long as the parts take.
MOMENTS = (
  Moment("start", "cf_jax.programs.train", "run", 1, 1.0),
  Moment("data", "cf_jax.data.synthetic_video", "write_video", 30, 0.05),
  Moment("index", "cf_jax.data.synthetic", "_write_index", 1, 0.5),
  Moment("manifest", "cf_jax.runtime.telemetry", "write_manifest", 1, 0.1),
  Moment("cold start", "cf_jax.programs.experiment", "Stream.__next__", 4, 2.0),
  Moment("checkpoint", "cf_jax.runtime.checkpoint", "Checkpoints.save", 2, 0.3),
  Moment("rollout", "cf_jax.programs.reinforce", "Collector.__call__", 2, 3.0),
  Moment("update", "cf_jax.programs.work", "count_policy_update", 2, 0.2),
  Moment("metrics", "cf_jax.runtime.telemetry", "MetricWriter.write", 1, 0.02),
  Moment("evaluation", "cf_jax.programs.held_out", "Evaluator.run", 2, 2.0),
  Moment("results", "cf_jax.runtime.telemetry", "write_json", 4, 0.05),
  Moment("report", "cf_jax.report", "write_report", 2, 0.5),
)
# What a life is killed in, one after the other.
PLANS = (
  ("start", "data", "index", "manifest", "cold start", "checkpoint", "rollout")
  + ("update", "metrics"),
  ("checkpoint", "checkpoint", "checkpoint", "evaluation", "evaluation")
  + ("results", "report", "report"),
  ("data", "cold start", "rollout", "evaluation", "results", "results")
  + ("report", "start"),
)


# --------------------------------------------------------------- in the child


def _announce(moment: Moment, pipe: int) -> None:
  """Writes a byte into `pipe` at every call of the moment's function."""
  owner = importlib.import_module(moment.module)
  *path, name = moment.function.split(".")
  for part in path:
    owner = getattr(owner, part)
  function = getattr(owner, name)

  def called(*args, **kwargs):
    os.write(pipe, b".")
    return function(*args, **kwargs)

  setattr(owner, name, called)


def child(argv: list[str]) -> None:
  """cf_jax.main, with the calls of one function told to the parent."""
  name, pipe = argv[1], int(argv[2])
  sys.argv = ["cf_jax.main", *argv[3:]]
  from cf_jax import main

  for moment in MOMENTS:
    if moment.name == name:
      _announce(moment, pipe)
  main.main()


# -------------------------------------------------------------- in the parent


def _start(workdir: pathlib.Path, data: pathlib.Path, name: str, pipe: int):
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false",
  }
  with open(workdir.parent / f"{workdir.name}.log", "ab") as log:
    return subprocess.Popen(
      [
        sys.executable,
        "-c",
        "import sys; from benchmarks import kills; kills.child(sys.argv)",
        name,
        str(pipe),
        *SETTINGS,
        f"--workdir={workdir}",
        f"--config.data.cache_dir={data}",
        # Shared: a writer may be killed there too.
        f"--config.compilation_cache_dir={workdir.parent / 'xla'}",
      ],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=log,
      env=environment,
      pass_fds=[pipe] if pipe >= 0 else [],
    )


def _kill(workdir, data, name: str, rng: random.Random) -> dict:
  """Starts the run and kills it in a moment; it may end before."""
  moment = next(moment for moment in MOMENTS if moment.name == name)
  times, delay_s = rng.randint(1, moment.times), rng.uniform(0, moment.delay_s)
  sent = rng.choice(SIGNALS)
  read, write = os.pipe()
  process = _start(workdir, data, name, write)
  os.close(write)
  with open(read, "rb", buffering=0) as calls:
    met = sum(1 for _ in zip(range(times), iter(lambda: calls.read(1), b"")))
    if met == times:
      time.sleep(delay_s)
      process.send_signal(sent)
    code = process.wait()  # with the pipe open: it goes on to write
  asked = sent != signal.SIGKILL
  fits = {0, 75} if asked else {0, -9}
  if asked and moment.name == "start":
    fits |= {-15, -2, 130}  # before there is anything to save
  return {
    "moment": moment.name,
    "call": times,
    "delay_s": round(delay_s, 3),
    "signal": sent.name,
    "code": code,
    "killed": met == times and code != 0,
    "fits": code in fits,
  }


def _rows(path: pathlib.Path) -> list[dict]:
  return [
    {
      name: v
      for name, v in json.loads(line).items()
      if not MEASURED.match(name)
    }
    for line in path.read_text().splitlines()
  ]


def _newest(folder: pathlib.Path) -> pathlib.Path:
  steps = [path for path in folder.iterdir() if path.name.isdigit()]
  return max(steps, key=lambda path: int(path.name))


def differences(one: pathlib.Path, two: pathlib.Path) -> list[str]:
  """What two complete runs do not have in common, in words."""
  import jax
  import orbax.checkpoint as ocp

  found = []
  for stage in ("sft", "rl"):
    states = []
    for run in (one, two):
      with ocp.PyTreeCheckpointer() as reader:
        step = _newest(run / "checkpoints" / stage)
        states.append(reader.restore(step.absolute() / "state"))
    paths, other = jax.tree_util.tree_leaves_with_path(states[0]), states[1]
    for (path, a), b in zip(paths, jax.tree.leaves(other), strict=True):
      if np.asarray(a).tobytes() != np.asarray(b).tobytes():
        found.append(f"{stage}{jax.tree_util.keystr(path)}")
  if _rows(one / "metrics.jsonl") != _rows(two / "metrics.jsonl"):
    found.append("metrics.jsonl")
  for name in ("rollouts.jsonl", "predictions.jsonl"):
    if (one / name).read_bytes() != (two / name).read_bytes():
      found.append(name)
  results = [
    json.loads((run / "results.json").read_text()) for run in (one, two)
  ]
  for result in results:
    del result["timing"]
  if results[0] != results[1]:
    found.append("results.json")
  if not (two / "report.html").stat().st_size:
    found.append("report.html")
  data = two.with_name(f"{two.name}_data")
  left = [path.name for path in two.rglob("*.tmp")]
  left += [path.name for path in data.rglob(".*.mp4")]
  return found + [f"left behind: {name}" for name in left]


def _videos(data: pathlib.Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(data)): path.read_bytes()
    for path in data.rglob("*.mp4")
    if not path.name.startswith(".")
  }


def _complete(out: pathlib.Path, name: str) -> float:
  """Starts a run until it is complete; the seconds that it took."""
  begin = time.monotonic()
  code = _start(out / name, out / f"{name}_data", "-", -1).wait()
  if code:
    raise RuntimeError(f"{name} ended with code {code}; see {out}/{name}.log")
  return time.monotonic() - begin


def main() -> int:
  """One life after the other until there were enough kills.

  The exit code is 1 where something was lost.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", required=True, type=pathlib.Path)
  parser.add_argument("--kills", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  parser.add_argument("--seconds", type=float, default=1e9, help="ends early")
  args = parser.parse_args()
  begin, out = time.monotonic(), args.out.absolute()
  out.mkdir(parents=True, exist_ok=True)
  path = out / "kills.json"
  lives = json.loads(path.read_text()) if path.exists() else []
  if not (out / "straight" / "report.html").exists():
    print(f"undisturbed: {_complete(out, 'straight'):.0f} s", flush=True)

  def keep():
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(lives, indent=1) + "\n")
    partial.replace(path)

  def count():
    return sum(kill["killed"] for life in lives for kill in life["kills"])

  while time.monotonic() - begin < args.seconds:
    if not lives or "differences" in lives[-1]:
      if count() >= args.kills:
        break
      lives.append({"next": 0, "kills": []})
    life, name = lives[-1], f"life_{len(lives) - 1}"
    workdir, data = out / name, out / f"{name}_data"
    plan = PLANS[(len(lives) - 1) % len(PLANS)]
    if life["next"] < len(plan):
      rng = random.Random(f"{args.seed} {len(lives)} {life['next']}")
      life["kills"].append(_kill(workdir, data, plan[life["next"]], rng))
      life["next"] += 1
      print(count(), life["kills"][-1], flush=True)
    else:
      _complete(out, name)
      found = differences(out / "straight", workdir)
      if _videos(data) != _videos(out / "straight_data"):
        found.append("videos")
      bad = [kill for kill in life["kills"] if not kill["fits"]]
      found += [f"code {kill['code']} at {kill['moment']}" for kill in bad]
      life["differences"] = found
      print(name, found or "equal", flush=True)
    keep()

  done = [life for life in lives if "differences" in life]
  tried, lost = (
    # A start that ended otherwise than its signal says is one that was lost.
    sum(k["killed"] or not k["fits"] for life in part for k in life["kills"])
    for part in (done, [life for life in done if life["differences"]])
  )
  print(f"kills: tried {tried}, survived {tried - lost}, lost {lost}")
  return 1 if lost else 0


if __name__ == "__main__":
  sys.exit(main())
