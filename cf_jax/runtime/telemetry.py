"""What a run tells about itself: metrics, rollouts, times, tables, manifest.

Files of a workdir written here:
  metrics.jsonl   one row per logged step: stage, step, wall_s, name: number
  rollouts.jsonl  one row per kept rollout: stage, step, prompt, completion, ...
  tensorboard/    the same metrics as event files
  manifest.json   config, seed, data hash, and one entry per start of the run

A row belongs to (stage, step), where step counts the updates done in its stage.
After a restart the rows that the restored checkpoints do not cover are dropped
before anything is appended, so no step is doubled and none is missing.
"""

import collections
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.markup
import rich.progress
import rich.table
from absl import logging

from cf_jax import disk
from cf_jax.runtime import processes

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
MANIFEST_FILE = "manifest.json"
EVENTS_FOLDER = "tensorboard"

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_VERSIONED = (
  "cf_jax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "numpy",
  "opencv-python-headless",
  "tokenizers",
  "tensorflow-datasets",
)
# `max_tokens` and `judge.key_variable` are named like none.
_SECRET_NAME = re.compile(
  r"(?:(?:^|[._-])(?:key|pat|pass)|apikey|token|secret|passwd|password"
  r"|credentials?)(?:_id)?$",
  re.IGNORECASE,
)
_LEAST_SECRET = 8  # letters; shorter ones are in many words
_KNOWN_KEYS = re.compile(
  r"\b(?:sk-|hf_|gh[pousr]_|github_pat_|glpat-|xox[abpr]-|AKIA|AIza)[\w-]{8,}"
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_IN_QUERY = re.compile(
  r"(?<=[?&])((?:[\w.-]*[_.-])?(?:key|token|secret|password|signature)=)[^&\s]+",
  re.IGNORECASE,
)
_BEARER = re.compile(r"(?<=\bBearer )\s*[\w.~+/=-]{16,}", re.IGNORECASE)
_TABLE_BOX = rich.box.SIMPLE_HEAD


# ---------------------------------------------------------------- json files


def to_jsonable(value: Any) -> Any:
  """Plain lists, dicts, strings and numbers; a non-finite number is None.

  JSON has no NaN, and a file that only Python reads back is no record.
  """
  if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
    value = value.tolist()
  if isinstance(value, Mapping):
    return {str(key): to_jsonable(item) for key, item in value.items()}
  if isinstance(value, (list, tuple, set, frozenset)):
    return [to_jsonable(item) for item in value]
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if value is None or isinstance(value, (bool, int, str)):
    return value
  return str(value)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a whole JSON file or leaves the old one: never half of one."""
  disk.write_text(
    path, json.dumps(to_jsonable(value), indent=2, ensure_ascii=False) + "\n"
  )


def read_rows(path: str | os.PathLike) -> list[dict]:
  """Reads a .jsonl file; a missing file has no rows.

  A last line that a killed writer left half-written is left out.

  Raises:
    ValueError: an earlier line is not a JSON object.
  """
  return list(each_row(path))


def each_row(path: str | os.PathLike) -> Iterator[dict]:
  """`read_rows` one by one: for files that grow as long as a run goes on.

  Raises:
    ValueError: a line before the last is not a JSON object.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return
  with path.open("rb") as file:
    for number, line in enumerate(file, start=1):
      if not line.endswith(b"\n"):
        return
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        row = None
      if not isinstance(row, dict):
        raise ValueError(
          f"{path} line {number}: expected a JSON object, got"
          f" {line[:60]!r}; repair or remove the line"
        )
      yield row


# ------------------------------------------------------------------- writers


class MetricWriter:
  """Appends metrics and rollouts of a run to its workdir.

  Metrics go to metrics.jsonl and to TensorBoard event files: through
  `clu.metric_writers` where tensorflow can be imported, else tensorboardX.

  Args:
    workdir: folder of the run; made if missing.
    resume: stage -> step of the checkpoint that this start restored. Rows of
      later steps, and of stages not named, are dropped. `{}` for a fresh run.
    active: False on all hosts but the first, which then write nothing.

  Attributes:
    backend: which TensorBoard writer is in use, in words.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    resume: Mapping[str, int],
    active: bool = True,
  ):
    self.backend = "none (another host writes)"
    self._active = active
    if not active:
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    _keep_rows(workdir / METRICS_FILE, resume)
    _keep_rows(workdir / ROLLOUTS_FILE, resume)
    self._metrics = (workdir / METRICS_FILE).open("ab")
    self._rollouts = (workdir / ROLLOUTS_FILE).open("ab")
    # Event files cannot be cut at a step: they are written anew from the rows.
    events = workdir / EVENTS_FOLDER
    events.mkdir(exist_ok=True)
    for old in events.glob("*.tfevents.*"):
      old.unlink()
    self._events = _open_events(events)
    self.backend = self._events.backend
    wall_s = 0.0
    for row in each_row(workdir / METRICS_FILE):
      wall_s = max(wall_s, row.get("wall_s") or 0.0)
      self._write_events(row)
    self._events.flush()
    self._start = time.monotonic() - wall_s

  def write(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
    """Writes one row of scalars; it is handed to the system at once.

    Args:
      step: updates done in this stage.
      stage: "sft", "rl", ...
      metrics: name -> number (Python, numpy or a fetched 0-d array).

    Raises:
      ValueError: a metric that is no scalar or takes one of the row's own
        names.
    """
    if not self._active:
      return
    row = {
      "stage": str(stage),
      "step": int(step),
      "wall_s": round(time.monotonic() - self._start, 3),
    }
    for name, value in metrics.items():
      if name in row:
        raise ValueError(f"metric name {name!r} is taken; name it otherwise")
      value = to_jsonable(value)
      if value is not None and not isinstance(value, (bool, int, float)):
        raise ValueError(
          f"metric {name!r} must be one number, got {value!r}; reduce it"
          " before writing"
        )
      row[name] = value
    _append(self._metrics, row)
    self._write_events(row)

  def write_rollouts(
    self, step: int, stage: str, records: Sequence[Mapping[str, Any]]
  ) -> None:
    """Writes rollouts.

    Args:
      step: updates done in this stage when they were sampled.
      stage: "sft", "rl", ...
      records: each with `prompt`, `completion` (str), `rewards` (dict of
        number), `keyframe_s` (list of seconds), and whatever else is known
        (`sample_id`, `task`, `answer`, `advantage`, `view`, ...).
    """
    if not self._active:
      return
    for record in records:
      _append(
        self._rollouts,
        {"stage": str(stage), "step": int(step)} | to_jsonable(record),
      )

  def flush(self) -> None:
    """Forces everything to disk; call it before a checkpoint is saved."""
    if not self._active:
      return
    for file in (self._metrics, self._rollouts):
      file.flush()
      os.fsync(file.fileno())
    self._events.flush()

  def close(self) -> None:
    """Flushes and closes the files."""
    if not self._active:
      return
    self.flush()
    self._metrics.close()
    self._rollouts.close()
    self._events.close()
    self._active = False

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _write_events(self, row: Mapping[str, Any]) -> None:
    self._events.write(
      row["step"],
      {
        f"{row['stage']}/{name}": float(value)
        for name, value in row.items()
        if name not in ("stage", "step") and value is not None
      },
    )


def _append(file: Any, row: Mapping[str, Any]) -> None:
  file.write(_line(row))
  file.flush()


def _line(row: Mapping[str, Any]) -> bytes:
  return json.dumps(row).encode("ascii") + b"\n"


def _keep_rows(path: pathlib.Path, resume: Mapping[str, int]) -> None:
  """Cuts a .jsonl file down to the rows that the checkpoints cover."""
  if not path.exists():
    return

  def write(file):
    for row in each_row(path):
      if row.get("step", 0) <= resume.get(row.get("stage"), -1):
        file.write(_line(row))

  disk.write(path, write)


class _CluEvents:
  """Event files through clu, which needs tensorflow."""

  backend = "clu.metric_writers (tensorflow found)"

  def __init__(self, folder: pathlib.Path, metric_writers: Any):
    self._writer = metric_writers.SummaryWriter(str(folder))

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    self._writer.write_scalars(step, scalars)

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class _LightEvents:
  """Event files through tensorboardX, which needs no tensorflow."""

  backend = "tensorboardX (no tensorflow)"

  def __init__(self, folder: pathlib.Path):
    import tensorboardX  # here: not needed where clu serves

    self._writer = tensorboardX.SummaryWriter(str(folder))

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    for name, value in scalars.items():
      self._writer.add_scalar(name, value, step)

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


def _open_events(folder: pathlib.Path) -> _CluEvents | _LightEvents:
  try:
    from clu import metric_writers  # imports tensorflow, so never at the top
  except ImportError:
    return _LightEvents(folder)
  return _CluEvents(folder, metric_writers)


# --------------------------------------------------------------------- times


class Peak(NamedTuple):
  """What the devices can multiply at best.

  Attributes:
    flops_per_s: floating point operations a second, all devices together.
    source: where the number is from, in words.
  """

  flops_per_s: float
  source: str


# Dense matmuls of one device in bfloat16 and, as jax multiplies float32 unless
# told otherwise, in float32 (TPU: bfloat16 passes; GPU: TF32); from the makers'
# data sheets. A device is one whose kind starts with the name; the first wins.
_PEAK_FLOPS_PER_S = (
  ("TPU v4", 275e12, 275e12),
  ("TPU v5 lite", 197e12, 197e12),
  ("TPU v5e", 197e12, 197e12),
  ("TPU v5", 459e12, 459e12),  # v5p
  ("TPU v6 lite", 918e12, 918e12),
  ("TPU v6e", 918e12, 918e12),
  ("NVIDIA A100", 312e12, 156e12),
  ("NVIDIA H100 PCIe", 756e12, 378e12),
  ("NVIDIA H100 NVL", 835e12, 417e12),
  ("NVIDIA H100", 989e12, 494e12),
  ("NVIDIA H200", 989e12, 494e12),
  ("NVIDIA GH200", 989e12, 494e12),
  ("NVIDIA B200", 2250e12, 1125e12),
  ("NVIDIA L40S", 362e12, 183e12),
  ("NVIDIA L4", 121e12, 60e12),
)


def find_peak(dtype: str) -> Peak:
  """The devices' peak: from a table, or measured with one large matmul.

  Args:
    dtype: what the model's matmuls run in, "float32" or "bfloat16".
  """
  devices = jax.devices()
  kind = devices[0].device_kind
  for name, bfloat16, float32 in _PEAK_FLOPS_PER_S:
    if kind.startswith(name):
      each = bfloat16 if dtype == "bfloat16" else float32
      return Peak(
        each * len(devices), f"{len(devices)} x {kind}, {dtype}, data sheet"
      )
  size = 1024 if devices[0].platform == "cpu" else 8192
  square = jnp.ones((size, size), dtype)
  multiply = jax.jit(jnp.matmul)
  jax.block_until_ready(multiply(square, square))
  taken_s = []
  for _ in range(20):  # the best of many: others may use the machine
    begin = time.perf_counter()
    jax.block_until_ready(multiply(square, square))
    taken_s.append(time.perf_counter() - begin)
  # CPU devices are shares of one machine, all of which the matmul uses.
  count = 1 if devices[0].platform == "cpu" else len(devices)
  return Peak(
    2.0 * size**3 / min(taken_s) * count,
    f"{count} x {kind}, {dtype}, measured with a matmul of {size} x {size}",
  )


class PhaseTimer:
  """Seconds per step spent in named phases, and the work they did.

  JAX returns before a computation is done: end a phase with
  `jax.block_until_ready` or its time shows up in the next one.

  Args:
    peak: what utilisation is measured against, for `flops`.
    parts: processes that do the same work as this one on other rows; counts
      and operations are those of all.
  """

  def __init__(self, peak: Peak | None = None, *, parts: int = 1):
    self._peak = peak
    self._parts = parts
    self._reset()

  def _reset(self) -> None:
    self._seconds = collections.defaultdict(float)
    self._count = collections.defaultdict(float)
    self._flops = collections.defaultdict(float)
    self._steps = 0
    self._outside_s = 0.0
    self._begin = time.perf_counter()

  @contextlib.contextmanager
  def __call__(self, name: str) -> Iterator[None]:
    """Times a phase; it also carries the name into profiler traces."""
    begin = time.perf_counter()
    try:
      with jax.profiler.TraceAnnotation(name):
        yield
    finally:
      self._seconds[name] += time.perf_counter() - begin

  @contextlib.contextmanager
  def outside(self) -> Iterator[None]:
    """Leaves out of the step what is no part of it; between phases only."""
    begin = time.perf_counter()
    try:
      yield
    finally:
      self._outside_s += time.perf_counter() - begin

  def add(self, name: str, seconds: float) -> None:
    """Adds seconds of work that went on beside the other phases."""
    self._seconds[name] += seconds

  def flops(self, name: str, amount: float) -> None:
    """Adds matmul operations to phase `name`, for its utilisation."""
    self._flops[name] += amount * self._parts

  def count(self, name: str, amount: float) -> None:
    """Adds tokens (or frames) to phase `name`, for its rate."""
    self._count[name] += amount * self._parts

  def step(self) -> None:
    """Marks the end of one step."""
    self._steps += 1

  def collect(self) -> dict[str, float]:
    """Metrics since the last call, which starts a new interval.

    Returns:
      `time/<phase>_s` seconds per step, `time/step_s` the whole step with
      what no phase covers, what was `outside` left out, `rate/<phase>_per_s`
      where something was counted; where operations were counted,
      `mfu/<phase>` the share of the peak, `share/<phase>` the phase's share of
      the step's seconds and `work/<phase>` its share of the step's operations;
      and `mfu/step`, all operations in the whole step.
    """
    steps = max(self._steps, 1)
    metrics = {
      f"time/{name}_s": seconds / steps
      for name, seconds in self._seconds.items()
    }
    whole_s = time.perf_counter() - self._begin - self._outside_s
    metrics["time/step_s"] = whole_s / steps
    for name, amount in self._count.items():
      if self._seconds[name] > 0:
        metrics[f"rate/{name}_per_s"] = amount / self._seconds[name]
    all_flops = sum(self._flops.values())
    for name, amount in self._flops.items():
      best_s = amount / self._peak.flops_per_s
      if self._seconds[name] > 0:
        metrics[f"mfu/{name}"] = best_s / self._seconds[name]
        metrics[f"share/{name}"] = self._seconds[name] / whole_s
        metrics[f"work/{name}"] = amount / all_flops
    if self._flops:
      best_s = all_flops / self._peak.flops_per_s
      metrics["mfu/step"] = best_s / whole_s
    self._reset()
    return metrics


class CompileCounter:
  """Counts the XLA programs built while it is open.

  After `mark_warm` every further one is a recompile: a shape or a setting
  changed that should not have. A program read from the persistent compilation
  cache counts too, as it was traced and looked up anew.

  Attributes:
    total: programs since the counter was opened.
    recompiles: programs since `mark_warm`, 0 before it.
    names: names of the recompiled programs.
  """

  def __init__(self):
    self.total = 0
    self.recompiles = 0
    self.names: list[str] = []
    self._warm = False
    self._met = set()

  def _listen(self, event: str, _: float, **about) -> None:
    if event != _COMPILE_EVENT:
      return
    self.total += 1
    if self._warm:
      self.recompiles += 1
      self.names.append(str(about.get("fun_name", "?")))
      logging.warning("recompiled after warm-up: %s", self.names[-1])

  def mark_warm(self, warm: bool = True) -> None:
    """From here on a program is a recompile (or, with False, is not)."""
    self._warm = warm

  @contextlib.contextmanager
  def warm_up(self, name: str) -> Iterator[None]:
    """Around work that is not in every step: its first time is a warm-up.

    Args:
      name: of the work; from its second time on, programs are recompiles.
    """
    warm = self._warm
    self._warm = warm and name in self._met
    self._met.add(name)
    try:
      yield
    finally:
      self._warm = warm

  def __enter__(self) -> "CompileCounter":
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *_) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)


class Tracer:
  """Writes a profiler trace of some updates, for Perfetto and XProf.

  Used as a context, with one call of `step` where an update begins.

  Args:
    updates: (first, last), both traced; None traces nothing.
    folder: gets plugins/profile/<time>/ with *.xplane.pb (XProf) and
      perfetto_trace.json.gz (ui.perfetto.dev).
  """

  def __init__(
    self, updates: tuple[int, int] | None, folder: str | os.PathLike
  ):
    self._updates = updates
    self._folder = pathlib.Path(folder)
    self._running = False
    self._met = False
    self._annotation = contextlib.ExitStack()

  def step(self, number: int) -> None:
    """Says that update `number` begins; it starts and ends the trace."""
    if self._updates is None:
      return
    first, last = self._updates
    self._annotation.close()
    if number > last and not self._met:
      logging.warning(
        "config.profile asks for updates %d to %d; the run goes on at %d, and"
        " nothing is traced",
        first,
        last,
        number,
      )
    self._met = True
    if self._running and number > last:
      self._stop()
    elif not self._running and first <= number <= last:
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # phases are named; calls would bury them
      jax.profiler.start_trace(
        self._folder, create_perfetto_trace=True, profiler_options=options
      )
      self._running = True
    if self._running:
      self._annotation.enter_context(
        jax.profiler.StepTraceAnnotation("update", step_num=number)
      )

  def _stop(self) -> None:
    jax.profiler.stop_trace()
    self._running = False
    logging.info("trace of updates %d to %d: %s", *self._updates, self._folder)

  def __enter__(self) -> "Tracer":
    return self

  def __exit__(self, *_) -> None:
    self._annotation.close()
    if self._running:
      self._stop()


def parse_updates(profile: str, num_updates: int) -> tuple[int, int] | None:
  """Reads `config.profile`: "10:12" is (10, 12), "" is None.

  Args:
    profile: first and last update of a trace.
    num_updates: of the stage.

  Raises:
    ValueError: neither, or not updates of the stage.
  """
  if not profile:
    return None
  match = re.fullmatch(r"(\d+):(\d+)", profile)
  if not match or not 1 <= int(match[1]) <= int(match[2]) <= num_updates:
    raise ValueError(
      f"profile must be 'FIRST:LAST', updates of 1 to {num_updates}, got"
      f" {profile!r}; change config.profile"
    )
  return int(match[1]), int(match[2])


# ------------------------------------------------------------------ terminal


class Progress:
  """A running stage: call `advance` once per step."""

  def __init__(self, show: Callable[[int, str], None], start: int):
    self._show = show
    self._done = start

  def advance(self, amount: int = 1, **fields: Any) -> None:
    """Moves on; `fields` are shown beside the bar, numbers with 4 digits."""
    self._done += amount
    note = "  ".join(
      f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
      for name, value in fields.items()
    )
    self._show(self._done, note)


@contextlib.contextmanager
def progress(
  description: str,
  total: int,
  *,
  unit: str = "step",
  start: int = 0,
  active: bool = True,
  every_s: float = 15.0,
  console: rich.console.Console | None = None,
) -> Iterator[Progress]:
  """A progress bar with ETA; plain log lines where there is no terminal.

  Args:
    description: the stage, in a word or two.
    total: steps when the stage is done, those before `start` included.
    unit: what one step is called in the log lines.
    start: steps already done (by an earlier start of the run).
    active: False shows nothing (hosts but the first).
    every_s: seconds between log lines; the first and last are always shown.
    console: where to draw; standard error by default, as absl's log.

  Yields:
    Progress.
  """
  console = console or rich.console.Console(stderr=True)
  if not (active and processes.is_first()):
    yield Progress(lambda done, note: None, start)
  elif console.is_terminal:
    yield from _bar(description, total, start, console)
  else:
    yield Progress(_log_lines(description, total, unit, start, every_s), start)


def _bar(
  description: str, total: int, start: int, console: rich.console.Console
) -> Iterator[Progress]:
  bar = rich.progress.Progress(
    rich.progress.TextColumn("{task.description:<12}"),
    rich.progress.BarColumn(bar_width=28),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TextColumn("eta"),
    rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
    rich.progress.TextColumn("[dim]{task.fields[note]}"),
    console=console,
  )
  with _logged_above(bar):
    task = bar.add_task(description, total=total, completed=start, note="")
    yield Progress(
      lambda done, note: bar.update(task, completed=done, note=note), start
    )


@contextlib.contextmanager
def waiting(
  description: str, *, console: rich.console.Console | None = None
) -> Iterator[None]:
  """A spinner with a clock around one long step; a log line elsewhere.

  Args:
    description: what is waited for.
    console: where to draw; standard error by default.
  """
  console = console or rich.console.Console(stderr=True)
  if not console.is_terminal:
    logging.info("%s", description)
    yield
    return
  spinner = rich.progress.Progress(
    rich.progress.SpinnerColumn(),
    rich.progress.TextColumn("{task.description}"),
    rich.progress.TimeElapsedColumn(),
    console=console,
    transient=True,
  )
  with _logged_above(spinner):
    spinner.add_task(rich.markup.escape(description), total=None)
    yield


@contextlib.contextmanager
def _logged_above(drawn: rich.progress.Progress) -> Iterator[None]:
  """Draws, with log lines scrolling above.

  rich replaces sys.stderr for that; absl's handler still holds the old stream
  and would write into the drawing.
  """
  handler = logging.get_absl_handler().python_handler
  with drawn:
    stream, handler.stream = handler.stream, sys.stderr
    try:
      yield
    finally:
      handler.stream = stream


def _log_lines(
  description: str, total: int, unit: str, start: int, every_s: float
) -> Callable[[int, str], None]:
  begin = time.monotonic()
  shown = -math.inf

  def show(done, note):
    nonlocal shown
    now = time.monotonic()
    if now - shown < every_s and done < total:
      return
    shown = now
    pace_s = (now - begin) / max(done - start, 1)
    left = clock(pace_s * max(total - done, 0))
    logging.info(
      "%s: %s %d of %d, %.3g s each, %s left%s",
      description,
      unit,
      done,
      total,
      pace_s,
      left,
      note and f"; {note}",
    )

  return show


def clock(seconds: float) -> str:
  """`3725` as `1:02:05`, `65` as `1:05`."""
  minutes, second = divmod(round(seconds), 60)
  hour, minute = divmod(minutes, 60)
  if hour:
    return f"{hour}:{minute:02d}:{second:02d}"
  return f"{minute}:{second:02d}"


def startup_table(
  title: str,
  rows: Mapping[str, Any],
  *,
  console: rich.console.Console | None = None,
) -> None:
  """Prints what a run is about to do, one `name value` row each."""
  if not processes.is_first():
    return
  table = rich.table.Table(
    title=title, box=_TABLE_BOX, show_header=False, title_justify="left"
  )
  table.add_column(style="dim", no_wrap=True)
  table.add_column(overflow="fold")
  for name, value in rows.items():
    table.add_row(rich.markup.escape(name), rich.markup.escape(str(value)))
  (console or rich.console.Console()).print(table)


def closing_table(
  title: str,
  columns: Sequence[str],
  rows: Sequence[Sequence[Any]],
  *,
  console: rich.console.Console | None = None,
) -> None:
  """Prints the results: the first column is text, the others are numbers.

  Raises:
    ValueError: a row with more or fewer cells than there are columns.
  """
  if not processes.is_first():
    return
  table = rich.table.Table(title=title, box=_TABLE_BOX, title_justify="left")
  for number, column in enumerate(columns):
    table.add_column(
      rich.markup.escape(column), justify="right" if number else "left"
    )
  for row in rows:
    if len(row) != len(columns):
      raise ValueError(
        f"row {list(row)} has {len(row)} cells, expected {len(columns)}:"
        f" {list(columns)}"
      )
    table.add_row(
      *(
        rich.markup.escape(
          f"{cell:.4g}" if isinstance(cell, float) else str(cell)
        )
        for cell in row
      )
    )
  (console or rich.console.Console()).print(table)


# ------------------------------------------------------------------ manifest


def write_manifest(
  workdir: str | os.PathLike,
  *,
  config: Any,
  seed: int,
  data_hash: str,
  argv: Sequence[str] | None = None,
  peak: Peak | None = None,
) -> dict:
  """Writes manifest.json; a restart adds to its `starts`.

  Args:
    workdir: folder of the run.
    config: ConfigDict or dict.
    seed: of the run.
    data_hash: of the data settings, as the data set's cache names it.
    argv: command line; `sys.argv` by default. What may be a secret in it is
      left out (`without_secrets`).
    peak: what the run's utilisation is measured against.

  Returns:
    The manifest. `starts` has one entry per start: time, argv, versions, git
    revision, devices and their peak.
  """
  path = pathlib.Path(workdir) / MANIFEST_FILE
  earlier = read_manifest(workdir).get("starts") if path.exists() else []
  start = {
    "time": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
    "argv": without_secrets(sys.argv if argv is None else argv),
    "versions": versions(),
    "git": git_revision(),
    "devices": [str(device.device_kind) for device in jax.devices()],
    "peak": peak and peak._asdict(),
  }
  if hasattr(config, "to_dict"):
    config = config.to_dict()
  manifest = to_jsonable(
    {
      "config": config,
      "seed": seed,
      "data_hash": data_hash,
      "starts": [*(earlier or []), start],
    }
  )
  if processes.is_first():
    write_json(path, manifest)
  return manifest


def without_secrets(argv: Sequence[str]) -> list[str]:
  """A command line with `***` for what may be a secret.

  That is: the value of a flag that is named like one, the user and the
  password of an address, what looks like a key of a known service,
  and the value of an environment variable that is named like a secret.
  """
  held = [
    value
    for name, value in os.environ.items()
    if _SECRET_NAME.search(name) and len(value) >= _LEAST_SECRET
  ]
  made, hidden = [], False
  for entry in map(str, argv):
    name, equals, _ = entry.partition("=")
    is_flag = name.startswith("-")
    named = bool(is_flag and _SECRET_NAME.search(name))
    if hidden and not name.startswith("--"):  # a value may begin with "-"
      entry = "***"
    elif named and equals:
      entry = f"{name}=***"
    else:
      for value in held:
        entry = entry.replace(value, "***")
      entry = _IN_ADDRESS.sub("***", _KNOWN_KEYS.sub("***", entry))
      entry = _BEARER.sub("***", _IN_QUERY.sub(r"\1***", entry))
    hidden = named and not equals
    made.append(entry)
  return made


def read_manifest(workdir: str | os.PathLike) -> dict:
  """Reads manifest.json of a run.

  Raises:
    ValueError: it is not what `write_manifest` wrote.
  """
  path = pathlib.Path(workdir) / MANIFEST_FILE
  try:
    said = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{path} is damaged ({error}); put it back, or give another --workdir"
    ) from error
  if not isinstance(said, dict) or not isinstance(said.get("config"), dict):
    raise ValueError(
      f"{path} is damaged: it has no config; put it back, or give another"
      " --workdir"
    )
  return said


def versions() -> dict[str, str]:
  """Versions of Python, the system and the packages that decide numbers."""
  found = {"python": platform.python_version(), "system": platform.platform()}
  for name in _VERSIONED:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def git_revision() -> str | None:
  """Commit of the checkout this package lies in, `+` if files differ.

  None where the package is installed rather than checked out.
  """
  root = pathlib.Path(__file__).resolve().parents[2]
  if not (root / ".git").exists():
    return None

  def git(*command):
    return subprocess.run(
      ["git", "-C", str(root), *command],
      capture_output=True,
      text=True,
      timeout=20,
      check=True,
    ).stdout.strip()

  try:
    return git("rev-parse", "HEAD") + ("+" if git("status", "-s") else "")
  except (OSError, subprocess.SubprocessError):
    return None  # no git program, or a checkout without a commit
