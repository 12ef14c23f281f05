"""What a run needs on a slice of TPUs that is not there.

Every program of a training run is built by the functions that the run itself
uses, from shapes and shardings alone, and compiled ahead of time. The compiler
says what memory a program takes; `runtime/hlo.py` counts what it does, and
`runtime/chips.py` how long that takes at least.

All of that is known when a program is optimized and its memory is laid out.
What follows, making machine code, is nine tenths of a TPU compiler's work. It
cannot be asked to stop there, so each program is compiled by a process of its
own, which ends when the compiler has written down what is wanted.

Axes: `B` videos, `G` completions per video, `K` keyframe slots, `N` encoded
slices, `P` visual tokens per slice, `S` prompt slots, `C` completion slots.
"""

import ast
import dataclasses
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import re
import runpy
import shutil
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from cf_jax import sampling
from cf_jax.data import patches, prompts
from cf_jax.models import config as model_config
from cf_jax.models import flops, vlm
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import policies, reinforce, rl_steps, sft
from cf_jax.runtime import chips, hlo, sharding, telemetry
from cf_jax.types import Experience, OtherView, Prompt, Rollout, View

RESULT_FILE = "plan.json"
_GIB = 2.0**30
_BLOCK = 512  # of `kernels.splash`, at these lengths
_INT, _FLOAT = np.dtype("int32"), np.dtype("float32")
_MORE = 3  # exit code of a process that has compiled one program
_SAID = 4  # of one that has told why it cannot
# What the compiler writes last before it makes machine code.
_LAID_OUT = "*.after_optimizations_after_buffer_assignment.txt"
# A whole compilation has said up to so much more temporary memory than the
# buffers that are assigned before its machine code (docs/scale.md).
_MORE_TEMPORARY = 0.5
_BUFFERS = "*.after_optimizations-buffer-assignment.txt"


# ------------------------------------------------------------------ the target


def _value(text: str) -> Any:
  """What JSON or, where it is none, Python reads: lists become tuples.

  Raises:
    ValueError: neither reads it.
  """
  try:
    value = json.loads(text)
  except ValueError:
    try:
      value = ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError):
      raise ValueError(f"no value: {text!r}") from None
  return tuple(value) if isinstance(value, list) else value


def read_target(path: str, changes: str) -> ml_collections.ConfigDict:
  """A run's config with some settings changed.

  Args:
    path: "configs/NAME.py" or "configs/NAME.py:ARG".
    changes: "mesh.tensor=4 rl.micro_batches=2"; values as in JSON or Python,
      without spaces, those of text as they are.

  Raises:
    ValueError: no such file, another program than "train", or a setting that
      the config does not have.
  """
  file, colon, arg = path.partition(":")
  if not os.path.isfile(file):
    raise ValueError(f"config.target: there is no file {file!r}")
  get_config = runpy.run_path(file).get("get_config")
  if get_config is None:
    raise ValueError(
      f"config.target must be a config of the program 'train'; {file} has no"
      " get_config"
    )
  config = get_config(*([arg] if colon else []))
  if config.get("program") != "train":
    raise ValueError(
      f"config.target must be a config of the program 'train', got {path}"
      f" of {config.get('program')!r}"
    )
  config.lock()
  for entry in changes.split():
    name, equals, value = entry.partition("=")
    try:
      old = config
      for part in name.split("."):
        old = old[part]
    except (KeyError, AttributeError, TypeError):
      raise ValueError(
        f"config.changes: {name!r} is no setting of {path}"
      ) from None
    if not equals:
      raise ValueError(f"config.changes: expected {name}=VALUE, got {entry!r}")
    if not isinstance(old, str):
      try:
        value = _value(value)
      except ValueError:
        raise ValueError(
          f"config.changes: {entry!r} has no value like {old!r}"
        ) from None
    try:
      config.update_from_flattened_dict({name: value})
    except TypeError as error:
      raise ValueError(f"config.changes: {entry!r}: {error}") from None
  return config


def describe(
  config: ml_collections.ConfigDict,
  size: str,
  where: chips.Slice,
  workdir: pathlib.Path,
) -> experiment_lib.Experiment:
  """The experiment as far as the steps look at it: no data, no weights.

  Args:
    config: the run's.
    size: of `model_config.SIZES`, where the run's directory would say it.
    where: devices to compile for.
    workdir: of this program.

  Raises:
    ValueError: the run cannot be divided over these devices.
  """
  mesh = sharding.make_mesh(**config.mesh, devices=where.devices)
  if config.tokenizer or config.init_from:
    tokenizer = prompts.load_tokenizer(policies.tokenizer_folder(config))
    model = policies.make_model(config, tokenizer)
    eos_id = tokenizer.eos_id
  else:
    fields = {**config.model, "size": config.model.size or size}
    model = model_config.make(**fields)
    eos_id = model.eos_token_id
  experiment_lib.check_mesh(config, model, mesh)
  if model.attention == "auto":
    # As `kernels.choose` would there; a decoder whose slots are split takes
    # XLA's, and there is one setting for both towers (`not_counted`).
    splash = where.chip and mesh.shape["context"] == 1
    model = dataclasses.replace(model, attention="splash" if splash else "xla")
  if mesh.size > 1:
    model = dataclasses.replace(model, mesh=mesh)
  grid = patches.grid_of(
    *config.data.reader.size_px,
    patch=model.vision.patch_size,
    merge=model.vision.spatial_merge_size,
  )
  return experiment_lib.Experiment(
    config=config,
    workdir=workdir,
    mesh=mesh,
    tokenizer=types.SimpleNamespace(eos_id=eos_id),
    model=model,
    samples={},
    make_views=types.SimpleNamespace(grid=grid),
    embed=None,
    banned=np.zeros(model.vocab_size, bool),
    data_hash="",
    peak=None,
  )


