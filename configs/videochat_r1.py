"""VideoChat-R1 (arXiv 2504.06958): GRPO on spatio-temporal perception.

  python -m cf_jax.main --config=configs/videochat_r1.py:joint \
    --config.init_from=Qwen2.5-VL-7B-Instruct \
    --config.data.source=jsonl:FOLDER --workdir=runs/videochat_r1

Every sample brings its own reward by its `kind`, so that one batch may hold all
of them. Rewards are sums of weight 1: format and IoU (grounding, tracking),
format and accuracy (multiple choice), all three (grounded questions), format
and event recall by an LLM (captions: set config.judge.url).

  configs/videochat_r1.py:joint       all but captions
  configs/videochat_r1.py:grounding   when something happens
  configs/videochat_r1.py:tracking    where something is, as boxes
  configs/videochat_r1.py:gqa         an answer and the times that show it
  configs/videochat_r1.py:caption     what happens; needs an LLM judge
  configs/videochat_r1.py:quality     multiple choice on a video's quality
  configs/videochat_r1.py:nothink     joint, answers without reasoning

With a comma and "smoke" a small policy runs on built-in data:

  configs/videochat_r1.py:smoke
  configs/videochat_r1.py:tracking,smoke
"""

import ml_collections

from configs import common

# Variant -> components of its samples, and built-in tasks of the smoke run.
VARIANTS = {
  "joint": (
    ("accuracy", "iou"),
    ("grounding", "grounded_qa", "needle"),
  ),
  "grounding": (("iou",), ("grounding",)),
  "tracking": (("iou",), ("tracking",)),
  "gqa": (("accuracy", "iou"), ("grounded_qa",)),
  "caption": (("event_recall",), ("caption",)),
  "quality": (("accuracy",), ("needle", "count")),
  "nothink": (
    ("accuracy", "iou"),
    ("grounding", "grounded_qa", "needle"),
  ),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The experiment; `arg` is a variant, "smoke", or both."""
  variant, smoke = common.parse("configs/videochat_r1.py", arg, tuple(VARIANTS))
  components, tasks = VARIANTS[variant]
  config = common.start("videochat_r1", arg, smoke, tasks)
  config.scan.select = "uniform"
  config.prompt.frames_per_slice = 2
  config.answers.update(
    components=("format", *components),
    interval_form="last",
    reasoning="none" if variant == "nothink" else "tagged",
  )
  config.contrast.kind = "none"
  config.reward.weight = dict.fromkeys(config.answers.components, 1.0)
  common.unclipped_grpo(config)
  config.sampling.update(temperature=1.0, top_p=1.0)
  config.sft.max_steps = config.sft.max_steps if smoke else 0
  if smoke:
    # The longest targets: eight boxes are many numbers.
    config.sampling.max_tokens = 176 if variant == "tracking" else 40
    config.prompt.max_tokens = 128
    return config

  # 16 slices of 220 tokens, of at most 3584 together.
  config.data.reader.size_px = (308, 560)
  config.tad.num_keyframes = 8 if variant == "tracking" else 32
  config.data.fps = 0.0 if variant == "tracking" else 2.0
  config.prompt.max_tokens = 8192
  config.rl.update(steps=2000, prompts_per_step=8, checkpoint_every=50)
  config.sampling.update(num_completions=8, max_tokens=1024)
  if variant == "nothink":
    for kind, template in config.prompt.templates.items():
      config.prompt.templates[kind] = template.replace(common.THINK, "Give")
  common.schedule(
    config, learning_rate=1e-6, warmup_steps=0, max_grad_norm=1.0, b2=0.999
  )
  return config
