"""What KF-GRPO buys: the runs behind the three contrasts of docs/contrasts.md.

  python -m launch.sweep --config=configs/contrasts.py --out=runs/contrasts
  python -m benchmarks.contrasts --runs=runs/contrasts

Each seed has one cold start, from which all its arms go on for equally many
updates with equally many completions a prompt.

  configs/contrasts.py:cold_start           the policy that all arms start from
  configs/contrasts.py:uniform_grpo         GRPO on uniform frames
  configs/contrasts.py:tad_grpo             GRPO on TAD's keyframes
  configs/contrasts.py:tad_tgrpo            T-GRPO on TAD's keyframes
  configs/contrasts.py:tad_kfgrpo           KF-GRPO on TAD's keyframes
  configs/contrasts.py:tad_placebo          its bonuses, dealt anew at random
  configs/contrasts.py:tad_placebo_prompt   the contrast of another prompt
"""

import ml_collections

from configs import kfgrpo_cpu

ARMS = (
  "cold_start",
  "uniform_grpo",
  "tad_grpo",
  "tad_tgrpo",
  "tad_kfgrpo",
  "tad_placebo",
  "tad_placebo_prompt",
)
SEEDS = 8
# Another generator, on which settings may be tuned, equally long for all arms.
TUNING_SEED = 1000


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """One arm; the default is KF-GRPO's."""
  arm = arg or "tad_kfgrpo"
  if arm not in ARMS:
    raise ValueError(
      f"configs/contrasts.py takes one of {', '.join(ARMS)}; got {arg!r}"
    )
  config = kfgrpo_cpu.get_config()
  config.name = "contrasts" + (f"_{arg}" if arg else "")
  config.data.synthetic.update(tasks=("needle", "order_two"), num_test=2048)
  # The answer alone: after a worded reasoning its tokens follow from the text,
  # under whatever pictures.
  config.answers.reasoning = "none"
  config.evaluation.arms = (
    "keyframes",
    "uniform",
    "shuffled",
    "reversed",
    "blind",
  )
  # Sixteen completions a prompt in every arm: T-GRPO's are 8 + 8.
  config.sampling.num_completions = 16
  config.scan.select = "uniform" if arm == "uniform_grpo" else "tad"
  if arm == "cold_start":
    config.rl.steps = 0
  elif arm in ("uniform_grpo", "tad_grpo"):
    config.contrast.kind = "none"
  elif arm == "tad_tgrpo":
    config.contrast.update(kind="threshold", num_shuffles=1, num_samples=8)
    config.sampling.num_completions = 8
  elif arm == "tad_placebo":
    config.contrast.placebo = "random"
  elif arm == "tad_placebo_prompt":
    config.contrast.placebo = "other_prompt"
  return config


def sweep(add) -> None:
  """Every arm of every seed, cold starts first."""
  for seed in range(SEEDS):
    seeds = {"seed": seed, "data.seed": seed}
    add(f"seed_{seed}/cold_start", arg="cold_start", **seeds)
    for arm in ARMS[1:]:
      add(
        f"seed_{seed}/{arm}",
        arg=arm,
        **seeds | {"sft.from_run": f"{{out}}/seed_{seed}/cold_start"},
      )
