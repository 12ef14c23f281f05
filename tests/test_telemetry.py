"""Metrics, rollouts, timers, progress and the manifest of a run."""

import io
import json
import logging as std_logging
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from absl import logging

from cf_jax import disk
from cf_jax.runtime import telemetry


def steps_of(path):
  return [(row["stage"], row["step"]) for row in telemetry.read_rows(path)]


def write_steps(workdir, resume, stage, first, last):
  with telemetry.MetricWriter(workdir, resume=resume) as writer:
    for step in range(first, last + 1):
      writer.write(step, stage, {"loss": 1.0 / step})
      writer.write_rollouts(step, stage, [{"prompt": "p"}, {"prompt": "q"}])


def events_of(workdir):
  """(tag, step) of every scalar in the event files, read without tensorflow."""
  from tensorboardX.proto import event_pb2

  found = []
  for path in (workdir / telemetry.EVENTS_FOLDER).glob("*.tfevents.*"):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      found += [(value.tag, event.step) for value in event.summary.value]
      data = data[16 + size :]
  return found


def test_rows_hold_stage_step_wall_time_and_the_metrics(tmp_path):
  with telemetry.MetricWriter(tmp_path, resume={}) as writer:
    writer.write(3, "rl", {"reward/mean": np.float32(0.5), "n": jnp.int32(2)})
  (row,) = telemetry.read_rows(tmp_path / telemetry.METRICS_FILE)
  assert row.pop("wall_s") >= 0
  assert row == {"stage": "rl", "step": 3, "reward/mean": 0.5, "n": 2}
  assert ("rl/reward/mean", 3) in events_of(tmp_path)


def test_a_row_is_in_the_file_before_the_writer_is_closed(tmp_path):
  writer = telemetry.MetricWriter(tmp_path, resume={})
  writer.write(1, "sft", {"loss": 1.0})
  assert steps_of(tmp_path / telemetry.METRICS_FILE) == [("sft", 1)]
  writer.close()
  writer.close()


def test_resume_doubles_nothing_and_misses_nothing(tmp_path):
  # Killed at rl update 5; the newest checkpoints are sft 4 and rl 3.
  write_steps(tmp_path, {}, "sft", 1, 4)
  write_steps(tmp_path, {"sft": 4}, "rl", 1, 5)
  write_steps(tmp_path, {"sft": 4, "rl": 3}, "rl", 4, 6)
  wanted = [("sft", step) for step in range(1, 5)]
  wanted += [("rl", step) for step in range(1, 7)]
  assert steps_of(tmp_path / telemetry.METRICS_FILE) == wanted
  twice = [key for key in wanted for _ in range(2)]
  assert steps_of(tmp_path / telemetry.ROLLOUTS_FILE) == twice
  losses = [step for tag, step in events_of(tmp_path) if tag == "rl/loss"]
  assert sorted(losses) == [1, 2, 3, 4, 5, 6]


def test_wall_time_goes_on_after_a_restart(tmp_path):
  path = tmp_path / telemetry.METRICS_FILE
  path.write_text('{"stage": "rl", "step": 1, "wall_s": 100.0}\n')
  write_steps(tmp_path, {"rl": 1}, "rl", 2, 2)
  assert 100 <= telemetry.read_rows(path)[-1]["wall_s"] < 160


def test_a_fresh_start_drops_rows_of_a_run_without_checkpoints(tmp_path):
  write_steps(tmp_path, {}, "sft", 1, 3)
  write_steps(tmp_path, {}, "sft", 1, 2)
  path = tmp_path / telemetry.METRICS_FILE
  assert steps_of(path) == [("sft", 1), ("sft", 2)]


def test_a_half_written_last_line_is_dropped(tmp_path):
  write_steps(tmp_path, {}, "rl", 1, 2)
  path = tmp_path / telemetry.METRICS_FILE
  with path.open("ab") as file:
    file.write(b'{"stage": "rl", "step": 3, "lo')
  assert steps_of(path) == [("rl", 1), ("rl", 2)]
  write_steps(tmp_path, {"rl": 2}, "rl", 3, 3)
  assert steps_of(path) == [("rl", 1), ("rl", 2), ("rl", 3)]


