"""Public datasets: the published files, the documented forms, every error.

The published files are read from ../shared/data, where they lie; the counts are
those that the benchmarks state.
"""

import collections
import csv
import json
import pathlib
import re

import hypothesis
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies

from cf_jax.data import answers, datasets, records, rows
from tests.conftest import ROOT

SHARED = ROOT.parent / "shared" / "data"


def _published(*names):
  path = SHARED.joinpath(*names)
  if not path.exists():
    pytest.skip(f"{path} is not there")
  return path


def _json(path, made):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(made))
  return path


def _jsonl(path, *made):
  path.write_text("".join(json.dumps(row) + "\n" for row in made))
  return path


def _counts(samples, group):
  return dict(
    collections.Counter(datasets.groups_of(s)[group] for s in samples)
  )


# -- the published files


def test_videomme_as_published():
  samples = datasets.read("videomme", _published("videomme"))
  assert len(samples) == 2700
  assert _counts(samples, "duration") == dict(short=900, medium=900, long=900)
  assert len(_counts(samples, "task")) == 12
  assert _counts(samples, "task")["OCR Problems"] == 139
  first = samples[0]
  assert (first.id, first.answer) == ("001-1", "C")
  assert first.video == "fFjv93ACGo8.mp4"
  assert first.options[0] == "Apples."
  assert dict(first.groups)["domain"] == "Knowledge"
  assert collections.Counter(s.answer for s in samples) == dict(
    A=677, B=735, C=684, D=604
  )
  short = datasets.read(
    "videomme",
    _published("videomme"),
    only=("duration=short", "task=OCR Problems", "task=Spatial Perception"),
  )
  assert {s.task for s in short} == {"OCR Problems", "Spatial Perception"}
  assert {dict(s.groups)["duration"] for s in short} == {"short"}


def test_lvbench_as_published():
  path = _published("lvbench", "lvbench_clean.json")
  samples = datasets.read("lvbench", path)
  assert len(samples) == 1519
  # Counted under the first type, as the official table.
  assert _counts(samples, "task") == {
    "entity recognition": 547,
    "event understanding": 513,
    "key information retrieval": 193,
    "reasoning": 146,
    "temporal grounding": 65,
    "summarization": 55,
  }
  assert samples[0].id == "00000000_0" and samples[1].id == "00000000_1"
  assert samples[0].evidence == ((15.0, 19.0),)
  assert samples[0].answer == "D" and samples[0].options[3] == "1633"
  # Times that end before they start are said, not used.
  wrong = [s for s in samples if any("time_reference" in f for f in s.flaws)]
  assert len(wrong) == 15 and not any(s.evidence for s in wrong)


def test_mlvu_as_published():
  samples = datasets.read("mlvu", _published("mlvu"))
  assert _counts(samples, "task") == dict(findNeedle=355, count=206, order=259)
  assert samples[0].id == "2_needle/0"
  assert samples[0].video == "2_needle/needle_32.mp4"
  # Two published answers are none of their candidates: kept, and said.
  odd = [s for s in samples if s.answer not in "ABCDE"]
  assert [s.id for s in odd] == ["2_needle/34", "2_needle/338"]
  assert all(s.flaws for s in odd)


def test_mvbench_as_published():
  samples = datasets.read("mvbench", _published("mvbench"))
  tasks = ("action_localization", "action_sequence")
  tasks += ("moving_direction", "object_existence")
  assert _counts(samples, "task") == dict.fromkeys(tasks, 200)
  of = {s.id: s for s in samples}
  part = of["action_sequence/0"]
  assert part.clip == (1.5, 17.1) and part.duration_s == pytest.approx(15.6)
  assert part.video == "star/Charades_v1_480/ZS9XR.mp4"
  whole = of["moving_direction/0"]
  assert (whole.clip, whole.answer) == (None, "A")
  assert of["action_localization/0"].evidence == ((0.0, 15.2),)
  cut = datasets.read("mvbench", _published("mvbench"), clips=False)
  assert not any(s.clip for s in cut)


def test_charades_as_published():
  path = _published("charades_sta")
  samples = datasets.read("charades_sta", path)
  assert len(samples) == 3714 and samples[0].id == "12404"
  assert (samples[0].start_s, samples[0].end_s) == (24.3, 30.4)
  assert (samples[0].duration_s, samples[0].video) == (30.96, "3MSZA.mp4")
  assert not any(s.flaws for s in samples)


