"""Supervised cold start on worded reasoning, stopped while there is something
left to learn.

The loss is a mean negative log-likelihood, by `sft.loss_on`:
  completion   of the target's tokens: reasoning, answer and end token. The
               softmax leaves out what is never sampled, as sampling does.
  all          of the prompt's text as well, under the whole vocabulary. What
               shows pictures carries no loss.

With `sft.pack` samples share rows (data/packing.py). The update is the same.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging

from cf_jax import masked, policy
from cf_jax.data import packing, targets
from cf_jax.models import vlm
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import held_out, policies, work
from cf_jax.runtime import (
  checkpoint,
  lifecycle,
  optim,
  processes,
  sharding,
  telemetry,
)
from cf_jax.types import Rollout, TrainState, View
from cf_jax.views import Prepared

LossOn = Literal["completion", "all"]


class Targets(NamedTuple):
  """What one SFT update reads.

  Attributes:
    view: View of B videos (ordered keyframes).
    pixel: float32[B, K, 4P, patch].
    target: Rollout with G = 1, the wanted completion.
  """

  view: View
  pixel: jax.Array
  target: Rollout


class PackedTargets(NamedTuple):
  """The same in rows that hold several samples.

  Attributes:
    rows: of `packing.lay`, R of them.
    pixel: float32[R, F, 4P, patch] pictures of each row.
  """

  rows: packing.Rows
  pixel: jax.Array


def sft_loss(
  params: Any,
  batch: Targets,
  *,
  model,
  grid,
  banned,
  loss_on: LossOn = "completion",
  whole: Targets | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean negative log-likelihood of the tokens that carry it, in nats a token.

  Where `batch` is a part of the batch `whole`, the loss is that part's summand
  of the mean, and so is every metric.
  """
  whole = whole or batch
  encoded = policy.encode_frames(model, params, batch.pixel, grid=grid)
  if loss_on == "completion":
    num_tokens = jnp.sum(whole.target.mask)
    logprob, entropy = policy.completion_logprobs(
      model, params, batch.view, encoded, batch.target, banned
    )
    mask = batch.target.mask
  else:
    found = policy.sequence_logprobs(
      model, params, batch.view, encoded, batch.target
    )
    logprob, entropy = (
      jnp.concatenate([prompt, target[:, 0]], axis=1)
      for prompt, target in zip(*found, strict=True)
    )
    mask = _all_scored(batch)
    num_tokens = jnp.sum(_all_scored(whole))
  return _mean_loss(logprob, entropy, mask, num_tokens)


def _all_scored(batch: Targets) -> jax.Array:
  """bool[B, S + C] what carries the loss on "all"."""
  text = policy.text_mask(batch.view.prompt)
  return jnp.concatenate([text, batch.target.mask[:, 0]], axis=1)


