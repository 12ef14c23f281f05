"""Runs the points of a config's `sweep`, one after the other, and tells.

  python -m launch.sweep --config=configs/contrasts.py --out=runs/contrasts

A config with a sweep has, beside `get_config`, a function

  def sweep(add):
    add("seed_0/grpo", arg="grpo", seed=0, **{"data.seed": 0})

`add` takes the point's name (its folder under --out), the config's argument and
overrides by dotted name. In a text, `{out}` stands for --out: a point may start
from an earlier one (`{"sft.from_run": "{out}/seed_0/cold_start"}`), so points
run in the order they were added. A point that is finished is not run again; one
that was interrupted goes on from its checkpoint. A point that fails is said and
the others go on; the exit code is then 1.

After every point OUT/sweep.json (each point's settings and results) and
OUT/sweep.md (held-out accuracy by view and task) are written anew. The same
command may run several times at once, on one machine or on several with a
common folder: a point that another is running is passed over, and one that
starts from it waits. `--points` takes a part of them, by a regular expression
on the names.
"""

import argparse
import contextlib
import fcntl
import json
import pathlib
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from cf_jax import disk

STOPPED = 75  # of cf_jax.main, as docs/reliability.md has it
_WAIT_S = 5.0  # between looks at what others run


class Point(NamedTuple):
  """One run of a sweep."""

  name: str
  arg: str | None
  overrides: dict[str, Any]


def collect(sweep: Callable) -> list[Point]:
  """The points that a config's `sweep` adds.

  Raises:
    ValueError: a name given twice, or one that is no relative path.
  """
  points: list[Point] = []

  def add(name: str, *, arg: str | None = None, **overrides) -> None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or ".." in name:
      raise ValueError(
        f"a point's name is words with slashes between, got {name!r}"
      )
    if name in {point.name for point in points}:
      raise ValueError(f"two points are named {name!r}")
    points.append(Point(name, arg, overrides))

  sweep(add)
  return points


def command(point: Point, config: str, out: pathlib.Path) -> list[str]:
  """The command line of a point."""

  def text(value):
    return value.replace("{out}", str(out)) if isinstance(value, str) else value

  return [
    sys.executable,
    "-m",
    "cf_jax.main",
    f"--config={config}" + (f":{point.arg}" if point.arg else ""),
    f"--workdir={out / point.name}",
    *(
      f"--config.{key}={text(value)}" for key, value in point.overrides.items()
    ),
  ]


def needs(point: Point, names: Iterable[str]) -> set[str]:
  """Those of the points in whose folders the point's settings lie."""
  texts = [text for text in point.overrides.values() if isinstance(text, str)]
  paths = {p for text in texts for p in re.findall(r"{out}/([\w./-]+)", text)}
  return {
    name
    for name in names
    if any(f"{path}/".startswith(f"{name}/") for path in paths)
  }


@contextlib.contextmanager
def claimed(point: Point, out: pathlib.Path) -> Iterator[bool]:
  """Whether the point is this process' to run; another may be running it."""
  folder = out / "claims"
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / point.name.replace("/", "~")).open("a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      yield False
    else:
      yield True


def is_finished(workdir: pathlib.Path) -> bool:
  """A run writes its results last, and then a report of them."""
  return (workdir / "results.json").is_file()


def table(done: Sequence[tuple[Point, dict]]) -> str:
  """Markdown: a row for every point, stage and view that was evaluated."""
  tasks = sorted(
    {
      row["task"]
      for _, results in done
      for row in results.get("evaluations", ())
      if row["task"] != "all"
    }
  ) + ["all"]
  lines = [
    "Held-out accuracy, %.",
    "",
    "| point | stage | view | " + " | ".join(tasks) + " |",
    "|---|---|---|" + "---|" * len(tasks),
  ]
  for point, results in done:
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in results.get("evaluations", ()):
      key = row["stage"], row["view"]
      cells.setdefault(key, {})[row["task"]] = row["accuracy"]
    for (stage, view), at in cells.items():
      shown = [f"{100 * at[t]:.1f}" if t in at else "" for t in tasks]
      lines.append(
        f"| {point.name} | {stage} | {view} | " + " | ".join(shown) + " |"
      )
  return "\n".join(lines) + "\n"


def write(points: Sequence[Point], out: pathlib.Path) -> None:
  """sweep.json and sweep.md of the points that are finished."""
  done = [
    (point, json.loads((out / point.name / "results.json").read_text("utf-8")))
    for point in points
    if is_finished(out / point.name)
  ]
  made = [point._asdict() | {"results": results} for point, results in done]
  for name, text in (
    ("sweep.json", json.dumps(made, indent=1) + "\n"),
    ("sweep.md", table(done) if done else "no point is finished yet\n"),
  ):
    disk.write_text(out / name, text)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs what is missing; the exit code is 1 where a point failed."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", required=True)
  parser.add_argument("--out", required=True, type=pathlib.Path)
  parser.add_argument("--points", default="", help="regular expression")
  args = parser.parse_args(argv)
  found = runpy.run_path(args.config)
  if "sweep" not in found:
    parser.error(f"{args.config} has no sweep(add)")
  points = collect(found["sweep"])
  mine = [point for point in points if re.search(args.points, point.name)]
  if not mine:
    names = ", ".join(point.name for point in points[:5])
    parser.error(f"--points={args.points} matches none of {names}, ...")
  args.out.mkdir(parents=True, exist_ok=True)
  out = args.out.absolute()
  failed: list[str] = []
  spent, ran, waiting = 0.0, 0, False
  names = {point.name for point in points}

  def missing() -> list[Point]:
    return [
      point
      for point in mine
      if point.name not in failed and not is_finished(out / point.name)
    ]

  print(f"{len(mine)} points, {len(missing())} to run", flush=True)
  while left := missing():
    for point in left:
      lacks = {
        name for name in needs(point, names) if not is_finished(out / name)
      }
      if broken := lacks & set(failed):
        failed.append(point.name)
        print(
          f"{point.name} starts from {min(broken)}, which failed", flush=True
        )
        break
      if foreign := lacks - {other.name for other in mine}:
        # Not this command's to run: another one may be at it.
        start = next(p for p in points if p.name == min(foreign))
        with claimed(start, out) as is_free:
          if is_free and not is_finished(out / start.name):
            failed.append(point.name)
            print(
              f"{point.name} starts from {start.name}, which is not finished"
              " and not among --points",
              flush=True,
            )
            break
        continue
      if lacks:
        continue
      with claimed(point, out) as is_mine:
        if not is_mine or is_finished(out / point.name):
          continue
        about = (
          f", about {spent / ran * len(left) / 60:.0f} min left" if ran else ""
        )
        print(f"[{len(left)} to run] {point.name}{about}", flush=True)
        begin = time.monotonic()
        code = subprocess.run(command(point, args.config, out)).returncode
      spent, ran, waiting = spent + time.monotonic() - begin, ran + 1, False
      if code in (130, -2):
        return 130
      if code == STOPPED:
        print("stopped; the same command goes on from there", flush=True)
        return code
      if code or not is_finished(out / point.name):
        failed.append(point.name)
        print(f"{point.name} failed with exit code {code}", flush=True)
      write(points, out)
      break
    else:
      if not waiting:
        others = ", ".join(point.name for point in left)
        print(f"waiting for what others run: {others}", flush=True)
      waiting = True
      time.sleep(_WAIT_S)
  write(points, out)
  print((out / "sweep.md").read_text("utf-8"))
  if failed:
    print(f"failed: {', '.join(failed)}", file=sys.stderr)
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
