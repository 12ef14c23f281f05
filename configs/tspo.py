"""TSPO (arXiv 2508.04369): a learned frame scorer before a frozen answerer.

  python -m cf_jax.main --config=configs/tspo.py \
    --config.init_from=Qwen2.5-VL-7B-Instruct \
    --config.data.source=jsonl:FOLDER --workdir=runs/tspo

The answerer is never trained: several selections of frames are drawn for every
question, each is answered, and the scorer follows GRPO on the accuracy. Where
this differs from TSPO: the log-probability of the ordered picks is exact (its
public code takes them for independent draws), the network is that of
models/selector.py (there one layer of windowed attention), and frames are
scored by the answerer's own vision tower (there by CLIP). Learning rate, group
and steps are ours.

  configs/tspo.py:located   the answerer is not asked: a selection earns the
                            share of the annotated events that it shows
  configs/tspo.py:tad       the learned score is added to TAD's priority

With a comma and "smoke" a small policy runs on built-in data, after a cold
start of its own, with the pixel descriptor:

  configs/tspo.py:smoke
  configs/tspo.py:located,smoke
  configs/tspo.py:tad,smoke

The results hold the answerer's accuracy on keyframes by `config.scan.select`
(stage "sft") and by the scorer (stage "rl"), and both their hit rates.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The experiment; `arg` is a variant, "smoke", or both."""
  variant, smoke = common.parse(
    "configs/tspo.py", arg, ("answered", "located", "tad")
  )
  config = common.start("tspo", arg, smoke, ("needle", "many_cuts"))
  config.selector.update(learn=True, train_policy=False, num_selections=4)
  if variant == "located":
    config.selector.reward = dict(answer=0.0, evidence=1.0)
  if variant != "tad":
    # The learned score alone.
    config.selector.tad_weight = 0.0
  config.selector.advantage.update(scale="group", baseline="mean")
  config.contrast.kind = "none"
  config.loss.kl_weight = 0.0
  config.sampling.num_completions = 2
  config.evaluation.arms = ("keyframes", "uniform", "blind")
  if smoke:
    config.rl.update(steps=8, checkpoint_every=4)
    return config

  config.scan.descriptor = "vision"
  config.data.loader.scan_frames = 512
  config.data.reader.size_px = (252, 392)
  config.tad.num_keyframes = 64
  config.prompt.max_tokens = 16384
  config.sft.max_steps = 0
  config.selector.num_selections = 8
  config.rl.update(steps=1000, prompts_per_step=8, checkpoint_every=50)
  config.sampling.max_tokens = 768
  config.selector.optim.update(
    learning_rate=1e-4, schedule="cosine", warmup_steps=20
  )
  return config
