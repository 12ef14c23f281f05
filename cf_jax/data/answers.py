"""Completion text -> numbers: the one door where strings stop.

Axes: `B` videos, `G` completions per video, `C` completion slots, `K`
keyframes.

The door is strict, because a lenient one is what a policy learns to exploit:
two answers are none, "A or B" is none, a letter that only looks like one is
none. It is total and linear: any str, however long or odd, is read without an
exception and without backtracking (tags by `str.find`, patterns with bounded
repeats on ASCII).
"""

import re
import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cf_jax.data import prompts

THINK = ("<think>", "</think>")
ANSWER = ("<answer>", "</answer>")

_CHOICE = re.compile(r"(?:\(([A-Z])\)|([A-Z])\)?)[.:]?")
_NUMBER = re.compile(
  r"[+-]?(?:\d{1,3}(?:,\d{3}){1,4}|\d{1,15})(?:\.\d{1,15})?", re.ASCII
)
_SECONDS = r"(\d{1,7}(?:\.\d{1,6})?) ?(?:s|sec|seconds)?"
_INTERVAL = re.compile(rf"{_SECONDS} ?(?:to|and|,|-) ?{_SECONDS}", re.ASCII)
_CITED = re.compile(
  r"(?<![\d.])(\d{1,7}(?:\.\d{1,6})?) ?s(?:ec|econds?)?(?![A-Za-z0-9])",
  re.ASCII,
)


class Completion(NamedTuple):
  """The parts of one completion.

  Attributes:
    reasoning: text between the think tags; "" without exactly one pair.
    answer: text between the answer tags, stripped; None without exactly one
      pair after the reasoning.
    well_formed: the whole completion is `<think>..</think>`, white space,
      `<answer>..</answer>`.
  """

  reasoning: str
  answer: str | None
  well_formed: bool


class Judgement(NamedTuple):
  """The fields of `types.Verdict` as numpy arrays.

  Attributes:
    component: accuracy and format, float32[B, G] in [0, 1].
    answer_span: bool[B, G, C] tokens of the answer inside its tag.
    length: int32[B, G] completion tokens, the end token included.
    cited: bool[B, G, K] keyframes whose time the reasoning cites.
  """

  component: dict[str, np.ndarray]
  answer_span: np.ndarray
  length: np.ndarray
  cited: np.ndarray


def _tagged(text: str, tags: tuple[str, str]) -> tuple[int, int] | None:
  """(start, end) of what stands between the tags, if there is one pair."""
  opening, closing = tags
  if text.count(opening) != 1 or text.count(closing) != 1:
    return None
  start = text.find(opening) + len(opening)
  end = text.find(closing)
  return (start, end) if start <= end else None


def parse_completion(text: str) -> Completion:
  """Takes a completion apart; reads any str, and never raises."""
  think = _tagged(text, THINK)
  answer = _tagged(text, ANSWER)
  if answer is not None:
    last_think = max(text.rfind(tag) for tag in THINK)
    if last_think > answer[0] - len(ANSWER[0]):
      answer = None  # the answer stands inside or before the reasoning
  if think is None or answer is None:
    well_formed = False
  else:
    between = text[think[1] + len(THINK[1]) : answer[0] - len(ANSWER[0])]
    well_formed = (
      think[0] == len(THINK[0])
      and not between.strip()
      and answer[1] + len(ANSWER[1]) == len(text)
    )
  return Completion(
    reasoning="" if think is None else text[think[0] : think[1]],
    answer=None if answer is None else text[answer[0] : answer[1]].strip(),
    well_formed=well_formed,
  )


def _plain(text: str) -> str:
  return " ".join(text.split()).casefold().rstrip(".")


def read_choice(answer: str, options: Sequence[str]) -> int | None:
  """Number of the option an answer names, or None.

  Read are `B`, `B.`, `B:`, `B)`, `(B)`, `(B).`, each alone or followed by the
  very text of that option, and the very text of an option alone. Where options
  are letters themselves a letter names the position; a text that two options
  share names none.

  Args:
    answer: what stands between the answer tags.
    options: the choices, without letters.
  """
  answer = answer.strip()
  match = _CHOICE.match(answer)
  if match is not None:
    number = string.ascii_uppercase.index(match[1] or match[2])
    rest = answer[match.end() :]
    if number < len(options) and (
      not rest or rest[0].isspace() and _plain(rest) == _plain(options[number])
    ):
      return number
  same = [n for n, option in enumerate(options) if option.strip() == answer]
  return same[0] if len(same) == 1 else None


