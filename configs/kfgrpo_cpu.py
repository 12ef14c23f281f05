"""KF-GRPO on a laptop: generated mp4 files to a trained policy and a report.

  python -m cf_jax.main --config=configs/kfgrpo_cpu.py --workdir=runs/kfgrpo_cpu

A policy of about a million parameters with the architecture of Qwen2.5-VL
learns three kinds of questions about short events in generated videos: a
supervised cold start, then KF-GRPO, then an evaluation under seven views.

  configs/kfgrpo_cpu.py:smoke   the same run, every stage, in about a minute

What the default run reaches, over five seeds, is in docs/results.md.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The experiment; `arg` is None or "smoke"."""
  if arg not in (None, "smoke"):
    raise ValueError(
      f"configs/kfgrpo_cpu.py takes no argument or :smoke, got {arg!r}"
    )
  config = ml_collections.ConfigDict()
  config.program = "train"
  config.name = "kfgrpo_cpu" if arg is None else f"kfgrpo_cpu_{arg}"
  config.seed = 0  # of parameters, sampling, shuffling and permutations
  config.distributed = False  # True: jax.distributed.initialize() first
  # Where compiled programs are kept between runs; "" turns it off.
  config.compilation_cache_dir = "~/.cache/cf_jax/xla"
  # "10:12" traces updates 10 to 12 of the reinforcement into workdir/profile:
  # open perfetto_trace.json.gz in ui.perfetto.dev, or the folder in XProf.
  config.profile = ""
  # How a run is stopped and followed; free to change from start to start.
  config.runtime = dict(
    time_limit_s=0.0,  # then it stops as if by SIGTERM; 0: no limit
    heartbeat_s=10.0,  # between two writings of heartbeat.json
    report_every_s=600.0,  # between two of report.html in training; 0: at end
  )
  # Devices along each mesh axis; -1 takes what the others leave.
  config.mesh = dict(data=-1, fsdp=1, tensor=1, context=1)

  # -- data
  config.data = dict(
    # "synthetic", "dataset:NAME=ROOT", "jsonl:FILE", or "jsonl:FOLDER" with
    # train.jsonl, dev.jsonl, test.jsonl
    source="synthetic",
    cache_dir="~/.cache/cf_jax/data",  # generated sets, by settings hash
    seed=0,  # of the generator
    # True: a manifest may name files outside its own folder.
    allow_outside=False,
    max_skip_fraction=0.01,  # share of unreadable videos that stops a run
    # With scan.select="uniform": of a video of d seconds at most ceil(d * fps)
    # frames are shown, and K at most; 0 always shows K.
    fps=0.0,
  )
  # With source="dataset:NAME=ROOT,NAME=ROOT" (docs/datasets.md): which part of
  # the public datasets in these folders is read.
  config.data.dataset = dict(
    split="train",  # "" is each one's first
    only=(),  # ("duration=short",): samples of these groups alone
    clips=True,  # False: files are cut to the annotated parts already
    max_bad_rows=0,  # wrong rows that may be left out, each is logged
  )
  config.data.synthetic = dict(
    num_train=2048,  # videos
    num_dev=192,
    num_test=768,
    num_frames=96,
    fps=8.0,
    size_px=64,
    tasks=("needle", "order", "count"),
  )
  config.data.loader = dict(
    scan_frames=96,  # T: frames that TAD looks at
    scan_size_px=(32, 32),  # height, width of the scan
    num_workers=0,  # grain worker processes; 0 reads in this one
    shuffle=True,
    # "" takes every sample once an epoch; "a=3,b=1" takes samples of source a
    # three times as often as those of b, however many there are of each
    mix="",
  )
  config.data.reader = dict(
    size_px=(56, 56),  # height, width at which keyframes are encoded
    # "area" (OpenCV, faster) or "bicubic" (Pillow, as Qwen2.5-VL's processor)
    resize="area",
    cache_mib=512,  # decoded frames kept in memory
    num_threads=2,
  )
  # Where files are decoded that the run did not write itself: in processes of
  # their own, so that a bad one costs one sample. docs/data_path.md
  config.data.decode = dict(
    processes=2,  # 0 decodes in this one, as built-in videos always are
    timeout_s=300.0,  # for one request about one file
    max_memory_mib=4096,  # of each process
    accept_damaged=False,  # files that the decoder complains of
  )
  # What a file may be; anything above is refused before it is decoded.
  config.data.limits = dict(
    max_file_mib=16384.0,
    max_pixels=8192 * 4320,  # of a frame
    max_duration_s=43200.0,
    max_frames=2592000,  # 12 hours at 60 a second
  )
  # Decoded frames on disk, for later runs; configs/cache_frames.py fills it.
  config.data.frame_cache = dict(
    # "prefer" decodes and keeps what is not there, "only" decodes nothing
    mode="off",
    folder="~/.cache/cf_jax/frames",
    max_gib=100.0,  # what was used longest ago goes
  )

  # -- selection: the scan is cheap, only the chosen frames are encoded
  config.scan = dict(
    descriptor="pixels",  # or "vision": the initial tower
    # "tad", or a control: "uniform", "random", "top_k", "aks", "k_center",
    # "k_center_median", "all_frames". These read tad.num_keyframes alone.
    select="tad",
  )
  config.tad = dict(num_keyframes=8, selection="soft")

  # A scorer of scanned frames that the rewards of drawn selections teach
  # (programs/scorer.py); what it says is added to TAD's priority.
  config.selector = dict(
    learn=False,
    train_policy=True,  # False: the policy is a frozen answerer, as in TSPO
    # N: selections of each of rl.prompts_per_step prompts; an update has
    # N times as many rows, each with sampling.num_completions completions.
    num_selections=2,
    temperature=1.0,  # of the draws, in standard deviations of the priority
    tad_weight=1.0,  # of TAD's priority beside the scorer's; 0 leaves it out
  )
  # What a selection earns: the mean of what makes an answer right, and the
  # share of the annotated intervals that got a keyframe. With answer=0 and
  # train_policy=False nothing is sampled.
  config.selector.reward = dict(answer=1.0, evidence=0.0)
  # Of a selection among those of its prompt.
  config.selector.advantage = dict(
    scale="none", baseline="leave_one_out", ddof=1, eps=1e-4
  )
  config.selector.network = dict(
    width=128,
    depth=3,
    kernel=7,
    dilation=2,
    dtype="float32",
  )

  # -- prompts and policy
  # A Qwen2.5-VL directory to start from; "" starts from seeded noise. It says
  # what the model is: model.size is then "" and model.* says how it is run.
  config.init_from = ""
  # "tiny", a folder with tokenizer.json, or "": that of init_from
  config.tokenizer = "tiny"
  config.prompt = dict(
    max_tokens=116,  # S; a longer prompt is an error
    # 2 (= the model's temporal patch) puts neighbouring keyframes into one
    # temporal slice, as Qwen2.5-VL does with video: half the visual tokens, and
    # the shuffled and reversed views cost slices of their own.
    frames_per_slice=1,
    # Draws its number on each frame, in red, counted from 0 (ViaRL).
    number_frames=False,
  )
  config.prompt.build = dict(
    show_time=True,  # each keyframe is preceded by its time as text
    time_format="{:.0f}s",
    question_template="{question}{options}",
    tokens_per_second=2,  # M-RoPE time positions
  )
  # Kind of question (data/records.py) -> its template, in place of the above.
  config.prompt.templates = ml_collections.ConfigDict()
  config.model = dict(
    size="tiny",  # fields of models/config.py may follow
    scan_unroll=4,
  )

  # Low-rank adapters: with a rank above 0 they alone are trained and kept in
  # checkpoints.
  config.lora = dict(
    rank=0,
    alpha=32.0,  # they count alpha / rank
    modules=(r"^decoder/layers/",),  # regexes on the paths of linear layers
  )

  # -- cold start
  config.sft = dict(
    # A run whose newest policy takes the place of the cold start: runs that
    # are compared can share one.
    from_run="",
    max_steps=500,
    batch_size=32,  # videos, of all processes together
    # Equal parts in which a batch goes through an update, one after the other:
    # the same update with a part's memory. 1 is fastest.
    micro_batches=1,
    # What the target answers with. So small a policy learns to name an option
    # long before it learns to look up its letter; both are read.
    answer_form="text",
    between="",  # white space between reasoning and answer
    # What carries the loss: "completion", or "all": the prompt's text too.
    loss_on="completion",
    # Above 0, samples are laid one behind another into rows with the room of so
    # many padded ones: the same update without most of the padding. It pays
    # where lengths differ, and 1 is where to start: attention's work grows with
    # the square of a row. Attention "cudnn" cannot.
    pack=0,
    stop_accuracy=0.62,  # dev accuracy (greedy) at which the cold start ends
    eval_every=10,  # updates
    checkpoint_every=100,
  )
  config.sft.optim = dict(
    learning_rate=2e-3,
    schedule="constant",
    warmup_steps=50,
    total_steps=config.sft.get_ref("max_steps"),
    weight_decay=0.01,
    max_grad_norm=1.0,
    b1=0.9,
    b2=0.98,
    eps=1e-8,
    frozen=(),
    no_decay=(r"(bias|scale)$",),
  )

  # -- KF-GRPO (arXiv 2509.15800; the formulas are ours, see docs/method.md)
  config.rl = dict(
    steps=250,
    prompts_per_step=16,  # B, of all processes together
    micro_batches=1,  # as in sft; equal parts of the prompts
    updates_per_batch=1,
    # How advantages are made: "group" (config.advantage) or "reinforce".
    advantage="group",
    # Of advantage.scale "batch": how slowly the running std of a kind of
    # question forgets; 0 takes the batch alone.
    std_decay=0.9,
    # Groups without spread teach nothing. Further batches that may be sampled
    # to fill up an update with groups that have some, and whether those
    # without are left out of the loss (with resample they always are).
    resample=0,
    mask_zero_spread=False,
    overlong_filter=False,  # completions that were cut off: out of the loss
    # Largest weight of truncated importance sampling; 0 is off.
    importance_cap=0.0,
    entropy_weight=0.0,
    log_every=1,
    eval_every=0,  # updates between looks at dev accuracy; 0: never
    checkpoint_every=50,
  )
  config.sampling = dict(
    num_completions=8,  # G
    max_tokens=10,  # C
    temperature=1.0,
    top_p=1.0,
    top_k=0,
  )
  # -- reading answers (data/answers.py)
  config.answers = dict(
    # What completions can earn: "format", and what the kinds of the data's
    # questions do ("accuracy", "iou", "event_recall").
    components=("accuracy", "format"),
    interval_form="strict",  # or "last", "json"
    reasoning="tagged",  # "none": the answer stands alone
    cite="time",  # keyframes are cited by "time", "frame" or "either"
  )
  # The LLM behind open-ended answers and captions: an OpenAI-compatible
  # endpoint, up to and without /chat/completions. "" is none.
  config.judge = dict(
    url="",
    model="",
    key_variable="",  # environment variable that holds the key
    cache_dir="~/.cache/cf_jax/judge",
    timeout_s=60.0,
    max_attempts=4,
    backoff_s=1.0,
    max_wait_s=30.0,
    concurrency=8,
    max_unreadable_fraction=0.02,
    max_tokens=1024,
    temperature=0.0,
  )

  # -- from answers to a reward (rewards.py)
  config.reward = dict(
    weight=dict(accuracy=1.0, format=0.2),
    # Further components: name -> those that are multiplied.
    products=ml_collections.ConfigDict(),
    # The component "length" is 1 for low to high tokens. `bonus` above 0 pays
    # right rollouts of such a length (Video-R1).
    length=dict(low=320, high=512, bonus=0.0),
    overlong=dict(weight=0.0, buffer=64),  # DAPO's soft penalty, in tokens
    kl=dict(weight=0.0, kind="k1"),  # KL in the reward, not in the loss
  )
  config.contrast = dict(
    # "rollout": KF-GRPO; "threshold": T-GRPO's group rule; "margin": leave one
    # out; "none": GRPO.
    kind="rollout",
    num_shuffles=2,  # M permutations behind p_S
    num_samples=4,  # completions drawn under another view, where any are
    tau=1.0,  # nats at which the contrast of a rollout saturates
    # Tokens over which a rollout is compared: those of its "answer", or all
    # "text" between tags, its reasoning too, which narrating alone may earn.
    span="answer",
    # Of the cited keyframes: "evidence" (annotated; without it 0), "deletion",
    # "weighted_deletion", "evidence_else_deletion" (deletion for samples that
    # are not annotated), "none".
    saliency="evidence",
    # Controls: "random" deals the bonuses anew, "other_prompt" takes the
    # contrast of another prompt. "none" is the method.
    placebo="none",
    # Updates between looks at the accuracy of shuffled and uniform frames; 0:
    # never.
    watch_every=50,
  )
  config.contrast.rollout = dict(
    alpha_t=0.3,  # temporal bonus (shuffled view)
    alpha_c=0.3,  # content bonus (uniform view)
    gamma=0.5,  # saliency factor
  )
  config.contrast.threshold = dict(mu=0.8, bonus=0.3)  # T-GRPO
  # The contrastive loss (ours) and its KL on the shuffled view; 0 is off.
  config.contrastive = dict(
    weight=0.0,
    margin=0.0,  # nats
    tau=1.0,
    form="plain",  # or "stop_gradient"
    kl_weight=0.04,
    kl_kind="k3",
  )
  config.advantage = dict(scale="none", baseline="mean", ddof=1, eps=1e-4)
  # REINFORCE++, where rl.advantage says so; its KL is that of reward.kl.kind.
  config.reinforce = dict(
    kl_weight=1e-3, discount=1.0, baseline="none", ddof=1, eps=1e-8
  )
  config.loss = dict(
    clip_low=0.2,
    clip_high=0.2,
    aggregate="sequence_mean",
    kl_weight=0.04,
    kl_kind="k3",
    ratio="token",  # "sequence": GSPO
  )
  config.rl.optim = dict(
    learning_rate=3e-4,
    schedule="constant",
    warmup_steps=10,
    total_steps=config.rl.get_ref("steps"),
    weight_decay=0.0,
    max_grad_norm=1.0,
    b1=0.9,
    b2=0.98,
    eps=1e-8,
    frozen=(),
    no_decay=(r"(bias|scale)$",),
  )

  config.selector.optim = dict(
    learning_rate=3e-3,
    schedule="constant",
    warmup_steps=0,
    total_steps=config.rl.get_ref("steps"),
    weight_decay=0.0,
    max_grad_norm=1.0,
    b1=0.9,
    b2=0.98,
    eps=1e-8,
    no_decay=(r"(bias|scale)$",),
  )

  # -- what is kept and shown
  config.checkpoint = dict(
    keep=2,  # of the newest checkpoints of a stage
    keep_best=0,  # and so many of the best, by a metric of metrics.jsonl
    best_metric="dev_accuracy",  # in rl: rl.eval_every; larger is better
  )
  config.evaluation = dict(
    batch_size=64,
    arms=(
      "keyframes",
      "uniform",
      "shuffled",
      "reversed",
      "single",
      "times",
      "blind",
    ),
  )
  config.report = dict(
    # The policies that answer the held-out videos: before reinforcement, after.
    stages=("sft", "rl"),
    num_film_strips=6,
    num_rollouts=8,
    probe_videos=768,
  )

  if arg == "smoke":
    config.data.synthetic.update(num_train=64, num_dev=16, num_test=48)
    config.sft.update(
      max_steps=6, batch_size=8, eval_every=3, checkpoint_every=3
    )
    config.rl.update(steps=4, prompts_per_step=4, checkpoint_every=2)
    config.sampling.num_completions = 4
    config.evaluation.batch_size = 16
    config.report.update(num_film_strips=3, num_rollouts=4, probe_videos=48)
  return config
