"""Frames are encoded once; a view re-indexes their tokens.

Axes as in `cf_jax.policy`.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax import masked, policy
from cf_jax.types import Rollout

G, C = 2, 5


@pytest.fixture(scope="module")
def encode(scene):
  return jax.jit(
    lambda params, pixel: policy.encode_frames(
      scene.config, params, pixel, grid=scene.grid
    )
  )


@pytest.fixture(scope="module")
def encoded(scene, encode):
  return encode(scene.params, scene.pixel)


@pytest.fixture(scope="module")
def logprobs(scene):
  return jax.jit(
    lambda params, view, encoded, rollout: policy.completion_logprobs(
      scene.config, params, view, encoded, rollout, scene.banned
    )
  )


@pytest.fixture(scope="module")
def rollout():
  rng = np.random.default_rng(1)
  length = np.array([[5, 2], [1, 3], [4, 5]])
  mask = np.arange(C) < length[:, :, None]
  return Rollout(
    token=jnp.asarray(rng.integers(1, 7, (3, G, C)), jnp.int32),
    mask=jnp.asarray(mask),
    logprob=jnp.zeros((3, G, C)),
    finished=jnp.ones((3, G), bool),
  )


def test_tokens_of_a_permuted_video_are_the_permuted_tokens(
  scene, encode, encoded
):
  for order in itertools.permutations(range(3)):
    order = np.array(order)
    np.testing.assert_array_equal(
      encode(scene.params, scene.pixel[:, order]), encoded[:, order]
    )


def test_a_view_shows_what_encoding_its_frames_would(scene, encode, encoded):
  frame = jnp.array([[2, 0, 1], [1, 1, 0], [0, 2, 2]])
  shown = policy.show(encoded, frame)
  assert shown.shape == (3, 3 * 4, scene.config.hidden_size)
  moved = jnp.take_along_axis(scene.pixel, frame[:, :, None, None], axis=1)
  again = encode(scene.params, moved)
  np.testing.assert_array_equal(shown, again.reshape(shown.shape))


def test_completions_see_the_order_of_the_frames(
  scene, encoded, logprobs, rollout
):
  """Or the shuffled view would measure nothing."""
  ordered, _ = logprobs(scene.params, scene.view, encoded, rollout)
  swapped = scene.view.replace(frame=scene.view.frame[:, ::-1])
  shuffled, _ = logprobs(scene.params, swapped, encoded, rollout)
  assert float(jnp.max(jnp.abs(ordered - shuffled))) > 1e-2
  # Other frames, swapped as well: the same pictures, hence the same numbers.
  crossed, _ = logprobs(
    scene.params, swapped, encoded[:, jnp.array([1, 0, 2])], rollout
  )
  np.testing.assert_array_equal(crossed, ordered)


def test_frames_that_no_slot_shows_do_not_matter(
  scene, encoded, logprobs, rollout
):
  expected = logprobs(scene.params, scene.view, encoded, rollout)
  found = logprobs(
    scene.params, scene.view, encoded.at[:, 2].set(99.0), rollout
  )
  for left, right in zip(found, expected):
    np.testing.assert_array_equal(left, right)


def test_padded_slots_do_not_matter(scene, encoded, logprobs, rollout):
  expected = logprobs(scene.params, scene.view, encoded, rollout)
  prompt = scene.view.prompt
  junk = prompt.replace(
    token=jnp.where(prompt.mask, prompt.token, 33),
    position=jnp.where(prompt.mask[:, None], prompt.position, 77),
    visual=jnp.where(prompt.mask, prompt.visual, 2),
  )
  other = rollout.replace(token=jnp.where(rollout.mask, rollout.token, 38))
  found = logprobs(
    scene.params, scene.view.replace(prompt=junk), encoded, other
  )
  for left, right in zip(found, expected):
    np.testing.assert_allclose(left, right, atol=1e-6)
    assert not np.any(np.asarray(left)[~np.asarray(rollout.mask)])


def test_longer_padding_does_not_matter(scene, encoded, logprobs, rollout):
  expected, _ = logprobs(scene.params, scene.view, encoded, rollout)
  prompt = scene.view.prompt

  def pad(x, value):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 6)], constant_values=value)

  wide = prompt.replace(
    token=pad(prompt.token, 5),
    mask=pad(prompt.mask, False),
    position=pad(prompt.position, 0),
    visual=pad(prompt.visual, -1),
  )
  found, _ = logprobs(
    scene.params, scene.view.replace(prompt=wide), encoded, rollout
  )
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_group_is_its_completions_one_by_one(
  scene, encoded, logprobs, rollout
):
  together, entropy = logprobs(scene.params, scene.view, encoded, rollout)
  for g in range(G):
    alone = jax.tree.map(lambda x, g=g: x[:, g : g + 1], rollout)
    found = logprobs(scene.params, scene.view, encoded, alone)
    np.testing.assert_allclose(found[0][:, 0], together[:, g], atol=1e-5)
    np.testing.assert_allclose(found[1][:, 0], entropy[:, g], atol=1e-5)
  assert np.all(np.asarray(together) <= 0)
  assert np.all(np.asarray(entropy) < np.log(40))


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_in_chunks_gives_the_same(scene, rollout, tied):
  params = scene.params
  if not tied:
    head = {"embedding": 2 * params["decoder"]["embed"]["embedding"]}
    params = params | {"decoder": params["decoder"] | {"head": head}}

  def value_and_grad(chunk):
    config = dataclasses.replace(
      scene.config, vocab_chunk=chunk, tie_word_embeddings=tied
    )

    def loss(params):
      encoded = policy.encode_frames(
        config, params, scene.pixel, grid=scene.grid
      )
      logprob, entropy = policy.completion_logprobs(
        config, params, scene.view, encoded, rollout, scene.banned
      )
      mean = masked.masked_mean(logprob + 0.3 * entropy, rollout.mask)
      return mean, (logprob, entropy)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

  (_, wanted), wanted_grad = value_and_grad(0)
  (_, found), grad = value_and_grad(16)  # of 40 words
  for left, right in zip(found, wanted):
    np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-6)
  for (path, left), right in zip(
    jax.tree_util.tree_leaves_with_path(grad), jax.tree.leaves(wanted_grad)
  ):
    scale = max(float(jnp.max(jnp.abs(right))), 1e-3)
    np.testing.assert_allclose(
      left, right, atol=1e-5 * scale, err_msg=str(path)
    )


def test_gradient_is_finite_and_reaches_every_parameter(scene, rollout):
  # A video whose completions are all masked, as in a group that is left out.
  mask = rollout.mask.at[2].set(False)

  def loss(params):
    encoded = policy.encode_frames(
      scene.config, params, scene.pixel, grid=scene.grid
    )
    logprob, entropy = policy.completion_logprobs(
      scene.config,
      params,
      scene.view,
      encoded,
      rollout.replace(mask=mask),
      scene.banned,
    )
    return masked.masked_mean(logprob + entropy, mask)

  grad = jax.jit(jax.grad(loss))(scene.params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grad):
    assert np.all(np.isfinite(leaf)), path
    # A bias on every key moves all scores of a query alike: no gradient.
    if "key" not in jax.tree_util.keystr(path) or leaf.ndim > 2:
      assert np.any(np.asarray(leaf)), path
