"""Qwen2.5-VL directories: parameters in, parameters out.

One table, `ROWS`, says which tensor of a file is which parameter of the tree,
and serves both ways. A linear layer's tensor is [out, in] in a file and
[in..., out...] here, with heads as axes of their own; layers are separate
tensors in a file and stacked here; the tower's query, key and value are one
tensor in a file and three parameters here.

Reading goes tensor by tensor: a parameter is allocated on the devices with its
sharding and filled layer by layer, from the slices of the file that this
process's devices hold. The host holds one tensor at a time.

Letters in the table, decoder: `V` vocabulary, `D` model width, `N` query heads,
`M` key/value heads, `H` head width, `F` mlp width. Tower: `d` width, `n` heads,
`h` head width, `f` mlp width, `m` width of a merged square, `C` colours, `T`
frames and `P` pixels of a patch's side.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import json
import math
import pathlib
import re
import shutil
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from cf_jax import disk
from cf_jax.data import json_file, patches, prompts, vision_input
from cf_jax.models import hf_config, vlm
from cf_jax.models.config import DTYPES, VLMConfig
from cf_jax.runtime import sharding

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Prefixes that transformers has written -> the published ones. Read in the
# sources of 4.49.0, 4.50.0, 4.51.3, 4.52.0 to 4.52.4, 4.53.1, 4.55.0, 4.57.1,
# 5.0.0 and 5.2.0; seen in files of 4.49.0, 4.53.1, 4.57.1, 5.2.0 to 5.6.2 and
# 5.23.0.
#   `visual.*`, `model.*`, `lm_head.weight`: the published files;
#     save_pretrained of 4.49 to 4.51 (the modules' own names) and of 4.52 on
#     (renamed back).
#   `model.visual.*` beside `model.*`: save_pretrained of 5.4.0 to 5.5.3, where
#     half of that renaming is lost.
#   `model.visual.*`, `model.language_model.*`: the modules' own names since
#     4.52, in what is saved past the renaming: a state dict gathered by a
#     trainer, or save_original_format=False (5.x).
#   `language_model.*`: the same of the headless Qwen2_5_VLModel since 4.52.
_PREFIXES = (
  (re.compile(r"^model\.visual\."), "visual."),
  (re.compile(r"^(model\.)?language_model\."), "model."),
)
# Tables of rotary frequencies, buffers that follow from the config.
_BUFFER = re.compile(r"(^|\.)rotary(_pos)?_emb\.inv_freq$")

_NUMPY_OF = {
  "F32": "float32",
  "BF16": "bfloat16",
  "F16": "float16",
  "F64": "float64",
}
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_BYTES = 16 * 2**20
_LOG_EVERY_S = 10.0

# Copied as they are from the tokenizer's folder, where it has them.
_TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
)
# The published preprocessor_config.json.
_PREPROCESSOR = {
  "image_processor_type": "Qwen2VLImageProcessor",
  "image_mean": list(patches.MEAN),
  "image_std": list(patches.STD),
  "min_pixels": 4 * 28 * 28,
  "max_pixels": 16384 * 28 * 28,
}


class Row(NamedTuple):
  """One parameter and its tensor.

  Attributes:
    path: the parameter; its leading axis is the layer where the tensor's name
      has a number.
    name: the tensor, `{}` for the layer.
    out: axes of the parameter that the tensor's first axis holds.
    inputs: axes that its other axes hold; a kernel has them first.
    part: which third of the tensor's first axis; None: all of it.
  """

  path: str
  name: str
  out: tuple[str, ...]
  inputs: tuple[str, ...] = ()
  part: int | None = None

  def axes(self) -> tuple[str, ...]:
    """The parameter's axes, without the layer."""
    if self.path.endswith("kernel"):
      return self.inputs + self.out
    return self.out + self.inputs

  def to_parameter(self) -> tuple[int, ...]:
    """Permutation from (out, inputs) to the parameter's axes."""
    split = len(self.out)
    order = tuple(range(split + len(self.inputs)))
    if self.path.endswith("kernel"):
      return order[split:] + order[:split]
    return order


def _linear(path, name, out, inputs, bias, part=None):
  rows = [Row(f"{path}/kernel", f"{name}.weight", out, inputs, part)]
  if bias:
    rows.append(Row(f"{path}/bias", f"{name}.bias", out, (), part))
  return rows


