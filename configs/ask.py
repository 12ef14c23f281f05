"""One question about one video or picture; the answer is streamed.

  python -m cf_jax.main --config=configs/ask.py --config.checkpoint=DIR \
    --config.video=FILE --config.question=TEXT

DIR is a Qwen2.5-VL directory or the workdir of a run. The answer alone goes to
standard output, so it can be piped; what was seen and what it cost goes to
standard error and, with a picture of the keyframes, into --workdir (runs/ask).

A setting that is None is that of the run's own training where DIR is a run, so
that its policy is asked in the form it has learned; else what the comment says.
How frames are scanned and chosen is said here, for runs too.
"""

import ml_collections
from ml_collections import config_dict


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The settings; there are no variants."""
  if arg is not None:
    raise ValueError(f"configs/ask.py takes no argument, got {arg!r}")
  config = ml_collections.ConfigDict()
  config.program = "ask"
  config.name = "ask"  # --workdir is runs/<name> where it is not given
  config.seed = 0  # of sampling; without effect at temperature 0
  config.distributed = False  # True: jax.distributed.initialize() first
  # Where compiled programs are kept; "" turns it off. The same model asked
  # about the same number and size of frames is not compiled again.
  config.compilation_cache_dir = "~/.cache/cf_jax/xla"
  # Devices along each mesh axis; -1 takes what the others leave. `tensor`
  # splits every matrix: a model too large for one device fits on several.
  config.mesh = dict(data=1, fsdp=1, tensor=-1, context=1)

  # -- what is asked (all three must be given)
  config.checkpoint = ""  # a Qwen2.5-VL directory, or a run's workdir
  # Where the directory that a run started from lies now; "" is where it lay.
  config.init_from = ""
  config.video = ""  # a file; a picture is a video of one frame
  config.question = ""
  config.options = ()  # choices without letters, ('red', 'blue')
  # "float32" or "bfloat16": parameters, cache and matmuls; None is the
  # checkpoint's own.
  config.dtype = config_dict.placeholder(str)

  # What a file may be; anything above is refused before it is decoded.
  config.limits = dict(
    max_file_mib=16384.0,
    max_pixels=8192 * 4320,  # of a frame
    max_duration_s=43200.0,
    max_frames=2592000,  # 12 hours at 60 a second
  )

  # -- which frames are seen
  config.scan = dict(
    num_frames=256,  # T: frames spread over the video that are looked at
    size_px=(64, 64),  # height, width at which they are
    num_threads=4,  # of the decoder
  )
  # "tad", or what it is compared with: "uniform", "top_k", "aks", "k_center",
  # "k_center_median"
  config.select = "tad"
  config.num_keyframes = config_dict.placeholder(int)  # K; None: 8
  config.tad = dict(
    scales=(2, 4),  # windows that are compared, in scanned frames
    gate=4.0,  # how far an apex stands out, in robust standard deviations
    prominence=0.7,  # and out of a higher one's slope, a share of its height
    min_gap=3,  # scanned frames between two apexes, at least
    shown="calmest",  # of a segment; or "middle", "medoid", "first", "apex"
    crowded="novelty",  # which of too many segments stay; or "priority"
  )
  # Keyframes keep the video's aspect ratio; a visual token takes 28 x 28 px.
  config.frame = dict(
    min_pixels=config_dict.placeholder(int),  # of a frame; None: 4 tokens
    max_pixels=config_dict.placeholder(int),  # of a frame; None: 256 tokens
    total_pixels=config_dict.placeholder(int),  # of all frames; None: no limit
  )
  # "bicubic" (as Qwen2.5-VL's processor) or "area" (faster); None: "bicubic"
  config.resize = config_dict.placeholder(str)

  # -- the prompt; positions per second of video are the model's own
  config.prompt = dict(
    pad_multiple=64,  # slots: prompts of nearly one length share a program
    # Keyframes that share a temporal slice: 1, or 2 as in Qwen2.5-VL's videos
    # (half the visual tokens); None: 1
    frames_per_slice=config_dict.placeholder(int),
    # Draws its number on each keyframe, counted from 0; None: False
    number_frames=config_dict.placeholder(bool),
  )
  config.prompt.build = dict(
    # Each keyframe is preceded by its time as text, or all are one video;
    # None: True
    show_time=config_dict.placeholder(bool),
    # None: "{:.1f}s"; of a picture, unless a run says otherwise, no text
    time_format=config_dict.placeholder(str),
    question_template=config_dict.placeholder(str),  # "{question}{options}"
    system=config_dict.placeholder(str),  # None: the chat template's own
  )

  # -- the answer. Of a generation_config.json only `eos_token_id` is read: any
  # of these ids ends the answer. How to sample is said here, and there is no
  # repetition penalty.
  config.sampling = dict(
    max_tokens=512,  # C: the answer is cut off there
    temperature=0.0,  # 0 always takes the likeliest token
    top_p=1.0,  # 1 is off
    top_k=0,  # 0 is off
  )
  config.stream_tokens = 4  # tokens that are shown at a time
  return config
