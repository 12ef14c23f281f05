"""The neighbouring systems at a size that two cores can train.

  python -m launch.sweep --config=configs/neighbours.py --out=runs/neighbours

Each arm takes its recipe's `:smoke` config, with more videos and updates, from
a cold start that the arms of a system share. runs/neighbours/sweep.md has the
accuracies before (the cold start) and after; results.json of a run also has
the mean IoU of the times given and the share from 0.3, 0.5 and 0.7 on.

  videochat_joint, _grounding, _gqa   trained on all three tasks, or on one
  temporal_full, temporal_selected    all training samples, or those that
                                      temporal_select kept, for equal updates
  tspo_located, _answered, _tad       a learned selection before a frozen
                                      answerer; its cold start shows TAD's

ViaRL's two policies have a config of this size of their own:
configs/viarl.py:small.
"""

import ml_collections

from configs import select_data, temporal_r1, tspo, videochat_r1

ARMS = {
  "videochat": ("joint", "grounding", "gqa"),
  "temporal": ("full", "selected"),
  "tspo": ("located", "answered", "tad"),
}
SEEDS = 3


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """One arm, the cold start of a system (SYSTEM_cold), or temporal_select."""
  arm = arg or "videochat_joint"
  system, _, variant = arm.partition("_")
  if (
    variant not in (*ARMS.get(system, ()), "cold") and arm != "temporal_select"
  ):
    known = [f"{name}_{v}" for name, all_ in ARMS.items() for v in all_]
    known += [f"{name}_cold" for name in ARMS]
    raise ValueError(
      "configs/neighbours.py takes one of"
      f" {', '.join((*known, 'temporal_select'))}; got {arm!r}"
    )
  if system == "videochat":
    shown = "joint" if variant == "cold" else variant
    config = videochat_r1.get_config(f"{shown},smoke")
  elif arm == "temporal_select":
    config = select_data.get_config("smoke")
  elif system == "temporal":
    config = temporal_r1.get_config("smoke")
  else:
    shown = "answered" if variant == "cold" else variant
    config = tspo.get_config(f"{shown},smoke")
  if system != "tspo":  # times are asked for
    _show_boundaries(config)
  config.name = "neighbours" + (f"_{arg}" if arg else "")
  # 256 held-out videos a task.
  config.data.synthetic.update(
    num_train=2048 if system == "tspo" else 4096,
    num_dev=192,
    num_test=256 * len(config.data.synthetic.tasks),
  )
  config.evaluation.batch_size = 64
  if arm == "temporal_select":
    return config

  config.report.probe_videos = 0
  if variant == "cold":
    config.sft.update(batch_size=32, checkpoint_every=100)
    if system == "tspo":
      config.sft.update(max_steps=1000, stop_accuracy=0.55, eval_every=20)
    else:  # colours are learned by 500 updates, times by and by after them
      config.sft.update(stop_accuracy=0.85, eval_every=50)
      config.sft.max_steps = 2000 if system == "videochat" else 1000
    config.rl.steps = 0
    config.report.stages = ("sft",)
    return config

  config.rl.update(steps=60, prompts_per_step=16, checkpoint_every=20)
  if system != "tspo":  # there the frozen answerer is asked twice a selection
    config.rl.update(steps=150, checkpoint_every=50)
    config.sampling.num_completions = 8
  config.report.stages = ("rl",)
  return config


def _show_boundaries(config: ml_collections.ConfigDict) -> None:
  """The first frame of each of TAD's pieces, and its time to a tenth.

  When something starts and ends are then two of the labels, to be copied; in
  videos of ten seconds they are of equal length.
  """
  config.data.synthetic.num_frames = config.data.loader.scan_frames = 80
  config.scan.select = "tad"
  config.tad.update(num_keyframes=8, shown="first")
  config.prompt.frames_per_slice = 1
  config.prompt.build.time_format = "{:.1f}s"
  config.prompt.max_tokens = 160


def sweep(add) -> None:
  """A system's cold start, then its arms, seed after seed."""
  for seed in range(SEEDS):
    seeds = {"seed": seed, "data.seed": seed}
    for system, variants in ARMS.items():
      cold = f"seed_{seed}/{system}_cold"
      add(cold, arg=f"{system}_cold", **seeds)
      start = seeds | {"sft.from_run": f"{{out}}/{cold}"}
      if system == "temporal":
        selection = f"seed_{seed}/temporal_select"
        add(
          selection,
          arg="temporal_select",
          policy=f"{{out}}/{cold}",
          **seeds,
        )
      for variant in variants:
        arm, changes = f"{system}_{variant}", dict(start)
        if variant == "selected":
          changes["data.source"] = f"jsonl:{{out}}/{selection}/selected"
          changes["data.allow_outside"] = True
        add(f"seed_{seed}/{arm}", arg=arm, **changes)
