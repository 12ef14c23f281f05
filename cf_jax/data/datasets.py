"""Public datasets and benchmarks, read as they are published.

`read("videomme", root=FOLDER)` gives Samples whose ids are the benchmark's own.
What stands where, and under which licence, is in `DATASETS` and in
docs/datasets.md. Nothing is downloaded. A row that is wrong is an error with
file, row and field; what the published rows get wrong themselves is kept and
said in `Sample.flaws`.
"""

import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from absl import logging

from cf_jax.data import images, records, rows
from cf_jax.data.sources import (
  choice_benchmarks,
  grounding_benchmarks,
  training_sets,
)

# A published name without suffix is that of a file with one of these.
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_SUFFIXES = frozenset(
  (*VIDEO_SUFFIXES, *images.SUFFIXES, ".gif", ".m4v", ".mpg", ".mpeg", ".ts")
  + (".flv", ".wmv", ".3gp", ".ogv")
)
_SHOWN = 3  # wrong rows in an error
# What a decoder would take for an address ("http:", "concat:"), and characters
# that are in no published name.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_NEVER = re.compile(r"[\\\x00-\x1f]")


class Dataset(NamedTuple):
  """How a dataset is published.

  Attributes:
    title: as its authors call it.
    role: "train" or "eval", or both.
    splits: split -> patterns of its annotation files below the root; the first
      pattern that anything matches counts. The first split is the default.
    sample: a row -> its Sample, or the Samples of its turns.
    videos: folders below the root where the videos may lie; the first that
      exists counts.
    licence: in short; "see its page" where it was not found out.
    published: where.
    ids: what an id is made of.
    load: an annotation file -> its rows.
    beside: an annotation file -> the files beside it that are read with it.
    subtitles: folder below the root, "" where there are none.
    folders: are the videos folders of pictures?
  """

  title: str
  role: Literal["train", "eval", "train, eval"]
  splits: dict[str, tuple[str, ...]]
  sample: Callable[[rows.Row], records.Sample | list[records.Sample]]
  videos: tuple[str, ...]
  licence: str
  published: str
  ids: str
  load: Callable[[pathlib.Path], Iterator[rows.Row]] = rows.read
  beside: Callable[[pathlib.Path], list[pathlib.Path]] = lambda path: []
  subtitles: str = ""
  folders: bool = False


def _maps(path: pathlib.Path) -> list[pathlib.Path]:
  return [choice_benchmarks.video_map(path)]


def _maps_and_windows(path: pathlib.Path) -> list[pathlib.Path]:
  return [*_maps(path), grounding_benchmarks.nextgqa_windows(path)]


def _judged_choices(path: pathlib.Path) -> list[pathlib.Path]:
  if "captioning" not in path.name:
    return []
  return [choice_benchmarks.tempcompass_choices(path)]


