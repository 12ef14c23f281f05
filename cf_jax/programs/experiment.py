"""What every program needs before it starts: data, tokenizer, model, views.

`build` reads a config top to bottom; nothing here trains or judges.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging
from jax.experimental import multihost_utils

from cf_jax import policy, report, sampling, views
from cf_jax.data import (
  answers,
  datasets,
  decoding,
  footage,
  pipeline,
  prompts,
  records,
  synthetic,
  video,
)
from cf_jax.models import config as model_config
from cf_jax.models import kernels, layers, vlm
from cf_jax.programs import policies
from cf_jax.runtime import lifecycle, optim, processes, sharding, telemetry
from cf_jax.types import TrainState, View

SPLITS = ("train", "dev", "test")
_PROBED_VIDEOS = 256  # for the width of time labels
_HELD_OUT_VIDEOS = 256  # of each public dataset, for dev and for test


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A config turned into objects.

  Attributes:
    config: the run's ConfigDict, locked.
    workdir: where everything of the run is kept.
    mesh: device mesh.
    tokenizer: the one door between text and ids.
    model: shape of the policy.
    samples: split -> list of Sample.
    make_views: batch -> Prepared.
    embed: uint8[B, T, h, w, 3] -> float[B, T, E], what the scan is judged by.
    banned: bool[V] ids that are never sampled.
    data_hash: of every question, answer and video name.
    peak: what the devices can multiply, below all utilisation.
    guard: is told how far the run is, and says when it has to stop.
    decoder: reads the files of all splits; loaders and readers share it.
  """

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  tokenizer: prompts.Tokenizer
  model: model_config.VLMConfig
  samples: dict[str, list[records.Sample]]
  make_views: views.ViewMaker
  embed: Callable[[np.ndarray], jax.Array]
  banned: np.ndarray
  data_hash: str
  peak: telemetry.Peak
  guard: lifecycle.Guard = dataclasses.field(default_factory=lifecycle.Guard)
  decoder: pipeline.Decoder = dataclasses.field(
    default_factory=decoding.Decoder
  )

  @property
  def grid(self) -> tuple[int, int]:
    """(height, width) of a frame in patches."""
    return self.make_views.grid

  @property
  def share(self) -> tuple[int, int]:
    """This process's part of every batch: (number, of how many)."""
    return sharding.batch_share(self.mesh)

  def loader(self, split: str, *, batch_size: int, **overrides) -> Any:
    """A grain iterator over this process's part of one split's batches.

    Args:
      split: a key of `samples`.
      batch_size: videos a batch, of all processes together.
      **overrides: of `config.data.loader`.
    """
    index, count = self.share
    settings = dict(self.config.data.loader) | overrides
    settings["batch_size"] = batch_size // count
    return pipeline.make_loader(
      self.samples[split],
      seed=self.config.seed,
      max_skip_fraction=self.config.data.max_skip_fraction,
      shard_index=index,
      shard_count=count,
      decoder=self.decoder,
      **settings,
    )

  def put(self, tree: Any) -> Any:
    """This process's rows of a batch to devices, split over data and fsdp."""
    return sharding.put_batch(tree, self.mesh)

  def gather(self, rows: Sequence[Any]) -> list[Any]:
    """The rows of a whole batch, from every process's own; JSON-able."""
    index, count = self.share
    parts = dict(processes.exchange([index, list(rows)]))
    return list(itertools.chain(*(parts[n] for n in range(count))))

  def own_rows(self, rows: np.ndarray) -> np.ndarray:
    """This process's rows of an array that every process has whole."""
    index, count = self.share
    size = len(rows) // count
    return rows[index * size : (index + 1) * size]

  def loader_states(self, state: dict) -> dict:
    """What a checkpoint keeps of all processes' loaders."""
    if processes.count() == 1:
      return state
    return {"hosts": self.gather([state])}


