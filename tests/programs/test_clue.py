"""Clue inference: questions that an evaluation asks twice.

Completions are scripted; that the policy can be asked with the frames of both
passes is seen as it answers, too.
"""

import json
import pathlib

import numpy as np
import pytest

from cf_jax.programs import (
  answering,
  clue,
  eval_settings,
  evaluate,
  policies,
  questions,
)
from tests.conftest import load_config

K = 6  # frames of the second pass; the first has four
SAID = "<answer>{}</answer><glue>{}</glue>"
# Question -> video, what the first pass says, frames of the second. A video of
# ten seconds has forty frames.
ASKED = {
  "one": ("long", SAID.format("A", "[(2, 4.1)]"), [8, 10, 11, 13, 14, 16]),
  "two": (
    "long",
    SAID.format("A", "[(8, 9), (0, 1)]"),
    [0, 2, 4, 32, 34, 36],
  ),
  "few": ("long", SAID.format("A", "[(3, 3.2)]"), [10, 11, 12, 13, 14, 15]),
  "end": ("long", SAID.format("A", "[(9, 30)]"), [34, 35, 36, 37, 38, 39]),
  "part": ("long", SAID.format("A", "[(1, 3)]"), [12, 14, 15, 17, 18, 20]),
  "short": ("short", SAID.format("A", "[(0, 1)]"), [0, 1, 2, 3]),
  "none": ("long", "<answer>B</answer>", None),
  "empty": ("long", SAID.format("B", "[]"), None),
  "outside": ("long", SAID.format("A", "[(50, 60)]"), None),
  "reversed": ("long", SAID.format("B", "[(5, 3)]"), None),
  "broken": ("broken", None, None),
}
WHY = {
  "none": "no glue behind one answer",
  "empty": "an empty glue",
  "outside": "all outside the video",
  "reversed": "a glue that cannot be read",
}
AGAIN = "B"


@pytest.fixture(scope="module")
def manifest(write_video, tmp_path_factory):
  folder = tmp_path_factory.mktemp("videos")
  rng = np.random.default_rng(0)
  for name, count in (("long", 40), ("short", 4)):
    frames = rng.integers(0, 255, (count, 32, 64, 3), np.uint8)
    write_video(folder / f"{name}.mp4", frames)
  (folder / "broken.mp4").write_bytes(b"no video")
  rows = [
    dict(id=name, video=f"{video}.mp4", question=f"{name}?", answer="B")
    | dict(options=["x", "y"])
    for name, (video, *_) in ASKED.items()
  ]
  rows[1] |= dict(kind="grounded_qa", evidence=[[0, 1]])
  rows[4] |= dict(clip=[2.0, 8.0])
  path = folder / "questions.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture
def config(scored_run, cache_dir, manifest):
  config = load_config("configs/evaluate.py")
  config.update(
    benchmark="jsonl",
    annotations=str(manifest),
    policy=str(scored_run.experiment.workdir),
    select="uniform",
    num_keyframes=4,
    batch_size=3,
  )
  config.clue.frames = K
  config.prompt.style = "direct"
  config.prompt.build.update(show_time=True, time_format="{:.2f}s")
  config.data.max_skip_fraction = 0.5
  config.data.cache_dir = str(cache_dir)
  config.data.decode.processes = 0
  config.data.reader.num_threads = 1
  return config


class Script:
  """What is said in the place of the policy.

  Attributes:
    asked: (pass, id, prompt) of every question that was put.
    stop: batches of the second pass before it is interrupted; None: all.
    really: is the policy asked all the same?
  """

  def __init__(self, monkeypatch, path):
    self.asked, self.stop, self.really = [], None, False
    names = list(ASKED)
    answer = answering.Answerer.__call__
    _, tokenizer = policies.describe(path)

    def call(answerer, prepared, make_views, numbers, turn):
      second = prepared.keyframes.index.shape[1] == K
      if second and self.stop is not None:
        if not self.stop:
          raise KeyboardInterrupt
        self.stop -= 1
      said = [
        dict(prompt_tokens=9, new_tokens=1, ended=True)
        for _ in numbers.tolist()
      ]
      if self.really:
        said = answer(answerer, prepared, make_views, numbers, turn)
      prompt = prepared.view["keyframes"].prompt
      for row, number in enumerate(numbers.tolist()):
        token = prompt.token[row][prompt.mask[row]]
        words = tokenizer.decode(token)
        self.asked.append((second + 1, names[number], words))
        first = ASKED[names[number]][1]
        said[row]["response"] = AGAIN if second else first
      return said

    monkeypatch.setattr(answering.Answerer, "__call__", call)

  def put(self, number):
    """Questions of a pass, each once."""
    return {name for turn, name, _ in self.asked if turn == number}


@pytest.fixture
def script(monkeypatch, config):
  return Script(monkeypatch, config.policy)


def _rows(path):
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _parts(workdir):
  return [row for part in workdir.rglob("parts/*.jsonl") for row in _rows(part)]


