"""A very small run of train.py, as one of several processes or alone.

  python -m tests.runtime.small_run CACHE WORKDIR

JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say which one.
"""

import pathlib
import sys

from tests import conftest


def run(cache: pathlib.Path, workdir: pathlib.Path, **changed) -> None:
  """Reinforcement and evaluation of a fresh policy, or what is left of them.

  Args:
    cache: where the generated set lies.
    workdir: of the run.
    **changed: fields of `config.rl`.
  """
  from cf_jax.programs import train

  config = conftest.shrink(
    conftest.load_config("configs/kfgrpo_cpu.py", "smoke"), cache
  )
  config.sft.max_steps = 0
  config.rl.update({"steps": 2, "checkpoint_every": 1} | changed)
  config.evaluation.update(arms=("keyframes",), stages=("rl",))
  config.contrast.kind = "none"
  config.loss.kl_weight = 0.0
  # Compiled by each process for itself, and seen by no other.
  config.scan.select = "uniform"
  config.rl.optim.frozen = (r"^vision/",)
  train.run(config.lock(), workdir)


def main(cache: str, workdir: str) -> None:
  """One process of several."""
  from cf_jax import main as main_lib
  from cf_jax.runtime import processes

  processes.start()
  try:
    run(pathlib.Path(cache), pathlib.Path(workdir))
  except Exception as error:
    main_lib.leave_together(error)


if __name__ == "__main__":
  main(*sys.argv[1:])