def test_nextqa_and_nextgqa_as_published():
  samples = datasets.read("nextqa", _published("nextqa"))
  assert len(samples) == 4996 and samples[0].id == "4010069381_6"
  # The official groups: causal, temporal, descriptive.
  assert _counts(samples, "type") == dict(
    causal=2607, temporal=1612, descriptive=777
  )
  folder = _published("nextgqa")
  grounded = datasets.read("nextgqa", folder, split="val")
  assert len(grounded) == 3358
  assert {s.kind for s in grounded} == {"grounded_qa"}
  with open(folder / "val.csv") as file:
    first = next(csv.DictReader(file))
  found = next(s for s in grounded if s.id == "4882821564_1")
  assert found.options[ord(found.answer) - ord("A")] == first["answer"]
  assert found.evidence == ((13.8, 29.8),)
  assert sum(len(s.evidence) > 1 for s in grounded) == 339
  files = datasets.annotation_files("nextgqa", folder, split="val")
  assert [path.name for path in files] == ["val.csv", "gsub_val.json"]


def test_qvhighlights_as_published():
  samples = datasets.read("qvhighlights", _published("qvhighlights"))
  assert len(samples) == 1550 and samples[0].id == "2579"
  assert samples[0].video == "NUsG9BgSes0_210.0_360.0.mp4"
  assert samples[0].evidence == ((82.0, 150.0),)
  assert samples[0].saliency[0] == (41, (1, 1, 2))
  assert sum(len(s.saliency) for s in samples) == 32549
  assert max(len(s.evidence) for s in samples) == 25


def test_tempcompass_as_published():
  samples = datasets.read("tempcompass", _published("tempcompass"))
  assert len(samples) == 1580 and len({s.video for s in samples}) == 410
  first = samples[0]
  assert first.id == "multi-choice/1034419625/action/0"
  assert first.question == "What is the man doing in the video?"
  assert first.options[0] == "dunking a basketball" and first.answer == "A"
  path = _published("tempcompass", "questions_multi-choice.json")
  truth = json.loads(path.read_text())
  for sample in samples:  # the answer is the published option
    _, video, aspect, number = sample.id.split("/")
    said = truth[video][aspect][int(number)]["answer"].strip()
    assert said.startswith(sample.answer)
    assert said.endswith(sample.options[ord(sample.answer) - ord("A")])


def test_got10k_and_time_r1_as_published():
  samples = datasets.read("got10k", _published("got10k"))
  assert len(samples) == 180 and {len(s.boxes) for s in samples} == {8}
  assert samples[0].id == "GOT-10k_Val_000010" == samples[0].video
  assert samples[0].fps == 10 and "sloth" in samples[0].question
  assert samples[0].boxes[0] == (0.093, 0.0, 0.8, 0.797)
  for sample in samples:
    answers.check_sample(sample)
    assert answers.accuracy(sample.answer, sample) == 1

  samples = datasets.read("timer1", _published("timer1"))
  assert len(samples) == 2500
  assert samples[0].video == "timerft_data/QtWT8rxUuNk.mp4"
  assert sum(bool(s.flaws) for s in samples) == 48
  # A file that was cut is not cut again; one that was not, is.
  assert samples[1].clip is None and "00:00:39" in samples[1].video
  assert sum(s.clip is not None for s in samples) == 94 + 62
  bench = datasets.read("tvgbench", _published("timer1"))
  assert sum("is empty" in f for s in bench for f in s.flaws) == 11
  assert len(bench) == 800 and bench[0].id == "0"
  assert (bench[0].start_s, bench[0].end_s) == (13.4, 28.1)
  assert len(_counts(bench, "query_type")) == 11


# -- made-up files of the documented forms

BOX = [[0, 0, 0.5, 0.5], [0.1, 0.1, 0.6, 0.6]]
VIDEO_R1 = {
  "problem_id": 7,
  "problem": "Which?",
  "data_type": "video",
  "problem_type": "multiple choice",
  "options": ["A. red", "B. blue"],
  "process": "<think>It is blue.</think>",
  "solution": "<answer>B</answer>",
  "path": "./CLEVRER/train/v.mp4",
  "data_source": "CLEVRER",
}
LVBENCH_QA = {
  "uid": 55,
  "question": "Which year?\n(A) 1636\n(B) 1366",
  "answer": "B",
  "question_type": ["reasoning", "summarization"],
  "time_reference": "01:00-01:30",
}


