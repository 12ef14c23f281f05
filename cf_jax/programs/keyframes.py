"""The keyframes of a video, or of every video below a folder.

A file is decoded once, small: each frame becomes one embedding, and these are
what TAD sees. The chosen frames are then decoded again at full size. Files of
the workdir:
  index.html                all videos on one page
  videos.json               which videos, with which settings, which failed
  NAME/keyframes.json       the keyframes, all apexes, facts, settings
  NAME/film_strip.png       the keyframes over the curve of variation scores
  NAME/keyframes/*.png      the keyframes, upright and at full size
NAME is the file's path below the folder, suffix included, so no two clash.

Axes: `T` scanned frames, `K` keyframes, `E` frame-embedding width.
"""

import collections
import concurrent.futures
import contextlib
import functools
import json
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cv2
import jax
import ml_collections
import numpy as np
import rich.console
from absl import logging
from flax import traverse_util

from cf_jax import descriptor, disk, selectors, tad
from cf_jax.data import frame_size, video, video_stream
from cf_jax.models import config as model_config
from cf_jax.runtime import sharding, telemetry
from cf_jax.types import Keyframes

LIST_FILE = "videos.json"
PAGE_FILE = "index.html"
RECORD_FILE = "keyframes.json"
STRIP_FILE = "film_strip.png"
PICTURES_FOLDER = "keyframes"

# fmt: off
SUFFIXES = (
  ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
  ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv",
)
# fmt: on
# Kind of a picture -> how OpenCV writes it.
PICTURES = {"png": [], "jpg": [cv2.IMWRITE_JPEG_QUALITY, 95]}

# What changes the answer; the rest of the config says how fast it comes.
_DECIDES = ("select", "num_keyframes", "fps", "tad", "dtype", "picture")

_PIXEL_PX, _VISION_PX = (64, 64), (112, 112)
# T is filled up to this, or four times this, sixteen times, ..., with masked
# frames: videos of any length share a few programs.
_LEAST_FRAMES = 1024
# A file is divided for several decoders where each gets so many frames.
_PART_FRAMES = 1024
# A header that promises more is not taken at its word.
_SURE_FRAMES = 2**18
_STRIP_PX = 320  # width of a picture of the film strip
_CURVE_POINTS = 4096  # of a longer curve the strip draws the envelope

# matplotlib is not made for threads.
_DRAWING = threading.Lock()


class Source(NamedTuple):
  """A video to look at.

  Attributes:
    name: its path below the folder, or its file name.
    path: where it lies.
  """

  name: str
  path: pathlib.Path


class Embedder(NamedTuple):
  """What stands for a frame.

  Attributes:
    embed: uint8[n, h, w, 3] RGB -> float[n, E]; n is always the same.
    size_px: (h, w) that it takes.
    chunk: n.
    source: "pixels", or the checkpoint whose vision tower it is.
  """

  embed: Callable[[np.ndarray], jax.Array]
  size_px: tuple[int, int]
  chunk: int
  source: str


# ------------------------------------------------------------------- settings


def check_settings(config: ml_collections.ConfigDict) -> None:
  """What can be told before anything is opened.

  Raises:
    ValueError: a setting is missing or out of range.
  """
  if not config.video.strip():
    raise ValueError(
      "config.video is empty; set --config.video= to a video file or a folder"
    )
  for name, value, least in (
    ("num_keyframes", config.num_keyframes, 1),
    ("scan.chunk", config.scan.chunk, 1),
    ("scan.num_threads", config.scan.num_threads, 1),
    ("scan.parts", config.scan.parts, 1),
    ("files_at_once", config.files_at_once, 1),
    ("scan.size_px", config.scan.size_px and min(config.scan.size_px), 4),
  ):
    if value is not None and value < least:
      raise ValueError(f"config.{name} must be at least {least}, got {value}")
  if config.scan.size_px and len(config.scan.size_px) != 2:
    raise ValueError(
      "config.scan.size_px must be (height, width), got"
      f" {tuple(config.scan.size_px)}"
    )
  if config.fps is not None and not 0 < config.fps < math.inf:
    raise ValueError(
      f"config.fps must be above 0, or None for every frame, got {config.fps}"
    )
  for name, value, choices in (
    ("select", config.select, selectors.CHOICES),
    ("picture", config.picture, tuple(PICTURES)),
    ("dtype", config.dtype, (None, *model_config.DTYPES)),
  ):
    if value not in choices:
      raise ValueError(f"config.{name} must be one of {choices}, got {value!r}")
  jax.eval_shape(  # or every video would find a wrong setting anew
    functools.partial(
      tad.select_keyframes, num_keyframes=config.num_keyframes, **config.tad
    ),
    jax.ShapeDtypeStruct((_LEAST_FRAMES, 4), np.float32),
  )
  if jax.process_count() > 1:
    raise ValueError(
      "keyframes runs on one host; leave config.distributed False and give"
      " each host its own folder"
    )


