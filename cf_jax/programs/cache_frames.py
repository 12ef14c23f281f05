"""Fills the frame cache: every video decoded once, before any training."""

import pathlib
import time
from collections.abc import Callable

import jax
import ml_collections
import numpy as np

from cf_jax import views
from cf_jax.data import footage, frame_cache, pipeline, records, video
from cf_jax.programs import experiment as experiment_lib
from cf_jax.runtime import telemetry

RESULT_FILE = "cache_frames.json"
FRAMES = ("shown", "scanned")


def check(config: ml_collections.ConfigDict) -> None:
  """Raises a ValueError where the settings do not fit together."""
  if config.data.frame_cache.mode != "prefer":
    raise ValueError(
      "the cache is filled in mode 'prefer', got"
      f" {config.data.frame_cache.mode!r}; leave data.frame_cache.mode as it is"
    )
  if config.fill.frames not in FRAMES:
    raise ValueError(
      f"fill.frames must be one of {', '.join(FRAMES)}, got"
      f" {config.fill.frames!r}"
    )
  if config.fill.batch_size < 1:
    raise ValueError(
      f"fill.batch_size must be positive, got {config.fill.batch_size}"
    )
  if config.fill.frames == "shown" and config.scan.descriptor != "pixels":
    raise ValueError(
      f"scan.descriptor is {config.scan.descriptor!r}: which frames are shown"
      " is known with the policy alone; set fill.frames to 'scanned'"
    )


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
  """Decodes what is not there yet.

  Args:
    config: of configs/cache_frames.py.
    workdir: gets cache_frames.json, and skipped.json where videos cannot be
      read.

  Returns:
    What cache_frames.json holds.

  Raises:
    ValueError: settings that do not fit, or the videos take more room than the
      cache has.
  """
  check(config)
  experiment_lib.check_fps(config.data.fps, config.scan.select)
  workdir.mkdir(parents=True, exist_ok=True)
  samples = experiment_lib.samples_of(config)
  wanted = {}
  for rows in samples.values():
    wanted |= {footage.of_sample(row): row for row in rows}
  mine = list(wanted.values())[jax.process_index() :: jax.process_count()]
  cache = pipeline.make_decoder(
    decode=config.data.decode,
    limits=config.data.limits,
    frame_cache=config.data.frame_cache,
    contained=config.data.source != "synthetic",
  )
  reader = pipeline.FrameReader(**config.data.reader, decoder=cache)
  choose = None
  if config.fill.frames == "shown":
    choose = views.make_selector(**config.scan, encode=None, **config.tad)
  telemetry.startup_table(
    config.name,
    {
      "videos": f"{len(mine)} of {len(wanted)}",
      "frames": f"{config.data.loader.scan_frames} scanned at"
      f" {tuple(config.data.loader.scan_size_px)} px, those that are"
      f" {config.fill.frames} at {tuple(config.data.reader.size_px)} px",
      "cache": f"{config.data.frame_cache.folder}, at most"
      f" {config.data.frame_cache.max_gib:g} GiB",
    },
  )
  skipped, begin, begin_s = {}, time.perf_counter(), time.time()
  size = min(config.fill.batch_size, max(len(mine), 1))
  with telemetry.progress("cache frames", len(mine), unit="video") as bar:
    for start in range(0, len(mine), size):
      rows = mine[start : start + size]
      lost = _fill(config, rows, size, cache, reader, choose)
      experiment_lib.list_skipped(workdir, lost)
      skipped |= lost
      if cache.evicted_used_s >= begin_s:
        raise ValueError(
          f"the frames of {start} of {len(mine)} videos fill the cache, and the"
          " next ones push them out; raise data.frame_cache.max_gib, now"
          f" {config.data.frame_cache.max_gib:g}"
        )
      bar.advance(len(rows))
  cache.close()
  told = dict(
    videos=len(mine),
    skipped=len(skipped),
    read=cache.hits,
    decoded=cache.misses,
    damaged=cache.remade,
    seconds=time.perf_counter() - begin,
  )
  process = jax.process_index()
  name = f"cache_frames_{process}.json" if process else RESULT_FILE
  telemetry.write_json(workdir / name, told)
  telemetry.startup_table(
    "",
    {
      "there": f"{len(mine) - len(skipped)} videos, {len(skipped)} skipped"
      + (f" ({workdir}/skipped.json)" if skipped else ""),
      "requests": f"{cache.misses} decoded, {cache.hits} were there",
      "seconds": f"{told['seconds']:.1f}",
    },
  )
  return told


def _fill(
  config: ml_collections.ConfigDict,
  rows: list[records.Sample],
  batch_size: int,
  cache: frame_cache.FrameCache,
  reader: pipeline.FrameReader,
  choose: Callable | None,
) -> dict[str, str]:
  """Reads the frames of some videos; path -> reason where that fails."""
  settings = config.data.loader
  batch, skipped = pipeline.collate_readable(
    rows,
    np.arange(len(rows)),
    batch_size=batch_size,
    scan_frames=settings.scan_frames,
    scan_size_px=settings.scan_size_px,
    decoder=cache,
  )
  if batch is None:
    return skipped
  if choose is None:
    scanned = np.broadcast_to(
      np.arange(settings.scan_frames), batch.scan_mask.shape
    )
    mask = batch.scan_mask
  else:
    among = views.selectable(
      batch,
      reader,
      config.data.fps,
      most=config.tad.num_keyframes,
      multiple=config.fill.frames_per_slice,
    )
    keyframes, uniform = views.frames_of_boxes(
      batch.samples,
      batch.scan_mask,
      *jax.device_get(choose(batch.scan, among)),
    )
    scanned = np.concatenate([keyframes.index, uniform], axis=1)
    mask = np.concatenate(
      [keyframes.mask, uniform < settings.scan_frames], axis=1
    )
  safe = np.where(mask, scanned, 0)  # as a view reads them
  index = np.take_along_axis(batch.frame_index, safe, axis=1)
  left = [
    n for n, row in enumerate(batch.samples) if row not in batch.samples[:n]
  ]
  while left:
    try:
      for n in left:  # prompts are measured by the longest of some videos
        cache.probe(footage.of_sample(batch.samples[n]))
      reader.read([batch.samples[n] for n in left], index[left])
      return skipped
    except video.VideoError as error:
      skipped[error.path] = str(error)
      left = [n for n in left if batch.samples[n].video != error.path]
  return skipped
