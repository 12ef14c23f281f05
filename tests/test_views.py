"""Views of real files: which picture stands in which slot, under which words.

Axes as in `cf_jax.views`.
"""

import jax
import numpy as np
import pytest
from PIL import Image

from cf_jax import policy, selectors, tad, views
from cf_jax.data import patches, pipeline, prompts, records
from cf_jax.models import rope, vlm
from cf_jax.programs import experiment as experiment_lib
from tests.conftest import init_params, load_config, shrink

SCAN = dict(scan_frames=64, scan_size_px=(32, 32))
ALL = views.ARMS


@pytest.fixture(scope="module")
def experiment(cache_dir, tmp_path_factory):
  config = shrink(load_config("configs/kfgrpo_cpu.py", "smoke"), cache_dir)
  config.contrast.num_shuffles = 2
  return experiment_lib.build(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def batch(experiment):
  return pipeline.collate(experiment.samples["test"][:4], np.arange(4), **SCAN)


@pytest.fixture(scope="module")
def prepared(experiment, batch):
  return experiment.make_views(batch, ALL)


def _equal_prompts(left, right):
  return all(
    np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right))
  )


def test_shapes(experiment, prepared):
  assert set(prepared.view) == {*ALL, "shuffled_1"}
  assert prepared.frames.shape == (4, 9, 28, 56, 3)
  pixel = experiment.make_views.patches(prepared.frames)
  assert pixel.shape == (4, 9, 8, 3 * 2 * 14 * 14)
  assert pixel.dtype == np.float32
  assert experiment.make_views.merged_grid == (1, 2)
  assert np.all(prepared.frames[:, 8] == 128)  # the blank
  for view in prepared.view.values():
    assert view.frame.shape == (4, 4) and view.frame.dtype == np.int32
    assert view.prompt.token.shape == (4, 96)
    assert view.frame.min() >= 0 and view.frame.max() <= 8


def test_a_video_is_scored_once(experiment, batch, prepared, monkeypatch):
  scored = []
  select = experiment.make_views._select

  def remember(*arrays):
    scored.append(arrays)
    return select(*arrays)

  monkeypatch.setattr(experiment.make_views, "_select", remember)
  turned = pipeline.collate(batch.samples[::-1], np.arange(4), **SCAN)
  again = experiment.make_views(turned, ("keyframes",))
  assert not scored
  for old, new in zip(
    jax.tree.leaves((prepared.keyframes, prepared.frames[:, :8])),
    jax.tree.leaves((again.keyframes, again.frames[:, :8])),
    strict=True,
  ):
    np.testing.assert_array_equal(old[::-1], new)
  # Cut to fewer frames it is another video.
  mask = batch.scan_mask & (np.arange(64) < 40)
  experiment.make_views(batch._replace(scan_mask=mask), ("keyframes",))
  assert len(scored) == 1


def test_frames_are_those_of_the_keyframes(experiment, batch, prepared):
  keyframes = prepared.keyframes
  assert keyframes.mask.all() and prepared.frame_mask.all()
  rows = np.arange(4)[:, None]
  number = batch.frame_index[rows, keyframes.index]
  reader = pipeline.FrameReader((28, 56), cache_mib=0, num_threads=1)
  np.testing.assert_array_equal(
    prepared.frames[:, :4], reader.read(batch.samples, number)
  )
  np.testing.assert_allclose(
    prepared.frame_time_s[:, :4], batch.scan_time_s[rows, keyframes.index]
  )
  assert np.all(np.diff(prepared.frame_time_s[:, :4]) > 0)
  assert np.all(np.diff(prepared.frame_time_s[:, 4:]) > 0)


def test_ordered_uniform_and_reversed(prepared):
  view = prepared.view
  assert np.all(view["keyframes"].frame == [0, 1, 2, 3])
  assert np.all(view["uniform"].frame == [4, 5, 6, 7])
  assert np.all(view["reversed"].frame == [3, 2, 1, 0])


def test_the_words_of_a_prompt_are_the_times_of_its_frames(
  experiment, batch, prepared
):
  for arm, first in (("keyframes", 0), ("uniform", 4)):
    row = prompts.build_prompt(
      experiment.tokenizer,
      batch.samples[2].question,
      batch.samples[2].options,
      frame_time_s=prepared.frame_time_s[2, first : first + 4],
      grid=(1, 2),
      **experiment.config.prompt.build,
    )
    prompt = prepared.view[arm].prompt
    count = len(row.token)
    np.testing.assert_array_equal(prompt.token[2, :count], row.token)
    np.testing.assert_array_equal(prompt.position[2, :, :count], row.position)
    np.testing.assert_array_equal(prompt.visual[2, :count], row.visual)
    assert prompt.mask[2].sum() == count
    assert (row.visual >= 0).sum() == 4 * 2


