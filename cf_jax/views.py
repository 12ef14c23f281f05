"""From a batch of samples to the views of their videos, ready for the policy.

Axes: `B` videos, `T` scanned frames, `K` keyframe slots, `N = 2K + 1` encoded
frames per video (keyframes, uniform frames, one blank), `P` visual tokens per
frame, `S` prompt slots.

The scan is cheap (small frames and a descriptor); only the frames that some
view shows are decoded at the policy's resolution. A view is a prompt and the
numbers of the frames in its slots. The shuffled and reversed views keep the
time labels and positions of the keyframes' slots: only the pictures move.
"""

import functools
import threading
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cf_jax import selectors, tad
from cf_jax.data import patches, pipeline, prompts, records
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


# Keyframes of so many videos are remembered: tens of kilobytes each.
_REMEMBERED_VIDEOS = 8192


class Prepared(NamedTuple):
  """A batch and its views, as numpy arrays.

  Attributes:
    batch: the loader's batch.
    keyframes: Keyframes of B videos.
    frames: uint8[B, N, height, width, 3] what is encoded.
    frame_time_s: float32[B, 2K] seconds of keyframes and uniform frames.
    frame_mask: bool[B, 2K] which of them exist.
    view: View of each arm asked for; the shuffled arm has one entry for each
      permutation (`shuffled`, `shuffled_1`, ...).
    can_shuffle: bool[B] False with fewer than two keyframes.
    has_apex: bool[B] False where the keyframes are the uniform frames.
  """

  batch: pipeline.Batch
  keyframes: Keyframes
  frames: np.ndarray
  frame_time_s: np.ndarray
  frame_mask: np.ndarray
  view: dict[str, View]
  can_shuffle: np.ndarray
  has_apex: np.ndarray


def permute_slots(
  num_valid: int, num_slots: int, rng: np.random.Generator
) -> np.ndarray:
  """A random order of the first `num_valid` slots that is not the identity.

  Returns:
    int32[num_slots]; slots from `num_valid` on stay where they are, and all
    do where there are fewer than two to move.
  """
  order = np.arange(num_slots, dtype=np.int32)
  if num_valid < 2:
    return order
  while True:
    drawn = rng.permutation(num_valid)
    if np.any(drawn != np.arange(num_valid)):
      order[:num_valid] = drawn
      return order


def make_selector(
  *,
  descriptor: str,
  select: str = "tad",
  encode: Callable | None = None,
  **settings,
) -> Callable[[np.ndarray, np.ndarray], tuple[Keyframes, jax.Array]]:
  """The jitted scan: small frames -> keyframes and uniform frame numbers.

  Args:
    descriptor: "pixels" (no weights) or "vision" (the policy's own tower).
    select: "tad" or a baseline, a key of `selectors.SELECTORS`. "random" shows
      the same frames of a video every time.
    encode: for "vision": uint8[B, T, h, w, 3] -> float[B, T, E].
    **settings: of `tad.select_keyframes`; a baseline takes `num_keyframes` and
      leaves the others.

  Returns:
    A function of scan uint8[B, T, h, w, 3] and mask bool[B, T] that gives
    Keyframes and the uniform selector's int32[B, K] (missing slots hold T).
  """
  if descriptor == "pixels":
    embed = jax.jit(tad.pixel_descriptor)
  elif descriptor == "vision":
    if encode is None:
      raise ValueError(
        "config.scan.descriptor='vision' needs the policy's vision tower,"
        " got none; set it to 'pixels'"
      )
    embed = encode
  else:
    raise ValueError(
      f"descriptor must be 'pixels' or 'vision', got {descriptor!r}; change"
      " config.scan.descriptor"
    )
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


