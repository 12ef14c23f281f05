"""Whole benchmarks on a few questions: figures worked by hand."""

import json

import hypothesis
import pytest
from hypothesis import strategies

from cf_jax.data import datasets, records
from cf_jax.evals import benchmarks
from tests.conftest import ROOT

DATA = ROOT.parent / "shared" / "data"


def _sample(name, answer="A", *, options=("w", "x", "y", "z"), **fields):
  return records.Sample(
    id=name,
    video=fields.pop("video", f"v{name}"),
    question="q",
    options=options,
    answer=answer,
    **fields,
  )


def _figures(scores):
  return {(one.metric, one.group): one for one in scores.figures}


def test_unread_responses_leave_videommes_denominator():
  groups = (("duration", "short"),)
  samples = [
    _sample("1", "A", task="OCR", groups=groups),
    _sample("2", "B", task="OCR", groups=groups),
    _sample("3", "B", task="OCR", groups=(("duration", "long"),)),
  ]
  said = {"1": "(A)", "2": "C", "3": "no idea"}
  scores = benchmarks.score("videomme", samples, said)
  found = _figures(scores)
  assert scores.metric == "accuracy" and scores.unread == 1
  assert (found["accuracy", "all"].value, scores.scored) == (0.5, 3)
  assert found["accuracy", "all"].count == 2
  assert found["accuracy_all", "all"].value == pytest.approx(1 / 3)
  assert found["accuracy", "duration: short"].value == 0.5
  assert ("accuracy", "duration: long") not in found
  assert scores.question["3"] == {"accuracy": 0.0, "accuracy_all": 0.0}
  assert scores.answer == {"1": "A", "2": "C", "3": None}
  # Wilson's interval of 1 in 2, by hand: 0.0945 to 0.9055.
  one = found["accuracy", "all"]
  assert (one.low, one.high) == pytest.approx((0.0945, 0.9055), abs=1e-4)
  assert one.interval == "Wilson"


def test_mlvu_averages_tasks():
  samples = [
    _sample("1", task="count"),
    _sample("2", task="order"),
    _sample("3", task="order"),
  ]
  scores = benchmarks.score("mlvu", samples, {"1": "A", "2": "A", "3": "B"})
  found = _figures(scores)
  assert scores.metric == "M-Avg"
  assert found["M-Avg", "all"].value == 0.75
  assert found["accuracy", "all"].value == pytest.approx(2 / 3)
  assert found["accuracy", "task: order"].value == 0.5


def test_an_answer_that_is_no_option_is_never_right():
  sample = _sample("1", "as published", flaws=("no option",))
  scores = benchmarks.score("mlvu", [sample], {"1": "as published"})
  assert scores.figures[0].value == 0


def test_vsibench_counts_three_directions_as_one():
  """Of eight equal parts two: a count of MRA 0.8, directions of 1, 0, 0."""
  direction = "object_rel_direction_"
  samples = [
    _sample("1", "10", options=(), kind="regression", task="object_counting"),
    _sample("2", "A", task=direction + "easy"),
    _sample("3", "A", task=direction + "medium"),
    _sample("4", "A", task=direction + "hard"),
  ]
  said = {"1": "8.8 of them", "2": "A.", "3": "B", "4": "left"}
  scores = benchmarks.score("vsibench", samples, said)
  found = _figures(scores)
  assert scores.metric == "overall"
  assert scores.figures[0].value == pytest.approx((0.8 + 1 / 3) / 2)
  assert found["MRA", "task: object_counting"].value == pytest.approx(0.8)
  assert found["accuracy", f"task: {direction}easy"].value == 1
  assert scores.answer["4"] is None and scores.unread == 1


def test_lvbench_counts_a_question_under_its_first_type():
  """The script of its repository counts it under every one: both are said."""
  groups = (("question_types", "reasoning, summarization"),)
  samples = [
    _sample("1", task="reasoning", groups=groups),
    _sample("2", "B", task="summarization"),
  ]
  found = _figures(benchmarks.score("lvbench", samples, {"1": "A", "2": "A"}))
  assert found["accuracy", "type: reasoning"].value == 1
  assert found["accuracy", "type: summarization"].value == 0
  assert found["accuracy", "listed type: summarization"].value == 1


