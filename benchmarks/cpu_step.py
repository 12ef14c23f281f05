"""What huge pages and unrolled layers buy one update of the default policy.

  python -m benchmarks.cpu_step

One forward and backward pass of the cold start's loss (32 prompts of 116
slots, 8 frames each, random data), in a fresh process for each of the four
settings, the rounds interleaved. Prints the best time of each and the ratio to
plain memory and scanned layers.
"""

import itertools
import os
import subprocess
import sys
import time

HUGE_PAGES = "glibc.malloc.hugetlb=1"
ROUNDS = 2


def measure(scan_unroll: int) -> float:
  """Best seconds of one loss and gradient."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from cf_jax.models import config as model_config
  from cf_jax.models import vlm
  from cf_jax.programs import sft
  from cf_jax.types import Prompt, Rollout, View

  model = model_config.make(
    size="tiny", vocab_size=596, scan_unroll=scan_unroll
  )
  rng = np.random.default_rng(0)
  batch, slots, frames, length = 32, 116, 8, 10
  visual = np.full((batch, slots), -1, np.int32)
  visual[:, 20:52] = np.arange(32)
  shape = (batch, 1, length)
  mask = np.ones(shape, bool)
  targets = sft.Targets(
    view=View(
      prompt=Prompt(
        token=rng.integers(0, 500, (batch, slots), np.int32),
        mask=np.ones((batch, slots), bool),
        position=np.broadcast_to(
          np.arange(slots, dtype=np.int32), (batch, 3, slots)
        ),
        visual=visual,
      ),
      frame=np.broadcast_to(np.arange(frames, dtype=np.int32), (batch, frames)),
    ),
    pixel=rng.standard_normal((batch, frames, 16, 1176), np.float32),
    target=Rollout(
      token=rng.integers(0, 500, shape, np.int32),
      mask=mask,
      logprob=np.zeros(shape, np.float32),
      finished=mask[..., 0],
    ),
  )
  params = jax.jit(lambda rng: vlm.init(model, rng))(jax.random.key(0))
  step = jax.jit(
    jax.value_and_grad(
      lambda params: sft.sft_loss(
        params,
        targets,
        model=model,
        grid=(4, 4),
        banned=jnp.zeros(596, bool),
      )[0]
    )
  )
  jax.block_until_ready(step(params))
  best = float("inf")
  for _ in range(8):
    begin = time.perf_counter()
    jax.block_until_ready(step(params))
    best = min(best, time.perf_counter() - begin)
  return best


def main() -> None:
  """Runs the four settings in turn and prints the table."""
  if len(sys.argv) > 1:
    print(measure(int(sys.argv[1])))
    return
  best = {}
  for _ in range(ROUNDS):
    for tunables, unroll in itertools.product(("", HUGE_PAGES), (1, 4)):
      environment = dict(os.environ, GLIBC_TUNABLES=tunables)
      ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu_step", str(unroll)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
      )
      key = ("huge pages" if tunables else "plain memory", unroll)
      best[key] = min(best.get(key, float("inf")), float(ran.stdout))
  base = best["plain memory", 1]
  print("| memory | layers per iteration | best, ms | ratio |")
  print("|---|---|---|---|")
  for (memory, unroll), seconds in best.items():
    print(
      f"| {memory} | {unroll} | {1e3 * seconds:.0f} | {base / seconds:.2f} |"
    )


if __name__ == "__main__":
  main()
