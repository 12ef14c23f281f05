"""What a run needs on TPUs, before any is paid for.

  python -m cf_jax.main --config=configs/plan.py \
    --config.target=configs/kfgrpo_tpu.py --config.topology=v5p:4x4x4

Compiles every program of the run for a slice that need not be there, and says
for each what a chip holds, computes and sends, whether it fits, and the least
time that it takes. It reads no weights and no data and needs the TPU's
compiler (pip install -e '.[plan]'), not a TPU. Exit code 1: it does not fit
(plan.json: totals.fits is false), or the planner failed (a traceback).

  --config.changes="mesh.fsdp=16 mesh.tensor=4 rl.micro_batches=2"

tries other settings of the target. See docs/scale.md.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The settings; there is no argument."""
  if arg is not None:
    raise ValueError(f"configs/plan.py takes no argument, got {arg!r}")
  config = ml_collections.ConfigDict()
  config.program = "plan"
  config.name = "plan"
  # The run: configs/NAME.py or configs/NAME.py:ARG, of the program "train".
  config.target = "configs/kfgrpo_tpu.py"
  # "mesh.tensor=4 sampling.max_tokens=768": settings of the target.
  config.changes = ""
  # Where the target's init_from is empty and its model.size too: a size of
  # cf_jax/models/config.py.
  config.size = "qwen2_5_vl_7b"
  # CHIP:AxB or CHIP:AxBxC in chips, of v4, v5e, v5p, v6e, 7x; or "cpu:8", so
  # many CPU devices of this process.
  config.topology = "v5p:4x4x4"
  config.num_slices = 1  # of that shape, joined by the data centre's network
  # "update decode": these programs and what they depend on; "": all. Names of
  # several words: "decode; evaluate: decode".
  config.programs = ""
  config.largest = 8  # arrays that are named, of each program
  # For TPUs: True makes the programs' machine code too, which takes several
  # times as long. Figures are then those of the whole compilation, by gigabytes
  # more (temporary memory of the 7B update 7.5 against 4.9 GiB, docs/scale.md),
  # and a kernel that no code can be made of is found.
  config.machine_code = False

  config.distributed = False  # True: jax.distributed.initialize() first
  # Where compiled programs are kept between runs; "" turns it off.
  config.compilation_cache_dir = ""
  return config
