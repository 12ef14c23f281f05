"""The learned scorer: what it computes, what it ignores, and that it learns."""

import dataclasses
import functools
import itertools
import math

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cf_jax import grpo, tad
from cf_jax.models import selector

SMALL = selector.SelectorConfig(
  embedding_dim=6, query_dim=4, width=8, depth=2, kernel=5
)
# The hard choice can show any frame: pieces cover the video and are not
# narrowed to their central half.
ANY_FRAME = dict(shown="middle", crowded="priority")


init = jax.jit(selector.init, static_argnums=0)


@pytest.fixture(scope="module")
def params():
  """As if trained: no leaf is zero."""
  fresh = init(SMALL, jax.random.key(0))
  leaves, tree = jax.tree.flatten(fresh)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return tree.unflatten(
    leaf + 0.3 * jax.random.normal(key, leaf.shape)
    for leaf, key in zip(leaves, keys, strict=True)
  )


@pytest.fixture(scope="module")
def apply():
  return jax.jit(functools.partial(selector.apply, SMALL))


def frames_of(size, seed=0, width=6):
  rng = np.random.default_rng(seed)
  return (3 + rng.normal(size=(size, width))).astype(np.float32)


QUESTION = np.array([1.0, -2.0, 0.5, 3.0], np.float32)


# -- what it computes


