"""Scores of public benchmarks, from predictions as text.

Each benchmark has a rule (`rules.py`): how an answer is read from text, what it
earns, and which means of that are its published figures. In front of every rule
stands one thing of ours: where a text has answer tags, what stands between the
last pair is the answer.
"""

import collections
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from cf_jax.data import answers, records
from cf_jax.evals import accuracy, bootstrap, choices
from cf_jax.evals import rules as rules_lib
from cf_jax.evals.rules import Reading, Rule

RULES = rules_lib.RULES
Ask = Callable[[Sequence[tuple[str, records.Sample]]], Sequence[float]]


class Figure(NamedTuple):
  """One number of the table, unrounded.

  Attributes:
    metric: as it is published: "accuracy", "mIoU", "R1@0.5", ...
    group: "all", or "name: value" of a breakdown.
    value: a fraction in [0, 1].
    low: of the 95 % interval, None where there is none.
    high: the same.
    count: questions it is about.
    interval: how the interval was made.
  """

  metric: str
  group: str
  value: float
  low: float | None
  high: float | None
  count: int
  interval: Literal["Wilson", "bootstrap by video", ""]


class Scores(NamedTuple):
  """All that scoring one set of predictions says.

  Attributes:
    benchmark: its name.
    metric: the main one, that of the first figure.
    figures: the table.
    question: id -> metric -> what the question earned.
    answer: id -> what was read, None where nothing was.
    total: questions of the annotations.
    scored: those with a score.
    missing: questions without a prediction (partial scoring alone).
    unknown: predictions without a question (partial scoring alone).
    unread: scored responses in which no answer was found.
    unjudged: questions that only an LLM can judge, and none was given (partial
      scoring alone).
    rule: how answers are read.
  """

  benchmark: str
  metric: str
  figures: list[Figure]
  question: dict[str, dict[str, float]]
  answer: dict[str, str | None]
  total: int
  scored: int
  missing: int
  unknown: int
  unread: int
  unjudged: int
  rule: str


# Figures that are shares of right answers, where a question counts 0 or 1.
_SHARES = ("accuracy", "Acc@", "R1@", "IoU@", "IoP@")
_DIRECTIONS = "object_rel_direction"


# -------------------------------------------------------------------- scoring


def _examples(names: Sequence[str]) -> str:
  shown = ", ".join(repr(name) for name in names[:3])
  return shown + (", ..." if len(names) > 3 else "")


def check_name(benchmark: str) -> None:
  """Raises a ValueError, with the nearest name, where there is no rule."""
  if benchmark in RULES:
    return
  plain = benchmark.lower().replace("-", "_")
  near = difflib.get_close_matches(plain, RULES, n=1)
  advice = f"; did you mean {near[0]!r}?" if near else ""
  raise ValueError(
    f"config.benchmark must be one of {', '.join(sorted(RULES))}, got"
    f" {benchmark!r}{advice}"
  )


def check_ids(
  benchmark: str, samples: Sequence[records.Sample], ids: Sequence[str]
) -> None:
  """Raises a ValueError with counts where predictions and questions differ."""
  wanted = {sample.id for sample in samples}
  given = set(ids)
  missing = sorted(wanted - given)
  unknown = sorted(given - wanted)
  problems = []
  if missing:
    problems.append(
      f"{len(missing)} of {len(wanted)} questions have no prediction"
      f" ({_examples(missing)})"
    )
  if unknown:
    problems.append(
      f"{len(unknown)} of {len(given)} predictions are for no question"
      f" ({_examples(unknown)})"
    )
  if problems:
    raise ValueError(
      f"{benchmark}: {' and '.join(problems)}; give the predictions of this"
      " split by its own ids (docs/scoring.md), or set"
      " config.allow_partial=True to score what is there"
    )


def _check_alike(responses: Mapping[str, Any]) -> None:
  """Raises a ValueError where QVHighlights' rows do not hold the same.

  A figure would then be about some of the questions, and nothing would say so.
  """
  held = collections.defaultdict(list)
  for name, response in responses.items():
    fields = ("pred_relevant_windows",)
    if isinstance(response, Mapping):
      fields = tuple(
        key for key in rules_lib.OFFICIAL if response.get(key) is not None
      )
    held[fields].append(name)
  if len(held) > 1:
    said = [
      f"{len(names)} have {' and '.join(fields) or 'neither'}"
      f" ({_examples(names)})"
      for fields, names in held.items()
    ]
    raise ValueError(
      f"qvhighlights: all predictions must hold the same, of"
      f" {len(responses)} {', '.join(said)}; score windows and saliency apart"
    )


