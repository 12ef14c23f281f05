"""An evaluation from its settings to its table: interrupted, shared out, on
videos that cannot be read. What is answered is held against the evaluator that
training uses, the scores against the scoring of the written files.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from cf_jax.data import pipeline, records, video
from cf_jax.evals import benchmarks, predictions
from cf_jax.models import config as model_config
from cf_jax.models import hf_weights
from cf_jax.programs import (
  answering,
  compare,
  eval_settings,
  evaluate,
  held_out,
  policies,
  questions,
)
from tests.conftest import load_config
from tests.test_report import NASTY, Page

QUESTIONS = 10


@pytest.fixture(scope="module")
def experiment(scored_run):
  """A tiny run of noise, in whose workdir a scorer of frames lies too."""
  return scored_run.experiment


@pytest.fixture
def config(experiment, cache_dir):
  """configs/evaluate.py for that run's test videos, unlocked."""
  return _config(experiment, cache_dir)


def _config(experiment, cache_dir):
  config = load_config("configs/evaluate.py")
  config.update(benchmark="run", policy=str(experiment.workdir), batch_size=3)
  config.select = "tad"
  config.data.cache_dir = str(cache_dir)
  config.data.decode.processes = 0
  config.data.reader.num_threads = 1
  return config


@pytest.fixture(scope="module")
def whole(experiment, cache_dir, tmp_path_factory):
  """What an evaluation without interruption gives, and where it lies."""
  workdir = tmp_path_factory.mktemp("whole")
  scores = evaluate.run(_config(experiment, cache_dir).lock(), workdir)
  return scores, pathlib.Path(scores["folder"])


def _rows(path):
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _read(path):
  return json.loads(path.read_text("utf-8"))


def test_answers_are_those_of_the_evaluator_that_trains(whole, experiment):
  _, folder = whole
  samples = experiment.samples["test"]
  params = policies.load_policy(str(experiment.workdir), experiment.mesh).params
  judge = held_out.Evaluator(
    experiment,
    samples,
    ("keyframes",),
    batch_size=QUESTIONS,
    max_tokens=experiment.config.sampling.max_tokens,
  )
  expected = judge.run(params)["keyframes"]
  rows = _rows(folder / "predictions.jsonl")
  assert [row["id"] for row in rows] == [sample.id for sample in samples]
  assert [row["response"] for row in rows] == expected.text
  assert len(set(expected.text)) > 2
  ((prepared, _),) = judge._prepared
  np.testing.assert_allclose(
    [row["time_s"] for row in rows], prepared.keyframe_time_s, atol=1e-3
  )
  right = [
    row["score"]["accuracy"] for row in _rows(folder / "questions.jsonl")
  ]
  assert right == expected.correct.tolist()


def test_scoring_the_files_gives_the_same_numbers(whole):
  scores, folder = whole
  samples = records.load_jsonl(folder / "annotations.jsonl", allow_outside=True)
  responses = predictions.read(folder / "predictions.jsonl", "jsonl", samples)
  again = benchmarks.to_json(benchmarks.score("jsonl", samples, responses))
  assert _read(folder / "scores.json") == again
  assert again | {"folder": str(folder)} == scores
  assert again["scored"] == QUESTIONS and not again["partial"]
  table = (folder / "table.md").read_text("utf-8")
  value = f"{100 * again['value']:.2f}"
  assert value in table and "every video was read" in table


def test_the_manifest_says_what_was_set(whole, experiment):
  _, folder = whole
  manifest = _read(folder / "eval_manifest.json")
  settings = manifest["settings"]
  run = experiment.config
  assert settings["frames"]["num_keyframes"] == run.tad.num_keyframes == 4
  assert settings["frames"]["size"] == {"size_px": [28, 56]}
  assert settings["frames"]["chooser"] == {
    "select": "tad",
    "scan": {"size_px": [32, 32], "num_frames": 64, "descriptor": "pixels"},
    "tad": {"selection": "soft"},
  }
  assert settings["sampling"]["temperature"] == 0.0
  assert settings["sampling"]["max_tokens"] == run.sampling.max_tokens
  assert settings["benchmark"]["questions"] == QUESTIONS
  assert settings["prompt"]["style"] == "run"
  assert set(settings["prompt"]["templates"].values()) == {
    "{question}{options}"
  }
  prompt = manifest["example"]["prompt"]
  assert experiment.samples["test"][0].question in prompt
  assert manifest["starts"][-1]["versions"]["jax"] == jax.__version__
  assert manifest["results"]["unreadable"] == {}
  # The key settings stand in the path, with the hash of all of them.
  digest = manifest["settings_hash"]
  assert folder.name == f"tad-K4-28x56px-greedy-{digest[:8]}"
  assert folder.parent.name == "run"
  assert not (folder / "parts").exists()


