"""TPU chips, slices of them, and the least time that a program needs there.

Peaks are those that https://docs.cloud.google.com/tpu/docs says of each chip
(v4: and arXiv 2304.01433 for its links). What is estimated from them is a
bound: nothing here was measured on a TPU.

What `estimate` assumes:

- Matmuls run at the chip's bfloat16 peak, whatever their shape and dtype.
- An instruction takes the longer of its matmuls and its traffic with main
  memory; instructions follow one another, but for copies in the background.
- All traffic over links is hidden behind that, or hides it: the longer counts.
- A collective of n devices uses as many axes of the torus as its devices fill,
  both directions of each; an axis that does not close to a ring has half. A
  ring moves (n - 1) / n of an array for an all-gather or a reduce-scatter and
  twice that for an all-reduce.
- The host, the judge and the decoding of videos cost nothing.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from cf_jax.runtime import hlo

_SETTING = "change config.topology"


class Chip(NamedTuple):
  """One device as jax shows it: a chip, of a 7x half a chip.

  Attributes:
    flops_per_s: bfloat16 peak.
    hbm_bytes: main memory that a program may use, as the compiler says when
      one does not fit; 7x: as documented.
    hbm_bytes_per_s: of main memory.
    link_bytes_per_s: of one link in one direction.
    num_axes: of the torus; each has two links.
    ring: axes of a multiple of so many chips close to a ring.
    dcn_bytes_per_s: to other slices.
    per_host: chips of a host in slices of several hosts.
    tells_collectives: whether the compiled text has them in a form that
      `hlo.count` reads.
  """

  flops_per_s: float
  hbm_bytes: float
  hbm_bytes_per_s: float
  link_bytes_per_s: float
  num_axes: int
  ring: int
  dcn_bytes_per_s: float
  per_host: int
  tells_collectives: bool = True


_GIB = 2.0**30
CHIPS = {
  "v4": Chip(275e12, 30.75 * _GIB, 1200e9, 50e9, 3, 4, 3.125e9, 4),
  "v5e": Chip(197e12, 15.75 * _GIB, 819e9, 50e9, 2, 16, 3.125e9, 4),
  "v5p": Chip(459e12, 95.74 * _GIB, 2765e9, 100e9, 3, 4, 6.25e9, 4),
  "v6e": Chip(918e12, 31.25 * _GIB, 1638e9, 100e9, 2, 16, 12.5e9, 4),
  "7x": Chip(1153.5e12, 96 * _GIB, 3690e9, 50e9, 3, 4, 6.25e9, 4, False),
}


class Slice(NamedTuple):
  """Where a program is to run.

  Attributes:
    name: as the user said it.
    chip: None for CPUs, of which no time is estimated.
    shape: chips along each axis of the torus; () for CPUs.
    devices: of jax, of all slices.
    num_slices: how many of them.
  """

  name: str
  chip: Chip | None
  shape: tuple[int, ...]
  devices: list
  num_slices: int

  @property
  def num_hosts(self) -> int:
    """Processes of a run."""
    return len({device.process_index for device in self.devices})

  @property
  def num_chips(self) -> int:
    """What is paid for."""
    return math.prod(self.shape) * self.num_slices or len(self.devices)


def open_slice(topology: str, num_slices: int) -> Slice:
  """Devices to compile for.

  Args:
    topology: "v5p:4x4x4": chips along each axis; or "cpu:8", so many devices
      of this process.
    num_slices: slices of that shape, joined by the data centre's network.

  Raises:
    ValueError: not a topology or a number of slices, no compiler for it, or
      too few CPU devices.
  """
  if num_slices < 1:
    raise ValueError(f"config.num_slices must be 1 or more, got {num_slices}")
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
  kind, shape = match.groups() if match else ("", "")
  if kind == "cpu":
    devices = jax.devices("cpu")
    if shape != str(len(devices)) or num_slices != 1:
      raise ValueError(
        f"topology {topology!r} of {num_slices} slices, but this process has"
        f" {len(devices)} CPU devices in one; {_SETTING}, or set XLA_FLAGS="
        f"--xla_force_host_platform_device_count={shape}"
      )
    return Slice(topology, None, (), devices, 1)
  if kind.removeprefix("tpu") not in CHIPS:
    raise ValueError(
      f"topology must be CHIP:AxB or CHIP:AxBxC with a chip of {list(CHIPS)},"
      f" got {topology!r}; {_SETTING}"
    )
  kind = kind.removeprefix("tpu")
  chip = CHIPS[kind]
  sizes = tuple(int(n) for n in shape.split("x"))
  if len(sizes) != chip.num_axes:
    raise ValueError(
      f"a {kind} slice has {chip.num_axes} axes, got {topology!r}; {_SETTING}"
    )
  settings = {}
  if math.prod(sizes) < chip.per_host:
    settings["chips_per_host_bounds"] = (*sizes, 1, 1)[:3]
  if kind == "v4":
    settings["chip_config_name"] = "megacore"
  if num_slices > 1:
    settings["num_slices"] = num_slices
  from jax.experimental import topologies

  try:
    described = topologies.get_topology_desc(
      platform="tpu",
      topology_name=f"{'tpu' if kind == '7x' else ''}{kind}:{shape}",
      **settings,
    )
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise ValueError(
      f"no compiler for topology {topology!r} ({str(error)[:200]}); {_SETTING}"
    ) from error
  return Slice(topology, chip, sizes, list(described.devices), num_slices)


class Time(NamedTuple):
  """Seconds on one device, see the module's assumptions.

  Attributes:
    matmul_s: all matmuls at the peak.
    memory_s: all traffic with main memory at its peak.
    chip_s: the longer of the two, instruction by instruction.
    network_s: all collectives; None where the chip's compiled text does not
      tell them, as are then the next two.
    bound_s: the longer of the last two: no run is faster.
    serial_s: their sum: nothing is hidden.
  """

  matmul_s: float
  memory_s: float
  chip_s: float
  network_s: float | None
  bound_s: float | None
  serial_s: float | None


def estimate(cost: hlo.Cost, where: Slice) -> Time:
  """Seconds of a program whose `busy_s` was counted with this chip's peaks."""
  chip = where.chip
  matmul_s = cost.flops / chip.flops_per_s
  memory_s = (cost.read + cost.written) / chip.hbm_bytes_per_s
  chip_s = max(cost.busy_s, memory_s)
  if not chip.tells_collectives:
    return Time(matmul_s, memory_s, chip_s, None, None, None)
  network_s = sum(
    transfer_s(transfer, size, where)
    for transfer, (_, size) in cost.transfers.items()
  )
  return Time(
    matmul_s,
    memory_s,
    chip_s,
    network_s,
    max(chip_s, network_s),
    chip_s + network_s,
  )


