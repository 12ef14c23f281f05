"""A run or a Qwen2.5-VL directory -> a Qwen2.5-VL directory.

  python -m cf_jax.main --config=configs/export.py \
    --config.checkpoint=runs/kfgrpo_cpu --workdir=exports/kfgrpo_cpu

transformers loads what it writes. Low-rank adapters are merged.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The settings; there is no argument."""
  if arg is not None:
    raise ValueError(f"configs/export.py takes no argument, got {arg!r}")
  config = ml_collections.ConfigDict()
  config.program = "export"
  config.name = "export"
  # A run's workdir (its last checkpoint), or a Qwen2.5-VL directory.
  config.checkpoint = ""
  # Where the directory that a run started from lies now; "" is where it lay.
  config.init_from = ""
  config.dtype = ""  # "float32" or "bfloat16"; "" keeps the checkpoint's
  config.max_shard_gb = 5.0  # largest safetensors file, 1e9 bytes

  config.distributed = False  # True: jax.distributed.initialize() first
  # Where compiled programs are kept between runs; "" turns it off.
  config.compilation_cache_dir = "~/.cache/cf_jax/xla"
  # Devices along each mesh axis; -1 takes what the others leave.
  config.mesh = dict(data=1, fsdp=-1, tensor=1, context=1)
  return config
