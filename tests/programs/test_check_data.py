"""Checking a local copy: what is counted, what is found, the exit codes."""

import json
import shutil

import cv2
import numpy as np
import pytest

from cf_jax.data import records
from cf_jax.programs import check_data
from tests.conftest import load_config


def _video(path, num_frames):
  path.parent.mkdir(parents=True, exist_ok=True)
  writer = cv2.VideoWriter(
    str(path), cv2.VideoWriter_fourcc(*"mp4v"), 8.0, (64, 48)
  )
  for n in range(num_frames):
    writer.write(np.full((48, 64, 3), 10 * n % 255, np.uint8))
  writer.release()


def _config(folder, /, **settings):
  config = load_config("configs/check_data.py")
  config.dataset, config.root = "charades_sta", str(folder)
  config.decoder.processes = 0
  config.update(settings)
  return config


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
  """Charades-STA of two videos of 4 s, and all of it is right."""
  root = tmp_path_factory.mktemp("charades")
  rows = [
    dict(qid=n, query="a person sits.", vid=f"V{n % 2}", duration=4.0)
    | {"relevant_windows": [[1.0, 3.5]]}
    for n in range(3)
  ]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (root / "charades_test.jsonl").write_text(text)
  for n in range(2):
    _video(root / f"Charades_v1_480/V{n}.mp4", 32)
  return root


def test_a_whole_copy(copy, tmp_path, capsys):
  check_data.run(_config(copy, decode="whole"), tmp_path)
  report = json.loads((tmp_path / check_data.REPORT_FILE).read_text())
  assert (report["questions"], report["videos"]) == (3, 2)
  assert report["durations"]["opened"] == 2
  assert report["durations"]["total_s"] == pytest.approx(8.0)
  assert report["groups"]["kind"] == {"interval": 3}
  assert set(report["problems"]) == set(check_data.PROBLEMS)
  assert not any(report["problems"].values())
  assert [path.rsplit("/")[-1] for path in report["annotations"]] == [
    "charades_test.jsonl"
  ]
  assert "Charades-STA" in capsys.readouterr().out


def test_all_that_can_be_wrong(copy, tmp_path):
  root = tmp_path / "copy"
  shutil.copytree(copy, root)
  file = root / "charades_test.jsonl"
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  more = [
    rows[0] | {"qid": 3, "vid": "gone"},
    rows[0] | {"qid": 4, "vid": "text"},
    rows[0] | {"qid": 5, "duration": 9.0},  # V0 lasts 4 s
    rows[0] | {"qid": 6, "duration": 8.0, "relevant_windows": [[1, 7]]},
    rows[0] | {"qid": 7, "relevant_windows": [[3, 1]]},
    rows[0] | {"qid": 8, "relevant_windows": [[1, 4.5]]},
  ]
  rows += more
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  (root / "Charades_v1_480/text.mp4").write_text("no video")
  workdir = tmp_path / "work"
  with pytest.raises(SystemExit) as ended:
    check_data.run(_config(root), workdir)
  assert ended.value.code == 1
  report = json.loads((workdir / check_data.REPORT_FILE).read_text())
  found = report["problems"]
  counts = {kind: len(some) for kind, some in found.items()}
  assert counts == dict.fromkeys(check_data.PROBLEMS, 1) | dict(
    duration=2, subtitles=0
  )
  assert "jsonl:8: field 'relevant_windows'" in found["rows"][0]
  assert "gone.mp4: there is no such file" in found["missing"][0]
  assert "text.mp4" in found["unreadable"][0]
  assert "lasts 4.00 s, 9 s are annotated" in found["duration"][0]
  assert found["beyond"][0].startswith("6 (")
  # 4.5 s is within the tolerance; the annotations contradict themselves.
  assert len(report["notes"]["flaws"]) == 1
  assert report["notes"]["flaws"][0].startswith("8: an interval ends at 4.5 s")
  # Nothing is opened, and what is not there is still found.
  with pytest.raises(SystemExit):
    check_data.run(_config(root, decode="none"), workdir)
  report = json.loads((workdir / check_data.REPORT_FILE).read_text())
  assert report["durations"] == {}
  assert len(report["problems"]["missing"]) == 1
  assert not report["problems"]["unreadable"]


def test_subtitles_are_read(tmp_path):
  rows = [
    dict(id=f"{n}", video_path=f"{n}.mp4", question="?", candidates=["a", "b"])
    | dict(correct_choice=0, question_category="TOS", topic_category="KA")
    | dict(level="L2-Relation", duration_group=15, duration=9.0)
    | dict(subtitle_path=f"{n}.json", starting_timestamp_for_subtitles=0)
    for n in range(3)
  ]
  (tmp_path / "lvb_val.json").write_text(json.dumps(rows))
  for folder in ("videos", "subtitles"):
    (tmp_path / folder).mkdir()
  for n in range(3):
    (tmp_path / f"videos/{n}.mp4").touch()
  (tmp_path / "subtitles/0.json").write_text("[]")
  (tmp_path / "subtitles/1.json").write_text('[{"line": "x"}]')
  config = _config(
    tmp_path, dataset="longvideobench", subtitles=True, decode="none"
  )
  with pytest.raises(SystemExit):
    check_data.run(config, tmp_path)
  report = json.loads((tmp_path / check_data.REPORT_FILE).read_text())
  (problem,) = report["problems"]["subtitles"]
  assert "1.json: row 0: field 'start': missing" in problem
  assert [path[-5:] for path in report["notes"]["no_subtitles"]] == ["2.mp4"]


def test_clips_are_parts_of_the_file():
  sample = records.Sample(
    *("a", "v.mp4", "?", (), "1.00 to 3.00", "interval"),
    clip=(10.0, 20.0),
    evidence=((1.0, 3.0),),
    duration_s=10.0,
  )
  assert check_data.compare(sample, 20.0, tolerance_s=0.0) == {}
  assert (
    "about 10 to 20 s of 15.00 s"
    in (check_data.compare(sample, 15.0, tolerance_s=2.0)["beyond"])
  )
  late = sample._replace(evidence=((1.0, 30.0),))
  assert (
    "ends at 40 s"
    in (check_data.compare(late, 20.0, tolerance_s=2.0)["beyond"])
  )


def test_what_cannot_be_checked(copy, tmp_path):
  for settings, message in (
    (dict(dataset="charades"), "no dataset is called 'charades'"),
    (dict(root=""), "config.root is missing"),
    (dict(root=str(tmp_path)), "has none of charades_sta_test.txt"),
    (dict(decode="all"), "config.decode must be one of"),
    (dict(tolerance_s=-1.0), "config.tolerance_s must be at least 0"),
    (dict(split="dev"), "no split 'dev'"),
  ):
    with pytest.raises(ValueError, match=message):
      check_data.run(_config(copy, **settings), tmp_path)
