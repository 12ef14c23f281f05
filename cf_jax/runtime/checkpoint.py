"""Orbax checkpoints: params, optimizer, step, rng and the data iterator.

Only what is trained is in them: frozen parameters are made again from where
they came, and a fingerprint in the host state tells whether they are the same.
One folder a stage (`checkpoints/sft`, `checkpoints/rl`), one sub-folder a step.
Orbax writes to a temporary name and renames it when it is whole, so a killed
writer leaves nothing that a restore would take for a checkpoint.
"""

import pathlib

import jax
import orbax.checkpoint as ocp

from cf_jax.runtime import sharding
from cf_jax.types import TrainState


class Checkpoints:
  """The checkpoints of one stage of a run.

  Args:
    directory: where the steps lie; made if missing.
    keep: how many of the newest are kept.
  """

  def __init__(self, directory: pathlib.Path, *, keep: int):
    self.directory = pathlib.Path(directory).absolute()
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=True
      ),
    )

  def latest_step(self) -> int | None:
    """The newest whole checkpoint's step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, host: dict) -> None:
    """Saves in the background; an existing checkpoint of `step` is kept.

    Args:
      step: updates done.
      state: TrainState on devices.
      host: json-able host state (data iterator, stage, counters).
    """
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)
      ),
    )

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
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract),
          host=ocp.args.JsonRestore(),
        ),
      )
    except ValueError as error:
      raise ValueError(
        f"checkpoint {step} in {self.directory} does not fit: it holds other"
        " shapes or parameters than this config's model and optimizer; give"
        f" the config it was saved under, or another --workdir ({error})"
      ) from error
    return restored["state"], restored["host"]

  def restore_params(self, template: dict) -> tuple[dict, dict]:
    """Reads the newest checkpoint's parameters, and nothing of its optimizer.

    Args:
      template: the trained parameters as `jax.ShapeDtypeStruct`s with
        shardings.

    Returns:
      Parameters, and the host state saved beside them.

    Raises:
      ValueError: there is no checkpoint, or it holds other parameters.
    """
    step = self.latest_step()
    if step is None:
      raise ValueError(f"no checkpoint in {self.directory}; train first")
    item = {"params": template}
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
    params = restored["state"]["params"]

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
    return params, restored["host"]

  def wait(self) -> None:
    """Blocks until everything saved so far is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then releases the writer's threads."""
    self._manager.close()
