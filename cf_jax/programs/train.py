"""The loop: mp4 files -> cold start -> KF-GRPO -> evaluation -> report.

Read it top to bottom. `run` is the order of things; the jitted steps stand
above it, each a few lines over pure functions.

Axes: `B` videos, `G` completions per video, `V` views, `C` completion slots.
"""

import json
import math
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from cf_jax import grpo, masked, policy, report, rewards, sampling, views
from cf_jax.data import answers, prompts
from cf_jax.models import flops
from cf_jax.programs import evaluate, policies, sft
from cf_jax.programs import experiment as experiment_lib
from cf_jax.runtime import checkpoint, optim, telemetry
from cf_jax.types import Experience, Verdict, View

RL_ARMS = ("keyframes", "shuffled", "uniform")
# Metrics of an update that are no means: the largest of its parts counts.
LARGEST = ("ratio_max", "mismatch")

# Name, goal in points, and the two (stage, view, task) whose accuracies differ.
GAPS = (
  (
    "KF-GRPO over the cold start (all tasks)",
    10.0,
    ("rl", "keyframes", "all"),
    ("sft", "keyframes", "all"),
  ),
  (
    "needle: TAD over uniform frames",
    15.0,
    ("rl", "keyframes", "needle"),
    ("rl", "uniform", "needle"),
  ),
  (
    "order: ordered over shuffled keyframes",
    15.0,
    ("rl", "keyframes", "order"),
    ("rl", "shuffled", "order"),
  ),
)


# ---------------------------------------------------------------- jitted steps


def make_score_step(experiment: experiment_lib.Experiment):
  """Teacher-forced scores of the same completions under other views.

  params, views, encoded frames, Rollout -> log-probabilities under the shuffled
  views [B, M, G, C] and under the uniform view [B, 1, G, C].
  """
  banned = jnp.asarray(experiment.banned)

  @jax.jit
  def score_step(params, view: dict[str, View], encoded, rollout):
    def logprobs(arm):
      return policy.completion_logprobs(
        experiment.model, params, view[arm], encoded, rollout, banned
      )[0]

    with jax.named_scope("score"):
      shuffled = jnp.stack(
        [logprobs(arm) for arm in sorted(view) if arm.startswith("shuffled")],
        axis=1,
      )
      return shuffled, logprobs("uniform")[:, None]

  return score_step


def make_reference_step(experiment: experiment_lib.Experiment):
  """The reference policy's scores under the keyframes.

  params, View, pixel, encoded frames, Rollout -> log-probabilities [B, G, C].
  Of the two, one is None, as in Experience: where the tower is trained, the
  reference has its own; where it is frozen, they share it.
  """
  model, grid = experiment.model, experiment.grid
  banned = jnp.asarray(experiment.banned)

  @jax.jit
  def reference_step(params, view: View, pixel, encoded, rollout):
    with jax.named_scope("reference"):
      if encoded is None:
        encoded = policy.encode_frames(model, params, pixel, grid=grid)
      return policy.completion_logprobs(
        model, params, view, encoded, rollout, banned
      )[0]

  return reference_step


def make_reward_step(experiment: experiment_lib.Experiment):
  """Verdict and contrasts -> reward, bonus, advantage [B, G], metrics."""
  config = experiment.config
  weight = dict(config.reward.weight)
  contrast = dict(config.contrast)
  del contrast["num_shuffles"]  # the views are made before
  tau = contrast.pop("tau")
  advantage_settings = dict(config.advantage)

  @jax.jit
  def reward_step(
    verdict: Verdict,
    evidence,
    rollout,
    shuffled,
    uniform,
    can_shuffle,
    has_apex,
  ):
    g_shuffled, g_uniform = (
      rewards.rollout_contrast(
        rollout.logprob, view, verdict.answer_span, tau=tau
      )
      for view in (shuffled, uniform)
    )
    correct = rewards.is_correct(verdict.component["accuracy"])
    saliency = rewards.evidence_saliency(verdict.cited, evidence)
    bonus = rewards.contrast_bonus(
      correct,
      g_shuffled,
      g_uniform,
      saliency,
      shuffled_mask=can_shuffle,
      uniform_mask=has_apex,
      **contrast,
    )
    reward = rewards.combine(verdict.component, weight=weight) + bonus
    advantage = grpo.group_advantages(reward, **advantage_settings)
    metrics = {
      f"reward/{name}": jnp.mean(value)
      for name, value in verdict.component.items()
    } | {
      "reward/mean": jnp.mean(reward),
      "reward/zero_spread_groups": jnp.mean(~grpo.spread_mask(reward)),
      "bonus/mean": jnp.mean(bonus),
      "bonus/saliency": jnp.mean(saliency),
      "bonus/g_shuffled_correct": masked.masked_mean(g_shuffled, correct),
      "bonus/g_shuffled_wrong": masked.masked_mean(g_shuffled, ~correct),
      "bonus/g_uniform_correct": masked.masked_mean(g_uniform, correct),
      "bonus/g_uniform_wrong": masked.masked_mean(g_uniform, ~correct),
      "length/mean": jnp.mean(verdict.length),
      "length/unfinished": jnp.mean(~rollout.finished),
    }
    return reward, bonus, advantage, metrics

  return reward_step


