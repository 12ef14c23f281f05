"""Every benchmark runs at its smallest; what it measures is not looked at.

Each in a process of its own, as flags are global. `cpu_step` (each setting in a
new process), `load_hf` (writes 2 GB), `keyframe_quality` (the real clips),
`seeds` (whole runs), `frame_cache` (real clips, minutes) and `bf16_drift`
(docs/parity.md) have no small form.
"""

import functools
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import gpu, packing
from cf_jax.models import config as model_config
from cf_jax.models import layers
from tests.conftest import ROOT


def run(name, *flags):
  """Runs a benchmark on the CPU and returns what it prints."""
  ran = subprocess.run(
    [sys.executable, "-m", f"benchmarks.{name}", *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stderr[-3000:]
  return ran.stdout


def need(package, extra):
  if importlib.util.find_spec(package) is None:
    pytest.skip(f"needs {package}: pip install cf_jax[{extra}]")


def table_rows(text):
  """Cells of every line of the Markdown tables, heads and rules left out."""
  lines = [line for line in text.splitlines() if line.startswith("|")]
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in lines
  ]
  rules = [n for n, row in enumerate(rows) if set(row[0]) <= {"-", ":"}]
  heads = {n - 1 for n in rules}
  return [row for n, row in enumerate(rows) if n not in heads | {*rules}]


def test_packing(monkeypatch):
  """In this process; it compares the losses of its forms itself."""
  monkeypatch.setattr(packing, "ROOMS", packing.ROOMS[:1])
  narrow = functools.partial(packing.peers.make_config, num_hidden_layers=1)
  monkeypatch.setattr(packing.peers, "make_config", narrow)
  made = packing.measure(count=4, frames=2, slots=64, length=8, repeats=1)
  rows = table_rows(packing.table(made))
  assert [row[0] for row in rows] == list(made["forms"])
  filled = [form["filled"] for form in made["forms"].values()]
  assert all(0 < share <= 1 for share in filled)


def test_growth(tmp_path):
  """Goes on where it was: of six points one is left."""
  out, plot = tmp_path / "growth.json", tmp_path / "growth.png"
  seconds = dict.fromkeys(("prefill", "decode", "score", "update"), 1.0)
  point = {"slots": 32, "seconds": seconds, "flops": {"update": 1e9}}
  names = ("prompt=64", "group=1", "group=2", "keyframes=1", "keyframes=2")
  done = {
    "parameters": 1,
    "base": {},
    "matmul_flops_per_s": 1e9,
    "points": dict.fromkeys(names, point),
  }
  out.write_text(json.dumps(done))
  text = run(
    "growth", "--tiny", "--repeats=1", f"--out={out}", f"--plot={plot}"
  )
  assert len(table_rows(text)) == 6 and plot.stat().st_size > 5000
  found = json.loads(out.read_text())["points"]
  assert found.keys() == {*names, "prompt=32"} and found["group=1"] == point


def test_gpu(tmp_path):
  out = tmp_path / "gpu.json"
  text = run("gpu", "--tiny", "--sizes=3b", "--repeats=1", f"--out={out}")
  assert [row[:2] for row in table_rows(text)] == [
    ["3b", phase] for phase in gpu.PHASES
  ]
  found = json.loads(out.read_text())["policies"]["3b"]
  assert found["numbers"].keys() == gpu.LIMITS.keys()
  assert all(
    0 < found["numbers"][name] < gpu.LIMITS[name] for name in gpu.LIMITS
  )
  for phase in gpu.PHASES:
    assert found[phase]["seconds"] > 0, phase


def test_gpu_times_nothing_that_is_wrong(monkeypatch):
  """Completions that see the padding of their prompt."""
  attend = layers.attend_packed

  def forgetful(query, key, value, prompt_mask, *rest, implementation, **how):
    if implementation == "auto":  # the reference names XLA's
      prompt_mask = np.ones(prompt_mask.shape, bool)
    return attend(
      query,
      key,
      value,
      prompt_mask,
      *rest,
      implementation=implementation,
      **how,
    )

  monkeypatch.setattr(layers, "attend_packed", forgetful)
  config = model_config.make(
    size="qwen2_5_vl_3b", dtype="bfloat16", param_dtype="bfloat16", remat="dots"
  )
  with pytest.raises(SystemExit, match="'auto'.*logprob is off by"):
    gpu.check_numbers(config)


def test_vocab(tmp_path):
  out = tmp_path / "vocab.json"
  small = ("--tiny", "--rounds=1", "--width=32", "--tokens=64")
  text = run("vocab", *small, f"--out={out}")
  found = json.loads(out.read_text())
  # Two programs for one number of tokens; two of four forms, timed.
  assert len(table_rows(text)) == 2 + 2 * 4
  (row,) = found["memory"]["rows"]
  assert row["words_update_bytes"] < row["plain_update_bytes"]


def test_shares(tmp_path):
  out = tmp_path / "shares.json"
  text = run("shares", "--config=configs/kfgrpo_cpu.py", f"--out={out}")
  shares = [float(row[2]) for row in table_rows(text)]
  assert len(shares) == 7 and sum(shares) == pytest.approx(100, abs=0.5)
  assert min(json.loads(out.read_text())["operations"].values()) > 0


def test_decode(tmp_path, write_video):
  frames = np.random.default_rng(0).integers(0, 255, (12, 32, 48, 3), np.uint8)
  write_video(tmp_path / "a.mp4", frames)
  out = tmp_path / "decode.json"
  run("decode", f"--videos={tmp_path}", "--tiny", f"--out={out}")
  (row,) = json.loads(out.read_text())["rows"].values()
  assert row["frames"] == 2 * 12 and row["times"] == 2


def test_damaged_videos(tmp_path, write_video):
  """Each way once; started again, it has nothing left to try."""
  frames = np.random.default_rng(0).integers(0, 255, (12, 32, 48, 3), np.uint8)
  write_video(tmp_path / "a.mp4", frames)
  out = tmp_path / "rows.jsonl"
  flags = f"--videos={tmp_path}", f"--out={out}", "--tiny"
  line = "tried 19, survived 19, lost 0"
  assert line in run("damaged_videos", *flags)
  rows = [json.loads(row) for row in out.read_text().splitlines()]
  assert len({row["damage"] for row in rows}) == 19


@pytest.mark.parametrize(
  ("name", "flags"),
  [
    ("generate", ("--rows=2", "--text=12", "--side=2", "--tokens=3")),
    ("grpo_step", ("--group=2", "--prompt=16", "--tokens=4", "--parts=2")),
  ],
)
def test_against_torch(name, flags):
  need("transformers", "parity")
  text = run(name, "--size=tiny", "--rounds=2", "--cores=1", *flags)
  assert len(table_rows(text)) > 3


def test_tad():
  need("torch", "parity")
  assert table_rows(run("tad", "--tiny", "--rounds=1", "--cores=1"))
