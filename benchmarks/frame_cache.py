"""The time of a step with the frame cache and without.

  python -m benchmarks.frame_cache --videos=FOLDER [--batches=6] [--rounds=2] \
    [--processes=2] [--out=FILE.json] [--tiny]

The folder's videos are copied until there are enough for all batches, each copy
with other bytes behind its frames, so that none is another one's for the cache.
A step is what follows on a batch before anything is learned: 96 frames of every
video scanned and scored, 8 keyframes and 8 uniform frames at 140 x 252 px, all
made one batch ahead (`experiment.Stream`), the vision tower and 4 rollouts of
16 tokens of each question by the tiny policy. Memory keeps nothing: every video
is met once a round. In turns:

  decode   mode "off", worker processes
  fill     mode "prefer" and an empty folder: decoded, written
  cached   mode "only"
  cold     the same, its entries dropped from the page cache before

`wait` is what of a step is spent waiting for its batch, `make` how long making
the batch took beside the steps. What bounds them: `bare`, cv2's own loop over
the same files in one thread, and `copy`, the entries' bytes read into memory.
"""

import json
import os
import pathlib
import shutil
import statistics
import struct
import tempfile
import time

import cv2
import jax
import numpy as np
from absl import app, flags, logging

from cf_jax.data import pipeline
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import policies
from cf_jax.runtime import telemetry
from configs import kfgrpo_cpu

_VIDEOS = flags.DEFINE_string("videos", None, "folder", required=True)
_BATCHES = flags.DEFINE_integer("batches", 6, "of 4 videos, a round")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "of each, in turns")
_PROCESSES = flags.DEFINE_integer("processes", 2, "that decode")
_OUT = flags.DEFINE_string("out", "", "results as JSON")
_TINY = flags.DEFINE_bool("tiny", False, "one batch, small frames: a check")

_BATCH, _ARMS = 4, ("keyframes",)
_WAYS = {"decode": "off", "fill": "prefer", "cached": "only", "cold": "only"}


def copies(folder: pathlib.Path, place: pathlib.Path, count: int) -> None:
  """Videos and a manifest; the first of them come first."""
  files = sorted(f for f in folder.iterdir() if f.suffix in (".mp4", ".avi"))
  made = []
  for number in range(count):
    source = files[number % len(files)]
    path = place / f"{number}{source.suffix}"
    # A box, or a chunk, that nobody knows.
    kind = ">I4sI" if source.suffix == ".mp4" else "<4sII"
    size = (12, b"skip") if source.suffix == ".mp4" else (b"JUNK", 4)
    path.write_bytes(source.read_bytes() + struct.pack(kind, *size, number))
    made.append(path)
  for split in experiment_lib.SPLITS:
    rows = [
      dict(
        video=str(path),
        question="What is shown?",
        options=["this", "that"],
        answer="A",
        id=f"{split}-{path.name}",
      )
      for path in (made if split == "train" else made[:1])
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place / f"{split}.jsonl").write_text(text)


def make_config(place: pathlib.Path, mode: str):
  """A small policy on those videos."""
  config = kfgrpo_cpu.get_config("smoke")
  config.data.source = f"jsonl:{place}"
  config.data.loader.update(shuffle=False, scan_frames=96)
  size_px = (56, 56) if _TINY.value else (140, 252)
  config.data.reader.update(size_px=size_px, cache_mib=0)
  config.data.decode.processes = _PROCESSES.value
  config.data.frame_cache.update(mode=mode, folder=str(place / "frames"))
  config.prompt.max_tokens = 128 if _TINY.value else 512
  config.sampling.update(num_completions=4, max_tokens=16)
  config.rl.update(prompts_per_step=_BATCH, micro_batches=1)
  config.sft.update(batch_size=_BATCH, micro_batches=1)
  return config.lock()


