"""Manifests: what is read, and what every bad line says."""

import json

import pytest

from cf_jax.data import records

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
  first, second = records.load_jsonl(_manifest(tmp_path, GOOD, row))
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


@pytest.mark.parametrize("line", ["{", "[1, 2]", "3", "[" * 100_000])
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
