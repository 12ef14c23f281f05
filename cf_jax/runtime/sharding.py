"""The mesh and the one table that says how every parameter is sharded.

Mesh axes: `data` (batch only), `fsdp` (batch, and parameters split along it),
`tensor` (heads and mlp width), `context` (slots of a prompt). The table is read
top to bottom, the first pattern that matches a parameter's path wins, and a
parameter that none matches is an error. Optimizer moments have their
parameter's path as a suffix, so the same table serves them.

A dimension that its axes do not divide is whole on each of their devices: key
and value heads where `tensor` is larger than their number, narrow widths of
the vision tower. Query heads are refused instead (`check_model`): all of
attention would be computed by every device of the axis.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor", "context")
_ROWS = ("data", "fsdp")
BATCH = P(_ROWS)

# Regex on the parameter path -> spec; layer stacks have L first, never split.
PARTITION_RULES = (
  (r"(embed|head)/embedding$", P("tensor", "fsdp")),  # [V, D]
  (r"/layers/(query|key|value)/kernel$", P(None, "fsdp", "tensor")),
  (r"/layers/(query|key|value)/bias$", P(None, "tensor")),
  (r"/layers/out/kernel$", P(None, "tensor", None, "fsdp")),  # [L, N, H, D]
  (r"/mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),  # [L, D, F]
  (r"/mlp/(gate|up)/bias$", P(None, "tensor")),
  (r"/mlp/down/kernel$", P(None, "tensor", "fsdp")),  # [L, F, D]
  (r"merger/up/kernel$", P("fsdp", "tensor")),
  (r"merger/down/kernel$", P("tensor", "fsdp")),
  (r"patch_embed/proj/kernel$", P(None, "fsdp")),
  # Adapters are split along their kernel's axes, never along the rank.
  (r"/layers/(out|mlp/down)/lora_a$", P(None, "tensor")),
  (r"/layers/(out|mlp/down)/lora_b$", P(None, None, "fsdp")),
  (r"/layers/.*/lora_a$", P(None, "fsdp")),
  (r"/layers/.*/lora_b$", P(None, None, "tensor")),
  (r"/lora_[ab]$", P()),  # of the patch embedding and the merger
  (r"(scale|bias)$", P()),
)
# What a TrainState holds beside parameters and their moments.
STATE_RULES = (*PARTITION_RULES, (r"(^|/)(rng|step|count)$", P()))
# What decoding holds: a prompt's cache is split over its slots too, and every
# other array over the batch alone.
DECODING_RULES = (
  (r"prefix_cache/(key|value)/\d+$", P(_ROWS, "tensor", "context")),  # B M S H
  (r"^cache/(key|value)/\d+$", P(_ROWS, None, "tensor")),  # [B, G, M, C, H]
  (r"^prefix_mask$", BATCH),
  (r"^(token|logprob|mask|done|last|position|key)$", BATCH),
)
# The copy of the decoder that decoding reads, layers apart, see
# `decoding_mesh`: a kernel's axes less L, and whole where it would lie over
# `fsdp`. A "table" is a kernel turned, see `layers.turn`.
COPY_RULES = (
  (r"(embed|head)/embedding$", P("tensor")),  # [V, D]
  (r"/layers/\d+/(query|key|value|mlp/gate|mlp/up)/kernel$", P(None, "tensor")),
  (r"/layers/\d+/(query|key|value|mlp/gate|mlp/up)/table$", P("tensor")),
  (r"/layers/\d+/(query|key|value|mlp/gate|mlp/up)/bias$", P("tensor")),
  (r"/layers/\d+/(out|mlp/down)/(kernel|lora_a)$", P("tensor")),
  (r"/layers/\d+/(out|mlp/down)/table$", P(None, "tensor")),
  (r"/layers/\d+/(out|mlp/down)/lora_b$", P()),
  (r"/layers/\d+/.*/lora_b$", P(None, "tensor")),
  (r"(scale|bias|lora_a)$", P()),
)


def path_of(key_path: tuple) -> str:
  """A leaf's path in words: `decoder/layers/query/kernel`."""
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def make_mesh(
  *,
  data: int,
  fsdp: int,
  tensor: int,
  context: int,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """The device mesh; one size of -1 takes the devices that the others leave.

  Of several TPU slices, `data` goes over them first: it is the axis with the
  least traffic.

  Args:
    data: devices along this axis, as along the three that follow.
    fsdp: see the module.
    tensor: see the module.
    context: see the module.
    devices: None: all of this run; others where a program is only compiled.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or `data`
      does not divide over slices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  sizes = [data, fsdp, tensor, context]
  if sizes.count(-1) == 1:
    sizes[sizes.index(-1)] = count // max(-math.prod(sizes), 1)
  if math.prod(sizes) != count or min(sizes) < 1:
    raise ValueError(
      f"mesh {dict(zip(AXES, sizes, strict=True))} needs"
      f" {math.prod(sizes)} devices, got {count}; change config.mesh"
    )
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    try:
      return jax.make_mesh(tuple(sizes), AXES, axis_types=auto, devices=devices)
    except NotImplementedError:  # an axis of the torus has to be divided
      arranged = mesh_utils.create_device_mesh(
        sizes, devices, allow_split_physical_axes=True
      )
      return Mesh(arranged, AXES, axis_types=auto)
  if sizes[0] % slices:
    raise ValueError(
      f"config.mesh.data must be a multiple of the {slices} slices, got"
      f" {sizes[0]}"
    )
  arranged = mesh_utils.create_hybrid_device_mesh(
    (sizes[0] // slices, *sizes[1:]),
    (slices, 1, 1, 1),
    devices,
    allow_split_physical_axes=True,
  )
  return Mesh(arranged, AXES, axis_types=auto)


def decoding_mesh(mesh: Mesh, num_kv_heads: int) -> Mesh:
  """The same devices for decoding: a part of `fsdp` is given to `tensor`.

  A token takes every weight. Split over `fsdp` they would all come over the
  links for each token, which takes many times the rest of an update. Instead
  as many neighbours along `fsdp` as there are key heads for share a copy, each
  its own heads, and the copies share the rows.

  Args:
    mesh: the run's.
    num_kv_heads: of the model.
  """
  data, fsdp, tensor, context = (mesh.shape[name] for name in AXES)
  if num_kv_heads % tensor:
    return mesh
  share = math.gcd(fsdp, num_kv_heads // tensor)
  if share == 1:
    return mesh
  devices = mesh.devices.reshape(data, fsdp // share, share * tensor, context)
  return Mesh(devices, AXES, axis_types=mesh.axis_types)


def spec_for(path: str, shape: tuple[int, ...], rules: tuple) -> P:
  """The first rule's spec for a parameter path.

  Raises:
    ValueError: no rule matches.
  """
  if not shape:
    return P()
  for pattern, spec in rules:
    if re.search(pattern, path):
      return spec
  raise ValueError(
    f"no partition rule matches parameter {path!r} of shape {shape}; add a"
    " row to PARTITION_RULES in cf_jax/runtime/sharding.py"
  )


def _fit(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
  """The spec, less the axes that do not divide their dimension."""
  fitted = []
  for size, axis in zip(shape, spec, strict=False):
    names = (axis,) if isinstance(axis, str) else (axis or ())
    parts = math.prod(mesh.shape[name] for name in names)
    fitted.append(axis if size % parts == 0 else None)
  return P(*fitted)


def tree_shardings(tree: Any, mesh: Mesh, rules: tuple) -> Any:
  """NamedShardings for a tree of parameters (or optimizer state, or caches).

  A dimension that its mesh axes do not divide is left whole.
  """

  def shard(key_path, leaf):
    spec = spec_for(path_of(key_path), leaf.shape, rules)
    return NamedSharding(mesh, _fit(spec, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(shard, tree)


def left_whole(tree: Any, mesh: Mesh, rules: tuple) -> dict[str, str]:
  """Paths of what a rule would split and the mesh does not divide.

  Returns:
    Path -> the size and the axis, as "4 heads" of a mesh whose tensor is 8:
    {"decoder/layers/key/kernel": "4 over tensor"}.
  """
  found = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    path = path_of(key_path)
    spec = spec_for(path, leaf.shape, rules)
    fitted = _fit(spec, leaf.shape, mesh)
    for size, axis, kept in zip(leaf.shape, spec, fitted, strict=False):
      if axis != kept:
        found[path] = f"{size} over {axis}"
  return found


def check_model(model: Any, mesh: Mesh) -> None:
  """Raises a ValueError where a mesh cannot share a model's heads.

  Args:
    model: `VLMConfig`.
    mesh: the run's.
  """
  parts = mesh.shape["tensor"]
  heads = {
    "num_attention_heads": model.num_attention_heads,
    "vision.num_heads": model.vision.num_heads,
  }
  for name, number in heads.items():
    if number % parts:
      common = math.gcd(*heads.values())
      fit = [n for n in range(1, common + 1) if common % n == 0]
      raise ValueError(
        f"config.mesh.tensor={parts} does not divide the {number} heads of"
        f" {name}: each device would compute all of them; set it to one of"
        f" {fit}, which divide all of {heads}, and give the other devices to"
        " config.mesh.fsdp"
      )


def constrain(tree: Any, mesh: Mesh, rules: tuple) -> Any:
  """Within a jitted function: `tree` lies as the rules say.

  On one device there is nothing to say, and nothing is.
  """
  if mesh.size == 1:
    return tree
  return jax.lax.with_sharding_constraint(
    tree, tree_shardings(tree, mesh, rules)
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over `data` and `fsdp`."""
  return NamedSharding(mesh, BATCH)


def check_batch(
  rows: int, mesh: Mesh, *, micro_batches: int, setting: str
) -> None:
  """Raises a ValueError where a batch does not divide into equal parts.

  Args:
    rows: of the batch, those of all processes together.
    mesh: its batch axes take equal shares of every part.
    micro_batches: parts.
    setting: names the batch size in the message.
  """
  devices = mesh.shape["data"] * mesh.shape["fsdp"]
  if micro_batches < 1 or rows % (devices * micro_batches):
    stage = setting.rpartition(".")[0]
    raise ValueError(
      f"a batch of {rows} does not divide into {micro_batches} micro-batches"
      f" over data x fsdp = {devices} devices; change {setting},"
      f" {stage}.micro_batches or config.mesh"
    )


def split_batch(tree: Any, mesh: Mesh, parts: int) -> Any:
  """[rows, ...] -> [parts, rows / parts, ...], within a jitted function.

  Every device's rows are divided, not the devices: a part lies on all of them,
  and nothing is moved.
  """
  devices = mesh.shape["data"] * mesh.shape["fsdp"]
  target = NamedSharding(mesh, P(None, *BATCH))

  def split(leaf):
    rows = leaf.shape[0]
    assert rows % (devices * parts) == 0, "see check_batch"
    leaf = leaf.reshape(
      devices, parts, rows // (devices * parts), *leaf.shape[1:]
    )
    leaf = leaf.swapaxes(0, 1).reshape(parts, rows // parts, *leaf.shape[3:])
    return jax.lax.with_sharding_constraint(leaf, target)

  return jax.tree.map(split, tree)


@functools.lru_cache
def batch_share(mesh: Mesh) -> tuple[int, int]:
  """Which part of a batch's rows this process brings: (number, of how many).

  Processes whose devices share rows, along `tensor` or `context`, bring the
  same part.

  Raises:
    ValueError: the rows of the processes overlap in part.
  """
  owner = np.vectorize(lambda device: device.process_index, otypes=[int])(
    mesh.devices
  ).reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
  if (owner == owner.flat[0]).all():
    return 0, 1
  rows = {
    process: tuple(np.flatnonzero((owner == process).any(axis=1)))
    for process in np.unique(owner)
  }
  parts = sorted(set(rows.values()))
  if sum(map(len, parts)) != len(owner) or len(set(map(len, parts))) > 1:
    raise ValueError(
      f"mesh {dict(mesh.shape)} gives processes overlapping parts of a batch:"
      f" {parts}; change config.mesh so that the devices of a process divide"
      " tensor x context, or are a multiple of it"
    )
  if any(part[-1] - part[0] != len(part) - 1 for part in parts):
    raise ValueError(
      f"mesh {dict(mesh.shape)} gives a process rows of a batch that are no"
      f" block: {parts}; change config.mesh"
    )
  # A mesh of other devices (a program that is only compiled) is all "ours".
  mine = rows.get(jax.process_index(), parts[0])
  return parts.index(mine), len(parts)


def local(tree: Any) -> Any:
  """What this process has of device arrays, as numpy arrays.

  Of arrays split over the batch its rows, of what is whole everything. Others
  it does not have: lay them so first.
  """

  def fetch(leaf):
    if not isinstance(leaf, jax.Array):
      return leaf
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
      return jax.device_get(leaf)
    shards = {}
    for shard in leaf.addressable_shards:
      rest = shard.index[1:]
      assert all(part == slice(None) for part in rest), "split beyond its rows"
      shards.setdefault(shard.index[0].start or 0, shard.data)
    return np.concatenate([np.asarray(shards[at]) for at in sorted(shards)])

  if all(
    leaf.is_fully_addressable
    for leaf in jax.tree.leaves(tree)
    if isinstance(leaf, jax.Array)
  ):
    return jax.device_get(tree)  # all at once
  return jax.tree.map(fetch, tree)


def over_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """`x`, its rows where the batch's are; without a mesh, as it is.

  The parameters' places alone do not say where activations lie: left to
  itself, the compiler divides the model's width over `fsdp` and gathers the
  batch on every device.
  """
  if mesh is None or mesh.size == 1:
    return x
  if x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
    return x
  free = (P.UNCONSTRAINED,) * (x.ndim - 2)
  return jax.lax.with_sharding_constraint(
    x, NamedSharding(mesh, P(*BATCH, *free, None))
  )


def put_batch(tree: Any, mesh: Mesh) -> Any:
  """This process's rows of a batch, as global arrays split over the batch.

  Raises:
    ValueError: the batch does not divide over the mesh's batch axes.
  """
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  target = batch_sharding(mesh)
  _, shares = batch_share(mesh)

  def put(leaf):
    rows = leaf.shape[0] * shares
    if rows % parts:
      raise ValueError(
        f"a batch of {rows} does not divide over data x fsdp = {parts}"
        " devices; change the batch size or config.mesh"
      )
    return jax.make_array_from_process_local_data(
      target, leaf, (rows, *leaf.shape[1:])
    )

  return jax.tree.map(put, tree)
