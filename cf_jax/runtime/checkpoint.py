"""Orbax checkpoints: params, optimizer, step, rng and the data iterator.

Only what is trained is in them: frozen parameters are made again from where
they came, and a fingerprint in the host state tells whether they are the same.
One folder a stage (`checkpoints/sft`, `checkpoints/rl`), one sub-folder a step.
Orbax writes to a temporary name and renames it when it is whole, so a killed
writer leaves nothing that a restore would take for a checkpoint. Before that
everything is forced to disk: Orbax does so with arrays alone, and an older
checkpoint is removed as soon as this one has its name.
"""

import contextlib
import difflib
import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from cf_jax import disk
from cf_jax.runtime import optim, sharding
from cf_jax.types import TrainState

# Of what is in a checkpoint, beside the arrays; raised with every change that
# an older one does not serve.
FORMAT = 2
# Beside the host state, in its file: that has no checksum as the arrays do.
_FORMAT_KEY, _CHECKSUM_KEY = "format", "checksum"
# Path -> type and bit sum of every array: what is compressed on disk may come
# back from a flipped bit as other numbers.
_ARRAYS_KEY = "arrays"


class _Host(dict):
  """Host state; what an older version did not save is an error in words."""

  def __init__(self, said: Mapping[str, Any], source: str):
    super().__init__(said)
    self._source = source
    # The first format had no checksum, and did not always give its number.
    found = self.pop(_FORMAT_KEY, None if _CHECKSUM_KEY in self else 1)
    checksum = self.pop(_CHECKSUM_KEY, None)
    self.pop(_ARRAYS_KEY, None)
    if found == FORMAT and checksum != _checksum(self):
      raise ValueError(
        f"the host state of {source} is damaged; move its folder away to go on"
        " from an earlier one, or give another --workdir to start anew"
      )
    if found not in (1, FORMAT):
      raise ValueError(
        f"{source} is of format {found!r}, this version of cf_jax reads"
        f" {FORMAT}; go on with the version that wrote it (manifest.json says"
        " which), or give another --workdir"
      )

  def __missing__(self, key: str):
    raise ValueError(
      f"{self._source} has no {key!r}: another version of cf_jax wrote it; go"
      " on with that version (manifest.json says which), or give another"
      " --workdir"
    )