def run(way: str, place: pathlib.Path, batches: int) -> dict:
  """Seconds a batch of one round, the first wait included."""
  config = make_config(place, _WAYS[way])
  experiment = experiment_lib.build(config, place / "run")
  params = policies.initial_params(config, experiment.model, experiment.mesh)
  encode = experiment_lib.make_encode_step(experiment)
  sample = experiment_lib.make_sample_steps(
    experiment, num_completions=4, max_tokens=16, temperature=1.0
  )
  seed = experiment.put(np.zeros((_BATCH, 2), np.uint32))

  def step(prepared) -> None:
    frames = experiment_lib.shown_frames(prepared)
    pixel = experiment.put(experiment.make_views.patches(frames))
    encoded = encode(params, pixel)
    apart = sample.unstack(params, rows=_BATCH * 4)
    view = experiment.put(prepared.view["keyframes"])
    begun = sample.prefill(params, view, encoded, seed)
    jax.block_until_ready(sample.decode(apart, begun))

  # All is compiled on videos that are not met again.
  settings = config.data.loader
  spare = pipeline.collate(
    experiment.samples["train"][-_BATCH:],
    np.arange(_BATCH),
    scan_frames=settings.scan_frames,
    scan_size_px=settings.scan_size_px,
    decoder=experiment.decoder,
  )
  step(experiment.make_views(spare, _ARMS))

  waited_s, made_s, begin = 0.0, 0.0, time.perf_counter()
  with experiment_lib.Stream(
    experiment, "train", _ARMS, batch_size=_BATCH
  ) as stream:
    for _ in range(batches):
      asked = time.perf_counter()
      prepared, _ = next(stream)
      waited_s += time.perf_counter() - asked
      made_s += stream.prepare_s
      step(prepared)
    spent_s = time.perf_counter() - begin
  experiment.decoder.close()
  return dict(
    step_s=spent_s / batches,
    wait_s=waited_s / batches,
    make_s=made_s / batches,
  )


def bare_rate(place: pathlib.Path, count: int) -> tuple[float, float]:
  """Frames a second, and seconds a batch, of cv2's own loop."""
  frames, begin = 0, time.perf_counter()
  for number in range(count):
    (path,) = place.glob(f"{number}.*")
    capture = cv2.VideoCapture(
      str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]
    )
    while capture.read()[0]:
      frames += 1
  spent_s = time.perf_counter() - begin
  return frames / spent_s, spent_s / count * _BATCH


def copy_rate(folder: pathlib.Path, count: int) -> tuple[float, float]:
  """GiB a second, and seconds a batch, of reading all entries."""
  files = [f for f in folder.rglob("entries/*/*") if f.is_file()]
  room = memoryview(bytearray(max(f.stat().st_size for f in files)))
  size, begin = 0, time.perf_counter()
  for path in files:
    with path.open("rb", buffering=0) as file:
      size += file.readinto(room)
  spent_s = time.perf_counter() - begin
  return size / 2**30 / spent_s, spent_s / count * _BATCH


def drop(folder: pathlib.Path) -> None:
  """Lets the system forget the content of files that are on the disk."""
  for path in folder.rglob("entries/*/*"):
    with path.open("rb") as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(_) -> None:
  logging.set_verbosity(logging.ERROR)
  batches = 1 if _TINY.value else _BATCHES.value
  found = {way: [] for way in _WAYS}
  with tempfile.TemporaryDirectory() as name:
    place = pathlib.Path(name)
    jax.config.update("jax_compilation_cache_dir", str(place / "xla"))
    # One batch is made ahead, scans of two more, and one is to compile with.
    count = _BATCH * (batches + 4)
    copies(pathlib.Path(_VIDEOS.value), place, count)
    for _ in range(1 if _TINY.value else _ROUNDS.value):
      for way in _WAYS:
        if way == "fill":
          shutil.rmtree(place / "frames", ignore_errors=True)
        if way == "cold":
          drop(place / "frames")
        if way == "cached":  # what was scanned ahead is read too
          run("fill", place, batches + 2)
        found[way].append(run(way, place, batches))
    rate, bare_s = bare_rate(place, count)
    copied, copy_s = copy_rate(place / "frames", count)
    size = sum(f.stat().st_size for f in (place / "frames").rglob("*"))
  rows = {
    way: {key: statistics.median(r[key] for r in of) for key in of[0]}
    for way, of in found.items()
  }
  about = dict(
    rows=rows,
    bare_frames_per_s=rate,
    bare_s_per_batch=bare_s,
    copy_gib_per_s=copied,
    copy_s_per_batch=copy_s,
    bytes_per_video=size / count,
    cores=os.cpu_count(),
    load=os.getloadavg(),
    versions=telemetry.versions(),
  )
  if _OUT.value:
    telemetry.write_json(_OUT.value, about)
  telemetry.closing_table(
    "seconds a batch of 4 videos",
    ("", "step", "of it waiting", "making a batch", "step, decode = 1"),
    [
      (
        way,
        f"{row['step_s']:.3f}",
        f"{row['wait_s']:.3f}",
        f"{row['make_s']:.3f}",
        f"{rows['decode']['step_s'] / row['step_s']:.2f}",
      )
      for way, row in rows.items()
    ],
  )
  print(
    f"bare decode {rate:.0f} frames/s, {bare_s:.3f} s a batch; entries read at"
    f" {copied:.2f} GiB/s, {copy_s:.4f} s a batch, {size / count / 2**20:.2f}"
    " MiB a video"
  )


if __name__ == "__main__":
  app.run(main)
