"""Is a local copy of a public dataset whole, and does it fit its annotations?

Files of the workdir:
  check_data.json  counts, durations, and every problem by its kind

Exit codes: 0 all is well, 1 something is wrong, 2 it could not be checked (a
ValueError: an unknown dataset, no annotation file).
"""

import collections
import concurrent.futures
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import logging

from cf_jax.data import (
  datasets,
  decoding,
  footage,
  records,
  subtitles,
  video,
)
from cf_jax.runtime import telemetry

REPORT_FILE = "check_data.json"
DECODE = ("headers", "whole", "none")
_WHOLE_FRAMES, _WHOLE_PX = 8, (28, 28)  # of a scan that goes to the end
# Kinds of problems, in the order of the table, and what they are called.
PROBLEMS = {
  "rows": "wrong rows of annotations",
  "missing": "missing videos",
  "unreadable": "unreadable videos",
  "duration": "videos of another duration than annotated",
  "beyond": "questions about times after the video's end",
  "subtitles": "unreadable subtitles",
}
# What is said of a copy, and is not wrong with it.
NOTES = {
  "flaws": "questions with flaws as published",
  "no_subtitles": "videos without subtitles",
}


class Found(NamedTuple):
  """What a file says of itself.

  Attributes:
    duration_s: seconds; None where it was not opened.
    error: why it cannot be used, or "".
    missing: is it not there at all?
  """

  duration_s: float | None = None
  error: str = ""
  missing: bool = False


def look(
  path: str, fps: float | None, decoder: decoding.Decoder, decode: str
) -> Found:
  """Opens a video, or a folder of pictures.

  Args:
    path: of the file.
    fps: pictures a second of a folder, else None.
    decoder: that opens it.
    decode: one of `DECODE`.
  """
  if not pathlib.Path(path).exists():
    return Found(error=f"{path}: there is no such file", missing=True)
  if decode == "none":
    return Found()
  whole = footage.Footage(path, None, fps)
  try:
    info = decoder.probe(whole)
    if decode == "whole":
      decoder.scan_frames(whole, _WHOLE_FRAMES, _WHOLE_PX)
  except video.VideoError as error:
    return Found(error=str(error))
  return Found(duration_s=info.duration_s)


