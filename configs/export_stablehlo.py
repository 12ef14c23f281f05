"""TAD and a policy as StableHLO for other platforms, from any machine.

  python -m cf_jax.main --config=configs/export_stablehlo.py \
    --config.checkpoint=runs/kfgrpo_cpu --workdir=exports/stablehlo

`jax.export.deserialize(open("tad.stablehlo", "rb").read()).call(...)` runs it
where there is jax and nothing of this project. Parameters are an argument of
the policy, as `cf_jax.models.hf_weights.load_hf` gives them.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The settings; there is no argument."""
  if arg is not None:
    raise ValueError(
      f"configs/export_stablehlo.py takes no argument, got {arg!r}"
    )
  config = ml_collections.ConfigDict()
  config.program = "export_stablehlo"
  config.name = "export_stablehlo"
  # A run's workdir or a Qwen2.5-VL directory: what the model is. Its weights
  # are not read.
  config.checkpoint = ""
  # Where the directory that a run started from lies now; "" is where it lay.
  config.init_from = ""
  config.platforms = ("tpu", "cuda")  # of cpu, cuda, rocm, tpu
  config.frames = dict(num_frames=96, width=64)  # T and E of TAD
  config.tad = dict(num_keyframes=8, selection="soft")
  config.policy = dict(
    batch_size=1,
    num_slices=8,  # encoded frames of a video
    size_px=(56, 56),  # height, width of a frame
    max_tokens=116,  # slots of a prompt
  )

  config.distributed = False  # True: jax.distributed.initialize() first
  # Where compiled programs are kept between runs; "" turns it off.
  config.compilation_cache_dir = ""
  return config
