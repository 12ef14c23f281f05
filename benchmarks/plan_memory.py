"""Is the memory that a plan says the memory that a program takes? On CPUs.

  python -m benchmarks.plan_memory --out=runs/plan_memory.json

Compiles programs of a small run as `cf_jax.programs.plan` does, runs each in a
process of its own and compares what the compiler said beforehand (temporary
memory and results) with the rise of the highest resident memory. It says
whether the method counts the right things; nothing about a TPU's memory, whose
compiler lays arrays out in another way.

"Said" is `memory_analysis`, as with config.machine_code=True. Plans for TPUs
take `hlo.assigned` of the buffer assignment by default: "assigned", beside it.
Decoding is not among the programs.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from absl import app, flags

from cf_jax.programs import plan
from cf_jax.runtime import chips, hlo
from configs import kfgrpo_cpu

_OUT = flags.DEFINE_string("out", "", "results as JSON")
_PROGRAM = flags.DEFINE_string("program", "", "one of them, in this process")

PROGRAMS = ("vision", "prefill", "score", "reference", "update")


def small_run():
  """Some 40M parameters, so that what a process has anyway is small."""
  config = kfgrpo_cpu.get_config()
  config.model = dict(
    size="tiny",
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    mrope_section=(8, 12, 12),
    vision=dict(out_hidden_size=512, hidden_size=256, intermediate_size=768),
  )
  config.data.reader.size_px = (224, 224)
  config.prompt.max_tokens = 640
  config.sampling.update(num_completions=8, max_tokens=64)
  config.rl.prompts_per_step = 4
  return config


def _status(name: str) -> int:
  text = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", text).group(1))


def measure(name: str) -> dict[str, float]:
  """Said and measured bytes of one program."""
  where = chips.open_slice("cpu:1", 1)
  experiment = plan.describe(small_run(), "", where, pathlib.Path())
  stream = plan.programs(experiment, plan.Shapes(experiment))
  program = next(stream)
  while program.name != name:
    traced = program.step.trace(*program.args, **program.static)
    program = stream.send(traced.out_info)
  lowered = program.step.trace(*program.args, **program.static).lower()
  with tempfile.TemporaryDirectory() as folder:
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    compiled = lowered.compile(compiler_options=options)
    (path,) = pathlib.Path(folder).glob("*_optimizations-buffer-assignment.txt")
    buffers = hlo.assigned(path.read_text("utf-8"))
  memory = plan.memory_of(compiled)
  fill = jax.jit(
    lambda: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), program.args)
  )
  args = jax.block_until_ready(fill())
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the highest
  before = _status("VmRSS")
  made = jax.block_until_ready(compiled(*args, **_arrays(program.static)))
  rise = _status("VmHWM") - before
  del made
  said = memory["temporary"] + memory["results"]
  return {
    "program": name,
    "said": said,
    "assigned": buffers["temporary"] + buffers["results"],
    "rose": rise,
    "ratio": rise / said,
  }


def _arrays(static):
  """Of the keyword arguments those that are no constants of the program."""
  return {k: v for k, v in static.items() if not isinstance(v, int)}


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  if _PROGRAM.value:
    print(json.dumps(measure(_PROGRAM.value)))
    return
  rows = []
  for name in PROGRAMS:
    ran = subprocess.run(
      [sys.executable, "-m", "benchmarks.plan_memory", f"--program={name}"],
      capture_output=True,
      text=True,
      check=False,
    )
    if ran.returncode:
      raise RuntimeError(ran.stderr[-2000:])
    rows.append(json.loads(ran.stdout.splitlines()[-1]))
    row = rows[-1]
    print(
      f"{name:10} said {row['said'] / 2**20:8.1f} MiB, assigned"
      f" {row['assigned'] / 2**20:8.1f} MiB, rose"
      f" {row['rose'] / 2**20:8.1f} MiB, {row['ratio']:.2f}",
      flush=True,
    )
  if _OUT.value:
    path = pathlib.Path(_OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
  app.run(main)
