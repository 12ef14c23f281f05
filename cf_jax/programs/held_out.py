"""Accuracy of a policy on held-out videos, under every view of them."""

import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cf_jax import disk, figures, report
from cf_jax.data import answers, pipeline, records, shortcuts
from cf_jax.evals import accuracy, keyframes
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import verdicts
from cf_jax.runtime import sharding, telemetry
from cf_jax.views import Prepared, Selected


class Judged(NamedTuple):
  """One arm's answers to a list of samples.

  Attributes:
    correct: bool[n].
    text: the n completions.
    score: float32[n] what the answer earns in the main component of its kind
      (accuracy, IoU, share of events): `correct` is this from a limit on.
    component: name -> float32[n] of every component, NaN for samples that it
      does not apply to.
  """

  correct: np.ndarray
  text: list[str]
  score: np.ndarray
  component: dict[str, np.ndarray]


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
    self._judge = verdicts.make_judge(experiment)
    # This process's rows of each batch, and how many of them are no filling.
    self._prepared: list[tuple[Prepared, int]] = []
    self._select = None

  def select_by(self, select: Callable[[pipeline.Batch], Selected]) -> None:
    """From now on the videos are prepared with other keyframes.

    Args:
      select: batch -> Keyframes and uniform frames, as numpy arrays.
    """
    self._select, self._prepared = select, []

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
        mine = self._experiment.own_rows(np.arange(self._batch_size))
        batch = pipeline.collate(
          [rows[n] for n in mine],
          start + mine,
          scan_frames=settings["scan_frames"],
          scan_size_px=settings["scan_size_px"],
          decoder=self._experiment.decoder,
        )
        selected = self._select(batch) if self._select else None
        prepared = self._experiment.make_views(
          batch, self._arms, selected=selected
        )
        self._prepared.append((prepared, int(np.sum(mine < real))))
        bar.advance(real)
        self._experiment.guard.progress()

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
    found = {arm: [] for arm in self._arms}
    seed = self._experiment.put(
      self._experiment.own_rows(np.zeros((self._batch_size, 2), np.uint32))
    )
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
        rollout = sharding.local(self._sample.decode(apart, begun).rollout)
        text = experiment_lib.decode_rollout(
          self._experiment.tokenizer, rollout.token, rollout.mask
        )
        verdict = self._judge(prepared, rollout.token, rollout.mask)
        main = verdicts.main_score(verdict)[:real, 0]
        parts = {
          name: np.where(verdict.applies[name], value[:, 0], np.nan)
          for name, value in verdict.component.items()
        }
        found[arm] += self._experiment.gather(
          (
            float(main[n]),
            text[n][0],
            {name: float(value[n]) for name, value in parts.items()},
          )
          for n in range(real)
        )
      bar.advance(real)
      self._experiment.guard.progress()
    return {arm: self._judged(*zip(*rows)) for arm, rows in found.items()}

  def _judged(
    self,
    scores: Sequence[float],
    texts: Sequence[str],
    components: Sequence[dict[str, float]],
  ) -> Judged:
    """An arm's answers, from what was read of every sample."""
    return Judged(
      correct=np.asarray(
        [
          answers.is_right(score, sample.kind)
          for score, sample in zip(scores, self._samples, strict=True)
        ],
        dtype=bool,
      ),
      text=list(texts),
      score=np.asarray(scores, np.float32),
      component={
        name: np.asarray([row[name] for row in components], np.float32)
        for name in components[0]
      },
    )

  def hit_rates(self) -> dict[str, float]:
    """Share of the annotated intervals that got a frame, by kind of frames.

    Empty where nothing is annotated.
    """
    self.prepare()
    found = {"keyframes": [], "uniform": []}
    for prepared, real in self._prepared:
      evidence = [s.evidence for s in prepared.batch.samples[:real]]
      num_keyframes = prepared.keyframes.index.shape[1]
      for name, first in (("keyframes", 0), ("uniform", num_keyframes)):
        seconds = prepared.frame_time_s[:real, first : first + num_keyframes]
        hits, count = keyframes.evidence_hits(evidence, seconds)
        found[name].append([int(hits.sum()), int(count.sum())])
    total = {
      name: np.sum(self._experiment.gather(parts), axis=0)
      for name, parts in found.items()
    }
    return {
      name: float(hits / count)
      for name, (hits, count) in total.items()
      if count
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
          "score": round(float(answered.score[n]), 6),
        },
        ensure_ascii=False,
      )
      for stage, arms in judged.items()
      for arm, answered in arms.items()
      for n, sample in enumerate(self._samples)
    ]
    disk.write_text(path, "\n".join(lines) + "\n")

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
    num_keyframes = prepared.keyframes.index.shape[1]
    for place, n in enumerate(chosen):
      sample, batch = prepared.batch.samples[n], prepared.batch
      seen = batch.scan_mask[n]
      keyframe = prepared.frame_mask[n, :num_keyframes]
      uniform = prepared.frame_mask[n, num_keyframes:]
      seconds = prepared.frame_time_s[n]
      shown = prepared.frames[n]
      figures.film_strip(
        workdir / report.STRIPS_FOLDER / f"{place:02d}_{sample.task}.png",
        uniform_frames=shown[num_keyframes : 2 * num_keyframes][uniform],
        uniform_s=seconds[num_keyframes:][uniform],
        tad_frames=shown[:num_keyframes][keyframe],
        tad_s=seconds[:num_keyframes][keyframe],
        score=prepared.keyframes.variation[n][seen],
        time_s=batch.scan_time_s[n][seen],
        apex=prepared.keyframes.apex[n][seen],
        events=[(start, end, "evidence") for start, end in sample.evidence],
        label=report.selector_name(self._experiment.config),
        about={
          "question": sample.question,
          "options": list(sample.options),
          "answer": sample.answer,
          "task": sample.task,
        },
      )

  def rows(self, judged: dict[str, Judged], stage: str) -> list[dict]:
    """Rows of `results.json`: stage, view, task, accuracy and interval.

    `score` is the mean score, `component` that of every component (accuracy,
    iou, format, ...) among the samples that it applies to. Of intervals, boxes
    and the times that grounded answers give, `recall` is the share of IoUs from
    0.3, 0.5 and 0.7 on. Regressions have `mra`, the mean relative accuracy.
    """
    tasks = [sample.task for sample in self._samples]
    return [
      {"stage": stage, "view": arm, "task": task, **share._asdict()}
      | self._more(answered, task)
      for arm, answered in judged.items()
      for task, share in accuracy.by_task(answered.correct, tasks).items()
    ]

  def _more(self, answered: Judged, task: str) -> dict:
    """What a row says beside the accuracy."""
    mine = [
      n
      for n, sample in enumerate(self._samples)
      if task in ("all", sample.task)
    ]
    kinds = {self._samples[n].kind for n in mine}
    made = {"score": float(np.mean(answered.score[mine]))}
    parts = {name: v[mine] for name, v in answered.component.items()}
    made["component"] = {
      name: float(np.nanmean(value))
      for name, value in parts.items()
      if not np.isnan(value).all()
    }
    iou = parts.get("iou")
    if iou is not None and not np.isnan(iou).any():
      made["recall"] = {
        str(limit): float(np.mean(iou >= limit)) for limit in (0.3, 0.5, 0.7)
      }
    if kinds == {"regression"}:
      made["mra"] = float(
        np.mean([accuracy.relative_accuracy(answered.score[n]) for n in mine])
      )
    return made


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
    decoder=experiment.decoder,
  )
  found = shortcuts.shortcut_probes(
    shortcuts.specs_of(samples),
    batch.scan,
    np.random.default_rng(experiment.config.seed),
  )
  return {name: probe._asdict() for name, probe in found.items()}
