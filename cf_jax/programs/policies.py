"""Where a policy comes from: a preset, a Qwen2.5-VL directory, or a run."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging

from cf_jax.data import patches, prompts, vision_input
from cf_jax.models import config as model_config
from cf_jax.models import hf_weights, lora, vlm
from cf_jax.runtime import checkpoint, optim, sharding, telemetry

STAGES = ("sft", "rl")
# Fields of `config.model` that say how to run a model, not what it is.
RUN_FIELDS = (
  "dtype",
  "param_dtype",
  "remat",
  "scan_unroll",
  "attention",
  "vocab_chunk",
)


class Policy(NamedTuple):
  """A policy that can be asked or exported.

  Attributes:
    model: its shape, and how to run it.
    params: on the mesh; adapters, where there are any, are not merged.
    tokenizer: its tokenizer.
    folder: where generation and preprocessor settings may lie.
    source: the directory or checkpoint it was read from.
  """

  model: model_config.VLMConfig
  params: dict
  tokenizer: prompts.Tokenizer
  folder: pathlib.Path
  source: str


def make_paths_absolute(config: ml_collections.ConfigDict) -> None:
  """Puts absolute paths into a config, so that a run finds them from anywhere.

  Args:
    config: a run's, changed in place: `init_from`, `sft.from_run` and
      `tokenizer`.
  """
  if config.sft.from_run:
    config.sft.from_run = str(pathlib.Path(config.sft.from_run).absolute())
  if config.init_from:
    config.init_from = str(pathlib.Path(config.init_from).absolute())
  if config.tokenizer not in ("", "tiny"):
    config.tokenizer = str(pathlib.Path(config.tokenizer).absolute())


def tokenizer_folder(config: ml_collections.ConfigDict) -> str:
  """`config.tokenizer`, or the directory that the policy starts from.

  Raises:
    ValueError: neither is set.
  """
  folder = config.tokenizer or config.init_from
  if not folder:
    raise ValueError(
      "config.tokenizer is empty and so is config.init_from; set one of them:"
      " 'tiny' or a folder with tokenizer.json"
    )
  return folder


def make_model(
  config: ml_collections.ConfigDict, tokenizer: prompts.Tokenizer
) -> model_config.VLMConfig:
  """The policy's shape: a preset, or that of the directory it starts from.

  Args:
    config: a run's; reads `init_from` and `model`.
    tokenizer: gives a preset its vocabulary and its ids.

  Raises:
    ValueError: `model` says what `init_from` already says, or the tokenizer
      is another model's.
  """
  fields = {**config.model}
  if not config.init_from:
    return model_config.make(
      **{"vocab_size": tokenizer.vocab_size, **tokenizer.config_ids, **fields}
    )
  size = fields.pop("size")
  extra = sorted(set(fields) - set(RUN_FIELDS))
  if size or extra:
    said = [f"size={size!r}"] * bool(size) + extra
    raise ValueError(
      f"config.model sets {', '.join(said)}, but config.init_from"
      f" ({config.init_from}) says what the model is; leave only"
      f" {', '.join(RUN_FIELDS)} and set config.model.size=''"
    )
  model = open_directory(config.init_from, tokenizer)
  return dataclasses.replace(model, **fields)


def open_directory(
  folder: str | pathlib.Path, tokenizer: prompts.Tokenizer
) -> model_config.VLMConfig:
  """The model of a Qwen2.5-VL directory that fits what is around it here.

  Raises:
    ValueError: the tokenizer is another model's, or pictures are prepared in a
      way that is not ours.
  """
  folder = pathlib.Path(folder)
  model = hf_weights.read_config(folder)
  hf_weights.check_tokenizer(model, tokenizer)
  if any(folder.glob("*processor_config.json")):
    found = vision_input.read_preprocessor(folder, "image")
    ours = found._replace(
      patch=model.vision.patch_size,
      merge=model.vision.spatial_merge_size,
      temporal=model.vision.temporal_patch_size,
      mean=patches.MEAN,
      std=patches.STD,
    )
    differ = [
      f"{name} {theirs}, expected {expected}"
      for name, theirs, expected in zip(found._fields, found, ours, strict=True)
      if theirs != expected
    ]
    if differ:
      raise ValueError(
        f"{folder}: its preprocessor has {'; '.join(differ)}; no other is"
        " supported"
      )
  return model


def abstract_params(
  config: ml_collections.ConfigDict,
  model: model_config.VLMConfig,
  mesh: jax.sharding.Mesh,
) -> dict:
  """Shapes and shardings of all parameters, adapters included."""
  shapes = jax.eval_shape(lambda rng: vlm.init(model, rng), jax.random.key(0))
  adapters = jax.eval_shape(
    lambda rng: lora.init(shapes, rng, **config.lora), jax.random.key(0)
  )
  whole = optim.join(shapes, adapters)
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    whole,
    sharding.tree_shardings(whole, mesh, sharding.PARTITION_RULES),
  )


def initial_params(
  config: ml_collections.ConfigDict,
  model: model_config.VLMConfig,
  mesh: jax.sharding.Mesh,
) -> dict:
  """What a run starts from, on the mesh: seeded noise or a directory's weights.

  Adapters are added as `config.lora` says.
  """
  rng = jax.random.key(config.seed)
  shapes = jax.eval_shape(lambda rng: vlm.init(model, rng), rng)

  def place(make):
    places = sharding.tree_shardings(
      jax.eval_shape(make, rng), mesh, sharding.PARTITION_RULES
    )
    return jax.jit(make, out_shardings=places)(rng)

  if config.init_from:
    _, base = hf_weights.load_hf(
      config.init_from, mesh, dtype=model.param_dtype
    )
  else:
    base = place(lambda rng: vlm.init(model, rng))
  adapter_rng = jax.random.fold_in(rng, 1)
  adapters = place(lambda _: lora.init(shapes, adapter_rng, **config.lora))
  return optim.join(base, adapters)


def frozen_patterns(
  config: ml_collections.ConfigDict, stage: str
) -> tuple[str, ...]:
  """Regexes on the paths of the parameters that a stage does not train."""
  patterns = tuple(config[stage].optim.frozen)
  if config.lora.rank:
    patterns += (lora.ALL_BUT_ADAPTERS,)
  return patterns


def check_frozen(now: str, host: dict, source: str) -> None:
  """Raises a ValueError where a checkpoint was trained beside other weights.

  Args:
    now: fingerprint of what is not in the checkpoint, made again.
    host: the checkpoint's host state.
    source: names the checkpoint in the message.
  """
  if now != host["frozen"]:
    raise ValueError(
      f"{source} was trained beside other frozen parameters (fingerprint"
      f" {host['frozen']!r}, now {now!r}): the weights of config.init_from"
      " changed, or another version of jax draws other numbers from"
      " config.seed"
    )


def is_run(path: str) -> bool:
  """Is it a run's workdir?"""
  return (pathlib.Path(path) / telemetry.MANIFEST_FILE).is_file()