def test_nextqa_counts_previous_as_next():
  samples = [_sample("1", task="TP"), _sample("2", task="TN", answer="B")]
  scores = benchmarks.score("nextqa", samples, {"1": "0", "2": "(C)"})
  found = _figures(scores)
  assert found["accuracy", "type: TN"].value == 0.5
  assert found["accuracy", "group: T"].count == 2


def test_nextgqa():
  """IoP 1/2 and IoU 1/3 on a question that is right; the other has none."""
  about = dict(kind="grounded_qa", task="CW", evidence=((2.0, 4.0),))
  samples = [_sample("1", **about), _sample("2", "B", **about)]
  said = {
    "1": "<think>B</think><answer>A</answer><glue>[(3, 5)]</glue>",
    "2": "<answer>1</answer><glue>[3, 5]</glue>",
  }
  found = _figures(benchmarks.score("nextgqa", samples, said))
  assert found["Acc@GQA", "all"].value == 0.5
  assert found["accuracy", "all"].value == 1
  assert found["mIoP", "all"].value == pytest.approx(0.25)
  assert found["mIoU", "all"].value == pytest.approx(1 / 6)
  assert found["set_mIoU", "all"].value == pytest.approx(1 / 6)
  assert found["mIoU", "all"].interval == "bootstrap by video"


def test_moments():
  about = dict(options=(), kind="interval", start_s=2.0, end_s=6.0)
  samples = [_sample("1", "", **about), _sample("2", "", **about)]
  said = {"1": "<answer>from 2 to 4</answer>", "2": "I do not know"}
  scores = benchmarks.score("charades_sta", samples, said)
  found = _figures(scores)
  assert found["mIoU", "all"].value == pytest.approx(0.25)
  assert [found[f"R1@{n}", "all"].value for n in (0.3, 0.5, 0.7)] == [
    0.5,
    0.5,
    0,
  ]
  assert scores.unread == 1


def test_qvhighlights_from_text():
  samples = [
    _sample(
      "1",
      "",
      options=(),
      kind="interval",
      evidence=((0.0, 10.0), (20.0, 60.0)),
      duration_s=150.0,
    )
  ]
  scores = benchmarks.score(
    "qvhighlights", samples, {"1": "20 to 60, perhaps 100 to 104"}
  )
  found = _figures(scores)
  assert found["mAP", "all"].value == pytest.approx(0.5)
  assert found["long mAP", "all"].value == 1
  assert found["short R1@0.5", "all"].value == 0
  assert not any(metric.startswith("HL") for metric, _ in found)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({}, "has neither 'pred_relevant_windows'"),
    ({"pred_relevant_windows": [[0, 2]]}, r"\[start, end, score\], got"),
    ({"pred_saliency_scores": []}, "must be a list of numbers"),
    ({"pred_saliency_scores": [float("nan")]}, "must be a list of numbers"),
    ({"pred_saliency_scores": [10**400]}, "must be a list of numbers"),
  ],
)
def test_wrong_official_rows(row, message):
  sample = _sample("1", "", options=(), evidence=((0.0, 2.0),))
  with pytest.raises(ValueError, match=message):
    benchmarks.score("qvhighlights", [sample], {"1": row})


def test_official_rows_hold_the_same():
  samples = [
    _sample(
      name,
      "",
      options=(),
      evidence=((0.0, 2.0),),
      duration_s=4.0,
      saliency=((0, (4, 4, 4)),),
    )
    for name in ("1", "2")
  ]
  windows = {"pred_relevant_windows": [[0, 2, 1]]}
  clips = {"pred_saliency_scores": [1, 0]}
  with pytest.raises(ValueError, match="1 have pred_relevant_windows"):
    benchmarks.score(
      "qvhighlights", samples, {"1": windows | clips, "2": clips}
    )
  with pytest.raises(ValueError, match="must hold the same"):
    benchmarks.score("qvhighlights", samples, {"1": "0 to 2", "2": clips})
  scores = benchmarks.score("qvhighlights", samples, {"1": clips, "2": clips})
  assert scores.metric == "HL-Fair-mAP" and scores.figures[0].value == 1
  assert all(figure.count == 2 for figure in scores.figures)


def test_a_figure_is_about_some_question():
  scores = benchmarks.score("videomme", [_sample("1")], {"1": "no idea"})
  assert (scores.metric, scores.figures[0].value) == ("accuracy_all", 0)
  assert all(figure.count for figure in scores.figures)


