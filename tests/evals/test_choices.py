"""Letters read from texts: cases worked by hand from each script's rule."""

import hypothesis
import pytest
from hypothesis import strategies

from cf_jax.evals import choices

OPTIONS = ("a red cat", "a dog", "the sea", "nothing at all")


@pytest.mark.parametrize(
  ("text", "letter"),
  [
    ("C", "C"),
    ("(C) the sea", "C"),
    ("The best answer is C.", "C"),
    ("Answer: C", "C"),
    # The script's own oddities: capitals of other words count.
    ("Best option: C", "B"),
    ("According to the video, C", "A"),
    ("the sea", None),
    ("E", None),
    ("", None),
  ],
)
def test_videomme(text, letter):
  phrases = choices.VIDEOMME_PHRASES
  assert choices.first_capital(text, "ABCD", phrases) == letter


def test_longvideobench_takes_out_what_videomme_leaves():
  phrases = choices.LONGVIDEOBENCH_PHRASES
  assert choices.first_capital("Best option: E", "ABCDE", phrases) == "E"


@pytest.mark.parametrize(
  ("text", "character"),
  [
    ("(D) 1633", "D"),
    ("D", "D"),
    (" D) 1633", "D"),
    ("D. 1633", "D"),
    ("The answer is D", "T"),
    ("It is (D) or (A)", "D"),
    ("()", None),
    ("", None),
  ],
)
def test_lvbench(text, character):
  assert choices.polished(text) == character


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("B", "B"),
    ("(B) the sea", "B"),
    ("B) the sea", "B"),
    (") B", None),
    ("B.", "B."),  # the script compares the whole text: wrong
    ("", None),
  ],
)
def test_mlvu(text, said):
  assert choices.before_bracket(text) == said


@pytest.mark.parametrize(
  ("text", "letters"),
  [
    ("(B) a dog", ("B",)),
    ("b", ("B",)),
    ("B. a dog", ("B",)),
    ("(B)(A) both", ("A", "B")),  # the word has both marks in it
    ("B\nbecause of it", ("B",)),
    ("The second", ()),
    ("(", ()),  # a part of every mark, and of none in particular
    ("", ()),
    (".", ()),
  ],
)
def test_mvbench(text, letters):
  assert choices.first_word(text, OPTIONS) == letters


@pytest.mark.parametrize(
  ("text", "letter"),
  [
    ("(B)", "B"),
    ("B", "B"),
    ("B.", "B"),
    ("(A) is wrong, (C) is right", "C"),
    ("A or B ", "B"),
    ("it must be that it is the sea", "C"),
    ("a dog and then, at the end, a red cat", "A"),
    ("the sea", None),  # five words and fewer are not searched for texts
    ("", None),
  ],
)
def test_nextqa(text, letter):
  found = choices.listed_forms(text, OPTIONS, choices.NEXTQA_FORMS)
  assert found == letter


@pytest.mark.parametrize(
  ("text", "letter"),
  [
    ("B. a dog", "B"),
    ("(A) no. The answer: B.", "A"),  # no "B." is left at the end, "(A)" is
    ("A: no, B. yes", "B"),
    ("(C)", "C"),
    ("E", None),
  ],
)
def test_video_mmmu(text, letter):
  found = choices.listed_forms(text, OPTIONS, choices.VIDEO_MMMU_FORMS)
  assert found == letter


@pytest.mark.parametrize(
  ("text", "letter"),
  [
    ("B", "B"),
    ("B. a dog", "B"),
    ("B) whatever", "B"),
    ("B</s>", "B"),
    ("(B) a dog", None),
    ("a dog", None),
    ("B: a dog", None),
  ],
)
def test_tempcompass(text, letter):
  assert choices.leading_mark(text, OPTIONS) == letter


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("Yes, it is", "yes"),
    ("no", "no"),
    ("Nothing", "no"),
    ("Is it?", None),
    ("", None),
  ],
)
def test_tempcompass_yes_or_no(text, said):
  assert choices.yes_or_no(text) == said


@pytest.mark.parametrize(
  ("text", "letter"),
  [
    ("Option 2: the sea rises", "B"),
    ("Option 1.", "A"),
    ("2", "B"),
    ("the sea falls", "A"),
    ("2) the sea rises", "B"),
    ("the second", None),
  ],
)
def test_tempcompass_captions(text, letter):
  found = choices.caption_mark(
    text, ("the sea falls", "the sea rises"), ("Option 1", "Option 2")
  )
  assert found == letter


@pytest.mark.parametrize(
  ("text", "letter"),
  [
    ("Therefore, the final answer is: $B", "B"),
    ("The answer is A. No: the answer is C.", "C"),
    ("**B**", "B"),
    ("B", "B"),
    ("A cat and B", None),
    ("A or B", None),
    ("Because", None),
    ("", None),
  ],
)
def test_mmvu(text, letter):
  assert choices.final_letter(text) == letter


def test_vsibench_word():
  assert choices.fuzzy_word("3.5 meters") == "3.5"
  assert choices.fuzzy_word("B. left") == "B"
  assert choices.fuzzy_word(" B") == ""


READERS = (
  lambda text: choices.first_capital(text, "AB", choices.VIDEOMME_PHRASES),
  choices.polished,
  choices.before_bracket,
  lambda text: choices.first_word(text, OPTIONS),
  lambda text: choices.listed_forms(text, OPTIONS, choices.NEXTQA_FORMS),
  lambda text: choices.listed_forms(text, OPTIONS, choices.VIDEO_MMMU_FORMS),
  lambda text: choices.leading_mark(text, OPTIONS),
  choices.yes_or_no,
  lambda text: choices.caption_mark(text, ("a", "b"), ("Option 1", "Option 2")),
  choices.final_letter,
  choices.fuzzy_word,
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
  strategies.text(max_size=60)
  | strategies.text(alphabet="ABa()., :\n1", max_size=60)
)
def test_any_text_is_read(text):
  for reader in READERS:
    reader(text)


@pytest.mark.parametrize("part", ["(", "A ", "1", "answer is ", "</s>", "A)."])
def test_long_texts_are_read(part):
  """A quadratic reader would not come back from a million characters."""
  text = part * (1_000_000 // len(part))
  for reader in READERS:
    reader(text)
