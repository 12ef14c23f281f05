"""A model small enough to run in every test, and a filled one of it."""

import jax
import numpy as np
import pytest

from cf_jax.models import config as model_config
from cf_jax.models import vlm


@pytest.fixture(scope="session")
def config():
  return model_config.make(
    size="tiny",
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    mrope_section=(1, 2, 1),
    vision=dict(
      depth=2,
      hidden_size=16,
      intermediate_size=24,
      num_heads=2,
      out_hidden_size=32,
      patch_size=2,
      window_size=8,
    ),
  )


@pytest.fixture(scope="session")
def params(config):
  """Noise in every parameter, so that no bias or norm is left out of a test."""
  rng = np.random.default_rng(0)

  def fill(path, leaf):
    noise = 0.17 * rng.normal(size=leaf.shape)
    return (noise + (path[-1].key == "scale")).astype(np.float32)

  shapes = jax.eval_shape(lambda rng: vlm.init(config, rng), jax.random.key(0))
  return jax.device_put(jax.tree_util.tree_map_with_path(fill, shapes))
