"""The frame selectors that `tad` is compared with.

Axes: `T` scanned frames, `K` keyframes, `E` frame-embedding width.

Every selector takes one video, `(embedding[T, E], mask[T] or None, *,
num_keyframes, ...)`, as `tad.select_keyframes` does, and returns Keyframes: the
frames in order of time, each the whole of its one-hot weight row, in segments
that meet half-way between neighbouring keyframes. They find no apexes and have
no gradient but that of the chosen embeddings. vmap and jit them as you like.

`SELECTORS` names them, and the layer itself, for settings and benchmarks;
`select_videos` is the jitted vmap of one of them.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from cf_jax import tad
from cf_jax.types import Keyframes

Array = jax.Array


def _as_keyframes(
  embedding: Array, mask: Array, order: Array, score: Array
) -> Keyframes:
  """Keyframes from frame numbers in pick order, T where none was left."""
  size = embedding.shape[0]
  feature = jnp.asarray(embedding)  # numpy cannot be indexed inside jit
  feature = feature.astype(jnp.promote_types(feature.dtype, jnp.float32))
  order = order.astype(jnp.int32)
  index = jnp.sort(order)
  valid = index < size
  shown = jnp.where(valid[:, None], feature[jnp.minimum(index, size - 1)], 0)
  # Halfway between neighbours; the first and the last reach to the ends.
  last = size - jnp.argmax(mask[::-1])
  first = jnp.argmax(mask)
  ahead = jnp.append(index[1:], size)
  halfway = jnp.where(ahead < size, (index + ahead + 1) // 2, last)
  start = jnp.append(first, halfway[:-1])
  segment = jnp.stack([start, halfway], axis=1)
  return Keyframes(
    index=index,
    mask=valid,
    order=order,
    weight=(jnp.arange(size) == index[:, None]).astype(feature.dtype),
    embedding=shown,
    score=jnp.where(mask, score, 0).astype(feature.dtype),
    variation=jnp.zeros(size, feature.dtype),
    saliency=jnp.zeros(index.shape, feature.dtype),
    segment=jnp.where(valid[:, None], segment, size).astype(jnp.int32),
    apex=jnp.zeros(size, bool),
    logprob=jnp.zeros((), feature.dtype),
  )


def _open(embedding: Array, mask: Array | None, num_keyframes: int) -> Array:
  """Checks a selector's arguments and returns the mask."""
  chex.assert_rank(embedding, 2)
  tad.check_count("num_keyframes", num_keyframes)
  tad.check_frames(embedding, mask)
  if mask is None:
    return jnp.ones(embedding.shape[0], bool)
  mask = jnp.asarray(mask, bool)
  chex.assert_shape(mask, embedding.shape[:1])
  return mask


def _frame_score(embedding: Array, mask: Array, query: Array | None) -> Array:
  """float[T]: cosine with the query where there is one, else variation."""
  if query is None:
    return tad.variation_scores(embedding, mask)
  return tad.relevance_scores(embedding, query)


def _highest(score: Array, mask: Array, num_keyframes: int) -> Array:
  """int32[K] real frames by falling score, earlier first among equals."""
  size = score.shape[0]
  order = jnp.argsort(jnp.where(mask, -score, jnp.inf), stable=True)
  order = jnp.where(mask[order], order, size)
  spare = max(0, num_keyframes - size)
  return jnp.pad(order, (0, spare), constant_values=size)[:num_keyframes]


def uniform(
  embedding: Array, mask: Array | None = None, *, num_keyframes: int
) -> Keyframes:
  """Evenly spaced frames, `tad.uniform_index`."""
  mask = _open(embedding, mask, num_keyframes)
  index = tad.uniform_index(mask, num_keyframes)
  return _as_keyframes(embedding, mask, index, jnp.zeros(mask.shape))


def random(
  embedding: Array,
  mask: Array | None = None,
  *,
  num_keyframes: int,
  rng: Array,
) -> Keyframes:
  """K different frames, every set equally likely."""
  mask = _open(embedding, mask, num_keyframes)
  score = jax.random.uniform(rng, mask.shape)
  order = _highest(score, mask, num_keyframes)
  return _as_keyframes(embedding, mask, order, score)


