"""What an answer earns that is always the same: the chance of every kind.

A policy that sees nothing can still learn which answer pays best on average.
The score of the best constant answer is what seeing has to beat; one over the
number of options is its special case where letters are balanced.

Axes: `n` samples, `c` constant answers.
"""

import collections
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cf_jax.data import answers, grounding_answers, records

_MAX_TEXTS = 32  # the commonest texts that are tried
_MAX_EDGES = 25  # times at which tried intervals start and end
_TENTHS = np.arange(11) / 10  # corners of tried boxes


class Blind(NamedTuple):
  """What the best constant answer reaches.

  Attributes:
    score: the mean of the kind's main component (accuracy, iou, ...).
    correct: the share of right answers, as `answers.is_right` has it.
    glue: of grounded_qa: the mean iou of the intervals, else None.
  """

  score: float
  correct: float
  glue: float | None = None


def blind(samples: Sequence[records.Sample]) -> dict[str, Blind]:
  """Best constant answer, per task.

  Each number is the best of the answers tried on these very samples: a guessed
  letter (one over the number of options); the commonest true answers; intervals
  between the starts and ends that occur; one box, of tenths, at all times;
  captions of other samples. A caption that names every possible event reaches
  more: event recall alone does not punish it.

  Args:
    samples: of any kinds.

  Returns:
    Task -> Blind.
  """
  kinds = collections.defaultdict(list)
  for sample in samples:
    kinds[sample.task, sample.kind].append(sample)
  parts = collections.defaultdict(list)
  for (task, kind), some in sorted(kinds.items()):
    parts[task].append((len(some), _blind(kind, some)))
  return {task: _mean(rows) for task, rows in parts.items()}


def correct(samples: Sequence[records.Sample]) -> dict[str, float]:
  """Share of right answers of the best constant, per task and over `all`."""
  count = collections.Counter(sample.task for sample in samples)
  share = {task: found.correct for task, found in blind(samples).items()}
  total = sum(count[task] * share[task] for task in share)
  return share | {"all": total / len(samples)}


def score_table(samples: Sequence[records.Sample]) -> np.ndarray:
  """float[c, n]: what each constant answer earns on each sample.

  Args:
    samples: of one kind without options; grounded_qa: the glue alone.
  """
  kind = samples[0].kind
  if kind == "tracking":
    return _box_table(samples)
  if kind in ("interval", "grounded_qa"):
    truths = [
      ((s.start_s, s.end_s),) if kind == "interval" else s.evidence
      for s in samples
    ]
    edges = np.unique([edge for truth in truths for edge in np.ravel(truth)])
    if len(edges) > _MAX_EDGES:
      edges = np.quantile(edges, np.linspace(0, 1, _MAX_EDGES))
    iou = grounding_answers.interval_set_iou
    return np.array(
      [
        [iou((pair,), truth) for truth in truths]
        for pair in itertools.combinations(edges.tolist(), 2)
      ]
    )
  if kind == "caption":
    said = _commonest([sample.events for sample in samples])
    return np.array(
      [
        [np.mean([e in caption for e in s.events]) for s in samples]
        for caption in said
      ]
    )
  said = _commonest([sample.answer for sample in samples])
  if kind == "open_ended":  # an LLM's judgement, at its strictest
    return np.array([[float(a == s.answer) for s in samples] for a in said])
  return np.array([[answers.accuracy(a, s) for s in samples] for a in said])


def _commonest(values: Sequence) -> list:
  count = collections.Counter(values)
  return [value for value, _ in count.most_common(_MAX_TEXTS)]


def _box_table(samples) -> np.ndarray:
  low, high = np.array(list(itertools.combinations(_TENTHS, 2))).T
  across, down = np.indices((len(low), len(low))).reshape(2, -1)
  box = np.stack([low[across], low[down], high[across], high[down]], axis=1)
  table = []
  for sample in samples:
    truth = np.array(sample.boxes)
    first = np.maximum(box[:, None, :2], truth[:, :2])
    last = np.minimum(box[:, None, 2:], truth[:, 2:])
    shared = np.prod(np.maximum(last - first, 0), axis=2)
    area = [np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (box, truth)]
    iou = shared / (area[0][:, None] + area[1] - shared)
    table.append(iou.mean(axis=1))
  return np.stack(table, axis=1)


def _blind(kind: str, samples) -> Blind:
  if kind in ("multiple_choice", "grounded_qa"):
    guess = float(np.mean([1 / len(sample.options) for sample in samples]))
    glue = None
    if kind == "grounded_qa":
      glue = float(score_table(samples).mean(axis=1).max())
    return Blind(guess, guess, glue)
  table = score_table(samples)
  right = answers.is_right(table, kind)
  return Blind(float(table.mean(axis=1).max()), float(right.mean(axis=1).max()))


def _mean(rows) -> Blind:
  """Of a task's kinds, by their numbers of samples."""
  weight = [count for count, _ in rows]
  glue = [(count, b.glue) for count, b in rows if b.glue is not None]
  return Blind(
    float(np.average([b.score for _, b in rows], weights=weight)),
    float(np.average([b.correct for _, b in rows], weights=weight)),
    float(np.average([g for _, g in glue], weights=[c for c, _ in glue]))
    if glue
    else None,
  )