@pytest.mark.parametrize("arm", ["shuffled", "shuffled_1", "reversed", "times"])
def test_only_the_pictures_move(prepared, arm):
  ordered, view = prepared.view["keyframes"], prepared.view[arm]
  assert _equal_prompts(view.prompt, ordered.prompt)
  assert np.all(np.any(view.frame != ordered.frame, axis=1))


def test_a_shuffled_view_is_a_permutation_and_not_the_identity(
  experiment, batch, prepared
):
  drawn = [prepared.view["shuffled"].frame, prepared.view["shuffled_1"].frame]
  drawn += [
    experiment.make_views(batch, ("shuffled",), draw=n).view["shuffled"].frame
    for n in range(1, 4)
  ]
  for frame in drawn:
    np.testing.assert_array_equal(np.sort(frame), [np.arange(4)] * 4)
    assert np.all(np.any(frame != np.arange(4), axis=1))
  # Permutations, steps and videos draw for themselves.
  assert len({frame.tobytes() for frame in drawn}) == len(drawn)
  assert len({row.tobytes() for frame in drawn for row in frame}) > 5
  again = experiment.make_views(batch, ("shuffled",)).view
  np.testing.assert_array_equal(again["shuffled"].frame, drawn[0])


def test_a_permutation_does_not_depend_on_the_batch(
  experiment, batch, prepared
):
  one = pipeline.collate(batch.samples[2:3], np.array([2]), **SCAN)
  alone = experiment.make_views(one, ("shuffled",)).view["shuffled"].frame
  np.testing.assert_array_equal(alone[0], prepared.view["shuffled"].frame[2])


@pytest.mark.parametrize("num_valid", [0, 1, 2, 3, 5])
def test_permute_frames(num_valid):
  for seed in range(30):
    order = views.permute_frames(num_valid, 5, np.random.default_rng(seed))
    assert order.dtype == np.int32
    assert sorted(order) == list(range(5))
    np.testing.assert_array_equal(order[num_valid:], np.arange(num_valid, 5))
    assert (num_valid < 2) == bool(np.all(order == np.arange(5)))


def test_blind_has_no_visual_slots(prepared):
  prompt = prepared.view["blind"].prompt
  assert np.all(prompt.visual == -1)
  shown = prepared.view["keyframes"].prompt
  assert np.all(prompt.mask.sum(1) < shown.mask.sum(1) - 8)


def test_single_shows_the_middle_uniform_frame(prepared):
  view = prepared.view["single"]
  assert np.all((view.prompt.visual >= 0).sum(1) == 2)
  assert view.prompt.visual.max() == 1  # slot 0
  assert np.all(view.frame == 6)


def test_times_show_blank_frames(experiment, prepared):
  pixel = experiment.make_views.patches(prepared.frames)
  view = prepared.view["times"]
  assert np.all(view.frame == 8)
  assert np.all((view.prompt.visual >= 0).sum(1) == 8)
  shown = np.asarray(policy.show(pixel, view.frame))
  assert len(np.unique(shown.reshape(4, 4, -1), axis=1)[0]) == 1


@pytest.fixture(scope="module")
def short(experiment, write_video, tmp_path_factory):
  """A video of three frames and one of a single frame."""
  rng = np.random.default_rng(0)
  folder = tmp_path_factory.mktemp("short")
  samples = []
  for count in (3, 1):
    path = folder / f"{count}.mp4"
    write_video(path, rng.integers(0, 255, (count, 64, 64, 3), np.uint8))
    samples.append(
      records.Sample(
        id=str(count),
        video=str(path),
        question="Which colour appears first?",
        options=("red", "green", "blue", "pink"),
        answer="A",
      )
    )
  batch = pipeline.collate(samples, np.arange(2), **SCAN)
  return experiment.make_views(batch, ALL)