def top_k(
  embedding: Array,
  mask: Array | None = None,
  *,
  num_keyframes: int,
  query: Array | None = None,
) -> Keyframes:
  """The K frames of most variation, or most like a query: float[E]."""
  mask = _open(embedding, mask, num_keyframes)
  score = _frame_score(embedding, mask, query)
  order = _highest(score, mask, num_keyframes)
  return _as_keyframes(embedding, mask, order, score)


def all_frames(
  embedding: Array,
  mask: Array | None = None,
  *,
  num_keyframes: int | None = None,
) -> Keyframes:
  """Every frame; K is T, and `num_keyframes` may say so."""
  size = embedding.shape[0]
  if num_keyframes not in (None, size):
    raise ValueError(
      f"num_keyframes={num_keyframes}, but all_frames shows every frame:"
      f" expected None or {size}"
    )
  mask = _open(embedding, mask, size)
  order = _highest(jnp.zeros(size), mask, size)
  return _as_keyframes(embedding, mask, order, jnp.zeros(size))


def k_center(
  embedding: Array,
  mask: Array | None = None,
  *,
  num_keyframes: int,
  median: bool = False,
) -> Keyframes:
  """Farthest-first traversal: always the frame least like those picked.

  Starts at the first real frame; the distance is `1 - cos`.

  Args:
    embedding: float[T, E].
    mask: bool[T] or None.
    num_keyframes: K.
    median: take the temporal median of three first, so that a flicker is not
      the farthest frame.
  """
  mask = _open(embedding, mask, num_keyframes)
  size = mask.shape[0]
  if median:
    feature = tad.temporal_median(embedding, mask)
  else:
    feature = embedding.astype(jnp.promote_types(embedding.dtype, jnp.float32))
  feature = jnp.where(mask[:, None], feature, 0)
  norm = jnp.sqrt(jnp.sum(feature * feature, axis=1, keepdims=True))
  feature = feature / jnp.where(norm > 0, norm, 1)

  def pick(distance, _):
    frame = jnp.argmax(distance)
    left = distance[frame] > -jnp.inf
    away = jnp.minimum(distance, 1 - feature @ feature[frame])
    away = away.at[frame].set(-jnp.inf)
    return away, jnp.where(left, frame, size)

  start = jnp.where(mask, jnp.inf, -jnp.inf).astype(feature.dtype)
  _, order = jax.lax.scan(pick, start, length=num_keyframes)
  return _as_keyframes(embedding, mask, order, jnp.zeros(size))


def aks(
  embedding: Array,
  mask: Array | None = None,
  *,
  num_keyframes: int,
  query: Array | None = None,
  threshold: float = 0.8,
  depth: int = 5,
) -> Keyframes:
  """Adaptive keyframe sampling: relevance and coverage by recursive halving.

  A segment with n frames to give keeps them all, its n best, if their mean
  score exceeds the segment's by more than `threshold`; else it is halved and
  each half gets half of them. Scores are scaled to [0, 1]. The second half
  takes the odd frame, of the video and of the n, so that exactly K are given.

  Reference: Adaptive Keyframe Sampling (arXiv 2502.21271) and its public code.
  That code judges every segment by its K best frames, whatever its share, and
  rounds shares down: below 32 frames parts of the video get none, so that fewer
  than K come out. Where K is a multiple of 32 and no part stands out after the
  first halving, the frames are the same.

  Args:
    embedding: float[T, E].
    mask: bool[T] or None.
    num_keyframes: K.
    query: float[E]; None scores frames by their variation.
    threshold: on the scaled scores.
    depth: times that a segment may be halved.
  """
  mask = _open(embedding, mask, num_keyframes)
  size = mask.shape[0]
  score = _frame_score(embedding, mask, query)
  low = jnp.min(jnp.where(mask, score, jnp.inf))
  high = jnp.max(jnp.where(mask, score, -jnp.inf))
  scaled = (score - low) / jnp.where(high > low, high - low, 1)
  scaled = jnp.where(mask, scaled, 0)

  # Per frame: its place among the real ones, and its segment's first place,
  # length, share of the K frames, and whether it may still be halved.
  rank = jnp.cumsum(mask) - 1
  count = jnp.sum(mask)
  start = jnp.zeros(size, jnp.int32)
  length = jnp.full(size, count, jnp.int32)
  share = jnp.full(size, jnp.minimum(num_keyframes, count), jnp.int32)
  alive = jnp.ones(size, bool)

  def best_of_segment(start, share):
    """bool[T] the `share` best real frames of each frame's segment."""
    segment = jnp.where(mask, start, size)
    order = jnp.lexsort((rank, -scaled, segment))
    # Segments are contiguous: `start` real frames come before this one.
    place = jnp.zeros(size, jnp.int32).at[order].set(jnp.arange(size))
    return mask & (place - start < share)

  def segment_mean(value, chosen, start):
    chosen = chosen.astype(value.dtype)
    total = jnp.zeros(size, value.dtype).at[start].add(value * chosen)
    number = jnp.zeros(size, value.dtype).at[start].add(chosen)
    return (total / jnp.maximum(number, 1))[start]

  for _ in range(depth):
    best = segment_mean(scaled, best_of_segment(start, share), start)
    mean = segment_mean(scaled, mask, start)
    alive &= (best - mean <= threshold) & (share > 1)
    half, less = length // 2, share // 2
    second = alive & (rank >= start + half)
    start = start + jnp.where(second, half, 0)
    length = jnp.where(alive, jnp.where(second, length - half, half), length)
    share = jnp.where(alive, jnp.where(second, share - less, less), share)

  chosen = best_of_segment(start, share)
  order = _highest(scaled, chosen, num_keyframes)
  return _as_keyframes(embedding, mask, order, scaled)