def _interrupted(after):
  """An answerer that is stopped at its batch number `after`."""
  answer = answering.Answerer.__call__
  count = 0

  def call(self, *args):
    nonlocal count
    if count == after:
      raise KeyboardInterrupt
    count += 1
    return answer(self, *args)

  return call, lambda: count


def test_goes_on_where_it_was_stopped(config, whole, tmp_path, monkeypatch):
  """Stopped in the middle of a line: every question is there once."""
  _, folder = whole
  workdir = tmp_path / "work"
  call, _ = _interrupted(1)
  with monkeypatch.context() as patch:
    patch.setattr(answering.Answerer, "__call__", call)
    with pytest.raises(KeyboardInterrupt):
      evaluate.run(config.copy_and_resolve_references(), workdir)
  (part,) = workdir.rglob("parts/0.jsonl")
  assert len(_rows(part)) == 3
  with part.open("ab") as file:
    file.write(b'{"id": "half a li')
  call, count = _interrupted(99)
  monkeypatch.setattr(answering.Answerer, "__call__", call)
  scores = evaluate.run(config.copy_and_resolve_references(), workdir)
  assert count() == 3  # three questions, three, and the last one
  other = pathlib.Path(scores["folder"])
  for name in ("predictions.jsonl", "questions.jsonl", "scores.json"):
    assert (other / name).read_bytes() == (folder / name).read_bytes(), name
  assert len(_read(other / "eval_manifest.json")["starts"]) == 2
  # Once more: nothing is asked.
  again = evaluate.run(config, workdir)
  assert again == scores and count() == 3


def test_processes_share_the_questions(config, whole, tmp_path):
  _, folder = whole
  config.shard.count = 2
  made = []
  for index in range(2):
    config.shard.index = index
    made.append(evaluate.run(config.copy_and_resolve_references(), tmp_path))
    if not index:
      (part,) = tmp_path.rglob("parts/*.jsonl")
      assert len(_rows(part)) == QUESTIONS // 2
  assert made[0] is None
  other = pathlib.Path(made[1]["folder"])
  for name in ("predictions.jsonl", "scores.json"):
    assert (other / name).read_bytes() == (folder / name).read_bytes(), name


def test_other_settings_are_another_folder(config, whole, tmp_path):
  _, folder = whole
  copied = tmp_path / folder.parent.name / folder.name
  shutil.copytree(folder, copied)
  manifest = _read(copied / "eval_manifest.json")
  manifest["settings"]["frames"]["num_keyframes"] = 9
  (copied / "eval_manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(
    ValueError, match=r"frames.num_keyframes \(there 9, now 4\)"
  ):
    evaluate.run(config, tmp_path)


# ------------------------------------------------------- a directory's policy


@pytest.fixture(scope="module")
def directory(experiment, tmp_path_factory):
  """The run's policy as a Qwen2.5-VL directory."""
  policy = policies.load_policy(str(experiment.workdir), experiment.mesh)
  folder = tmp_path_factory.mktemp("model") / "qwen"
  hf_weights.save_hf(
    folder, policy.model, policy.params, tokenizer=policy.tokenizer.folder
  )
  return folder


@pytest.fixture(scope="module")
def manifest(write_video, tmp_path_factory):
  """Five questions: about a wide video, a high one, and a broken file."""
  folder = tmp_path_factory.mktemp("videos")
  rng = np.random.default_rng(0)
  for name, shape in (("wide", (32, 64)), ("high", (64, 32))):
    frames = rng.integers(0, 255, (20, *shape, 3), np.uint8)
    write_video(folder / f"{name}.mp4", frames)
  (folder / "broken.mp4").write_bytes(b"no video")
  rows = [
    dict(id=str(n), video=f"{name}.mp4", question=f"q{n}?", options=["x", "y"])
    | dict(answer="A", task=name)
    for n, name in enumerate(("wide", "broken", "high", "wide", "high"))
  ]
  path = folder / "questions.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture
