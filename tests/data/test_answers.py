"""The string door: what it reads, and what it refuses to be fooled by."""

import time
import types

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from cf_jax.data import answers, prompts

OPTIONS = ("red", "blue", "green")


def sample(**fields):
  made = dict(
    id="s",
    kind="multiple_choice",
    options=OPTIONS,
    answer="B",
    start_s=None,
    end_s=None,
    evidence=(),
  )
  return types.SimpleNamespace(**(made | fields))


def complete(answer, reasoning="red blue"):
  return f"<think>{reasoning}</think><answer>{answer}</answer>"


# -- parts of a completion


@pytest.mark.parametrize(
  "text",
  [
    "<think>a</think><answer>B</answer>",
    "<think>a\nb</think>\n \t<answer>\nB </answer>",
    "<think></think><answer>B</answer>",
  ],
)
def test_well_formed(text):
  made = answers.parse_completion(text)
  assert made.well_formed
  assert made.answer == "B"


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("<answer>B</answer>", "B"),  # readable, but not the whole form
    ("x <think>a</think><answer>B</answer>", "B"),
    ("<think>a</think> so <answer>B</answer>", "B"),
    ("<think>a</think><answer>B</answer> ", "B"),
    ("<think>a</think><answer>B</answer>\n", "B"),
    ("<think>a<think>b</think><answer>B</answer>", "B"),
    ("<think>a</think></think><answer>B</answer>", "B"),
    ("", None),
    ("B", None),
    ("<think>a</think><answer>B", None),  # no closing tag
    ("<think>a</think>B</answer>", None),
    ("<think>a</think></answer>B<answer>", None),
    ("<think>a</think><answer>A</answer><answer>B</answer>", None),
    ("<think>a</think><answer><answer>B</answer></answer>", None),
    ("<think>a</think><answer>A<answer>B</answer>", None),
    ("<think><answer>B</answer></think>", None),
    ("<answer>B</answer><think>a</think>", None),
    ("<answer><think>a</think>B</answer>", None),
    ("<think>a</think><ANSWER>B</ANSWER>", None),
    ("<think>a</think><answer >B</answer>", None),
    ("<think>a</think>＜answer＞B＜/answer＞", None),  # full width
    ("<think>a</think><аnswer>B</аnswer>", None),  # Cyrillic a
  ],
)
def test_ill_formed(text, answer):
  made = answers.parse_completion(text)
  assert not made.well_formed
  assert made.answer == answer


def test_reasoning_needs_exactly_one_pair():
  parse = answers.parse_completion
  assert parse(complete("B", "why")).reasoning == "why"
  assert parse("<think>a<think>b</think>").reasoning == ""
  assert parse("</think>a<think>").reasoning == ""


# -- multiple choice


@pytest.mark.parametrize(
  "answer",
  [
    "B",
    " B\n",
    "B.",
    "B:",
    "B)",
    "(B)",
    "(B).",
    "B. blue",
    "(B) Blue.",
    "B blue",
    "B.\n blue",
    "blue",
    " blue\n",
  ],
)
def test_one_option(answer):
  assert answers.read_choice(answer, OPTIONS) == 1


@pytest.mark.parametrize(
  "answer",
  [
    "",
    " ",
    "A or B",
    "A, B",
    "AB",
    "A B",
    "A/B",
    "A and B",
    "B or not",
    "B. red",
    "B. blue or red",
    "B.blue",
    "b",
    "Blue",
    "blue.",
    "bl",
    "blue red",
    "D",
    "Z",
    "(B",
    "((B))",
    "[B]",
    "not B",
    "B B",
    "B. B",
    "B..",
    "answer: B",
    "*B*",
    "1",
    "2",
    "В",  # Cyrillic Ve
    "Β",  # Greek Beta
    "Ｂ",  # full width
    "B\u200b",
    "\u202eB",
    "B\u0301",
    "B\x00",
    "option B",
    "B" * 10_000,
    "B." * 5_000,
    " " * 10_000,
    "(" * 10_000,
    "nan",
    "A\nB",
    "B; C",
  ],
)
def test_not_one_option(answer):
  assert answers.read_choice(answer, OPTIONS) is None


def test_letter_beyond_the_options():
  assert answers.read_choice("C", OPTIONS) == 2
  assert answers.read_choice("C", OPTIONS[:2]) is None
  assert answers.read_choice("A", ()) is None


def test_option_text_may_be_a_letter():
  # "A. B" names the first option in full; "B" alone is the second.
  assert answers.read_choice("A. B", ("B", "A")) == 0
  assert answers.read_choice("B", ("B", "A")) == 1
  assert answers.read_choice("B", ("A or B", "A")) == 1


def test_text_shared_by_two_options_names_none():
  assert answers.read_choice("red", ("red", "blue", "red")) is None
  assert answers.read_choice("blue", ("red", "blue", "red")) == 1


