"""The built-in procedural video question-answering set, as real mp4 files.

A video is a drifting texture of muted colours with camera cuts, one-frame
flickers, oscillating light and camera jitter. Three times something happens for
about half a second: a big, saturated shape pops up, or the picture cuts away to
another texture and back. Three tasks ask about the shapes:

- needle: one shape, two cutaways; which colour is the shape?
- order: two shapes, one cutaway; which colour appears first?
- count: one, two or three shapes, the rest cutaways; how many shapes appear?

What is built to hold: every law of motion, light and timing is stationary and
the same backwards in time, so no picture tells when it was shown; colours are
drawn apart from times, so times tell no answer; letters and answers are
balanced per task and split, so the question alone tells no answer; and the
largest change of pixels is a cut, a cutaway or a flicker.

Axes: `T` frames; pixels are [..., height, width, 3], RGB.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import rich.console
import rich.progress

from cf_jax.data import records

# Part of the cache key: raise it whenever a specification or a pixel changes.
VERSION = 3

# The corners of the RGB cube first: they survive the codec's chroma loss best.
PALETTE = {
  "red": (225, 35, 35),
  "green": (30, 190, 45),
  "blue": (40, 55, 235),
  "yellow": (235, 225, 35),
  "cyan": (35, 220, 230),
  "magenta": (230, 40, 225),
  "orange": (240, 135, 20),
  "purple": (120, 30, 160),
}
SHAPES = ("disc", "square", "diamond", "ring")
CUTAWAY = "cutaway"
TASKS = ("needle", "order", "count")
SPLITS = ("train", "dev", "test")
LETTERS = "ABCD"

_EVENT_FRAMES = (4, 5, 6)
_EVENT_GAP = 10  # frames from the end of an event to the start of the next
_MARGIN = 6  # frames from an event to a cut or to an end of the video
_FLICKER_GAP = 3  # frames from a flicker to anything else
_CUT_GAP = 16  # frames from a cut to a cut or to an end of the video


class Event(NamedTuple):
  """A shape that pops up, or a cutaway.

  Attributes:
    start: its first frame.
    stop: one past its last frame.
    colour: a name of `PALETTE`; "" of a cutaway.
    shape: a name of `SHAPES`, or `CUTAWAY`.
    centre_px: (row, column) of its centre.
    radius_px: half its width.
  """

  start: int
  stop: int
  colour: str
  shape: str
  centre_px: tuple[int, int]
  radius_px: int


class Spec(NamedTuple):
  """Everything about one video and its question; `render` draws it.

  Attributes:
    id: "train-000012", unique in the set.
    task: a name of `TASKS`.
    question: the question alone.
    options: the choices, without letters.
    answer: the letter of the right one.
    seed: entropy of the textures and motions.
    num_frames: T.
    fps: frames a second.
    size_px: height and width.
    events: in time order.
    relevant: numbers of the events that the answer rests on.
    cuts: first frames of the shots after the first.
    flickers: frames of one-frame flicker.
  """

  id: str
  task: str
  question: str
  options: tuple[str, ...]
  answer: str
  seed: tuple[int, ...]
  num_frames: int
  fps: float
  size_px: int
  events: tuple[Event, ...]
  relevant: tuple[int, ...]
  cuts: tuple[int, ...]
  flickers: tuple[int, ...]

  @property
  def reasoning(self) -> str:
    """The shapes' colours in time order: 'red blue'."""
    return " ".join(self.events[n].colour for n in self.relevant)

  @property
  def evidence(self) -> tuple[tuple[float, float], ...]:
    """(start, end) seconds of the relevant events, in time order."""
    return tuple(
      (self.events[n].start / self.fps, self.events[n].stop / self.fps)
      for n in self.relevant
    )


# -- questions and times


def balanced(
  count: int, sizes: Sequence[int], rng: np.random.Generator
) -> np.ndarray:
  """Rows of a full factorial design, as balanced as `count` allows.

  Whole copies of the product of the factors come first; in what remains each
  factor for itself takes its levels equally often, give or take one.

  Args:
    count: rows.
    sizes: levels of each factor.
    rng: numpy generator.

  Returns:
    int[count, len(sizes)], rows in random order.
  """
  cells = np.array(list(itertools.product(*map(range, sizes))))
  copies, rest = divmod(count, len(cells))
  remainder = np.stack(
    [
      rng.permutation(rng.permutation(size)[np.arange(rest) % size])
      for size in sizes
    ],
    axis=1,
  )
  return rng.permutation(np.concatenate([cells] * copies + [remainder]))


