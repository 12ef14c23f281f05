"""Who chooses the frames of an evaluation: a run's scorer, a selector, a bound.

The selectors by name are those of test_selectors.py; in whole evaluations they
stand in test_evaluate.py.
"""

import types

import chex
import jax
import numpy as np
import pytest

from cf_jax import descriptor, selectors
from cf_jax.data import pipeline
from cf_jax.programs import amplify, choosing, scorer
from cf_jax.runtime import sharding, telemetry

K = 3


@pytest.fixture(scope="module")
def run(scored_run):
  return scored_run


@pytest.fixture(scope="module")
def batch(run):
  experiment, _ = run
  settings = experiment.config.data.loader
  return pipeline.collate(
    experiment.samples["test"][:2],
    np.arange(2),
    scan_frames=settings.scan_frames,
    scan_size_px=settings.scan_size_px,
  )


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(data=-1, fsdp=1, tensor=1, context=1)


def test_the_scorer_of_a_run(run, batch, mesh, monkeypatch):
  """The saved one, read again: the highest scores that keep their distance."""
  experiment, learned = run
  path, opened = str(experiment.workdir), []
  load = scorer.open_scorer
  monkeypatch.setattr(
    scorer,
    "open_scorer",
    lambda *args, **how: opened.append(load(*args, **how)) or opened[0],
  )
  found = choosing.learned(path, mesh, init_from="", num_keyframes=K)
  chex.assert_trees_all_equal(opened[0].state.params, learned)
  assert found.scan_frames(K) == experiment.config.data.loader.scan_frames
  chosen = found.choose(batch, K)
  assert chosen.index.shape == (2, K)
  gap = 3  # tad.select_keyframes' own
  for score, order in zip(chosen.score, chosen.order):
    left = dict(enumerate(score))
    for pick in order:
      assert score[pick] >= max(left.values()) - 1e-4
      left = {t: s for t, s in left.items() if abs(t - pick) >= gap}
  assert found.settings["select"] == "learned"
  assert path not in str(found.settings)  # other places, the same settings


def test_a_selector_policy(run, batch, mesh, monkeypatch):
  """It is asked about the batch, and its greedy lists are what is shown."""
  experiment, _ = run
  index = np.array([[1, 5], [2, 64]], np.int32)
  lists = types.SimpleNamespace(chosen=[amplify.as_keyframes(index, 64)])
  monkeypatch.setattr(amplify.Selector, "load", lambda self, params, rows: 0)
  monkeypatch.setattr(amplify.Selector, "read", lambda self, _: (None, lists))
  found = choosing.viarl(
    str(experiment.workdir), mesh, init_from="", num_keyframes=2, batch_size=2
  )
  chosen = found.choose(batch, 2)
  np.testing.assert_array_equal(chosen.index, index)
  assert chosen.mask.tolist() == [[True, True], [True, False]]
  assert found.settings["candidates"] == 4 and found.settings["weights"]


def test_a_selector_names_as_many_frames_as_it_was_taught(mesh, tmp_path):
  stage = tmp_path / "viarl" / "cycle_1" / "selector"
  stage.mkdir(parents=True)
  telemetry.write_json(
    tmp_path / "viarl" / "manifest.json",
    {"config": {"amplify": {"num_frames": 8}}},
  )
  assert choosing.amplified_frames(str(stage)) == 8
  with pytest.raises(ValueError, match="names 8 frames, and config.num_key"):
    choosing.viarl(
      str(stage), mesh, init_from="", num_keyframes=4, batch_size=2
    )
  assert choosing.amplified_frames(str(tmp_path)) is None


def test_no_run(mesh, tmp_path):
  with pytest.raises(ValueError, match="expected the workdir of a run"):
    choosing.learned(str(tmp_path), mesh, init_from="", num_keyframes=2)


def test_a_run_that_learned_no_selection(run, mesh, tmp_path):
  experiment, _ = run
  config = experiment.config.copy_and_resolve_references()
  config.unlock()
  config.selector.learn = False
  telemetry.write_manifest(tmp_path, config=config, seed=0, data_hash="")
  with pytest.raises(ValueError, match="learned no selection"):
    choosing.learned(str(tmp_path), mesh, init_from="", num_keyframes=2)


@pytest.mark.parametrize(
  ("evidence", "count", "expected"),
  [
    # Twelve frames, one a second: spread over [2, 7], six of them.
    ([(2, 7)], 2, [3, 6]),
    ([(2, 7)], 6, [2, 3, 4, 5, 6, 7]),
    # Two more, spread over the others: 0, 1, 8, 9, 10, 11.
    ([(2, 7)], 8, [1, 2, 3, 4, 5, 6, 7, 10]),
    # Two intervals share five frames, the first has one more.
    ([(0, 5), (8, 11)], 5, [1, 3, 5, 9, 11]),
    # Between two frames: the nearest.
    ([(4.1, 4.3), (9, 9)], 2, [4, 9]),
    ([(3, 4)], 99, list(range(12))),
    ([(0, 1), (5, 5), (9, 9)], 2, [1, 5]),
  ],
)
def test_frames_of_the_evidence(evidence, count, expected):
  found = choosing.evidence_frames(evidence, np.arange(12.0), count)
  assert found.tolist() == expected


def test_the_oracle(batch):
  found = choosing.oracle(num_frames=64, size_px=(32, 32))
  chosen = found.choose(batch, K)
  for row, sample in enumerate(batch.samples):
    seconds = batch.scan_time_s[row][chosen.index[row]]
    assert sample.evidence
    for start, end in sample.evidence[:K]:
      near = np.min(np.maximum(start - seconds, seconds - end))
      assert near <= np.diff(batch.scan_time_s[row]).max()


@pytest.mark.parametrize("name", ["uniform", "all_frames", "random"])
def test_selectors_by_name(batch, name):
  """Against the selectors themselves, on the scan's embeddings."""
  found = choosing.by_name(
    name,
    num_frames=64,
    size_px=(32, 32),
    descriptor="pixels",
    encode=None,
    tad={"gate": 9.0},  # which none of these reads
  )
  count = 64 if name == "all_frames" else K
  chosen = found.choose(batch, count)
  if name == "random":  # as many, and the same ones every time
    assert chosen.mask.all() and np.all(np.diff(chosen.index, axis=1) > 0)
    np.testing.assert_array_equal(
      chosen.index, found.choose(batch, count).index
    )
  else:
    expected = selectors.select_videos(
      name,
      jax.jit(descriptor.pixel_descriptor)(batch.scan),
      batch.scan_mask,
      num_keyframes=count,
    )
    np.testing.assert_array_equal(chosen.index, expected.index)
  # Evenly spaced frames need no other ones beside them.
  assert found.scan_frames(K) == (K if name == "uniform" else 64)