class ViewMaker:
  """Turns loader batches into `Prepared` batches.

  Args:
    tokenizer: prompts.Tokenizer.
    select: from `make_selector`.
    reader: pipeline.FrameReader at the policy's resolution.
    prompt: keyword arguments of `prompts.build_prompt`.
    max_prompt_tokens: S; a longer prompt is an error, never cut.
    patch: (patch_size, merge_size, temporal_patch_size).
    num_keyframes: K.
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
  ):
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
    self._num_keyframes = num_keyframes
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
    self, batch: pipeline.Batch, arms: Sequence[str], *, draw: int = 0
  ) -> Prepared:
    """Selects, decodes and words the views of a batch.

    Args:
      batch: from the loader.
      arms: names from `ARMS`.
      draw: another number gives other permutations (the step, say).

    Raises:
      ValueError: an unknown arm, or a prompt longer than S.
    """
    unknown = sorted(set(arms) - set(ARMS))
    if unknown:
      raise ValueError(f"unknown arms {unknown}; choose from {ARMS}")
    keyframes, uniform = self._selected(batch)
    uniform_mask = uniform < batch.scan_mask.shape[1]
    scanned = np.concatenate([keyframes.index, uniform], axis=1)  # [B, 2K]
    mask = np.concatenate([keyframes.mask, uniform_mask], axis=1)
    safe = np.where(mask, scanned, 0)
    rows = np.arange(len(batch.samples))[:, None]
    frames = self._reader.read(batch.samples, batch.frame_index[rows, safe])
    blank = np.full_like(frames[:, :1], 128)
    frames = np.concatenate([frames, blank], axis=1)  # [B, N, h, w, 3]
    time_s = np.where(mask, batch.scan_time_s[rows, safe], np.nan)

    num_slots = keyframes.index.shape[1]
    slots = np.arange(num_slots, dtype=np.int32)
    everyone = np.ones(len(batch.samples), dtype=bool)

    def view(first, frame):
      """A view with the time labels of frames [first, first + K)."""
      window = slice(first, first + num_slots)
      return View(
        prompt=self._prompts(batch, time_s[:, window], mask[:, window]),
        frame=np.broadcast_to(frame, (len(everyone), num_slots)),
      )

    num_valid = keyframes.mask.sum(axis=1)
    by_keyframes = view(0, slots)
    made = {}
    for arm in arms:
      if arm == "keyframes":
        made[arm] = by_keyframes
      elif arm == "uniform":
        made[arm] = view(num_slots, slots + num_slots)
      elif arm == "reversed":
        order = np.stack(
          [np.concatenate([slots[:n][::-1], slots[n:]]) for n in num_valid]
        )
        made[arm] = by_keyframes.replace(frame=order)
      elif arm == "shuffled":
        for m in range(self._num_shuffles):
          order = np.stack(
            [
              permute_slots(
                n,
                num_slots,
                np.random.default_rng([self._seed, draw, int(sample), m]),
              )
              for n, sample in zip(num_valid, batch.sample_index, strict=True)
            ]
          )
          made[arm if m == 0 else f"{arm}_{m}"] = by_keyframes.replace(
            frame=order
          )
      elif arm == "single":
        middle = num_slots + uniform_mask.sum(axis=1) // 2
        one = np.take_along_axis(time_s, middle[:, None], axis=1)
        made[arm] = View(
          prompt=self._prompts(batch, one, everyone[:, None]),
          frame=np.broadcast_to(
            middle[:, None], (len(everyone), num_slots)
          ).astype(np.int32),
        )
      elif arm == "times":
        made[arm] = by_keyframes.replace(
          frame=np.full_like(by_keyframes.frame, 2 * num_slots)
        )
      else:  # blind
        made[arm] = View(
          prompt=self._prompts(batch, time_s[:, :0], mask[:, :0]),
          frame=np.broadcast_to(slots, (len(everyone), num_slots)),
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
    )

  def patches(self, frames: np.ndarray) -> np.ndarray:
    """uint8[B, N, height, width, 3] -> float32[B, N, 4P, patch].

    Made where they are needed: they take 8 times the memory of the frames.
    """
    made = patches.frames_to_patches(
      frames.reshape(-1, *frames.shape[2:]),
      patch=self._patch_size,
      merge=self._merge,
      temporal=self._temporal,
    )
    return made.reshape(*frames.shape[:2], *made.shape[1:])

  def _selected(self, batch: pipeline.Batch) -> tuple[Keyframes, np.ndarray]:
    """Keyframes and uniform frames; a video is scored once, then remembered.

    The selector has no weights that training changes, so a video's keyframes
    hold for the run. All of a batch is scored where one of it is new, which
    keeps the shapes of the jitted scan fixed.
    """
    keys = [
      (sample.video, int(mask.sum()))
      for sample, mask in zip(batch.samples, batch.scan_mask, strict=True)
    ]
    with self._lock:
      return self._remembered(batch, keys)

  def _remembered(self, batch, keys):
    if not all(key in self._memory for key in keys):
      with jax.profiler.TraceAnnotation("tad"):
        scored = jax.device_get(self._select(batch.scan, batch.scan_mask))
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
      num_frames=self._num_keyframes,
      duration_s=duration_s,
      grid=self.merged_grid,
      **self._prompt,
    )

  def _prompts(self, batch, time_s, mask) -> Prompt:
    rows = [
      prompts.build_prompt(
        self._tokenizer,
        sample.question,
        sample.options,
        frame_time_s=seconds[real],
        grid=self.merged_grid,
        **self._prompt,
      )
      for sample, seconds, real in zip(batch.samples, time_s, mask, strict=True)
    ]
    return Prompt(**prompts.pad_prompts(rows, self._max_prompt_tokens))
