"""Where a short cut pays as well as looking: the runs of docs/contrasts.md, 2.

  python -m launch.sweep --config=configs/shortcut.py --out=runs/shortcut
  python -m benchmarks.contrasts --study=shortcut --runs=runs/shortcut

A cold start has learned two ways to answer which of two colours came first:
from the pictures ("red blue", then red), or the option A ("A", then its text).
In the videos of reinforcement A is right in 17 of 20 questions, in held-out
ones in half of them. All arms show TAD's keyframes:

  grpo, tgrpo                how the policy learns from them
  kfgrpo                     the contrast over the answer's tokens
  kfgrpo_text                over those of the reasoning, too
  placebo                    bonuses of kfgrpo_text, dealt anew at random

  configs/shortcut.py:cold_start   the policy that all arms start from
"""

import ml_collections

from configs import kfgrpo_cpu

ARMS = ("grpo", "tgrpo", "kfgrpo", "kfgrpo_text", "placebo")
SEEDS = 8


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """One arm; the default is KF-GRPO's over reasoning and answer."""
  arm = arg or "kfgrpo_text"
  if arm not in ("cold_start", *ARMS):
    raise ValueError(
      "configs/shortcut.py takes one of"
      f" {', '.join(('cold_start', *ARMS))}; got {arm!r}"
    )
  config = kfgrpo_cpu.get_config()
  config.name = "shortcut" + (f"_{arg}" if arg else "")
  config.data.synthetic.update(tasks=("order_skewed",), num_test=1024)
  config.evaluation.arms = ("keyframes", "shuffled", "reversed", "blind")
  config.contrast.watch_every = 0
  config.rl.steps = 60
  if arm == "cold_start":
    config.data.synthetic.tasks = ("order_ways",)
    config.rl.steps = 0
    config.sft.stop_accuracy = 0.7
    config.report.stages = ("sft",)
    return config

  config.report.stages = ("rl",)
  config.report.probe_videos = 0
  if arm == "grpo":
    config.contrast.kind = "none"
  elif arm == "tgrpo":
    completions = config.sampling.num_completions // 2
    config.sampling.num_completions = completions
    config.contrast.update(
      kind="threshold", num_shuffles=1, num_samples=completions
    )
  elif arm != "kfgrpo":
    config.contrast.span = "text"
    if arm == "placebo":
      config.contrast.placebo = "random"
  return config


def sweep(add) -> None:
  """A cold start, then its arms, seed after seed."""
  for seed in range(SEEDS):
    seeds = {"seed": seed, "data.seed": seed}
    cold = f"seed_{seed}/cold_start"
    add(cold, arg="cold_start", **seeds)
    for arm in ARMS:
      add(
        f"seed_{seed}/{arm}",
        arg=arm,
        **seeds | {"sft.from_run": f"{{out}}/{cold}"},
      )
