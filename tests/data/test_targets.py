"""What supervised training wants written, for every kind of question."""

import numpy as np
import pytest

from cf_jax.data import (
  answers,
  prompts,
  records,
  synthetic_specs,
  synthetic_tasks,
  targets,
)


@pytest.fixture(scope="module")
def tiny():
  return prompts.load_tokenizer("tiny")


def _sample(**changes):
  fields = dict(
    id="a",
    video="a.mp4",
    question="Which colour appears first?",
    options=("red", "green", "blue"),
    answer="B",
    reasoning="green red",
  )
  return records.Sample(**(fields | changes))


def _open(kind, answer, **changes):
  return _sample(options=(), kind=kind, answer=answer, **changes)


def _text(tokenizer, target, row):
  real = target.token[row, 0][target.mask[row, 0]]
  assert real[-1] == tokenizer.eos_id and tokenizer.eos_id not in real[:-1]
  return tokenizer.decode(real[:-1])


BOXES = ((0.0, 0.25, 0.5, 1.0), (0.1, 0.2, 1 / 3, 0.4))
WORDED = {
  "letter": (
    _sample(),
    {},
    "<think>green red</think><answer>B</answer>",
  ),
  "text": (
    _sample(),
    dict(answer_form="text"),
    "<think>green red</think><answer>green</answer>",
  ),
  "plain": (_sample(), dict(reasoning="none"), "<answer>B</answer>"),
  "newline": (
    _sample(),
    dict(between="\n"),
    "<think>green red</think>\n<answer>B</answer>",
  ),
  "interval": (
    _open("interval", "x", start_s=1.5, end_s=10.0, reasoning=""),
    dict(answer_form="text"),
    "<think></think><answer>1.5 to 10</answer>",
  ),
  "last": (
    _open("interval", "x", start_s=0.0, end_s=2.125, reasoning="red 1s"),
    dict(interval_form="last"),
    "<think>red 1s</think><answer>0 to 2.125</answer>",
  ),
  "json": (
    _open("interval", "x", start_s=1.5, end_s=10.0),
    dict(interval_form="json", reasoning="none"),
    '<answer>{"start_time":"1.5","end_time":"10"}</answer>',
  ),
  "glue": (
    _sample(kind="grounded_qa", evidence=((1.0, 2.5), (4.0, 5.0))),
    dict(between="\n"),
    "<think>green red</think>\n<answer>B</answer>\n"
    "<glue>[(1,2.5),(4,5)]</glue>",
  ),
  "no evidence": (
    _sample(kind="grounded_qa"),
    dict(reasoning="none", answer_form="text"),
    "<answer>green</answer><glue>[]</glue>",
  ),
  "tracking": (
    _open("tracking", "x", boxes=BOXES),
    dict(reasoning="none"),
    "<answer>[[0,0.25,0.5,1],[0.1,0.2,0.333,0.4]]</answer>",
  ),
  "numerical": (
    _open("numerical", "2.50"),
    {},
    "<think>green red</think><answer>2.50</answer>",
  ),
  "caption": (
    _open("caption", "a red disc", events=("a red disc appears",)),
    {},
    "<think>green red</think><answer>a red disc</answer>",
  ),
}


@pytest.mark.parametrize("name", WORDED)
def test_wordings(tiny, name):
  sample, forms, text = WORDED[name]
  assert targets.target_text(sample, **forms) == text
  target = targets.target_rollout(tiny, [sample], 96, **forms)
  assert _text(tiny, target, 0) == text


@pytest.mark.parametrize(
  ("answer_form", "said"), [("letter", "B"), ("text", "green")]
)
def test_targets_are_read_back_as_right(tiny, answer_form, said):
  samples = [
    _sample(),
    _sample(id="b", reasoning=""),
    _open("free_form", "grass"),
  ]
  target = targets.target_rollout(tiny, samples, 24, answer_form=answer_form)
  assert target.token.shape == (3, 1, 24) and target.finished.all()
  assert target.mask.dtype == bool and target.token.dtype == np.int32
  for row, (sample, answer) in enumerate(zip(samples, (said, said, "grass"))):
    text = _text(tiny, target, row)
    reasoning = sample.reasoning
    assert text == f"<think>{reasoning}</think><answer>{answer}</answer>"
    assert answers.is_correct(text, sample)
    assert np.all(np.diff(target.mask[row, 0].astype(int)) <= 0)
  assert np.all(target.token[~target.mask] == tiny.eos_id)


