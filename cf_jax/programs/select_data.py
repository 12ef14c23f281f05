"""Variance-aware selection: which training samples a policy can learn from.

arXiv 2506.01908 asks its base model several times about every sample, and
trains on those that it answers now right and now wrong. How often it asks and
where it draws the lines is not public: numbers and rule here are ours.

The policy answers every sample of the train split R times, each answer is read
by the very door that training uses, and `decide` keeps or drops the sample.
Files of the workdir:
  scores.jsonl    every sample in order: its answers and their scores
  selected.jsonl  the samples kept, a manifest
  selected/       train.jsonl is the same; dev.jsonl and test.jsonl are whole:
                  a folder for config.data.source of a training run
  dropped.jsonl   the others, each with the reason
  selection.png   what was kept, by mean score and by spread
  results.json    counts by task and reason
An interrupted run goes on after the last whole batch in scores.jsonl. When all
are scored, other limits (config.select) decide anew without asking again.

Axes: `B` samples, `G` = R answers each.
"""

import collections
import concurrent.futures
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from cf_jax import disk, figures, sampling, views
from cf_jax.data import answers, pipeline, records
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import held_out, policies, sft, train, verdicts
from cf_jax.runtime import checkpoint, lifecycle, optim, telemetry

SCORES_FILE = "scores.jsonl"
SELECTED_FILE = "selected.jsonl"
SELECTED_FOLDER = "selected"
DROPPED_FILE = "dropped.jsonl"
CHART_FILE = "selection.png"
RESULTS_FILE = "results.json"

KEPT = "kept"
REASONS = (
  KEPT,
  "all right",
  "all wrong",
  "no good answer",
  "consistent",
  "unreadable video",
)
# Settings that decide after the answers; what was answered stays as it is.
_FREE = (*train.FREE, "select")


# ------------------------------------------------------------------- the rule


def decide(
  scores: Sequence[float],
  sample: records.Sample,
  *,
  min_best: float,
  min_spread: float,
) -> str:
  """Whether a sample is kept, and if not why [ours].

  Answers that earn an IoU or a share of events: kept where the best one is good
  and they differ. All others: kept where some answer is right and some is not;
  where none is right, those that earn a part for a part (texts, regressions)
  are kept if they differ.

  Args:
    scores: main score of each answer, in [0, 1].
    sample: what they answer.
    min_best: what the best answer must reach to be good.
    min_spread: standard deviation (ddof 0) from which answers differ; equal
      ones never do.

  Returns:
    One of `REASONS`.
  """
  # Not std > 0: that of equal scores may be a rounding error above it.
  differ = max(scores) > min(scores) and np.std(scores) >= min_spread
  if answers.CREDIT[sample.kind][0] != "accuracy":
    if max(scores) < min_best:
      return "no good answer"
    return KEPT if differ else "consistent"
  right = [answers.is_right(score, sample.kind) for score in scores]
  if all(right):
    return "all right"
  return KEPT if any(right) or differ else "all wrong"


# --------------------------------------------------------------------- asking


class _Asked(NamedTuple):
  """A batch that is ready for the policy.

  Attributes:
    numbers: of the samples it is about.
    prepared: its views; None where no video can be read.
    skipped: path -> reason of the videos that cannot be read.
  """

  numbers: range
  prepared: views.Prepared | None
  skipped: dict[str, str]


def _batches(
  experiment: experiment_lib.Experiment, first: int, batch_size: int
) -> Iterator[_Asked]:
  """Batches of the train split in order, one made ahead of the device."""
  samples = experiment.samples["train"]
  settings = experiment.config.data.loader

  def make(start):
    numbers = range(start, min(start + batch_size, len(samples)))
    batch, skipped = pipeline.collate_readable(
      [samples[n] for n in numbers],
      np.asarray(numbers, np.int32),
      batch_size=batch_size,
      scan_frames=settings.scan_frames,
      scan_size_px=settings.scan_size_px,
      decoder=experiment.decoder,
    )
    prepared = batch and experiment.make_views(batch, ("keyframes",))
    return _Asked(numbers, prepared, skipped)

  with concurrent.futures.ThreadPoolExecutor(1) as reader:
    ahead = None
    for start in range(first, len(samples), batch_size):
      ready = ahead or reader.submit(make, start)
      ahead = None
      if start + batch_size < len(samples):
        ahead = reader.submit(make, start + batch_size)
      yield ready.result()


