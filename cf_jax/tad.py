"""Temporal Apex Distillation: which frames of one video are worth seeing.

Axes: `B` videos, `T` scanned frames, `K` keyframes, `P` visual tokens per
frame, `E` frame-embedding width. A mask is bool and True means real; masked
frames do not exist: the answer is that of the real frames alone, in order.

Three stages, after the outline in the abstract of ChronoForge-RL (arXiv
2509.15800); the formulas are this project's own:

1. `variation_scores`: how different the frames after `t` are from those before;
2. `detect_inflections`: the apexes of that curve, the video's turning points;
3. `distill_keyframes`: the best apexes cut the video into segments, and each
   segment shows its calmest frame.

`select_keyframes` is the three in a row for ONE video, `select_videos` its
jitted vmap. A boundary belongs to the frame after it: `variation[t]` and
`apex[t]` speak of the step from frame `t - 1` to frame `t`, so a segment starts
at its apex and `variation` of the first frame is 0.

Everything is computed in float32, in float64 for float64 input.
"""

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from cf_jax import masked, windows
from cf_jax.types import Keyframes

Array = jax.Array

MAD_TO_STD = 1.4826  # the standard deviation of a normal with this MAD


def _widen(value: Array) -> Array:
  value = jnp.asarray(value)  # numpy cannot be indexed inside jit
  return value.astype(jnp.promote_types(value.dtype, jnp.float32))


# Frames that do not exist -----------------------------------------------------


def _as_mask(mask: Array | None, shape: tuple[int, ...]) -> Array | None:
  """A bool array of that shape; None stays None."""
  if mask is None:
    return None
  mask = jnp.asarray(mask, bool)
  if mask.shape != shape:
    raise ValueError(
      f"mask has shape {mask.shape}, expected {shape}, an entry for every frame"
    )
  return mask


def _real_first(mask: Array) -> Array:
  """int32[T] frame numbers, the real ones first and in order."""
  num_frames = mask.shape[0]
  position = jnp.flatnonzero(mask, size=num_frames, fill_value=num_frames - 1)
  return position.astype(jnp.int32)


def _gather(value: Array, mask: Array | None) -> Array:
  """Moves the real rows to the front and fills the rest with zeros."""
  if mask is None:
    return value
  real = jnp.arange(value.shape[0]) < jnp.sum(mask)
  real = real.reshape((-1,) + (1,) * (value.ndim - 1))
  return jnp.where(real, value[_real_first(mask)], jnp.zeros((), value.dtype))


def _spread(value: Array, mask: Array | None) -> Array:
  """Undoes `_gather` along the last axis; masked entries are 0 or False."""
  if mask is None:
    return value
  rank = jnp.maximum(jnp.cumsum(mask) - 1, 0)
  return jnp.where(mask, value[..., rank], jnp.zeros((), value.dtype))


def _count(num_frames: int, mask: Array | None) -> Array:
  if mask is None:
    return jnp.asarray(num_frames, jnp.int32)
  return jnp.sum(mask).astype(jnp.int32)


def check_frames(embedding: Array, mask: Array | None) -> None:
  """Checks the frames of one or more videos.

  Args:
    embedding: float[..., T, E].
    mask: bool[..., T] or None.

  Raises:
    ValueError: there is no frame, or NaN or inf in a real one; inside jit the
      latter can only wait.
  """
  if not embedding.shape[-2]:
    raise ValueError(
      f"embedding has shape {embedding.shape}, expected at least one frame"
    )
  if any(isinstance(x, jax.core.Tracer) for x in (embedding, mask)):
    return
  with jax.ensure_compile_time_eval():  # a constant of someone else's jit
    mask = _as_mask(mask, embedding.shape[:-1])
    bad = ~jnp.all(jnp.isfinite(embedding), axis=-1)
    bad = bad if mask is None else bad & mask
    number = int(jnp.sum(bad))
  if number:
    raise ValueError(
      f"embedding has NaN or inf in {number} of {bad.size} frames;"
      " expected finite numbers in every real frame. Drop these frames with"
      " mask=False."
    )


def _check_bonus(
  bonus: Array | None, mask: Array | None, shape: tuple[int, ...]
) -> None:
  """Raises on another shape, and on NaN as `check_frames` does."""
  if bonus is None:
    return
  if jnp.shape(bonus) != shape:
    raise ValueError(
      f"bonus has shape {jnp.shape(bonus)}, expected {shape}, a number for"
      " every frame"
    )
  if any(isinstance(x, jax.core.Tracer) for x in (bonus, mask)):
    return
  with jax.ensure_compile_time_eval():
    bad = jnp.isnan(jnp.asarray(bonus))
    bad = bad if mask is None else bad & _as_mask(mask, shape)
    number = int(jnp.sum(bad))
  if number:
    raise ValueError(
      f"bonus is NaN in {number} of {bad.size} frames, expected a number"
    )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  if value not in choices:
    raise ValueError(
      f"{name}={value!r}, expected one of {', '.join(map(repr, choices))}"
    )


def _check_scales(scales: Sequence[int]) -> tuple[int, ...]:
  found = tuple(scales) if isinstance(scales, Iterable) else ()
  whole = all(isinstance(scale, numbers.Integral) for scale in found)
  if not found or not whole or min(found) < 1:
    raise ValueError(
      f"scales={scales}, expected window lengths, whole numbers of at least 1"
    )
  return found


def check_count(name: str, value: int) -> None:
  """Raises ValueError where value is no whole number of at least 1."""
  if not isinstance(value, numbers.Integral) or value < 1:
    raise ValueError(f"{name}={value}, expected a whole number, at least 1")


def _check_smoothing(smoothing: float) -> None:
  if not smoothing >= 0:  # NaN too
    raise ValueError(f"smoothing={smoothing}, expected 0 or more frames")


def _check_numbers(
  *, gate: float = 0.0, softness: float = 1.0, temperature: float = 1.0, **_
) -> None:
  """Raises on settings that mean nothing; traced ones are taken as they are."""
  for name, value in (("softness", softness), ("temperature", temperature)):
    if isinstance(value, numbers.Real) and not value > 0:
      raise ValueError(f"{name}={value}, expected a number above 0")
  if isinstance(gate, numbers.Real) and not math.isfinite(gate):
    raise ValueError(f"gate={gate}, expected a finite number")


# Stage 1: variation scoring ---------------------------------------------------


def _shift(value: Array, steps: int) -> Array:
  """Row t of the result is row `t + steps`, zero where there is none."""
  size = value.shape[0]
  steps = max(-size, min(size, steps))
  pad = [(max(-steps, 0), max(steps, 0))] + [(0, 0)] * (value.ndim - 1)
  start = max(steps, 0)
  return jax.lax.slice_in_dim(jnp.pad(value, pad), start, start + size)


