"""What happens to numbers that are none: docs/reliability.md, tried.

Gradients and rewards that are no numbers stop a run before it learns from them;
what is masked may hold anything and changes nothing.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cf_jax import grpo, policy, sampling
from cf_jax.programs import reinforce, sft
from cf_jax.types import TrainState

LOSS = dict(clip_low=0.2, clip_high=0.2, kl_weight=0.1, kl_kind="k3")


@pytest.mark.parametrize(
  ("scale", "baseline"),
  [("none", "mean"), ("group", "leave_one_out"), ("batch", "none")],
)
def test_masked_rewards_may_be_anything(scale, baseline):
  """A group without any completion that counts, and one with a single one."""
  reward = np.full((3, 4), np.nan, np.float32)
  reward[0] = [np.inf, -np.inf, 1e30, np.nan]
  reward[1, 2] = 0.5
  reward[2] = [1, 0, 0, 1]
  mask = np.zeros((3, 4), bool)
  mask[1, 2] = mask[2] = True
  settings = dict(scale=scale, baseline=baseline, ddof=1, eps=1e-4)
  made = grpo.group_advantages(
    jnp.asarray(reward), jnp.asarray(mask), **settings
  )
  assert np.isfinite(made).all() and np.all(np.asarray(made)[~mask] == 0)
  clean = np.where(mask, reward, 0).astype(np.float32)
  without = grpo.group_advantages(
    jnp.asarray(clean), jnp.asarray(mask), **settings
  )
  np.testing.assert_array_equal(made, without)


@pytest.mark.parametrize(
  ("aggregate", "ratio"),
  [("sequence_mean", "token"), ("token_mean", "sequence")],
)
def test_completions_without_a_token(aggregate, ratio):
  """Of the three completions, two have none: they add 0, and no gradient."""
  mask = jnp.zeros((1, 3, 4), bool).at[0, 0].set(True)
  logprob = jnp.full((1, 3, 4), jnp.nan).at[0, 0].set(-1.0)
  args = [jnp.full((1, 3, 4), jnp.nan).at[0, 0].set(v) for v in (-1.1, -1.3)]
  advantage = jnp.array([[1.0, jnp.nan, jnp.inf]])

  def loss(logprob, mask):
    return grpo.policy_loss(
      logprob, *args, advantage, mask, aggregate=aggregate, ratio=ratio, **LOSS
    )[0]

  value_and_grad = jax.jit(jax.value_and_grad(loss))
  value, grad = value_and_grad(logprob, mask)
  assert np.isfinite(value) and value != 0
  assert np.isfinite(grad).all()
  assert np.all(grad[0, 0] != 0) and np.all(grad[0, 1:] == 0)
  nothing, grad = value_and_grad(logprob, jnp.zeros_like(mask))
  assert nothing == 0 and np.all(grad == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_gradient_that_is_no_number_changes_nothing(bad):
  """1e30 is finite, its square is not: a clipped update would be 0, unsaid."""
  params = {"a": jnp.ones(3), "b": jnp.zeros(2)}
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
  state = TrainState(
    step=jnp.int32(7),
    params=params,
    opt_state=optimizer.init(params),
    rng=jax.random.key_data(jax.random.key(0)),
  )
  update = jax.jit(lambda grad: sft.apply_gradient(state, grad, {}, optimizer))
  good = {"a": jnp.ones(3), "b": jnp.ones(2)}
  after, metrics = update(good)
  assert metrics["nonfinite"] == 0 and not np.all(after.params["a"] == 1)
  np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(5), rtol=1e-6)
  after, metrics = update({"a": good["a"].at[1].set(bad), "b": good["b"]})
  assert metrics["nonfinite"] == 1
  for new, old in zip(
    jax.tree.leaves((after.params, after.opt_state)),
    jax.tree.leaves((state.params, state.opt_state)),
    strict=True,
  ):
    np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -1e7])
def test_a_reward_that_is_no_number_stops_the_run(bad):
  reward = np.zeros((2, 3), np.float32)
  batch = types.SimpleNamespace(
    scored=types.SimpleNamespace(reward=reward, bonus=np.full((2, 3), 0.25)),
    verdict=types.SimpleNamespace(component={"accuracy": np.full((2, 3), bad)}),
    prepared=types.SimpleNamespace(
      batch=types.SimpleNamespace(
        samples=[types.SimpleNamespace(id=name) for name in ("first", "second")]
      )
    ),
  )
  reinforce.check_rewards(batch, 3)
  reward[1, 2] = bad
  with pytest.raises(FloatingPointError, match="update 3.*'second'.*accuracy"):
    reinforce.check_rewards(batch, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sampling_from_no_numbers_ends(scene, bad):
  """Completions are of known length and ids; their log-probabilities tell."""
  params, pixel = scene.params, scene.pixel.at[0].set(bad)  # one of three
  encoded = jax.jit(
    lambda pixel: policy.encode_frames(
      scene.config, params, pixel, grid=scene.grid
    )
  )(pixel)
  rollout = jax.jit(
    lambda params, encoded: sampling.generate(
      scene.config,
      params,
      scene.view.prompt,
      policy.show(encoded, scene.view.frame),
      sampling.row_seeds(jax.random.key(0), jnp.arange(3)),
      scene.banned,
      num_completions=2,
      max_tokens=4,
      temperature=1.0,
      top_p=1.0,
      top_k=0,
      eos_id=jnp.array([3, 3]),
    )
  )(params, encoded)
  token = np.asarray(rollout.token)
  assert token.shape == (3, 2, 4)
  assert token.min() >= 0 and token.max() < scene.config.vocab_size
  told = np.isfinite(np.where(rollout.mask, rollout.logprob, 0)).all(
    axis=(1, 2)
  )
  assert not told[0]
  assert told[1:].all()  # other videos are untouched