def test_fewer_frames_than_slots(experiment, short):
  np.testing.assert_array_equal(short.keyframes.mask.sum(1), [3, 1])
  np.testing.assert_array_equal(short.can_shuffle, [True, False])
  assert not short.has_apex[1]
  mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
  np.testing.assert_array_equal(short.frame_mask, np.tile(mask, (1, 2)))
  np.testing.assert_array_equal(np.isnan(short.frame_time_s), ~short.frame_mask)
  for arm in ("keyframes", "uniform", "shuffled", "reversed", "times"):
    visual = short.view[arm].prompt.visual
    np.testing.assert_array_equal((visual >= 0).sum(1), [6, 2])
    np.testing.assert_array_equal(visual.max(axis=1), [5, 1])
  np.testing.assert_array_equal(
    short.view["reversed"].frame, [[2, 1, 0, 3], [0, 1, 2, 3]]
  )
  shuffled = short.view["shuffled"].frame
  assert shuffled[0, 3] == 3 and np.any(shuffled[0] != np.arange(4))
  np.testing.assert_array_equal(shuffled[1], np.arange(4))
  np.testing.assert_array_equal(short.view["single"].frame[:, 0], [5, 4])
  assert np.all(np.isfinite(experiment.make_views.patches(short.frames)))


def test_thin_scan():
  mask = np.arange(64) < np.array([64, 16, 1, 0])[:, None]

  def kept(fps, **how):
    thin = views.thin_scan(mask, (8.0, 2.0, 0.0, 0.0), fps, most=8, **how)
    return [np.flatnonzero(row).tolist() for row in thin]

  # Eight seconds and two, by hand; a picture has no length.
  assert kept(0.5) == [[8, 24, 40, 56], [8], [0], []]
  assert kept(0.45) == [[8, 24, 40, 56], [8], [0], []]
  assert kept(0.75) == [[5, 16, 26, 37, 48, 58], [4, 12], [0], []]
  assert kept(0.6, multiple=2)[0] == [5, 16, 26, 37, 48, 58]
  assert kept(1.0)[0] == list(range(64))  # K are shown


def test_frames_a_second(cache_dir, tmp_path, batch):
  """Every other slot is empty; the frames are those of a K that is smaller."""
  config = shrink(load_config("configs/kfgrpo_cpu.py", "smoke"), cache_dir)
  config.scan.select = "uniform"
  config.data.fps = 0.25  # of eight seconds; half of the frames are scanned
  thin = experiment_lib.build(config, tmp_path)
  batch = pipeline.collate(
    batch.samples, np.arange(4), scan_frames=32, scan_size_px=(32, 32)
  )
  found = thin.make_views(batch, ("keyframes", "uniform"))
  assert found.frame_mask.tolist() == [[True, True, False, False] * 2] * 4
  np.testing.assert_array_equal(
    found.keyframe_time_s[:, :2], [[17 / 8, 49 / 8]] * 4
  )
  assert np.all(found.view["keyframes"].prompt.visual.max(axis=1) == 3)
  config.data.fps = 0.0
  config.tad.num_keyframes = 2
  two = experiment_lib.build(config, tmp_path)
  expected = two.make_views(batch, ("keyframes",))
  for name in ("token", "mask", "position"):
    np.testing.assert_array_equal(
      getattr(found.view["keyframes"].prompt, name),
      getattr(expected.view["keyframes"].prompt, name),
    )
  np.testing.assert_array_equal(found.frames[:, :2], expected.frames[:, :2])


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"data.fps": 2.0}, "config.data.fps=2 thins .* config.scan.select='tad'"),
    (
      {"data.fps": 2.0, "scan.select": "uniform", "selector.learn": True},
      "config.data.fps=2 .* learned selection always shows",
    ),
    ({"data.fps": -1.0}, "config.data.fps must be 0 or above, got -1.0"),
  ],
)
def test_frames_a_second_that_do_not_fit(tiny_config, tmp_path, changes, said):
  tiny_config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=said):
    experiment_lib.build(tiny_config, tmp_path)


def test_unknown_arm(experiment, batch):
  with pytest.raises(ValueError, match=r"unknown arms \['shufled'\].*shuffled"):
    experiment.make_views(batch, ("keyframes", "shufled"))


def test_overlong_prompt_names_the_setting(experiment, batch):
  config = experiment.config
  maker = views.ViewMaker(
    experiment.tokenizer,
    views.make_selector(descriptor="pixels", **config.tad),
    pipeline.FrameReader((28, 56), cache_mib=0, num_threads=1),
    prompt=dict(config.prompt.build),
    max_prompt_tokens=20,
    patch=(14, 2, 2),
    num_keyframes=4,
    num_shuffles=1,
    seed=0,
  )
  with pytest.raises(
    ValueError, match="budget is 20.*config.prompt.max_tokens"
  ):
    maker(batch, ("keyframes",))