def test_lvbench_of_the_published_form(tmp_path):
  video = {"key": "Cm73", "type": "cartoon", "qa": [LVBENCH_QA]}
  video["video_info"] = {"duration_minutes": 2.0}
  _jsonl(tmp_path / "video_info.meta.jsonl", video)
  (sample,) = datasets.read("lvbench", root=tmp_path)
  assert (sample.id, sample.question) == ("55", "Which year?")
  assert (sample.options, sample.answer) == (("1636", "1366"), "B")
  assert sample.task == "reasoning" and sample.evidence == ((60.0, 90.0),)
  assert sample.duration_s == 120
  assert dict(sample.groups)["question_types"] == "reasoning, summarization"


def test_mlvu_in_words(tmp_path):
  row = dict(video="a.mp4", duration=9, question="Describe.", answer="It is.")
  _json(
    tmp_path / "json/8_sub_scene.json",
    [row | {"question_type": "subPlot", "scoring_points": ["it", "is"]}],
  )
  _json(tmp_path / "json/9_summary.json", [row | {"question_type": "summary"}])
  scene, summary = datasets.read("mlvu", root=tmp_path)
  assert scene.kind == summary.kind == "open_ended"
  assert scene.events == ("it", "is") and scene.answer == "It is."
  # The right text twice: the last letter, as the official script, and said.
  row |= dict(candidates=["x", "y", "x"], answer="x", question_type="plotQA")
  path = _json(tmp_path / "1_plotQA.json", [row])
  (sample,) = datasets.read("mlvu", path)
  assert sample.answer == "C" and "options A, C" in sample.flaws[0]
  wrong = _json(tmp_path / "3_ego.json", [row | {"answer": "z"}])
  with pytest.raises(ValueError, match="row 0: field 'answer': got 'z', none"):
    datasets.read("mlvu", wrong)


def test_mvbench_of_pictures_and_tvbench(tmp_path):
  row = dict(video="clip_01", question="Why?", candidates=["a", "b"])
  row |= dict(answer="b", start=2.0, end=5.0)
  path = _json(tmp_path / "episodic_reasoning.json", [row])
  (sample,) = datasets.read("mvbench", path)
  assert (sample.fps, sample.clip) == (3.0, (2.0, 5.0))
  assert sample.video == "tvqa/frames_fps3_hq/clip_01"
  path = _json(tmp_path / "action_count.json", [row | {"video": "v.avi"}])
  (sample,) = datasets.read("tvbench", path)
  assert (sample.video, sample.fps) == ("action_count/v.avi", None)
  with pytest.raises(ValueError, match="task 'other'.*action_antonym"):
    datasets.read("mvbench", _json(tmp_path / "other.json", [row]))


def test_tempcompass_all_tasks(tmp_path):
  def put(name, **row):
    _json(tmp_path / f"questions/{name}.json", {"1_reverse": {"order": [row]}})

  put("multi-choice", question="What?\nA. up\nB. down", answer="B. down")
  put("yes_no", question="Up?", answer="no")
  put(
    "caption_matching",
    question="Which?\nSentence A: It rises.\nSentence B: It falls: fast.",
    answer="Sentence B: It falls: fast.",
  )
  put("captioning", question="Write a caption.", answer="B. down")
  of = {s.task: s for s in datasets.read("tempcompass", root=tmp_path)}
  assert len(of) == 4
  assert of["yes_no"].answer == "no" and of["yes_no"].kind == "free_form"
  match = of["caption_matching"]
  assert match.labels == ("Sentence A", "Sentence B") and match.answer == "B"
  assert match.options == ("It rises.", "It falls: fast.")
  caption = of["captioning"]
  assert caption.id == "captioning/1_reverse/order/0"
  assert caption.rubric == "What?\nA. up\nB. down"
  assert (caption.answer, caption.kind) == ("B. down", "open_ended")
  (tmp_path / "questions/multi-choice.json").unlink()
  with pytest.raises(ValueError, match="multi-choice.json"):
    datasets.read("tempcompass", root=tmp_path)


