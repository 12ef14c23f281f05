"""Filling the frame cache, and training data read from it alone."""

import json

import numpy as np
import pytest

from cf_jax.data import footage, pipeline
from cf_jax.programs import cache_frames
from cf_jax.programs import experiment as experiment_lib
from tests.conftest import load_config, shrink


@pytest.fixture
def config(cache_dir, tmp_path):
  """As the small runs of other tests: the same videos."""
  small = shrink(load_config("configs/kfgrpo_cpu.py", "smoke"), cache_dir)
  made = load_config("configs/cache_frames.py", "kfgrpo_cpu,smoke")
  for name in ("data", "scan", "tad"):
    made[name] = small[name]
  made.data.frame_cache.update(mode="prefer", folder=str(tmp_path / "frames"))
  return made


def _samples(config):
  found = experiment_lib.load_samples(
    source=config.data.source,
    cache_dir=config.data.cache_dir,
    synthetic_set=dict(config.data.synthetic),
    seed=config.data.seed,
  )
  return sum(found.values(), [])


def _decoder(config, mode):
  settings = dict(config.data.frame_cache) | {"mode": mode}
  return pipeline.make_decoder(
    decode=config.data.decode,
    limits=config.data.limits,
    frame_cache=settings,
    contained=False,
  )


@pytest.mark.parametrize("frames", ["shown", "scanned"])
def test_then_nothing_is_decoded(config, tmp_path, frames):
  config.fill.update(frames=frames, batch_size=16)
  told = cache_frames.run(config, tmp_path / "run")
  samples = _samples(config)
  assert told["videos"] == len(samples) == 34 and told["skipped"] == 0
  assert told["decoded"] == 3 * 34 and told["read"] == 0
  again = cache_frames.run(config, tmp_path / "run")
  assert again["decoded"] == 0 and again["read"] == 3 * 34
  held = json.loads((tmp_path / "run" / "cache_frames.json").read_text())
  assert held["read"] == 3 * 34

  only, here = _decoder(config, "only"), _decoder(config, "off")
  how = dict(
    scan_frames=config.data.loader.scan_frames,
    scan_size_px=config.data.loader.scan_size_px,
  )
  left, right = (
    pipeline.collate(samples[:8], np.arange(8), decoder=decoder, **how)
    for decoder in (only, here)
  )
  for name in ("scan", "scan_mask", "scan_time_s", "frame_index"):
    np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
  one = footage.of_sample(samples[0])
  assert only.probe(one) == here.probe(one)
  if frames == "scanned":
    readers = [
      pipeline.FrameReader(**config.data.reader, decoder=decoder)
      for decoder in (only, here)
    ]
    found, expected = (
      reader.read(samples[:8], left.frame_index[:, ::7]) for reader in readers
    )
    np.testing.assert_array_equal(found, expected)


def test_frames_a_second(config, tmp_path):
  """What is kept is what the training shows, which then decodes nothing."""
  config.scan.select = "uniform"
  config.data.fps = 0.25
  told = cache_frames.run(config, tmp_path / "run")
  assert told["skipped"] == 0
  train = shrink(
    load_config("configs/kfgrpo_cpu.py", "smoke"), config.data.cache_dir
  )
  train.scan.select, train.data.fps = "uniform", 0.25
  train.data.frame_cache = dict(config.data.frame_cache) | {"mode": "only"}
  made = experiment_lib.build(train, tmp_path / "train")
  batch = pipeline.collate(
    made.samples["test"][:4],
    np.arange(4),
    scan_frames=config.data.loader.scan_frames,
    scan_size_px=config.data.loader.scan_size_px,
    decoder=made.decoder,
  )
  shown = made.make_views(batch, ("keyframes", "uniform"))
  assert shown.frame_mask.sum() == 4 * 2 * 2


def test_a_cache_that_is_too_small(config, tmp_path):
  config.fill.frames = "scanned"
  config.data.frame_cache.max_gib = 2**-13  # 128 KiB
  with pytest.raises(ValueError, match=r"raise data\.frame_cache\.max_gib"):
    cache_frames.run(config, tmp_path / "run")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data.frame_cache.mode": "only"}, "filled in mode 'prefer'"),
    ({"fill.frames": "all"}, r"fill\.frames must be one of"),
    ({"fill.batch_size": 0}, r"fill\.batch_size"),
    ({"scan.descriptor": "vision"}, r"fill\.frames to 'scanned'"),
  ],
)
def test_settings_that_do_not_fit(config, tmp_path, changes, message):
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    cache_frames.run(config, tmp_path / "run")
