"""The table of docs/scale.md: sizes and slices, each cell a plan.

  python -m benchmarks.plan_table --out=runs/plans --seconds=3600

Each cell is `cf_jax.main --config=configs/plan.py` in a process of its own,
kept in OUT/CELL/plan.json; a second call goes on where the first ended, and
`--seconds` begins no cell after so many. OUT/table.md says "unmeasured" for
cells that are not there. `--cells` takes a part of them, by a regular
expression on their names, `--programs` fewer programs of each.
"""

import json
import pathlib
import re
import subprocess
import sys
import time

from absl import app, flags

from cf_jax.programs import plan

_OUT = flags.DEFINE_string("out", "runs/plans", "results")
_SECONDS = flags.DEFINE_float("seconds", 3600.0, "to begin cells in")
_CELLS = flags.DEFINE_string("cells", "", "a regular expression")
_PROGRAMS = flags.DEFINE_string("programs", "update decode", "of each cell")

SIZES = ("3b", "7b", "32b")
SLICES = (
  "v5e:4x4",
  "v5e:8x8",
  "v5e:16x16",
  "v5p:2x4x4",
  "v5p:4x4x4",
  "v5p:4x8x8",
  "v6e:8x8",
  "v6e:16x16",
)
# Keyframes and slots of a prompt: 180 tokens a frame, its time, the question.
KEYFRAMES = {16: 3584, 64: 13312}
_GIB = 2.0**30


def cells() -> dict[str, list[str]]:
  """Name -> arguments of the planner."""
  made = {}
  for size in SIZES:
    for topology in SLICES:
      kind, shape = topology.split(":")
      chips = 1
      for side in shape.split("x"):
        chips *= int(side)
      for count, slots in KEYFRAMES.items():
        changes = (
          f"rl.prompts_per_step={chips} evaluation.batch_size={chips}"
          f" tad.num_keyframes={count} prompt.max_tokens={slots}"
        )
        made[f"{size}-{kind}-{shape}-k{count}"] = [
          f"--config.size=qwen2_5_vl_{size}",
          f"--config.topology={topology}",
          f"--config.changes={changes}",
        ]
  return made


def row(name: str, folder: pathlib.Path) -> str:
  """One line of the table."""
  path = folder / plan.RESULT_FILE
  size, kind, shape, frames = name.split("-")
  head = f"| {size.upper()} | {kind} {shape} | {frames[1:]} |"
  found = {"programs": []}
  if path.exists():
    found = json.loads(path.read_text("utf-8"))
  by_name = {each["program"]: each for each in found["programs"]}
  words = []
  for program in ("update", "decode"):
    columns = 4 if program == "update" else 3
    each = by_name.get(program)
    if each is None:
      words += ["unmeasured"] + ["-"] * (columns - 1)
      continue
    gib = "?"  # where the compiler refused it without a figure
    if each["peak_bytes"] is not None:
      gib = f"{each['peak_bytes'] / _GIB:.1f}"
    if not each["fits"]:
      gib = f"**{gib}, does not fit**"
    elif each.get("near"):
      gib += ", may not fit"
    words.append(gib)
    if "time" not in each:  # the compiler refused it
      words += ["-"] * (columns - 1)
      continue
    times = [each["time"][key] for key in ("bound_s", "serial_s")]
    words += ["-" if time_s is None else f"{time_s:.2f}" for time_s in times]
    if program == "update":
      share = each.get("mfu_bound")
      words.append(f"{100 * share:.0f} %" if share else "-")
  return f"{head} {' | '.join(words)} |"


def does_not_fit(folder: pathlib.Path, programs: str) -> bool:
  """Is there a whole plan, and does it say so?

  Args:
    folder: of a cell.
    programs: that were asked for, see `plan.named`; "": all of an update.
  """
  path = folder / plan.RESULT_FILE
  if not path.exists():
    return False
  found = json.loads(path.read_text("utf-8"))
  there = {each["program"] for each in found["programs"]}
  lacking = set(plan.named(programs)) - there
  if not programs:
    lacking = set(found["totals"].get("update_lacks", ["unknown"]))
  return not lacking and not found["totals"]["fits"]


def write(out: pathlib.Path) -> None:
  """The table of what is there."""
  lines = [
    "| model | slice | keyframes | update, GiB | bound, s | nothing hidden, s |"
    " MFU <= | decode, GiB | bound, s | nothing hidden, s |",
    "|---|---|---|---|---|---|---|---|---|---|",
    *(row(name, out / name) for name in cells()),
  ]
  (out / "table.md").write_text("\n".join(lines) + "\n", "utf-8")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  try:
    plan.check_compiler(SLICES[0])
  except ValueError as error:
    sys.exit(str(error))
  out, begin = pathlib.Path(_OUT.value), time.monotonic()
  out.mkdir(parents=True, exist_ok=True)
  for name, arguments in cells().items():
    if not re.search(_CELLS.value, name):
      continue
    if time.monotonic() - begin > _SECONDS.value:
      break
    print(name, flush=True)
    with (out / f"{name}.log").open("w") as log:
      code = subprocess.run(
        [
          sys.executable,
          *("-m", "cf_jax.main", "--config=configs/plan.py"),
          f"--config.programs={_PROGRAMS.value}",
          *arguments,
          f"--workdir={out / name}",
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
        check=False,
      ).returncode
    if code:
      # 1 is a plan that does not fit, and a planner that failed.
      refused = does_not_fit(out / name, _PROGRAMS.value)
      said = "does not fit" if refused else f"failed with exit code {code}"
      print(f"{name} {said}: {out / name}.log", flush=True)
    write(out)
  write(out)


if __name__ == "__main__":
  app.run(main)
