"""Predictions of a benchmark -> its published figures.

No policy runs here: the responses lie in a file. Files of the workdir:
  scores.json      every figure, unrounded, with its interval and count; what
                   was scored: benchmark, rule, files with their hashes
  questions.jsonl  each question: what was read, the truth, what it earned
"""

import hashlib
import json
import pathlib

import ml_collections
from absl import logging

from cf_jax import disk
from cf_jax.data import datasets, judge, records
from cf_jax.evals import benchmarks, predictions, rules
from cf_jax.runtime import telemetry

SCORES_FILE = "scores.json"
QUESTIONS_FILE = "questions.jsonl"


def file_hash(path: str | pathlib.Path) -> str:
  """SHA-256 of a file's bytes."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def read_samples(
  config: ml_collections.ConfigDict,
) -> tuple[list[records.Sample], list[pathlib.Path]]:
  """The questions, and the files they were read from.

  Raises:
    ValueError: no annotations, or such that cannot be read.
  """
  benchmarks.check_name(config.benchmark)
  if not config.annotations:
    raise ValueError(
      "config.annotations is missing: the benchmark's annotation file or folder"
      " as it is published (docs/datasets.md)"
    )
  if config.benchmark in rules.MANIFESTS:
    if config.only or config.split:
      raise ValueError(
        "config.only and config.split are for published benchmarks, got"
        f" config.benchmark={config.benchmark!r}; leave them out"
      )
    path = pathlib.Path(config.annotations).expanduser()
    # Nothing of the videos is opened: where they lie does not matter.
    return records.load_jsonl(path, allow_outside=True), [path]
  where = dict(annotations=config.annotations, split=config.split)
  return (
    datasets.read(config.benchmark, only=tuple(config.only), **where),
    datasets.annotation_files(config.benchmark, **where),
  )


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Scores `config.predictions`, prints the table, writes the files.

  Raises:
    ValueError: a bad setting, file or prediction; ids that do not fit.
  """
  if not config.predictions:
    raise ValueError(
      'config.predictions is missing: JSON lines {"id": ..., "response":'
      ' "text"}, or a published form (docs/scoring.md)'
    )
  samples, files = read_samples(config)
  responses = predictions.read(config.predictions, config.benchmark, samples)
  ask = judge.Judge(**config.judge).score if config.judge.url else None
  scores = benchmarks.score(
    config.benchmark,
    samples,
    responses,
    allow_partial=config.allow_partial,
    ask=ask,
    seed=config.seed,
  )
  write(
    scores,
    samples,
    workdir,
    about={
      "split": config.split,
      "only": list(config.only),
      "seed": config.seed,
      "judge": config.judge.model if config.judge.url else None,
      "files": {
        "annotations": {str(path): file_hash(path) for path in files},
        "predictions": {
          config.predictions: file_hash(
            pathlib.Path(config.predictions).expanduser()
          )
        },
      },
    },
  )
  show(scores)
  logging.info("figures: %s", workdir / SCORES_FILE)


def write(
  scores: benchmarks.Scores,
  samples: list[records.Sample],
  workdir: pathlib.Path,
  *,
  about: dict,
) -> None:
  """Writes scores.json and questions.jsonl.

  Args:
    scores: from `benchmarks.score`.
    samples: its questions.
    workdir: where to.
    about: what else scores.json says: files, settings.
  """
  telemetry.write_json(
    workdir / SCORES_FILE,
    benchmarks.to_json(scores)
    | about
    | {"versions": telemetry.versions(), "git": telemetry.git_revision()},
  )
  lines = [
    json.dumps(
      {
        "id": sample.id,
        "read": scores.answer[sample.id],
        "answer": sample.answer,
        "score": scores.question[sample.id],
      },
      ensure_ascii=False,
    )
    for sample in samples
    if sample.id in scores.question
  ]
  disk.write_text(workdir / QUESTIONS_FILE, "\n".join(lines) + "\n")


def show(scores: benchmarks.Scores) -> None:
  """Prints the table; what is partial or unread stands under it."""
  columns, rows = benchmarks.table(scores)
  telemetry.closing_table(scores.benchmark, columns, rows)
  for note in benchmarks.notes(scores):
    logging.warning("%s", note)
