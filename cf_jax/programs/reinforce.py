"""The reinforcement stage: rollouts, verdicts, bonuses, advantages, updates.

KF-GRPO and its neighbours are settings of this one loop. `contrast_arms` says
which views are looked at beside the keyframes, `Collector` takes a batch from
prompts to advantages, `train_policy` is the loop. The jitted steps are in
`rl_steps.py`.

Axes: `B` videos, `G` completions per video, `K` keyframe slots, `C` completion
slots.
"""

import contextlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from cf_jax import grpo, rewards, sampling, views
from cf_jax.data import answers, records
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import (
  held_out,
  policies,
  rl_steps,
  scorer,
  verdicts,
  work,
)
from cf_jax.runtime import checkpoint, lifecycle, optim, sharding, telemetry
from cf_jax.types import Experience, OtherView, TrainState, Verdict

# Metrics of an update that tell what it started from, not where it led.
FIRST = ("mismatch_",)

CONTRASTS = ("rollout", "threshold", "margin", "none")
SALIENCIES = (
  "evidence",
  "deletion",
  "weighted_deletion",
  "evidence_else_deletion",
  "none",
)
PLACEBOS = ("none", "random", "other_prompt")
SPANS = ("answer", "text")
ADVANTAGES = ("group", "reinforce")
MAX_REWARD = 1e6


# -------------------------------------------------------------------- settings


class Arms(NamedTuple):
  """Views beside the keyframes, by what is done with them.

  Attributes:
    scored: the keyframes' completions are teacher-forced under them.
    sampled: completions of their own are drawn and judged.
    watched: the same, at intervals, for a look at their accuracy.
  """

  scored: tuple[str, ...]
  sampled: tuple[str, ...]
  watched: tuple[str, ...]

  @property
  def made(self) -> tuple[str, ...]:
    """The views that every batch has."""
    others = {*self.scored, *self.sampled, *self.watched}
    return ("keyframes", *sorted(others))


def contrast_arms(config: ml_collections.ConfigDict) -> Arms:
  """Which views a run needs.

  A bonus whose weight is 0 asks for no view; the contrastive loss asks for the
  shuffled one.

  Raises:
    ValueError: an unknown kind, saliency, placebo, span or estimator, or a
      weight that the estimator does not read.
  """
  contrast = config.contrast
  for name, value, known in (
    ("contrast.kind", contrast.kind, CONTRASTS),
    ("contrast.saliency", contrast.saliency, SALIENCIES),
    ("contrast.placebo", contrast.placebo, PLACEBOS),
    ("contrast.span", contrast.span, SPANS),
    ("rl.advantage", config.rl.advantage, ADVANTAGES),
  ):
    if value not in known:
      raise ValueError(
        f"config.{name} must be one of {list(known)}, got {value!r}"
      )
  if config.rl.advantage == "reinforce" and config.reward.kl.weight:
    raise ValueError(
      "with config.rl.advantage='reinforce' the KL is part of every token's"
      f" reward, got config.reward.kl.weight={config.reward.kl.weight}; set it"
      " to 0, and config.reinforce.kl_weight instead"
    )
  weighed = tuple(
    arm
    for arm, weight in (
      ("shuffled", contrast.rollout.alpha_t),
      ("uniform", contrast.rollout.alpha_c),
    )
    if weight
  )
  scored, sampled = {
    "rollout": (weighed, ()),
    "threshold": ((), ("shuffled",)),
    "margin": ((), weighed),
    "none": ((), ()),
  }[contrast.kind]
  if config.contrastive.weight and "shuffled" not in scored:
    scored = (*scored, "shuffled")
  return Arms(
    scored,
    sampled,
    ("shuffled", "uniform") if contrast.watch_every else (),
  )


