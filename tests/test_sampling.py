"""The sampler agrees with the trainer, and a row with itself in any batch.

Axes as in `cf_jax.sampling`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax import grpo, policy, sampling
from cf_jax.models import vlm

EOS = 3
G, C = 4, 6


@pytest.fixture(scope="module")
def encoded(scene):
  return policy.encode_frames(
    scene.config, scene.params, scene.pixel, grid=scene.grid
  )


@pytest.fixture(scope="module")
def visual(scene, encoded):
  return policy.show(encoded, scene.view.frame)


@pytest.fixture(scope="module")
def generate(scene):
  """Jitted; lengths are static, how to sample is not."""
  return jax.jit(
    functools.partial(sampling.generate, scene.config),
    static_argnames=("num_completions", "max_tokens"),
  )


@pytest.fixture(scope="module")
def sample(scene, visual, generate):
  """rows, seed and settings -> Rollout."""

  def sample(rows=slice(None), *, seed=0, banned=None, **settings):
    seeds = sampling.row_seeds(jax.random.key(seed), jnp.arange(3))
    settings = (
      dict(
        num_completions=G,
        max_tokens=C,
        eos_id=EOS,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
      )
      | settings
    )
    prompt = jax.tree.map(lambda x: x[rows], scene.view.prompt)
    banned = scene.banned if banned is None else banned
    settings["eos_id"] = np.resize(settings["eos_id"], 2)  # one shape for all
    return generate(
      scene.params, prompt, visual[rows], seeds[rows], banned, **settings
    )

  return sample


@pytest.fixture(scope="module")
def piecewise(scene, visual):
  """Like `sample`, but by `advance` up to each limit in turn."""
  start = jax.jit(
    functools.partial(sampling.start, scene.config),
    static_argnames=("num_completions", "max_tokens"),
  )
  advance = jax.jit(
    functools.partial(sampling.advance, scene.config), donate_argnums=1
  )

  def piecewise(limits, *, eos_id=EOS, banned=scene.banned, **settings):
    seeds = sampling.row_seeds(jax.random.key(0), jnp.arange(3))
    how = dict(temperature=1.0, top_p=1.0, top_k=0) | settings
    how["eos_id"] = np.resize(eos_id, 2)
    decoding = start(
      scene.params,
      scene.view.prompt,
      visual,
      seeds,
      banned,
      num_completions=G,
      max_tokens=C,
      **how,
    )
    slots = [int(decoding.slot)]
    for limit in limits:
      decoding = advance(scene.params, decoding, np.int32(limit), banned, **how)
      slots.append(int(decoding.slot))
    return decoding, slots

  piecewise.programs = advance._cache_size
  return piecewise


@pytest.mark.parametrize(
  "settings",
  [{}, dict(temperature=0.0), dict(temperature=1.7, top_p=0.8, top_k=9)],
)
def test_in_pieces_it_is_bitwise_the_same(sample, piecewise, settings):
  whole = sample(**settings)
  for limits in ([C], [2, 3, 3, 5, 99], list(range(1, C + 1))):
    decoding, slots = piecewise(limits, **settings)
    for name in ("token", "mask", "logprob", "finished"):
      np.testing.assert_array_equal(
        getattr(decoding.rollout, name), getattr(whole, name), err_msg=name
      )
    assert slots == [1, *np.minimum(limits, C)]


def test_the_limit_is_an_argument(piecewise):
  piecewise([2])
  programs = piecewise.programs()
  piecewise([3, 4, 6])
  assert piecewise.programs() == programs


def test_several_end_tokens(sample, piecewise):
  """Any of them ends a row; the first fills what follows."""
  free = np.asarray(sample(eos_id=0).token)  # 0 is banned: nothing ends a row
  ends = (EOS, int(free[0, 0, 2]))
  ended = np.isin(free, ends)
  first = np.where(ended.any(-1), ended.argmax(-1), C)
  mask = np.arange(C) <= first[..., None]
  assert mask.all(axis=-1).any() and not mask.all()  # both kinds are drawn
  several = sample(eos_id=ends)
  np.testing.assert_array_equal(several.mask, mask)
  np.testing.assert_array_equal(several.token, np.where(mask, free, EOS))
  np.testing.assert_array_equal(several.finished, first < C)
  decoding, _ = piecewise([2, C], eos_id=ends)
  np.testing.assert_array_equal(decoding.token, several.token)


def test_nothing_is_drawn_after_the_last_end(piecewise):
  only = jnp.arange(40) != EOS  # all banned but the end
  decoding, slots = piecewise([3, C], banned=only)
  assert slots == [1, 1, 1] and bool(decoding.done.all())


@pytest.mark.parametrize(
  "settings", [{}, dict(temperature=1.7, top_p=0.8, top_k=9)]
)
def test_logprobs_are_the_trainers(scene, encoded, sample, settings):
  rollout = sample(**settings)
  logprob, _ = jax.jit(
    functools.partial(policy.completion_logprobs, scene.config)
  )(scene.params, scene.view, encoded, rollout, scene.banned)
  np.testing.assert_allclose(rollout.logprob, logprob, atol=1e-5)
  assert np.all(np.asarray(rollout.logprob)[np.asarray(rollout.mask)] < 0)


def test_greedy_is_the_argmax_of_the_full_forward(scene, visual, sample):
  rollout = sample(temperature=0.0, num_completions=1, eos_id=0)  # 0: banned
  prompt = scene.view.prompt
  rows = np.arange(3)
  length = np.asarray(prompt.mask).sum(1)
  width = prompt.token.shape[1] + C
  token, visual_index = np.zeros((3, width), int), np.full((3, width), -1)
  mask, position = np.zeros((3, width), bool), np.zeros((3, 3, width), int)
  token[:, :-C], visual_index[:, :-C] = prompt.token, prompt.visual
  mask[:, :-C], position[:, :, :-C] = prompt.mask, prompt.position
  forward = jax.jit(functools.partial(vlm.sequence_logits, scene.config))
  following = 1 + position.max(axis=(1, 2))
  for step in range(C):
    logits = forward(scene.params, token, position, mask, visual_index, visual)
    last = np.asarray(logits)[rows, length + step - 1]
    best = np.where(np.asarray(scene.banned), -np.inf, last).argmax(-1)
    np.testing.assert_array_equal(rollout.token[:, 0, step], best)
    token[rows, length + step] = best
    mask[rows, length + step] = True
    position[rows, :, length + step] = (following + step)[:, None]


def test_greedy_completions_of_a_group_are_equal(sample):
  token = np.asarray(sample(temperature=0.0).token)
  assert np.all(token == token[:, :1])


def test_a_row_does_not_depend_on_its_batch(sample):
  together = sample()
  for row in range(3):
    alone = sample(slice(row, row + 1))
    for name in ("token", "mask", "finished"):
      np.testing.assert_array_equal(
        getattr(alone, name)[0], getattr(together, name)[row]
      )
    np.testing.assert_allclose(
      alone.logprob[0], together.logprob[row], atol=1e-5
    )


def test_a_row_does_not_depend_on_the_size_of_its_group(sample):
  many, few = sample(), sample(num_completions=2)
  np.testing.assert_array_equal(many.token[:, :2], few.token)
  # Nor does a token on how many may follow.
  short = sample(max_tokens=3)
  np.testing.assert_array_equal(many.token[..., :3], short.token)


def test_rows_completions_and_seeds_differ(sample):
  token = np.asarray(sample().token).reshape(3 * G, C)
  assert len({tuple(row) for row in token}) > 9
  assert np.any(token != np.asarray(sample(seed=1).token).reshape(3 * G, C))


def test_row_seeds_follow_the_sample_not_its_place():
  key = jax.random.key(5)
  seeds = np.asarray(sampling.row_seeds(key, jnp.array([4, 9, 4])))
  assert seeds.shape == (3, 2) and seeds.dtype == np.uint32
  np.testing.assert_array_equal(seeds[0], seeds[2])
  assert np.any(seeds[0] != seeds[1])
  other = sampling.row_seeds(jax.random.fold_in(key, 1), jnp.array([4]))
  assert np.any(seeds[0] != np.asarray(other)[0])


def test_the_end_token_stops_a_row(sample):
  rollout = jax.device_get(sample(num_completions=16, temperature=2.0))
  token, mask = rollout.token, rollout.mask
  ended = token == EOS
  assert 0 < rollout.finished.mean() < 1  # both kinds are in the draw
  np.testing.assert_array_equal(rollout.finished, np.any(ended & mask, axis=-1))
  first = np.where(rollout.finished, ended.argmax(-1), C - 1)
  np.testing.assert_array_equal(mask, np.arange(C) <= first[..., None])
  assert np.all(token[~mask] == EOS) and not np.any(rollout.logprob[~mask])


def test_everything_ended_at_the_first_token(scene, sample):
  only = jnp.arange(40) != EOS  # all banned but the end
  rollout = jax.device_get(sample(banned=only))
  assert rollout.finished.all() and np.all(rollout.token == EOS)
  np.testing.assert_array_equal(rollout.mask.sum(-1), 1)
  np.testing.assert_array_equal(rollout.logprob, 0)


def test_one_token_at_most(sample):
  rollout = sample(max_tokens=1, num_completions=8)
  assert rollout.token.shape == (3, 8, 1) and bool(rollout.mask.all())
  np.testing.assert_array_equal(rollout.finished, rollout.token[..., 0] == EOS)


def test_banned_ids_are_never_sampled(sample):
  banned = np.arange(40) % 4 != EOS
  rollout = sample(banned=jnp.asarray(banned), temperature=1e3)
  token = np.asarray(rollout.token)
  assert not banned[token].any() and len(np.unique(token)) > 5


def test_sampled_shares_are_the_probabilities(scene, visual, generate):
  """2048 first tokens of one prompt against the softmax."""
  prompt = jax.tree.map(lambda x: x[:1], scene.view.prompt)
  rollout = generate(
    scene.params,
    prompt,
    visual[:1],
    jnp.array([[1, 2]], jnp.uint32),
    scene.banned,
    num_completions=2048,
    max_tokens=1,
    eos_id=EOS,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
  )
  logits = vlm.sequence_logits(
    scene.config,
    scene.params,
    prompt.token,
    prompt.position,
    prompt.mask,
    prompt.visual,
    visual[:1],
  )[0, int(prompt.mask.sum()) - 1]
  prob = np.asarray(jax.nn.softmax(grpo.ban(logits, scene.banned)))
  count = np.bincount(np.asarray(rollout.token).ravel(), minlength=40)
  assert not count[np.asarray(scene.banned)].any()
  deviation = np.abs(count - 2048 * prob)
  assert np.all(deviation < 5 * np.sqrt(2048 * prob * (1 - prob)) + 1)


def test_settings_are_arguments(sample, generate):
  """A closure over a temperature would keep the first value for ever."""
  first = sample()
  programs = generate._cache_size()
  for settings in (
    dict(temperature=0.3),
    dict(top_p=0.3),
    dict(top_k=2),
    dict(temperature=5.0),
  ):
    assert np.any(np.asarray(sample(**settings).token) != first.token)
  for same in (dict(top_p=0.0), dict(top_k=1), dict(temperature=1e-5)):
    np.testing.assert_array_equal(  # the best id always stays
      sample(**same).token, sample(temperature=0.0).token
    )
  assert generate._cache_size() == programs


def _filter(logits, top_p, top_k):
  """The filter of one row, worked the long way."""
  prob = np.exp(logits - logits.max())
  prob /= prob.sum()
  order = sorted(range(len(logits)), key=lambda i: -logits[i])
  kept, mass = [], 0.0
  for i in order:
    if kept and (mass >= top_p < 1 or top_k and len(kept) >= top_k):
      break
    kept.append(i)
    mass += prob[i]
  floor = min(logits[i] for i in kept)
  return np.where(logits >= floor, logits, -np.inf)


@pytest.mark.parametrize("top_p", [0.0, 0.2, 0.55, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
def test_filter_by_brute_force(top_p, top_k):
  rng = np.random.default_rng(3)
  logits = rng.normal(size=(5, 12)) * [[0.1], [1], [2], [4], [9]]
  logits[4, 2:6] = -1e30  # banned
  logits = logits.astype(np.float32)
  found = jax.jit(sampling.filter_logits)(
    jnp.asarray(logits),
    top_p=jnp.float32(top_p),
    top_k=jnp.int32(top_k),
  )
  expected = [_filter(row, top_p, top_k) for row in logits]
  # What has no probability to speak of may go or stay.
  rare = logits < logits.max(axis=-1, keepdims=True) - 14
  np.testing.assert_allclose(
    np.where(rare, 0, found), np.where(rare, 0, expected), rtol=1e-6
  )


def test_filter_by_hand():
  # Probabilities 0.5, 0.25, 0.125, 0.125.
  logits = jnp.log(jnp.array([0.25, 0.5, 0.125, 0.125]))

  def kept(top_p, top_k):
    found = sampling.filter_logits(
      logits, top_p=jnp.float32(top_p), top_k=jnp.int32(top_k)
    )
    return np.isfinite(found).tolist()

  assert kept(0.4, 0) == [False, True, False, False]
  assert kept(0.6, 0) == [True, True, False, False]
  assert kept(1.0, 2) == [True, True, False, False]
  assert kept(0.8, 0) == [True] * 4  # equal logits stay together
  assert kept(1.0, 3) == [True] * 4
  assert kept(0.4, 2) == [False, True, False, False]