def reference(config, params, frames, question):
  """The formula of the module's docstring, frame by frame, in float64."""
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

  def rms(x):
    return np.sqrt(np.mean(x * x))

  def silu(x):
    return x / (1 + np.exp(-x))

  def dense(leaf, x):
    return x @ leaf["kernel"] + leaf.get("bias", 0)

  def norm(leaf, x):
    return x / np.sqrt(np.mean(x * x) + 1e-6) * leaf["scale"]

  unit = [frame / rms(frame) for frame in frames.astype(np.float64)]
  mean = np.mean(unit, axis=0)
  spread = rms(np.stack(unit) - mean)
  x = []
  for t, frame in enumerate(unit):
    turn = np.pi * (t + 0.5) / len(unit) * np.array([1, 2, 4, 8])
    time = np.concatenate([np.sin(turn), np.cos(turn)])
    y = dense(p["frame"], (frame - mean) / spread)
    x.append(y + dense(p["video"], mean) + dense(p["time"], time))
  if question is None:
    c = silu(p["no_question"])
  else:
    c = silu(dense(p["question"], question / rms(question.astype(np.float64))))
  for layer in range(config.depth):
    leaf, step = p[f"layer_{layer}"], config.dilation**layer
    scale, shift = np.split(dense(leaf["film"], c), 2)
    y = [norm(leaf["norm"], frame) * (1 + scale) + shift for frame in x]
    for t in range(len(x)):
      mixed = np.zeros(config.width)
      for tap in range(config.kernel):
        other = t + (tap - config.kernel // 2) * step
        if 0 <= other < len(y):
          mixed += leaf["kernel"][tap] * y[other]
      up = dense(leaf["mlp"]["up"], mixed)
      gate = silu(dense(leaf["mlp"]["gate"], mixed))
      x[t] = x[t] + dense(leaf["mlp"]["down"], gate * up)
  direction = (p["score"] + c @ p["likeness"]) / np.sqrt(config.width)
  return np.array([norm(p["norm"], frame) @ direction for frame in x])


@pytest.mark.parametrize("question", [QUESTION, None], ids=["asked", "unasked"])
@pytest.mark.parametrize("size", [1, 11])
def test_score_equals_the_formula(params, apply, question, size):
  if size == 1:  # of one frame nothing deviates
    frames = frames_of(2)[:1]
    score = apply(params, frames, None, question)
    assert score.shape == (1,) and np.isfinite(score).all()
    return
  frames = frames_of(size)
  score = apply(params, frames, None, question)
  assert score.dtype == jnp.float32
  want = reference(SMALL, params, frames, question)
  np.testing.assert_allclose(score, want, atol=2e-5)
  assert np.ptp(want) > 0.1


def test_masked_frames_do_not_exist(params, apply):
  frames = frames_of(13)
  mask = np.array([0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0], bool)
  frames[~mask] = np.nan
  score = apply(params, frames, mask, QUESTION)
  want = reference(SMALL, params, frames[mask], QUESTION)
  np.testing.assert_allclose(score[mask], want, atol=2e-5)
  np.testing.assert_array_equal(score[~mask], 0)

  def total(params, frames):
    score = selector.apply(SMALL, params, frames, mask, QUESTION)
    return jnp.sum(jnp.sin(score))

  slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(params, frames)
  for path, leaf in jax.tree_util.tree_leaves_with_path(slopes[0]):
    assert np.isfinite(leaf).all(), path
    assert np.any(leaf) == (path[0].key != "no_question"), path
  np.testing.assert_array_equal(slopes[1][~mask], 0)
  assert np.isfinite(slopes[1]).all()


def test_batch_is_a_loop_and_other_videos_do_not_matter(params, apply):
  frames = np.stack([frames_of(9, seed) for seed in range(3)])
  mask = np.arange(9) < np.array([[9], [4], [0]])
  questions = np.stack([QUESTION, -QUESTION, 2 * QUESTION[::-1]])
  frames[2] = np.nan
  batched = jax.jit(jax.vmap(functools.partial(selector.apply, SMALL, params)))
  score = batched(frames, mask, questions)
  for video in range(3):
    one = apply(params, frames[video], mask[video], questions[video])
    np.testing.assert_allclose(score[video], one, atol=1e-5)
  np.testing.assert_array_equal(score[2], 0)


def test_sizes_of_embeddings_do_not_matter(params, apply):
  frames = frames_of(9)
  size = np.geomspace(1e-3, 1e3, 9, dtype=np.float32)[:, None]
  score = apply(params, frames, None, QUESTION)
  other = apply(params, size * frames, None, 7 * QUESTION)
  np.testing.assert_allclose(other, score, atol=1e-4)


@pytest.mark.parametrize("frame", [0.0, 1.0], ids=["zeros", "still"])
def test_still_videos_score_by_time_alone(params, frame):
  frames = jnp.full((8, 6), frame) + 1e-8

  def total(params, frames):
    score = selector.apply(SMALL, params, frames, None, QUESTION)
    return jnp.sum(score**2), score

  slopes, score = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(
    params, frames
  )
  noisy = frames * (1 + 1e-7 * frames_of(8))
  np.testing.assert_allclose(total(params, noisy)[1], score, atol=1e-2)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_bfloat16(params, apply):
  frames, rough = frames_of(9), dataclasses.replace(SMALL, dtype="bfloat16")
  score = jax.jit(functools.partial(selector.apply, rough))(
    params, frames, None, QUESTION
  )
  assert score.dtype == jnp.float32
  want = apply(params, frames, None, QUESTION)
  assert np.corrcoef(score, want)[0, 1] > 0.99


def test_work_is_linear_in_the_length_of_the_video(params):
  """No array of the program grows as T * T."""
  size = 50_000
  program = jax.make_jaxpr(functools.partial(selector.apply, SMALL))(
    params, jnp.zeros((size, 6)), jnp.ones(size, bool), QUESTION
  )

  def sizes(jaxpr):
    for equation in jaxpr.eqns:
      for out in equation.outvars:
        yield math.prod(out.aval.shape)
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        yield from sizes(inner)

  assert max(sizes(program.jaxpr)) <= 2 * SMALL.width * size  # the SwiGLU


# -- beside TAD


@pytest.mark.parametrize(
  "settings",
  [
    dict(selection="straight_through", **ANY_FRAME),
    dict(selection="stochastic", rng=jax.random.key(0)),
  ],
  ids=["hard", "drawn"],
)
def test_untrained_it_leaves_tad_as_it_is(settings):
  fresh = init(SMALL, jax.random.key(3))
  frames = np.repeat(frames_of(5), 7, axis=0)
  settings = dict(num_keyframes=4, **settings)

  @jax.jit
  def both(frames):
    ours = selector.select(SMALL, fresh, frames, None, QUESTION, **settings)
    return ours, tad.select_keyframes(frames, **settings)

  ours, theirs = both(frames)
  assert theirs.apex.any()
  chex.assert_trees_all_equal(ours, theirs)


def test_the_score_is_added_to_the_priority(params):
  frames, mask = jnp.asarray(frames_of(20)), np.arange(20) < 17
  question = np.float32([3, 1, 4, 1, 5, 9])
  config = dataclasses.replace(SMALL, query_dim=6)
  untrained = init(config, jax.random.key(0))

  @jax.jit
  def scores(params, frames):
    plain = tad.select_keyframes(frames, mask, num_keyframes=3)
    learned = selector.apply(SMALL, params, frames, mask, QUESTION)
    both = selector.select(
      SMALL, params, frames, mask, QUESTION, num_keyframes=3
    )
    asked = selector.select(
      config,
      untrained,
      frames,
      mask,
      question,
      num_keyframes=3,
      relevance_weight=2.0,
    )
    return plain.score, learned, both.score, asked.score

  plain, learned, both, asked = scores(params, frames)
  np.testing.assert_allclose(both, plain + learned, atol=1e-5)
  cosine = frames @ question / np.linalg.norm(frames, axis=1) / 11.5325626
  np.testing.assert_allclose(asked, plain + 2 * cosine * mask, atol=1e-5)
  select = functools.partial(
    selector.select, num_keyframes=3, relevance_weight=1.0
  )
  with pytest.raises(ValueError, match="query_dim=4, embedding_dim=6 and a"):
    select(SMALL, params, frames, mask, QUESTION)
  with pytest.raises(ValueError, match="embedding_dim=6 and no question"):
    select(config, params, frames)


# -- log-probabilities of draws


def by_hand(score, order, temperature, min_gap):
  """log p of picks: masked softmaxes, as in the docstring of `tad`."""
  total, picked = 0.0, []
  for pick in order:
    free = [
      t
      for t in range(score.shape[0])
      if all(abs(t - other) >= min_gap for other in picked)
    ] or [t for t in range(score.shape[0]) if t not in picked]
    level = score[jnp.asarray(free)] / temperature
    total += score[pick] / temperature - jax.nn.logsumexp(level)
    picked.append(pick)
  return total


def test_policy_gradient_equals_enumeration(params):
  """All ordered picks of 2 of 5 frames, of a reward that looks at both."""
  frames = jnp.asarray(frames_of(5))
  settings = dict(num_keyframes=2, temperature=0.7, min_gap=2)
  orders = [
    pair
    for pair in itertools.permutations(range(5), 2)
    if abs(pair[0] - pair[1]) >= 2
  ]
  value = jnp.asarray([np.cos(3.0 * a + b) for a, b in orders])

  def chances(params):
    frozen = tad.select_keyframes(frames, num_keyframes=2).score
    score = frozen + selector.apply(SMALL, params, frames, None, QUESTION)
    return jnp.stack([by_hand(score, order, 0.7, 2) for order in orders])

  def logprobs(params):
    return jax.vmap(
      lambda order: selector.selection_logprob(
        SMALL, params, frames, order, None, QUESTION, **settings
      )
    )(jnp.asarray(orders))

  @jax.jit
  def both(params):
    functions = (chances, logprobs)
    return [(f(params), jax.jacrev(f)(params)) for f in functions]

  (want, want_slope), (found, slope) = both(params)
  assert float(jnp.sum(jnp.exp(want))) == pytest.approx(1, abs=1e-5)
  np.testing.assert_allclose(found, want, atol=1e-5)
  chex.assert_trees_all_close(slope, want_slope, atol=1e-4)

  # Pairs of draws and leave-one-out advantages estimate the same gradient.
  def draw(rng):
    drawn = selector.select(
      SMALL,
      params,
      frames,
      None,
      QUESTION,
      selection="stochastic",
      rng=rng,
      **settings,
    )
    return drawn.order, drawn.logprob

  keys = jax.random.split(jax.random.key(0), 16_000)
  order, logprob = jax.jit(jax.vmap(draw))(keys)
  number = {pair: place for place, pair in enumerate(orders)}
  place = np.array([number[tuple(pair)] for pair in order.tolist()])
  np.testing.assert_allclose(logprob, want[place], atol=1e-5)
  advantage = grpo.group_advantages(
    value[place].reshape(-1, 2),
    scale="none",
    baseline="leave_one_out",
    ddof=0,
    eps=0.0,
  ).reshape(-1)
  weight = jnp.zeros(len(orders)).at[place].add(advantage) / len(place)

  def flat(weight):
    summed = jax.tree.map(lambda s: jnp.tensordot(weight, s, 1), want_slope)
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(summed)])

  exact = flat(jnp.exp(want) * value)
  estimate = flat(weight)
  error = np.linalg.norm(estimate - exact) / np.linalg.norm(exact)
  assert error < 0.1
  # Without the other draw the estimate of the same draws is further off.
  plain = jnp.zeros(len(orders)).at[place].add(value[place] + 5) / len(place)
  assert np.linalg.norm(flat(plain) - exact) > np.linalg.norm(estimate - exact)


