"""Slices of TPUs and the seconds that collectives take there."""

import importlib.util
import subprocess
import sys
import types

import pytest

from cf_jax.runtime import chips, hlo
from tests.conftest import ROOT


def slice_of(kind, *shape, num_slices=1):
  return chips.Slice("", chips.CHIPS[kind], shape, [], num_slices)


@pytest.mark.parametrize(
  ("kind", "shape", "group", "axes"),
  [
    ("v5p", (4, 4, 4), 64, 3),  # three rings of four
    ("v5p", (4, 4, 4), 16, 2),
    ("v5p", (2, 4, 4), 32, 2.5),  # two are no ring
    ("v6e", (8, 8), 64, 1),  # a ring needs sixteen
    ("v6e", (16, 16), 256, 2),
    ("v6e", (16, 16), 4, 0.5),  # a part of an axis
  ],
)
def test_an_all_gather_fills_the_axes(kind, shape, group, axes):
  """(n - 1) / n of the array, over both directions of each axis."""
  link = {"v5p": 100e9, "v6e": 100e9}[kind]
  found = chips.transfer_s(
    hlo.Transfer("all-gather", group), 1e9, slice_of(kind, *shape)
  )
  assert found == pytest.approx(1e9 * (group - 1) / group / (2 * link * axes))


def test_an_all_reduce_goes_round_twice():
  where = slice_of("v5p", 4, 4, 4)
  once, twice = (
    chips.transfer_s(hlo.Transfer(kind, 64), 1e9, where)
    for kind in ("reduce-scatter", "all-reduce")
  )
  assert twice == 2 * once


def test_what_spans_slices_goes_over_the_slow_network():
  where = slice_of("v5p", 4, 4, 4, num_slices=2)
  inside, across = (
    chips.transfer_s(hlo.Transfer("all-reduce", group), 1e9, where)
    for group in (64, 128)
  )
  assert across > 50 * inside


def test_nothing_hidden_is_the_sum():
  where = slice_of("v5e", 4, 4)
  cost = hlo.Cost(
    flops=197e12,
    read=819e9 / 2,
    busy_s=1.2,
    transfers={hlo.Transfer("all-reduce", 16): (1, 1e9)},
  )
  found = chips.estimate(cost, where)
  assert (found.matmul_s, found.memory_s, found.chip_s) == (1.0, 0.5, 1.2)
  assert found.bound_s == 1.2
  assert found.serial_s == pytest.approx(1.2 + found.network_s)


def test_where_collectives_are_not_told_there_is_no_bound():
  cost = hlo.Cost(flops=1153.5e12, read=0.0, busy_s=1.2)
  found = chips.estimate(cost, slice_of("7x", 4, 4, 4))
  assert (found.matmul_s, found.chip_s) == (1.0, 1.2)
  assert (found.network_s, found.bound_s, found.serial_s) == (None, None, None)


@pytest.mark.parametrize(
  ("topology", "words"),
  [
    ("v5p", "CHIP:AxB"),
    ("h100:8", "CHIP:AxB"),
    ("v5p:8x8", "3 axes"),
    ("cpu:4096", "xla_force_host_platform_device_count=4096"),
  ],
)
def test_what_is_no_topology_says_so(topology, words):
  with pytest.raises(ValueError, match=words):
    chips.open_slice(topology, 1)


@pytest.mark.parametrize("num_slices", [0, -1])
def test_there_is_a_slice(num_slices):
  with pytest.raises(ValueError, match="num_slices must be 1 or more"):
    chips.open_slice("v5p:4x4x4", num_slices)


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed (pip install -e '.[plan]')",
)
def test_the_two_cores_of_a_v4_are_one_device():
  """In a process of its own, where nobody else needs the compiler."""
  source = """
from cf_jax.programs import plan
from cf_jax.runtime import chips
plan.check_compiler("v4:2x2x4")
where = chips.open_slice("v4:2x2x4", 1)
print(len(where.devices), where.num_chips, where.num_hosts)
"""
  ran = subprocess.run(
    [sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT
  )
  assert ran.returncode == 0, ran.stderr[-2000:]
  assert ran.stdout.split() == ["16", "16", "4"]


def test_bytes_of_a_device():
  whole = types.SimpleNamespace(shape=(8, 4), dtype="float32")
  assert chips.device_bytes({"a": whole, "b": None}) == 8 * 4 * 4
