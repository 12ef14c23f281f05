"""What chooses the frames that an evaluation shows.

  uniform                      evenly spaced frames, found without a scan
  tad, aks, k_center, ...      of `selectors.SELECTORS`: by small scanned frames
  oracle                       frames of the annotated evidence: a bound
  learned                      the scorer of a run (configs/tspo.py)
  viarl                        the selector policy of a run (configs/viarl.py)

All are one thing, a `Chooser`: how a video is scanned, and which scanned frames
are shown. A run's own chooser scans as its run did.

Axes: `B` videos, `T` scanned frames, `K` keyframes.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from cf_jax import selectors, views
from cf_jax.data import frame_size, pipeline
from cf_jax.models import config as model_config
from cf_jax.programs import amplify, policies, scorer
from cf_jax.programs import experiment as experiment_lib
from cf_jax.runtime import optim, telemetry
from cf_jax.types import Keyframes

LEARNED = "learned"
VIARL = "viarl"
ORACLE = "oracle"
# "random" shows the same frames of a video every time (views.make_selector).
CHOICES = (*selectors.SELECTORS, LEARNED, VIARL, ORACLE)


class Chooser(NamedTuple):
  """Scanned frames -> those that are shown.

  Attributes:
    scan_frames: K -> T.
    scan_size_px: (height, width) of the scan.
    choose: Batch of T scanned frames, K -> Keyframes as numpy arrays. Takes as
      many rows as the evaluation's batches have.
    settings: what decides the choice, for the manifest; no paths.
    source: where it was read, "" for none.
  """

  scan_frames: Callable[[int], int]
  scan_size_px: tuple[int, int]
  choose: Callable[[pipeline.Batch, int], Keyframes]
  settings: dict[str, Any]
  source: str


def by_name(
  name: str,
  *,
  num_frames: int,
  size_px: tuple[int, int],
  descriptor: str,
  encode: Callable | None,
  tad: Mapping[str, Any],
) -> Chooser:
  """One of `selectors.SELECTORS`.

  Args:
    name: its key.
    num_frames: T; "uniform" scans the K frames that it shows and no others.
    size_px: (height, width) of the scan.
    descriptor: "pixels" or "vision", see `views.make_embedder`.
    encode: for "vision".
    tad: keyword arguments of `tad.select_keyframes`, which the others leave.
  """

  @functools.cache
  def select(num_keyframes):
    return views.make_selector(
      descriptor=descriptor,
      select=name,
      encode=encode,
      **dict(tad) | {"num_keyframes": num_keyframes},
    )

  def choose(batch, num_keyframes):
    found, _ = select(num_keyframes)(batch.scan, batch.scan_mask)
    return jax.device_get(found)

  uniform = name == "uniform"
  scan = dict(size_px=list(size_px))
  if not uniform:
    scan |= dict(num_frames=num_frames, descriptor=descriptor)
  return Chooser(
    scan_frames=(lambda k: k) if uniform else (lambda _: num_frames),
    scan_size_px=tuple(size_px),
    choose=choose,
    settings=dict(select=name, scan={} if uniform else scan)
    | (dict(tad=dict(tad)) if name == "tad" else {}),
    source="",
  )


def evidence_frames(
  evidence: Sequence[tuple[float, float]],
  time_s: np.ndarray,
  num_keyframes: int,
) -> np.ndarray:
  """Scanned frames that show the evidence, and uniform ones where it is short.

  The intervals share the K frames equally, and each has its own spread over
  it; one that lies between two scanned frames has the nearest one.

  Args:
    evidence: (start, end) seconds, at least one.
    time_s: float[T] of the scanned frames, ascending; all of them real.
    num_keyframes: K.

  Returns:
    int64[min(K, T)], ascending.
  """
  chosen = set()
  for n, (start, end) in enumerate(evidence):
    share = num_keyframes // len(evidence)
    share += n < num_keyframes % len(evidence)
    inside = np.flatnonzero((time_s >= start) & (time_s <= end))
    if not len(inside):
      inside = np.abs(time_s - (start + end) / 2).argmin()[None]
    chosen |= {*inside[frame_size.spread(len(inside), share)].tolist()}
  others = np.setdiff1d(np.arange(len(time_s)), [*chosen])
  room = max(min(num_keyframes, len(time_s)) - len(chosen), 0)
  chosen |= {*others[frame_size.spread(len(others), room)].tolist()}
  return np.sort([*chosen])[:num_keyframes]


def oracle(*, num_frames: int, size_px: tuple[int, int]) -> Chooser:
  """What somebody shows who knows where the answer is.

  Args:
    num_frames: T.
    size_px: (height, width) of the scan, which nobody looks at.
  """

  def choose(batch, num_keyframes):
    index = np.full((len(batch.samples), num_keyframes), num_frames, np.int32)
    for row, (sample, mask) in enumerate(zip(batch.samples, batch.scan_mask)):
      found = evidence_frames(
        sample.evidence, batch.scan_time_s[row][mask], num_keyframes
      )
      index[row, : len(found)] = found
    return amplify.as_keyframes(index, num_frames)

  return Chooser(
    scan_frames=lambda _: num_frames,
    scan_size_px=tuple(size_px),
    choose=choose,
    settings=dict(select=ORACLE, scan=dict(num_frames=num_frames)),
    source="",
  )


def _open_run(
  path: str, mesh: jax.sharding.Mesh, init_from: str, **tad: int
) -> experiment_lib.Experiment:
  """A run without its data, on another mesh, with other settings of `tad`.

  Raises:
    ValueError: it is no run.
  """
  if not path or not policies.is_run(path):
    raise ValueError(
      f"config.selector is {path!r}, expected the workdir of a run"
      f" ({telemetry.MANIFEST_FILE} lies in it); set --config.selector"
    )
  folder = pathlib.Path(path)
  config = policies.run_config(folder, init_from)
  config.tad.update(tad)
  return experiment_lib.build(
    config.lock(),
    folder,
    described=policies.describe(path, init_from),
    samples={},
    mesh=mesh,
  )


def _scan_of(experiment: experiment_lib.Experiment) -> dict[str, Any]:
  loader = experiment.config.data.loader
  return dict(
    num_frames=loader.scan_frames,
    size_px=list(loader.scan_size_px),
    descriptor=experiment.config.scan.descriptor,
  )


def learned(
  path: str, mesh: jax.sharding.Mesh, *, init_from: str, num_keyframes: int
) -> Chooser:
  """The scorer of a run: the frames of highest score that keep their distance.

  Args:
    path: the run's workdir.
    mesh: where it is computed.
    init_from: as in `policies.load_policy`.
    num_keyframes: K; not only the number that the run was trained with.

  Raises:
    ValueError: no run, or one without a learned selection.
  """
  experiment = _open_run(path, mesh, init_from, num_keyframes=num_keyframes)
  opened = scorer.open_scorer(experiment, init_from=init_from)

  def choose(batch, _):
    found, _ = opened.choose(batch)
    return found

  config, scan = experiment.config, _scan_of(experiment)
  return Chooser(
    scan_frames=lambda _: scan["num_frames"],
    scan_size_px=tuple(scan["size_px"]),
    choose=choose,
    settings=dict(
      select=LEARNED,
      scan=scan,
      tad=dict(config.tad),
      tad_weight=config.selector.tad_weight,
      weights=optim.fingerprint(opened.state.params),
    ),
    source=path,
  )


def amplified_frames(path: str) -> int | None:
  """How many frames a run's selector policy was taught to name, if it says.

  Args:
    path: of the selector's stage, inside the workdir of configs/viarl.py.
  """
  for folder in list(pathlib.Path(path).absolute().parents)[:2]:
    if policies.is_run(str(folder)):
      config = telemetry.read_manifest(folder)["config"]
      if "amplify" in config:
        return config["amplify"]["num_frames"]
  return None


def viarl(
  path: str,
  mesh: jax.sharding.Mesh,
  *,
  init_from: str,
  num_keyframes: int,
  batch_size: int,
) -> Chooser:
  """A selector policy: the frames whose numbers it writes, greedily.

  A list that cannot be read gives a uniform stride, as in its training.

  Args:
    path: workdir of the selector's stage, as in runs/viarl/cycle_2/selector.
    mesh: where it is computed.
    init_from: as in `policies.load_policy`.
    num_keyframes: n, frames that a list names.
    batch_size: rows of the batches that it is asked about.

  Raises:
    ValueError: no run, or one that was taught another number of frames.
  """
  taught = amplified_frames(path) if path else None
  if taught not in (None, num_keyframes):
    raise ValueError(
      f"the selector in {path} names {taught} frames, and config.num_keyframes"
      f" is {num_keyframes}; set it to {taught}"
    )
  experiment = _open_run(path, mesh, init_from)
  selector = amplify.Selector(experiment, num_keyframes)
  params = policies.load_policy(
    path,
    mesh,
    init_from=init_from,
    described=(experiment.model, experiment.tokenizer),
  ).params
  weights = optim.fingerprint(params)
  selector.load(params, rows=batch_size)

  def choose(batch, _):
    _, lists = selector.read(batch)
    return lists.chosen[0]

  config, scan = experiment.config, _scan_of(experiment)
  return Chooser(
    scan_frames=lambda _: scan["num_frames"],
    scan_size_px=tuple(scan["size_px"]),
    choose=choose,
    settings=dict(
      select=VIARL,
      scan=scan | dict(select=config.scan.select),
      candidates=config.tad.num_keyframes,
      size_px=list(config.data.reader.size_px),
      question_template=config.prompt.build.question_template,
      max_tokens=config.sampling.max_tokens,
      weights=weights,
    ),
    source=path,
  )


def own_tower(
  config: ml_collections.ConfigDict,
  path: str,
  mesh: jax.sharding.Mesh,
  model: model_config.VLMConfig,
  size_px: tuple[int, int],
) -> Callable:
  """uint8[B, T, h, w, 3] -> [B, T, E] by the vision tower of a policy.

  Of a run the tower that it started from, as in its training; of a directory
  its own.

  Args:
    config: of the evaluation; reads `init_from`.
    path: of the policy.
    mesh: where it is computed.
    model: its shape.
    size_px: (h, w).
  """
  if policies.is_run(path):
    run = policies.run_config(pathlib.Path(path), config.init_from)
    params = policies.initial_params(run, model, mesh)
  else:
    model, params, _ = policies.load_vision(
      path, mesh, dtype=config.dtype, init_from=config.init_from
    )
  return experiment_lib.scan_embedder(model, params, size_px)