def test_count_tokens_is_an_upper_bound(experiment, prepared):
  sample = prepared.batch.samples[0]
  bound = experiment.make_views.count_tokens(sample, duration_s=8.0)
  used = prepared.view["keyframes"].prompt.mask[0].sum()
  assert used <= bound <= used + 8


def test_selector_errors(experiment):
  with pytest.raises(ValueError, match="got 'clip'; change config.scan"):
    views.make_selector(descriptor="clip", **experiment.config.tad)
  with pytest.raises(ValueError, match="vision tower"):
    views.make_selector(descriptor="vision", **experiment.config.tad)
  with pytest.raises(ValueError, match="'tadd' .*change config.scan.select"):
    views.make_selector(
      descriptor="pixels", select="tadd", **experiment.config.tad
    )


@pytest.mark.parametrize("select", ["k_center", "random", "uniform"])
def test_keyframes_of_another_selector(experiment, batch, select):
  tad = dict(experiment.config.tad)
  choose = views.make_selector(descriptor="pixels", select=select, **tad)
  keyframes, uniform = choose(batch.scan, batch.scan_mask)
  again, _ = choose(batch.scan[::-1], batch.scan_mask[::-1])
  np.testing.assert_array_equal(again.index[::-1], keyframes.index)
  ours, _ = views.make_selector(descriptor="pixels", **tad)(
    batch.scan, batch.scan_mask
  )
  assert np.any(ours.index != keyframes.index)
  assert np.all(keyframes.index == uniform) == (select == "uniform")
  if select == "random":  # no two videos the same frames
    assert len(np.unique(keyframes.index, axis=0)) == len(batch.samples)


def test_scan_by_the_vision_tower(experiment, batch, cache_dir, tmp_path):
  config = shrink(load_config("configs/kfgrpo_cpu.py", "smoke"), cache_dir)
  config.scan.descriptor = "vision"
  config.data.loader.scan_size_px = (28, 28)
  made = experiment_lib.build(config, tmp_path)
  few = pipeline.collate(
    batch.samples[:2], np.arange(2), scan_frames=64, scan_size_px=(28, 28)
  )
  keyframes = made.make_views(few, ("keyframes",)).keyframes
  assert keyframes.embedding.shape == (2, 4, 32)
  assert keyframes.mask.all() and np.all(np.diff(keyframes.index) > 0)


# ------------------------------------------------- two frames share a slice


@pytest.fixture(scope="module")
def paired_experiment(cache_dir, tmp_path_factory):
  """Six frames in three slots of one video span, as Video-R1 has them."""
  config = shrink(load_config("configs/kfgrpo_cpu.py", "smoke"), cache_dir)
  config.scan.select = "uniform"
  config.tad.num_keyframes = 6
  config.contrast.num_shuffles = 2
  config.prompt.frames_per_slice = 2
  config.prompt.build.show_time = False
  return experiment_lib.build(config, tmp_path_factory.mktemp("paired"))


@pytest.fixture(scope="module")
def odd(paired_experiment, write_video, tmp_path_factory):
  """A batch of 12 frames at 4 a second, of three, and of a picture."""
  rng = np.random.default_rng(0)
  folder = tmp_path_factory.mktemp("odd")
  for count in (12, 3):
    frames = rng.integers(0, 255, (count, 28, 56, 3), np.uint8)
    write_video(folder / f"{count}.mp4", frames)
  picture = rng.integers(0, 255, (28, 56, 3), np.uint8)
  Image.fromarray(picture).save(folder / "1.png")
  samples = [
    records.Sample(name, str(folder / name), "Which?", ("red", "blue"), "A")
    for name in ("12.mp4", "3.mp4", "1.png")
  ]
  batch = pipeline.collate(samples, np.arange(3), **SCAN)
  return paired_experiment.make_views(batch, ALL), picture


@pytest.fixture(scope="module")
def encoded(paired_experiment, odd):
  """Visual tokens of every slice, and what encodes frames one by one."""
  model, params = paired_experiment.model, init_params(paired_experiment.model)
  shown = experiment_lib.shown_frames(odd[0], blank=True)
  pixel = paired_experiment.make_views.patches(shown)
  made = policy.encode_frames(model, params, pixel, grid=paired_experiment.grid)

  def reference(frames):
    """Tokens of frames in a row, paired as transformers' processor does."""
    pairs = patches.frames_to_patches(frames, pair=True)
    token = vlm.encode_vision(model, params, pairs, paired_experiment.grid)
    return np.asarray(token).reshape(-1, token.shape[-1])

  return made, reference


