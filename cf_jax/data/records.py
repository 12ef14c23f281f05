"""Video questions of any source as one Sample type."""

import json
import math
import os
import pathlib
import re
import string
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

Kind = Literal[
  "multiple_choice",
  "numerical",
  "regression",
  "ocr",
  "free_form",
  "open_ended",
  "interval",
  "grounded_qa",
  "tracking",
  "caption",
]
# Kinds with options, and those whose truth is not in `answer` alone.
_CHOSEN = ("multiple_choice", "grounded_qa")
_TRUTH = {"interval": "start_s", "tracking": "boxes", "caption": "events"}


class Sample(NamedTuple):
  """One question about one video.

  Attributes:
    id: unique in its split.
    video: path of the file.
    question: the question alone, without the options.
    options: the choices in order, without letters; empty for open questions.
    answer: the letter of the right option, or the answer's text.
    kind: how an answer is read and judged (`answers.CREDIT`).
    task: the group under which accuracies are reported.
    start_s: first second of the evidence, None where not annotated.
    end_s: last second of the evidence, None where not annotated.
    evidence: (start, end) seconds of every relevant event, in time order.
    reasoning: a worded chain of thought for supervised training, or "".
    source: the set it comes from.
    boxes: of a tracking question: (x0, y0, x1, y1) of the object in frames at
      equal distances, as fractions of width and height.
    events: of a caption question: what happens, in time order.
    groups: (name, value) of what else results are broken down by, as in
      (("duration", "short"), ("domain", "Knowledge")); a name comes once.
    duration_s: seconds of the video, or of `clip`, as annotated; None where
      they are not.
    clip: (start, end) seconds of the part of the file that the question is
      about; None is all of it. Times of other fields count from its start.
    fps: frames a second where `video` is a folder of pictures, else None.
    image: path of a picture that belongs to the question, or "".
    subtitles: path of a file that `subtitles.read` understands, or "".
    subtitles_start_s: seconds of that file at which the video begins.
    labels: what the published question marks its options with, where that is
      not A, B, C, ...: ("Option 1", "Option 2").
    saliency: of highlight detection: (number of a 2-second clip, the
      annotators' scores of it) of every annotated clip.
    rubric: what a judge is asked about the answer, where that is another
      question than the policy's.
    flaws: what the published row gets wrong itself, in words.
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
  boxes: tuple[tuple[float, float, float, float], ...] = ()
  events: tuple[str, ...] = ()
  groups: tuple[tuple[str, str], ...] = ()
  duration_s: float | None = None
  clip: tuple[float, float] | None = None
  fps: float | None = None
  image: str = ""
  subtitles: str = ""
  subtitles_start_s: float = 0.0
  labels: tuple[str, ...] = ()
  saliency: tuple[tuple[int, tuple[int, ...]], ...] = ()
  rubric: str = ""
  flaws: tuple[str, ...] = ()


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
  "evidence",
  "boxes",
  "events",
  "groups",
  "duration_s",
  "clip",
  "fps",
  "image",
  "subtitles",
  "subtitles_start_s",
  "labels",
  "saliency",
  "rubric",
  "flaws",
)
_MOST_SALIENT = 2**31  # no number of a clip, and no score, is as large
_PATHS = ("video", "image", "subtitles")
# What a decoder would take for an address: "http:", "concat:".
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


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


def load_jsonl(
  path: str | pathlib.Path, *, allow_outside: bool = False
) -> list[Sample]:
  """Reads a manifest: one JSON object with a question in each line.

  Fields: `video` (relative to the manifest, or absolute), `question`,
  `options` (list of texts; none for an open question), `answer` (a letter, or
  the text of one option; for an open question its text or number), and
  optionally `start_s`, `end_s`, `id`, `task`, `kind`, `reasoning`, `evidence`
  (list of [start, end] in seconds; start_s to end_s where there is none),
  `boxes` (list of [x0, y0, x1, y1], fractions) and `events` (list of texts).
  Questions of kind interval, tracking and caption need no `answer`: theirs is
  start_s to end_s, the boxes or the events. Empty lines are skipped. The other
  fields of `Sample` (but `source`) may be there too: `groups` as an object,
  `clip` as [start, end], `fps`, `duration_s`, `image`, `subtitles`, ...

  Args:
    path: of the manifest.
    allow_outside: may it name files outside its own folder? False follows
      symbolic links before it decides.

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
    sample = _read_line(line, where, number, path, allow_outside)
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