def test_got10k():
  box = (0.0, 0.0, 0.5, 0.5)
  sample = _sample("1", "", options=(), kind="tracking", boxes=(box,) * 2)
  text = "<answer>[[0, 0, .5, .5], [0, 0, .5, .25]]</answer>"
  found = _figures(benchmarks.score("got10k", [sample], {"1": text}))
  assert found["overlap", "all"].value == pytest.approx(0.75)
  assert found["AO", "all"].value == pytest.approx(0.5)
  assert found["SR@0.5", "all"].value == 0
  assert found["overlap", "all"].low is None  # one video


def test_own_manifests():
  samples = [
    _sample("1", "B", task="needle"),
    _sample("2", "3", options=(), kind="numerical", task="count"),
    _sample("3", "", options=(), kind="interval", start_s=1.0, end_s=3.0),
  ]
  said = {"1": "<answer>B</answer>", "2": "3", "3": "1 to 2"}
  scores = benchmarks.score("jsonl", samples, said)
  assert scores.figures[0].value == 1
  assert scores.question["3"] == {"accuracy": 1.0, "iou": 0.5}
  caption = _sample("4", "", options=(), kind="caption", events=("a", "b"))
  scores = benchmarks.score(
    "jsonl", [caption], {"4": "<answer>a</answer>"}, ask=lambda pairs: [0.5]
  )
  assert scores.question["4"]["event_recall"] == 0.5


def test_ids_that_do_not_fit():
  samples = [_sample(str(n)) for n in range(5)]
  said = {"0": "A", "9": "A"}
  with pytest.raises(ValueError) as error:
    benchmarks.score("lvbench", samples, said)
  assert "4 of 5 questions have no prediction ('1', '2', '3', ...)" in str(
    error.value
  )
  assert "1 of 2 predictions are for no question ('9')" in str(error.value)
  assert "config.allow_partial=True" in str(error.value)
  scores = benchmarks.score("lvbench", samples, said, allow_partial=True)
  assert (scores.scored, scores.missing, scores.unknown) == (1, 4, 1)
  assert benchmarks.to_json(scores)["partial"]
  assert "PARTIAL: 1 of 5 questions" in benchmarks.markdown(scores)
  with pytest.raises(ValueError, match="none of 1 predictions"):
    benchmarks.score("lvbench", samples, {"9": "A"}, allow_partial=True)


def test_what_an_llm_judges():
  samples = [
    _sample("1"),
    _sample("2", "DFS", options=(), kind="open_ended"),
  ]
  said = {"1": "A", "2": "depth first"}
  with pytest.raises(ValueError, match=r"\('2'\) are judged by an LLM; set"):
    benchmarks.score("mmvu", samples, said)
  scores = benchmarks.score("mmvu", samples, said, allow_partial=True)
  assert scores.unjudged == 1 and benchmarks.to_json(scores)["partial"]
  asked = []

  def ask(pairs):
    asked.extend(pairs)
    return [1.0] * len(pairs)

  scores = benchmarks.score("mmvu", samples, said, ask=ask)
  assert scores.figures[0].value == 1 and scores.unjudged == 0
  assert [text for text, _ in asked] == ["depth first"]


def test_tempcompass_asks_what_its_rules_cannot_match():
  samples = [_sample("1", options=("run", "walk")), _sample("2")]
  said = {"1": "it runs", "2": ""}
  scores = benchmarks.score("tempcompass", samples, said)
  assert scores.figures[0].value == 0 and scores.unread == 2

  def ask(pairs):
    ((text, sample),) = pairs  # nothing is asked about silence
    assert text == "it runs" and sample.kind == "open_ended"
    assert sample.answer == "A. run"
    assert sample.question == "q\nA. run\nB. walk"
    return [1.0]

  scores = benchmarks.score("tempcompass", samples, said, ask=ask)
  assert scores.figures[0].value == 0.5