DATASETS = {
  "activitynet": Dataset(
    title="ActivityNet Captions",
    role="train, eval",
    splits={
      "val_2": ("val_2.json", "*/val_2.json"),
      "val_1": ("val_1.json", "*/val_1.json"),
      "train": ("train.json", "*/train.json"),
      "test": ("test.json", "*/test.json"),
    },
    load=grounding_benchmarks.sentences_rows,
    sample=grounding_benchmarks.sentences,
    videos=("videos", "Activity_Videos", "v1-3"),
    licence="see its page",
    published="the page of Dense-Captioning Events in Videos (Stanford)",
    ids="VIDEO/N: the video's name and the number of the sentence, from 0",
  ),
  "charades_sta": Dataset(
    title="Charades-STA",
    role="train, eval",
    splits={
      "test": (
        "charades_sta_test.txt",
        "charades_test.jsonl",
        "charades_test.json",
        "data/test-*.parquet",
        "*/charades_sta_test.txt",
        "*/charades_test.json",
      ),
      "train": (
        "charades_sta_train.txt",
        "charades_train.jsonl",
        "train.json",
        "*/charades_sta_train.txt",
        "*/train.json",
      ),
    },
    load=grounding_benchmarks.charades_sta_rows,
    sample=grounding_benchmarks.charades_sta,
    videos=("Charades_v1_480", "Charades_v1", "videos"),
    licence="Charades: non-commercial use",
    published="GitHub: jiyanggao/TALL; videos: the page of Charades (AI2)",
    ids="qid where the file has one (JSONL); VIDEO/N in JSON; else the number"
    " of the row, from 0",
  ),
  "dream1k": Dataset(
    title="DREAM-1K",
    role="eval",
    splits={
      "test": ("DREAM-1k.jsonl", "json/metadata.json", "*/DREAM-1k.jsonl")
    },
    sample=grounding_benchmarks.dream1k,
    videos=("video/DREAM-1K_videos", "video", "videos"),
    licence="Apache-2.0; see its page for the videos",
    published="Hugging Face: omni-research/DREAM-1K",
    ids="idx",
  ),
  "got10k": Dataset(
    title="GOT-10k, 8 boxes a video as VideoChat-R1",
    role="train, eval",
    splits={
      "val": ("got_val.json", "*/got_val.json"),
      "train": ("got_train.json", "*/got_train.json"),
    },
    sample=grounding_benchmarks.got10k,
    videos=("val", "train", "GOT-10k/val", "GOT-10k/train"),
    licence="see its page",
    published="the page of GOT-10k; boxes: GitHub: OpenGVLab/VideoChat-R1",
    ids="name of the video's folder",
    folders=True,
  ),
  "llava_video": Dataset(
    title="LLaVA-Video-178K, multiple choice",
    role="train",
    splits={"train": ("*/*_mc_*.json", "*_mc_*.json")},
    sample=training_sets.llava_video,
    videos=(".", "videos"),
    licence="none named on its page",
    published="Hugging Face: lmms-lab/LLaVA-Video-178K",
    ids="FILE/ROW/TURN: name of the file, numbers from 0",
  ),
  "longvideobench": Dataset(
    title="LongVideoBench",
    role="eval",
    splits={
      "val": ("lvb_val.json", "validation-*.parquet", "*/lvb_val.json"),
    },
    sample=choice_benchmarks.longvideobench,
    videos=("videos",),
    licence="CC BY-NC-SA 4.0",
    published="Hugging Face: longvideobench/LongVideoBench",
    ids="id",
    subtitles="subtitles",
  ),
  "lvbench": Dataset(
    title="LVBench",
    role="eval",
    splits={
      "test": (
        "video_info.meta.jsonl",
        "data/video_info.meta.jsonl",
        "lvbench_clean.json",
      ),
    },
    load=choice_benchmarks.lvbench_rows,
    sample=choice_benchmarks.lvbench,
    videos=("all_videos", "videos"),
    licence="CC BY-NC-SA 4.0",
    published="Hugging Face: THUDM/LVBench",
    ids="uid where the file has one; else VIDEO_N, the number of the question"
    " among the video's, from 0",
  ),
  "mlvu": Dataset(
    title="MLVU dev",
    role="eval",
    splits={"dev": ("json/*.json", "MLVU/json/*.json", "[1-9]_*.json")},
    sample=choice_benchmarks.mlvu,
    videos=("video", "MLVU/video"),
    licence="CC BY-NC-SA 4.0",
    published="Hugging Face: MLVU/MVLU",
    ids="FILE/N: name of the file and number of the row, from 0, as 2_needle/0",
  ),
  "mmvu": Dataset(
    title="MMVU validation",
    role="eval",
    splits={"validation": ("validation.json", "*/validation.json")},
    sample=choice_benchmarks.mmvu,
    videos=("videos",),
    licence="none named on its page",
    published="Hugging Face: yale-nlp/MMVU",
    ids="id",
  ),
  "mvbench": Dataset(
    title="MVBench",
    role="eval",
    splits={"test": ("json/*.json", "*.json")},
    sample=choice_benchmarks.mvbench,
    videos=("video", "videos"),
    licence="MIT (annotations); see its page for the videos",
    published="Hugging Face: OpenGVLab/MVBench",
    ids="FILE/N: name of the file and number of the row, from 0, as"
    " action_sequence/0",
  ),
  "nextgqa": Dataset(
    title="NExT-GQA",
    role="train, eval",
    splits={
      "test": ("test.csv", "*/test.csv"),
      "val": ("val.csv", "*/val.csv"),
      "train": ("train.csv", "*/train.csv"),
    },
    load=grounding_benchmarks.nextgqa_rows,
    sample=grounding_benchmarks.nextgqa,
    videos=("NExTVideo", "videos"),
    licence="MIT",
    published="GitHub: doc-doc/NExT-GQA",
    ids="VIDEO_QID",
    beside=_maps_and_windows,
  ),
  "nextqa": Dataset(
    title="NExT-QA, multiple choice",
    role="eval",
    splits={
      "val": ("val.csv", "*/val.csv"),
      "test": ("test.csv", "*/test.csv", "MC/test-*.parquet"),
      "train": ("train.csv", "*/train.csv"),
    },
    load=choice_benchmarks.nextqa_rows,
    sample=choice_benchmarks.nextqa,
    videos=("NExTVideo", "videos"),
    licence="MIT",
    published="GitHub: doc-doc/NExT-QA",
    ids="VIDEO_QID",
    beside=_maps,
  ),
  "qvhighlights": Dataset(
    title="QVHighlights",
    role="train, eval",
    splits={
      "val": ("highlight_val_release.jsonl", "*/highlight_val_release.jsonl"),
      "train": (
        "highlight_train_release.jsonl",
        "*/highlight_train_release.jsonl",
      ),
      "test": ("highlight_test_with_gt.jsonl",),
    },
    sample=grounding_benchmarks.qvhighlights,
    videos=("videos",),
    licence="CC BY-NC-SA 4.0",
    published="GitHub: jayleicn/moment_detr",
    ids="qid",
  ),
  "tempcompass": Dataset(
    title="TempCompass",
    role="eval",
    splits={
      "test": ("questions/*.json", "questions_*.json", "*.json"),
    },
    load=choice_benchmarks.tempcompass_rows,
    sample=choice_benchmarks.tempcompass,
    videos=("videos",),
    licence="CC BY-NC 4.0",
    published="GitHub: llyx97/TempCompass",
    ids="TASK/VIDEO/ASPECT/N as in multi-choice/1034419625/action/0, N from 0",
    beside=_judged_choices,
  ),
  "timer1": Dataset(
    title="Time-R1, training set",
    role="train",
    splits={"train": ("annotations/train_2k5.json", "train_2k5.json")},
    sample=grounding_benchmarks.timer1,
    videos=("videos", "."),
    licence="Apache-2.0 (annotations); see its page for the videos",
    published="GitHub: xiaomi-research/time-r1",
    ids="qid",
  ),
  "tvbench": Dataset(
    title="TVBench",
    role="eval",
    splits={"test": ("json/*.json", "*.json")},
    sample=choice_benchmarks.tvbench,
    videos=("video", "videos"),
    licence="CC BY 4.0; see its page for the videos",
    published="Hugging Face: FunAILab/TVBench",
    ids="FILE/N: name of the file and number of the row, from 0",
  ),
  "tvgbench": Dataset(
    title="TVGBench, the test set of Time-R1",
    role="eval",
    splits={"test": ("annotations/tvgbench.json", "tvgbench.json")},
    sample=grounding_benchmarks.tvgbench,
    videos=("videos", "."),
    licence="Apache-2.0 (annotations); see its page for the videos",
    published="GitHub: xiaomi-research/time-r1",
    ids="number of the row, from 0",
  ),
  "video_mmmu": Dataset(
    title="Video-MMMU",
    role="eval",
    splits={
      "test": ("data/*_video.json", "*_video.json", "*ion/test-*.parquet"),
    },
    load=choice_benchmarks.video_mmmu_rows,
    sample=choice_benchmarks.video_mmmu,
    videos=(".", "videos"),
    licence="none named; access on conditions, see its page",
    published="Hugging Face: lmms-lab/VideoMMMU",
    ids="TRACK/ID as in Perception/dev_Biology_3; an id stands in every track",
  ),
  "video_r1": Dataset(
    title="Video-R1-260k",
    role="train",
    splits={"train": ("Video-R1-260k.json",)},
    sample=training_sets.video_r1,
    videos=(".",),
    licence="Apache-2.0; see its page for the videos",
    published="Hugging Face: Video-R1/Video-R1-data",
    ids="problem_id",
  ),
  "video_r1_cot": Dataset(
    title="Video-R1-CoT-165k",
    role="train",
    splits={"train": ("Video-R1-COT-165k.json",)},
    sample=training_sets.video_r1_cot,
    videos=(".",),
    licence="Apache-2.0; see its page for the videos",
    published="Hugging Face: Video-R1/Video-R1-data",
    ids="problem_id",
  ),
  "videomme": Dataset(
    title="Video-MME",
    role="eval",
    splits={
      "test": (
        "videomme/test-*.parquet",
        "test-*.parquet",
        "videomme.json",
      ),
    },
    sample=choice_benchmarks.videomme,
    videos=("data", "videos", "video"),
    licence="academic research only",
    published="Hugging Face: lmms-lab/Video-MME",
    ids="question_id",
    subtitles="subtitle",
  ),
  "vsibench": Dataset(
    title="VSI-Bench",
    role="eval",
    splits={"test": ("test.jsonl", "test-*.parquet", "*/test-*.parquet")},
    sample=choice_benchmarks.vsibench,
    videos=(".", "videos"),
    licence="Apache-2.0; see its page for the scenes",
    published="Hugging Face: nyu-visionx/VSI-Bench",
    ids="id",
  ),
}


