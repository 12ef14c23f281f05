"""TAD and the policy, exported on a CPU for machines that are not here."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from cf_jax import tad
from cf_jax.models import vlm
from cf_jax.programs import export_stablehlo
from tests.conftest import init_params, make_small_model

needs_flatbuffers = pytest.mark.skipif(
  importlib.util.find_spec("flatbuffers") is None,
  reason="flatbuffers (requirements.txt) writes the files",
)


def frames():
  """Three scenes of ten frames, the last five slots empty."""
  rng = np.random.default_rng(0)
  scene = np.repeat(rng.normal(size=(3, 16)), 10, axis=0)
  embedding = scene + 0.05 * rng.normal(size=scene.shape)
  mask = np.arange(30) < 25
  return embedding.astype(np.float32), mask


@pytest.fixture(scope="module")
def exported_tad():
  return export_stablehlo.export_tad(
    num_frames=30, width=16, platforms=("cpu", "tpu", "cuda"), num_keyframes=4
  )


def test_tad_is_for_all_platforms_and_the_same(exported_tad):
  assert exported_tad.platforms == ("cpu", "tpu", "cuda")
  embedding, mask = frames()
  found = exported_tad.call(embedding, mask)
  wanted = jax.jit(lambda e, m: tad.select_keyframes(e, m, num_keyframes=4))(
    embedding, mask
  )
  np.testing.assert_array_equal(found["index"], wanted.index)
  np.testing.assert_allclose(found["weight"], wanted.weight, atol=1e-6)


@needs_flatbuffers
def test_a_file_is_read_back(exported_tad):
  again = jax.export.deserialize(exported_tad.serialize())
  embedding, mask = frames()
  assert again.call(embedding, mask)["index"].shape == (4,)


def test_the_policy_needs_no_device_of_its_platforms():
  exported = export_policy(("tpu", "cuda"))
  assert exported.platforms == ("tpu", "cuda")
  text = exported.mlir_module()
  assert "stablehlo.dot_general" in text
  with pytest.raises(ValueError, match="platform"):
    exported.call(*policy_arguments())  # this is a CPU


def test_the_policy_is_the_same():
  """Against the logits of the whole sequence at its last real slot."""
  model, arguments = make_small_model(), policy_arguments()
  found = export_policy(("cpu", "tpu")).call(*arguments)
  params, pixel, token, position, mask, index = arguments

  @jax.jit
  def whole():
    visual = vlm.encode_vision(model, params, pixel[0], (4, 4))
    return vlm.sequence_logits(
      model,
      params,
      token,
      position,
      mask,
      index,
      visual.reshape(1, -1, model.hidden_size),
    )

  np.testing.assert_allclose(found, whole()[:, mask.sum() - 1], atol=1e-5)


def export_policy(platforms):
  return export_stablehlo.export_policy(
    make_small_model(),
    batch_size=1,
    num_slices=2,
    grid=(4, 4),
    max_tokens=12,
    platforms=platforms,
  )


def policy_arguments():
  model = make_small_model()
  rng = np.random.default_rng(1)
  index = np.full((1, 12), -1, np.int32)
  index[0, 1:9] = np.arange(8)  # two slices of four tokens
  return (
    init_params(model),
    rng.normal(size=(1, 2, 16, model.vision.patch_dim)).astype(np.float32),
    rng.integers(0, model.vocab_size, (1, 12)).astype(np.int32),
    np.broadcast_to(np.arange(12, dtype=np.int32), (1, 3, 12)),
    np.arange(12)[None] < 11,
    index,
  )


def test_a_kernel_of_one_platform_is_refused():
  model = make_small_model()
  with pytest.raises(ValueError, match="config.model.attention"):
    export_stablehlo.export_policy(
      dataclasses.replace(model, attention="splash"),
      batch_size=1,
      num_slices=2,
      grid=(4, 4),
      max_tokens=12,
      platforms=("tpu",),
    )