def to_jsonl(samples: Sequence[Sample]) -> str:
  """A manifest from which `load_jsonl` reads the same samples again.

  All but `source`, which is then the manifest's name. Answers to questions with
  options are written as the option's text: among options that are letters
  themselves a letter would name another one.

  Raises:
    ValueError: an answer that neither text nor letter names alone.
  """
  lines = []
  for sample in samples:
    row = {name: getattr(sample, name) for name in _FIELDS}
    if sample.options:
      number = string.ascii_uppercase.find(sample.answer)
      row["answer"] = sample.options[number]
      if sample.options.count(row["answer"]) > 1:
        row["answer"] = sample.answer
      if letter_of(row["answer"], sample.options) != sample.answer:
        raise ValueError(
          f"sample {sample.id!r}: its answer {sample.answer!r} cannot be told"
          f" apart among the options {list(sample.options)}"
        )
    for name in _PATHS:
      if row[name]:
        row[name] = str(pathlib.Path(row[name]).absolute())
    row["groups"] = dict(sample.groups)
    row["subtitles_start_s"] = sample.subtitles_start_s or None
    # No evidence is said too: start_s to end_s would take its place.
    kept = {
      name: value
      for name, value in row.items()
      if value not in (None, "", (), {}) or name == "evidence"
    }
    lines.append(json.dumps(kept, ensure_ascii=False) + "\n")
  return "".join(lines)


def _read_line(
  line: str, where: str, number: int, path: pathlib.Path, allow_outside: bool
) -> Sample:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: not JSON ({error})") from error
  if not isinstance(row, dict):
    raise ValueError(
      f"{where}: got a {type(row).__name__}, expected a JSON object with"
      " video, question, options and answer"
    )
  check_text(row, where)
  unknown = sorted(set(row) - set(_FIELDS))
  if unknown:
    raise ValueError(
      f"{where}: field {unknown[0]!r}: unknown; expected {', '.join(_FIELDS)}"
    )

  def fail(name: str, message: str):
    raise ValueError(f"{where}: field {name!r}: {message}")

  _text(row, "video", fail)
  paths = {
    name: _path(row, name, path.parent, allow_outside, fail) for name in _PATHS
  }
  question = _text(row, "question", fail)
  flaws = _texts(row, "flaws", fail)
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
  if len(set(options)) < len(options) and not flaws:
    fail("options", f"got the same text twice in {list(options)}")

  kind = row.get("kind")
  if kind is not None and kind not in get_args(Kind):
    fail("kind", f"got {kind!r}, expected one of {get_args(Kind)}")
  start_s, end_s = _seconds(row, "start_s", fail), _seconds(row, "end_s", fail)
  if (start_s is None) != (end_s is None):
    missing = "end_s" if end_s is None else "start_s"
    fail(missing, "missing; give both start_s and end_s, or neither")
  if start_s is not None and end_s < start_s:
    fail("end_s", f"got {end_s}, which lies before start_s {start_s}")
  evidence = _evidence(row, fail)
  if evidence is None:
    evidence = () if start_s is None else ((start_s, end_s),)
  boxes, events = _boxes(row, fail), _texts(row, "events", fail)
  truth = {
    "interval": start_s is not None and start_s < end_s,
    "tracking": boxes,
    "caption": events,
  }
  if kind in _TRUTH and not truth[kind]:
    fail(_TRUTH[kind], f"missing or empty; a question of kind {kind} needs it")

  answer = row.get("answer")
  if answer is None and kind == "interval":
    answer = f"{start_s:.2f} to {end_s:.2f}"
  elif answer is None and kind in _TRUTH:
    answer = json.dumps(boxes) if kind == "tracking" else " ".join(events)
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
  if kind is None:
    kind = "numerical" if is_number else "free_form"
    kind = "multiple_choice" if options else kind
  if (kind in _CHOSEN) != bool(options):
    fail("kind", f"got {kind!r} with {len(options)} options")
  return Sample(
    id=_text(row, "id", fail, default=f"line-{number}"),
    question=question,
    options=options,
    answer=answer,
    kind=kind,
    task=_text(row, "task", fail, default="all"),
    start_s=start_s,
    end_s=end_s,
    evidence=evidence,
    reasoning=_text(row, "reasoning", fail, default=""),
    source=path.name,
    boxes=boxes,
    events=events,
    groups=_groups(row, fail),
    duration_s=_seconds(row, "duration_s", fail),
    clip=_clip(row, fail),
    fps=_positive(row, "fps", fail),
    subtitles_start_s=_seconds(row, "subtitles_start_s", fail) or 0.0,
    labels=_texts(row, "labels", fail),
    saliency=_saliency(row, fail),
    rubric=_text(row, "rubric", fail, default=""),
    flaws=flaws,
    **paths,
  )


