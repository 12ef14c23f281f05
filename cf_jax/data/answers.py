"""Completion text -> numbers: the one door where strings stop.

Axes: `B` videos, `G` completions per video, `C` completion slots, `K`
keyframes.

The door is strict, because a lenient one is what a policy learns to exploit:
two answers are none, "A or B" is none, a letter that only looks like one is
none. It is total and linear: any str, however long or odd, is read without an
exception and without backtracking (tags by `str.find`, patterns with bounded
repeats on ASCII). Answers that are texts are the exception to "two are none":
what is compared word by word (`ocr`, `free_form`) earns a part for a part.

Answers that point (intervals, boxes, frame numbers) are read by
`grounding_answers.py`, texts are compared by `text_scores.py`; both are rooms
behind this door.
"""

import re
import string
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from cf_jax.data import grounding_answers, prompts, text_scores

THINK = ("<think>", "</think>")
ANSWER = ("<answer>", "</answer>")
GLUE = ("<glue>", "</glue>")
INDEX = ("<index>", "</index>")

IntervalForm = Literal["strict", "last", "json"]
Reasoning = Literal["tagged", "none"]
Citation = Literal["time", "frame", "either"]

# Kind of a sample -> what its answers earn credit in, the main one first.
CREDIT = {
  "multiple_choice": ("accuracy",),
  "numerical": ("accuracy",),
  "ocr": ("accuracy",),
  "free_form": ("accuracy",),
  "regression": ("accuracy",),
  "open_ended": ("accuracy",),
  "interval": ("iou",),
  "tracking": ("iou",),
  "grounded_qa": ("accuracy", "iou"),
  "caption": ("event_recall",),
}
# Kinds that an LLM judges (judge.py).
JUDGED = ("open_ended", "caption")
# From which main score on an answer is called right, where it is not 1.
_RIGHT_FROM = {"interval": 0.5, "tracking": 0.5, "regression": 0.5}

_CHOICE = re.compile(r"(?:\(([A-Z])\)|([A-Z])\)?)[.:]?")
_NUMBER = re.compile(
  r"[+-]?(?:\d{1,3}(?:,\d{3}){1,4}|\d{1,15})(?:\.\d{1,15})?", re.ASCII
)
_CITED = re.compile(
  r"(?<![\d.])(\d{1,7}(?:\.\d{1,6})?) ?s(?:ec|econds?)?(?![A-Za-z0-9])",
  re.ASCII,
)
# "frame 3", "Frames 3, 4 and 7"; not "frame 3.5" and not "frames 3 s".
_CITED_FRAMES = re.compile(
  r"(?<![A-Za-z])frames? {0,2}#?"
  r"(\d{1,4}(?:(?:,? and |, ?| & )\d{1,4}){0,63})"
  r"(?!\.?\d| ?s(?:ec|econds?)?(?![A-Za-z0-9]))",
  re.ASCII | re.IGNORECASE,
)


class Completion(NamedTuple):
  """The parts of one completion.

  Attributes:
    reasoning: text between the think tags; "" without exactly one pair.
    answer: text between the answer tags, stripped; None without exactly one
      pair after the reasoning.
    well_formed: the whole completion is the sections asked for, in order, with
      nothing but white space between them.
    glue: text between the glue tags, stripped; None without exactly one pair
      after the answer.
    index: text between the index tags, stripped; None without exactly one pair
      after the reasoning.
  """

  reasoning: str
  answer: str | None
  well_formed: bool
  glue: str | None = None
  index: str | None = None


class Judgement(NamedTuple):
  """The fields of `types.Verdict` as numpy arrays.

  Attributes:
    component: accuracy, format, ..., float32[B, G] in [0, 1]; 0 where a
      component does not apply.
    answer_span: bool[B, G, C] tokens of the answer inside its tag.
    reasoning_span: bool[B, G, C] tokens of the reasoning inside its tag, where
      there is an answer.
    length: int32[B, G] completion tokens, the end token included.
    cited: bool[B, G, K] keyframes that the reasoning cites.
    applies: the same names, bool[B]: the samples that have the component.
  """

  component: dict[str, np.ndarray]
  answer_span: np.ndarray
  reasoning_span: np.ndarray
  length: np.ndarray
  cited: np.ndarray
  applies: dict[str, np.ndarray]