def test_stored_picks_of_a_video_with_holes(params):
  frames, mask = jnp.asarray(frames_of(12)), np.arange(12) % 4 != 1
  settings = dict(num_keyframes=4, selection="stochastic", min_gap=2)

  @jax.jit
  def twice(rng):
    given = dict(settings, rng=rng)
    drawn = selector.select(SMALL, params, frames, mask, QUESTION, **given)
    again = selector.selection_logprob(
      SMALL, params, frames, drawn.order, mask, QUESTION, **given
    )
    return drawn.order, drawn.logprob, again

  order, drawn, again = twice(jax.random.key(5))
  assert mask[np.asarray(order)].all() and len(set(order.tolist())) == 4
  assert float(again) == pytest.approx(float(drawn), abs=1e-5)


# -- it learns. Videos of six shots of eight frames; the question names the
# one that is evidence, in a space of its own.

KINDS, SHOTS, LENGTH = 6, 6, 8
PLANTED = selector.SelectorConfig(
  embedding_dim=16, query_dim=6, width=32, depth=2, kernel=5
)
WORLD = np.random.default_rng(0)
LOOKS = WORLD.normal(size=(KINDS, 16)).astype(np.float32)
WORDS = WORLD.normal(size=(KINDS, 6)).astype(np.float32)
ROWS = 32