def transfer_s(transfer: hlo.Transfer, size: float, where: Slice) -> float:
  """Seconds of collectives that carry so many bytes together."""
  chip, group = where.chip, transfer.group
  if group < 2:
    return 0.0
  if transfer.kind == "collective-permute":
    return size / chip.link_bytes_per_s
  if group > math.prod(where.shape):  # it spans slices
    rate = chip.dcn_bytes_per_s
  else:
    rate = 2 * chip.link_bytes_per_s * _axes(group, where)
  share = (group - 1) / group
  if transfer.kind == "all-reduce":
    return 2 * share * size / rate
  if transfer.kind.endswith("all-to-all"):
    # Of a ring, a quarter is crossed on average.
    return size / rate * max(1, group / 4)
  return share * size / rate


def _axes(group: int, where: Slice) -> float:
  """Axes of the torus that a group fills; one that is no ring counts half."""
  filled, total = 1, 0.0
  for size in sorted(where.shape, reverse=True):
    if filled >= group or size == 1:
      break
    whole = group >= filled * size
    total += 1.0 if whole and size % where.chip.ring == 0 else 0.5
    filled *= size
  return total or 0.5


def device_bytes(tree: Any) -> int:
  """Of a tree of arrays or shapes with shardings, on the first device."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.shape
    if getattr(leaf, "sharding", None) is not None:
      shape = leaf.sharding.shard_shape(shape)
    total += math.prod(shape) * np.dtype(leaf.dtype).itemsize
  return total
