"""Disks that are full, folders that are gone, checkpoints of other times.

Each is one clear sentence, and nothing that was there is destroyed.
"""

import contextlib
import errno
import gc
import re
import resource
import signal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from cf_jax import disk, main
from cf_jax.data import synthetic
from cf_jax.programs import ask, keyframes, train
from cf_jax.runtime import checkpoint, lifecycle, telemetry
from cf_jax.types import TrainState

HOST = {"loader": {"next": 3}}


def _state(step, size=20_000):
  rng = np.random.default_rng(step)
  return TrainState(
    step=jnp.int32(step),
    params={"kernel": jnp.asarray(rng.normal(size=size), jnp.float32)},
    opt_state=(),
    rng=jax.random.key_data(jax.random.key(0)),
  )


def _assert_holds(folder, step):
  with checkpoint.Checkpoints(folder, keep=9, read_only=True) as store:
    state, host = store.restore(_state(0), step)
  np.testing.assert_array_equal(
    state.params["kernel"], _state(step).params["kernel"]
  )
  assert host == HOST


@contextlib.contextmanager
def _full_disk(size):
  """The system refuses to let any file grow past so many bytes."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


# ------------------------------------------------------------------ full disks


def test_a_checkpoint_on_a_full_disk(tmp_path):
  with checkpoint.Checkpoints(tmp_path / "rl", keep=2) as store:
    store.save(1, _state(1), HOST)
    store.wait()
    with _full_disk(4096), pytest.raises(OSError) as caught:
      store.save(2, _state(2), HOST)
      store.wait()
    said = str(caught.value)
    assert "could not be written" in said and str(tmp_path / "rl") in said
    assert "same command again" in said
  gc.collect()
  _assert_holds(tmp_path / "rl", 1)
  # With room again the next start goes on from there.
  with checkpoint.Checkpoints(tmp_path / "rl", keep=2) as store:
    assert store.latest_step() == 1
    store.save(2, _state(2), HOST)
  _assert_holds(tmp_path / "rl", 2)


def test_metrics_on_a_full_disk(tmp_path):
  with telemetry.MetricWriter(tmp_path, resume={}) as writer:
    writer.write(1, "rl", {"loss": 1.0})
    writer.flush()
    size = (tmp_path / telemetry.METRICS_FILE).stat().st_size
    with _full_disk(size + 10), pytest.raises(OSError, match="large"):
      writer.write(2, "rl", {"loss": 2.0})
  # The half-written row is dropped, also where more follows later.
  with telemetry.MetricWriter(tmp_path, resume={"rl": 1}) as writer:
    writer.write(2, "rl", {"loss": 2.0})
  rows = telemetry.read_rows(tmp_path / telemetry.METRICS_FILE)
  assert [row["step"] for row in rows] == [1, 2]


@pytest.mark.parametrize(
  ("number", "says"),
  [
    (errno.ENOSPC, "the disk is full: make room"),
    (errno.EROFS, "can only be read there"),
    (errno.EACCES, "permission is missing"),
    (errno.EEXIST, "a file is in the way"),
  ],
)
def test_troubles_are_said_in_words(number, says):
  said = main.explain_error(OSError(number, "os's word", "/runs/x/m.jsonl"))
  assert said.startswith("/runs/x/m.jsonl: ") and says in said
  assert "os's word" in said
  assert "the same command goes on from there" in said
  assert main.explain_error(ValueError("plain")) == "plain"


# ------------------------------------------------------- folders and data gone


def test_a_second_run_touches_nothing(tiny_config, tmp_path):
  tiny_config.lock()
  with lifecycle.Guard(tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match="is in use by process"):
      train.run(tiny_config, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("program", [ask, keyframes])
def test_other_programs_wait_for_nobody_either(program, tmp_path, monkeypatch):
  """`_run` would write; the video of the settings need not be there."""
  monkeypatch.setattr(program, "_run", lambda *_: pytest.fail("it ran"))
  monkeypatch.setattr(program, "check_settings", lambda _: None)
  monkeypatch.setattr(keyframes, "find_videos", lambda *_: [])
  config = ml_collections.ConfigDict({"video": "a.mp4"})
  with (
    lifecycle.locked(tmp_path),
    pytest.raises(ValueError, match="is in use by process"),
  ):
    program.run(config, tmp_path)


def test_a_workdir_that_can_only_be_read(tiny_config, tmp_path, monkeypatch):
  def on_a_read_only_disk(path, mode="r", *rest, opened=open, **how):
    if str(path).startswith(str(tmp_path)) and set(mode) & set("wxa+"):
      raise OSError(errno.EROFS, "Read-only file system", str(path))
    return opened(path, mode, *rest, **how)

  monkeypatch.setattr("builtins.open", on_a_read_only_disk)
  with pytest.raises(OSError, match="Read-only") as caught:
    train.run(tiny_config.lock(), tmp_path)
  assert "can only be read there" in main.explain_error(caught.value)
  assert not list(tmp_path.iterdir())


def test_a_report_that_fails_costs_no_update(tmp_path, monkeypatch, caplog):
  def fails(folder):
    raise TypeError("no number")

  monkeypatch.setattr(lifecycle.report, "write_report", fails)
  guard = lifecycle.Guard(report_every_s=1e-9)
  guard.advance(1, tmp_path)
  with caplog.at_level("ERROR"):
    assert guard.advance(2, tmp_path) == ""
  assert "could not be rebuilt" in caplog.text


@pytest.mark.parametrize(
  ("name", "value", "same"),
  [
    ("processes", 5, True),
    ("timeout_s", 7.0, True),
    ("processes", 0, False),  # then nobody hears the decoder's complaints
    ("accept_damaged", True, False),
  ],
)
def test_what_is_refused_may_not_change_between_starts(
  name, value, same, tiny_config, tmp_path
):
  def start():
    telemetry.write_manifest(
      tmp_path, config=tiny_config.to_dict(), seed=0, data_hash="", argv=[]
    )

  start()
  before = tiny_config.data.decode[name]
  assert tiny_config.data.decode.processes
  tiny_config.data.decode[name] = value
  if name == "processes":  # built-in videos are decoded in the run's own
    train.check_same_config(tiny_config, tmp_path)
  tiny_config.data.decode[name] = before
  tiny_config.data.source = "jsonl:videos"
  (tmp_path / telemetry.MANIFEST_FILE).unlink()
  start()
  tiny_config.data.decode[name] = value
  if same:
    train.check_same_config(tiny_config, tmp_path)
  else:
    with pytest.raises(ValueError, match=f"data.decode.{name}"):
      train.check_same_config(tiny_config, tmp_path)


def test_a_data_set_that_is_gone(tiny_config, tmp_path):
  tiny_config.data.source = f"jsonl:{tmp_path / 'gone'}"
  with pytest.raises(ValueError, match="no manifest at .*config.data.source"):
    train.run(tiny_config.lock(), tmp_path / "run")
  names = {p.name for p in (tmp_path / "run").iterdir()}
  assert names == {lifecycle.HEARTBEAT_FILE}


@pytest.mark.parametrize(
  "text", ["", "{", "[1]", "{}", '{"config": 3}', "\xff", '{"a":' * 60_000]
)
def test_a_damaged_manifest(text, tiny_config, tmp_path):
  path = tmp_path / telemetry.MANIFEST_FILE
  path.write_bytes(text.encode("latin1"))
  with pytest.raises(ValueError, match="manifest.json is damaged"):
    train.run(tiny_config, tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_built_in_set_without_its_index(tmp_path):
  (tmp_path / "DONE").touch()
  with pytest.raises(ValueError, match="index.*remove.*written anew"):
    synthetic.load(tmp_path, "train")


# ------------------------------------------------------------------ checkpoints


def _files(folder):
  return sorted(p for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("how", ["halved", "emptied", "removed"])
def test_a_damaged_checkpoint_says_where_to_go_on(how, tmp_path):
  folder = tmp_path / "rl"
  with checkpoint.Checkpoints(folder, keep=2) as store:
    for step in (2, 4):
      store.save(step, _state(step), HOST)
  largest = max(_files(folder / "4" / "state"), key=lambda p: p.stat().st_size)
  data = largest.read_bytes()
  if how == "removed":
    largest.unlink()
  else:
    largest.write_bytes(data[: len(data) // 2] if how == "halved" else b"")
  listed = _files(folder)
  with checkpoint.Checkpoints(folder, keep=2) as store:
    with pytest.raises(ValueError) as caught:
      store.restore(_state(0))
    said = str(caught.value)
    assert "checkpoint 4" in said and "cannot be read" in said
    assert f"move {folder / '4'} away to go on from step 2" in said
  gc.collect()
  assert _files(folder) == listed  # nothing is destroyed
  (folder / "4").rename(tmp_path / "away")
  _assert_holds(folder, 2)


def test_checkpoints_of_another_version(tmp_path, monkeypatch):
  with checkpoint.Checkpoints(tmp_path, keep=3) as store:
    store.save(1, _state(1), HOST)
    monkeypatch.setattr(checkpoint, "FORMAT", 7)
    store.save(2, _state(2), HOST)
    store.wait()
    monkeypatch.undo()
    _, host = store.restore(_state(0), 1)
    with pytest.raises(ValueError, match="has no 'moments'.*another version"):
      host["moments"]
    with pytest.raises(ValueError, match="of format 7.*reads 2.*manifest.json"):
      store.restore(_state(0), 2)


def test_a_damaged_host_state_is_found(tmp_path):
  """Valid JSON, another number: the arrays' checksums do not cover it."""
  with checkpoint.Checkpoints(tmp_path, keep=1) as store:
    store.save(1, _state(1), HOST)
    store.wait()
    holds = [
      path
      for path in _files(tmp_path / "1" / "host")
      if b'"next": 3' in path.read_bytes()
    ]
    (path,) = holds
    path.write_text(path.read_text().replace('"next": 3', '"next": 4'))
    with pytest.raises(ValueError, match="host state of checkpoint 1.*damaged"):
      store.restore(_state(0))