def open_config(config, manifest):
  """The same run about those questions, in programs that are compiled."""
  config.update(benchmark="jsonl", annotations=str(manifest))
  config.data.max_skip_fraction = 0.5
  return config


def test_videos_that_cannot_be_read(open_config, tmp_path):
  config = open_config
  scores = evaluate.run(config.copy_and_resolve_references(), tmp_path)
  folder = pathlib.Path(scores["folder"])
  rows = {row["id"]: row for row in _rows(folder / "predictions.jsonl")}
  assert list(rows) == list("01234")
  assert rows["1"]["response"] == "" and "broken.mp4" in rows["1"]["unreadable"]
  assert scores["questions"] == scores["scored"] == 5
  (lost,) = _read(folder / "eval_manifest.json")["results"]["unreadable"]
  assert pathlib.Path(lost).name == "broken.mp4"
  table = (folder / "table.md").read_text("utf-8")
  assert "1 of 5 questions are about 1 videos that cannot be read" in table
  assert "count as wrong" in table

  config.unreadable = "left_out"
  fewer = evaluate.run(config.copy_and_resolve_references(), tmp_path)
  assert fewer["folder"] != scores["folder"]
  assert fewer["scored"] == 4 and fewer["partial"]

  config.data.max_skip_fraction = 0.3  # of three videos
  config.num_questions = 3
  with pytest.raises(ValueError, match="1 videos cannot be read, at most 0"):
    evaluate.run(config, tmp_path)


def test_a_part_that_cannot_be_read(open_config, manifest, tmp_path):
  """Other questions about its video, and behind it, keep their answers."""
  rows = [
    dict(id=str(n), video=f"{name}.mp4", question=f"q{n}?", options=["x", "y"])
    | dict(answer="A")
    for n, name in enumerate(("wide", "wide", "high"))
  ]
  path = manifest.with_name("parts.jsonl")
  made = []
  for clip in ([1.0, 4.0], [50.0, 53.0]):  # of five seconds
    rows[0]["clip"] = clip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = open_config.copy_and_resolve_references()
    config.annotations = str(path)
    folder = evaluate.run(config, tmp_path)["folder"]
    made.append(_rows(pathlib.Path(folder) / "predictions.jsonl"))
  assert "its clip is from 50.00" in made[1][0]["unreadable"]
  assert made[0][1:] == made[1][1:] and "unreadable" not in made[0][0]


def test_a_video_that_is_lost_on_the_way(open_config, tmp_path, monkeypatch):
  """It scans, and then its frames cannot be read."""
  read = pipeline.FrameReader.read

  def fail(self, samples, index):
    if any("high" in sample.video for sample in samples):
      path = next(s.video for s in samples if "high" in s.video)
      raise video.VideoError(path, "lost")
    return read(self, samples, index)

  monkeypatch.setattr(pipeline.FrameReader, "read", fail)
  open_config.data.max_skip_fraction = 1.0
  scores = evaluate.run(open_config, tmp_path)
  rows = _rows(pathlib.Path(scores["folder"]) / "predictions.jsonl")
  assert [row["id"] for row in rows if "unreadable" in row] == ["1", "2", "4"]
  assert rows[2]["unreadable"].endswith("high.mp4: lost")


def test_a_directory_s_policy(open_config, directory, tmp_path):
  open_config.update(
    policy=str(directory), select="uniform", num_keyframes=4, num_questions=1
  )
  open_config.sampling.max_tokens = 12
  open_config.frame.size_px = (28, 56)  # as the run: nothing is compiled anew
  scores = evaluate.run(open_config, tmp_path)
  folder = pathlib.Path(scores["folder"])
  (row,) = _rows(folder / "predictions.jsonl")
  # Evenly spaced: floor((k + 0.5) 20 / 4), at four frames a second.
  assert row["frames"] == [2, 7, 12, 17]
  assert row["time_s"] == [0.5, 1.75, 3.0, 4.25]
  assert row["size_px"] == [28, 56]
  prompt = _read(folder / "eval_manifest.json")["example"]["prompt"]
  assert "q0?\nA. x\nB. y\nAnswer with the letter" in prompt
  assert folder.name.startswith("uniform-K4-28x56px-greedy-")


