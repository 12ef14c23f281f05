"""Judging: batches do not matter, every sample once, chance by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from cf_jax.data import answers, records
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import held_out
from cf_jax.runtime import sharding
from tests.conftest import init_params, load_config, shrink

ARMS = ("keyframes", "blind")


@pytest.fixture(scope="module")
def experiment(cache_dir, tmp_path_factory):
  config = shrink(load_config("configs/kfgrpo_cpu.py", "smoke"), cache_dir)
  return experiment_lib.build(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def params(experiment):
  return init_params(experiment.model)


def _evaluator(experiment, samples, batch_size):
  return held_out.Evaluator(
    experiment, samples, ARMS, batch_size=batch_size, max_tokens=12
  )


def test_a_smaller_last_batch_changes_nothing(experiment, params):
  samples = experiment.samples["test"][:8]
  whole = _evaluator(experiment, samples, 64).run(params)
  parts = _evaluator(experiment, samples, 3).run(params)
  for arm in ARMS:
    assert len(whole[arm].text) == len(whole[arm].correct) == 8
    assert whole[arm].text == parts[arm].text
    np.testing.assert_array_equal(whole[arm].correct, parts[arm].correct)
    np.testing.assert_array_equal(
      whole[arm].correct,
      [answers.is_correct(t, s) for t, s in zip(whole[arm].text, samples)],
    )


def test_videos_are_prepared_once(experiment, params, monkeypatch):
  judge = _evaluator(experiment, experiment.samples["dev"][:3], 3)
  first = judge.run(params)
  monkeypatch.setattr(
    held_out.pipeline, "collate", lambda *_, **__: pytest.fail("scanned")
  )
  assert judge.run(params)["keyframes"].text == first["keyframes"].text


@pytest.mark.parametrize(
  ("arms", "count"),
  [
    (("keyframes",), 4),
    (("shuffled", "blind"), 4),
    (("keyframes", "uniform"), 8),
    (("single",), 8),
    (("times", "keyframes"), 5),
  ],
)
def test_frames_that_no_arm_shows_are_not_encoded(experiment, arms, count):
  """Of four keyframes, four uniform frames and a blank one, the last."""
  judge = held_out.Evaluator(
    experiment, experiment.samples["dev"][:3], arms, batch_size=3, max_tokens=4
  )
  judge.prepare()
  ((prepared, _),) = judge._prepared
  assert prepared.frames.shape[1] == 9
  shown = experiment_lib.shown_frames(prepared)
  number = [*range(count)] if count % 4 == 0 else [0, 1, 2, 3, 8]
  np.testing.assert_array_equal(shown, prepared.frames[:, number])
  for view in prepared.view.values():
    assert view.frame.max() < count


def test_a_batch_divides_over_the_devices(experiment):
  """Six samples on eight devices are filled up to eight rows."""

  one = np.full((4, 2, 1, 1), jax.devices()[0], object)
  wide = dataclasses.replace(
    experiment, mesh=jax.sharding.Mesh(one, sharding.AXES)
  )
  samples = experiment.samples["dev"][:6]
  for batch_size, expected in ((64, 8), (3, 8), (8, 8)):
    assert _evaluator(wide, samples, batch_size)._batch_size == expected
  assert _evaluator(wide, samples * 3, 9)._batch_size == 16


def test_rows(experiment):
  samples = [
    records.Sample(str(n), "v", "q", ("a", "b"), "A", task=task)
    for n, task in enumerate(["order", "count", "order"])
  ]
  judge = _evaluator(experiment, samples, 2)
  judged = held_out.Judged(
    np.array([True, True, False]),
    ["x"] * 3,
    np.array([1, 1, 0]),
    {
      "format": np.array([1, 1, 1]),
      "iou": np.array([0.4, np.nan, 0.8]),
      "caption": np.full(3, np.nan),
    },
  )
  rows = judge.rows({"blind": judged}, "sft")
  assert [(r["task"], r["accuracy"], r["count"]) for r in rows] == [
    ("count", 1.0, 1),
    ("order", 0.5, 2),
    ("all", 2 / 3, 3),
  ]
  for row in rows:
    assert row["stage"] == "sft" and row["view"] == "blind"
    assert set(row) == {
      "stage",
      "view",
      "task",
      "accuracy",
      "count",
      "low",
      "high",
      "score",
      "component",
    } | ({"recall"} if row["task"] == "order" else set())
  assert [row["component"] for row in rows] == [
    {"format": 1.0},
    {"format": 1.0, "iou": pytest.approx(0.6)},
    {"format": 1.0, "iou": pytest.approx(0.6)},
  ]
  assert rows[1]["recall"] == {"0.3": 1.0, "0.5": 0.5, "0.7": 0.5}


def test_probes_are_off_at_zero(experiment):
  assert held_out.probes(experiment, 0) == {}