def _needs_judge(benchmark: str, samples: Sequence[records.Sample]) -> str:
  return (
    f"{benchmark}: answers to {len(samples)} questions"
    f" ({_examples([sample.id for sample in samples])}) are judged by an LLM;"
    " set config.judge.url and config.judge.model, or"
    " config.allow_partial=True to leave them out"
  )


def _judgeable(benchmark: str, sample: records.Sample) -> records.Sample:
  """The sample as the judge is asked about it.

  Raises:
    ValueError: a question that no judge here can score.
  """
  if benchmark == "mlvu":
    raise ValueError(
      f"mlvu: {sample.id!r} is a question of its generation tasks, which are"
      " rated from 1 to 5 by an LLM; that is not built. Give the annotation"
      " files of the multiple-choice tasks alone, or set"
      " config.allow_partial=True"
    )
  if sample.options:  # TempCompass: what the rules cannot match
    letters = choices.letters_of(sample.options)
    marks = sample.labels or letters
    apart = ": " if sample.labels else ". "
    lines = [
      f"{mark}{apart}{option}"
      for mark, option in zip(marks, sample.options, strict=True)
    ]
    return sample._replace(
      kind="open_ended",
      question="\n".join([sample.question, *lines]),
      answer=lines[letters.index(sample.answer)],
      rubric="",
    )
  if sample.kind == "caption":
    return sample
  return sample._replace(kind="open_ended")


def _judge(
  benchmark: str,
  pending: Sequence[tuple[str, records.Sample]],
  metric: str,
  ask: Ask,
) -> list[Reading]:
  """What an LLM says of responses that no rule can score."""
  readings, asked = [], []
  for text, sample in pending:
    question = _judgeable(benchmark, sample)
    value = 0.0  # silence is not asked about
    if question.kind == "caption" and not question.events:
      value = 1.0  # nothing to state, as in the script
    elif text.strip():
      asked.append((len(readings), text, question))
    readings.append(_judged(benchmark, text, question, metric, value))
  said = ask([(text, question) for _, text, question in asked]) if asked else ()
  for (place, text, question), value in zip(asked, said, strict=True):
    readings[place] = _judged(benchmark, text, question, metric, float(value))
  return readings


def _judged(
  benchmark: str,
  text: str,
  sample: records.Sample,
  metric: str,
  value: float,
) -> Reading:
  score = {metric: value}
  if benchmark in rules_lib.MANIFESTS:
    right = answers.is_right(value, sample.kind)
    score = {metric: float(right), answers.CREDIT[sample.kind][0]: value}
  return Reading(text.strip() or None, score)


def read_response(
  benchmark: str, response: Any, sample: records.Sample
) -> Reading | None:
  """What one response says by the benchmark's rule.

  Args:
    benchmark: a key of `RULES`.
    response: raw text; for qvhighlights also an official row.
    sample: the question.

  Returns:
    None where only an LLM can judge.

  Raises:
    ValueError: a response of another type.
  """
  rule = RULES[benchmark]
  if isinstance(response, str):
    inner = None if rule.whole else answers.last_answer(response)
    response = response if inner is None else inner
  elif benchmark != "qvhighlights" or not isinstance(response, Mapping):
    raise ValueError(
      f"prediction {sample.id!r}: the response must be text, got"
      f" {response!r:.60}"
    )
  return rule.read(response, sample)