def _rows():
  block, layer = "visual.blocks.{}", "model.layers.{}"
  tower, decoder = "vision/layers", "decoder/layers"
  rows = [
    Row(
      "vision/patch_embed/proj/kernel",
      "visual.patch_embed.proj.weight",
      ("d",),
      ("CTPP",),
    ),
    Row(f"{tower}/attention_norm/scale", f"{block}.norm1.weight", ("d",)),
    Row(f"{tower}/mlp_norm/scale", f"{block}.norm2.weight", ("d",)),
    Row("vision/merger/norm/scale", "visual.merger.ln_q.weight", ("d",)),
    Row("decoder/embed/embedding", "model.embed_tokens.weight", ("V",), ("D",)),
    Row(
      f"{decoder}/attention_norm/scale",
      f"{layer}.input_layernorm.weight",
      ("D",),
    ),
    Row(
      f"{decoder}/mlp_norm/scale",
      f"{layer}.post_attention_layernorm.weight",
      ("D",),
    ),
    Row("decoder/norm/scale", "model.norm.weight", ("D",)),
    Row("decoder/head/embedding", "lm_head.weight", ("V",), ("D",)),
  ]
  linear = [
    *(
      (f"{tower}/{name}", f"{block}.attn.qkv", ("n", "h"), ("d",), True, part)
      for part, name in enumerate(("query", "key", "value"))
    ),
    (f"{tower}/out", f"{block}.attn.proj", ("d",), ("n", "h"), True),
    (f"{tower}/mlp/gate", f"{block}.mlp.gate_proj", ("f",), ("d",), True),
    (f"{tower}/mlp/up", f"{block}.mlp.up_proj", ("f",), ("d",), True),
    (f"{tower}/mlp/down", f"{block}.mlp.down_proj", ("d",), ("f",), True),
    ("vision/merger/up", "visual.merger.mlp.0", ("m",), ("m",), True),
    ("vision/merger/down", "visual.merger.mlp.2", ("D",), ("m",), True),
    (f"{decoder}/query", f"{layer}.self_attn.q_proj", ("N", "H"), ("D",), True),
    (f"{decoder}/key", f"{layer}.self_attn.k_proj", ("M", "H"), ("D",), True),
    (f"{decoder}/value", f"{layer}.self_attn.v_proj", ("M", "H"), ("D",), True),
    (f"{decoder}/out", f"{layer}.self_attn.o_proj", ("D",), ("N", "H"), False),
    (f"{decoder}/mlp/gate", f"{layer}.mlp.gate_proj", ("F",), ("D",), False),
    (f"{decoder}/mlp/up", f"{layer}.mlp.up_proj", ("F",), ("D",), False),
    (f"{decoder}/mlp/down", f"{layer}.mlp.down_proj", ("D",), ("F",), False),
  ]
  for path, name, out, inputs, bias, *part in linear:
    rows += _linear(
      path, name, out, inputs, bias=bias, part=(part or [None])[0]
    )
  return tuple(rows)


ROWS = _rows()


class _Piece(NamedTuple):
  """What one tensor of a file fills."""

  row: Row
  layer: int | None


class _Tensor(NamedTuple):
  """Where a tensor lies, as its file says."""

  file: pathlib.Path
  raw: str  # its name in the file
  shape: tuple[int, ...]
  dtype: str


def _sizes(config: VLMConfig) -> dict[str, tuple[int, str]]:
  """Letter -> (size, the fields of config.json that set it)."""
  tower = config.vision
  heads = "hidden_size, num_attention_heads"
  merged = tower.hidden_size * tower.spatial_merge_size**2
  return {
    "V": (config.vocab_size, "vocab_size"),
    "D": (config.hidden_size, "hidden_size"),
    "N": (config.num_attention_heads, heads),
    "M": (config.num_key_value_heads, f"num_key_value_heads, {heads}"),
    "H": (config.head_dim, heads),
    "F": (config.intermediate_size, "intermediate_size"),
    "d": (tower.hidden_size, "vision_config.hidden_size"),
    "n": (tower.num_heads, "vision_config.hidden_size"),
    "h": (tower.head_dim, "vision_config.hidden_size"),
    "f": (tower.intermediate_size, "vision_config.intermediate_size"),
    "m": (
      merged,
      "vision_config.hidden_size, vision_config.spatial_merge_size",
    ),
    "C": (tower.in_channels, "vision_config.in_channels"),
    "T": (tower.temporal_patch_size, "vision_config.temporal_patch_size"),
    "P": (tower.patch_size, "vision_config.patch_size"),
  }


def _file_axes(row: Row) -> tuple[str, ...]:
  """The tensor's axes, each a product of letters; `3` for a fused one."""
  first = "".join(row.out)
  if row.part is not None:
    first = "3" + first
  inputs = "".join(row.inputs)
  # The patch embedding is a convolution's kernel, an axis per letter.
  return (first, *(inputs if inputs == "CTPP" else [inputs] * bool(inputs)))


