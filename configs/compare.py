"""Two or more evaluations side by side, question by question.

  python -m cf_jax.main --config=configs/compare.py \
    --config.evaluations=DIR1,DIR2 --workdir=runs/compare

DIR is a folder with an eval_manifest.json, as configs/evaluate.py writes it, or
a folder with exactly one below it. The first is what the others are compared
with. Writes comparison.html (opens offline), comparison.md, comparison.json and
changed.jsonl; how to read them is in docs/evaluation.md.
"""

import ml_collections

from configs import kfgrpo_cpu


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The settings; there are no variants."""
  if arg is not None:
    raise ValueError(f"configs/compare.py takes no argument, got {arg!r}")
  config = ml_collections.ConfigDict()
  config.program = "compare"
  config.name = "compare"  # --workdir is runs/<name> where it is not given
  config.distributed = False
  config.compilation_cache_dir = ""  # nothing is compiled
  config.evaluations = ""  # needed: folders with a comma between
  # True: evaluations of different questions are compared on those they share.
  config.allow_partial = False
  config.bootstrap = dict(
    draws=4000,  # of as many videos as there are, with replacement
    level=0.95,  # coverage of the intervals
    seed=0,
  )
  # -- questions that changed, with what was shown
  config.shown = dict(
    max_questions=12,  # in each direction of each pair; changed.jsonl has all
    max_frames=16,  # of a film strip
    height_px=168,  # of its pictures
  )
  config.limits = kfgrpo_cpu.get_config().data.limits  # of their decoding
  return config
