"""Rows of annotation files that others wrote, and errors that name the place.

A file of rows is a JSON list of objects, JSONL, CSV, TSV or parquet, told apart
by its suffix. A row that is wrong is a ValueError with file, row and field; a
file that cannot be read at all is one with the file. In lists and tables rows
count from 0, in text files lines count from 1.
"""

import csv
import dataclasses
import io
import json
import math
import pathlib
import re
import string
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from cf_jax.data import records

# "A. text", "A: text", "A) text", "(A) text"; the text may be missing.
_MARKED = re.compile(r"\(([A-Z])\)[.:]?\s*|([A-Z])[.:)]\s*")
_NUMBER = re.compile(r"[+-]?\d{1,15}(?:\.\d{1,30})?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Row:
  """One record of a file.

  Attributes:
    data: field -> value, as the file has it.
    where: the file and the place in it, for errors.
    path: the file.
    number: of the row, from 0.
    extra: what a reader found beside the row (other files, counts).
    problem: why there is no row: what a line of a text file has wrong.
  """

  data: dict[str, Any]
  where: str
  path: pathlib.Path
  number: int
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)
  problem: str = ""

  def fail(self, name: str, message: str) -> NoReturn:
    """Raises a ValueError about a field."""
    raise ValueError(f"{self.where}: field {name!r}: {message}")

  def check(self) -> None:
    """Raises a ValueError where there is no row of fields."""
    if self.problem:
      raise ValueError(f"{self.where}: {self.problem}")
    if not isinstance(self.data, dict):
      raise ValueError(
        f"{self.where}: got {_short(self.data)}, expected an object with fields"
      )
    records.check_text(self.data, self.where)

  def within(self, name: str) -> "Row":
    """The object that a field holds, as a row whose errors name the field."""
    value = self.value(name)
    if not isinstance(value, dict):
      self.fail(name, f"got {_short(value)}, expected an object")
    return dataclasses.replace(self, data=value, where=f"{self.where}: {name}")

  def has(self, name: str) -> bool:
    """Is the field there, and not null?"""
    return self.data.get(name) is not None

  def value(self, name: str) -> Any:
    """The field as it is; an error where it is missing or null."""
    found = self.data.get(name)
    if found is None:
      state = "null" if name in self.data else "missing"
      self.fail(
        name, f"{state}; the row has {', '.join(map(str, self.data))[:200]}"
      )
    return found

  def text(self, name: str, default: str | None = None) -> str:
    """A text with something in it, stripped; `default` where it is missing."""
    if default is not None and not self.has(name):
      return default
    found = self.value(name)
    if not isinstance(found, str) or not found.strip():
      self.fail(name, f"got {_short(found)}, expected text")
    return found.strip()

  def any_text(self, name: str) -> str:
    """A text, stripped, which may be empty."""
    found = self.value(name)
    if not isinstance(found, str):
      self.fail(name, f"got {_short(found)}, expected text")
    return found.strip()

  def label(self, name: str) -> str:
    """A text or whole number, as text: ids, and names that may be digits."""
    found = self.value(name)
    if isinstance(found, int) and not isinstance(found, bool):
      return str(found)
    return self.text(name)

  def one_of(self, name: str, allowed: Sequence[str]) -> str:
    """A text that is one of a few."""
    found = self.text(name)
    if found not in allowed:
      self.fail(name, f"got {_short(found)}, expected one of {list(allowed)}")
    return found

  def number_of(self, name: str, *, low: float = -math.inf) -> float:
    """A finite number, or in a table of texts the text of one."""
    return self.as_number(name, self.value(name), low=low)

  def seconds(self, name: str) -> float | None:
    """Seconds, at least 0; None where the field is missing."""
    return self.number_of(name, low=0.0) if self.has(name) else None

  def whole(self, name: str) -> int:
    """A whole number, at least 0."""
    found = self.number_of(name, low=0.0)
    if found != int(found):
      self.fail(name, f"got {found}, expected a whole number")
    return int(found)

  def as_number(
    self, name: str, value: Any, *, low: float = -math.inf
  ) -> float:
    """A finite number of at least `low` from some part of a field."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
      value = float(value)
    if (
      isinstance(value, bool)
      or not isinstance(value, (int, float))
      or not records.is_finite(value)
      or value < low
    ):
      least = "" if low == -math.inf else f" of at least {low:g}"
      self.fail(name, f"got {_short(value)}, expected a number{least}")
    return float(value)

  def listed(self, name: str) -> list:
    """A list."""
    found = self.value(name)
    if not isinstance(found, (list, tuple)):
      self.fail(name, f"got {_short(found)}, expected a list")
    return list(found)

  def texts(self, name: str) -> tuple[str, ...]:
    """A list of texts, stripped; numbers become their text."""
    made = []
    for item in self.listed(name):
      if isinstance(item, bool) or not isinstance(item, (str, int, float)):
        self.fail(name, f"got {_short(item)} in the list, expected texts")
      made.append(str(item).strip())
    return tuple(made)

  def options(self, name: str, values: Sequence[str] = ()) -> tuple[str, ...]:
    """Two to 26 choices, without the letters that they may be marked by.

    Letters are taken off where every option has its own ("A. ", "(A) ").

    Args:
      name: the field that they are of.
      values: the options; those of the field where there are none here.
    """
    values = tuple(v.strip() for v in values) or self.texts(name)
    if not 2 <= len(values) <= len(string.ascii_uppercase):
      self.fail(name, f"got {len(values)} options, expected 2 to 26")
    marks = [_MARKED.match(option) for option in values]
    if all(
      mark and (mark[1] or mark[2]) == letter
      for mark, letter in zip(marks, string.ascii_uppercase)
    ):
      values = tuple(o[m.end() :].strip() for o, m in zip(values, marks))
    return values

  def letter(self, name: str, options: Sequence[str]) -> str:
    """The letter that a field says: "B", "(B)", "B.", "B. the option"."""
    found = self.text(name)
    letters = string.ascii_uppercase[: len(options)]
    mark = _MARKED.match(found)
    letter = (mark[1] or mark[2]) if mark else found
    rest = found[mark.end() :].strip() if mark else ""
    if len(letter) != 1 or letter not in letters:
      self.fail(
        name,
        f"got {_short(found)}, expected one of the letters {letters}",
      )
    said = options[letters.index(letter)]
    if rest and _plain(rest) != _plain(said):
      self.fail(
        name, f"got {_short(found)}, but option {letter} is {_short(said)}"
      )
    return letter

  def places(self, name: str, options: Sequence[str]) -> list[str]:
    """The letters of the options whose text a field says, at least one."""
    found = self.any_text(name) if self.value(name) == "" else self.label(name)
    same = [
      letter
      for letter, option in zip(string.ascii_uppercase, options)
      if option == found
    ]
    if not same:
      self.fail(name, f"got {_short(found)}, none of the options {[*options]}")
    return same

  def place(self, name: str, options: Sequence[str]) -> str:
    """The letter of the one option whose text a field says."""
    same = self.places(name, options)
    if len(same) > 1:
      self.fail(
        name,
        f"got {_short(self.value(name))}, which is the text of options"
        f" {', '.join(same)}",
      )
    return same[0]

  def interval(
    self,
    name: str,
    value: Any = None,
    *,
    empty: bool = False,
    low: float = 0.0,
  ) -> tuple[float, float]:
    """(start, end) seconds.

    Args:
      name: the field that it is of.
      value: [start, end]; the field where there is none here.
      empty: may it end where it starts?
      low: the earliest start.
    """
    value = self.value(name) if value is None else value
    if not isinstance(value, (list, tuple)) or len(value) != 2:
      self.fail(name, f"got {_short(value)}, expected [start, end]")
    start_s, end_s = (self.as_number(name, part, low=low) for part in value)
    if end_s < start_s or end_s == start_s and not empty:
      self.fail(
        name,
        f"got {start_s:g} to {end_s:g} s, which ends before it starts"
        if end_s < start_s
        else f"got {start_s:g} to {end_s:g} s, which is empty",
      )
    return start_s, end_s

  def intervals(
    self, name: str, *, low: float = 0.0
  ) -> tuple[tuple[float, float], ...]:
    """At least one (start, end) in seconds, in time order."""
    made = [self.interval(name, value, low=low) for value in self.listed(name)]
    if not made:
      self.fail(name, "got an empty list, expected at least one [start, end]")
    return tuple(sorted(made))

  def sample(self, **fields: Any) -> records.Sample:
    """A Sample, with what its own numbers contradict noted in `flaws`."""
    sample = records.Sample(**fields)
    flaws = list(sample.flaws)
    if len(set(sample.options)) < len(sample.options):
      flaws.append("two options have the same text")
    if not all(sample.options):
      flaws.append("an option has no text")
    times = [time for pair in sample.evidence for time in pair]
    if times and min(times) < 0:
      flaws.append(f"an interval starts at {min(times):g} s")
    if sample.kind == "interval" and sample.start_s == sample.end_s:
      flaws.append(f"the interval at {sample.start_s:g} s is empty")
    duration_s = sample.duration_s
    if times and duration_s is not None and max(times) > duration_s:
      flaws.append(
        f"an interval ends at {max(times):g} s, the video is said to last"
        f" {duration_s:g} s"
      )
    return sample._replace(flaws=tuple(flaws))


def read(path: pathlib.Path) -> Iterator[Row]:
  """The rows of a file, by its suffix.

  Raises:
    ValueError: a file that cannot be read, or of another kind.
  """
  readers = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
  }
  suffix = path.suffix.lower()
  if suffix not in readers:
    raise ValueError(
      f"{path}: got a file of kind {suffix!r}, expected one of"
      f" {', '.join(readers)}"
    )
  return readers[suffix](path)


def read_json(path: pathlib.Path) -> Iterator[Row]:
  """The rows of a JSON list of objects."""
  made = load_json(path)
  if not isinstance(made, list):
    raise ValueError(
      f"{path}: got a JSON {type(made).__name__}, expected a list of objects"
    )
  for number, data in enumerate(made):
    yield Row(data, f"{path}: row {number}", path, number)


def read_jsonl(path: pathlib.Path) -> Iterator[Row]:
  """The rows of a file with one JSON object a line; empty lines are none."""
  number = 0
  for line_number, line in enumerate(read_text(path).split("\n"), start=1):
    if not line.strip():
      continue
    data, problem = {}, ""
    try:
      data = json.loads(line)
    except (ValueError, RecursionError) as error:
      problem = f"not JSON ({error})"
    where = f"{path}:{line_number}"
    yield Row(data, where, path, number, problem=problem)
    number += 1


def read_csv(path: pathlib.Path) -> Iterator[Row]:
  """The rows of a CSV or TSV file whose first line names the fields."""
  lines = io.StringIO(read_text(path), newline="")
  tabs = path.suffix.lower() == ".tsv"
  try:
    table = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
    names = next(table, [])
    if len(set(names)) < len(names) or not names:
      raise ValueError(
        f"{path}:1: got the names {names}, expected one for each column"
      )
    for number, values in enumerate(values for values in table if values):
      problem = ""
      if len(values) != len(names):
        problem = f"got {len(values)} values, expected {len(names)}"
      data = {
        name: value if value.strip() else None
        for name, value in zip(names, values)
      }
      where = f"{path}:{table.line_num}"
      yield Row(data, where, path, number, problem=problem)
  except csv.Error as error:
    raise ValueError(f"{path}: not a table ({error})") from error


def read_parquet(path: pathlib.Path) -> Iterator[Row]:
  """The rows of a parquet file.

  Raises:
    ValueError: not parquet, or pyarrow is not installed.
  """
  try:
    import pyarrow.parquet
  except ImportError as error:
    raise ValueError(
      f"{path}: parquet files are read by pyarrow, which is not installed"
      f" ({error}); install it, or give the annotations as JSON or JSONL"
    ) from error
  try:
    made = pyarrow.parquet.ParquetFile(path).read().to_pylist()
  except (OSError, pyarrow.ArrowException) as error:
    raise ValueError(f"{path}: not a parquet file ({error})") from error
  for number, data in enumerate(made):
    yield Row(data, f"{path}: row {number}", path, number)


def load_json(path: pathlib.Path) -> Any:
  """What a JSON file holds.

  Raises:
    ValueError: not JSON, naming the file and the place.
  """
  try:
    return json.loads(read_text(path))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not JSON ({error})") from error


def load_object(path: pathlib.Path) -> dict[str, Any]:
  """The object that a JSON file holds.

  Raises:
    ValueError: not JSON, or another thing than an object.
  """
  made = load_json(path)
  if not isinstance(made, dict):
    raise ValueError(
      f"{path}: got a JSON {type(made).__name__}, expected an object"
    )
  return made


def read_text(path: pathlib.Path) -> str:
  """The text of a file.

  Raises:
    ValueError: no such file, or not UTF-8.
  """
  try:
    return path.read_text("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 text ({error})") from error
  except OSError as error:
    raise ValueError(f"{path}: {error.strerror}") from error


def _plain(text: str) -> str:
  return " ".join(text.split()).casefold().rstrip(".")


def _short(value: Any) -> str:
  said = repr(value)
  return said if len(said) <= 80 else said[:77] + "..."
