"""Predictions of a public benchmark -> its published figures (docs/scoring.md).

  python -m cf_jax.main --config=configs/score.py \
    --config.benchmark=nextqa --config.annotations=nextqa/val.csv \
    --config.predictions=predictions.jsonl --workdir=runs/score_nextqa

Predictions are JSON lines {"id": ..., "response": "raw model text"} with the
benchmark's own question ids.
"""

import ml_collections

from configs import kfgrpo_cpu


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The settings; there is no argument."""
  if arg is not None:
    raise ValueError(f"configs/score.py takes no argument, got {arg!r}")
  config = ml_collections.ConfigDict()
  config.program = "score"
  config.name = "score"
  config.benchmark = ""  # videomme, lvbench, nextqa, ... (docs/scoring.md)
  # The annotation file, or folder of files, as published; for the benchmark
  # "jsonl" a manifest of one's own.
  config.annotations = ""
  config.split = ""  # of the annotations; "" is the benchmark's usual one
  # Keep questions of these groups: ("duration=short", "task=OCR Problems").
  config.only = ()
  config.predictions = ""  # JSON lines, or a published form
  # Score the questions that have a prediction, and say that it is not all.
  config.allow_partial = False
  config.seed = 0  # of the bootstrap intervals

  # The LLM that judges what rules cannot (judge.py); without a url there is
  # none.
  config.judge = kfgrpo_cpu.get_config().judge

  config.distributed = False  # True: jax.distributed.initialize() first
  # Where compiled programs are kept between runs; "" turns it off.
  config.compilation_cache_dir = "~/.cache/cf_jax/xla"
  return config