def _tagged(text: str, tags: tuple[str, str]) -> tuple[int, int] | None:
  """(start, end) of what stands between the tags, if there is one pair."""
  opening, closing = tags
  if text.count(opening) != 1 or text.count(closing) != 1:
    return None
  start = text.find(opening) + len(opening)
  end = text.find(closing)
  return (start, end) if start <= end else None


def parse_completion(
  text: str, *, sections: Sequence[tuple[str, str]] = (THINK, ANSWER)
) -> Completion:
  """Takes a completion apart; reads any str, and never raises.

  Args:
    text: the completion.
    sections: tags of a well-formed completion, in order.
  """
  found = {tags: _tagged(text, tags) for tags in (THINK, ANSWER, GLUE, INDEX)}
  last_think = max(text.rfind(tag) for tag in THINK)
  for tags in (ANSWER, INDEX):
    span = found[tags]
    if span is not None and last_think > span[0] - len(tags[0]):
      found[tags] = None  # stands inside or before the reasoning
  glue, answer = found[GLUE], found[ANSWER]
  if glue is not None and (answer is None or glue[0] < answer[1]):
    found[GLUE] = None

  position = 0
  well_formed = True
  for tags in sections:
    span = found[tags]
    between = "" if span is None else text[position : span[0] - len(tags[0])]
    # The first section stands at the very start.
    if span is None or (between.strip() if position else between):
      well_formed = False
      break
    position = span[1] + len(tags[1])

  def inside(tags):
    span = found[tags]
    return None if span is None else text[span[0] : span[1]].strip()

  think = found[THINK]
  return Completion(
    reasoning="" if think is None else text[think[0] : think[1]],
    answer=inside(ANSWER),
    well_formed=well_formed and position == len(text),
    glue=inside(GLUE),
    index=inside(INDEX),
  )


def last_answer(text: str) -> str | None:
  """The text of the last of any number of answer tags (arXiv 2504.06958)."""
  opening, closing = ANSWER
  found, position = None, 0
  while True:
    start = text.find(opening, position)
    end = text.find(closing, start) if start >= 0 else -1
    if end < 0:
      return found
    found = text[start + len(opening) : end].strip()
    position = end + len(closing)


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


def cited_times(text: str) -> tuple[float, ...]:
  """Every time in seconds that a text names: `1.5s`, `2 s`, `3 seconds`."""
  return tuple(float(match[1]) for match in _CITED.finditer(text))


def cited_frames(text: str) -> tuple[int, ...]:
  """Every frame number that a text names: `frame 3`, `Frames 3, 4 and 7`."""
  return tuple(
    int(number)
    for match in _CITED_FRAMES.finditer(text)
    for number in re.findall(r"\d{1,4}", match[1], re.ASCII)
  )


def cited_keyframes(
  text: str,
  frame_time_s: np.ndarray,
  *,
  tolerance_s: float,
  cite: Citation = "time",
) -> np.ndarray:
  """Which keyframes a text cites by their time or number.

  A time cites the nearest keyframe if that lies within the tolerance, so one
  time never cites two. Frame numbers count the keyframes shown, from 1.

  Args:
    text: the reasoning.
    frame_time_s: float[K] seconds; NaN where there is no keyframe.
    tolerance_s: half of the last digit shown, and a little more.
    cite: "time", "frame" or "either".

  Returns:
    bool[K].

  Raises:
    ValueError: an unknown way to cite.
  """
  if cite not in ("time", "frame", "either"):
    raise ValueError(
      f"cite must be 'time', 'frame' or 'either', got {cite!r}; change"
      " config.answers.cite"
    )
  cited = np.zeros(len(frame_time_s), dtype=bool)
  exists = np.isfinite(frame_time_s)
  if not np.any(exists):
    return cited
  if cite != "frame":
    for seconds in cited_times(text):
      apart = np.abs(frame_time_s - seconds)
      nearest = int(np.nanargmin(apart))
      if apart[nearest] <= tolerance_s:
        cited[nearest] = True
  if cite != "time":
    for number in cited_frames(text):
      if 1 <= number <= len(cited):
        cited[number - 1] = exists[number - 1]
  return cited