def load_samples(
  *,
  source: str,
  cache_dir: str,
  synthetic_set: dict,
  seed: int,
  dataset: dict | None = None,
  allow_outside: bool = False,
) -> dict[str, list[records.Sample]]:
  """Samples of every split.

  Args:
    source: "synthetic", or "jsonl:PATH" for a user's manifest. A folder with
      `train.jsonl`, `dev.jsonl`, `test.jsonl` gives the splits; of a single
      file, the last tenth of the videos is `test`, the tenth before it `dev`.
      So it is with "dataset:NAME=ROOT,NAME=ROOT", public datasets of
      `datasets.DATASETS` and the folders of their local copies, but that at
      most 256 videos of each are held out for test, and 256 for dev.
    cache_dir: where generated sets lie.
    synthetic_set: keyword arguments of `synthetic.ensure`.
    seed: generator seed of the built-in set.
    dataset: more keyword arguments of `datasets.read`; None gives none.
    allow_outside: of `records.load_jsonl`.

  Raises:
    ValueError: an unknown source or a bad manifest.
  """
  if source == "synthetic":
    root = synthetic.ensure(cache_dir, seed=seed, **synthetic_set)
    return {split: synthetic.load(root, split) for split in SPLITS}
  kind, _, path = source.partition(":")
  if kind == "dataset" and path:
    parts = [
      hold_out(
        _read_dataset(pair, dataset or {}, prefix="," in path),
        pair,
        most=_HELD_OUT_VIDEOS,
      )
      for pair in path.split(",")
    ]
    return {
      split: list(itertools.chain(*(part[split] for part in parts)))
      for split in SPLITS
    }
  if kind != "jsonl" or not path:
    raise ValueError(
      "data.source must be 'synthetic', 'jsonl:PATH' or 'dataset:NAME=ROOT',"
      f" got {source!r}; change config.data.source"
    )
  path = pathlib.Path(path)
  read = functools.partial(records.load_jsonl, allow_outside=allow_outside)
  if path.is_dir():
    made = {split: read(path / f"{split}.jsonl") for split in SPLITS}
    warn_of_shared_videos(made)
    return made
  return hold_out(read(path), str(path))


def _read_dataset(
  pair: str, settings: dict, *, prefix: bool
) -> list[records.Sample]:
  name, equals, root = pair.partition("=")
  if not equals or not root:
    raise ValueError(
      f"got {pair!r} in 'dataset:...', expected NAME=ROOT; change"
      " config.data.source"
    )
  made = datasets.read(name, root=root, **settings)
  if not prefix:
    return made
  return [sample._replace(id=f"{name}/{sample.id}") for sample in made]


def hold_out(
  samples: Sequence[records.Sample], source: str, *, most: int | None = None
) -> dict[str, list[records.Sample]]:
  """The last tenth of the videos as test, the tenth before it as dev.

  Args:
    samples: all questions; those about one video stay together.
    source: where they are from, for the error.
    most: videos in test, and in dev; None sets no limit.

  Raises:
    ValueError: fewer than ten videos.
  """
  videos = list(dict.fromkeys(sample.video for sample in samples))
  tenth = len(videos) // 10
  if tenth < 1:
    raise ValueError(
      f"{source} has {len(videos)} videos, expected at least 10 to hold out"
      " a dev and a test tenth; give a folder with train.jsonl, dev.jsonl and"
      " test.jsonl in config.data.source"
    )
  tenth = min(tenth, most or tenth)
  split_of = dict.fromkeys(videos, "train")
  split_of |= dict.fromkeys(videos[-2 * tenth :], "dev")
  split_of |= dict.fromkeys(videos[-tenth:], "test")
  made = {split: [] for split in SPLITS}
  for sample in samples:
    made[split_of[sample.video]].append(sample)
  return made


def warn_of_shared_videos(samples: dict[str, list[records.Sample]]) -> None:
  """Says so where a held-out split has videos that are trained on."""
  trained = {sample.video for sample in samples["train"]}
  for split in ("dev", "test"):
    shared = trained & {sample.video for sample in samples[split]}
    if shared:
      logging.warning(
        "%d videos of %s are in train too (%s, ...): its accuracy is not held"
        " out",
        len(shared),
        split,
        min(shared),
      )