# ------------------------------------------------------------------- settings


def test_what_a_none_stands_for(open_config, directory, experiment):
  model = model_config.qwen2_5_vl_7b()
  config = open_config
  config.update(policy=str(directory), select=None)
  made = eval_settings.settle(config, model)
  assert (made.select, made.num_keyframes, made.resize) == (
    "tad",
    16,
    "bicubic",
  )
  assert made.scan.to_dict() == dict(
    num_frames=256, size_px=(64, 64), descriptor="pixels"
  )
  assert made.frame.max_pixels == 256 * 28 * 28
  assert made.prompt.style == "direct" and made.prompt.build.show_time
  assert made.sampling.max_tokens == 512
  config.policy = str(experiment.workdir)
  made = eval_settings.settle(config, model)
  run = experiment.config
  assert (made.select, made.num_keyframes) == ("learned", 4)
  assert made.selector == config.policy
  assert made.frame.size_px == tuple(run.data.reader.size_px)
  assert made.scan.num_frames == run.data.loader.scan_frames
  assert made.prompt.style == "run"
  assert made.prompt.build.time_format == run.prompt.build.time_format
  config.frame.max_pixels = 5000  # now aspect ratios are kept
  assert eval_settings.settle(config, model).frame.size_px is None


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(benchmark="videomme2"), "config.benchmark is 'videomme2', expected"),
    (dict(policy=""), "config.policy is empty"),
    (dict(select="tda"), "config.select must be one of"),
    (dict(subtitles="yes"), "config.subtitles must be one of"),
    (dict(num_keyframes=0), "config.num_keyframes must be at least 1"),
    (dict(fps=0.0), "config.fps must be above 0"),
    (dict(shard=dict(index=2, count=2)), "config.shard.index is 2"),
    (dict(prompt=dict(style="run")), "is not a run"),
    (dict(scan=dict(num_frames=2), select="tad"), "and 2 frames are scanned"),
    (dict(frame=dict(size_px=(30, 28))), "multiples of 28"),
    (dict(select="learned", fps=1.0), "leave config.fps None"),
    (dict(prompt=dict(frames_per_slice=2)), "do not divide into slices of 2"),
  ],
)
def test_settings_that_cannot_be_followed(
  open_config, directory, changes, said
):
  open_config.update(policy=str(directory), num_keyframes=3)
  open_config.update(changes)
  with pytest.raises(ValueError, match=said):
    eval_settings.check_settings(open_config)
    eval_settings.settle(open_config, model_config.qwen2_5_vl_7b())


def test_benchmarks_that_do_not_fit(open_config, directory):
  open_config.policy = str(directory)
  open_config.annotations = ""
  with pytest.raises(ValueError, match="needs --config.annotations=FILE"):
    questions.read_questions(open_config)
  open_config.benchmark = "run"
  with pytest.raises(ValueError, match="is not a run; name another"):
    questions.read_questions(open_config)
  open_config.subtitles = "all"
  with pytest.raises(ValueError, match="are for published benchmarks"):
    questions.read_questions(open_config)


def test_tracking_shows_a_frame_for_each_box(open_config, directory, tmp_path):
  rows = [dict(path="v/a", object="cat", gt=[[0, 0, 0.5, 0.5]] * 8)]
  (tmp_path / "got_val.json").write_text(json.dumps(rows))
  open_config.update(
    policy=str(directory),
    benchmark="got10k",
    annotations=str(tmp_path),
    select="uniform",
    num_keyframes=8,
    fps=None,
  )
  (sample,) = questions.read_questions(open_config)
  assert len(sample.boxes) == 8
  for change in (dict(num_keyframes=16), dict(select="tad"), dict(fps=1.0)):
    other = open_config.copy_and_resolve_references()
    other.update(change)
    with pytest.raises(ValueError, match="a box for each of 8 frames"):
      questions.read_questions(other)


