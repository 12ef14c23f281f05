"""What KF-GRPO buys: the runs behind the three contrasts of docs/contrasts.md.

  python -m launch.sweep --config=configs/contrasts.py --out=runs/contrasts
  python -m benchmarks.contrasts --runs=runs/contrasts

Each seed has one cold start, from which all its arms go on for equally many
updates with equally many completions a prompt. An arm is SELECTOR_METHOD:

  uniform_, tad_, learned_          which frames are shown
  _grpo, _tgrpo, _kfgrpo            how the policy learns from them
  _placebo                          KF-GRPO's bonuses, dealt anew at random
  _placebo_prompt                   with the contrast of another prompt

  configs/contrasts.py:cold_start   the policy that all arms start from

It is taught on TAD's frames. What of the difference to uniform frames is that,
two runs a seed say: uniform_cold_start is taught on uniform frames, and
uniform_own_grpo goes on from it.
"""

import ml_collections

from configs import kfgrpo_cpu

# Behind the three contrasts, on every seed.
ARMS = (
  "uniform_grpo",
  "tad_grpo",
  "tad_tgrpo",
  "tad_kfgrpo",
  "tad_placebo",
  "tad_placebo_prompt",
)
SEEDS = 8
# The rest of the table {frames} x {method}, descriptive, on the first seeds.
FURTHER_ARMS = (
  "uniform_tgrpo",
  "uniform_kfgrpo",
  "learned_grpo",
  "learned_tgrpo",
  "learned_kfgrpo",
)
FURTHER_SEEDS = 3
# Taught on uniform frames from the first update on, on the same seeds.
UNIFORM_COLD, UNIFORM_OWN = "uniform_cold_start", "uniform_own_grpo"
# Another generator, on which settings may be tuned, equally long for all arms.
TUNING_SEED = 1000


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """One arm; the default is KF-GRPO's."""
  arm = arg or "tad_kfgrpo"
  arms = ("cold_start", *ARMS, *FURTHER_ARMS, UNIFORM_COLD, UNIFORM_OWN)
  if arm not in arms:
    raise ValueError(
      f"configs/contrasts.py takes one of {', '.join(arms)}; got {arg!r}"
    )
  config = kfgrpo_cpu.get_config()
  config.name = "contrasts" + (f"_{arg}" if arg else "")
  config.data.synthetic.update(tasks=("needle", "order_two"), num_test=2048)
  # The answer alone: after a worded reasoning its tokens follow from the text,
  # under whatever pictures.
  config.answers.reasoning = "none"
  config.rl.steps = 100
  config.evaluation.arms = ("keyframes", "shuffled", "reversed", "blind")
  config.contrast.watch_every = 0
  if arm in ("cold_start", UNIFORM_COLD):
    config.rl.steps = 0
    config.report.stages = ("sft",)
    # Its policy sees other frames in some arms.
    config.evaluation.arms += ("uniform", "single", "times")
    if arm == UNIFORM_COLD:
      config.scan.select = "uniform"
      config.evaluation.arms = ("keyframes", "reversed")
    return config

  config.report.stages = ("rl",)
  config.report.probe_videos = 0  # the cold start's run has probed the data
  frames, _, method = arm.replace("_own", "").partition("_")
  # Sixteen completions a prompt in every arm: T-GRPO's are 8 + 8, those of a
  # learned selection 8 for each of two selections.
  completions = 16
  if frames == "learned":
    config.selector.learn = True
    completions //= config.selector.num_selections
  else:
    config.scan.select = frames
  if method == "grpo":
    config.contrast.kind = "none"
  elif method == "tgrpo":
    completions //= 2
    config.contrast.update(
      kind="threshold", num_shuffles=1, num_samples=completions
    )
  elif method == "placebo":
    config.contrast.placebo = "random"
  elif method == "placebo_prompt":
    config.contrast.placebo = "other_prompt"
  config.sampling.num_completions = completions
  if arm in (*FURTHER_ARMS, UNIFORM_OWN):
    config.evaluation.arms = ("keyframes", "reversed")
  return config


def sweep(add) -> None:
  """Every arm of every seed after its cold start; then the further arms."""

  def add_arms(seed, cold, arms):
    for arm in arms:
      add(
        f"seed_{seed}/{arm}",
        arg=arm,
        **{"seed": seed, "data.seed": seed},
        **{"sft.from_run": f"{{out}}/seed_{seed}/{cold}"},
      )

  def add_cold(seed, cold):
    add(f"seed_{seed}/{cold}", arg=cold, **{"seed": seed, "data.seed": seed})

  for seed in range(SEEDS):
    add_cold(seed, "cold_start")
    add_arms(seed, "cold_start", ARMS)
  for seed in range(FURTHER_SEEDS):
    add_arms(seed, "cold_start", FURTHER_ARMS)
    add_cold(seed, UNIFORM_COLD)
    add_arms(seed, UNIFORM_COLD, (UNIFORM_OWN,))
