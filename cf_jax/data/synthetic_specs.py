"""From tasks to the videos and questions of a split.

The factors of a question (letter, colour, place, ...) come from a full
factorial design, so letters and answers are balanced per task and split;
everything else is drawn apart from them.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from cf_jax.data import (
  synthetic_tasks,
  synthetic_times,
  synthetic_video,
)
from cf_jax.data.synthetic_video import Event, Spec

# Part of the cache key: raise it whenever a specification or a pixel changes.
VERSION = 3

BASIC = ("needle", "order", "count")
SPLITS = ("train", "dev", "test")


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


def make_specs(
  split: str,
  count: int,
  *,
  seed: int,
  num_frames: int = 96,
  fps: float = 8.0,
  size_px: int = 64,
  tasks: Sequence[str] = BASIC,
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
    tasks: names of `synthetic_tasks.TASKS`, in turn.
    num_events: shapes and cutaways of a video, 2 to 4; some tasks have one.
    num_colours: how many colours of `PALETTE` are used, at least 4.

  Returns:
    `count` Specs, tasks mixed.

  Raises:
    ValueError: a setting outside its range.
  """
  _check(split, count, num_frames, fps, size_px, tasks, num_events, num_colours)
  names = list(synthetic_video.PALETTE)[:num_colours]
  rng = np.random.default_rng([seed, SPLITS.index(split), VERSION])
  task_of = rng.permutation(np.arange(count) % len(tasks))
  rows = []
  for n, name in enumerate(tasks):
    task = _task(name, split)
    levels = task.levels(task.num_events or num_events, num_colours)
    rows.append(iter(balanced(int(np.sum(task_of == n)), levels, rng)))
  specs = []
  for index in range(count):
    name = tasks[task_of[index]]
    task = _task(name, split)
    question = task.ask(
      next(rows[task_of[index]]), names, task.num_events or num_events, rng
    )
    start, stop, cut = task.times(rng, question, num_frames, fps)
    shapes = question.shapes or [""] * len(start)
    events = [
      _draw_event(
        rng,
        *map(int, span),
        str(colour),
        shape,
        looks=task.looks,
        size_px=size_px,
      )
      for *span, colour, shape in zip(start, stop, question.colours, shapes)
    ]
    # What shows all the time leaves room for flickers.
    passing = stop - start < num_frames
    spec = Spec(
      id=f"{split}-{index:06d}",
      task=name,
      question=question.text,
      options=tuple(map(str, question.options)),
      answer=question.answer,
      seed=(seed, SPLITS.index(split), VERSION, index),
      num_frames=num_frames,
      fps=float(fps),
      size_px=size_px,
      events=tuple(events),
      relevant=tuple(question.relevant),
      cuts=tuple(cut.tolist()),
      flickers=synthetic_times.draw_flickers(
        rng, num_frames, start=start[passing], stop=stop[passing], cut=cut
      ),
    )
    if task.answer is not None:
      spec = spec._replace(answer=task.answer(spec))
    specs.append(spec)
  return specs


def _task(name: str, split: str) -> synthetic_tasks.Task:
  """How a split asks a task's questions."""
  task = synthetic_tasks.TASKS[name]
  return (split == "train" and task.train) or task


def _draw_event(
  rng: np.random.Generator,
  start: int,
  stop: int,
  colour: str,
  shape: str,
  *,
  looks: str,
  size_px: int,
) -> Event:
  """Draws what an event leaves open: place, size, and the shape if it is "".

  What moves is smaller, so that no fixed box holds it.
  """
  low, high = (0.12, 0.17) if looks == "moves" else (0.22, 0.3)
  radius = int(rng.integers(round(low * size_px), round(high * size_px)))
  centre = rng.integers(radius + 1, size_px - radius - 1, 2)
  if not colour:
    shape = synthetic_video.CUTAWAY
  elif not shape:
    shape = str(rng.choice(synthetic_video.SHAPES))
  event = Event(
    start,
    stop,
    colour,
    shape,
    tuple(centre.tolist()),
    radius,
    fades=looks == "fades" and bool(colour),
  )
  if looks != "moves":
    return event
  path = _wander(
    rng,
    stop - start,
    low=synthetic_video.extent_px(shape, radius),
    size_px=size_px,
  )
  return event._replace(centre_px=path[0], path_px=path)


def _wander(rng, length: int, *, low: int, size_px: int):
  """A path to and fro between the edges, at an even pace in either direction.

  Every place between the edges is equally likely at any time.
  """
  period = length * rng.uniform(1 / 3, 1, 2)
  turn = rng.random(2) + np.arange(length)[:, None] / period
  share = 1 - abs(2 * (turn % 1) - 1)
  path = low + np.rint(share * (size_px - 1 - 2 * low)).astype(int)
  return tuple(map(tuple, path.tolist()))


def _check(
  split, count, num_frames, fps, size_px, tasks, num_events, num_colours
):
  known = tuple(synthetic_tasks.TASKS)
  fewest, most = len(synthetic_tasks.LETTERS), len(synthetic_video.PALETTE)
  shortest = 2 * synthetic_times.CUT_GAP + 1
  if split not in SPLITS:
    raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
  if count < 1:
    raise ValueError(
      f"num_{split} must be at least 1, got {count}; change"
      f" data.synthetic.num_{split}"
    )
  if not tasks or set(tasks) - set(known) or len(set(tasks)) < len(tasks):
    raise ValueError(
      f"tasks must be different names of {known}, got {tuple(tasks)}; change"
      " data.synthetic.tasks"
    )
  if not 2 <= num_events <= 4:
    raise ValueError(
      f"num_events must be 2 to 4, got {num_events}; change"
      " data.synthetic.num_events"
    )
  if not fewest <= num_colours <= most:
    raise ValueError(
      f"num_colours must be {fewest} to {most}, got {num_colours}; change"
      " data.synthetic.num_colours"
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
  if num_frames < shortest:
    raise ValueError(
      f"num_frames must be at least {shortest}, got {num_frames}; change"
      " data.synthetic.num_frames"
    )
