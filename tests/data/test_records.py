"""Manifests: what is read, and what every bad line says."""

import json

import pytest

from cf_jax.data import answers, records

GOOD = {
  "video": "clips/a.mp4",
  "question": "Which colour?",
  "options": ["red", "blue"],
  "answer": "B",
}


def _manifest(tmp_path, *rows):
  path = tmp_path / "my.jsonl"
  path.write_text(
    "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
  )
  return path


def test_reads_a_full_line(tmp_path):
  row = GOOD | {
    "answer": "red",
    "start_s": 1,
    "end_s": 2.5,
    "id": 7,
    "task": "needle",
  }
  (sample,) = records.load_jsonl(_manifest(tmp_path, "", row, "  "))
  assert sample == records.Sample(
    id="7",
    video=str(tmp_path / "clips/a.mp4"),
    question="Which colour?",
    options=("red", "blue"),
    answer="A",
    task="needle",
    start_s=1.0,
    end_s=2.5,
    evidence=((1.0, 2.5),),
    source="my.jsonl",
  )


def test_defaults_and_absolute_path(tmp_path):
  row = GOOD | {"video": "/videos/b.mp4"}
  first, second = records.load_jsonl(
    _manifest(tmp_path, GOOD, row), allow_outside=True
  )
  assert (first.id, second.id) == ("line-1", "line-2")
  assert second.video == "/videos/b.mp4"
  assert first.answer == "B" and first.kind == "multiple_choice"
  assert first.evidence == () and first.start_s is None


def test_open_questions(tmp_path):
  rows = [
    {"video": "a.mp4", "question": "How many?", "answer": 3},
    {"video": "a.mp4", "question": "What?", "answer": "a red disc"},
  ]
  number, text = records.load_jsonl(_manifest(tmp_path, *rows))
  assert (number.kind, number.answer) == ("numerical", "3")
  assert (text.kind, text.options) == ("free_form", ())


def test_numbers_as_options(tmp_path):
  row = GOOD | {"options": [1, 2, 3], "answer": 2}
  (sample,) = records.load_jsonl(_manifest(tmp_path, row))
  assert sample.options == ("1", "2", "3") and sample.answer == "B"


def test_letter_of_prefers_the_text_of_an_option():
  assert records.letter_of("B", ["B", "A"]) == "A"
  assert records.letter_of("C", ["x", "y", "z"]) == "C"
  with pytest.raises(ValueError, match="exactly one option"):
    records.letter_of("D", ["x", "y", "z"])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"video": None}, "field 'video': got None, expected text"),
    ({"question": " "}, "field 'question'"),
    ({"options": "red"}, "field 'options': got 'red', expected a list"),
    ({"options": ["red"]}, "field 'options': got 1"),
    ({"options": ["red", "red"]}, "field 'options': got the same text"),
    ({"options": ["red", True]}, "field 'options'"),
    ({"answer": "C"}, "field 'answer': got 'C', expected one of"),
    ({"answer": "b"}, "field 'answer': got 'b'"),
    ({"answer": ""}, "field 'answer'"),
    ({"answer": None}, "field 'answer'"),
    ({"answer": ["A"]}, "field 'answer'"),
    ({"start_s": 3}, "field 'end_s': missing"),
    ({"start_s": 3, "end_s": 2}, "field 'end_s': got 2"),
    ({"start_s": "1", "end_s": 2}, "field 'start_s': got '1'"),
    ({"start_s": float("nan"), "end_s": 2}, "field 'start_s'"),
    ({"start_s": -1, "end_s": 2}, "field 'start_s'"),
    ({"start_s": 1, "end_s": 10**400}, "field 'end_s'"),  # beyond any float
    ({"evidence": [[0, 10**400]]}, "field 'evidence'"),
    ({"kind": "free_form"}, "field 'kind'"),
    ({"kind": "quiz"}, "field 'kind': got 'quiz'"),
    ({"vidoe": "a"}, "field 'vidoe': unknown"),
    ({"id": ["x"]}, "field 'id'"),
  ],
)
def test_bad_field_names_file_line_and_field(tmp_path, change, message):
  with pytest.raises(ValueError) as caught:
    records.load_jsonl(_manifest(tmp_path, GOOD, GOOD | change))
  assert "my.jsonl:2: " in str(caught.value)
  assert message in str(caught.value)


