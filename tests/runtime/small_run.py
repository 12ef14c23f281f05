"""A very small run of train.py, as one of several processes or alone.

  python -m tests.runtime.small_run CACHE WORKDIR rl.steps=4 mesh.fsdp=2 ...

JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say which one.
"""

import ast
import hashlib
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from tests import conftest


def settings(
  cache: pathlib.Path, changed: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """Cold start, KF-GRPO and evaluation of a fresh policy.

  Args:
    cache: where the generated set lies.
    changed: dotted name of a setting -> its value here.
  """
  config = conftest.shrink(
    conftest.load_config("configs/kfgrpo_cpu.py", "smoke"), cache
  )
  config.sft.update(max_steps=2, eval_every=2, checkpoint_every=2)
  config.evaluation.arms = ("keyframes",)
  config.report.num_film_strips = 0
  for name, value in changed.items():
    parent, _, last = name.rpartition(".")
    node = config
    for key in parent.split(".") if parent else ():
      node = node[key]
    node[last] = value
  return config.lock()


def plant_judge() -> None:
  """Every other completion is right, and its first token is the answer.

  So small a policy never is, and without a reward no update would follow.
  """
  from cf_jax.programs import verdicts

  make_judge = verdicts.make_judge

  def make(experiment):
    judge = make_judge(experiment)

    def read(prepared, token, mask):
      found = judge(prepared, token, mask)
      right = (token * mask).sum(axis=-1) % 2
      return found.replace(
        component=found.component | {"accuracy": right.astype(np.float32)},
        answer_span=mask & (np.arange(token.shape[-1]) == 0),
      )

    return read

  verdicts.make_judge = make


def compare_copies() -> None:
  """At every checkpoint: parameters that each process has whole are equal."""
  from cf_jax.runtime import checkpoint, processes

  save = checkpoint.Checkpoints.save

  def save_equal(self, step, state, *rest):
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
      if leaf.is_fully_replicated:
        digest.update(np.asarray(jax.device_get(leaf)).tobytes())
    found = set(processes.exchange(digest.hexdigest()))
    assert len(found) == 1, f"processes differ at step {step}"
    save(self, step, state, *rest)

  checkpoint.Checkpoints.save = save_equal


def main(cache: str, workdir: str, *changed: str) -> None:
  """One process of several."""
  from cf_jax import main as main_lib
  from cf_jax.programs import train
  from cf_jax.runtime import processes

  pairs = (word.partition("=") for word in changed)
  changed = {name: ast.literal_eval(value) for name, _, value in pairs}
  processes.start()
  try:
    plant_judge()
    compare_copies()
    train.run(settings(pathlib.Path(cache), changed), pathlib.Path(workdir))
    processes.part()
  except Exception as error:
    main_lib.leave_together(error)


if __name__ == "__main__":
  main(*sys.argv[1:])
