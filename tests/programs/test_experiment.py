"""What every program needs before it starts."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import policies
from cf_jax.runtime import sharding
from tests.conftest import init_params, load_config, shrink


@pytest.fixture(scope="module")
def experiment(cache_dir, tmp_path_factory):
  config = shrink(load_config("configs/kfgrpo_cpu.py", "smoke"), cache_dir)
  return experiment_lib.build(config, tmp_path_factory.mktemp("run"))


def _load(source, **settings):
  return experiment_lib.load_samples(
    source=str(source),
    cache_dir="nowhere",
    synthetic_set={},
    seed=0,
    **settings,
  )


@pytest.fixture
def manifest(tmp_path, write_video):
  """Writes `count` lines, each about `videos` videos in turn."""
  for n in range(25):
    write_video(tmp_path / f"{n}.mp4", np.zeros((4, 64, 64, 3), np.uint8))

  def write(name, count, videos=25):
    lines = [
      dict(
        video=f"{n % videos}.mp4",
        question=f"q{n}",
        options=["x", "y"],
        answer="A",
      )
      for n in range(count)
    ]
    path = tmp_path / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path

  return write


def test_a_single_manifest_is_split_by_tenths(manifest):
  found = _load(f"jsonl:{manifest('all.jsonl', 25)}")
  assert {split: len(rows) for split, rows in found.items()} == {
    "train": 21,
    "dev": 2,
    "test": 2,
  }
  questions = [row.question for rows in found.values() for row in rows]
  assert questions == [f"q{n}" for n in range(25)]


def test_questions_about_one_video_stay_in_one_split(manifest):
  found = _load(f"jsonl:{manifest('all.jsonl', 60, videos=20)}")
  videos = {split: {row.video for row in rows} for split, rows in found.items()}
  assert [len(videos[s]) for s in experiment_lib.SPLITS] == [16, 2, 2]
  assert [len(found[s]) for s in experiment_lib.SPLITS] == [48, 6, 6]
  assert not videos["train"] & (videos["dev"] | videos["test"])
  assert not videos["dev"] & videos["test"]


def test_a_folder_gives_the_splits(manifest, tmp_path):
  for split, count in (("train", 3), ("dev", 1), ("test", 2)):
    manifest(f"{split}.jsonl", count)
  found = _load(f"jsonl:{tmp_path}")
  assert [len(found[s]) for s in experiment_lib.SPLITS] == [3, 1, 2]
  (tmp_path / "dev.jsonl").unlink()
  with pytest.raises(ValueError, match="dev.jsonl"):
    _load(f"jsonl:{tmp_path}")


def test_public_datasets_are_sources(tmp_path):
  row = {"duration": 9.0, "timestamps": [[1, 2]], "sentences": ["it falls."]}
  for name, file, videos in (("a", "train.json", 20), ("b", "train.json", 10)):
    (tmp_path / name).mkdir()
    made = {f"{name}{n}": row for n in range(videos)}
    (tmp_path / name / file).write_text(json.dumps(made))
  one = f"charades_sta={tmp_path / 'a'}"
  found = _load(f"dataset:{one}", dataset={"split": "train"})
  assert [len(found[s]) for s in experiment_lib.SPLITS] == [16, 2, 2]
  assert found["test"][-1].id == "a19/0"
  assert found["train"][0].source == "charades_sta"
  # Of several, each holds out its own videos and names its questions.
  both = f"dataset:{one},activitynet={tmp_path / 'b'}"
  found = _load(both, dataset={"split": "train"})
  assert [len(found[s]) for s in experiment_lib.SPLITS] == [24, 3, 3]
  assert found["dev"][-1].id == "activitynet/b8/0"
  for source, message in (
    ("dataset:charades_sta", "expected NAME=ROOT; change config.data.source"),
    (f"dataset:charades={tmp_path}", "no dataset is called 'charades'"),
    ("dataset:", "change config.data.source"),
  ):
    with pytest.raises(ValueError, match=message):
      _load(source)
  many = [
    row._replace(video=f"{n}.mp4")
    for n in range(4000)
    for row in found["dev"][:1]
  ]
  held = experiment_lib.hold_out(many, "many", most=256)
  assert [len(held[s]) for s in experiment_lib.SPLITS] == [3488, 256, 256]


def test_bad_sources(manifest):
  with pytest.raises(ValueError, match="9 videos, expected at least 10"):
    _load(f"jsonl:{manifest('few.jsonl', 9)}")
  for source in ("synthetic2", "jsonl:", "csv:a.csv", ""):
    with pytest.raises(ValueError, match="change config.data.source"):
      _load(source)
  with pytest.raises(ValueError, match="config.data.source"):
    _load("jsonl:no/such/file.jsonl")


def test_data_hash_sees_every_question(experiment):
  samples = experiment.samples
  assert experiment_lib.hash_samples(samples) == experiment.data_hash
  for change in (
    dict(question="?"),
    dict(answer="?"),
    dict(video="b/c.mp4"),
    dict(clip=(1.0, 2.0)),
    dict(groups=(("domain", "?"),)),
  ):
    first = samples["dev"][0]._replace(**change)
    other = samples | {"dev": [first, *samples["dev"][1:]]}
    assert experiment_lib.hash_samples(other) != experiment.data_hash
  moved = [
    row._replace(video=f"elsewhere/{row.video.rsplit('/', 1)[1]}")
    for row in samples["dev"]
  ]
  assert (
    experiment_lib.hash_samples(samples | {"dev": moved})
    == experiment.data_hash
  )


def test_splits_share_no_video(experiment):
  names = [
    {row.video for row in experiment.samples[split]}
    for split in experiment_lib.SPLITS
  ]
  assert [len(found) for found in names] == [16, 8, 10]
  assert len(set.union(*names)) == 34


def test_banned_ids_cover_the_added_tokens(experiment):
  tokenizer = experiment.tokenizer
  assert experiment.banned.shape == (experiment.model.vocab_size,)
  assert not experiment.banned[tokenizer.eos_id]
  assert experiment.banned[tokenizer.special["<|image_pad|>"]]


def test_summary_counts(experiment):
  rows = experiment_lib.summary(experiment)
  params = init_params(experiment.model)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert f"{count / 1e6:.2f} M parameters" in rows["policy"]
  assert "train 16, dev 8, test 10" in rows["samples"]
  assert rows["frames"] == "64 scanned, 4 shown in 4 slots"
  assert rows["tokens per sample"].startswith("8 visual, ")  # 4 x 1 x 2
  assert "4 updates of 4 prompts x 2" in rows["KF-GRPO"]
  assert "epoch is 4 updates" in rows["KF-GRPO"]


def test_decode_rollout_leaves_the_end_out(experiment):
  tokenizer = experiment.tokenizer
  ids = tokenizer.encode("red blue")
  token = np.full((1, 2, 8), tokenizer.eos_id)
  token[0, :, : len(ids)] = ids
  mask = np.zeros((1, 2, 8), bool)
  mask[0, 0, : len(ids) + 1] = True
  mask[0, 1, : len(ids)] = True  # cut off by the limit
  assert experiment_lib.decode_rollout(tokenizer, token, mask) == [
    ["red blue", "red blue"]
  ]


def test_make_stage_divides_the_parameters(experiment):
  def params():
    return policies.initial_params(
      experiment.config, experiment.model, experiment.mesh
    )

  stage = experiment_lib.make_stage(experiment, "sft", params())
  assert stage.frozen == {} and int(stage.state.step) == 0
  assert jax.tree.structure(stage.state_shardings) == jax.tree.structure(
    stage.state
  )
  for a, b in zip(
    jax.tree.leaves(stage.state.params), jax.tree.leaves(params()), strict=True
  ):
    np.testing.assert_array_equal(a, b)  # seeded


# ---------------------------------------------------------------------- Stream


def _stream(experiment, **settings):
  return experiment_lib.Stream(
    experiment, "train", ("keyframes", "shuffled"), batch_size=4, **settings
  )


def _same(left, right):
  return all(
    np.array_equal(a, b)
    for a, b in zip(
      jax.tree.leaves((left.view, left.frames)),
      jax.tree.leaves((right.view, right.frames)),
      strict=True,
    )
  )


def test_stream_goes_on_after_any_batch(experiment):
  with _stream(experiment) as stream:
    straight = [next(stream) for _ in range(5)]
  for done in (1, 3):
    state = json.loads(json.dumps(straight[done - 1][1]))
    with _stream(experiment, first=done, loader_state=state) as stream:
      for expected, _ in straight[done:]:
        assert _same(next(stream)[0], expected)


def test_stream_draws_another_permutation_each_time(experiment):
  with _stream(experiment) as stream:
    batches = [next(stream)[0] for _ in range(8)]  # two epochs of four
  first, second = (
    {
      int(n): row.tobytes()
      for batch in batches[some]
      for n, row in zip(batch.batch.sample_index, batch.view["shuffled"].frame)
    }
    for some in (slice(4), slice(4, 8))
  )
  assert sorted(first) == sorted(second) == list(range(16))
  assert any(first[n] != second[n] for n in first)


def test_stream_hands_errors_to_the_loop(experiment, monkeypatch):
  monkeypatch.setattr(
    type(experiment.make_views),
    "__call__",
    lambda *_, **__: (_ for _ in ()).throw(ValueError("a broken video")),
  )
  with (
    _stream(experiment) as stream,
    pytest.raises(ValueError, match="a broken video"),
  ):
    next(stream)


def test_micro_batches_are_checked_before_anything_is_made(
  tiny_config, tmp_path
):
  tiny_config.rl.micro_batches = 3
  with pytest.raises(ValueError, match="batch of 4 .* 3 micro-batches"):
    experiment_lib.build(tiny_config, tmp_path)
  tiny_config.rl.steps = 0  # then nobody asks
  tiny_config.sft.micro_batches = 2
  experiment_lib.check_batches(
    tiny_config, sharding.make_mesh(**tiny_config.mesh)
  )


def test_stream_ends_while_nobody_reads(experiment):
  with _stream(experiment) as stream:
    time.sleep(0.05)
  assert not stream._thread.is_alive()


def test_answers_of_a_view_are_greedy_and_stop(experiment):
  params = init_params(experiment.model)
  with _stream(experiment) as stream:
    prepared, _ = next(stream)
  encoded = experiment_lib.make_encode_step(experiment)(
    params, experiment.put(experiment.make_views.patches(prepared.frames))
  )
  assert encoded.shape == (4, 9, 2, 32)
  sample = experiment_lib.make_sample_steps(
    experiment, num_completions=1, max_tokens=5, temperature=0.0
  )
  view = experiment.put(prepared.view["keyframes"])
  apart = sample.unstack(params, rows=4)

  def answer():
    begun = sample.prefill(params, view, encoded, np.zeros((4, 2), np.uint32))
    return sample.decode(apart, begun).rollout

  rollout = answer()
  assert rollout.token.shape == (4, 1, 5)
  assert not experiment.banned[np.asarray(rollout.token)].any()
  again = answer()
  np.testing.assert_array_equal(rollout.token, again.token)
  assert bool(jnp.all(rollout.logprob <= 0))