def check_settings(config: ml_collections.ConfigDict) -> None:
  """Raises a ValueError where rewards or advantages would come to nothing."""
  arms, overlong = contrast_arms(config), config.reward.overlong
  if overlong.weight and not overlong.buffer > 0:
    raise ValueError(
      "config.reward.overlong.buffer is the number of tokens over which the"
      f" penalty grows, got {overlong.buffer}; make it 1 or more, or set"
      " config.reward.overlong.weight to 0"
    )
  if config.sampling.num_completions != 1 or scorer.is_alone(config):
    return  # where the scorer is alone, selections are compared
  name = {"group": "advantage", "reinforce": "reinforce"}[config.rl.advantage]
  baseline, scale = config[name].baseline, config.advantage.scale
  kind, resample = config.contrast.kind, config.rl.resample
  compares = [
    setting
    for setting, does in (
      (f"{name}.baseline={baseline!r}", baseline != "none"),
      (f"advantage.scale={scale!r}", name == "advantage" and scale != "none"),
      ("contrast.kind='margin'", kind == "margin" and arms.sampled),
      ("rl.mask_zero_spread=True", config.rl.mask_zero_spread),
      (f"rl.resample={resample}", resample),
    )
    if does
  ]
  if compares:
    raise ValueError(
      "a single completion has no others to be compared with, got"
      " config.sampling.num_completions=1 with"
      f" {', '.join(f'config.{setting}' for setting in compares)}; sample 2 or"
      " more, or compare with none ('none', False, 0)"
    )


def check_credit(
  config: ml_collections.ConfigDict, samples: Sequence[records.Sample]
) -> None:
  """Raises a ValueError for a kind of question whose answers earn nothing.

  At least one of the components that right answers earn has a weight, or is a
  factor of a product that has one.
  """
  weight, products = config.reward.weight, config.reward.products
  counted = {name for name, factor in weight.items() if factor}
  for name in counted & set(products):
    counted |= set(products[name])
  for kind in sorted({sample.kind for sample in samples}):
    if not counted & set(answers.CREDIT[kind]):
      raise ValueError(
        f"a right answer to a {kind} question is read as"
        f" {' and '.join(answers.CREDIT[kind])}, and config.reward.weight"
        f" counts {sorted(counted)} alone: it would earn nothing; give the"
        f" whole of it, as in --config.reward.weight="
        f'"{dict(weight) | {answers.CREDIT[kind][0]: 1.0}}"'
      )


def uses_reference(config: ml_collections.ConfigDict) -> bool:
  """Does anything ask what the frozen reference says?"""
  penalty = (
    config.reinforce.kl_weight
    if config.rl.advantage == "reinforce"
    else config.reward.kl.weight
  )
  return bool(config.loss.kl_weight or penalty or config.contrastive.weight)


def deletes_frames(config: ml_collections.ConfigDict) -> bool:
  """Is saliency measured by what the answer loses without a frame?"""
  return config.contrast.kind == "rollout" and "deletion" in (
    config.contrast.saliency
  )


# ----------------------------------------------------------------- one batch


class Collected(NamedTuple):
  """A batch from prompts to advantages.

  Attributes:
    prepared: views of its videos.
    token: int32[B, G, C] as numpy, and
    mask: bool[B, G, C], of the rollouts.
    verdict: what was read in them.
    scored: of the reward step, on the host.
    experience: for the update, on the devices.
  """

  prepared: views.Prepared
  token: np.ndarray
  mask: np.ndarray
  verdict: Verdict
  scored: rl_steps.Scored
  experience: Experience


