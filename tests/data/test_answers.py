"""The string door: what it reads, and what it refuses to be fooled by."""

import time
import types

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from cf_jax.data import answers, grounding_answers, prompts

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
    boxes=(),
    events=(),
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
  with pytest.raises(ValueError, match="without boxes"):
    answers.accuracy(None, sample(kind="tracking"))
  with pytest.raises(ValueError, match="without events"):
    answers.accuracy(None, sample(kind="caption"))
  with pytest.raises(ValueError, match="without answer"):
    answers.accuracy(None, sample(kind="ocr", answer=" "))
  with pytest.raises(ValueError, match="config.judge.url"):
    answers.accuracy("a", sample(kind="caption", events=("b",)))


# -- numbers


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


def test_accuracy_of_regressions():
  def score(answer, truth):
    return answers.accuracy(answer, sample(kind="regression", answer=truth))

  assert score("3", "3.0") == 1
  assert score("0", "0") == 1
  assert score("3", "4") == pytest.approx(0.75)
  assert score("5", "4") == pytest.approx(0.75)
  assert score("-4", "4") == score("9", "4") == score("1", "0") == 0
  assert score("nan", "4") == score("3 or 4", "4") == score("1e1", "10") == 0


# -- texts


def test_free_form():
  text = sample(kind="free_form", answer="A red disc")
  assert answers.accuracy("a  red disc.", text) == 1
  # Shared words 3 of 3 + 7, pairs 2 of 2 + 6, run 3 of 3 + 7, each doubled.
  assert answers.accuracy("a red disc or a blue one", text) == pytest.approx(
    (0.6 + 0.5 + 0.6) / 3
  )
  assert not answers.is_correct(complete("a red disc or a blue one"), text)
  assert answers.is_correct(complete("A red disc."), text)
  # A word has no pairs of words, another script has no words: 1 all the same.
  assert answers.accuracy("red", sample(kind="free_form", answer="Red")) == 1
  assert answers.accuracy("红", sample(kind="free_form", answer="红")) == 1


def test_ocr():
  text = sample(kind="ocr", answer="exit to the left")
  assert answers.accuracy("exit to the left", text) == 1
  assert answers.accuracy("exit the left", text) == 0.75
  assert answers.accuracy("left " * 9, text) == 0
  assert not answers.is_correct(complete("exit the left"), text)


# -- what points


def test_intervals_by_form():
  span = sample(kind="interval", start_s=1.0, end_s=4.0)
  assert answers.accuracy("0 to 2", span) == 0.25
  assert not answers.is_correct(complete("0 to 2"), span)
  assert answers.is_correct(complete("1 to 4"), span)
  lenient = complete("1.0 and 4.0, so")
  assert not answers.is_correct(lenient, span)
  assert answers.is_correct(lenient, span, interval_form="last")

  def iou(text, form):
    parsed = answers.parse_completion(text)
    return answers.credit(text, parsed, span, interval_form=form)["iou"]

  loose = "It runs from 1 to 2, or rather 2 to 4."
  assert iou(complete(loose), "last") == pytest.approx(2 / 3)
  assert iou(complete(loose), "strict") == iou(complete(loose), "json") == 0
  twice = "<answer>1 to 4</answer><answer>8 to 9</answer>"
  assert iou(twice, "last") == 0  # the last one alone
  assert iou("<answer>8 to 9</answer>" + complete("1 to 4"), "last") == 1
  assert iou(twice, "strict") == 0
  json_text = '{"start_time": "1", "end_time": "4"}'
  assert iou(complete(json_text), "json") == 1
  assert iou(complete(json_text), "strict") == 0
  with pytest.raises(ValueError, match="config.answers.interval_form"):
    iou("", "loose")


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("", None),
    ("<answer>1", None),
    ("</answer>1<answer>", None),
    ("<answer>1</answer>", "1"),
    ("<answer>1</answer><answer>2", "1"),
    ("<answer>1<answer>2</answer>", "1<answer>2"),
    ("<answer>1</answer> <answer> 2 </answer>x", "2"),
  ],
)
def test_last_answer(text, answer):
  assert answers.last_answer(text) == answer


def test_tracking():
  box = (0.0, 0.0, 0.5, 1.0)
  track = sample(kind="tracking", boxes=(box,) * 8)
  right = str([list(box)] * 8)
  half = str([[0.0, 0.0, 0.25, 1.0]] * 4 + [list(box)] * 4)
  assert answers.accuracy(right, track) == 1
  assert answers.accuracy(half, track) == 0.75
  assert answers.accuracy(str([list(box)] * 7), track) == 0
  assert answers.accuracy(right + right, track) == 0


GQA = dict(kind="grounded_qa", answer="B", evidence=((1.0, 2.0), (4.0, 6.0)))


