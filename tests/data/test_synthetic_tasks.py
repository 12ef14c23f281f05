"""Every task of the built-in set: what is drawn, asked, and worded."""

import collections
import itertools
import math

import numpy as np
import pytest

from cf_jax.data import (
  answers,
  records,
  synthetic,
  synthetic_specs,
  synthetic_tasks,
  synthetic_times,
  synthetic_video,
  video,
)
from cf_jax.data.synthetic_video import Event

ALL = tuple(synthetic_tasks.TASKS)
NEW = tuple(task for task in ALL if task not in synthetic_specs.BASIC)


@pytest.fixture(scope="module")
def by_task():
  specs = synthetic_specs.make_specs("train", 96 * len(ALL), seed=1, tasks=ALL)
  found = collections.defaultdict(list)
  for spec in specs:
    found[spec.task].append((spec, synthetic_tasks.to_sample(spec, "a.mp4")))
  assert {len(rows) for rows in found.values()} == {96}
  return found


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
  """The folder of a small set of all tasks."""
  return synthetic.ensure(
    tmp_path_factory.mktemp("cache"),
    seed=3,
    num_train=2 * len(ALL),
    num_dev=1,
    num_test=1,
    tasks=ALL,
  )


def _even(values, levels):
  count = collections.Counter(values)
  assert len(count) == levels, count
  assert max(count.values()) - min(count.values()) <= 1, count


def _shapes(spec):
  return [e for e in spec.events if e.shape in synthetic_video.SHAPES]


def test_the_basic_tasks_are_what_they_were():
  """Drawn before there were others; published results rest on them."""
  specs = synthetic_specs.make_specs("train", 3, seed=0)
  assert [spec.task for spec in specs] == ["needle", "order", "count"]
  spec = specs[1]
  assert spec.options == ("yellow", "red", "blue", "green")
  assert spec.answer == "C" and spec.relevant == (1, 2)
  assert spec.events == (
    Event(16, 22, "", "cutaway", (21, 38), 18),
    Event(46, 50, "blue", "disc", (22, 39), 16),
    Event(61, 65, "green", "square", (38, 39), 15),
  )
  assert (spec.cuts, spec.flickers) == ((79,), (9, 36, 84))


def test_every_sample_can_be_judged(by_task):
  kinds = {}
  for task, rows in by_task.items():
    for spec, sample in rows:
      answers.check_sample(sample)
      assert sample.task == task and sample.source == "synthetic"
      assert (sample.start_s, sample.end_s) == (
        sample.evidence[0][0],
        sample.evidence[-1][1],
      )
      assert list(sample.evidence) == sorted(sample.evidence)
      assert 0 <= sample.start_s < sample.end_s <= spec.num_frames / spec.fps
      assert sample.reasoning
    (kinds[task],) = {sample.kind for _, sample in rows}
  assert set(kinds.values()) == {
    "multiple_choice",
    "grounded_qa",
    "interval",
    "regression",
    "numerical",
    "free_form",
    "caption",
    "tracking",
  }
  assert set(kinds.values()) < set(records.Kind.__args__)


@pytest.mark.parametrize(
  "task", ["order_two", "grounded_qa", "long", "ramp", "many_cuts"]
)
def test_letters_and_colours_are_balanced(by_task, task):
  rows = by_task[task]
  letters = 2 if task == "order_two" else 4
  _even([sample.answer for _, sample in rows], letters)
  _even([spec.events[spec.relevant[0]].colour for spec, _ in rows], 4)
  for spec, sample in rows:
    right = sample.options["ABCD".index(sample.answer)]
    assert right == spec.events[spec.relevant[0]].colour
    assert len(set(sample.options)) == len(sample.options) == letters


def test_both_options_of_order_two_appear(by_task):
  for spec, sample in by_task["order_two"]:
    colours = [event.colour for event in _shapes(spec)]
    assert sorted(sample.options) == sorted(colours)
    assert sample.reasoning == " ".join(colours)
  pairs = [sample.reasoning for _, sample in by_task["order_two"]]
  count = collections.Counter(pairs)
  assert len(count) == 12 and min(count.values()) >= 6
  _even([spec.relevant for spec, _ in by_task["order_two"]], 3)