def _checksum(host: Mapping[str, Any]) -> str:
  """16 hex digits of what JSON keeps of it."""
  text = json.dumps(json.loads(json.dumps(host)), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sums(state: Any) -> dict[str, str]:
  """Path -> "float32 123": type and bit sum of every array."""
  types = {
    sharding.path_of(key_path): leaf.dtype.name
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }
  sums = optim.bit_sums(state)
  return {path: f"{types[path]} {value}" for path, value in sums.items()}


class Checkpoints:
  """The checkpoints of one stage of a run.

  Args:
    directory: where the steps lie.
    keep: how many of the newest are kept.
    keep_best: how many of the best ones are kept beside them; 0: none.
    best_metric: the metric, larger is better, by which they are. A checkpoint
      at which it was not measured is none of them.
    read_only: nothing is made or cleaned up: for the run of someone else, who
      may be writing.

  Raises:
    ValueError: less than one is kept.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    keep: int,
    keep_best: int = 0,
    best_metric: str = "",
    read_only: bool = False,
  ):
    if keep < 1 or keep_best < 0 or keep_best and not best_metric:
      raise ValueError(
        "at least one checkpoint is kept, and the best ones by a metric; got"
        f" config.checkpoint.keep={keep}, keep_best={keep_best},"
        f" best_metric={best_metric!r}"
      )
    self.directory = pathlib.Path(directory).absolute()
    self._best = best_metric if keep_best else None
    policies = checkpoint_managers.preservation_policy
    kept = [policies.LatestN(n=keep)]
    if keep_best:
      kept.append(
        policies.BestN(
          get_metric_fn=self._score,
          n=keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        best_fn=self._score if keep_best else None,
        create=not read_only,
        read_only=read_only,
        # What a killed writer left.
        cleanup_tmp_directories=not read_only,
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(
          post_finalization_callback=None if read_only else self._force
        ),
      ),
    )

  def _force(self) -> None:
    """What is written, and not named yet, lies on disk afterwards."""
    if jax.process_index() == 0:  # who names it
      for folder in self.directory.glob("*.orbax-checkpoint-tmp*"):
        disk.sync_tree(folder)

  def _score(self, metrics: Mapping[str, float]) -> float:
    return metrics[self._best]

  def latest_step(self) -> int | None:
    """The newest whole checkpoint's step, or None."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """The best checkpoint's step; None where none was measured."""
    return self._manager.best_step() if self._best else None

  def check_metric(self, measured: Iterable[str]) -> None:
    """Is the metric that tells the best ever measured in this stage?

    Args:
      measured: names of all that is.

    Raises:
      ValueError: it is not, so that none would be kept as the best.
    """
    measured = sorted(measured)
    if self._best is None or self._best in measured:
      return
    near = difflib.get_close_matches(self._best, measured, n=1, cutoff=0.5)
    advice = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
      f"config.checkpoint.best_metric={self._best!r} is not measured here"
      f"{advice or '.'} Name one of {', '.join(measured)}, or set"
      " config.checkpoint.keep_best=0"
    )

  def save(
    self,
    step: int,
    state: TrainState,
    host: dict,
    metrics: Mapping[str, Any] | None = None,
  ) -> None:
    """Saves in the background; an existing checkpoint of `step` is kept.

    Args:
      step: updates done.
      state: TrainState on devices.
      host: json-able host state (data iterator, stage, counters).
      metrics: of the step; the one that tells the best is kept beside it.

    Raises:
      OSError: this one, or the one before, cannot be written.
    """
    if step in self._manager.all_steps():
      return
    score = None
    if self._best:
      found = float((metrics or {}).get(self._best, math.nan))
      if math.isfinite(found):
        score = {self._best: found}
      else:
        logging.info(
          "checkpoint %d has no %s: none of the best", step, self._best
        )
    with self._writing():
      self._manager.save(
        step,
        metrics=score,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          host=ocp.args.JsonSave(
            {
              _FORMAT_KEY: FORMAT,
              _CHECKSUM_KEY: _checksum(host),
              _ARRAYS_KEY: _sums(state),
            }
            | host
          ),
        ),
      )

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Orbax and tensorstore raise many things where a disk is full."""
    try:
      yield
    except Exception as error:
      raise OSError(
        f"a checkpoint could not be written to {self.directory}: {error}. The"
        " ones before it are whole: make room, or put it right, and give the"
        " same command again"
      ) from error

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    """What is broken on disk is said in terms of what to do."""
    try:
      yield
    except Exception as error:
      others = [n for n in self._manager.all_steps() if n != step]
      advice = (
        f"move {self.directory / str(step)} away to go on from step"
        f" {max(others)}"
        if others
        else "give another --workdir to start anew"
      )
      raise ValueError(
        f"checkpoint {step} in {self.directory} cannot be read: it is damaged,"
        " or holds other shapes or parameters than this config's model and"
        " optimizer, and does not fit; give the config it was saved under, or"
        f" another --workdir. If it is damaged, {advice} ({error})"
      ) from error

  def restore(
    self, template: TrainState, step: int | None = None
  ) -> tuple[TrainState, dict]:
    """Reads a checkpoint into the shardings of `template`.

    Args:
      template: TrainState of arrays or `jax.ShapeDtypeStruct`s with shardings.
      step: which; the newest by default.

    Returns:
      TrainState and the host state saved beside it.

    Raises:
      ValueError: there is none, or it holds other shapes (another config).
    """
    step = self.latest_step() if step is None else step
    if step is None:
      raise ValueError(
        f"no checkpoint in {self.directory}; train first or change --workdir"
      )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    with self._reading(step):
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract),
          host=ocp.args.JsonRestore(),
        ),
      )
    self._check_arrays(step, restored, restored["state"])
    return restored["state"], self._host(step, restored)

  def restore_params(
    self, template: dict, *, within: str = ""
  ) -> tuple[dict, dict]:
    """Reads the newest checkpoint's parameters, and nothing of its optimizer.

    Args:
      template: the trained parameters as `jax.ShapeDtypeStruct`s with
        shardings.
      within: part of the state that has them; "" is the state itself.

    Returns:
      Parameters, and the host state saved beside them.

    Raises:
      ValueError: there is no checkpoint, or it holds other parameters.
    """
    step = self.latest_step()
    if step is None:
      raise ValueError(f"no checkpoint in {self.directory}; train first")
    item = {"params": template}
    if within:
      item = {within: item}
    with self._reading(step):
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
          ),
          host=ocp.args.JsonRestore(),
        ),
      )
    state = restored["state"]
    params = (state[within] if within else state)["params"]

    def check(key_path, wanted, got):
      # Orbax leaves the template where a path is missing, and keeps the
      # file's shape where they differ.
      missing = isinstance(got, jax.ShapeDtypeStruct)
      if missing or (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
        found = "nothing" if missing else f"{got.dtype}{list(got.shape)}"
        raise ValueError(
          f"checkpoint {step} in {self.directory} does not fit its config:"
          f" {sharding.path_of(key_path)} must"
          f" be {wanted.dtype}{list(wanted.shape)}, got {found}"
        )

    jax.tree_util.tree_map_with_path(check, template, params)
    read = {"params": params}
    self._check_arrays(step, restored, {within: read} if within else read)
    return params, self._host(step, restored)

  def _check_arrays(self, step: int, restored: Any, state: Any) -> None:
    """Raises a ValueError where an array has other bits than were saved.

    Arrays that are read as another type are not compared; nor are those of a
    checkpoint from before there were sums.
    """
    said = restored["host"]
    saved = said.get(_ARRAYS_KEY) if isinstance(said, Mapping) else None
    if not isinstance(saved, Mapping):
      return
    for path, found in _sums(state).items():
      wanted = str(saved.get(path, found))
      same_type = wanted.partition(" ")[0] == found.partition(" ")[0]
      if same_type and wanted != found:
        raise ValueError(
          f"checkpoint {step} in {self.directory} is damaged: {path} has other"
          " numbers than were saved; move its folder away to go on from an"
          " earlier one, or give another --workdir to start anew"
        )

  def _host(self, step: int, restored: Any) -> _Host:
    said = restored["host"]
    # What is no object has nothing that is asked for, which is said then.
    return _Host(
      said if isinstance(said, Mapping) else {},
      f"checkpoint {step} in {self.directory}",
    )

  def wait(self) -> None:
    """Blocks until everything saved so far is on disk.

    Raises:
      OSError: it cannot be written.
    """
    with self._writing():
      self._manager.wait_until_finished()
      disk.sync(self.directory)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Waits, then releases the writer's threads."""
    with self._writing():
      self._manager.close()