def find_videos(path: str, workdir: pathlib.Path) -> list[Source]:
  """The video files that a path stands for, in order of their names.

  Args:
    path: a file of any name, or a folder: all files below it whose suffix is
      one of SUFFIXES, hidden ones left out.
    workdir: left out too, where it lies in that folder.

  Raises:
    ValueError: nothing there, or a folder without videos.
  """
  root = pathlib.Path(path).expanduser()
  if root.is_file():
    return [Source(root.name, root)]
  if not root.is_dir():
    raise ValueError(
      f"{path}: there is no such file or folder; change config.video"
    )
  found = []
  for folder, below, files in os.walk(root):
    here = pathlib.Path(folder)
    below[:] = sorted(
      name
      for name in below
      if name[0] != "." and (here / name).resolve() != workdir.resolve()
    )
    found += [
      Source((here / name).relative_to(root).as_posix(), here / name)
      for name in files
      if name[0] != "." and name.lower().endswith(SUFFIXES)
    ]
  if not found:
    raise ValueError(
      f"{path}: no video below this folder; looked for files named"
      f" *{', *'.join(SUFFIXES)}"
    )
  return sorted(found)


def make_embedder(config: ml_collections.ConfigDict) -> Embedder:
  """The pixel descriptor, or with `config.checkpoint` a vision tower.

  Raises:
    ValueError: the checkpoint cannot be read, or frames do not divide into its
      patches.
  """
  size_px = config.scan.size_px and tuple(config.scan.size_px)
  if not config.checkpoint:
    return Embedder(
      jax.jit(descriptor.pixel_descriptor),
      size_px or _PIXEL_PX,
      config.scan.chunk,
      "pixels",
    )
  # Here, because what reads checkpoints is a quarter of the start.
  from cf_jax import policy as policy_lib
  from cf_jax.programs import policies

  model, params, source = policies.load_vision(
    config.checkpoint,
    sharding.make_mesh(**config.mesh),
    dtype=config.dtype,
    init_from=config.init_from,
  )
  size_px = size_px or _VISION_PX
  embed = policy_lib.make_frame_embedder(model, params, size_px)
  turn = threading.Lock()

  def embed_in_turn(frames):
    # Programs over several devices must reach all of them in one order.
    with turn:
      return embed(frames)

  return Embedder(embed_in_turn, size_px, config.scan.chunk, source)


def check_same_settings(
  workdir: pathlib.Path, root: str, settings: dict[str, Any]
) -> None:
  """A workdir belongs to one file or folder and to one choice of settings.

  Raises:
    ValueError: it holds others; names the first differences.
  """
  path = workdir / LIST_FILE
  if not path.exists():
    return
  held = json.loads(path.read_text("utf-8"))
  there, here = (
    traverse_util.flatten_dict(tree, sep=".")
    for tree in (
      {"video": held["video"]} | held["settings"],
      {"video": root} | settings,
    )
  )
  differ = [
    f"{name} (there {there.get(name)!r}, now {here.get(name)!r})"
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]
  if differ:
    raise ValueError(
      f"{workdir} holds keyframes of other settings: {'; '.join(differ[:5])};"
      " give another --workdir or the same settings"
    )


# ------------------------------------------------------------------ one video


