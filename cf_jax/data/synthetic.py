"""The built-in procedural video question-answering set, as real mp4 files.

What is asked stands in `synthetic_tasks.py`, how videos and questions are drawn
in `synthetic_specs.py`, `synthetic_times.py` and `synthetic_video.py`; here is
the set on disk. What is built to hold: every law of motion, light and timing is
stationary and the same backwards in time, so no picture tells when it was
shown; colours are drawn apart from times, so times tell no answer; letters and
answers are balanced per task and split, so the question alone tells no answer;
and in the videos of short events the largest change of pixels is a cut, a
cutaway or a flicker.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import multiprocessing
import pathlib
import shutil
from collections.abc import Sequence

import cv2
import rich.console
import rich.progress

from cf_jax import disk
from cf_jax.data import (
  records,
  synthetic_specs,
  synthetic_tasks,
  synthetic_video,
)
from cf_jax.data.synthetic_video import Event, Spec


def ensure(
  cache_dir: str | pathlib.Path,
  *,
  seed: int,
  num_train: int,
  num_dev: int,
  num_test: int,
  num_frames: int = 96,
  fps: float = 8.0,
  size_px: int = 64,
  tasks: Sequence[str] = synthetic_specs.BASIC,
  num_events: int = 3,
  num_colours: int = 4,
  num_workers: int = 2,
) -> pathlib.Path:
  """Writes the set unless it is there, and says where it is.

  It lies in `cache_dir/synthetic/<hash of the settings and VERSION>`. Videos
  appear under their names when they are complete, and the index last, so a
  call after an interruption goes on where the other one ended.

  Args:
    cache_dir: folder of generated sets.
    seed: of the set.
    num_train: videos to train on.
    num_dev: videos to tune on.
    num_test: videos to judge on.
    num_frames: T, frames a video; this and the following as in
      `synthetic_specs.make_specs`.
    fps: frames a second.
    size_px: height and width of the pictures.
    tasks: names of `synthetic_tasks.TASKS`.
    num_events: events a video.
    num_colours: colours of `PALETTE` in use.
    num_workers: processes that draw videos.

  Returns:
    The set's folder, for `load` and `load_specs`.

  Raises:
    ValueError: a setting outside its range, or a video cannot be written.
  """
  counts = {"train": num_train, "dev": num_dev, "test": num_test}
  settings = dict(
    seed=seed,
    num_frames=num_frames,
    fps=fps,
    size_px=size_px,
    tasks=list(tasks),
    num_events=num_events,
    num_colours=num_colours,
  )
  named = {"version": synthetic_specs.VERSION, "counts": counts, **settings}
  key = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
  root = (
    pathlib.Path(cache_dir).expanduser().absolute() / "synthetic" / key[:16]
  )
  if (root / "DONE").is_file():
    return root
  specs = {
    split: synthetic_specs.make_specs(split, count, **settings)
    for split, count in counts.items()
  }
  for split in synthetic_specs.SPLITS:
    (root / "videos" / split).mkdir(parents=True, exist_ok=True)
  with open(root / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits, then finds it done
    if not (root / "DONE").is_file():
      _write_videos(root, list(itertools.chain(*specs.values())), num_workers)
      _write_index(root, specs)
      disk.write_text(
        root / "settings.json", json.dumps(named, indent=2) + "\n"
      )
      disk.write_text(root / "DONE", "")
  return root


def load_specs(path: str | pathlib.Path, split: str) -> list[Spec]:
  """Reads one split's specifications back from the index.

  Raises:
    ValueError: the index is gone.
  """
  root = pathlib.Path(path)
  if not (root / "index").is_dir():
    raise ValueError(
      f"the built-in set in {root} has lost its index; remove that folder, and"
      " it is written anew"
    )
  builder = _builder(root, None)
  specs = []
  for row in builder.as_data_source(split=split):
    fields = json.loads(row["spec"])
    fields["events"] = [Event(**_tuples(event)) for event in fields["events"]]
    specs.append(Spec(**_tuples(fields)))
  return sorted(specs, key=lambda spec: spec.id)


def _tuples(fields: dict) -> dict:
  """The same with tuples for JSON's lists, to two floors down."""
  return {
    name: tuple(
      tuple(item) if isinstance(item, list) else item for item in value
    )
    if isinstance(value, list)
    else value
    for name, value in fields.items()
  }


def load(path: str | pathlib.Path, split: str) -> list[records.Sample]:
  """Reads one split as Samples.

  Args:
    path: from `ensure`.
    split: "train", "dev" or "test".
  """
  root = pathlib.Path(path)
  return [
    synthetic_tasks.to_sample(spec, str(_video_path(root, spec.id)))
    for spec in load_specs(root, split)
  ]


def _video_path(root: pathlib.Path, name: str) -> pathlib.Path:
  return root / "videos" / name.split("-")[0] / f"{name}.mp4"


def _write_share(root: pathlib.Path, specs: Sequence[Spec]) -> int:
  cv2.setNumThreads(0)  # several of these run side by side
  for spec in specs:
    synthetic_video.write_video(spec, _video_path(root, spec.id))
  return len(specs)


def _write_videos(
  root: pathlib.Path, specs: Sequence[Spec], num_workers: int
) -> None:
  """Writes what is missing, in processes where it is worth starting them."""
  for left in (root / "videos").glob("*/.*.mp4"):
    left.unlink()  # by a writer that was killed; ours is the lock
  missing = [s for s in specs if not _video_path(root, s.id).is_file()]
  shares = [missing[n : n + 32] for n in range(0, len(missing), 32)]
  with rich.progress.Progress(
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeRemainingColumn(),
    console=rich.console.Console(stderr=True),
  ) as progress:
    bar = progress.add_task(
      "write videos", total=len(specs), completed=len(specs) - len(missing)
    )
    if len(missing) <= 256 or num_workers < 2:
      for share in shares:
        progress.advance(bar, _write_share(root, share))
      return
    # Not forked: the caller may run threads of jax.
    with concurrent.futures.ProcessPoolExecutor(
      num_workers, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
      jobs = [pool.submit(_write_share, root, share) for share in shares]
      for job in concurrent.futures.as_completed(jobs):
        progress.advance(bar, job.result())


def _builder(root: pathlib.Path, specs: dict[str, list[Spec]] | None):
  """The TFDS builder of a set; `specs` only to write it."""
  # Here, so that importing this module (in every worker) stays cheap.
  import tensorflow_datasets as tfds

  class VideoQuestions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Synthetic video questions; see cf_jax.data.synthetic."""

    VERSION = tfds.core.Version(f"{synthetic_specs.VERSION}.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        description="Procedural videos with one question each.",
        features=tfds.features.FeaturesDict(
          {
            "id": tfds.features.Text(),
            "spec": tfds.features.Text(),
          }
        ),
      )

    def _split_generators(self, dl_manager):
      del dl_manager
      return {split: self._generate_examples(split) for split in specs}

    def _generate_examples(self, split):
      for spec in specs[split]:
        fields = spec._asdict() | {
          "events": [event._asdict() for event in spec.events]
        }
        yield spec.id, {"id": spec.id, "spec": json.dumps(fields)}

  return VideoQuestions(data_dir=root / "index", file_format="array_record")


def _write_index(root: pathlib.Path, specs: dict[str, list[Spec]]) -> None:
  shutil.rmtree(root / "index", ignore_errors=True)
  # TFDS prints "Downloading ..." and draws bars of its own.
  with (
    contextlib.redirect_stdout(io.StringIO()),
    contextlib.redirect_stderr(io.StringIO()),
  ):
    _builder(root, specs).download_and_prepare()
