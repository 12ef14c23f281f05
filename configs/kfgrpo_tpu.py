"""KF-GRPO on a TPU slice or pod: Qwen2.5-VL-7B on your videos.

  python -m cf_jax.main --config=configs/kfgrpo_tpu.py \
    --config.init_from=Qwen2.5-VL-7B-Instruct \
    --config.data.source=jsonl:FOLDER --workdir=runs/kfgrpo

configs/kfgrpo_gpu.py with a pod's batch and one process for each host. Nobody
has run this at full size yet: the sizes are a place to start from, not a tuned
recipe.

  configs/kfgrpo_tpu.py:smoke   a small policy on built-in data
"""

import ml_collections

from configs import common, kfgrpo_gpu


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The experiment; `arg` is None or "smoke"."""
  _, smoke = common.parse("configs/kfgrpo_tpu.py", arg, ("full",))
  config = kfgrpo_gpu.get_config(arg)
  config.name = "kfgrpo_tpu" + (f"_{arg}" if arg else "")
  if not smoke:
    config.distributed = True
    config.rl.prompts_per_step = 32
  return config
