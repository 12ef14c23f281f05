"""The planner: what it is given is what a run has, and what it says."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from cf_jax.programs import plan
from cf_jax.runtime import chips, hlo, sharding
from tests.conftest import ROOT, load_config, make_small_model

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
  with caplog.at_level("INFO"), pytest.raises(SystemExit) as stopped:
    plan.run(config, tmp_path)
  assert stopped.value.code == 1
  said = caplog.text
  assert "vision needs" in said and "would help: mesh.fsdp" in said
  found = json.loads((tmp_path / plan.RESULT_FILE).read_text())
  (row,) = found["programs"]
  assert row["largest"][0]["bytes"] > 1024
  assert 0 < row["mfu_bound"] < 1
  assert row["time"]["serial_s"] >= row["time"]["bound_s"] > 0
  # One program of an update says nothing of an update's time.
  assert "an update's time needs all of its programs" in said
  assert "update" in found["totals"]["update_lacks"]
  assert not any("hours" in name for name in found["totals"])


@pytest.mark.parametrize(
  ("target", "changes", "words"),
  [
    ("configs/nothing.py", "", "no file"),
    ("configs/ask.py", "", "'train'"),
    ("configs/common.py", "", "no get_config"),
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


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ('["^(Vision|decoder/embed)/"]', ("^(Vision|decoder/embed)/",)),
    ("('^(Vision|decoder/embed)/',)", ("^(Vision|decoder/embed)/",)),
    ("()", ()),
    ("[]", ()),
  ],
)
def test_changes_leave_text_as_it_is(monkeypatch, text, value):
  monkeypatch.chdir(ROOT)
  config = plan.read_target(SMOKE, f"rl.optim.frozen={text}")
  assert config.rl.optim.frozen == value


@pytest.mark.parametrize("value", ["true", "True"])
def test_changes_are_of_json_or_python(monkeypatch, value):
  monkeypatch.chdir(ROOT)
  config = plan.read_target(SMOKE, f"rl.mask_zero_spread={value}")
  assert config.rl.mask_zero_spread is True
  with pytest.raises(ValueError, match="no value like"):
    plan.read_target(SMOKE, "rl.steps=open('a')")


@pytest.mark.parametrize(("context", "kernel"), [(1, "splash"), (2, "xla")])
def test_attention_is_what_auto_takes_there(
  monkeypatch, tmp_path, context, kernel
):
  monkeypatch.chdir(ROOT)
  sizes = dict.fromkeys(sharding.AXES, 1) | {"context": context}
  mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), sharding.AXES)
  monkeypatch.setattr(sharding, "make_mesh", lambda **_: mesh)
  where = chips.Slice("", chips.CHIPS["v5p"], (1, 1, 1), [], 1)
  target = plan.read_target(SMOKE, "prompt.max_tokens=116")
  found = plan.describe(target, "", where, tmp_path).model.attention
  assert found == kernel
  target = plan.read_target(SMOKE, "prompt.max_tokens=117")
  if context > 1:  # as a run itself refuses it
    with pytest.raises(ValueError, match="set it to 118"):
      plan.describe(target, "", where, tmp_path)


def test_a_program_that_is_not_there_is_named(monkeypatch, tmp_path):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(plan, "_measure", None)  # nothing is compiled
  with pytest.raises(ValueError, match=r"no \['updat'\]; it has .*'update'"):
    plan.plan(settings(programs="vision updat"), tmp_path)
  assert not (tmp_path / plan.RESULT_FILE).exists()


def test_programs_are_those_that_are_told(monkeypatch, tmp_path):
  monkeypatch.chdir(ROOT)
  target = plan.read_target(SMOKE, "")
  where = chips.open_slice("cpu:1", 1)
  experiment = plan.describe(target, "", where, tmp_path)
  stream = plan.programs(experiment, plan.Shapes(experiment))
  found, made = {}, None
  while True:
    try:
      program = stream.send(made)
    except StopIteration:
      break
    found[program.name], made = program.a_step, None
    if program.passes_on:
      traced = program.step.trace(*program.args, **program.static)
      made = plan._guessed(traced.out_info, experiment)
  assert found == plan.calls_of(target)
  assert found["update"] == 1 and found["evaluate: decode"] == 0


def test_caches_are_divided_by_rows_heads_and_slots():
  """2 layers of 2 heads of 8 numbers, keys and values, in float32."""
  model = make_small_model()
  layers, heads = model.num_hidden_layers, model.num_key_value_heads
  width = 2 * layers * heads * model.head_dim * np.dtype(model.dtype).itemsize

  def size(**sizes):
    whole = dict.fromkeys(sharding.AXES, 1) | sizes
    mesh = jax.sharding.AbstractMesh(tuple(whole.values()), sharding.AXES)
    return plan.cache_bytes(model, mesh, rows=4, group=3, prompt=16, length=5)

  assert size() == 4 * (16 + 3 * 5) * width
  assert size(data=2, fsdp=2) == (16 + 3 * 5) * width
  assert size(tensor=heads) == 4 * (16 + 3 * 5) * width // heads
  # A completion is whole on the devices of the axis.
  assert size(context=4) == 4 * (4 + 3 * 5) * width


def test_help_for_a_model_without_the_setting(monkeypatch):
  monkeypatch.chdir(ROOT)
  target = plan.read_target(SMOKE, "")
  assert "remat" not in target.model
  row = dict(program="update", peak_bytes=100.0)
  row |= dict(arguments_bytes=50, beside_bytes=0)
  said = plan.helpful(row, target, 1)
  assert any("model.remat=full (in the config's file" in each for each in said)
  assert plan.helpful(row | {"peak_bytes": None}, target, 1)
  assert plan.helpful(row | {"refused_for": "vmem"}, target, 1) == []


def test_what_the_compiler_refuses_is_no_infinity():
  """Its figure has the arguments in it; what it does not say is None."""
  said = hlo.refusal(
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required"
    " for HLO temporaries (17.39G) exceeds available HBM (15.75G)."
  )
  row = plan._refused(said, 5 << 30, 2 << 30)
  assert row["peak_bytes"] == pytest.approx(19.39 * 2**30)
  assert row["memory"]["temporary"] == pytest.approx(12.39 * 2**30)
  unknown = plan._refused(hlo.refusal("RESOURCE_EXHAUSTED: no"), 5, 2)
  assert unknown["peak_bytes"] is None and not unknown["fits"]
  rows = [row | {"program": "update"}, unknown | {"program": "decode"}]
  where = chips.Slice("", chips.CHIPS["v5e"], (4, 4), [], 1)
  calls = {"decode": 1, "update": 1}
  found = plan.totals({"programs": rows}, where, calls)
  assert not found["fits"] and found["peak_in"] == "update"
  found = plan.totals({"programs": rows[1:]}, where, calls)
  assert found["peak_bytes"] is None and found["peak_in"] is None


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
  where = chips.Slice("", chips.CHIPS["v5p"], (4, 4, 4), [], 1)
  assert "splash in the vision tower" in plan.not_counted(where, 0, 2)[0]


def test_totals_without_a_bound_have_none():
  row = {"program": "update", "peak_bytes": 1, "fits": True}
  row |= {"calls_per_update": 1, "time": {"bound_s": None, "serial_s": None}}
  where = chips.Slice("", chips.CHIPS["7x"], (4, 4, 4), [], 1)
  found = plan.totals({"programs": [row]}, where, {"update": 1})
  assert found.keys() == {"fits", "peak_bytes", "peak_in", "update_lacks"}


def test_an_update_is_the_sum_of_all_its_programs():
  where = chips.Slice("", chips.CHIPS["v5e"], (4, 4), [], 1)
  calls = {"decode": 1, "update": 2, "evaluate: decode": 0}
  rows = [
    {
      "program": name,
      "peak_bytes": 1,
      "fits": True,
      "time": {"bound_s": 1.0, "serial_s": 3.0},
    }
    for name in calls
  ]
  found = plan.totals({"programs": rows}, where, calls)
  assert (found["update_bound_s"], found["update_serial_s"]) == (3.0, 9.0)
  assert found["chip_hours_per_1000_updates"] == 16 * 9.0 * 1000 / 3600
  assert found["update_lacks"] == []
  found = plan.totals({"programs": rows[:1]}, where, calls)
  assert found["update_lacks"] == ["update"] and "update_bound_s" not in found


def test_collectives_are_summed_by_kind():
  row = {
    "collectives": [
      {"kind": "all-gather", "group": 4, "count": 2, "bytes": 1e9},
      {"kind": "all-gather", "group": 8, "count": 3, "bytes": 2e9},
      {"kind": "all-reduce", "group": 8, "count": 1, "bytes": 4e9},
    ]
  }
  assert plan._sent(row) == "all-reduce 4 GB in 1, all-gather 3 GB in 5"
  assert plan._sent({}) == ""


def test_programs_are_named_by_words_or_by_lines():
  assert plan.named("update  decode") == ["update", "decode"]
  assert plan.named("evaluate: decode; update") == [
    "evaluate: decode",
    "update",
  ]
  assert plan.named("") == []
