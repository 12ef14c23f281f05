"""Predictions as people keep them -> the id and the response of each question.

JSON lines `{"id": ..., "response": "raw text"}`, other keys ignored; or a JSON
file in one of the published forms:
  a list of such rows
  {id: text}                               LVBench, LongVideoBench
  {id: {"prediction": number, "answer": number}}                     NExT-QA
  {video: {dimension: [{"prediction": text, ...}]}}              TempCompass
  [{"questions": [{"question_id", "response"}]}]                    VideoMME
QVHighlights: its official JSON lines, with `qid` and `pred_relevant_windows` or
`pred_saliency_scores` or both.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from cf_jax.data import records
from cf_jax.evals import choices

_SHOWN = 3  # examples in an error
# TempCompass's files: what a model said, before and after it was rated.
_SAID = ("prediction", "response", "video-llm-prediction")
_TRUTH = ("answer", "gt-answer")


def read(
  path: str | pathlib.Path,
  benchmark: str,
  samples: Sequence[records.Sample],
) -> dict[str, Any]:
  """Responses by id, in the file's order.

  Args:
    path: of the file.
    benchmark: as in `benchmarks.RULES`.
    samples: the questions, to which the published forms are matched.

  Returns:
    id -> text; of QVHighlights' official rows id -> row.

  Raises:
    ValueError: no such file, not JSON, rows of another form, ids that stand
      twice; names file and row.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise ValueError(
      f"config.predictions: there is no file {str(path)!r}; give JSON lines"
      ' {"id": ..., "response": "text"}'
    )
  try:
    text = path.read_text("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 text ({error})") from error
  if path.suffix.lower() == ".json":
    made = _parse(text, str(path), "JSON lines are for a .jsonl file")
    rows = _published(made, path, benchmark, samples)
  else:
    rows = _lines(text, path, benchmark)
  found, first, twice = {}, {}, []
  for where, row in rows:
    if isinstance(row, str):
      raise ValueError(f"{where}: {row}")
    name, response = row
    if name in found:
      twice.append(f"{name!r} at {where} and {first[name]}")
    found[name], first[name] = response, where
  if twice:
    raise ValueError(
      f"{len(twice)} predictions have an id that another one has:"
      f" {'; '.join(twice[:_SHOWN])}; keep one prediction a question"
    )
  if not found:
    raise ValueError(f"{path} holds no predictions")
  return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  made = dict(pairs)
  if len(made) < len(pairs):
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    raise ValueError(
      f"{len(twice)} keys stand twice in an object: {twice[:_SHOWN]}"
    )
  return made


def _parse(text: str, where: str, advice: str) -> Any:
  try:
    return json.loads(text, object_pairs_hook=_distinct)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: not JSON ({error}); {advice}") from error


def _lines(
  text: str, path: pathlib.Path, benchmark: str
) -> Iterator[tuple[str, tuple[str, Any] | str]]:
  """(where, (id, response)) of a file with one object a line."""
  advice = "one object a line; a file that is one object must end in .json"
  for number, line in enumerate(text.split("\n"), start=1):
    if line.strip():
      where = f"{path}:{number}"
      yield where, _row(_parse(line, where, advice), benchmark)


def _row(row: Any, benchmark: str) -> tuple[str, Any] | str:
  """(id, response) of a row, or what is wrong with it."""
  if not isinstance(row, dict):
    return f"got a {type(row).__name__}, expected an object with id, response"
  official = benchmark == "qvhighlights" and "response" not in row
  key = "qid" if official and "id" not in row else "id"
  name = row.get(key)
  if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
    return f"field {key!r}: got {name!r}, expected the question's id"
  if official:
    return str(name), row
  response = row.get("response")
  if not isinstance(response, str):
    return f"field 'response': got {response!r:.60}, expected the model's text"
  return str(name), response


def _published(
  made: Any,
  path: pathlib.Path,
  benchmark: str,
  samples: Sequence[records.Sample],
) -> Iterator[tuple[str, tuple[str, Any] | str]]:
  """(where, (id, response)) of a JSON file, whatever its form."""
  if isinstance(made, list):
    for number, row in enumerate(made):
      where = f"{path}: entry {number}"
      if isinstance(row, dict) and isinstance(row.get("questions"), list):
        for question in row["questions"]:
          if isinstance(question, dict) and "question_id" in question:
            question = question | {"id": question["question_id"]}
          yield where, _row(question, benchmark)
      else:
        yield where, _row(row, benchmark)
    return
  if not isinstance(made, dict):
    raise ValueError(f"{path}: expected an object or a list of rows")
  by_id = {sample.id: sample for sample in samples}
  tasks = sorted({sample.task for sample in samples})
  for name, value in made.items():
    where = f"{path}: {name!r}"
    if isinstance(value, str):
      yield where, (name, value)
    elif isinstance(value, dict) and "prediction" in value:
      yield where, _numbered(name, value, by_id.get(name))
    elif isinstance(value, dict) and benchmark == "tempcompass":
      if len(tasks) != 1:
        raise ValueError(
          f"{path} does not say of which task it is, and the annotations have"
          f" {tasks}; set config.annotations to the one file of its questions"
        )
      yield from _by_dimension(where, f"{tasks[0]}/{name}", value, by_id)
    else:
      yield where, f"got {value!r:.60}, expected the model's text"


def _numbered(
  name: str, value: dict[str, Any], sample: records.Sample | None
) -> tuple[str, str] | str:
  """A prediction that is an option's number (or text), and its truth."""
  said, truth = value["prediction"], value.get("answer")
  if isinstance(said, bool) or not isinstance(said, (int, str)):
    return f"field 'prediction': got {said!r:.60}, expected a number or text"
  if isinstance(truth, int) and sample is not None and sample.options:
    letter = choices.letters_of(sample.options)[truth : truth + 1]
    if letter != sample.answer:
      return (
        f"field 'answer': {truth}, which is {letter!r}, but the annotations say"
        f" {sample.answer!r}; predictions and annotations are not of one split"
      )
  return name, str(said)


def _by_dimension(
  where: str,
  prefix: str,
  value: dict[str, Any],
  by_id: dict[str, records.Sample],
) -> Iterator[tuple[str, tuple[str, str] | str]]:
  """TempCompass: the answers to each dimension's questions, in order."""
  for dimension, rows in value.items():
    if not isinstance(rows, list):
      yield where, f"field {dimension!r}: got {rows!r:.60}, expected a list"
      return
    for number, row in enumerate(rows):
      name = f"{prefix}/{dimension}/{number}"
      at = f"{where}, {dimension!r} {number}"
      if not isinstance(row, dict):
        yield at, f"got {row!r:.60}, expected an object"
        return
      said = next((row[key] for key in _SAID if key in row), None)
      truth = next((row[key] for key in _TRUTH if key in row), None)
      sample = by_id.get(name)
      # A model that refuses has null there; it is wrong.
      said = "" if said is None and any(key in row for key in _SAID) else said
      if not isinstance(said, str):
        yield at, f"field 'prediction': got {said!r:.60}, expected text"
      elif sample is not None and not _same_truth(truth, sample):
        yield (
          at,
          f"field 'answer': {truth!r}, which is not the annotations' one;"
          " predictions and annotations do not belong together",
        )
      else:
        yield at, (name, said)


def _same_truth(truth: Any, sample: records.Sample) -> bool:
  """Whether a published truth names the option that the sample does."""
  if not isinstance(truth, str) or not sample.options:
    return True
  letters = choices.letters_of(sample.options)
  number = letters.index(sample.answer)
  return sample.options[number] in truth
