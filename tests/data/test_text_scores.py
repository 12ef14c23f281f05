"""Word error rates by hand; ROUGE as the package rouge-score gives it."""

import pytest

from cf_jax.data import text_scores


@pytest.mark.parametrize(
  ("answer", "truth", "want"),
  [
    ("exit to the left", "exit to the left", 1),
    ("exit to left", "exit to the left", 0.75),  # a word is missing
    ("exit to the right", "exit to the left", 0.75),  # a word is another
    ("exit now to the left", "exit to the left", 0.75),  # a word too many
    ("to exit the left", "exit to the left", 0.5),  # two words change places
    ("Exit  to\nthe left.", "exit to the left", 0.5),  # as printed
    ("a b c d e f g h i", "exit to the left", 0),
    ("", "exit to the left", 0),
    ("出口", "出口", 1),
  ],
)
def test_word_accuracy_by_hand(answer, truth, want):
  assert text_scores.word_accuracy(answer, truth) == want


# F measures of RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True) of
# rouge-score 0.1.2.
@pytest.mark.parametrize(
  ("answer", "truth", "want"),
  [
    ("a red disc", "A red disc", (1, 1, 1)),
    (
      "the dogs were running in the park",
      "A dog runs through the park",
      (0.615385, 0.181818, 0.615385),
    ),
    ("the park a dog runs", "a dog runs the park", (1, 0.75, 0.6)),
    (
      "police killed the gunman",
      "the gunman police killed",
      (1, 0.666667, 0.5),
    ),
    ("a red disc or a blue one", "A red disc", (0.6, 0.5, 0.6)),
    ("", "A red disc", (0, 0, 0)),
    ("red", "red", (1, 0, 1)),
    ("the cat the cat the cat", "the cat sat", (0.444444, 0.285714, 0.444444)),
    (
      "He opens the door, then closes it!",
      "He closes the door and opens it.",
      (0.857143, 0.166667, 0.571429),
    ),
  ],
)
def test_rouge_of_the_reference(answer, truth, want):
  assert text_scores.rouge(answer, truth) == pytest.approx(want, abs=1e-6)
  assert text_scores.mean_rouge(answer, truth) == pytest.approx(
    sum(want) / 3, abs=1e-6
  )


def test_words_are_stemmed_from_four_letters_on():
  assert text_scores.stems("The DOGS' ran-running, is 3.5") == [
    "the",
    "dog",
    "ran",
    "run",
    "is",
    "3",
    "5",
  ]
