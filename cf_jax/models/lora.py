"""Low-rank adapters (LoRA, arXiv 2106.09685): small matrices beside kernels.

A linear layer with adapters gives `x W + b + (alpha / rank) (x A) B`. Its
adapters are leaves beside its kernel in the tree of parameters, and
`layers.linear` applies what it finds there: no setting of the model says where
adapters are, and a tree without them is the plain model.

  lora_a      [(L,) in..., rank]
  lora_b      [(L,) rank, out...]
  lora_scale  [(L)]  alpha / rank; never trained

Axes: `L` layers of a stack.
"""

import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import traverse_util

from cf_jax.models import patterns

LEAVES = ("lora_a", "lora_b", "lora_scale")
# What an optimizer freezes so that adapters are all that is trained.
ALL_BUT_ADAPTERS = r"^(?!.*/lora_[ab]$)"


def num_inputs(name: str) -> int:
  """How many axes of a kernel of a decoder layer are inputs.

  Attention's output projection, `out`, contracts heads and their width.
  """
  return 2 if name == "out" else 1


def _axes(module: str) -> tuple[int, int]:
  """How many leading axes of a kernel are layers, and how many are inputs."""
  *above, name = module.split("/")
  in_layer = above[-1:] == ["layers"]
  return int("/layers/" in module), num_inputs(name) if in_layer else 1


def _modules(params: dict) -> Iterator[tuple[str, tuple[str, ...], jax.Array]]:
  """(path, its parts, kernel) of every linear layer."""
  for path, leaf in traverse_util.flatten_dict(params).items():
    if path[-1] == "kernel":
      yield "/".join(path[:-1]), path[:-1], leaf


def init(
  params: dict,
  rng: jax.Array,
  *,
  rank: int,
  alpha: float,
  modules: Sequence[str],
) -> dict:
  """Adapters that change nothing yet: A is random, B is zero.

  A is uniform in +-1 / sqrt(inputs), as in the common implementations.

  Args:
    params: the model's parameters, read for their paths and shapes only.
    rng: typed key.
    rank: width of the adapters; 0 adds none.
    alpha: adapters count `alpha / rank`.
    modules: regexes on the path of linear layers, e.g.
      "decoder/layers/(query|value)$", "^decoder/layers/mlp/", "^vision/".

  Returns:
    A tree with the adapters' leaves alone, float32, to be joined with the
    parameters; empty for rank 0.

  Raises:
    ValueError: a negative rank, a broken pattern, or one that matches no
      linear layer.
  """
  if rank < 0:
    raise ValueError(
      f"rank must be at least 0, got {rank}; change config.lora.rank"
    )
  if rank == 0:
    return {}
  found = list(_modules(params))
  wanted = patterns.compile_all(modules, "config.lora.modules")
  unused = [
    regex.pattern
    for regex in wanted
    if not any(regex.search(path) for path, _, _ in found)
  ]
  if unused or not modules:
    raise ValueError(
      f"lora patterns {unused} match no linear layer, expected regexes on"
      f" {sorted(path for path, _, _ in found)}; change config.lora.modules"
    )
  flat = {}
  for number, (path, parts, kernel) in enumerate(sorted(found)):
    if not any(regex.search(path) for regex in wanted):
      continue
    stacked, inputs = _axes(path)
    depth, shape = kernel.shape[:stacked], kernel.shape[stacked:]
    bound = 1 / math.sqrt(math.prod(shape[:inputs]))
    flat[*parts, "lora_a"] = jax.random.uniform(
      jax.random.fold_in(rng, number),
      (*depth, *shape[:inputs], rank),
      minval=-bound,
      maxval=bound,
    )
    flat[*parts, "lora_b"] = jnp.zeros((*depth, rank, *shape[inputs:]))
    flat[*parts, "lora_scale"] = jnp.full(depth, alpha / rank)
  return traverse_util.unflatten_dict(flat)


def has_adapters(params: dict) -> bool:
  """Does the tree hold any adapter?"""
  return any(path[-1] in LEAVES for path in traverse_util.flatten_dict(params))


def merge(params: dict, dtype: str | None = None) -> dict:
  """Adds the adapters into their kernels: `W + (alpha / rank) A B`.

  The sum is taken in float32 and rounded once. A bfloat16 kernel can swallow a
  small update.

  Args:
    params: the model's parameters, with or without adapters.
    dtype: of the kernels that had adapters; None keeps each kernel's.

  Returns:
    The tree of the plain model.
  """
  flat = traverse_util.flatten_dict(params)
  merged = {k: v for k, v in flat.items() if k[-1] not in LEAVES}
  for path, parts, kernel in _modules(params):
    if (*parts, "lora_a") in flat:
      stacked, _ = _axes(path)
      merged[*parts, "kernel"] = _merge_one(
        kernel,
        *(flat[*parts, name] for name in LEAVES),
        stacked=stacked,
        dtype=dtype or kernel.dtype,
      )
  return traverse_util.unflatten_dict(merged)


def _merge_one(kernel, a, b, scale, *, stacked, dtype):
  def add(kernel, a, b, scale):
    update = jnp.tensordot(a, b, axes=1, precision="highest") * scale
    return (kernel.astype(jnp.float32) + update).astype(dtype)

  # One layer at a time: the product in float32 is as large as the kernel.
  if stacked:
    return jax.lax.map(lambda layer: add(*layer), (kernel, a, b, scale))
  return add(kernel, a, b, scale)