def _order(prepared, arm, row):
  """Numbers of the frames in a view's slots, the last of a pair included."""
  return prepared.slices[row, prepared.view[arm].frame[row]].ravel()


def test_slots_of_pairs(paired_experiment, odd):
  prepared, picture = odd
  # keyframes, two shuffles, reversed, uniform: 3 each; single and blank.
  assert prepared.slices.shape == (3, 17, 2) and prepared.num_shown == 17
  assert prepared.frames.shape == (3, 13, 28, 56, 3)
  assert prepared.num_slots == 3
  assert paired_experiment.make_views.patches(
    experiment_lib.shown_frames(prepared)
  ).shape == (3, 17, 8, 3 * 2 * 14 * 14)
  assert _order(prepared, "keyframes", 0).tolist() == [0, 1, 2, 3, 4, 5]
  assert _order(prepared, "uniform", 0).tolist() == [6, 7, 8, 9, 10, 11]
  assert _order(prepared, "reversed", 0).tolist() == [5, 4, 3, 2, 1, 0]
  assert _order(prepared, "times", 0).tolist() == [12] * 6
  # Of 12 frames 1, 3, ... are shown; of three the second slot has one.
  np.testing.assert_array_equal(
    prepared.slot_time_s,
    [[0.25, 1.25, 2.25], [0, 0.5, np.nan], [0, np.nan, np.nan]],
  )
  assert _order(prepared, "keyframes", 1)[:4].tolist() == [0, 1, 2, 2]
  assert _order(prepared, "uniform", 1)[:4].tolist() == [6, 7, 8, 8]
  assert _order(prepared, "reversed", 1)[:4].tolist() == [2, 1, 0, 0]
  assert [_order(prepared, "single", n)[0] for n in range(3)] == [9, 7, 6]
  # The picture is shown twice in one slot, and cannot be out of order.
  assert prepared.can_shuffle.tolist() == [True, True, False]
  assert not prepared.has_apex[2]
  np.testing.assert_array_equal(prepared.frames[2, 0], picture)
  for arm in ("keyframes", "uniform", "shuffled", "reversed"):
    visual = prepared.view[arm].prompt.visual
    np.testing.assert_array_equal((visual >= 0).sum(axis=1), [6, 4, 2])
    assert set(_order(prepared, arm, 2)[:2]) == {6 if arm == "uniform" else 0}
  single = prepared.view["single"].prompt
  np.testing.assert_array_equal((single.visual >= 0).sum(axis=1), [2, 2, 2])
  assert np.all(prepared.view["blind"].prompt.visual == -1)


def test_frames_move_before_they_are_paired(paired_experiment, odd):
  prepared, _ = odd
  drawn = [
    _order(prepared, arm, row)
    for arm in ("shuffled", "shuffled_1")
    for row in (0, 1)
  ]
  for order in drawn[::2]:
    assert sorted(order) == list(range(6)) and any(order != np.arange(6))
  for order in drawn[1::2]:
    assert sorted(order[:3]) == [0, 1, 2] and any(order[:3] != np.arange(3))
    assert order[3] == order[2]
  # Pairs are torn apart: moving whole slots would not do that.
  assert any(
    {frozenset(pair) for pair in order.reshape(3, 2)}
    != {frozenset(pair) for pair in np.arange(6).reshape(3, 2)}
    for order in drawn[::2]
  )
  ordered = prepared.view["keyframes"]
  for arm in ("shuffled", "shuffled_1", "reversed", "times"):
    assert _equal_prompts(prepared.view[arm].prompt, ordered.prompt)


@pytest.mark.parametrize(
  "arm", ["keyframes", "shuffled", "shuffled_1", "reversed", "uniform"]
)
def test_tokens_of_pairs_by_brute_force(odd, encoded, arm):
  prepared, _ = odd
  token, reference = encoded
  shown = np.asarray(policy.show(token, prepared.view[arm].frame))
  for row, real in ((0, 6), (1, 3), (2, 1)):
    order = _order(prepared, arm, row)[:real]
    expected = reference(prepared.frames[row, order])
    np.testing.assert_allclose(
      shown[row, : len(expected)], expected, rtol=0, atol=1e-5
    )
  # The order inside a slice counts.
  if arm == "reversed":
    forward = np.asarray(policy.show(token, prepared.view["keyframes"].frame))
    assert np.abs(shown[0, :2] - forward[0, 4:]).max() > 1e-3


