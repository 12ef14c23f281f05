"""Temporal-R1 (arXiv 2506.01908): discrete and continuous rewards in one.

  python -m cf_jax.main --config=configs/temporal_r1.py \
    --config.init_from=Qwen2.5-VL-7B-Instruct \
    --config.data.source=jsonl:FOLDER --workdir=runs/temporal_r1

Answers earn accuracy (questions) or temporal IoU (grounding, as JSON) and
format. The paper trains on the samples that its base model answers now right
and now wrong: make that manifest with configs/select_data.py first.

  configs/temporal_r1.py:half   0.5 accuracy + 0.5 IoU
  configs/temporal_r1.py:tenth  0.9 accuracy + 0.1 IoU

With a comma and "smoke" a small policy runs on built-in data:

  configs/temporal_r1.py:smoke
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The experiment; `arg` is a variant, "smoke", or both."""
  variant, smoke = common.parse(
    "configs/temporal_r1.py", arg, ("half", "tenth")
  )
  config = common.start(
    "temporal_r1", arg, smoke, ("needle", "order", "grounding")
  )
  config.scan.select = "uniform"
  config.answers.update(
    components=("format", "accuracy", "iou"), interval_form="json"
  )
  accuracy = 0.5 if variant == "half" else 0.9
  config.reward.weight = dict(
    accuracy=accuracy,
    iou=1 - accuracy,
    format=0.1,  # ours: its weight is not public
  )
  config.contrast.kind = "none"
  config.advantage.update(scale="group", ddof=1, eps=1e-6)
  config.loss.update(
    clip_low=0.2,
    clip_high=0.2,
    aggregate="token_mean",
    kl_weight=1e-2,
    kl_kind="k3",
  )
  config.rl.entropy_weight = 1e-3
  config.sampling.update(temperature=1.0, top_p=1.0)
  config.sft.max_steps = config.sft.max_steps if smoke else 0
  if smoke:
    config.sampling.max_tokens = 32
    config.prompt.max_tokens = 128
    return config

  config.data.reader.size_px = (224, 392)
  config.tad.num_keyframes = 32
  config.prompt.max_tokens = 8192
  config.prompt.templates["interval"] = (
    "{question}\n"
    + f"{common.THINK} when it starts and ends, in seconds, inside"
    ' <answer> </answer> as JSON: {{"start_time": "12.0", "end_time": "15.5"}}.'
  )
  config.rl.update(steps=500, prompts_per_step=16, checkpoint_every=50)
  config.sampling.update(num_completions=8, max_tokens=1024)
  common.schedule(
    config, learning_rate=1e-6, warmup_steps=0, max_grad_norm=1.0, b2=0.999
  )
  return config
