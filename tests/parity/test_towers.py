"""Vision tower and decoder against transformers, in float32.

Axes: `B` rows, `S` slots, `V` vocabulary, `L` blocks, `D` width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax.models import vision, vlm
from tests.parity import conftest, specs

TOWER = jax.jit(
  vision.run, static_argnums=(0, 3), static_argnames="with_hidden"
)


def run_media(case, kind, suffix):
  """Hidden states and visual tokens of the media, one after the other."""
  pixels = case.batch[f"pixel_values{suffix}"]
  hidden, visual, first = [], [], 0
  for slices, height, width in case.batch[f"{kind}_grid_thw"].tolist():
    last = first + slices * height * width
    token, blocks = TOWER(
      case.config,
      case.params["vision"],
      pixels[first:last].reshape(slices, height * width, -1),
      (height, width),
      with_hidden=True,
    )
    hidden.append(np.reshape(blocks, (len(blocks), -1, blocks.shape[-1])))
    visual.append(np.reshape(token, (-1, token.shape[-1])))
    first = last
  return np.concatenate(hidden, axis=1), np.concatenate(visual)


@pytest.mark.parametrize("kind, suffix", [("image", ""), ("video", "_videos")])
def test_every_block_and_the_merger(case, kind, suffix):
  hidden, visual = run_media(case, kind, suffix)
  expected = case.expected[f"hidden/{kind}"]
  assert np.std(expected) > 0.5  # else any tolerance passes
  hidden = hidden[:, :: specs.PATCH_STEP]
  np.testing.assert_allclose(hidden, expected, atol=1e-4, rtol=0)
  np.testing.assert_allclose(
    visual, case.expected[f"visual/{kind}"], atol=1e-4, rtol=0
  )


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(case, side):
  batch = conftest.repad(case.batch, side)
  ours = np.asarray(vlm.forward(case.config, case.params, **batch))
  assert ours.dtype == np.float32 and np.all(np.isfinite(ours))
  ours = ours[conftest.real_slots(batch)]
  expected = case.expected["logits"][conftest.real_slots(case.batch)]
  assert np.std(expected) > 1  # else any tolerance passes
  np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
  assert np.max(conftest.divergence(expected, ours)) < 1e-8


def loss(params, case):
  """Mean over the text's own ids, as transformers has it for labels."""
  ids = case.batch["input_ids"]
  label = conftest.real_slots(case.batch) & (ids >= specs.FIRST_TEXT)
  logits = vlm.forward(case.config, params, **case.batch)
  logprob = jax.nn.log_softmax(logits[:, :-1])
  chosen = jnp.take_along_axis(logprob, ids[:, 1:, None], axis=-1)[..., 0]
  return -jnp.mean(chosen, where=label[:, 1:])


def test_gradient_to_every_parameter(case):
  value, gradient = jax.jit(
    jax.value_and_grad(lambda params: loss(params, case))
  )(case.params)
  np.testing.assert_allclose(value, case.expected["loss"], rtol=1e-5)

  def error(path, ours, expected):
    """Largest relative L2 error of the layers of a parameter."""
    depth = len(ours) if any(part.key == "layers" for part in path) else 1
    kept = np.isfinite(expected)  # of a golden that has a part of it
    off, size = (
      np.linalg.norm(np.where(kept, x, 0).reshape(depth, -1), axis=1)
      for x in (ours - expected, expected)
    )
    assert np.all(size > 1e-5)  # else there is nothing to compare
    return np.max(off / size)

  errors = jax.tree_util.tree_map_with_path(
    error, jax.device_get(gradient), jax.device_get(case.gradient)
  )
  assert max(jax.tree.leaves(errors)) < 1e-3, errors