def temporal_median(embedding: Array, mask: Array | None = None) -> Array:
  """Median over each frame and its two neighbours; the end frames stay.

  It removes what lasts one frame and moves no cut.

  Args:
    embedding: float[T, E].
    mask: bool[T] real frames; None means all.

  Returns:
    float[T, E], 0 in masked frames.
  """
  chex.assert_rank(embedding, 2)
  mask = _as_mask(mask, embedding.shape[:1])
  feature = _gather(_widen(embedding), mask)
  count = _count(embedding.shape[0], mask)
  return _spread(windows.median_of_three(feature, count).T, mask).T


def _over_norms(dot: Array, left: Array, right: Array) -> Array:
  """dot / sqrt(left right); 0, with zero gradient, beside a zero vector.

  The roots one by one: the product of two squared norms leaves float32 for
  embeddings of 1e-11 or 1e9.
  """
  empty = (left == 0) | (right == 0)  # not > 0, which would hide a NaN
  cosine = dot / jnp.sqrt(jnp.where(empty, 1, left))
  return jnp.where(empty, 0, cosine / jnp.sqrt(jnp.where(empty, 1, right)))


def _distance(dot: Array, before: Array, after: Array, metric: str) -> Array:
  """Distance of two vectors from their dot product and squared norms."""
  if metric == "cosine":
    empty = (before == 0) | (after == 0)
    away = 1 - _over_norms(dot, before, after)
    return jnp.where(empty, 0, jnp.maximum(away, 0))
  total = before + after
  square = (total - 2 * dot) / jnp.where(total == 0, 1, total)
  equal = square <= 0
  return jnp.where(equal, 0, jnp.sqrt(jnp.where(equal, 1, square)))


def _variation(
  feature: Array,
  count: Array,
  *,
  metric: str,
  scales: tuple[int, ...],
  median: bool,
  smoothing: float,
) -> Array:
  """`variation_scores` of the first `count` frames; the other rows are 0."""
  time = jnp.arange(feature.shape[0])
  # Rows from `count` on are zero: windows that stick out end at the video's.
  squares, dots = windows.window_dots(
    feature, count, scales=scales, median=median
  )
  lead = max(scales)
  total = 0
  for scale, square, dot in zip(scales, squares, dots):
    dot = dot[lead:]
    before = square[lead - scale : square.shape[0] - scale]
    after = square[lead:]
    if metric == "l2":  # the cosine of sums is that of means
      width = jnp.clip(time, 1, scale).astype(dot.dtype)
      ahead = jnp.clip(count - time, 1, scale).astype(dot.dtype)
      dot = dot / (width * ahead)
      before = before / width**2
      after = after / ahead**2
    total += _distance(dot, before, after, metric)
  inside = (time > 0) & (time < count)
  score = jnp.where(inside, total / len(scales), 0)
  if smoothing:
    score = _smooth(score, inside, smoothing)
  # One broken frame breaks the statistics of its video: say so everywhere.
  broken = jnp.any(jnp.isnan(score))
  return jnp.where(inside & broken, jnp.nan, score)


def _smooth(value: Array, inside: Array, width: float) -> Array:
  """Gaussian average over the real entries."""
  radius = max(1, round(3 * width))
  tap = jnp.arange(-radius, radius + 1)
  kernel = jnp.exp(-0.5 * (tap / width) ** 2).astype(value.dtype)

  def blur(entry):
    return jnp.convolve(jnp.pad(entry, radius), kernel, mode="valid")

  weight = blur(inside.astype(value.dtype))
  return jnp.where(inside, blur(value) / jnp.where(inside, weight, 1), 0)


def variation_scores(
  embedding: Array,
  mask: Array | None = None,
  *,
  metric: Literal["cosine", "l2"] = "cosine",
  scales: Sequence[int] = (2, 4),
  median: bool = True,
  smoothing: float = 0.0,
) -> Array:
  """How different the frames from `t` on are from those before `t`.

  `v_t = mean over s of d(mean f[t : t+s], mean f[t-s : t])`, after a temporal
  median of three that removes one-frame flicker without moving a cut. Windows
  are cut off at the ends of the video. `scales=(1,), median=False` is the
  plain distance of neighbours, `1 - cos(f_t, f_{t-1})`.

  Args:
    embedding: float[T, E] one embedding per scanned frame.
    mask: bool[T] real frames; None means all.
    metric: "cosine", `1 - cos(a, b)`, or "l2", `|a - b| / sqrt(|a|^2 + |b|^2)`,
      which sees a change of length too. Neither changes with the scale of f
      (in float32, for embeddings of 1e-15 to 1e15).
    scales: window lengths in frames.
    median: take the temporal median first.
    smoothing: standard deviation in frames of a Gaussian over v, 0 for none.
      It ranks flicker above cuts where the median is off.

  Returns:
    float[T] variation; 0 for the first real frame and for masked frames.

  Raises:
    ValueError: a setting out of range, or (outside jit) a frame with NaN.
  """
  chex.assert_rank(embedding, 2)
  _check_choice("metric", metric, ("cosine", "l2"))
  scales = _check_scales(scales)
  _check_smoothing(smoothing)
  check_frames(embedding, mask)
  mask = _as_mask(mask, embedding.shape[:1])
  feature = _gather(_widen(embedding), mask)
  count = _count(embedding.shape[0], mask)
  score = _variation(
    feature,
    count,
    metric=metric,
    scales=scales,
    median=median,
    smoothing=smoothing,
  )
  return _spread(score, mask)


def score_chunks(
  chunks: Iterable[Array],
  *,
  scales: Sequence[int] = (2, 4),
  smoothing: float = 0.0,
  **settings,
) -> Array:
  """`variation_scores` of a video that comes in pieces, as a whole would score.

  Only a chunk and `2 max(scales) + 2` frames before it are held at a time.
  Chunks of one size share one compiled program.

  Args:
    chunks: float[n, E], n of any size, in order of time.
    scales: see `variation_scores`.
    smoothing: see `variation_scores`; done on the whole curve.
    **settings: the other settings of `variation_scores`.

  Returns:
    float[T] of all frames.
  """
  scales = _check_scales(scales)
  _check_smoothing(smoothing)
  reach = max(scales) + 1  # frames on either side that a score depends on
  held, done, scores = None, 0, []
  settings["scales"] = scales
  for chunk in chunks:
    held = chunk if held is None else jnp.concatenate([held, chunk])
    stop = held.shape[0] - reach
    if stop > done:
      scores.append(score_videos(held[None], **settings)[0, done:stop])
      drop = max(0, stop - reach)
      held, done = held[drop:], stop - drop
  if held is None:
    raise ValueError("no chunk came, expected at least one with a frame")
  scores.append(score_videos(held[None], **settings)[0, done:])
  score = jnp.concatenate(scores)
  if smoothing:
    score = _smooth(score, jnp.arange(score.shape[0]) > 0, smoothing)
  return score


