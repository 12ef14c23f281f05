"""From a batch of samples to the views of their videos, ready for the policy.

Axes: `B` videos, `T` scanned frames, `K` keyframes, `F` frames in a temporal
slice, `L = K / F` slots of a view, `N` encoded slices per video, `P` visual
tokens per slice, `S` prompt slots.

The scan is cheap (small frames and a descriptor); only the frames that some
view shows are decoded at the policy's resolution. A view is a prompt and the
numbers of the slices in its slots. The shuffled and reversed views keep the
time labels and positions of the keyframes' slots: only the pictures move.

With F = 1 every frame is a slice, so those two only re-index the keyframes'
slices. With F = 2 neighbours share one, as Qwen2.5-VL sees a video: frames move
before they are paired, and what comes of it are other slices.
"""

import copy
import functools
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cf_jax import descriptor as descriptor_lib
from cf_jax import selectors, tad
from cf_jax.data import (
  drawing,
  footage,
  frame_size,
  patches,
  pipeline,
  prompts,
  records,
)
from cf_jax.types import Keyframes, Prompt, View

ARMS = (
  "keyframes",  # TAD's frames in order
  "uniform",  # evenly spaced frames in order
  "shuffled",  # TAD's frames in a random order that is not the identity
  "reversed",  # TAD's frames backwards
  "single",  # the middle one of the uniform frames, alone
  "times",  # TAD's time labels over blank frames
  "blind",  # no frames
)


# Keyframes of a batch and int32[B, K] uniform frames, T where there is none.
Selected = tuple[Keyframes, np.ndarray]

# Keyframes of so many videos are remembered: tens of kilobytes each.
_REMEMBERED_VIDEOS = 8192


class Prepared(NamedTuple):
  """A batch and its views, as numpy arrays.

  Attributes:
    batch: the loader's batch.
    keyframes: Keyframes of B videos.
    frames: uint8[B, 2K + 1, height, width, 3] keyframes, uniform frames and a
      blank one, each once.
    frame_time_s: float32[B, 2K] seconds of keyframes and uniform frames.
    frame_mask: bool[B, 2K] which of them exist.
    view: View of each arm asked for, of slices; the shuffled arm has one entry
      for each permutation (`shuffled`, `shuffled_1`, ...).
    can_shuffle: bool[B] False with fewer than two keyframes.
    has_apex: bool[B] False where the keyframes are the uniform frames.
    slices: int32[B, N, F] which of the frames make each encoded slice: the
      keyframes' L slices, then those that only other arms show, last the blank
      one. N depends on the arms alone.
  """

  batch: pipeline.Batch
  keyframes: Keyframes
  frames: np.ndarray
  frame_time_s: np.ndarray
  frame_mask: np.ndarray
  view: dict[str, View]
  can_shuffle: np.ndarray
  has_apex: np.ndarray
  slices: np.ndarray

  @property
  def num_slots(self) -> int:
    """L, the slots of a view."""
    return self.keyframes.index.shape[1] // self.slices.shape[2]

  @property
  def keyframe_time_s(self) -> np.ndarray:
    """float32[B, K] seconds of the keyframes."""
    return self.frame_time_s[:, : self.keyframes.index.shape[1]]

  @property
  def slot_time_s(self) -> np.ndarray:
    """float32[B, L] seconds of the keyframes' slots: of their first frames."""
    return self.keyframe_time_s[:, :: self.slices.shape[2]]

  @property
  def num_shown(self) -> int:
    """How many of the N slices some view shows; they are the first ones."""
    return self.slices.shape[1] - ("times" not in self.view)

  def by_slot(self, value: np.ndarray) -> np.ndarray:
    """[B, K] of keyframes -> [B, L]: the largest of each slot's."""
    return value.reshape(len(value), self.num_slots, -1).max(axis=2)


def permute_frames(
  num_valid: int, num_frames: int, rng: np.random.Generator
) -> np.ndarray:
  """A random order of the first `num_valid` frames that is not the identity.

  Returns:
    int32[num_frames]; frames from `num_valid` on stay where they are, and all
    do where there are fewer than two to move.
  """
  order = np.arange(num_frames, dtype=np.int32)
  if num_valid < 2:
    return order
  while True:
    drawn = rng.permutation(num_valid)
    if np.any(drawn != np.arange(num_valid)):
      order[:num_valid] = drawn
      return order


_embed_pixels = jax.jit(descriptor_lib.pixel_descriptor)