def build(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  described: tuple[model_config.VLMConfig, prompts.Tokenizer] | None = None,
  samples: dict[str, list[records.Sample]] | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Experiment:
  """Reads the config and makes everything that does not train.

  Args:
    config: of a program that trains or samples.
    workdir: where everything of the run is kept.
    described: of a policy from elsewhere (`policies.describe`); None makes
      model and tokenizer as the config says.
    samples: split -> samples, of a program that looks through a run's eyes at
      other videos; None reads those of the config.
    mesh: of that program; None makes the config's.
  """
  mesh = mesh or sharding.make_mesh(**config.mesh)
  if described is None:
    tokenizer = prompts.load_tokenizer(policies.tokenizer_folder(config))
    described = policies.make_model(config, tokenizer), tokenizer
  model, tokenizer = described
  check_prompt(config, model)
  learns = "selector" in config and config.selector.learn
  check_fps(config.data.fps, config.scan.select, learns=learns)
  if mesh.size > 1:
    check_mesh(config, model, mesh)
    model = dataclasses.replace(model, mesh=mesh)
  if samples is None:
    check_batches(config, mesh)
  check_attention(model)
  sampling.check_settings(**config.sampling)
  decoder = pipeline.make_decoder(
    decode=config.data.decode,
    limits=config.data.limits,
    frame_cache=config.data.frame_cache,
    # The built-in videos were written by this project, a moment ago.
    contained=samples is not None or config.data.source != "synthetic",
  )
  if samples is None:
    samples = _own_samples(config, workdir, decoder)

  reader = pipeline.FrameReader(**config.data.reader, decoder=decoder)
  encode = None
  if config.scan.descriptor == "vision":
    encode = _vision_descriptor(config, model, mesh)
  make_views = views.ViewMaker(
    tokenizer,
    views.make_selector(**config.scan, encode=encode, **config.tad),
    reader,
    prompt=dict(config.prompt.build),
    templates=dict(config.prompt.templates),
    max_prompt_tokens=config.prompt.max_tokens,
    patch=(
      model.vision.patch_size,
      model.vision.spatial_merge_size,
      model.vision.temporal_patch_size,
    ),
    num_keyframes=config.tad.num_keyframes,
    # A program that only samples has no contrast, and shuffles nothing.
    num_shuffles=config.contrast.num_shuffles if "contrast" in config else 1,
    seed=config.seed,
    frames_per_slice=config.prompt.frames_per_slice,
    number_frames=config.prompt.number_frames,
    fps=config.data.fps,
  )
  return Experiment(
    config=config,
    workdir=workdir,
    mesh=mesh,
    tokenizer=tokenizer,
    model=model,
    samples=samples,
    make_views=make_views,
    embed=views.make_embedder(config.scan.descriptor, encode),
    banned=tokenizer.banned_mask(model.vocab_size),
    data_hash=hash_samples(samples),
    peak=telemetry.find_peak(model.dtype),
    decoder=decoder,
  )


def samples_of(
  config: ml_collections.ConfigDict,
) -> dict[str, list[records.Sample]]:
  """`load_samples` by a training config's `data`."""
  return load_samples(
    source=config.data.source,
    cache_dir=config.data.cache_dir,
    synthetic_set=dict(config.data.synthetic),
    seed=config.data.seed,
    allow_outside=config.data.allow_outside,
    dataset=dict(config.data.dataset),
  )


def _own_samples(config, workdir, decoder) -> dict[str, list[records.Sample]]:
  """The config's own samples, less the held-out ones that cannot be read."""
  samples = samples_of(config)
  skipped = {}
  if config.data.source != "synthetic":  # those were written a moment ago
    for split in ("dev", "test"):
      samples[split], lost = pipeline.readable(
        samples[split],
        max_skip_fraction=config.data.max_skip_fraction,
        scan_frames=config.data.loader.scan_frames,
        scan_size_px=config.data.loader.scan_size_px,
        decoder=decoder,
      )
      if processes.count() > 1:  # what one host cannot read, all leave out
        for other in processes.exchange(lost):
          lost |= other
        samples[split] = [s for s in samples[split] if s.video not in lost]
      skipped |= lost
    list_skipped(workdir, skipped)
  for split, rows in samples.items():
    logging.info("%s: %d samples", split, len(rows))
    # An unreadable truth fails here, not after an hour.
    answers.check_samples(
      rows,
      components=config.answers.components,
      has_judge=bool(config.judge.url),
    )
    _check_boxes(config, rows)
  return samples


def _check_boxes(
  config: ml_collections.ConfigDict, samples: Sequence[records.Sample]
) -> None:
  """Raises a ValueError for tracking questions whose frames cannot be shown."""
  counts = [
    len(sample.boxes) for sample in samples if sample.kind == "tracking"
  ]
  most = min(config.tad.num_keyframes, config.data.loader.scan_frames)
  if max(counts, default=0) > most:
    raise ValueError(
      f"a tracking question has boxes of {max(counts)} frames, and {most} are"
      " shown; raise config.tad.num_keyframes or config.data.loader.scan_frames"
    )
  if counts and "selector" in config and config.selector.learn:
    raise ValueError(
      f"{len(counts)} questions are of tracking, whose frames are those of"
      " their boxes: none are left to choose; leave them out, or set"
      " config.selector.learn=False"
    )


def check_prompt(
  config: ml_collections.ConfigDict, model: model_config.VLMConfig
) -> None:
  """Raises a ValueError where prompts and model count time differently."""
  said = config.prompt.build.tokens_per_second
  if said != model.vision.tokens_per_second:
    raise ValueError(
      f"config.prompt.build.tokens_per_second is {said}, the model counts"
      f" {model.vision.tokens_per_second} positions a second; set them equal"
    )


def check_fps(fps: float, select: str, *, learns: bool = False) -> None:
  """Raises a ValueError where frames a second cannot be kept to."""
  if not 0 <= fps < math.inf:
    raise ValueError(f"config.data.fps must be 0 or above, got {fps}")
  if fps and select != "uniform":
    raise ValueError(
      f"config.data.fps={fps:g} thins uniform frames out, got"
      f" config.scan.select={select!r}; set one of them to 0 or 'uniform'"
    )
  if fps and learns:
    raise ValueError(
      f"config.data.fps={fps:g} thins uniform frames out, and a learned"
      " selection always shows config.tad.num_keyframes; set it to 0"
    )


def check_mesh(
  config: ml_collections.ConfigDict,
  model: model_config.VLMConfig,
  mesh: jax.sharding.Mesh,
) -> None:
  """Raises a ValueError where a run cannot be divided over its devices."""
  sharding.check_model(model, mesh)
  parts, slots = mesh.shape["context"], config.prompt.max_tokens
  if slots % parts:
    raise ValueError(
      f"config.prompt.max_tokens={slots} does not divide over"
      f" config.mesh.context={parts}; set it to {slots + -slots % parts}"
    )


def check_batches(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> None:
  """Raises a ValueError where a stage's batch cannot be divided as set."""
  for stage, steps, rows in (
    ("sft", "max_steps", "batch_size"),
    ("rl", "steps", "prompts_per_step"),
  ):
    if stage in config and config[stage][steps]:
      sharding.check_batch(
        config[stage][rows],
        mesh,
        micro_batches=config[stage].micro_batches,
        setting=f"config.{stage}.{rows}",
      )


def check_attention(model: model_config.VLMConfig) -> None:
  """Raises a ValueError where its kernel cannot serve on these devices."""
  attend = functools.partial(
    layers.attend, mask=None, implementation=model.attention
  )
  for heads, width in (
    (model.num_attention_heads, model.head_dim),
    (model.vision.num_heads, model.vision.head_dim),
  ):
    x = jax.ShapeDtypeStruct(
      (1, kernels.SPLASH_BLOCK, heads, width), model.dtype
    )
    jax.jit(attend).lower(x, x, x)


def longest_prompt(experiment: Experiment) -> int:
  """Most slots that any question's prompt can take.

  Time labels are as wide as the longest of some probed videos makes them.

  Raises:
    ValueError: more than `prompt.max_tokens`; it shows before training.
  """
  duration_s = 0.0
  distinct = {}
  for sample in itertools.chain(*experiment.samples.values()):
    distinct.setdefault((sample.question, sample.options), sample)
  some = list(distinct.values())[:_PROBED_VIDEOS]
  for sample in some:
    with contextlib.suppress(video.VideoError):  # skipped, and counted, later
      info = experiment.decoder.probe(footage.of_sample(sample))
      duration_s = max(duration_s, info.duration_s)
  count, wordiest = max(
    (
      (experiment.make_views.count_tokens(sample, duration_s=duration_s), n)
      for n, sample in enumerate(distinct.values())
    )
  )
  wordiest = list(distinct.values())[wordiest]
  limit = experiment.config.prompt.max_tokens
  if count > limit:
    raise ValueError(
      f"the prompt of sample {wordiest.id!r} can take {count} tokens, the"
      f" budget is {limit}; raise config.prompt.max_tokens, or show fewer or"
      " smaller frames"
    )
  return count


def list_skipped(workdir: pathlib.Path, skipped: dict[str, str]) -> None:
  """Adds videos that could not be read to this process's skipped.json.

  Args:
    workdir: of the run.
    skipped: path -> reason.
  """
  process = jax.process_index()
  name = f"skipped_{process}.json" if process else "skipped.json"
  known = {}
  if (workdir / name).exists():
    known = json.loads((workdir / name).read_text("utf-8"))
  if skipped:
    telemetry.write_json(workdir / name, known | skipped)


def hash_samples(samples: dict[str, list[records.Sample]]) -> str:
  """First 16 hex digits of a SHA-256 over every field of every sample."""
  digest = hashlib.sha256()
  for split, rows in sorted(samples.items()):
    for row in rows:
      paths = {
        name: pathlib.Path(getattr(row, name)).name
        for name in ("video", "image", "subtitles")
      }
      said = (split, *_told(row._replace(**paths)))
      digest.update(repr(said).encode())
  return digest.hexdigest()[:16]


def _told(row: records.Sample) -> list:
  """What a sample says; of the fields from `groups` on those that are given.

  So samples without them keep the hash that they had before there were any.
  """
  first = row._fields.index("groups")
  return [
    *row[:first],
    *(
      (name, value)
      for name, value in zip(row._fields[first:], row[first:])
      if value != row._field_defaults[name]
    ),
  ]


def summary(experiment: Experiment) -> dict[str, str]:
  """What a run is about to do, for the start-up table.

  Raises:
    ValueError: a prompt that does not fit, or patterns of parameters that
      match none: what would else show after the first stage.
  """
  config = experiment.config
  abstract = policies.abstract_params(config, experiment.model, experiment.mesh)
  for stage in policies.STAGES:
    stage_optimizer(config, stage, abstract)
    trained, _ = optim.split(abstract, policies.frozen_patterns(config, stage))
  count, num_trained = (
    sum(leaf.size for leaf in jax.tree.leaves(tree))
    for tree in (abstract, trained)
  )
  size, trained_size = (
    sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    for tree in (abstract, trained)
  )
  num_keyframes = config.tad.num_keyframes
  num_slots = num_keyframes // config.prompt.frames_per_slice
  num_visual = num_slots * math.prod(experiment.make_views.merged_grid)
  prompt = longest_prompt(experiment)
  batch, group = config.rl.prompts_per_step, config.sampling.num_completions
  slots = config.prompt.max_tokens + group * config.sampling.max_tokens
  learns, many = config.selector.learn, config.selector.num_selections
  rows = batch * (many if learns else 1)
  cache = vlm.cache_bytes(experiment.model, rows * slots)
  # Decoding has a copy of the layers; of all, where it casts them.
  copied = jax.eval_shape(
    functools.partial(vlm.unstacked, experiment.model, rows=rows * group),
    abstract,
  )["decoder"]
  if experiment.model.dtype == experiment.model.param_dtype:
    copied = copied["layers"]
  copied = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(copied))
  mib = 2.0**20
  devices = jax.devices()
  return {
    "devices": f"{len(devices)} x {devices[0].device_kind}, mesh"
    f" {dict(experiment.mesh.shape)}",
    "policy": f"{config.init_from or config.model.size}:"
    f" {count / 1e6:.2f} M parameters, {num_trained / 1e6:.2f} M trained",
    "samples": ", ".join(
      f"{split} {len(rows)}" for split, rows in experiment.samples.items()
    ),
    "frames": f"{config.data.loader.scan_frames} scanned, {num_keyframes}"
    f" shown in {num_slots} slots",
    "tokens per sample": f"{num_visual} visual, at most {prompt} in the"
    " longest question's prompt (limit"
    f" {config.prompt.max_tokens}),"
    f" up to {config.sampling.max_tokens} new",
    report.method_name(config): f"{config.rl.steps} updates of {batch} prompts"
    + (f" x {many} selections" if learns else "")
    + f" x {group} completions; an epoch is"
    f" {len(experiment.samples['train']) // batch} updates",
    "memory": f"parameters {size / mib:.1f} MiB, Adam"
    f" {2 * trained_size / mib:.1f}, reference {trained_size / mib:.1f},"
    f" layers to decode with {copied / mib:.1f}, key/value cache"
    f" {cache / mib:.1f}",
    "peak": f"{experiment.peak.flops_per_s / 1e12:.3g} TFLOP/s"
    f" ({experiment.peak.source})",
    "kept in": str(experiment.workdir),
  }


def _vision_descriptor(config, model, mesh):
  """uint8[B, T, h, w, 3] -> [B, T, E] by the policy's own vision tower.

  The tower is the initial one, so that the scan of a run does not change under
  its feet while the policy trains.
  """
  params = policies.initial_params(config, model, mesh)
  if processes.count() > 1:
    # Each process looks at videos of its own, whatever the others are at.
    params = multihost_utils.process_allgather(
      {"vision": params["vision"]}, tiled=True
    )
    model = dataclasses.replace(model, mesh=None)
  return scan_embedder(model, params, config.data.loader.scan_size_px)


def scan_embedder(
  model: model_config.VLMConfig, params: dict, size_px: tuple[int, int]
) -> Callable[[np.ndarray], jax.Array]:
  """uint8[B, T, h, w, 3] -> [B, T, E] by a vision tower.

  Args:
    model: its shape.
    params: with its parameters under "vision"; no others are kept.
    size_px: (h, w).
  """
  embed = policy.make_frame_embedder(
    model, {"vision": params["vision"]}, size_px
  )

  def embed_scans(scan):
    flat = embed(scan.reshape(-1, *scan.shape[2:]))
    return flat.reshape(*scan.shape[:2], -1)

  return embed_scans


class Stage(NamedTuple):
  """What a stage trains, and what it leaves as it is.

  Attributes:
    state: TrainState on the mesh; its parameters are the trained ones alone.
    frozen: the other parameters.
    state_shardings: of `state`.
    frozen_shardings: of `frozen`.
    optimizer: of the trained parameters.
  """

  state: TrainState
  frozen: dict
  state_shardings: TrainState
  frozen_shardings: dict
  optimizer: optax.GradientTransformation

  @property
  def trains_vision(self) -> bool:
    """Is anything of the vision tower trained, adapters included?"""
    return "vision" in self.state.params


def stage_optimizer(
  config: ml_collections.ConfigDict, stage: str, params: dict
) -> optax.GradientTransformation:
  """The optimizer of a stage; frozen parameters are taken out before it."""
  settings = {**config[stage].optim}
  del settings["frozen"]
  return optim.make_optimizer(params, **settings)


def _fresh_state(optimizer, rng, trained):
  return TrainState(
    step=jnp.int32(0),
    params=trained,
    opt_state=optimizer.init(trained),
    rng=jax.random.key_data(rng),
  )


def describe_stage(experiment: Experiment, stage: str, params: dict) -> Stage:
  """A stage whose state is shapes and shardings: nothing is computed.

  Args:
    experiment: from `build`.
    stage: "sft" or "rl", a key of the config with `optim` under it.
    params: all parameters, or their shapes.
  """
  optimizer = stage_optimizer(experiment.config, stage, params)
  trained, frozen = optim.split(
    params, policies.frozen_patterns(experiment.config, stage)
  )
  shapes = jax.eval_shape(
    functools.partial(_fresh_state, optimizer), jax.random.key(0), trained
  )
  shardings = sharding.tree_shardings(
    shapes, experiment.mesh, sharding.STATE_RULES
  )
  return Stage(
    state=jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=place
      ),
      shapes,
      shardings,
    ),
    frozen=frozen,
    state_shardings=shardings,
    frozen_shardings=sharding.tree_shardings(
      frozen, experiment.mesh, sharding.PARTITION_RULES
    ),
    optimizer=optimizer,
  )