def _files(folder):
  names = ("predictions.jsonl", "questions.jsonl", "scores.json")
  return [(folder / name).read_bytes() for name in names]


def test_the_second_pass_shows_the_clue(config, script, tmp_path):
  script.really = True
  scores = evaluate.run(config, tmp_path)
  folder = pathlib.Path(scores["folder"])
  assert folder.name.startswith(f"uniform-K4-clue{K}-28x56px-greedy-")
  rows = {row["id"]: row for row in _rows(folder / "predictions.jsonl")}
  assert list(rows) == list(ASKED)
  for name, (_, said, frames) in ASKED.items():
    row = rows[name]
    if name == "broken":
      assert "unreadable" in row and row["response"] == ""
    elif frames is None:
      assert row["response"] == said and row["no_clue"] == WHY[name]
      assert len(row["frames"]) == 4 and "first" not in row
    else:
      assert row["response"] == AGAIN and row["first"]["response"] == said
      assert row["frames"] == frames and "no_clue" not in row
      start_s = 2.0 if name == "part" else 0.0
      shown_s = np.array(frames) / 4 - start_s
      np.testing.assert_allclose(row["time_s"], shown_s, atol=1e-3)
      assert len(row["first"]["frames"]) == 4
      if name not in ("few", "end"):
        for seconds in row["time_s"]:
          assert any(s <= seconds <= e for s, e in row["clue"])
  assert rows["two"]["clue"] == [[8, 9], [0, 1]]
  assert rows["end"]["clue"] == [[9, 10]]  # clipped to the video
  assert rows["two"]["frames"] == sorted(rows["two"]["frames"])

  # A question is put in the grounded form, then in its own.
  put = {(turn, name): words for turn, name, words in script.asked}
  assert all("one?\nA. x\nB. y" in put[turn, "one"] for turn in (1, 2))
  assert "as in <glue>[(12.0, 15.5)]</glue>" in put[1, "one"]
  assert "the right option alone." in put[2, "one"]
  assert "glue" not in put[2, "one"] and "glue" in put[2, "two"]
  # Frames bear their true times, those of a clip from its start.
  shown = [f"{n / 4:.2f}s" for n in ASKED["one"][2]]
  places = [put[2, "one"].index(time) for time in shown]
  assert places == sorted(places)
  assert "1.00s" in put[2, "part"] and "3.50s" not in put[2, "part"]

  # The answer of the second pass counts, or that of the first stands.
  scored = {row["id"]: row for row in _rows(folder / "questions.jsonl")}
  right = {k: row["score"]["accuracy"] for k, row in scored.items()}
  assert [k for k, score in right.items() if not score] == ["outside", "broken"]
  manifest = json.loads((folder / "eval_manifest.json").read_text())
  assert manifest["results"]["clue"] == dict(
    twice=6,
    once=dict.fromkeys(sorted(WHY.values()), 1),
    fewer_frames=1,
    beside=2,
  )
  assert manifest["settings"]["clue"]["frames"] == K
  assert "<glue>" in manifest["settings"]["clue"]["template"]
  assert "<glue>" in manifest["example"]["first"]
  assert "<glue>" not in manifest["example"]["prompt"]
  table = (folder / "table.md").read_text("utf-8")
  assert "6 questions were asked twice; of 4 the first answer stands" in table
  assert "1 an empty glue" in table and "2 clues have fewer than 6" in table
  assert "1 second passes show fewer than 6 frames" in table


def test_goes_on_between_the_passes(config, script, tmp_path):
  whole = evaluate.run(config.copy_and_resolve_references(), tmp_path / "whole")
  script.asked.clear()
  script.stop = 1
  with pytest.raises(KeyboardInterrupt):
    evaluate.run(config.copy_and_resolve_references(), tmp_path / "work")
  twice = {name for name, asked in ASKED.items() if asked[2]}
  assert script.put(1) == ASKED.keys() - {"broken"}
  once = script.put(2)
  assert once < twice and once
  waiting = {row["id"] for row in _parts(tmp_path / "work") if clue.waits(row)}
  assert waiting == twice  # their lines stand before those of the second pass
  script.asked.clear()
  script.stop = None
  scores = evaluate.run(config, tmp_path / "work")
  assert script.put(1) == set() and script.put(2) == twice - once
  folders = [pathlib.Path(made["folder"]) for made in (whole, scores)]
  assert folders[0].name == folders[1].name
  assert _files(folders[0]) == _files(folders[1])


