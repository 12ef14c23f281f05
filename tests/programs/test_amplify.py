"""Selector and answerer in turns: lists by hand, rewards by hand, resuming.

So small policies name no frames and give no answers: in whole runs the tests
say which lists can be read and which answers are right.
"""

import collections
import json
import re
import shutil
import types

import jax
import numpy as np
import pytest

from cf_jax.data import answers, pipeline, prompts, records, video
from cf_jax.programs import amplify, reinforce, verdicts
from cf_jax.programs import experiment as experiment_lib
from cf_jax.runtime import checkpoint
from tests.conftest import init_params, load_config, shrink
from tests.programs import test_reinforce

N, T = 6, 10  # candidates of scanned frames


def _config(cache_dir):
  config = shrink(load_config("configs/viarl.py", "smoke"), cache_dir)
  config.report = dict(num_rollouts=2)
  config.amplify.update(num_frames=2, answerer_start_steps=0, cycles=2)
  config.sampling.max_tokens = 20
  config.sft.update(max_steps=2, eval_every=2, checkpoint_every=1)
  config.rl.update(steps=2, checkpoint_every=1)
  config.data.synthetic.num_test = 8
  config.evaluation.batch_size = 4
  config.answerer.sft.max_steps = 2
  return config


# --------------------------------------------------------------------- by hand


def _tokens(tokenizer, rows):
  """Texts [B][G] as token and mask [B, G, C]."""
  ids = [[[*tokenizer.encode(t), tokenizer.eos_id] for t in r] for r in rows]
  slots = max(len(i) for row in ids for i in row)
  token = np.zeros((len(ids), len(ids[0]), slots), np.int32)
  mask = np.zeros(token.shape, bool)
  for b, row in enumerate(ids):
    for g, one in enumerate(row):
      token[b, g, : len(one)], mask[b, g, : len(one)] = one, True
  return token, mask


@pytest.fixture(scope="module")
def lists():
  """Four lists for a video with 6 candidates, and for one with only 3."""
  tokenizer = prompts.load_tokenizer("tiny")
  experiment = types.SimpleNamespace(
    tokenizer=tokenizer,
    config=load_config("configs/viarl.py", "smoke"),
  )
  samples = [
    records.Sample("a", "v", "q", (), "x", evidence=((3.5, 4.5),)),
    records.Sample("b", "w", "q", (), "x", evidence=((0.5, 1.5),)),
  ]
  index = np.array([[0, 2, 4, 6, 8, 9], [1, 2, 3, T, T, T]], np.int32)
  scan_mask = np.arange(T) < np.array([[10], [4]])
  prepared = types.SimpleNamespace(
    batch=types.SimpleNamespace(samples=samples, scan_mask=scan_mask),
    keyframes=amplify.as_keyframes(index, T),
    keyframe_time_s=np.where(index < T, index, np.nan).astype(np.float32),
    num_slots=N,
  )
  said = [
    "<think>red</think><index>[4, 2]</index>",  # scanned frames 4 and 8
    "<think>red</think><index>[0, 1]</index>",
    "<think>red</think><index>[0, 9]</index>",  # there is no 9
    "<index>[0, 2]</index>",  # a list, but nothing thought
  ]
  token, mask = _tokens(tokenizer, [said, said])
  return (
    amplify.read_lists(experiment, prepared, token, mask, num_frames=2),
    prepared,
    token,
    mask,
    experiment,
  )


def test_lists_by_hand(lists):
  found, *_ = lists
  component = found.verdict.component
  assert component["index"].tolist() == [[1, 1, 0, 1], [0, 1, 0, 1]]
  assert component["format"].tolist() == [[1, 1, 1, 0]] * 2
  # Evidence: candidate 2 (4 s) of the first video, 0 (1 s) of the second.
  assert component["hit"].tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]
  index = np.stack([keyframes.index for keyframes in found.chosen], axis=1)
  # Not readable: every third candidate of six, every first one of three.
  assert index[0].tolist() == [[4, 8], [0, 2], [0, 6], [0, 4]]
  assert index[1].tolist() == [[1, 2], [1, 2], [1, 2], [1, 3]]
  assert found.verdict.cited[0].astype(int).tolist() == [
    [0, 0, 1, 0, 1, 0],
    [1, 1, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0],
    [1, 0, 1, 0, 0, 0],
  ]


def test_uniform_frames():
  mask = np.arange(T) < np.array([[10], [4], [1]])
  found = amplify.uniform_frames(mask, 2)
  assert found.tolist() == [[2, 7], [1, 3], [0, T]]


