"""Subtitles: the three published forms, and what is on screen when."""

import json

import pytest

from cf_jax.data import subtitles

SRT = """\ufeff1
00:00:01,000 --> 00:00:02,500
<font color="white">Hello,
world.</font>

2
00:01:00,000 --> 00:01:01,000


3
01:00:00,050 --> 01:00:02,000

Good

bye: 3

7
"""


def test_subrip(tmp_path):
  path = tmp_path / "a.srt"
  path.write_text(SRT)
  assert subtitles.read(path) == [
    (1.0, 2.5, "Hello, world."),
    (3600.05, 3602.0, "Good bye: 3 7"),
  ]
  late = subtitles.read(path, start_s=3600.0)
  assert late[1].start_s == pytest.approx(0.05)


def test_both_forms_of_json(tmp_path):
  path = tmp_path / "a.json"
  path.write_text(
    json.dumps(
      [
        {"start": "00:00:01.500", "end": "00:00:03.000", "line": "One."},
        {"timestamp": [4.0, 5.5], "text": "Two."},
        {"timestamp": [7.0, None], "text": "Three."},
      ]
    )
  )
  lines = subtitles.read(path)
  assert lines[:2] == [(1.5, 3.0, "One."), (4.0, 5.5, "Two.")]
  assert subtitles.shown(lines, [2.0, 2.5, 3.5, 99.0]) == ["One.", "Three."]
  assert subtitles.shown(lines, []) == []


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("a.srt", "1\n00:00:02,000 --> 00:00:01,000\nx", "a.srt:2: .*too early"),
    ("a.srt", "1\n0:0 --> 1\nx", "a.srt:2: got '0:0 --> 1', expected HH"),
    ("a.json", '[{"start": "1", "end": "2", "line": "x"}]', "row 0: .*'start'"),
    ("a.json", '[{"timestamp": [1], "text": "x"}]', "expected .start, end"),
    ("a.vtt", "", "expected .srt or .json"),
  ],
)
def test_bad_files(tmp_path, name, text, message):
  path = tmp_path / name
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    subtitles.read(path)
