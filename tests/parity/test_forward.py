"""`vlm.forward` takes what a processor returns, and says what does not fit."""

import dataclasses

import jax
import numpy as np
import pytest

from cf_jax.models import rope, vlm
from tests.parity import conftest, specs


@pytest.fixture(scope="module")
def tied():
  with jax.default_matmul_precision("highest"):
    yield conftest.load_case("tied", "stored")


def test_padded_slots_may_hold_anything(tied):
  padded = ~conftest.real_slots(tied.batch)
  expected = tied.expected["logits"][~padded]
  for filler in (-100, 10**6, specs.IMAGE):
    ids = np.where(padded, filler, tied.batch["input_ids"])
    logits = np.asarray(
      vlm.forward(tied.config, tied.params, **tied.batch | {"input_ids": ids})
    )
    assert np.all(np.isfinite(logits))
    np.testing.assert_allclose(logits[~padded], expected, atol=1e-4)


def test_text_alone_and_no_mask(tied):
  """Rows do not touch each other: the batch's text is the text by itself."""
  row = len(tied.batch["input_ids"]) - 1
  real = conftest.real_slots(tied.batch)[row]
  ids = tied.batch["input_ids"][row, real]
  assert len(ids) == 11 and min(ids) >= specs.FIRST_TEXT
  config = dataclasses.replace(
    tied.config, image_token_id=None, video_token_id=None
  )
  for model in (tied.config, config):
    logits = vlm.forward(model, tied.params, ids[None].tolist(), None)
    np.testing.assert_allclose(
      logits[0], tied.expected["logits"][row, real], atol=1e-4
    )


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(pixel_values=None), r"pixel_values must be \(\d+, 96\)"),
    (dict(pixel_values=np.zeros((240, 95))), r"got \(240, 95\)"),
    (dict(pixel_values_videos=np.zeros((1, 96))), "pixel_values_videos must"),
    (dict(image_grid_thw=None), "expected a grid for every image"),
    (dict(second_per_grid_ts=[1.0]), "must be 2 finite seconds"),
    (dict(attention_mask=np.ones((3, 3))), "attention_mask must be"),
  ],
)
def test_what_does_not_match_is_named(tied, change, message):
  with pytest.raises(ValueError, match=message):
    vlm.forward(tied.config, tied.params, **tied.batch | change)


def test_ids_beyond_the_table_are_named(tied):
  with pytest.raises(ValueError, match=r"in \[0, 83\), got 7 to 83"):
    vlm.forward(tied.config, tied.params, [[83, 7]], None)


def test_fractions_of_a_second_live():
  """5.2.0 cuts them, but gives the same logits for explicit `position_ids`."""
  reference = conftest.import_reference()
  case = conftest.load_case("tied", "stored")
  batch = case.batch | {"second_per_grid_ts": np.array([2.5, 0.5], np.float32)}
  named = {k: v for k, v in batch.items() if "pixel" not in k}
  position = np.moveaxis(rope.rope_index(case.config, **named), 1, 0)
  weights = conftest.part(case.expected, "weight/")
  model = reference.load(specs.SPECS["tied"], weights, "float32")
  cut, exact = (
    reference.run(model, inputs)
    for inputs in (batch, batch | {"position_ids": position})
  )
  real = conftest.real_slots(batch)
  with jax.default_matmul_precision("highest"):
    ours = np.asarray(vlm.forward(case.config, case.params, **batch))
  np.testing.assert_allclose(ours[real], exact[real], atol=1e-4)
  assert np.max(np.abs(cut - exact)[real]) > 0.1