def test_rewards_by_hand(lists):
  """R = 2 accuracy index + index + format + 0.2 length, by the config."""
  _, prepared, token, mask, experiment = lists
  score = np.array([[1, 0, 1, 1], [1, 1, 0, 0]], np.float32)
  answerer = types.SimpleNamespace(score_lists=lambda batch, chosen: score)
  verdict = amplify.make_judge(experiment, answerer, num_frames=2)(
    prepared, token, mask
  )
  config = experiment.config
  config.reward.length.update(low=2, high=2)
  found = test_reinforce.score(
    config,
    reference=np.zeros((2, 4, test_reinforce.C), np.float32),
    component=verdict.component,
    applies=verdict.applies,
  )
  inside = 0.2 * (test_reinforce.LENGTH == 2)
  expected = np.array([[4, 2, 1, 3], [1, 4, 1, 1]]) + inside
  np.testing.assert_allclose(found.reward, expected, rtol=1e-6)
  assert float(found.component_mean["hit"][0]) == 0.5


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"amplify.num_frames": 17}, "config.amplify.num_frames is 17"),
    ({"amplify.cycles": 0}, "config.amplify.cycles"),
    ({"contrast.kind": "rollout"}, "config.contrast.kind"),
    ({"data.reader.cache_mib": 1}, "config.answerer.data.reader.cache_mib"),
    (
      {"answerer.data": dict(loader=dict(scan_frames=7))},
      "config.answerer.data says another loader",
    ),
    ({"answerer.sfd": dict(max_steps=7)}, "config.answerer .*sfd"),
  ],
)
def test_settings_that_do_not_fit(changes, said):
  config = load_config("configs/viarl.py", "smoke")
  config.rl.prompts_per_step = 16
  for name, value in changes.items():
    *path, last = name.split(".")
    section = config
    for part in path:
      section = section[part]
    section[last] = value
  with pytest.raises(ValueError, match=said):
    amplify.check(config)


# ------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def answerer(cache_dir, tmp_path_factory):
  config = amplify.answerer_config(_config(cache_dir))
  experiment = experiment_lib.build(config, tmp_path_factory.mktemp("answerer"))
  made = amplify.Answerer(experiment)
  made.load(init_params(experiment.model), rows=2)
  return made


def test_a_video_is_decoded_once_for_all_its_lists(answerer, monkeypatch):
  samples = answerer.experiment.samples["test"][:2]
  batch = pipeline.collate(
    samples, np.arange(2), scan_frames=64, scan_size_px=(32, 32)
  )
  count, read = collections.Counter(), video.read_frames

  def read_frames(path, index, *args, **settings):
    count[path] += 1
    return read(path, index, *args, **settings)

  monkeypatch.setattr(video, "read_frames", read_frames)
  prepared, make_views = [], type(answerer.experiment.make_views).__call__

  def record(self, *args, **settings):
    prepared.append(make_views(self, *args, **settings))
    return prepared[-1]

  monkeypatch.setattr(type(answerer.experiment.make_views), "__call__", record)
  chosen = [
    amplify.by_sample({samples[0].id: first, samples[1].id: second})(batch)[0]
    for first, second in (((1, 30), (2, 9)), ((5, 40), (2, 63)))
  ]
  assert answerer.score_lists(batch, chosen).shape == (2, 2)
  assert count == {sample.video: 1 for sample in samples}
  # The frames shown are those of the lists: 8 frames a second.
  times = [each.keyframe_time_s.tolist() for each in prepared]
  assert times == [
    [[1 / 8, 30 / 8], [2 / 8, 9 / 8]],
    [[5 / 8, 5.0], [2 / 8, 63 / 8]],
  ]


def _make_judge(experiment, make_judge=verdicts.make_judge):
  """Calls answers right by the sum of their tokens."""
  judge = make_judge(experiment)

  def read(prepared, token, mask):
    found = judge(prepared, token, mask)
    right = ((token * mask).sum(axis=-1) % 2).astype(np.float32)
    return found.replace(component=found.component | {"accuracy": right})

  return read


def _judge_selection(tokenizer, token, mask, **settings):
  """Reads a list of two neighbours in the sum of tokens that are none."""
  found, frame = judge_selection(tokenizer, token, mask, **settings)
  first = (token * mask).sum(axis=-1) % (settings["num_candidates"] - 1)
  real = found.component["index"] > 0
  index = (real | (first > 0)).astype(np.float32)
  found = found._replace(component=found.component | {"index": index})
  pair = np.stack([first, first + 1], axis=-1).astype(np.int32)
  return found, np.where(real[..., None], frame, pair)


judge_selection = answers.judge_selection


def _run(config, workdir):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(verdicts, "make_judge", _make_judge)
    patch.setattr(answers, "judge_selection", _judge_selection)
    amplify.run(config, workdir)


