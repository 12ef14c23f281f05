"""Video-R1 (arXiv 2503.21776): a cold start on reasoning, then T-GRPO.

  python -m cf_jax.main --config=configs/video_r1.py \
    --config.init_from=Qwen2.5-VL-7B-Instruct \
    --config.data.source=jsonl:FOLDER --workdir=runs/video_r1

The constants are those of the paper and of its public code (docs/method.md).
Images are videos of one frame: they earn no temporal bonus.

  configs/video_r1.py:code    the public code's threshold, mu = 0.8
  configs/video_r1.py:paper   the later paper's, mu = 1
  configs/video_r1.py:grpo    plain GRPO
  configs/video_r1.py:sft     the cold start alone
  configs/video_r1.py:zero    no cold start

With a comma and "smoke" a small policy runs on built-in data:

  configs/video_r1.py:smoke
  configs/video_r1.py:paper,smoke
"""

import ml_collections

from configs import common

VARIANTS = ("code", "paper", "grpo", "sft", "zero")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The experiment; `arg` is a variant, "smoke", or both."""
  variant, smoke = common.parse("configs/video_r1.py", arg, VARIANTS)
  config = common.start(
    "video_r1", arg, smoke, ("needle", "order", "numerical", "free_form")
  )
  # Uniform frames in one video span, two to a slice. They are shuffled before
  # they are paired.
  config.scan.select = "uniform"
  config.prompt.build.show_time = False
  config.prompt.frames_per_slice = 2
  config.contrast.update(kind="threshold", num_shuffles=1, num_samples=4)
  config.contrast.threshold.update(
    mu=1.0 if variant == "paper" else 0.8, bonus=0.3
  )
  if variant == "grpo":
    config.contrast.kind = "none"
  config.reward.weight = dict(accuracy=1.0, format=1.0)
  config.reward.length = dict(low=320, high=512, bonus=0.2)
  common.unclipped_grpo(config)
  config.sampling.update(temperature=1.0, top_p=0.95)
  config.sft.loss_on = "all"  # its public code trains on the prompt as well
  if variant == "sft":
    config.rl.steps = 0
  if variant == "zero":
    config.sft.max_steps = 0
  if smoke:
    config.reward.length.update(low=2, high=8)
    return config

  config.data.reader.size_px = (252, 392)  # 126 tokens, of at most 128
  config.tad.num_keyframes = 16  # 8 slices
  config.data.fps = 2.0
  config.prompt.max_tokens = 4096  # 16384 there; a longer one is an error
  if variant != "zero":
    config.sft.update(
      max_steps=5000,
      batch_size=32,
      micro_batches=4,
      answer_form="letter",
      between="\n",  # as in its data
      stop_accuracy=1.1,  # one epoch of 165k, not until it is good enough
      eval_every=1000,
      checkpoint_every=250,
    )
  if variant != "sft":
    config.rl.update(steps=1000, prompts_per_step=8, checkpoint_every=50)
  config.sampling.update(num_completions=8, max_tokens=768)
  common.schedule(
    config,
    learning_rate=1e-6,
    schedule="cosine",
    warmup_steps=0,
    weight_decay=0.01,
    max_grad_norm=5.0,
    b2=0.999,
  )
  return config