@pytest.mark.parametrize(
  "line", ["{", "[1, 2]", "3", "[" * 100_000, '{"id": ' + "9" * 5000 + "}"]
)
def test_bad_json(tmp_path, line):
  with pytest.raises(ValueError, match=r"my.jsonl:2: (not JSON|got a)"):
    records.load_jsonl(_manifest(tmp_path, GOOD, line))


def test_same_id_twice(tmp_path):
  rows = [GOOD | {"id": "x"}, GOOD, GOOD | {"id": "x"}]
  with pytest.raises(ValueError, match=r":3: field 'id': 'x' .* line 1"):
    records.load_jsonl(_manifest(tmp_path, *rows))


def test_no_file_and_no_sample(tmp_path):
  with pytest.raises(ValueError, match="no manifest at .*config.data.source"):
    records.load_jsonl(tmp_path / "no.jsonl")
  with pytest.raises(ValueError, match="no samples"):
    records.load_jsonl(_manifest(tmp_path, ""))
  path = tmp_path / "latin.jsonl"
  path.write_bytes(b'{"video": "\xe9"}')
  with pytest.raises(ValueError, match="not UTF-8"):
    records.load_jsonl(path)


# -- kinds whose truth is more than a text

PLAIN = {"video": "a.mp4", "question": "When?"}


def test_questions_that_point(tmp_path):
  rows = [
    PLAIN | {"kind": "interval", "start_s": 1.5, "end_s": 4},
    PLAIN | {"kind": "tracking", "boxes": [[0, 0, 0.5, 1]] * 2},
    PLAIN | {"kind": "caption", "events": ["it falls ", "it rises"]},
    GOOD | {"kind": "grounded_qa", "evidence": [[4, 6], [1, 2]]},
    GOOD | {"kind": "grounded_qa", "start_s": 1, "end_s": 2, "evidence": []},
    PLAIN | {"kind": "ocr", "answer": "EXIT"},
  ]
  made = records.load_jsonl(_manifest(tmp_path, *rows))
  for sample in made:
    answers.check_sample(sample)
  assert (made[0].answer, made[0].evidence) == ("1.50 to 4.00", ((1.5, 4.0),))
  assert made[1].boxes == ((0.0, 0.0, 0.5, 1.0),) * 2
  assert made[2].events == ("it falls", "it rises")
  assert made[2].answer == "it falls it rises"
  assert made[3].evidence == ((1.0, 2.0), (4.0, 6.0))
  assert made[4].evidence == ()  # none is not "not annotated"
  # What the target says is itself the best answer.
  assert [answers.accuracy(s.answer, s) for s in made[:2]] == [1, 1]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"kind": "interval"}, "field 'start_s': missing"),
    ({"kind": "interval", "start_s": 2, "end_s": 2}, "field 'start_s'"),
    ({"kind": "tracking"}, "field 'boxes': missing"),
    ({"kind": "tracking", "boxes": [[0, 0, 2, 1]]}, "field 'boxes': got"),
    ({"kind": "tracking", "boxes": [[0.5, 0, 0.1, 1]]}, "field 'boxes': got"),
    ({"kind": "tracking", "boxes": [[0, 0, 1]]}, "field 'boxes': got"),
    ({"kind": "caption", "events": []}, "field 'events': missing"),
    ({"kind": "caption", "events": ["a", " "]}, "field 'events': got"),
    ({"kind": "caption", "events": "a"}, "field 'events': got 'a'"),
    ({"kind": "ocr", "options": ["a", "b"], "answer": "a"}, "field 'kind'"),
    ({"kind": "grounded_qa", "answer": "x"}, "field 'kind'"),
    ({"answer": "x", "evidence": [[2, 1]]}, "field 'evidence': got"),
    ({"answer": "x", "evidence": [1, 2]}, "field 'evidence': got"),
    ({"kind": ["ocr"], "answer": "x"}, "field 'kind': got ['ocr']"),
  ],
)
def test_bad_truths_name_their_field(tmp_path, change, message):
  with pytest.raises(ValueError) as caught:
    records.load_jsonl(_manifest(tmp_path, PLAIN | change))
  assert message in str(caught.value)


