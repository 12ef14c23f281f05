"""What the benchmarks share: models, prompts, clocks, peaks, and the peer.

Axes: `B` prompts, `S` prompt slots.
"""

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cf_jax.models import config as model_config
from cf_jax.models import rope
from cf_jax.types import Prompt

SIZES = ("tiny", "25m", "100m")
PACKAGES = ("jax", "torch", "transformers", "trl", "numpy")


def make_config(size: str, **fields: Any) -> model_config.VLMConfig:
  """A Qwen2.5-VL of about so many parameters, untied, heads of 64 (tiny: 32).

  Raises:
    ValueError: an unknown size.
  """
  shapes = {  # vocabulary, width, mlp, layers, query heads, tower's heads
    "tiny": (512, 128, 256, 2, 4, 1),
    "25m": (16_384, 384, 1_024, 8, 6, 3),
    "100m": (32_768, 640, 1_792, 12, 10, 5),
  }
  if size not in shapes:
    raise ValueError(f"size must be one of {tuple(shapes)}, got {size!r}")
  words, width, mlp, layers, heads, tower = shapes[size]
  half = width // heads // 2
  ids = dict(
    vision_start_token_id=words - 4,
    vision_end_token_id=words - 3,
    image_token_id=words - 2,
    video_token_id=words - 1,
  )
  made = model_config.make(
    size="tiny",
    vision=dict(
      depth=4,
      hidden_size=64 * tower,
      intermediate_size=int(2.7 * 64 * tower),
      num_heads=tower,
      out_hidden_size=width,
      window_size=112,
      fullatt_block_indexes=(1, 3),
    ),
    vocab_size=words,
    hidden_size=width,
    intermediate_size=mlp,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=2,
    mrope_section=(half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8),
    max_position_embeddings=16_384,
    tie_word_embeddings=False,
    **ids,
  )
  return dataclasses.replace(made, **fields)


class Prompts(NamedTuple):
  """Prompts of an image and text, as both sides want them.

  Attributes:
    token: int32[B, S].
    pixel: float32[B, patches, patch_dim]; no patches in prompts of text.
    grid: (height, width) of an image in patches.
    ours: Prompt with numpy leaves.
  """

  token: np.ndarray
  pixel: np.ndarray
  grid: tuple[int, int]
  ours: Prompt

  def repeat(self, times: int) -> "Prompts":
    """Every prompt `times` times, one after the other."""
    return Prompts(
      np.repeat(self.token, times, 0),
      np.repeat(self.pixel, times, 0),
      self.grid,
      jax.tree.map(lambda leaf: np.repeat(leaf, times, 0), self.ours),
    )


def make_prompts(
  config: model_config.VLMConfig,
  rng: np.random.Generator,
  *,
  rows: int,
  text: int,
  side: int,
) -> Prompts:
  """Random text around one square image.

  Args:
    config: the model.
    rng: of ids and pixels.
    rows: B.
    text: tokens that are none of the image's, both markers counted.
    side: of the image, in visual tokens; 0 for text alone.
  """
  merge = config.vision.spatial_merge_size
  before = min(20, text // 2)
  token = rng.integers(1, config.vocab_size - 8, (rows, text), np.int32)
  grid = (side * merge, side * merge)
  if side:
    image = np.full((rows, side**2), config.image_token_id, np.int32)
    token[:, before - 1] = config.vision_start_token_id
    token[:, before] = config.vision_end_token_id
    token = np.concatenate([token[:, :before], image, token[:, before:]], 1)
  visual = np.full(token.shape, -1, np.int32)
  visual[:, before : before + side**2] = np.arange(side**2)
  position = rope.rope_index(
    config, token, None, np.array([[1, *grid]] * rows) if side else None
  )
  return Prompts(
    token,
    rng.standard_normal(
      (rows, grid[0] * grid[1], config.vision.patch_dim), np.float32
    ),
    grid,
    Prompt(
      token=token,
      mask=np.ones(token.shape, bool),
      position=np.asarray(position, np.int32),
      visual=visual,
    ),
  )


def to_torch(config: model_config.VLMConfig, params: dict) -> Any:
  """The same weights as a Qwen2.5-VL of transformers, through its files."""
  import torch
  import transformers

  from cf_jax.models import hf_weights

  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  with tempfile.TemporaryDirectory() as folder:
    where = pathlib.Path(folder) / "model"
    hf_weights.save_hf(where, config, params)
    # Copied: the files are mapped, and go.
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
      where, dtype=torch.float32, use_safetensors=True
    )
    with torch.no_grad():
      for parameter in model.parameters():
        parameter.data = parameter.data.clone()
  return model.eval()


# ---------------------------------------------------------------------- clocks


