"""Open answers that are compared by rule: Video-MMMU's words and numbers.

Written afresh after the benchmark's script; linear in the length of the text
(its patterns are made to start at the first digit of a number only, which
finds the same numbers).
"""

import re

# What an answer stands after.
_INDICATORS = (
  "could be ",
  "so ",
  "is ",
  "thus ",
  "therefore ",
  "final ",
  "answer ",
  "result ",
  "are ",
  "in total ",
  "total ",
  "identify ",
  "recognize ",
  "calculated as ",
  "counted as ",
  "measured as ",
  "observed as ",
  "concluded as ",
  "found to be ",
  "equals ",
  "determined to be ",
  "number of ",
  "value is ",
  "adds up to ",
  "have ",
  "has ",
)
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (
  re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
  re.compile(r"(?:(?<!\d)|(?=-))-?\d++(?:\.\d+)?[eE][+-]?\d+"),
  re.compile(
    r"(?:(?<!\d)|(?=[-.]))-?(?:\d++\.\d+|\.\d+|\d++\b)"
    r"(?![eE][+-]?\d)(?![,\d])"
  ),
)
# Longer than any number that is meant; float() takes its time on more.
_MAX_DIGITS = 400


def to_float(text: str) -> float | None:
  """What Python's float reads, or None; also None beyond 400 characters."""
  if len(text) > _MAX_DIGITS:
    return None
  try:
    return float(text)
  except ValueError:
    return None


def _normal(text: str) -> list[str | float]:
  """A number at two decimals, or the text in lower case."""
  text = text.strip()
  number = to_float(text.replace(",", ""))
  if number is not None:
    return [round(number, 2)]
  text = text.lower()
  # A single letter must stand alone at one of its sides.
  return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def candidates(text: str) -> list[str | float]:
  """What a text may answer: ends of its lines, and the numbers in them."""
  text = text.strip().strip(".").lower()
  lines = text.split("\n")
  ends = []
  for number, line in enumerate(lines):
    last = number == len(lines) - 1
    shortest = ""
    for indicator in (*_INDICATORS, "=") if last else _INDICATORS:
      if indicator in line:
        end = line.rsplit(indicator, 1)[-1].strip()
        if not shortest or len(end) < len(shortest):
          shortest = end
    if shortest and shortest not in _TRIVIAL:
      ends.append(shortest)
  ends = ends or [text]
  said = list(ends)
  for end in ends:
    for pattern in _NUMBERS:
      said += pattern.findall(end)
  return [value for one in said for value in _normal(one)]


def is_right(text: str, truth: str) -> bool:
  """Whether a number of the answer equals the truth, or its words hold it."""
  meant = _normal(truth)
  return any(
    any(isinstance(one, str) and one in said for one in meant)
    if isinstance(said, str)
    else said in meant
    for said in candidates(text)
  )
