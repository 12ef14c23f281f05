"""Moments: overlaps by hand, and how texts name intervals."""

import hypothesis
import pytest
from hypothesis import strategies

from cf_jax.evals import grounding


@pytest.mark.parametrize(
  ("text", "moment"),
  [
    ("It happens from 3.5 to 8 seconds", (3.5, 8.0)),
    ("1 to 2, no: 3 and 5.", (3.0, 5.0)),
    ("1 to 2 to 3", (1.0, 2.0)),
    ("1.2.3 to 4", (2.3, 4.0)),
    ("9 to 4", (9.0, 4.0)),
    ("[2, 4.5]", (2.0, 4.5)),
    ('{"start_time": "2", "end_time": 4}', (2.0, 4.0)),
    ("from 3 TO 8", None),
    ("at 3 seconds", None),
    ("", None),
  ],
)
def test_read_moment(text, moment):
  assert grounding.read_moment(text) == moment


def test_a_moment_is_read_from_the_whole_text():
  """As in the published script; but an answer in JSON comes first."""
  text = "3 to 8 seconds <answer>perhaps</answer>"
  assert grounding.read_moment(text, "perhaps") == (3, 8)
  said = '{"start_time": 2, "end_time": 4}'
  assert grounding.read_moment(f"3 to 8 {said}", said) == (2, 4)


def test_hull_iou():
  assert grounding.hull_iou((2, 6), (4, 8)) == pytest.approx(2 / 6)
  assert grounding.hull_iou((0, 1), (4, 8)) == 0
  assert grounding.hull_iou((9, 4), (4, 8)) == 0
  assert grounding.hull_iou((0, float("inf")), (4, 8)) == 0


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("[(1, 2), (3.5, 4)]", ((1, 2), (3.5, 4))),
    ("[(1,2),]", ((1, 2),)),
    ("[]", ()),
    ("[[1, 2]]", None),
    ("[(2, 1)]", None),
    ("1 to 2", None),
  ],
)
def test_read_glue(text, found):
  assert grounding.read_glue(text) == found


def test_best_overlap():
  """(4, 8) against (0, 5) and (6, 20): IoU 1/8 and 2/16, IoP 1/4 and 2/4."""
  overlap = grounding.best_overlap((4, 8), [(0, 5), (6, 20)])
  assert overlap.iou == pytest.approx(0.125)
  assert overlap.iop == pytest.approx(0.5)
  assert grounding.best_overlap((3, 3), [(0, 5)]) == (0, 1)
  assert grounding.best_overlap((6, 6), [(0, 5)]) == (0, 0)


def test_read_windows():
  text = "First 3 to 8s, then 10.5 - 12 and 20, 30; [4, 2]"
  assert grounding.read_windows(text) == ((3, 8), (10.5, 12), (20, 30))


READERS = (grounding.read_moment, grounding.read_glue, grounding.read_windows)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
  strategies.text(max_size=60)
  | strategies.text(alphabet="12. ,to-()[]s", max_size=60)
)
def test_any_text_is_read(text):
  for reader in READERS:
    reader(text)


@pytest.mark.parametrize("part", ["1", "1.", "1 to ", "(1, 2), ", "[(", " "])
def test_long_texts_are_read(part):
  text = part * (1_000_000 // len(part))
  for reader in READERS:
    reader(text)
    reader("[" + text)
