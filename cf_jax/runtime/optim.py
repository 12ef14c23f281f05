"""Optax chain, schedule, and parameters frozen by regex.

Frozen parameters are not an optimizer's business: `split` takes them out of
the tree before there is one. They then have no gradient, no moments and no
place in a checkpoint, and `join` puts the whole tree together for the model.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from cf_jax.models import patterns
from cf_jax.runtime import sharding

_FROZEN = "config.*.optim.frozen"
_NO_DECAY = "config.*.optim.no_decay"


def matches(params: Any, regexes: Sequence[str], setting: str) -> Any:
  """A bool tree: does any of the regexes match the parameter's path?

  Args:
    params: a tree, read for its paths only.
    regexes: searched for in the paths.
    setting: where they are from, for the errors.

  Raises:
    ValueError: a broken regex, or one that matches no parameter (a misspelt
      freeze would train what it was meant to keep).
  """
  compiled = patterns.compile_all(regexes, setting)
  used = set()

  def match(key_path, _):
    path = sharding.path_of(key_path)
    hits = [regex.pattern for regex in compiled if regex.search(path)]
    used.update(hits)
    return bool(hits)

  tree = jax.tree_util.tree_map_with_path(match, params)
  unused = sorted(set(regexes) - used)
  if unused:
    raise ValueError(
      f"patterns {unused} match no parameter path; change {setting}"
    )
  return tree


def split(params: dict, frozen: Sequence[str]) -> tuple[dict, dict]:
  """Divides parameters into those that are trained and those that are not.

  Args:
    params: nested dicts.
    frozen: regexes on the parameter path; what any of them matches is frozen.

  Returns:
    Two trees with the paths of `params`, each without the other's leaves.

  Raises:
    ValueError: a pattern that is broken or matches nothing, or all parameters
      frozen.
  """
  hit = traverse_util.flatten_dict(matches(params, frozen, _FROZEN))
  flat = traverse_util.flatten_dict(params)
  trained = {path: leaf for path, leaf in flat.items() if not hit[path]}
  if not trained:
    raise ValueError(
      f"frozen patterns {tuple(frozen)} match every parameter; change {_FROZEN}"
    )
  rest = {path: leaf for path, leaf in flat.items() if hit[path]}
  return (
    traverse_util.unflatten_dict(trained),
    traverse_util.unflatten_dict(rest),
  )


def join(base: dict, over: dict) -> dict:
  """One tree with the leaves of both; where both have a path, `over` wins."""
  flat = traverse_util.flatten_dict
  return traverse_util.unflatten_dict(flat(base) | flat(over))


@jax.jit
def _bit_sums(tree):
  def reduce(leaf):
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
      place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
        jnp.uint32, leaf.shape, axis
      )
    mixed = (bits.astype(jnp.uint32) + 1) * (2 * place + 1)  # odd: invertible
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)

  return jax.tree.map(reduce, tree)


def bit_sums(tree: Any) -> dict[str, int]:
  """Path -> a number of every bit of an array, by its bits and their places.

  Each array is reduced on its devices, and to the same number however it is
  sharded. It tells damage and other numbers; it is no cryptographic hash.
  """
  sums = jax.device_get(_bit_sums(tree))
  return {
    sharding.path_of(key_path): int(value)
    for key_path, value in jax.tree_util.tree_leaves_with_path(sums)
  }


def fingerprint(params: dict) -> str:
  """16 hex digits of the `bit_sums` of every parameter; "" for none."""
  if not params:
    return ""
  digest = hashlib.sha256()
  for path, value in bit_sums(params).items():
    digest.update(f"{path} {value};".encode())
  return digest.hexdigest()[:16]


def make_schedule(
  *,
  learning_rate: float,
  schedule: Literal["constant", "cosine", "linear"],
  warmup_steps: int,
  total_steps: int,
) -> optax.Schedule:
  """Linear warm-up from 0, then constant, or down to 0 at `total_steps`."""
  if schedule == "constant":
    decay = optax.constant_schedule(learning_rate)
  elif schedule == "cosine":
    decay = optax.cosine_decay_schedule(
      learning_rate, max(total_steps - warmup_steps, 1)
    )
  elif schedule == "linear":
    decay = optax.linear_schedule(
      learning_rate, 0.0, max(total_steps - warmup_steps, 1)
    )
  else:
    raise ValueError(
      "schedule must be 'constant', 'cosine' or 'linear', got"
      f" {schedule!r}; change config.*.optim.schedule"
    )
  if warmup_steps == 0:
    return decay
  warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
  return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(
  params: Any,
  *,
  learning_rate: float,
  schedule: Literal["constant", "cosine", "linear"],
  warmup_steps: int,
  total_steps: int,
  weight_decay: float,
  max_grad_norm: float,
  b1: float,
  b2: float,
  eps: float,
  no_decay: tuple[str, ...],
) -> optax.GradientTransformation:
  """AdamW after clipping by global norm, for the trained part of a model.

  Args:
    params: the whole model's tree, read for its paths only.
    learning_rate: peak.
    schedule: see `make_schedule`.
    warmup_steps: updates of linear warm-up.
    total_steps: updates until the schedule ends.
    weight_decay: decoupled decay of the parameters not matched by `no_decay`.
    max_grad_norm: global norm above which gradients are scaled down.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: Adam's denominator.
    no_decay: regexes on the parameter path of norms and biases.

  Raises:
    ValueError: a pattern that is broken or matches nothing, or an unknown
      schedule.
  """
  # Of the whole model: a pattern may match frozen parameters alone.
  matches(params, no_decay, _NO_DECAY)
  spared = patterns.compile_all(no_decay, _NO_DECAY)

  def decayed(tree):
    return jax.tree_util.tree_map_with_path(
      lambda key_path, _: (
        not any(regex.search(sharding.path_of(key_path)) for regex in spared)
      ),
      tree,
    )

  return optax.chain(
    optax.clip_by_global_norm(max_grad_norm),
    optax.adamw(
      make_schedule(
        learning_rate=learning_rate,
        schedule=schedule,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
      ),
      b1=b1,
      b2=b2,
      eps=eps,
      weight_decay=weight_decay,
      mask=decayed,
    ),
  )


def all_finite(tree: Any) -> jax.Array:
  """bool[]: is every number of the tree finite?"""
  return jnp.all(
    jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])
  )