def test_nextgqa_of_a_text_that_is_there_twice(tmp_path):
  (tmp_path / "test.csv").write_text(
    "video_id,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    "7,how,happy,2,CH,sad,happy,glad,happy,calm\n"
  )
  _json(
    tmp_path / "gsub_test.json",
    {"7": {"duration": 9, "location": {"2": [[3, 4], [-0.1, 1]]}}},
  )
  _json(tmp_path / "map_vid_vidorID.json", {"7": "0104/7"})
  (sample,) = datasets.read("nextgqa", tmp_path)
  assert (sample.id, sample.video) == ("7_2", "0104/7.mp4")
  assert sample.answer == "B"  # the first, as the official code
  assert sample.evidence == ((-0.1, 1.0), (3.0, 4.0))
  assert len(sample.flaws) == 3 and sample.start_s is None
  # Training has no intervals.
  (tmp_path / "test.csv").rename(tmp_path / "train.csv")
  (sample,) = datasets.read("nextgqa", tmp_path, split="train")
  assert (sample.kind, sample.evidence) == ("multiple_choice", ())


def test_vsibench(tmp_path):
  row = dict(id=3, dataset="scannet", scene_name="scene0_00", question="How?")
  path = _jsonl(
    tmp_path / "test.jsonl",
    row
    | dict(question_type="room_size_estimation", ground_truth="21.8")
    | {"options": None},
    row
    | dict(id=4, question_type="object_rel_distance", ground_truth="B")
    | {"options": ["A. sofa", "B. chair"]},
  )
  number, choice = datasets.read("vsibench", path)
  assert (number.kind, number.answer) == ("regression", "21.8")
  assert (choice.kind, choice.options) == (
    "multiple_choice",
    ("sofa", "chair"),
  )
  assert number.video == "scannet/scene0_00.mp4" and number.id == "3"


def test_mmvu_and_video_mmmu(tmp_path):
  row = dict(
    id="validation_0",
    video="https://host/resolve/main/videos/Art/0.mp4",
    question_type="open-ended",
    metadata={"subject": "Art"},
    question="Which?",
    choices=dict.fromkeys("ABCDE", ""),
    answer="Dolly Zoom",
  )
  choice = dict(question_type="multiple-choice", answer="B", id="validation_1")
  path = _json(
    tmp_path / "validation.json",
    [row, row | choice | {"choices": {"A": "10.0", "B": "5.0"}}],
  )
  words, letter = datasets.read("mmvu", path)
  assert (words.video, words.kind) == ("Art/0.mp4", "open_ended")
  assert (letter.options, letter.answer) == (("10.0", "5.0"), "B")

  row = dict(id="dev_Biology_3", question="Which?", options=["a", "b"])
  row["answer"] = "A"
  for track in ("Perception", "Comprehension"):
    _json(tmp_path / f"{track.lower()}_video.json", {track: {"0": row}})
  opened = row | dict(options=[], answer="12.97", question_type="open")
  _json(tmp_path / "adaptation_video.json", {"Adaptation": {"0": opened}})
  samples = datasets.read("video_mmmu", tmp_path)
  assert sorted(s.id for s in samples) == [
    f"{track}/dev_Biology_3"
    for track in ("Adaptation", "Comprehension", "Perception")
  ]
  assert {s.video for s in samples} == {"Science/dev_Biology_3.mp4"}
  assert [s.answer for s in samples if not s.options] == ["12.97"]

  table = pyarrow.table({name: [value] for name, value in row.items()})
  (tmp_path / "copy/Perception").mkdir(parents=True)
  path = tmp_path / "copy/Perception/test-00000-of-00001.parquet"
  pyarrow.parquet.write_table(table, path)
  (sample,) = datasets.read("video_mmmu", root=tmp_path / "copy")
  assert sample == samples[-1]._replace(
    video=str(tmp_path / "copy/Science/dev_Biology_3.mp4")
  )


LONGVIDEOBENCH = dict(
  id="v_0",
  video_path="v.mp4",
  question="Which?",
  candidates=["a", "b", "c", "d", "e"],
  correct_choice=4,
  question_category="TOS",
  topic_category="KA",
  level="L2-Relation",
  duration_group=600,
  duration=190.16,
  subtitle_path="v_en.json",
  starting_timestamp_for_subtitles=30,
)


