"""Each phase's share of the operations of a KF-GRPO step, by a run's config.

  python -m benchmarks.shares --config=configs/kfgrpo_cpu.py \\
    [--size=qwen2_5_vl_7b] [--out=FILE.json]

Counts matmuls (`cf_jax.models.flops`) and runs nothing. Every prompt is taken
to fill `config.prompt.max_tokens`, every completion to fill
`config.sampling.max_tokens`. `--size` puts a published shape in the place of
`config.model`. The shares of a real step's seconds and operations are in the
metrics of a run, as `share/<phase>` and `work/<phase>`.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks import peers
from cf_jax.data import patches, prompts
from cf_jax.models import config as model_config
from cf_jax.models import flops
from cf_jax.programs import policies
from cf_jax.runtime import optim, sharding

_CONFIG = config_flags.DEFINE_config_file("config", "configs/kfgrpo_cpu.py")
_SIZE = flags.DEFINE_enum(
  "size", "", ["", *model_config.SIZES], "in the place of config.model"
)
_OUT = flags.DEFINE_string("out", "", "also write the results as JSON here")


def count(config, model: model_config.VLMConfig) -> dict[str, float]:
  """Operations of each phase; those of the scored views apart."""
  mesh = sharding.make_mesh(**config.mesh)
  trained, frozen = optim.split(
    policies.abstract_params(config, model, mesh),
    policies.frozen_patterns(config, "rl"),
  )
  batch = config.rl.prompts_per_step
  num_slots = config.tad.num_keyframes // config.prompt.frames_per_slice
  slots = np.full(batch, config.prompt.max_tokens)

  def step(*arms):
    return flops.grpo_step(
      model,
      trained,
      frozen,
      grid=patches.grid_of(
        *config.data.reader.size_px,
        patch=model.vision.patch_size,
        merge=model.vision.spatial_merge_size,
      ),
      num_frames=2 * batch * num_slots,
      num_shown=batch * num_slots,
      prompt=dict.fromkeys(("keyframes", *arms), slots),
      completion=np.full(
        (batch, config.sampling.num_completions), config.sampling.max_tokens
      ),
    )

  shuffled = [f"shuffled_{n}" for n in range(config.contrast.num_shuffles)]
  counted = step("uniform")
  uniform = counted.pop("score")
  counted[f"score, {len(shuffled)} shuffled"] = step(*shuffled)["score"]
  counted["score, uniform"] = uniform
  return counted


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  config = _CONFIG.value
  if _SIZE.value:
    model = model_config.make(size=_SIZE.value)
  else:
    tokenizer = prompts.load_tokenizer(policies.tokenizer_folder(config))
    model = policies.make_model(config, tokenizer)
  counted = count(config, model)
  peers.write(_OUT.value, {"size": _SIZE.value, "operations": counted})
  whole = sum(counted.values())
  print(
    peers.table(
      ["phase", "TFLOP", "share, %"],
      [
        [phase, operations / 1e12, 100 * operations / whole]
        for phase, operations in counted.items()
      ],
    )
  )


if __name__ == "__main__":
  app.run(main)
