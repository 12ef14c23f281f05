"""The mesh and the one table that says how every parameter is sharded.

Mesh axes: `data` (batch only), `fsdp` (batch, and parameters split along it),
`tensor` (heads and mlp width), `context` (sequence). The table is read top to
bottom, the first pattern that matches a parameter's path wins, and a parameter
that none matches is an error. Optimizer moments have their parameter's path as
a suffix, so the same table serves them.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor", "context")
BATCH = P(("data", "fsdp"))

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


def path_of(key_path: tuple) -> str:
  """A leaf's path in words: `decoder/layers/query/kernel`."""
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def make_mesh(*, data: int, fsdp: int, tensor: int, context: int) -> Mesh:
  """The device mesh; one size of -1 takes the devices that the others leave.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  count = jax.device_count()
  sizes = [data, fsdp, tensor, context]
  if sizes.count(-1) == 1:
    sizes[sizes.index(-1)] = count // max(-math.prod(sizes), 1)
  if math.prod(sizes) != count or min(sizes) < 1:
    raise ValueError(
      f"mesh {dict(zip(AXES, sizes, strict=True))} needs"
      f" {math.prod(sizes)} devices, got {count}; change config.mesh"
    )
  return jax.make_mesh(
    tuple(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
  )


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


def tree_shardings(tree: Any, mesh: Mesh, rules: tuple) -> Any:
  """NamedShardings for a tree of parameters (or optimizer state).

  A dimension that its mesh axes do not divide is left whole.
  """

  def shard(key_path, leaf):
    spec = spec_for(path_of(key_path), leaf.shape, rules)
    fitted = []
    for size, axis in zip(leaf.shape, spec, strict=False):
      names = (axis,) if isinstance(axis, str) else (axis or ())
      parts = math.prod(mesh.shape[name] for name in names)
      fitted.append(axis if size % parts == 0 else None)
    return NamedSharding(mesh, P(*fitted))

  return jax.tree_util.tree_map_with_path(shard, tree)


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


def put_batch(tree: Any, mesh: Mesh) -> Any:
  """This process's rows of a batch, as global arrays split over the batch.

  Raises:
    ValueError: the batch does not divide over the mesh's batch axes.
  """
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  target = batch_sharding(mesh)

  def put(leaf):
    rows = leaf.shape[0] * jax.process_count()
    if rows % parts:
      raise ValueError(
        f"a batch of {rows} does not divide over data x fsdp = {parts}"
        " devices; change the batch size or config.mesh"
      )
    return jax.make_array_from_process_local_data(target, leaf)

  return jax.tree.map(put, tree)
