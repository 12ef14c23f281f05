"""What stays in float32 when the model runs in bfloat16, and what that costs.

| in float32 | why |
|---|---|
| positions, angles, the rotation of queries and keys | 257 rounds to 256 |
| norms: squares, mean, root | an error here scales a whole row |
| attention scores, softmax, sums over keys | e^20 is off by 6 % |
| logits, log-probs, entropies | policy gradients are their differences |

Parameters may be float32 or bfloat16. Matmuls take bfloat16 and accumulate in
float32; residuals, activations and the caches are bfloat16, as in
transformers, whose drift from float32 ours equals. What each costs when it is
taken away (`benchmarks.bf16_drift`) stands in docs/parity.md.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from cf_jax import grpo
from cf_jax.models import rope, vlm
from tests.parity import conftest


def shorten(config):
  return dataclasses.replace(config, dtype="bfloat16")


def test_drift_is_that_of_transformers(case):
  """Weights are exact in bfloat16: only the arithmetic differs."""
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.params)
  logits = vlm.forward(shorten(case.config), params, **case.batch)
  assert logits.dtype == jnp.float32
  real = conftest.real_slots(case.batch)
  error = np.abs(np.asarray(logits) - case.expected["logits"])[real]
  rms, largest = np.sqrt(np.mean(error**2)), np.max(error)
  their_rms, their_largest = case.expected["bfloat16_drift"]
  assert rms < 1.5 * their_rms
  assert largest < 2 * their_largest


def test_positions_beyond_256_keep_their_distance():
  """Attention sees differences of positions: a common shift changes nothing."""
  case = conftest.load_case("tied", "stored")
  config = shorten(case.config)
  fields = vlm.read_processor(config, case.params, **case.batch)
  run = jax.jit(vlm.sequence_logits, static_argnums=0)
  near, far = (
    run(config, case.params, **fields | dict(position=position))
    for position in (fields["position"], fields["position"] + 1001)
  )
  error = np.asarray(far - near)[conftest.real_slots(case.batch)]
  rms = np.sqrt(np.mean(error**2))
  assert rms < case.expected["bfloat16_drift"][0]  # 0.03 of 0.04


def test_neighbours_turn_differently():
  position = jnp.broadcast_to(jnp.arange(256, 264), (1, 3, 8))
  cos, sin = rope.mrope(position, section=(1, 2, 1), theta=1e6)
  x = jnp.ones((1, 8, 1, 8), jnp.bfloat16)
  turned = np.array(rope.rotate(x, cos, sin).astype(jnp.float32))[0, :, 0]
  assert len(np.unique(turned, axis=0)) == 8


def operations(jaxpr):
  """(primitive, dtype of its first operand) of a program and those inside."""
  for equation in jaxpr.eqns:
    if equation.invars:
      yield equation.primitive.name, equation.invars[0].aval.dtype
    for inner in jaxprs_in_params(equation.params):
      yield from operations(inner)


def test_reductions_and_exponentials_are_float32():
  case = conftest.load_case("tied", "stored")
  config = shorten(case.config)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.params)
  grid = (6, 10)

  def program(params, patches, token, banned):
    visual = vlm.encode_vision(config, params, patches, grid)
    position = jnp.broadcast_to(jnp.arange(20), (1, 3, 20))
    logits = vlm.sequence_logits(
      config,
      params,
      token,
      position,
      jnp.ones((1, 20), bool),
      jnp.where(position[:, 0] < 15, position[:, 0], -1),
      visual,
    )
    return grpo.token_logprobs(logits, token, banned)

  patches = jnp.zeros((1, 60, config.vision.patch_dim), jnp.bfloat16)
  token = jnp.zeros((1, 20), jnp.int32)
  banned = jnp.zeros(config.vocab_size, bool)
  jaxpr = jax.make_jaxpr(program)(params, patches, token, banned)
  assert all(out.dtype == jnp.float32 for out in jaxpr.out_avals)
  exact = {"cos", "sin", "rsqrt", "exp", "log", "reduce_sum", "reduce_max"}
  seen = {}
  for name, dtype in operations(jaxpr.jaxpr):
    if jnp.issubdtype(dtype, jnp.floating):
      seen.setdefault(name, set()).add(str(dtype))
  assert exact <= set(seen)
  assert all(seen[name] == {"float32"} for name in exact)
  # And the matmuls are not: else this is no bfloat16 model.
  assert "bfloat16" in seen["dot_general"]