def score(
  benchmark: str,
  samples: Sequence[records.Sample],
  responses: Mapping[str, Any],
  *,
  allow_partial: bool = False,
  ask: Ask | None = None,
  seed: int = 0,
) -> Scores:
  """Scores responses by a benchmark's rule.

  Args:
    benchmark: a key of `RULES`.
    samples: its questions, ids unique.
    responses: id -> raw text; for qvhighlights also id -> official row.
    allow_partial: score the questions that have a response (and need no judge
      where there is none) instead of raising.
    ask: `judge.Judge.score`, for what an LLM judges.
    seed: of the bootstrap.

  Raises:
    ValueError: an unknown benchmark; missing or unknown ids; a response of the
      wrong form; a judge that is needed; nothing to score.
  """
  check_name(benchmark)
  if not allow_partial:
    check_ids(benchmark, samples, list(responses))
  rule = RULES[benchmark]
  ids = {sample.id for sample in samples}
  if len(ids) < len(samples):
    raise ValueError(f"{benchmark}: the annotations have an id twice")
  if benchmark == "qvhighlights":
    _check_alike(responses)
  there = [sample for sample in samples if sample.id in responses]
  made: dict[str, Reading] = {}
  pending = []
  for sample in there:
    reading = read_response(benchmark, responses[sample.id], sample)
    by_rule = reading is not None
    if by_rule:
      made[sample.id] = reading
    if not by_rule or (
      benchmark == "tempcompass" and ask and reading.answer is None
    ):
      pending.append(sample)
  unjudged = 0
  # No judge here rates what MLVU's generation tasks ask for.
  if pending and (ask is None or benchmark == "mlvu"):
    if not allow_partial:
      _judgeable(benchmark, pending[0])
      raise ValueError(_needs_judge(benchmark, pending))
    unjudged = len(pending)
  elif pending:
    judged = _judge(
      benchmark,
      [(_answer_text(responses[one.id]), one) for one in pending],
      rule.metrics[0],
      ask,
    )
    for sample, reading in zip(pending, judged, strict=True):
      made[sample.id] = reading
  scored = [sample for sample in there if sample.id in made]
  if not scored:
    raise ValueError(
      f"{benchmark}: none of {len(responses)} predictions can be scored against"
      f" {len(samples)} questions"
    )
  figures = _figures(benchmark, scored, made, seed)
  return Scores(
    benchmark=benchmark,
    metric=figures[0].metric,
    figures=figures,
    question={sample.id: made[sample.id].score for sample in scored},
    answer={sample.id: made[sample.id].answer for sample in scored},
    total=len(samples),
    scored=len(scored),
    missing=len(samples) - len(there),
    unknown=len(responses) - len(there),
    unread=sum(made[sample.id].answer is None for sample in scored),
    unjudged=unjudged,
    rule=rule.words,
  )


def _answer_text(response: str) -> str:
  inner = answers.last_answer(response)
  return response if inner is None else inner


class _Table:
  """Means of readings with their intervals."""

  def __init__(
    self,
    samples: Sequence[records.Sample],
    made: Mapping[str, Reading],
    seed: int,
  ):
    self.samples = samples
    self.readings = [made[sample.id] for sample in samples]
    names = {name: n for n, name in enumerate({s.video: 0 for s in samples})}
    self._video = np.array([names[sample.video] for sample in samples])
    self._drawn = bootstrap.draw(len(names), seed=seed)

  def having(self, metric: str) -> list[int]:
    """Numbers of the questions that a metric is a mean over."""
    return [
      n
      for n, reading in enumerate(self.readings)
      if metric in reading.score and (reading.counted or metric != "accuracy")
    ]

  def mean(
    self,
    metric: str,
    group: str,
    numbers: Sequence[int],
    *,
    name: str = "",
    strata: Mapping[int, str] | None = None,
    shares: Mapping[str, float] | None = None,
  ) -> Figure:
    """One figure.

    Args:
      metric: of the readings.
      group: of the figure.
      numbers: of the questions.
      name: of the figure, the metric's by default.
      strata: of each question, where means over strata are averaged.
      shares: of the strata in that average, equal by default.
    """
    values = np.array([self.readings[n].score[metric] for n in numbers])
    count = len(numbers)
    name = name or metric
    binary = name.startswith(_SHARES) or name.endswith("Hit1")
    binary |= " R1@" in name
    if binary and strata is None and np.all((values == 0) | (values == 1)):
      share = accuracy.wilson(int(values.sum()), count)
      return Figure(
        name, group, share.accuracy, share.low, share.high, count, "Wilson"
      )
    of = [strata[n] if strata else "" for n in numbers]
    known = sorted(set(of))
    place = np.array([known.index(one) for one in of])
    share = np.array([shares[one] if shares else 1.0 for one in known])
    means = np.array([values[place == n].mean() for n in range(len(known))])
    interval = bootstrap.mean_interval(
      values,
      np.ones(count),
      self._video[list(numbers)],
      place,
      self._drawn,
      shares=share,
    )
    low, high = interval or (None, None)
    return Figure(
      name,
      group,
      float((share * means).sum() / share.sum()),
      low,
      high,
      count,
      "bootstrap by video" if interval else "",
    )