def describe(
  path: str, init_from: str = ""
) -> tuple[model_config.VLMConfig, prompts.Tokenizer]:
  """Shape and tokenizer of a policy, without reading its parameters.

  Args:
    path: as in `load_policy`.
    init_from: as in `load_policy`.

  Raises:
    ValueError: neither kind of directory, or one that cannot be read.
  """
  folder = pathlib.Path(path)
  if not path:
    raise ValueError(
      "no checkpoint; set --config.checkpoint to a Qwen2.5-VL directory or to"
      " a run's workdir"
    )
  if is_run(path):
    config = run_config(folder, init_from)
    tokenizer = prompts.load_tokenizer(tokenizer_folder(config))
    return make_model(config, tokenizer), tokenizer
  if not (folder / "config.json").is_file():
    what = "has neither" if folder.is_dir() else "is not a directory with"
    raise ValueError(
      f"{path} {what} config.json (a Qwen2.5-VL directory) nor"
      f" {telemetry.MANIFEST_FILE} (a run's workdir); change"
      " config.checkpoint"
    )
  tokenizer = prompts.load_tokenizer(folder)
  return open_directory(folder, tokenizer), tokenizer


def load_policy(
  path: str,
  mesh: jax.sharding.Mesh,
  *,
  dtype: str | None = None,
  init_from: str = "",
  described: tuple[model_config.VLMConfig, prompts.Tokenizer] | None = None,
  stages: Sequence[str] = STAGES,
) -> Policy:
  """Opens a Qwen2.5-VL directory or a run's workdir.

  Of a run, the newest checkpoint of its last stage.

  Args:
    path: a directory with `config.json`, or a workdir with `manifest.json`.
    mesh: where the parameters go.
    dtype: "float32" or "bfloat16", what parameters are stored and matmuls run
      in; None keeps the checkpoint's. Adapters stay float32.
    init_from: where the directory that a run started from lies now; "" is
      where it lay.
    described: what `describe` gave, to open nothing twice.
    stages: of a run, those whose checkpoints count.

  Raises:
    ValueError: neither kind of directory, or one that cannot be read.
  """
  model, tokenizer = described or describe(path, init_from)
  folder = pathlib.Path(path)
  if is_run(path):
    config = run_config(folder, init_from)
    return _load_run(folder, config, model, tokenizer, mesh, dtype, stages)
  model, params = hf_weights.load_hf(folder, mesh, dtype=dtype)
  return Policy(model, params, tokenizer, folder, str(folder))