@pytest.mark.parametrize("wrong", ["A", "A or B", "C", "B or C", "all", ""])
def test_accuracy_of_wrong_and_double_answers(wrong):
  assert answers.accuracy(wrong, sample()) == 0
  assert not answers.is_correct(complete(wrong), sample())


def test_accuracy_of_the_right_answer():
  assert answers.accuracy("B", sample()) == 1
  assert answers.is_correct(complete("(B) blue"), sample())
  assert answers.accuracy(None, sample()) == 0


def test_the_samples_fault_is_an_error():
  with pytest.raises(ValueError, match="no letter of its 3 options"):
    answers.accuracy("B", sample(answer="E"))
  with pytest.raises(ValueError, match="is no number"):
    answers.accuracy("1", sample(kind="numerical", answer="one"))
  with pytest.raises(ValueError, match="kind must be"):
    answers.accuracy("1", sample(kind="poem"))
  with pytest.raises(ValueError, match="without start_s"):
    answers.accuracy(None, sample(kind="interval"))


# -- numbers and intervals


@pytest.mark.parametrize(
  ("answer", "number"),
  [
    ("3", 3.0),
    (" -2.50 ", -2.5),
    ("+1", 1.0),
    ("1,234.5", 1234.5),
    ("007", 7.0),
  ],
)
def test_number(answer, number):
  assert answers.read_number(answer) == number


@pytest.mark.parametrize(
  "answer",
  [
    "",
    "nan",
    "NaN",
    "inf",
    "-inf",
    "Infinity",
    "1e400",
    "1e3",
    "0x10",
    "1_0",
    "٣",
    "３",
    "²",
    "1.2.3",
    "1 2",
    "1 or 2",
    "1,23",
    ".",
    "-",
    "9" * 10_000,
    "0" * 10_000 + ".",
    "1." + "0" * 10_000,
    ",",
    "--1",
    "5%",
    "three",
  ],
)
def test_not_a_number(answer):
  assert answers.read_number(answer) is None


def test_accuracy_of_numbers():
  def score(answer, truth):
    return answers.accuracy(answer, sample(kind="numerical", answer=truth))

  assert score("3", "3") == 1
  assert score("3.141", "3.142") == 1  # equal at two decimals
  assert score("3.14", "3.15") == 0
  assert score("3.0", "3") == 0  # only one side has a decimal point
  assert score("nan", "3") == 0
  assert score("3 or 4", "3") == 0


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
  assert answers.read_interval(answer) == (1.5, 4.0)


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
  assert answers.read_interval(answer) is None


def test_interval_iou_by_hand():
  assert answers.interval_iou((0, 2), (1, 4)) == 0.25
  assert answers.interval_iou((0, 1), (2, 3)) == 0
  assert answers.interval_iou((1, 1), (1, 1)) == 0
  assert answers.interval_iou((3, 1), (0, 4)) == 0
  span = sample(kind="interval", start_s=1.0, end_s=4.0)
  assert answers.accuracy("0 to 2", span) == 0.25
  assert not answers.is_correct(complete("0 to 2"), span)
  assert answers.is_correct(complete("1 to 4"), span)


def test_free_form():
  text = sample(kind="free_form", answer="A red disc")
  assert answers.accuracy("a  red disc.", text) == 1
  assert answers.accuracy("a red disc or a blue one", text) == 0


# -- citations


def test_cited_times():
  assert answers.cited_times(
    "At 1.5s red, at 2 s blue; 3 seconds later, 4sec. Not 5, 6m, 7sx, 1.2.3s,"
    " x12345678s, ٣s"
  ) == (1.5, 2.0, 3.0, 4.0)


def test_a_time_cites_at_most_the_nearest_keyframe():
  times = np.array([1.5, 1.55, 4.0, np.nan])

  def cited(text):
    made = answers.cited_keyframes(text, times, tolerance_s=0.051)
    return made.tolist()

  assert cited("1.5s") == [True, False, False, False]
  assert cited("1.6s and 4.0s, again 4.0s") == [False, True, True, False]
  assert cited("2.0s, 400s") == [False] * 4
  empty = answers.cited_keyframes("1s", np.full(2, np.nan), tolerance_s=1.0)
  assert empty.tolist() == [False, False]


def test_evidence_keyframes():
  made = answers.evidence_keyframes(
    [sample(evidence=((1.0, 2.0), (5.0, 5.5))), sample()],
    np.array([[0.9, 1.0, 2.1, 5.2], [1.0, 2.0, np.nan, np.nan]]),
  )
  assert made.tolist() == [[False, True, False, True], [False] * 4]


# -- a batch


@pytest.fixture(scope="module")
def tokenizer():
  return prompts.load_tokenizer("tiny")