def packed_loss(
  params: Any,
  batch: PackedTargets,
  *,
  model,
  grid,
  banned,
  loss_on: LossOn = "completion",
  whole: PackedTargets | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`sft_loss` of the samples in the rows."""
  rows = batch.rows
  num_tokens = jnp.sum((whole or batch).rows.scored)
  encoded = policy.encode_frames(model, params, batch.pixel, grid=grid)
  visual = encoded.reshape(len(encoded), -1, encoded.shape[-1])
  hidden = vlm.segmented(
    model,
    params,
    vlm.embed(model, params, rows.token, rows.visual, visual),
    rows.position,
    rows.segment,
  )
  logprob, entropy = policy.slot_logprobs(
    model,
    params,
    jnp.take_along_axis(hidden, rows.state[:, :, None], axis=1),
    rows.label,
    rows.scored,
    banned if loss_on == "completion" else jnp.zeros_like(banned),
  )
  return _mean_loss(logprob, entropy, rows.scored, num_tokens)


def _mean_loss(logprob, entropy, mask, num_tokens):
  def mean(value):
    return masked.masked_mean(value, mask, total=num_tokens)

  loss = -mean(logprob)
  return loss, {"loss": loss, "entropy": mean(entropy)}


def check(config: ml_collections.ConfigDict) -> None:
  """Raises a ValueError for settings of `config.sft` that mean nothing."""
  kinds = get_args(LossOn)
  if config.sft.loss_on not in kinds:
    raise ValueError(
      f"loss_on must be one of {kinds}, got {config.sft.loss_on!r}; change"
      " config.sft.loss_on"
    )
  if config.sft.pack < 0:
    raise ValueError(
      f"pack must be 0 or a number of samples, got {config.sft.pack}; change"
      " config.sft.pack"
    )


def pack(
  experiment: experiment_lib.Experiment, batch: Targets
) -> PackedTargets:
  """Lays this process's samples into as few rows as the mesh can share.

  All processes have equally many.
  """
  config = experiment.config.sft
  rows = packing.lay(
    batch.view.prompt,
    batch.view.frame,
    batch.target,
    room=config.pack,
    num_visual=math.prod(experiment.make_views.merged_grid),
    on_prompt=config.loss_on == "all",
  )
  shape, (_, shares) = experiment.mesh.shape, experiment.share
  step = shape["data"] * shape["fsdp"] * config.micro_batches // shares
  count = max(processes.exchange(-(-len(rows.token) // step) * step))
  rows = packing.fill_up(rows, count)
  return PackedTargets(rows, batch.pixel[rows.sample, rows.frame])


def make_sft_step(
  experiment: experiment_lib.Experiment, stage: experiment_lib.Stage
):
  """The jitted update: state (donated), frozen, batch -> state, metrics.

  The batch is Targets or PackedTargets.
  """
  banned = jnp.asarray(experiment.banned)
  config = experiment.config.sft

  def loss(params, batch, whole):
    packed = isinstance(batch, PackedTargets)
    return (packed_loss if packed else sft_loss)(
      params,
      batch,
      model=experiment.model,
      grid=experiment.grid,
      banned=banned,
      loss_on=config.loss_on,
      whole=whole,
    )

  return make_update(
    experiment,
    stage,
    loss,
    micro_batches=config.micro_batches,
  )


def make_update(
  experiment: experiment_lib.Experiment,
  stage: experiment_lib.Stage,
  loss: Callable[[Any, Any, Any], tuple[jax.Array, dict[str, jax.Array]]],
  *,
  micro_batches: int,
  largest: tuple[str, ...] = (),
):
  """Jits one optimizer update of a stage.

  A batch may go through the model in parts, one after the other: the loss, its
  gradient and the metrics are those of the whole, for a part's memory.

  Args:
    experiment: from `experiment.build`.
    stage: says what is trained; the loss is differentiated by that alone.
    loss: all parameters, part, whole batch -> loss, metrics; both add up over
      the parts.
    micro_batches: how many equal parts; 1 leaves the batch whole.
    largest: metrics that do not add up: the largest of the parts' counts.

  Returns:
    A function of TrainState (donated), frozen parameters and a batch that
    gives the new state and metrics.
  """

  def update_step(state: TrainState, frozen: dict, batch: Any):
    def of_trained(trained, part):
      with jax.named_scope("loss"):
        return loss(optim.join(frozen, trained), part, batch)

    differentiate = jax.value_and_grad(of_trained, has_aux=True)
    if micro_batches == 1:
      (_, metrics), grad = differentiate(state.params, batch)
    else:
      zeros = jax.lax.with_sharding_constraint(
        jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params),
        stage.state_shardings.params,
      )
      grad, metrics = accumulate(
        lambda part: differentiate(state.params, part),
        zeros,
        sharding.split_batch(batch, experiment.mesh, micro_batches),
        largest=largest,
      )
    with jax.named_scope("update"):
      return apply_gradient(state, grad, metrics, stage.optimizer)

  return jax.jit(
    update_step,
    donate_argnums=0,
    in_shardings=(
      stage.state_shardings,
      stage.frozen_shardings,
      sharding.batch_sharding(experiment.mesh),
    ),
    out_shardings=(
      stage.state_shardings,
      sharding.replicated(experiment.mesh),
    ),
  )


def accumulate(
  differentiate: Callable[[Any], tuple[tuple[jax.Array, dict], Any]],
  zeros: Any,
  parts: Any,
  *,
  largest: tuple[str, ...],
) -> tuple[Any, dict[str, jax.Array]]:
  """Gradient and metrics of a batch, from one part after the other.

  Args:
    differentiate: part -> (loss, metrics), gradient.
    zeros: float32 tree of the gradient's shapes: bfloat16 would lose what a
      late part adds to a large sum.
    parts: pytree of [parts, rows, ...].
    largest: names of the metrics of which the largest counts; the others and
      the gradients add up.
  """

  def add(total, part):
    (_, metrics), grad = differentiate(part)
    total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, grad)
    return total, metrics

  grad, metrics = jax.lax.scan(add, zeros, parts)
  return grad, {
    name: (jnp.max if name in largest else jnp.sum)(value, axis=0)
    for name, value in metrics.items()
  }


def apply_gradient(
  state: TrainState,
  grad: Any,
  metrics: dict[str, jax.Array],
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer update; a non-finite gradient leaves the state as it was.

  So does one whose norm overflows: clipping would make it 0 without a word.
  `metrics["nonfinite"]` is 1 where that happened; the loop stops there.
  """
  norm = optax.tree.norm(grad)
  finite = optim.all_finite(grad) & jnp.isfinite(norm)
  updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)

  def keep(new, old):
    # Gradients of several parts are float32, whatever the state is.
    return jax.tree.map(
      lambda a, b: jnp.where(finite, a.astype(b.dtype), b), new, old
    )

  metrics = metrics | {
    "grad_norm": norm,
    "nonfinite": 1.0 - finite.astype(jnp.float32),
  }
  return state.replace(
    step=state.step + 1,
    params=keep(params, state.params),
    opt_state=keep(opt_state, state.opt_state),
  ), metrics


