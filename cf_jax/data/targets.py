"""What supervised training wants written: a sample's answer as a completion.

  <think>red 3s</think><answer>B</answer><glue>[(2.5,3.5)]</glue>

Targets are the mirror image of `answers.py`: every one is read back by the very
door that reads the policy's completions, and one that would not earn everything
there is an error, as is one that does not fit.

Axes: `B` samples, `G` = 1 completion each, `C` completion slots.
"""

import json
import string
from collections.abc import Sequence
from typing import Literal

import numpy as np

from cf_jax.data import answers, grounding_answers, prompts, records
from cf_jax.types import Rollout

AnswerForm = Literal["letter", "text"]

_DECIMALS = 3  # of seconds and of corners, noughts at the end left out
# What is left of an IoU where numbers are written with so many decimals; any
# other score is 0 or 1.
_FULL_CREDIT = 0.95


def target_text(
  sample: records.Sample,
  *,
  reasoning: answers.Reasoning = "tagged",
  answer_form: AnswerForm = "letter",
  interval_form: answers.IntervalForm = "strict",
  between: str = "",
) -> str:
  """The completion that supervised training wants, without the end token.

  Args:
    sample: of any kind.
    reasoning: "tagged": the sample's chain of thought stands between think tags
      before the answer; "none": the answer stands alone.
    answer_form: what stands between the answer tags of a question with options:
      the letter of the right one, or its text.
    interval_form: of an interval: `2.5 to 4` ("strict", "last"), or the object
      of arXiv 2506.01908 ("json").
    between: white space between the sections; Video-R1's data have a newline.

  Raises:
    ValueError: an unknown form.
  """
  answer = _answer(sample, answer_form, interval_form)
  sections = [(answers.ANSWER, answer)]
  if reasoning == "tagged":
    sections.insert(0, (answers.THINK, sample.reasoning))
  elif reasoning != "none":
    raise ValueError(
      f"reasoning must be 'tagged' or 'none', got {reasoning!r}; change"
      " config.answers.reasoning"
    )
  if sample.kind == "grounded_qa":
    pairs = (f"({_number(a)},{_number(b)})" for a, b in sample.evidence)
    sections.append((answers.GLUE, f"[{','.join(pairs)}]"))
  return between.join(
    f"{opening}{text}{closing}" for (opening, closing), text in sections
  )


def target_rollout(
  tokenizer: prompts.Tokenizer,
  samples: Sequence[records.Sample],
  max_tokens: int,
  *,
  reasoning: answers.Reasoning = "tagged",
  answer_form: AnswerForm = "letter",
  interval_form: answers.IntervalForm = "strict",
  between: str = "",
) -> Rollout:
  """The wanted completion of each sample as a Rollout with G = 1.

  Args:
    tokenizer: from `prompts.load_tokenizer`.
    samples: B samples, of one kind or of many.
    max_tokens: C.
    reasoning: this and the following as in `target_text`.
    answer_form: letter or text of an option.
    interval_form: of intervals; as the answers are read.
    between: white space between the sections.

  Raises:
    ValueError: an unknown form, a target longer than `max_tokens` (it is never
      cut), or one that `answers.judge` would not give full credit: an IoU of
      less than 0.95 (small things need more than the three decimals that are
      written) or anything else below 1. What a caption earns is up to an LLM;
      only its form is looked at.
  """
  texts = [
    target_text(
      sample,
      reasoning=reasoning,
      answer_form=answer_form,
      interval_form=interval_form,
      between=between,
    )
    for sample in samples
  ]
  rollout = _rollout(tokenizer, samples, texts, max_tokens)
  components = {"format"}.union(*(answers.CREDIT[s.kind] for s in samples))
  judged = answers.judge(
    tokenizer,
    samples,
    rollout.token,
    rollout.mask,
    frame_time_s=np.zeros((len(samples), 0)),
    components=sorted(components),
    interval_form=interval_form,
    reasoning=reasoning,
    ask=lambda pairs: [1.0] * len(pairs),
  )
  for row, (sample, text) in enumerate(zip(samples, texts)):
    for name, credit in judged.component.items():
      full = _FULL_CREDIT if name == "iou" else 1.0
      if judged.applies[name][row] and credit[row, 0] < full:
        raise ValueError(
          f"the target of sample {sample.id!r}, {text!r}, would be read as a"
          f" wrong answer: {name} {credit[row, 0]:.3g}; change the sample, or"
          " config.sft.answer_form"
        )
  return rollout


