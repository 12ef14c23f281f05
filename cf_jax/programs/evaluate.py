"""Accuracy of a policy on held-out videos, under every view of them."""

import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cf_jax import report
from cf_jax.data import answers, pipeline, records, shortcuts
from cf_jax.evals import accuracy
from cf_jax.programs import experiment as experiment_lib
from cf_jax.runtime import telemetry
from cf_jax.views import Prepared


class Judged(NamedTuple):
  """One arm's answers to a list of samples.

  Attributes:
    correct: bool[n].
    text: the n completions.
  """

  correct: np.ndarray
  text: list[str]


class Evaluator:
  """Greedy answers to a fixed list of samples, its videos prepared once.

  Args:
    experiment: from `experiment.build`.
    samples: held-out samples.
    arms: names from `views.ARMS`.
    batch_size: videos a device call answers.
    max_tokens: completion limit.
  """

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    samples: Sequence[records.Sample],
    arms: Sequence[str],
    *,
    batch_size: int,
    max_tokens: int,
  ):
    self._experiment = experiment
    self._samples = list(samples)
    self._arms = tuple(arms)
    # The last batch is filled up; so is one too small for all devices.
    parts = experiment.mesh.shape["data"] * experiment.mesh.shape["fsdp"]
    smaller = min(batch_size, len(self._samples))
    self._batch_size = parts * -(-smaller // parts)
    self._sample = experiment_lib.make_sample_steps(
      experiment, num_completions=1, max_tokens=max_tokens, temperature=0.0
    )
    self._encode = experiment_lib.make_encode_step(experiment)
    self._prepared: list[tuple[Prepared, int]] = []

  def prepare(self) -> None:
    """Scans and decodes the videos; later calls reuse it."""
    if self._prepared:
      return
    settings = dict(self._experiment.config.data.loader)
    count = len(self._samples)
    with telemetry.progress("scan videos", count, unit="video") as bar:
      for start in range(0, count, self._batch_size):
        rows = self._samples[start : start + self._batch_size]
        real = len(rows)
        rows = rows + [rows[-1]] * (self._batch_size - real)
        batch = pipeline.collate(
          rows,
          np.arange(start, start + self._batch_size),
          scan_frames=settings["scan_frames"],
          scan_size_px=settings["scan_size_px"],
        )
        self._prepared.append(
          (self._experiment.make_views(batch, self._arms), real)
        )
        bar.advance(real)

  def run(
    self, params: Any, *, show_progress: bool = False
  ) -> dict[str, Judged]:
    """Answers every sample under every arm."""
    self.prepare()
    with telemetry.progress(
      "answer", len(self._samples), unit="video", active=show_progress
    ) as bar:
      return self._answer_all(params, bar)

  def _answer_all(self, params, bar):
    found = {arm: ([], []) for arm in self._arms}
    seed = self._experiment.put(np.zeros((self._batch_size, 2), np.uint32))
    apart = self._sample.unstack(params, rows=self._batch_size)
    for prepared, real in self._prepared:
      pixel = self._experiment.make_views.patches(
        experiment_lib.shown_frames(prepared)
      )
      encoded = self._encode(params, self._experiment.put(pixel))
      for arm in self._arms:
        begun = self._sample.prefill(
          params, self._experiment.put(prepared.view[arm]), encoded, seed
        )
        rollout = jax.device_get(self._sample.decode(apart, begun).rollout)
        text = experiment_lib.decode_rollout(
          self._experiment.tokenizer, rollout.token, rollout.mask
        )
        correct, texts = found[arm]
        for row, sample in zip(
          text[:real], prepared.batch.samples[:real], strict=True
        ):
          texts.append(row[0])
          correct.append(answers.is_correct(row[0], sample))
      bar.advance(real)
    return {
      arm: Judged(np.asarray(correct, dtype=bool), texts)
      for arm, (correct, texts) in found.items()
    }

  def write_predictions(
    self, judged: dict[str, dict[str, Judged]], path: pathlib.Path
  ) -> None:
    """Every completion behind the accuracies, one JSON object a line.

    Args:
      judged: stage -> arm -> Judged, from `run`.
      path: of the JSONL file.
    """
    lines = [
      json.dumps(
        {
          "id": sample.id,
          "task": sample.task,
          "answer": sample.answer,
          "stage": stage,
          "view": arm,
          "completion": answered.text[n],
          "correct": bool(answered.correct[n]),
        },
        ensure_ascii=False,
      )
      for stage, arms in judged.items()
      for arm, answered in arms.items()
      for n, sample in enumerate(self._samples)
    ]
    telemetry.write_text(path, "\n".join(lines) + "\n")

  def write_film_strips(self, workdir: pathlib.Path, count: int) -> None:
    """Draws uniform frames against keyframes, tasks in turn.

    Args:
      workdir: of the run; pictures go to its `film_strips` folder.
      count: how many videos of the first batch.
    """
    self.prepare()
    prepared, real = self._prepared[0]
    by_task = {}
    for n, sample in enumerate(prepared.batch.samples[:real]):
      by_task.setdefault(sample.task, []).append(n)
    turns = itertools.zip_longest(*(by_task[task] for task in sorted(by_task)))
    chosen = [n for turn in turns for n in turn if n is not None][:count]
    num_slots = prepared.keyframes.index.shape[1]
    for place, n in enumerate(chosen):
      sample, batch = prepared.batch.samples[n], prepared.batch
      seen = batch.scan_mask[n]
      keyframe = prepared.frame_mask[n, :num_slots]
      uniform = prepared.frame_mask[n, num_slots:]
      seconds = prepared.frame_time_s[n]
      shown = prepared.frames[n]
      report.film_strip(
        workdir / report.STRIPS_FOLDER / f"{place:02d}_{sample.task}.png",
        uniform_frames=shown[num_slots : 2 * num_slots][uniform],
        uniform_s=seconds[num_slots:][uniform],
        tad_frames=shown[:num_slots][keyframe],
        tad_s=seconds[:num_slots][keyframe],
        score=prepared.keyframes.variation[n][seen],
        time_s=batch.scan_time_s[n][seen],
        apex=prepared.keyframes.apex[n][seen],
        events=[(start, end, "evidence") for start, end in sample.evidence],
        about={
          "question": sample.question,
          "options": list(sample.options),
          "answer": sample.answer,
          "task": sample.task,
        },
      )

  def rows(self, judged: dict[str, Judged], stage: str) -> list[dict]:
    """Rows of `results.json`: stage, view, task, accuracy and interval."""
    tasks = [sample.task for sample in self._samples]
    return [
      {"stage": stage, "view": arm, "task": task, **score._asdict()}
      for arm, answered in judged.items()
      for task, score in accuracy.by_task(answered.correct, tasks).items()
    ]


def chance(samples: Sequence[records.Sample]) -> dict[str, float]:
  """Expected accuracy of a guess, per task and over `all`."""
  each = {}
  for sample in samples:
    share = 1 / len(sample.options) if sample.options else 0.0
    each.setdefault(sample.task, []).append(share)
  pooled = [share for shares in each.values() for share in shares]
  return {
    task: float(np.mean(shares)) for task, shares in sorted(each.items())
  } | {"all": float(np.mean(pooled))}


def probes(
  experiment: experiment_lib.Experiment, count: int
) -> dict[str, dict[str, float]]:
  """Small probes for shortcuts in the built-in set, by `data.shortcuts`.

  Args:
    experiment: from `experiment.build`.
    count: test videos the probes are fitted and judged on.

  Returns:
    name -> accuracy, chance, half_interval; nothing for a user's own data,
    whose true events are not known.
  """
  if experiment.config.data.source != "synthetic" or count == 0:
    return {}
  samples = experiment.samples["test"][:count]
  settings = experiment.config.data.loader
  batch = pipeline.collate(
    samples,
    np.arange(len(samples)),
    scan_frames=settings.scan_frames,
    scan_size_px=settings.scan_size_px,
  )
  found = shortcuts.shortcut_probes(
    shortcuts.specs_of(samples),
    batch.scan,
    np.random.default_rng(experiment.config.seed),
  )
  return {name: probe._asdict() for name, probe in found.items()}