def make_stage(experiment: Experiment, stage: str, params: dict) -> Stage:
  """A fresh TrainState of a stage.

  Args:
    experiment: from `build`.
    stage: "sft" or "rl", a key of the config with `optim` under it.
    params: all parameters, where the stage starts; the state takes over the
      buffers of those that it trains.
  """
  made = describe_stage(experiment, stage, params)
  trained, _ = optim.split(
    params, policies.frozen_patterns(experiment.config, stage)
  )
  fresh = jax.jit(
    functools.partial(_fresh_state, made.optimizer),
    out_shardings=made.state_shardings,
    donate_argnums=1,
  )
  rng = jax.random.key(experiment.config.seed)
  return made._replace(state=fresh(rng, trained))


class SampleSteps(NamedTuple):
  """Sampling in jitted steps, so that the time of each can be told.

  Attributes:
    unstack: params, rows=B * G -> params for `decode`. Its layers lie apart, a
      copy: a loop over tokens that takes them out of the stack copies all of
      them for every token. Once for each policy, not for each batch. It lies,
      as the caches do, as `sharding.decoding_mesh` says.
    prefill: params, View, encoded frames, seeds -> Decoding with one token.
    decode: params of `unstack`, Decoding (donated) -> Decoding at its end; its
      completions lie where the batch's rows do.
  """

  unstack: Callable
  prefill: Callable
  decode: Callable