def _product(letters, sizes):
  return math.prod(3 if c == "3" else sizes[c][0] for c in letters)


def tensor_shapes(config: VLMConfig) -> dict[str, tuple[int, ...]]:
  """Published name -> shape of every tensor of a model."""
  sizes = _sizes(config)
  return {
    name: tuple(_product(axis, sizes) for axis in _file_axes(pieces[0].row))
    for name, pieces in _pieces(config).items()
  }


def _pieces(config: VLMConfig) -> dict[str, list[_Piece]]:
  """Published name of a tensor -> the parameters that it fills."""
  depth = {
    "vision": config.vision.depth,
    "decoder": config.num_hidden_layers,
  }
  found = collections.defaultdict(list)
  for row in ROWS:
    if row.name == _HEAD and config.tie_word_embeddings:
      continue
    if "{}" in row.name:
      for layer in range(depth[row.path.split("/")[0]]):
        found[row.name.format(layer)].append(_Piece(row, layer))
    else:
      found[row.name].append(_Piece(row, None))
  return dict(found)


def published_name(name: str) -> str:
  """A tensor's name as in the published files, whoever wrote it."""
  for pattern, prefix in _PREFIXES:
    name = pattern.sub(prefix, name)
  return name


# ----------------------------------------------------------------- in


def read_config(directory: str | pathlib.Path) -> VLMConfig:
  """The config of a Qwen2.5-VL directory, without its weights.

  Raises:
    ValueError: `config.json` is missing, broken, or of another model.
  """
  path = pathlib.Path(directory) / "config.json"
  if not path.is_file():
    raise ValueError(
      f"no config.json in {str(directory)!r}; expected a Qwen2.5-VL directory"
      f" as transformers' save_pretrained writes it{_hint(path.parent)}"
    )
  spec = json_file.read_object(path)
  try:
    return hf_config.from_hf(spec)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def load_hf(
  directory: str | pathlib.Path,
  mesh: Mesh | None = None,
  dtype: str | None = None,
  part: Literal["", "vision", "decoder"] = "",
) -> tuple[VLMConfig, dict]:
  """Reads a Qwen2.5-VL directory straight into its shardings.

  Every process of a multi-host run calls this with a directory that it sees;
  each reads only what its devices hold.

  Args:
    directory: config.json, and model.safetensors or several files with
      model.safetensors.index.json.
    mesh: where parameters go, by `sharding.PARTITION_RULES`; None: the first
      device.
    dtype: "float32" or "bfloat16"; None keeps each tensor's own. float16 and
      float64 files need one, as parameters are float32 or bfloat16.
    part: what is read, the subtree of that name; "" reads all.

  Returns:
    The config and the parameters, as `vlm.init` lays them out. The config's
    `dtype` and `param_dtype` are `dtype`, or that of most of the file's
    numbers.

  Raises:
    ValueError: not such a directory, or one that does not fit its config;
      names up to ten tensors of each kind.
  """
  directory = pathlib.Path(directory)
  if dtype is not None and dtype not in DTYPES:
    raise ValueError(
      f"dtype must be one of {DTYPES} or None, got {dtype!r}; None keeps the"
      " file's"
    )
  config = read_config(directory)
  pieces = _pieces(config)
  with contextlib.ExitStack() as stack:
    handles = {
      path: stack.enter_context(_open(path)) for path in _files(directory)
    }
    tensors = _survey(handles, config, pieces, directory)
    if part:
      tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if any(piece.row.path.startswith(f"{part}/") for piece in pieces[name])
      }
    target = _target_dtypes(tensors, pieces, dtype)
    if config.tie_word_embeddings and not part:
      _check_tied(handles, tensors)
    params = _fill(handles, tensors, pieces, config, mesh, target)
  held = collections.Counter()
  for name, tensor in tensors.items():
    if name in pieces:
      held[target[pieces[name][0].row.path]] += math.prod(tensor.shape)
  run = held.most_common(1)[0][0]
  return dataclasses.replace(config, dtype=run, param_dtype=run), params


