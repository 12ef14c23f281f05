"""Temporal Apex Distillation: goldens by hand, properties, gradients."""

import functools
import itertools
import math

import chex
import hypothesis
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from hypothesis import strategies as st

from cf_jax import tad

A, B, C = np.eye(3, dtype=np.float32)
few = hypothesis.settings(max_examples=12, deadline=None, database=None)
seeds = st.integers(0, 2**31 - 1)
both = pytest.mark.parametrize(
  "wrap", [jax.jit, lambda f: f], ids=["jit", "py"]
)


def rows(*frames):
  return jnp.asarray(np.stack(frames))


def shots(lengths, seed=0, width=12, noise=0.02):
  """Embeddings of shots with different content, and where they start."""
  rng = np.random.default_rng(seed)
  centre = rng.normal(size=(len(lengths), width))
  frame = np.repeat(centre, lengths, axis=0)
  frame += noise * rng.normal(size=frame.shape)
  return frame.astype(np.float32), np.cumsum(lengths)[:-1]


@functools.cache
def jitted(function, **settings):
  """One compiled program per settings; op by op takes seconds a call."""
  return jax.jit(functools.partial(function, **settings))


def select(embedding, mask=None, num_keyframes=4, selection="soft", **arrays):
  program = jitted(
    tad.select_keyframes, num_keyframes=num_keyframes, selection=selection
  )
  return program(embedding, mask, **arrays)


# -- stage 1: variation


@both
@pytest.mark.parametrize(
  ("frames", "settings", "want"),
  [
    # neighbours: 1 - cos
    ((A, A, B, B), dict(scales=(1,), median=False), (0, 0, 1, 0)),
    (
      (A, 3 * A + 4 * B, 3 * A + 4 * B),
      dict(scales=(1,), median=False),
      (0, 0.4, 0),
    ),
    # windows of two, cut off at the ends: 1 - 1 / sqrt 2 beside the cut
    (
      (A, A, B, B),
      dict(scales=(2,), median=False),
      (0, 0.2928932, 1, 0.2928932),
    ),
    # the mean over the two lines above
    (
      (A, A, B, B),
      dict(scales=(1, 2), median=False),
      (0, 0.1464466, 1, 0.1464466),
    ),
    # |a - b| / sqrt(|a|^2 + |b|^2): sqrt 2 / sqrt 2, then 1 / sqrt 5
    (
      (A, B, B, 2 * B),
      dict(scales=(1,), median=False, metric="l2"),
      (0, 1, 0, 0.4472136),
    ),
    # means, not sums: (a + b) / 2 against b is sqrt(0.5) / sqrt(0.5 + 1)
    (
      (A, B, B),
      dict(scales=(2,), median=False, metric="l2"),
      (0, 1, 0.5773503),
    ),
    # one frame of something else is gone, the cut stays where it was
    (
      (A, A, C, A, A, B, B, B),
      dict(scales=(1,), median=True),
      (0, 0, 0, 0, 0, 1, 0, 0),
    ),
    # a Gaussian of width 1 over a single step, frame 0 left out
    (
      (A, A, A, A, B, B, B, B, B),
      dict(scales=(1,), median=False, smoothing=1.0),
      (
        0,
        0.0111090 / 1.7529750,
        0.1353353 / 2.3595056,
        0.6065307 / 2.4948409,
        0.3990503,
        0.6065307 / 2.5059500,
        0.1353353 / 2.4948409,
        0.0111090 / 2.3595056,
        0,
      ),
    ),
  ],
)
def test_variation_golden(wrap, frames, settings, want):
  score = wrap(functools.partial(tad.variation_scores, **settings))
  np.testing.assert_allclose(score(rows(*frames)), want, atol=2e-6)


def test_windows_of_any_length():
  rng = np.random.default_rng(0)
  frame = rng.normal(size=(23, 5))
  for scale in (3, 5, 6, 7, 40):
    score = jitted(tad.variation_scores, scales=(scale,), median=False)
    got = score(frame)
    for t in range(1, 23):
      after = frame[t : t + scale].mean(0)
      before = frame[max(0, t - scale) : t].mean(0)
      cosine = before @ after / np.linalg.norm(before) / np.linalg.norm(after)
      assert got[t] == pytest.approx(1 - cosine, abs=1e-5)


def test_scores_are_exact_late_in_a_long_video():
  frame, _ = shots([20, 20], seed=3)
  offset = 3000
  long = np.concatenate([np.full((offset, 12), 7, np.float32), frame])
  late = jitted(tad.variation_scores)(long)[offset + 8 :]
  alone = jitted(tad.variation_scores)(frame)[8:]
  np.testing.assert_allclose(late, alone, atol=3e-7)


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
@pytest.mark.parametrize("sizes", [[40], [1] * 7 + [33], [16, 16, 8], [30, 10]])
def test_chunks_score_as_the_whole(sizes, smoothing):
  frame = jnp.asarray(shots([9, 14, 17], noise=0.2)[0])
  whole = jitted(tad.variation_scores, smoothing=smoothing)(frame)
  chunks = jnp.split(frame, np.cumsum(sizes)[:-1])
  got = tad.score_chunks(iter(chunks), smoothing=smoothing)
  np.testing.assert_allclose(got, whole, atol=1e-6)


def test_no_chunks():
  with pytest.raises(ValueError, match="no chunk"):
    tad.score_chunks([])
  with pytest.raises(ValueError, match=r"smoothing=-2\.0"):
    tad.score_chunks([jnp.ones((5, 2))], smoothing=-2.0)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_dtypes(metric):
  frame, _ = shots([6, 6])

  def types(dtype):
    return jax.eval_shape(
      functools.partial(tad.select_keyframes, num_keyframes=3, metric=metric),
      jnp.asarray(frame, dtype),
    )

  real = ("weight", "embedding", "score", "variation", "saliency", "logprob")
  whole = ("index", "order", "segment")
  for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
    keyframes = types(dtype)
    for name in real:
      assert getattr(keyframes, name).dtype == jnp.float32, name
    for name in whole:
      assert getattr(keyframes, name).dtype == jnp.int32, name
  half = jnp.asarray(frame, jnp.bfloat16)
  score = jitted(tad.variation_scores, metric=metric)
  np.testing.assert_array_equal(score(half), score(half.astype(jnp.float32)))
  with jax.enable_x64(True):
    keyframes = types(jnp.float64)
    for name in real:
      assert getattr(keyframes, name).dtype == jnp.float64, name
    for name in whole:
      assert getattr(keyframes, name).dtype == jnp.int32, name


# -- stage 2: inflections


def apexes(value, **settings):
  program = jitted(tad.detect_inflections, **settings)
  apex, _ = program(jnp.asarray(value, jnp.float32))
  return np.flatnonzero(apex).tolist()