class Collector:
  """Samples, judges and scores one batch after the other.

  Args:
    experiment: from `experiment.build`.
    stage: says what is trained.
    reference_params: all parameters of the frozen reference.
    timer: of the loop.
    moments: squared deviations and degrees of freedom by kind of question, of
      an earlier run of the same stage; None starts anew.
    judge: what reads the completions; None: `verdicts.make_judge`.

  Attributes:
    arms: the views a batch has.
    moments: the running ones, for the next checkpoint.
    at_times: names of the metrics that not every batch has.
  """

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    stage: experiment_lib.Stage,
    reference_params: dict,
    timer: telemetry.PhaseTimer,
    *,
    moments: tuple[list[float], list[float]] | None = None,
    judge: verdicts.Reader | None = None,
  ):
    config = experiment.config
    self._experiment = experiment
    self._stage = stage
    self._reference_params = reference_params
    self._timer = timer
    check_settings(config)
    self.arms = contrast_arms(config)
    train = experiment.samples["train"]
    self._kinds = sorted({sample.kind for sample in train})
    self._tasks = sorted({sample.task for sample in train})
    self.at_times = [f"arm/{arm}" for arm in self.arms.watched]
    for task in self._tasks:
      self.at_times += [f"accuracy/{task}", f"task_reward/{task}"]
    earned = {name for kind in self._kinds for name in answers.CREDIT[kind]}
    self.at_times += [f"reward/{name}" for name in sorted(earned)]
    if moments is None:
      moments = ([0.0] * len(self._kinds), [0.0] * len(self._kinds))
    self.moments = tuple(np.asarray(x, np.float32) for x in moments)
    self._uses_reference = uses_reference(config)
    self._deletes = deletes_frames(config)
    self._saliency = config.contrast.saliency
    self._watch_every = config.contrast.watch_every
    self._rescores = bool(config.rl.importance_cap)
    self._contrastive = bool(config.contrastive.weight)
    self._filters = config.rl.overlong_filter
    self._masks = config.rl.mask_zero_spread or config.rl.resample

    self._judge = judge or verdicts.make_judge(experiment)
    self._encode = experiment_lib.make_encode_step(experiment)
    self._sample = experiment_lib.make_sample_steps(
      experiment, **config.sampling
    )
    self._sample_views = experiment_lib.make_sample_steps(
      experiment,
      **dict(config.sampling)
      | {"num_completions": config.contrast.num_samples},
    )
    self._score = rl_steps.make_score_step(experiment)
    self._reference = rl_steps.make_reference_step(experiment)
    self._delete = rl_steps.make_deletion_step(experiment)
    self._reward = rl_steps.make_reward_step(
      experiment, num_kinds=len(self._kinds), num_tasks=len(self._tasks)
    )

  def __call__(
    self, params: dict, prepared: views.Prepared, rng: jax.Array, step: int
  ) -> Collected:
    """One batch.

    Args:
      params: all parameters of the policy.
      prepared: the batch's views.
      rng: key of the batch; rows fold their sample's number in.
      step: the update that it is for.
    """
    experiment, timer, put = self._experiment, self._timer, self._experiment.put
    samples = prepared.batch.samples
    num_slots = prepared.num_slots
    watched = self.arms.watched if self.looks(step) else ()
    with timer("data"):
      shown = experiment_lib.shown_frames(prepared, blank=self._deletes)
      pixel = put(experiment.make_views.patches(shown))
      view = put(prepared.view)
      seed = self._seeds(rng, prepared)

    with timer("vision"):
      encoded = jax.block_until_ready(self._encode(params, pixel))
      # The reference and the update encode the keyframes again where the
      # tower is trained; where it is frozen, pixels have served.
      pixel = pixel[:, :num_slots] if self._stage.trains_vision else None

    with timer("prefill"):
      decoding = jax.block_until_ready(
        self._sample.prefill(params, view["keyframes"], encoded, seed)
      )

    with timer("decode"):
      apart = self._sample.unstack(params, rows=decoding.done.size)
      decoding = self._sample.decode(apart, decoding)
      rollout = jax.block_until_ready(decoding.rollout)
      del decoding  # its caches are large

    sampled = {}
    if self.arms.sampled or watched:
      with timer("other arms"):
        for number, arm in enumerate(sorted({*self.arms.sampled, *watched})):
          begun = self._sample_views.prefill(
            params,
            view[arm],
            encoded,
            self._seeds(jax.random.fold_in(rng, 1 + number), prepared),
          )
          sampled[arm] = jax.block_until_ready(
            self._sample_views.decode(apart, begun).rollout
          )
    del apart

    with timer("score"):
      names = [
        name for name in view if name.partition("_")[0] in self.arms.scored
      ]
      if self._rescores:
        names.append("keyframes")
      scored_views = jax.block_until_ready(
        self._score(
          params, {name: view[name] for name in names}, encoded, rollout
        )
      )
      old = scored_views.pop("keyframes", None)
      old = None if old is None else old[:, 0]

    with timer("judge"):
      token, mask = sharding.local((rollout.token, rollout.mask))
      verdict = self._judge(prepared, token, mask)
      other_verdicts = {
        arm: self._judge(prepared, *sharding.local((other.token, other.mask)))
        for arm, other in sampled.items()
      }
      seen = {
        arm: verdicts.main_score(other) for arm, other in other_verdicts.items()
      }
      evidence = prepared.by_slot(
        answers.evidence_keyframes(samples, prepared.keyframe_time_s)
      )

    on_device = put(verdict)
    keyframes = prepared.keyframes
    shown = prepared.by_slot(np.where(keyframes.mask, keyframes.saliency, 0))
    most = shown.max(axis=1, keepdims=True)
    first = np.arange(shown.shape[1]) == shown.argmax(axis=1)[:, None]
    by_evidence = rewards.evidence_saliency(on_device.cited, put(evidence))
    saliency = by_evidence
    if self._saliency == "none":
      saliency = jnp.zeros_like(saliency)
    if self._deletes:
      with timer("deletion"):
        saliency = jax.block_until_ready(
          self._delete(
            params,
            view["keyframes"],
            encoded,
            rollout,
            on_device.answer_span,
            on_device.cited,
            put(prepared.by_slot(keyframes.saliency)),
            put(prepared.by_slot(keyframes.mask)),
          )
        )
    if self._saliency == "evidence_else_deletion":
      annotated = put(np.array([bool(s.evidence) for s in samples]))
      saliency = jnp.where(annotated[:, None], by_evidence, saliency)
    encoded = None if self._stage.trains_vision else encoded[:, :num_slots]

    reference = under = None
    if self._uses_reference:
      with timer("reference"):
        reference = jax.block_until_ready(
          self._ask_reference(view["keyframes"], pixel, encoded, rollout)
        )
        if self._contrastive:
          under = jax.block_until_ready(
            self._ask_reference(view["shuffled"], pixel, encoded, rollout)
          )

    with timer("reward"):
      scored = self._reward(
        on_device,
        rollout,
        rl_steps.Evidence(
          scored=scored_views,
          sampled={arm: put(seen[arm]) for arm in self.arms.sampled},
          ref_logprob=reference,
          saliency=saliency,
          top=put(first & (most > 0)),
          can_shuffle=put(prepared.can_shuffle),
          has_apex=put(prepared.has_apex),
          kind=put(self._numbers(self._kinds, [s.kind for s in samples])),
          task=put(self._numbers(self._tasks, [s.task for s in samples])),
          rng=jax.random.fold_in(rng, 0),
        ),
        self.moments,
      )
      experience = self._experience(
        view,
        rollout,
        scored,
        reference,
        under,
        scored_views,
        on_device,
        put(prepared.can_shuffle),
      ).replace(pixel=pixel, encoded=encoded, old_logprob=old)
      scored = sharding.local(scored)
      self.moments = scored.moments
      for arm in watched:
        scored.metrics[f"arm/{arm}"] = np.mean(seen[arm])
    work.count_step(
      timer,
      experiment,
      self._stage,
      prepared,
      mask,
      scored=names,
      num_references=self._uses_reference + self._contrastive,
    )
    return Collected(prepared, token, mask, verdict, scored, experience)

  def looks(self, step: int) -> bool:
    """Is an update one that looks at the accuracy of other views?"""
    return bool(self.arms.watched) and step % self._watch_every == 0

  def may_compile(
    self, compiles: telemetry.CompileCounter, step: int
  ) -> contextlib.AbstractContextManager:
    """Around a batch: the first look at other views compiles what it needs."""
    if self.looks(step):
      return compiles.warm_up("look")
    return contextlib.nullcontext()

  def views_of(self, drawn: scorer.Drawn, *, draw: int) -> views.Prepared:
    """The views of a batch whose keyframes the scorer has drawn.

    Args:
      drawn: from `scorer.Scorer.draw`.
      draw: seeds the permutations, as in `views.ViewMaker`.
    """
    return self._experiment.make_views(
      drawn.batch, self.arms.made, draw=draw, selected=drawn.selected
    )

  def partial_means(self, every: Sequence[rl_steps.Scored]) -> dict[str, float]:
    """Components and tasks, over the samples of these batches that have them.

    `reward/NAME` is a component, `accuracy/TASK` the main component and
    `task_reward/TASK` the whole reward; what no sample has is left out.
    """
    found: dict[str, list[tuple[float, int]]] = {}
    for scored in every:
      for name, pair in scored.component_mean.items():
        found.setdefault(f"reward/{name}", []).append(pair)
      for n, task in enumerate(self._tasks):
        for name, (mean, count) in (
          ("accuracy", scored.task_mean),
          ("task_reward", scored.task_reward),
        ):
          found.setdefault(f"{name}/{task}", []).append((mean[n], count[n]))
    made = {}
    for name, pairs in found.items():
      means, counts = (np.array(each) for each in zip(*pairs, strict=True))
      if counts.any():
        made[name] = float(np.average(means, weights=counts))
    return made

  def _experience(
    self, view, rollout, scored, reference, under, scored_views, verdict, moved
  ):
    group_mask = scored.spread
    if not self._masks:
      group_mask = jnp.ones_like(group_mask)
    if self._filters:
      rollout = rollout.replace(
        mask=grpo.overlong_filter(rollout.mask, rollout.finished)
      )
    other = None
    if self._contrastive:
      ordered, shuffled = (
        rewards.answer_logprob(logprob, verdict.answer_span)
        for logprob in (rollout.logprob, scored_views["shuffled"][:, 0])
      )
      other = OtherView(
        view=view["shuffled"],
        ref_logprob=under,
        answer_span=verdict.answer_span,
        select=scored.correct & (ordered > shuffled) & moved[:, None],
        moved=moved,
      )
    return Experience(
      view=view["keyframes"],
      rollout=rollout,
      advantage=scored.advantage,
      ref_logprob=reference,
      group_mask=group_mask,
      other=other,
    )

  def _ask_reference(self, view, pixel, encoded, rollout):
    return self._reference(
      self._reference_params, view, pixel, encoded, rollout
    )

  def _seeds(self, rng, prepared):
    return self._experiment.put(
      np.asarray(sampling.row_seeds(rng, prepared.batch.sample_index))
    )

  def _numbers(self, names, mine) -> np.ndarray:
    place = {name: n for n, name in enumerate(names)}
    return np.asarray([place[name] for name in mine], np.int32)