def look(
  source: Source,
  folder: pathlib.Path,
  config: ml_collections.ConfigDict,
  embedder: Embedder,
  settings: dict[str, Any],
  *,
  parts: int,
  num_threads: int,
  advance: Callable[[int], None],
) -> dict[str, Any]:
  """Finds the keyframes of one video and writes all that is kept of it.

  Args:
    source: the video.
    folder: gets the files; keyframes.json comes last.
    config: of configs/keyframes.py.
    embedder: what stands for a frame.
    settings: kept in keyframes.json.
    parts: of the file that are decoded side by side.
    num_threads: of each decoder.
    advance: called with the frames newly decoded, now and then.

  Returns:
    What keyframes.json holds.

  Raises:
    video.VideoError: the file cannot be read.
  """
  identity = _identity(source.path)
  (folder / RECORD_FILE).unlink(missing_ok=True)
  begin = time.monotonic()
  stream = video_stream.FrameStream(
    source.path,
    embedder.size_px,
    chunk=embedder.chunk,
    fps=config.fps,
    num_threads=num_threads,
    parts=parts,
    limits=video.Limits(**config.limits),
  )
  embedding, number = _scan(stream, embedder, advance)
  chosen, score = _choose(config, embedding)
  scanned_s = time.monotonic() - begin

  facts = identity | _facts(stream)
  stamp_s = stream.start_s + np.asarray(stream.time_s)
  shown = chosen.index[chosen.mask]
  at = number[shown]
  names = [
    f"{PICTURES_FOLDER}/{k:03d}_frame_{n}.{config.picture}"
    for k, n in enumerate(at.tolist(), start=1)
  ]
  (folder / PICTURES_FOLDER).mkdir(parents=True, exist_ok=True)
  for old in (folder / PICTURES_FOLDER).iterdir():
    old.unlink()
  small = _write_pictures(
    source.path, folder, names, at, stream, max(parts, num_threads)
  )

  from cf_jax import figures  # see _prepare

  keep = _envelope(score, chosen.apex)
  with _DRAWING:
    figures.keyframe_strip(
      folder / STRIP_FILE,
      frames=small,
      frame_s=stamp_s[at],
      score=score[keep],
      time_s=stamp_s[number[keep]],
      apex=chosen.apex[keep],
      label="TAD" if config.select == "tad" else config.select,
    )

  def moment(frame: int) -> dict[str, Any]:
    return dict(
      frame_index=int(number[frame]),
      timestamp=round(float(stamp_s[number[frame]]), 6),
      score=float(chosen.score[frame]),
      variation=float(score[frame]),
    )

  keyframes = []
  picked = chosen.order.tolist()
  for slot, (frame, name) in enumerate(zip(shown.tolist(), names, strict=True)):
    first, end = chosen.segment[slot].tolist()
    keyframes.append(
      moment(frame)
      | dict(
        saliency=float(chosen.saliency[slot]),
        rank=picked.index(frame) + 1,
        segment=dict(
          first_frame=int(number[first]),
          last_frame=int(number[end - 1]),
          start=round(float(stamp_s[number[first]]), 6),
          end=round(float(stamp_s[number[end - 1]]), 6),
        ),
        apex=moment(first) if chosen.apex[first] else None,
        file=name,
      )
    )
  record = dict(
    name=source.name,
    video=facts,
    num_scanned=len(number),
    film_strip=STRIP_FILE,
    keyframes=keyframes,
    apexes=[moment(frame) for frame in np.flatnonzero(chosen.apex).tolist()],
    settings=settings,
    seconds=dict(scan=scanned_s, all=time.monotonic() - begin),
  )
  record = telemetry.to_jsonable(record)
  telemetry.write_json(folder / RECORD_FILE, record)
  return record


def finished(
  source: Source, folder: pathlib.Path, settings: dict[str, Any]
) -> dict[str, Any] | None:
  """What keyframes.json of an earlier start holds, if it is still right.

  The file of the video has the same size and time, the settings are the same,
  and every picture is there.
  """
  path = folder / RECORD_FILE
  if not path.exists():
    return None
  record = json.loads(path.read_text("utf-8"))
  identity = _identity(source.path)
  same = (
    record["settings"] == settings
    and {name: record["video"][name] for name in identity} == identity
    and (folder / record["film_strip"]).exists()
    and all((folder / row["file"]).exists() for row in record["keyframes"])
  )
  return record if same else None


