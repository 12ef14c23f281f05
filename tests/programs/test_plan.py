"""The planner: what it is given is what a run has, and what it says."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from cf_jax.programs import plan
from cf_jax.runtime import chips
from tests.conftest import ROOT, load_config

SMOKE = "configs/kfgrpo_cpu.py:smoke"


def settings(**changes):
  config = load_config("configs/plan.py")
  config.update(target=SMOKE, topology="cpu:1", **changes)
  config.lock()
  return config


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
  """The encoder of the smoke run; 'in_root' because configs/ lies there."""
  folder = tmp_path_factory.mktemp("plan")
  before = pathlib.Path.cwd()
  os.chdir(ROOT)
  try:
    return plan.plan(settings(programs="vision"), folder), folder
  finally:
    os.chdir(before)


def test_parameters_and_moments_by_hand(planned):
  """Adam has two numbers for each parameter, the reference one, in float32."""
  found, _ = planned
  held = found["per_device_bytes"]
  count = held["parameters"] // 4
  assert 0.9e6 < count < 1.4e6
  assert held["reference"] == 4 * count
  # And a count of updates, beside its step and key.
  assert 0 < held["optimizer"] - 8 * count < 64
  # 4 layers, 2 heads of 32 numbers, keys and values; prompts of 116 slots and
  # 4 completions of 10 for each of 4 prompts.
  assert held["cache"] == 2 * 4 * 2 * 32 * 4 * (116 + 4 * 10) * 4


def test_operations_of_the_encoder_by_hand(planned):
  """Its matmuls; attention within windows of one visual token and, in the
  second block, of the whole slice."""
  found, _ = planned
  (row,) = found["programs"]
  frames, patches, width = 4 * 16, 16, 64  # 4 videos of 8 + 8 frames
  block = 4 * width**2 + 3 * width * 192
  wanted = patches * 1176 * width + 2 * patches * block
  wanted += 4 * ((4 * width) ** 2 + 4 * width * 128)  # the merger
  pairs = 2 * patches**2 * width
  wanted += 2 * pairs  # of the costlier branch, in both blocks
  assert row["flops"] == pytest.approx(2 * frames * wanted, rel=0.02)
  assert row["fits"] and row["memory"]["peak"] > row["memory"]["arguments"]


def test_a_second_call_compiles_nothing_anew(planned, monkeypatch):
  found, folder = planned
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(plan, "_measure", None)
  again = plan.plan(settings(programs="vision"), folder)
  assert (
    again["programs"]
    == json.loads((folder / plan.RESULT_FILE).read_text())["programs"]
  )
  with pytest.raises(ValueError, match="other settings"):
    plan.plan(settings(programs="vision", changes="seed=1"), folder)


def test_what_does_not_fit_is_named(monkeypatch, tmp_path, caplog):
  """A chip with a kilobyte of memory: exit code 1 and what would help."""
  chip = chips.CHIPS["v5e"]._replace(hbm_bytes=1024.0)
  where = chips.Slice("small:1", chip, (1, 1), jax.devices()[:1], 1)
  monkeypatch.setattr(chips, "open_slice", lambda *_: where)
  monkeypatch.chdir(ROOT)
  # The other attention is of TPUs alone.
  config = settings(programs="vision", changes="model.scan_unroll=2")
  monkeypatch.setattr(
    plan,
    "describe",
    lambda *args, made=plan.describe: made(
      *args[:2], where._replace(chip=None), args[3]
    ),
  )
  with caplog.at_level("ERROR"), pytest.raises(SystemExit) as stopped:
    plan.run(config, tmp_path)
  assert stopped.value.code == 1
  said = caplog.text
  assert "vision needs" in said and "would help: mesh.fsdp" in said
  found = json.loads((tmp_path / plan.RESULT_FILE).read_text())
  (row,) = found["programs"]
  assert row["largest"][0]["bytes"] > 1024
  assert 0 < row["mfu_bound"] < 1
  assert row["time"]["serial_s"] >= row["time"]["bound_s"] > 0
  assert math.isclose(
    found["totals"]["chip_hours_per_1000_updates"],
    row["time"]["serial_s"] * 1000 / 3600,
  )


@pytest.mark.parametrize(
  ("target", "changes", "words"),
  [
    ("configs/nothing.py", "", "no file"),
    ("configs/ask.py", "", "'train'"),
    (SMOKE, "rl.steeps=3", "'rl.steeps' is no setting"),
    (SMOKE, "rl.steps", "VALUE"),
    (SMOKE, "rl.steps=many", "no value like 4"),
  ],
)
def test_a_target_that_cannot_be_is_an_error(
  monkeypatch, target, changes, words
):
  monkeypatch.chdir(ROOT)
  with pytest.raises(ValueError, match=words):
    plan.read_target(target, changes)


def test_changes_keep_their_type(monkeypatch):
  monkeypatch.chdir(ROOT)
  config = plan.read_target(
    SMOKE,
    'mesh.tensor=2 rl.optim.frozen=["^vision/"] contrast.kind=none'
    " rl.mask_zero_spread=True",
  )
  assert config.mesh.tensor == 2 and config.rl.optim.frozen == ("^vision/",)
  assert config.contrast.kind == "none" and config.rl.mask_zero_spread is True


def test_without_the_compiler_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"'\.\[plan\]'"):
    plan.check_compiler("v5p:4x4x4")


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed (pip install -e '.[plan]')",
)
def test_a_tpu_that_is_not_there(tmp_path):
  """Two chips of a v6e, a small model: the encoder, time and memory."""
  ran = subprocess.run(
    [
      sys.executable,
      *("-m", "cf_jax.main", "--config=configs/plan.py"),
      "--config.target=configs/kfgrpo_tpu.py:smoke",
      "--config.topology=v6e:1x1",
      "--config.programs=vision",
      f"--workdir={tmp_path}",
    ],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert ran.returncode == 0, ran.stderr[-2000:]
  found = json.loads((tmp_path / plan.RESULT_FILE).read_text())
  (row,) = found["programs"]
  assert row["fits"] and 0 < row["time"]["bound_s"] < 1e-2


def test_blocks_that_splash_looks_at(monkeypatch):
  """Against the mask of every query and key, in blocks of four."""
  monkeypatch.setattr(plan, "_BLOCK", 4)
  prompt, group, length = 10, 3, 5
  total = prompt + group * length
  allowed = [
    [
      key <= query
      and (
        key < prompt
        or (query >= prompt and (query - prompt) // 5 == (key - prompt) // 5)
      )
      for key in range(total)
    ]
    for query in range(total)
  ]
  blocks = [range(first, min(first + 4, total)) for first in range(0, total, 4)]
  looked_at = sum(
    any(allowed[q][k] for q in rows for k in columns)
    for rows in blocks
    for columns in blocks
  )
  assert plan.share_of_blocks(prompt, group, length) == looked_at / 49


def test_what_a_plan_leaves_out_is_said():
  def said(kind, shape, num_slices):
    where = chips.Slice("", chips.CHIPS[kind], shape, [], num_slices)
    return plan.not_counted(where, 3 << 30)

  assert said("v5p", (4, 4, 4), 1) == []
  assert "gradients of 3.00 GiB" in said("v5e", (8, 8), 2)[0]
  assert "no bound" in said("7x", (4, 4, 4), 1)[0]


def test_totals_without_a_bound_have_none():
  row = {"program": "update", "peak_bytes": 1, "fits": True}
  row |= {"calls_per_update": 1, "time": {"bound_s": None, "serial_s": None}}
  where = chips.Slice("", chips.CHIPS["7x"], (4, 4, 4), [], 1)
  assert plan.totals({"programs": [row]}, where).keys() == {
    "fits",
    "peak_bytes",
    "peak_in",
  }


def test_programs_are_named_by_words_or_by_lines():
  assert plan.named("update  decode") == ["update", "decode"]
  assert plan.named("evaluate: decode; update") == [
    "evaluate: decode",
    "update",
  ]
  assert plan.named("") == []
