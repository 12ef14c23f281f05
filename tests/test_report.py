"""The page of a run and the film strip of a video."""

import html.parser
import json
import re
import tracemalloc

import matplotlib.image
import numpy as np
import pytest

from cf_jax import figures, report
from cf_jax.runtime import telemetry
from tests.conftest import load_config

NASTY = '</pre><script>alert("x")</script> & <img src=http://x.example/a.png>'


class Page(html.parser.HTMLParser):
  """Tags, attributes and text of a page; checks that tags are balanced."""

  VOID = ("meta", "img", "br")

  def __init__(self, text):
    super().__init__()
    self.tags, self.links, self.words, self._open = [], [], [], []
    self.feed(text)
    self.close()
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [value for key, value in attrs if key in ("src", "href")]
    if tag not in self.VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)


def strip(path, *, count=4, shown=4, size=(8, 12), **settings):
  frames = np.zeros((count, *size, 3), np.uint8)
  time_s = np.arange(16) / 4
  defaults = {
    "uniform_frames": frames,
    "uniform_s": np.linspace(0.5, 3.5, count),
    "tad_frames": frames[:shown],
    "tad_s": np.linspace(0.2, 3.0, shown),
    "score": np.sin(time_s) ** 2,
    "time_s": time_s,
    "apex": np.arange(16) == 6,
  }
  return figures.film_strip(path, **(defaults | settings))


@pytest.fixture
def workdir(tmp_path):
  with telemetry.MetricWriter(tmp_path, resume={}) as writer:
    for step in (1, 2, 3):
      writer.write(
        step,
        "sft",
        {
          "loss": 1.0 / step,
          "dev_accuracy": 0.2 * step,
          "time/update_s": 0.1,
        },
      )
    for step in (1, 2):
      writer.write(
        step,
        "rl",
        {
          "reward/mean": 0.5,
          "reward/accuracy": 0.5,
          "bonus/temporal": 0.1,
          "kl": None,
          "time/decode_s": 0.4,
          "time/video_s": 0.5,
          "time/update_s": 0.2,
          "rate/decode_per_s": 1234.0,
          "rate/video_per_s": 77.0,
          "work/decode": 0.375,
          "work/update": 0.625,
          "mfu/decode": 0.031,
          "mfu/step": 0.123,
          "time/step_s": 0.64,
        },
      )
      writer.write_rollouts(
        step,
        "rl",
        [
          {
            "sample_id": "v",
            "task": "order",
            "prompt": NASTY,
            "completion": f"{NASTY} {good}",
            "answer": 0,
            "rewards": {"accuracy": good, "total": good},
            "keyframe_s": [0.5, 2.25],
          }
          for good in (0.0, 1.0)
        ],
      )
  rows = [
    {
      "stage": stage,
      "view": view,
      "task": task,
      "accuracy": 0.5,
      "count": 40,
      "low": 0.35,
      "high": 0.65,
    }
    for stage in ("sft", "rl")
    for view in ("keyframes", "uniform", "<new>")
    for task in ("needle", "all")
  ]
  telemetry.write_json(
    tmp_path / "results.json",
    {
      "chance": {"needle": 0.25, "all": 0.3},
      "evaluations": rows,
      "probes": {
        "blind_policy": {
          "accuracy": 0.26,
          "chance": 0.25,
          "half_interval": 0.05,
        },
        "pixel_change": {
          "accuracy": 0.6,
          "chance": 0.25,
          "half_interval": 0.05,
        },
      },
      "timing": {"this_start_s": 75.0},
      "goals": [{"name": "gain", "value": 12.0, "goal": 10.0, "met": True}],
    },
  )
  telemetry.write_manifest(
    tmp_path,
    config={"name": "tiny", "tad": {"num_keyframes": 8}},
    seed=7,
    data_hash="3f9a",
    argv=["main"],
    peak=telemetry.Peak(5e10, "by hand"),
  )
  strip(tmp_path / "film_strips" / "v.png", about={"question": NASTY})
  return tmp_path


def test_the_page_is_one_file_without_scripts_or_links_outside(workdir):
  path = report.write_report(workdir)
  page = Page(path.read_text("utf-8"))
  assert path == workdir / "report.html"
  assert "script" not in page.tags and "link" not in page.tags
  assert page.links and all(link.startswith("data:") for link in page.links)
  assert "url(" not in path.read_text("utf-8")