def test_a_bad_line_in_the_middle_is_named(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
  with pytest.raises(ValueError, match=r"rows.jsonl line 2"):
    telemetry.read_rows(path)


def test_non_finite_numbers_are_null_and_rows_are_valid_json(tmp_path):
  with telemetry.MetricWriter(tmp_path, resume={}) as writer:
    writer.write(1, "rl", {"kl": float("nan"), "top": np.inf})
  text = (tmp_path / telemetry.METRICS_FILE).read_text()
  row = json.loads(text, parse_constant=lambda name: pytest.fail(name))
  assert row["kl"] is None and row["top"] is None
  assert not {"rl/kl", "rl/top"} & {tag for tag, _ in events_of(tmp_path)}


@pytest.mark.parametrize(
  "metrics, words",
  [
    ({"loss": np.zeros(2)}, "must be one number"),
    ({"loss": "low"}, "must be one number"),
    ({"step": 1.0}, "taken"),
  ],
)
def test_what_is_no_metric_is_refused(tmp_path, metrics, words):
  with (
    telemetry.MetricWriter(tmp_path, resume={}) as writer,
    pytest.raises(ValueError, match=words),
  ):
    writer.write(1, "rl", metrics)


def test_rollouts_keep_any_text(tmp_path):
  text = 'line\nbreak "quote" \u2028 \U0001f3ac \ud83d'
  record = {
    "prompt": "p",
    "completion": text,
    "rewards": {"accuracy": 1.0},
    "keyframe_s": np.array([0.5, 1.25]),
  }
  with telemetry.MetricWriter(tmp_path, resume={}) as writer:
    writer.write_rollouts(2, "rl", [record])
  (row,) = telemetry.read_rows(tmp_path / telemetry.ROLLOUTS_FILE)
  assert row["completion"] == text
  assert row["keyframe_s"] == [0.5, 1.25]


def test_other_hosts_write_nothing(tmp_path):
  with telemetry.MetricWriter(
    tmp_path / "run", resume={}, active=False
  ) as writer:
    writer.write(1, "rl", {"loss": 1.0})
    writer.write_rollouts(1, "rl", [{}])
    writer.flush()
  assert not (tmp_path / "run").exists()


def test_the_writer_says_which_backend_it_is(tmp_path):
  with telemetry.MetricWriter(tmp_path, resume={}) as writer:
    assert "tensorboardX" in writer.backend or "clu" in writer.backend


def test_write_json_leaves_the_old_file_when_it_cannot_write(tmp_path):
  path = tmp_path / "deep" / "a.json"
  telemetry.write_json(path, {"a": np.arange(2), "b": (1, None)})
  assert json.loads(path.read_text()) == {"a": [0, 1], "b": [1, None]}

  def fail(file):
    file.write(b"half")
    raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"):
    disk.write(path, fail)
  assert json.loads(path.read_text())["a"] == [0, 1]
  assert [item.name for item in path.parent.iterdir()] == ["a.json"]


def test_phase_timer_gives_seconds_per_step_and_starts_anew(monkeypatch):
  clock = iter([0.0, 0.0, 1.0, 1.0, 4.0, 6.0, 6.0, 7.0, 7.0])
  monkeypatch.setattr(telemetry.time, "perf_counter", lambda: next(clock))
  timer = telemetry.PhaseTimer()
  with timer("decode"):
    pass
  timer.step()
  with timer("decode"):
    pass
  timer.count("decode", 200)
  timer.step()
  metrics = timer.collect()
  assert metrics == {
    "time/decode_s": 2.0,
    "time/step_s": 3.0,
    "rate/decode_per_s": 50.0,
  }
  assert timer.collect() == {"time/step_s": 1.0}


def test_what_is_outside_of_a_step_is_left_out(monkeypatch):
  clock = iter([0.0, 0.0, 5.0, 5.0, 6.0, 8.0, 8.0, 9.0, 9.0])
  monkeypatch.setattr(telemetry.time, "perf_counter", lambda: next(clock))
  timer = telemetry.PhaseTimer(telemetry.Peak(100.0, "by hand"))
  with timer.outside():
    pass
  with timer("update"):
    pass
  timer.flops("update", 60.0)
  timer.step()
  metrics = timer.collect()
  assert metrics["time/step_s"] == 3.0
  assert metrics["share/update"] == pytest.approx(1 / 3)
  assert metrics["mfu/step"] == pytest.approx(0.2)
  assert timer.collect()["time/step_s"] == 1.0


def test_utilisation_is_operations_over_the_peak(monkeypatch):
  clock = iter([0.0, 0.0, 2.0, 5.0, 5.0])
  monkeypatch.setattr(telemetry.time, "perf_counter", lambda: next(clock))
  timer = telemetry.PhaseTimer(telemetry.Peak(100.0, "by hand"))
  with timer("update"):
    pass
  timer.flops("update", 50.0)
  timer.flops("score", 25.0)  # its time was never taken
  timer.add("video", 4.0)
  timer.step()
  metrics = timer.collect()
  assert metrics == {
    "time/update_s": 2.0,
    "time/video_s": 4.0,
    "time/step_s": 5.0,
    "mfu/update": 0.25,
    "share/update": 0.4,
    "work/update": 2 / 3,
    "mfu/step": 0.15,
  }


class _Device:
  platform = "gpu"

  def __init__(self, kind):
    self.device_kind = kind


@pytest.mark.parametrize(
  ("kind", "dtype", "each"),
  [
    ("NVIDIA H200", "bfloat16", 989e12),
    ("NVIDIA A100-SXM4-40GB", "float32", 156e12),
    ("TPU v5 lite", "bfloat16", 197e12),
    ("TPU v5p", "bfloat16", 459e12),
  ],
)
def test_peak_of_a_known_device(monkeypatch, kind, dtype, each):
  devices = [_Device(kind)] * 4
  monkeypatch.setattr(telemetry.jax, "devices", lambda: devices)
  peak = telemetry.find_peak(dtype)
  assert peak.flops_per_s == 4 * each
  assert kind in peak.source and "data sheet" in peak.source


def test_peak_of_a_cpu_is_measured():
  peak = telemetry.find_peak("float32")
  assert 1e8 < peak.flops_per_s < 1e15
  assert "measured" in peak.source and "float32" in peak.source


@pytest.mark.parametrize(
  ("profile", "updates"), [("", None), ("2:3", (2, 3)), ("4:4", (4, 4))]
)
def test_updates_to_trace(profile, updates):
  assert telemetry.parse_updates(profile, 4) == updates


@pytest.mark.parametrize("profile", ["3", "3:2", "0:2", "4:5", "a:b", "1:2:3"])
def test_updates_that_cannot_be_traced(profile):
  with pytest.raises(ValueError, match=r"1 to 4.*config\.profile"):
    telemetry.parse_updates(profile, 4)


def test_tracer_traces_what_was_asked_for(monkeypatch, tmp_path):
  said, warned = [], []
  monkeypatch.setattr(
    telemetry.logging, "warning", lambda text, *args: warned.append(text % args)
  )
  monkeypatch.setattr(
    telemetry.jax.profiler,
    "start_trace",
    lambda folder, **_: said.append(("start", folder)),
  )
  monkeypatch.setattr(
    telemetry.jax.profiler, "stop_trace", lambda: said.append("stop")
  )
  start = ("start", tmp_path)
  for updates, steps, expected in (
    ((2, 3), range(1, 6), [1, start, 2, 3, "stop", 4, 5]),
    ((1, 4), range(3, 5), [start, 3, 4, "stop"]),  # went on, and ended
    ((1, 2), range(3, 5), [3, 4]),
  ):
    said.clear()
    with telemetry.Tracer(updates, tmp_path) as tracer:
      for number in steps:
        tracer.step(number)
        said.append(number)
    assert said == expected
  # The last of them came too late, and is told so once.
  (line,) = warned
  assert "updates 1 to 2" in line and "goes on at 3" in line
  said.clear()
  with telemetry.Tracer(None, tmp_path) as tracer:
    tracer.step(1)
  assert not said


def test_compile_counter_counts_after_warm_up_only():
  double = jax.jit(lambda x: x * 2)
  with telemetry.CompileCounter() as compiles:
    double(np.ones(3, np.float32))
    assert compiles.total == 1 and compiles.recompiles == 0
    compiles.mark_warm()
    double(np.ones(3, np.float32))
    assert compiles.recompiles == 0
    double(np.ones(4, np.float32))
    assert compiles.recompiles == 1 and "lambda" in compiles.names[0]
    compiles.mark_warm(False)
    double(np.ones(5, np.float32))
    assert compiles.recompiles == 1 and compiles.total == 3
  double(np.ones(6, np.float32))
  assert compiles.total == 3


def test_work_that_is_not_in_every_step_warms_up_once():
  double = jax.jit(lambda x: x * 2)
  with telemetry.CompileCounter() as compiles:
    with compiles.warm_up("early"):
      double(np.ones(3, np.float32))
    compiles.mark_warm()
    with compiles.warm_up("evaluate"):
      double(np.ones(4, np.float32))
    assert compiles.recompiles == 0
    for name, count in (("evaluate", 1), ("early", 2)):
      with compiles.warm_up(name):
        double(np.ones(4 + count, np.float32))
      assert compiles.recompiles == count
    double(np.ones(7, np.float32))
    assert compiles.recompiles == 3


def test_progress_without_a_terminal_is_log_lines(caplog):
  logging.get_absl_logger().addHandler(caplog.handler)
  try:
    caplog.set_level(std_logging.INFO)
    logging.set_verbosity(logging.INFO)
    console = rich.console.Console(file=io.StringIO(), force_terminal=False)
    with telemetry.progress(
      "cold start", 10, start=7, console=console, unit="update"
    ) as bar:
      for _ in range(3):
        bar.advance(loss=0.123456, arm="uniform")
  finally:
    logging.get_absl_logger().removeHandler(caplog.handler)
  lines = list(dict.fromkeys(record.getMessage() for record in caplog.records))
  assert len(lines) == 2, lines  # the first and the last of three
  assert lines[0].startswith("cold start: update 8 of 10")
  assert lines[1].startswith("cold start: update 10 of 10")
  assert lines[1].endswith("0:00 left; loss 0.1235  arm uniform")


def test_progress_on_a_terminal_is_a_bar_and_gives_the_log_back():
  file = io.StringIO()
  console = rich.console.Console(file=file, force_terminal=True, width=100)
  handler = logging.get_absl_handler().python_handler
  before = handler.stream
  with telemetry.progress("KF-GRPO", 4, console=console) as bar:
    bar.advance(2, reward=0.5)
    assert handler.stream is not before
  assert handler.stream is before
  shown = file.getvalue()
  assert "KF-GRPO" in shown and "2/4" in shown and "reward 0.5" in shown


def test_waiting_is_a_spinner_or_a_line(caplog):
  file = io.StringIO()
  console = rich.console.Console(file=file, force_terminal=True, width=100)
  before = logging.get_absl_handler().python_handler.stream
  with telemetry.waiting("loading [b]", console=console):
    pass
  assert logging.get_absl_handler().python_handler.stream is before
  assert "loading [b]" in file.getvalue()
  logging.get_absl_logger().addHandler(caplog.handler)
  try:
    console = rich.console.Console(file=io.StringIO(), force_terminal=False)
    with (
      caplog.at_level("INFO", logger="absl"),
      telemetry.waiting("loading", console=console),
    ):
      pass
  finally:
    logging.get_absl_logger().removeHandler(caplog.handler)
  assert "loading" in [record.getMessage() for record in caplog.records]


def test_an_inactive_host_shows_no_progress():
  file = io.StringIO()
  console = rich.console.Console(file=file, force_terminal=True)
  with telemetry.progress("x", 2, active=False, console=console) as bar:
    bar.advance()
  assert file.getvalue() == ""


@pytest.mark.parametrize(
  "seconds, text",
  [
    (0, "0:00"),
    (59.6, "1:00"),
    (65, "1:05"),
    (3725, "1:02:05"),
  ],
)
def test_clock(seconds, text):
  assert telemetry.clock(seconds) == text


def test_tables_print_their_cells_literally():
  console = rich.console.Console(file=io.StringIO(), width=80)
  telemetry.startup_table(
    "run", {"devices": "1 cpu", "budget": "[bold]8 x 4"}, console=console
  )
  telemetry.closing_table(
    "results", ["view", "sft"], [["uniform", 0.51239]], console=console
  )
  text = console.file.getvalue()
  assert "1 cpu" in text and "[bold]8 x 4" in text
  assert "uniform" in text and "0.5124" in text
  with pytest.raises(ValueError, match="2 cells, expected 1"):
    telemetry.closing_table("t", ["a"], [["b", 1]], console=console)


def test_manifest_adds_a_start_each_time(tmp_path):
  settings = {
    "config": {"tad": {"num_keyframes": 8}, "arms": ("a", "b")},
    "seed": 3,
    "data_hash": "3f9a",
  }
  telemetry.write_manifest(tmp_path, **settings, argv=["main", "--x"])
  manifest = telemetry.write_manifest(tmp_path, **settings, argv=["main"])
  assert manifest == telemetry.read_manifest(tmp_path)
  assert manifest["config"] == {"tad": {"num_keyframes": 8}, "arms": ["a", "b"]}
  assert manifest["seed"] == 3 and manifest["data_hash"] == "3f9a"
  assert [s["argv"] for s in manifest["starts"]] == [["main", "--x"], ["main"]]
  assert {"python", "jax", "numpy"} <= set(manifest["starts"][0]["versions"])