def find(name: str) -> Dataset:
  """A dataset by its name.

  Raises:
    ValueError: an unknown name.
  """
  if name not in DATASETS:
    raise ValueError(
      f"no dataset is called {name!r}; expected one of {', '.join(DATASETS)}"
    )
  return DATASETS[name]


def annotation_files(
  name: str,
  annotations: str | pathlib.Path | Sequence[str | pathlib.Path] | None = None,
  *,
  root: str | pathlib.Path | None = None,
  split: str | None = None,
) -> list[pathlib.Path]:
  """The files that `read` takes the questions from, and what lies beside them.

  Args: as of `read`.

  Raises:
    ValueError: as `read`, for files.
  """
  found = _annotation_files(name, annotations, root=root, split=split)
  beside = [other for path in found for other in find(name).beside(path)]
  return list(
    dict.fromkeys(found + [other for other in beside if other.is_file()])
  )


def _annotation_files(name, annotations, *, root, split) -> list[pathlib.Path]:
  dataset = find(name)
  if split and split not in dataset.splits:
    raise ValueError(
      f"{name} has no split {split!r}; expected one of"
      f" {', '.join(dataset.splits)}"
    )
  if annotations and not isinstance(annotations, (str, pathlib.Path)):
    given = [pathlib.Path(path).expanduser() for path in annotations]
  elif annotations:
    given = [pathlib.Path(annotations).expanduser()]
  elif root:
    given = [pathlib.Path(root).expanduser()]
  else:
    raise ValueError(
      f"{name}: give annotations (a file or folder) or root (the folder of a"
      " local copy)"
    )
  missing = [path for path in given if not path.exists()]
  if missing:
    raise ValueError(f"{name}: there is no {missing[0]}; change annotations")
  if any(path.is_file() for path in given):
    folders = [path for path in given if path.is_dir()]
    if split or folders:
      what = f"split {split!r}" if split else f"the folder {folders[0]}"
      raise ValueError(
        f"{name}: got files of annotations and {what}; give only the files"
      )
    return given
  patterns = dataset.splits[split or next(iter(dataset.splits))]
  found = []
  for folder in given:
    some = _files_of(folder, patterns)
    if not some and not split:
      some = _only_split(name, folder)
    if not some:
      raise ValueError(
        f"{name}: {folder} has none of {', '.join(patterns)}; give the file in"
        " annotations, or another split"
      )
    found += some
  return found


