"""A run, or a Qwen2.5-VL directory, as a Qwen2.5-VL directory.

What it writes is what transformers, serving programs and evaluation harnesses
read: sharded safetensors with an index, config, tokenizer, chat template,
preprocessor and generation config.
"""

import pathlib

import jax
import ml_collections
from absl import logging

from cf_jax.models import config as model_config
from cf_jax.models import hf_weights, lora
from cf_jax.programs import policies
from cf_jax.runtime import sharding, telemetry


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes `config.checkpoint` into `workdir`, adapters merged.

  Raises:
    ValueError: nothing to export, a workdir that holds something else, or no
      space left.
  """
  if config.max_shard_gb <= 0:
    raise ValueError(
      f"config.max_shard_gb must be positive, got {config.max_shard_gb}"
    )
  if config.dtype not in ("", *model_config.DTYPES):
    raise ValueError(
      f"config.dtype must be '' or one of {model_config.DTYPES}, got"
      f" {config.dtype!r}"
    )
  dtype = config.dtype or None
  hf_weights.check_target(workdir)  # before anything is loaded
  mesh = sharding.make_mesh(**config.mesh)
  policy = policies.load_policy(
    config.checkpoint,
    mesh,
    # A run keeps its own until its adapters are merged: rounded once.
    dtype=None if policies.is_run(config.checkpoint) else dtype,
    init_from=config.init_from,
  )
  params = policy.params
  if lora.has_adapters(params):
    logging.info("merging the adapters into their kernels")
    params = lora.merge(params, dtype)
  hf_weights.save_hf(
    workdir,
    policy.model,
    params,
    tokenizer=policy.tokenizer.folder,
    settings=policy.folder,
    dtype=dtype,
    max_shard_bytes=int(config.max_shard_gb * 1e9),
  )
  if jax.process_index() == 0:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    size = sum(file.stat().st_size for file in workdir.iterdir())
    telemetry.startup_table(
      "exported",
      {
        "from": policy.source,
        "to": workdir,
        "parameters": f"{count / 1e6:.2f} M",
        "size": f"{size / 1e6:.1f} MB",
      },
    )