def _identity(path: pathlib.Path) -> dict[str, Any]:
  about = path.stat()
  return dict(
    path=str(path.absolute()),
    bytes=about.st_size,
    modified_ns=about.st_mtime_ns,
  )


def _scan(
  stream: video_stream.FrameStream,
  embedder: Embedder,
  advance: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
  """float[T, E] and int64[T] numbers of the frames that were taken."""
  rows, waiting, told = collections.defaultdict(list), None, 0

  def collect() -> None:
    if waiting is not None:
      part, made, real = waiting
      rows[part].append(np.asarray(made)[:real])

  with contextlib.closing(iter(stream)) as chunks:
    for chunk in chunks:
      real = len(chunk.frames)
      spare = [(0, embedder.chunk - real)] + [(0, 0)] * 3
      made = embedder.embed(np.pad(chunk.frames, spare))
      collect()  # the one before, while this one is computed
      waiting = chunk.part, made, real
      advance(max(0, chunk.num_decoded - told))  # parts come as they are done
      told = max(told, chunk.num_decoded)
  collect()
  return stream.join(rows), np.array(stream.number)


def _padded(count: int) -> int:
  """How many frames so many are filled up to."""
  size = _LEAST_FRAMES
  while size < count:
    size *= 4
  return size


def _prepare(
  config: ml_collections.ConfigDict, embedder: Embedder, counts: list[int]
) -> None:
  """Compiles the programs for videos of so many frames."""
  from cf_jax import figures  # noqa: F401  draws; a quarter of the start, too

  blank = np.zeros((embedder.chunk, *embedder.size_px, 3), np.uint8)
  made = embedder.embed(blank)
  for size in sorted({_padded(count) for count in counts}):
    if size <= _SURE_FRAMES:
      _choose(config, np.zeros((size, made.shape[1]), made.dtype))


def _choose(
  config: ml_collections.ConfigDict, embedding: np.ndarray
) -> tuple[Keyframes, np.ndarray]:
  """Keyframes, and the curve of variation scores: float[T]."""
  count = len(embedding)
  size = _padded(count)
  padded = np.zeros((1, size, embedding.shape[1]), embedding.dtype)
  padded[0, :count] = embedding
  mask = np.arange(size)[None] < count
  chosen = selectors.select_videos(
    config.select,
    padded,
    mask,
    num_keyframes=config.num_keyframes,
    **(config.tad if config.select == "tad" else {}),
  )
  score = chosen.variation
  if config.select != "tad":
    score = tad.score_videos(padded, mask)
  chosen, score = jax.tree.map(
    lambda leaf: leaf[0], jax.device_get((chosen, score))
  )
  # What is numbered by frames, without those that were added.
  return (
    chosen.replace(apex=chosen.apex[:count], score=chosen.score[:count]),
    score[:count],
  )


def _facts(stream: video_stream.FrameStream) -> dict[str, Any]:
  """What is known of a file that was decoded to its end; times in seconds."""
  info, time_s = stream.info, np.asarray(stream.time_s)
  step_s = np.diff(time_s)
  usual_s = float(np.median(step_s)) if len(step_s) else 1 / info.fps
  duration_s = float(time_s[-1]) + usual_s
  # The sound may end a little later than the picture.
  short = info.duration_s - duration_s > max(0.1, 2 * usual_s)
  return dict(
    codec=stream.codec,
    width=info.width,
    height=info.height,
    rotation=stream.rotation,
    num_frames=len(time_s),
    header_frames=info.num_frames,
    duration_s=duration_s,
    start_s=stream.start_s,
    fps=len(time_s) / duration_s,
    variable_fps=bool(
      len(step_s) and step_s.max() - step_s.min() > 0.1 * usual_s
    ),
    problem=(
      f"cut short: the header says {info.duration_s:.2f} s,"
      f" {duration_s:.2f} s can be decoded"
      if short
      else None
    ),
  )


def _write_pictures(
  path: pathlib.Path,
  folder: pathlib.Path,
  names: list[str],
  number: np.ndarray,
  stream: video_stream.FrameStream,
  parts: int,
) -> np.ndarray:
  """Writes the keyframes at full size; returns them small: uint8[K, h, w, 3].

  Parts of the video are gone through side by side where frames can be sought.
  """
  width = min(_STRIP_PX, stream.info.width)
  height = max(1, round(stream.info.height * width / stream.info.width))
  small = np.zeros((len(names), height, width, 3), np.uint8)
  suffix = pathlib.Path(names[0]).suffix

  def write(slots: np.ndarray) -> None:
    wanted = number[slots].tolist()
    for slot, frame in zip(
      slots.tolist(),
      video_stream.pick_frames(path, wanted, stream),
      strict=True,
    ):
      small[slot] = frame_size.resize_frame(frame, (height, width), "area")
      _, data = cv2.imencode(
        suffix, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), PICTURES[suffix[1:]]
      )
      disk.write(folder / names[slot], data.tobytes())

  parts = min(parts, len(names)) if stream.seekable else 1
  with concurrent.futures.ThreadPoolExecutor(parts) as pool:
    list(pool.map(write, np.array_split(np.arange(len(names)), parts)))
  return small


