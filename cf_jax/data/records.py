"""Video questions of any source as one Sample type."""

import json
import math
import pathlib
import string
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

Kind = Literal["multiple_choice", "numerical", "free_form"]


class Sample(NamedTuple):
  """One question about one video.

  Attributes:
    id: unique in its split.
    video: path of the file.
    question: the question alone, without the options.
    options: the choices in order, without letters; empty for open questions.
    answer: the letter of the right option, or the answer's text.
    kind: how an answer is read and judged.
    task: the group under which accuracies are reported.
    start_s: first second of the evidence, None where not annotated.
    end_s: last second of the evidence, None where not annotated.
    evidence: (start, end) seconds of every relevant event, in time order.
    reasoning: a worded chain of thought for supervised training, or "".
    source: the set it comes from.
  """

  id: str
  video: str
  question: str
  options: tuple[str, ...]
  answer: str
  kind: Kind = "multiple_choice"
  task: str = ""
  start_s: float | None = None
  end_s: float | None = None
  evidence: tuple[tuple[float, float], ...] = ()
  reasoning: str = ""
  source: str = ""


_FIELDS = (
  "video",
  "question",
  "options",
  "answer",
  "start_s",
  "end_s",
  "id",
  "task",
  "kind",
  "reasoning",
)


def letter_of(answer: str, options: Sequence[str]) -> str:
  """The letter of an answer that is a letter or the text of one option.

  The text of an option wins over a letter, so that options which are letters
  themselves are read as written.

  Raises:
    ValueError: neither, or the text of more than one option.
  """
  same = [n for n, option in enumerate(options) if option == answer]
  if len(same) == 1:
    return string.ascii_uppercase[same[0]]
  letters = string.ascii_uppercase[: len(options)]
  if not same and len(answer) == 1 and answer in letters:
    return answer
  raise ValueError(
    f"got {answer!r}, expected one of the letters {letters} or the text of"
    f" exactly one option of {list(options)}"
  )


def load_jsonl(path: str | pathlib.Path) -> list[Sample]:
  """Reads a manifest: one JSON object with a question in each line.

  Fields: `video` (relative to the manifest, or absolute), `question`,
  `options` (list of texts; none for an open question), `answer` (a letter, or
  the text of one option; for an open question its text or number), and
  optionally `start_s`, `end_s`, `id`, `task`, `kind`, `reasoning`. Empty lines
  are skipped.

  Raises:
    ValueError: a bad line, naming file, line number and field; no file; no
      sample in it.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise ValueError(f"no manifest at {path}; change config.data.source")
  samples, first_line = [], {}
  try:
    text = path.read_text("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 text ({error})") from error
  for number, line in enumerate(text.split("\n"), start=1):
    if not line.strip():
      continue
    where = f"{path}:{number}"
    sample = _read_line(line, where, number, path)
    if sample.id in first_line:
      raise ValueError(
        f"{where}: field 'id': {sample.id!r} is taken by line"
        f" {first_line[sample.id]}; ids must be unique"
      )
    first_line[sample.id] = number
    samples.append(sample)
  if not samples:
    raise ValueError(f"{path} has no samples; expected one JSON object a line")
  return samples


def _read_line(
  line: str, where: str, number: int, path: pathlib.Path
) -> Sample:
  try:
    row = json.loads(line)
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f"{where}: not JSON ({error})") from error
  if not isinstance(row, dict):
    raise ValueError(
      f"{where}: got a {type(row).__name__}, expected a JSON object with"
      " video, question, options and answer"
    )
  unknown = sorted(set(row) - set(_FIELDS))
  if unknown:
    raise ValueError(
      f"{where}: field {unknown[0]!r}: unknown; expected {', '.join(_FIELDS)}"
    )

  def fail(name: str, message: str):
    raise ValueError(f"{where}: field {name!r}: {message}")

  video = _text(row, "video", fail)
  question = _text(row, "question", fail)
  options = row.get("options") or []
  if not isinstance(options, list) or not all(
    isinstance(option, (str, int, float))
    and not isinstance(option, bool)
    and str(option).strip()
    for option in options
  ):
    fail("options", f"got {options!r}, expected a list of texts")
  options = tuple(str(option).strip() for option in options)
  if len(options) == 1 or len(options) > len(string.ascii_uppercase):
    fail("options", f"got {len(options)}, expected 2 to 26, or none")
  if len(set(options)) < len(options):
    fail("options", f"got the same text twice in {list(options)}")

  answer = row.get("answer")
  if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
    fail("answer", f"got {answer!r}, expected a letter or text")
  is_number = isinstance(answer, (int, float))
  answer = str(answer).strip()
  if not answer:
    fail("answer", "got empty text, expected a letter or text")
  if options:
    try:
      answer = letter_of(answer, options)
    except ValueError as error:
      fail("answer", str(error))
  kind = row.get("kind")
  if kind is None:
    kind = "numerical" if is_number else "free_form"
    kind = "multiple_choice" if options else kind
  if kind not in get_args(Kind):
    fail("kind", f"got {kind!r}, expected one of {get_args(Kind)}")
  if (kind == "multiple_choice") != bool(options):
    fail("kind", f"got {kind!r} with {len(options)} options")

  start_s, end_s = _seconds(row, "start_s", fail), _seconds(row, "end_s", fail)
  if (start_s is None) != (end_s is None):
    missing = "end_s" if end_s is None else "start_s"
    fail(missing, "missing; give both start_s and end_s, or neither")
  if start_s is not None and end_s < start_s:
    fail("end_s", f"got {end_s}, which lies before start_s {start_s}")
  return Sample(
    id=_text(row, "id", fail, default=f"line-{number}"),
    video=str((path.parent / pathlib.Path(video).expanduser()).absolute()),
    question=question,
    options=options,
    answer=answer,
    kind=kind,
    task=_text(row, "task", fail, default="all"),
    start_s=start_s,
    end_s=end_s,
    evidence=() if start_s is None else ((start_s, end_s),),
    reasoning=_text(row, "reasoning", fail, default=""),
    source=path.name,
  )


def _text(row: dict[str, Any], name: str, fail, default=None) -> str:
  value = row.get(name)
  if value is None and default is not None:
    return default
  if name == "id" and isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  if not isinstance(value, str) or not value.strip():
    fail(name, f"got {value!r}, expected text")
  return value.strip()


def _seconds(row: dict[str, Any], name: str, fail) -> float | None:
  value = row.get(name)
  if value is None:
    return None
  if (
    isinstance(value, bool)
    or not isinstance(value, (int, float))
    or not math.isfinite(value)
    or value < 0
  ):
    fail(name, f"got {value!r}, expected seconds, at least 0")
  return float(value)