def _hint(directory):
  """What a directory that is not of this format holds instead."""
  if not directory.is_dir():
    return "; there is no such directory"
  names = sorted(path.name for path in directory.iterdir())
  if not names:
    return "; the directory is empty"
  for suffixes, why in (
    (
      (".bin", ".pt", ".pth", ".ckpt"),
      "pickles run code when they are read and are refused; convert them once"
      ' with transformers: python -c "from transformers import'
      " Qwen2_5_VLForConditionalGeneration as M; M.from_pretrained('DIR',"
      " dtype='auto').save_pretrained('NEW')\"",
    ),
    ((".gguf",), "GGUF is not read; take the model's safetensors directory"),
  ):
    found = [name for name in names if name.endswith(suffixes)]
    if found:
      return f"; found {', '.join(found[:10])}: {why}"
  if "adapter_config.json" in names:
    return (
      "; found adapter_config.json: adapters alone are not a model; merge them"
      " into their base with peft's merge_and_unload() and save that"
    )
  return f"; found {', '.join(names[:10])}"


def _files(directory):
  """The safetensors files, in the order transformers looks for them."""
  if (directory / SINGLE).is_file():
    return [directory / SINGLE]
  index = directory / INDEX
  if not index.is_file():
    raise ValueError(
      f"no {SINGLE} or {INDEX} in {str(directory)!r}{_hint(directory)}"
    )
  try:
    names = json.loads(index.read_text("utf-8"))["weight_map"]
    files = sorted(set(names.values()))
    if outside := [
      n for n in files if pathlib.PurePath(n).name != n or n == ".."
    ]:
      raise ValueError(f"files that are not beside it: {outside[:3]}")
  except (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
  ) as error:
    raise ValueError(
      f"{index}: expected an object with weight_map, tensor to file; got"
      f" {error!r}"
    ) from error
  missing = [name for name in files if not (directory / name).is_file()]
  if missing:
    raise ValueError(
      f"{index} names {len(missing)} of {len(files)} files that are not there:"
      f" {', '.join(missing[:10])}; copy the whole directory"
    )
  return [directory / name for name in files]


def _open(path):
  try:
    return safetensors.safe_open(path, framework="np")
  except safetensors.SafetensorError as error:
    with path.open("rb") as file:
      pointer = file.read(40).startswith(b"version https://git-lfs")
    why = "a git-lfs pointer: run git lfs pull" if pointer else "copy it again"
    raise ValueError(
      f"{path} is truncated or not a safetensors file ({error};"
      f" {path.stat().st_size} bytes); {why}"
    ) from error


def _survey(handles, config, pieces, directory):
  """Published name -> _Tensor, in the files' order, checked by name and shape.

  The head of a tied model stays in where a file has it.
  """
  expected = tensor_shapes(config)
  tensors, extra, buffers = {}, [], []
  for path, handle in handles.items():
    for raw in handle.offset_keys():
      name = published_name(raw)
      if _BUFFER.search(name):
        buffers.append(raw)
      elif name in tensors:
        raise ValueError(
          f"{directory}: {tensors[name].raw} ({tensors[name].file.name}) and"
          f" {raw} ({path.name}) are the same tensor; remove one file"
        )
      elif name in pieces or name == _HEAD:
        found = handle.get_slice(raw)
        tensors[name] = _Tensor(
          path, raw, tuple(found.get_shape()), found.get_dtype()
        )
      else:
        extra.append(raw)
  if buffers:
    logging.info(
      "%d rotary tables are not read: %s", len(buffers), _first_ten(buffers)
    )
  missing = [name for name in pieces if name not in tensors]
  if missing or extra:
    raise ValueError(_misfit(missing, extra, len(pieces), directory))
  _check_shapes(tensors, expected, pieces, config)
  return tensors


def _first_ten(names):
  more = f" and {len(names) - 10} more" if len(names) > 10 else ""
  return ", ".join(names[:10]) + more


def _misfit(missing, extra, count, directory):
  said = []
  if missing:
    said.append(
      f"{len(missing)} of {count} tensors are missing: {_first_ten(missing)}"
    )
    if missing == [_HEAD]:
      said.append(
        "a model without a head of its own has tie_word_embeddings true in"
        " config.json"
      )
  if extra:
    said.append(
      f"{len(extra)} tensors are not of this model: {_first_ten(extra)}"
    )
    if any("lora_" in name for name in extra):
      said.append("merge adapters with peft's merge_and_unload() first")
  said.append("expected what config.json describes, no more and no less")
  return f"{directory}: " + "; ".join(said)


def _check_shapes(tensors, expected, pieces, config):
  sizes = _sizes(config)
  for name, tensor in tensors.items():
    if name not in expected or tensor.shape == expected[name]:
      continue
    letters = "".join(_file_axes(pieces[name][0].row))
    fields = {
      field: None
      for letter in letters
      if letter in sizes
      for field in sizes[letter][1].split(", ")
    }
    raise ValueError(
      f"{tensor.file}: {tensor.raw} has shape {list(tensor.shape)}, config.json"
      f" says {list(expected[name])}; check {', '.join(fields)}"
    )