def _ask(
  experiment: experiment_lib.Experiment,
  params: dict,
  path: pathlib.Path,
  rows: list[dict],
) -> None:
  """Adds the answers and scores that are missing to `path` and `rows`."""
  config, samples = experiment.config, experiment.samples["train"]
  parts = experiment.mesh.shape["data"] * experiment.mesh.shape["fsdp"]
  batch_size = parts * -(-config.evaluation.batch_size // parts)
  del rows[len(rows) - len(rows) % batch_size :]  # a batch cut off half-way
  disk.write_text(path, "".join(map(_line, rows)))
  skipped = {row["video"]: row["unreadable"] for row in rows if "video" in row}
  max_skipped = int(config.data.max_skip_fraction * len(samples))

  steps = experiment_lib.make_sample_steps(experiment, **config.sampling)
  encode = experiment_lib.make_encode_step(experiment)
  read = verdicts.make_judge(experiment)
  rng = jax.random.key(config.seed)
  num_answers = config.sampling.num_completions
  apart = steps.unstack(params, rows=batch_size * num_answers)
  with (
    open(path, "ab") as file,
    telemetry.progress(
      "answer", len(samples), start=len(rows), unit="sample"
    ) as bar,
  ):
    for asked in _batches(experiment, len(rows), batch_size):
      skipped |= asked.skipped
      experiment_lib.list_skipped(experiment.workdir, asked.skipped)
      if len(skipped) > max_skipped:
        listed = "; ".join(list(skipped.values())[:5])
        raise ValueError(
          f"{len(skipped)} videos of {len(samples)} samples cannot be read, at"
          f" most {max_skipped} may be skipped (data.max_skip_fraction):"
          f" {listed}"
        )
      found = {}
      if asked.prepared is not None:
        prepared = asked.prepared
        pixel = experiment.make_views.patches(
          experiment_lib.shown_frames(prepared)
        )
        index = prepared.batch.sample_index
        begun = steps.prefill(
          params,
          experiment.put(prepared.view["keyframes"]),
          encode(params, experiment.put(pixel)),
          experiment.put(np.asarray(sampling.row_seeds(rng, index))),
        )
        rollout = jax.device_get(steps.decode(apart, begun).rollout)
        score = verdicts.main_score(read(prepared, rollout.token, rollout.mask))
        texts = experiment_lib.decode_rollout(
          experiment.tokenizer, rollout.token, rollout.mask
        )
        found = dict(zip(index.tolist(), zip(texts, score, strict=True)))
      fresh = [
        _row(n, samples[n], found.get(n), asked.skipped) for n in asked.numbers
      ]
      file.write("".join(map(_line, fresh)).encode())
      file.flush()
      rows += fresh
      bar.advance(len(fresh))
      experiment.guard.progress()


def _row(number, sample, found, skipped) -> dict:
  row = {"number": number, "id": sample.id, "task": sample.task}
  if found is None:
    reason = skipped[sample.video]
    return row | {"video": sample.video, "unreadable": reason}
  texts, score = found
  return row | {
    "answers": texts,
    "scores": [round(float(value), 6) for value in score],
  }


def _line(row: dict) -> str:
  return json.dumps(row) + "\n"


def _policy(
  experiment: experiment_lib.Experiment,
  described: tuple | None,
  workdir: pathlib.Path,
) -> dict:
  """Parameters of the policy that is asked.

  Without one in the config: the one that reinforcement would start from.
  """
  config = experiment.config
  if described is not None:
    return policies.load_policy(
      config.policy,
      experiment.mesh,
      init_from=config.init_from,
      described=described,
    ).params
  if config.sft.from_run:
    return policies.load_start(config, experiment.model, experiment.mesh)
  store = checkpoint.Checkpoints(
    workdir / "checkpoints" / "sft", **config.checkpoint
  )
  dev = held_out.Evaluator(
    experiment,
    experiment.samples["dev"],
    ("keyframes",),
    batch_size=config.evaluation.batch_size,
    max_tokens=config.sampling.max_tokens,
  )
  resume = {"sft": store.latest_step()} if store.latest_step() else {}
  with telemetry.MetricWriter(workdir, resume=resume) as writer:
    params = sft.cold_start(
      experiment,
      policies.initial_params(config, experiment.model, experiment.mesh),
      dev,
      writer,
      store,
    )
  store.close()
  return params


def _check_policy(path: pathlib.Path, params: dict) -> None:
  """Raises a ValueError where another policy gave the answers so far."""
  now = optim.fingerprint(params)
  if path.exists():
    there = json.loads(path.read_text("utf-8"))["fingerprint"]
    if there != now:
      raise ValueError(
        f"{path.parent} holds answers of another policy (fingerprint {there},"
        f" now {now}); give another --workdir, or the policy as it was"
      )
  else:
    telemetry.write_json(path, {"fingerprint": now})


# ------------------------------------------------------------------------ run


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Asks, decides, writes. Interrupted, the same call goes on where it was.

  Raises:
    ValueError: another config, policy or manifest than the workdir's, a policy
      or a manifest that cannot be read, nothing to keep, or another run that is
      using the workdir.
    lifecycle.Stopped: by a signal or the time limit; everything is saved.
  """
  if jax.process_count() > 1:
    raise ValueError(
      "select_data runs on one host; leave config.distributed False and give"
      " each host a manifest of its own"
    )
  workdir.mkdir(parents=True, exist_ok=True)
  policies.make_paths_absolute(config)
  if config.policy:
    config.policy = str(pathlib.Path(config.policy).absolute())
  elif not (config.sft.max_steps or config.sft.from_run or config.init_from):
    raise ValueError(
      "no policy to ask; set --config.policy to a Qwen2.5-VL directory or to a"
      " run's workdir"
    )
  train.check_same_config(config, workdir, free=_FREE)
  with lifecycle.Guard(workdir, **config.runtime) as guard:
    _run(config, workdir, guard)


def _run(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  guard: lifecycle.Guard,
) -> None:
  limits = dict(config.select)
  guard.enter("data")
  described = None
  if config.policy:
    described = policies.describe(config.policy, config.init_from)
  experiment = dataclasses.replace(
    experiment_lib.build(config, workdir, described=described), guard=guard
  )
  train.check_same_data(experiment.data_hash, workdir)
  slots = experiment_lib.longest_prompt(experiment)
  samples = experiment.samples["train"]
  telemetry.write_manifest(
    workdir,
    config=config,
    seed=config.seed,
    data_hash=experiment.data_hash,
    peak=experiment.peak,
  )
  rows = telemetry.read_rows(workdir / SCORES_FILE)[: len(samples)]
  telemetry.startup_table(
    config.name,
    {
      "policy": config.policy or config.init_from or config.model.size,
      "samples": f"{len(samples)}, {len(rows)} of them scored already",
      "answers": f"{config.sampling.num_completions} each at temperature"
      f" {config.sampling.temperature}",
      "tokens per sample": f"at most {slots} in the prompt (limit"
      f" {config.prompt.max_tokens}), up to {config.sampling.max_tokens} new",
      "limits": ", ".join(f"{name} {limits[name]}" for name in sorted(limits)),
      "kept in": str(workdir),
    },
  )
  if len(rows) < len(samples):
    params = _policy(experiment, described, workdir)
    _check_policy(workdir / "policy.json", params)
    _ask(experiment, params, workdir / SCORES_FILE, rows)
  reasons = [
    "unreadable video"
    if "unreadable" in row
    else decide(row["scores"], sample, **limits)
    for row, sample in zip(rows, samples, strict=True)
  ]
  _write(experiment, rows, reasons, limits)


def _write(
  experiment: experiment_lib.Experiment,
  rows: Sequence[dict],
  reasons: Sequence[str],
  limits: dict[str, float],
) -> None:
  """What came out, in files and on the terminal."""
  workdir, samples = experiment.workdir, experiment.samples["train"]
  kept = [s for s, why in zip(samples, reasons, strict=True) if why == KEPT]
  text = records.to_jsonl(kept)
  folder = workdir / SELECTED_FOLDER
  disk.write_text(workdir / SELECTED_FILE, text)
  disk.write_text(folder / "train.jsonl", text)
  for split in ("dev", "test"):
    held_out = records.to_jsonl(experiment.samples[split])
    disk.write_text(folder / f"{split}.jsonl", held_out)
  dropped = []
  for row, sample, why in zip(rows, samples, reasons, strict=True):
    if why != KEPT:
      about = {"id": sample.id, "video": sample.video, "reason": why}
      if "unreadable" in row:
        about["unreadable"] = row["unreadable"]
      else:
        about |= _moments(row["scores"])
      dropped.append(json.dumps(about, ensure_ascii=False) + "\n")
  disk.write_text(workdir / DROPPED_FILE, "".join(dropped))
  _draw(workdir / CHART_FILE, rows, samples, reasons, limits)

  tasks = sorted({sample.task for sample in samples})
  count = collections.Counter(
    (sample.task, why) for sample, why in zip(samples, reasons, strict=True)
  )
  for task in tasks:
    for why in REASONS:
      count["all", why] += count[task, why]
  shown = [why for why in REASONS if count["all", why] or why == KEPT]
  telemetry.write_json(
    workdir / RESULTS_FILE,
    {
      "samples": len(samples),
      "kept": len(kept),
      "answers_each": experiment.config.sampling.num_completions,
      "limits": limits,
      "by_task": {
        task: {why: count[task, why] for why in shown}
        for task in [*tasks, "all"]
      },
    },
  )
  telemetry.closing_table(
    "what was kept",
    ["task", "samples", *shown],
    [
      [
        task,
        sum(count[task, why] for why in shown),
        *(count[task, why] for why in shown),
      ]
      for task in [*tasks, "all"]
    ],
  )
  if not kept:
    raise ValueError(
      f"none of {len(samples)} samples is kept; {workdir / DROPPED_FILE} says"
      " why: the policy may be too weak or too strong for them, or the limits"
      " of config.select too high"
    )
  logging.info("manifest: %s", workdir / SELECTED_FILE)


def _moments(scores: Sequence[float]) -> dict[str, float]:
  return {
    "mean": round(float(np.mean(scores)), 6),
    "best": max(scores),
    "spread": round(float(np.std(scores)), 6),
  }


def _draw(path, rows, samples, reasons, limits) -> None:
  """One panel for answers that are right or wrong, one for those in between."""
  chosen, graded, num_answers = {}, {}, 1
  for row, sample, why in zip(rows, samples, reasons, strict=True):
    if "unreadable" not in row:
      moments, num_answers = _moments(row["scores"]), len(row["scores"])
      if answers.CREDIT[sample.kind][0] == "accuracy":
        chosen.setdefault(why, []).append(moments["mean"])
      else:
        graded.setdefault(why, []).append(moments["spread"])
  panels = []
  if chosen:
    panels.append(
      figures.Histogram(
        "Questions",
        "mean score of a sample's answers",
        (np.arange(num_answers + 2) - 0.5) / num_answers,
        {why: chosen[why] for why in REASONS if why in chosen},
        None,
      )
    )
  if graded:
    panels.append(
      figures.Histogram(
        "Grounding, tracking, captions",
        "standard deviation of a sample's scores",
        np.linspace(0, 0.5, 21),
        {why: graded[why] for why in REASONS if why in graded},
        limits["min_spread"],
      )
    )
  figures.histograms(path, panels, count_label="samples")