# ---------------------------------------------------------------- the programs


class Program(NamedTuple):
  """One compiled program of a run.

  Attributes:
    name: of the phase that it is.
    step: jitted.
    args: shapes with shardings, or shapes, as the run gives them.
    static: keyword arguments that are no arrays.
    beside: trees that lie in memory meanwhile and are not among `args`.
    rounds: of a loop whose end depends on the data.
    model_flops: operations that the model needs, all devices together; 0 where
      nobody counts them.
    a_step: how often one update of the run calls it.
    seen: share of the scores that a fused attention looks at.
    passes_on: are its results given to later programs?
  """

  name: str
  step: Callable
  args: tuple
  static: dict[str, Any]
  beside: dict[str, Any]
  rounds: int
  model_flops: float
  a_step: int
  seen: float
  passes_on: bool


def calls_of(config: ml_collections.ConfigDict) -> dict[str, int]:
  """Name of each program of a run -> calls in an update, in the run's order.

  Args:
    config: the run's.
  """
  arms = reinforce.contrast_arms(config)
  contrastive = bool(config.contrastive.weight)
  found = {"vision": 1, "prefill": 1, "unstack": 1, "decode": 1}
  if arms.sampled or arms.watched:  # the latter at times: not in an update
    found["prefill, other arms"] = len(arms.sampled)
    found["decode, other arms"] = len(arms.sampled)
  if arms.scored or config.rl.importance_cap:
    found["score"] = 1
  if reinforce.deletes_frames(config):
    found["deletion"] = 1
  if reinforce.uses_reference(config) or contrastive:
    found["reference"] = reinforce.uses_reference(config) + contrastive
  found["update"] = config.rl.updates_per_batch
  for name in ("vision", "prefill", "decode"):
    found[f"evaluate: {name}"] = 0
  if config.sft.max_steps and not config.sft.from_run:
    found["cold start"] = 0
  return found


class Shapes:
  """What the run's programs are given.

  Args:
    experiment: from `describe`.
  """

  def __init__(self, experiment: experiment_lib.Experiment):
    config, model = experiment.config, experiment.model
    self._experiment = experiment
    self._batch = sharding.batch_sharding(experiment.mesh)
    self.slots = config.tad.num_keyframes // config.prompt.frames_per_slice
    self.rows = config.rl.prompts_per_step
    if config.selector.learn:
      self.rows *= config.selector.num_selections
    self.arms = reinforce.contrast_arms(config)
    paired = config.prompt.frames_per_slice > 1
    self.slices = self.slots * (
      1
      + ("uniform" in self.arms.made)
      + paired * ("shuffled" in self.arms.made) * config.contrast.num_shuffles
    )
    self.blank = reinforce.deletes_frames(config)
    grid = experiment.grid
    self.patches = grid[0] * grid[1]
    self.visual = self.patches // model.vision.spatial_merge_size**2
    if self.slots * self.visual > config.prompt.max_tokens:
      raise ValueError(
        f"{self.slots} slots of {self.visual} visual tokens do not fit into"
        f" config.prompt.max_tokens={config.prompt.max_tokens}; raise it, or"
        " show fewer or smaller frames"
      )
    sharding.check_batch(
      self.rows,
      experiment.mesh,
      micro_batches=config.rl.micro_batches,
      setting="config.rl.prompts_per_step",
    )
    # As `held_out.Evaluator` fills a batch up.
    parts = experiment.mesh.shape["data"] * experiment.mesh.shape["fsdp"]
    self.judged = parts * -(-config.evaluation.batch_size // parts)

  def array(self, *shape: int, dtype: Any = _INT) -> jax.ShapeDtypeStruct:
    """Split over the batch, as `sharding.put_batch` does."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=self._batch)

  def view(self, rows: int) -> View:
    """One view of so many videos."""
    slots = self._experiment.config.prompt.max_tokens
    return View(
      prompt=Prompt(
        token=self.array(rows, slots),
        mask=self.array(rows, slots, dtype=bool),
        position=self.array(rows, 3, slots),
        visual=self.array(rows, slots),
      ),
      frame=self.array(rows, self.slots),
    )

  def pixel(self, rows: int, slices: int) -> jax.ShapeDtypeStruct:
    """Patches of so many slices a video."""
    width = self._experiment.model.vision.patch_dim
    return self.array(rows, slices, self.patches, width, dtype=_FLOAT)

  def seed(self, rows: int) -> jax.ShapeDtypeStruct:
    """Raw keys."""
    return self.array(rows, 2, dtype=np.dtype("uint32"))


def _placed(made: Any, compiled: jax.stages.Compiled) -> Any:
  """The results of a compiled program, where it leaves them."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    made,
    compiled.output_shardings,
  )