def _figures(
  benchmark: str,
  samples: Sequence[records.Sample],
  made: Mapping[str, Reading],
  seed: int,
) -> list[Figure]:
  """The table of a benchmark, the main figure first."""
  rule = RULES[benchmark]
  table = _Table(samples, made, seed)
  main = rule.metrics[0]
  figures = []
  if rule.over_tasks:
    figures.append(_over_tasks(benchmark, table, rule))
  for metric in rule.metrics:
    numbers = table.having(metric)
    if benchmark == "vsibench" or not numbers:
      continue
    figures.append(table.mean(metric, "all", numbers))
  if not figures:
    raise ValueError(
      f"{benchmark}: nothing in the {len(samples)} predictions is scored by its"
      f" annotations; expected one of {', '.join(rule.metrics)}"
    )
  members = collections.defaultdict(list)
  for n in table.having(main):
    for group in dict.fromkeys(rule.groups(samples[n])):
      members[group].append(n)
  order = list(dict.fromkeys(name for name, _ in members))
  for group in sorted(members, key=lambda g: (order.index(g[0]), g[1])):
    numbers = members[group]
    name = main
    if benchmark == "vsibench":
      kinds = {samples[n].kind for n in numbers}
      if len(kinds) == 1:
        name = "MRA" if kinds == {"regression"} else "accuracy"
    figures.append(
      table.mean(main, f"{group[0]}: {group[1]}", numbers, name=name)
    )
  if benchmark == "nextgqa":
    figures += _nextgqa_accuracy(table)
  return figures


def _over_tasks(benchmark: str, table: _Table, rule: Rule) -> Figure:
  """The mean of the tasks' means; VSI-Bench's three directions are one task."""
  numbers = table.having(rule.metrics[0])
  strata = {n: table.samples[n].task for n in numbers}
  directions = {one for one in strata.values() if one.startswith(_DIRECTIONS)}
  shares = {
    one: 1 / len(directions) if one in directions else 1.0
    for one in strata.values()
  }
  return table.mean(
    rule.metrics[0],
    "all",
    numbers,
    name=rule.over_tasks,
    strata=strata,
    shares=shares if benchmark == "vsibench" else None,
  )


def _nextgqa_accuracy(table: _Table) -> list[Figure]:
  """Accuracy by type, beside Acc@GQA by type."""
  members = collections.defaultdict(list)
  for n in table.having("accuracy"):
    for group in rules_lib.nextqa_groups(table.samples[n]):
      members[group].append(n)
  return [
    table.mean("accuracy", f"{name}: {value}", members[name, value])
    for name, value in sorted(members)
  ]


# ------------------------------------------------------------------ showing it


def table(scores: Scores) -> tuple[list[str], list[list[str]]]:
  """Columns and rows of the printed table, figures in per cent."""
  rows = []
  for figure in scores.figures:
    interval = ""
    if figure.low is not None:
      interval = f"{100 * figure.low:.2f} to {100 * figure.high:.2f}"
    rows.append(
      [
        figure.metric,
        figure.group,
        f"{100 * figure.value:.2f}",
        interval,
        figure.interval,
        str(figure.count),
      ]
    )
  return ["metric", "of", "%", "95 % interval", "interval by", "n"], rows


def notes(scores: Scores) -> list[str]:
  """What must be said beside the table: what is partial, and what unread."""
  said = []
  if scores.missing or scores.unknown or scores.unjudged:
    said.append(
      f"PARTIAL: {scores.scored} of {scores.total} questions are scored;"
      f" {scores.missing} have no prediction, {scores.unjudged} need a judge;"
      f" {scores.unknown} predictions are for no question"
    )
  if scores.unread:
    said.append(
      f"{scores.unread} of {scores.scored} responses hold no answer by the"
      f" rule: {scores.rule}"
    )
  return said


def markdown(scores: Scores) -> str:
  """The table and its notes, for a page."""
  columns, rows = table(scores)
  lines = [columns, ["---"] * len(columns), *rows]
  text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
  return text + "".join(f"\n{note}\n" for note in notes(scores))


def to_json(scores: Scores) -> dict[str, Any]:
  """What scores.json says of them; values are unrounded fractions."""
  return {
    "benchmark": scores.benchmark,
    "metric": scores.metric,
    "value": scores.figures[0].value,
    "figures": [figure._asdict() for figure in scores.figures],
    "questions": scores.total,
    "scored": scores.scored,
    "missing": scores.missing,
    "unknown": scores.unknown,
    "unread": scores.unread,
    "unjudged": scores.unjudged,
    "partial": bool(scores.missing or scores.unknown or scores.unjudged),
    "rule": scores.rule,
  }
