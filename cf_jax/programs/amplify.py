"""Iterated amplification: a policy that chooses frames, one that answers.

After ViaRL (arXiv 2505.15447). The selector sees many small candidate frames
with their numbers drawn on them, and the question without its options; it
writes a list of numbers. The answerer sees those frames, large, and the
options, and answers greedily. In turns

  1. the selector is trained by reinforcement, the frozen answerer's answers
     being its reward;
  2. the answerer is trained on the right answers, with the frames that the
     selector now chooses.

Every stage is a run in a folder of its own, with metrics and checkpoints:
  selector/            the selector's cold start on frames of the evidence
  answerer/            the answerer's, on frames of its own `scan`
  cycle_1/selector/, cycle_1/answerer/, cycle_2/...
`evaluation.json` in each says how the two stand after it, results.json and
report.html say it of all. Interrupted, the same call goes on where it was:
stages that are done are read from their checkpoints.

Axes: `B` samples, `G` frame lists each, `T` scanned frames, `N` candidates,
`n` frames shown to the answerer.
"""

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from cf_jax import amplify_page, disk, report, tad, views
from cf_jax.data import answers, chance, pipeline, records, targets
from cf_jax.evals import accuracy
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import (
  held_out,
  policies,
  reinforce,
  sft,
  train,
  verdicts,
)
from cf_jax.runtime import checkpoint, lifecycle, processes, telemetry
from cf_jax.types import Keyframes, Rollout, Verdict

EVALUATION_FILE = "evaluation.json"
FRAMES_FILE = "frames.jsonl"

# ------------------------------------------------------------------- settings