def _by_rules(tree: Any, mesh: jax.sharding.Mesh, rules: tuple) -> Any:
  """Shapes, with the places that rules give them."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    tree,
    sharding.tree_shardings(tree, mesh, rules),
  )


def cache_bytes(
  model: model_config.VLMConfig,
  mesh: jax.sharding.Mesh,
  *,
  rows: int,
  group: int,
  prompt: int,
  length: int,
) -> int:
  """Bytes of keys and values on each device while a batch is decoded.

  Args:
    model: the policy's shape.
    mesh: that decodes, see `sharding.decoding_mesh`.
    rows: B videos, of all devices.
    group: G completions of each.
    prompt: S slots.
    length: C slots.
  """
  shape = (rows, model.num_key_value_heads, prompt, model.head_dim)
  layer = jax.ShapeDtypeStruct(shape, np.dtype(model.dtype))
  layers = (layer,) * model.num_hidden_layers
  caches = {
    "prefix_cache": {"key": layers, "value": layers},
    "cache": jax.eval_shape(
      lambda: vlm.init_completion_cache(model, rows, group, length)
    ),
  }
  return chips.device_bytes(_by_rules(caches, mesh, sharding.DECODING_RULES))


def _guessed(made: Any, experiment: experiment_lib.Experiment) -> Any:
  """The results of a program that was not compiled.

  Decoding is laid out as the run says it; everything else of a batch is split
  over its rows.
  """
  mesh = experiment.mesh
  decoding = sharding.decoding_mesh(mesh, experiment.model.num_key_value_heads)

  if isinstance(made, sampling.Decoding):
    return _by_rules(made, decoding, sharding.DECODING_RULES)
  if isinstance(made, dict) and "decoder" in made:
    return _by_rules(made, decoding, sharding.COPY_RULES)
  parts = mesh.shape["data"] * mesh.shape["fsdp"]

  def place(leaf):
    whole = not leaf.shape or leaf.shape[0] % parts
    chosen = sharding.replicated(mesh)
    if not whole:
      chosen = sharding.batch_sharding(mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chosen)

  return jax.tree.map(place, made)


def programs(
  experiment: experiment_lib.Experiment, shapes: Shapes
) -> Iterator[Program]:
  """The programs of an update and of an evaluation, in the run's order.

  A generator: what is sent back for a program are its results, shapes with
  shardings, which later ones are given.
  """
  config, model = experiment.config, experiment.model
  params = policies.abstract_params(config, model, experiment.mesh)
  stage = experiment_lib.describe_stage(experiment, "rl", params)
  state, frozen = stage.state, stage.frozen
  calls = calls_of(config)
  always = {
    "optimizer": state.opt_state,
    "reference": state.params,  # where the run started, for KL and evaluation
  }
  rows, slots = shapes.rows, shapes.slots
  group, length = config.sampling.num_completions, config.sampling.max_tokens
  arms = [
    name
    for arm in shapes.arms.scored
    for name in (
      [arm] + [f"{arm}_{m}" for m in range(1, config.contrast.num_shuffles)]
      if arm == "shuffled"
      else [arm]
    )
  ]
  rescores = bool(config.rl.importance_cap)
  prompt = np.full(rows, config.prompt.max_tokens)
  told = np.full((rows, group), length)
  references = calls.get("reference", 0)
  made = flops.grpo_step(
    model,
    state.params,
    frozen,
    grid=experiment.grid,
    num_frames=rows * shapes.slices,
    num_shown=rows * slots,
    prompt=dict.fromkeys(("keyframes", *arms), prompt),
    completion=told,
    num_references=references,
  )
  view = shapes.view(rows)
  view_of = dict.fromkeys((*arms, *(["keyframes"] * rescores)), view)

  def program(
    name, step, *args, beside=None, rounds=1, model_flops=0.0, **more
  ):
    passes_on = more.pop("passes_on", False)
    static = more
    if hasattr(step, "func"):  # of `SampleSteps`
      static |= step.keywords
      step = step.func
    return Program(
      name,
      step,
      args,
      static,
      always if beside is None else always | beside,
      rounds,
      model_flops,
      calls[name],
      seen_by.get(name.rpartition(": ")[2], packed),
      passes_on,
    )

  packed = share_of_blocks(config.prompt.max_tokens, group, length - 1)
  seen_by = {
    "vision": 1.0,
    "prefill": share_of_blocks(config.prompt.max_tokens, 0, 0),
    "cold start": share_of_blocks(config.prompt.max_tokens, 1, length - 1),
  }

  # -- rollout
  pixel = shapes.pixel(rows, shapes.slices + shapes.blank)
  encode = experiment_lib.make_encode_step(experiment)
  encoded = yield program(
    "vision",
    encode,
    params,
    pixel,
    model_flops=made["vision"],
    passes_on=True,
  )
  sample = experiment_lib.make_sample_steps(experiment, **config.sampling)
  seed = shapes.seed(rows)
  decoding = yield program(
    "prefill",
    sample.prefill,
    params,
    view,
    encoded,
    seed,
    model_flops=made["prefill"],
    passes_on=True,
  )
  apart = yield program(
    "unstack",
    sample.unstack,
    params,
    beside={"encoded": encoded, "rollout": decoding},
    passes_on=True,
    rows=rows * group,
  )
  yield program(
    "decode",
    sample.decode,
    apart,
    decoding,
    beside={"parameters": params, "encoded": encoded},
    rounds=length - 1,
    model_flops=made["decode"],
  )
  scores = shapes.array(rows, group, length, dtype=_FLOAT)
  rollout = Rollout(
    token=shapes.array(rows, group, length),
    mask=shapes.array(rows, group, length, dtype=bool),
    logprob=scores,
    finished=shapes.array(rows, group, dtype=bool),
  )
  if "decode, other arms" in calls:
    other = experiment_lib.make_sample_steps(
      experiment,
      **dict(config.sampling)
      | {"num_completions": config.contrast.num_samples},
    )
    begun = yield program(
      "prefill, other arms",
      other.prefill,
      params,
      view,
      encoded,
      seed,
      beside={"to decode with": apart},
      passes_on=True,
    )
    yield program(
      "decode, other arms",
      other.decode,
      apart,
      begun,
      beside={"parameters": params, "encoded": encoded},
      rounds=length - 1,
    )

  # -- scores
  if "score" in calls:
    yield program(
      "score",
      rl_steps.make_score_step(experiment),
      params,
      view_of,
      encoded,
      rollout,
      model_flops=made["score"] + rescores * (made["prefill"] + made["decode"]),
    )
  if "deletion" in calls:
    yield program(
      "deletion",
      rl_steps.make_deletion_step(experiment),
      params,
      view,
      encoded,
      rollout,
      shapes.array(rows, group, length, dtype=bool),
      shapes.array(rows, group, slots, dtype=bool),
      shapes.array(rows, slots, dtype=_FLOAT),
      shapes.array(rows, slots, dtype=bool),
    )
  shown_pixel = shapes.pixel(rows, slots) if stage.trains_vision else None
  shown = None
  if not stage.trains_vision:
    shown = shapes.array(*encoded.shape, dtype=encoded.dtype)
    shown = shapes.array(rows, slots, *encoded.shape[2:], dtype=encoded.dtype)
  if "reference" in calls:
    # The reference has buffers of its own; those that train are beside it.
    yield program(
      "reference",
      rl_steps.make_reference_step(experiment),
      params,
      view,
      shown_pixel,
      shown,
      rollout,
      model_flops=made["reference"] / references,
    )

  # -- update
  other_view = None
  if config.contrastive.weight:
    other_view = OtherView(
      view=view,
      ref_logprob=scores,
      answer_span=shapes.array(rows, group, length, dtype=bool),
      select=shapes.array(rows, group, dtype=bool),
      moved=shapes.array(rows, dtype=bool),
    )
  by_token = config.rl.advantage == "reinforce"
  experience = Experience(
    view=view,
    rollout=rollout,
    advantage=scores if by_token else shapes.array(rows, group, dtype=_FLOAT),
    ref_logprob=scores if reinforce.uses_reference(config) else None,
    group_mask=shapes.array(rows, dtype=bool),
    pixel=shown_pixel,
    encoded=shown,
    old_logprob=scores if rescores else None,
    other=other_view,
  )
  yield program(
    "update",
    rl_steps.make_update_step(experiment, stage),
    state,
    frozen,
    experience,
    # The optimizer is among its arguments.
    beside={"optimizer": None},
    model_flops=made["update"] * (1 + bool(config.contrastive.weight)),
  )

  # -- evaluation
  rows = shapes.judged
  view = shapes.view(rows)
  greedy = experiment_lib.make_sample_steps(
    experiment, num_completions=1, max_tokens=length, temperature=0.0
  )
  many = "uniform" in config.evaluation.arms
  pixel = shapes.pixel(rows, slots * (1 + many))
  encoded = yield program(
    "evaluate: vision", encode, params, pixel, passes_on=True
  )
  begun = yield program(
    "evaluate: prefill",
    greedy.prefill,
    params,
    view,
    encoded,
    shapes.seed(rows),
    beside={"to decode with": apart},
    passes_on=True,
  )
  yield program(
    "evaluate: decode",
    greedy.decode,
    apart,
    begun,
    beside={"parameters": params, "encoded": encoded},
    rounds=length - 1,
  )

  # -- cold start
  if "cold start" in calls:
    start = experiment_lib.describe_stage(experiment, "sft", params)
    rows = config.sft.batch_size
    one = shapes.array(rows, 1, length, dtype=_FLOAT)
    yield program(
      "cold start",
      sft.make_sft_step(experiment, start),
      start.state,
      start.frozen,
      sft.Targets(
        view=shapes.view(rows),
        pixel=shapes.pixel(rows, slots),
        target=Rollout(
          token=shapes.array(rows, 1, length),
          mask=shapes.array(rows, 1, length, dtype=bool),
          logprob=one,
          finished=shapes.array(rows, 1, dtype=bool),
        ),
      ),
      beside={"optimizer": None, "reference": None},
    )


# --------------------------------------------------------------------- results


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Bytes on each device, as the compiler says."""
  stats = compiled.memory_analysis()
  arguments = stats.argument_size_in_bytes
  results = stats.output_size_in_bytes - stats.alias_size_in_bytes
  temporary = stats.temp_size_in_bytes
  code = stats.generated_code_size_in_bytes
  return {
    "arguments": arguments,
    "results": results,
    "temporary": temporary,
    "code": code,
    "peak": arguments + results + temporary + code,
  }


