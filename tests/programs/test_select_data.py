"""Selection: the rule by hand, and a run that is cut off, resumed, asked again.

So small a policy never answers right: a judge of the tests says who did.
"""

import json
import shutil

import cv2
import ml_collections
import numpy as np
import pytest

from cf_jax.data import records
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import select_data, verdicts
from tests.conftest import load_config, shrink

LIMITS = dict(min_best=0.5, min_spread=0.1)


def _sample(kind):
  options = ("a", "b") if kind == "multiple_choice" else ()
  return records.Sample("i", "v", "q", options, "A", kind=kind)


@pytest.mark.parametrize(
  ("kind", "scores", "expected"),
  [
    ("multiple_choice", (1, 1, 1, 1), "all right"),
    ("multiple_choice", (0, 0, 0, 0), "all wrong"),
    ("multiple_choice", (0, 0, 0, 1), "kept"),
    ("grounded_qa", (1, 1, 0, 1), "kept"),
    # A regression is right from 0.5 on.
    ("regression", (0.9, 0.6, 0.5, 1), "all right"),
    ("regression", (0.4, 0.4, 0.0, 0.0), "kept"),
    ("free_form", (0.3, 0.3, 0.35, 0.3), "all wrong"),
    ("free_form", (0.3, 0.9, 0.3, 0.3), "kept"),
    # Standard deviations 0.25, 0.1, 0.05 and 0.2.
    ("interval", (0.0, 0.5, 0.5, 0.0), "kept"),
    ("interval", (0.4, 0.6, 0.6, 0.4), "kept"),
    ("interval", (0.6, 0.7, 0.7, 0.6), "consistent"),
    ("tracking", (0.0, 0.4, 0.4, 0.0), "no good answer"),
    ("interval", (0, 0, 0, 0), "no good answer"),
    ("interval", (1, 1, 1, 1), "consistent"),
    ("caption", (0, 1, 0, 1), "kept"),
  ],
)
def test_the_rule(kind, scores, expected):
  # A hair below 0.1, where rounding would decide.
  limits = LIMITS | {"min_spread": 0.0999}
  assert select_data.decide(scores, _sample(kind), **limits) == expected


@pytest.mark.parametrize(
  ("kind", "scores", "expected"),
  [
    ("multiple_choice", (0, 0, 0), "all wrong"),
    ("multiple_choice", (1, 1, 1), "all right"),
    ("multiple_choice", (0, 0, 1), "kept"),
    ("open_ended", (0, 0, 0), "all wrong"),
    # The standard deviation of three times 0.3 is 6e-17.
    ("free_form", (0.3, 0.3, 0.3), "all wrong"),
    ("free_form", (0.3, 0.3, 0.301), "kept"),
    ("regression", (0.0, 0.0, 0.0), "all wrong"),
    ("interval", (0.6, 0.6, 0.6), "consistent"),
    ("interval", (0.6, 0.6, 0.601), "kept"),
    ("caption", (1, 1, 1), "consistent"),
  ],
)
def test_equal_answers_never_differ(kind, scores, expected):
  limits = LIMITS | {"min_spread": 0.0}
  assert select_data.decide(scores, _sample(kind), **limits) == expected


def _config(cache_dir):
  config = load_config("configs/select_data.py", "smoke")
  trained = ("rl", "contrast", "report")  # what `shrink` shrinks too
  for name in trained:
    config[name] = ml_collections.ConfigDict()
  shrink(config, cache_dir)
  for name in trained:
    del config[name]
  config.sft.update(max_steps=1, eval_every=1, checkpoint_every=1)
  config.sampling.update(num_completions=4, max_tokens=32)
  config.evaluation.batch_size = 4
  config.data.max_skip_fraction = 0.1  # one of 16
  return config


def _make_judge(experiment):
  """Calls an answer right by the sum of its tokens."""
  real = verdicts_make_judge(experiment)

  def read(prepared, token, mask):
    found = real(prepared, token, mask)
    right = ((token * mask).sum(axis=-1) % 2).astype(np.float32)
    right[prepared.batch.sample_index % 4 == 0] = 0
    component = dict.fromkeys(found.component, right)
    return found.replace(component=component)

  return read


verdicts_make_judge = verdicts.make_judge


@pytest.fixture(scope="module")
def folder(cache_dir, tmp_path_factory):
  """The built-in set as manifests; one training video is no video."""
  config = _config(cache_dir)
  samples = experiment_lib.load_samples(
    source="synthetic",
    cache_dir=config.data.cache_dir,
    synthetic_set=dict(config.data.synthetic),
    seed=0,
  )
  folder = tmp_path_factory.mktemp("manifests")
  (folder / "broken.mp4").write_text("no video")
  broken = str(folder / "broken.mp4")
  samples["train"][5] = samples["train"][5]._replace(video=broken)
  for split, rows in samples.items():
    (folder / f"{split}.jsonl").write_text(records.to_jsonl(rows))
  return folder


def _run(cache_dir, folder, workdir, **changes):
  config = _config(cache_dir)
  config.data.source = f"jsonl:{folder}"
  config.data.allow_outside = True  # the videos of the built-in set
  config.update_from_flattened_dict(changes)
  select_data.run(config.lock(), workdir)


