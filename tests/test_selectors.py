"""The baseline selectors, each against a case worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax import selectors, tad

A, B, C = np.eye(3, dtype=np.float32)
QUERY = jnp.asarray([1.0, 0.0])


def with_relevance(*cosines):
  """Frames whose cosine with QUERY is given."""
  cosine = np.asarray(cosines)
  return jnp.asarray(np.stack([cosine, np.sqrt(1 - cosine**2)], 1), jnp.float32)


def run(selector, embedding, mask=None, **settings):
  static = {
    name: settings.pop(name)
    for name in ("num_keyframes", "median", "depth")
    if name in settings
  }
  program = jax.jit(functools.partial(selector, **static))
  return program(embedding, mask, **settings)


ALL = {
  "uniform": {},
  "random": {"rng": jax.random.key(3)},
  "top_k": {},
  "k_center": {},
  "k_center_median": {},
  "aks": {},
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("number", [1, 4, 9])
def test_what_always_holds(name, number):
  """Holes and padding are never shown; masked slots hold T."""
  rng = np.random.default_rng(0)
  frames = rng.normal(size=(12, 5)).astype(np.float32)
  mask = np.array([0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 0], bool)
  frames[~mask] = np.nan
  selector = selectors.by_name(name)
  keyframes = run(selector, frames, mask, num_keyframes=number, **ALL[name])
  shown = min(number, 7)
  index, real = np.asarray(keyframes.index), np.asarray(keyframes.mask)
  assert real.tolist() == [k < shown for k in range(number)]
  assert np.all(np.diff(index[:shown]) > 0) and np.all(mask[index[:shown]])
  assert np.all(index[shown:] == 12)
  assert sorted(keyframes.order.tolist()) == index.tolist()
  assert keyframes.index.dtype == jnp.int32
  np.testing.assert_array_equal(
    keyframes.embedding[:shown], frames[index[:shown]]
  )
  assert np.all(keyframes.embedding[shown:] == 0)
  np.testing.assert_array_equal(keyframes.weight.sum(1), real)
  low, high = np.asarray(keyframes.segment)[:shown].T
  assert low[0] == 1 and high[-1] == 10 and np.all(low[1:] == high[:-1])
  assert np.all((low <= index[:shown]) & (index[:shown] < high))
  # The same fields and shapes as the layer it is compared with.
  ours = jax.eval_shape(
    functools.partial(tad.select_keyframes, num_keyframes=number),
    jnp.asarray(frames),
    jnp.asarray(mask),
  )
  assert jax.tree.map(lambda x: (x.shape, x.dtype), ours) == jax.tree.map(
    lambda x: (x.shape, x.dtype), keyframes
  )


def test_uniform():
  keyframes = run(selectors.uniform, jnp.ones((10, 3)), num_keyframes=4)
  assert keyframes.index.tolist() == [1, 3, 6, 8]
  assert keyframes.segment.tolist() == [[0, 2], [2, 5], [5, 7], [7, 10]]


def test_random_is_even_and_changes_with_its_key():
  frames = jnp.ones((6, 2))
  mask = jnp.asarray([True, True, False, True, True, True])
  draw = jax.jit(
    jax.vmap(
      lambda rng: selectors.random(frames, mask, num_keyframes=2, rng=rng).index
    )
  )
  index = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
  pairs, count = np.unique(index, axis=0, return_counts=True)
  assert len(pairs) == 10  # of 5 frames
  assert np.all(np.abs(count - 400) < 4 * np.sqrt(400))


def test_top_k_by_relevance_and_by_variation():
  frames = with_relevance(0.1, 0.9, 0.3, 0.8, 0.8, 0.2)
  keyframes = run(selectors.top_k, frames, num_keyframes=3, query=QUERY)
  assert keyframes.order.tolist() == [1, 3, 4]  # the earlier of equals first
  np.testing.assert_allclose(
    keyframes.score, [0.1, 0.9, 0.3, 0.8, 0.8, 0.2], atol=1e-6
  )
  cut = jnp.asarray(np.stack([A] * 6 + [B] * 6))
  keyframes = run(selectors.top_k, cut, num_keyframes=1)
  assert keyframes.index.tolist() == [6]


def test_all_frames():
  mask = jnp.asarray([True, False, True, True])
  keyframes = run(selectors.all_frames, jnp.ones((4, 2)), mask)
  assert keyframes.index.tolist() == [0, 2, 3, 4]
  assert keyframes.mask.tolist() == [True, True, True, False]
  run(selectors.all_frames, jnp.ones((4, 2)), num_keyframes=4)
  with pytest.raises(ValueError, match="num_keyframes=3.*None or 4"):
    selectors.all_frames(jnp.ones((4, 2)), num_keyframes=3)


def test_k_center():
  # From a the frame at 1 - cos = 1 is farthest, then the one between them
  # (1 - 0.8 and 1 - 0.6), then the other a, at 0.
  frames = jnp.asarray(np.stack([A, A, 0.8 * A + 0.6 * B, B]))
  keyframes = run(selectors.k_center, frames, num_keyframes=4)
  assert keyframes.order.tolist() == [0, 3, 2, 1]
  # A flicker is the farthest frame, and none after a median of three.
  frames = jnp.asarray(np.stack([A, A, A, -A, A, A, B, B, B]))
  plain = run(selectors.k_center, frames, num_keyframes=2)
  steady = run(selectors.k_center, frames, num_keyframes=2, median=True)
  assert plain.index.tolist() == [0, 3]
  assert steady.index.tolist() == [0, 6]


def test_aks():
  # Scaled to 0 .. 1 the scores are these. The best two of all eight stand out
  # by 1 - 0.25 = 0.75, under the threshold: halved, one for each half. With a
  # threshold of 0.7 they are taken together.
  frames = with_relevance(0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0)
  spread = run(selectors.aks, frames, num_keyframes=2, query=QUERY)
  assert spread.index.tolist() == [1, 4]
  together = run(
    selectors.aks, frames, num_keyframes=2, query=QUERY, threshold=0.7
  )
  assert together.index.tolist() == [1, 2]
  flat = run(selectors.aks, frames, num_keyframes=2, query=QUERY, depth=0)
  assert flat.index.tolist() == [1, 2]


def test_aks_gives_the_odd_frame_to_the_second_half():
  # Three for seven frames: one for the first three, two for the last four;
  # then one each for frames 3, 4 and 5, 6.
  frames = with_relevance(0.3, 0.4, 0.1, 0.2, 0.0, 0.1, 0.6)
  keyframes = run(selectors.aks, frames, num_keyframes=3, query=QUERY)
  assert keyframes.index.tolist() == [1, 3, 6]
  # Of five alike: one of the first two, and of three one and one of two.
  frames = with_relevance(*[0.5] * 5)
  keyframes = run(selectors.aks, frames, num_keyframes=3, query=QUERY)
  assert keyframes.index.tolist() == [0, 2, 3]


def split_by_relevance(score, number, threshold, depth, judged):
  """The recursion of the paper on numpy numbers; frames that are kept.

  `judged` is how many of the best speak for a segment: its share (None), or a
  number for all, as in the public code.
  """
  kept = []

  def visit(frames, share, depth):
    best = sorted(frames, key=lambda t: -score[t])  # earlier first among equals
    top = best[: judged or share]
    stands_out = np.mean(score[top]) - np.mean(score[frames]) > threshold
    if stands_out or depth == 0 or share <= 1:
      kept.extend(best[:share])
      return
    half = len(frames) // 2
    visit(frames[:half], share // 2, depth - 1)
    visit(frames[half:], share - share // 2, depth - 1)

  visit(list(range(len(score))), number, depth)
  return sorted(kept)


@pytest.mark.parametrize("number", [5, 8, 13])
@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.8])
def test_aks_equals_its_recursion(number, threshold):
  rng = np.random.default_rng(number)
  cosine = rng.beta(0.4, 2.0, 61).round(2)  # peaks, and ties
  mask = rng.random(61) < 0.8
  keyframes = run(
    selectors.aks,
    with_relevance(*cosine),
    mask,
    num_keyframes=number,
    query=QUERY,
    threshold=threshold,
  )
  score = np.asarray(keyframes.score)[mask]
  assert score.min() == 0 and score.max() == 1
  kept = split_by_relevance(score, number, threshold, 5, judged=None)
  assert keyframes.index.tolist() == np.flatnonzero(mask)[kept].tolist()


@pytest.mark.parametrize("size", [200, 333, 700])
def test_aks_equals_the_public_procedure(size):
  """With the settings it was published with, and 64 frames."""
  rng = np.random.default_rng(size)
  cosine = rng.random(size)
  if size == 700:  # frames that stand out at once
    cosine *= 0.05
    cosine[rng.permutation(size)[:70]] = 0.9 + 0.1 * rng.random(70)
  keyframes = run(
    selectors.aks, with_relevance(*cosine), num_keyframes=64, query=QUERY
  )
  score = np.asarray(keyframes.score)
  kept = split_by_relevance(score, 64, 0.8, 5, judged=64)
  assert keyframes.index.tolist() == kept and len(kept) == 64
  best = sorted(np.argsort(-score, kind="stable")[:64].tolist())
  assert (kept == best) == (size == 700)


def test_aks_by_halves_is_one_frame_per_part():
  frames = with_relevance(*[0.5] * 16)
  keyframes = run(selectors.aks, frames, num_keyframes=8, query=QUERY)
  assert keyframes.index.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


def test_number_out_of_range():
  for number in (0, 2.5):
    with pytest.raises(ValueError, match=f"num_keyframes={number}"):
      selectors.uniform(jnp.ones((4, 2)), num_keyframes=number)


def test_nan_is_an_error_outside_jit():
  frames = jnp.ones((1, 9, 3)).at[0, 4].set(jnp.nan)
  with pytest.raises(ValueError, match="NaN or inf in 1 of 9 frames"):
    selectors.select_videos("k_center", frames, num_keyframes=3)
  with pytest.raises(ValueError, match="NaN or inf in 1 of 9 frames"):
    selectors.k_center(frames[0], num_keyframes=3)


def test_numpy_arrays_can_be_constants_of_a_jit():
  frames = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
  mask = np.arange(12) < 9
  chosen = jax.jit(
    lambda rng: selectors.random(frames, mask, num_keyframes=4, rng=rng)
  )(jax.random.key(0))
  assert np.all(np.asarray(chosen.index) < 9)
  np.testing.assert_array_equal(chosen.embedding, frames[chosen.index])


# -- by name


def test_every_selector_has_a_name_and_a_case():
  assert set(selectors.SELECTORS) == {*ALL, "tad", "all_frames"}
  with pytest.raises(ValueError, match="named 'k-center' .* 'k_center',"):
    selectors.by_name("k-center")


@pytest.mark.parametrize("name", [*ALL, "all_frames"])
def test_a_batch_is_a_loop(name):
  rng = np.random.default_rng(1)
  frames = rng.normal(size=(3, 10, 4)).astype(np.float32)
  mask = np.arange(10) < np.array([[10], [7], [2]])
  number = 10 if name == "all_frames" else 4
  arrays = {}
  if name == "random":
    arrays["rng"] = jax.random.split(jax.random.key(2), 3)
  if name == "aks":
    arrays["query"] = rng.normal(size=(3, 4)).astype(np.float32)
  found = selectors.select_videos(
    name, frames, mask, num_keyframes=number, **arrays
  )
  one = jax.jit(
    functools.partial(selectors.by_name(name), num_keyframes=number)
  )
  for video in range(3):
    alone = one(
      frames[video], mask[video], **{k: v[video] for k, v in arrays.items()}
    )
    assert found.index[video].tolist() == alone.index.tolist()
    np.testing.assert_allclose(found.score[video], alone.score, atol=1e-5)
  assert found.mask.sum(1).tolist() == [number, min(number, 7), 2]


@pytest.mark.parametrize("key", [jax.random.key, jax.random.PRNGKey])
def test_a_key_is_split_over_the_videos(key):
  frames = jnp.ones((8, 100, 2))
  found = selectors.select_videos("random", frames, num_keyframes=3, rng=key(0))
  assert len({tuple(row) for row in found.index.tolist()}) == 8
