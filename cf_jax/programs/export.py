"""A run, or a Qwen2.5-VL directory, as a Qwen2.5-VL directory.

What it writes is what transformers, serving programs and evaluation harnesses
read: sharded safetensors with an index, config, tokenizer, chat template,
preprocessor and generation config.
"""

import pathlib

import jax
import ml_collections
from absl import logging

from cf_jax.models import hf_weights, lora
from cf_jax.programs import policies
from cf_jax.runtime import sharding, telemetry


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes `config.checkpoint` into `workdir`, adapters merged.

  Raises:
    ValueError: nothing to export, or a workdir that holds something else.
    OSError: no space left.
  """
  mesh = sharding.make_mesh(**config.mesh)
  policy = policies.load_policy(config.checkpoint, mesh)
  dtype = config.dtype or None
  params = policy.params
  if lora.has_adapters(params):
    logging.info("merging the adapters into their kernels")
    params = lora.merge(params, dtype)
  hf_weights.save_hf(
    workdir,
    policy.model,
    params,
    tokenizer=policy.folder,
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