@both
def test_apex_and_strength_golden(wrap):
  # MAD 0, so the unit is 1e-3 of the top and softness 1000 makes tau = 1:
  # sigmoid(1)^2 * (2 * 1 - 0 - 0) = 0.7310586^2 * 2.
  value = jnp.asarray([0.0, 0, 1, 0, 0])
  soft = wrap(functools.partial(tad.detect_inflections, softness=1000.0))
  apex, strength = soft(value)
  assert apex.tolist() == [False, False, True, False, False]
  np.testing.assert_allclose(strength, [0, 0, 1.0688933, 0, 0], rtol=1e-6)
  hard = wrap(functools.partial(tad.detect_inflections, strength="hard"))
  np.testing.assert_allclose(hard(value)[1], [0, 0, 2, 0, 0])


def test_soft_strength_becomes_the_hard_one():
  value = jnp.asarray([0, 0.2, 0.9, 0.3, 0.35, 0.2, 0.1, 0.8, 0.1, 0.2])
  kwargs = dict(gate=0.0, prominence=0.0, min_gap=1)
  hard = jitted(tad.detect_inflections, strength="hard", **kwargs)(value)[1]
  soft = jitted(tad.detect_inflections, softness=1e-4, **kwargs)(value)[1]
  assert np.flatnonzero(hard).tolist() == [2, 4, 7]
  # Below the gate the soft strength stays, so compare where the gate is open.
  np.testing.assert_allclose(soft, hard, atol=1e-6)


def test_gate_and_gap_golden():
  # Of the values after the first the median is 3 and the MAD 1.
  value = [0, 1, 3, 2, 4, 3, 9, 2, 4, 1]
  found = functools.partial(apexes, value, prominence=0.0)
  assert found(gate=2.0, min_gap=1) == [6]  # above 3 + 2.97
  assert found(gate=0.5, min_gap=1) == [4, 6, 8]  # above 3.74
  assert found(gate=-1.0, min_gap=1) == [2, 4, 6, 8]
  assert found(gate=-1.0, min_gap=3) == [2, 6]  # 4 and 8 are near 6
  assert found(gate=-1.0, min_gap=5) == [6]


def test_prominence_golden():
  found = functools.partial(apexes, gate=0.0, min_gap=1)
  # On the way from the 5s to the 6 the curve falls to 4, from the 3 to the 6
  # to 1: four fifths and a third of their heights.
  value = [0, 0, 5, 4, 6, 4, 5, 1, 3, 0, 0, 0, 0]
  assert found(value, prominence=0.1) == [2, 4, 6, 8]
  assert found(value, prominence=0.3) == [4, 8]
  assert found(value, prominence=0.6) == [4, 8]
  assert found(value, prominence=0.7) == [4]
  # Equal tops of one hill are both the highest: min_gap takes one of them.
  assert found([0, 0, 5, 4, 5, 0, 0, 0], prominence=0.9) == [2, 4]


@few
@hypothesis.given(seeds)
def test_prominence_is_that_of_scipy(seed):
  value = np.random.default_rng(seed).integers(0, 30, 32).astype(np.float32)
  value[0] = 0
  found = functools.partial(apexes, value, gate=-99.0, min_gap=1)
  every = np.array(found(prominence=0.0))
  closed = np.append(value, 0)  # at both ends the ground
  height = scipy.signal.peak_prominences(closed, every)[0]
  want = every[height >= value[every] / 2].tolist()
  assert found(prominence=0.5) == want


def test_contrast_golden():
  value = [0, 0, 4, 8, 4, 0, 0, 8, 0, 2, 0, 0]
  found = functools.partial(apexes, value, gate=0.0, prominence=0.0)
  # The frames beside the first top are 4 on average, those beside the second 0.
  assert found(min_gap=2, contrast=2.0) == [3, 7, 9]
  assert found(min_gap=2, contrast=2.1) == [7, 9]
  # Of four frames on two sides: 2, 0.5, and of the last one 2.
  assert found(min_gap=3, contrast=2.0) == [3, 7]
  assert found(min_gap=3, contrast=5.0) == [7]
  # Only frames that exist count, and not the first: (1 + 1 + 1) / 3.
  assert apexes([9, 1, 6, 1, 1], gate=0.0, contrast=6.0) == [2]
  assert apexes([9, 1, 6, 1, 1], gate=0.0, contrast=6.1) == []


def _stands_alone_by_hand(value, inside, contrast, reach):
  found = []
  for t, own in enumerate(value):
    beside = [n for n in range(t - reach, t + reach + 1) if n != t]
    beside = [n for n in beside if 0 <= n < len(value) and inside[n]]
    mean = sum(value[n] for n in beside) / max(len(beside), 1)
    found.append(own >= contrast * mean)
  return found


@pytest.mark.parametrize("reach", [2, 400])
def test_contrast_equals_its_definition(reach):
  value = np.random.default_rng(0).integers(1, 9, 60)
  inside = np.arange(60) % 7 != 0
  program = jax.jit(tad._stand_alone, static_argnums=3)
  found = program(jnp.asarray(value, jnp.float32), inside, 1.5, reach)
  want = _stands_alone_by_hand(value, inside, 1.5, reach)
  assert found.tolist() == want and 0 < sum(want) < 60


def test_a_long_gap_is_no_long_program():
  def steps(min_gap):
    detect = functools.partial(tad.detect_inflections, min_gap=min_gap)
    return len(jax.make_jaxpr(detect)(jnp.ones(512)).eqns)

  assert steps(200) < 1.5 * steps(3)


def test_flat_is_the_least_height_of_an_apex():
  value = [0, 1, 3, 1, 1, 7, 1, 1]  # the lowest after the first is 1
  found = functools.partial(apexes, value, gate=0.0, prominence=0.0)
  assert found(flat=2.0) == [2, 5]
  assert found(flat=2.5) == [5]
  assert found(flat=6.5) == []


def test_plateaus_and_ends():
  found = functools.partial(apexes, gate=0.0)
  assert found([0, 1, 3, 3, 3, 1, 1]) == [3]
  assert found([0, 1, 3, 3, 1, 1]) == [2]  # the earlier of two centres
  assert found([0, 1, 1, 3, 3, 4, 4, 1, 1]) == [5]  # a step is no peak
  assert found([0, 5, 1, 1, 1]) == []  # one neighbour only
  assert found([0, 1, 1, 1, 5]) == []
  assert found([0, 1, 1, 5, 5]) == []
  assert found([0.0]) == []
  # Ties within the gap: the earlier one.
  assert found([0, 0, 3, 0, 3, 0, 0], min_gap=3) == [2]


@few
@hypothesis.given(seeds, st.sampled_from([1, 2, 3, 6]))
def test_gap_is_greedy_from_the_top(seed, min_gap):
  rng = np.random.default_rng(seed)
  value = rng.integers(0, 5, 40).astype(np.float32)
  candidates = apexes(value, gate=0.0, min_gap=1)
  kept = []
  for t in sorted(candidates, key=lambda t: (-value[t], t)):
    if all(abs(t - other) >= min_gap for other in kept):
      kept.append(t)
  assert apexes(value, gate=0.0, min_gap=min_gap) == sorted(kept)


