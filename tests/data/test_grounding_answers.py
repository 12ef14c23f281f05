"""Answers that point: what is read, and overlaps worked by hand."""

import itertools
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from cf_jax.data import grounding_answers

# -- intervals


@pytest.mark.parametrize(
  "answer",
  [
    "1.5 to 4",
    "1.5s to 4.0s",
    "[1.5, 4]",
    "1.5 - 4",
    "1.5-4",
    "1.5 and 4.0 seconds",
    " 1.5 sec to  4 s",
  ],
)
def test_interval(answer):
  assert grounding_answers.read_interval(answer) == (1.5, 4.0)


@pytest.mark.parametrize(
  "answer",
  [
    "",
    "4 to 1.5",
    "2 to 2",
    "1 to 2 to 3",
    "1 to 2 or 3 to 4",
    "nan to 1",
    "-1 to 2",
    "1",
    "[1, 2",
    "1, 2]",
    "[[1, 2]]",
    "1 to inf",
    "1e1 to 20",
    "1" * 10_000 + " to 2",
    "1 " * 10_000,
  ],
)
def test_not_an_interval(answer):
  assert grounding_answers.read_interval(answer) is None


def test_interval_iou_by_hand():
  assert grounding_answers.interval_iou((0, 2), (1, 4)) == 0.25
  assert grounding_answers.interval_iou((0, 1), (2, 3)) == 0
  assert grounding_answers.interval_iou((1, 1), (1, 1)) == 0
  assert grounding_answers.interval_iou((3, 1), (0, 4)) == 0


@pytest.mark.parametrize(
  ("text", "interval"),
  [
    ("1 to 4", (1, 4)),
    ("from 1. to 4.50 s", (1, 4.5)),
    ("1 to 2 and 3 TO 4", (3, 4)),
    ("1 to 2 to 3", (1, 2)),  # matches do not overlap
    ("between 10 and 20.", (10, 20)),
    ("4 to 1", None),
    ("2 to 2", None),
    ("1-4", None),
    ("1  to 4", None),
    ("1 to 4.5.6", None),
    ("1.2.3 to 4", None),
    ("12345678 to 4", None),
    ("١ to ٤", None),
    ("", None),
  ],
)
def test_last_interval(text, interval):
  assert grounding_answers.read_last_interval(text) == interval


@pytest.mark.parametrize(
  "text",
  [
    '{"start_time": "1.5", "end_time": "4"}',
    '{"end_time": 4, "start_time": 1.5}',
    ' { "start_time":1.5,"end_time":" 4.0 " } ',
  ],
)
def test_json_interval(text):
  assert grounding_answers.read_json_interval(text) == (1.5, 4)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "null",
    "[1.5, 4]",
    '{"start_time": 4, "end_time": 1.5}',
    '{"start_time": 1, "end_time": 1}',
    '{"start_time": -1, "end_time": 1}',
    '{"start_time": 1.5}',
    '{"start_time": 1.5, "end_time": 4, "note": ""}',
    '{"start_time": 1.5, "end_time": 4, "end_time": 9}',
    '{"start_time": 1.5, "end_time": 4}{"start_time": 6, "end_time": 9}',
    '{"start_time": NaN, "end_time": 4}',
    '{"start_time": 1, "end_time": Infinity}',
    '{"start_time": 1, "end_time": 1e400}',
    '{"start_time": 1, "end_time": 1' + "0" * 3000 + "}",
    '{"start_time": true, "end_time": 4}',
    '{"start_time": "1 s", "end_time": "4 s"}',
    '{"start_time": "nan", "end_time": "4"}',
    '{"start_time": "١", "end_time": "٤"}',
    "{'start_time': 1.5, 'end_time': 4}",
    '{"start_time": [1.5], "end_time": {}}',
    "[" * 3000,
    '{"start_time": ' * 200,
  ],
)
def test_not_a_json_interval(text):
  assert grounding_answers.read_json_interval(text) is None


@pytest.mark.parametrize(
  ("text", "intervals"),
  [
    ("[]", ()),
    ("[(1.5, 4)]", ((1.5, 4),)),
    (" [(4, 6),(1, 2)]\n", ((4, 6), (1, 2))),
    ("[[1, 2], [4, 6]]", ((1, 2), (4, 6))),
    ("", None),
    ("()", None),
    ("(1, 2)", None),
    ("[(1, 2]]", None),
    ("[(2, 1)]", None),
    ("[(1, 1)]", None),
    ("[(-1, 1)]", None),
    ("[(1, 2, 3)]", None),
    ("[(1, 2)] [(3, 4)]", None),
    ("[((1, 2))]", None),
    ("[(nan, 2)]", None),
    ("[(1, 1e999)]", None),
    ("[(1, 2)" * 1000, None),
    ("[" + ", ".join(["(1, 2)"] * 101) + "]", None),
  ],
)
def test_intervals(text, intervals):
  assert grounding_answers.read_intervals(text) == intervals


@pytest.mark.parametrize(
  ("first", "second", "iou"),
  [
    ((), (), 1),
    ([(1, 2)], (), 0),
    ((), [(1, 2)], 0),
    ([(0, 2), (1, 3)], [(0, 3)], 1),  # what overlaps counts once
    ([(0, 1), (2, 3)], [(0, 3)], 2 / 3),
    ([(0, 2), (4, 6)], [(1, 5)], 2 / 6),
    ([(0, 1)], [(1, 2)], 0),
    ([(5, 9), (0, 1)], [(0, 1), (5, 9)], 1),
  ],
)
def test_interval_set_iou_by_hand(first, second, iou):
  made = grounding_answers.interval_set_iou(first, second)
  assert made == pytest.approx(iou)