def read_number(answer: str) -> float | None:
  """The one finite number an answer consists of, or None."""
  answer = answer.strip()
  if _NUMBER.fullmatch(answer) is None:
    return None
  return float(answer.replace(",", ""))


def read_interval(answer: str) -> tuple[float, float] | None:
  """(start, end) in seconds where an answer is one interval, or None.

  Read are `1.5 to 4`, `1.5s - 4.0s`, `[1.5, 4]` and the like. A reversed or
  empty interval is None.
  """
  answer = answer.strip()
  if answer.startswith("[") and answer.endswith("]"):
    answer = answer[1:-1]
  if len(answer) > 1000:
    return None
  match = _INTERVAL.fullmatch(" ".join(answer.split()))
  if match is None:
    return None
  start, end = float(match[1]), float(match[2])
  return (start, end) if start < end else None


def cited_times(text: str) -> tuple[float, ...]:
  """Every time in seconds that a text names: `1.5s`, `2 s`, `3 seconds`."""
  return tuple(float(match[1]) for match in _CITED.finditer(text))


def cited_keyframes(
  text: str, frame_time_s: np.ndarray, *, tolerance_s: float
) -> np.ndarray:
  """Which keyframes a text cites by their time.

  A time cites the nearest keyframe if that lies within the tolerance, so one
  time never cites two.

  Args:
    text: the reasoning.
    frame_time_s: float[K] seconds; NaN where there is no keyframe.
    tolerance_s: half of the last digit shown, and a little more.

  Returns:
    bool[K].
  """
  cited = np.zeros(len(frame_time_s), dtype=bool)
  if not np.any(np.isfinite(frame_time_s)):
    return cited
  for seconds in cited_times(text):
    apart = np.abs(frame_time_s - seconds)
    nearest = int(np.nanargmin(apart))
    if apart[nearest] <= tolerance_s:
      cited[nearest] = True
  return cited


def interval_iou(
  first: tuple[float, float], second: tuple[float, float]
) -> float:
  """Intersection over union of two intervals; 0 if either has no length."""
  overlap = min(first[1], second[1]) - max(first[0], second[0])
  union = max(first[1], second[1]) - min(first[0], second[0])
  if not (first[0] < first[1] and second[0] < second[1] and overlap > 0):
    return 0.0
  return overlap / union


def accuracy(answer: str | None, sample) -> float:
  """How right one answer is, by the sample's kind.

  multiple_choice: 1 for the right option. numerical: 1 where equal at two
  decimals, 0 if only one side has a decimal point (arXiv 2503.21776). interval:
  intersection over union with start_s to end_s. free_form: 1 for the same text
  up to case, white space and a final full stop.

  Args:
    answer: from `parse_completion`; None earns 0.
    sample: records.Sample.

  Returns:
    A number in [0, 1].

  Raises:
    ValueError: a kind or a true answer that this door cannot read. It is the
      sample's fault, never the completion's.
  """
  if sample.kind == "multiple_choice":
    truth = read_choice(sample.answer, sample.options)
    if truth is None:
      raise ValueError(
        f"sample {sample.id!r}: answer {sample.answer!r} is no letter of its"
        f" {len(sample.options)} options; fix the sample"
      )
    chosen = None if answer is None else read_choice(answer, sample.options)
    return float(chosen == truth)
  if sample.kind == "numerical":
    truth = read_number(sample.answer)
    if truth is None:
      raise ValueError(
        f"sample {sample.id!r}: answer {sample.answer!r} is no number; fix"
        " the sample"
      )
    value = None if answer is None else read_number(answer)
    if value is None or ("." in answer) != ("." in sample.answer):
      return 0.0
    return float(round(value, 2) == round(truth, 2))
  if sample.kind == "interval":
    if sample.start_s is None or sample.end_s is None:
      raise ValueError(
        f"sample {sample.id!r}: an interval question without start_s and"
        " end_s; fix the sample"
      )
    found = None if answer is None else read_interval(answer)
    if found is None:
      return 0.0
    return interval_iou(found, (sample.start_s, sample.end_s))
  if sample.kind == "free_form":
    return float(answer is not None and _plain(answer) == _plain(sample.answer))
  raise ValueError(
    f"sample {sample.id!r}: kind must be 'multiple_choice', 'numerical',"
    f" 'interval' or 'free_form', got {sample.kind!r}; fix the sample"
  )