def make_sample_steps(
  experiment: Experiment,
  *,
  num_completions: int,
  max_tokens: int,
  **settings,
) -> SampleSteps:
  """The steps from encoded frames to completions.

  Args:
    experiment: from `build`.
    num_completions: G.
    max_tokens: C.
    **settings: how a token is drawn, see `sampling.generate`.
  """
  model, eos_id = experiment.model, experiment.tokenizer.eos_id
  banned = jnp.asarray(experiment.banned)

  mesh = sharding.decoding_mesh(experiment.mesh, model.num_key_value_heads)
  decoder = model
  if model.mesh is not None:
    decoder = dataclasses.replace(model, mesh=mesh)

  def laid(decoding):
    return sharding.constrain(decoding, mesh, sharding.DECODING_RULES)

  @jax.jit
  def prefill_step(params, view: View, encoded, seed, settings):
    begun = sampling.start(
      model,
      params,
      view.prompt,
      policy.show(encoded, view.frame),
      seed,
      banned,
      num_completions=num_completions,
      max_tokens=max_tokens,
      eos_id=eos_id,
      **settings,
    )
    return laid(begun)

  @functools.partial(jax.jit, donate_argnums=1)
  def decode_step(params, decoding: sampling.Decoding, settings):
    ended = laid(
      sampling.advance(
        decoder, params, decoding, max_tokens, banned, eos_id=eos_id, **settings
      )
    )
    told = {
      name: getattr(ended, name)
      for name in ("token", "logprob", "mask", "done")
    }
    told = sharding.constrain(told, experiment.mesh, sharding.DECODING_RULES)
    return ended.replace(**told)

  @functools.partial(jax.jit, static_argnames="rows")
  def unstack_step(params, *, rows):
    platform = mesh.devices.flat[0].platform
    apart = vlm.unstacked(model, params, rows=rows, platform=platform)
    return sharding.constrain(apart, mesh, sharding.COPY_RULES)

  return SampleSteps(
    unstack=unstack_step,
    prefill=functools.partial(prefill_step, settings=settings),
    decode=functools.partial(decode_step, settings=settings),
  )