@few
@hypothesis.given(seeds, st.integers(1, 5))
def test_clear_cuts_are_all_found(seed, num_cuts):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(8, 20, num_cuts + 1)
  lengths[-1] += 120 - lengths.sum()
  centre = np.linalg.qr(rng.normal(size=(16, 16)))[0][: num_cuts + 1]
  frame = np.repeat(centre, lengths, axis=0)
  frame = frame + 0.01 * rng.normal(size=frame.shape)
  cuts = np.cumsum(lengths)[:-1]
  flicker = rng.integers(0, 8) + cuts[0] - 8  # one frame of something else
  if 1 <= flicker <= cuts[0] - 3:
    frame[flicker] = rng.normal(size=16)
  keyframes = select(jnp.asarray(frame, jnp.float32), num_keyframes=6)
  assert np.flatnonzero(keyframes.apex).tolist() == cuts.tolist()
  shot = np.searchsorted(cuts, keyframes.index, side="right")
  assert set(shot) == set(range(num_cuts + 1))
  assert flicker not in keyframes.index.tolist()


@pytest.mark.parametrize("flicker", [0, 1, 7, 17, 23, 38, 39])
def test_one_frame_flicker_is_no_apex(flicker):
  frames, cuts = shots([20, 20])
  frames[flicker] = np.random.default_rng(1).normal(size=12)
  keyframes = select(frames)
  assert np.flatnonzero(keyframes.apex).tolist() == cuts.tolist()
  assert flicker not in keyframes.index.tolist()


def test_ties_go_to_the_earlier():
  """Four apexes of one height and K for three, the same in any program."""
  frames = rows(*[A, B] * 3)[jnp.repeat(jnp.arange(5), 8)]
  choose = functools.partial(
    tad.select_keyframes,
    num_keyframes=3,
    crowded="priority",
    scales=(1,),
  )
  one = jax.jit(choose)(frames)
  assert np.flatnonzero(one.apex).tolist() == [8, 16, 24, 32]
  assert one.segment.tolist() == [[0, 8], [8, 16], [16, 40]]
  many = jax.jit(jax.vmap(choose))(jnp.stack([frames, frames]))
  for video in range(2):
    assert many.index[video].tolist() == one.index.tolist()


# -- stage 3: distillation

VALUE = (0, 1, 2, 3, 9, 1, 2, 1, 8, 5, 1, 2)


def distill(num_keyframes, apex=(4, 8), frames=None, **settings):
  size = len(VALUE)
  frames = jnp.ones((size, 3)) if frames is None else frames
  program = jitted(
    tad.distill_keyframes, num_keyframes=num_keyframes, **settings
  )
  return program(
    frames,
    jnp.asarray(VALUE, jnp.float32),
    jnp.asarray(np.isin(np.arange(size), apex)),
    jnp.zeros(size),
  )


def test_distill_golden():
  # Roughness, the larger of the steps on either side of a frame:
  # 1 2 3 9 | 9 2 2 8 | 8 5 2 2; the central half of four frames is two.
  keyframes = distill(3)
  assert keyframes.index.tolist() == [1, 5, 10]
  assert keyframes.segment.tolist() == [[0, 4], [4, 8], [8, 12]]
  # Mean 35 / 11, variance 195 / 11 - mean^2: z(9) = 2.1100, z(8) = 1.7474.
  assert keyframes.score[4] == pytest.approx(2.1100, abs=1e-4)
  assert keyframes.score[8] == pytest.approx(1.7474, abs=1e-4)
  np.testing.assert_allclose(keyframes.saliency, [0, 1, 0.82812], atol=1e-4)
  assert keyframes.order.tolist() == [5, 10, 1]  # by priority
  assert keyframes.mask.tolist() == [True] * 3
  assert keyframes.logprob == 0
  assert np.flatnonzero(keyframes.apex).tolist() == [4, 8]


def test_spare_frames_split_the_longest_segments():
  keyframes = distill(5)  # pieces 0-2, 2-4, 4-6, 6-8, 8-12
  assert keyframes.index.tolist() == [0, 2, 5, 6, 10]
  assert keyframes.segment.tolist() == [
    [0, 4],
    [0, 4],
    [4, 8],
    [4, 8],
    [8, 12],
  ]
  # Lengths 2 and 10 for five: shares 1 and 4, pieces of 2, 3, 2, 3.
  keyframes = distill(5, apex=(2,), shown="first")
  assert keyframes.index.tolist() == [0, 2, 4, 7, 9]


def test_priority_keeps_the_best_apexes():
  keyframes = distill(2, crowded="priority")
  assert keyframes.segment.tolist() == [[0, 4], [4, 12]]
  assert keyframes.index.tolist() == [1, 6]
  assert np.sum(keyframes.apex) == 2  # not capped by K


@pytest.mark.parametrize(
  ("shown", "index"),
  [
    ("calmest", [1, 5, 10]),
    ("middle", [1, 5, 9]),
    ("first", [0, 4, 8]),
    ("apex", [3, 4, 8]),
  ],
)
def test_shown_golden(shown, index):
  assert distill(3, shown=shown).index.tolist() == index


def test_medoid_is_the_frame_most_like_its_segment():
  frames = rows(A, A, B, A, *[B, B, C, B], *[C, A, C, C])
  keyframes = distill(3, frames=frames, shown="medoid")
  assert keyframes.index.tolist() == [1, 5, 10]


def test_the_median_does_not_hide_flicker_from_the_choice():
  frames = np.tile(A, (12, 1))
  frames[1] = -A  # would be the calmest of its segment
  assert distill(3, frames=jnp.asarray(frames)).index.tolist() == [2, 5, 10]


def test_crowded_scene_that_comes_back_needs_no_second_frame():
  scene = [(A, 20), (B, 12), (A, 14), (C, 12), (A, 13), (B + C, 12)]
  frames = rows(*[f for f, n in scene for _ in range(n)])
  keyframes = select(frames, num_keyframes=4)
  start = np.cumsum([0] + [n for _, n in scene])
  assert np.flatnonzero(keyframes.apex).tolist() == start[1:-1].tolist()
  shot = np.searchsorted(start, keyframes.index, side="right") - 1
  assert shot.tolist() == [0, 1, 3, 5]


@pytest.mark.parametrize(
  ("last", "kept"),
  [
    # K = 2 of 24 frames, so 6 are a whole share, and apexes of one height. Of C
    # the merit is 1.2 * (2 / 6)^(1/4) * 1.02 = 0.930, of the last segment
    # 1.2 * (0.02 + its distance from A): 1.224,
    (B, (14, 24)),
    (0.2 * A + 0.96**0.5 * B, (14, 24)),  # 0.984,
    (0.3 * A + 0.91**0.5 * B, (12, 14)),  # 0.864
    (A, (12, 14)),  # and 0.024
  ],
)
def test_crowded_merit_golden(last, kept):
  frames = rows(*[A] * 12, *[C] * 2, *[last] * 10)
  apex = np.isin(np.arange(24), (12, 14))
  program = jitted(tad.distill_keyframes, num_keyframes=2)
  keyframes = program(
    frames, jnp.asarray(apex, jnp.float32), jnp.asarray(apex), jnp.zeros(24)
  )
  assert keyframes.segment.tolist() == [[0, 12], list(kept)]


