"""The questions of an evaluation, and the words they are put in."""

import functools
import string
from collections.abc import Sequence
from typing import Any

import ml_collections

from cf_jax.data import datasets, records, subtitles
from cf_jax.programs import choosing, policies
from cf_jax.programs import experiment as experiment_lib
from cf_jax.runtime import telemetry

# Benchmarks that no annotation files describe.
OWN = ("jsonl", "synthetic", "run")


def run_config(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What the policy was trained with; nothing where it is no run."""
  if not policies.is_run(config.policy):
    return {}
  return telemetry.read_manifest(config.policy)["config"]


def read_questions(
  config: ml_collections.ConfigDict,
) -> list[records.Sample]:
  """The benchmark's questions in its own order.

  Raises:
    ValueError: annotations that cannot be read, or none that are left.
  """
  name = config.benchmark
  if name in OWN and (config.subtitles != "none" or config.only):
    raise ValueError(
      f"config.subtitles and config.only are for published benchmarks, got"
      f" config.benchmark={name!r}; leave them out"
    )
  if name == "jsonl":
    if not config.annotations:
      raise ValueError(
        "config.benchmark='jsonl' needs --config.annotations=FILE.jsonl"
      )
    samples = records.load_jsonl(
      config.annotations, allow_outside=config.data.allow_outside
    )
  elif name in OWN:
    samples = _held_out(config)[config.split or "test"]
  else:
    samples = datasets.read(
      name,
      config.annotations,
      root=config.root,
      split=config.split,
      videos=config.videos,
      subtitles=config.subtitles != "none",
      only=tuple(config.only),
      clips=config.clips,
      max_bad_rows=config.max_bad_rows,
    )
  samples = samples[: config.num_questions]
  if not samples:
    raise ValueError(
      f"{name}: no question is left; change config.only or config.split"
    )
  blank = [sample.id for sample in samples if not sample.evidence]
  if config.select == choosing.ORACLE and blank:
    raise ValueError(
      f"config.select='oracle' shows the annotated evidence, and {len(blank)}"
      f" of {len(samples)} questions have none ({', '.join(blank[:3])}); take"
      " another selector or benchmark"
    )
  _check_tracking(config, samples)
  pictured = [sample.id for sample in samples if sample.image]
  if pictured:
    raise ValueError(
      f"{len(pictured)} questions of {name} come with a picture beside the"
      f" video ({', '.join(pictured[:3])}, ...), which is not shown yet; leave"
      " them out with config.only"
    )
  return samples


def _check_tracking(
  config: ml_collections.ConfigDict, samples: Sequence[records.Sample]
) -> None:
  """Raises a ValueError where frames are shown that no boxes are known of.

  The annotated boxes of a video are those of so many frames at equal distances,
  and an answer with any other number of them cannot be read.
  """
  counts = sorted({len(s.boxes) for s in samples if s.kind == "tracking"})
  if not counts:
    return
  if len(counts) > 1:
    raise ValueError(
      f"the videos of {config.benchmark} have {counts} boxes; one evaluation"
      " shows the same number of frames of each"
    )
  asked = config.select, config.num_keyframes, config.fps
  if asked != ("uniform", counts[0], None):
    raise ValueError(
      f"{config.benchmark} has a box for each of {counts[0]} frames at equal"
      f" distances, got select={asked[0]!r}, num_keyframes={asked[1]},"
      f" fps={asked[2]}; set --config.select=uniform"
      f" --config.num_keyframes={counts[0]}, and leave config.fps out"
    )


def _held_out(config) -> dict[str, list[records.Sample]]:
  """The splits of the built-in set, or of what a run was trained on."""
  data = config.data
  source, made, seed = "synthetic", dict(data.synthetic), data.seed
  dataset = None
  if config.benchmark == "run":
    run = run_config(config)
    if not run:
      raise ValueError(
        "config.benchmark='run' takes the data of the policy's run, and"
        f" {config.policy} is not a run; name another benchmark"
      )
    source, seed = run["data"]["source"], run["data"]["seed"]
    made, dataset = run["data"]["synthetic"], run["data"].get("dataset")
  splits = experiment_lib.load_samples(
    source=source,
    cache_dir=data.cache_dir,
    synthetic_set=made,
    seed=seed,
    allow_outside=data.allow_outside,
    dataset=dataset,
  )
  if config.split and config.split not in splits:
    raise ValueError(
      f"config.split must be one of {tuple(splits)}, got {config.split!r}"
    )
  return splits


def is_built_in(config: ml_collections.ConfigDict) -> bool:
  """Are the videos files that this code wrote?"""
  if config.benchmark == "run":
    return run_config(config)["data"]["source"] == "synthetic"
  return config.benchmark == "synthetic"


class Wording:
  """Puts a question into the user's words.

  Args:
    config: settled.
    form: puts every question as one of this kind is put, in the words of the
      policy's run or ours and not the benchmark's; None puts each as its own.

  Attributes:
    templates: kind of question -> template.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    *,
    form: records.Kind | None = None,
  ):
    kinds = dict(config.prompt.templates)
    if config.prompt.style == "run":
      own = run_config(config)["prompt"]
      whole = own["build"]["question_template"]
      kinds = dict.fromkeys(kinds, whole) | dict(own["templates"])
    elif form is None and config.benchmark in config.prompt.of_benchmark:
      kinds = dict.fromkeys(kinds, config.prompt.of_benchmark[config.benchmark])
    if form is not None:
      kinds = dict.fromkeys(kinds, kinds[form])
    self.templates = kinds
    self._with_subtitles = config.prompt.subtitles
    self._how = config.subtitles
    self._lines = functools.lru_cache(maxsize=64)(subtitles.read)

  def __call__(
    self, sample: records.Sample, time_s: Sequence[float] | None = None
  ) -> str:
    """The text behind the frames.

    Args:
      sample: the question.
      time_s: seconds of the frames shown, for subtitles "shown"; None takes
        all lines, more than any choice of frames has.
    """
    marks = sample.labels or tuple(
      f"{letter}." for letter in string.ascii_uppercase
    )
    options = "".join(
      f"\n{mark} {option}" for mark, option in zip(marks, sample.options)
    )
    template = self.templates[sample.kind]
    try:
      text = template.format(question=sample.question, options=options)
    except (KeyError, IndexError, ValueError) as error:
      raise ValueError(
        f"cannot fill in {template!r} ({error!r}); expected the fields"
        " {question} and {options}, and {{ and }} for literal braces; change"
        f" config.prompt.templates.{sample.kind} or config.prompt.of_benchmark"
      ) from error
    if not sample.subtitles or self._how == "none":
      return text
    lines = self._lines(sample.subtitles, start_s=sample.subtitles_start_s)
    if self._how == "shown" and time_s is not None:
      said = subtitles.shown(lines, time_s)
    else:
      said = [line.text for line in lines]
    return self._with_subtitles.format(subtitles="\n".join(said)) + text