def _fail(sample, problem: str):
  raise ValueError(f"sample {sample.id!r}: {problem}; fix the sample")


def check_sample(sample) -> None:
  """Makes sure that answers to a sample can be judged.

  Args:
    sample: records.Sample.

  Raises:
    ValueError: a kind or a true answer that this door cannot read. It is the
      sample's fault, never the completion's.
  """
  if sample.kind not in CREDIT:
    _fail(sample, f"kind must be one of {sorted(CREDIT)}, got {sample.kind!r}")
  if sample.kind in ("multiple_choice", "grounded_qa"):
    if read_choice(sample.answer, sample.options) is None:
      _fail(
        sample,
        f"answer {sample.answer!r} is no letter of its"
        f" {len(sample.options)} options",
      )
  elif sample.kind in ("numerical", "regression"):
    if read_number(sample.answer) is None:
      _fail(sample, f"answer {sample.answer!r} is no number")
  elif sample.kind == "interval":
    if sample.start_s is None or sample.end_s is None:
      _fail(sample, "an interval question without start_s and end_s")
  elif sample.kind == "tracking":
    if not sample.boxes:
      _fail(sample, "a tracking question without boxes")
  elif sample.kind == "caption":
    if not sample.events:
      _fail(sample, "a caption question without events")
  elif not sample.answer.strip():
    _fail(sample, f"a {sample.kind} question without answer")


def check_samples(
  samples: Sequence, *, components: Sequence[str], has_judge: bool
) -> None:
  """Makes sure, before a run, that `judge` can judge answers to samples.

  Args:
    samples: records.Sample, of any kind.
    components: as in `judge`.
    has_judge: whether `judge` is given an LLM to ask.

  Raises:
    ValueError: a sample that `check_sample` refuses, one whose kind needs a
      component that is not made, or one for an LLM where there is none.
  """
  for sample in samples:
    check_sample(sample)
    missing = sorted(set(CREDIT[sample.kind]) - set(components))
    if missing:
      raise ValueError(
        f"sample {sample.id!r}: a {sample.kind} question earns"
        f" {' and '.join(CREDIT[sample.kind])}, but the components are"
        f" {list(components)}; add {missing} to config.answers.components"
      )
    if sample.kind in JUDGED and not has_judge:
      raise ValueError(
        f"sample {sample.id!r}: answers to a {sample.kind} question are judged"
        " by an LLM; set config.judge.url"
      )


def read_interval(
  parsed: Completion, text: str, *, form: IntervalForm
) -> grounding_answers.Interval | None:
  """The interval a completion answers with, or None.

  Args:
    parsed: the completion's parts.
    text: the whole completion.
    form: "strict" (one interval alone), "last" (the last one of the last
      answer tag, arXiv 2504.06958) or "json" (arXiv 2506.01908).

  Raises:
    ValueError: an unknown form.
  """
  if form == "last":
    answer = last_answer(text)
    return answer and grounding_answers.read_last_interval(answer)
  readers = {
    "strict": grounding_answers.read_interval,
    "json": grounding_answers.read_json_interval,
  }
  if form not in readers:
    raise ValueError(
      f"interval_form must be 'strict', 'last' or 'json', got {form!r}; change"
      " config.answers.interval_form"
    )
  return None if parsed.answer is None else readers[form](parsed.answer)


def _number_score(answer: str, sample) -> float:
  truth, value = read_number(sample.answer), read_number(answer)
  if value is None:
    return 0.0
  if sample.kind == "regression":
    if value == truth:
      return 1.0
    return 1 - min(1.0, abs(value - truth) / abs(truth)) if truth else 0.0
  if ("." in answer) != ("." in sample.answer):
    return 0.0
  return float(round(value, 2) == round(truth, 2))


def _text_score(answer: str, sample) -> float:
  if sample.kind == "ocr":
    return text_scores.word_accuracy(answer, sample.answer)
  # ROUGE-2 of a single word is 0, and so is ROUGE of other scripts.
  if _plain(answer) == _plain(sample.answer):
    return 1.0
  return text_scores.mean_rouge(answer, sample.answer)