def test_query_and_bonus_steer():
  frames, cuts = shots([10, 10, 10, 10], seed=1)
  query = jnp.asarray(frames[25])
  ask = functools.partial(select, frames, relevance_weight=2.0)
  plain = ask(query=jnp.zeros(12), bonus=jnp.zeros(40))
  asked = ask(query=query, bonus=jnp.zeros(40))
  cosine = frames @ frames[25]
  cosine /= np.linalg.norm(frames, axis=1) * np.linalg.norm(frames[25])
  np.testing.assert_allclose(asked.score, plain.score + 2 * cosine, atol=1e-5)
  bonus = jnp.zeros(40).at[17].set(50.0)
  told = ask(query=jnp.zeros(12), bonus=bonus)
  assert told.index.tolist()[1] == 17


def test_query_and_bonus_steer_a_video_without_an_apex():
  # Parts 0-4, 4-8, 8-12 around frames 2, 6, 10; a step away costs 2 / 4.
  choose = functools.partial(select, jnp.ones((12, 3)), num_keyframes=3)
  bonus = np.zeros(12)
  bonus[5] = 0.6
  keyframes = choose(bonus=bonus)
  assert keyframes.index.tolist() == [2, 5, 10]
  power = np.exp([-1, -0.5 + 0.6, 0, -0.5])
  np.testing.assert_allclose(
    keyframes.weight[1, 4:8], power / power.sum(), rtol=1e-5
  )
  bonus[5] = 0.4
  assert choose(bonus=bonus).index.tolist() == [2, 6, 10]
  # What says the same of every frame says nothing.
  assert choose(bonus=np.ones(12)).index.tolist() == [2, 6, 10]
  rng = np.random.default_rng(0)
  still = 1 + 1e-7 * rng.normal(size=(12, 3)).astype(np.float32)
  asked = select(still, num_keyframes=3, query=jnp.asarray([1.0, 2, 3]))
  assert asked.index.tolist() == [2, 6, 10]


# -- uniform frames


@both
def test_uniform_golden(wrap):
  index = wrap(functools.partial(tad.uniform_index, num_keyframes=4))
  assert index(jnp.ones(10, bool)).tolist() == [1, 3, 6, 8]
  assert index(jnp.arange(6) % 2 == 0).tolist() == [0, 2, 4, 6]  # T for none
  assert index(jnp.zeros(3, bool)).tolist() == [3] * 4


