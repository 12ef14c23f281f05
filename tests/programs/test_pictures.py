"""Pictures and videos in one manifest: a step of Video-R1's recipe on both."""

import json

import jax
import numpy as np
from PIL import Image

from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import reinforce, verdicts
from cf_jax.runtime import checkpoint, telemetry
from tests.conftest import init_params, load_config, shrink


def _make_judge(experiment, make_judge=verdicts.make_judge):
  """Calls every completion right: so small a policy never is."""
  judge = make_judge(experiment)

  def read(prepared, token, mask):
    found = judge(prepared, token, mask)
    right = np.ones(token.shape[:2], np.float32)
    return found.replace(component=found.component | {"accuracy": right})

  return read


def test_one_step_on_pictures_and_videos(
  cache_dir, tmp_path, write_video, monkeypatch
):
  """Frames are paired; what cannot be shuffled earns no temporal bonus."""
  rng = np.random.default_rng(0)
  lines = []
  for n in range(4):
    frames = rng.integers(0, 255, (9, 64, 64, 3), np.uint8)
    name = f"{n}.mp4" if n % 2 else f"{n}.png"
    if n % 2:
      write_video(tmp_path / name, frames)
    else:
      Image.fromarray(frames[0]).save(tmp_path / name)
    lines.append(
      dict(
        video=name,
        question=f"Which of {n}?",
        options=["red", "blue"],
        answer="A",
        id=name,
      )
    )
  for split in ("train", "dev", "test"):
    (tmp_path / f"{split}.jsonl").write_text(
      "".join(json.dumps(line) + "\n" for line in lines)
    )
  config = shrink(load_config("configs/video_r1.py", "smoke"), cache_dir)
  config.data.source = f"jsonl:{tmp_path}"
  config.rl.steps = 1
  config.contrast.num_samples = 2
  monkeypatch.setattr(verdicts, "make_judge", _make_judge)
  collected = []
  collect = reinforce.Collector.__call__

  def remember(self, *args):
    collected.append(collect(self, *args))
    return collected[-1]

  monkeypatch.setattr(reinforce.Collector, "__call__", remember)
  experiment = experiment_lib.build(config.lock(), tmp_path / "run")
  params = init_params(experiment.model)
  store = checkpoint.Checkpoints(tmp_path / "run" / "rl", keep=1)
  with telemetry.MetricWriter(tmp_path / "run", resume={}) as writer:
    trained = reinforce.train_policy(experiment, params, writer, store)
  store.close()
  assert jax.tree.structure(trained) == jax.tree.structure(params)
  metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert np.isfinite(json.loads(metrics)["loss"])

  (batch,) = collected
  prepared = batch.prepared
  is_video = np.array(
    [sample.video.endswith(".mp4") for sample in prepared.batch.samples]
  )
  assert sorted(is_video) == [False, False, True, True]
  visual = prepared.view["keyframes"].prompt.visual
  np.testing.assert_array_equal(  # two slots of four frames, or one of one
    (visual >= 0).sum(axis=1), np.where(is_video, 4, 2)
  )
  np.testing.assert_array_equal(prepared.can_shuffle, is_video)
  bonus = np.where(is_video, np.float32(0.3), 0)
  np.testing.assert_allclose(batch.scored.bonus, np.tile(bonus, (2, 1)).T)