def _target_dtypes(tensors, pieces, dtype):
  """Path of a parameter -> the dtype that it is stored in."""
  found = collections.defaultdict(dict)
  for name, tensor in tensors.items():
    if tensor.dtype not in _NUMPY_OF:
      raise ValueError(
        f"{tensor.file}: {tensor.raw} is {tensor.dtype}; supported are"
        f" {', '.join(_NUMPY_OF)}: quantised weights are not read"
      )
    kept = _NUMPY_OF[tensor.dtype]
    if dtype is None and kept not in DTYPES:
      raise ValueError(
        f"{tensor.file}: {tensor.raw} is {kept}, parameters are one of"
        f" {DTYPES}; load with dtype='float32' or dtype='bfloat16'"
        " (config.dtype, or config.model.param_dtype for training)"
      )
    for piece in pieces.get(name, ()):
      found[piece.row.path].setdefault(dtype or kept, tensor.raw)
  for path, by_dtype in found.items():
    if len(by_dtype) > 1:
      # Layers are one array, and promoting would not be keeping.
      raise ValueError(
        f"the layers of {path} have several dtypes: "
        + ", ".join(f"{raw} is {kept}" for kept, raw in by_dtype.items())
        + "; load with dtype='float32' or dtype='bfloat16' (config.dtype, or"
        " config.model.param_dtype for training)"
      )
  return {path: next(iter(by_dtype)) for path, by_dtype in found.items()}


def _check_tied(handles, tensors):
  """A tied model's file may repeat the embedding as the head, bit for bit."""
  head, embed = tensors.get(_HEAD), tensors[_EMBED]
  if head is None:
    return
  same = head.shape == embed.shape and head.dtype == embed.dtype
  if same:
    one, other = (
      handles[tensor.file].get_slice(tensor.raw) for tensor in (head, embed)
    )
    count, width = embed.shape
    step = _COMPARED_BYTES // (4 * width) + 1
    same = all(
      one[start : min(start + step, count)].tobytes()
      == other[start : min(start + step, count)].tobytes()
      for start in range(0, count, step)
    )
  if not same:
    raise ValueError(
      f"{head.file}: {head.raw} differs from {embed.raw}, but config.json says"
      " tie_word_embeddings true; expected equal tensors, or"
      " tie_word_embeddings false for a model with a head of its own"
    )


def _fill(handles, tensors, pieces, config, mesh, target):
  """The parameters, allocated when first met and filled layer by layer."""
  shapes = jax.eval_shape(lambda: vlm.init(config, jax.random.key(0)))
  if mesh is None:
    device = SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: device, shapes)
  else:
    shardings = sharding.tree_shardings(shapes, mesh, sharding.PARTITION_RULES)
  shapes = traverse_util.flatten_dict(shapes, sep="/")
  shardings = traverse_util.flatten_dict(shardings, sep="/")
  params = {}
  clock = _Clock("read", sum(_bytes(tensor) for tensor in tensors.values()))
  for name, tensor in tensors.items():
    source = handles[tensor.file].get_slice(tensor.raw)
    for row, layer in pieces.get(name, ()):
      where, shape = shardings[row.path], shapes[row.path].shape
      dtype = jnp.dtype(target[row.path])
      part = _read(source, row, shape, dtype, where, layer is not None)
      if layer is None:
        params[row.path] = part
      else:
        if row.path not in params:
          params[row.path] = _allocate(where, shape, dtype)()
        params[row.path] = _insert(where)(params[row.path], part, layer)
      # Else the host would run ahead of the devices and hold what waits.
      params[row.path].block_until_ready()
    clock.add(_bytes(tensor))
  return traverse_util.unflatten_dict(params, sep="/")


def _bytes(tensor):
  return math.prod(tensor.shape) * jnp.dtype(_NUMPY_OF[tensor.dtype]).itemsize


