"""Every system's recipe from its cold start to its report, one update each.

KF-GRPO's is in test_train.py, captions with a judge in test_judged.py, ViaRL's
in test_amplify.py, the selection of data in test_select_data.py.
"""

import json

import numpy as np
import pytest

from cf_jax.programs import train
from cf_jax.runtime import telemetry
from tests.conftest import load_config, shrink

# Config and variant -> rewards that its rows have.
RECIPES = {
  ("video_r1", "paper,smoke"): {"accuracy", "format"},
  ("video_r1", "zero,smoke"): {"accuracy", "format"},
  ("videochat_r1", "joint,smoke"): {"accuracy", "iou", "format"},
  ("videochat_r1", "tracking,smoke"): {"iou", "format"},
  ("temporal_r1", "smoke"): {"accuracy", "iou", "format"},
  ("tspo", "smoke"): {"accuracy", "format"},
}


@pytest.mark.parametrize(("name", "variant"), RECIPES)
def test_a_recipe_runs_to_its_end(cache_dir, tmp_path, name, variant):
  whole = load_config(f"configs/{name}.py", variant)
  config = shrink(load_config(f"configs/{name}.py", variant), cache_dir)
  config.sampling.max_tokens = whole.sampling.max_tokens
  config.prompt.max_tokens = whole.prompt.max_tokens
  config.sft.update(
    max_steps=min(1, whole.sft.max_steps), eval_every=1, checkpoint_every=1
  )
  config.rl.update(steps=1, checkpoint_every=1)
  config.evaluation.arms = ("keyframes",)
  config.report.num_film_strips = 0
  if "tracking" in variant:
    config.tad.num_keyframes = whole.tad.num_keyframes  # one for each box
  train.run(config.lock(), tmp_path)

  rows = telemetry.read_rows(tmp_path / telemetry.METRICS_FILE)
  stages = [row["stage"] for row in rows]
  assert stages == ["sft"] * config.sft.max_steps + ["rl"]
  earned = {f"reward/{name}" for name in RECIPES[name, variant]}
  missing = earned - rows[-1].keys()
  # Four prompts of three tasks: a batch may lack a component, never format.
  assert missing <= {"reward/iou", "reward/accuracy"} and missing != earned
  assert all(np.isfinite(v) for v in rows[-1].values() if isinstance(v, float))
  results = json.loads((tmp_path / "results.json").read_text("utf-8"))
  tasks = {row["task"] for row in results["evaluations"]}
  assert tasks == {*config.data.synthetic.tasks, "all"}
  assert config.name in (tmp_path / "report.html").read_text("utf-8")
