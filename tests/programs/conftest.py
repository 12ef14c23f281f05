"""A run that programs can open: its manifest, and checkpoints of noise."""

import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax import descriptor
from cf_jax.models import selector
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import policies
from cf_jax.runtime import checkpoint, telemetry
from cf_jax.types import TrainState
from tests.conftest import draw_no_panels, load_config, shrink


@pytest.fixture(scope="module", autouse=True)
def plain_panels():
  with pytest.MonkeyPatch.context() as patch:
    draw_no_panels(patch)
    yield


def save_policy(folder: pathlib.Path, params: dict) -> None:
  """A checkpoint to read parameters from; there is no optimizer in it."""
  state = TrainState(
    step=jnp.int32(1), params=params, opt_state=(), rng=jnp.zeros(2, jnp.uint32)
  )
  store = checkpoint.Checkpoints(folder, keep=1)
  store.save(1, state, {"loader": {}, "done": True, "frozen": ""})
  store.close()


class ScoredRun(NamedTuple):
  """A run before whose policy a scorer of frames learned.

  Attributes:
    experiment: its workdir has the manifest and the checkpoints.
    learned: parameters of the scorer.
  """

  experiment: experiment_lib.Experiment
  learned: dict


@pytest.fixture(scope="session")
def scored_run(cache_dir, tmp_path_factory):
  """Noise as if trained, in checkpoints that programs find."""
  config = shrink(load_config("configs/kfgrpo_cpu.py", "smoke"), cache_dir)
  config.model.initializer_range = 0.5  # answers that differ
  config.selector.update(learn=True, train_policy=False, tad_weight=0.0)
  config.selector.network.update(width=8, depth=1)
  workdir = tmp_path_factory.mktemp("scored") / "run"
  experiment = experiment_lib.build(config.lock(), workdir)
  telemetry.write_manifest(
    workdir, config=config, seed=0, data_hash=experiment.data_hash
  )
  save_policy(
    workdir / "checkpoints" / "sft",
    policies.initial_params(config, experiment.model, experiment.mesh),
  )
  width = jax.eval_shape(
    descriptor.pixel_descriptor, jax.ShapeDtypeStruct((4, 4, 3), np.uint8)
  ).shape[-1]
  network = selector.SelectorConfig(
    embedding_dim=width,
    query_dim=experiment.model.hidden_size,
    **config.selector.network,
  )
  shapes = jax.eval_shape(
    functools.partial(selector.init, network), jax.random.key(0)
  )
  noise = np.random.default_rng(0)
  learned = jax.tree.map(
    lambda x: 0.3 * noise.normal(size=x.shape).astype(x.dtype), shapes
  )
  save_policy(workdir / "checkpoints" / "selector", learned)
  return ScoredRun(experiment, learned)