def test_the_published_wording_of_videomme(open_config, directory, tmp_path):
  """Against the example of its authors' page."""
  open_config.policy = str(directory)
  open_config.benchmark = "videomme"
  open_config.subtitles = "all"
  config = eval_settings.settle(open_config, model_config.qwen2_5_vl_7b())
  said = "Hi guys, I'm going to show you how to perfectly prepare a ..."
  path = tmp_path / "said.srt"
  path.write_text(f"1\n00:00:00,000 --> 00:00:04,000\n{said}\n")
  sample = records.Sample(
    "001-1",
    "v.mp4",
    "What is the color of the clothing worn by the persons in the video?",
    ("Black.", "Gray.", "Green.", "Brown."),
    "A",
  )
  instruction = (
    "Select the best answer to the following multiple-choice question based on"
    " the video. Respond with only the letter (A, B, C, or D) of the correct"
    " option.\n"
    "What is the color of the clothing worn by the persons in the video?\n"
    "A. Black.\nB. Gray.\nC. Green.\nD. Brown.\nThe best answer is:"
  )
  wording = questions.Wording(config)
  assert wording(sample) == instruction
  with_subtitles = sample._replace(subtitles=str(path))
  listed = f"This video's subtitles are listed below:\n{said}\n"
  assert wording(with_subtitles) == listed + instruction
  config.subtitles = "shown"
  wording = questions.Wording(config)
  assert said in wording(with_subtitles, np.array([2.0]))
  assert said not in wording(with_subtitles, np.array([9.0]))


@pytest.mark.parametrize(
  ("changes", "fps", "count"),
  [
    ({}, 2.0, 16),
    ({"fps": 1.0}, 1.0, 16),
    ({"num_keyframes": 64}, None, 64),
    ({"select": "tad"}, None, 16),
  ],
)
def test_frames_a_second_of_a_run(
  open_config, tmp_path, monkeypatch, changes, fps, count
):
  trained = load_config("configs/video_r1.py").to_dict()
  monkeypatch.setattr(questions, "run_config", lambda config: trained)
  open_config.update(dict(policy=str(tmp_path), select=None) | changes)
  config = eval_settings.settle(open_config, model_config.qwen2_5_vl_7b())
  assert (config.fps, config.num_keyframes) == (fps, count)


def test_frames_of_videos(open_config, directory):
  """How many a second, and of which size."""
  open_config.update(policy=str(directory), num_keyframes=8, fps=0.5)
  model = model_config.qwen2_5_vl_7b()
  config = eval_settings.settle(open_config, model)
  planner = answering.Planner(config, model, None, None)
  counts = [
    planner.num_keyframes(video.VideoInfo(9, 1.0, 64, 64, seconds))
    for seconds in (0.5, 7.0, 8.0, 8.1, 100.0)
  ]
  assert counts == [1, 4, 4, 5, 8]
  wide = video.VideoInfo(9, 1.0, 1920, 1080, 9.0)  # 9 by 16
  high = wide._replace(width=1080, height=1920)
  # At most 256 tokens of 28 x 28 px: 12 by 21 of them.
  assert planner.size_px(wide, 8) == (336, 588)
  assert planner.size_px(high, 8) == (588, 336)
  # A budget of 640 tokens for all is 80 a frame: 6 by 11.
  config.frame.total_pixels = 640 * 28 * 28
  assert planner.size_px(wide, 8) == (168, 308)


# --------------------------------------------------------------- comparisons


@pytest.fixture(scope="module")
def compared(whole, experiment, cache_dir, tmp_path_factory):
  """Two evaluations, the second with blank-like other frames and NASTY texts,
  and what comparing them wrote."""
  config = _config(experiment, cache_dir)
  config.select = "uniform"
  workdir = tmp_path_factory.mktemp("uniform")
  second = pathlib.Path(evaluate.run(config.lock(), workdir)["folder"])
  # Scores by hand: A is right on the even questions, B on the first six.
  first = tmp_path_factory.mktemp("tad") / "copy"
  shutil.copytree(whole[1], first)
  for folder, right in (
    (first, [n % 2 == 0 for n in range(QUESTIONS)]),
    (second, [n < 6 for n in range(QUESTIONS)]),
  ):
    rows = _rows(folder / "questions.jsonl")
    for row, good in zip(rows, right):
      row["score"] = {"accuracy": float(good)}
      row["question"] = NASTY + row["question"]
      row["read"] = NASTY
    _write(folder / "questions.jsonl", rows)
    rows = _rows(folder / "predictions.jsonl")
    for row in rows:
      row["response"] += NASTY
    _write(folder / "predictions.jsonl", rows)
  out = tmp_path_factory.mktemp("compare")
  config = load_config("configs/compare.py")
  config.evaluations = f"{first}, {workdir}"  # the second one lies below
  return compare.run(config.lock(), out), out, (first, second)


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_comparison_by_hand(compared):
  result, out, _ = compared
  row = result["differences"][0]
  assert (row["group"], row["first"], row["second"]) == ("all", 0.5, 0.6)
  assert (row["gained"], row["lost"], row["count"]) == (3, 2, QUESTIONS)
  assert row["mean"] == pytest.approx(0.1)
  assert row["low"] < 0.1 < row["high"]
  # Every built-in video has one question: at least three heads of five.
  assert row["units"] == QUESTIONS and row["test"] == "McNemar, exact"
  assert row["p"] == pytest.approx(1.0)
  changed = _rows(out / "changed.jsonl")
  assert [r["change"] for r in changed] == ["gained"] * 3 + ["lost"] * 2
  assert result["changed"] == 5
  tasks = {r["group"]: r["count"] for r in result["differences"]}
  assert sum(n for g, n in tasks.items() if g.startswith("task")) == QUESTIONS
  assert result == _read(out / "comparison.json")


