"""How the videos of the built-in set are drawn, and written as mp4.

A drifting texture of muted colours with camera cuts, one-frame flickers,
oscillating light and camera jitter; into it come events: a big, saturated shape
that pops up, fades in and out or wanders about, or a cutaway, where the picture
changes to another texture and back.

Every law of motion and light is stationary and the same backwards in time, so
no picture tells when it was shown.

Axes: `T` frames; pixels are [..., height, width, 3], RGB.
"""

import itertools
import os
import pathlib
from typing import NamedTuple

import cv2
import numpy as np

from cf_jax import disk

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
# Half the width of a shape, in radii, where it is not 1.
_REACH = {"square": 0.85, "diamond": 1.25}


class Event(NamedTuple):
  """A shape, or a cutaway.

  Attributes:
    start: its first frame.
    stop: one past its last frame.
    colour: a name of `PALETTE`; "" of a cutaway.
    shape: a name of `SHAPES`, or `CUTAWAY`.
    centre_px: (row, column) of its centre.
    radius_px: half its width.
    fades: comes and goes little by little.
    path_px: of a shape that moves: its centre in every frame.
  """

  start: int
  stop: int
  colour: str
  shape: str
  centre_px: tuple[int, int]
  radius_px: int
  fades: bool = False
  path_px: tuple[tuple[int, int], ...] = ()


class Spec(NamedTuple):
  """Everything about one video and its question; `render` draws it.

  Attributes:
    id: "train-000012", unique in the set.
    task: a name of `synthetic_tasks.TASKS`.
    question: the question alone.
    options: the choices, without letters; empty for an open question.
    answer: the letter of the right one, or the answer's text.
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
  def evidence(self) -> tuple[tuple[float, float], ...]:
    """(start, end) seconds of the relevant events, in time order.

    Of one that fades: while at least half of it is there.
    """
    found = []
    for event in (self.events[n] for n in self.relevant):
      hidden = (event.stop - event.start) // 4 if event.fades else 0
      found.append(
        ((event.start + hidden) / self.fps, (event.stop - hidden) / self.fps)
      )
    return tuple(found)


def extent_px(shape: str, radius_px: int) -> int:
  """How many pixels a shape reaches from its centre to every side."""
  return int(_REACH.get(shape, 1.0) * radius_px)


def opacity(event: Event) -> np.ndarray:
  """float[stop - start]: how much of an event shows in each of its frames."""
  length = event.stop - event.start
  if not event.fades:
    return np.ones(length)
  return np.sin(np.pi * (np.arange(length) + 0.5) / length) ** 2


def render(spec: Spec) -> np.ndarray:
  """Draws a video.

  Args:
    spec: from `synthetic_tasks.make_specs`.

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
    colour = np.array(PALETTE[event.colour])
    for n, share in enumerate(opacity(event)):
      frame = event.start + n
      # A path says where a shape is on the screen, the camera's jitter in it.
      centre = (
        np.array(event.path_px[n])
        if event.path_px
        else np.array(event.centre_px) + jitter[frame]
      )
      shape = _shape_mask(event, size, centre)
      behind = canvas[frame][shape]
      canvas[frame][shape] = np.rint(behind + share * (colour - behind))
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


def _shape_mask(event: Event, size: int, centre: np.ndarray) -> np.ndarray:
  """bool[size, size] of an event's shape about a centre (row, column)."""
  row, column = np.ogrid[:size, :size]
  row, column = row - centre[0], column - centre[1]
  radius = event.radius_px
  if event.shape == "disc":
    return row**2 + column**2 <= radius**2
  if event.shape == "square":
    return np.maximum(abs(row), abs(column)) <= _REACH["square"] * radius
  if event.shape == "diamond":
    return abs(row) + abs(column) <= _REACH["diamond"] * radius
  distance = row**2 + column**2  # a ring
  return (distance <= radius**2) & (distance >= (0.45 * radius) ** 2)


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
  disk.replace(partial, path)