def test_a_host_state_that_is_no_object(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=1) as store:
    store.save(1, _state(1), HOST)
    store.wait()
    for path in _files(tmp_path / "1" / "host"):
      if b'"next": 3' in path.read_bytes():
        path.write_text("[1]")
    _, host = store.restore(_state(0))
    with pytest.raises(ValueError, match="checkpoint 1 .* has no 'loader'"):
      host["loader"]


def test_what_a_killed_writer_left_is_cleaned_up_by_its_own_run(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=1) as store:
    store.save(1, _state(1), HOST)
  left = tmp_path / "2.orbax-checkpoint-tmp"
  left.mkdir()
  with checkpoint.Checkpoints(tmp_path, keep=1, read_only=True) as store:
    assert store.latest_step() == 1
  assert left.exists()  # whoever reads may not know that the writer is dead
  with checkpoint.Checkpoints(tmp_path, keep=1) as store:
    store.save(3, _state(3), HOST)  # waits for the broom
  assert not left.exists()


def test_a_checkpoint_is_forced_to_disk_before_it_has_its_name(
  tmp_path, monkeypatch
):
  """A power cut after an older one is removed must find the newer one whole."""
  forced, sync = set(), disk.sync
  monkeypatch.setattr(disk, "sync", lambda p: (forced.add(p), sync(p))[1])
  moved = tmp_path / "0.damaged"  # as the error of a damaged one advises
  moved.mkdir()
  (moved / "link").symlink_to("nowhere")
  with checkpoint.Checkpoints(tmp_path, keep=1) as store:
    store.save(1, _state(1), HOST)
    store.wait()
  kept = tmp_path / "1"
  within = {
    "/".join(path.relative_to(tmp_path).parts[1:])
    for path in forced
    if path != tmp_path and path.parts[len(tmp_path.parts)] != "1"
  }
  named = {
    str(path.relative_to(kept))
    for path in kept.rglob("*")
    if path.name != "commit_success.txt" and path.is_file()
  }
  assert named and named <= {re.sub(r"\.orbax.*?(?=/)", "", p) for p in within}
  assert tmp_path in forced