def _envelope(score: np.ndarray, apex: np.ndarray) -> np.ndarray:
  """int64[n] points of a curve that show it: highest, lowest, every apex."""
  count = len(score)
  if count <= _CURVE_POINTS:
    return np.arange(count)
  width = -(-2 * count // _CURVE_POINTS)
  rows = np.pad(score, (0, -count % width), mode="edge").reshape(-1, width)
  start = np.arange(len(rows)) * width
  ends = [start + rows.argmax(1), start + rows.argmin(1), [0, count - 1]]
  return np.unique(
    np.concatenate([*ends, np.flatnonzero(apex)]).clip(max=count - 1)
  )


# ------------------------------------------------------------------------ run


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> list[dict[str, Any]]:
  """Finds the keyframes of every video; the same call again goes on.

  Args:
    config: of configs/keyframes.py.
    workdir: gets everything.

  Returns:
    What each keyframes.json holds, in order of the names.

  Raises:
    ValueError: a setting or the checkpoint is not as it should be, another
      process uses the workdir, or there are videos that failed: after all
      others are done.
  """
  check_settings(config)
  sources = find_videos(config.video, workdir)
  if any((workdir / source.name).is_file() for source in sources):
    raise ValueError(
      f"{workdir} is the folder of the videos; give another --workdir"
    )
  from cf_jax.runtime import lifecycle  # see _prepare

  with lifecycle.locked(workdir):
    return _run(config, workdir, sources)


def _run(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  sources: list[Source],
) -> list[dict[str, Any]]:
  """What `run` does while nobody else writes there."""
  console = rich.console.Console(stderr=True)
  root = str(pathlib.Path(config.video).expanduser().absolute())
  embedder = make_embedder(config)
  settings = telemetry.to_jsonable(
    {name: config.to_dict()[name] for name in _DECIDES}
    | dict(embedding=embedder.source, size_px=embedder.size_px)
  )
  check_same_settings(workdir, root, settings)
  about = dict(
    video=root, settings=settings, versions=telemetry.versions(), videos=[]
  )
  telemetry.write_json(workdir / LIST_FILE, about)

  records, failed, lengths = {}, {}, {}
  for source in sources:
    try:
      done = finished(source, workdir / source.name, settings)
      if done:
        records[source.name] = done
      else:
        lengths[source] = video.probe(
          source.path, limits=video.Limits(**config.limits)
        ).num_frames
    except (ValueError, OSError) as error:
      failed[source.name] = str(error)
  if records:
    logging.info("%d of %d videos were done before", len(records), len(sources))
  begin, decoded = time.monotonic(), 0
  for source, result in _look_at_all(
    lengths, workdir, config, embedder, settings, console
  ):
    if isinstance(result, Exception):
      failed[source.name] = str(result)
    else:
      records[source.name] = result
      decoded += result["video"]["num_frames"]
  took_s = time.monotonic() - begin

  records = dict(sorted(records.items()))
  about["videos"] = [
    dict(name=name, error=failed.get(name)) for name, _ in sources
  ]
  about["this_start"] = dict(num_frames=decoded, seconds=took_s)
  telemetry.write_json(workdir / LIST_FILE, about)
  from cf_jax import keyframe_page  # see _prepare

  keyframe_page.write(
    workdir / PAGE_FILE,
    title=pathlib.Path(root).name,
    records=records,
    failed=failed,
    settings=settings,
  )
  _tell(records, console)
  if decoded:
    logging.info(
      "%d frames in %.1f s: %.0f a second", decoded, took_s, decoded / took_s
    )
  logging.info("page: %s", workdir / PAGE_FILE)
  if failed:
    said = list(failed.values())
    if len(sources) == 1:
      raise ValueError(said[0])
    more = f" and {len(said) - 5} more (see {LIST_FILE})" * (len(said) > 5)
    raise ValueError(
      f"{len(said)} of {len(sources)} videos failed: {'; '.join(said[:5])}"
      f"{more}; all others are in {workdir}"
    )
  return list(records.values())


def _look_at_all(
  lengths: dict[Source, int],
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  embedder: Embedder,
  settings: dict[str, Any],
  console: rich.console.Console,
) -> Iterator[tuple[Source, dict[str, Any] | Exception]]:
  """Every video with its record or what went wrong, as they are done.

  Files are decoded side by side; fewer files than cores are divided, the short
  ones by the decoder itself.
  """
  if not lengths:
    return
  cores = cv2.getNumberOfCPUs()
  side_by_side = min(config.files_at_once or cores, len(lengths))
  share = max(1, cores // side_by_side)
  stop, lock, complete = threading.Event(), threading.Lock(), 0
  pool = concurrent.futures.ThreadPoolExecutor(side_by_side)
  # While the first files are decoded. What fails here fails there.
  compiler = concurrent.futures.ThreadPoolExecutor(1)
  taken = lengths.values() if config.fps is None else ()
  compiler.submit(_prepare, config, embedder, list(taken))
  with telemetry.progress(
    "keyframes", sum(lengths.values()), unit="frame", console=console
  ) as bar:

    def work(source: Source) -> dict[str, Any]:
      nonlocal complete
      left = lengths[source]  # of what the header promised
      parts = min(config.scan.parts or share, max(1, left // _PART_FRAMES))

      def show(amount: int) -> None:
        nonlocal left
        with lock:
          bar.advance(amount, files=f"{complete}/{len(lengths)}")
        left -= amount

      def advance(amount: int) -> None:
        if stop.is_set():
          raise InterruptedError
        show(min(amount, left - 1))  # the last one when all is written

      try:
        return look(
          source,
          workdir / source.name,
          config,
          embedder,
          settings,
          parts=parts,
          num_threads=config.scan.num_threads or max(1, share // parts),
          advance=advance,
        )
      finally:
        with lock:
          complete += 1
        show(left)  # with what a wrong header promised, or a broken file had

    futures = {pool.submit(work, source): source for source in lengths}
    try:
      for future in concurrent.futures.as_completed(futures):
        error = future.exception()
        if error and not isinstance(error, (ValueError, OSError, cv2.error)):
          raise error
        yield futures[future], error or future.result()
    finally:
      stop.set()
      pool.shutdown(cancel_futures=True)
      compiler.shutdown()


def _tell(
  records: dict[str, dict[str, Any]], console: rich.console.Console
) -> None:
  """What was found, on the terminal."""
  telemetry.closing_table(
    "",
    ("video", "seconds", "frames", "apexes", "keyframes"),
    [
      (
        name,
        f"{record['video']['duration_s']:.1f}",
        record["video"]["num_frames"],
        len(record["apexes"]),
        len(record["keyframes"]),
      )
      for name, record in records.items()
    ],
    console=console,
  )
  for name, record in records.items():
    if record["video"]["problem"]:
      logging.warning("%s: %s", name, record["video"]["problem"])