_SPLASH = re.compile(r"splash_mha_(fwd|dkv|dq)")
# Matmuls over all pairs of query and key that each kernel makes.
_SPLASH_MATMULS = {"fwd": 2, "dkv": 4, "dq": 3}


def _splash_flops(text, shapes, *, seen):
  """Of one call: the blocks that are not masked as a whole."""
  kind = _SPLASH.search(text)
  if kind is None:
    return None
  query = max(shapes, key=math.prod)  # the largest; key heads are fewer
  *heads, slots, width = query
  return (
    2.0
    * _SPLASH_MATMULS[kind.group(1)]
    * math.prod(heads)
    * slots**2
    * width
    * seen
  )


def share_of_blocks(prompt: int, group: int, length: int) -> float:
  """How much of a packed row's scores splash looks at, in blocks of 512.

  Args:
    prompt: S slots.
    group: G completions behind them.
    length: slots of each.
  """
  total = prompt + group * length
  slot = np.arange(total)
  start = np.where(
    slot < prompt, 0, prompt + (slot - prompt) // max(length, 1) * length
  )
  edges = range(0, total, _BLOCK)
  looked_at = 0
  for first in edges:
    query = slice(first, first + _BLOCK)
    for key in edges:
      last = min(key + _BLOCK, total) - 1
      before = slot[query] >= key
      inside = (key < prompt) | (last >= start[query])
      looked_at += bool(np.any(before & inside))
  return looked_at / len(edges) ** 2