SETS = strategies.lists(
  strategies.tuples(
    strategies.integers(0, 12), strategies.integers(0, 12)
  ).filter(lambda pair: pair[0] < pair[1]),
  max_size=5,
)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(SETS, SETS)
def test_interval_set_iou_equals_counting_cells(first, second):
  cells = [
    {cell for start, end in intervals for cell in range(start, end)}
    for intervals in (first, second)
  ]
  union = len(cells[0] | cells[1])
  want = len(cells[0] & cells[1]) / union if union else 1
  made = grounding_answers.interval_set_iou(first, second)
  assert made == pytest.approx(want)


# -- boxes

BOX = [0.1, 0.2, 0.5, 0.6]


def test_boxes():
  text = json.dumps([BOX, [0, 0, 1, 1]])
  assert grounding_answers.read_boxes(text, count=2) == (
    (0.1, 0.2, 0.5, 0.6),
    (0, 0, 1, 1),
  )


@pytest.mark.parametrize(
  "second",
  [
    [0.1, 0.2, 0.5],
    [0.1, 0.2, 0.5, 0.6, 0.7],
    [0.1, 0.2, 0.5, 1.5],
    [-0.1, 0.2, 0.5, 0.6],
    [0.5, 0.2, 0.1, 0.6],
    [0.1, 0.6, 0.5, 0.2],
    [0.1, 0.2, 0.1, 0.6],
    [0.1, 0.2, "0.5", 0.6],
    [0.1, 0.2, True, 0.6],
    [0.1, 0.2, float("nan"), 0.6],
    [0.1, 0.2, float("inf"), 0.6],
    None,
    [BOX],
  ],
)
def test_not_boxes(second):
  text = json.dumps([BOX, second])
  assert grounding_answers.read_boxes(text, count=2) is None


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_number_of_boxes_is_exact(count):
  text = json.dumps([BOX] * count)
  assert grounding_answers.read_boxes(text, count=2) is None


def test_box_iou_by_hand():
  iou = grounding_answers.box_iou
  assert iou((0, 0, 1, 1), (0.5, 0, 1, 1)) == 0.5
  assert iou((0, 0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75)) == pytest.approx(1 / 7)
  assert iou((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0
  assert iou((0, 0, 0, 1), (0, 0, 0, 1)) == 0
  assert iou((1, 1, 0, 0), (1, 1, 0, 0)) == 0
  track = [(0, 0, 1, 1)] * 2
  assert grounding_answers.mean_box_iou(track, [(0.5, 0, 1, 1)] * 2) == 0.5


# -- frame numbers


@pytest.mark.parametrize(
  "text", ["[7, 0, 127]", " 0,7,127 ", "[ 127 , 7 , 000 ]"]
)
def test_indices(text):
  made = grounding_answers.read_indices(text, count=3, num_candidates=128)
  assert made == (0, 7, 127)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "[]",
    "[1, 2]",
    "[1, 2, 3, 4]",
    "[1, 2, 2]",
    "[1, 2, 128]",
    "[1, 2, -3]",
    "[1, 2, 3.0]",
    "[1, 2, 3",
    "[[1, 2, 3]]",
    "[1 2 3]",
    "[1, 2, ٣]",
    "[1, 2, 3][4, 5, 6]",
    "[1, 2, 3] or [4, 5, 6]",
    "[1, 2, " + "9" * 3000 + "]",
    "1," * 100_000,
  ],
)
def test_not_indices(text):
  made = grounding_answers.read_indices(text, count=3, num_candidates=128)
  assert made is None


def test_every_choice_of_frames_is_read():
  for chosen in itertools.permutations(range(4), 2):
    made = grounding_answers.read_indices(
      str(list(chosen)), count=2, num_candidates=4
    )
    assert made == tuple(sorted(chosen))


def test_uniform_stride():
  np.testing.assert_array_equal(
    grounding_answers.uniform_stride(count=8, num_candidates=128),
    [0, 16, 32, 48, 64, 80, 96, 112],
  )
  with pytest.raises(ValueError, match="config.amplify.num_frames"):
    grounding_answers.uniform_stride(count=8, num_candidates=7)


# -- any string at all

PIECES = strategies.sampled_from(
  list("[](){},:.-+eE \n\"'")
  + ["1", "0", "4", "9" * 400, "1e400", "NaN"]
  + ["true", "null", '"start_time"', '"end_time"', " to ", "٤", "\ud800", "１"]
)
ANY = strategies.one_of(
  strategies.text(strategies.characters(exclude_categories=()), max_size=40),
  strategies.lists(PIECES, max_size=30).map("".join),
)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(ANY)
def test_readers_never_raise_and_give_proper_values(text):
  for interval in (
    grounding_answers.read_interval(text),
    grounding_answers.read_last_interval(text),
    grounding_answers.read_json_interval(text),
    *(grounding_answers.read_intervals(text) or ()),
  ):
    assert interval is None or 0 <= interval[0] < interval[1] < 1e308
  for box in grounding_answers.read_boxes(text, count=1) or ():
    assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
  made = grounding_answers.read_indices(text, count=2, num_candidates=10)
  assert made is None or 0 <= made[0] < made[1] < 10