def cold_start(
  experiment: experiment_lib.Experiment,
  start_params: dict,
  judge: held_out.Evaluator,
  writer: telemetry.MetricWriter,
  store: checkpoint.Checkpoints,
  *,
  make_target: Callable[[Prepared], Rollout] | None = None,
) -> dict:
  """Trains until dev accuracy reaches `sft.stop_accuracy`, or `max_steps`.

  Args:
    experiment: from `experiment.build`.
    start_params: all parameters; their buffers are taken over.
    judge: answers the dev split under the keyframes view.
    writer: where metrics go.
    store: the stage's checkpoints; an unfinished stage goes on from there.
    make_target: a batch's wanted completions, G = 1; None: the answers of its
      samples.

  Returns:
    All parameters: where the reinforcement stage starts, and its anchor.
    Without any update (`sft.max_steps` 0), `start_params`.
  """
  config = experiment.config.sft
  if not config.max_steps:
    return start_params
  check(experiment.config)
  stage = experiment_lib.make_stage(experiment, "sft", start_params)
  state, frozen = stage.state, stage.frozen
  fingerprint = optim.fingerprint(frozen)
  first, loader_state = 0, None
  if store.latest_step() is not None:
    state, host = store.restore(state)
    policies.check_frozen(fingerprint, host, str(store.directory))
    first, loader_state = int(state.step), host["loader"]
    if host["done"]:
      logging.info("cold start: done at update %d", first)
      return optim.join(frozen, state.params)
    logging.info("cold start: continues at update %d", first)
  settings = experiment.config

  def wanted(samples):
    return targets.target_rollout(
      experiment.tokenizer,
      samples,
      settings.sampling.max_tokens,
      reasoning=settings.answers.reasoning,
      answer_form=config.answer_form,
      interval_form=settings.answers.interval_form,
      between=config.between,
    )

  if make_target is None:
    # A target that does not fit shows before training.
    wanted(experiment.samples["train"])

    def make_target(prepared):
      return wanted(prepared.batch.samples)

  sft_step = make_sft_step(experiment, stage)
  timer = telemetry.PhaseTimer(experiment.peak, parts=experiment.share[1])

  with (
    experiment_lib.Stream(
      experiment,
      "train",
      ("keyframes",),
      batch_size=config.batch_size,
      first=first,
      loader_state=loader_state,
    ) as stream,
    telemetry.CompileCounter() as compiles,
    telemetry.progress(
      "cold start", config.max_steps, start=first, unit="update"
    ) as bar,
    experiment.guard.loop("cold start", config.max_steps, start=first),
  ):
    for step in range(first + 1, config.max_steps + 1):
      with timer("data"):
        prepared, loader_state = next(stream)
        timer.add("video", stream.prepare_s)
        view = prepared.view["keyframes"]
        batch = Targets(
          view=view,
          pixel=experiment.make_views.patches(
            experiment_lib.shown_frames(prepared)
          ),
          target=make_target(prepared),
        )
        mask, scored = batch.target.mask, 0
        if config.loss_on == "all":
          scored = int(np.sum(policy.text_mask(view.prompt)))
        if config.pack:
          batch = pack(experiment, batch)
      # Packed batches differ in their number of rows.
      with (
        timer("update"),
        compiles.warm_up(f"update of {len(batch.pixel)} rows"),
      ):
        state, metrics = sft_step(state, frozen, experiment.put(batch))
        metrics = jax.device_get(metrics)
      if config.pack:
        metrics |= {
          "pack/rows": len(batch.pixel),
          "pack/filled": float(np.mean(batch.rows.segment > 0)),
        }
      work.count_update(
        timer, experiment, stage, prepared, mask, scored_prompt=scored
      )
      if metrics["nonfinite"]:
        raise FloatingPointError(
          f"cold start: non-finite gradient at update {step}; lower"
          " config.sft.optim.learning_rate"
        )
      timer.step()
      bar.advance(loss=float(metrics["loss"]))
      with timer.outside():
        stop = experiment.guard.advance(step, experiment.workdir)
      if step == first + 1:
        compiles.mark_warm()
      done = step == config.max_steps
      if step % config.eval_every == 0 or done:
        with timer("evaluate"), compiles.warm_up("evaluate"):
          judged = judge.run(optim.join(frozen, state.params))["keyframes"]
        metrics["dev_accuracy"] = float(np.mean(judged.correct))
        done = done or metrics["dev_accuracy"] >= config.stop_accuracy
        logging.info(
          "cold start: update %d, loss %.3f, dev accuracy %.3f",
          step,
          metrics["loss"],
          metrics["dev_accuracy"],
        )
      writer.write(
        step,
        "sft",
        metrics
        | timer.collect()
        | {
          "data/skipped_total": len(
            set(experiment.gather(loader_state["skipped"]))
          ),
          "recompiles": compiles.recompiles,
        },
      )
      if done or stop or step % config.checkpoint_every == 0:
        writer.flush()
        with compiles.warm_up("checkpoint"):
          store.save(
            step,
            state,
            {
              "loader": experiment.loader_states(loader_state),
              "done": done,
              "frozen": fingerprint,
            },
            metrics,
          )
      if stop:
        store.wait()
        raise lifecycle.Stopped(f"{stop} in update {step} of the cold start")
      if done:
        break
  store.wait()
  return optim.join(frozen, state.params)