def is_correct(text: str, sample) -> bool:
  """Whether a completion is right; an interval from an IoU of 0.5 on."""
  return accuracy(parse_completion(text).answer, sample) >= 0.5


def answer_tokens(pieces: Sequence[bytes]) -> np.ndarray:
  """bool[len(pieces)]: tokens with a byte of the answer (white space cut).

  Args:
    pieces: UTF-8 bytes of the tokens of a completion with one answer tag.
  """
  joined = b"".join(pieces)
  # Tags are ASCII, so they stand in the bytes where they stand in the text.
  start = joined.index(ANSWER[0].encode()) + len(ANSWER[0])
  end = joined.index(ANSWER[1].encode())
  inside = joined[start:end]
  start += len(inside) - len(inside.lstrip())
  end -= len(inside) - len(inside.rstrip())
  stop = np.cumsum([len(piece) for piece in pieces])
  begin = stop - [len(piece) for piece in pieces]
  return (begin < end) & (stop > start) & (start < end)


def judge(
  tokenizer: prompts.Tokenizer,
  samples: Sequence,
  token: np.ndarray,
  mask: np.ndarray,
  *,
  frame_time_s: np.ndarray,
  cite_tolerance_s: float = 0.051,
) -> Judgement:
  """Reads every completion of a batch.

  Args:
    tokenizer: from `prompts.load_tokenizer`.
    samples: B samples (records.Sample).
    token: int32[B, G, C] completion ids.
    mask: bool[B, G, C] True up to and including the end token.
    frame_time_s: float[B, K] seconds of the keyframes as shown in the prompt;
      NaN where there is none.
    cite_tolerance_s: how far a cited time may be from its keyframe's.

  Returns:
    Judgement; `types.Verdict(**judgement._asdict())` is the batch's verdict.
  """
  shape = token.shape[:2]
  made = Judgement(
    component={
      "accuracy": np.zeros(shape, np.float32),
      "format": np.zeros(shape, np.float32),
    },
    answer_span=np.zeros(token.shape, dtype=bool),
    length=mask.sum(axis=-1).astype(np.int32),
    cited=np.zeros((*shape, frame_time_s.shape[1]), dtype=bool),
  )
  for b, g in np.ndindex(*shape):
    slots = np.flatnonzero(mask[b, g] & (token[b, g] != tokenizer.eos_id))
    pieces = [tokenizer.token_bytes(int(i)) for i in token[b, g, slots]]
    text = b"".join(pieces).decode("utf-8", errors="replace")
    parsed = parse_completion(text)
    made.component["accuracy"][b, g] = accuracy(parsed.answer, samples[b])
    made.component["format"][b, g] = parsed.well_formed
    if parsed.answer is not None:
      made.answer_span[b, g, slots] = answer_tokens(pieces)
    made.cited[b, g] = cited_keyframes(
      parsed.reasoning, frame_time_s[b], tolerance_s=cite_tolerance_s
    )
  return made


def evidence_keyframes(
  samples: Sequence, frame_time_s: np.ndarray, *, slack_s: float = 0.0
) -> np.ndarray:
  """Which keyframes lie inside a sample's annotated evidence.

  Args:
    samples: B samples; `evidence` is a sequence of (start_s, end_s), may be
      empty.
    frame_time_s: float[B, K] seconds; NaN where there is no keyframe.
    slack_s: how far outside still counts.

  Returns:
    bool[B, K].
  """
  inside = np.zeros(frame_time_s.shape, dtype=bool)
  for b, sample in enumerate(samples):
    for start, end in sample.evidence or ():
      inside[b] |= (frame_time_s[b] >= start - slack_s) & (
        frame_time_s[b] <= end + slack_s
      )
  return inside
