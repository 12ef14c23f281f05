"""What each phase of a training step handles: tokens, frames, operations.

The loops time their phases; this says how much was done in them, so that
metrics have rates and utilisation.

Axes: `B` videos, `G` completions per video, `C` completion slots.
"""

import math
from collections.abc import Collection

import numpy as np

from cf_jax import views
from cf_jax.models import flops
from cf_jax.programs import experiment as experiment_lib
from cf_jax.runtime import telemetry


def count_step(
  timer: telemetry.PhaseTimer,
  experiment: experiment_lib.Experiment,
  stage: experiment_lib.Stage,
  prepared: views.Prepared,
  mask: np.ndarray,
  *,
  scored: Collection[str],
  uses_reference: bool,
) -> None:
  """Tells the timer what the phases of a reinforcement step handled.

  `video` counts frames, the others tokens: `score` those of every view that
  the completions are scored under, prompts and completions.

  Args:
    timer: of the loop.
    experiment: from `experiment.build`.
    stage: says what is trained.
    prepared: the batch.
    mask: bool[B, G, C] the rollouts.
    scored: names of the views that they are teacher-forced under.
    uses_reference: whether the reference scores them.
  """
  view, completion = prepared.view, mask.sum(axis=2)
  view = {arm: view[arm] for arm in ("keyframes", *scored)}
  prompt = {arm: view[arm].prompt.mask.sum(axis=1) for arm in view}
  batch, num_slices = len(prepared.frames), prepared.num_shown
  read = {arm: int(length.sum()) for arm, length in prompt.items()}
  told = int(completion.sum())
  whole = {arm: length + told for arm, length in read.items()}
  num_visual = math.prod(experiment.make_views.merged_grid)
  for phase, amount in (
    ("video", _num_frames(prepared)),
    ("vision", batch * num_slices * num_visual),
    ("prefill", read["keyframes"]),
    ("decode", told),
    ("score", sum(whole.values()) - whole["keyframes"]),
    ("reference", uses_reference * whole["keyframes"]),
    ("update", bool(stage.state.params) * whole["keyframes"]),
  ):
    if amount:
      timer.count(phase, amount)
  for phase, operations in flops.grpo_step(
    experiment.model,
    stage.state.params,
    stage.frozen,
    grid=experiment.grid,
    num_frames=batch * num_slices,
    num_shown=view["keyframes"].frame.size,
    prompt=prompt,
    completion=completion,
    uses_reference=uses_reference,
  ).items():
    if operations:
      timer.flops(phase, operations)


def count_update(
  timer: telemetry.PhaseTimer,
  experiment: experiment_lib.Experiment,
  stage: experiment_lib.Stage,
  prepared: views.Prepared,
  mask: np.ndarray,
) -> None:
  """Tells the timer what the phases of a supervised update handled.

  Args:
    timer: of the loop.
    experiment: from `experiment.build`.
    stage: says what is trained.
    prepared: the batch, with its keyframes' view.
    mask: bool[B, G, C] the completions.
  """
  model, view = experiment.model, prepared.view["keyframes"]
  prompt, completion = view.prompt.mask.sum(axis=1), mask.sum(axis=2)
  timer.count("video", _num_frames(prepared))
  timer.count("update", int(prompt.sum() + completion.sum()))
  timer.flops(
    "update",
    flops.update(
      stage.state.params,
      stage.frozen,
      vision=flops.vision(model, view.frame.size, experiment.grid),
      decoder=flops.prompts(model, prompt)
      + flops.completions(model, prompt, completion),
    ),
  )


def _num_frames(prepared: views.Prepared) -> int:
  """Frames scanned and shown; those that a cache had count as well."""
  return int(prepared.batch.scan_mask.sum() + prepared.frame_mask.sum())