def shown_frames(
  prepared: views.Prepared, *, blank: bool = False
) -> np.ndarray:
  """The frames of a batch's slices: uint8[B, n * F, height, width, 3].

  Slice after slice, for `make_views.patches`: first the keyframes' slots, then
  what only other arms show. The blank slice, which is the last, is there where
  a view shows it, and with `blank`.
  """
  count = prepared.slices.shape[1] if blank else prepared.num_shown
  frame = prepared.slices[:, :count].reshape(len(prepared.slices), -1)
  return prepared.frames[np.arange(len(frame))[:, None], frame]


def make_encode_step(experiment: Experiment):
  """Jitted vision: params, pixel -> visual tokens of every frame."""

  @jax.jit
  def encode_step(params, pixel):
    encoded = policy.encode_frames(
      experiment.model, params, pixel, grid=experiment.grid
    )
    # An update may read them, and wants its batch to lie so.
    return jax.lax.with_sharding_constraint(
      encoded, sharding.batch_sharding(experiment.mesh)
    )

  return encode_step


def decode_rollout(
  tokenizer: prompts.Tokenizer, token: np.ndarray, mask: np.ndarray
) -> list[list[str]]:
  """Completions as text, the end token left out: [B][G]."""
  return [
    [
      tokenizer.decode([int(i) for i in row[real] if i != tokenizer.eos_id])
      for row, real in zip(rows, reals, strict=True)
    ]
    for rows, reals in zip(token, mask, strict=True)
  ]