@pytest.mark.parametrize(
  ("text", "accuracy", "iou", "form"),
  [
    ("<answer>B</answer><glue>[(1, 2), (4, 6)]</glue>", 1, 1, 1),
    ("<answer>A</answer>\n<glue>[(4, 6)]</glue>", 0, 2 / 3, 1),
    ("<answer>B</answer><glue>[]</glue>", 1, 0, 1),
    ("<answer>B</answer><glue>4 to 6</glue>", 1, 0, 0),
    ("<answer>B</answer>", 1, 0, 0),
    ("<answer>B<glue>[(1, 2)]</glue></answer>", 0, 0, 0),
    ("<glue>[(1, 2), (4, 6)]</glue><answer>B</answer>", 1, 0, 0),
    ("<answer>B</answer><glue>[(1, 2)]</glue><glue>[]</glue>", 1, 0, 0),
    ("<answer>A or B</answer><glue>[(1, 2), (4, 6)]</glue>", 0, 1, 1),
  ],
)
def test_grounded_qa(tokenizer, text, accuracy, iou, form):
  token, mask = batch_of(tokenizer, ["<think>a</think>" + text], width=140)
  made = answers.judge(
    tokenizer,
    [sample(**GQA)],
    token,
    mask,
    frame_time_s=np.zeros((1, 1)),
    components=("accuracy", "iou", "format"),
  )
  assert made.component["accuracy"][0, 0] == accuracy
  assert made.component["iou"][0, 0] == pytest.approx(iou)
  assert made.component["format"][0, 0] == form


def test_no_evidence_and_no_glue_agree():
  text = "<answer>B</answer><glue>[]</glue>"
  parsed = answers.parse_completion(text)
  none = sample(**(GQA | dict(evidence=())))
  assert answers.credit(text, parsed, none) == {"accuracy": 1, "iou": 1}


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


def test_cited_frames():
  assert answers.cited_frames(
    "Frame 3 and frames 4, 5 and 7; frame #2. frame 9.5, frames 1 s, subframe"
    " 8, frame 12345, Frames 6, and 10 & 11!"
  ) == (3, 4, 5, 7, 2, 6, 10, 11)


def test_frame_numbers_cite_from_one():
  times = np.array([1.0, 2.0, np.nan])

  def cited(text, cite):
    made = answers.cited_keyframes(text, times, tolerance_s=0.1, cite=cite)
    return made.tolist()

  both = "Frame 1, frame 3, frame 0 and frame 9; then 2.0s."
  assert cited(both, "frame") == [True, False, False]
  assert cited(both, "time") == [False, True, False]
  assert cited(both, "either") == [True, True, False]
  with pytest.raises(ValueError, match="config.answers.cite"):
    cited(both, "both")


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
  reasoned = [
    tokenizer.decode(ids[span])
    for ids, span in zip(token[0], made.reasoning_span[0], strict=True)
  ]
  assert reasoned[0] == "1.0s red 2.5s blue" and reasoned[4:] == [""] * 3
  assert reasoned[1] == reasoned[2] != ""


def test_every_sample_has_its_own_components(tokenizer):
  samples = [
    sample(),
    sample(kind="interval", start_s=1.0, end_s=4.0),
    sample(**GQA),
    sample(kind="caption", events=("it falls", "it rises")),
  ]
  glue = complete("B") + "<glue>[(1, 2), (4, 6)]</glue>"
  texts = [complete("B"), complete("1 to 4"), glue, complete("it falls")]
  rows = [batch_of(tokenizer, [text, "nothing"], width=140) for text in texts]
  asked = []

  def ask(questions):
    asked.extend((answer, one.kind) for answer, one in questions)
    return [0.5] * len(questions)

  settings = dict(
    frame_time_s=np.zeros((4, 2)),
    components=("accuracy", "iou", "event_recall", "format"),
  )
  token, mask = (np.concatenate(part) for part in zip(*rows))
  made = answers.judge(tokenizer, samples, token, mask, ask=ask, **settings)
  applies = {name: value.tolist() for name, value in made.applies.items()}
  assert applies == {
    "accuracy": [True, False, True, False],
    "iou": [False, True, True, False],
    "event_recall": [False, False, False, True],
    "format": [True] * 4,
  }
  for name, column in (
    ("accuracy", [1, 0, 1, 0]),
    ("iou", [0, 1, 1, 0]),
    ("event_recall", [0, 0, 0, 0.5]),
    ("format", [1, 1, 1, 1]),
  ):
    np.testing.assert_array_equal(made.component[name][:, 0], column)
    np.testing.assert_array_equal(made.component[name][:, 1], 0)
  assert asked == [("it falls", "caption")]  # no answer, no question

  with pytest.raises(ValueError, match="config.judge.url"):
    answers.judge(tokenizer, samples, token, mask, **settings)
  settings["components"] = ("accuracy", "format")
  with pytest.raises(ValueError, match="config.answers.components"):
    answers.judge(tokenizer, samples, token, mask, ask=ask, **settings)