def test_captions():
  samples = [
    _sample(n, "", options=(), kind="caption", events=events, task=task)
    for n, events, task in (
      ("1", ("a", "b"), "live"),
      ("2", ("a", "b"), "live"),
      ("3", ("a",), "animation"),
      ("4", (), "stock"),  # nothing to state
    )
  ]
  said = {"1": "x", "2": "x", "3": "", "4": "x"}
  scores = benchmarks.score(
    "dream1k", samples, said, ask=lambda pairs: [1.0, 0.5]
  )
  found = _figures(scores)
  # Of live 0.75, of animation 0, of stock 1.
  assert found["recall over categories", "all"].value == pytest.approx(1.75 / 3)
  assert found["recall", "all"].value == pytest.approx(2.5 / 4)
  with pytest.raises(ValueError, match="config.judge.url"):
    benchmarks.score("dream1k", samples, said)


def test_mlvus_generation_tasks_are_not_built():
  sample = _sample("1", "text", options=(), kind="open_ended")
  for ask in (None, lambda pairs: [1.0]):
    with pytest.raises(ValueError, match="rated from 1 to 5"):
      benchmarks.score("mlvu", [sample], {"1": "text"}, ask=ask)


def test_wrong_settings():
  with pytest.raises(ValueError, match="config.benchmark must be one of"):
    benchmarks.score("videome", [], {})
  with pytest.raises(ValueError, match="the response must be text, got 5"):
    benchmarks.score("lvbench", [_sample("1")], {"1": 5})


def test_the_last_answer_tag_is_read_first():
  said = {"1": "<think>B or C</think><answer>B</answer> <answer>A</answer>"}
  scores = benchmarks.score("videomme", [_sample("1")], said)
  assert scores.figures[0].value == 1


def _truth(sample):
  """A response that says the truth, in the form that the benchmark asks for."""
  if sample.kind == "tracking":
    return f"<answer>{json.dumps(sample.boxes)}</answer>"
  if sample.kind == "interval":
    return f"It happens from {sample.start_s} to {sample.end_s} seconds."
  if sample.kind == "grounded_qa":
    start, end = sample.evidence[0]
    return f"<answer>{sample.answer}</answer><glue>[({start}, {end})]</glue>"
  return f"({sample.answer})" if sample.source == "mvbench" else sample.answer


@pytest.mark.parametrize(
  ("benchmark", "metric", "wrong"),
  [
    ("videomme", "accuracy", 0),
    ("lvbench", "accuracy", 0),
    ("mlvu", "accuracy", 2),  # the published answer is none of the options
    ("mvbench", "accuracy", 0),
    ("nextqa", "accuracy", 0),
    ("nextgqa", "Acc@GQA", 0),
    ("charades_sta", "mIoU", 0),
    ("got10k", "overlap", 0),
    ("timer1", "mIoU", 0),
    ("tvgbench", "mIoU", 11),  # published moments that are a point in time
  ],
)
def test_the_truth_is_right_on_real_annotations(benchmark, metric, wrong):
  files = {
    "nextqa": "nextqa/val.csv",
    "nextgqa": "nextgqa/val.csv",
    "timer1": "timer1/train_2k5.json",
    "tvgbench": "timer1/tvgbench.json",
    "charades_sta": "charades_sta/charades_test.jsonl",
  }
  path = DATA / files.get(benchmark, benchmark)
  if not path.exists():
    pytest.skip(f"no ../shared/data/{files.get(benchmark, benchmark)}")
  samples = datasets.read(benchmark, path)
  said = {sample.id: _truth(sample) for sample in samples}
  found = _figures(benchmarks.score(benchmark, samples, said))
  right = found[metric, "all"]
  assert right.value == pytest.approx(1 - wrong / len(samples), abs=1e-12)
  assert right.count == len(samples)


KINDS = {
  "got10k": _sample("1", "", options=(), boxes=((0.0, 0.0, 1.0, 1.0),)),
  "nextgqa": _sample("1", task="CW", evidence=((0.0, 2.0),)),
  "charades_sta": _sample("1", "", options=(), start_s=1.0, end_s=2.0),
  "qvhighlights": _sample("1", "", options=(), evidence=((0.0, 2.0),)),
  "nextqa": _sample("1", task="CW"),
}


@pytest.mark.parametrize(
  "benchmark", sorted(set(benchmarks.RULES) - {"dream1k"})
)
@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
  strategies.text(max_size=40)
  | strategies.text(alphabet="AB().<answer>/glue[1, to", max_size=60)
)
def test_any_response_is_scored(benchmark, text):
  sample = KINDS.get(benchmark, _sample("1"))
  reading = benchmarks.read_response(benchmark, text, sample)
  assert all(0 <= value <= 1 for value in reading.score.values())