def make_choose_step(experiment: experiment_lib.Experiment):
  """Jitted: two batches of experience and int32[B] rows of both -> one."""
  target = sharding.batch_sharding(experiment.mesh)

  @jax.jit
  def choose_step(pool: Experience, fresh: Experience, row) -> Experience:
    return jax.tree.map(
      lambda a, b: jax.lax.with_sharding_constraint(
        jnp.concatenate([a, b])[row], target
      ),
      pool,
      fresh,
    )

  return choose_step


def useful_first(pool: np.ndarray, fresh: np.ndarray) -> np.ndarray:
  """Rows of two batches to keep: those that teach, the older ones first.

  Args:
    pool: bool[B] which groups of the older batch have a spread.
    fresh: bool[B] the same of the newer one.

  Returns:
    int32[B] rows of the two in a row.
  """
  teaches = np.concatenate([pool, fresh])
  return np.argsort(~teaches, kind="stable")[: len(pool)].astype(np.int32)


# ------------------------------------------------------------------- the loop


def train_policy(
  experiment: experiment_lib.Experiment,
  start_params: dict,
  writer: telemetry.MetricWriter,
  store: checkpoint.Checkpoints,
  *,
  judge: verdicts.Reader | None = None,
  learned: scorer.Scorer | None = None,
  dev: held_out.Evaluator | None = None,
) -> dict:
  """Rollouts, verdicts, contrasts, advantages, one batch's updates a step.

  Args:
    experiment: from `experiment.build`.
    start_params: the cold start's parameters: where the policy starts, and the
      frozen reference of the KL.
    writer: where metrics and rollouts go.
    store: the stage's checkpoints; an unfinished stage goes on from there.
    judge: what reads the completions; None: `verdicts.make_judge`.
    learned: draws the keyframes and is trained beside the policy, once for
      every batch; it goes on from the same checkpoint. None: they are fixed.
    dev: answers the dev split, every `rl.eval_every` updates.

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
  first, num_batches, loader_state, moments = 0, 0, None, None
  if store.latest_step() is not None:
    if learned is None:
      state, host = store.restore(state)
    else:
      joint, host = store.restore(learned.joint(state))
      state = learned.take(joint)
    policies.check_frozen(fingerprint, host, str(store.directory))
    first, loader_state = (
      int(state.step) // config.updates_per_batch,
      host["loader"],
    )
    num_batches, moments = host["batches"], host["moments"]
    logging.info("reinforcement: continues at update %d", first)
  params = optim.join(frozen, state.params)
  if first >= config.steps:
    return params

  timer = telemetry.PhaseTimer(experiment.peak, parts=experiment.share[1])
  collect = Collector(
    experiment, stage, start_params, timer, moments=moments, judge=judge
  )
  choose_step = make_choose_step(experiment)
  update_step = rl_steps.make_update_step(experiment, stage)
  sample_rng = jax.random.fold_in(
    jax.random.wrap_key_data(jnp.asarray(jax.device_get(state.rng))), 1
  )

  with (
    experiment_lib.Stream(
      experiment,
      "train",
      collect.arms.made,
      batch_size=config.prompts_per_step,
      first=num_batches,
      loader_state=loader_state,
      views_made=learned is None,
    ) as stream,
    telemetry.CompileCounter() as compiles,
    telemetry.Tracer(
      telemetry.parse_updates(experiment.config.profile, config.steps),
      experiment.workdir / "profile",
    ) as tracer,
    telemetry.progress(
      "reinforcement", config.steps, start=first, unit="update"
    ) as bar,
    experiment.guard.loop("reinforcement", config.steps, start=first),
  ):
    for step in range(first + 1, config.steps + 1):
      with timer.outside():  # a trace may be written
        tracer.step(step)
      taken, experience, teaches, taught = [], None, None, []
      while True:
        with timer("data"):
          prepared, loader_state = next(stream)
          timer.add("video", stream.prepare_s)
        num_batches += 1
        rng = jax.random.fold_in(sample_rng, num_batches)
        if learned is not None:
          with timer("select"):
            drawn = learned.draw(prepared, number=num_batches)
            prepared = collect.views_of(drawn, draw=num_batches)
        with collect.may_compile(compiles, step):
          batch = collect(params, prepared, rng, step)
        check_rewards(batch, step)
        taken.append(batch)
        if learned is not None:
          with timer("select"):
            taught.append(learned.update(drawn, batch.scored.main))
        spread = np.asarray(
          experiment.gather(batch.scored.spread.tolist()), bool
        )
        if experience is None:
          experience, teaches = batch.experience, spread
        else:
          row = useful_first(teaches, spread)
          with compiles.warm_up("choose"):
            experience = choose_step(
              experience,
              batch.experience,
              experiment.put(experiment.own_rows(row)),
            )
          teaches = np.concatenate([teaches, spread])[row]
        # Its frames would lie beside the next batch's.
        taken[-1] = batch._replace(experience=None)
        del batch
        if teaches.all() or len(taken) > config.resample:
          break

      with timer("update"):
        update_metrics = {}
        for _ in range(config.updates_per_batch):
          state, found = update_step(state, frozen, experience)
          kept = {
            name: value
            for name, value in update_metrics.items()
            if name.startswith(FIRST)
          }
          update_metrics = found | kept
        del experience
        params = optim.join(frozen, state.params)
        metrics = (
          mean_metrics([batch.scored.metrics for batch in taken])
          | collect.partial_means([batch.scored for batch in taken])
          | mean_metrics(taught)
          | jax.device_get(update_metrics)
        )
      work.count_policy_update(
        timer,
        experiment,
        stage,
        taken[-1].prepared,
        taken[-1].mask,
        times=config.updates_per_batch,
        contrastive=bool(experiment.config.contrastive.weight),
      )
      if metrics["nonfinite"]:
        raise FloatingPointError(
          f"reinforcement: non-finite gradient at update {step}; lower"
          " config.rl.optim.learning_rate"
        )
      timer.step()
      bar.advance(
        reward=float(metrics["reward/mean"]),
        correct=float(metrics["reward/correct"]),
      )
      with timer.outside():
        stop = experiment.guard.advance(step, experiment.workdir)
      if step == first + 1:
        compiles.mark_warm()
        judged_at = ["dev_accuracy"] if dev and config.eval_every else []
        store.check_metric([*metrics, *collect.at_times, *judged_at])
      if dev and config.eval_every and step % config.eval_every == 0:
        with timer.outside(), compiles.warm_up("evaluate"):
          judged = dev.run(params)["keyframes"]
        metrics["dev_accuracy"] = float(np.mean(judged.correct))
      if step % config.log_every == 0 or step == config.steps:
        writer.write(
          step,
          "rl",
          metrics
          | timer.collect()
          | {
            "data/skipped_total": len(
              set(experiment.gather(loader_state["skipped"]))
            ),
            "sampled/batches": len(taken),
            "sampled/groups_that_teach": int(teaches.sum()),
            "recompiles": compiles.recompiles,
          },
        )
        writer.write_rollouts(
          step, "rl", rollout_records(experiment, taken[-1])
        )
      if stop or step % config.checkpoint_every == 0 or step == config.steps:
        writer.flush()
        with compiles.warm_up("checkpoint"):
          store.save(
            step,
            state if learned is None else learned.joint(state),
            {
              "loader": experiment.loader_states(loader_state),
              "frozen": fingerprint,
              "batches": num_batches,
              "moments": [x.tolist() for x in collect.moments],
            },
            metrics,
          )
      if stop:
        store.wait()
        raise lifecycle.Stopped(f"{stop} in update {step} of reinforcement")
  store.wait()
  return params


def train_scorer(
  experiment: experiment_lib.Experiment,
  params: dict,
  writer: telemetry.MetricWriter,
  store: checkpoint.Checkpoints,
  learned: scorer.Scorer,
  *,
  judge: verdicts.Reader | None = None,
) -> None:
  """Teaches the scorer what a frozen answerer gets right.

  Where its reward asks for the evidence alone, nothing is answered.

  Args:
    experiment: from `experiment.build`.
    params: all parameters of the answerer.
    writer: where metrics and rollouts go.
    store: the scorer's checkpoints; an unfinished stage goes on from there.
    learned: the scorer; it is changed.
    judge: what reads the completions; None: `verdicts.make_judge`.

  Raises:
    ValueError: a setting that only an update of the policy follows.
  """
  config = experiment.config.rl
  wanted = contrast_arms(experiment.config)
  if wanted.scored or wanted.sampled or uses_reference(experiment.config):
    raise ValueError(
      "config.selector.train_policy=False has no update of the policy for a"
      " bonus or a reference: set config.contrast.kind='none' and"
      " config.contrastive.weight, config.loss.kl_weight and"
      " config.reward.kl.weight to 0"
    )
  if config.eval_every:
    raise ValueError(
      "with config.selector.train_policy=False the answerer stays what it is"
      f" on dev, got config.rl.eval_every={config.eval_every}; set it to 0"
    )
  fingerprint, first, loader_state = optim.fingerprint(params), 0, None
  if store.latest_step() is not None:
    learned.state, host = store.restore(learned.state)
    policies.check_frozen(fingerprint, host, str(store.directory))
    first, loader_state = int(learned.state.step), host["loader"]
    logging.info("learned selection: continues at update %d", first)
  if first >= config.steps:
    return

  timer = telemetry.PhaseTimer(experiment.peak, parts=experiment.share[1])
  rng = jax.random.key(experiment.config.seed)
  nothing = TrainState(
    step=jnp.int32(0), params={}, opt_state=(), rng=jax.random.key_data(rng)
  )
  stage = experiment_lib.Stage(nothing, params, nothing, params, None)
  collect = Collector(experiment, stage, params, timer, judge=judge)
  sample_rng = jax.random.fold_in(rng, 1)

  with (
    experiment_lib.Stream(
      experiment,
      "train",
      collect.arms.made,
      batch_size=config.prompts_per_step,
      first=first,
      loader_state=loader_state,
      views_made=False,
    ) as stream,
    telemetry.CompileCounter() as compiles,
    telemetry.Tracer(
      telemetry.parse_updates(experiment.config.profile, config.steps),
      experiment.workdir / "profile",
    ) as tracer,
    telemetry.progress(
      "learned selection", config.steps, start=first, unit="update"
    ) as bar,
    experiment.guard.loop("learned selection", config.steps, start=first),
  ):
    for step in range(first + 1, config.steps + 1):
      with timer.outside():  # a trace may be written
        tracer.step(step)
      with timer("data"):
        batch, loader_state = next(stream)
        timer.add("video", stream.prepare_s)
      with timer("select"):
        drawn = learned.draw(batch, number=step)
      metrics, rollouts, main = {}, [], None
      if learned.asks:
        with timer("select"):
          prepared = collect.views_of(drawn, draw=step)
        with collect.may_compile(compiles, step):
          answered = collect(
            params, prepared, jax.random.fold_in(sample_rng, step), step
          )
        check_rewards(answered, step)
        main = answered.scored.main
        metrics = mean_metrics(
          [answered.scored.metrics]
        ) | collect.partial_means([answered.scored])
        rollouts = rollout_records(experiment, answered)
        del answered  # its frames would lie beside the next batch's
      with timer("select"):
        metrics |= learned.update(drawn, main)
      timer.step()
      bar.advance(reward=metrics["selector/reward"])
      with timer.outside():
        stop = experiment.guard.advance(step, experiment.workdir)
      if step == first + 1:
        compiles.mark_warm()
        store.check_metric([*metrics, *collect.at_times])
      if step % config.log_every == 0 or step == config.steps:
        writer.write(
          step,
          "rl",
          metrics
          | timer.collect()
          | {
            "data/skipped_total": len(
              set(experiment.gather(loader_state["skipped"]))
            ),
            "recompiles": compiles.recompiles,
          },
        )
        writer.write_rollouts(step, "rl", rollouts)
      if stop or step % config.checkpoint_every == 0 or step == config.steps:
        writer.flush()
        with compiles.warm_up("checkpoint"):
          store.save(
            step,
            learned.state,
            {
              "loader": experiment.loader_states(loader_state),
              "frozen": fingerprint,
            },
            metrics,
          )
      if stop:
        store.wait()
        raise lifecycle.Stopped(f"{stop} in update {step} of the scorer")
  store.wait()


def check_rewards(batch: Collected, step: int) -> None:
  """Raises a FloatingPointError for a reward that no advantage can be of.

  NaN, infinite, or beyond `MAX_REWARD`: squares of such lose all others in
  float32, and a gradient of such is clipped to nothing.
  """
  reward = np.asarray(batch.scored.reward)
  wrong = ~(np.abs(reward) <= MAX_REWARD)
  if not wrong.any():
    return
  b, g = np.argwhere(wrong)[0]
  parts = ", ".join(
    f"{name} {float(value[b, g]):.4g}"
    for name, value in batch.verdict.component.items()
  )
  raise FloatingPointError(
    f"reinforcement: a reward of {reward[b, g]:.4g} at update {step}, of sample"
    f" {batch.prepared.batch.samples[b].id!r} ({parts}, bonus"
    f" {float(batch.scored.bonus[b, g]):.4g}); rewards must be finite and at"
    f" most {MAX_REWARD:.0e}: see config.reward and the parameters it started"
    " from"
  )


def mean_metrics(every: list[dict]) -> dict[str, float]:
  """Means over all batches sampled for an update, the ones passed over too."""
  names = dict.fromkeys(name for metrics in every for name in metrics)
  return {
    name: float(np.mean([m[name] for m in every if name in m]))
    for name in names
  }


def rollout_records(
  experiment: experiment_lib.Experiment, batch: Collected
) -> list[dict]:
  """One row of rollouts.jsonl for each completion of the first video."""
  prepared, scored = batch.prepared, batch.scored
  sample = prepared.batch.samples[0]
  texts = experiment_lib.decode_rollout(
    experiment.tokenizer, batch.token[:1], batch.mask[:1]
  )[0]
  seconds = prepared.keyframe_time_s[0]
  shown = prepared.view["keyframes"].prompt
  prompt = re.sub(  # a frame is one pad here, not one for each visual token
    r"(<\|(?:image|video)_pad\|>)+",
    r"\1",
    experiment.tokenizer.decode(shown.token[0][shown.mask[0]]),
  )
  applies = batch.verdict.applies
  return [
    {
      "sample_id": sample.id,
      "task": sample.task,
      "prompt": prompt,
      "answer": sample.answer,
      "completion": text,
      "rewards": {
        name: float(value[0, g])
        for name, value in batch.verdict.component.items()
        if applies[name][0]
      }
      | {
        "bonus": float(scored.bonus[0, g]),
        "total": float(scored.reward[0, g]),
      },
      # Of REINFORCE++, whose tokens have their own: their mean.
      "advantage": float(
        np.mean(scored.advantage[0, g][..., batch.mask[0, g]])
        if scored.advantage.ndim == 3
        else scored.advantage[0, g]
      ),
      "keyframe_s": [round(float(t), 3) for t in seconds if t == t],
    }
    for g, text in enumerate(texts)
  ]