# Stage 2: inflection detection ------------------------------------------------


def _masked_median(value: Array, inside: Array) -> Array:
  """Median of the entries that are inside; 0 where there are none."""
  count = jnp.sum(inside)
  ordered = jnp.sort(jnp.where(inside, value, jnp.inf))
  low = ordered[jnp.maximum((count - 1) // 2, 0)]
  high = ordered[jnp.minimum(count // 2, value.shape[0] - 1)]
  return jnp.where(count > 0, (low + high) / 2, 0)


def _peaks(value: Array, inside: Array) -> Array:
  """Rises then falls; a plateau counts once, at its centre."""
  size = value.shape[0]
  time = jnp.arange(size)
  step = (value != jnp.roll(value, 1)) | ~inside | ~jnp.roll(inside, 1)
  starts = step.at[0].set(True)
  ends = jnp.roll(starts, -1).at[-1].set(True)
  first = jax.lax.cummax(jnp.where(starts, time, 0))
  last = jax.lax.cummin(jnp.where(ends, time, size - 1), reverse=True)
  before = jnp.maximum(first - 1, 0)
  after = jnp.minimum(last + 1, size - 1)
  rises = inside[before] & (before < first) & (value > value[before])
  falls = inside[after] & (after > last) & (value > value[after])
  return inside & rises & falls & (time == (first + last) // 2)


def _keep_apart(peak: Array, value: Array, min_gap: int) -> Array:
  """Drops every peak that is nearer than min_gap to a higher one.

  Highest first, earlier first among equals. Each round settles all peaks that
  are the highest in their neighbourhood at once, so a few rounds do.
  """
  if min_gap <= 1:
    return peak
  reach = max(1, min(min_gap, value.shape[0]) - 1)

  def highest(level, before, after):  # among so many places on either side
    window = (before + after + 1,)
    return jax.lax.reduce_window(
      level, -jnp.inf, jax.lax.max, window, (1,), ((before, after),)
    )

  def settle(state):
    alive, kept = state
    level = jnp.where(alive, value, -jnp.inf)
    earlier = _shift(highest(level, reach - 1, 0), -1)
    earlier = earlier.at[0].set(-jnp.inf)
    winner = alive & (level > earlier) & (level >= highest(level, 0, reach))
    near = highest(winner.astype(value.dtype), reach, reach) > 0
    return alive & ~near, kept | winner

  start = (peak, jnp.zeros_like(peak))
  return jax.lax.while_loop(lambda state: jnp.any(state[0]), settle, start)[1]


_VALLEY = 32  # places on either side in which a peak's valley is looked for


def _keep_prominent(peak: Array, value: Array, prominence: float) -> Array:
  """Drops the peaks on the shoulder of a higher one.

  Such a peak has a higher place within reach, and on the way there the curve
  does not fall to `1 - prominence` of the peak.
  """
  low = (1 - prominence) * value

  def walk(state):
    step, before, after, left, right, shoulder = state
    before, after = _shift(before, -1), _shift(after, 1)
    left, right = left & (before > low), right & (after > low)
    shoulder |= (left & (before > value)) | (right & (after > value))
    return step + 1, before, after, left, right, shoulder

  def undecided(state):
    step, _, _, left, right, shoulder = state
    return (step < _VALLEY) & jnp.any((left | right) & ~shoulder)

  start = (0, value, value, peak, peak, jnp.zeros_like(peak))
  return peak & ~jax.lax.while_loop(undecided, walk, start)[-1]


def _stand_alone(
  value: Array, inside: Array, contrast: float, reach: int
) -> Array:
  """Places `contrast` times as high as the mean of those within reach."""
  size = value.shape[0]
  reach = min(reach, size)
  if not reach:
    return value >= 0

  def beside(entry):
    total = windows.window_sums(jnp.pad(entry, reach), reach)
    return total[:size] + total[reach + 1 :]

  around = beside(jnp.where(inside, value, 0))
  number = beside(inside.astype(value.dtype))
  return value * jnp.maximum(number, 1) >= contrast * around


def _inflections(
  value: Array,
  count: Array,
  *,
  gate: float,
  prominence: float,
  contrast: float,
  min_gap: int,
  strength: str,
  softness: float,
  flat: float,
) -> tuple[Array, Array]:
  """`detect_inflections` of the first `count` entries."""
  time = jnp.arange(value.shape[0])
  inside = (time > 0) & (time < count)
  middle = _masked_median(value, inside)
  deviation = _masked_median(jnp.abs(value - middle), inside)
  top = jnp.max(jnp.where(inside, value, 0))
  low = jnp.min(jnp.where(inside, value, jnp.inf))
  # 1e-12: smaller curves are rounding, and its square still has a reciprocal.
  unit = jnp.maximum(jnp.maximum(deviation, 1e-3 * top), 1e-12)

  fixed = jax.lax.stop_gradient(value)
  apex = _peaks(fixed, inside)
  apex &= fixed > middle + gate * MAD_TO_STD * unit
  apex &= fixed - low >= flat
  apex &= _stand_alone(fixed, inside, contrast, min_gap - 1)
  apex = _keep_prominent(apex, fixed, prominence)
  apex = _keep_apart(apex, fixed, min_gap)

  before, after = _shift(value, -1), _shift(value, 1)
  bend = jax.nn.relu(2 * value - before - after)
  bend = jnp.where((time > 1) & (time < count - 1), bend, 0)
  if strength == "hard":
    return apex, jnp.where(apex, bend, 0)
  rise = jax.nn.sigmoid((value - before) / (softness * unit))
  fall = jax.nn.sigmoid((value - after) / (softness * unit))
  return apex, rise * fall * bend


def detect_inflections(
  variation: Array,
  mask: Array | None = None,
  *,
  gate: float = 4.0,
  prominence: float = 0.7,
  contrast: float = 0.0,
  min_gap: int = 3,
  strength: Literal["soft", "hard"] = "soft",
  softness: float = 1.0,
  flat: float = 1e-4,
) -> tuple[Array, Array]:
  """Finds the apexes of the variation curve.

  An apex rises above both neighbours (a plateau counts once, at its centre),
  exceeds `median + gate * 1.4826 * unit`, has no higher apex nearer than
  `min_gap`, and is prominent: between it and the nearest higher place within 32
  frames, on either side, v falls to `1 - prominence` of the apex or lower. A
  dissolve is one hill with several tops, and has one apex. With a contrast it
  is a step as well, `contrast` times the mean of v in the min_gap - 1 frames
  before and after it: hard cuts only. The strength, for ranking and gradients,
  is

      a_t = sigmoid((v_t - v_{t-1}) / tau) * sigmoid((v_t - v_{t+1}) / tau)
            * relu(2 v_t - v_{t-1} - v_{t+1}),   tau = softness * unit,

  `unit = max(MAD, 1e-3 max v)`: a rescaled curve has the same apexes. As
  softness goes to 0 this is the hard detector times the curvature, ties aside.
  The first and the last step of a video have one neighbour and are no apex.

  Args:
    variation: float[T] of `variation_scores`.
    mask: bool[T] real frames; None means all.
    gate: height above the median in robust standard deviations.
    prominence: 0 to 1, the share of its height that an apex stands out of a
      higher one's slope; 0 for any.
    contrast: of an apex with the frames beside it; 0 for any. Hard cuts, as a
      shot detector finds them, are `scales=(1,), flat=0.005, contrast=8`.
    min_gap: least distance of two apexes in frames.
    strength: "soft" as above, or "hard": the curvature at apexes, else 0.
    softness: tau in units of the curve's own spread.
    flat: least height of an apex above the lowest place. The default is what
      rounding makes of a constant curve.

  Returns:
    apex bool[T] and strength float[T], False and 0 where masked.

  Raises:
    ValueError: a setting out of range.
  """
  chex.assert_rank(variation, 1)
  _check_choice("strength", strength, ("soft", "hard"))
  check_count("min_gap", min_gap)
  _check_numbers(gate=gate, softness=softness)
  mask = _as_mask(mask, variation.shape)
  value = _gather(_widen(variation), mask)
  count = _count(variation.shape[0], mask)
  apex, bend = _inflections(
    value,
    count,
    gate=gate,
    prominence=prominence,
    contrast=contrast,
    min_gap=min_gap,
    strength=strength,
    softness=softness,
    flat=flat,
  )
  return _spread(apex, mask), _spread(bend, mask)


# Stage 3: prioritized distillation --------------------------------------------


def _standardize(value: Array, inside: Array) -> Array:
  mean = masked.masked_mean(value, inside)
  std = masked.masked_std(value, inside, ddof=0)
  return jnp.where(inside, (value - mean) / jnp.maximum(std, 1e-3), 0)


def _uniform(count: Array, num_keyframes: int) -> Array:
  """floor((k + 0.5) n / K') of n frames, K' = min(n, K); rest arbitrary."""
  slot = jnp.arange(num_keyframes)
  share = jnp.clip(count, 1, num_keyframes)
  whole, rest = count // share, count % share
  # (2k + 1) n // 2K' without the product, which overflows in long videos.
  return slot * whole + (whole * share + (2 * slot + 1) * rest) // (2 * share)


def uniform_index(mask: Array, num_keyframes: int) -> Array:
  """Evenly spaced real frames, `floor((k + 0.5) n / K)` of the n real ones.

  Args:
    mask: bool[T] real frames.
    num_keyframes: K.

  Returns:
    int32[K] frame numbers, ascending and distinct. With n < K all n real frames
    come first and the other slots hold T.
  """
  chex.assert_rank(mask, 1)
  check_count("num_keyframes", num_keyframes)
  mask = _as_mask(mask, mask.shape)
  count = _count(mask.shape[0], mask)
  index = _uniform(count, num_keyframes)
  valid = jnp.arange(num_keyframes) < count
  return _frame_number(index, valid, mask, mask.shape[0])


def _frame_number(
  index: Array, valid: Array, mask: Array | None, num_frames: int
) -> Array:
  """Positions among the real frames to frame numbers, T where not valid."""
  index = jnp.clip(index, 0, num_frames - 1)
  if mask is not None:
    index = _real_first(mask)[index]
  return jnp.where(valid, index, num_frames).astype(jnp.int32)


def _cut(
  score: Array, apex: Array, count: Array, num_segments: int
) -> tuple[Array, Array]:
  """Starts and ends of the segments between the best num_segments - 1 apexes.

  int32[num_segments] each; empty segments come last, with start = end = count.
  """
  size = score.shape[0]
  spare = num_segments - 1
  rank = jnp.where(apex, -score, jnp.inf)
  # Sorted whole: XLA does not split top_k over the videos of a batch.
  time = jnp.arange(size, dtype=jnp.int32)
  best, place = jax.lax.sort((rank, time), num_keys=1)
  place = jnp.where(best < jnp.inf, place, count)[:spare]
  place = jnp.pad(place, (0, spare - place.shape[0]), constant_values=size)
  place = jnp.sort(jnp.minimum(place, count))
  start = jnp.append(jnp.zeros(1, jnp.int32), place)
  return start, jnp.append(place, count)


def _keep_novel(
  start: Array,
  end: Array,
  count: Array,
  score: Array,
  steady: Array,
  num_keyframes: int,
) -> tuple[Array, Array]:
  """K of M segments, the longest first, then always the one of most merit:

      (0.2 + p) * min(1, length / (n / 2K))^(1/4) * (0.02 + distance)

  p is the lower priority of the two apexes around the segment, the highest of
  all being 1, as an end of the video is: a part of one shot does not become a
  scene. Of n frames, half an even share is long enough; what lies between two
  apexes of one transition is not. Distance is the least cosine distance of the
  segment's middle frame from those kept so far, at most 1: a scene that comes
  back waits for those not seen yet, and is still better than a shred.
  """
  size = steady.shape[0]
  length = end - start
  picture = steady[jnp.clip((start + end - 1) // 2, 0, size - 1)]
  norm = jnp.sqrt(jnp.sum(picture * picture, axis=1, keepdims=True))
  picture = picture / jnp.where(norm > 0, norm, 1)
  apart = 1 - _dot(picture, picture.T)

  inner = (start > 0) & (start < count)
  opening = jnp.maximum(score[jnp.minimum(start, size - 1)], 0)
  top = jnp.max(jnp.where(inner, opening, 0))
  opening = jnp.where(inner, opening / jnp.where(top > 0, top, 1), 1)
  closing = jnp.append(opening[1:], 1)  # 1 at the ends of the video
  share = length / (jnp.maximum(count, 1) / (2 * num_keyframes))
  share = jnp.minimum(1, share.astype(picture.dtype))
  weight = (0.2 + jnp.minimum(opening, closing)) * share**0.25

  def keep(turn, state):
    kept, distance = state
    merit = jnp.where(turn == 0, length, weight * (0.02 + distance))
    pick = jnp.argmax(jnp.where(kept | (length == 0), -1, merit))
    return kept.at[pick].set(True), jnp.minimum(distance, apart[pick])

  first = (jnp.zeros_like(length, bool), jnp.ones_like(picture[:, 0]))
  kept, _ = jax.lax.fori_loop(0, num_keyframes, keep, first)
  kept &= length > 0
  place = jnp.flatnonzero(kept, size=num_keyframes, fill_value=-1)
  start = jnp.where(place >= 0, start[place], count)
  return start, jnp.where(place >= 0, end[place], count)


def _share_out(start: Array, end: Array, count: Array):
  """Splits the segments into one piece per keyframe.

  One frame for each segment; spare ones go one by one to the largest length /
  (frames so far), to the earlier among equals.

  Returns:
    low, high int32[K] bounds of the pieces, and int32[K] their segments.
  """
  slots = start.shape[0]
  length = end - start
  share = (length > 0).astype(jnp.int32)
  spare = jnp.minimum(slots, count) - jnp.sum(share)

  def grant(turn, share):
    quotient = jnp.where(length > 0, length / jnp.maximum(share, 1), -1)
    return share.at[jnp.argmax(quotient)].add((turn < spare).astype(jnp.int32))

  share = jax.lax.fori_loop(0, slots, grant, share)
  total = jnp.cumsum(share)
  slot = jnp.arange(slots)
  segment = jnp.sum(slot[:, None] >= total[None, :], axis=1)
  segment = jnp.minimum(segment, slots - 1)
  turn = slot - (total - share)[segment]
  parts = jnp.maximum(share[segment], 1)
  low = start[segment] + turn * length[segment] // parts
  high = start[segment] + (turn + 1) * length[segment] // parts
  return low, high, segment


def _soft_rows(
  logit: Array, support: Array, temperature: float
) -> tuple[Array, Array]:
  """argmax int32[K] and softmax [K, T] of each row over its support."""
  masked_logit = jnp.where(support, logit[None, :], -jnp.inf)
  index = jnp.argmax(masked_logit, axis=1)
  top = jnp.max(masked_logit, axis=1, keepdims=True)
  top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0, top))
  scaled = jnp.where(support, (logit[None, :] - top) / temperature, 0)
  power = jnp.where(support, jnp.exp(scaled), 0)
  total = jnp.sum(power, axis=1, keepdims=True)
  return index, power / jnp.where(jnp.any(support, 1, keepdims=True), total, 1)


def _dot(weight: Array, feature: Array) -> Array:
  return jnp.matmul(weight, feature, precision=jax.lax.Precision.HIGHEST)


def _cosine(left: Array, right: Array) -> Array:
  """[T] cosine of the rows of two [T, E]."""
  one, other, dot = windows.row_dots([left, right, left], [left, right, right])
  return _over_norms(dot, one, other)


def relevance_scores(embedding: Array, query: Array) -> Array:
  """float[T]: the cosine of every frame with a query, float[E]."""
  chex.assert_rank([embedding, query], [2, 1])
  if query.shape != embedding.shape[1:]:
    raise ValueError(
      f"query has shape {query.shape}, expected {embedding.shape[1:]}, the"
      " width of a frame embedding"
    )
  feature = _widen(embedding)
  query = _widen(query).astype(feature.dtype)
  (square,) = windows.row_dots([feature], [feature])
  return _over_norms(_dot(feature, query), square, jnp.sum(query * query))


SHOWN = ("calmest", "middle", "medoid", "first", "apex")


def _fitness(
  feature: Array,
  steady: Array,
  variation: Array,
  count: Array,
  low: Array,
  high: Array,
  owner: Array,
  shown: str,
) -> Array:
  """[T] how well each frame stands for its piece; the best one is shown."""
  size = feature.shape[0]
  time = jnp.arange(size)
  inside = time < count
  if shown == "calmest":
    # A frame is as calm as the rougher of the steps beside it, and no calmer
    # than it is like its neighbours: the median hides flicker from v alone.
    flicker = jnp.where(inside, 1 - _cosine(feature, steady), 0)
    rough = jnp.maximum(variation, _shift(variation, 1)) + flicker
    return -_standardize(rough, inside)
  if shown == "apex":
    return _standardize(variation, inside)
  if shown == "middle":
    offset = 2 * time - (low + high - 1)[owner]
    return -jnp.abs(offset) / jnp.maximum(high - low, 1)[owner].astype(
      feature.dtype
    )
  if shown == "first":
    return (low[owner] - time) / jnp.maximum(high - low, 1)[owner].astype(
      feature.dtype
    )
  piece = (time >= low[:, None]) & (time < high[:, None])
  mean = _dot(piece.astype(feature.dtype), feature)
  return _standardize(_cosine(feature, mean[owner]), inside)


def _distill(
  feature: Array,
  variation: Array,
  apex: Array,
  strength: Array,
  extra: Array,
  count: Array,
  *,
  num_keyframes: int,
  selection: str,
  rng: Array | None,
  shown: str,
  crowded: str,
  variation_weight: float,
  apex_weight: float,
  temperature: float,
  min_gap: int,
) -> dict[str, Array]:
  """`distill_keyframes` of the first `count` frames, frames numbered there."""
  size = feature.shape[0]
  time = jnp.arange(size)
  inside = time < count
  stepped = inside & (time > 0)
  height = jnp.clip(_standardize(variation, stepped), -3, 3)
  bend = jnp.clip(_standardize(strength, stepped), -3, 3)
  score = variation_weight * height + apex_weight * bend + extra
  score = jnp.where(inside, score, 0)

  fixed = jax.lax.stop_gradient(score)
  steady = windows.median_of_three(feature, count)
  if crowded == "novelty" and selection != "stochastic":
    start, end = _cut(fixed, apex, count, 2 * num_keyframes)
    calm = jax.lax.stop_gradient(steady)
    start, end = _keep_novel(start, end, count, fixed, calm, num_keyframes)
  else:
    start, end = _cut(fixed, apex, count, num_keyframes)
  low, high, segment = _share_out(start, end, count)
  slot = jnp.arange(num_keyframes)
  valid = slot < count
  even = ~jnp.any(apex)

  # Pieces of an evenly sampled video meet half-way between its keyframes.
  spaced = _uniform(count, num_keyframes)
  spaced = jnp.where(valid, spaced, count)
  halfway = (spaced[:-1] + spaced[1:] + 1) // 2
  halfway = jnp.where(valid[1:], halfway, count)
  low = jnp.where(even, jnp.append(jnp.zeros(1, low.dtype), halfway), low)
  high = jnp.where(even, jnp.append(halfway, count), high)
  segment = jnp.where(even, 0, segment)

  if selection == "stochastic":
    order = _draw(fixed, inside, num_keyframes, rng, temperature, min_gap)
    logprob = _picks_logprob(score, order, inside, temperature, min_gap)
    index = jnp.sort(order)
    valid = index < size
    segment = jnp.sum(index[:, None] >= start[None, 1:], axis=1)
    weight = (time == index[:, None]).astype(feature.dtype)
    embedding = feature[jnp.minimum(index, size - 1)]
    embedding = jnp.where(valid[:, None], embedding, 0)
  else:
    owner = jnp.sum(time[:, None] >= low[None, 1:], axis=1)  # its piece
    fit = _fitness(feature, steady, variation, count, low, high, owner, shown)
    broken = jnp.isnan(jnp.sum(variation + fit))
    # Without an apex a frame is the fitter the nearer it is to its even place.
    length = jnp.maximum(high - low, 1)[owner].astype(feature.dtype)
    near = -2 * jnp.abs(time - spaced[owner]) / length
    fit = jnp.where(even, near, fit) + jnp.where(broken, 0, extra)
    support = (time >= low[:, None]) & (time < high[:, None])
    if shown in ("calmest", "medoid"):
      edge = (high - low + 1) // 4
      central = (time >= (low + edge)[:, None]) & (
        time < (high - edge)[:, None]
      )
      support &= central | even
    support &= valid[:, None]
    index, weight = _soft_rows(fit, support, temperature)
    weight = jnp.where(broken, jnp.nan, weight)
    embedding = _dot(weight, feature)
    if selection == "straight_through":
      hard = (time == index[:, None]) & valid[:, None]
      sharp = feature[jnp.minimum(index, size - 1)]
      sharp = jnp.where(valid[:, None], sharp, 0)
      embedding = jax.lax.stop_gradient(sharp) + _forward_zero(embedding)
      weight = hard.astype(weight.dtype) + _forward_zero(weight)
    logprob = jnp.zeros((), feature.dtype)
    order = None

  # Saliency: the priority of the opening apex, the highest of all being 1.
  top = jnp.max(jnp.where(apex, fixed, 0))
  merit = jnp.where(apex, fixed, 0) / jnp.where(top > 0, top, 1)
  opener = start[segment]
  saliency = jnp.clip(merit[jnp.minimum(opener, size - 1)], 0, 1)
  saliency = jnp.where(valid & (opener > 0), saliency, 0)
  if order is None:
    rank = jnp.argsort(jnp.where(valid, -saliency, jnp.inf), stable=True)
    order = jnp.where(valid[rank], index[rank], size)
  return {
    "index": index,
    "mask": valid,
    "order": order,
    "weight": weight,
    "embedding": embedding,
    "score": score,
    "saliency": saliency,
    "segment": jnp.stack([start[segment], end[segment]], axis=1),
    "logprob": logprob,
  }


def _forward_zero(value: Array) -> Array:
  """0 forward, the gradient of the value backward."""
  return value - jax.lax.stop_gradient(value)


def distill_keyframes(
  embedding: Array,
  variation: Array,
  apex: Array,
  strength: Array,
  mask: Array | None = None,
  *,
  num_keyframes: int,
  selection: Literal["soft", "straight_through", "stochastic"] = "soft",
  rng: Array | None = None,
  shown: Literal["calmest", "middle", "medoid", "first", "apex"] = "calmest",
  crowded: Literal["novelty", "priority"] = "novelty",
  variation_weight: float = 1.0,
  apex_weight: float = 1.0,
  relevance_weight: float = 1.0,
  query: Array | None = None,
  bonus: Array | None = None,
  temperature: float = 1.0,
  min_gap: int = 3,
) -> Keyframes:
  """Cuts the video at its best apexes and shows one calm frame of each part.

  Priority: `score = w_v z(v) + w_a z(a) + w_q cos(f, query) + bonus`, z the
  masked standard score (std at least 1e-3) clipped to +-3. The best K - 1
  apexes cut the video into segments; where there are more apexes, `crowded`
  says which parts go without a frame. Each segment gets one frame, spare frames
  go one by one to the largest length / (frames so far) and split their segment
  evenly. Without any apex the frames are exactly those of `uniform_index`, but
  where a query or a bonus speaks for another frame of the same part.
  Saliency is the priority of the apex that opens the segment, over the highest.

  Args:
    embedding: float[T, E].
    variation: float[T] of `variation_scores`.
    apex: bool[T] of `detect_inflections`.
    strength: float[T] of `detect_inflections`.
    mask: bool[T] real frames; None means all.
    num_keyframes: K.
    selection: "soft": `weight[k]` is a softmax within keyframe k's piece of
      video, `embedding = weight @ f`, an honest gradient with the cuts held
      fixed. "straight_through": the shown frame forward, the gradient of the
      soft selection backward. "stochastic": frames drawn one by one from
      softmax(score / temperature), see `selection_logprob`.
    rng: key, for "stochastic" only.
    shown: the frame of a piece that is shown. "calmest": least variation on
      either side and least flicker, in the central half; "medoid": most like
      the piece's mean, in the central half; "middle"; "first", after the cut;
      "apex", most variation. Query relevance and bonus are added.
    crowded: with more than K - 1 apexes, "priority" merges what lies between
      the lower ones; "novelty" cuts at up to 2K - 1 apexes and keeps the K
      segments most unlike one another, weighed by their apexes and a little by
      their lengths. An event of a few frames has two apexes, and losing either
      would lose the event.
    variation_weight: w_v.
    apex_weight: w_a.
    relevance_weight: w_q, used with a query only.
    query: float[E] embedding of the question, None for none.
    bonus: float[T] priority from elsewhere, such as a learned scorer.
    temperature: of the softmaxes, in standard deviations of what they rank.
    min_gap: least distance of two stochastic picks, in real frames.

  Returns:
    Keyframes; slots beyond the number of real frames are masked.

  Raises:
    ValueError: a setting out of range, a query or bonus of another length,
      "stochastic" without rng, or (outside jit) a bonus that is NaN.
  """
  chex.assert_rank([embedding, variation, apex, strength], [2, 1, 1, 1])
  chex.assert_equal_shape([variation, apex, strength])
  _check_choice(
    "selection", selection, ("soft", "straight_through", "stochastic")
  )
  _check_choice("shown", shown, SHOWN)
  _check_choice("crowded", crowded, ("novelty", "priority"))
  check_count("num_keyframes", num_keyframes)
  check_count("min_gap", min_gap)
  _check_numbers(temperature=temperature)
  if selection == "stochastic" and rng is None:
    raise ValueError('selection="stochastic" draws frames, expected rng=key')
  size = embedding.shape[0]
  _check_bonus(bonus, mask, (size,))
  mask = _as_mask(mask, (size,))
  feature = _gather(_widen(embedding), mask)
  count = _count(size, mask)
  variation, apex = _widen(variation), jnp.asarray(apex, bool)
  extra = jnp.zeros(size, feature.dtype)
  if query is not None:
    extra += relevance_weight * relevance_scores(feature, query)
  if bonus is not None:
    extra += _gather(_widen(bonus).astype(feature.dtype), mask)
  found = _distill(
    feature,
    _gather(variation, mask),
    _gather(apex, mask),
    _gather(_widen(strength), mask),
    extra,
    count,
    num_keyframes=num_keyframes,
    selection=selection,
    rng=rng,
    shown=shown,
    crowded=crowded,
    variation_weight=variation_weight,
    apex_weight=apex_weight,
    temperature=temperature,
    min_gap=min_gap,
  )
  valid = found["mask"]
  segment = found["segment"]
  first = _frame_number(segment[:, 0], valid, mask, size)
  last = _frame_number(segment[:, 1] - 1, valid, mask, size)
  return Keyframes(
    index=_frame_number(found["index"], valid, mask, size),
    mask=valid,
    order=_frame_number(found["order"], found["order"] < count, mask, size),
    weight=_spread(found["weight"], mask),
    embedding=found["embedding"],
    score=_spread(found["score"], mask),
    variation=variation,
    saliency=found["saliency"],
    segment=jnp.stack([first, jnp.minimum(last + 1, size)], axis=1),
    apex=apex,
    logprob=found["logprob"],
  )


# Stochastic selection ---------------------------------------------------------


def _available(order: Array, inside: Array, min_gap: int) -> Array:
  """bool[K, T] the frames each pick could choose from.

  Frames nearer than min_gap to an earlier pick are gone; where that leaves
  none, every frame that was not picked itself is back.
  """
  time = jnp.arange(inside.shape[0])
  away = jnp.abs(time[None, :] - order[:, None])

  def free(gap):
    near = (away < gap).astype(jnp.int32)
    return inside & (jnp.cumsum(near, axis=0) - near == 0)

  apart = free(min_gap)
  return jnp.where(jnp.any(apart, axis=1, keepdims=True), apart, free(1))


def _draw(
  score: Array,
  inside: Array,
  num_keyframes: int,
  rng: Array,
  temperature: float,
  min_gap: int,
) -> Array:
  """int32[K] frames in the order drawn, T where none was left.

  One Gumbel perturbation serves all draws: the largest perturbed score among
  those still available is a draw from their softmax, whichever went before.
  """
  size = score.shape[0]
  time = jnp.arange(size)
  noise = jax.random.gumbel(rng, (size,), score.dtype)
  level = jnp.where(inside, score / temperature + noise, -jnp.inf)

  def draw(state, _):
    apart, unpicked = state
    free = jnp.where(jnp.any(apart), apart, unpicked)
    pick = jnp.argmax(jnp.where(free, level, -jnp.inf))
    pick = jnp.where(jnp.any(free), pick, size).astype(jnp.int32)
    away = jnp.abs(time - pick)
    return (apart & (away >= min_gap), unpicked & (away > 0)), pick

  return jax.lax.scan(draw, (inside, inside), length=num_keyframes)[1]


def _picks_logprob(
  score: Array,
  order: Array,
  inside: Array,
  temperature: float,
  min_gap: int,
) -> Array:
  """`selection_logprob` among the first frames, numbered there."""
  size = score.shape[0]
  free = _available(order, inside, min_gap)
  able = jnp.any(free & (jnp.arange(size) == order[:, None]), axis=1)
  logit = score / temperature
  free |= ~able[:, None]  # keeps the other rows finite
  level = jnp.where(free, logit[None, :], -jnp.inf)
  picked = logit[jnp.clip(order, 0, size - 1)]
  step = jnp.where(able, picked - jax.nn.logsumexp(level, axis=1), -jnp.inf)
  return jnp.sum(jnp.where(order < size, step, 0))


def selection_logprob(
  score: Array,
  order: Array,
  mask: Array | None = None,
  *,
  temperature: float = 1.0,
  min_gap: int = 3,
) -> Array:
  """Exact log-probability of a stochastic selection, from its pick order.

  `sum_j [ s_j / t - logsumexp over the still available s / t ]`: after each
  draw the frames nearer than `min_gap` are gone; where that leaves none, all
  frames not yet picked are back, so K frames come out of any video that has
  them. Plackett-Luce for `min_gap=1`.

  Args:
    score: float[T] priority, differentiable.
    order: int32[K] picks in the order drawn, T for none.
    mask: bool[T] real frames; None means all.
    temperature: as in the draw.
    min_gap: as in the draw, in real frames.

  Returns:
    float[] log-probability; -inf for picks that no draw gives: a masked frame,
    one frame twice, two nearer than `min_gap` while others are left.
  """
  chex.assert_rank([score, order], [1, 1])
  check_count("min_gap", min_gap)
  _check_numbers(temperature=temperature)
  size = score.shape[0]
  mask = _as_mask(mask, (size,))
  inside = jnp.arange(size) < _count(size, mask)
  order = jnp.asarray(order)
  if mask is not None:
    rank = jnp.where(mask, jnp.cumsum(mask) - 1, -1)  # -1: never drawn
    order = jnp.append(rank, size)[order]
  return _picks_logprob(
    _gather(_widen(score), mask), order, inside, temperature, min_gap
  )


# All of it --------------------------------------------------------------------


def select_keyframes(
  embedding: Array,
  mask: Array | None = None,
  *,
  num_keyframes: int,
  selection: Literal["soft", "straight_through", "stochastic"] = "soft",
  rng: Array | None = None,
  metric: Literal["cosine", "l2"] = "cosine",
  scales: Sequence[int] = (2, 4),
  median: bool = True,
  smoothing: float = 0.0,
  gate: float = 4.0,
  prominence: float = 0.7,
  contrast: float = 0.0,
  min_gap: int = 3,
  strength: Literal["soft", "hard"] = "soft",
  softness: float = 1.0,
  flat: float = 1e-4,
  shown: Literal["calmest", "middle", "medoid", "first", "apex"] = "calmest",
  crowded: Literal["novelty", "priority"] = "novelty",
  variation_weight: float = 1.0,
  apex_weight: float = 1.0,
  relevance_weight: float = 1.0,
  query: Array | None = None,
  bonus: Array | None = None,
  temperature: float = 1.0,
) -> Keyframes:
  """Chooses K keyframes of one video: the three stages in a row.

  The arguments are those of `variation_scores`, `detect_inflections` and
  `distill_keyframes`. vmap, jit, grad and scan over it freely.

  Args:
    embedding: float[T, E] one embedding per scanned frame.
    mask: bool[T] real frames; None means all.
    num_keyframes: K.
    selection: "soft", "straight_through" or "stochastic".
    rng: key, for "stochastic" only.
    metric: see `variation_scores`, as scales, median and smoothing.
    scales: window lengths in frames.
    median: temporal median of three first.
    smoothing: Gaussian over the curve, in frames.
    gate: see `detect_inflections`, as the six that follow.
    prominence: of an apex, as a share of its height.
    contrast: of an apex with the frames beside it.
    min_gap: least distance of two apexes, and of two stochastic picks.
    strength: "soft" or "hard".
    softness: of the soft strength.
    flat: least height of an apex.
    shown: see `distill_keyframes`, as everything that follows.
    crowded: "novelty" or "priority".
    variation_weight: w_v.
    apex_weight: w_a.
    relevance_weight: w_q.
    query: float[E] or None.
    bonus: float[T] or None.
    temperature: of the softmaxes.

  Returns:
    Keyframes. A NaN in a real frame makes the numbers of that video NaN and its
    keyframes the uniform ones (stochastic ones mean nothing then); outside jit
    it is an error.

  Raises:
    ValueError: as the three stages.
  """
  variation = variation_scores(
    embedding,
    mask,
    metric=metric,
    scales=scales,
    median=median,
    smoothing=smoothing,
  )
  apex, bend = detect_inflections(
    variation,
    mask,
    gate=gate,
    prominence=prominence,
    contrast=contrast,
    min_gap=min_gap,
    strength=strength,
    softness=softness,
    flat=flat,
  )
  return distill_keyframes(
    embedding,
    variation,
    apex,
    bend,
    mask,
    num_keyframes=num_keyframes,
    selection=selection,
    rng=rng,
    shown=shown,
    crowded=crowded,
    variation_weight=variation_weight,
    apex_weight=apex_weight,
    relevance_weight=relevance_weight,
    query=query,
    bonus=bonus,
    temperature=temperature,
    min_gap=min_gap,
  )


_STATIC = (
  "num_keyframes",
  "selection",
  "metric",
  "scales",
  "median",
  "smoothing",
  "min_gap",
  "strength",
  "shown",
  "crowded",
)


def _over_videos(one: Callable, embedding: Array, *arrays: Array | None):
  """vmap of `one`, also over a mesh with Explicit axes.

  No frame of a video depends on another video, so that splitting the videos
  needs no word from the user; gathers and sorts inside would ask for one.
  """
  many = jax.vmap(one)
  place = jax.typeof(embedding).sharding
  explicit = place.mesh.explicit_axes
  if not explicit:
    return many(embedding, *arrays)
  split = jax.sharding.PartitionSpec(place.spec[0])
  return jax.sharding.auto_axes(
    many,
    axes=explicit,
    out_sharding=jax.sharding.NamedSharding(place.mesh, split),
  )(embedding, *arrays)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _select_batch(embedding, mask, rng, query, bonus, **settings):
  def one(embedding, mask, rng, query, bonus):
    return select_keyframes(
      embedding, mask, rng=rng, query=query, bonus=bonus, **settings
    )

  return _over_videos(one, embedding, mask, rng, query, bonus)


def select_videos(
  embedding: Array,
  mask: Array | None = None,
  *,
  rng: Array | None = None,
  query: Array | None = None,
  bonus: Array | None = None,
  **settings,
) -> Keyframes:
  """`select_keyframes` of a batch, jit-compiled.

  Split over devices along B, it stays split, whatever the mesh's axis types. (A
  vmap of your own over Explicit axes goes inside `jax.sharding.auto_axes`.)

  Args:
    embedding: float[B, T, E].
    mask: bool[B, T] or None.
    rng: one key, split over the videos; for "stochastic" only.
    query: float[B, E] or None.
    bonus: float[B, T] or None.
    **settings: the other arguments of `select_keyframes`.

  Returns:
    Keyframes, every field with a leading B.
  """
  chex.assert_rank(embedding, 3)
  check_frames(embedding, mask)
  _check_bonus(bonus, mask, embedding.shape[:2])
  _check_numbers(**settings)  # before jit makes them tracers
  mask = _as_mask(mask, embedding.shape[:2])
  if rng is not None:
    rng = jax.random.split(rng, embedding.shape[0])
  if "scales" in settings:
    settings["scales"] = _check_scales(settings["scales"])
  return _select_batch(embedding, mask, rng, query, bonus, **settings)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _score_batch(embedding, mask, **settings):
  score = functools.partial(variation_scores, **settings)
  return _over_videos(score, embedding, mask)


def score_videos(
  embedding: Array, mask: Array | None = None, **settings
) -> Array:
  """`variation_scores` of a batch, jit-compiled: [B, T, E] to [B, T]."""
  chex.assert_rank(embedding, 3)
  check_frames(embedding, mask)
  mask = _as_mask(mask, embedding.shape[:2])
  if "scales" in settings:
    settings["scales"] = _check_scales(settings["scales"])
  return _score_batch(embedding, mask, **settings)


def straight_through_tokens(token: Array, keyframes: Keyframes) -> Array:
  """Ties the visual tokens of the chosen frames to their selection weights.

  `x_k * (1 + w_k - stop_gradient(w_k))`, w_k the weight of the shown frame: the
  value is unchanged, and the weight receives a gradient although only the
  chosen frames were encoded.

  Args:
    token: float[K, P, D] visual tokens of the keyframes.
    keyframes: of one video, "soft" or "straight_through".

  Returns:
    float[K, P, D].
  """
  chex.assert_rank(token, 3)
  index = jnp.minimum(keyframes.index, keyframes.weight.shape[1] - 1)
  weight = jnp.take_along_axis(keyframes.weight, index[:, None], axis=1)
  gate = 1 + _forward_zero(jnp.where(keyframes.mask, weight[:, 0], 0))
  return token * gate[:, None, None].astype(token.dtype)