def test_format_of_an_answer_alone(tokenizer):
  texts = ["<answer>B</answer>", complete("B"), " <answer>B</answer>", "B"]
  token, mask = batch_of(tokenizer, texts)
  settings = dict(frame_time_s=np.zeros((1, 1)))
  made = answers.judge(
    tokenizer, [sample()], token, mask, reasoning="none", **settings
  )
  np.testing.assert_array_equal(made.component["format"], [[1, 0, 0, 0]])
  np.testing.assert_array_equal(made.component["accuracy"], [[1, 1, 1, 0]])
  with pytest.raises(ValueError, match="config.answers.reasoning"):
    answers.judge(
      tokenizer, [sample()], token, mask, reasoning="off", **settings
    )


def test_judge_selection(tokenizer):
  def choose(index):
    return f"<think>red</think><index>{index}</index>"

  texts = [
    choose("[5, 0, 11]"),
    choose("5, 0"),
    choose("[5, 5, 1]"),
    choose("[5, 12, 1]"),
    choose("[1, 2, 3]") + "<index>[4, 5, 6]</index>",
    "<index>[1, 2, 3]</index>",
    "",
  ]
  token, mask = batch_of(tokenizer, texts, width=140)
  made, frame = answers.judge_selection(
    tokenizer, token, mask, num_frames=3, num_candidates=12
  )
  np.testing.assert_array_equal(
    made.component["index"], [[1, 0, 0, 0, 0, 1, 0]]
  )
  np.testing.assert_array_equal(
    made.component["format"], [[1, 1, 1, 1, 0, 0, 0]]
  )
  stride = [0, 4, 8]
  np.testing.assert_array_equal(
    frame[0], [[0, 5, 11], *[stride] * 4, [1, 2, 3], stride]
  )
  shown = tokenizer.decode(token[0, 0][made.answer_span[0, 0]])
  assert shown == "[5, 0, 11]"


def test_answer_span_across_tokens_and_broken_characters():
  span = answers.tokens_inside
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
    "<glue>",
    "</glue>",
    "<index>",
    "</index>",
    "A",
    "B",
    " or ",
    " to ",
    "[",
    "]",
    ",",
    "1",
    "4",
    "٤",
    "1e400",
    '{"start_time":',
    '"end_time":',
    "}",
    "frame ",
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
  grounding_answers.read_interval(text)
  answers.cited_keyframes(text, np.arange(3.0), tolerance_s=0.1)
  answers.cited_keyframes(text, np.arange(3.0), tolerance_s=0.1, cite="either")
  box = (0.0, 0.0, 1.0, 1.0)
  truths = [
    sample(kind=kind, answer="3", start_s=1.0, end_s=4.0, boxes=(box,))
    for kind in ("numerical", "regression", "ocr", "free_form", "interval")
  ] + [sample(kind="tracking", boxes=(box,) * 2), sample(**GQA)]
  for truth in truths:
    for form in ("strict", "last", "json"):
      made = answers.credit(text, parsed, truth, interval_form=form)
      assert all(0 <= score <= 1 for score in made.values())
    assert 0 <= answers.accuracy(text, truth) <= 1


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(ANY)
def test_no_text_points_to_two_places(text):
  """Far apart truths: at most one of them is overlapped, by any form."""
  spans = [
    sample(kind="interval", start_s=start, end_s=start + 1.0)
    for start in (1.0, 4.0)
  ]
  parsed = answers.parse_completion(text)
  for form in ("strict", "last", "json"):
    scores = [
      answers.credit(text, parsed, span, interval_form=form)["iou"]
      for span in spans
    ]
    assert min(scores) <= 0.25  # an interval over both has a union of 4 s


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
    "frame ",
    "frames 1, ",
    "[",
    "(1, ",
    '{"start_time": ',
    "<answer>1 to 2</answer>",
    "red ",
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
      grounding_answers.read_interval(part)
      answers.read_choice(part, OPTIONS)
      answers.cited_times(part)
      answers.cited_frames(part)
      answers.last_answer(part)
      grounding_answers.read_last_interval(part)
      grounding_answers.read_json_interval(part)
      grounding_answers.read_intervals(part)
      grounding_answers.read_boxes(part, count=8)
      grounding_answers.read_indices(part, count=8, num_candidates=128)
      answers.accuracy(part, sample(kind="free_form", answer="a red disc"))
  assert time.perf_counter() - start < 2  # a quadratic one takes minutes