def _laid_out(
  lowered: jax.stages.Lowered, folder: pathlib.Path
) -> tuple[str, dict[str, int]]:
  """The optimized program, and bytes on each device, but for its code.

  The compiler goes on in the background: the process has to be ended.

  Args:
    lowered: for a TPU.
    folder: empty, for the compiler to write to.
  """
  failed = []

  def compile_it():
    try:
      lowered.compile(
        compiler_options={
          "xla_dump_to": str(folder),
          "xla_dump_hlo_as_text": True,
        }
      )
    except jax.errors.JaxRuntimeError as error:
      failed.append(error)

  working = threading.Thread(target=compile_it, daemon=True)
  working.start()
  size = -1
  while True:
    working.join(1.0)
    if failed:
      raise failed[0]
    there = list(folder.glob(_LAID_OUT))
    before, size = size, there[0].stat().st_size if there else -1
    if 0 < size == before:
      break
    if not working.is_alive() and not there:
      raise RuntimeError(
        f"the compiler left no {_LAID_OUT} in {folder};"
        " set config.machine_code=True"
      )
  text, buffers = there[0].read_text("utf-8"), list(folder.glob(_BUFFERS))
  if len(buffers) != 1 or not text.rstrip().endswith("}"):
    raise RuntimeError(
      f"what the compiler wrote to {folder} is not whole (is the disk full?);"
      " set config.machine_code=True"
    )
  return text, hlo.assigned(buffers[0].read_text("utf-8"))


def _refused(said: hlo.Refusal, arguments: int, beside: int) -> dict[str, Any]:
  """The row of a program that the compiler does not make; bytes of a device.

  A figure that the compiler does not say is None.
  """
  peak = said.peak
  if peak is None and said.beside_arguments is not None:
    peak = said.beside_arguments + arguments
  return {
    "fits": False,
    "near": False,
    "memory": {
      "temporary": None if peak is None else max(0.0, peak - arguments),
      "peak": peak,
    },
    "peak_bytes": None if peak is None else peak + beside,
    "largest": _named(said.largest),
    "refused": said.said,
    "refused_for": said.space,
  }


def _named(arrays):
  return [
    {"bytes": size, "shape": shape, "made_by": made_by}
    for size, shape, made_by in arrays
  ]


def _measure(program, where, experiment, largest, folder):
  """Compiles one program; (its row of the results, results' shapes).

  With a folder up to its machine code, see `_laid_out`.
  """
  begin = time.monotonic()
  traced = program.step.trace(*program.args, **program.static)
  platform = where.devices[0].platform
  lowered = traced.lower(lowering_platforms=(platform,))
  lower_s = time.monotonic() - begin
  logging.info("%s: lowered in %.0f s", program.name, lower_s)
  beside = sum(map(chips.device_bytes, program.beside.values()))
  row = {
    "program": program.name,
    "calls_per_update": program.a_step,
    "arguments_bytes": chips.device_bytes(program.args),
    "beside_bytes": beside,
    "model_flops": program.model_flops,
    "lower_s": round(lower_s, 1),
  }
  begin = time.monotonic()
  compiled = None
  try:
    if folder is None:
      compiled = lowered.compile()
      text, memory = compiled.as_text(), memory_of(compiled)
    else:
      text, memory = _laid_out(lowered, folder)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    said = hlo.refusal(str(error))
    if not said.largest and folder is not None:
      # It writes down what it gave up on.
      for path in folder.glob("*.after_optimizations.txt"):
        arrays = hlo.largest_arrays(path.read_text("utf-8"), largest)
        said = said._replace(largest=arrays)
    said = said._replace(largest=said.largest[:largest])
    row |= _refused(said, row["arguments_bytes"], beside)
    row["compile_s"] = round(time.monotonic() - begin, 1)
    return row, _guessed(traced.out_info, experiment)
  peaks = {}
  if where.chip:
    peaks = dict(
      flops_per_s=where.chip.flops_per_s,
      bytes_per_s=where.chip.hbm_bytes_per_s,
    )
  cost = hlo.count(
    text,
    num_devices=len(where.devices),
    open_rounds=program.rounds,
    kernel_flops=functools.partial(_splash_flops, seen=program.seen),
    **peaks,
  )
  peak = memory["peak"] + beside
  row |= {
    "fits": where.chip is None or peak <= where.chip.hbm_bytes,
    "near": bool(
      where.chip
      and folder is not None
      and peak <= where.chip.hbm_bytes
      and peak + _MORE_TEMPORARY * memory["temporary"] > where.chip.hbm_bytes
    ),
    "memory": memory,
    "peak_bytes": peak,
    "largest": _named(hlo.largest_arrays(text, largest)),
    "flops": cost.flops,
    "bytes": cost.read + cost.written,
    "collectives": [
      {
        "kind": transfer.kind,
        "group": transfer.group,
        "count": count,
        "bytes": size,
      }
      for transfer, (count, size) in sorted(cost.transfers.items())
    ],
    "open_loops": cost.open_loops,
    "uncounted_kernels": cost.kernels,
    "compile_s": round(time.monotonic() - begin, 1),
  }
  if where.chip:
    spent = chips.estimate(cost, where)
    row["time"] = spent._asdict()
    peak_flops = len(where.devices) * where.chip.flops_per_s
    if program.model_flops and spent.bound_s:
      row["mfu_bound"] = program.model_flops / peak_flops / spent.bound_s
  if compiled is None:
    return row, _guessed(traced.out_info, experiment)
  return row, _placed(traced.out_info, compiled)