def test_longvideobench(tmp_path):
  _json(tmp_path / "lvb_val.json", [LONGVIDEOBENCH])
  (tmp_path / "videos").mkdir()
  (sample,) = datasets.read("longvideobench", root=tmp_path)
  assert sample.answer == "E" and sample.subtitles == ""
  assert sample.video == str(tmp_path / "videos/v.mp4")
  with pytest.raises(ValueError, match="no folder .*subtitles"):
    datasets.read("longvideobench", root=tmp_path, subtitles=True)
  _json(tmp_path / "subtitles/v_en.json", [])
  (sample,) = datasets.read("longvideobench", root=tmp_path, subtitles=True)
  assert sample.subtitles == str(tmp_path / "subtitles/v_en.json")
  assert sample.subtitles_start_s == 30
  flat = {k: v for k, v in LONGVIDEOBENCH.items() if k != "candidates"}
  flat |= {f"option{n}": "abc"[n] if n < 3 else "N/A" for n in range(5)}
  path = _json(tmp_path / "flat.json", [flat | {"correct_choice": 2}])
  (sample,) = datasets.read("longvideobench", path)
  assert (sample.options, sample.answer) == (("a", "b", "c"), "C")


def test_charades_of_every_form(tmp_path):
  text = tmp_path / "charades_sta_test.txt"
  text.write_text("3MSZA 24.3 30.4##person turn a light on.\n\n")
  shape = {"duration": 30.96, "timestamps": [[24.3, 30.4]]}
  shape["sentences"] = [" person turn a light on. "]
  whole = _json(tmp_path / "test.json", {"3MSZA": shape})
  flat = _jsonl(
    tmp_path / "flat.jsonl",
    dict(video="3MSZA.mp4", caption="person turn a light on.")
    | {"timestamp": [24.3, 30.4]},
  )
  for path, name in ((text, "0"), (whole, "3MSZA/0"), (flat, "0")):
    (sample,) = datasets.read("charades_sta", path)
    assert (sample.id, sample.video) == (name, "3MSZA.mp4")
    assert sample.question == "person turn a light on."
    assert (sample.start_s, sample.end_s) == (24.3, 30.4)
    assert answers.accuracy(sample.answer, sample) == 1


def test_activitynet_and_dream(tmp_path):
  shape = {"duration": 55.15, "timestamps": [[0, 4.14], [4.14, 60]]}
  shape["sentences"] = ["Two men.", " One man."]
  _json(tmp_path / "val_2.json", {"v_a": shape})
  (tmp_path / "videos").mkdir()
  (tmp_path / "videos/v_a.mkv").touch()
  first, second = datasets.read("activitynet", root=tmp_path)
  assert (first.id, second.id) == ("v_a/0", "v_a/1")
  assert first.video == str(tmp_path / "videos/v_a.mkv")
  assert "ends at 60 s" in second.flaws[0] and not first.flaws

  said = [{"role": "user", "content": [{"text": "?"}]}]
  said += [{"role": "assistant", "content": [{"reference": "It is."}]}]
  row = dict(messages=said, dataset="DREAM/youtube", idx=1, vid=1)
  row["extra_info"] = {"duration": 5.09, "events": ["it is"]}
  flat = dict(idx=2, video_file="video/2.mp4", description="It was.")
  flat |= dict(events=["it was"], duration=3.0, source="youtube")
  path = _jsonl(tmp_path / "DREAM-1k.jsonl", row, flat)
  one, two = datasets.read("dream1k", path)
  assert (one.id, one.video, one.events) == ("1", "1.mp4", ("it is",))
  assert (one.answer, one.task) == ("It is.", "youtube")
  assert (two.video, two.task) == ("2.mp4", "youtube")


def test_video_r1(tmp_path):
  kinds = dict(numerical="3", OCR="EXIT", regression="1.5")
  made = [VIDEO_R1] + [
    VIDEO_R1
    | dict(problem_id=n, problem_type=kind, options=[], process=None)
    | dict(solution=f"<answer>{answer}</answer>")
    for n, (kind, answer) in enumerate(kinds.items())
  ]
  made.append(
    made[1] | dict(problem_id=9, data_type="image", path="./Math/a.png")
  )
  path = _json(tmp_path / "Video-R1-260k.json", made)
  samples = datasets.read("video_r1", root=tmp_path)
  assert len(samples) == len(made)
  first = samples[0]
  assert (first.id, first.answer, first.options) == ("7", "B", ("red", "blue"))
  assert first.reasoning == "It is blue."
  assert first.video == str(tmp_path / "CLEVRER/train/v.mp4")
  assert [s.kind for s in samples[1:4]] == ["numerical", "ocr", "regression"]
  for sample in samples:
    answers.check_sample(sample)
  # With the reasoning that the cold start teaches, each row must have one.
  with pytest.raises(ValueError, match=r"row 1: field 'process': null"):
    datasets.read("video_r1_cot", path)