def credit(
  text: str,
  parsed: Completion,
  sample,
  *,
  interval_form: IntervalForm = "strict",
) -> dict[str, float]:
  """What one completion earns in each component of its sample's kind.

  multiple_choice, grounded_qa: accuracy 1 for the right option. numerical: 1
  where equal at two decimals, 0 if only one side has a decimal point. ocr: 1 -
  word error rate. free_form: mean F of ROUGE-1, 2 and L, and 1 for the same
  text. regression: 1 - relative error, at least 0 (all arXiv 2503.21776).
  interval: iou with start_s to end_s; tracking: mean iou of the boxes;
  grounded_qa: iou of the glue with the evidence (arXiv 2504.06958).

  Args:
    text: the completion.
    parsed: its parts.
    sample: records.Sample, checked.
    interval_form: as in `read_interval`.

  Returns:
    Component -> number in [0, 1]; nothing for the kinds that an LLM judges.

  Raises:
    ValueError: an unknown interval_form.
  """
  if sample.kind in JUDGED:
    return {}
  answer = parsed.answer
  if sample.kind == "interval":
    found = read_interval(parsed, text, form=interval_form)
    truth = (sample.start_s, sample.end_s)
    return {
      "iou": grounding_answers.interval_iou(found, truth) if found else 0.0
    }
  if sample.kind == "tracking":
    boxes = answer and grounding_answers.read_boxes(
      answer, count=len(sample.boxes)
    )
    return {
      "iou": grounding_answers.mean_box_iou(boxes, sample.boxes)
      if boxes
      else 0.0
    }
  made = {}
  if sample.kind == "grounded_qa":
    glue = parsed.glue
    found = None if glue is None else grounding_answers.read_intervals(glue)
    made["iou"] = (
      0.0
      if found is None
      else grounding_answers.interval_set_iou(found, sample.evidence)
    )
  if answer is None:
    made["accuracy"] = 0.0
  elif sample.kind in ("multiple_choice", "grounded_qa"):
    truth = read_choice(sample.answer, sample.options)
    made["accuracy"] = float(read_choice(answer, sample.options) == truth)
  elif sample.kind in ("numerical", "regression"):
    made["accuracy"] = _number_score(answer, sample)
  else:
    made["accuracy"] = _text_score(answer, sample)
  return made


def _score(text: str, parsed: Completion, sample, interval_form) -> float:
  """The main component of `credit`."""
  check_sample(sample)
  if parsed.answer is None and interval_form != "last":
    return 0.0
  if sample.kind in JUDGED:
    raise ValueError(
      f"sample {sample.id!r}: answers to a {sample.kind} question are judged"
      " by an LLM; set config.judge.url"
    )
  earned = credit(text, parsed, sample, interval_form=interval_form)
  return earned[CREDIT[sample.kind][0]]


def accuracy(answer: str | None, sample) -> float:
  """How right one answer is: the main component of `credit`.

  Args:
    answer: from `parse_completion`; None earns 0.
    sample: records.Sample.

  Returns:
    A number in [0, 1].

  Raises:
    ValueError: a sample that `check_sample` refuses, or an answer that only an
      LLM can judge.
  """
  parsed = Completion(reasoning="", answer=answer, well_formed=False)
  return _score("", parsed, sample, "strict")


def is_right(score: float | np.ndarray, kind: str) -> bool | np.ndarray:
  """Whether main scores are those of right answers.

  Intervals and boxes are right from an IoU of 0.5 on, regressions from a
  relative error of 0.5 down, all else where nothing is missing.

  Args:
    score: what `judge` gave the main component of the kind; a number or many.
    kind: of the sample.
  """
  return score >= _RIGHT_FROM.get(kind, 1.0)


def is_correct(
  text: str, sample, *, interval_form: IntervalForm = "strict"
) -> bool:
  """Whether a completion is right, as in `is_right`.

  Args:
    text: the completion.
    sample: records.Sample.
    interval_form: as in `read_interval`.

  Raises:
    ValueError: as in `accuracy`.
  """
  score = _score(text, parse_completion(text), sample, interval_form)
  return bool(is_right(score, sample.kind))


