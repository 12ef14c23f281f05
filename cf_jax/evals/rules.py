"""How each public benchmark reads an answer, and what that earns.

Rules are the benchmarks' own, lenient where those are; the strict parser of
rewards has no part in this, but for a user's own manifests. docs/scoring.md has
them in words, and what they were compared with.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cf_jax.data import answers, grounding_answers, records
from cf_jax.evals import (
  choices,
  grounding,
  highlights,
  open_answers,
  regression,
  tracking,
)


class Reading(NamedTuple):
  """What one response says, and what that earns.

  Attributes:
    answer: as read, for people; None where nothing could be read.
    score: metric -> number; the main metric of the question always.
    counted: False where the published script leaves the question out of its
      denominator.
  """

  answer: str | None
  score: dict[str, float]
  counted: bool = True


# ------------------------------------------------------------ reading answers
# Every reader takes (text, sample) and returns a Reading, or None where an LLM
# has to judge.


def _chosen(said: str | None, sample: records.Sample) -> Reading:
  """Accuracy of a letter."""
  return Reading(said, {"accuracy": float(said == sample.answer)})


def _answered(said: str | None, right: bool, counted: bool) -> Reading:
  """Accuracy over what was answered, as some scripts count, and over all."""
  score = {"accuracy": float(right), "accuracy_all": float(right)}
  return Reading(said, score, counted)


def _read_videomme(text: str, sample: records.Sample) -> Reading:
  said = choices.first_capital(text, "ABCD", choices.VIDEOMME_PHRASES)
  return _answered(said, said == sample.answer, said is not None)


def _read_longvideobench(text: str, sample: records.Sample) -> Reading:
  said = choices.first_capital(text, "ABCDE", choices.LONGVIDEOBENCH_PHRASES)
  return _chosen(said, sample)


def _read_lvbench(text: str, sample: records.Sample) -> Reading:
  return _chosen(choices.polished(text), sample)


def _read_mlvu(text: str, sample: records.Sample) -> Reading | None:
  if sample.kind != "multiple_choice":
    return None
  said = choices.before_bracket(text)
  known = said in tuple(choices.letters_of(sample.options))
  # Of two published rows the answer is no option: nothing is right there.
  return _chosen(said if known else None, sample)


def _read_mvbench(text: str, sample: records.Sample) -> Reading:
  said = choices.first_word(text, sample.options)
  right = float(sample.answer in said)
  return Reading(" or ".join(said) or None, {"accuracy": right})


def _read_nextqa(text: str, sample: records.Sample) -> Reading:
  bare = text.strip()
  letters = choices.letters_of(sample.options)
  if len(bare) == 1 and bare in "0123456789"[: len(letters)]:
    return _chosen(letters[int(bare)], sample)
  return _chosen(
    choices.listed_forms(text, sample.options, choices.NEXTQA_FORMS), sample
  )


def _read_tempcompass(text: str, sample: records.Sample) -> Reading | None:
  if sample.kind == "open_ended":
    return None
  if sample.labels:
    said = choices.caption_mark(text, sample.options, sample.labels)
  elif sample.options:
    said = choices.leading_mark(text, sample.options)
  else:
    said = choices.yes_or_no(text)
  return _chosen(said, sample)


def _read_vsibench(text: str, sample: records.Sample) -> Reading:
  said = choices.fuzzy_word(text)
  if sample.kind == "regression":
    value = open_answers.to_float(said)
    mra = regression.mean_relative_accuracy(value, float(sample.answer))
    return Reading(None if value is None else said, {"score": mra})
  right = said.lower() == sample.answer.lower()
  known = said.upper() in list(choices.letters_of(sample.options))
  return Reading(said if known else None, {"score": float(right)})


def _read_mmvu(text: str, sample: records.Sample) -> Reading | None:
  if sample.kind == "open_ended":
    return None
  return _chosen(choices.final_letter(text), sample)


def _read_video_mmmu(text: str, sample: records.Sample) -> Reading:
  counted = text not in ("", "API Error")
  if sample.kind != "multiple_choice":
    right = counted and open_answers.is_right(text, sample.answer)
    return _answered(text.strip() or None, right, counted)
  said = None
  if counted:
    said = choices.listed_forms(text, sample.options, choices.VIDEO_MMMU_FORMS)
  return _answered(said, said == sample.answer, counted)


def _read_moment(text: str, sample: records.Sample) -> Reading:
  said = grounding.read_moment(text, answers.last_answer(text))
  iou = 0.0
  if said is not None:
    iou = grounding.hull_iou(said, (sample.start_s, sample.end_s))
  score = {"mIoU": iou}
  score |= {f"R1@{limit}": float(iou >= limit) for limit in grounding.LIMITS}
  return Reading(said and f"{said[0]:g} to {said[1]:g}", score)


def _tagged(text: str, name: str) -> str | None:
  """What stands between the first pair of tags."""
  start = text.find(f"<{name}>")
  end = text.find(f"</{name}>", start) if start >= 0 else -1
  return text[start + len(name) + 2 : end] if end >= 0 else None


def _read_nextgqa(text: str, sample: records.Sample) -> Reading:
  answer = _tagged(text, "answer")
  bare = (text if answer is None else answer).strip()
  letters = choices.letters_of(sample.options)
  if len(bare) == 1 and bare in "0123456789"[: len(letters)]:
    letter = letters[int(bare)]
  else:
    letter = choices.first_capital(bare, "ABCDEFG", choices.VIDEOCHAT_PHRASES)
  score = {"accuracy": float(letter == sample.answer)}
  said = None
  if sample.evidence:
    glue = _tagged(text, "glue")
    said = None if glue is None else grounding.read_glue(glue)
    score |= _grounded(said, sample, score["accuracy"] > 0)
  found = [letter, said and str(list(said))]
  return Reading(", ".join(filter(None, found)) or None, score)


def _grounded(
  said: Sequence[grounding.Interval] | None,
  sample: records.Sample,
  right: bool,
) -> dict[str, float]:
  """NExT-GQA's figures of one question, and the IoU of both sets."""
  overlap, together = grounding.Overlap(0.0, 0.0), 0.0
  if said is not None:
    together = grounding_answers.interval_set_iou(said, sample.evidence)
  if said:
    # The metric takes one interval: of several their hull [ours].
    hull = min(s for s, _ in said), max(e for _, e in said)
    overlap = grounding.best_overlap(hull, sample.evidence)
  return {
    "Acc@GQA": float(right and overlap.iop >= 0.5),
    "mIoP": overlap.iop,
    "IoP@0.3": float(overlap.iop >= 0.3),
    "IoP@0.5": float(overlap.iop >= 0.5),
    "mIoU": overlap.iou,
    "IoU@0.3": float(overlap.iou >= 0.3),
    "IoU@0.5": float(overlap.iou >= 0.5),
    "set_mIoU": together,
  }