def test_uniform_of_a_long_video_does_not_overflow():
  size, number = 1_500_007, 1000
  uniform = jitted(tad.uniform_index, num_keyframes=number)
  index = uniform(jnp.ones(size, bool))
  want = [(2 * k + 1) * size // (2 * number) for k in range(number)]
  assert index.tolist() == want


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12, 40])
@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("rounding", [0.0, 1e-7])
def test_static_video_gives_the_uniform_frames(size, number, rounding):
  rng = np.random.default_rng(size)
  frames = np.ones((40, 12), np.float32)
  frames += rounding * rng.normal(size=frames.shape)
  mask = np.arange(40) < size
  keyframes = select(jnp.asarray(frames), mask, number)
  real = min(size, number)
  want = [(2 * k + 1) * size // (2 * real) for k in range(real)]
  want += [40] * (number - real)
  assert keyframes.index.tolist() == want
  assert jitted(tad.uniform_index, num_keyframes=number)(mask).tolist() == want
  assert keyframes.mask.tolist() == [k < size for k in range(number)]
  assert not np.any(keyframes.apex) and not np.any(keyframes.saliency)
  np.testing.assert_allclose(keyframes.weight.sum(1), keyframes.mask, atol=1e-6)
  shown = np.asarray(keyframes.weight)[range(real), want[:real]]
  np.testing.assert_array_equal(shown, keyframes.weight.max(1)[:real])


@pytest.mark.parametrize(
  ("selection", "number"),
  [("soft", 1), ("straight_through", 3), ("stochastic", 3)],
)
def test_video_of_one_frame(selection, number):
  frame = jnp.asarray([[3.0, -4.0]])

  def choose(frame):
    keyframes = tad.select_keyframes(
      frame,
      num_keyframes=number,
      selection=selection,
      rng=jax.random.key(0) if selection == "stochastic" else None,
    )
    return jnp.sum(keyframes.embedding), keyframes

  slope, keyframes = jax.jit(jax.grad(choose, has_aux=True))(frame)
  spare = number - 1
  assert keyframes.index.tolist() == [0] + [1] * spare
  assert keyframes.order.tolist() == [0] + [1] * spare
  assert keyframes.mask.tolist() == [True] + [False] * spare
  assert keyframes.weight.tolist() == [[1]] + [[0]] * spare
  assert keyframes.segment.tolist() == [[0, 1]] + [[1, 1]] * spare
  assert keyframes.embedding.tolist() == [[3, -4]] + [[0, 0]] * spare
  assert keyframes.variation.tolist() == [0]
  assert keyframes.apex.tolist() == [False]
  assert keyframes.logprob == 0
  assert slope.tolist() == [[1, 1]]


# -- properties


@few
@hypothesis.given(seeds, st.sampled_from(["soft", "straight_through"]))
def test_what_always_holds(seed, selection):
  rng = np.random.default_rng(seed)
  size, number = 40, 5
  frames = rng.normal(size=(size, 12)).astype(np.float32)
  frames += 3 * np.repeat(rng.normal(size=(10, 12)), 4, axis=0)
  mask = rng.random(size) < rng.choice([0.05, 0.3, 1.0])
  keyframes = select(jnp.asarray(frames), jnp.asarray(mask), number, selection)
  real = np.asarray(keyframes.mask)
  index = np.asarray(keyframes.index)
  assert real.sum() == min(number, mask.sum())
  assert np.all(np.diff(index[real]) > 0) and np.all(mask[index[real]])
  assert np.all(index[~real] == size)
  order = np.asarray(keyframes.order)
  assert sorted(order.tolist()) == index.tolist()
  low, high = np.asarray(keyframes.segment).T
  assert np.all((low <= index)[real]) and np.all((index < high)[real])
  weight = np.asarray(keyframes.weight)
  np.testing.assert_allclose(weight.sum(1), real, atol=1e-5)
  assert np.all(weight[:, ~mask] == 0) and np.all(weight >= 0)
  time = np.arange(size)
  assert np.all(weight[time < low[:, None]] == 0)
  assert np.all(weight[time >= high[:, None]] == 0)
  assert np.all((keyframes.saliency >= 0) & (keyframes.saliency <= 1))
  assert not np.any(np.asarray(keyframes.apex)[~mask])


@few
@hypothesis.given(seeds, st.sampled_from([1e-15, 1e-11, 0.03, 7.0, 1e9, 1e15]))
def test_scale_of_the_embedding_does_not_matter(seed, scale):
  frames, _ = shots([9, 14, 17], seed=seed, noise=0.2)
  one = select(jnp.asarray(frames))
  other = select(jnp.asarray(frames * scale))
  assert one.index.tolist() == other.index.tolist()
  assert one.apex.tolist() == other.apex.tolist()
  np.testing.assert_allclose(one.variation, other.variation, atol=2e-6)


@few
@hypothesis.given(seeds)
def test_time_reversal_mirrors_the_answer(seed):
  """Boundary t becomes T - t and frame t becomes T - 1 - t.

  It cannot hold where a tie or a plateau of even length has to be broken, nor
  for pieces and uniform indices that do not divide evenly: all of these round
  towards the start of the video.
  """
  frames, cuts = shots([9, 14, 17], seed=seed, noise=0.2)
  one = select(jnp.asarray(frames), num_keyframes=3)
  back = select(jnp.asarray(frames[::-1].copy()), num_keyframes=3)

  def mirror(value):
    return np.roll(np.asarray(value)[::-1], 1)

  np.testing.assert_allclose(mirror(back.variation), one.variation, atol=2e-6)
  assert mirror(back.apex).tolist() == one.apex.tolist()
  if np.flatnonzero(one.apex).tolist() == cuts.tolist():
    assert (39 - back.index[::-1]).tolist() == one.index.tolist()
    np.testing.assert_allclose(back.embedding[::-1], one.embedding, atol=1e-4)


def test_masked_frames_do_not_exist():
  frames, _ = shots([9, 14, 17], noise=0.1)
  rng = np.random.default_rng(5)
  mask = np.sort(rng.permutation(60)[:40])
  spread = np.full((60, 12), np.nan, np.float32)
  spread[mask] = frames
  real = np.zeros(60, bool)
  real[mask] = True
  padded = np.full((60, 12), np.nan, np.float32)
  padded[:40] = frames
  want = select(frames, np.ones(40, bool), 5)
  hole = select(spread, real, 5)
  tail = select(padded, np.arange(60) < 40, 5)
  assert hole.index.tolist() == mask[want.index].tolist()
  assert hole.order.tolist() == mask[want.order].tolist()
  assert tail.index.tolist() == want.index.tolist()
  assert tail.segment.tolist() == want.segment.tolist()
  for name in ("variation", "score", "apex"):
    value = np.asarray(getattr(want, name))
    np.testing.assert_allclose(
      np.asarray(getattr(hole, name))[mask], value, atol=1e-6
    )
    np.testing.assert_allclose(
      np.asarray(getattr(tail, name))[:40], value, atol=1e-6
    )
    assert not np.any(np.asarray(getattr(hole, name))[~real])
  for name in ("embedding", "saliency"):
    value = getattr(want, name)
    np.testing.assert_allclose(getattr(hole, name), value, atol=1e-6)
    np.testing.assert_allclose(getattr(tail, name), value, atol=1e-6)

  def loss(frames):
    keyframes = tad.select_keyframes(frames, jnp.asarray(real), num_keyframes=5)
    return jnp.sum(keyframes.embedding**2) + jnp.sum(keyframes.score**2)

  slope = np.asarray(jax.jit(jax.grad(loss))(spread))
  assert np.all(np.isfinite(slope)) and np.all(slope[~real] == 0)
  assert np.any(slope[real] != 0)


@pytest.mark.parametrize("mask", [None, np.arange(8) < 0])
def test_gradient_of_empty_and_constant_videos_is_finite(mask):
  def loss(frames):
    keyframes = tad.select_keyframes(frames, mask, num_keyframes=3)
    return jnp.sum(keyframes.embedding) + jnp.sum(keyframes.score)

  slope = jax.jit(jax.grad(loss))
  for frames in (jnp.zeros((8, 3)), jnp.ones((8, 3))):
    assert np.all(np.isfinite(slope(frames)))


def test_batch_is_a_loop_and_other_videos_do_not_matter():
  lengths = ([9, 14, 17], [20, 20], [40], [5, 6, 7, 8, 9, 5])
  batch = jnp.asarray([shots(n, seed=i)[0] for i, n in enumerate(lengths)])
  mask = jnp.arange(40) < jnp.asarray([40, 33, 3, 40])[:, None]
  many = tad.select_videos(batch, mask, num_keyframes=4)
  for video in range(4):
    one = select(batch[video], mask[video])
    picked = jax.tree.map(lambda x, video=video: x[video], many)
    assert picked.index.tolist() == one.index.tolist()
    chex.assert_trees_all_close(picked, one, atol=2e-6)
  # A list of scales, as a config gives it, and a scan instead of a vmap.
  listed = tad.score_videos(batch, mask, scales=[2, 4])
  np.testing.assert_allclose(listed, many.variation, atol=2e-6)

  def step(seen, video):
    keyframes = tad.select_keyframes(*video, num_keyframes=4)
    return seen + jnp.sum(keyframes.mask), keyframes

  seen, scanned = jax.lax.scan(step, 0, (batch, mask))
  assert seen == 4 + 4 + 3 + 4
  chex.assert_trees_all_close(scanned, many, atol=2e-6)


SHARDED = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from cf_jax import tad

assert jax.device_count() == 8
rng = np.random.default_rng(0)
frame = np.repeat(rng.normal(size=(16, 4, 6)), 6, axis=1)
frame = (frame + 0.02 * rng.normal(size=frame.shape)).astype(np.float32)
mask = np.arange(24) < rng.integers(15, 25, (16, 1))
query = frame[:, 3]
how = dict(num_keyframes=3)
want = tad.select_videos(frame, mask, query=query, **how)

def loss(frame, mask, query):
  found = tad.select_videos(frame, mask, query=query, **how)
  return jnp.sum(found.embedding ** 2), found

slope = jax.jit(jax.grad(loss, has_aux=True))
want_slope = slope(frame, mask, query)[0]
assert len(np.unique(want.index, axis=0)) > 3
for kind in (AxisType.Auto, AxisType.Explicit):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  split = NamedSharding(mesh, P("data"))
  rows = jax.device_put((frame, mask, query), split)
  found = tad.select_videos(*rows[:2], query=rows[2], **how)
  score = tad.score_videos(*rows[:2])
  gradient, inside = slope(*rows)
  # The log-probability of what is not drawn is a constant, kept everywhere.
  for leaf in jax.tree.leaves((found.replace(logprob=score), score, gradient)):
    assert leaf.sharding.is_equivalent_to(split, leaf.ndim), leaf.sharding
  for name in ("index", "order", "mask", "segment", "apex"):
    for other in (found, inside):
      np.testing.assert_array_equal(getattr(other, name), getattr(want, name))
  np.testing.assert_allclose(score, want.variation, atol=2e-6)
  np.testing.assert_allclose(found.weight, want.weight, atol=1e-5)
  np.testing.assert_allclose(gradient, want_slope, atol=1e-4)
  # No part of a video is sent: the devices only tell one another, with one
  # bool, whether any of them has to go round a loop again.
  text = slope.lower(*rows).compile().as_text()
  kinds = "all-[a-z]+|collective-[a-z]+|reduce-scatter|ragged-[a-z]+"
  sent = re.findall(rf"= (\\S+) ({kinds})", text)
  assert sent and set(sent) == {("pred[]", "all-reduce")}, (kind, sent)
print("equal")
"""


def test_eight_devices_share_the_videos(with_devices):
  assert "equal" in with_devices(8, SHARDED)


def test_numpy_arrays_can_be_constants_of_a_jit():
  frames, _ = shots([9, 14])
  mask = np.arange(23) != 4
  curve = np.random.default_rng(0).random(23)
  order = np.array([7, 2, 23])

  def everything(frames, mask, curve, order, apex):
    return (
      tad.select_keyframes(
        frames, mask, num_keyframes=3, query=frames[3], bonus=curve
      ),
      tad.distill_keyframes(frames, curve, apex, curve, mask, num_keyframes=3),
      tad.detect_inflections(curve, mask),
      tad.temporal_median(frames, mask),
      tad.uniform_index(mask, 3),
      tad.relevance_scores(frames, frames[3]),
      tad.selection_logprob(curve, order, mask),
    )

  arrays = (frames, mask, curve, order, np.arange(23) == 9)
  want = jax.jit(everything)(*arrays)
  ones = mask.astype(np.int32)  # as tokenizers make them
  got = jax.jit(lambda: everything(frames, ones, *arrays[2:]))()
  chex.assert_trees_all_close(got, want, atol=1e-6)
  frames[7] = np.nan
  with pytest.raises(ValueError, match="NaN or inf in 1 of 23"):
    jax.jit(lambda: tad.variation_scores(frames, mask))()


def test_mask_of_another_length():
  for score in (tad.variation_scores, jax.jit(tad.variation_scores)):
    with pytest.raises(ValueError, match=r"mask has shape \(4,\).* \(5,\)"):
      score(jnp.ones((5, 2)), jnp.ones(4, bool))


def test_nan_is_an_error_outside_jit_and_stays_in_its_video_inside():
  batch = jnp.asarray([shots([9, 14], seed=i)[0] for i in range(3)])
  bad = batch.at[1, 4, 2].set(jnp.nan)
  with pytest.raises(ValueError, match="NaN or inf in 1 of 69 frames"):
    tad.select_videos(bad, num_keyframes=4)
  with pytest.raises(ValueError, match="mask=False"):
    tad.variation_scores(bad[1])
  mask = jnp.ones((3, 23), bool).at[1, 4].set(False)
  tad.score_videos(bad, mask)  # as the message says
  many = jax.jit(jax.vmap(select))
  want, got = many(batch), many(bad)
  for video in (0, 2):
    chex.assert_trees_all_equal(
      jax.tree.map(lambda x, video=video: x[video], (got,)),
      jax.tree.map(lambda x, video=video: x[video], (want,)),
    )
  uniform = tad.uniform_index(jnp.ones(23, bool), 4)
  assert got.index[1].tolist() == uniform.tolist()
  assert np.all(np.isnan(got.embedding[1]))
  assert np.all(np.isnan(got.variation[1, 1:]))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(num_keyframes=0), "num_keyframes=0"),
    (dict(num_keyframes=2, scales=()), "scales"),
    (dict(num_keyframes=2, scales=(0,)), "scales"),
    (dict(num_keyframes=2, metric="dot"), "metric='dot'.*'cosine', 'l2'"),
    (dict(num_keyframes=2, min_gap=0), "min_gap"),
    (dict(num_keyframes=2, smoothing=-1.0), "smoothing"),
    (dict(num_keyframes=2, shown="best"), "shown"),
    (dict(num_keyframes=2, crowded="no"), "crowded"),
    (dict(num_keyframes=2, strength="no"), "strength"),
    (dict(num_keyframes=2, selection="hard"), "selection"),
    (dict(num_keyframes=2, selection="stochastic"), "rng"),
  ],
)
def test_settings_out_of_range(settings, message):
  with pytest.raises(ValueError, match=message):
    tad.select_keyframes(jnp.ones((5, 2)), **settings)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(num_keyframes=2.5), r"num_keyframes=2\.5, expected a whole"),
    (dict(scales=(1.5,)), r"scales=\(1\.5,\), expected window lengths, whole"),
    (dict(scales=3), "scales=3"),
    (dict(min_gap=2.5), r"min_gap=2\.5"),
    (dict(smoothing=math.nan), "smoothing=nan"),
    (dict(gate=math.nan), "gate=nan, expected a finite number"),
    (dict(softness=0.0), r"softness=0\.0, expected a number above 0"),
    (dict(temperature=0), "temperature=0, expected"),
    (dict(temperature=math.nan), "temperature=nan"),
    (dict(query=np.ones(3)), r"query has shape \(3,\), expected \(2,\)"),
    (dict(bonus=np.ones(3)), r"bonus has shape \(3,\), expected \(5,\)"),
    (dict(bonus=np.full(5, np.nan)), "bonus is NaN in 5 of 5 frames"),
  ],
)
def test_settings_that_mean_nothing(settings, message):
  choose = functools.partial(
    tad.select_keyframes, **(dict(num_keyframes=2) | settings)
  )
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(choose, jnp.ones((5, 2)))


def test_settings_are_checked_before_jit():
  frames = jnp.ones((1, 5, 2))
  for name in ("temperature", "softness"):
    with pytest.raises(ValueError, match=f"{name}=-1"):
      tad.select_videos(frames, num_keyframes=2, **{name: -1})
  with pytest.raises(ValueError, match="bonus is NaN in 1 of 5"):
    bonus = np.array([[0, 0, np.nan, 0, 0]])
    tad.select_videos(frames, num_keyframes=2, bonus=bonus)
  with pytest.raises(ValueError, match="temperature=0"):
    tad.selection_logprob(jnp.ones(5), jnp.arange(2), temperature=0)


def test_a_video_without_a_frame():
  with pytest.raises(ValueError, match=r"shape \(0, 3\).* at least one frame"):
    jax.eval_shape(tad.variation_scores, jnp.ones((0, 3)))


def test_a_mask_may_be_a_list():
  frames = jnp.asarray([shots([3, 3])[0]])
  mask = np.arange(6)[None] < 4
  chex.assert_trees_all_equal(
    tad.score_videos(frames, mask.tolist()), tad.score_videos(frames, mask)
  )


@pytest.mark.parametrize(
  "selection", ["soft", "straight_through", "stochastic"]
)
def test_memory_is_linear(selection):
  """No array of the program grows as T * T or T * E * K."""
  size, width, number = 512, 64, 16

  def run(frames, rng):
    keyframes = tad.select_keyframes(
      frames, num_keyframes=number, selection=selection, rng=rng
    )
    return jnp.sum(keyframes.embedding) + keyframes.logprob

  def sizes(jaxpr):
    for equation in jaxpr.eqns:
      for out in equation.outvars:
        yield math.prod(out.aval.shape)
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        yield from sizes(inner)

  graph = jax.make_jaxpr(jax.grad(run))(
    jnp.ones((size, width)), jax.random.key(0)
  )
  assert max(sizes(graph.jaxpr)) <= 2 * size * width


# -- gradients


def test_soft_gradient_equals_finite_differences():
  with jax.enable_x64(True):
    frames, _ = shots([7, 9, 8], seed=2, width=4, noise=0.3)
    rng = np.random.default_rng(0)
    frames = jnp.asarray(frames, jnp.float64)
    mask = jnp.arange(24) != 20
    probe = jnp.asarray(rng.normal(size=(4, 4)))
    ray = jnp.asarray(rng.normal(size=(24, 4)))
    query = jnp.asarray(rng.normal(size=4))
    extra = jnp.asarray(rng.normal(size=24))

    def loss(frames, query, extra):
      keyframes = tad.select_keyframes(
        frames, mask, num_keyframes=4, query=query, bonus=extra
      )
      return (
        jnp.sum(probe * keyframes.embedding)
        + jnp.sum(extra * keyframes.score)
        + jnp.sum(keyframes.weight**2)
      )

    loss = jax.jit(loss)
    slope = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(frames, query, extra)
    step = 1e-5
    want = [
      (
        loss(frames + step * ray, query, extra)
        - loss(frames - step * ray, query, extra)
      ),
      (
        loss(frames, query + step * query[::-1], extra)
        - loss(frames, query - step * query[::-1], extra)
      ),
      (
        loss(frames, query, extra + step * ray[:, 0])
        - loss(frames, query, extra - step * ray[:, 0])
      ),
    ]
    got = [
      jnp.sum(slope[0] * ray),
      jnp.sum(slope[1] * query[::-1]),
      jnp.sum(slope[2] * ray[:, 0]),
    ]
    for have, difference in zip(got, want, strict=True):
      assert float(have) == pytest.approx(
        float(difference) / (2 * step), rel=1e-6
      )


def test_forward_mode_and_second_derivatives():
  with jax.enable_x64(True):
    frames, _ = shots([5, 6], seed=2, width=3, noise=0.3)
    rng = np.random.default_rng(0)
    frames = jnp.asarray(frames, jnp.float64)
    ray = jnp.asarray(rng.normal(size=frames.shape))
    probe = jnp.asarray(rng.normal(size=(2, 3)))

    def loss(frames):
      keyframes = tad.select_keyframes(frames, num_keyframes=2)
      value = jnp.sum(probe * keyframes.embedding**2)
      return value + jnp.sum(keyframes.weight**3)

    step = 1e-5

    @jax.jit
    def everything(frames):
      slope = jax.grad(loss)
      return {
        "forward": jax.jvp(loss, (frames,), (ray,))[1],
        "backward": jnp.sum(slope(frames) * ray),
        "second": jax.jvp(slope, (frames,), (ray,))[1],
        "value": loss(frames),
        "slope": slope(frames),
      }

    here, ahead, behind = (
      everything(frames + n * step * ray) for n in (0, 1, -1)
    )
    rise = (ahead["value"] - behind["value"]) / (2 * step)
    assert float(here["forward"]) == pytest.approx(float(rise), rel=1e-6)
    assert float(here["backward"]) == pytest.approx(float(rise), rel=1e-6)
    bend = (ahead["slope"] - behind["slope"]) / (2 * step)
    np.testing.assert_allclose(here["second"], bend, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(bend)) > 0.1


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("smoothing", [0.0, 1.5])
def test_variation_gradient_equals_finite_differences(metric, smoothing):
  with jax.enable_x64(True):
    rng = np.random.default_rng(1)
    frames = jnp.asarray(rng.normal(size=(11, 3)))
    ray = jnp.asarray(rng.normal(size=(11, 3)))
    probe = jnp.asarray(rng.normal(size=11))

    @jax.jit
    def loss(frames):
      score = tad.variation_scores(
        frames, metric=metric, scales=(1, 3), smoothing=smoothing
      )
      return jnp.sum(probe * score)

    step = 1e-6
    want = (loss(frames + step * ray) - loss(frames - step * ray)) / (2 * step)
    got = jnp.sum(jax.grad(loss)(frames) * ray)
    assert float(got) == pytest.approx(float(want), rel=1e-6)


def test_gradient_of_tiny_and_huge_embeddings():
  frames = jnp.asarray(shots([4, 5])[0])
  slope = jax.jit(jax.grad(lambda f: jnp.sum(tad.variation_scores(f) ** 2)))
  want = slope(frames)
  for scale in (1e-11, 1e9):
    got = slope(frames * scale) * scale
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_straight_through():
  frames = jnp.asarray(shots([9, 14, 17], noise=0.2)[0])
  rng = np.random.default_rng(0)
  probe, tilt = rng.normal(size=(4, 12)), rng.normal(size=(4, 40))

  def loss(frames, selection):
    keyframes = tad.select_keyframes(
      frames, num_keyframes=4, selection=selection
    )
    value = jnp.sum(probe * keyframes.embedding)
    return value + jnp.sum(tilt * keyframes.weight), keyframes

  slope = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
  with jax.enable_x64(True):
    wide = jnp.asarray(frames, jnp.float64)
    soft_slope, soft = slope(wide, "soft")
    hard_slope, hard = slope(wide, "straight_through")
    # Compiled, the two add in different orders; see the next test.
    np.testing.assert_allclose(hard_slope, soft_slope, rtol=0, atol=1e-12)
    assert np.max(np.abs(soft_slope)) > 0.1
  narrow = select(frames, selection="straight_through")
  for source, keyframes in ((wide, hard), (frames, narrow)):
    index = np.asarray(soft.index)
    assert keyframes.index.tolist() == index.tolist()
    np.testing.assert_array_equal(
      keyframes.embedding, np.asarray(source)[index]
    )
    np.testing.assert_array_equal(keyframes.weight, np.eye(40)[index])


def test_straight_through_gradient_is_the_soft_one_to_the_last_bit():
  """Operation by operation, as nothing is fused then."""
  rng = np.random.default_rng(0)
  frames, _ = shots([5, 6], width=3, noise=0.2)
  apex = jnp.arange(11) == 5
  probe = rng.normal(size=(3, 3)).astype(np.float32)
  tilt = rng.normal(size=(3, 11)).astype(np.float32)
  curves = jnp.asarray(rng.random((3, 11)), jnp.float32)

  def loss(frames, curves, selection):
    variation, strength, bonus = curves
    keyframes = tad.distill_keyframes(
      frames,
      variation,
      apex,
      strength,
      num_keyframes=3,
      selection=selection,
      bonus=bonus,
    )
    value = jnp.sum(probe * keyframes.embedding)
    return value + jnp.sum(tilt * keyframes.weight)

  slope = jax.grad(loss, argnums=(0, 1))
  soft = slope(jnp.asarray(frames), curves, "soft")
  hard = slope(jnp.asarray(frames), curves, "straight_through")
  chex.assert_trees_all_equal(hard, soft)
  assert all(np.any(leaf != 0) for leaf in soft)


def test_straight_through_tokens():
  frames = jnp.asarray(shots([9, 14, 17], noise=0.2)[0])
  token = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 5)))

  def loss(token, bonus):
    keyframes = tad.select_keyframes(frames, num_keyframes=4, bonus=bonus)
    return jnp.sum(tad.straight_through_tokens(token, keyframes) ** 2)

  bonus = jnp.zeros(40)
  slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  value, (token_slope, slope) = slopes(token, bonus)
  assert float(value) == pytest.approx(float(jnp.sum(token**2)), rel=1e-6)
  np.testing.assert_allclose(token_slope, 2 * token, rtol=1e-6)

  def surrogate(bonus):  # 2 |x_k|^2 times the weight of the shown frame
    keyframes = tad.select_keyframes(frames, num_keyframes=4, bonus=bonus)
    shown = keyframes.weight[jnp.arange(4), keyframes.index]
    return jnp.sum(2 * jnp.sum(token**2, axis=(1, 2)) * shown)

  np.testing.assert_allclose(
    slope, jax.jit(jax.grad(surrogate))(bonus), atol=1e-5
  )
  assert np.any(slope != 0)


# -- stochastic selection


def log_probability(score, order, min_gap):
  """By hand: masked draws, all unpicked frames back where none is left."""
  total, picked = 0.0, []
  for pick in order:
    free = [
      t
      for t in range(len(score))
      if all(abs(t - other) >= min_gap for other in picked)
    ] or [t for t in range(len(score)) if t not in picked]
    if pick not in free:
      return -math.inf
    total += score[pick] - math.log(sum(math.exp(score[t]) for t in free))
    picked.append(pick)
  return total


@pytest.mark.parametrize(
  ("size", "number", "min_gap"), [(7, 3, 2), (6, 3, 2), (5, 3, 1), (5, 2, 3)]
)
def test_logprob_equals_enumeration(size, number, min_gap):
  score = np.random.default_rng(size).normal(size=size)
  orders, want = [], []
  for order in itertools.permutations(range(size), number):
    value = log_probability(score / 0.7, order, min_gap)
    if value > -math.inf:
      orders.append(order)
      want.append(value)
  assert sum(map(math.exp, want)) == pytest.approx(1)
  logprob = functools.partial(
    tad.selection_logprob, temperature=0.7, min_gap=min_gap
  )
  got = jax.jit(jax.vmap(logprob, (None, 0)))(
    jnp.asarray(score, jnp.float32), jnp.asarray(orders)
  )
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_logprob_golden():
  # Plackett-Luce over weights 1, 2, 3: 3/6 * 1/3; frame 3 does not exist.
  score = jnp.log(jnp.asarray([1.0, 2, 3, 9]))
  mask = jnp.asarray([True, True, True, False])
  logprob = jitted(tad.selection_logprob, min_gap=1)
  value = logprob(score, jnp.asarray([2, 0]), mask)
  assert value == pytest.approx(math.log(1 / 6), abs=1e-6)
  # A fourth pick there is none: slot T counts for nothing.
  value = logprob(score, jnp.asarray([2, 0, 1, 4]), mask)
  assert value == pytest.approx(math.log(1 / 6), abs=1e-6)
  # What no draw gives: the frame that does not exist, one frame twice.
  assert logprob(score, jnp.asarray([3, 0]), mask) == -math.inf
  assert logprob(score, jnp.asarray([2, 2]), mask) == -math.inf


def test_logprob_of_picks_too_near_each_other():
  # 3 apart: frame 3 alone is left after frame 0, of weight 1 in 15.
  score = jnp.log(jnp.asarray([1.0, 2, 3, 9]))
  logprob = jax.jit(
    jax.value_and_grad(functools.partial(tad.selection_logprob, min_gap=3))
  )
  value, slope = logprob(score, jnp.asarray([0, 3]))
  assert value == pytest.approx(math.log(1 / 15), abs=1e-6)
  np.testing.assert_allclose(slope, np.array([14, -2, -3, -9]) / 15, atol=1e-6)
  value, slope = logprob(score, jnp.asarray([0, 1]))
  assert value == -math.inf and np.all(np.isfinite(slope))


@functools.cache
def draws(count):
  """Frames, a fixed curve, and `count` selections of 2 of 5 frames."""
  frames = jnp.asarray(np.random.default_rng(4).normal(size=(5, 3)))
  curve = jnp.asarray([0.0, 0.4, -0.3, 0.8, 0.1])
  run = jax.jit(jax.vmap(lambda rng: stochastic(frames, curve, rng)))
  return frames, curve, run(jax.random.split(jax.random.key(7), count))


def stochastic(frames, curve, rng):
  return tad.distill_keyframes(
    frames,
    jnp.zeros(5),
    jnp.zeros(5, bool),
    jnp.zeros(5),
    num_keyframes=2,
    selection="stochastic",
    bonus=curve,
    rng=rng,
    min_gap=2,
  )


def test_draws_follow_their_probability():
  _, curve, drawn = draws(20_000)
  order = np.asarray(drawn.order)
  np.testing.assert_array_equal(np.sort(order, axis=1), drawn.index)
  for picks in itertools.permutations(range(5), 2):
    want = log_probability(np.asarray(curve), picks, 2)
    match = np.all(order == picks, axis=1)
    spread = 4 * math.sqrt(math.exp(want) / len(order)) if want > -99 else 0
    assert abs(np.mean(match) - math.exp(want)) <= spread, picks
    np.testing.assert_allclose(drawn.logprob[match], want, atol=1e-5)


def test_reinforce_estimates_the_exact_gradient():
  _, curve, drawn = draws(20_000)
  reward = jnp.asarray([0.0, 1.0, 0.2, -0.5, 2.0])
  logprob = functools.partial(tad.selection_logprob, min_gap=2)
  orders = jnp.asarray(
    [
      picks
      for picks in itertools.permutations(range(5), 2)
      if abs(picks[0] - picks[1]) > 1
    ]
  )

  def expected(curve):
    chance = jnp.exp(jax.vmap(logprob, (None, 0))(curve, orders))
    return jnp.sum(chance * jnp.sum(reward[orders], axis=1))

  def surrogate(curve):
    value = jnp.sum(reward[drawn.order], axis=1)
    value -= jnp.mean(value)
    return jnp.mean(jax.vmap(logprob, (None, 0))(curve, drawn.order) * value)

  exact = jax.jit(jax.grad(expected))(curve)
  estimate = jax.jit(jax.grad(surrogate))(curve)
  np.testing.assert_allclose(estimate, exact, atol=0.03)
  assert np.max(np.abs(exact)) > 0.1


def test_stochastic_selection_of_videos():
  batch = jnp.asarray([shots([9, 14], seed=i)[0] for i in range(2)])
  mask = jnp.arange(23) < jnp.asarray([23, 3])[:, None]
  kwargs = dict(num_keyframes=5, selection="stochastic", temperature=2.0)
  one = tad.select_videos(batch, mask, rng=jax.random.key(0), **kwargs)
  again = tad.select_videos(batch, mask, rng=jax.random.key(0), **kwargs)
  other = tad.select_videos(batch, mask, rng=jax.random.key(1), **kwargs)
  chex.assert_trees_all_equal(one, again)
  assert one.order[0].tolist() != other.order[0].tolist()
  assert one.mask.sum(1).tolist() == [5, 3]
  assert one.order[1, 3:].tolist() == [23, 23]
  for video in range(2):
    value = jitted(tad.selection_logprob, temperature=2.0)(
      one.score[video], one.order[video], mask[video]
    )
    assert float(value) == pytest.approx(float(one.logprob[video]), abs=1e-5)
    real = one.index[video][one.mask[video]]
    np.testing.assert_array_equal(
      one.embedding[video][one.mask[video]], batch[video][real]
    )
