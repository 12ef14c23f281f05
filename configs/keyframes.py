"""The keyframes of a video, or of every video below a folder.

  python -m cf_jax.main --config=configs/keyframes.py --config.video=FILE \
    --config.num_keyframes=16 --workdir=DIR

FILE may be a folder. DIR (runs/keyframes) gets a page, index.html, and for each
video keyframes.json, film_strip.png and the keyframes at full size. The same
call again does what is not done yet; other settings need another DIR.
"""

import ml_collections
from ml_collections import config_dict


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The settings; there are no variants."""
  if arg is not None:
    raise ValueError(f"configs/keyframes.py takes no argument, got {arg!r}")
  config = ml_collections.ConfigDict()
  config.program = "keyframes"
  config.name = "keyframes"  # --workdir is runs/<name> where it is not given
  config.distributed = False  # the program runs on one host
  # Where compiled programs are kept; "" turns it off.
  config.compilation_cache_dir = "~/.cache/cf_jax/xla"
  # Devices along each mesh axis, for the vision tower of `checkpoint`; -1 takes
  # what the others leave.
  config.mesh = dict(data=1, fsdp=1, tensor=-1, context=1)

  # -- what is looked at
  config.video = ""  # a file, or a folder: all videos below it
  # What a file may be; anything above is refused before it is decoded.
  config.limits = dict(
    max_file_mib=16384.0,
    max_pixels=8192 * 4320,  # of a frame
    max_duration_s=43200.0,
    max_frames=2592000,  # 12 hours at 60 a second
  )
  # Frames a second that are scanned; None: every decoded frame.
  config.fps = config_dict.placeholder(float)
  config.scan = dict(
    # (height, width) at which frames are scanned; None: 64 x 64, and 112 x 112
    # with a checkpoint (multiples of its patches, 28 px)
    size_px=config_dict.placeholder(tuple),
    chunk=256,  # frames that are embedded at a time
    # Decoders of one file, each at a part of it, and threads of each decoder;
    # None: the cores, shared by the files at once.
    parts=config_dict.placeholder(int),
    num_threads=config_dict.placeholder(int),
  )
  config.files_at_once = config_dict.placeholder(int)  # None: the cores

  # -- what stands for a frame: a descriptor of its colours and where they are,
  # or the mean of its visual tokens by the vision tower of
  config.checkpoint = ""  # a Qwen2.5-VL directory, or a run's workdir
  # Where the directory that a run started from lies now; "" is where it lay.
  config.init_from = ""
  # "float32" or "bfloat16"; None is the checkpoint's own.
  config.dtype = config_dict.placeholder(str)

  # -- which frames are taken
  config.num_keyframes = 16  # K
  # "tad", or what it is compared with: "uniform", "top_k", "aks", "k_center",
  # "k_center_median"
  config.select = "tad"
  config.tad = dict(
    metric="cosine",  # or "l2"
    scales=(2, 4),  # windows that are compared, in scanned frames
    median=True,  # of three frames, before: a flash of one frame is no cut
    smoothing=0.0,  # of the curve, in frames
    gate=4.0,  # how far an apex stands out, in robust standard deviations
    prominence=0.7,  # and out of a higher one's slope, a share of its height
    contrast=0.0,  # and of the frames beside it; hard cuts only: 8
    min_gap=3,  # scanned frames between two apexes, at least
    strength="soft",  # of an apex: or "hard"
    softness=1.0,  # of the soft strength
    flat=1e-4,  # least height of an apex
    shown="calmest",  # of a segment; or "middle", "medoid", "first", "apex"
    crowded="novelty",  # which of too many segments stay; or "priority"
    variation_weight=1.0,  # of the curve's height in an apex's priority
    apex_weight=1.0,  # of its sharpness
  )
  config.picture = "png"  # or "jpg", smaller and not exact
  return config