def _read_got10k(text: str, sample: records.Sample) -> Reading:
  answer = _tagged(text, "answer")
  said = tracking.read_track(
    text if answer is None else answer, count=len(sample.boxes)
  )
  score = dict.fromkeys(("overlap", "AO", "SR@0.5", "SR@0.75"), 0.0)
  if said is not None:
    ious = tracking.toolkit_ious(said, sample.boxes)
    score = {
      "overlap": tracking.mean_overlap(said, sample.boxes),
      "AO": float(np.mean(ious)),
      "SR@0.5": float(np.mean(ious > 0.5)),
      "SR@0.75": float(np.mean(ious > 0.75)),
    }
  return Reading(said and f"{len(said)} boxes", score)


def _finite(value: Any) -> bool:
  """Whether a value is a number that float64 holds."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return False
  try:
    return math.isfinite(value)
  except OverflowError:  # an integer beyond it
    return False


def _numbers(value: Any, count: int | None = None) -> bool:
  """Whether a value is a list of finite numbers, `count` of them if given."""
  return (
    isinstance(value, (list, tuple))
    and (count is None or len(value) == count)
    and all(map(_finite, value))
  )


# What QVHighlights' official rows hold, both or one of them.
OFFICIAL = ("pred_relevant_windows", "pred_saliency_scores")


def _official_row(
  row: Mapping[str, Any], sample: records.Sample
) -> tuple[list | None, list | None]:
  """Windows and saliency of one official row, checked."""
  windows, clip_scores = (row.get(name) for name in OFFICIAL)
  if windows is None and clip_scores is None:
    raise ValueError(
      f"prediction {sample.id!r} has neither 'pred_relevant_windows' nor"
      " 'pred_saliency_scores'"
    )
  if windows is not None and not (
    isinstance(windows, list) and all(_numbers(one, 3) for one in windows)
  ):
    raise ValueError(
      f"prediction {sample.id!r}: pred_relevant_windows must be a list of"
      f" [start, end, score], got {windows!r:.80}"
    )
  if clip_scores is not None and not (clip_scores and _numbers(clip_scores)):
    raise ValueError(
      f"prediction {sample.id!r}: pred_saliency_scores must be a list of"
      f" numbers, got {clip_scores!r:.80}"
    )
  return windows, clip_scores


def _read_qvhighlights(
  response: str | Mapping[str, Any], sample: records.Sample
) -> Reading:
  if isinstance(response, str):
    named = grounding.read_windows(response)
    # In the order named, the first best.
    windows = [(*pair, -rank) for rank, pair in enumerate(named)]
    clip_scores = None
  else:
    windows, clip_scores = _official_row(response, sample)
  score, said = {}, None
  if windows is not None:
    for name in highlights.LENGTHS:
      truths = highlights.of_length(sample.evidence, name)
      if not truths:
        continue
      made = highlights.moments(windows, truths)
      mark = "" if name == "full" else f"{name} "
      score[f"{mark}mAP"] = float(np.mean(made.ap))
      for limit, ap in zip(highlights.LIMITS, made.ap, strict=True):
        score[f"{mark}mAP@{limit}"] = float(ap)
      for limit in highlights.LIMITS:
        score[f"{mark}R1@{limit}"] = float(made.iou >= limit)
    said = "; ".join(f"{one[0]:g} to {one[1]:g}" for one in windows[:3])
  if clip_scores is not None and sample.saliency:
    ratings = highlights.saliency(sample.saliency, sample.duration_s)
    for name, at_least in highlights.RATINGS.items():
      clips = highlights.clips(clip_scores, ratings, at_least)
      score[f"HL-{name}-mAP"], score[f"HL-{name}-Hit1"] = clips
    said = said or f"{len(clip_scores)} clips"
  return Reading(said or None, score)


def _read_manifest(text: str, sample: records.Sample) -> Reading | None:
  if sample.kind in answers.JUDGED:
    return None
  if answers.ANSWER[0] not in text:
    text = "".join((answers.ANSWER[0], text, answers.ANSWER[1]))
  parsed = answers.parse_completion(text)
  credit = answers.credit(text, parsed, sample)
  main = answers.CREDIT[sample.kind][0]
  right = float(answers.is_right(credit[main], sample.kind))
  return Reading(parsed.answer or None, {"accuracy": right} | credit)


# ---------------------------------------------------------------- breakdowns


def _own_groups(sample: records.Sample) -> list[tuple[str, str]]:
  """The task, where no group says the same, and the groups."""
  said = [value for _, value in sample.groups]
  task = [("task", sample.task)] if sample.task not in ("", *said) else []
  return [*task, *sample.groups]


def _lvbench_groups(sample: records.Sample) -> list[tuple[str, str]]:
  """The first type of a question, as in the table; then every listed one."""
  groups = dict(sample.groups)
  listed = groups.pop("question_types", "").split(", ")
  return [
    ("type", sample.task),
    *(("listed type", one) for one in listed if one),
    *groups.items(),
  ]


def nextqa_groups(sample: records.Sample) -> list[tuple[str, str]]:
  """C, T and D, and the seven types of the script: TP counts as TN."""
  kind = "TN" if sample.task == "TP" else sample.task
  return [("group", kind[0]), ("type", kind)]


def _no_groups(sample: records.Sample) -> list[tuple[str, str]]:
  del sample
  return []


class Rule(NamedTuple):
  """How a benchmark is scored.

  Attributes:
    read: (response, sample) -> Reading, None where an LLM must judge.
    words: the same in words.
    metrics: of the questions, in the order of the table.
    groups: of a sample, as (name, value), by which the first metric is broken
      down.
    over_tasks: name of a mean over the tasks' means, which then comes first.
    whole: the reader wants the tags of answers too.
  """

  read: Callable[[Any, records.Sample], Reading | None]
  words: str
  metrics: tuple[str, ...] = ("accuracy",)
  groups: Callable[[records.Sample], list[tuple[str, str]]] = _own_groups
  over_tasks: str = ""
  whole: bool = False


_MOMENT = Rule(
  _read_moment,
  "the last 'a to b' or 'a and b', in seconds (arXiv 2504.06958)",
  ("mIoU", *(f"R1@{limit}" for limit in grounding.LIMITS)),
  whole=True,
)
_MANIFEST = Rule(
  _read_manifest,
  "the strict reading of rewards, by the kind of question",
  ("accuracy", "iou", "event_recall"),
  groups=_own_groups,
  whole=True,
)
_HIGHLIGHTS = tuple(
  f"{mark}{metric}"
  for mark in ("", "short ", "middle ", "long ")
  for metric in (
    "mAP",
    *(f"R1@{limit}" for limit in highlights.LIMITS),
    *(f"mAP@{limit}" for limit in highlights.LIMITS),
  )
) + tuple(
  f"HL-{name}-{metric}"
  for name in highlights.RATINGS
  for metric in ("mAP", "Hit1")
)
# Sets of one's own, scored as rewards are.
MANIFESTS = ("jsonl", "synthetic")
RULES: dict[str, Rule] = {
  "videomme": Rule(
    _read_videomme,
    "the first of the capitals A to D, 'The best answer is' and the like taken"
    " out; responses without one are not in the denominator of accuracy",
    ("accuracy", "accuracy_all"),
  ),
  "lvbench": Rule(
    _read_lvbench,
    "the first character: before the first ')', after its '(', of a word",
    groups=_lvbench_groups,
  ),
  "mlvu": Rule(
    _read_mlvu,
    "the character before the first ')', or the whole text",
    over_tasks="M-Avg",
  ),
  "mvbench": Rule(
    _read_mvbench,
    "the first word of the first line is a part of '(a)', or has it in it",
  ),
  "tvbench": Rule(
    _read_mvbench,
    "the first word of the first line is a part of '(a)', or has it in it",
  ),
  "tempcompass": Rule(
    _read_tempcompass,
    "the option's letter, line or text at the start ('yes' or 'no' likewise);"
    " an LLM judges what fails this if there is one, else it is wrong",
  ),
  "vsibench": Rule(
    _read_vsibench,
    "what stands before the first space, as letter or number",
    ("score",),
    over_tasks="overall",
  ),
  "mmvu": Rule(
    _read_mmvu,
    "the letter after the last 'answer is' or 'answer:', else the only letter;"
    " an LLM judges open answers",
  ),
  "video_mmmu": Rule(
    _read_video_mmmu,
    "MMMU's forms 'A.' or 'A:', '(A)', 'A ', the option's text, the last one;"
    " open answers by words and numbers; empty responses are not in the"
    " denominator of accuracy",
    ("accuracy", "accuracy_all"),
  ),
  "longvideobench": Rule(
    _read_longvideobench,
    "the first of the capitals A to E, 'The best answer is' and the like taken"
    " out; none is wrong",
  ),
  "nextqa": Rule(
    _read_nextqa,
    "the option's number from 0 alone; else the forms '(A)', 'A ', 'A.', the"
    " option's text, the last one; none is wrong",
    groups=nextqa_groups,
  ),
  "nextgqa": Rule(
    _read_nextgqa,
    "the first of the capitals A to G between answer tags (or the option's"
    " number from 0), and [(start, end), ...] between glue tags",
    (
      "Acc@GQA",
      "accuracy",
      "mIoP",
      "IoP@0.3",
      "IoP@0.5",
      "mIoU",
      "IoU@0.3",
      "IoU@0.5",
      "set_mIoU",
    ),
    nextqa_groups,
    whole=True,
  ),
  "charades_sta": _MOMENT,
  "activitynet": _MOMENT,
  "timer1": _MOMENT,
  "tvgbench": _MOMENT,
  "got10k": Rule(
    _read_got10k,
    "a list of [x0, y0, x1, y1] between answer tags, else the whole text",
    ("overlap", "AO", "SR@0.5", "SR@0.75"),
    _no_groups,
    whole=True,
  ),
  "qvhighlights": Rule(
    _read_qvhighlights,
    "official rows; or text, whose intervals are windows in the order named",
    _HIGHLIGHTS,
    _no_groups,
  ),
  "dream1k": Rule(
    lambda text, sample: None,
    "an LLM says of every event of the reference whether the caption states it",
    ("recall",),
    over_tasks="recall over categories",
  ),
} | dict.fromkeys(MANIFESTS, _MANIFEST)