def planted(number, seed):
  """frames [n, T, 16], questions [n, 6], target [n, 16], evidence [n, T]."""
  rng = np.random.default_rng(seed)
  kinds, asked = [], rng.integers(0, KINDS, number)
  for kind in asked:
    while True:
      shots = rng.integers(0, KINDS, SHOTS)
      if np.sum(shots == kind) == 1 and np.all(shots[1:] != shots[:-1]):
        break
    kinds.append(np.repeat(shots, LENGTH))
  kinds = np.stack(kinds)
  noise = 0.1 * rng.normal(size=(*kinds.shape, 16))
  return jax.tree.map(
    jnp.asarray,
    (
      (LOOKS[kinds] + noise).astype(np.float32),
      WORDS[asked],
      LOOKS[asked],
      kinds == asked[:, None],
    ),
  )


def ask(params, frames, question, **settings):
  return selector.select(
    PLANTED, params, frames, None, question, num_keyframes=2, **settings
  )


@jax.jit
def hit_rate(params, data):
  """Share of videos whose two keyframes, chosen hard, show the evidence."""
  frames, question, _, evidence = data
  seen = jax.vmap(functools.partial(ask, params, **ANY_FRAME))(frames, question)
  return jnp.mean(
    jnp.any(jnp.take_along_axis(evidence, seen.index, axis=1), axis=1)
  )


def train(loss, steps):
  """Adam on `loss(params, batch, rng)`."""
  data = planted(16 * ROWS, seed=1)
  params = init(PLANTED, jax.random.key(0))
  optimizer = optax.adam(3e-3)

  @jax.jit
  def step(params, state, number):
    batch = jax.tree.map(
      lambda x: x.reshape(-1, ROWS, *x.shape[1:])[number % 16], data
    )
    rng = jax.random.fold_in(jax.random.key(2), number)
    slope = jax.grad(loss)(params, batch, rng)
    update, state = optimizer.update(slope, state)
    return optax.apply_updates(params, update), state

  state = optimizer.init(params)
  for number in range(steps):
    params, state = step(params, state, number)
  return params


@pytest.fixture(scope="module")
def held_out():
  return planted(256, seed=9)


def test_straight_through_gradient_teaches_it(held_out):
  """A reader that wants frames that look like the evidence."""

  def loss(params, batch, _):
    frames, question, target, _ = batch
    seen = jax.vmap(
      functools.partial(ask, params, selection="straight_through", **ANY_FRAME)
    )(frames, question)
    return -jnp.mean(jnp.einsum("bke,be->bk", seen.embedding, target))

  untrained = hit_rate(init(PLANTED, jax.random.key(0)), held_out)
  assert untrained < 0.5  # two frames of six shots
  assert hit_rate(train(loss, 60), held_out) > 0.95


