"""Which option a text names, by the rule of each multiple-choice benchmark.

These are the lenient readers of the benchmarks' own scripts, written afresh;
rewards read strictly (`data/answers.py`). docs/scoring.md names the script of
each rule and what is odd about it. Every reader takes any str in linear time
and returns a letter, or None where the script would find none.
"""

import re
from collections.abc import Sequence

import numpy as np

# Taken out one after another before the first capital is looked for.
VIDEOMME_PHRASES = (
  "The best answer is",
  "The correct answer is",
  "The answer is",
  "The answer",
  "Answer:",
  "Option:",
  "The correct answer",
  "The correct option",
)
LONGVIDEOBENCH_PHRASES = (
  "The best answer is",
  "The correct answer is",
  "The answer is",
  "The answer",
  "The best option is",
  "The correct option is",
  "Best answer:",
  "Best option:",
)
VIDEOCHAT_PHRASES = LONGVIDEOBENCH_PHRASES[:6]

# How a letter is written -> how its last place is found where several letters
# are written so; forms of one group are tried together.
Forms = tuple[tuple[tuple[str, str], ...], ...]
NEXTQA_FORMS: Forms = (
  (("({})", "({})"),),
  (("{} ", " {} "),),
  (("{}.", " {} "),),
)
VIDEO_MMMU_FORMS: Forms = (
  (("{}.", "{}."), ("{}:", "{}:")),
  (("({})", "({})"),),
  (("{} ", " {} "),),
)
_STRIPPED = ",.!?;:'"
_FINAL = re.compile(
  r"(?i:answer|option)(?i: is)?[ :]{0,3}[\"'(*$\\]{0,3}([A-E])(?![A-Za-z0-9])"
)
_LONE = re.compile(r"(?<![A-Za-z0-9])([A-E])(?![A-Za-z0-9'])")


def letters_of(options: Sequence[str]) -> str:
  """`ABCD` for four options."""
  return "".join(chr(ord("A") + n) for n in range(len(options)))


def first_capital(
  text: str, letters: str, phrases: Sequence[str]
) -> str | None:
  """The first of some capitals, once phrases are taken out (VideoMME).

  Args:
    text: of the answer.
    letters: the capitals that count, wherever they stand.
    phrases: taken out, in this order.
  """
  text = text.strip()
  for phrase in phrases:
    text = text.replace(phrase, "")
  found = re.search(f"[{letters}]", text)
  return found and found[0]


def polished(text: str) -> str | None:
  """One character: before the first `)`, after its `(`, of a word (LVBench)."""
  text = text.strip().split(")", 1)[0].strip()
  if "(" in text:
    text = text.split("(", 2)[1].strip()
  return text.split(" ", 1)[0][:1] or None


def before_bracket(text: str) -> str | None:
  """The character before the first `)`, or the whole text (MLVU)."""
  place = text.find(")")
  if place < 0:
    return text or None
  return text[place - 1 : place] or None


def first_word(text: str, options: Sequence[str]) -> tuple[str, ...]:
  """The letters that the first word of the first line may mean (MVBench).

  The script asks whether the word without dots is a part of `(a)`, or has
  `(a)` in it. A word without any letter or digit is part of every option's
  mark; here it means none.

  Args:
    text: of the answer.
    options: of the question.
  """
  word = text.strip().split("\n", 1)[0].lower().split(" ", 1)[0]
  bare = word.replace(".", "")
  if not bare.strip("()"):
    return ()
  return tuple(
    letter
    for letter in letters_of(options)
    if bare in f"({letter.lower()})" or f"({letter.lower()})" in word
  )


def listed_forms(text: str, options: Sequence[str], forms: Forms) -> str | None:
  """The letter that stands last in the first form that is found (MMMU).

  Where no form is found and the text has more than five words, the option whose
  text stands in it, the last one of several.

  Args:
    text: of the answer.
    options: of the question.
    forms: ways to write a letter, the preferred first.
  """
  for mark in _STRIPPED:
    text = text.strip(mark)
  text = f" {text} "
  letters = letters_of(options)
  for group in forms:
    found, places = [], []
    for form, place in group:
      for letter in letters:
        if form.format(letter) in text:
          found.append(letter)
          places.append(place)
    if found:
      where = [text.rfind(places[0].format(letter)) for letter in found]
      return found[int(np.argmax(where))] if len(found) > 1 else found[0]
  if len(text.split()) <= 5:
    return None
  text = text.lower()
  said = {
    letter: text.rfind(option.lower())
    for letter, option in zip(letters, options, strict=True)
  }
  said = {letter: place for letter, place in said.items() if place >= 0}
  # Of equals the first, as in the scripts.
  return max(said, key=said.__getitem__) if said else None


def leading_mark(text: str, options: Sequence[str]) -> str | None:
  """A to D alone, or before `.` or `)` at the start (TempCompass)."""
  text = text.replace("</s>", "").strip()
  if text in ("A", "B", "C", "D") or text[:2] in {
    letter + mark for letter in "ABCD" for mark in ".)"
  }:
    return text[0]
  for letter, option in zip(letters_of(options), options, strict=True):
    if text == f"{letter}. {option}":
      return letter
  return None


def yes_or_no(text: str) -> str | None:
  """`yes` or `no` at the start, in any case (TempCompass)."""
  text = text.replace("</s>", "").strip()[:3].lower()
  if text == "yes":
    return "yes"
  return "no" if text.startswith("no") else None


def caption_mark(
  text: str, options: Sequence[str], labels: Sequence[str]
) -> str | None:
  """The option whose line, text, label or number alone is given (TempCompass).

  Args:
    text: of the answer.
    options: the captions.
    labels: what stands before them: `Caption A`, `Option 1`.
  """
  text = text.replace("</s>", "").strip()
  said = None
  letters = letters_of(options)
  after = text.split(") ", 2)[1] if ") " in text else None
  # What comes later overrules, as in the script.
  for letter, option, label in zip(letters, options, labels, strict=True):
    if text == f"{label}: {option}":
      said = letter
  for letter, option in zip(letters, options, strict=True):
    if option.split(": ", 1)[0] in (text, after):
      said = letter
  bare = text.replace(".", "")
  for marks in (labels, [label.split(" ", 1)[-1] for label in labels]):
    for letter, mark in zip(letters, marks, strict=True):
      if mark in (text, bare):
        said = letter
  return said


def fuzzy_word(text: str) -> str:
  """What stands before the first space, without dots at its end (VSI-Bench)."""
  return text.split(" ", 1)[0].rstrip(".").strip()


def final_letter(text: str) -> str | None:
  """The letter after the last `answer is` or `answer:`; else the only one.

  For MMVU, whose own script asks an LLM: this rule is ours. A to E as a word of
  their own count; where the text names two and says of none that it is the
  answer, none counts.
  """
  said = [match[1] for match in _FINAL.finditer(text)]
  if said:
    return said[-1]
  lone = {match[1] for match in _LONE.finditer(text)}
  return lone.pop() if len(lone) == 1 else None
