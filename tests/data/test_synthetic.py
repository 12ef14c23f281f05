"""The built-in set: its balance, its pictures, its files."""

import collections
import itertools
import json
import sys

import numpy as np
import pytest

from cf_jax.data import (
  records,
  synthetic,
  synthetic_specs,
  synthetic_tasks,
  synthetic_video,
  video,
)

COUNTS = dict(num_train=9, num_dev=3, num_test=3)


@pytest.fixture(scope="module")
def specs():
  return synthetic_specs.make_specs("train", 720, seed=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return synthetic.ensure(tmp_path_factory.mktemp("cache"), seed=3, **COUNTS)


def test_balanced_is_a_full_factorial_and_a_fair_rest():
  rows = synthetic_specs.balanced(2 * 12 + 5, (3, 4), np.random.default_rng(0))
  cells = collections.Counter(map(tuple, rows.tolist()))
  assert len(cells) == 12 and min(cells.values()) == 2
  for column, size in zip(rows.T, (3, 4)):
    count = np.bincount(column, minlength=size)
    assert count.max() - count.min() <= 1


@pytest.mark.parametrize("split", synthetic_specs.SPLITS)
@pytest.mark.parametrize(
  ("count", "num_colours"), [(720, 4), (100, 4), (96, 6)]
)
def test_letters_and_contents_are_balanced_per_task(split, count, num_colours):
  rows = synthetic_specs.make_specs(
    split, count, seed=2, num_colours=num_colours
  )
  tasks = collections.Counter(spec.task for spec in rows)
  assert max(tasks.values()) - min(tasks.values()) <= 1
  for task in synthetic_specs.BASIC:
    some = [spec for spec in rows if spec.task == task]
    letters = collections.Counter(spec.answer for spec in some)
    right = collections.Counter(_right(spec) for spec in some)
    for seen, num in (
      (letters, len(some[0].options)),
      (right, 3 if task == "count" else num_colours),
    ):
      assert len(seen) == num
      assert max(seen.values()) - min(seen.values()) <= 1


def _reasoning(spec):
  return synthetic_tasks.to_sample(spec, "").reasoning


def _right(spec):
  return spec.options[synthetic_tasks.LETTERS.index(spec.answer)]


def test_answers_follow_from_the_events(specs):
  for spec in specs:
    shapes = [
      event for event in spec.events if event.shape in synthetic_video.SHAPES
    ]
    colours = [event.colour for event in shapes]
    assert [spec.events[n] for n in spec.relevant] == shapes
    assert set(colours) <= set(list(synthetic_video.PALETTE)[:4])
    for event in spec.events:
      assert (event.colour == "") == (event.shape == synthetic_video.CUTAWAY)
    assert _reasoning(spec) == " ".join(colours)
    assert len(set(spec.options)) == len(spec.options)
    right = _right(spec)
    if spec.task == "needle":
      assert spec.question == "Which colour is the shape?"
      assert [o for o in spec.options if o in colours] == [right] == colours
      assert len(spec.options) == 4
    elif spec.task == "order":
      assert spec.question == "Which colour appears first?"
      assert len(set(colours)) == len(colours) == 2
      assert set(colours) <= set(spec.options) and len(spec.options) == 4
      assert min(spec.options, key=[*colours, *spec.options].index) == right
    else:
      assert spec.question == "How many shapes appear?"
      assert len(colours) == int(right)
      assert sorted(spec.options) == ["1", "2", "3"]


def test_the_number_of_events_is_the_same_in_every_video(specs):
  """So it does not tell the task, nor how many of them are shapes."""
  assert {len(spec.events) for spec in specs} == {3}
  shapes = collections.Counter(
    (spec.task, len(spec.relevant)) for spec in specs
  )
  assert shapes == {
    ("needle", 1): 240,
    ("order", 2): 240,
    ("count", 1): 80,
    ("count", 2): 80,
    ("count", 3): 80,
  }


def test_relevant_events_are_balanced(specs):
  for task, num in (("needle", 3), ("order", 3)):
    seen = collections.Counter(s.relevant for s in specs if s.task == task)
    assert len(seen) == num
    assert max(seen.values()) - min(seen.values()) <= 1
  seen = collections.Counter(s.relevant for s in specs if s.task == "count")
  assert len(seen) == 3 + 3 + 1 and seen[0, 1, 2] == 80
  for relevant in set(seen) - {(0, 1, 2)}:  # drawn: 80 / 3, give or take
    assert abs(seen[relevant] - 80 / 3) < 4 * (80 * 2 / 9) ** 0.5


def test_wrong_options_of_order_tell_nothing(specs):
  """The second colour, too, stands under every letter and is any colour."""
  some = [spec for spec in specs if spec.task == "order"]
  for first in list(synthetic_video.PALETTE)[:4]:
    second = collections.Counter(
      _reasoning(spec).split()[1]
      for spec in some
      if _reasoning(spec).split()[0] == first
    )
    assert len(second) == 3
    assert abs(np.array(list(second.values())) - 20).max() < 4 * 20**0.5
  place = collections.Counter(
    (spec.answer, spec.options.index(_reasoning(spec).split()[1]))
    for spec in some
  )
  assert len(place) == 4 * 3
  assert abs(np.array(list(place.values())) - 20).max() < 4 * 20**0.5


def test_times_keep_their_distances(specs):
  for spec in specs:
    for first, second in itertools.pairwise(spec.events):
      assert second.start - first.stop >= 10
    assert 1 <= len(spec.cuts) <= 2 and 1 <= len(spec.flickers) <= 4
    for event in spec.events:
      assert 4 <= event.stop - event.start <= 6
      assert event.start >= 6 and event.stop <= spec.num_frames - 6
      for cut in spec.cuts:
        assert cut <= event.start - 6 or cut >= event.stop + 6
      for flicker in spec.flickers:
        assert flicker < event.start - 2 or flicker > event.stop + 2
      low, high = np.array(event.centre_px) + np.array([[-1], [1]]) * (
        event.radius_px
      )
      assert low.min() >= 0 and high.max() < spec.size_px


def test_times_look_the_same_backwards(specs):
  """Mean times of events and cuts mirror each other about the middle."""
  middle = np.array(
    [[(e.start + e.stop) / 2 for e in spec.events] for spec in specs]
  )
  error = 5 * middle.std(axis=0) / len(specs) ** 0.5
  mirrored = specs[0].num_frames - middle[:, ::-1]
  assert np.all(abs(middle.mean(axis=0) - mirrored.mean(axis=0)) < error)
  cuts = np.array([c for spec in specs for c in spec.cuts])
  assert abs(cuts.mean() - 48) < 5 * cuts.std() / len(cuts) ** 0.5


def test_splits_differ_and_repeat():
  def make(split):
    return synthetic_specs.make_specs(split, 12, seed=0)

  assert make("train") == make("train")
  assert [s.events for s in make("train")] != [s.events for s in make("dev")]
  seeds = {
    spec.seed for split in synthetic_specs.SPLITS for spec in make(split)
  }
  assert len(seeds) == 36


def test_pictures(specs):
  spec = specs[0]
  pixel = synthetic_video.render(spec)
  assert pixel.shape == (96, 64, 64, 3) and pixel.dtype == np.uint8
  np.testing.assert_array_equal(pixel, synthetic_video.render(spec))
  change = abs(np.diff(pixel.astype(int), axis=0)).mean(axis=(1, 2, 3))
  sudden = {*spec.cuts, *spec.flickers, *(f + 1 for f in spec.flickers)}
  assert int(change.argmax()) + 1 in sudden


def test_pictures_of_shapes_and_of_cutaways(specs):
  """Against the same video whose events last no frame."""
  seen = collections.Counter()
  for spec in specs[:24]:
    pixel = synthetic_video.render(spec)
    bare = synthetic_video.render(
      spec._replace(events=tuple(e._replace(stop=e.start) for e in spec.events))
    )
    changed = np.any(pixel != bare, axis=3)
    inside = np.zeros(spec.num_frames, dtype=bool)
    for event in spec.events:
      seen[event.shape] += 1
      shown = slice(event.start, event.stop)
      inside[shown] = True
      if event.shape == synthetic_video.CUTAWAY:
        # All of the picture, and no shape: nothing flat in a shape's colour.
        assert np.all(changed[shown].mean(axis=(1, 2)) > 0.9)
        for frame in pixel[shown]:
          for name in synthetic_video.PALETTE:
            assert _flat_share(frame, _near(frame, name)) < 0.02
        continue
      for frame, mask in zip(pixel[shown], changed[shown]):
        assert 0.04 < np.mean(mask) < 0.4
        # Light scales all channels; the shape is its colour times that.
        assert np.mean(_near(frame, event.colour)) > 0.04
        assert np.all(_near(frame, event.colour)[mask])
        assert _flat_share(frame, mask) == np.mean(mask)
    assert not changed[~inside].any()
  assert set(seen) == {*synthetic_video.SHAPES, synthetic_video.CUTAWAY}


def _near(frame, name):
  """bool[H, W]: pixels of one colour of the palette under any light."""
  colour = np.array(synthetic_video.PALETTE[name])
  top = np.maximum(frame.max(axis=2, keepdims=True), 1)
  return abs(frame / top - colour / colour.max()).max(axis=2) < 0.15


def _flat_share(frame, where):
  """Share of the picture that has the commonest of the colours there."""
  _, count = np.unique(frame[where], axis=0, return_counts=True)
  return count.max(initial=0) / where.size


def test_largest_change_is_seldom_an_event(specs):
  edges = 0
  for spec in specs[:20]:
    change = abs(
      np.diff(synthetic_video.render(spec).astype(np.int16), axis=0)
    ).mean(axis=(1, 2, 3))
    at = int(change.argmax()) + 1
    edges += any(at in (event.start, event.stop) for event in spec.events)
  assert edges <= 4


def test_files_come_back_as_drawn(root):
  (spec,) = synthetic.load_specs(root, "test")[:1]
  (sample,) = synthetic.load(root, "test")[:1]
  info = video.probe(sample.video)
  assert info == video.VideoInfo(96, 8.0, 64, 64, 12.0)
  frames, time_s = video.read_frames(sample.video)
  np.testing.assert_allclose(time_s, np.arange(96) / 8, atol=1e-9)
  error = abs(frames.astype(int) - synthetic_video.render(spec)).mean()
  assert error < 6  # the codec's loss


def test_index_gives_back_specs_and_samples(root):
  drawn = synthetic_specs.make_specs("train", 9, seed=3)
  assert synthetic.load_specs(root, "train") == drawn
  samples = synthetic.load(root, "train")
  assert [sample.id for sample in samples] == [spec.id for spec in drawn]
  for sample, spec in zip(samples, drawn):
    assert isinstance(sample, records.Sample)
    assert (sample.question, sample.options, sample.answer) == (
      spec.question,
      spec.options,
      spec.answer,
    )
    assert sample.evidence[0][0] == sample.start_s
    assert sample.evidence[-1][1] == sample.end_s
    assert sample.start_s == spec.events[spec.relevant[0]].start / 8
  assert "tensorflow" not in sys.modules


def test_second_call_writes_nothing_and_settings_name_the_folder(root):
  before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
  cache = root.parents[1]
  assert synthetic.ensure(cache, seed=3, **COUNTS) == root
  assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
  settings = json.loads((root / "settings.json").read_text())
  assert (
    settings["seed"] == 3 and settings["version"] == synthetic_specs.VERSION
  )


def test_interrupted_writing_goes_on(tmp_path, monkeypatch):
  write, written = synthetic_video.write_video, []

  def stop_after_four(spec, path):
    if len(written) == 4:
      raise KeyboardInterrupt
    written.append(spec.id)
    write(spec, path)

  monkeypatch.setattr(synthetic_video, "write_video", stop_after_four)
  with pytest.raises(KeyboardInterrupt):
    synthetic.ensure(tmp_path, seed=0, **COUNTS)
  (root,) = (tmp_path / "synthetic").iterdir()
  assert not (root / "DONE").exists()
  first = [path.name for path in root.glob("videos/*/*.mp4")]
  assert sorted(first) == sorted(f"{name}.mp4" for name in written)
  left = root / "videos" / "train" / ".train-000009.123.mp4"
  left.touch()  # by a writer that was killed

  def remember(spec, path):
    written.append(spec.id)
    write(spec, path)

  monkeypatch.setattr(synthetic_video, "write_video", remember)
  assert synthetic.ensure(tmp_path, seed=0, **COUNTS) == root
  assert len(written) == len(set(written)) == 15
  assert not left.exists()
  assert len(synthetic.load(root, "train")) == 9


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(num_dev=0), "data.synthetic.num_dev"),
    (dict(tasks=("needle", "hay")), "data.synthetic.tasks"),
    (dict(num_frames=20), "data.synthetic.num_frames"),
    (dict(num_frames=36, num_events=4, num_colours=8), "do not fit"),
    (dict(size_px=31), "data.synthetic.size_px"),
    (dict(fps=0.0), "data.synthetic.fps"),
    (dict(num_events=5), "data.synthetic.num_events"),
    (dict(num_colours=9), "data.synthetic.num_colours"),
  ],
)
def test_bad_settings_name_themselves(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    synthetic.ensure(tmp_path, **(COUNTS | dict(seed=0) | change))


def test_one_task_and_more_colours():
  rows = synthetic_specs.make_specs(
    "test",
    40,
    seed=0,
    tasks=("count",),
    num_events=2,
    num_colours=8,
    num_frames=64,
    size_px=48,
  )
  assert {spec.task for spec in rows} == {"count"}
  assert {spec.options for spec in rows} == {("1", "2"), ("2", "1")}
  assert synthetic_video.render(rows[0]).shape == (64, 48, 48, 3)
