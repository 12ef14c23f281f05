"""TAD and the policy as StableHLO, for programs without this code.

What it writes is what `jax.export` reads back on a machine that has jax and
nothing of this project: `jax.export.deserialize(file).call(...)`. It is lowered
for the platforms asked for, whatever this machine has, and reads no weights:
parameters are an argument.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
from jax import export

from cf_jax import disk, tad
from cf_jax.data import patches
from cf_jax.models import config as model_config
from cf_jax.models import vlm
from cf_jax.programs import policies
from cf_jax.runtime import telemetry

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
SIGNATURE_FILE = "signature.json"


def export_tad(
  *, num_frames: int, width: int, platforms: Sequence[str], **settings
) -> export.Exported:
  """TAD of one video.

  Args:
    num_frames: T.
    width: E of an embedding.
    platforms: of `PLATFORMS`.
    **settings: of `tad.select_keyframes`.

  Returns:
    embedding float32[T, E], mask bool[T] -> dict of the fields of Keyframes.
  """

  def select(embedding, mask):
    return vars(tad.select_keyframes(embedding, mask, **settings))

  return export.export(jax.jit(select), platforms=platforms)(
    jax.ShapeDtypeStruct((num_frames, width), jnp.float32),
    jax.ShapeDtypeStruct((num_frames,), bool),
  )


def export_policy(
  model: model_config.VLMConfig,
  *,
  batch_size: int,
  num_slices: int,
  grid: tuple[int, int],
  max_tokens: int,
  platforms: Sequence[str],
) -> export.Exported:
  """The whole policy: patches and prompts to the next token's logits.

  Args:
    model: its shape. Its attention is taken to be XLA's: kernels are of one
      platform.
    batch_size: B.
    num_slices: n encoded slices of each video.
    grid: (height, width) of a slice in patches.
    max_tokens: S.
    platforms: of `PLATFORMS`.

  Returns:
    params, patches float32[B, n, 4P, patch], token int32[B, S], position
    int32[B, 3, S], mask bool[B, S], visual_index int32[B, S] -> logits
    float32[B, V] of what follows the last real slot.
  """
  if model.attention not in ("auto", "xla"):
    raise ValueError(
      f"attention {model.attention!r} is a kernel of one platform, and this"
      " is for several; set config.model.attention to 'auto' or 'xla'"
    )

  def next_token(params, pixel, token, position, mask, visual_index):
    visual = vlm.encode_vision(
      model, params, pixel.reshape(-1, *pixel.shape[2:]), grid
    )
    visual = visual.reshape(len(token), -1, visual.shape[-1])
    embedded = vlm.embed(model, params, token, visual_index, visual)
    hidden, _ = vlm.prefill(model, params, embedded, position, mask)
    last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return vlm.logits(model, params, hidden)[:, 0]

  params = jax.eval_shape(functools.partial(vlm.init, model), jax.random.key(0))
  rows, slots = batch_size, max_tokens
  return export.export(jax.jit(next_token), platforms=platforms)(
    params,
    jax.ShapeDtypeStruct(
      (rows, num_slices, grid[0] * grid[1], model.vision.patch_dim),
      jnp.float32,
    ),
    *(
      jax.ShapeDtypeStruct(shape, dtype)
      for shape, dtype in (
        ((rows, slots), jnp.int32),
        ((rows, 3, slots), jnp.int32),
        ((rows, slots), bool),
        ((rows, slots), jnp.int32),
      )
    ),
  )


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes `tad.stablehlo`, `policy.stablehlo` and what they are called with.

  Raises:
    ValueError: an unknown platform, or a policy that cannot be read.
  """
  wrong = sorted(set(config.platforms) - set(PLATFORMS))
  if wrong or not config.platforms:
    raise ValueError(
      f"config.platforms must be some of {PLATFORMS}, got"
      f" {tuple(config.platforms)}"
    )
  platforms = tuple(config.platforms)
  model = policies.describe(config.checkpoint, config.init_from)[0]
  model = dataclasses.replace(model, attention="xla")
  grid = patches.grid_of(
    *config.policy.size_px,
    patch=model.vision.patch_size,
    merge=model.vision.spatial_merge_size,
  )
  made = {
    "tad": export_tad(
      num_frames=config.frames.num_frames,
      width=config.frames.width,
      platforms=platforms,
      **config.tad,
    ),
    "policy": export_policy(
      model,
      batch_size=config.policy.batch_size,
      num_slices=config.policy.num_slices,
      grid=tuple(grid),
      max_tokens=config.policy.max_tokens,
      platforms=platforms,
    ),
  }
  workdir.mkdir(parents=True, exist_ok=True)
  signature = {}
  for name, exported in made.items():
    content = bytes(exported.serialize())
    disk.write(workdir / f"{name}.stablehlo", content)
    signature[name] = {
      "platforms": exported.platforms,
      "arguments": [str(aval) for aval in exported.in_avals],
      "results": [str(aval) for aval in exported.out_avals],
      "bytes": len(content),
    }
  telemetry.write_json(workdir / SIGNATURE_FILE, signature)
  telemetry.startup_table(
    "exported",
    {
      name: f"{workdir / name}.stablehlo, {found['bytes'] / 1e6:.1f} MB, for"
      f" {', '.join(found['platforms'])}"
      for name, found in signature.items()
    },
  )