STAGES = {
  "selector": "sft",
  "cycle_1/selector": "rl",
  "cycle_1/answerer": "sft",
  "cycle_2/selector": "rl",
  "cycle_2/answerer": "sft",
}
# Where a run is cut off -> what it has not written by then.
CUTS = {
  "in reinforcement": (
    "cycle_2/selector/checkpoints/rl/2",
    "cycle_2/selector/evaluation.json",
    "cycle_2/answerer",
  ),
  "between stages": ("cycle_2/answerer",),
  "in supervised training": (
    "cycle_2/answerer/checkpoints/sft/2",
    "cycle_2/answerer/evaluation.json",
  ),
}


@pytest.fixture(scope="module")
def straight(cache_dir, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("straight") / "run"
  _run(_config(cache_dir).lock(), workdir)
  return workdir


def _remove(path):
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink()


def _state(workdir, stage):
  store = checkpoint.Checkpoints(
    workdir / stage / "checkpoints" / STAGES[stage], keep=2
  )
  try:
    assert store.latest_step() == 2
    return store._manager.restore(2)["state"]
  finally:
    store.close()


@pytest.fixture(scope="module")
def states(straight):
  return {stage: _state(straight, stage) for stage in STAGES}


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ("selector", "cycle_1/selector"),
    ("cycle_1/selector", "cycle_2/selector"),
    ("cycle_1/answerer", "cycle_2/answerer"),
  ],
)
def test_a_stage_starts_where_the_one_before_ended(states, before, after):
  before, after = (states[stage]["params"] for stage in (before, after))
  gap = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), before, after)
  # Two updates with Adam: at most about twice the learning rate.
  assert 0 < max(jax.tree.leaves(gap)) < 0.005


def test_the_second_cycle_draws_other_answers(straight):
  first, second = (
    (straight / f"cycle_{n}/selector/rollouts.jsonl").read_bytes()
    for n in (1, 2)
  )
  assert first and second and first != second


def test_results(straight):
  results = json.loads((straight / "results.json").read_text())
  rows = results["evaluations"]
  assert [row["after"] for row in rows if row["task"] == "all"] == [
    "answerer",
    "cycle_1/selector",
    "cycle_1/answerer",
    "cycle_2/selector",
    "cycle_2/answerer",
  ]
  for row in rows:
    assert row["count"] == 8
    for frames in ("chosen", "uniform"):
      assert 0 <= row[f"accuracy/{frames}"]["accuracy"] <= 1
    assert row["lists/hit"] <= row["lists/readable"] <= 1
  # Whatever the selector chooses, the answerer's own frames stay the same.
  assert len({row["evidence/uniform"]["accuracy"] for row in rows}) == 1
  page = (straight / "report.html").read_text()
  assert 'href="cycle_1/answerer/report.html"' in page
  assert "http" not in re.sub(r"data:[^\"]*", "", page)


def test_the_answerers_training_saw_the_selectors_frames(straight):
  rows = [
    json.loads(line)
    for line in (straight / "cycle_1/answerer/frames.jsonl")
    .read_text()
    .splitlines()
  ]
  assert len(rows) == len({row["id"] for row in rows}) == 16 + 8
  for row in rows:
    assert row["seconds"] == [t / 8 for t in row["frames"]]


@pytest.mark.parametrize("cut", CUTS)
def test_resumed_equals_straight(
  straight, states, cut, cache_dir, tmp_path, monkeypatch
):
  workdir = tmp_path / "run"
  shutil.copytree(straight, workdir)
  for name in (*CUTS[cut], "results.json", "report.html"):
    _remove(workdir / name)
    if name.endswith("/2"):  # and it has the update before
      assert (workdir / name).with_name("1").is_dir()
  # Of every stage: the slowest part, and nothing is compared with it.
  monkeypatch.setattr(amplify.report, "write_report", lambda *_, **__: None)
  _run(_config(cache_dir).lock(), workdir)
  for stage in ("cycle_2/selector", "cycle_2/answerer"):
    expected, found = states[stage], _state(workdir, stage)
    flat = jax.tree_util.tree_leaves_with_path(expected)
    for (path, a), b in zip(flat, jax.tree.leaves(found), strict=True):
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), (stage, path)
  names = [
    "results.json",
    "cycle_1/selector/rollouts.jsonl",
    "cycle_2/selector/rollouts.jsonl",
    "cycle_2/answerer/frames.jsonl",
  ]
  for name in names:
    assert (straight / name).read_bytes() == (workdir / name).read_bytes()


def test_the_rewards_of_reinforcement_are_in_its_metrics(straight):
  lines = (straight / "cycle_1/selector/metrics.jsonl").read_text()
  for row in map(json.loads, lines.splitlines()):
    for name in ("accuracy", "format", "hit", "index", "selected_accuracy"):
      assert 0 <= row[f"reward/{name}"] <= 1
    assert row["grad_norm"] > 0 and row["recompiles"] == 0
    assert not reinforce.contrast_arms(
      load_config("configs/viarl.py", "smoke")
    ).scored
