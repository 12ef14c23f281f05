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
  num_references: int,
) -> None:
  """Tells the timer what was handled from a batch to its advantages.

  `video` counts frames, the others tokens: `score` those of every view that
  the completions are scored under, prompts and completions.

  Args:
    timer: of the loop.
    experiment: from `experiment.build`.
    stage: says what is trained.
    prepared: the batch.
    mask: bool[B, G, C] the rollouts.
    scored: names of the views that they are teacher-forced under; the
      keyframes among them where the trainer scores its own rollouts.
    num_references: views under which the reference scores them.
  """
  view, completion = prepared.view, mask.sum(axis=2)
  view = {arm: view[arm] for arm in dict.fromkeys(("keyframes", *scored))}
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
    ("score", sum(whole[arm] for arm in scored)),
    ("reference", num_references * whole["keyframes"]),
  ):
    if amount:
      timer.count(phase, amount)
  made = flops.grpo_step(
    experiment.model,
    stage.state.params,
    stage.frozen,
    grid=experiment.grid,
    num_frames=batch * num_slices,
    num_shown=view["keyframes"].frame.size,
    prompt=prompt,
    completion=completion,
    num_references=num_references,
  )
  if "keyframes" in scored:
    made["score"] += made["prefill"] + made["decode"]
  for phase, operations in made.items():
    if operations and phase != "update":
      timer.flops(phase, operations)


def count_policy_update(
  timer: telemetry.PhaseTimer,
  experiment: experiment_lib.Experiment,
  stage: experiment_lib.Stage,
  prepared: views.Prepared,
  mask: np.ndarray,
  *,
  times: int,
  contrastive: bool,
) -> None:
  """Tells the timer what the updates of a step handled.

  Args:
    timer: of the loop.
    experiment: from `experiment.build`.
    stage: says what is trained.
    prepared: the newest batch of the step; groups that came from an earlier one
      are counted with its lengths.
    mask: bool[B, G, C] its rollouts.
    times: updates.
    contrastive: whether they run under a second view too.
  """
  model, view = experiment.model, prepared.view["keyframes"]
  prompt, completion = view.prompt.mask.sum(axis=1), mask.sum(axis=2)
  passes = times * (1 + contrastive)
  timer.count("update", passes * int(prompt.sum() + completion.sum()))
  trained = stage.state.params
  tower = 0.0
  if "vision" in trained:
    tower = flops.vision(model, view.frame.size, experiment.grid)
  decoder = flops.prompts(model, prompt)
  decoder += flops.completions(model, prompt, completion)
  timer.flops(
    "update",
    flops.update(
      trained, stage.frozen, vision=times * tower, decoder=passes * decoder
    ),
  )


def count_update(
  timer: telemetry.PhaseTimer,
  experiment: experiment_lib.Experiment,
  stage: experiment_lib.Stage,
  prepared: views.Prepared,
  mask: np.ndarray,
  *,
  scored_prompt: int,
) -> None:
  """Tells the timer what the phases of a supervised update handled.

  Args:
    timer: of the loop.
    experiment: from `experiment.build`.
    stage: says what is trained.
    prepared: the batch, with its keyframes' view.
    mask: bool[B, G, C] the completions.
    scored_prompt: tokens of the prompts that carry loss.
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
      + flops.completions(model, prompt, completion)
      + flops.scores(model, scored_prompt),
    ),
  )


def _num_frames(prepared: views.Prepared) -> int:
  """Frames scanned and shown; those that a cache had count as well."""
  return int(prepared.batch.scan_mask.sum() + prepared.frame_mask.sum())
