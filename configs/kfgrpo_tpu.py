"""KF-GRPO on a TPU slice or pod: Qwen2.5-VL-7B on your videos.

  bash launch/tpu_vm.sh run --config=configs/kfgrpo_tpu.py \
    --config.init_from=/bucket/Qwen2.5-VL-7B-Instruct \
    --config.data.source=jsonl:/bucket/my_videos \
    --workdir=/bucket/runs/kfgrpo

configs/kfgrpo_gpu.py with a slice's batch, one process for each host; from an
empty cloud project on: docs/tpu.md. For 64 chips: v6e-64 (v6e:8x8 to the
planner) or v5p-128 (v5p:4x4x4). Of other slices, set rl.prompts_per_step to a
multiple of the chips. Nobody has run this on TPUs yet.

  python -m cf_jax.main --config=configs/plan.py \
    --config.target=configs/kfgrpo_tpu.py --config.topology=v6e:8x8

says what a chip would hold, compute and send (a bound, not a measurement;
docs/scale.md has every program, and 64 keyframes). Of 7B on 64 chips:

            update                           768 tokens of 512 completions
  v6e:8x8   at least 0.90 s, MFU <= 55 %     at least 1.94 s
  v5p:4x4x4 at least 1.42 s, MFU <= 69 %     at least 1.29 s

By buffer assignment no program takes more than 7.9 of a v6e's 31.25 GiB and 8.9
of a v5p's 95.74; compiled to its end, the update takes 9.1 and 9.4.

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
    config.rl.prompts_per_step = 64  # of all chips together: one for each
    config.sampling.max_tokens = 768
    config.evaluation.batch_size = 64
  return config