def grpo_loss(
  params: Any,
  batch: Experience,
  *,
  model,
  grid,
  banned,
  loss: dict,
  whole: Experience | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Clipped policy loss plus k3 KL to the reference (docs/method.md).

  Where `batch` is a part of the batch `whole`, the loss is that part's summand,
  and so is every metric that is not in `LARGEST`.
  """
  whole = whole or batch
  counted = whole.rollout.mask & whole.group_mask[:, None, None]
  encoded = batch.encoded
  if encoded is None:
    encoded = policy.encode_frames(model, params, batch.pixel, grid=grid)
  logprob, entropy = policy.completion_logprobs(
    model, params, batch.view, encoded, batch.rollout, banned
  )
  value, metrics = grpo.policy_loss(
    logprob,
    batch.rollout.logprob,
    batch.ref_logprob,
    batch.advantage,
    batch.rollout.mask,
    batch.group_mask,
    total=grpo.denominator(counted, aggregate=loss["aggregate"]),
    num_tokens=jnp.sum(counted),
    **loss,
  )
  metrics = metrics | {
    "loss": value,
    "entropy": masked.masked_mean(
      entropy, batch.rollout.mask, total=jnp.sum(whole.rollout.mask)
    ),
    "mismatch": jnp.max(
      jnp.where(batch.rollout.mask, jnp.abs(logprob - batch.rollout.logprob), 0)
    ),
  }
  return value, metrics


def make_update_step(
  experiment: experiment_lib.Experiment, stage: experiment_lib.Stage
):
  """The jitted update: state (donated), frozen, Experience -> new, metrics."""
  banned = jnp.asarray(experiment.banned)
  settings = dict(experiment.config.loss)

  def loss(params, batch, whole):
    return grpo_loss(
      params,
      batch,
      model=experiment.model,
      grid=experiment.grid,
      banned=banned,
      loss=settings,
      whole=whole,
    )

  return sft.make_update(
    experiment,
    stage,
    loss,
    micro_batches=experiment.config.rl.micro_batches,
    largest=LARGEST,
  )


# ------------------------------------------------------------- reinforcement


def reinforce(
  experiment: experiment_lib.Experiment,
  start_params: dict,
  writer: telemetry.MetricWriter,
  store: checkpoint.Checkpoints,
) -> dict:
  """KF-GRPO: rollouts, verdicts, contrasts, advantages, one update a batch.

  Args:
    experiment: from `experiment.build`.
    start_params: the cold start's parameters: where the policy starts, and the
      frozen reference of the KL.
    writer: where metrics and rollouts go.
    store: the stage's checkpoints; an unfinished stage goes on from there.

  Returns:
    All parameters after the last update.
  """
  config = experiment.config.rl
  # The state is donated to its updates; the reference keeps its own buffers.
  trained, frozen = optim.split(
    start_params, policies.frozen_patterns(experiment.config, "rl")
  )
  copied = jax.tree.map(jnp.copy, trained)
  stage = experiment_lib.make_stage(
    experiment, "rl", optim.join(frozen, copied)
  )
  state, fingerprint = stage.state, optim.fingerprint(frozen)
  first, loader_state = 0, None
  if store.latest_step() is not None:
    state, host = store.restore(state)
    policies.check_frozen(fingerprint, host, str(store.directory))
    first, loader_state = int(state.step), host["loader"]
    logging.info("KF-GRPO: continues at update %d", first)
  params = optim.join(frozen, state.params)
  if first >= config.steps:
    return params

  encode_step = experiment_lib.make_encode_step(experiment)
  sample = experiment_lib.make_sample_steps(
    experiment, **experiment.config.sampling
  )
  score_step = make_score_step(experiment)
  reference_step = make_reference_step(experiment)
  reward_step = make_reward_step(experiment)
  update_step = make_update_step(experiment, stage)
  sample_rng = jax.random.fold_in(
    jax.random.wrap_key_data(jnp.asarray(jax.device_get(state.rng))), 1
  )
  cite_tolerance_s = prompts.label_tolerance_s(
    experiment.config.prompt.build.time_format
  )
  timer = telemetry.PhaseTimer(experiment.peak)

  with (
    experiment_lib.Stream(
      experiment,
      "train",
      RL_ARMS,
      batch_size=config.prompts_per_step,
      first=first,
      loader_state=loader_state,
    ) as stream,
    telemetry.CompileCounter() as compiles,
    telemetry.Tracer(
      telemetry.parse_updates(experiment.config.profile, config.steps),
      experiment.workdir / "profile",
    ) as tracer,
    telemetry.progress(
      "KF-GRPO", config.steps, start=first, unit="update"
    ) as bar,
  ):
    for step in range(first + 1, config.steps + 1):
      tracer.step(step)
      with timer("data"):
        prepared, loader_state = next(stream)
        timer.add("video", stream.prepare_s)
        pixel = experiment.put(
          experiment.make_views.patches(experiment_lib.shown_frames(prepared))
        )
        view = experiment.put(prepared.view)
        num_slots = view["keyframes"].frame.shape[1]
        seed = experiment.put(
          np.asarray(
            sampling.row_seeds(
              jax.random.fold_in(sample_rng, step), prepared.batch.sample_index
            )
          )
        )

      with timer("vision"):
        encoded = jax.block_until_ready(encode_step(params, pixel))
        # The reference and the update encode the keyframes again where the
        # tower is trained; where it is frozen, pixels have served.
        pixel = pixel[:, :num_slots] if stage.trains_vision else None

      with timer("prefill"):
        decoding = jax.block_until_ready(
          sample.prefill(params, view["keyframes"], encoded, seed)
        )

      with timer("decode"):
        rows = decoding.done.size
        decoding = sample.decode(sample.unstack(params, rows=rows), decoding)
        rollout = jax.block_until_ready(decoding.rollout)
        del decoding  # its caches are large

      with timer("score"):
        shuffled, uniform = jax.block_until_ready(
          score_step(params, view, encoded, rollout)
        )
        encoded = None if stage.trains_vision else encoded[:, :num_slots]

      with timer("reference"):
        reference = jax.block_until_ready(
          reference_step(
            start_params, view["keyframes"], pixel, encoded, rollout
          )
        )

      with timer("judge"):
        token, mask = jax.device_get((rollout.token, rollout.mask))
        samples = prepared.batch.samples
        frame_time_s = prepared.frame_time_s[:, :num_slots]
        verdict = Verdict(
          **answers.judge(
            experiment.tokenizer,
            samples,
            token,
            mask,
            frame_time_s=frame_time_s,
            cite_tolerance_s=cite_tolerance_s,
          )._asdict()
        )
        evidence = answers.evidence_keyframes(samples, frame_time_s)
        reward, bonus, advantage, metrics = reward_step(
          experiment.put(verdict),
          experiment.put(evidence),
          rollout,
          shuffled,
          uniform,
          experiment.put(prepared.can_shuffle),
          experiment.put(prepared.has_apex),
        )

      with timer("update"):
        state, update_metrics = update_step(
          state,
          frozen,
          Experience(
            view=view["keyframes"],
            rollout=rollout,
            advantage=advantage,
            ref_logprob=reference,
            group_mask=jnp.ones(advantage.shape[0], dtype=bool),
            pixel=pixel,
            encoded=encoded,
          ),
        )
        del pixel, encoded  # or they would lie beside the next batch's
        params = optim.join(frozen, state.params)
        metrics = jax.device_get(metrics | update_metrics)
      count_work(timer, experiment, stage, prepared, mask)
      if metrics["nonfinite"]:
        raise FloatingPointError(
          f"KF-GRPO: non-finite gradient at update {step}; lower"
          " config.rl.optim.learning_rate"
        )
      timer.step()
      bar.advance(
        reward=float(metrics["reward/mean"]),
        accuracy=float(metrics["reward/accuracy"]),
      )
      if step == first + 1:
        compiles.mark_warm()
      if step % config.log_every == 0 or step == config.steps:
        for task, score in task_accuracy(verdict, prepared).items():
          metrics[f"accuracy/{task}"] = score
        writer.write(
          step,
          "rl",
          metrics
          | timer.collect()
          | {
            "data/skipped_total": len(loader_state["skipped"]),
            "recompiles": compiles.recompiles,
          },
        )
        writer.write_rollouts(
          step,
          "rl",
          rollout_records(
            experiment,
            prepared,
            token,
            mask,
            verdict,
            jax.device_get((reward, bonus, advantage)),
            num_slots,
          ),
        )
      if step % config.checkpoint_every == 0 or step == config.steps:
        writer.flush()
        store.save(step, state, {"loader": loader_state, "frozen": fingerprint})
  store.wait()
  return params


def count_work(
  timer: telemetry.PhaseTimer,
  experiment: experiment_lib.Experiment,
  stage: experiment_lib.Stage,
  prepared: views.Prepared,
  mask: np.ndarray,
) -> None:
  """Tells the timer the tokens and the operations of each phase of an update.

  Args:
    timer: of the loop.
    experiment: from `experiment.build`.
    stage: says what is trained.
    prepared: the batch.
    mask: bool[B, G, C] the rollouts.
  """
  view, completion = prepared.view, mask.sum(axis=2)
  prompt = {arm: view[arm].prompt.mask.sum(axis=1) for arm in view}
  batch, num_frames = experiment_lib.shown_frames(prepared).shape[:2]
  read, told = int(prompt["keyframes"].sum()), int(completion.sum())
  num_visual = math.prod(experiment.make_views.merged_grid)
  for phase, tokens in (
    ("vision", batch * num_frames * num_visual),
    ("prefill", read),
    ("decode", told),
    ("update", read + told),
  ):
    timer.count(phase, tokens)
  for phase, operations in flops.grpo_step(
    experiment.model,
    stage.state.params,
    stage.frozen,
    grid=experiment.grid,
    num_frames=batch * num_frames,
    num_shown=view["keyframes"].frame.size,
    prompt=prompt,
    completion=completion,
  ).items():
    timer.flops(phase, operations)


def task_accuracy(
  verdict: Verdict, prepared: views.Prepared
) -> dict[str, float]:
  """Share of right rollouts of each task in a batch."""
  tasks = np.asarray([sample.task for sample in prepared.batch.samples])
  right = verdict.component["accuracy"]
  return {
    task: float(np.mean(right[tasks == task])) for task in np.unique(tasks)
  }


def rollout_records(
  experiment, prepared, token, mask, verdict, scored, num_slots
) -> list[dict]:
  """One row of rollouts.jsonl for each completion of the first video."""
  reward, bonus, advantage = scored
  sample = prepared.batch.samples[0]
  texts = experiment_lib.decode_rollout(
    experiment.tokenizer, token[:1], mask[:1]
  )[0]
  seconds = prepared.frame_time_s[0, :num_slots]
  shown = prepared.view["keyframes"].prompt
  prompt = re.sub(  # a frame is one pad here, not one for each visual token
    r"(<\|(?:image|video)_pad\|>)+",
    r"\1",
    experiment.tokenizer.decode(shown.token[0][shown.mask[0]]),
  )
  return [
    {
      "sample_id": sample.id,
      "task": sample.task,
      "prompt": prompt,
      "answer": sample.answer,
      "completion": text,
      "rewards": {
        name: float(value[0, g]) for name, value in verdict.component.items()
      }
      | {"bonus": float(bonus[0, g]), "total": float(reward[0, g])},
      "advantage": float(advantage[0, g]),
      "keyframe_s": [round(float(t), 3) for t in seconds if t == t],
    }
    for g, text in enumerate(texts)
  ]


# ------------------------------------------------------------------------ run


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """The whole of it. Interrupted, the same call goes on where it was."""
  begin = time.monotonic()
  workdir.mkdir(parents=True, exist_ok=True)
  results_path = workdir / "results.json"
  policies.make_paths_absolute(config)
  check_same_config(config, workdir)
  telemetry.parse_updates(config.profile, config.rl.steps)  # or fail at once
  if (workdir / "report.html").exists() and results_path.exists():
    logging.info(
      "this run is complete; its report is %s", workdir / "report.html"
    )
    return

  # -- data, tokenizer, policy
  experiment = experiment_lib.build(config, workdir)
  check_same_data(experiment.data_hash, workdir)
  # Before the workdir belongs to this config: it finds mistakes.
  about = experiment_lib.summary(experiment)
  telemetry.write_manifest(
    workdir,
    config=config,
    seed=config.seed,
    data_hash=experiment.data_hash,
    peak=experiment.peak,
  )
  stores = {
    stage: checkpoint.Checkpoints(
      workdir / "checkpoints" / stage, keep=config.checkpoint.keep
    )
    for stage in policies.STAGES
  }
  resume = {
    stage: store.latest_step()
    for stage, store in stores.items()
    if store.latest_step() is not None
  }
  if resume:
    logging.info("continuing from checkpoints %s", resume)
  writer = telemetry.MetricWriter(
    workdir, resume=resume, active=jax.process_index() == 0
  )
  telemetry.startup_table(config.name, about | {"event files": writer.backend})

  # A set with shortcuts, or with too few videos to tell, shows before training.
  probes = evaluate.probes(experiment, config.report.probe_videos)

  # -- cold start, then KF-GRPO
  limits = {
    "batch_size": config.evaluation.batch_size,
    "max_tokens": config.sampling.max_tokens,
  }
  dev = evaluate.Evaluator(
    experiment, experiment.samples["dev"], ("keyframes",), **limits
  )
  sft_params = sft.cold_start(
    experiment,
    policies.initial_params(config, experiment.model, experiment.mesh),
    dev,
    writer,
    stores["sft"],
  )
  rl_params = reinforce(experiment, sft_params, writer, stores["rl"])
  writer.close()

  # -- evaluation before and after, on videos that no stage has seen
  test = evaluate.Evaluator(
    experiment, experiment.samples["test"], config.evaluation.arms, **limits
  )
  judged = {
    "sft": test.run(sft_params, show_progress=True),
    "rl": test.run(rl_params, show_progress=True),
  }
  rows = [
    row for stage, found in judged.items() for row in test.rows(found, stage)
  ]
  chance = evaluate.chance(experiment.samples["test"])
  results = {
    "chance": chance,
    "evaluations": rows,
    "probes": probes,
    "goals": goals(rows, chance),
    "timing": {"this_start_s": round(time.monotonic() - begin, 1)},
  }
  test.write_predictions(judged, workdir / "predictions.jsonl")
  test.write_film_strips(workdir, config.report.num_film_strips)
  telemetry.write_json(results_path, results)
  path = report.write_report(workdir, num_rollouts=config.report.num_rollouts)
  for store in stores.values():
    store.close()

  # -- what came out
  found = {(row["stage"], row["view"], row["task"]): row for row in rows}
  tasks = [*sorted({s.task for s in experiment.samples["test"]}), "all"]
  telemetry.closing_table(
    "held-out accuracy",
    ["stage and view", *tasks],
    [
      [
        f"{stage}  {arm}",
        *(found[stage, arm, task]["accuracy"] for task in tasks),
      ]
      for stage in judged
      for arm in config.evaluation.arms
    ],
  )
  logging.info("report: %s", path)


def goals(rows: Sequence[dict], chance: dict[str, float]) -> list[dict]:
  """What a run is meant to show, in points of accuracy."""
  at = {
    (row["stage"], row["view"], row["task"]): row["accuracy"] for row in rows
  }

  inside = [
    100
    * min(row["high"] - chance[row["task"]], chance[row["task"]] - row["low"])
    for row in rows
    if (row["stage"], row["view"]) == ("rl", "blind")
  ]
  made = []
  for name, goal, high, low in GAPS:
    if high in at and low in at:
      value = 100 * (at[high] - at[low])
      made.append(
        {"name": name, "value": value, "goal": goal, "met": value >= goal}
      )
  if inside:
    made.append(
      {
        "name": "blind policy: chance inside its interval in every task",
        "value": min(inside),
        "goal": 0.0,
        "met": min(inside) >= 0,
      }
    )
  return made


def check_same_config(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> None:
  """A workdir belongs to one config; what is traced may change.

  Raises:
    ValueError: it holds a run of another one; names the first differences.
  """
  if not (workdir / telemetry.MANIFEST_FILE).exists():
    return
  there = telemetry.read_manifest(workdir)["config"]
  here = telemetry.to_jsonable(config.to_dict())
  differ = [
    f"{key} (there {json.dumps(old)}, now {json.dumps(new)})"
    for key, old, new in _differences(there, here)
    if key != "profile"
  ]
  if differ:
    raise ValueError(
      f"{workdir} holds a run of another config: {'; '.join(differ[:5])};"
      " give another --workdir or the same settings"
    )


def check_same_data(data_hash: str, workdir: pathlib.Path) -> None:
  """A workdir belongs to one data set.

  Raises:
    ValueError: its run was started on other samples.
  """
  if not (workdir / telemetry.MANIFEST_FILE).exists():
    return
  there = telemetry.read_manifest(workdir)["data_hash"]
  if there != data_hash:
    raise ValueError(
      f"{workdir} holds a run on other data (hash {there}, now {data_hash});"
      " give another --workdir, or the data of config.data.source as it was"
    )


def _differences(
  there: Any, here: Any, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
  if isinstance(there, dict) and isinstance(here, dict):
    for key in sorted(set(there) | set(here)):
      yield from _differences(
        there.get(key), here.get(key), f"{prefix}.{key}" if prefix else key
      )
  elif there != here:
    yield prefix, there, here