def test_llava_video(tmp_path):
  def turn(speaker, value):
    return {"from": speaker, "value": value}

  row = dict(id="x", video="academic_source/a.mp4", data_source="academic")
  row["conversations"] = [
    turn("human", "<image>\nWho?\nA. Ann\nB. Bob\nAnswer by the letter."),
    turn("gpt", "B."),
    turn("human", "When?\nA. now\nB. then"),
    turn("gpt", "A. Now"),
  ]
  path = tmp_path / "0_30_s/0_30_s_mc_qa.json"
  _json(path, [row, row])
  samples = datasets.read("llava_video", root=tmp_path)
  assert [s.id for s in samples] == [
    f"0_30_s_mc_qa/{n}/{t}" for n in range(2) for t in range(2)
  ]
  assert samples[0].question == "Who?"
  assert (samples[0].options, samples[0].answer) == (("Ann", "Bob"), "B")
  assert samples[1].answer == "A"


def test_the_page_says_what_the_table_says():
  page = (ROOT / "docs/datasets.md").read_text()
  for name, dataset in datasets.DATASETS.items():
    assert f"| `{name}` | {dataset.title} | {dataset.role} |" in page
    for said in (dataset.published, dataset.licence, dataset.ids):
      assert f"| {said} |" in page, name
    for split, patterns in dataset.splits.items():
      named = ", ".join(f"`{pattern}`" for pattern in patterns)
      assert f"{split}: {named}" in page, name


# -- paths


def test_videos_are_looked_for_below_the_root(tmp_path):
  row = dict(
    id="a", **{k: LONGVIDEOBENCH[k] for k in LONGVIDEOBENCH if k != "id"}
  )
  path = _json(tmp_path / "lvb_val.json", [row])
  (sample,) = datasets.read("longvideobench", path)
  assert sample.video == "v.mp4"
  other = tmp_path / "elsewhere"
  other.mkdir()
  (sample,) = datasets.read("longvideobench", path, videos=other)
  assert sample.video == str(other / "v.mp4")
  (sample,) = datasets.read("longvideobench", root=tmp_path, videos="elsewhere")
  assert sample.video == str(other / "v.mp4")


@pytest.mark.parametrize(
  "name", ["/etc/v.mp4", "../v.mp4", "a/../../v.mp4", "http://x/v.mp4", "a\nb"]
)
def test_no_path_leads_out_of_the_copy(tmp_path, name):
  path = _json(tmp_path / "v.json", [LONGVIDEOBENCH | {"video_path": name}])
  with pytest.raises(ValueError, match=r"v.json: row 0: got the path"):
    datasets.read("longvideobench", path)


# -- errors


def test_the_only_split_of_a_folder():
  samples = datasets.read("nextgqa", _published("nextgqa"))  # of val alone
  assert len(samples) == 3358
  with pytest.raises(ValueError, match="has none of test.csv"):
    datasets.read("nextgqa", _published("nextgqa"), split="test")


def test_videos_lie_in_the_folder_of_their_split(tmp_path):
  row = dict(path="a/GOT-10k_1", object="cat", gt=[[0, 0, 1, 1]] * 2)
  for split in ("val", "train"):
    (tmp_path / split).mkdir()
    _json(tmp_path / f"got_{split}.json", [row])
  for split, folder in (("train", "train"), ("val", "val"), (None, "val")):
    (sample,) = datasets.read("got10k", root=tmp_path, split=split)
    assert sample.video == str(tmp_path / folder / "GOT-10k_1")


