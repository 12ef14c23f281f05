"""KF-GRPO with low-rank adapters, from a Qwen2.5-VL directory, on your videos.

  python -m cf_jax.main --config=configs/finetune.py \
    --config.init_from=Qwen2.5-VL-3B-Instruct \
    --config.data.source=jsonl:my.jsonl --workdir=runs/mine

The same program as configs/kfgrpo_cpu.py, where every setting is explained;
here stands what differs. Without worded reasoning to imitate there is no cold
start. The numbers suit the 3B model and an accelerator of 80 GB; they are a
place to start from, not a tuned recipe.
"""

import ml_collections

from configs import kfgrpo_cpu

QUESTION_TEMPLATE = (
  "{question}{options}\n"
  "The pictures are keyframes of one video, each preceded by its time."
  " First reason about what they show, citing times, inside <think> </think>;"
  " then give the answer alone, for options its letter, inside"
  " <answer> </answer>."
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The experiment; there is no argument."""
  if arg is not None:
    raise ValueError(f"configs/finetune.py takes no argument, got {arg!r}")
  config = kfgrpo_cpu.get_config()
  config.name = "finetune"
  config.mesh.update(data=1, fsdp=-1)

  config.init_from = ""  # needed: a Qwen2.5-VL directory
  config.tokenizer = ""  # that of init_from
  config.model = dict(
    size="",  # init_from says what the model is
    dtype="bfloat16",
    param_dtype="bfloat16",  # of the frozen weights; adapters are float32
    remat="full",
  )
  config.lora.update(rank=32, alpha=64.0)

  config.data.source = ""  # needed: "jsonl:FILE" or "jsonl:FOLDER"
  config.data.loader.update(scan_frames=256, scan_size_px=(56, 56))
  config.data.reader.update(
    size_px=(280, 504), resize="bicubic", cache_mib=4096, num_threads=4
  )
  config.tad.num_keyframes = 16
  config.prompt.max_tokens = 3584  # 16 frames of 180 tokens, times, question
  config.prompt.build.update(
    time_format="{:.1f}s", question_template=QUESTION_TEMPLATE
  )

  # No cold start; where there is worded reasoning, max_steps asks for one.
  config.sft.update(max_steps=0, answer_form="letter", stop_accuracy=1.1)
  config.sft.optim.update(learning_rate=1e-5, b2=0.999)
  config.rl.update(steps=500, prompts_per_step=8, checkpoint_every=25)
  config.rl.optim.update(learning_rate=1e-5, warmup_steps=20)
  config.sampling.max_tokens = 512
  config.evaluation.batch_size = 8
  config.report.probe_videos = 0  # the probes are of the built-in set
  return config
