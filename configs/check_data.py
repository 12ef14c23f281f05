"""Is a local copy of a public dataset whole, and does it fit its annotations?

  python -m cf_jax.main --config=configs/check_data.py \
    --config.dataset=videomme --config.root=DIR

Datasets, licences and folders: docs/datasets.md. The exit code is 0 where all
is well, 1 where something is wrong, 2 where it could not be checked.
"""

import ml_collections

from configs import kfgrpo_cpu


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The settings; there is no argument."""
  if arg is not None:
    raise ValueError(f"configs/check_data.py takes no argument, got {arg!r}")
  config = ml_collections.ConfigDict()
  config.program = "check_data"
  config.name = "check_data"
  config.dataset = ""  # needed: videomme, charades_sta, ... (docs/datasets.md)
  config.root = ""  # needed: folder of the local copy
  # Where annotations and videos lie, if not where they are published.
  config.annotations = ""
  config.videos = ""
  config.split = ""  # "" is the dataset's first
  config.subtitles = False  # are those there too?
  config.clips = True  # False: files are cut to the annotated parts already

  # "headers" reads the header and the first frame of every video, "whole" goes
  # through it to its end, "none" only looks whether the file is there.
  config.decode = "headers"
  # Seconds that a container may differ from the annotated duration, and that an
  # annotated interval may end after the video.
  config.tolerance_s = 2.0
  config.shown = 10  # problems of a kind that are printed; the file has all
  # As of training: processes that decode, and what a file may be.
  shared = kfgrpo_cpu.get_config().data
  config.decoder = shared.decode
  config.limits = shared.limits

  config.distributed = False  # one process checks
  # Nothing is compiled here.
  config.compilation_cache_dir = ""
  return config
