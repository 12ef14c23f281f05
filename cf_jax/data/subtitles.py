"""Subtitles of a video: what is said, and when.

Read are SubRip files (Video-MME) and the two JSON forms of LongVideoBench: a
list of {"start", "end", "line"} with times as HH:MM:SS.mmm, or of {"timestamp":
[start, end], "text"} in seconds.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from cf_jax.data import rows

_TIME = r"(\d{1,2}):(\d{2}):(\d{2})[,.](\d{1,3})"
_SPAN = re.compile(rf"{_TIME}\s+-->\s+{_TIME}", re.ASCII)
_CLOCK = re.compile(r"(\d{1,2}):(\d{2}):(\d{2}(?:\.\d{1,9})?)", re.ASCII)
_MARKUP = re.compile(r"</?[a-z][^<>]{0,40}>", re.IGNORECASE)


class Line(NamedTuple):
  """One line of text.

  Attributes:
    start_s: seconds of the video at which it appears.
    end_s: seconds at which it goes.
    text: without markup.
  """

  start_s: float
  end_s: float
  text: str


def read(path: str | pathlib.Path, *, start_s: float = 0.0) -> list[Line]:
  """The lines of a file, in its order; those without text are left out.

  Args:
    path: of a .srt or .json file.
    start_s: seconds of the file at which the video begins
      (`Sample.subtitles_start_s`).

  Raises:
    ValueError: another kind of file, or a line that cannot be read, naming it.
  """
  path = pathlib.Path(path)
  suffix = path.suffix.lower()
  if suffix not in (".srt", ".json"):
    raise ValueError(f"{path}: got {suffix!r}, expected .srt or .json")
  found = _srt(path) if suffix == ".srt" else _json(path)
  return [
    Line(line.start_s - start_s, line.end_s - start_s, line.text)
    for line in found
    if line.text
  ]


def shown(lines: Sequence[Line], time_s: Sequence[float]) -> list[str]:
  """The texts on screen at any of some seconds, each line once, in order."""
  return [
    line.text
    for line in lines
    if any(line.start_s <= second <= line.end_s for second in time_s)
  ]


def _srt(path: pathlib.Path) -> list[Line]:
  made, span, text = [], None, []

  def finish(last=False):
    # Empty lines may stand inside; before the next times stands its number.
    if not last and len(text) > 1 and not text[-2] and text[-1].isdigit():
      text.pop()
    if span is not None:
      made.append(Line(*span, _clean(" ".join(text))))

  for number, line in enumerate(rows.read_text(path).split("\n"), start=1):
    line = line.strip()
    match = _SPAN.match(line)
    if match is not None:
      finish()
      start = _seconds(*match.groups()[:4])
      end = _seconds(*match.groups()[4:])
      if end < start:
        raise ValueError(f"{path}:{number}: got {line!r}, which ends too early")
      span, text = (start, end), []
    elif "-->" in line:
      raise ValueError(
        f"{path}:{number}: got {line!r}, expected HH:MM:SS,mmm --> HH:MM:SS,mmm"
      )
    else:
      text.append(line)
  finish(last=True)
  return made


def _json(path: pathlib.Path) -> list[Line]:
  made = []
  for row in rows.read_json(path):
    row.check()
    if row.has("timestamp"):
      pair = row.listed("timestamp")
      if len(pair) != 2:
        row.fail("timestamp", f"got {pair!r}, expected [start, end]")
      start_s = row.as_number("timestamp", pair[0], low=0.0)
      # The last line of some files has no end: it stays.
      end_s = float("inf")
      if pair[1] is not None:
        end_s = row.as_number("timestamp", pair[1], low=start_s)
      text = row.any_text("text")
    else:
      start_s, end_s = (_clock(row, name) for name in ("start", "end"))
      if end_s < start_s:
        row.fail("end", f"got {end_s:g} s, which is before {start_s:g} s")
      text = row.any_text("line")
    made.append(Line(start_s, end_s, _clean(text)))
  return made


def _clock(row: rows.Row, name: str) -> float:
  match = _CLOCK.fullmatch(row.text(name))
  if match is None:
    row.fail(name, f"got {row.text(name)!r}, expected HH:MM:SS.mmm")
  hours, minutes, seconds = match.groups()
  return 3600.0 * int(hours) + 60.0 * int(minutes) + float(seconds)


def _seconds(hours: str, minutes: str, seconds: str, rest: str) -> float:
  whole = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
  return whole + int(rest) / 10 ** len(rest)


def _clean(text: str) -> str:
  return " ".join(_MARKUP.sub("", text).split())
