"""The best constant answers, against counts by hand and by brute force."""

import itertools

import numpy as np
import pytest

from cf_jax.data import (
  answers,
  chance,
  grounding_answers,
  records,
  synthetic_specs,
  synthetic_tasks,
)


def _sample(kind, answer="x", task="t", **changes):
  return records.Sample(
    id="a",
    video="",
    question="",
    options=changes.pop("options", ()),
    answer=answer,
    kind=kind,
    task=task,
    **changes,
  )


def test_options_are_guessed():
  samples = [
    _sample("multiple_choice", "A", options=("x", "y")),
    _sample("multiple_choice", "A", options=("x", "y", "z", "w")),
  ]
  assert chance.blind(samples) == {"t": chance.Blind(0.375, 0.375)}


def test_the_commonest_text_wins():
  samples = [_sample("numerical", a) for a in ("1", "2", "2", "3")]
  assert chance.blind(samples) == {"t": chance.Blind(0.5, 0.5)}
  # 1 - relative error of 4 on 4, 2, 8: 1, 0, 0.5; of 2: 0.5, 1, 0.25.
  samples = [_sample("regression", a) for a in ("4", "2", "8")]
  found = chance.blind(samples)["t"]
  assert found.score == pytest.approx(1.75 / 3) and found.correct == 2 / 3


def test_intervals_between_the_edges():
  samples = [
    _sample("interval", start_s=0.0, end_s=2.0),
    _sample("interval", start_s=1.0, end_s=3.0),
  ]
  # 0 to 2, 0 to 3 and 1 to 3: (1 + 1/3) / 2, (2/3 + 2/3) / 2, ...
  found = chance.blind(samples)["t"]
  assert found.score == pytest.approx(2 / 3) and found.correct == 1


def test_one_box_at_all_times():
  left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
  found = chance.blind([_sample("tracking", boxes=(left, right))])["t"]
  assert found.score == pytest.approx(0.5)  # either half, or the whole
  table = chance.score_table([_sample("tracking", boxes=(left, right))])
  tenths = list(itertools.combinations(np.arange(11) / 10, 2))
  brute = [
    grounding_answers.mean_box_iou([(x0, y0, x1, y1)] * 2, (left, right))
    for x0, x1 in tenths
    for y0, y1 in tenths
  ]
  np.testing.assert_allclose(table[:, 0], brute, atol=1e-12)


def test_captions_of_others_and_the_pool():
  samples = [
    _sample("caption", events=("a", "b")),
    _sample("caption", events=("b", "c")),
    _sample("open_ended", "x", task="u"),
    _sample("open_ended", "y", task="u"),
  ]
  found = chance.blind(samples)
  assert found == {"t": chance.Blind(0.75, 0.5), "u": chance.Blind(0.5, 0.5)}
  assert chance.correct(samples) == {"t": 0.5, "u": 0.5, "all": 0.5}


def test_glue_is_reported_beside_the_letter():
  samples = [
    _sample("grounded_qa", "A", options=("x", "y"), evidence=((0, 2), (4, 6)))
  ]
  assert chance.blind(samples) == {
    "t": chance.Blind(0.5, 0.5, pytest.approx(4 / 6))
  }


def test_the_built_in_set():
  """Chance is what the design says: one over the number of equal answers."""
  tasks = tuple(synthetic_tasks.TASKS)
  samples = [
    synthetic_tasks.to_sample(spec, "")
    for spec in synthetic_specs.make_specs(
      "test", 96 * len(tasks), seed=0, tasks=tasks
    )
  ]
  found = chance.blind(samples)
  quarter = ("needle", "order", "grounded_qa", "long", "ramp", "many_cuts")
  for task in quarter:
    assert found[task].correct == pytest.approx(1 / 4)
  for task in ("order_two", "order_ways", "order_skewed"):
    assert found[task].correct == pytest.approx(1 / 2)
  assert found["count"].correct == pytest.approx(1 / 3)
  assert found["numerical"].correct == pytest.approx(1 / 3)
  assert found["free_form"].correct == pytest.approx(1 / 16)
  assert found["events"].correct == pytest.approx(1 / 24)
  # Exact colour and shape 1/16; one of the two words 6/16, worth a third.
  assert found["free_form"].score == pytest.approx(1 / 16 + 6 / 16 / 3)
  assert found["grounding"].score < 0.22 and found["tracking"].score < 0.2
  assert found["tracking"].correct == 0
  assert found["grounded_qa"].glue < 0.25
  # No constant interval on the whole grid of half seconds does better.
  truths = [(s.start_s, s.end_s) for s in samples if s.task == "grounding"]
  best = max(
    np.mean([grounding_answers.interval_iou((a, b), t) for t in truths])
    for a, b in itertools.combinations(np.arange(0, 12.5, 0.5), 2)
  )
  assert found["grounding"].score == pytest.approx(best)
  interval = next(s for s in samples if s.task == "grounding")
  assert answers.accuracy(interval.answer, interval) == 1
