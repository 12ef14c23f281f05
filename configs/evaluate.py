"""A policy on a benchmark: predictions, official scores, and what was set.

  python -m cf_jax.main --config=configs/evaluate.py \
    --config.benchmark=videomme --config.root=DIR \
    --config.policy=Qwen2.5-VL-7B-Instruct --workdir=runs/evaluate

`benchmark` is a name of docs/datasets.md, "jsonl" (a manifest of yours,
--config.annotations=FILE), "synthetic" (the built-in set, config.data), or
"run": the test split that the policy, a run, was trained beside. The policy is
a Qwen2.5-VL directory or a run's workdir. All of it: docs/evaluation.md.

A setting that is None is that of the run's own training where the policy is a
run, so that it is asked in the form it has learned; else what the comment says.
Interrupted, the same call goes on.
"""

import ml_collections
from ml_collections import config_dict

from configs import kfgrpo_cpu

_LETTER = "Answer with the letter of the right option alone."
# How questions are put to a policy that was not trained here, by kind
# (data/records.py). Ours; what a benchmark publishes is in OF_BENCHMARK.
DIRECT = {
  "multiple_choice": "{question}{options}\n" + _LETTER,
  "numerical": "{question}\nAnswer with a number alone, in digits.",
  "regression": "{question}\nAnswer with a number alone, in digits.",
  "ocr": "{question}\nAnswer with the text as it is written, and nothing else.",
  "free_form": "{question}\nAnswer in a word or a short phrase.",
  "open_ended": "{question}",
  "interval": "When in the video does this happen: {question}\nAnswer with the"
  " seconds at which it starts and ends alone, as in: 12.0 to 15.5",
  "grounded_qa": "{question}{options}\nAnswer with the letter of the right"
  " option inside <answer> </answer>, then the times that show it, in seconds,"
  " as in <glue>[(12.0, 15.5)]</glue>.",
  "tracking": "{question}\nThe frames come at equal distances. Answer with one"
  " box [x0, y0, x1, y1] a frame, in fractions of width and height, in one"
  " list.",
  "caption": "{question}\nTell everything that happens, in order.",
}
# Benchmark -> the wording that its authors published, in place of the above:
# Video-MME's (github.com/MME-Benchmarks/Video-MME).
OF_BENCHMARK = {
  "videomme": "Select the best answer to the following multiple-choice question"
  " based on the video. Respond with only the letter (A, B, C, or D) of the"
  " correct option.\n{question}{options}\nThe best answer is:",
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The settings; there are no variants."""
  if arg is not None:
    raise ValueError(f"configs/evaluate.py takes no argument, got {arg!r}")
  train = kfgrpo_cpu.get_config()
  config = ml_collections.ConfigDict()
  config.program = "evaluate"
  config.name = "evaluate"  # --workdir is runs/<name> where it is not given
  config.seed = 0  # of sampling; without effect at temperature 0
  # True: jax.distributed.initialize() first. Each process then answers its
  # share of the questions on its own devices, with the whole policy, and all
  # write to one file system; process 0 scores.
  config.distributed = False
  # The same without jax.distributed: this is number `index` of `count`
  # processes, and the last to finish scores.
  config.shard = dict(index=0, count=1)
  config.compilation_cache_dir = "~/.cache/cf_jax/xla"  # "" turns it off
  # A process's own devices along each mesh axis; -1 takes what the others
  # leave. With `tensor` a policy too large for one of them fits on several.
  config.mesh = dict(data=-1, fsdp=1, tensor=1, context=1)

  # -- what is answered
  config.benchmark = ""  # needed
  config.root = ""  # folder of the local copy (docs/datasets.md)
  config.annotations = ""  # file or folder; "" finds them under root
  config.split = ""  # "" is the benchmark's own
  config.videos = ""  # folder of videos under root; "" is the benchmark's own
  # "none", "shown" (lines on screen at the frames shown) or "all"
  config.subtitles = "none"
  config.only = ()  # breakdown values to keep, ("duration=short",)
  config.clips = True  # False: the local files are cut to the parts already
  config.max_bad_rows = 0  # wrong annotation rows to leave out, each is logged
  config.num_questions = config_dict.placeholder(int)  # the first N; None: all

  # -- who answers
  config.policy = ""  # needed: a Qwen2.5-VL directory, or a run's workdir
  # Where the directory that a run started from lies now; "" is where it lay.
  config.init_from = ""
  # "float32" or "bfloat16": parameters, cache and matmuls; None is the
  # checkpoint's own.
  config.dtype = config_dict.placeholder(str)

  # -- which frames are shown
  # "uniform", "tad", "top_k", "aks", "k_center", "k_center_median", "random";
  # "all_frames" (every scanned one, whatever num_keyframes says); "learned"
  # (the scorer of a run); "viarl" (a selector policy); "oracle" (the annotated
  # evidence, and uniform frames where it is short); None: "tad"
  config.select = config_dict.placeholder(str)
  # The run of "learned" ("": the policy's own), or the selector's stage of
  # "viarl" (runs/viarl/cycle_2/selector).
  config.selector = ""
  config.num_keyframes = config_dict.placeholder(int)  # K; None: 16
  # Of a video of d seconds at most ceil(d * fps) frames are shown, and K at
  # most; None always shows K (all frames of a shorter video). Of a run that
  # shows uniform frames, None is its data.fps, where num_keyframes is None too.
  config.fps = config_dict.placeholder(float)
  config.scan = dict(
    num_frames=config_dict.placeholder(int),  # T, frames looked at; None: 256
    size_px=config_dict.placeholder(tuple),  # (height, width); None: (64, 64)
    descriptor=config_dict.placeholder(str),  # or "vision"; None: "pixels"
  )
  # Of `tad.select_keyframes`; None: the run's, or the layer's own default.
  config.tad = dict(
    scales=config_dict.placeholder(tuple),
    gate=config_dict.placeholder(float),
    prominence=config_dict.placeholder(float),
    min_gap=config_dict.placeholder(int),
    shown=config_dict.placeholder(str),
    crowded=config_dict.placeholder(str),
    selection=config_dict.placeholder(str),
  )
  config.frame = dict(
    # (height, width) of every frame; None keeps aspect ratios, within the
    # limits below (a run: None is the size that it was trained with, unless
    # one of the limits is given).
    size_px=config_dict.placeholder(tuple),
    min_pixels=config_dict.placeholder(int),  # of a frame; None: 4 tokens
    max_pixels=config_dict.placeholder(int),  # of a frame; None: 256 tokens
    total_pixels=config_dict.placeholder(int),  # of all frames; None: no limit
  )
  # "bicubic" (as Qwen2.5-VL's processor) or "area" (faster); None: "bicubic"
  config.resize = config_dict.placeholder(str)

  # Clue inference (arXiv 2504.06958): asks for an answer and the seconds that
  # show it, shows so many frames of these seconds, and asks again; 0: asks once
  config.clue = dict(frames=0)

  # -- how they are asked
  config.prompt = dict(
    # "direct": the templates below; "run": those of the run's training; None:
    # "direct"
    style=config_dict.placeholder(str),
    frames_per_slice=config_dict.placeholder(int),  # None: 1
    number_frames=config_dict.placeholder(bool),  # None: False
    pad_multiple=128,  # slots: prompts of nearly one length share a program
    subtitles="This video's subtitles are listed below:\n{subtitles}\n",
  )
  config.prompt.build = dict(
    show_time=config_dict.placeholder(bool),  # None: True
    time_format=config_dict.placeholder(str),  # None: "{:.1f}s"
    system=config_dict.placeholder(str),  # None: the chat template's own
  )
  config.prompt.templates = DIRECT
  config.prompt.of_benchmark = OF_BENCHMARK
  config.sampling = dict(
    # C: an answer is cut off there, and counted; None: 512
    max_tokens=config_dict.placeholder(int),
    temperature=0.0,  # 0 always takes the likeliest token
    top_p=1.0,  # 1 is off
    top_k=0,  # 0 is off
  )
  config.batch_size = 8  # questions that a process answers at a time

  # -- videos
  # Questions about videos that cannot be read are "wrong" or "left_out".
  config.unreadable = "wrong"
  config.data = dict(
    max_skip_fraction=0.01,  # share of unreadable videos that stops it
    cache_dir=train.data.cache_dir,  # of the built-in set
    seed=train.data.seed,  # of its generator
    allow_outside=train.data.allow_outside,  # of a manifest, as in training
    synthetic=train.data.synthetic,
    reader=dict(cache_mib=512, num_threads=2),  # see configs/kfgrpo_cpu.py
    decode=train.data.decode,
    limits=train.data.limits,
    frame_cache=train.data.frame_cache,
  )

  # The LLM that scores open-ended answers and captions; "" is none.
  config.judge = train.judge
  return config