def test_text_of_the_run_is_escaped_and_shown_as_it_was(workdir):
  page = Page(report.write_report(workdir).read_text("utf-8"))
  words = "".join(page.words)
  assert words.count(NASTY) >= 4  # prompts, completions, the strip's question
  assert "<new>" in words


def test_the_page_shows_results_probes_times_and_settings(workdir):
  text = report.write_report(workdir).read_text("utf-8")
  words = " ".join(Page(text).words)
  for wanted in (
    "+12.0",
    "goal met",
    "50.0 → 50.0",
    "needle (n = 40)",
    "TAD keyframes",
    "blind policy",
    "at chance",
    "not at chance",
    "0.400 s",
    "beside the rest",
    "1,234 tokens",
    "77 frames",
    "62.5%",  # of the seconds, 0.4 of 0.64; of the operations
    "31.2%",  # 0.2 of 0.64
    "37.5%",
    "3.1%",
    "12.3%",
    "0.05 TFLOP/s (by hand)",
    "1:15",
    "tad.num_keyframes",
    "3f9a",
    "keyframes at 0.5, 2.2 s",
    "answer: 0",
  ):
    assert wanted in words, wanted
  # Five curves, two tasks, the shares of KF-GRPO's phases.
  assert len(re.findall("image/svg", text)) == 8
  assert len(re.findall("image/png", text)) == 1


def test_the_same_run_gives_the_same_page(workdir):
  first = report.write_report(workdir).read_bytes()
  assert report.write_report(workdir).read_bytes() == first


@pytest.mark.parametrize(
  "left",
  [
    "metrics.jsonl",
    "results.json",
    "rollouts.jsonl",
    "manifest.json",
    "film_strips",
  ],
)
def test_a_part_of_a_run_has_a_page(workdir, left):
  for name in (
    "metrics.jsonl",
    "results.json",
    "rollouts.jsonl",
    "manifest.json",
  ):
    if name != left:
      (workdir / name).unlink()
  if left != "film_strips":
    (workdir / "film_strips" / "v.png").unlink()
  text = report.write_report(workdir).read_text("utf-8")
  assert len(Page(text).tags) > 10 and "<section>" in text


def test_an_empty_folder_is_an_error_that_names_the_setting(tmp_path):
  with pytest.raises(ValueError, match="--workdir"):
    report.write_report(tmp_path)


def test_a_long_completion_is_cut_and_says_so(workdir):
  with telemetry.MetricWriter(workdir, resume={}) as writer:
    writer.write_rollouts(1, "rl", [{"prompt": "p", "completion": "y" * 9000}])
  text = report.write_report(workdir).read_text("utf-8")
  assert "(7500 more characters)" in text and "y" * 1501 not in text


def test_running_mean_by_hand():
  mean = report._running_mean(np.array([0.0, 3.0, 6.0, 9.0]), 3)
  np.testing.assert_allclose(mean, [1.5, 3.0, 6.0, 7.5])
  np.testing.assert_allclose(
    report._running_mean(np.array([1.0, 2.0]), 1), [1.0, 2.0]
  )


def test_a_long_run_is_no_list_of_dicts():
  """8 bytes a number: what a report takes does not grow with its run as fast
  as the rows that it reads do."""
  names = [f"m{n}" for n in range(40)]

  def rows():
    for step in range(1, 3001):
      row = {name: step + n / 64 for n, name in enumerate(names)}
      yield {"stage": "rl", "step": step} | row

  def peak(read):
    tracemalloc.start()
    kept = read(rows())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most, kept

  least, columns = peak(report._columns)
  assert 2 * least < peak(list)[0]
  found = columns["rl"]
  assert found["m32"][2999] == 3000.5 and len(found) == 41


def test_columns_by_hand():
  rows = [
    {"stage": "sft", "step": 1, "loss": 2.0},
    {"stage": "rl", "step": 1, "kl": None, "x": 1},
    {"stage": "rl", "step": 2, "kl": 0.5},
  ]
  found = report._columns(iter(rows))
  assert list(found) == ["sft", "rl"] and found["sft"]["loss"].tolist() == [2]
  nan = float("nan")
  for name, value in {"step": [1, 2], "kl": [nan, 0.5], "x": [1, nan]}.items():
    np.testing.assert_array_equal(found["rl"][name], value)


def test_a_curve_keeps_its_peaks():
  x = np.arange(100_000.0)
  y = np.sin(x / 500)
  y[[34_567, 70_001]] = 9.0, -9.0
  few_x, few_y = report._outline(x, y)
  assert len(few_x) <= 2002 and {34_567, 70_001, 0, 99_999} <= {*few_x}
  assert (np.diff(few_x) > 0).all()
  np.testing.assert_array_equal(few_y, y[few_x.astype(int)])
  np.testing.assert_array_equal(report._outline(x[:9], y[:9])[1], y[:9])