def test_the_best_are_kept_beside_the_newest(tmp_path):
  scores = {1: 0.5, 2: 0.9, 3: None, 4: float("nan"), 5: 0.7, 6: 0.1}
  settings = dict(keep=2, keep_best=2, best_metric="dev_accuracy")
  with checkpoint.Checkpoints(tmp_path, **settings) as store:
    assert store.best_step() is None
    for step, score in scores.items():
      metrics = {"loss": 1.0}
      if score is not None:
        metrics["dev_accuracy"] = np.float32(score)
      store.save(step, _state(step), HOST, metrics)
    store.wait()
    assert store.best_step() == 2 and store.latest_step() == 6
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "5", "6"]
  # Another start counts on.
  with checkpoint.Checkpoints(tmp_path, **settings) as store:
    store.save(7, _state(7), HOST, {"dev_accuracy": 0.8})
    store.wait()
    assert store.best_step() == 2
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "6", "7"]


def test_a_best_metric_that_is_never_measured(tmp_path):
  settings = dict(keep=2, keep_best=2, best_metric="dev_acuracy")
  with checkpoint.Checkpoints(tmp_path, **settings) as store:
    with pytest.raises(ValueError, match="did you mean 'dev_accuracy'") as told:
      store.check_metric(["loss", "dev_accuracy"])
    assert "config.checkpoint.best_metric='dev_acuracy'" in str(told.value)
  with checkpoint.Checkpoints(
    tmp_path, **settings | {"best_metric": "loss"}
  ) as store:
    store.check_metric(["loss"])
  with checkpoint.Checkpoints(tmp_path, **settings | {"keep_best": 0}) as store:
    store.check_metric(["loss"])  # it is not asked for


@pytest.mark.parametrize("complete", [True, False])
def test_a_signal_during_the_last_report(
  complete, tiny_config, tmp_path, monkeypatch
):
  """All is computed and kept then: there is nothing to go on with."""

  def run(config, workdir, guard):
    (workdir / telemetry.METRICS_FILE).write_text(
      '{"stage": "rl", "step": 1, "loss": 1.0}\n'
    )
    if complete:
      telemetry.write_json(workdir / "results.json", {})
    guard.enter("report")
    signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(train, "_run", run)
  if complete:
    train.run(tiny_config.lock(), tmp_path)
    assert train.is_complete(tmp_path)
  else:
    with pytest.raises(lifecycle.Stopped, match="SIGTERM while at: report"):
      train.run(tiny_config.lock(), tmp_path)
  assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
  "settings", [dict(keep=0), dict(keep=1, keep_best=1, best_metric="")]
)
def test_settings_of_checkpoints(settings, tmp_path):
  with pytest.raises(ValueError, match="config.checkpoint.keep"):
    checkpoint.Checkpoints(tmp_path, **settings)