def _read(source, row, shape, dtype, where, stacked):
  """One layer of a parameter, sharded as the parameter `where` is.

  Only the slices that this process's devices hold are read, each once, as they
  lie in the file; the devices swap the axes.
  """
  order = row.to_parameter()
  spec = tuple(where.spec) if isinstance(where, NamedSharding) else ()
  spec += (None,) * (len(shape) - len(spec))
  shape, spec = shape[stacked:], spec[stacked:]
  # Parameter's axis j is axis order[j] of (out, inputs).
  natural, natural_spec = [0] * len(order), [None] * len(order)
  for j, axis in enumerate(order):
    natural[axis], natural_spec[axis] = shape[j], spec[j]
  turned = where
  if isinstance(where, NamedSharding):
    turned = NamedSharding(where.mesh, P(*spec))
    where = NamedSharding(where.mesh, P(*natural_spec))
  split = len(row.out)
  out, inputs = natural[:split], natural[split:]
  first_row = (row.part or 0) * math.prod(out)
  width, depth = math.prod(out[1:]), math.prod(inputs[1:])
  matrix = len(source.get_shape()) == 2
  known = {}

  def fetch(index):
    bounds = tuple(part.indices(size)[:2] for part, size in zip(index, natural))
    if bounds in known:
      return known[bounds]
    start, stop = bounds[0]
    rows = slice(first_row + start * width, first_row + stop * width)
    cut = [slice(None), *(slice(*bound) for bound in bounds[1:])]
    sizes = [stop - start, *natural[1:]]
    if matrix:
      begin, end = bounds[split]
      block = source[rows, begin * depth : end * depth]
      sizes[split], cut[split] = end - begin, slice(None)
    else:
      block = source[rows]
    block = block.reshape(sizes)[tuple(cut)]
    known[bounds] = np.ascontiguousarray(block.astype(dtype, copy=False))
    return known[bounds]

  read = jax.make_array_from_callback(tuple(natural), where, fetch, dtype=dtype)
  return _turn(turned, order)(read) if order != tuple(sorted(order)) else read


@functools.cache
def _allocate(where, shape, dtype):
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)


# Swapping axes and writing are two programs: XLA's CPU backend fuses them into
# loops that are four times slower than its transpose and its copy.


@functools.cache
def _turn(where, order):
  return jax.jit(lambda part: part.transpose(order), out_shardings=where)


@functools.cache
def _insert(where):
  """Writes one layer in place."""

  def insert(stack, part, layer):
    return jax.lax.dynamic_update_index_in_dim(stack, part, layer, axis=0)

  return jax.jit(insert, donate_argnums=0, out_shardings=where)


class _Clock:
  """Logs how far a long transfer is."""

  def __init__(self, verb: str, total: int):
    self._verb, self._total, self._done = verb, total, 0
    self._start = self._said = time.monotonic()

  def add(self, count: int) -> None:
    self._done += count
    now = time.monotonic()
    if now - self._said < _LOG_EVERY_S:
      return
    self._said = now
    rate = self._done / (now - self._start)
    logging.info(
      "%s %.3g of %.3g GB, %.2f GB/s, %.0f s left",
      self._verb,
      self._done / 1e9,
      self._total / 1e9,
      rate / 1e9,
      (self._total - self._done) / rate,
    )


# ---------------------------------------------------------------- out


def save_hf(
  directory: str | pathlib.Path,
  config: VLMConfig,
  params: dict,
  *,
  tokenizer: str | pathlib.Path | None = None,
  settings: str | pathlib.Path | None = None,
  max_shard_bytes: int = 5 * 10**9,
  dtype: str | None = None,
) -> None:
  """Writes a Qwen2.5-VL directory that transformers loads.

  The names are the published ones, which every version reads. Everything is
  written beside `directory` and renamed at the end, so what a killed export
  leaves behind has another name (`DIRECTORY.partial`) and is replaced by the
  next one. The host holds one file's tensors at a time. In a multi-host run
  every process calls this and the first one writes.

  Args:
    directory: must not exist, or be empty.
    config: the model; ids that it leaves out are the tokenizer's.
    params: as `vlm.init` lays them out, without adapters.
    tokenizer: folder of a tokenizer, whose files and chat template are copied;
      None writes the model alone.
    settings: folder whose generation and preprocessor settings are copied,
      where it has them; None: `tokenizer`.
    max_shard_bytes: a file's tensors may be this large together.
    dtype: "float32" or "bfloat16"; None keeps each parameter's own.

  Raises:
    ValueError: adapters, parameters or a tokenizer that do not fit the config,
      a directory that is not empty, or no space left.
  """
  directory = pathlib.Path(directory)
  if dtype is not None and dtype not in DTYPES:
    raise ValueError(f"dtype must be one of {DTYPES} or None, got {dtype!r}")
  flat = traverse_util.flatten_dict(params, sep="/")
  pieces = _pieces(config)
  _check_params(flat, config)
  shapes = tensor_shapes(config)
  target = {path: jnp.dtype(dtype or leaf.dtype) for path, leaf in flat.items()}
  sizes = {
    name: math.prod(shapes[name]) * target[found[0].row.path].itemsize
    for name, found in pieces.items()
  }
  shards = _shards(sizes, max_shard_bytes)
  held = collections.Counter()
  for path, leaf in flat.items():
    held[target[path].name] += leaf.size
  texts = _texts(
    config, held.most_common(1)[0][0], tokenizer, settings or tokenizer
  )
  if len(shards) > 1:
    texts[INDEX] = _json(
      {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {
          name: file for file, names in shards.items() for name in names
        },
      }
    )

  def tensors(names):
    return {
      name: _tensor(flat, pieces[name], shapes[name], target) for name in names
    }

  needed = sum(sizes.values()) + sum(len(text) for text in texts.values())
  check_target(directory, needed)
  clock = _Clock("wrote", sum(sizes.values()))
  if jax.process_index() == 0:
    _write(directory, shards, sizes, texts, tensors, clock, needed)
  else:  # its devices' parts are fetched by the first process
    for names in shards.values():
      for name in names:
        tensors([name])
  multihost_utils.sync_global_devices("save_hf")