def test_settings_that_differ(compared):
  result, out, _ = compared
  told = {row["setting"]: row["value"] for row in result["settings"]}
  assert told["frames.chooser.select"] == {"A": '"tad"', "B": '"uniform"'}
  assert "policy.weights" not in told and "prompt.hash" not in told
  assert "frames.chooser.select" in (out / "comparison.md").read_text("utf-8")


def test_the_page_is_whole_and_harmless(compared):
  _, out, _ = compared
  page = Page((out / "comparison.html").read_text("utf-8"))
  assert "script" not in page.tags
  assert all(link.startswith("data:image/") for link in page.links)
  words = " ".join(page.words)
  assert "B is better than A: 3 questions" in words
  assert "B is worse than A: 2 questions" in words
  assert words.count(NASTY) >= 15
  strips = [link for link in page.links if link.startswith("data:image/jpeg")]
  assert len(strips) == 5 * 2 * 4  # questions, evaluations, keyframes


def test_videos_that_are_gone_leave_a_word(compared, tmp_path):
  _, _, (first, second) = compared
  rows = _rows(first / "questions.jsonl")
  for row in rows:
    row["video"] = str(tmp_path / "gone.mp4")
  moved = tmp_path / "moved"
  shutil.copytree(first, moved)
  _write(moved / "questions.jsonl", rows)
  config = load_config("configs/compare.py")
  config.evaluations = f"{moved},{second}"
  compare.run(config, tmp_path)
  assert "no pictures: " in (tmp_path / "comparison.html").read_text("utf-8")


def test_other_questions_are_refused(compared, tmp_path):
  _, _, (first, second) = compared
  fewer = tmp_path / "fewer"
  shutil.copytree(second, fewer)
  rows = _rows(fewer / "questions.jsonl")[1:]
  rows[0]["answer"] = "another"
  _write(fewer / "questions.jsonl", rows)
  config = load_config("configs/compare.py")
  config.evaluations = f"{first},{fewer}"
  with pytest.raises(
    ValueError, match="1 are only in the first, 0 only in the second, and 1 of"
  ):
    compare.run(config, tmp_path)
  config.allow_partial = True
  result = compare.run(config, tmp_path)
  assert result["questions"] == QUESTIONS - 2 and result["not_shared"] == 2
  assert "PARTIAL" in (tmp_path / "comparison.html").read_text("utf-8")


def test_what_cannot_be_compared(compared, tmp_path):
  _, _, (first, second) = compared
  config = load_config("configs/compare.py")
  config.evaluations = str(first)
  with pytest.raises(ValueError, match="names 1 folders, expected 2"):
    compare.run(config, tmp_path)
  config.evaluations = f"{first},{tmp_path}"
  with pytest.raises(ValueError, match="holds 0 evaluations"):
    compare.run(config, tmp_path)
  half = tmp_path / "half"
  half.mkdir()
  shutil.copy(first / "eval_manifest.json", half)
  config.evaluations = f"{first},{half}"
  with pytest.raises(ValueError, match="not finished"):
    compare.run(config, tmp_path)


def test_tasks_take_turns():
  rows = [dict(task=task, n=n) for n, task in enumerate("aaabca")]
  assert [row["n"] for row in compare.in_turn(rows, 5)] == [0, 3, 4, 1, 2]
