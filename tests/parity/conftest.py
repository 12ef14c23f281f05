"""The checkpoints of the parity tests, stored and live.

`stored` reads `goldens/`, which transformers made once; `live` draws other
weights and asks the installed transformers, and is skipped where that is not
the version that the goldens were made with.
"""

import functools
import pathlib
import tempfile
from typing import NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy

from cf_jax.models import config as model_config
from cf_jax.models import hf_weights
from tests.parity import specs

GOLDENS = pathlib.Path(__file__).parent / "goldens"
LIVE_SEED = 12


class Case(NamedTuple):
  """A checkpoint, a batch, and what transformers makes of them.

  Attributes:
    config: VLMConfig, read from the checkpoint's config.json.
    params: read from its safetensors.
    batch: what a processor returns.
    expected: the reference's outputs, see `reference.make_case`.
    gradient: as params; NaN where the golden leaves entries out.
  """

  config: model_config.VLMConfig
  params: dict
  batch: dict[str, np.ndarray]
  expected: dict[str, np.ndarray]
  gradient: dict


def import_reference():
  """The module `reference`, or a skip that says what is missing."""
  pytest.importorskip("torch", reason="pip install '.[parity]'")
  transformers = pytest.importorskip(
    "transformers", reason="pip install '.[parity]'"
  )
  if transformers.__version__ != specs.VERSION:
    pytest.skip(
      f"transformers is {transformers.__version__}, the goldens are of"
      f" {specs.VERSION}: pip install '.[parity]'"
    )
  from tests.parity import reference

  return reference


def _stored(name):
  with np.load(GOLDENS / f"{name}.npz") as arrays:
    raw = dict(arrays)
  wide = {np.dtype(np.int16): np.int64, np.dtype(np.float16): np.float32}
  for key, value in raw.items():
    if "pixel_values" in key:
      raw[key] = value * np.float32(specs.PIXEL_UNIT)
    elif value.dtype in wide:
      raw[key] = value.astype(wide[value.dtype])
  return raw


def _live(name):
  raw = import_reference().make_case(name, LIVE_SEED)
  return {
    key: value[:, :: specs.PATCH_STEP] if key.startswith("hidden/") else value
    for key, value in raw.items()
  }


def load_checkpoint(
  spec: str, tensors: dict[str, np.ndarray]
) -> tuple[model_config.VLMConfig, dict]:
  """Tensors under the names of transformers, through a directory."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    (path / "config.json").write_text(spec)
    safetensors.numpy.save_file(tensors, path / hf_weights.SINGLE)
    return hf_weights.load_hf(path, dtype="float32")


def part(raw: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  """The arrays under a prefix, without it."""
  return {
    key.removeprefix(prefix): value
    for key, value in raw.items()
    if key.startswith(prefix)
  }


@functools.cache
def load_case(name: str, source: str) -> Case:
  """A case of `specs.SPECS`, "stored" or "live"."""
  raw = (_stored if source == "stored" else _live)(name)
  spec = str(raw["config"])

  config, params = load_checkpoint(spec, part(raw, "weight/"))
  # A gradient has its parameter's name and shape: the same door reads it.
  _, gradient = load_checkpoint(spec, part(raw, "gradient/"))
  return Case(config, params, part(raw, "batch/"), raw, gradient)


@pytest.fixture(scope="module", params=["stored", "live"])
def source(request):
  return request.param


@pytest.fixture(scope="module", params=tuple(specs.SPECS))
def case(request, source):
  with jax.default_matmul_precision("highest"):
    yield load_case(request.param, source)


def real_slots(batch: dict[str, np.ndarray]) -> np.ndarray:
  """bool[B, S]."""
  return np.asarray(batch["attention_mask"]) == 1


def repad(batch: dict[str, np.ndarray], side: str) -> dict[str, np.ndarray]:
  """The same rows, padded on the "left" or on the "right"."""
  ids, real = batch["input_ids"], real_slots(batch)
  slot = np.arange(ids.shape[1])
  count = real.sum(axis=1, keepdims=True)
  mask = slot < count if side == "right" else slot >= len(slot) - count
  moved = np.zeros_like(ids)
  moved[mask] = ids[real]
  return batch | dict(input_ids=moved, attention_mask=mask.astype(np.int64))


def logprob(logits: np.ndarray) -> np.ndarray:
  """Log-softmax over the last axis, in float64."""
  logits = logits.astype(np.float64)
  logits = logits - logits.max(axis=-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def divergence(expected: np.ndarray, ours: np.ndarray) -> np.ndarray:
  """KL(expected, ours) in nats over the last axis."""
  p, q = logprob(expected), logprob(ours)
  return np.sum(np.exp(p) * (p - q), axis=-1)