def selection_rollout(
  tokenizer: prompts.Tokenizer,
  samples: Sequence[records.Sample],
  max_tokens: int,
  *,
  frames: np.ndarray,
  num_candidates: int,
  reasoning: answers.Reasoning = "tagged",
  between: str = "",
) -> Rollout:
  """The wanted frame list of each sample (arXiv 2505.15447), G = 1.

  Args:
    tokenizer: from `prompts.load_tokenizer`.
    samples: B samples.
    max_tokens: C.
    frames: int[B, num_frames] numbers to name, from `evidence_frames`.
    num_candidates: frames that are shown.
    reasoning: as in `target_text`.
    between: white space between the sections.

  Raises:
    ValueError: a target longer than `max_tokens`, or one that
      `answers.judge_selection` would not read as these frames.
  """
  texts = []
  for sample, row in zip(samples, frames, strict=True):
    text = f"{answers.INDEX[0]}{json.dumps(row.tolist())}{answers.INDEX[1]}"
    if reasoning == "tagged":
      opening, closing = answers.THINK
      text = f"{opening}{sample.reasoning}{closing}{between}{text}"
    texts.append(text)
  rollout = _rollout(tokenizer, samples, texts, max_tokens)
  judged, read = answers.judge_selection(
    tokenizer,
    rollout.token,
    rollout.mask,
    num_frames=frames.shape[1],
    num_candidates=num_candidates,
    reasoning=reasoning,
  )
  good = judged.component["format"] * judged.component["index"] == 1
  good &= np.all(read == np.sort(frames, axis=1)[:, None], axis=2)
  for row, text in enumerate(texts):
    if not good[row, 0]:
      raise ValueError(
        f"the frame list of sample {samples[row].id!r}, {text!r}, would not be"
        f" read: {frames.shape[1]} different numbers below {num_candidates}"
        " are; change the frames or the sample's reasoning"
      )
  return rollout


def evidence_frames(
  samples: Sequence[records.Sample],
  candidate_time_s: np.ndarray,
  *,
  num_frames: int,
) -> np.ndarray:
  """The frames that a perfect selector names: evidence first.

  Of the frames inside a sample's evidence as many as fit, at equal distances;
  of the others, at equal distances, what is left to name.

  Args:
    samples: B samples.
    candidate_time_s: float[B, N] seconds of the frames shown.
    num_frames: how many to name.

  Returns:
    int64[B, num_frames], ascending.

  Raises:
    ValueError: fewer candidates than frames.
  """
  stride = grounding_answers.uniform_stride  # raises where there are too few
  stride(count=num_frames, num_candidates=candidate_time_s.shape[1])
  inside = answers.evidence_keyframes(samples, candidate_time_s)
  chosen = []
  for row in inside:
    relevant, other = np.flatnonzero(row), np.flatnonzero(~row)
    count = min(num_frames, len(relevant))
    chosen.append(
      np.sort(
        np.concatenate(
          [_spread(relevant, count), _spread(other, num_frames - count)]
        )
      )
    )
  return np.stack(chosen)


def _spread(values: np.ndarray, count: int) -> np.ndarray:
  """`count` of the values, from the middles of as many equal parts."""
  middle = (np.arange(count) + 0.5) * len(values) / max(count, 1)
  return values[middle.astype(int)]


def _number(value: float) -> str:
  """Seconds or a corner: `2.5`, `3`, `0.125`."""
  return f"{value:.{_DECIMALS}f}".rstrip("0").rstrip(".")


def _answer(sample, answer_form, interval_form) -> str:
  """What stands between the answer tags."""
  if answer_form not in ("letter", "text"):
    raise ValueError(
      f"answer_form must be 'letter' or 'text', got {answer_form!r}; change"
      " config.sft.answer_form"
    )
  answers.check_sample(sample)
  if sample.kind in ("multiple_choice", "grounded_qa"):
    number = answers.read_choice(sample.answer, sample.options)
    if answer_form == "text":
      return sample.options[number]
    return string.ascii_uppercase[number]
  if sample.kind == "interval":
    start, end = _number(sample.start_s), _number(sample.end_s)
    if interval_form == "json":
      made = {"start_time": start, "end_time": end}
      return json.dumps(made, separators=(",", ":"))
    return f"{start} to {end}"
  if sample.kind == "tracking":
    boxes = (f"[{','.join(map(_number, box))}]" for box in sample.boxes)
    return f"[{','.join(boxes)}]"
  return sample.answer


def _rollout(tokenizer, samples, texts, max_tokens) -> Rollout:
  """Texts as ids with the end token, padded with it."""
  shape = (len(texts), 1, max_tokens)
  token = np.full(shape, tokenizer.eos_id, dtype=np.int32)
  mask = np.zeros(shape, dtype=bool)
  for row, (sample, text) in enumerate(zip(samples, texts, strict=True)):
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    if len(ids) > max_tokens:
      raise ValueError(
        f"the target of sample {sample.id!r} has {len(ids)} tokens, the limit"
        f" is {max_tokens}; raise config.sampling.max_tokens"
      )
    token[row, 0, : len(ids)] = ids
    mask[row, 0, : len(ids)] = True
  return Rollout(
    token=token,
    mask=mask,
    logprob=np.zeros(shape, np.float32),
    finished=np.ones(shape[:2], dtype=bool),
  )