def tokens_inside(
  pieces: Sequence[bytes], *, tags: tuple[str, str] = ANSWER
) -> np.ndarray:
  """bool[len(pieces)]: tokens with a byte of a section (white space cut).

  Args:
    pieces: UTF-8 bytes of the tokens of a completion with one such pair.
    tags: what the section stands between.
  """
  joined = b"".join(pieces)
  # Tags are ASCII, so they stand in the bytes where they stand in the text.
  start = joined.index(tags[0].encode()) + len(tags[0])
  end = joined.index(tags[1].encode())
  inside = joined[start:end]
  start += len(inside) - len(inside.lstrip())
  end -= len(inside) - len(inside.rstrip())
  stop = np.cumsum([len(piece) for piece in pieces])
  begin = stop - [len(piece) for piece in pieces]
  return (begin < end) & (stop > start) & (start < end)


def _sections(
  kind: str | None, reasoning: Reasoning
) -> tuple[tuple[str, str], ...]:
  """Tags of a well-formed answer; a kind of None is a frame selection."""
  if reasoning not in ("tagged", "none"):
    raise ValueError(
      f"reasoning must be 'tagged' or 'none', got {reasoning!r}; change"
      " config.answers.reasoning"
    )
  made = [THINK] if reasoning == "tagged" else []
  made.append(INDEX if kind is None else ANSWER)
  if kind == "grounded_qa":
    made.append(GLUE)
  return tuple(made)


def _completions(tokenizer, token: np.ndarray, mask: np.ndarray):
  """(b, g), slots, their bytes and the text of every completion."""
  for b, g in np.ndindex(*token.shape[:2]):
    slots = np.flatnonzero(mask[b, g] & (token[b, g] != tokenizer.eos_id))
    pieces = [tokenizer.token_bytes(int(i)) for i in token[b, g, slots]]
    text = b"".join(pieces).decode("utf-8", errors="replace")
    yield (b, g), slots, pieces, text


def _has_content(text: str, parsed: Completion, sample, interval_form) -> bool:
  """Whether what the form asks for inside its tags can be read."""
  if sample.kind == "interval" and interval_form == "json":
    return read_interval(parsed, text, form="json") is not None
  if sample.kind == "tracking":
    read = grounding_answers.read_boxes
    return read(parsed.answer, count=len(sample.boxes)) is not None
  if sample.kind == "grounded_qa":
    return grounding_answers.read_intervals(parsed.glue) is not None
  return True


