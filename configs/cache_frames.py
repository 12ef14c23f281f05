"""Decodes the videos of a training config into the frame cache, once.

  python -m cf_jax.main --config=configs/cache_frames.py:video_r1 \
    --config.data.source=jsonl:FOLDER --config.data.frame_cache.folder=DIR

The argument is the training config whose frames are wanted, with its own behind
a comma; without one it is kfgrpo_cpu. Settings under data, scan and tad (and
fill.frames_per_slice, its prompt.frames_per_slice) must be those of the
training; that then takes --config.data.frame_cache.mode=only (or prefer) and
the same folder. Interrupted, the same call goes on where it was.
Several hosts share the work with --config.distributed=True.

  configs/cache_frames.py:kfgrpo_cpu,smoke   the built-in videos
"""

import importlib
import inspect
import pathlib

import ml_collections

# What decides which frames there are.
_READ = (
  "seed",
  "distributed",
  "compilation_cache_dir",
  "data",
  "scan",
  "tad",
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The settings; `arg` names a training config, "video_r1" or "x,smoke"."""
  recipe, _, rest = (arg or "kfgrpo_cpu").partition(",")
  train = None
  if (pathlib.Path(__file__).parent / f"{recipe}.py").is_file():
    module = importlib.import_module(f"configs.{recipe}")
    if inspect.isfunction(getattr(module, "get_config", None)):
      train = module.get_config(rest or None)
  if train is None or train.program != "train":
    raise ValueError(
      "configs/cache_frames.py takes the name of a training config, and its"
      f" argument behind a comma; got {arg!r}"
    )
  config = ml_collections.ConfigDict()
  config.program = "cache_frames"
  config.name = "_".join(["cache_frames", *(arg.split(",") if arg else ())])
  for name in _READ:
    config[name] = train[name]
  config.data.frame_cache.mode = "prefer"
  config.fill = dict(
    # "shown": the keyframes and the uniform frames of every video, as the
    # training's selector chooses them. "scanned": all frames that are scanned,
    # for a selector that learns or draws.
    frames="shown",
    # The training's: with data.fps, whole slices are shown.
    frames_per_slice=train.prompt.frames_per_slice,
    batch_size=8,  # videos at a time
  )
  return config
