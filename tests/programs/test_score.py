"""Published prediction sets score their published figures, by the command."""

import json
import pathlib

import pytest

from cf_jax.programs import score
from tests.conftest import ROOT, load_config

DATA = ROOT.parent / "shared" / "data"


def _run(tmp_path, **settings):
  config = load_config("configs/score.py")
  config.update(settings)
  config.lock()
  score.run(config, tmp_path)
  return json.loads((tmp_path / "scores.json").read_text("utf-8"))


def _published(tmp_path, benchmark, annotations, predictions):
  for name in (annotations, predictions):
    if not (DATA / benchmark / name).is_file():
      pytest.skip(f"no ../shared/data/{benchmark}/{name}")
  return _run(
    tmp_path,
    benchmark=benchmark,
    annotations=str(DATA / benchmark / annotations),
    predictions=str(DATA / benchmark / predictions),
  )


def _percent(made, digits=2):
  """(metric, group) -> per cent as it is printed."""
  return {
    (one["metric"], one["group"]): f"{100 * one['value']:.{digits}f}"
    for one in made["figures"]
  }


def test_nextqa(tmp_path, capsys):
  made = _published(tmp_path, "nextqa", "val.csv", "HGA-bert-ft-h256-val.json")
  found = _percent(made)
  assert found["accuracy", "all"] == "49.74"
  assert found["accuracy", "group: C"] == "46.26"
  assert found["accuracy", "group: T"] == "50.74"
  assert found["accuracy", "group: D"] == "59.33"
  assert (made["questions"], made["scored"], made["unread"]) == (4996, 4996, 0)
  assert not made["partial"]
  assert "49.74" in capsys.readouterr().out
  rows = (tmp_path / "questions.jsonl").read_text("utf-8").splitlines()
  right = sum(json.loads(row)["score"]["accuracy"] for row in rows)
  assert len(rows) == 4996 and right / 4996 == made["value"]
  (hashed,) = made["files"]["predictions"].values()
  path = DATA / "nextqa" / "HGA-bert-ft-h256-val.json"
  assert hashed == score.file_hash(path) and len(hashed) == 64


def test_qvhighlights(tmp_path):
  """Every number of the official metrics file, to its last digit."""
  made = _published(
    tmp_path,
    "qvhighlights",
    "highlight_val_release.jsonl",
    "sample_val_preds.jsonl",
  )
  found = {metric: value for (metric, _), value in _percent(made).items()}
  path = DATA / "qvhighlights" / "sample_val_preds_metrics_raw.json"
  official = json.loads(path.read_text("utf-8"))
  compared = 0
  for length in ("full", "short", "middle", "long"):
    mark = "" if length == "full" else f"{length} "
    for metric in ("mAP", "R1"):
      for limit, value in official[length][f"MR-{metric}"].items():
        name = mark + (metric if limit == "average" else f"{metric}@{limit}")
        assert found[name] == f"{value:.2f}", name
        compared += 1
  for rating in ("Fair", "Good", "VeryGood"):
    for metric in ("mAP", "Hit1"):
      value = official[f"HL-min-{rating}"][f"HL-{metric}"]
      assert found[f"HL-{rating}-{metric}"] == f"{value:.2f}"
      compared += 1
  assert compared == 4 * (11 + 10) + 6
  assert official["brief"]["MR-full-mAP"] == 32.2 and found["mAP"] == "32.20"


@pytest.mark.parametrize(
  "predictions",
  ["video-llava_multi-choice.json", "video-llava_multi-choice_rated.json"],
)
def test_tempcompass(tmp_path, predictions):
  made = _published(
    tmp_path, "tempcompass", "questions_multi-choice.json", predictions
  )
  found = _percent(made, 1)
  assert found["accuracy", "all"] == "45.6"
  assert made["scored"] == 1580 and made["unread"] == 0
  path = DATA / "tempcompass" / "video-llava_multi-choice_rated.json"
  rated = json.loads(path.read_text("utf-8"))
  ratings = [
    one["rating"]
    for dimensions in rated.values()
    for one in dimensions.get("order", ())
  ]
  share = f"{100 * sum(ratings) / len(ratings):.1f}"
  assert found["accuracy", "aspect: order"] == share


def _manifest(tmp_path: pathlib.Path) -> pathlib.Path:
  rows = [
    {"id": n, "video": "v.mp4", "question": "?", "options": ["x", "y"]}
    | {"answer": "x"}
    for n in ("1", "2")
  ]
  path = tmp_path / "truth.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
  return path


def test_partial_predictions(tmp_path):
  manifest, said = _manifest(tmp_path), tmp_path / "said.jsonl"
  said.write_text('{"id": "1", "response": "A"}\n', "utf-8")
  settings = dict(
    benchmark="jsonl", annotations=str(manifest), predictions=str(said)
  )
  with pytest.raises(ValueError, match="1 of 2 questions have no prediction"):
    _run(tmp_path, **settings)
  made = _run(tmp_path, **settings, allow_partial=True)
  assert made["partial"] and (made["scored"], made["missing"]) == (1, 1)
  assert made["value"] == 1


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({}, "config.predictions is missing"),
    ({"predictions": "p"}, "config.benchmark must be one of"),
    ({"predictions": "p", "benchmark": "NExT-QA"}, "did you mean 'nextqa'"),
    (
      {
        "predictions": "p",
        "benchmark": "jsonl",
        "annotations": "a.jsonl",
        "only": ("task=x",),
      },
      "config.only and config.split are for published benchmarks",
    ),
    (
      {"predictions": "p", "benchmark": "lvbench"},
      "config.annotations is missing",
    ),
  ],
)
def test_settings_that_are_missing(tmp_path, settings, message):
  with pytest.raises(ValueError, match=message):
    _run(tmp_path, **settings)
