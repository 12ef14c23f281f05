"""Numbers: MRA against the paper's example, open answers by hand."""

import hypothesis
import pytest
from hypothesis import strategies

from cf_jax.evals import open_answers, regression


@pytest.mark.parametrize(
  ("value", "truth", "mra"),
  [
    (10, 10, 1.0),
    (8.8, 10, 0.8),  # an error of 0.12: below 1 - limit for .50 to .85
    (12.2, 10, 0.6),
    (4, 10, 0.0),
    (5, 10, 0.1),  # 0.5 <= 1 - 0.5: the script counts the limit itself
    (float("inf"), 10, 0.0),
    (float("nan"), 10, 0.0),
    (None, 10, 0.0),
  ],
)
def test_mean_relative_accuracy(value, truth, mra):
  found = regression.mean_relative_accuracy(value, truth)
  assert found == pytest.approx(mra)


def test_a_truth_of_zero():
  with pytest.raises(ValueError, match="truth that is not 0"):
    regression.mean_relative_accuracy(1.0, 0.0)


@pytest.mark.parametrize(
  ("text", "truth", "right"),
  [
    ("3.43", "3.429", True),  # two decimals
    ("The result is 3.429", "3.43", True),
    ("so x = 1,234", "1234", True),
    ("it is 12", "1", False),
    ("The answer is the mitral valve", "Mitral valve", True),
    ("banana", "a", False),  # one letter must have a space at its side
    ("a b", "a", True),
    ("-3e2 in total", "-300", True),
    ("", "1", False),
  ],
)
def test_open_answers(text, truth, right):
  assert open_answers.is_right(text, truth) == right


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
  strategies.text(max_size=60)
  | strategies.text(alphabet="12.,e+-is =\n", max_size=60)
)
def test_any_text_is_read(text):
  open_answers.is_right(text, "12")
  open_answers.to_float(text)


@pytest.mark.parametrize("part", ["1", "1,111", "-1.", "is ", "1e", "=", "\n"])
def test_long_texts_are_read(part):
  open_answers.is_right(part * (300_000 // len(part)), "12")