def test_nothing_is_scored_between_the_passes(config, script, tmp_path):
  """Of two processes the first is done, the second has a pass to go."""
  config.shard.count = 2
  runs = [config.copy_and_resolve_references() for _ in range(2)]
  runs[1].shard.index = 1
  assert evaluate.run(runs[0], tmp_path) is None
  script.stop = 0
  with pytest.raises(KeyboardInterrupt):
    evaluate.run(runs[1], tmp_path)
  assert {row["id"] for row in _parts(tmp_path)} == ASKED.keys()
  assert evaluate.run(runs[0], tmp_path) is None
  assert not list(tmp_path.rglob("predictions.jsonl"))
  script.stop = None
  for run in runs:
    scores = evaluate.run(run, tmp_path)
  rows = _rows(pathlib.Path(scores["folder"]) / "predictions.jsonl")
  assert sum("first" in row for row in rows) == 6


def test_frames_that_cannot_be_read(config, script, tmp_path, monkeypatch):
  """The first answer stands where the second pass has no frames."""
  prepare = answering.Preparer.prepare

  def fail(self, group, numbers):
    if self._within is None:
      return prepare(self, group, numbers)
    lost = dict.fromkeys(numbers, "long.mp4: lost")
    return answering.Ready([], None, None, lost)

  monkeypatch.setattr(answering.Preparer, "prepare", fail)
  scores = evaluate.run(config, tmp_path)
  folder = pathlib.Path(scores["folder"])
  row = _rows(folder / "predictions.jsonl")[0]
  assert row["response"] == ASKED["one"][1] and row["clue"] == [[2, 4.1]]
  assert row["no_clue"] == "its frames cannot be read: long.mp4: lost"
  counts = json.loads((folder / "eval_manifest.json").read_text())["results"]
  assert counts["clue"]["once"]["its frames cannot be read"] == 6


def test_another_clue_is_another_evaluation(config, script, tmp_path):
  """And without it, nothing of it is in the settings."""
  made = []
  config.num_questions = 2
  for frames in (0, 2, 4):
    config.clue.frames = frames
    scores = evaluate.run(config.copy_and_resolve_references(), tmp_path)
    made.append(pathlib.Path(scores["folder"]))
  assert len(set(made)) == 3 and "clue" not in made[0].name
  manifest = json.loads((made[0] / "eval_manifest.json").read_text())
  assert (
    "clue" not in manifest["settings"] and "first" not in (manifest["example"])
  )
  assert "clue" not in manifest["results"]
  assert "clue" not in (made[0] / "table.md").read_text("utf-8")


def test_other_kinds_are_refused(config, tmp_path):
  path = tmp_path / "open.jsonl"
  row = dict(id="0", video="long.mp4", question="q?", answer="red")
  path.write_text(json.dumps(row | dict(kind="free_form")))
  config.annotations = str(path)
  config.data.allow_outside = True
  with pytest.raises(
    ValueError, match=r"config.clue.frames=6 asks .* there are free_form"
  ):
    evaluate.run(config, tmp_path)


def test_a_run_that_was_never_asked_for_intervals(config, tmp_path):
  config.prompt.style = None  # the run's own
  with pytest.raises(ValueError, match="without a template of grounded_qa"):
    evaluate.run(config, tmp_path)


def test_settings_that_cannot_be_followed(config, scored_run):
  config.clue.frames = -1
  with pytest.raises(ValueError, match="config.clue.frames must be at least 0"):
    eval_settings.check_settings(config)
  config.clue.frames = 5
  config.prompt.frames_per_slice = 2
  with pytest.raises(ValueError, match="config.clue.frames=5 frames do not"):
    eval_settings.settle(config, scored_run.experiment.model)


def test_the_first_pass_has_no_benchmark_s_words(config):
  config.update(benchmark="videomme", annotations="")
  words = questions.Wording(config, form=clue.FORM)
  assert set(words.templates.values()) == {config.prompt.templates[clue.FORM]}


@pytest.mark.parametrize(
  ("response", "expected"),
  [
    ("<answer>A</answer><glue>[(1, 2.5)]</glue>", {"clue": [[1, 2.5]]}),
    (
      "<think>so</think><answer>A</answer><glue>[(8, 12), (0, 1)]</glue>",
      {"clue": [[8, 10], [0, 1]]},
    ),
    (
      "<answer>A</answer><glue>[(1, 2), (10, 12)]</glue>",
      {"clue": [[1, 2]]},  # one of two lies behind the end
    ),
    ("<glue>[(1, 2)]</glue>", {"no_clue": WHY["none"]}),
    ("<glue>[(1, 2)]</glue><answer>A</answer>", {"no_clue": WHY["none"]}),
    ("", {"no_clue": WHY["none"]}),
    ("<answer>A</answer><glue>1 to 2</glue>", {"no_clue": WHY["reversed"]}),
    (
      "<answer>A</answer><glue>[(1, 2), (3, 3)]</glue>",
      {"no_clue": WHY["reversed"]},
    ),
    ("<answer>A</answer><glue>[]</glue>", {"no_clue": WHY["empty"]}),
    ("<answer>A</answer><glue>[(10, 11)]</glue>", {"no_clue": WHY["outside"]}),
  ],
)
def test_what_the_first_pass_names(response, expected):
  assert clue.read(response, 10.0) == expected