def _only_split(name: str, folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of the one split that a folder has; none where it has several."""
  there = {
    split: files
    for split, patterns in find(name).splits.items()
    if (files := _files_of(folder, patterns))
  }
  if len(there) != 1:
    return []
  ((split, files),) = there.items()
  logging.info("%s: %s has the split %r alone", name, folder, split)
  return files


def _files_of(
  folder: pathlib.Path, patterns: Sequence[str]
) -> list[pathlib.Path]:
  """The files of the first pattern that anything matches."""
  for pattern in patterns:
    some = sorted(path for path in folder.glob(pattern) if path.is_file())
    if some:
      return some
  return []


def read(
  name: str,
  annotations: str | pathlib.Path | Sequence[str | pathlib.Path] | None = None,
  *,
  root: str | pathlib.Path | None = None,
  split: str | None = None,
  videos: str | pathlib.Path | None = None,
  subtitles: bool = False,
  clips: bool = True,
  only: Sequence[str] = (),
  max_bad_rows: int = 0,
) -> list[records.Sample]:
  """The questions of a dataset, all of them right.

  Args:
    name: a key of `DATASETS`.
    annotations: file, folder or list of files; None (or "") looks for the
      published names below the root.
    root: folder of the local copy. Videos are looked for below it and their
      paths begin with it; None leaves them relative. Missing videos are no
      error here (see programs/check_data.py).
    split: of `DATASETS`; None (or "") is its first, or the only one that a
      folder has.
    videos: folder of the videos, below the root or absolute; None (or "") is
      the first of the dataset's own that exists.
    subtitles: fill in `Sample.subtitles`; "" where a video has none.
    clips: False says that the local files are cut to the annotated parts, so
      that `Sample.clip` is None.
    only: "GROUP=VALUE" keeps the samples of that group ("task" and "kind" are
      some too); several values of one group are alternatives.
    max_bad_rows: so many wrong rows may be left out; each is logged.

  Raises:
    ValueError: an unknown name, split or group, a missing or unreadable file,
      more wrong rows than allowed (naming file, row and field), or no row.
  """
  made, problems = examine(
    name,
    annotations,
    root=root,
    split=split,
    videos=videos,
    subtitles=subtitles,
    clips=clips,
  )
  if len(problems) > max_bad_rows:
    shown = "; ".join(problems[:_SHOWN])
    more = " ..." if len(problems) > _SHOWN else ""
    raise ValueError(
      f"{shown}{more} ({len(problems)} wrong rows in all, max_bad_rows allows"
      f" {max_bad_rows})"
    )
  for problem in problems:
    logging.warning("left out: %s", problem)
  if not made:
    raise ValueError(f"{name}: no question in the annotation files")
  return select(made, only)


def examine(
  name: str,
  annotations: str | pathlib.Path | Sequence[str | pathlib.Path] | None = None,
  *,
  root: str | pathlib.Path | None = None,
  split: str | None = None,
  videos: str | pathlib.Path | None = None,
  subtitles: bool = False,
  clips: bool = True,
) -> tuple[list[records.Sample], list[str]]:
  """The questions of a dataset, and what is wrong with the other rows.

  Args: as of `read`.

  Raises:
    ValueError: an unknown name or split, or a missing or unreadable file.
  """
  dataset = find(name)
  if subtitles and not dataset.subtitles:
    raise ValueError(f"{name} has no subtitles; set subtitles to False")
  place = _Place(
    name,
    dataset,
    root or None,
    split or next(iter(dataset.splits)),
    videos or None,
    subtitles,
  )
  made, problems, known = [], [], {}
  for path in _annotation_files(name, annotations, root=root, split=split):
    for row in dataset.load(path):
      try:
        row.check()
        found = dataset.sample(row)
        found = found if isinstance(found, list) else [found]
        for sample in found:
          if sample.id in known:
            raise ValueError(
              f"{row.where}: id {sample.id!r} is taken by {known[sample.id]};"
              " ids must be unique"
            )
        found = [
          place.resolve(row, sample._replace(source=name), clips=clips)
          for sample in found
        ]
      except ValueError as error:
        problems.append(str(error))
        continue
      known |= dict.fromkeys((sample.id for sample in found), row.where)
      made += found
  return made, problems


def select(
  samples: Sequence[records.Sample], only: Sequence[str]
) -> list[records.Sample]:
  """The samples of some groups.

  Args:
    samples: of one dataset.
    only: "GROUP=VALUE", see `read`.

  Raises:
    ValueError: no such group, or a value that no sample has.
  """
  wanted = {}
  for said in only:
    group, equals, value = said.partition("=")
    if not equals:
      raise ValueError(f"only: got {said!r}, expected GROUP=VALUE")
    values = sorted({groups_of(s).get(group, "") for s in samples} - {""})
    if value not in values:
      names = sorted({name for s in samples for name in groups_of(s)})
      raise ValueError(
        f"only: no sample has {group} {value!r}; "
        + (f"it has {values[:20]}" if values else f"there are {names}")
      )
    wanted.setdefault(group, set()).add(value)
  return [
    sample
    for sample in samples
    if all(
      groups_of(sample).get(group) in values for group, values in wanted.items()
    )
  ]


def groups_of(sample: records.Sample) -> dict[str, str]:
  """Name -> value of everything results of a sample are broken down by."""
  return dict(sample.groups) | {"task": sample.task, "kind": sample.kind}


class _Place:
  """Published names -> paths of a local copy."""

  def __init__(self, name, dataset, root, split, videos, subtitles):
    self._has_suffix = not dataset.folders
    self._videos = pathlib.Path(videos).expanduser() if videos else None
    self._wants_subtitles, self._subtitles = subtitles, None
    if root is not None:
      root = pathlib.Path(root).expanduser()
      if not root.is_dir():
        raise ValueError(f"{name}: there is no folder {root}; change root")
      # Where every split has a folder of its own, that of this one.
      named = sorted(dataset.videos, key=lambda f: f.split("/")[-1] != split)
      some = [root / folder for folder in named]
      folder = next((path for path in some if path.is_dir()), some[0])
      self._videos = root / self._videos if videos else folder
      self._subtitles = root / dataset.subtitles
    if videos and not self._videos.is_dir():
      raise ValueError(
        f"{name}: there is no folder {self._videos}; change videos"
      )
    if subtitles and self._subtitles and not self._subtitles.is_dir():
      raise ValueError(
        f"{name}: there is no folder {self._subtitles} of subtitles; unpack"
        " them there, or set subtitles to False"
      )

  def resolve(
    self, row: rows.Row, sample: records.Sample, *, clips: bool
  ) -> records.Sample:
    """A Sample with paths in place of published names."""
    video = _relative(row, sample.video)
    if self._has_suffix and sample.fps is None:
      video = _with_suffix(video, self._videos)
    if self._videos is not None:
      video = os.path.join(self._videos, video)
    said = ""
    if self._wants_subtitles:
      said = _relative(row, sample.subtitles)
      if self._subtitles is not None:
        said = os.path.join(self._subtitles, said)
        said = said if os.path.isfile(said) else ""
    return sample._replace(
      video=video,
      subtitles=said,
      clip=sample.clip if clips else None,
    )


def _relative(row: rows.Row, name: str) -> str:
  """A published path, which must not lead out of the copy."""
  parts = [part for part in name.split("/") if part not in ("", ".")]
  if (
    name.startswith("/")
    or ".." in parts
    or not parts
    or _SCHEME.match(name)
    or _NEVER.search(name)
  ):
    raise ValueError(
      f"{row.where}: got the path {name!r}, expected one below the folder of"
      " videos"
    )
  return "/".join(parts)


def _with_suffix(name: str, folder: pathlib.Path | None) -> str:
  """A name as a file's: with the suffix of the file that is there."""
  # A dot in a name is no suffix: NUsG9BgSes0_210.0_360.0
  if os.path.splitext(name)[1].lower() in _SUFFIXES:
    return name
  for suffix in VIDEO_SUFFIXES if folder is not None else ():
    if os.path.isfile(os.path.join(folder, name + suffix)):
      return name + suffix
  return name + VIDEO_SUFFIXES[0]