def test_a_manifest_is_read_back_as_it_was(tmp_path):
  rows = [
    # Letters as options: a letter would name another one.
    GOOD | {"options": ["B", "A"], "answer": "A", "evidence": [[1, 2]]},
    GOOD | {"start_s": 1, "end_s": 2, "evidence": [], "task": "\u4e00"},
    {"video": "/v/a.mp4", "question": "How many?", "answer": 3, "id": 9},
    {"video": "a.mp4", "question": "When?", "kind": "interval"}
    | {"start_s": 0.125, "end_s": 2},
    {"video": "a.mp4", "question": "Where?", "kind": "tracking"}
    | {"boxes": [[0.1, 0.2, 0.3, 0.4]]},
    {"video": "a.mp4", "question": "What?", "kind": "caption"}
    | {"events": ["a", "b"], "reasoning": "why"},
  ]
  manifest = _manifest(tmp_path, *rows)
  samples = records.load_jsonl(manifest, allow_outside=True)
  folder = tmp_path / "elsewhere"
  folder.mkdir()
  (folder / "my.jsonl").write_text(records.to_jsonl(samples))
  # It names the videos where they are, and so outside of its own folder.
  with pytest.raises(ValueError, match="allow_outside"):
    records.load_jsonl(folder / "my.jsonl")
  again = records.load_jsonl(folder / "my.jsonl", allow_outside=True)
  assert again == samples
  assert samples[0].answer == "B"  # the text "A" is the second option


# -- what public benchmarks need besides


def test_the_fields_of_benchmarks_are_read_back(tmp_path):
  row = PLAIN | {
    "answer": "x",
    "groups": {"duration": "short", "domain": "Knowledge"},
    "clip": [2, 5.5],
    "duration_s": 3.5,
    "fps": 3,
    "image": "q.png",
    "subtitles": "a.srt",
    "subtitles_start_s": 30,
    "labels": ["Option 1", "Option 2"],
    "saliency": [[4, [1, 2, 3]]],
    "rubric": "Does it fall?",
    "flaws": ["no"],
  }
  (sample,) = records.load_jsonl(_manifest(tmp_path, row))
  assert sample.groups == (("duration", "short"), ("domain", "Knowledge"))
  assert (sample.clip, sample.fps, sample.duration_s) == ((2.0, 5.5), 3.0, 3.5)
  assert sample.image == str(tmp_path / "q.png")
  assert sample.saliency == ((4, (1, 2, 3)),)
  again = tmp_path / "again.jsonl"
  again.write_text(records.to_jsonl([sample]))
  assert records.load_jsonl(again) == [sample._replace(source="again.jsonl")]


def test_published_options_may_repeat(tmp_path):
  row = GOOD | {"options": ["red", "red", "blue"], "answer": "B"}
  row |= {"flaws": ["two options have the same text"], "evidence": []}
  (sample,) = records.load_jsonl(_manifest(tmp_path, row))
  assert sample.answer == "B"
  again = tmp_path / "again.jsonl"
  again.write_text(records.to_jsonl([sample]))
  assert records.load_jsonl(again)[0].answer == "B"
  letters = sample._replace(options=("A", "A", "B"))
  with pytest.raises(ValueError, match="cannot be told apart"):
    records.to_jsonl([letters])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"groups": {"a": 1}}, "field 'groups'"),
    ({"clip": [3, 2]}, "field 'clip': got [3, 2]"),
    ({"fps": 0}, "field 'fps': got 0, expected more"),
    ({"labels": ["a", ""]}, "field 'labels'"),
    ({"saliency": [[1, 2]]}, "field 'saliency'"),
    ({"video": "http://host/a.mp4"}, "expected the path of a local file"),
    ({"image": "concat:a|b"}, "expected the path of a local file"),
  ],
)
def test_bad_fields_of_benchmarks(tmp_path, change, message):
  with pytest.raises(ValueError) as caught:
    records.load_jsonl(_manifest(tmp_path, PLAIN | {"answer": "x"} | change))
  assert message in str(caught.value)


def test_a_manifest_may_be_kept_to_its_own_folder(tmp_path):
  folder = tmp_path / "set"
  folder.mkdir()
  (folder / "link").symlink_to(tmp_path / "elsewhere")
  fine = _manifest(folder, PLAIN | {"answer": "x", "video": "b/../a.mp4"})
  assert records.load_jsonl(fine, allow_outside=False)
  for video in ("../a.mp4", "link/a.mp4", str(tmp_path / "a.mp4")):
    path = _manifest(folder, PLAIN | {"answer": "x", "video": video})
    assert records.load_jsonl(path, allow_outside=True)
    with pytest.raises(ValueError, match="config.data.allow_outside=True"):
      records.load_jsonl(path, allow_outside=False)