def _path(
  row: dict[str, Any],
  name: str,
  folder: pathlib.Path,
  allow_outside: bool,
  fail,
) -> str:
  said = _text(row, name, fail, default="")
  if not said:
    return ""
  if _SCHEME.match(said) or "\0" in said:
    fail(name, f"got {said!r}, expected the path of a local file")
  try:
    found = (folder / pathlib.Path(said).expanduser()).absolute()
    leads_to, inside = [found.resolve()], folder.resolve()
    if not allow_outside and found.is_dir():  # of pictures
      with os.scandir(found) as files:
        links = [file.path for file in files if file.is_symlink()]
      leads_to += [pathlib.Path(link).resolve() for link in links]
  except (OSError, RuntimeError, ValueError) as error:  # a link to itself, ~who
    fail(name, f"got {said!r}, expected the path of a local file ({error})")
  for path in leads_to:
    if not allow_outside and not path.is_relative_to(inside):
      fail(
        name,
        f"got {said!r}, which leads to {path}, outside of {inside};"
        " set config.data.allow_outside=True to read it there",
      )
  return str(found)


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
    or not is_finite(value)
    or value < 0
  ):
    fail(name, f"got {value!r}, expected seconds, at least 0")
  return float(value)


def check_text(row: Any, where: str) -> None:
  """Raises a ValueError for half a character, which no file and no prompt can.

  JSON can spell a surrogate that has no other half, and Python takes it.
  """
  try:
    json.dumps(row, ensure_ascii=False, default=str).encode("utf-8")
  except UnicodeEncodeError as error:
    part = error.object[max(error.start - 20, 0) : error.end]
    raise ValueError(
      f"{where}: {part!r} ends in half a character (a surrogate without its"
      " other half); write the whole one, or leave it out"
    ) from error


def is_finite(value: int | float) -> bool:
  """Is it a number that a float can hold?"""
  try:
    return math.isfinite(value)
  except OverflowError:  # a whole number beyond any float
    return False


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
  """`count` finite numbers, at least 0, of a list; None if it is not that."""
  if not isinstance(value, list) or len(value) != count:
    return None
  for item in value:
    if (
      isinstance(item, bool)
      or not isinstance(item, (int, float))
      or not is_finite(item)
      or item < 0
    ):
      return None
  return tuple(float(item) for item in value)


def _evidence(
  row: dict[str, Any], fail
) -> tuple[tuple[float, float], ...] | None:
  value = row.get("evidence")
  if value is None:
    return None
  made = [_numbers(pair, 2) for pair in _list(row, "evidence", fail)]
  if any(pair is None or pair[1] < pair[0] for pair in made):
    fail("evidence", f"got {value!r}, expected a list of [start, end]")
  return tuple(sorted(made))


def _boxes(row: dict[str, Any], fail):
  made = [_numbers(box, 4) for box in _list(row, "boxes", fail)]
  if any(
    box is None or max(box) > 1 or box[0] >= box[2] or box[1] >= box[3]
    for box in made
  ):
    fail(
      "boxes",
      f"got {row['boxes']!r}, expected a list of [x0, y0, x1, y1] in [0, 1],"
      " x0 < x1 and y0 < y1",
    )
  return tuple(made)


def _texts(row: dict[str, Any], name: str, fail) -> tuple[str, ...]:
  made = _list(row, name, fail)
  if not all(isinstance(item, str) and item.strip() for item in made):
    fail(name, f"got {made!r}, expected a list of texts")
  return tuple(item.strip() for item in made)


def _groups(row: dict[str, Any], fail) -> tuple[tuple[str, str], ...]:
  made = row.get("groups") or {}
  if not isinstance(made, dict) or not all(
    isinstance(value, str) for value in made.values()
  ):
    fail("groups", f"got {made!r}, expected an object of texts")
  return tuple(made.items())


def _clip(row: dict[str, Any], fail) -> tuple[float, float] | None:
  value = row.get("clip")
  if value is None:
    return None
  made = _numbers(value, 2)
  if made is None or made[1] <= made[0]:
    fail("clip", f"got {value!r}, expected [start, end] in seconds")
  return made


def _positive(row: dict[str, Any], name: str, fail) -> float | None:
  value = _seconds(row, name, fail)
  if value == 0:
    fail(name, "got 0, expected more")
  return value


def _saliency(row: dict[str, Any], fail):
  made = []
  for pair in _list(row, "saliency", fail):
    if (
      not isinstance(pair, list)
      or len(pair) != 2
      or not isinstance(pair[1], list)
      or not all(
        type(n) is int and 0 <= n < _MOST_SALIENT for n in (pair[0], *pair[1])
      )
    ):
      fail(
        "saliency",
        f"got {str(pair):.80}, expected [clip, [score, ...]], whole numbers"
        f" below {_MOST_SALIENT}",
      )
    made.append((pair[0], tuple(pair[1])))
  return tuple(made)


def _list(row: dict[str, Any], name: str, fail) -> list:
  value = row.get(name)
  if value is None:
    return []
  if not isinstance(value, list):
    fail(name, f"got {value!r}, expected a list")
  return value
