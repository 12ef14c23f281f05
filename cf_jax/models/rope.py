"""Rotary position embedding: two axes for patches, three for the decoder.

A head of width H rotates H / 2 pairs, channel i with channel i + H / 2, by the
angle `position * theta ** (-2 i / H)`. Angles are float32 whatever the model
runs in: bfloat16 rounds the position 257 to 256.

Axes: `B` videos, `P` visual tokens per frame (4P patches), `S` sequence slots,
`N` heads, `H` head width.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cf_jax.models.config import VLMConfig


def _frequencies(width: int, theta: float) -> np.ndarray:
  """float32[width / 2], from 1 down to about 1 / theta."""
  exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  return np.float32(1) / np.float32(theta) ** exponent


def patch_positions(grid: tuple[int, int], merge: int) -> np.ndarray:
  """int32[4P, 2] row and column of every patch, in merge-block order.

  The processor lists the patches of a merged square together: squares row by
  row, and row by row within a square.
  """
  height, width = grid
  row, column = np.meshgrid(
    np.arange(height, dtype=np.int32),
    np.arange(width, dtype=np.int32),
    indexing="ij",
  )
  position = np.stack([row, column], axis=-1)
  position = position.reshape(
    height // merge, merge, width // merge, merge, 2
  ).transpose(0, 2, 1, 3, 4)
  return position.reshape(-1, 2)


def vision_angles(
  grid: tuple[int, int], *, merge: int, head_dim: int, theta: float
) -> np.ndarray:
  """Rotary angles of the patches of one slice.

  The first half of the angles follows the row, the second the column.

  Args:
    grid: (height, width) of the slice in patches.
    merge: side of a merged square, in patches.
    head_dim: H.
    theta: base of the frequencies.

  Returns:
    float32[4P, H / 2] in merge-block order, a compile-time constant.
  """
  position = patch_positions(grid, merge).astype(np.float32)
  frequency = _frequencies(head_dim // 2, theta)
  angle = position[:, :, None] * frequency  # [4P, 2, H / 4]
  return angle.reshape(len(position), -1)


def mrope(
  position: jax.Array, *, section: tuple[int, int, int], theta: float
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of multimodal RoPE (Qwen2-VL, arXiv 2409.12191, 2.1).

  Frequency i follows the time position for i < section[0], the height position
  for the next section[1], the width position for the last section[2].

  Args:
    position: int32[B, 3, S] time, height and width positions.
    section: how many of the H / 2 frequencies follow each axis.
    theta: base of the frequencies.

  Returns:
    cos, sin: float32[B, S, H / 2].
  """
  axis = np.repeat(np.arange(3), section)
  frequency = _frequencies(2 * len(axis), theta)
  chosen = position[:, axis].astype(jnp.float32)  # [B, H / 2, S]
  angle = jnp.swapaxes(chosen, 1, 2) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates queries or keys, in float32.

  Args:
    x: float[..., S, N, H].
    cos: float32[..., S, H / 2].
    sin: float32[..., S, H / 2].

  Returns:
    float[..., S, N, H] in x's dtype.
  """
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[..., None, :], sin[..., None, :]
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)


def rope_index(
  config: VLMConfig,
  input_ids: np.ndarray,
  attention_mask: np.ndarray | None = None,
  image_grid_thw: np.ndarray | None = None,
  video_grid_thw: np.ndarray | None = None,
  second_per_grid_ts: Sequence[float] | None = None,
) -> np.ndarray:
  """M-RoPE positions of a processor's batch, as Qwen2.5-VL was trained.

  Text moves all three axes together. Media start at p = 1 + the maximum of the
  positions so far over all axes, and so does the text after them; slice k of a
  video has

    time = p + floor(k * second_per_grid_t * tokens_per_second)
    height = p + row,  width = p + column,

  and the slices of an image all have time p. The product is float32, as it was
  in training: at 2 steps a second, slice 45 of 0.7 s each has 63, where float64
  would stay just below.

  Equal to `get_rope_index` of transformers 4.49 to 4.51, whose rule is that of
  Qwen's own fine-tuning code. From 4.52 on, 5.2.0 included, transformers cuts
  `second_per_grid_t` to whole seconds first (huggingface/transformers#48669),
  so that all slices of a video at more than 2 frames a second share one time;
  whole seconds give the same positions in all of these versions. Later versions
  are reported to let text continue at p + max(height, width) / merge after a
  video, whatever its time span.

  Args:
    config: the model; its token ids say where media are.
    input_ids: int[B, S], each medium's id repeated for its visual tokens.
    attention_mask: [B, S], nonzero for real slots, wherever the padding is;
      None: all are real.
    image_grid_thw: int[images, 3] slices, height and width in patches, in the
      order of the batch.
    video_grid_thw: int[videos, 3].
    second_per_grid_ts: float[videos] seconds between slices; None: 1.

  Returns:
    int32[B, 3, S], 0 in padded slots. (transformers has [3, B, S].)

  Raises:
    ValueError: the media ids in the text do not match the grids.
  """
  input_ids = np.asarray(input_ids)
  mask = _real_slots(input_ids, attention_mask)
  merge = config.vision.spatial_merge_size
  media = {}  # token id -> its grids and seconds per slice, in order
  for name, token_id, grids in (
    ("image", config.image_token_id, image_grid_thw),
    ("video", config.video_token_id, video_grid_thw),
  ):
    grids = grid_list(name, grids, merge)
    if grids and token_id is None:
      raise ValueError(
        f"{name}_grid_thw has {len(grids)} grids, but the model has no"
        f" {name}_token_id; set config.model.{name}_token_id"
      )
    seconds = np.zeros(len(grids))
    if name == "video":
      seconds = _seconds(second_per_grid_ts, len(grids))
    if token_id is not None:
      media[token_id] = name, list(zip(grids, seconds, strict=True))

  position = np.zeros((len(input_ids), 3, input_ids.shape[1]), np.int32)
  used = dict.fromkeys(media, 0)
  for row, real in enumerate(mask):
    token = input_ids[row, real]
    starts = np.flatnonzero(np.isin(token, list(media)))
    line = np.zeros((3, len(token)), np.int64)
    done = following = 0
    while done < len(token):
      left = starts[np.searchsorted(starts, done) :]
      begin = left[0] if len(left) else len(token)
      line[:, done:begin] = following + np.arange(begin - done)
      following += begin - done
      done = begin
      if begin == len(token):
        break
      token_id = int(token[begin])
      name, grids = media[token_id]
      if used[token_id] == len(grids):
        raise ValueError(
          f"row {row} of input_ids has a {name} after the {len(grids)} of"
          f" {name}_grid_thw; expected a grid for every {name}"
        )
      (slices, height, width), second_per_slice = grids[used[token_id]]
      used[token_id] += 1
      shape = (slices, height // merge, width // merge)
      done = begin + int(np.prod(shape))
      if done > len(token) or np.any(token[begin:done] != token_id):
        got = np.argmin(np.append(token[begin:done] == token_id, False))
        raise ValueError(
          f"row {row} of input_ids repeats the {name} id {got} times, expected"
          f" {np.prod(shape)} for the grid {(slices, height, width)} of"
          f" {name}_grid_thw"
        )
      # float32 step by step, as in training.
      time, down, across = np.indices(shape).reshape(3, -1)
      elapsed = time.astype(np.float32) * np.float32(second_per_slice)
      elapsed = elapsed * np.float32(config.vision.tokens_per_second)
      line[:, begin:done] = following + np.stack(
        [elapsed.astype(np.int64), down, across]
      )
      following = int(line[:, begin:done].max()) + 1
    position[row][:, real] = line
  for token_id, (name, grids) in media.items():
    if used[token_id] != len(grids):
      raise ValueError(
        f"input_ids has {used[token_id]} {name}s, {name}_grid_thw has"
        f" {len(grids)}; expected the text and the grids of one batch"
      )
  return position


def _real_slots(input_ids, attention_mask):
  """bool[B, S]."""
  if input_ids.ndim != 2:
    raise ValueError(f"input_ids must be [B, S], got shape {input_ids.shape}")
  if attention_mask is None:
    return np.ones(input_ids.shape, bool)
  mask = np.asarray(attention_mask) != 0
  if mask.shape != input_ids.shape:
    raise ValueError(
      f"attention_mask must be {input_ids.shape} as input_ids, got {mask.shape}"
    )
  return mask


def grid_list(
  name: str, grid_thw: np.ndarray | None, merge: int
) -> list[tuple[int, int, int]]:
  """The (slices, height, width) of media, checked.

  Raises:
    ValueError: not [media, 3], or sides that do not merge into visual tokens.
  """
  if grid_thw is None:
    return []
  grids = np.asarray(grid_thw)
  if grids.ndim != 2 or grids.shape[1] != 3:
    raise ValueError(
      f"{name}_grid_thw must be [{name}s, 3], got shape {grids.shape}"
    )
  if np.any(grids < 1) or np.any(grids[:, 1:] % merge):
    raise ValueError(
      f"{name}_grid_thw must hold (slices, height, width) with sides that are"
      f" multiples of {merge} patches, got {grids.tolist()}"
    )
  return [tuple(grid) for grid in grids.tolist()]


def _seconds(second_per_grid_ts, count):
  """float[videos]."""
  if second_per_grid_ts is None:
    return np.ones(count)
  seconds = np.asarray(second_per_grid_ts, np.float64)
  if seconds.shape != (count,) or not np.all(
    np.isfinite(seconds) & (seconds >= 0)
  ):
    raise ValueError(
      f"second_per_grid_ts must be {count} finite seconds, one for every video"
      f" of video_grid_thw, got {seconds.tolist()}"
    )
  return seconds