def load_start(
  config: ml_collections.ConfigDict,
  model: model_config.VLMConfig,
  mesh: jax.sharding.Mesh,
) -> dict:
  """Parameters of another run, from which this one is to go on.

  Args:
    config: of this run; reads `sft.from_run`.
    model: shape of this run's policy.
    mesh: where the parameters go.

  Raises:
    ValueError: no run, or one of another policy.
  """
  path = config.sft.from_run
  if not is_run(path):
    raise ValueError(
      f"config.sft.from_run: {path} is no run's workdir (it has no"
      f" {telemetry.MANIFEST_FILE})"
    )
  found = load_policy(path, mesh)
  shapes = abstract_params(config, model, mesh)
  if jax.tree.map(jnp.shape, shapes) != jax.tree.map(jnp.shape, found.params):
    raise ValueError(
      f"config.sft.from_run: {path} holds a policy of other shapes; give a run"
      " with this run's config.model, config.tokenizer and config.lora"
    )
  return found.params


def load_vision(
  path: str,
  mesh: jax.sharding.Mesh,
  *,
  dtype: str | None = None,
  init_from: str = "",
) -> tuple[model_config.VLMConfig, dict, str]:
  """Opens the vision tower of a policy; of a directory, nothing else is read.

  Args:
    path: as in `load_policy`.
    mesh: where the parameters go.
    dtype: as in `load_policy`.
    init_from: as in `load_policy`.

  Returns:
    The model, its parameters under "vision", and where they were read.

  Raises:
    ValueError: neither kind of directory, or one that cannot be read.
  """
  described = describe(path, init_from)
  if is_run(path):
    policy = load_policy(
      path, mesh, dtype=dtype, init_from=init_from, described=described
    )
    return policy.model, {"vision": policy.params["vision"]}, policy.source
  model, params = hf_weights.load_hf(path, mesh, dtype=dtype, part="vision")
  return model, params, str(path)


def run_config(
  workdir: pathlib.Path, init_from: str = ""
) -> ml_collections.ConfigDict:
  """What a run was started with.

  Args:
    workdir: of the run.
    init_from: as in `load_policy`.

  Raises:
    ValueError: the directory that it started from is not there.
  """
  config = ml_collections.ConfigDict(telemetry.read_manifest(workdir)["config"])
  config.init_from = init_from or config.init_from
  config.data.fps = config.data.get("fps", 0.0)  # older runs have none
  config.model.attention = "auto"  # the run's kernel was its machine's
  if config.init_from and not pathlib.Path(config.init_from).is_dir():
    raise ValueError(
      f"the run in {workdir} starts from {config.init_from}, which is not"
      " there; say where it lies now with --config.init_from"
    )
  return config


def _load_run(workdir, config, model, tokenizer, mesh, dtype, stages):
  template = abstract_params(config, model, mesh)
  params, newest = {}, None
  for stage in reversed(stages):  # later stages win over earlier ones
    folder = workdir / "checkpoints" / stage
    if not folder.is_dir():
      continue
    store = checkpoint.Checkpoints(folder, keep=1, read_only=True)
    try:
      if store.latest_step() is None:
        continue
      patterns = frozen_patterns(config, stage)
      trained, _ = optim.split(template, patterns)
      found, host = store.restore_params(trained)
      params = optim.join(found, params)
      if newest is None:
        newest = (patterns, host, f"{folder}, step {store.latest_step()}")
    finally:
      store.close()
    if jax.tree.structure(params) == jax.tree.structure(template):
      break
  if newest is None:
    raise ValueError(
      f"{workdir} holds a run without a checkpoint yet; let it go on until"
      " config.sft.checkpoint_every, or change config.checkpoint"
    )
  if jax.tree.structure(params) != jax.tree.structure(template):
    params = optim.join(initial_params(config, model, mesh), params)
  patterns, host, source = newest
  _, frozen = optim.split(params, patterns)
  check_frozen(optim.fingerprint(frozen), host, source)
  if dtype is not None:
    model = dataclasses.replace(model, dtype=dtype, param_dtype=dtype)
    params = jax.tree_util.tree_map_with_path(
      lambda path, leaf: (
        leaf if path[-1].key in lora.LEAVES else leaf.astype(dtype)
      ),
      params,
    )
  logging.info("policy: %s", source)
  settings = pathlib.Path(config.init_from or tokenizer.folder)
  return Policy(model, params, tokenizer, settings, source)
