"""KF-GRPO on one host of GPUs: Qwen2.5-VL-7B on your videos.

  python -m cf_jax.main --config=configs/kfgrpo_gpu.py \
    --config.init_from=Qwen2.5-VL-7B-Instruct \
    --config.data.source=jsonl:FOLDER --workdir=runs/kfgrpo

The method is that of configs/kfgrpo_cpu.py. For one host of eight 80 GB GPUs
(EXTRA=cuda bash launch/run.sh) or a Slurm cluster (EXTRA=cuda bash
launch/slurm.sh, one process for each GPU). rl.prompts_per_step has to be a
multiple of the GPUs: two nodes of eight need
--config.rl.prompts_per_step=16. Nobody has run this at full size yet: the sizes
are a place to start from, not a tuned recipe. The planner has no compiler for
GPUs that are not there. Of this config on as many TPU chips (v5p:2x2x2, 7B) it
says 22.7 GiB for the update, at least 1.11 s, and 18.5 GiB for decoding, at
least 0.84 s; other chips and programs: docs/scale.md.

  configs/kfgrpo_gpu.py:smoke   a small policy on built-in data
"""

import ml_collections

from configs import common

# Saliency judges the times that the reasoning cites.
CITE = "First reason, citing times, inside <think> </think>, then give"


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The experiment; `arg` is None or "smoke"."""
  _, smoke = common.parse("configs/kfgrpo_gpu.py", arg, ("full",))
  config = common.start("kfgrpo_gpu", arg, smoke, ("needle", "order", "count"))
  if smoke:
    return config
  config.data.reader.size_px = (280, 504)  # 180 tokens a frame
  config.tad.num_keyframes = 16
  config.prompt.max_tokens = 3584
  build, templates = config.prompt.build, config.prompt.templates
  build.question_template = build.question_template.replace(common.THINK, CITE)
  for kind, template in templates.items():
    templates[kind] = template.replace(common.THINK, CITE)
  config.sft.max_steps = 0
  config.rl.update(steps=1000, prompts_per_step=8, checkpoint_every=50)
  config.rl.optim.frozen = (r"^vision/",)
  config.contrast.watch_every = 50
  config.sampling.update(num_completions=8, max_tokens=512)
  common.schedule(
    config, learning_rate=1e-6, warmup_steps=20, max_grad_norm=1.0, b2=0.999
  )
  return config