# One of them, by name --------------------------------------------------------

# Each takes (embedding, mask, *, num_keyframes); "random" also needs rng.
SELECTORS = {
  "tad": tad.select_keyframes,
  "uniform": uniform,
  "random": random,
  "top_k": top_k,
  "aks": aks,
  "k_center": k_center,
  "k_center_median": functools.partial(k_center, median=True),
  "all_frames": all_frames,
}
# Those that need no key and show K frames: what programs let a user choose.
CHOICES = tuple(
  name for name in SELECTORS if name not in ("random", "all_frames")
)


def by_name(name: str) -> Callable[..., Keyframes]:
  """The selector of a setting.

  Raises:
    ValueError: no selector has this name.
  """
  if name not in SELECTORS:
    raise ValueError(
      f"a selector named {name!r} does not exist, expected one of"
      f" {', '.join(map(repr, SELECTORS))}"
    )
  return SELECTORS[name]


@functools.partial(
  jax.jit, static_argnames=("name", "num_keyframes", "median", "depth")
)
def _select_batch(name, embedding, mask, rng, query, *, num_keyframes, **rest):
  select = functools.partial(by_name(name), num_keyframes=num_keyframes, **rest)

  def one(embedding, mask, rng, query):
    arrays = {"rng": rng, "query": query}
    given = {k: array for k, array in arrays.items() if array is not None}
    return select(embedding, mask, **given)

  return jax.vmap(one)(embedding, mask, rng, query)


def select_videos(
  name: str,
  embedding: Array,
  mask: Array | None = None,
  *,
  num_keyframes: int,
  rng: Array | None = None,
  query: Array | None = None,
  **settings,
) -> Keyframes:
  """The selector `name` over a batch, jit-compiled.

  Args:
    name: a key of `SELECTORS`; "tad" is `tad.select_videos`.
    embedding: float[B, T, E].
    mask: bool[B, T] or None.
    num_keyframes: K.
    rng: for "random" and a stochastic "tad": a key, split over the videos. For
      "random" also B keys, one for each.
    query: float[B, E] or None, for "tad", "top_k" and "aks".
    **settings: others of that selector.

  Returns:
    Keyframes, every field with a leading B.
  """
  by_name(name)
  chex.assert_rank(embedding, 3)
  settings["num_keyframes"] = num_keyframes
  if name == "tad":
    return tad.select_videos(embedding, mask, rng=rng, query=query, **settings)
  tad.check_frames(embedding, mask)
  mask = None if mask is None else jnp.asarray(mask, bool)
  if rng is not None:
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    if rng.ndim == (0 if typed else 1):  # an untyped key is two numbers
      rng = jax.random.split(rng, embedding.shape[0])
  return _select_batch(name, embedding, mask, rng, query, **settings)