class Stream:
  """Prepared batches of a split, made one ahead of the device.

  A thread reads, scans and words the next batch while the current one is
  computed on. Every batch comes with the loader state after it, so that a
  checkpoint written beside it never counts a batch that was only read ahead.

  Args:
    experiment: from `build`.
    split: "train", "dev" or "test".
    arms: views to make.
    batch_size: videos a batch, of all processes together.
    first: number of the first batch; it seeds the permutations.
    loader_state: to go on after, from an earlier batch; None starts anew.
    views_made: False gives the loader's batches as they are, where what a view
      shows is not known ahead.

  Attributes:
    prepare_s: seconds that it took to make the newest batch.
  """

  def __init__(
    self,
    experiment: Experiment,
    split: str,
    arms: Sequence[str],
    *,
    batch_size: int,
    first: int = 0,
    loader_state: dict | None = None,
    views_made: bool = True,
  ):
    self._loader = experiment.loader(split, batch_size=batch_size)
    if loader_state is not None:
      self._loader.set_state(loader_state)
    self._experiment = experiment
    self._arms = tuple(arms)
    self._views_made = views_made
    self._next = first
    self.prepare_s = 0.0
    self._queue = queue.Queue(maxsize=1)
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._work, daemon=True)
    self._thread.start()

  def _work(self) -> None:
    try:
      while not self._closed.is_set():
        known = self._loader.skipped_total
        begin = time.perf_counter()
        with jax.profiler.TraceAnnotation("video"):
          try:
            prepared = self._prepare()
          finally:
            if self._loader.skipped_total > known:
              list_skipped(self._experiment.workdir, self._loader.skipped)
        self._next += 1
        spent_s = time.perf_counter() - begin
        self._offer((prepared, self._loader.get_state(), spent_s))
    except Exception as error:  # handed to the loop, which raises it
      self._offer(error)

  def _prepare(self) -> views.Prepared | pipeline.Batch:
    batch = next(self._loader)
    while self._views_made:
      try:
        return self._experiment.make_views(batch, self._arms, draw=self._next)
      except video.VideoError as error:  # scanned, and then not read
        batch = self._loader.without(batch, error.path, str(error))
    return batch

  def _offer(self, item) -> None:
    while not self._closed.is_set():
      try:
        return self._queue.put(item, timeout=0.2)
      except queue.Full:
        continue

  def __next__(self) -> tuple[views.Prepared | pipeline.Batch, dict]:
    """The next batch and the loader state that follows it."""
    item = self._queue.get()
    if isinstance(item, Exception):
      raise item
    prepared, loader_state, self.prepare_s = item
    return prepared, loader_state

  def __enter__(self) -> "Stream":
    return self

  def __exit__(self, *_) -> None:
    self._closed.set()
    self._thread.join()
    self._loader.close()
