"""Prediction files: rows, published forms, and what is wrong with them."""

import json

import pytest

from cf_jax.data import records
from cf_jax.evals import predictions


def _sample(name="1", answer="A", task="t", options=("x", "y")):
  return records.Sample(
    id=name, video="v", question="q", options=options, answer=answer, task=task
  )


def _read(tmp_path, text, benchmark="videomme", samples=(), name="p.jsonl"):
  path = tmp_path / name
  path.write_text(text if isinstance(text, str) else json.dumps(text), "utf-8")
  return predictions.read(path, benchmark, samples)


def test_rows(tmp_path):
  text = '{"id": "a", "response": "B", "frames": [1]}\n\n' + (
    '{"id": 7, "response": ""}\r\n'
  )
  assert _read(tmp_path, text) == {"a": "B", "7": ""}


def test_official_rows_of_qvhighlights(tmp_path):
  row = {"qid": 3, "pred_relevant_windows": [[0, 2, 0.5]]}
  found = _read(tmp_path, json.dumps(row), "qvhighlights")
  assert found == {"3": row}
  text = '{"id": "3", "response": "from 1 to 2"}'
  assert _read(tmp_path, text, "qvhighlights") == {"3": "from 1 to 2"}


@pytest.mark.parametrize(
  ("benchmark", "made", "found"),
  [
    ("videomme", [{"id": "1", "response": "A"}], {"1": "A"}),
    (
      "videomme",
      [{"video_id": "1", "questions": [{"question_id": "1", "response": "A"}]}],
      {"1": "A"},
    ),
    ("lvbench", {"1": "A"}, {"1": "A"}),
    ("nextqa", {"1": {"prediction": 1, "answer": 0}}, {"1": "1"}),
    (
      "tempcompass",
      {"v": {"action": [{"prediction": "A"}, {"video-llm-prediction": None}]}},
      {"t/v/action/0": "A", "t/v/action/1": ""},
    ),
  ],
)
def test_published_forms(tmp_path, benchmark, made, found):
  samples = [_sample()]
  assert _read(tmp_path, made, benchmark, samples, "p.json") == found


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("not json", "p.jsonl:1: not JSON"),
    ('{\n"1": "A"\n}', "one object must end in .json"),
    ('{"id": 1, "response": "a"}\n{"id": 2}', "p.jsonl:2: field 'response'"),
    ('{"response": "a"}', "field 'id': got None"),
    ('{"id": true, "response": "a"}', "field 'id'"),
    ('{"id": 1, "id": 2, "response": "a"}', "keys stand twice.*'id'"),
    ("[1]", "got a list"),
    ("", "holds no predictions"),
    ("[" * 100_000, "not JSON"),
    (
      '{"id": 1, "response": "a"}\n{"id": "1", "response": "b"}',
      "1 predictions have an id that another one has: '1' at .*:2 and .*:1",
    ),
  ],
)
def test_wrong_rows(tmp_path, text, message):
  with pytest.raises(ValueError, match=message):
    _read(tmp_path, text)


@pytest.mark.parametrize(
  ("benchmark", "made", "message"),
  [
    ("lvbench", {"1": 5}, "'1': got 5, expected the model's text"),
    ("lvbench", 5, "expected an object or a list"),
    (
      "nextqa",
      {"1": {"prediction": 1, "answer": 1}},
      "1, which is 'B', but the annotations say 'A'",
    ),
    ("nextqa", {"1": {"prediction": [1]}}, "expected a number or text"),
    ("tempcompass", {"v": {"action": 3}}, "expected a list"),
    ("tempcompass", {"v": {"action": [{}]}}, "field 'prediction'"),
  ],
)
def test_wrong_published_forms(tmp_path, benchmark, made, message):
  with pytest.raises(ValueError, match=message):
    _read(tmp_path, made, benchmark, [_sample()], "p.json")


def test_tempcompass_answers_of_other_questions(tmp_path):
  made = {"v": {"action": [{"prediction": "A", "answer": "A. z"}]}}
  samples = [_sample("t/v/action/0")]
  with pytest.raises(ValueError, match="do not belong together"):
    _read(tmp_path, made, "tempcompass", samples, "p.json")


def test_tempcompass_of_several_tasks(tmp_path):
  samples = [_sample("1"), _sample("2", task="u")]
  with pytest.raises(ValueError, match=r"\['t', 'u'\]; set config.annotations"):
    _read(tmp_path, {"v": {"a": []}}, "tempcompass", samples, "p.json")


def test_no_file(tmp_path):
  with pytest.raises(ValueError, match="there is no file"):
    predictions.read(tmp_path / "none.jsonl", "videomme", ())