def _check_params(flat, config):
  """Raises unless the parameters are the config's."""
  adapters = [path for path in flat if path.split("/")[-1].startswith("lora_")]
  if adapters:
    raise ValueError(
      f"params hold {len(adapters)} leaves of adapters ({adapters[0]}, ...),"
      " which this format cannot say; merge them first with lora.merge(params)"
    )
  expected = traverse_util.flatten_dict(
    jax.eval_shape(lambda: vlm.init(config, jax.random.key(0))), sep="/"
  )
  missing, extra = set(expected) - set(flat), set(flat) - set(expected)
  if missing or extra:
    raise ValueError(
      "params are not the config's: missing"
      f" {_first_ten(sorted(missing)) or 'none'}; unknown"
      f" {_first_ten(sorted(extra)) or 'none'}; give the config that made them"
    )
  for path, leaf in flat.items():
    if leaf.shape != expected[path].shape:
      raise ValueError(
        f"{path} has shape {leaf.shape}, the config says"
        f" {expected[path].shape}; give the config that made the params"
      )
    if leaf.dtype.name not in DTYPES:
      raise ValueError(f"{path} is {leaf.dtype}, expected one of {DTYPES}")


def _tensor(flat, pieces, shape, target):
  """One tensor of a file on the host; its parts, if fused, in order."""
  parts = []
  for row, layer in pieces:
    leaf, dtype = flat[row.path], target[row.path]
    order = np.argsort(row.to_parameter())
    if isinstance(leaf, jax.Array):
      value = _take(leaf, layer, dtype=dtype).transpose(order)
    else:  # a stack on the host must not travel to a device for one layer
      value = leaf if layer is None else leaf[layer]
      value = value.astype(dtype).transpose(order)
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
      value = multihost_utils.process_allgather(value, tiled=True)
    parts.append(np.asarray(value).reshape(-1, *shape[1:]))
  whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
  return np.ascontiguousarray(whole)


@functools.partial(jax.jit, static_argnames="dtype")
def _take(leaf, layer, *, dtype):
  """One layer; None: the whole parameter."""
  return (leaf if layer is None else leaf[layer]).astype(dtype)


def _shards(sizes, max_shard_bytes):
  """File name -> the tensors it holds, filled in order."""
  groups, filled = [[]], 0
  for name in sorted(sizes, key=_by_number):
    if groups[-1] and filled + sizes[name] > max_shard_bytes:
      groups.append([])
      filled = 0
    groups[-1].append(name)
    filled += sizes[name]
  if len(groups) == 1:
    return {SINGLE: groups[0]}
  return {
    f"model-{i:05d}-of-{len(groups):05d}.safetensors": names
    for i, names in enumerate(groups, 1)
  }


def _by_number(name):
  return [
    (int(part), "") if part.isdigit() else (-1, part)
    for part in name.split(".")
  ]


def check_target(directory: str | pathlib.Path, needed: int = 0) -> None:
  """Can the first process write so much there? All processes learn it.

  Args:
    directory: as in `save_hf`.
    needed: bytes.

  Raises:
    ValueError: it is not empty, or the disk is too full.
  """
  directory = pathlib.Path(directory)
  problem = ""
  if jax.process_index() == 0:
    if directory.exists() and (
      not directory.is_dir() or any(directory.iterdir())
    ):
      problem = (
        f"{str(directory)!r} exists and is not empty; name a new directory"
        " (--workdir) or remove it"
      )
    else:
      directory.parent.mkdir(parents=True, exist_ok=True)
      free = shutil.disk_usage(directory.parent).free
      if needed > free:
        problem = _no_space(directory, needed, free)
  if jax.process_count() > 1:  # else the others would wait for it for ever
    failed = multihost_utils.broadcast_one_to_all(np.int32(bool(problem)))
    if failed and not problem:
      problem = (
        f"the first process cannot write {str(directory)!r}; see its log"
      )
  if problem:
    raise ValueError(problem)


