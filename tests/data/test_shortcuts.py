"""The probes stay at chance on the built-in set, and see a planted clue."""

import numpy as np
import pytest

from cf_jax.data import (
  shortcuts,
  synthetic,
  synthetic_specs,
  synthetic_tasks,
  synthetic_video,
  video,
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
  root = synthetic.ensure(
    tmp_path_factory.mktemp("cache"),
    seed=11,
    num_train=1,
    num_dev=1,
    num_test=150,
  )
  samples = synthetic.load(root, "test")
  frames = np.stack(
    [video.read_frames(sample.video, None, (32, 32))[0] for sample in samples]
  )
  return shortcuts.specs_of(samples), frames


def test_every_probe_is_at_chance(videos):
  specs, frames = videos
  assert [spec.id for spec in specs[:2]] == ["test-000000", "test-000001"]
  found = shortcuts.shortcut_probes(specs, frames, np.random.default_rng(0))
  assert len(found) == 3 + 4 * 3
  for name, probe in found.items():
    assert abs(probe.accuracy - probe.chance) < probe.half_interval, name
    assert 0 < probe.half_interval < 0.35


def test_a_ramp_of_light_is_found(videos):
  specs, frames = videos
  ramp = np.linspace(0.7, 1.0, frames.shape[1])[:, None, None, None]
  frames = (frames * ramp).astype(np.uint8)
  found = shortcuts.shortcut_probes(specs, frames, np.random.default_rng(0))
  for name in (
    "which of two frames came first",
    "a frame's half of the video",
  ):
    probe = found[name]
    assert probe.accuracy - probe.chance > probe.half_interval, name


def test_a_clock_in_a_corner_is_found(videos):
  specs, frames = videos
  frames = frames.copy()
  clock = np.linspace(0, 255, frames.shape[1]).astype(np.uint8)
  frames[:, :, :4, :4] = clock[:, None, None, None]
  found = shortcuts.shortcut_probes(specs, frames, np.random.default_rng(0))
  for name in (
    "which of two frames came first",
    "which of two events came first",
    "a frame's half of the video",
  ):
    probe = found[name]
    assert probe.accuracy - probe.chance > probe.half_interval, name


def test_a_favourite_colour_is_found(videos):
  specs, frames = videos
  changed = [
    spec._replace(answer="ABCD"[spec.options.index("red")])
    if "red" in spec.options
    else spec
    for spec in specs
  ]
  found = shortcuts.shortcut_probes(changed, frames, np.random.default_rng(0))
  for task in ("needle", "order"):
    probe = found[f"{task}: question and options"]
    assert probe.accuracy - probe.chance > probe.half_interval, task


def test_a_telling_middle_frame_is_found():
  specs = synthetic_specs.make_specs("test", 240, seed=0, tasks=("needle",))
  frames = np.zeros((240, 96, 16, 16, 3), np.uint8)
  found = shortcuts.shortcut_probes(specs, frames, np.random.default_rng(0))
  probe = found["needle: one middle frame"]
  assert abs(probe.accuracy - probe.chance) < probe.half_interval
  for spec, pixel in zip(specs, frames):
    right = spec.options[synthetic_tasks.LETTERS.index(spec.answer)]
    pixel[48, :4, :4] = synthetic_video.PALETTE[right]
  found = shortcuts.shortcut_probes(specs, frames, np.random.default_rng(0))
  probe = found["needle: one middle frame"]
  assert probe.accuracy - probe.chance > probe.half_interval


def test_a_favourite_letter_and_telling_times_are_found(videos):
  specs, frames = videos
  changed = [
    spec._replace(answer="B" if n % 10 == 0 else "A")
    for n, spec in enumerate(specs)
  ]
  found = shortcuts.shortcut_probes(changed, frames, np.random.default_rng(0))
  probe = found["needle: letter alone"]
  assert probe.accuracy - probe.chance > probe.half_interval
  changed = [
    spec._replace(flickers=(20 if spec.answer == "A" else 80,))
    for spec in specs
  ]
  found = shortcuts.shortcut_probes(changed, frames, np.random.default_rng(0))
  probe = found["order: times alone"]
  assert probe.accuracy - probe.chance > probe.half_interval


def test_too_few_videos(videos):
  specs, frames = videos
  with pytest.raises(ValueError, match="report.probe_videos"):
    shortcuts.shortcut_probes(specs[:20], frames[:20], np.random.default_rng(0))


def test_open_questions():
  """At chance as they are, above it with a planted clue."""
  specs = synthetic_specs.make_specs(
    "test",
    192,
    seed=0,
    tasks=("grounding", "numerical", "free_form", "events"),
  )
  frames = np.zeros((192, 96, 16, 16, 3), np.uint8)
  found = shortcuts.shortcut_probes(specs, frames, np.random.default_rng(0))
  names = [name for name in found if ": " in name]
  assert len(names) == 4 + 4  # grounding has questions, the others times
  for name in names:
    probe = found[name]
    assert abs(probe.accuracy - probe.chance) <= probe.half_interval, name
  changed = []
  for spec in specs:
    if spec.task == "grounding":  # which two seconds it starts in
      start_s = float(spec.answer.split()[0])
      spec = spec._replace(question=f"part {start_s // 2}")
    if spec.task == "numerical":
      spec = spec._replace(
        cuts=(20 if spec.answer == "1" else 80,),
        flickers=(20 if spec.answer == "2" else 80,),
      )
    changed.append(spec)
  found = shortcuts.shortcut_probes(changed, frames, np.random.default_rng(0))
  for name in ("grounding: question", "numerical: times alone"):
    probe = found[name]
    assert probe.accuracy - probe.chance > probe.half_interval, name


def test_one_long_event():
  """No pair of events, and no middle frame without one: no such probe."""
  specs = synthetic_specs.make_specs("test", 16, seed=0, tasks=("tracking",))
  frames = np.zeros((16, 96, 16, 16, 3), np.uint8)
  found = shortcuts.shortcut_probes(specs, frames, np.random.default_rng(0))
  assert list(found) == [
    "which of two frames came first",
    "a frame's half of the video",
  ]
