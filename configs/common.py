"""What the recipes share: their size, and how their argument is read.

Not an experiment of its own. A recipe starts from configs/kfgrpo_cpu.py, where
every setting is explained, takes a size from here and says what differs.
"""

import ml_collections

from configs import kfgrpo_cpu

# How to answer, for the templates below.
THINK = "First reason inside <think> </think>, then give"
ASK = {
  "multiple_choice": "the letter of the right option alone",
  "numerical": "the number alone, in digits",
  "regression": "the number alone, in digits",
  "ocr": "the text as it is written",
  "free_form": "the answer in words",
  "open_ended": "the answer in words",
  "interval": "when it starts and ends, in seconds, as in 12.0 to 15.5",
  "tracking": "one box [x0, y0, x1, y1] a frame, in fractions of width and"
  " height, in one list",
  "caption": "a description of everything that happens, in order",
}


def parse(
  path: str, arg: str | None, variants: tuple[str, ...]
) -> tuple[str, bool]:
  """The variant and whether it is the smoke run.

  Args:
    path: of the config, for the message.
    arg: None, a variant, "smoke", or both with a comma between.
    variants: the first one is the default.

  Raises:
    ValueError: anything else.
  """
  words = arg.split(",") if arg else []
  smoke = "smoke" in words
  rest = [word for word in words if word != "smoke"]
  if (
    len(rest) > 1
    or len(words) > len(rest) + smoke
    or (rest and rest[0] not in variants)
  ):
    raise ValueError(
      f"{path} takes one of {', '.join(variants)}, smoke, or one of them and"
      f" smoke with a comma between; got {arg!r}"
    )
  return (rest[0] if rest else variants[0]), smoke


def start(
  name: str, arg: str | None, smoke: bool, tasks: tuple[str, ...]
) -> ml_collections.ConfigDict:
  """A recipe before its own settings.

  Args:
    name: of the config.
    arg: as the user gave it.
    smoke: a small policy on built-in data, every stage in about a minute;
      else Qwen2.5-VL-7B on the user's data.
    tasks: of the built-in data, for the smoke run.
  """
  if smoke:
    config = kfgrpo_cpu.get_config("smoke")
    config.data.synthetic.tasks = tasks
    config.evaluation.arms = ("keyframes", "shuffled", "blind")
    config.report.probe_videos = 0  # they take 16 videos of each task
  else:
    config = kfgrpo_cpu.get_config()
    _qwen2_5_vl(config)
  config.contrast.watch_every = 0
  config.name = "_".join([name, *(arg.split(",") if arg else ())])
  return config


def _qwen2_5_vl(config: ml_collections.ConfigDict) -> None:
  """Qwen2.5-VL-7B, all of it trained, on one host of accelerators or a pod."""
  config.mesh.update(data=1, fsdp=-1)
  config.init_from = ""  # needed: a Qwen2.5-VL directory
  config.tokenizer = ""  # that of init_from
  config.model = dict(
    size="",  # init_from says what the model is
    dtype="bfloat16",
    param_dtype="float32",  # trained: small steps would be lost in bfloat16
    remat="full",
  )
  config.data.source = ""  # needed: "jsonl:FILE" or "jsonl:FOLDER"
  config.data.loader.update(scan_frames=256, scan_size_px=(56, 56))
  config.data.reader.update(resize="bicubic", cache_mib=4096, num_threads=8)
  config.prompt.build.update(
    time_format="{:.1f}s",
    question_template="{question}{options}\n"
    + f"{THINK} {ASK['multiple_choice']} inside <answer> </answer>.",
  )
  config.prompt.templates = {
    kind: f"{{question}}{{options}}\n{THINK} {how} inside <answer> </answer>."
    for kind, how in ASK.items()
  } | {
    "grounded_qa": "{question}{options}\n"
    + f"{THINK} the letter of the right option inside <answer> </answer>,"
    " then the times that show it, in seconds, as in"
    " <glue>[(12.0, 15.5)]</glue>."
  }
  # A cold start, where max_steps asks for one: as the templates ask, and whole.
  config.sft.update(answer_form="letter", stop_accuracy=1.1, eval_every=100)
  config.evaluation.batch_size = 8
  config.report.probe_videos = 0  # the probes are of the built-in set


def unclipped_grpo(config: ml_collections.ConfigDict) -> None:
  """Advantages and loss of the public code of Video-R1 and VideoChat-R1."""
  config.advantage.update(scale="group", ddof=1, eps=1e-4)
  config.loss.update(
    clip_low=1e9,  # no clip
    clip_high=1e9,
    aggregate="sequence_mean",
    kl_weight=0.04,
    kl_kind="k3",
  )


def schedule(config: ml_collections.ConfigDict, **settings) -> None:
  """The optimizer of both stages, also of one that has no updates yet."""
  for stage in ("sft", "rl"):
    config[stage].optim.update(**settings)
