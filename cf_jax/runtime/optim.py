"""Optax chain, schedule, and parameters frozen by regex."""

import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from cf_jax.runtime import sharding


def matches(params: Any, patterns: tuple[str, ...]) -> Any:
  """A bool tree: does the parameter's path match any of the patterns?

  Raises:
    ValueError: a pattern matches no parameter (a misspelt freeze would train
      what it was meant to keep).
  """
  used = set()

  def match(key_path, _):
    hits = [p for p in patterns if re.search(p, sharding.path_of(key_path))]
    used.update(hits)
    return bool(hits)

  tree = jax.tree_util.tree_map_with_path(match, params)
  unused = sorted(set(patterns) - used)
  if unused:
    raise ValueError(
      f"optim patterns {unused} match no parameter path; change"
      " config.*.frozen or config.*.no_decay"
    )
  return tree


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
  frozen: tuple[str, ...],
  no_decay: tuple[str, ...],
) -> optax.GradientTransformation:
  """AdamW after clipping by global norm; frozen parameters get no update.

  Args:
    params: parameter tree, read for its paths only.
    learning_rate: peak.
    schedule: see `make_schedule`.
    warmup_steps: updates of linear warm-up.
    total_steps: updates until the schedule ends.
    weight_decay: decoupled decay of the parameters not matched by `no_decay`.
    max_grad_norm: global norm above which gradients are scaled down.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: Adam's denominator.
    frozen: regexes on the parameter path; matches are neither updated nor
      counted in the norm, and have no moments.
    no_decay: regexes on the parameter path of norms and biases.

  Raises:
    ValueError: a pattern that matches nothing, or an unknown schedule.
  """
  matches(params, tuple(no_decay))  # raises on a pattern without a parameter

  def decayed(tree):
    return jax.tree_util.tree_map_with_path(
      lambda key_path, _: (
        not any(re.search(p, sharding.path_of(key_path)) for p in no_decay)
      ),
      tree,
    )

  trained = optax.chain(
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
  if not frozen:
    return trained
  is_frozen = matches(params, tuple(frozen))
  if all(jax.tree.leaves(is_frozen)):
    raise ValueError(
      f"frozen patterns {tuple(frozen)} match every parameter; change"
      " config.*.optim.frozen"
    )
  label = jax.tree.map(lambda hit: "frozen" if hit else "trained", is_frozen)
  return optax.multi_transform(
    {"trained": trained, "frozen": optax.set_to_zero()}, label
  )


def all_finite(tree: Any) -> jax.Array:
  """bool[]: is every number of the tree finite?"""
  return jnp.all(
    jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])
  )