def test_groups_of_rollouts_are_spread(tmp_path):
  path = tmp_path / "rollouts.jsonl"
  rows = [
    {"stage": "rl", "step": step, "prompt": f"p{step}", "completion": f"{n}"}
    for step in range(1, 12)
    for n in range(2)
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  groups = report._spread_groups(path, 3)
  assert [key[1] for key in groups] == [1, 6, 11]
  assert [row["completion"] for row in groups["rl", 6, None, "p6"]] == [
    "0",
    "1",
  ]


def test_film_strip_marks_frames_of_events(tmp_path):
  amber = np.array([0xE8, 0xA3, 0x3D]) / 255

  def count(name, events):
    path = strip(tmp_path / name, events=events)
    picture = matplotlib.image.imread(path)[..., :3]
    return int((np.abs(picture - amber).max(-1) < 0.02).sum())

  none = count("none.png", ())
  assert none == 0
  assert count("one.png", [(0.4, 0.6, "disc")]) > 500
  about = tmp_path / "about.png"
  strip(about, about={"answer": "B"})
  assert json.loads((tmp_path / "about.json").read_text()) == {"answer": "B"}


@pytest.mark.parametrize(
  "settings",
  [
    {"shown": 2},  # a video with fewer real frames than K
    {"count": 1, "shown": 1},
    {"size": (20, 8)},
    {"score": np.zeros(16), "apex": np.zeros(16, bool)},
  ],
)
def test_film_strip_draws_odd_videos(tmp_path, settings):
  assert strip(tmp_path / "a.png", **settings).stat().st_size > 5000


def test_keyframe_strip_has_a_row_for_every_eight(tmp_path):
  def draw(count, **settings):
    time_s = np.arange(16) / 4
    path = figures.keyframe_strip(
      tmp_path / f"{count}.png",
      frames=np.zeros((count, 8, 12, 3), np.uint8),
      frame_s=np.linspace(0.2, 3.0, count),
      score=np.sin(time_s) ** 2,
      time_s=time_s,
      apex=np.arange(16) == 6,
      **settings,
    )
    return matplotlib.image.imread(path)

  one, eight, nine, more = (draw(count) for count in (1, 8, 9, 17))
  row = nine.shape[0] - eight.shape[0]
  assert row > 50 and more.shape[0] - nine.shape[0] == pytest.approx(row, abs=2)
  assert one.shape[1] == eight.shape[1] == more.shape[1]
  # The pictures are black; so much of a page is.
  black = [(page[..., :3].max(-1) == 0).sum() for page in (eight, more)]
  assert black[1] / black[0] == pytest.approx(17 / 8, rel=0.1)
  with pytest.raises(ValueError, match="frames 2, frame_s 3"):
    figures.keyframe_strip(
      tmp_path / "a.png",
      frames=np.zeros((2, 8, 12, 3), np.uint8),
      frame_s=[0, 1, 2],
      score=[0],
      time_s=[0],
      apex=[False],
    )


def test_film_strip_refuses_unequal_lengths(tmp_path):
  with pytest.raises(ValueError, match="tad_frames 4, tad_s 3"):
    strip(tmp_path / "a.png", tad_s=[0.0, 1.0, 2.0])


@pytest.mark.parametrize(
  ("path", "arg", "method", "select"),
  [
    ("configs/kfgrpo_cpu.py", None, "KF-GRPO", "TAD"),
    ("configs/video_r1.py", "paper", "T-GRPO", "uniform"),
    ("configs/video_r1.py", "grpo", "GRPO", "uniform"),
    ("configs/videochat_r1.py", None, "GRPO", "uniform"),
    ("configs/temporal_r1.py", None, "GRPO", "uniform"),
    ("configs/viarl.py", None, "REINFORCE++", "uniform"),
    ("configs/tspo.py", None, "TSPO", "TAD"),
    ("configs/contrasts.py", "tad_placebo", "KF-GRPO (placebo)", "TAD"),
  ],
)
def test_recipes_are_called_by_their_names(path, arg, method, select):
  config = load_config(path, arg)
  for form in (config, json.loads(config.to_json())):  # as a manifest has it
    assert report.method_name(form) == method
    assert report.selector_name(form) == select


def test_a_run_without_settings_has_a_name():
  assert report.method_name({}) == "reinforcement"