@pytest.mark.parametrize(
  ("task", "share"), [("order_ways", 3 / 5), ("order_skewed", 17 / 20)]
)
def test_short_cuts_are_there_to_train_on_alone(task, share):
  def draw(split):
    specs = synthetic_specs.make_specs(split, 720, seed=1, tasks=(task,))
    return specs, [synthetic_tasks.to_sample(spec, "") for spec in specs]

  specs, samples = draw("train")
  assert np.mean([s.answer == "A" for s in samples]) == pytest.approx(share)
  for spec, sample in zip(specs, samples, strict=True):
    colours = [event.colour for event in _shapes(spec)]
    assert sample.options["AB".index(sample.answer)] == colours[0]
    if sample.reasoning != " ".join(colours):
      assert task == "order_ways"
      assert sample.reasoning == sample.answer == "A"
  if task == "order_ways":
    by_colour = [s.answer for s in samples if s.reasoning != "A"]
    assert abs(np.mean([a == "A" for a in by_colour]) - 0.5) < 0.05
  for split in ("dev", "test"):
    _even([sample.answer for sample in draw(split)[1]], 2)


def test_grounding_names_one_of_several_shapes(by_task):
  for spec, sample in by_task["grounding"]:
    colours = [event.colour for event in spec.events]
    assert len(set(colours)) == len(colours) == 3
    (n,) = spec.relevant
    assert sample.question == f"When does the {colours[n]} shape appear?"
    start_s, end_s = sample.evidence[0]
    assert sample.answer == f"{start_s:g} to {end_s:g}"
    assert end_s - start_s in (1, 1.5) and (2 * start_s) % 1 == 0
    colour, cited = sample.reasoning.split()
    assert colour == colours[n]
    assert start_s <= float(cited.rstrip("s")) <= end_s
  _even([(s.relevant, q.question) for s, q in by_task["grounding"]], 12)


def test_grounded_questions_have_one_or_two_intervals(by_task):
  rows = by_task["grounded_qa"]
  _even([spec.relevant for spec, _ in rows], 6)
  for spec, sample in rows:
    shapes = _shapes(spec)
    assert len({event.colour for event in shapes}) == 1
    assert sample.evidence == tuple((e.start / 8, e.stop / 8) for e in shapes)
    assert len(answers.cited_times(sample.reasoning)) == len(shapes)


def test_seconds_are_those_between_two_starts(by_task):
  for spec, sample in by_task["regression"]:
    first, second = (spec.events[n] for n in spec.relevant)
    assert len({event.colour for event in spec.events}) == 3
    assert float(sample.answer) == (second.start - first.start) / 8 > 0
    assert sample.question == (
      f"How many seconds after the {first.colour} shape does the"
      f" {second.colour} shape appear?"
    )
    assert answers.cited_times(sample.reasoning) == (
      first.start / 8,
      second.start / 8,
    )


def test_open_answers_follow_from_the_events(by_task):
  _even([sample.answer for _, sample in by_task["numerical"]], 3)
  _even([sample.answer for _, sample in by_task["free_form"]], 16)
  _even([sample.answer for _, sample in by_task["events"]], 24)
  for spec, sample in by_task["numerical"]:
    assert int(sample.answer) == len(_shapes(spec)) and not sample.options
  for spec, sample in by_task["free_form"]:
    (event,) = _shapes(spec)
    assert sample.answer == f"{event.colour} {event.shape}"
  for spec, sample in by_task["events"]:
    assert sample.answer.split() == [event.colour for event in spec.events]
    times = [int(time) for time in answers.cited_times(sample.reasoning)]
    assert times == sorted(times)
  for spec, sample in by_task["caption"]:
    shown = [f"a {event.colour} {event.shape}" for event in spec.events]
    assert sample.events == tuple(f"{text} appears" for text in shown)
    assert sample.answer == f"{shown[0]}, then {shown[1]}, then {shown[2]}"