def helpful(
  row: dict[str, Any], config: ml_collections.ConfigDict, parts: int
) -> list[str]:
  """Settings that would make a program that does not fit smaller.

  Args:
    row: its results.
    config: of the run.
    parts: data x fsdp devices.
  """
  if row.get("refused_for", "hbm") not in ("", "hbm"):
    return []  # a kernel's own memory: none of these
  held = row["arguments_bytes"] + row["beside_bytes"]
  peak = row["peak_bytes"]
  said = []
  if peak is None or held > 0.4 * peak:
    said.append(
      "mesh.fsdp or mesh.tensor larger (or a larger slice): parameters,"
      " optimizer and caches are divided by them"
    )
    if not config.lora.rank:
      said.append("lora.rank=64: only adapters have an optimizer")
  if peak is None or held < 0.8 * peak:
    rows = config.rl.prompts_per_step
    if row["program"] == "update" and config.model.get("remat") != "full":
      settable = "remat" in config.model
      said.append(
        "model.remat=full"
        + ("" if settable else " (in the config's file, which does not set it)")
      )
    each = rows // parts  # prompts of a device
    if row["program"] == "update" and each > config.rl.micro_batches:
      said.append(
        f"rl.micro_batches above {config.rl.micro_batches}, as long as"
        f" rl.prompts_per_step divides by it times {parts}"
      )
    said.append(
      "mesh.context or mesh.tensor larger, with as many fewer of mesh.fsdp:"
      " one prompt's activations are divided by them"
    )
    if each > 1:
      said.append(f"rl.prompts_per_step below {rows}")
    said += [
      f"sampling.num_completions below {config.sampling.num_completions} or"
      f" sampling.max_tokens below {config.sampling.max_tokens}",
      f"prompt.max_tokens below {config.prompt.max_tokens}, with"
      f" tad.num_keyframes below {config.tad.num_keyframes} or a smaller"
      " data.reader.size_px",
    ]
  return said


def _fingerprint(config, target) -> dict:
  return telemetry.to_jsonable(
    {
      "target": target.to_dict(),
      "size": config.size,
      "topology": config.topology,
      "num_slices": config.num_slices,
      "machine_code": config.machine_code,
      "jax": jax.__version__,
    }
  )


def _known(path: pathlib.Path, settings: dict) -> dict[str, dict]:
  """Programs of an earlier call with the same settings, by name."""
  if not path.exists():
    return {}
  there = json.loads(path.read_text("utf-8"))
  if there["settings"] != settings:
    raise ValueError(
      f"{path} holds a plan with other settings; give another --workdir"
    )
  return {row["program"]: row for row in there["programs"]}


def check_compiler(topology: str) -> None:
  """Raises a ValueError where a TPU's compiler is needed and not there."""
  if topology.startswith("cpu:"):
    return
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "the TPU's compiler (libtpu) is not installed; pip install -e '.[plan]',"
      " or plan for CPUs: config.topology=cpu:N"
    )
  jax.config.update("jax_platforms", "cpu")  # a TPU may be there, in use
  # It would ask the cloud what machine this is.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  # Nothing is run on it: several plans may be made at once.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")


