"""Floating point operations of the matmuls that the model needs.

What utilisation is counted from: real tokens only, each pass once. Padding,
what a backward pass computes again, norms, softmax and adapters do not count.
A query is counted with every real key of its sequence, the later ones too, as
is usual (arXiv 2204.02311, appendix B). A multiply-add is two operations.

Axes: `B` prompts, `G` completions per prompt.
"""

from typing import Any

import jax
import numpy as np

from cf_jax.models.config import VLMConfig


def vision(config: VLMConfig, num_slices: int, grid: tuple[int, int]) -> float:
  """Forward pass of the tower.

  Args:
    config: the model.
    num_slices: how many slices.
    grid: (height, width) of a slice in patches.
  """
  tower = config.vision
  width, area = tower.hidden_size, tower.spatial_merge_size**2
  patches = grid[0] * grid[1]
  side = tower.window_units * tower.spatial_merge_size
  windows = sum(  # pairs of patches within windows, smaller at the far edges
    (min(side, grid[0] - top) * min(side, grid[1] - left)) ** 2
    for top in range(0, grid[0], side)
    for left in range(0, grid[1], side)
  )
  num_full = len(set(tower.fullatt_block_indexes))
  pairs = num_full * patches**2 + (tower.depth - num_full) * windows
  block = 4 * width**2 + 3 * width * tower.intermediate_size
  merged = area * width
  merger = merged**2 + merged * tower.out_hidden_size
  return (
    2.0
    * num_slices
    * (
      patches * tower.patch_dim * width
      + tower.depth * patches * block
      + 2 * pairs * width
      + patches // area * merger
    )
  )


def prompts(config: VLMConfig, prompt: np.ndarray) -> float:
  """Forward pass of prompts, without any scores of next tokens.

  Args:
    config: the model.
    prompt: int[B] real slots.
  """
  prompt = np.asarray(prompt, np.float64)
  return _layers(config, np.sum(prompt), np.sum(prompt**2))


def completions(
  config: VLMConfig, prompt: np.ndarray, completion: np.ndarray
) -> float:
  """Forward pass of completions that share prompts, scores included.

  Sampling and teacher forcing need the same: the last token is fed to nobody.

  Args:
    config: the model.
    prompt: int[B] real slots.
    completion: int[B, G] tokens, end tokens included.
  """
  prompt, completion = (
    np.asarray(length, np.float64) for length in (prompt, completion)
  )
  fed = np.maximum(completion - 1, 0)
  pairs = np.sum(fed * (prompt[:, None] + fed))
  return _layers(config, np.sum(fed), pairs) + scores(
    config, np.sum(completion)
  )


def scores(config: VLMConfig, num_tokens: float) -> float:
  """Scores of so many next tokens."""
  return 2.0 * num_tokens * config.hidden_size * config.vocab_size


def _layers(config, num_tokens, num_pairs):
  """All decoder layers, for so many tokens and pairs of query and key."""
  queries = config.num_attention_heads * config.head_dim
  keys = config.num_key_value_heads * config.head_dim
  width = config.hidden_size
  token = (
    2 * width * queries
    + 2 * width * keys
    + 3 * width * config.intermediate_size
  )
  pair = 2 * queries
  return (
    2.0
    * config.num_hidden_layers
    * float(num_tokens * token + num_pairs * pair)
  )


def update(
  trained: dict, frozen: dict, *, vision: float, decoder: float
) -> float:
  """Forward and backward pass.

  Backward, a tower takes its forward pass once more for the gradient of its
  activations, where anything at or before it is trained, and once more for that
  of its kernels, by the share of them that is trained.

  Args:
    trained: parameters that have a gradient.
    frozen: the others.
    vision: forward pass of the tower.
    decoder: forward pass of the decoder.
  """
  total, reached = 0.0, False
  for name, forward in (("vision", vision), ("decoder", decoder)):
    reached = reached or name in trained
    ours, others = (
      _kernel_size(tree.get(name, {})) for tree in (trained, frozen)
    )
    total += forward * (1 + reached + ours / (ours + others))
  return total


def grpo_step(
  config: VLMConfig,
  trained: dict,
  frozen: dict,
  *,
  grid: tuple[int, int],
  num_frames: int,
  num_shown: int,
  prompt: dict[str, np.ndarray],
  completion: np.ndarray,
  num_references: int = 1,
) -> dict[str, float]:
  """Each phase of one reinforcement step.

  Args:
    config: the model.
    trained: parameters that have a gradient; of the tower any, or none. Without
      any there is no update.
    frozen: the others.
    grid: (height, width) of a frame in patches.
    num_frames: frames of all views of all videos, each encoded once.
    num_shown: those of the keyframes' views.
    prompt: int[B] real slots of each arm; completions are sampled under
      "keyframes" and scored under the others.
    completion: int[B, G] tokens, end tokens included.
    num_references: views under which the frozen reference scores them.

  Returns:
    Operations of `vision`, `prefill`, `decode`, `score`, `reference`, `update`.
  """
  read = {arm: prompts(config, length) for arm, length in prompt.items()}
  told = {
    arm: completions(config, length, completion)
    for arm, length in prompt.items()
  }
  decoder = read["keyframes"] + told["keyframes"]
  # A frozen tower's tokens serve the reference and the update.
  again = vision(config, num_shown, grid) if "vision" in trained else 0.0
  return {
    "vision": vision(config, num_frames, grid),
    "prefill": read["keyframes"],
    "decode": told["keyframes"],
    "score": sum(read[arm] + told[arm] for arm in prompt if arm != "keyframes"),
    "reference": num_references * (again + decoder),
    "update": update(trained, frozen, vision=again, decoder=decoder)
    if trained
    else 0.0,
  }


def _kernel_size(tree: Any) -> int:
  return sum(
    leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if path[-1].key == "kernel"
  )