def test_unknown_names_and_missing_files(tmp_path):
  with pytest.raises(ValueError, match="'vidomme'.*expected one of.*videomme"):
    datasets.read("vidomme", tmp_path)
  with pytest.raises(ValueError, match="give annotations .* or root"):
    datasets.read("videomme")
  with pytest.raises(ValueError, match="has none of videomme/test-"):
    datasets.read("videomme", root=tmp_path)
  with pytest.raises(ValueError, match="there is no .*nowhere"):
    datasets.read("videomme", tmp_path / "nowhere")
  with pytest.raises(ValueError, match="no split 'dev'; expected one of test"):
    datasets.read("videomme", tmp_path, split="dev")
  with pytest.raises(ValueError, match="has no subtitles"):
    datasets.read("nextqa", tmp_path, subtitles=True)
  path = _jsonl(tmp_path / "a.xml", {})
  with pytest.raises(ValueError, match="kind '.xml', expected one of .json"):
    datasets.read("videomme", path)
  path = tmp_path / "a.parquet"
  path.write_bytes(b"PAR1 not at all")
  with pytest.raises(ValueError, match="a.parquet: not a parquet file"):
    datasets.read("videomme", path)
  path = tmp_path / "a.json"
  path.write_text('[{"a": 1')
  with pytest.raises(ValueError, match="a.json: not JSON .*line 1 column 9"):
    datasets.read("videomme", path)
  with pytest.raises(ValueError, match="no question in the annotation"):
    datasets.read("videomme", _json(tmp_path / "none.json", []))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"id": None}, "row 1: field 'id': null"),
    ({"question": 3}, "row 1: field 'question': got 3, expected text"),
    ({"candidates": "ab"}, "field 'candidates': got 'ab', expected a list"),
    ({"candidates": ["a"]}, "field 'candidates': got 1 options"),
    ({"correct_choice": 5}, "field 'correct_choice': got 5 for 5 options"),
    ({"correct_choice": "x"}, "field 'correct_choice': got 'x', expected a"),
    ({"duration": -1}, "field 'duration': got -1, expected a number"),
    ({"duration": float("nan")}, "field 'duration': got nan"),
    ({"id": "v_0"}, "row 1: id 'v_0' is taken by .*row 0"),
  ],
)
def test_a_wrong_row_names_file_row_and_field(tmp_path, change, message):
  path = _json(
    tmp_path / "lvb_val.json",
    [LONGVIDEOBENCH, LONGVIDEOBENCH | {"id": "v_1"} | change],
  )
  with pytest.raises(ValueError, match=f"lvb_val.json: .*{message}") as caught:
    datasets.read("longvideobench", path)
  assert "(1 wrong rows in all" in str(caught.value)
  assert len(datasets.read("longvideobench", path, max_bad_rows=1)) == 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"answer": "E"}, "field 'answer': got 'E', expected one of the letters"),
    ({"answer": "A. Pear"}, "got 'A. Pear', but option A is 'Apples.'"),
    ({"duration": "tiny"}, "field 'duration': got 'tiny', expected one of"),
    ({"options": ["A. a", True]}, "field 'options': got True in the list"),
  ],
)
def test_answers_fit_their_options(tmp_path, change, message):
  row = dict(
    videoID="v",
    question_id="001-1",
    question="Which?",
    options=["A. Apples.", "B. Candles."],
    answer="A",
    task_type="Counting Problem",
    duration="short",
    domain="Knowledge",
    sub_category="Geography",
  )
  assert datasets.read("videomme", _json(tmp_path / "a.json", [row]))
  with pytest.raises(ValueError) as caught:
    datasets.read("videomme", _json(tmp_path / "a.json", [row | change]))
  assert message in str(caught.value)