def plan(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> dict[str, Any]:
  """Compiles what is asked for; writes `plan.json` as it goes on.

  For TPUs, and unless `config.machine_code`, in processes of their own.

  Args:
    config: of configs/plan.py.
    workdir: where the results are kept.

  Returns:
    What plan.json holds: `settings`, `slice`, `programs`, `totals`.

  Raises:
    ValueError: settings that do not go together, or no compiler.
  """
  if config.machine_code or config.topology.startswith("cpu:"):
    return _plan(config, workdir, to_the_end=True)
  check_compiler(config.topology)
  target = read_target(config.target, config.changes)
  _check_names(config.programs, target)
  where = chips.open_slice(config.topology, config.num_slices)
  Shapes(describe(target, config.size, where, workdir))  # or a ValueError
  _known(workdir / RESULT_FILE, _fingerprint(config, target))  # or one, too
  code = _MORE
  while code == _MORE:
    context = multiprocessing.get_context("spawn")
    heard, told = context.Pipe(duplex=False)
    working = context.Process(
      target=_compile_one, args=(config.to_dict(), workdir, told)
    )
    working.start()
    told.close()
    working.join()
    code = working.exitcode
    if code == _SAID:
      raise ValueError(heard.recv())
  if code:
    raise RuntimeError(f"a process that compiles ended with exit code {code}")
  return json.loads((workdir / RESULT_FILE).read_text("utf-8"))


def _check_names(programs: str, target: ml_collections.ConfigDict) -> None:
  """Raises a ValueError for a program that the run does not have."""
  there = list(calls_of(target))
  unknown = [name for name in named(programs) if name not in there]
  if unknown:
    raise ValueError(
      f"config.programs: this run has no {unknown}; it has {there} (a name of"
      ' several words ends with ";")'
    )


def named(programs: str) -> list[str]:
  """Names of programs, split at ";" or, where there is none, at spaces."""
  parts = programs.split(";" if ";" in programs else None)
  return [part.strip() for part in parts if part.strip()]


def _compile_one(settings, workdir, told):
  """Compiles the first program that is wanted and not there, and ends."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  try:
    _plan(ml_collections.ConfigDict(settings), workdir, to_the_end=False)
  except ValueError as error:  # mostly a setting: the parent says it
    logging.exception("it cannot be planned")
    told.send(str(error)[:4000])  # a pipe holds more
    sys.stderr.flush()
    os._exit(_SAID)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(0)  # whatever the compiler still does


def _plan(config, workdir, *, to_the_end):
  """`plan` in this process; else one program, after which the process ends."""
  check_compiler(config.topology)
  target = read_target(config.target, config.changes)
  _check_names(config.programs, target)
  where = chips.open_slice(config.topology, config.num_slices)
  experiment = describe(target, config.size, where, workdir)
  shapes = Shapes(experiment)
  wanted = named(config.programs)
  params = policies.abstract_params(target, experiment.model, experiment.mesh)
  stage = experiment_lib.describe_stage(experiment, "rl", params)
  group, length = (
    target.sampling.num_completions,
    target.sampling.max_tokens,
  )
  slots = shapes.rows * (target.prompt.max_tokens + group * length)
  mesh, calls = experiment.mesh, calls_of(target)
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  heads = experiment.model.num_key_value_heads
  result = {
    "settings": _fingerprint(config, target),
    "slice": {
      "topology": where.name,
      "num_slices": where.num_slices,
      "chips": where.num_chips,
      "hosts": where.num_hosts,
      "mesh": dict(mesh.shape),
      "chip": where.chip and where.chip._asdict(),
    },
    "batch": {
      "prompts": shapes.rows,
      "completions": group,
      "prompt_slots": target.prompt.max_tokens,
      "completion_slots": length,
      "slices": shapes.slices,
      "visual_tokens": shapes.slots * shapes.visual,
      "tokens": slots,
    },
    "per_device_bytes": {
      "parameters": chips.device_bytes(params),
      "optimizer": chips.device_bytes(stage.state.opt_state),
      "reference": chips.device_bytes(stage.state.params),
      "cache": cache_bytes(
        experiment.model,
        sharding.decoding_mesh(mesh, heads),
        rows=shapes.rows,
        group=group,
        prompt=target.prompt.max_tokens,
        length=length,
      ),
    },
    "not_counted": not_counted(
      where, chips.device_bytes(params), mesh.shape["context"]
    ),
    "programs": [],
  }
  known = _known(workdir / RESULT_FILE, result["settings"])
  stream = programs(experiment, shapes)
  program = next(stream)
  while program is not None:
    asked = not wanted or program.name in wanted
    made = None
    if asked and program.name in known:
      if to_the_end:
        logging.info("%s: as compiled before", program.name)
      result["programs"].append(known[program.name])
      result["totals"] = totals(result, where, calls)
    elif asked:
      logging.info("%s: compiling for %s", program.name, where.name)
      folder = None
      if not to_the_end:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="plan_"))
      try:
        row, made = _measure(program, where, experiment, config.largest, folder)
      finally:
        if folder is not None:
          shutil.rmtree(folder, ignore_errors=True)
      if not row["fits"]:
        row["would_help"] = helpful(row, target, parts)
      result["programs"].append(row)
      result["totals"] = totals(result, where, calls)
      telemetry.write_json(workdir / RESULT_FILE, result)
      logging.info(
        "%s: %s GiB a device, %.0f s to compile",
        row["program"],
        _gib(row["peak_bytes"]),
        row["compile_s"],
      )
      if not to_the_end:
        _keep(result, known, where, calls, workdir)
        sys.stderr.flush()
        os._exit(_MORE)
    if made is None and program.passes_on:
      traced = program.step.trace(*program.args, **program.static)
      made = _guessed(traced.out_info, experiment)
    done = {row["program"] for row in result["programs"]}
    if wanted and done.issuperset(wanted):
      break
    try:
      program = stream.send(made)
    except StopIteration:
      program = None
  _keep(result, known, where, calls, workdir)
  return result


def _keep(result, known, where, calls, workdir):
  """Writes the results; programs of an earlier call stay."""
  done = {row["program"] for row in result["programs"]}
  result["programs"] += [row for n, row in known.items() if n not in done]
  result["totals"] = totals(result, where, calls)
  telemetry.write_json(workdir / RESULT_FILE, result)


def totals(
  result: dict[str, Any], where: chips.Slice, calls: Mapping[str, int]
) -> dict[str, Any]:
  """Of all programs that were compiled so far.

  Args:
    result: as in `plan`.
    where: it was compiled for.
    calls: of `calls_of`.

  Returns:
    `fits`; `peak_bytes` and `peak_in` of the largest program, None where the
    compiler said none; `update_lacks`, the programs of an update that are not
    there. Where none is lacking and all have a time, that of an update.
  """
  rows = {row["program"]: row for row in result["programs"]}
  known = [row for row in rows.values() if row["peak_bytes"] is not None]
  worst = max(known, key=lambda row: row["peak_bytes"], default={})
  made = {
    "fits": all(row["fits"] for row in rows.values()),
    "peak_bytes": worst.get("peak_bytes"),
    "peak_in": worst.get("program"),
    "update_lacks": [
      n for n, count in calls.items() if count and n not in rows
    ],
  }
  update = [rows[name] for name in calls if calls[name] and name in rows]
  times = [row.get("time", {}).get("bound_s") for row in update]
  if where.chip and not made["update_lacks"] and None not in times:
    for name in ("bound_s", "serial_s"):
      made[f"update_{name}"] = sum(
        calls[row["program"]] * row["time"][name] for row in update
      )
    made["chip_hours_per_1000_updates"] = (
      where.num_chips * made["update_serial_s"] * 1000 / 3600
    )
  return made


def not_counted(
  where: chips.Slice, parameter_bytes: int, context: int = 1
) -> list[str]:
  """What a plan's times leave out on these slices, a sentence each.

  Args:
    where: it is compiled for.
    parameter_bytes: of a device; a gradient has as many.
    context: devices along this axis of the mesh.
  """
  found = []
  if where.num_slices > 1:
    found.append(
      f"what goes between slices: gradients of {parameter_bytes / _GIB:.2f} GiB"
      " a device in every update, summed over the data centre's network"
    )
  if where.chip and not where.chip.tells_collectives:
    found.append(
      "collectives: the compiler hands most of them to another unit, in a form"
      " that is not read here; so there is no bound, only what a chip does"
    )
  if where.chip and context > 1:
    found.append(
      "splash in the vision tower: with mesh.context above 1 the decoder takes"
      " XLA's attention, and both towers are planned with it"
    )
  return found


# ------------------------------------------------------------------------- run


def _gib(size: float | None) -> str:
  """A size in GiB, "?" where it is not known."""
  return "?" if size is None else f"{size / _GIB:.2f}"


def _wanting(row: dict[str, Any]) -> str:
  """What the compiler had too little of, where it names no size."""
  space = row.get("refused_for", "")
  if space in ("", "hbm"):
    return "memory, it does not say how much"
  return f"{space}, a chip's own memory for its kernels, not its main memory"


def _sent(row: dict[str, Any]) -> str:
  """A program's collectives by kind: "all-gather 43.1 GB in 204"."""
  kinds = {}
  for each in row.get("collectives", ()):
    count, size = kinds.get(each["kind"], (0, 0))
    kinds[each["kind"]] = count + each["count"], size + each["bytes"]
  largest = sorted(kinds.items(), key=lambda kind: -kind[1][1])
  return ", ".join(
    f"{kind} {size / 1e9:.3g} GB in {count:.0f}"
    for kind, (count, size) in largest
  )


def show(result: dict[str, Any]) -> None:
  """Prints the tables."""
  chip, held = result["slice"]["chip"], result["per_device_bytes"]
  batch = result["batch"]
  telemetry.startup_table(
    "plan",
    {
      "slice": f"{result['slice']['topology']} x"
      f" {result['slice']['num_slices']}, {result['slice']['chips']} chips,"
      f" {result['slice']['hosts']} hosts, mesh {result['slice']['mesh']}",
      "an update": f"{batch['prompts']} prompts of {batch['prompt_slots']}"
      f" slots ({batch['visual_tokens']} visual), {batch['completions']}"
      f" completions of {batch['completion_slots']}",
      "held by each device": ", ".join(
        f"{name} {size / _GIB:.2f} GiB" for name, size in held.items()
      ),
      "memory of a device": f"{chip['hbm_bytes'] / _GIB:.2f} GiB"
      if chip
      else "not limited",
    },
  )
  telemetry.closing_table(
    "memory of each device, GiB (temporary: activations)",
    ["program", "all", "arguments", "beside them", "temporary"],
    [
      [
        row["program"]
        + ("" if row["fits"] else "  DOES NOT FIT")
        + ("  MAY NOT FIT" if row.get("near") else ""),
        _gib(row["peak_bytes"]),
        _gib(row["arguments_bytes"]),
        _gib(row["beside_bytes"]),
        _gib(row["memory"]["temporary"]),
      ]
      for row in result["programs"]
    ],
  )
  columns = ["program", "TFLOP", "GB", "GB sent"]
  if chip:
    columns += ["chip ms", "sent ms", "MFU <="]
  lines = []
  for row in result["programs"]:
    line = [row["program"]]
    if "flops" in row:
      line += [
        f"{row['flops'] / 1e12:.3g}",
        f"{row['bytes'] / 1e9:.3g}",
        f"{sum(c['bytes'] for c in row['collectives']) / 1e9:.3g}",
      ]
    if "time" in row:
      line += [
        "?" if row["time"][name] is None else f"{1000 * row['time'][name]:.4g}"
        for name in ("chip_s", "network_s")
      ]
      share = row.get("mfu_bound")
      line.append(f"{100 * share:.1f} %" if share else "")
    lines.append(line + [""] * (len(columns) - len(line)))
  telemetry.closing_table("each program, on each device", columns, lines)
  for row in result["programs"]:
    sent = _sent(row)
    if sent and (chip is None or chip["tells_collectives"]):
      logging.info("%s sends: %s", row["program"], sent)
  for row in result["programs"]:
    if row.get("uncounted_kernels"):
      logging.warning(
        "%s: %d calls of kernels count as memory traffic alone; their matmuls"
        " are not in its times",
        row["program"],
        row["uncounted_kernels"],
      )
    if row.get("near"):
      logging.warning(
        "%s: so near the limit that it may not fit; config.machine_code=True"
        " compiles it to the end, which tells",
        row["program"],
      )
  for sentence in result["not_counted"]:
    logging.warning("not counted: %s", sentence)
  found = result["totals"]
  if "update_bound_s" in found:
    logging.info(
      "an update takes at least %.2f s, %.2f s with nothing hidden: %.0f"
      " chip-hours for 1,000 (every completion at its longest; no host time)",
      found["update_bound_s"],
      found["update_serial_s"],
      found["chip_hours_per_1000_updates"],
    )
  elif chip and chip["tells_collectives"] and found["update_lacks"]:
    logging.info(
      "an update's time needs all of its programs; not planned: %s",
      ", ".join(found["update_lacks"]),
    )
  for row in result["programs"]:
    if row["fits"]:
      continue
    if row["peak_bytes"] is None:
      logging.error(
        "%s is refused for want of %s", row["program"], _wanting(row)
      )
    else:
      over = f" of {chip['hbm_bytes'] / _GIB:.2f}" if chip else ""
      logging.error(
        "%s needs %.2f GiB%s: arguments %.2f, beside them %.2f, temporary %.2f",
        row["program"],
        row["peak_bytes"] / _GIB,
        over,
        row["arguments_bytes"] / _GIB,
        row["beside_bytes"] / _GIB,
        row["memory"]["temporary"] / _GIB,
      )
    for array in row.get("largest", ()):
      logging.error(
        "  %8.2f GiB %s (%s)",
        array["bytes"] / _GIB,
        array["shape"],
        array["made_by"],
      )
    if "refused" in row:
      logging.error("  the compiler: %s", row["refused"])
    for setting in row["would_help"]:
      logging.error("  would help: %s", setting)


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Plans, prints, writes; exit code 1 where something does not fit."""
  workdir.mkdir(parents=True, exist_ok=True)
  result = plan(config, workdir)
  show(result)
  logging.info("all of it: %s", workdir / RESULT_FILE)
  if not result["totals"]["fits"]:
    sys.exit(1)