def draw_times(
  rng: np.random.Generator, *, num_frames: int, num_events: int, num_cuts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Uniform times of events and cuts that keep their distances.

  All of them are drawn independently and uniformly and drawn again until the
  distances hold, a rule that is the same backwards in time.

  Returns:
    Start and stop frames of the events int[num_events], ascending, and cuts
    int[num_cuts], ascending.

  Raises:
    ValueError: the video is too short for its events.
  """
  tries = 512
  for _ in range(64):
    length = rng.choice(_EVENT_FRAMES, (tries, num_events))
    # The last start depends on the length, so that both ends are alike.
    start = _MARGIN + np.floor(
      rng.random(length.shape) * (num_frames - 2 * _MARGIN - length + 1)
    ).astype(int)
    cut = rng.integers(_CUT_GAP, num_frames - _CUT_GAP + 1, (tries, num_cuts))
    order = np.argsort(start, axis=1)
    start = np.take_along_axis(start, order, axis=1)
    stop = start + np.take_along_axis(length, order, axis=1)
    cut = np.sort(cut, axis=1)
    good = np.all(start[:, 1:] - stop[:, :-1] >= _EVENT_GAP, axis=1)
    good &= np.all(np.diff(cut, axis=1) >= _CUT_GAP, axis=1)
    before = cut[:, :, None] <= start[:, None] - _MARGIN
    after = cut[:, :, None] >= stop[:, None] + _MARGIN
    good &= np.all(before | after, axis=(1, 2))
    if good.any():
      n = int(np.argmax(good))
      return start[n], stop[n], cut[n]
  raise ValueError(
    f"{num_events} events and {num_cuts} cuts do not fit into {num_frames}"
    " frames; raise data.synthetic.num_frames or lower num_events"
  )


def _draw_flickers(rng, num_frames, start, stop, cut):
  """Frames at least `_FLICKER_GAP` from every event, cut, end, and flicker."""
  free = np.ones(num_frames, dtype=bool)
  free[:_FLICKER_GAP] = free[num_frames - _FLICKER_GAP :] = False
  for first, last in zip(start, stop):
    free[first - _FLICKER_GAP : last + _FLICKER_GAP] = False
  for first in cut:
    free[first - _FLICKER_GAP : first + _FLICKER_GAP] = False
  chosen = []
  for _ in range(rng.integers(2, 5)):
    if not free.any():
      break
    frame = int(rng.choice(np.flatnonzero(free)))
    chosen.append(frame)
    free[max(frame - _FLICKER_GAP, 0) : frame + _FLICKER_GAP + 1] = False
  return tuple(sorted(chosen))


def _choices(right, others, letter, rng):
  """Options with the right one under its letter, the others in random order."""
  options = list(rng.permutation(others))
  options.insert(letter, right)
  return options


def _needle(row, names, num_events, rng):
  """Colours of the events, relevant events, question, options, answer."""
  letter, colour, target = (int(level) for level in row)
  colours = [""] * num_events
  colours[target] = names[colour]
  others = list(rng.permutation([n for n in names if n != names[colour]]))
  options = _choices(names[colour], others[:3], letter, rng)
  return (
    colours,
    (target,),
    "Which colour is the shape?",
    options,
    LETTERS[letter],
  )


def _order(row, names, num_events, rng):
  letter, colour, offset, pair = (int(level) for level in row)
  first = names[colour]
  second = names[(colour + 1 + offset) % len(names)]
  relevant = list(itertools.combinations(range(num_events), 2))[pair]
  colours = [""] * num_events
  colours[relevant[0]], colours[relevant[1]] = first, second
  rest = list(rng.permutation([n for n in names if n not in (first, second)]))
  options = _choices(first, [second, *rest[:2]], letter, rng)
  return (
    colours,
    relevant,
    "Which colour appears first?",
    options,
    LETTERS[letter],
  )


def _count(row, names, num_events, rng):
  letter, times = (int(level) for level in row)
  relevant = np.sort(rng.permutation(num_events)[: times + 1])
  colours = [""] * num_events
  for n in relevant:
    colours[n] = str(rng.choice(names))
  others = [str(n + 1) for n in range(num_events) if n != times]
  options = _choices(str(times + 1), others, letter, rng)
  return (
    colours,
    tuple(relevant.tolist()),
    "How many shapes appear?",
    options,
    LETTERS[letter],
  )


def make_specs(
  split: str,
  count: int,
  *,
  seed: int,
  num_frames: int = 96,
  fps: float = 8.0,
  size_px: int = 64,
  tasks: Sequence[str] = TASKS,
  num_events: int = 3,
  num_colours: int = 4,
) -> list[Spec]:
  """Draws the videos and questions of one split.

  Args:
    split: "train", "dev" or "test"; no two splits share a random number.
    count: videos.
    seed: of the set.
    num_frames: T, frames a video.
    fps: frames a second.
    size_px: height and width of the pictures.
    tasks: names of `TASKS`, in turn.
    num_events: shapes and cutaways of a video, 2 to 4.
    num_colours: how many colours of `PALETTE` are used, at least 4.

  Returns:
    `count` Specs, tasks mixed.

  Raises:
    ValueError: a setting outside its range.
  """
  _check(split, count, num_frames, fps, size_px, tasks, num_events, num_colours)
  names = list(PALETTE)[:num_colours]
  rng = np.random.default_rng([seed, SPLITS.index(split), VERSION])
  makers = {
    "needle": (_needle, (len(LETTERS), num_colours, num_events)),
    "order": (
      _order,
      (
        len(LETTERS),
        num_colours,
        num_colours - 1,
        math.comb(num_events, 2),
      ),
    ),
    "count": (_count, (num_events, num_events)),
  }
  task_of = rng.permutation(np.arange(count) % len(tasks))
  rows = {
    n: iter(balanced(int(np.sum(task_of == n)), makers[task][1], rng))
    for n, task in enumerate(tasks)
  }
  specs = []
  for index in range(count):
    task = tasks[task_of[index]]
    colours, relevant, question, options, answer = makers[task][0](
      next(rows[task_of[index]]), names, num_events, rng
    )
    start, stop, cut = draw_times(
      rng,
      num_frames=num_frames,
      num_events=num_events,
      num_cuts=int(rng.integers(1, 3)),
    )
    events = []
    for n in range(num_events):
      radius = int(rng.integers(round(0.22 * size_px), round(0.3 * size_px)))
      centre = rng.integers(radius + 1, size_px - radius - 1, 2)
      events.append(
        Event(
          int(start[n]),
          int(stop[n]),
          str(colours[n]),
          str(rng.choice(SHAPES)) if colours[n] else CUTAWAY,
          tuple(centre.tolist()),
          radius,
        )
      )
    specs.append(
      Spec(
        id=f"{split}-{index:06d}",
        task=task,
        question=question,
        options=tuple(map(str, options)),
        answer=answer,
        seed=(seed, SPLITS.index(split), VERSION, index),
        num_frames=num_frames,
        fps=float(fps),
        size_px=size_px,
        events=tuple(events),
        relevant=tuple(relevant),
        cuts=tuple(cut.tolist()),
        flickers=_draw_flickers(rng, num_frames, start, stop, cut),
      )
    )
  return specs


def _check(
  split, count, num_frames, fps, size_px, tasks, num_events, num_colours
):
  if split not in SPLITS:
    raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
  if count < 1:
    raise ValueError(
      f"num_{split} must be at least 1, got {count}; change"
      f" data.synthetic.num_{split}"
    )
  if not tasks or set(tasks) - set(TASKS) or len(set(tasks)) < len(tasks):
    raise ValueError(
      f"tasks must be different names of {TASKS}, got {tuple(tasks)}; change"
      " data.synthetic.tasks"
    )
  if not 2 <= num_events <= 4:
    raise ValueError(
      f"num_events must be 2 to 4, got {num_events}; change"
      " data.synthetic.num_events"
    )
  if not len(LETTERS) <= num_colours <= len(PALETTE):
    raise ValueError(
      f"num_colours must be {len(LETTERS)} to {len(PALETTE)}, got"
      f" {num_colours}; change data.synthetic.num_colours"
    )
  if size_px < 32 or size_px % 2:
    raise ValueError(
      f"size_px must be even and at least 32, got {size_px}; change"
      " data.synthetic.size_px"
    )
  if not fps > 0:
    raise ValueError(
      f"fps must be positive, got {fps}; change data.synthetic.fps"
    )
  if num_frames < 2 * _CUT_GAP + 1:
    raise ValueError(
      f"num_frames must be at least {2 * _CUT_GAP + 1}, got {num_frames};"
      " change data.synthetic.num_frames"
    )


# -- pictures


def render(spec: Spec) -> np.ndarray:
  """Draws a video.

  Args:
    spec: from `make_specs`.

  Returns:
    uint8[T, H, W, 3] RGB, before any codec.
  """
  rng = np.random.default_rng(spec.seed)
  size, frames = spec.size_px, np.arange(spec.num_frames)
  jitter = rng.integers(-1, 2, (spec.num_frames, 2))
  canvas = np.empty((spec.num_frames, size, size, 3), np.int16)
  for first, last in itertools.pairwise((0, *spec.cuts, spec.num_frames)):
    _draw_shot(canvas[first:last], frames[first:last], jitter[first:last], rng)
  for event in spec.events:
    if event.shape == CUTAWAY:
      shown = slice(event.start, event.stop)
      _draw_shot(canvas[shown], frames[shown], jitter[shown], rng)
      continue
    colour = np.array(PALETTE[event.colour], np.int16)
    for frame in range(event.start, event.stop):
      shape = _shape_mask(event, size, jitter[frame])
      canvas[frame][shape] = colour
  light = 1 + 0.12 * _oscillation(rng, frames)
  light[list(spec.flickers)] *= rng.choice((0.4, 1.9), len(spec.flickers))
  video = np.empty(canvas.shape, np.uint8)
  flat = (spec.num_frames, size, 3 * size)  # a scalar is one channel's
  for picture, drawn, factor in zip(
    video.reshape(flat), canvas.reshape(flat), light.tolist()
  ):
    cv2.multiply(drawn, factor, dst=picture, dtype=cv2.CV_8U)
  return video


def _oscillation(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
  """float[T] in [-1, 1], stationary and the same backwards in time."""
  period = rng.uniform(16, 64, 2)
  phase = rng.uniform(0, 2 * np.pi, 2)
  return np.sin(2 * np.pi * frames[:, None] / period + phase).mean(axis=1)


def _draw_shot(
  out: np.ndarray,
  frames: np.ndarray,
  jitter: np.ndarray,
  rng: np.random.Generator,
) -> None:
  """Fills int16[t, H, W, 3] with two blob textures that move to and fro."""
  size = out.shape[1]
  reach = size // 8
  tint = (rng.uniform(70, 165) + rng.uniform(-18, 18, 3)).astype(np.int16)
  layers, corners = [], []
  for width in (size / 6, size / 12):
    layers.append(_blobs(size + 2 * reach + 2, width, rng))
    move = np.stack(
      [_oscillation(rng, frames), _oscillation(rng, frames)], axis=1
    )
    corners.append(np.rint(reach * move).astype(int) + reach + 1 + jitter)
  layers[0] += tint
  for picture, (row, column), (row2, column2) in zip(out, *corners):
    np.add(
      layers[0][row : row + size, column : column + size],
      layers[1][row2 : row2 + size, column2 : column2 + size],
      out=picture,
    )


def _blobs(size: int, width: float, rng: np.random.Generator) -> np.ndarray:
  """int16[size, size, 3]: a smooth random field of low saturation."""
  noise = rng.standard_normal((size, size, 3), dtype=np.float32)
  noise = 0.45 * noise + noise[:, :, :1]  # mostly grey
  smooth = cv2.GaussianBlur(noise, (0, 0), width)
  return (smooth * (22 / smooth.std())).astype(np.int16)


def _shape_mask(event: Event, size: int, jitter: np.ndarray) -> np.ndarray:
  """bool[size, size] of an event's shape."""
  row, column = np.ogrid[:size, :size]
  row = row - event.centre_px[0] - jitter[0]
  column = column - event.centre_px[1] - jitter[1]
  radius = event.radius_px
  if event.shape == "disc":
    return row**2 + column**2 <= radius**2
  if event.shape == "square":
    return np.maximum(abs(row), abs(column)) <= 0.85 * radius
  if event.shape == "diamond":
    return abs(row) + abs(column) <= 1.25 * radius
  distance = row**2 + column**2  # a ring
  return (distance <= radius**2) & (distance >= (0.45 * radius) ** 2)


# -- the set on disk


def corpus_texts() -> list[str]:
  """Every text of the set's prompts and targets, for a tokenizer's words."""
  texts = [
    "Which colour is the shape?",
    "Which colour appears first?",
    "How many shapes appear?",
    " ".join(PALETTE),
    "\n".join(f"{letter}. {n + 1}" for n, letter in enumerate(LETTERS)),
  ]
  for colour in PALETTE:
    texts += [f"{letter}. {colour}" for letter in LETTERS]
  return texts


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
  tasks: Sequence[str] = TASKS,
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
    num_frames: T, frames a video; this and the following as in `make_specs`.
    fps: frames a second.
    size_px: height and width of the pictures.
    tasks: names of `TASKS`.
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
  named = {"version": VERSION, "counts": counts, **settings}
  key = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
  root = (
    pathlib.Path(cache_dir).expanduser().absolute() / "synthetic" / key[:16]
  )
  if (root / "DONE").is_file():
    return root
  specs = {
    split: make_specs(split, count, **settings)
    for split, count in counts.items()
  }
  for split in SPLITS:
    (root / "videos" / split).mkdir(parents=True, exist_ok=True)
  with open(root / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits, then finds it done
    if not (root / "DONE").is_file():
      _write_videos(root, list(itertools.chain(*specs.values())), num_workers)
      _write_index(root, specs)
      (root / "settings.json").write_text(json.dumps(named, indent=2) + "\n")
      (root / "DONE").touch()
  return root


def load_specs(path: str | pathlib.Path, split: str) -> list[Spec]:
  """Reads one split's specifications back from the index."""
  builder = _builder(pathlib.Path(path), None)
  specs = []
  for row in builder.as_data_source(split=split):
    fields = json.loads(row["spec"])
    fields["events"] = tuple(
      Event(**event | {"centre_px": tuple(event["centre_px"])})
      for event in fields["events"]
    )
    specs.append(
      Spec(
        **{
          name: tuple(value) if isinstance(value, list) else value
          for name, value in fields.items()
        }
      )
    )
  return sorted(specs, key=lambda spec: spec.id)


def load(path: str | pathlib.Path, split: str) -> list[records.Sample]:
  """Reads one split as Samples.

  Args:
    path: from `ensure`.
    split: "train", "dev" or "test".
  """
  root = pathlib.Path(path)
  return [
    records.Sample(
      id=spec.id,
      video=str(_video_path(root, spec.id)),
      question=spec.question,
      options=spec.options,
      answer=spec.answer,
      task=spec.task,
      start_s=spec.evidence[0][0],
      end_s=spec.evidence[-1][1],
      evidence=spec.evidence,
      reasoning=spec.reasoning,
      source="synthetic",
    )
    for spec in load_specs(root, split)
  ]


def write_video(spec: Spec, path: pathlib.Path) -> None:
  """Draws a video and writes it as mp4; the name appears when it is whole.

  Raises:
    ValueError: OpenCV cannot write there.
  """
  partial = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
  writer = cv2.VideoWriter(
    str(partial),
    cv2.VideoWriter_fourcc(*"mp4v"),
    spec.fps,
    (spec.size_px, spec.size_px),
  )
  if not writer.isOpened():
    raise ValueError(
      f"cannot write {partial}; change data.cache_dir to a folder with room"
    )
  for picture in np.ascontiguousarray(render(spec)[..., ::-1]):
    writer.write(picture)
  writer.release()
  os.replace(partial, path)


def _video_path(root: pathlib.Path, name: str) -> pathlib.Path:
  return root / "videos" / name.split("-")[0] / f"{name}.mp4"


def _write_share(root: pathlib.Path, specs: Sequence[Spec]) -> int:
  cv2.setNumThreads(0)  # several of these run side by side
  for spec in specs:
    write_video(spec, _video_path(root, spec.id))
  return len(specs)


def _write_videos(
  root: pathlib.Path, specs: Sequence[Spec], num_workers: int
) -> None:
  """Writes what is missing, in processes where it is worth starting them."""
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

    VERSION = tfds.core.Version(f"{VERSION}.0.0")

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
