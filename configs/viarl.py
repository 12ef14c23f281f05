"""ViaRL (arXiv 2505.15447): a selector of frames and an answerer, in turns.

  python -m cf_jax.main --config=configs/viarl.py \
    --config.init_from=Qwen2.5-VL-7B-Instruct \
    --config.answerer.init_from=Qwen2.5-VL-7B-Instruct \
    --config.data.source=jsonl:FOLDER --workdir=runs/viarl

The selector sees 128 small frames with their numbers drawn on them and the
question without its options, and names eight; REINFORCE++ rewards it with what
the frozen answerer makes of these. Then the answerer is trained on them. Two
such cycles. The training samples of the selector's cold start need evidence:
start_s and end_s in the manifest.

  configs/viarl.py:smoke   small policies on built-in data, all stages
  configs/viarl.py:small   the same for so long that they learn something
"""

import ml_collections

from configs import common

NUM_FRAMES = 8
SELECT = (
  "{{question}}\nEach frame bears its number, in red at the bottom right."
  " First describe inside <think> </think> what shows the answer and how that"
  " looks, then name the {num_frames} frames to look at inside"
  " <index> </index>, as in <index>{example}</index>."
)
ANSWER = (
  "{question}{options}\nGive the letter of the right option alone inside"
  " <answer> </answer>."
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The experiment; `arg` is None, "smoke" or "small"."""
  if arg not in (None, "smoke", "small"):
    raise ValueError(
      f"configs/viarl.py takes no argument, :smoke or :small, got {arg!r}"
    )
  config = common.start("viarl", arg, arg is not None, ("needle",))
  config.program = "amplify"
  # Of a run's report this one has only the number of rollouts.
  del config.evaluation.arms
  config.report = dict(num_rollouts=8)

  config.amplify = dict(
    cycles=2,
    num_frames=NUM_FRAMES,  # n: frames that a list names
    # Updates of the answerer on frames of its own config.answerer.scan before
    # the first cycle: 0 where it can answer already.
    answerer_start_steps=0,
  )

  # -- the selector: all of the config but `answerer`
  config.scan.select = "uniform"  # its candidates
  config.prompt.number_frames = True
  config.prompt.build.update(show_time=False)  # their numbers are enough
  config.contrast.kind = "none"
  config.reward.weight = dict(
    selected_accuracy=2.0, index=1.0, format=1.0, length=0.2
  )
  config.reward.products = dict(selected_accuracy=("accuracy", "index"))
  config.reward.length.update(low=80, high=512, bonus=0.0)
  config.rl.advantage = "reinforce"
  config.reinforce.update(kl_weight=1e-3, discount=1.0, baseline="none")
  config.reward.kl.kind = "k1"
  config.loss.update(kl_weight=0.0, aggregate="token_mean")
  config.sampling.update(temperature=1.0, top_p=1.0)

  # -- the answerer: what differs from that
  config.answerer = dict(
    init_from="",
    scan=dict(select="uniform"),  # where nobody chooses for it
    prompt=dict(number_frames=False, build=dict(question_template=ANSWER)),
    answers=dict(reasoning="none"),
    sft=dict(from_run=""),  # config.sft.from_run is the selector's
  )
  if arg is not None:
    _on_built_in_data(config)
    return _small(config) if arg == "small" else config

  config.tad.num_keyframes = 128
  config.data.reader.size_px = (56, 112)  # longest side 112, 8 tokens a frame
  config.prompt.max_tokens = 2048
  config.prompt.build.question_template = SELECT.format(
    num_frames=NUM_FRAMES, example=list(range(3, 3 + 15 * NUM_FRAMES, 15))
  )
  config.prompt.templates = ml_collections.ConfigDict()
  config.sft.update(
    max_steps=500,  # ours: how long is not public
    batch_size=32,
    micro_batches=4,
    stop_accuracy=1.1,
    eval_every=100,
    checkpoint_every=100,
  )
  config.rl.update(steps=500, prompts_per_step=8, checkpoint_every=50)
  config.sampling.update(num_completions=8, max_tokens=512)
  common.schedule(
    config, learning_rate=4e-7, warmup_steps=0, max_grad_norm=1.0, b2=0.999
  )
  config.sft.optim.learning_rate = 1e-6  # ours
  config.answerer.data = dict(
    reader=dict(size_px=(504, 896))  # longest side 896
  )
  config.answerer.prompt.max_tokens = 5120
  config.answerer.sampling = dict(max_tokens=16)
  config.answerer.sft.update(max_steps=500, batch_size=16, answer_form="letter")
  return config


def _on_built_in_data(config: ml_collections.ConfigDict) -> None:
  """Sixteen candidates, four chosen; seconds a stage."""
  config.amplify.update(num_frames=4, answerer_start_steps=6)
  config.model.update(num_hidden_layers=2, scan_unroll=2)  # compiles sooner
  config.rl.prompts_per_step = 8
  config.evaluation.batch_size = 8  # the same: one program for both
  config.tad.num_keyframes = 16
  config.prompt.max_tokens = 112
  config.prompt.build.question_template = "{question}"
  config.reward.length.update(low=2, high=24)
  config.sampling.max_tokens = 24
  config.answerer.prompt.max_tokens = 112
  config.answerer.prompt.build.question_template = "{question}{options}"
  config.answerer.sampling = dict(max_tokens=10)
  config.answerer.sft.update(max_steps=6, answer_form="text")


def _small(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """More candidates, videos and updates.

  A candidate a second, at 0.5s, 1.5s, ..., and these times as text: so small a
  policy learns to copy them as its numbers, and had not learned to read drawn
  digits in 370 updates.
  """
  config.data.synthetic.update(
    num_train=2048, num_dev=192, num_test=768, fps=4.0
  )
  config.tad.num_keyframes = 24
  config.prompt.build.update(show_time=True, time_format="{:.1f}s")
  config.prompt.max_tokens = 320
  config.sft.update(
    max_steps=600,
    batch_size=32,
    stop_accuracy=0.5,  # of the dev lists, those that hit
    eval_every=50,
    checkpoint_every=100,
  )
  config.rl.update(steps=60, prompts_per_step=16, checkpoint_every=20)
  config.sampling.num_completions = 8
  config.evaluation.batch_size = 64
  config.amplify.answerer_start_steps = 400
  # It learns to read colours from frames that show them.
  config.answerer.scan.select = "tad"
  config.answerer.sft.max_steps = 60
  return config
