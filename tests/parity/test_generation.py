"""Greedy ids against `generate` of transformers, images and videos shown."""

import jax
import numpy as np
import pytest

from cf_jax import sampling
from cf_jax.models import vlm
from cf_jax.types import Prompt
from tests.parity import conftest, specs

GENERATE = jax.jit(
  sampling.generate,
  static_argnums=0,
  static_argnames=("num_completions", "max_tokens"),
)


@pytest.mark.parametrize("with_end", [False, True])
def test_greedy_ids(case, with_end):
  """`generate` pads on the left, our sampler on the right."""
  fields = vlm.read_processor(
    case.config, case.params, **conftest.repad(case.batch, "right")
  )
  prompt = Prompt(
    token=fields["token"],
    mask=fields["mask"],
    position=fields["position"],
    visual=fields["visual_index"],
  )
  expected = case.expected["generated_eos" if with_end else "generated"]
  eos_id = int(case.expected["eos_id"])
  rollout = GENERATE(
    case.config,
    case.params,
    prompt,
    fields["visual_tokens"],
    np.zeros((len(prompt.token), 2), np.uint32),
    np.zeros(case.config.vocab_size, bool),
    num_completions=1,
    max_tokens=specs.NUM_GENERATED,
    eos_id=eos_id if with_end else -1,  # no id: all tokens are wanted
    temperature=0.0,
  )
  # Else rounding decides, and the comparison says nothing.
  assert case.expected["generated_margin"] > 1e-3
  for row, mask, theirs in zip(
    np.array(rollout.token[:, 0]),
    np.array(rollout.mask[:, 0]),
    expected,
    strict=True,
  ):
    ours = row[mask]
    np.testing.assert_array_equal(ours, theirs[: len(ours)])
    # After its end, transformers pads a row that others outlast.
    assert not np.any(theirs[len(ours) :])
    assert len(ours) == specs.NUM_GENERATED or (with_end and ours[-1] == eos_id)