def read_bytes(config: model_config.VLMConfig, params: dict) -> int:
  """Bytes of parameters that one step of the decode loop reads."""
  read = {
    name: leaf
    for name, leaf in params["decoder"].items()
    if name != "embed" or config.tie_word_embeddings
  }
  return sum(leaf.nbytes for leaf in jax.tree.leaves(read))


def use_cores(count: int) -> None:
  """Binds this process, and so both sides, to `count` cores.

  Before anything is computed: both read it when they make their threads.
  """
  cores = sorted(os.sched_getaffinity(0))[:count]
  os.sched_setaffinity(0, cores)


def interleave(
  cases: Mapping[str, Callable[[], dict[str, float]]],
  rounds: int,
  after: Callable[[dict[str, dict[str, list[float]]]], None] | None = None,
) -> dict[str, dict[str, list[float]]]:
  """Runs all cases in turn, `rounds` times, another one first in each.

  Args:
    cases: name -> function that runs it and returns phase -> seconds.
    rounds: how often.
    after: is called with what is known after every round, to keep it.

  Returns:
    name -> phase -> seconds of each round.
  """
  names = list(cases)
  taken = {name: {} for name in names}
  for index in range(rounds):
    first = index % len(names)
    for name in names[first:] + names[:first]:
      for phase, seconds in cases[name]().items():
        taken[name].setdefault(phase, []).append(seconds)
    if after is not None:
      after(taken)
  return taken


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
  """Median of the ratios of the rounds: slow spells hit both alike."""
  return statistics.median(a / b for a, b in zip(over, under, strict=True))


def seconds(function: Callable[[], Any]) -> float:
  """Of one call, its arrays ready."""
  begin = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - begin


# ----------------------------------------------------------------------- peaks


def copy_bandwidth(num_bytes: int = 1 << 28, repeats: int = 8) -> float:
  """Best bytes a second of a copy, read and written bytes both counted."""
  source = jnp.ones(num_bytes // 4, jnp.float32)
  copy = jax.jit(lambda x: x + 1, donate_argnums=0)
  best = float("inf")
  for _ in range(repeats):
    begin = time.perf_counter()
    source = jax.block_until_ready(copy(source))
    best = min(best, time.perf_counter() - begin)
  return 2 * num_bytes / best


def matmul_peak(
  size: int = 2_048, dtype: str = "float32", repeats: int = 5
) -> float:
  """Best operations a second of a square matmul."""
  square = jnp.ones((size, size), dtype)
  multiply = jax.jit(jnp.matmul)
  jax.block_until_ready(multiply(square, square))
  best = min(seconds(lambda: multiply(square, square)) for _ in range(repeats))
  return 2 * size**3 / best


def torch_peaks(size: int = 2_048, num_bytes: int = 1 << 28) -> dict:
  """The same two numbers, as torch has them."""
  import torch

  square, line = torch.ones(size, size), torch.ones(num_bytes // 4)
  into = torch.empty_like(line)
  multiply_s, copy_s = [], []
  for _ in range(5):
    multiply_s.append(seconds(lambda: int((square @ square)[0, 0])))
    copy_s.append(seconds(lambda: int(into.copy_(line)[0])))
  return {
    "matmul_flops_per_s": 2 * size**3 / min(multiply_s),
    "copy_bytes_per_s": 2 * num_bytes / min(copy_s),
  }


def machine() -> dict[str, Any]:
  """What the numbers were measured on, and how busy it was."""
  versions = {}
  for name in PACKAGES:
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  model = platform.processor()
  about = pathlib.Path("/proc/cpuinfo")
  if about.exists():
    for line in about.read_text().splitlines():
      if line.startswith("model name"):
        model = line.partition(":")[2].strip()
        break
  return {
    "processor": model,
    "cores": len(os.sched_getaffinity(0)),
    "devices": [device.device_kind for device in jax.devices()],
    "load_average": os.getloadavg()[0],
    "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    "versions": versions,
  }


# --------------------------------------------------------------------- results


def read(path: str) -> dict:
  """An unfinished benchmark's results; empty where there are none."""
  if path and pathlib.Path(path).exists():
    return json.loads(pathlib.Path(path).read_text())
  return {}


def write(path: str, result: dict) -> None:
  """Replaces the results, so that a killed benchmark goes on from there."""
  if not path:
    return
  where = pathlib.Path(path)
  where.parent.mkdir(parents=True, exist_ok=True)
  partial = where.with_suffix(".partial")
  partial.write_text(json.dumps(result, indent=1) + "\n")
  partial.replace(where)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Markdown; numbers to three digits, None as "unmeasured"."""

  def show(cell):
    if cell is None:
      return "unmeasured"
    if isinstance(cell, float):
      return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell)

  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(
    "| " + " | ".join(show(cell) for cell in line) + " |" for line in lines
  )
