"""Which training samples a policy can learn from (arXiv 2506.01908).

  python -m cf_jax.main --config=configs/select_data.py \
    --config.policy=Qwen2.5-VL-7B-Instruct \
    --config.data.source=jsonl:FOLDER --workdir=runs/select_data

The policy answers every training sample several times; samples that it answers
always or never right are dropped. Then configs/temporal_r1.py takes
--config.data.source=jsonl:runs/select_data/selected with
--config.data.allow_outside=True, for the videos stay where they are. Questions
are put and answers are read as that recipe does; what differs is here.

  configs/select_data.py:smoke   a small policy on built-in data
"""

import ml_collections

from configs import temporal_r1

# What only training reads.
_TRAINING = (
  "profile",
  "rl",
  "reward",
  "contrast",
  "contrastive",
  "advantage",
  "reinforce",
  "loss",
  "selector",
  "report",
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The settings; `arg` is None or "smoke"."""
  if arg not in (None, "smoke"):
    raise ValueError(
      f"configs/select_data.py takes no argument or :smoke, got {arg!r}"
    )
  config = temporal_r1.get_config(arg)
  config.program = "select_data"
  config.name = "_".join(["select_data", *([arg] if arg else [])])
  for name in _TRAINING:
    del config[name]
  del config.evaluation.arms

  # A Qwen2.5-VL directory or a run's workdir; they say what the model is. "" is
  # the policy that reinforcement would start from: config.init_from, or noise,
  # after the cold start of config.sft (config.sft.from_run has one). Of a run,
  # config.init_from says where the directory that it started from lies now; ""
  # is where it lay.
  config.policy = ""
  # Repeats and limits are ours; those of the paper are not public.
  config.sampling.update(num_completions=8, temperature=1.0)
  config.select = dict(
    min_best=0.5,  # IoU that the best of a sample's answers must reach
    min_spread=0.1,  # standard deviation from which a sample's scores differ
  )
  config.evaluation.batch_size = 8  # samples that are asked at a time
  if arg == "smoke":
    # So short a cold start gives answers of the right form, and often wrong.
    config.sft.update(
      max_steps=50, batch_size=8, stop_accuracy=1.1, eval_every=50
    )
    config.sft.optim.warmup_steps = 10
    config.sampling.max_tokens = 32  # intervals are JSON
    config.evaluation.batch_size = 32
  return config