def compare(
  sample: records.Sample, duration_s: float, *, tolerance_s: float
) -> dict[str, str]:
  """What a question says of its video that is not so.

  Args:
    sample: the question.
    duration_s: of the file, in seconds.
    tolerance_s: how far it may be off.

  Returns:
    Kind of problem -> words; nothing where all fits.
  """
  found, where = {}, f"{sample.id} ({sample.video})"
  start_s = 0.0
  if sample.clip is not None:
    start_s, end_s = sample.clip
    if end_s > duration_s + tolerance_s:
      found["beyond"] = (
        f"{where}: about {start_s:g} to {end_s:g} s of {duration_s:.2f} s"
      )
  elif (
    sample.duration_s is not None
    and abs(sample.duration_s - duration_s) > tolerance_s
  ):
    found["duration"] = (
      f"{sample.video}: lasts {duration_s:.2f} s, {sample.duration_s:g} s are"
      " annotated"
    )
  last_s = max((end for _, end in sample.evidence), default=0.0)
  if start_s + last_s > duration_s + tolerance_s and "beyond" not in found:
    found["beyond"] = (
      f"{where}: an interval ends at {start_s + last_s:g} s of"
      f" {duration_s:.2f} s"
    )
  return found


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Checks `config.root`, prints the table, writes the report.

  Raises:
    ValueError: a bad setting, or annotations that cannot be read at all.
    SystemExit: with code 1, where something is wrong.
  """
  if config.decode not in DECODE:
    raise ValueError(
      f"config.decode must be one of {DECODE}, got {config.decode!r}"
    )
  if not config.root:
    raise ValueError(
      "config.root is missing: the folder of the local copy (docs/datasets.md)"
    )
  if config.tolerance_s < 0:
    raise ValueError(
      f"config.tolerance_s must be at least 0, got {config.tolerance_s}"
    )
  where = dict(
    annotations=config.annotations, root=config.root, split=config.split
  )
  samples, wrong_rows = datasets.examine(
    config.dataset,
    videos=config.videos,
    subtitles=config.subtitles,
    clips=config.clips,
    **where,
  )
  report = {
    "dataset": config.dataset,
    "annotations": [
      str(path) for path in datasets.annotation_files(config.dataset, **where)
    ],
    "decode": config.decode,
    "tolerance_s": config.tolerance_s,
    "questions": len(samples),
  }
  files = _look_at_all(samples, config)
  problems = {kind: [] for kind in (*PROBLEMS, *NOTES)}
  problems["rows"] = wrong_rows
  for found in files.values():
    if found.error:
      problems["missing" if found.missing else "unreadable"].append(found.error)
  silent = set()
  for sample in samples:
    found = files[sample.video]
    if found.duration_s is not None:
      said = compare(sample, found.duration_s, tolerance_s=config.tolerance_s)
      for kind, words in said.items():
        problems[kind].append(words)
    problems["flaws"] += [f"{sample.id}: {flaw}" for flaw in sample.flaws]
    if config.subtitles and not sample.subtitles:
      silent.add(sample.video)
  problems["no_subtitles"] = sorted(silent)
  for path in dict.fromkeys(sample.subtitles for sample in samples):
    try:
      if path:
        subtitles.read(path)
    except ValueError as error:
      problems["subtitles"].append(str(error))
  # Several questions say the same of one video.
  problems = {
    kind: list(dict.fromkeys(some)) for kind, some in problems.items()
  }
  report |= {
    "videos": len(files),
    "durations": _durations(files.values()),
    "groups": _count_groups(samples),
    "problems": {kind: problems[kind] for kind in PROBLEMS},
    "notes": {kind: problems[kind] for kind in NOTES},
  }
  workdir.mkdir(parents=True, exist_ok=True)
  telemetry.write_json(workdir / REPORT_FILE, report)
  _print(config, report)
  if any(report["problems"].values()):
    sys.exit(1)


def _look_at_all(samples, config) -> dict[str, Found]:
  """Path -> what is there, of every video that a question is about."""
  fps_of = {sample.video: sample.fps for sample in samples}
  made = {}
  decoder = decoding.Decoder(**config.decoder, limits=config.limits)
  with (
    telemetry.progress("check videos", len(fps_of), unit="video") as bar,
    concurrent.futures.ThreadPoolExecutor(
      max(config.decoder.processes, 1)
    ) as pool,
  ):
    jobs = {
      pool.submit(look, path, fps, decoder, config.decode): path
      for path, fps in fps_of.items()
    }
    for job in concurrent.futures.as_completed(jobs):
      made[jobs[job]] = job.result()
      bar.advance(1)
  decoder.close()
  return {path: made[path] for path in fps_of}


def _durations(found) -> dict[str, float]:
  """Seconds over the videos that could be opened; nothing if none could."""
  seconds = [one.duration_s for one in found if one.duration_s is not None]
  if not seconds:
    return {}
  return {
    "opened": len(seconds),
    "total_s": float(np.sum(seconds)),
    "shortest_s": float(np.min(seconds)),
    "median_s": float(np.median(seconds)),
    "longest_s": float(np.max(seconds)),
  }


def _count_groups(
  samples: Sequence[records.Sample],
) -> dict[str, dict[str, int]]:
  """Group -> value -> questions."""
  counts = collections.defaultdict(collections.Counter)
  for sample in samples:
    for name, value in datasets.groups_of(sample).items():
      counts[name][value] += 1
  return {
    name: dict(sorted(counter.items())) for name, counter in counts.items()
  }


def _print(config: ml_collections.ConfigDict, report: dict[str, Any]) -> None:
  """The table, and the first problems of every kind."""
  dataset = datasets.find(config.dataset)
  lines = [("questions", report["questions"]), ("videos", report["videos"])]
  lines += [
    (f"videos: {name.removesuffix('_s').replace('_', ' ')}", value)
    for name, value in report["durations"].items()
  ]
  for names, found in ((PROBLEMS, "problems"), (NOTES, "notes")):
    lines += [(names[kind], len(some)) for kind, some in report[found].items()]
  telemetry.closing_table(
    f"{dataset.title} ({dataset.licence}): {config.root}",
    ("", "count or seconds"),
    lines,
  )
  for kind, some in (report["problems"] | report["notes"]).items():
    log = logging.error if kind in PROBLEMS else logging.info
    for words in some[: config.shown]:
      log("%s: %s", kind, words)
    if len(some) > config.shown:
      log("%s: %d more in %s", kind, len(some) - config.shown, REPORT_FILE)