def test_policy_gradient_teaches_it(held_out):
  """Four draws a question; the reward says whether they show the evidence."""
  draws = 4

  def loss(params, batch, rng):
    frames, question, _, evidence = batch
    sample = functools.partial(ask, params, selection="stochastic")
    keys = jax.random.split(rng, (ROWS, draws))
    seen = jax.vmap(
      lambda f, q, keys: jax.vmap(lambda key: sample(f, q, rng=key))(keys)
    )(frames, question, keys)
    reward = jax.vmap(lambda e, index: jnp.any(e[index], axis=-1))(
      evidence, seen.index
    )
    advantage = grpo.group_advantages(
      reward.astype(jnp.float32),
      scale="none",
      baseline="leave_one_out",
      ddof=0,
      eps=0.0,
    )
    return -jnp.mean(advantage * seen.logprob)

  assert hit_rate(train(loss, 60), held_out) > 0.9


def test_it_knows_before_from_after_and_early_from_late():
  """Wanted is the frame after the first marker, or the one before the last."""
  config = dataclasses.replace(
    PLANTED, query_dim=2, width=16, depth=1, kernel=3
  )
  questions = np.eye(2, dtype=np.float32)

  def draw(number, seed):
    rng = np.random.default_rng(seed)
    frames = rng.normal(size=(number, 24, 16)).astype(np.float32)
    first, last = rng.integers(1, 9, number), rng.integers(14, 22, number)
    rows, asked = np.arange(number), rng.integers(0, 2, number)
    frames[rows, first] = frames[rows, last] = 3 * LOOKS[0]
    wanted = np.where(asked, last - 1, first + 1)
    return frames, questions[asked], wanted

  def loss(params, frames, question, wanted):
    score = jax.vmap(lambda f, q: selector.apply(config, params, f, None, q))(
      frames, question
    )
    picked = jnp.take_along_axis(score, wanted[:, None], axis=1)[:, 0]
    right = jnp.argmax(score, axis=1) == wanted
    return jnp.mean(jax.nn.logsumexp(score, axis=1) - picked), jnp.mean(right)

  params = init(config, jax.random.key(0))
  optimizer = optax.adam(1e-2)

  @jax.jit
  def step(params, state, *batch):
    slope, right = jax.grad(loss, has_aux=True)(params, *batch)
    update, state = optimizer.update(slope, state)
    return optax.apply_updates(params, update), state, right

  state, rights = optimizer.init(params), []
  for number in range(200):
    params, state, right = step(params, state, *draw(64, number))
    rights.append(float(right))
  assert np.mean(rights[-10:]) > 0.95  # of videos not seen before


# -- settings


@pytest.mark.parametrize(
  ("field", "value", "said"),
  [
    ("embedding_dim", 0, "embedding_dim must be .* at least 1, got 0"),
    ("query_dim", 0, "query_dim must be .* at least 1, got 0"),
    ("width", 12.5, r"width must be a whole number .* got 12\.5"),
    ("depth", -1, "depth must be .* at least 0, got -1"),
    ("kernel", 4, "kernel must be odd, .* got 4"),
    ("dilation", 0, "dilation must be .* at least 1, got 0"),
    ("dtype", "float16", "dtype must be one of .*bfloat16.* got 'float16'"),
  ],
)
def test_settings_out_of_range(field, value, said):
  with pytest.raises(ValueError, match=said) as error:
    dataclasses.replace(SMALL, **{field: value})
  assert f"change SelectorConfig.{field}" in str(error.value)


def test_widths_that_are_not_the_configs(params):
  with pytest.raises(ValueError, match="5 wide, expected 6; .*embedding_dim"):
    selector.apply(SMALL, params, jnp.zeros((3, 5)))
  with pytest.raises(ValueError, match=r"\[3\], expected \[4\]; .*query_dim"):
    selector.apply(SMALL, params, jnp.zeros((3, 6)), None, jnp.zeros(3))
  deaf = dataclasses.replace(SMALL, query_dim=None)
  with pytest.raises(ValueError, match=r"\[3\], expected none; .*query_dim"):
    selector.apply(deaf, params, jnp.zeros((3, 6)), None, jnp.zeros(3))


def test_a_config_is_a_static_argument():
  deaf = dataclasses.replace(SMALL, query_dim=None, depth=0)
  fresh = init(deaf, jax.random.key(0))
  assert "question" not in fresh and "layer_0" not in fresh
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fresh))
  score = jax.jit(selector.apply, static_argnums=0)(
    deaf, fresh, jnp.asarray(frames_of(4))
  )
  np.testing.assert_array_equal(score, 0)
