"""Counted operations against what XLA counts in the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax.models import config as model_config
from cf_jax.models import flops, vlm


@pytest.fixture(scope="module")
def model():
  # Wide and shallow, so that matmuls are nearly all there is; unrolled, as XLA
  # counts the body of a loop once.
  return model_config.make(
    size="tiny",
    vocab_size=2000,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    mrope_section=(8, 12, 12),
    scan_unroll=2,
    tie_word_embeddings=True,
    vision=dict(
      depth=2,
      hidden_size=256,
      intermediate_size=512,
      num_heads=2,
      out_hidden_size=256,
      patch_size=4,
      window_size=16,
      fullatt_block_indexes=(1,),
    ),
  )


@pytest.fixture(scope="module")
def params(model):
  return jax.eval_shape(lambda: vlm.init(model, jax.random.key(0)))


def _counted(function, *args):
  return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_a_prompt_and_its_completions(model, params):
  rows, slots, group, tokens = 2, 48, 3, 16

  def forward(params):
    _, hidden = vlm.packed(
      model,
      params,
      jnp.ones((rows, slots, model.hidden_size)),
      jnp.zeros((rows, 3, slots), jnp.int32),
      jnp.ones((rows, slots), bool),
      jnp.zeros((rows, group, tokens), jnp.int32),
      jnp.ones((rows, group, tokens), bool),
    )
    return vlm.logits(model, params, hidden)

  prompt = np.full(rows, slots)
  completion = np.full((rows, group), tokens)
  ours = flops.prompts(model, prompt)
  ours += flops.completions(model, prompt, completion)
  np.testing.assert_allclose(ours, _counted(forward, params), rtol=0.02)


def test_prompts_alone(model, params):
  def forward(params):
    return vlm.prefill(
      model,
      params,
      jnp.ones((2, 64, model.hidden_size)),
      jnp.zeros((2, 3, 64), jnp.int32),
      jnp.ones((2, 64), bool),
    )

  ours = flops.prompts(model, np.full(2, 64))
  np.testing.assert_allclose(ours, _counted(forward, params), rtol=0.02)


def test_vision(model, params):
  def forward(params):
    pixel = jnp.ones((3, 48, model.vision.patch_dim))
    return vlm.encode_vision(model, params, pixel, (8, 6))

  # By hand for windows of 4 x 4 patches on 8 x 6: two of 16, two of 8, in
  # one block; the other sees all 48. XLA pads the small windows.
  ours = flops.vision(model, 3, (8, 6))
  np.testing.assert_allclose(ours, _counted(forward, params), rtol=0.03)
  wider = flops.vision(model, 3, (8, 12)) - 2 * ours
  # Only attention grows faster than the number of patches.
  full = 96**2 - 2 * 48**2
  windows = 6 * 16**2 - 2 * (2 * 16**2 + 2 * 8**2)
  assert wider == 2 * 3 * 2 * 256 * (full + windows)


def test_padding_does_not_count(model):
  lengths, tokens = np.array([5, 9]), np.array([[3, 1], [0, 7]])
  one_by_one = sum(
    flops.prompts(model, lengths[i : i + 1])
    + sum(
      flops.completions(model, lengths[i : i + 1], tokens[i : i + 1, g, None])
      for g in range(2)
    )
    for i in range(2)
  )
  together = flops.prompts(model, lengths)
  together += flops.completions(model, lengths, tokens)
  np.testing.assert_allclose(together, one_by_one, rtol=1e-12)


@pytest.mark.parametrize(
  ("trained", "expected"),
  [
    (("vision", "decoder"), 3 * 1 + 3 * 10),
    (("decoder",), 1 + 3 * 10),
    (("vision",), 3 * 1 + 2 * 10),  # back through the decoder to the tower
  ],
)
def test_update_by_what_is_trained(params, trained, expected):
  ours = {name: params[name] for name in trained}
  rest = {name: params[name] for name in params if name not in trained}
  assert flops.update(ours, rest, vision=1.0, decoder=10.0) == expected


def test_adapters_alone_spare_the_gradient_of_the_kernels(params):
  trained = {"decoder": {"layers": {"query": {"lora_a": jnp.ones(3)}}}}
  assert flops.update(trained, params, vision=1.0, decoder=10.0) == 1 + 2 * 10


def test_a_step_is_its_phases(model, params):
  """Two videos: two shuffled views as long as the keyframes', a longer one."""
  lengths = {"keyframes": 20, "shuffled": 20, "shuffled_1": 20, "uniform": 30}
  completion = np.full((2, 3), 4)

  def count(trained):
    return flops.grpo_step(
      model,
      {name: params[name] for name in trained},
      {name: params[name] for name in params if name not in trained},
      grid=(4, 4),
      num_frames=16,
      num_shown=8,
      prompt={arm: np.full(2, length) for arm, length in lengths.items()},
      completion=completion,
    )

  def forward(length):
    slots = np.full(2, length)
    return flops.prompts(model, slots) + flops.completions(
      model, slots, completion
    )

  frozen, trained = count(("decoder",)), count(("vision", "decoder"))
  tower = flops.vision(model, 1, (4, 4))
  for found in (frozen, trained):
    assert found["vision"] == 16 * tower
    assert found["prefill"] + found["decode"] == forward(20)
    assert found["score"] == 2 * forward(20) + forward(30)
  assert frozen["reference"] == forward(20)
  assert frozen["update"] == 3 * forward(20)
  assert trained["reference"] == 8 * tower + forward(20)
  assert trained["update"] == 3 * (8 * tower + forward(20))
