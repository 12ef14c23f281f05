"""What the phases of a step handled, counted by hand."""

import types

import numpy as np
import pytest

from cf_jax.models import flops
from cf_jax.programs import work
from cf_jax.runtime import telemetry
from cf_jax.types import Prompt, View
from tests.conftest import init_params, make_small_model

SCANNED, SHOWN = (4, 3), (3, 3)  # frames of each of two videos
LENGTH = {"keyframes": (5, 3), "shuffled": (5, 3), "uniform": (4, 4)}
SLICES = 4  # of all views, two of them the keyframes'
COMPLETION = ((2, 1), (3, 3))


def mask(length, size):
  return np.arange(size) < np.array(length)[..., None]


def view(length):
  return View(
    prompt=Prompt(token=None, mask=mask(length, 6), position=None, visual=None),
    frame=np.zeros((2, 2), np.int32),
  )


PREPARED = types.SimpleNamespace(
  batch=types.SimpleNamespace(scan_mask=mask(SCANNED, 5)),
  frames=np.zeros((2, 5, 1, 1, 3), np.uint8),
  frame_mask=mask(SHOWN, 4),
  view={arm: view(length) for arm, length in LENGTH.items()},
  num_shown=SLICES,
)


@pytest.fixture(scope="module")
def made():
  model = make_small_model()
  return (
    types.SimpleNamespace(
      model=model,
      grid=(4, 4),
      make_views=types.SimpleNamespace(merged_grid=(2, 2)),
    ),
    types.SimpleNamespace(
      state=types.SimpleNamespace(params=init_params(model)), frozen={}
    ),
  )


class Notes(telemetry.PhaseTimer):
  """What a timer is told."""

  def __init__(self):
    super().__init__()
    self.told, self.operations = {}, {}

  def count(self, name, amount):
    self.told[name] = self.told.get(name, 0) + amount

  def flops(self, name, amount):
    self.operations[name] = self.operations.get(name, 0) + amount


@pytest.mark.parametrize(
  ("scored", "num_references", "score", "reference"),
  [
    # 9 tokens of completions after 8 of prompts, in every view.
    (("shuffled", "uniform"), 1, 34, 17),
    (("uniform",), 0, 17, None),
    ((), 1, None, 17),
    (("shuffled", "keyframes"), 2, 34, 34),  # the rollouts themselves again
  ],
)
def test_a_batch(made, scored, num_references, score, reference):
  experiment, stage = made
  notes = Notes()
  work.count_step(
    notes,
    experiment,
    stage,
    PREPARED,
    mask(COMPLETION, 4),
    scored=scored,
    num_references=num_references,
  )
  wanted = {
    "video": 13,
    "vision": 2 * SLICES * 4,
    "prefill": 8,
    "decode": 9,
    "score": score,
    "reference": reference,
  }
  wanted = {phase: amount for phase, amount in wanted.items() if amount}
  assert notes.told == wanted
  assert notes.operations.keys() == wanted.keys() - {"video"}
  forward = notes.operations["prefill"] + notes.operations["decode"]
  tower = flops.vision(experiment.model, 4, experiment.grid)
  assert notes.operations["vision"] == pytest.approx(2 * tower)
  score_operations = notes.operations.get("score", 0)
  if "keyframes" in scored:
    assert score_operations == pytest.approx(2 * forward)
  # Once more in the tower where it is trained.
  assert notes.operations.get("reference", 0) == pytest.approx(
    num_references * (tower + forward)
  )


@pytest.mark.parametrize(
  ("times", "contrastive", "tokens"),
  [(1, False, 17), (3, False, 51), (2, True, 68)],
)
def test_the_updates_of_a_step(made, times, contrastive, tokens):
  experiment, stage = made
  notes = Notes()
  work.count_policy_update(
    notes,
    experiment,
    stage,
    PREPARED,
    mask(COMPLETION, 4),
    times=times,
    contrastive=contrastive,
  )
  assert notes.told == {"update": tokens}
  prompt, completion = np.array(LENGTH["keyframes"]), np.array(COMPLETION)
  forward = flops.prompts(experiment.model, prompt) + flops.completions(
    experiment.model, prompt, completion
  )
  tower = flops.vision(experiment.model, 4, experiment.grid)
  expected = 3 * times * (tower + (1 + contrastive) * forward)
  assert notes.operations["update"] == pytest.approx(expected)


def test_an_update(made):
  experiment, stage = made
  notes = Notes()
  completion = mask(((2,), (3,)), 4)
  work.count_update(
    notes, experiment, stage, PREPARED, completion, scored_prompt=0
  )
  assert notes.told == {"video": 13, "update": 8 + 5}
  assert notes.operations.keys() == {"update"}
  more = Notes()
  work.count_update(
    more, experiment, stage, PREPARED, completion, scored_prompt=3
  )
  model = experiment.model
  # Forward, and twice as much backward.
  assert more.operations["update"] - notes.operations["update"] == (
    pytest.approx(3 * 3 * 2 * model.hidden_size * model.vocab_size)
  )