def test_the_blank_slice_is_the_last(odd, encoded):
  """What saliency by deletion puts in a slot."""
  prepared, _ = odd
  blank = np.full((2, 28, 56, 3), 128, np.uint8)
  np.testing.assert_allclose(
    encoded[0][:, -1], [encoded[1](blank)] * 3, rtol=0, atol=1e-5
  )
  few = prepared._replace(view={"keyframes": prepared.view["keyframes"]})
  assert experiment_lib.shown_frames(few).shape[1] == 2 * 16
  assert experiment_lib.shown_frames(few, blank=True).shape[1] == 2 * 17


def test_positions_of_pairs_are_the_reference(paired_experiment, odd):
  """Six frames at 2 a second: slices are 2 / fps = 1 s apart."""
  prompt = odd[0].view["keyframes"].prompt
  real = prompt.mask[0]
  expected = rope.rope_index(
    paired_experiment.model,
    prompt.token[:1, real],
    video_grid_thw=[[3, *paired_experiment.grid]],
    second_per_grid_ts=[2 / 2],
  )
  np.testing.assert_array_equal(prompt.position[0][:, real], expected[0])
  assert len(np.unique(prompt.position[0, 0, prompt.visual[0] >= 0])) == 3


def test_numbers_by_slot(odd):
  prepared, _ = odd
  value = np.array([[0, 3, 1, 2, 0, 0], [5, 4, 0, 0, 0, 1], [7, 0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(
    prepared.by_slot(value), [[3, 2, 0], [5, 0, 1], [7, 0, 0]]
  )
  np.testing.assert_array_equal(
    prepared.by_slot(prepared.keyframes.mask),
    [[True] * 3, [True, True, False], [True, False, False]],
  )


@pytest.mark.parametrize(
  ("setting", "value", "message"),
  [
    ("tad.num_keyframes", 5, "5 keyframes .* config.tad.num_keyframes"),
    ("prompt.frames_per_slice", 3, "is 3, expected 1 or the 2 frames"),
    ("prompt.frames_per_slice", 0, "change config.prompt.frames_per_slice"),
  ],
)
def test_frames_that_make_no_slices(
  tiny_config, tmp_path, setting, value, message
):
  tiny_config.prompt.frames_per_slice = 2
  tiny_config.update_from_flattened_dict({setting: value})
  with pytest.raises(ValueError, match=message):
    experiment_lib.build(tiny_config, tmp_path)


class TestFramesOfBoxes:
  """What tracking questions show, beside others in one batch."""

  def run(self, num_boxes, num_real=24, num_keyframes=6):
    rng = np.random.default_rng(0)
    mask = np.arange(24) < np.array([24, num_real])[:, None]
    chosen = jax.device_get(
      jax.vmap(lambda f, m: selectors.top_k(f, m, num_keyframes=num_keyframes))(
        rng.normal(size=(2, 24, 4)), mask
      )
    )
    uniform = np.stack([tad.uniform_index(row, num_keyframes) for row in mask])
    samples = [
      records.Sample("a", "a.mp4", "", ("x", "y"), "A"),
      records.Sample(
        "b", "b.mp4", "", (), "", "tracking", boxes=((0, 0, 1, 1),) * num_boxes
      ),
    ]
    made = views.frames_of_boxes(samples, mask, chosen, uniform)
    return chosen, uniform, *made

  def test_equal_distances_in_as_many_slots(self):
    chosen, uniform, keyframes, other = self.run(4)
    # floor((k + 0.5) * 24 / 4)
    expected = [3, 9, 15, 21, 24, 24]
    assert keyframes.index[1].tolist() == expected == other[1].tolist()
    assert keyframes.mask[1].tolist() == [True] * 4 + [False] * 2
    assert not keyframes.saliency[1].any()
    # The other question's frames are those that were selected.
    np.testing.assert_array_equal(keyframes.index[0], chosen.index[0])
    np.testing.assert_array_equal(keyframes.saliency[0], chosen.saliency[0])
    np.testing.assert_array_equal(other[0], uniform[0])
    assert chosen.index[1].tolist() != expected  # nothing is changed in place

  @pytest.mark.parametrize(
    ("num_boxes", "num_real"), [(7, 24), (4, 3)], ids=["slots", "frames"]
  )
  def test_too_few_frames(self, num_boxes, num_real):
    with pytest.raises(ValueError, match="'b' has boxes of .*num_keyframes"):
      self.run(num_boxes, num_real)