def make_embedder(
  descriptor: str, encode: Callable | None = None
) -> Callable[[np.ndarray], jax.Array]:
  """What the scan is judged by: uint8[B, T, h, w, 3] -> float[B, T, E].

  Args:
    descriptor: "pixels" (no weights) or "vision" (the policy's own tower).
    encode: for "vision", such a function.
  """
  if descriptor == "pixels":
    return _embed_pixels
  if descriptor != "vision":
    raise ValueError(
      f"descriptor must be 'pixels' or 'vision', got {descriptor!r}; change"
      " config.scan.descriptor"
    )
  if encode is None:
    raise ValueError(
      "config.scan.descriptor='vision' needs the policy's vision tower,"
      " got none; set it to 'pixels'"
    )
  return encode


def make_selector(
  *,
  descriptor: str,
  select: str = "tad",
  encode: Callable | None = None,
  **settings,
) -> Callable[[np.ndarray, np.ndarray], tuple[Keyframes, jax.Array]]:
  """The jitted scan: small frames -> keyframes and uniform frame numbers.

  Args:
    descriptor: of `make_embedder`.
    select: "tad" or a baseline, a key of `selectors.SELECTORS`. "random" shows
      the same frames of a video every time.
    encode: of `make_embedder`.
    **settings: of `tad.select_keyframes`; a baseline takes `num_keyframes` and
      leaves the others.

  Returns:
    A function of scan uint8[B, T, h, w, 3] and mask bool[B, T] that gives
    Keyframes and the uniform selector's int32[B, K] (missing slots hold T).
  """
  embed = make_embedder(descriptor, encode)
  try:
    selectors.by_name(select)
  except ValueError as error:
    raise ValueError(f"{error}; change config.scan.select") from None
  num_keyframes = settings["num_keyframes"]
  if select != "tad":
    settings = dict(num_keyframes=num_keyframes)
  uniform = jax.jit(
    jax.vmap(functools.partial(tad.uniform_index, num_keyframes=num_keyframes))
  )

  def choose(scan, mask):
    how = dict(settings)
    if select == "random":  # by what a video shows, not where it stands
      seeds = [zlib.crc32(np.ascontiguousarray(video)) for video in scan]
      how["rng"] = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
    mask = jnp.asarray(mask)
    keyframes = selectors.select_videos(select, embed(scan), mask, **how)
    return keyframes, uniform(mask)

  return choose


def thin_scan(
  mask: np.ndarray,
  duration_s: Sequence[float],
  fps: float,
  *,
  most: int,
  multiple: int = 1,
) -> np.ndarray:
  """The scanned frames that uniform frames at `fps` are taken from.

  Args:
    mask: bool[B, T] real scanned frames.
    duration_s: of the B videos or clips, as their files say.
    fps: frames a second.
    most: K, and the following, as of `frame_size.num_shown`.

  Returns:
    bool[B, T] as many of the real frames, at equal distances, as are shown, or
    all where that is K.
  """
  thin = mask.copy()
  for row, seconds in zip(thin, duration_s, strict=True):
    count = frame_size.num_shown(seconds, fps, most=most, multiple=multiple)
    real = np.flatnonzero(row)
    if count < most:
      row[:] = False
      row[real[frame_size.spread(len(real), count)]] = True
  return thin


def selectable(
  batch: pipeline.Batch,
  reader: pipeline.FrameReader,
  fps: float,
  *,
  most: int,
  multiple: int,
) -> np.ndarray:
  """The scanned frames of a batch that a selector may choose among.

  All real ones, or with `fps` what `thin_scan`, whose arguments these are,
  leaves of them.
  """
  if not fps:
    return batch.scan_mask
  duration_s = reader.durations_s(batch.samples)
  return thin_scan(
    batch.scan_mask, duration_s, fps, most=most, multiple=multiple
  )


def frames_of_boxes(
  samples: Sequence[records.Sample],
  mask: np.ndarray,
  keyframes: Keyframes,
  uniform: np.ndarray,
) -> tuple[Keyframes, np.ndarray]:
  """The same, but for tracking questions: they show what their boxes are of.

  A question with n boxes has them in n frames at equal distances, and is asked
  for as many; its other slots stay empty, whatever was selected.

  Args:
    samples: B samples.
    mask: bool[B, T] real scanned frames.
    keyframes: of the selection, numpy arrays [B, ...].
    uniform: int32[B, K] uniform frames, T where there is none.

  Raises:
    ValueError: more boxes than K, or than the video has frames.
  """
  rows = [n for n, sample in enumerate(samples) if sample.kind == "tracking"]
  if not rows:
    return keyframes, uniform
  num_slots, num_frames = keyframes.index.shape[1], mask.shape[1]
  index, uniform = keyframes.index.copy(), uniform.copy()
  for row in rows:
    sample, real = samples[row], int(mask[row].sum())
    count = len(sample.boxes)
    if count > min(num_slots, real):
      raise ValueError(
        f"tracking sample {sample.id!r} has boxes of {count} frames, got"
        f" {num_slots} keyframes and {real} scanned frames; raise"
        " config.tad.num_keyframes or config.data.loader.scan_frames, or leave"
        " the sample out"
      )
    index[row] = num_frames
    place = frame_size.spread(real, count)
    index[row, :count] = np.flatnonzero(mask[row])[place]
    uniform[row] = index[row]
  shown = np.array([sample.kind == "tracking" for sample in samples])[:, None]
  return keyframes.replace(
    index=index,
    mask=np.where(shown, index < num_frames, keyframes.mask),
    order=np.where(shown, index, keyframes.order),
    saliency=np.where(shown, 0, keyframes.saliency),
  ), uniform