def test_controls_of_the_selection(by_task):
  for spec, _ in by_task["many_cuts"]:
    assert len(spec.cuts) == 24 and len(spec.events) == 1
    assert min(np.diff((0, *spec.cuts, 96))) >= 3
  for spec, _ in by_task["long"]:
    (event,) = _shapes(spec)
    assert event.stop - event.start == 32 and not event.fades
    assert len(spec.events) == 3
  for spec, sample in by_task["ramp"]:
    (event,) = _shapes(spec)
    share = synthetic_video.opacity(event)
    np.testing.assert_allclose(share, share[::-1])
    assert share.max() > 0.99 and np.all(np.diff(share[:16]) > 0)
    assert abs(np.diff(share, prepend=0, append=0)).max() < 0.1
    # Half of it is there in the half of the time that is the evidence.
    seen = event.start + np.flatnonzero(share > 0.5)
    assert sample.evidence == ((seen[0] / 8, (seen[-1] + 1) / 8),)


@pytest.mark.parametrize("task", NEW)
def test_nothing_overlaps_and_all_shapes_are_inside(by_task, task):
  for spec, _ in by_task[task]:
    taken = np.zeros(spec.num_frames, int)
    for event in spec.events:
      taken[event.start : event.stop] += 1
      reach = synthetic_video.extent_px(event.shape, event.radius_px)
      for centre in event.path_px:
        assert reach <= min(centre) and max(centre) <= 63 - reach
    assert taken.max() == 1
    if task != "tracking":
      assert not taken[list(spec.flickers)].any()
      for cut in spec.cuts:
        assert not taken[cut - 1 : cut + 1].any()


@pytest.mark.parametrize("task", NEW)
def test_times_look_the_same_backwards(by_task, task):
  rows = [spec for spec, _ in by_task[task]]
  middle = np.array(
    [[(e.start + e.stop) / 2 for e in spec.events] for spec in rows]
  )
  error = 5 * middle.std(axis=0) / len(rows) ** 0.5 + 1e-9
  mirrored = 96 - middle[:, ::-1]
  assert np.all(abs(middle.mean(axis=0) - mirrored.mean(axis=0)) < error)


def test_a_wandering_shape_is_everywhere_alike(by_task):
  """Uniform between the edges, at the start as at the end."""
  place = []
  for spec, _ in by_task["tracking"]:
    (event,) = spec.events
    reach = synthetic_video.extent_px(event.shape, event.radius_px)
    path = np.array(event.path_px)
    assert path.shape == (96, 2) and abs(np.diff(path, axis=0)).max() <= 4
    place.append((path - reach) / (63 - 2 * reach))
  place = np.array(place)
  for moment in (0, 40, 95):
    for axis in range(2):
      at = place[:, moment, axis]
      assert abs(at.mean() - 0.5) < 5 * 12**-0.5 / 96**0.5
      assert abs(at.var() - 1 / 12) < 0.03


def test_every_arrangement_is_equally_likely():
  """Against all ways to place two events and a cut, counted one by one."""

  def possible():
    for a, b, c in itertools.product(range(12), repeat=3):
      items = sorted([(a, a + 2), (b, b + 3), (c, c)])
      edges = [(0, 0), *items, (11, 11)]
      if a < b and all(
        later[0] - earlier[1] >= 1
        for earlier, later in itertools.pairwise(edges)
      ):
        yield a, b, c

  expected = set(possible())
  rng = np.random.default_rng(0)
  seen = collections.Counter()
  for _ in range(60 * len(expected)):
    start, stop, cut = synthetic_times.arrange(
      rng, lengths=(2, 3), num_cuts=1, num_frames=11, gap=1
    )
    assert (stop - start).tolist() == [2, 3]
    seen[*start.tolist(), *cut.tolist()] += 1
  assert set(seen) == expected and len(expected) == 3 * math.comb(5, 3)
  assert max(abs(n - 60) for n in seen.values()) < 5 * 60**0.5
  with pytest.raises(ValueError, match="data.synthetic.num_frames"):
    synthetic_times.arrange(
      rng, lengths=(2, 3), num_cuts=1, num_frames=8, gap=1
    )