def judge(
  tokenizer: prompts.Tokenizer,
  samples: Sequence,
  token: np.ndarray,
  mask: np.ndarray,
  *,
  frame_time_s: np.ndarray,
  cite_tolerance_s: float = 0.051,
  components: Sequence[str] = ("accuracy", "format"),
  interval_form: IntervalForm = "strict",
  reasoning: Reasoning = "tagged",
  cite: Citation = "time",
  ask: Callable[[Sequence[tuple[str, object]]], Sequence[float]] | None = None,
) -> Judgement:
  """Reads every completion of a batch, each by its own sample's kind.

  Args:
    tokenizer: from `prompts.load_tokenizer`.
    samples: B samples (records.Sample), of one kind or of many.
    token: int32[B, G, C] completion ids.
    mask: bool[B, G, C] True up to and including the end token.
    frame_time_s: float[B, K] seconds of the keyframes as shown in the prompt;
      NaN where there is none.
    cite_tolerance_s: how far a cited time may be from its keyframe's.
    components: names of the components to make, the same for every batch of a
      run: "format" and those of `CREDIT`.
    interval_form: as in `read_interval`.
    reasoning: "tagged", or "none" where the answer stands alone.
    cite: as in `cited_keyframes`.
    ask: the LLM judge, (answer, sample) pairs -> scores in [0, 1]
      (`judge.Judge.score`); None where no sample needs one.

  Returns:
    Judgement; `types.Verdict(**judgement._asdict())` is the batch's verdict.

  Raises:
    ValueError: a bad setting, or a sample that `check_samples` refuses.
  """
  shape = token.shape[:2]
  check_samples(samples, components=components, has_judge=ask is not None)
  made = Judgement(
    component={name: np.zeros(shape, np.float32) for name in components},
    answer_span=np.zeros(token.shape, dtype=bool),
    reasoning_span=np.zeros(token.shape, dtype=bool),
    length=mask.sum(axis=-1).astype(np.int32),
    cited=np.zeros((*shape, frame_time_s.shape[1]), dtype=bool),
    applies={
      name: np.array(
        [name == "format" or name in CREDIT[s.kind] for s in samples], bool
      )
      for name in components
    },
  )
  questions = []
  for (b, g), slots, pieces, text in _completions(tokenizer, token, mask):
    sample = samples[b]
    sections = _sections(sample.kind, reasoning)
    parsed = parse_completion(text, sections=sections)
    if "format" in made.component:
      made.component["format"][b, g] = parsed.well_formed and _has_content(
        text, parsed, sample, interval_form
      )
    earned = credit(text, parsed, sample, interval_form=interval_form)
    for name, value in earned.items():
      made.component[name][b, g] = value
    if parsed.answer is not None:
      made.answer_span[b, g, slots] = tokens_inside(pieces)
      if parsed.reasoning:
        made.reasoning_span[b, g, slots] = tokens_inside(pieces, tags=THINK)
      if sample.kind in JUDGED and parsed.answer:
        questions.append(((b, g), parsed.answer, sample))
    made.cited[b, g] = cited_keyframes(
      parsed.reasoning,
      frame_time_s[b],
      tolerance_s=cite_tolerance_s,
      cite=cite,
    )
  if questions:
    scores = ask([(answer, sample) for _, answer, sample in questions])
    for (where, _, sample), score in zip(questions, scores, strict=True):
      made.component[CREDIT[sample.kind][0]][where] = score
  return made


def judge_selection(
  tokenizer: prompts.Tokenizer,
  token: np.ndarray,
  mask: np.ndarray,
  *,
  num_frames: int,
  num_candidates: int,
  reasoning: Reasoning = "tagged",
) -> tuple[Judgement, np.ndarray]:
  """Reads the frame lists of a selector (arXiv 2505.15447).

  Args:
    tokenizer: from `prompts.load_tokenizer`.
    token: int32[B, G, C] completion ids.
    mask: bool[B, G, C] True up to and including the end token.
    num_frames: numbers asked for.
    num_candidates: frames that were shown.
    reasoning: as in `judge`.

  Returns:
    Judgement with the components index (1 for a readable list) and format, and
    nothing cited; int32[B, G, num_frames] frames to show the answerer, in
    order: a uniform stride where the list is not readable.

  Raises:
    ValueError: a bad setting, or too few candidates.
  """
  shape = token.shape[:2]
  default = grounding_answers.uniform_stride(
    count=num_frames, num_candidates=num_candidates
  )
  names = ("format", "index")
  made = Judgement(
    component={name: np.zeros(shape, np.float32) for name in names},
    answer_span=np.zeros(token.shape, dtype=bool),
    reasoning_span=np.zeros(token.shape, dtype=bool),
    length=mask.sum(axis=-1).astype(np.int32),
    cited=np.zeros((*shape, num_frames), dtype=bool),
    applies={name: np.ones(shape[0], dtype=bool) for name in names},
  )
  frame = np.tile(default, (*shape, 1))
  sections = _sections(None, reasoning)
  for (b, g), slots, pieces, text in _completions(tokenizer, token, mask):
    parsed = parse_completion(text, sections=sections)
    made.component["format"][b, g] = parsed.well_formed
    if parsed.index is None:
      continue
    made.answer_span[b, g, slots] = tokens_inside(pieces, tags=INDEX)
    if parsed.reasoning:
      made.reasoning_span[b, g, slots] = tokens_inside(pieces, tags=THINK)
    found = grounding_answers.read_indices(
      parsed.index, count=num_frames, num_candidates=num_candidates
    )
    if found is not None:
      made.component["index"][b, g] = 1
      frame[b, g] = found
  return made, frame


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