@pytest.mark.parametrize(
  ("name", "file", "made", "message"),
  [
    ("charades_sta", "a.txt", "v 3.0 2.0##x", "a.txt:1: .*ends before it st"),
    ("charades_sta", "a.txt", "v 3.0 3.0##x", "a.txt:1: .*which is empty"),
    ("charades_sta", "a.txt", "v 3.0 x", "a.txt:1: got 'v 3.0 x', expected V"),
    ("activitynet", "a.json", '{"v": {"timestamps": [[0, 1]]}}', "'sentences'"),
    ("nextqa", "a.csv", "video,a0\n1", "a.csv:2: got 1 values, expected 2"),
    ("nextqa", "a.csv", "", "a.csv:1: got the names"),
    ("nextgqa", "val.csv", "video_id\n1", "expected gsub_val.json beside it"),
    ("qvhighlights", "a.jsonl", "{", "a.jsonl:1: not JSON"),
    ("qvhighlights", "a.jsonl", "3", "a.jsonl:1: got 3, expected an object"),
    ("mmvu", "a.json", "{}", "a.json: got a JSON dict, expected a list"),
    ("video_mmmu", "a.json", '{"X": {}}', "got 'X', expected .* Perception"),
    ("tempcompass", "yes_no.json", '{"v": 3}', "v: expected an object"),
    ("got10k", "a.json", '[{"path": "a", "gt": [[0, 0, 2, 1]]}]', "fractions"),
  ],
)
def test_broken_files(tmp_path, name, file, made, message):
  path = tmp_path / file
  path.write_text(made)
  with pytest.raises(ValueError, match=message):
    datasets.read(name, path)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"solution": "B"}, "field 'solution': got 'B', expected <answer>"),
    ({"solution": "<answer>C</answer>"}, "field 'solution': got 'C'"),
    ({"problem_type": "essay"}, "field 'problem_type': got 'essay'"),
    ({"path": "./a.png"}, "field 'path': got 'a.png' for data_type 'video'"),
    ({"process": "no tags"}, "field 'process': got 'no tags', expected <think"),
    (
      {"problem_type": "numerical", "solution": "<answer>a few</answer>"},
      "field 'solution': got 'a few', expected a number",
    ),
  ],
)
def test_bad_training_rows(tmp_path, change, message):
  path = _json(tmp_path / "a.json", [VIDEO_R1 | change])
  with pytest.raises(ValueError) as caught:
    datasets.read("video_r1", path)
  assert message in str(caught.value)


def test_groups_that_are_not_there(tmp_path):
  path = _json(tmp_path / "lvb_val.json", [LONGVIDEOBENCH])
  for only, message in (
    ("level", "expected GROUP=VALUE"),
    ("size=3", "no sample has size '3'; there are"),
    ("level=L1", r"it has \['L2-Relation'\]"),
  ):
    with pytest.raises(ValueError, match=message):
      datasets.read("longvideobench", path, only=(only,))


# Values that no reader expects, and some that several do.
_VALUES = strategies.recursive(
  strategies.none()
  | strategies.booleans()
  | strategies.integers()
  | strategies.floats()
  | strategies.sampled_from(["", "A", "B. b", "3", "01:00-02:00", "\0", "é"])
  | strategies.text(max_size=8),
  lambda inner: (
    strategies.lists(inner, max_size=3)
    | strategies.dictionaries(strategies.text(max_size=4), inner, max_size=2)
  ),
  max_leaves=5,
)
_MORE_FIELDS = """
options answer video vid query gt timestamp messages events question_type type
qid a0 a1 a2 a3 a4 video_id candidates relevant_windows relevant_clip_ids
saliency_scores conversations start end accurate_start object dataset
scene_name videoID path qsemtype sentence idx vid extra_info metadata choices
"""
_FIELDS = sorted(
  {*VIDEO_R1, *LVBENCH_QA, *LONGVIDEOBENCH, *re.findall(r"\w+", _MORE_FIELDS)}
)
_EXTRA = dict(
  tempcompass=dict(task="yes_no", video="v", aspect="order", place=0)
  | {"judged": None},
  video_mmmu={0: "Adaptation"},
  nextgqa=dict(windows={}, folders={}),
  activitynet=dict(video="v", place=0),
)


@hypothesis.settings(
  max_examples=150, deadline=None, derandomize=True, database=None
)
@hypothesis.given(
  name=strategies.sampled_from(sorted(datasets.DATASETS)),
  data=strategies.dictionaries(
    strategies.sampled_from(_FIELDS), _VALUES, max_size=12
  ),
)
def test_garbage_is_a_value_error_or_a_sample(name, data):
  row = rows.Row(
    data, "a.json: row 0", pathlib.Path("a.json"), 0, _EXTRA.get(name, {})
  )
  try:
    made = datasets.DATASETS[name].sample(row)
  except ValueError:
    return
  for sample in made if isinstance(made, list) else [made]:
    assert isinstance(sample, records.Sample) and sample.id


@hypothesis.settings(
  max_examples=60,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
  name=strategies.sampled_from(sorted(datasets.DATASETS)),
  data=strategies.binary(max_size=40)
  | strategies.builds(lambda v: json.dumps(v).encode(), _VALUES),
  suffix=strategies.sampled_from([".json", ".jsonl", ".csv", ".txt", ".tsv"]),
)
def test_garbage_files_are_value_errors(tmp_path, name, data, suffix):
  path = tmp_path / f"yes_no{suffix}"
  path.write_bytes(data)
  with pytest.raises(ValueError):
    datasets.read(name, path)