def _write(directory, shards, sizes, texts, tensors, clock, needed):
  """Writes beside the directory, then renames."""
  partial = directory.with_name(directory.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  try:
    for file, names in shards.items():
      safetensors.numpy.save_file(
        tensors(names), partial / file, metadata={"format": "pt"}
      )
      clock.add(sum(sizes[name] for name in names))
    for name, text in texts.items():
      disk.write(partial / name, text)
    disk.replace(partial, directory)
  except (OSError, safetensors.SafetensorError) as error:
    free = shutil.disk_usage(directory.parent).free
    shutil.rmtree(partial, ignore_errors=True)
    full = getattr(error, "errno", None) == errno.ENOSPC
    if full or f"os error {errno.ENOSPC}" in str(error):
      raise ValueError(_no_space(directory, needed, free)) from error
    raise
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _no_space(directory, needed, free):
  return (
    f"no space left for {str(directory)!r}: it takes {needed / 1e9:.3g} GB,"
    f" {free / 1e9:.3g} GB are free; free some or name a directory elsewhere"
  )


def _json(value: Any) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(
    "utf-8"
  )


def _texts(config, dtype, folder, settings) -> dict[str, bytes]:
  """File name -> content of everything but the weights."""
  texts = {}
  if folder is not None:
    folder = pathlib.Path(folder)
    opened = prompts.load_tokenizer(folder)
    config = _with_ids(config, opened)
    for name in _TOKENIZER_FILES:
      if (folder / name).is_file():
        texts[name] = (folder / name).read_bytes()
    # Old and new places: before 4.50 only the first was read.
    texts["chat_template.json"] = _json({"chat_template": opened.chat_template})
    texts["chat_template.jinja"] = opened.chat_template.encode("utf-8")
  found = {}
  if settings is not None:
    for media in ("image", "video"):
      there = vision_input.find_preprocessor(settings, media)
      if there is not None:
        _, found[media] = there
    generated = pathlib.Path(settings) / "generation_config.json"
    if generated.is_file():
      found["generation"] = json_file.read_object(generated)
  ids = ("bos_token_id", "eos_token_id", "pad_token_id")
  generation = {
    key: getattr(config, key) for key in ids if getattr(config, key) is not None
  }
  cut = {
    "patch_size": config.vision.patch_size,
    "temporal_patch_size": config.vision.temporal_patch_size,
    "merge_size": config.vision.spatial_merge_size,
  }
  image = found.get("image", _PREPROCESSOR)
  # transformers falls back to the image's settings where there are none.
  video = found.get("video", image)
  processor = {"processor_class": "Qwen2_5_VLProcessor"}
  return texts | {
    "config.json": _json(hf_config.to_hf(config, dtype=dtype)),
    "generation_config.json": _json(found.get("generation", generation)),
    # The published name; 5.2 does not know the class that some copies name.
    "preprocessor_config.json": _json(
      image
      | cut
      | processor
      | {"image_processor_type": _PREPROCESSOR["image_processor_type"]}
    ),
    "video_preprocessor_config.json": _json(
      video
      | cut
      | processor
      | {"video_processor_type": "Qwen2VLVideoProcessor"}
    ),
  }


def _with_ids(config, tokenizer):
  """The config with the tokenizer's ids where it has none."""
  missing = {
    field: token_id
    for field, token_id in tokenizer.config_ids.items()
    if getattr(config, field) is None
  }
  config = dataclasses.replace(config, **missing)
  check_tokenizer(config, tokenizer)
  return config


def check_tokenizer(config: VLMConfig, tokenizer: prompts.Tokenizer) -> None:
  """Raises a ValueError where a model and a tokenizer are not made for another.

  They must agree on the ids that prompts spell, and every id needs an
  embedding.
  """
  for field in prompts.SPELLED_FIELDS:
    own, other = getattr(config, field), tokenizer.config_ids[field]
    if own != other:
      raise ValueError(
        f"{field} is {own} in the model's config, {other}"
        f" ({prompts.ID_FIELDS[field]}) in {tokenizer.folder}; give the"
        " tokenizer that the model was trained with (config.tokenizer)"
      )
  tokenizer.banned_mask(config.vocab_size)  # raises on too small a table