@pytest.mark.parametrize(
  "forms",
  [
    {},
    dict(answer_form="text", interval_form="last"),
    dict(reasoning="none", interval_form="json"),
  ],
  ids=["letter", "text", "plain json"],
)
def test_targets_of_the_built_in_set_are_right(tiny, forms):
  """All tasks in one batch; read by the door itself, sample by sample."""
  samples = [
    synthetic_tasks.to_sample(spec, "a.mp4")
    for spec in synthetic_specs.make_specs(
      "train", 75, seed=0, tasks=tuple(synthetic_tasks.TASKS)
    )
  ]
  target = targets.target_rollout(tiny, samples, 192, **forms)
  for row, sample in enumerate(samples):
    text = _text(tiny, target, row)
    parsed = answers.parse_completion(text)
    if forms.get("reasoning") != "none":
      assert parsed.reasoning == sample.reasoning
    if sample.kind != "caption":
      earned = answers.credit(
        text,
        parsed,
        sample,
        interval_form=forms.get("interval_form", "strict"),
      )
      assert set(earned) == set(answers.CREDIT[sample.kind])
      assert min(earned.values()) == pytest.approx(1)


@pytest.mark.parametrize(
  ("forms", "message"),
  [
    (dict(answer_form="number"), r"'number'.*config\.sft\.answer_form"),
    (dict(reasoning="long"), r"'long'.*config\.answers\.reasoning"),
    (dict(interval_form="loose"), r"'loose'.*config\.answers\.interval_form"),
  ],
)
def test_an_unknown_form_names_its_setting(tiny, forms, message):
  with pytest.raises(ValueError, match=message):
    targets.target_rollout(
      tiny, [_open("interval", "x", start_s=1, end_s=2)], 24, **forms
    )


@pytest.mark.parametrize(
  ("sample", "forms", "message"),
  [
    # The text of an option that is the letter of another one.
    (_sample(options=("B", "C", "D"), answer="A"), {}, None),
    (
      _sample(options=("B", "C", "D"), answer="A"),
      dict(answer_form="text"),
      "accuracy 0",
    ),
    (_sample(reasoning="</think>"), {}, "format 0"),
    (
      _open("interval", "x", start_s=1.0, end_s=1.0005),
      dict(reasoning="none"),
      "iou 0",
    ),
    (_open("tracking", "x", boxes=((0.0, 0.0, 0.002, 0.5),)), {}, None),
    (
      _open("tracking", "x", boxes=((0.0, 0.0, 0.0034, 0.5),)),
      {},
      r"iou 0\.882",
    ),
    (_sample(), dict(between="and"), "format 0"),
  ],
)
def test_a_target_that_would_be_read_as_wrong(tiny, sample, forms, message):
  if message is None:
    targets.target_rollout(tiny, [sample], 64, **forms)
    return
  with pytest.raises(ValueError, match=f"sample 'a'.*{message}"):
    targets.target_rollout(tiny, [sample], 64, **forms)


def test_a_target_is_never_cut(tiny):
  long = _sample(id="long-one", reasoning="red " * 40)
  with pytest.raises(
    ValueError, match="'long-one' has .* limit is 24.*sampling.max_tokens"
  ):
    targets.target_rollout(tiny, [_sample(), long], 24)


def test_a_target_may_fill_every_slot(tiny):
  count = int(targets.target_rollout(tiny, [_sample()], 64).mask.sum())
  full = targets.target_rollout(tiny, [_sample()], count)
  assert full.mask.all() and full.token[0, 0, -1] == tiny.eos_id
  with pytest.raises(ValueError, match=f"limit is {count - 1}"):
    targets.target_rollout(tiny, [_sample()], count - 1)


# -- frame lists


def test_evidence_frames_come_first_and_the_rest_is_spread():
  time_s = np.tile(np.arange(12.0), (3, 1))
  samples = [
    _sample(evidence=((3.0, 4.0),)),
    _sample(evidence=()),
    _sample(evidence=((0.0, 7.0),)),
  ]
  found = targets.evidence_frames(samples, time_s, num_frames=4)
  # 3 and 4; the other ten in two halves, 0 1 2 5 6 and 7 8 9 10 11.
  assert found.tolist() == [[2, 3, 4, 9], [1, 4, 7, 10], [1, 3, 5, 7]]
  with pytest.raises(ValueError, match="cannot choose"):
    targets.evidence_frames(samples, time_s, num_frames=13)


def test_frame_lists(tiny):
  frames = np.array([[3, 17, 40], [0, 1, 2]])
  target = targets.selection_rollout(
    tiny, [_sample()] * 2, 48, frames=frames, num_candidates=64
  )
  assert _text(tiny, target, 0) == (
    "<think>green red</think><index>[3, 17, 40]</index>"
  )
  _, read = answers.judge_selection(
    tiny, target.token, target.mask, num_frames=3, num_candidates=64
  )
  np.testing.assert_array_equal(read[:, 0], frames)
  plain = targets.selection_rollout(
    tiny,
    [_sample()] * 2,
    48,
    frames=frames,
    num_candidates=64,
    reasoning="none",
  )
  assert _text(tiny, plain, 1) == "<index>[0, 1, 2]</index>"
  with pytest.raises(ValueError, match="different numbers below 40"):
    targets.selection_rollout(
      tiny, [_sample()] * 2, 48, frames=frames, num_candidates=40
    )