@pytest.fixture(scope="module")
def straight(cache_dir, folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("straight") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(verdicts, "make_judge", _make_judge)
    _run(cache_dir, folder, workdir)
  return workdir


def _rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_nothing_is_lost(straight, folder):
  train = records.load_jsonl(folder / "train.jsonl", allow_outside=True)
  scores = _rows(straight / "scores.jsonl")
  assert [row["id"] for row in scores] == [sample.id for sample in train]
  kept = records.load_jsonl(straight / "selected.jsonl", allow_outside=True)
  dropped = _rows(straight / "dropped.jsonl")
  assert {s.id for s in kept} | {r["id"] for r in dropped} == {
    sample.id for sample in train
  }
  assert len(kept) + len(dropped) == len(train) == 16
  assert len(kept) > 0 and {row["reason"] for row in dropped} >= {
    "all wrong",
    "unreadable video",
  }
  # Each is a sample as it was, and its reason follows from its scores.
  by_id = {sample.id: sample for sample in train}
  reason = {row["id"]: row["reason"] for row in dropped}
  for row in scores:
    if "unreadable" in row:
      assert row["id"] == train[5].id and "broken.mp4" in row["unreadable"]
      continue
    assert len(row["answers"]) == len(row["scores"]) == 4
    expected = select_data.decide(row["scores"], by_id[row["id"]], **LIMITS)
    assert reason.get(row["id"], "kept") == expected
  for sample in kept:
    assert sample == by_id[sample.id]._replace(source="selected.jsonl")
  assert list(json.loads((straight / "skipped.json").read_text())) == [
    str(folder / "broken.mp4")
  ]
  by_task = json.loads((straight / "results.json").read_text())["by_task"]
  assert sum(by_task["all"].values()) == 16
  assert by_task["all"]["kept"] == len(kept)
  assert cv2.imread(str(straight / "selection.png")).shape[0] > 200


def test_the_folder_is_a_source(straight, folder):
  made = experiment_lib.load_samples(
    source=f"jsonl:{straight / 'selected'}",
    cache_dir="",
    synthetic_set={},
    seed=0,
    allow_outside=True,
  )
  assert len(made["train"]) == len(_rows(straight / "selected.jsonl"))
  for split in ("dev", "test"):
    path = folder / f"{split}.jsonl"
    assert made[split] == records.load_jsonl(path, allow_outside=True)


def test_resumed_equals_straight_byte_by_byte(
  straight, cache_dir, folder, tmp_path, monkeypatch
):
  """From where a power cut left it: two batches, and half a line."""
  workdir = tmp_path / "run"
  shutil.copytree(straight, workdir)
  for name in ("selected.jsonl", "dropped.jsonl", "results.json"):
    (workdir / name).unlink()
  lines = (straight / "scores.jsonl").read_bytes().splitlines(keepends=True)
  torn = b"".join(lines[:8]) + lines[8][:20]
  (workdir / "scores.jsonl").write_bytes(torn)
  monkeypatch.setattr(verdicts, "make_judge", _make_judge)

  policy = (workdir / "policy.json").read_text()
  (workdir / "policy.json").write_text('{"fingerprint": "another"}')
  with pytest.raises(ValueError, match="another policy.*--workdir"):
    _run(cache_dir, folder, workdir)
  (workdir / "policy.json").write_text(policy)

  _run(cache_dir, folder, workdir)
  for name in ("scores", "selected", "dropped"):
    expected = (straight / f"{name}.jsonl").read_bytes()
    assert (workdir / f"{name}.jsonl").read_bytes() == expected

  with pytest.raises(ValueError, match="sampling.temperature .there 1.0"):
    _run(cache_dir, folder, workdir, **{"sampling.temperature": 0.5})

  # Other limits decide anew, and nobody is asked again.
  monkeypatch.setattr(
    select_data, "_ask", lambda *_: pytest.fail("asked again")
  )
  before = len(_rows(workdir / "selected.jsonl"))
  _run(cache_dir, folder, workdir, **{"select.min_best": 1.1})
  assert len(_rows(workdir / "selected.jsonl")) < before
  assert (workdir / "scores.jsonl").read_bytes() == (
    straight / "scores.jsonl"
  ).read_bytes()

  lines = (folder / "train.jsonl").read_text().replace("Which", "What")
  other = tmp_path / "other"
  other.mkdir()
  for split in ("dev", "test"):
    text = (folder / f"{split}.jsonl").read_text()
    (other / f"{split}.jsonl").write_text(text)
  (other / "train.jsonl").write_text(lines)
  manifest = workdir / "manifest.json"
  manifest.write_text(manifest.read_text().replace(str(folder), str(other)))
  with pytest.raises(ValueError, match="other data"):
    _run(cache_dir, other, workdir)


def test_a_policy_is_asked_for(cache_dir, folder, tmp_path):
  with pytest.raises(ValueError, match="--config.policy"):
    _run(cache_dir, folder, tmp_path, **{"sft.max_steps": 0})