class ViewMaker:
  """Turns loader batches into `Prepared` batches.

  Args:
    tokenizer: prompts.Tokenizer.
    select: from `make_selector`.
    reader: pipeline.FrameReader at the policy's resolution.
    frames_per_slice: F, 1 or the temporal patch size.
    prompt: keyword arguments of `prompts.build_prompt`.
    templates: kind of question -> question template, where it is not that of
      `prompt`.
    max_prompt_tokens: S; a longer prompt is an error, never cut.
    patch: (patch_size, merge_size, temporal_patch_size).
    num_keyframes: K.
    number_frames: draws its number on each frame, keyframes and uniform frames
      counted from 0.
    fps: frames a second that are shown at most, see `thin_scan`; 0: always K.
    num_shuffles: M permutations for the shuffled arm.
    seed: seeds the permutations, with the sample's number and the epoch.
  """

  def __init__(
    self,
    tokenizer: prompts.Tokenizer,
    select: Callable,
    reader: pipeline.FrameReader,
    *,
    prompt: dict,
    max_prompt_tokens: int,
    patch: tuple[int, int, int],
    num_keyframes: int,
    num_shuffles: int,
    seed: int,
    frames_per_slice: int = 1,
    number_frames: bool = False,
    fps: float = 0.0,
    templates: Mapping[str, str] | None = None,
  ):
    self._templates = dict(templates or {})
    unknown = sorted(set(self._templates) - set(get_args(records.Kind)))
    if unknown:
      raise ValueError(
        f"question templates for {unknown}, but the kinds of questions are"
        f" {sorted(get_args(records.Kind))}; change config.prompt.templates"
      )
    self._tokenizer = tokenizer
    self._select = select
    self._reader = reader
    self._prompt = prompt
    self._max_prompt_tokens = max_prompt_tokens
    self._patch_size, self._merge, self._temporal = patch
    if num_shuffles < 1:
      raise ValueError(
        f"num_shuffles must be at least 1, got {num_shuffles}; change"
        " config.contrast.num_shuffles"
      )
    if frames_per_slice not in (1, self._temporal):
      raise ValueError(
        f"frames_per_slice is {frames_per_slice}, expected 1 or the"
        f" {self._temporal} frames that the model's temporal patch holds;"
        " change config.prompt.frames_per_slice"
      )
    if num_keyframes % frames_per_slice:
      raise ValueError(
        f"{num_keyframes} keyframes do not divide into slices of"
        f" {frames_per_slice} frames; change config.tad.num_keyframes or"
        " config.prompt.frames_per_slice"
      )
    self._frames_per_slice = frames_per_slice
    self._number_frames = number_frames
    self._fps, self._num_keyframes = fps, num_keyframes
    self._num_slots = num_keyframes // frames_per_slice
    self._num_shuffles = num_shuffles
    self._seed = seed
    self._memory = {}
    self._lock = threading.Lock()  # a loader thread and the loop both ask
    height, width = reader.size_px
    self.grid = patches.grid_of(
      height, width, patch=self._patch_size, merge=self._merge
    )
    self.merged_grid = (
      self.grid[0] // self._merge,
      self.grid[1] // self._merge,
    )

  def __call__(
    self,
    batch: pipeline.Batch,
    arms: Sequence[str],
    *,
    draw: int = 0,
    selected: Selected | None = None,
  ) -> Prepared:
    """Selects, decodes and words the views of a batch.

    Args:
      batch: from the loader.
      arms: names from `ARMS`.
      draw: another number gives other permutations (the step, say).
      selected: what `select` would give, as numpy arrays; None asks it, once a
        video.

    Raises:
      ValueError: an unknown arm, or a prompt longer than S.
    """
    unknown = sorted(set(arms) - set(ARMS))
    if unknown:
      raise ValueError(f"unknown arms {unknown}; choose from {ARMS}")
    if selected is None:
      selected = self._selected(batch)
    elif any(sample.kind == "tracking" for sample in batch.samples):
      raise ValueError(
        "the frames of a tracking question are those of its boxes, none are"
        " left to choose; leave such samples out, or set"
        " config.selector.learn=False"
      )
    keyframes, uniform = selected
    uniform_mask = uniform < batch.scan_mask.shape[1]
    scanned = np.concatenate([keyframes.index, uniform], axis=1)  # [B, 2K]
    mask = np.concatenate([keyframes.mask, uniform_mask], axis=1)
    safe = np.where(mask, scanned, 0)
    rows = np.arange(len(batch.samples))[:, None]
    frames = self._reader.read(batch.samples, batch.frame_index[rows, safe])
    if self._number_frames:
      number = np.tile(np.arange(keyframes.index.shape[1]), 2)
      frames = drawing.draw_numbers(
        frames, np.broadcast_to(number, frames.shape[:2])
      )
    blank = np.full_like(frames[:, :1], 128)
    frames = np.concatenate([frames, blank], axis=1)  # [B, 2K + 1, h, w, 3]
    time_s = np.where(mask, batch.scan_time_s[rows, safe], np.nan)

    count = len(batch.samples)
    num_keyframes, per_slice = keyframes.index.shape[1], self._frames_per_slice
    number = np.arange(num_keyframes, dtype=np.int32)
    num_valid = keyframes.mask.sum(axis=1)
    blocks = []

    def encode(frame):
      """Adds slices of frames int[B, n * F]; their numbers, int32[B, n]."""
      first = sum(block.shape[1] for block in blocks)
      made = np.broadcast_to(frame, (count, frame.shape[-1]))
      blocks.append(made.reshape(count, -1, per_slice).astype(np.int32))
      slots = np.arange(first, first + blocks[-1].shape[1], dtype=np.int32)
      return np.broadcast_to(slots, (count, len(slots)))

    def fill(order, real):
      """Repeats the last of a row's `real` frames: an odd number is paired as
      Qwen2.5-VL's processor does it, the slots behind are masked."""
      if per_slice == 1:
        return order
      last = np.maximum(real - 1, 0)[:, None]
      return np.take_along_axis(order, np.minimum(number, last), axis=1)

    def words(first):
      """The prompts of slots with the times of frames [first, first + K)."""
      window = slice(first, first + num_keyframes, per_slice)
      return self._prompts(batch, time_s[:, window], mask[:, window])

    in_order = np.broadcast_to(number, (count, num_keyframes))
    by_keyframes = View(
      prompt=words(0), frame=encode(fill(in_order, num_valid))
    )

    def moved(order):
      """The keyframes in another order, int32[B, K], in the same slots."""
      return by_keyframes.replace(
        frame=order if per_slice == 1 else encode(fill(order, num_valid))
      )

    uniform_slots = None
    if "uniform" in arms or "single" in arms and per_slice == 1:
      uniform_slots = encode(
        num_keyframes + fill(in_order, uniform_mask.sum(axis=1))
      )
    made = {}
    for arm in arms:
      if arm == "keyframes":
        made[arm] = by_keyframes
      elif arm == "uniform":
        made[arm] = View(prompt=words(num_keyframes), frame=uniform_slots)
      elif arm == "reversed":
        order = [
          np.concatenate([number[:n][::-1], number[n:]]) for n in num_valid
        ]
        made[arm] = moved(np.stack(order))
      elif arm == "shuffled":
        for m in range(self._num_shuffles):
          order = [
            permute_frames(
              n,
              num_keyframes,
              np.random.default_rng([self._seed, draw, int(sample), m]),
            )
            for n, sample in zip(num_valid, batch.sample_index, strict=True)
          ]
          made[arm if m == 0 else f"{arm}_{m}"] = moved(np.stack(order))
      elif arm == "single":
        middle = (uniform_mask.sum(axis=1) // 2)[:, None]  # [B, 1]
        one = np.take_along_axis(time_s, num_keyframes + middle, axis=1)
        if per_slice == 1:
          slot = np.take_along_axis(uniform_slots, middle, axis=1)
        else:
          slot = encode(np.repeat(num_keyframes + middle, per_slice, axis=1))
        made[arm] = View(
          prompt=self._prompts(batch, one, np.ones((count, 1), bool)),
          frame=np.broadcast_to(slot, by_keyframes.frame.shape),
        )
      elif arm == "blind":
        made[arm] = View(
          prompt=self._prompts(batch, time_s[:, :0], mask[:, :0]),
          frame=by_keyframes.frame,
        )
    blank = encode(np.full(per_slice, 2 * num_keyframes))
    if "times" in arms:
      made["times"] = by_keyframes.replace(
        frame=np.broadcast_to(blank, by_keyframes.frame.shape)
      )
    return Prepared(
      batch=batch,
      keyframes=keyframes,
      frames=frames,
      frame_time_s=time_s,
      frame_mask=mask,
      view=made,
      can_shuffle=num_valid >= 2,
      has_apex=np.any(keyframes.index != uniform, axis=1),
      slices=np.concatenate(blocks, axis=1),
    )

  def choosing(
    self, choose: Callable[[pipeline.Batch], tuple[Keyframes, np.ndarray]]
  ) -> "ViewMaker":
    """The same views of frames that are chosen otherwise, every time anew.

    Args:
      choose: batch -> Keyframes and uniform frame numbers, numpy arrays as
        `selected` of a call.
    """
    other = copy.copy(self)
    other._selected = choose
    return other

  def read_ahead(self, batch: pipeline.Batch, index: np.ndarray) -> None:
    """Decodes frames that later calls show, each video once, into the cache.

    Args:
      batch: from the loader.
      index: int[B, n] scanned frames; T where there is none.
    """
    safe = np.where(index < batch.scan_mask.shape[1], index, 0)
    rows = np.arange(len(batch.samples))[:, None]
    self._reader.read(batch.samples, batch.frame_index[rows, safe])

  def patches(self, frames: np.ndarray) -> np.ndarray:
    """uint8[B, n * F, height, width, 3] -> float32[B, n, 4P, patch].

    F frames in a row are a slice (`experiment.shown_frames` lays them so).
    Made where they are needed: they take 8 times the memory of the frames.
    """
    made = patches.frames_to_patches(
      frames.reshape(-1, *frames.shape[2:]),
      patch=self._patch_size,
      merge=self._merge,
      temporal=self._temporal,
      pair=self._frames_per_slice > 1,
    )
    return made.reshape(len(frames), -1, *made.shape[1:])

  def _selected(self, batch: pipeline.Batch) -> tuple[Keyframes, np.ndarray]:
    """Keyframes and uniform frames; a video is scored once, then remembered.

    The selector has no weights that training changes, so a video's keyframes
    hold for the run. All of a batch is scored where one of it is new, which
    keeps the shapes of the jitted scan fixed.
    """
    keys = [
      (footage.of_sample(sample), int(mask.sum()))
      for sample, mask in zip(batch.samples, batch.scan_mask, strict=True)
    ]
    with self._lock:
      keyframes, uniform = self._remembered(batch, keys)
    return frames_of_boxes(batch.samples, batch.scan_mask, keyframes, uniform)

  def _remembered(self, batch, keys):
    if not all(key in self._memory for key in keys):
      with jax.profiler.TraceAnnotation("tad"):
        mask = selectable(
          batch,
          self._reader,
          self._fps,
          most=self._num_keyframes,
          multiple=self._frames_per_slice,
        )
        scored = jax.device_get(self._select(batch.scan, mask))
      while self._memory and len(self._memory) + len(keys) > _REMEMBERED_VIDEOS:
        self._memory.pop(next(iter(self._memory)))  # the oldest
      for row, key in enumerate(keys):
        self._memory[key] = jax.tree.map(
          lambda leaf, i=row: leaf[i].copy(), scored
        )
    return jax.tree.map(
      lambda *leaves: np.stack(leaves), *(self._memory[key] for key in keys)
    )

  def count_tokens(self, sample: records.Sample, *, duration_s: float) -> int:
    """Most slots of a sample's prompt, for a video of `duration_s` seconds."""
    return prompts.count_tokens(
      self._tokenizer,
      sample.question,
      sample.options,
      num_frames=self._num_slots,
      duration_s=duration_s,
      grid=self.merged_grid,
      **self._build(sample),
    )

  def _build(self, sample: records.Sample) -> dict:
    """Keyword arguments of `prompts.build_prompt` for a sample's kind."""
    template = self._templates.get(sample.kind)
    return self._prompt | ({"question_template": template} if template else {})

  def _prompts(self, batch, time_s, mask) -> Prompt:
    rows = [
      prompts.build_prompt(
        self._tokenizer,
        sample.question,
        sample.options,
        frame_time_s=seconds[real],
        grid=self.merged_grid,
        **self._build(sample),
      )
      for sample, seconds, real in zip(batch.samples, time_s, mask, strict=True)
    ]
    return Prompt(**prompts.pad_prompts(rows, self._max_prompt_tokens))