def selector_config(
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """What the selector's stages are runs of: all but the other sections."""
  made = ml_collections.ConfigDict(config.to_dict())
  del made.answerer, made.amplify
  policies.make_paths_absolute(made)
  return made.lock()


def answerer_config(
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """What the answerer's stages are runs of: the same but `config.answerer`.

  Raises:
    ValueError: a setting in `config.answerer` that is none.
  """
  made = ml_collections.ConfigDict(config.to_dict())
  del made.answerer, made.amplify
  made.lock()
  try:
    made.update(config.answerer.to_dict())
  except (AttributeError, KeyError) as error:
    raise ValueError(
      f"config.answerer says what differs from the selector's settings, but"
      f" {error}"
    ) from error
  made.tad.num_keyframes = config.amplify.num_frames
  made.sft.optim.total_steps = made.sft.max_steps
  policies.make_paths_absolute(made)
  return made


def check(config: ml_collections.ConfigDict) -> None:
  """Raises a ValueError where the two do not fit together."""
  if processes.count() > 1:
    raise ValueError(
      "amplify runs in one process, got"
      f" {processes.count()}; set config.distributed=False"
    )
  num_frames, num_candidates = (
    config.amplify.num_frames,
    config.tad.num_keyframes,
  )
  if not 1 <= num_frames <= num_candidates:
    raise ValueError(
      f"config.amplify.num_frames is {num_frames}, expected 1 to"
      f" config.tad.num_keyframes, the {num_candidates} candidates"
    )
  if config.amplify.cycles < 1:
    raise ValueError(
      f"config.amplify.cycles must be at least 1, got {config.amplify.cycles}"
    )
  if config.contrast.kind != "none" or config.rl.steps < 1:
    raise ValueError(
      "the selector is trained by reinforcement without a contrast, got"
      f" config.contrast.kind={config.contrast.kind!r} and"
      f" config.rl.steps={config.rl.steps}; set 'none' and at least 1"
    )
  of_answerer = answerer_config(config)
  ours, theirs = config.data.to_dict(), of_answerer.data.to_dict()
  differ = [
    name
    for name in ("source", "seed", "synthetic", "loader")
    if ours[name] != theirs[name]
  ]
  if differ:
    raise ValueError(
      "both see the same samples and the same scan, but config.answerer.data"
      f" says another {', '.join(differ)}; leave that out"
    )
  reinforce.check_settings(config)
  for name, value in (
    ("selector.learn", config.selector.learn),
    ("rl.eval_every", config.rl.eval_every),
  ):
    if value:
      raise ValueError(
        f"the selector of amplify is a policy that writes lists, and is judged"
        f" after every stage; got config.{name}={value}, leave that out"
      )
  lists = config.sampling.num_completions * num_frames
  reader = of_answerer.data.reader
  height, width = reader.size_px
  size = config.rl.prompts_per_step * lists * height * width * 3
  if size > reader.cache_mib * 2**20:
    raise ValueError(
      f"the frames that a batch's lists name take {size / 2**20:.0f} MiB,"
      f" config.answerer.data.reader.cache_mib is {reader.cache_mib}; raise it,"
      " or every list would decode its video again"
    )


# --------------------------------------------------------------- frame lists


class Lists(NamedTuple):
  """What a batch of frame lists comes to.

  Attributes:
    verdict: answers.Judgement with the components format, index and hit (the
      list is readable and holds a frame of the evidence).
    chosen: Keyframes of B videos for each of the G lists.
  """

  verdict: answers.Judgement
  chosen: list[Keyframes]


def as_keyframes(index: np.ndarray, num_scanned: int) -> Keyframes:
  """Scanned frames as the keyframes of a view; nothing else is known of them.

  Args:
    index: int32[B, n], ascending; T where there is none.
    num_scanned: T.
  """
  nothing = dict.fromkeys(field.name for field in dataclasses.fields(Keyframes))
  return Keyframes(
    **nothing | dict(index=index, order=index, mask=index < num_scanned)
  )


@functools.cache
def _uniform_step(num_frames: int):
  return jax.jit(
    jax.vmap(functools.partial(tad.uniform_index, num_keyframes=num_frames))
  )


def uniform_frames(mask: np.ndarray, num_frames: int) -> np.ndarray:
  """bool[B, T] -> int32[B, n]: evenly spaced real frames."""
  return np.asarray(_uniform_step(num_frames)(mask))


def read_lists(
  experiment: experiment_lib.Experiment,
  prepared: views.Prepared,
  token: np.ndarray,
  mask: np.ndarray,
  *,
  num_frames: int,
) -> Lists:
  """Reads the selector's completions: int32[B, G, C] and bool[B, G, C].

  A list that cannot be read, or that names a frame which a short video does not
  have, gives a uniform stride and earns nothing.
  """
  candidate = prepared.keyframes
  judged, frame = answers.judge_selection(
    experiment.tokenizer,
    token,
    mask,
    num_frames=num_frames,
    num_candidates=candidate.index.shape[1],
    reasoning=experiment.config.answers.reasoning,
  )
  num_real = candidate.mask.sum(axis=1)[:, None, None]  # [B, 1, 1]
  stride = np.arange(num_frames) * np.maximum(num_real // num_frames, 1)
  exists = np.all(frame < num_real, axis=2)
  frame = np.where(exists[..., None], frame, stride)  # [B, G, n]
  readable = judged.component["index"] * exists
  inside = answers.evidence_keyframes(
    prepared.batch.samples, prepared.keyframe_time_s
  )
  rows = np.arange(len(frame))[:, None, None]
  last = candidate.index.shape[1] - 1
  safe = np.minimum(frame, last)  # a stride may end behind a short video
  real = frame < num_real
  hit = np.any(inside[rows, safe] & real, axis=2)
  cited = np.zeros((*frame.shape[:2], candidate.index.shape[1]), bool)
  groups = np.arange(frame.shape[1])[None, :, None]
  cited[rows, groups, safe] = real & (readable[..., None] > 0)
  component = judged.component | {
    "index": readable,
    "hit": (hit * readable).astype(np.float32),
  }
  scanned = prepared.batch.scan_mask.shape[1]
  index = np.where(real, candidate.index[rows, safe], scanned)
  return Lists(
    verdict=judged._replace(
      component=component,
      cited=cited.reshape(*cited.shape[:2], prepared.num_slots, -1).any(-1),
      applies=dict.fromkeys(component, np.ones(len(frame), bool)),
    ),
    chosen=[
      as_keyframes(index[:, g].astype(np.int32), scanned)
      for g in range(index.shape[1])
    ],
  )


def shown(keyframes: Keyframes) -> tuple[Keyframes, np.ndarray]:
  """Frames as `selected` of a ViewMaker, which decodes no others beside them.

  They stand for the uniform frames too, which no view here shows.
  """
  return keyframes, keyframes.index


def by_sample(lists: Mapping[str, Sequence[int]]) -> Callable:
  """What `ViewMaker.choosing` takes: frames by the question, not the video.

  Args:
    lists: id of a sample -> n scanned frames, T where there is none.
  """

  def choose(batch: pipeline.Batch):
    index = np.asarray([lists[s.id] for s in batch.samples], np.int32)
    return shown(as_keyframes(index, batch.scan_mask.shape[1]))

  return choose


# ------------------------------------------------------------- the two policies


class Answerer:
  """Greedy answers to frames that somebody else chose.

  Args:
    experiment: the answerer's.

  Attributes:
    experiment: the same.
  """

  def __init__(self, experiment: experiment_lib.Experiment):
    self.experiment = experiment
    self._steps = experiment_lib.make_sample_steps(
      experiment,
      num_completions=1,
      max_tokens=experiment.config.sampling.max_tokens,
      temperature=0.0,
    )
    self._encode = experiment_lib.make_encode_step(experiment)
    self._read = verdicts.make_judge(experiment)
    self._params = self._apart = None

  def load(self, params: dict, *, rows: int) -> None:
    """Takes over the parameters that answer from now on, `rows` at a time."""
    self._params = params
    self._apart = self._steps.unstack(params, rows=rows)

  def unload(self) -> None:
    """Lets go of them, so that a stage may take over their buffers."""
    self._params = self._apart = None

  def score(
    self, batch: pipeline.Batch, keyframes: Keyframes | None = None
  ) -> np.ndarray:
    """float32[B]: main score of the answers; None shows its own frames."""
    experiment = self.experiment
    prepared = experiment.make_views(
      batch, ("keyframes",), selected=keyframes and shown(keyframes)
    )
    pixel = experiment.make_views.patches(experiment_lib.shown_frames(prepared))
    seed = np.zeros((len(batch.samples), 2), np.uint32)
    begun = self._steps.prefill(
      self._params,
      experiment.put(prepared.view["keyframes"]),
      self._encode(self._params, experiment.put(pixel)),
      experiment.put(seed),
    )
    rollout = jax.device_get(self._steps.decode(self._apart, begun).rollout)
    verdict = self._read(prepared, rollout.token, rollout.mask)
    return verdicts.main_score(verdict)[:, 0]

  def score_lists(
    self, batch: pipeline.Batch, chosen: Sequence[Keyframes]
  ) -> np.ndarray:
    """float32[B, G]: the same for G choices; each video is decoded once."""
    index = np.concatenate([keyframes.index for keyframes in chosen], axis=1)
    self.experiment.make_views.read_ahead(batch, index)
    return np.stack([self.score(batch, each) for each in chosen], axis=1)


def make_judge(
  experiment: experiment_lib.Experiment,
  answerer: Answerer,
  *,
  num_frames: int,
) -> verdicts.Reader:
  """What the selector's rollouts earn: components format, index, accuracy.

  `hit` is there to be logged: the list holds a frame of the evidence.

  Args:
    experiment: the selector's.
    answerer: with frozen parameters.
    num_frames: n.
  """

  def read(prepared, token, mask) -> Verdict:
    lists = read_lists(experiment, prepared, token, mask, num_frames=num_frames)
    score = answerer.score_lists(prepared.batch, lists.chosen)
    verdict = lists.verdict
    return Verdict(
      **verdict._replace(
        component=verdict.component | {"accuracy": score},
        applies=verdict.applies | {"accuracy": np.ones(len(score), dtype=bool)},
      )._asdict()
    )

  return read


class Choice(NamedTuple):
  """A selector's greedy list for each of a batch of samples.

  Attributes:
    prepared: the batch, filled up to its fixed size.
    real: how many of its rows count.
    lists: what the lists come to, G = 1.
  """

  prepared: views.Prepared
  real: int
  lists: Lists


class Selector:
  """Greedy frame lists.

  Args:
    experiment: the selector's.
    num_frames: n.
  """

  def __init__(self, experiment: experiment_lib.Experiment, num_frames: int):
    self.experiment = experiment
    self.num_frames = num_frames
    self._steps = experiment_lib.make_sample_steps(
      experiment,
      num_completions=1,
      max_tokens=experiment.config.sampling.max_tokens,
      temperature=0.0,
    )
    self._encode = experiment_lib.make_encode_step(experiment)
    self._params = self._apart = None

  def load(self, params: dict, *, rows: int) -> None:
    """Takes over the parameters that choose from now on, `rows` at a time."""
    self._params = params
    self._apart = self._steps.unstack(params, rows=rows)

  def unload(self) -> None:
    """Lets go of them, so that a stage may take over their buffers."""
    self._params = self._apart = None

  def read(self, batch: pipeline.Batch) -> tuple[views.Prepared, Lists]:
    """What the policy of `load` says of a batch, and what it comes to."""
    experiment = self.experiment
    prepared = experiment.make_views(batch, ("keyframes",))
    pixel = experiment.make_views.patches(experiment_lib.shown_frames(prepared))
    begun = self._steps.prefill(
      self._params,
      experiment.put(prepared.view["keyframes"]),
      self._encode(self._params, experiment.put(pixel)),
      experiment.put(np.zeros((len(batch.samples), 2), np.uint32)),
    )
    rollout = jax.device_get(self._steps.decode(self._apart, begun).rollout)
    lists = read_lists(
      experiment,
      prepared,
      rollout.token,
      rollout.mask,
      num_frames=self.num_frames,
    )
    return prepared, lists

  def choose(
    self,
    params: dict,
    samples: Sequence[records.Sample],
    *,
    show: str = "",
  ) -> Iterator[Choice]:
    """Batch after batch of the samples whose videos can be read.

    Args:
      params: of the selector.
      samples: whose videos and questions are looked at.
      show: what the progress bar is called; without one there is none.
    """
    experiment = self.experiment
    settings = experiment.config.data.loader
    size = batch_rows(experiment)
    self.load(params, rows=size)
    with telemetry.progress(
      show, len(samples), unit="sample", active=bool(show)
    ) as bar:
      for start in range(0, len(samples), size):
        rows = samples[start : start + size]
        batch, skipped = pipeline.collate_readable(
          rows,
          np.arange(start, start + len(rows)),
          batch_size=size,
          scan_frames=settings.scan_frames,
          scan_size_px=settings.scan_size_px,
          decoder=experiment.decoder,
        )
        experiment_lib.list_skipped(experiment.workdir, skipped)
        if batch is not None:
          prepared, lists = self.read(batch)
          real = sum(sample.video not in skipped for sample in rows)
          yield Choice(prepared, real, lists)
        bar.advance(len(rows))
    self.unload()


def batch_rows(experiment: experiment_lib.Experiment) -> int:
  """`evaluation.batch_size`, made a multiple of the devices it lies on."""
  parts = experiment.mesh.shape["data"] * experiment.mesh.shape["fsdp"]
  return parts * -(-experiment.config.evaluation.batch_size // parts)


class _OnDev:
  """For the cold starts: what an Evaluator does, by another measure.

  Args:
    measure: all parameters -> right bool[n] and score float[n] on dev.
  """

  def __init__(self, measure):
    self._measure = measure

  def run(self, params: dict) -> dict[str, held_out.Judged]:
    """As `Evaluator.run`, under the keyframes view."""
    correct, score = self._measure(params)
    return {"keyframes": held_out.Judged(correct, [], score, {})}


# ------------------------------------------------------------------ the stages


class Stage(NamedTuple):
  """One part of the run.

  Attributes:
    name: of its folder.
    experiment: of the policy that it trains, with the stage's settings.
    kind: "sft" or "rl".
  """

  name: str
  experiment: experiment_lib.Experiment
  kind: str


def open_stage(
  experiment: experiment_lib.Experiment,
  workdir: pathlib.Path,
  name: str,
  kind: str,
  *,
  cycle: int,
  **sft_changes,
) -> Stage:
  """A stage's folder and settings; later cycles have other random numbers."""
  config = ml_collections.ConfigDict(experiment.config.to_dict())
  config.program, config.name = "train", f"{config.name}/{name}"
  config.seed += cycle
  if sft_changes:
    config.sft.update(**sft_changes)
    config.sft.optim.total_steps = config.sft.max_steps
  folder = workdir / name
  folder.mkdir(parents=True, exist_ok=True)
  opened = dataclasses.replace(experiment, config=config.lock(), workdir=folder)
  if not (folder / telemetry.MANIFEST_FILE).exists():
    telemetry.write_manifest(
      folder,
      config=config,
      seed=config.seed,
      data_hash=experiment.data_hash,
      peak=experiment.peak,
    )
  return Stage(name, opened, kind)


def train_stage(stage: Stage, train_it) -> dict:
  """Parameters after a stage; a finished one is read from its checkpoint.

  Args:
    stage: from `open_stage`.
    train_it: (writer, store) -> parameters.
  """
  folder, config = stage.experiment.workdir, stage.experiment.config
  store = checkpoint.Checkpoints(
    folder / "checkpoints" / stage.kind, **config.checkpoint
  )
  resume = {}
  if store.latest_step() is not None:
    resume[stage.kind] = store.latest_step()
    logging.info("%s: continuing from checkpoint %s", stage.name, resume)
  try:
    with telemetry.MetricWriter(
      folder, resume=resume, active=jax.process_index() == 0
    ) as writer:
      params = train_it(writer, store)
  finally:
    store.close()
  if (folder / telemetry.METRICS_FILE).stat().st_size:
    report.write_report(folder, num_rollouts=config.report.num_rollouts)
  return params


class Amplifier:
  """The two policies and what is done with them.

  Args:
    config: of configs/viarl.py.
    workdir: of the run.
    guard: is told how far the run is.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    guard: lifecycle.Guard,
  ):
    self.config, self.workdir = config, workdir
    self.num_frames = config.amplify.num_frames
    self.of_selector, self.of_answerer = (
      dataclasses.replace(
        experiment_lib.build(of_policy(config), workdir), guard=guard
      )
      for of_policy in (selector_config, answerer_config)
    )
    reinforce.check_credit(
      self.of_selector.config, self.of_selector.samples["train"]
    )
    self._selector = Selector(self.of_selector, self.num_frames)
    self._answerer = Answerer(self.of_answerer)

  # -- cold starts

  def start_selector(self) -> dict:
    """The selector, trained to name frames of the evidence."""
    stage = open_stage(
      self.of_selector, self.workdir, "selector", "sft", cycle=0
    )
    experiment = stage.experiment

    def make_target(prepared) -> Rollout:
      return targets.selection_rollout(
        experiment.tokenizer,
        prepared.batch.samples,
        experiment.config.sampling.max_tokens,
        frames=targets.evidence_frames(
          prepared.batch.samples,
          prepared.keyframe_time_s,
          num_frames=self.num_frames,
        ),
        num_candidates=prepared.keyframes.index.shape[1],
        reasoning=experiment.config.answers.reasoning,
        between=experiment.config.sft.between,
      )

    def hits(params):
      dev = experiment.samples["dev"]
      found = [
        choice.lists.verdict.component["hit"][: choice.real, 0]
        for choice in self._selector.choose(params, dev)
      ]
      hit = np.concatenate(found)
      return hit > 0, hit

    return self._cold_start(stage, hits, make_target)

  def start_answerer(self) -> dict:
    """The answerer, trained on frames of its own `scan`."""
    stage = open_stage(
      self.of_answerer,
      self.workdir,
      "answerer",
      "sft",
      cycle=0,
      max_steps=self.config.amplify.answerer_start_steps,
    )
    return self._cold_start(stage, self._on_dev(None))

  def _on_dev(self, lists):
    """Right answers on dev: to lists by sample, or to frames of its own."""
    experiment = self.of_answerer
    dev, size = experiment.samples["dev"], batch_rows(experiment)
    settings = experiment.config.data.loader
    choose = lists and by_sample(lists)

    def measure(params):
      self._answerer.load(params, rows=size)
      correct, scores = [], []
      for start in range(0, len(dev), size):
        rows = dev[start : start + size]
        batch, skipped = pipeline.collate_readable(
          rows,
          np.arange(start, start + len(rows)),
          batch_size=size,
          scan_frames=settings.scan_frames,
          scan_size_px=settings.scan_size_px,
          decoder=experiment.decoder,
        )
        assert not skipped, "dev was read when the run began"
        score = self._answerer.score(batch, choose and choose(batch)[0])
        scores.append(score[: len(rows)])
        correct += map(
          answers.is_right, score[: len(rows)], [row.kind for row in rows]
        )
      self._answerer.unload()
      return np.asarray(correct, bool), np.concatenate(scores)

    return measure

  def _cold_start(self, stage, measure, make_target=None) -> dict:
    experiment = stage.experiment
    config = experiment.config
    if config.sft.from_run:
      return policies.load_start(config, experiment.model, experiment.mesh)
    return train_stage(
      stage,
      lambda writer, store: sft.cold_start(
        experiment,
        policies.initial_params(config, experiment.model, experiment.mesh),
        _OnDev(measure),
        writer,
        store,
        make_target=make_target,
      ),
    )

  # -- a cycle

  def train_selector(self, selector: dict, answerer: dict, cycle: int) -> dict:
    """Reinforcement of the selector; the answerer is frozen."""
    stage = open_stage(
      self.of_selector,
      self.workdir,
      f"cycle_{cycle}/selector",
      "rl",
      cycle=cycle,
    )
    self._answerer.load(answerer, rows=self.config.rl.prompts_per_step)
    judge = make_judge(
      stage.experiment, self._answerer, num_frames=self.num_frames
    )
    params = train_stage(
      stage,
      lambda writer, store: reinforce.train_policy(
        stage.experiment, selector, writer, store, judge=judge
      ),
    )
    self._answerer.unload()
    return params

  def train_answerer(self, selector: dict, answerer: dict, cycle: int) -> dict:
    """Supervised training of the answerer on the selector's frames."""
    stage = open_stage(
      self.of_answerer,
      self.workdir,
      f"cycle_{cycle}/answerer",
      "sft",
      cycle=cycle,
    )
    lists = self._chosen(selector, stage)
    experiment = dataclasses.replace(
      stage.experiment,
      make_views=stage.experiment.make_views.choosing(by_sample(lists)),
    )
    return train_stage(
      stage,
      lambda writer, store: sft.cold_start(
        experiment, answerer, _OnDev(self._on_dev(lists)), writer, store
      ),
    )

  def _chosen(self, selector: dict, stage: Stage) -> dict[str, list[int]]:
    """The selector's greedy lists for train and dev, kept in the folder."""
    path = stage.experiment.workdir / FRAMES_FILE
    if not path.exists():
      lines = []
      for split in ("train", "dev"):
        samples = self.of_selector.samples[split]
        for choice in self._selector.choose(
          selector, samples, show=f"choose {split}"
        ):
          (keyframes,) = choice.lists.chosen
          batch, verdict = choice.prepared.batch, choice.lists.verdict
          for n in range(choice.real):
            row = {
              "id": batch.samples[n].id,
              "frames": keyframes.index[n].tolist(),
              "seconds": [
                round(float(batch.scan_time_s[n, t]), 3)
                for t in keyframes.index[n][keyframes.mask[n]]
              ],
              "readable": bool(verdict.component["index"][n, 0]),
              "hit": bool(verdict.component["hit"][n, 0]),
            }
            lines.append(json.dumps(row) + "\n")
      disk.write_text(path, "".join(lines))
    return {row["id"]: row["frames"] for row in telemetry.read_rows(path)}

  # -- how they stand

  def measure(self, selector: dict, answerer: dict, name: str) -> list[dict]:
    """Accuracies on test with the selector's frames and with uniform ones.

    Args:
      selector: parameters.
      answerer: parameters.
      name: of the stage that was the last; its folder keeps what is found.

    Returns:
      A row for each task and `all`: accuracy on either kind of frames (and its
      interval), share of readable lists, share of samples one of whose frames
      shows the evidence.
    """
    path = self.workdir / name / EVALUATION_FILE
    if path.exists():
      return json.loads(path.read_text("utf-8"))
    size = batch_rows(self.of_selector)
    self._answerer.load(answerer, rows=size)
    samples = []
    found = collections.defaultdict(list)
    for choice in self._selector.choose(
      selector, self.of_selector.samples["test"], show="evaluate"
    ):
      batch, real = choice.prepared.batch, choice.real
      rows = batch.samples[:real]
      (chosen,) = choice.lists.chosen
      uniform = as_keyframes(
        uniform_frames(batch.scan_mask, self.num_frames),
        batch.scan_mask.shape[1],
      )
      for frames, how in (("chosen", chosen), ("uniform", uniform)):
        score = self._answerer.score(batch, how)[:real]
        found[f"accuracy/{frames}"] += map(
          answers.is_right, score, [row.kind for row in rows]
        )
        index = np.where(how.mask, how.index, 0)
        time_s = np.take_along_axis(batch.scan_time_s, index, axis=1)
        time_s = np.where(how.mask, time_s, np.nan)[:real]
        seen = answers.evidence_keyframes(rows, time_s).any(axis=1)
        found[f"evidence/{frames}"] += seen.tolist()
      component = choice.lists.verdict.component
      found["lists/readable"] += (component["index"][:real, 0] > 0).tolist()
      found["lists/hit"] += (component["hit"][:real, 0] > 0).tolist()
      samples += rows
    self._answerer.unload()
    tasks = [sample.task for sample in samples]
    shares = {
      key: accuracy.by_task(np.asarray(value), tasks)
      for key, value in found.items()
    }
    made = [
      {"after": name, "task": task, "count": shares["lists/hit"][task].count}
      | {
        key: share[task].accuracy
        if key.startswith("lists")
        else share[task]._asdict()
        for key, share in shares.items()
      }
      for task in shares["lists/hit"]
    ]
    telemetry.write_json(path, made)
    return made


# ------------------------------------------------------------------------ run


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """All stages. Interrupted, the same call goes on where it was.

  Raises:
    ValueError: settings that do not fit together, another config or other data
      than the workdir's, or another run that is using it.
    lifecycle.Stopped: by a signal or the time limit; everything is saved.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  check(config)
  train.check_same_config(config, workdir)
  with lifecycle.Guard(workdir, **config.runtime) as guard:
    _run(config, workdir, guard)


def _run(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  guard: lifecycle.Guard,
) -> None:
  guard.enter("data")
  both = Amplifier(config, workdir, guard)
  train.check_same_data(both.of_selector.data_hash, workdir)
  about = experiment_lib.summary(both.of_selector)
  of_answerer = experiment_lib.summary(both.of_answerer)
  telemetry.write_manifest(
    workdir,
    config=config,
    seed=config.seed,
    data_hash=both.of_selector.data_hash,
    peak=both.of_selector.peak,
  )
  shown = ("policy", "frames", "tokens per sample")
  telemetry.startup_table(
    config.name,
    {name: about[name] for name in ("devices", "samples")}
    | {f"selector: {name}": about[name] for name in shown}
    | {f"answerer: {name}": of_answerer[name] for name in shown}
    | {
      "cycles": f"{config.amplify.cycles} of {config.rl.steps} updates of the"
      f" selector, {both.of_answerer.config.sft.max_steps} of the answerer",
      "kept in": str(workdir),
    },
  )

  selector, answerer = both.start_selector(), both.start_answerer()
  rows = both.measure(selector, answerer, "answerer")
  for cycle in range(1, config.amplify.cycles + 1):
    selector = both.train_selector(selector, answerer, cycle)
    rows += both.measure(selector, answerer, f"cycle_{cycle}/selector")
    answerer = both.train_answerer(selector, answerer, cycle)
    rows += both.measure(selector, answerer, f"cycle_{cycle}/answerer")

  results = {
    "chance": chance.correct(both.of_selector.samples["test"]),
    "evaluations": rows,
  }
  telemetry.write_json(workdir / report.RESULTS_FILE, results)
  path = amplify_page.write(workdir / report.REPORT_FILE, config.name, rows)
  telemetry.closing_table(
    "on held-out videos",
    amplify_page.COLUMNS,
    [
      [
        row["after"],
        row["task"],
        row["accuracy/chosen"]["accuracy"],
        row["accuracy/uniform"]["accuracy"],
        row["lists/hit"],
        row["lists/readable"],
      ]
      for row in rows
    ],
  )
  logging.info("report: %s", path)
