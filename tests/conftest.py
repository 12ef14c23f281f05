"""What the tests share: quick compilation, a small model, a small run.

Set before jax is imported: programs of tests run once or twice, so compiling
them well costs more than it gains. Compiled programs are kept for the session,
and xdist's workers, which inherit the environment, share them.
"""

import atexit
import gc
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
  # One module for LLVM, not one for each of many threads that are not there.
  " --xla_cpu_parallel_codegen_split_count=1",
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _cache = tempfile.mkdtemp(prefix="cf_jax_xla_")
  atexit.register(shutil.rmtree, _cache, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import cv2
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from ml_collections import config_flags

from cf_jax import pages
from cf_jax.models import config as model_config
from cf_jax.models import vlm
from cf_jax.types import Prompt, View

# Tracing makes objects by the million, and next to none of them is garbage.
gc.set_threshold(200_000, 50, 100)

ROOT = pathlib.Path(__file__).parents[1]


def pytest_collection_modifyitems(items):
  """Long files first: short ones fill what is left of the last minute.

  A file is one worker's; launch/test.sh keeps their order.
  """
  long = {
    "programs",
    "test_benchmarks.py",
    "test_notebooks.py",
    "test_sharding.py",
    "test_tad.py",
  }
  items.sort(key=lambda item: long.isdisjoint(item.path.parts))


def load_config(path: str, arg: str | None = None) -> ml_collections.ConfigDict:
  """A config, unlocked; `path` is relative to the repository."""
  parser = config_flags.config_flags._ConfigFileParser(
    name="config", lock_config=False
  )
  return parser.parse(str(ROOT / path) + (f":{arg}" if arg else ""))


def draw_no_panels(patch: pytest.MonkeyPatch) -> None:
  """Pages without their curves, which take seconds: test_report draws them."""

  def name(alt, draw, **size):
    return f"<p>{pages.escape(alt)}</p>"

  patch.setattr(pages, "svg_panel", name)


def init_params(model: model_config.VLMConfig) -> dict:
  """Fresh parameters, in one program instead of a hundred."""
  return jax.jit(lambda: vlm.init(model, jax.random.key(0)))()


def make_small_model() -> model_config.VLMConfig:
  """Two narrow layers in each tower."""
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


def fill_params(
  config: model_config.VLMConfig, rng: np.random.Generator
) -> dict:
  """Noise in every parameter, so that no bias or norm is left out of a test."""

  def fill(path, leaf):
    noise = 0.17 * rng.normal(size=leaf.shape)
    return (noise + (path[-1].key == "scale")).astype(np.float32)

  shapes = jax.eval_shape(lambda key: vlm.init(config, key), jax.random.key(0))
  return jax.device_put(jax.tree_util.tree_map_with_path(fill, shapes))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
  """Where generated sets lie, shared by the workers of a session."""
  base = tmp_path_factory.getbasetemp()
  shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
  return shared / "cf_jax_data"


# Fields of `config.model`: one narrow layer in each tower.
SMALLEST = dict(
  size="tiny",
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=1,
  mrope_section=(1, 2, 1),
  vision=dict(
    depth=1,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    out_hidden_size=32,
    fullatt_block_indexes=(0,),
  ),
)


def shrink(
  config: ml_collections.ConfigDict, cache_dir
) -> ml_collections.ConfigDict:
  """The same run at the smallest size: 34 short videos, one narrow layer."""
  config.data.cache_dir = str(cache_dir)
  config.data.synthetic.update(
    num_train=16, num_dev=8, num_test=10, num_frames=64
  )
  config.data.loader.scan_frames = 64
  config.data.reader.update(size_px=(28, 56), cache_mib=16, num_threads=1)
  config.data.decode.processes = 1
  config.tad.num_keyframes = 4
  config.prompt.max_tokens = 96
  config.model = SMALLEST
  config.sft.update(
    max_steps=4,
    batch_size=4,
    stop_accuracy=1.1,
    eval_every=2,
    checkpoint_every=2,
  )
  config.rl.update(steps=4, prompts_per_step=4, checkpoint_every=2)
  config.sampling.update(num_completions=2, max_tokens=12)
  config.contrast.num_shuffles = 1
  config.evaluation.batch_size = 8
  config.report.update(num_film_strips=2, num_rollouts=2, probe_videos=0)
  return config


@pytest.fixture
def tiny_config(cache_dir):
  """configs/kfgrpo_cpu.py:smoke, shrunk; unlocked, to be changed further."""
  return shrink(load_config("configs/kfgrpo_cpu.py", "smoke"), cache_dir)


@pytest.fixture(scope="session")
def write_video():
  """Writes frames uint8[T, h, w, 3] RGB as an mp4 file."""

  def write(path, frames, fps=4.0):
    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(
      str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height)
    )
    assert writer.isOpened()
    for frame in frames:
      writer.write(frame[..., ::-1])
    writer.release()
    return path

  return write


@pytest.fixture(scope="session")
def with_devices():
  """Runs a script in a process that sees `count` CPU devices."""

  def run(count, script, *args):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count"
    ran = subprocess.run(
      [sys.executable, "-c", script, *args],
      cwd=ROOT,
      capture_output=True,
      text=True,
      env=os.environ | {"XLA_FLAGS": f"{flags}={count}"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout

  return run


# ----------------------------------------------- a model without a tokenizer

B, K, P, S = 3, 2, 4, 14
LENGTH = (14, 11, 12)  # real prompt slots


class Scene(NamedTuple):
  """What `policy` and `sampling` read.

  Attributes:
    config: VLMConfig with 40 tokens and patches of 24 numbers.
    params: noise in every parameter, so that none is left out of a test.
    grid: of a frame, in patches.
    pixel: float32[B, 3, 4P, 24] three frames a video.
    view: View of the first two.
    banned: bool[V].
  """

  config: model_config.VLMConfig
  params: dict
  grid: tuple[int, int]
  pixel: jax.Array
  view: View
  banned: jax.Array


@pytest.fixture(scope="session")
def scene():
  config, rng = make_small_model(), np.random.default_rng(0)
  params = fill_params(config, rng)
  mask = np.arange(S) < np.array(LENGTH)[:, None]
  visual = np.full((B, S), -1)
  visual[:, 1:9] = np.arange(K * P)  # text, two frames, text
  position = np.tile(np.arange(S), (B, 3, 1))
  position[:, 0, 1:9] = np.repeat([1, 4], P)
  position[:, 1:, 1:9] = 1 + np.stack([np.arange(8) % 4 // 2, np.arange(8) % 2])
  position[:, :, 9:] = 5 + np.arange(S - 9)
  view = View(
    prompt=Prompt(
      token=jnp.asarray(rng.integers(0, 40, (B, S)), jnp.int32),
      mask=jnp.asarray(mask),
      position=jnp.asarray(np.where(mask[:, None], position, 0)),
      visual=jnp.asarray(np.where(mask, visual, -1)),
    ),
    frame=jnp.asarray(np.tile(np.arange(K), (B, 1))),
  )
  pixel = rng.normal(size=(B, 3, 4 * P, config.vision.patch_dim))
  banned = np.zeros(40, bool)
  banned[[0, 7, 39]] = True
  return Scene(
    config,
    params,
    (4, 4),
    jnp.asarray(pixel, jnp.float32),
    view,
    jnp.asarray(banned),
  )