def batch_of(tokenizer, texts, width=40):
  """Completions of one video as (token, mask), the end token included."""
  token = np.full((1, len(texts), width), tokenizer.eos_id, np.int32)
  mask = np.zeros(token.shape, bool)
  for g, text in enumerate(texts):
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    token[0, g, : len(ids)] = ids
    mask[0, g, : len(ids)] = True
  return token, mask


def test_judge(tokenizer):
  texts = [
    complete("B", "1.0s red 2.5s blue"),
    complete(" (B) blue\n"),
    complete("A"),
    complete("A or B"),
    "<answer>B</answer>",
    "red blue",
    "",
  ]
  token, mask = batch_of(tokenizer, texts)
  made = answers.judge(
    tokenizer,
    [sample()],
    token,
    mask,
    frame_time_s=np.array([[1.0, 2.5, np.nan]]),
  )
  np.testing.assert_array_equal(
    made.component["accuracy"], [[1, 1, 0, 0, 1, 0, 0]]
  )
  np.testing.assert_array_equal(
    made.component["format"], [[1, 1, 1, 1, 0, 0, 0]]
  )
  np.testing.assert_array_equal(made.length, mask.sum(-1))
  assert made.length.dtype == np.int32
  np.testing.assert_array_equal(made.cited[0, 0], [True, True, False])
  assert not made.cited[0, 1:].any()
  shown = [
    tokenizer.decode(ids[span])
    for ids, span in zip(token[0], made.answer_span[0], strict=True)
  ]
  assert shown == ["B", "(B) blue", "A", "A or B", "B", "", ""]
  assert not (made.answer_span & ~mask).any()


def test_answer_span_across_tokens_and_broken_characters():
  span = answers.answer_tokens
  # Tokens that straddle the tags count where a byte of the answer is in them.
  pieces = [b"<ans", b"wer> B", b".", b" </", b"answer>"]
  assert span(pieces).tolist() == [False, True, True, False, False]
  # One character over two tokens, half a character before the tag.
  pieces = [b"\xe4", b"<answer>", b"\xe4\xbd", b"\xa0", b"</answer>"]
  assert span(pieces).tolist() == [False, False, True, True, False]
  assert not span([b"<answer>", b"  ", b"</answer>"]).any()


def test_special_tokens_in_a_completion_are_text(tokenizer):
  token, mask = batch_of(tokenizer, [complete("B")])
  token[0, 0, 2] = tokenizer.special["<|image_pad|>"]
  made = answers.judge(
    tokenizer, [sample()], token, mask, frame_time_s=np.zeros((1, 1))
  )
  assert made.component["format"][0, 0] == 1
  token[0, 0, 5] = tokenizer.special["<|image_pad|>"]  # over the answer tag
  made = answers.judge(
    tokenizer, [sample()], token, mask, frame_time_s=np.zeros((1, 1))
  )
  assert made.component["accuracy"][0, 0] == 0


# -- any string at all

TAGS = strategies.sampled_from(
  [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "A",
    "B",
    " or ",
    ".",
    "(",
    ")",
    "1.5s",
    "nan",
    "\n",
    "<",
    "А",
    "\ud800",
    "\x00",
  ]
)
ANY = strategies.one_of(
  strategies.text(strategies.characters(exclude_categories=()), max_size=60),
  strategies.lists(TAGS, max_size=14).map("".join),
)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(ANY)
def test_never_raises_and_never_rewards_two_answers(text):
  truths = [sample(answer=letter) for letter in "ABC"]
  scores = [answers.is_correct(text, truth) for truth in truths]
  assert sum(scores) <= 1
  parsed = answers.parse_completion(text)
  assert not (parsed.well_formed and parsed.answer is None)
  answers.read_number(text)
  answers.read_interval(text)
  answers.cited_keyframes(text, np.arange(3.0), tolerance_s=0.1)
  for kind, answer in (("numerical", "3"), ("free_form", "red")):
    answers.accuracy(text, sample(kind=kind, answer=answer))


@pytest.mark.parametrize(
  "unit",
  [
    "<think>",
    "<answer>",
    "</answer>",
    "<answer>B",
    "<",
    "A or ",
    " ",
    "1",
    "1.",
    "1,",
    "1 to ",
    "(",
    "B.",
    "1s",
    "\u0301",
  ],
)
def test_linear_on_long_text(unit):
  text = unit * (200_000 // len(unit))
  start = time.perf_counter()
  for reading in (text, complete(text), complete("B", text)):
    answers.is_correct(reading, sample())
    parsed = answers.parse_completion(reading)
    for part in (parsed.answer or "", parsed.reasoning, reading):
      answers.read_number(part)
      answers.read_interval(part)
      answers.read_choice(part, OPTIONS)
      answers.cited_times(part)
  assert time.perf_counter() - start < 2  # a quadratic one takes minutes