@pytest.mark.parametrize("task", ["tracking", "ramp", "long", "grounding"])
def test_pictures_show_what_the_specification_says(by_task, task):
  """Against the same video without its shapes."""
  for spec, sample in by_task[task][:3]:
    pixel = synthetic_video.render(spec).astype(int)
    gone = tuple(
      e if e.shape == synthetic_video.CUTAWAY else e._replace(stop=e.start)
      for e in spec.events
    )
    bare = synthetic_video.render(spec._replace(events=gone))
    changed = abs(pixel - bare).max(axis=3) > 8
    expected = np.zeros(spec.num_frames, bool)
    for event in _shapes(spec):
      # Within the first and last percents of opacity nothing need show.
      expected[event.start : event.stop] = synthetic_video.opacity(event) > 0.25
    seen = changed.any(axis=(1, 2))
    assert np.all(seen[expected])
    for n in spec.relevant:
      colour = np.array(synthetic_video.PALETTE[spec.events[n].colour])
      start, end = (int(8 * t) for t in spec.evidence[spec.relevant.index(n)])
      for frame in range(start, end):
        assert seen[frame]
        if task == "grounding":
          shown = np.median(pixel[frame][changed[frame]], axis=0)
          assert np.argmax(shown) == np.argmax(colour)
    if task == "tracking":
      for k, box in enumerate(sample.boxes):
        row, column = np.nonzero(changed[12 * k + 6])
        drawn = (column.min(), row.min(), column.max() + 1, row.max() + 1)
        np.testing.assert_allclose(box, np.array(drawn) / 64, atol=0.018)


def test_a_mixed_set_comes_back_from_disk(mixed):
  drawn = synthetic_specs.make_specs("train", 2 * len(ALL), seed=3, tasks=ALL)
  assert synthetic.load_specs(mixed, "train") == drawn
  samples = synthetic.load(mixed, "train")
  assert {sample.task for sample in samples} == set(ALL)
  for sample, spec in zip(samples, drawn):
    assert sample == synthetic_tasks.to_sample(spec, sample.video)


def test_files_show_the_boxes(mixed):
  """The moving shape's colour, found in decoded frames, lies in its boxes."""
  for sample, spec in zip(
    synthetic.load(mixed, "train"), synthetic.load_specs(mixed, "train")
  ):
    if sample.task != "tracking":
      continue
    frames, time_s = video.read_frames(sample.video)
    assert len(frames) == 96 and time_s[-1] == pytest.approx(95 / 8)
    assert abs(frames.astype(int) - synthetic_video.render(spec)).mean() < 6
    (event,) = spec.events
    colour = np.array(synthetic_video.PALETTE[event.colour], float)
    for k, (x0, y0, x1, y1) in enumerate(sample.boxes):
      frame = frames[12 * k + 6].astype(float)
      frame -= frame.min(axis=2, keepdims=True)
      direction = (colour - colour.min()) / np.linalg.norm(
        colour - colour.min()
      )
      strength = frame @ direction
      row, column = np.nonzero(strength > 0.6 * strength.max())
      assert x0 - 0.04 < np.mean(column) / 64 < x1 + 0.04
      centre = np.array([np.mean(column), np.mean(row)]) / 64
      np.testing.assert_allclose(
        centre, [(x0 + x1) / 2, (y0 + y1) / 2], atol=0.06
      )


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(num_frames=99), "multiple of 4 .*data.synthetic.num_frames"),
    (dict(num_frames=36, num_events=4), "do not fit"),
  ],
)
def test_bad_settings_of_seconds_name_themselves(settings, message):
  with pytest.raises(ValueError, match=message):
    synthetic_specs.make_specs(
      "train", 8, seed=0, tasks=("grounding",), **settings
    )


def test_other_sizes():
  """Two to four events, more colours, shorter and faster videos."""
  for settings in (
    dict(num_events=2, num_frames=64),
    dict(num_events=4, num_colours=8, fps=12.0, num_frames=120),
    dict(num_frames=64, size_px=32),
  ):
    specs = synthetic_specs.make_specs(
      "dev", 2 * len(ALL), seed=0, tasks=ALL, **settings
    )
    for spec in specs:
      answers.check_sample(synthetic_tasks.to_sample(spec, ""))
