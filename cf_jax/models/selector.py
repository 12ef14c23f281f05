"""A learned scorer: which frames of a video matter to a question.

Its score is added to TAD's priority (`bonus` of `tad.select_keyframes`), and
the last layer starts at zero, so that an untrained scorer leaves TAD's choice
as it is. Everything is for ONE video; vmap, jit, grad and shard it freely.

The network is this project's own. From TSPO (arXiv 2508.04369), which scores
frozen CLIP features by one windowed attention layer and their likeness to the
question, it takes the short temporal context and the product of frame and
question in the score. In place of attention it has dilated depthwise
convolutions, which cost O(T) and know before from after:

    m      = mean over the video of f^,            f^ = f / rms(f)
    x      = W_f (f^ - m) / rms(f^ - m) + W_m m + W_t time
    c      = silu(W_q q^)                          or a vector for "no question"
    x     += SwiGLU(conv(norm(x) * (1 + A c) + B c))           depth times
    score  = norm(x) . (w + C c) / sqrt(D),        w = C = 0 at the start

The deviation from the video's mean is what tells its frames apart: frame
embeddings of most encoders are alike by nine tenths. Masked frames do not
exist; the scale of an embedding does not matter.

Axes: `T` scanned frames, `K` keyframes, `E` frame-embedding width, `U`
question-embedding width, `D` width of the scorer.
"""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from cf_jax import masked, tad
from cf_jax.models import config as model_config
from cf_jax.models import layers
from cf_jax.types import Keyframes

Array = jax.Array

_OCTAVES = 4  # of the sines that say where in the video a frame is
_EPS = 1e-6
# A video whose frames differ by less, relative to their size, is a still.
_STILL = 1e-3


@dataclasses.dataclass(frozen=True)
class SelectorConfig:
  """What a scorer is; frozen and hashable, so it can be a static argument.

  Attributes:
    embedding_dim: E, width of a frame embedding.
    query_dim: U, width of a question embedding; None for a scorer that is
      never asked anything.
    width: D.
    depth: temporal layers; 0 scores every frame for itself.
    kernel: frames that a layer looks at, odd.
    dilation: layer l looks at every dilation**l-th frame.
    dtype: of activations, "float32" or "bfloat16"; parameters, norms and
      scores are float32.
  """

  embedding_dim: int
  query_dim: int | None = None
  width: int = 128
  depth: int = 3
  kernel: int = 7
  dilation: int = 2
  dtype: str = "float32"

  def __post_init__(self):
    for name, least in (
      ("embedding_dim", 1),
      ("query_dim", 1),
      ("width", 1),
      ("depth", 0),
      ("kernel", 1),
      ("dilation", 1),
    ):
      value = getattr(self, name)
      if value is None and name == "query_dim":
        continue
      if not isinstance(value, int) or value < least:
        raise ValueError(
          f"{name} must be a whole number of at least {least}, got"
          f" {value!r}; change SelectorConfig.{name}"
        )
    if self.kernel % 2 == 0:
      raise ValueError(
        f"kernel must be odd, as many frames before as after, got"
        f" {self.kernel}; change SelectorConfig.kernel"
      )
    if self.dtype not in model_config.DTYPES:
      raise ValueError(
        f"dtype must be one of {model_config.DTYPES}, got {self.dtype!r};"
        " change SelectorConfig.dtype"
      )

  @property
  def reach(self) -> int:
    """Frames on either side that the temporal layers see."""
    steps = sum(self.dilation**layer for layer in range(self.depth))
    return self.kernel // 2 * steps


def _scale_free(value: Array) -> Array:
  """Last axis over its root mean square; zeros stay, with zero gradient."""
  square = jnp.mean(value * value, axis=-1, keepdims=True)
  empty = square == 0
  return value * jax.lax.rsqrt(jnp.where(empty, 1, square)) * ~empty


def _time_features(rank: Array, count: Array) -> Array:
  """float32[T, 8]: sines of half a turn to four turns over the video."""
  phase = (rank + 0.5) / jnp.maximum(count, 1)
  turn = jnp.pi * phase[:, None] * 2.0 ** jnp.arange(_OCTAVES)
  return jnp.concatenate([jnp.sin(turn), jnp.cos(turn)], axis=1)


class _Block(nn.Module):
  """norm, FiLM, depthwise temporal convolution, SwiGLU; added to its input."""

  config: SelectorConfig
  step: int  # frames between two taps

  @nn.compact
  def __call__(self, x, inside, condition):
    how = self.config
    wide = dict(dtype=how.dtype, param_dtype="float32")
    y = layers.RMSNorm(eps=_EPS, param_dtype="float32", name="norm")(x)
    film = layers.linear(
      2 * how.width, use_bias=True, std=how.width**-0.5, name="film", **wide
    )
    scale, shift = jnp.split(film(condition), 2)
    y = jnp.where(inside, y * (1 + scale) + shift, 0)

    kernel = self.param(
      "kernel",
      nn.initializers.normal(how.kernel**-0.5),
      (how.kernel, how.width),
    ).astype(how.dtype)
    # Shifted sums: XLA has no fast depthwise convolution on the CPU.
    radius = how.kernel // 2 * self.step
    padded = jnp.pad(y, ((radius, radius), (0, 0)))
    y = sum(
      tap * jax.lax.slice_in_dim(padded, start, start + x.shape[0])
      for tap, start in zip(
        kernel, range(0, 2 * radius + 1, self.step), strict=True
      )
    )
    mlp = layers.SwiGLU(
      width=2 * how.width,
      use_bias=True,
      std=how.width**-0.5,
      name="mlp",
      **wide,
    )
    return x + mlp(y)


class _Scorer(nn.Module):
  config: SelectorConfig

  @nn.compact
  def __call__(self, embedding, mask, query):
    how = self.config
    size = embedding.shape[0]

    def dense(inputs, name, use_bias=False):
      return layers.linear(
        how.width,
        use_bias=use_bias,
        std=inputs**-0.5,
        dtype=how.dtype,
        param_dtype="float32",
        name=name,
      )

    # Cut off before anything else: 0 * NaN of a masked frame is NaN.
    real = jnp.ones(size, bool) if mask is None else mask
    frame = jnp.where(real[:, None], embedding.astype(jnp.float32), 0)
    frame = _scale_free(frame)
    mean = masked.masked_mean(frame, real[:, None], axis=0)
    frame = jnp.where(real[:, None], frame - mean, 0)
    spread = masked.masked_mean(frame * frame, real[:, None])
    floor = _STILL**2 * jnp.mean(mean * mean) + 1e-12
    frame = frame * jax.lax.rsqrt(jnp.maximum(spread, floor))
    x = dense(how.embedding_dim, "frame", use_bias=True)(frame)

    # The real frames to the front, in order, and zeros behind them.
    count = jnp.sum(real)
    rank = jnp.arange(size)
    inside = (rank < count)[:, None]
    if mask is not None:
      x = x[jnp.flatnonzero(mask, size=size, fill_value=0)]
    x += dense(how.embedding_dim, "video")(mean)
    x += dense(2 * _OCTAVES, "time")(_time_features(rank, count))
    x = jnp.where(inside, x, 0)

    condition = self.param(
      "no_question", nn.initializers.normal(1.0), (how.width,)
    )
    if how.query_dim is not None:
      # Called without a question too, for its parameters.
      asked = jnp.zeros(how.query_dim) if query is None else query
      asked = _scale_free(asked.astype(jnp.float32))
      asked = dense(how.query_dim, "question", use_bias=True)(asked)
      condition = condition if query is None else asked
    condition = nn.silu(condition.astype(how.dtype))

    for layer in range(how.depth):
      block = _Block(how, step=how.dilation**layer, name=f"layer_{layer}")
      x = block(x, inside, condition)

    x = layers.RMSNorm(eps=_EPS, param_dtype="float32", name="norm")(
      x.astype(jnp.float32)
    )
    zeros = nn.initializers.zeros
    direction = self.param("score", zeros, (how.width,))
    direction += condition.astype(jnp.float32) @ self.param(
      "likeness", zeros, (how.width, how.width)
    )
    score = jnp.sum(x * direction, axis=-1) * how.width**-0.5
    if mask is None:
      return score
    return jnp.where(mask, score[jnp.maximum(jnp.cumsum(mask) - 1, 0)], 0)


def init(config: SelectorConfig, rng: Array) -> dict:
  """Fresh parameters, float32; every score is 0 until they are trained."""
  frame = jnp.zeros((1, config.embedding_dim))
  return _Scorer(config).init(rng, frame, None, None)["params"]


def apply(
  config: SelectorConfig,
  params: dict,
  embedding: Array,
  mask: Array | None = None,
  query: Array | None = None,
) -> Array:
  """Scores the frames of one video.

  Args:
    config: the scorer.
    params: its parameters.
    embedding: float[T, E] one embedding per scanned frame.
    mask: bool[T] real frames; None means all.
    query: float[U] embedding of the question, of any encoder; None for none.

  Returns:
    float32[T] score, to be added to TAD's priority; 0 where masked.

  Raises:
    ValueError: widths that are not the config's.
  """
  chex.assert_rank(embedding, 2)
  if mask is not None:
    chex.assert_shape(mask, embedding.shape[:1])
  if embedding.shape[1] != config.embedding_dim:
    raise ValueError(
      f"frame embeddings are {embedding.shape[1]} wide, expected"
      f" {config.embedding_dim}; change SelectorConfig.embedding_dim"
    )
  if query is not None and query.shape != (config.query_dim,):
    expected = "none" if config.query_dim is None else f"[{config.query_dim}]"
    raise ValueError(
      f"a question embedding of shape {list(query.shape)}, expected"
      f" {expected}; change SelectorConfig.query_dim"
    )
  with jax.named_scope("selector"):
    return _Scorer(config).apply({"params": params}, embedding, mask, query)


def select(
  config: SelectorConfig,
  params: dict,
  embedding: Array,
  mask: Array | None = None,
  query: Array | None = None,
  *,
  relevance_weight: float = 0.0,
  **settings,
) -> Keyframes:
  """`tad.select_keyframes` with the learned score in its priority.

  How it is trained: "soft" and "straight_through" selections give the scorer a
  gradient through `weight` and `embedding`, "stochastic" ones through
  `logprob`, the exact log-probability of the draw.

  Args:
    config: the scorer.
    params: its parameters.
    embedding: float[T, E].
    mask: bool[T] or None.
    query: float[U] or None; for the scorer.
    relevance_weight: w_q of TAD's own `cos(f, query)`, a Python number. For
      encoders that put pictures and words into one space; 0 for none.
    **settings: of `tad.select_keyframes`.

  Returns:
    Keyframes.

  Raises:
    ValueError: widths that are not the config's, or a relevance of what cannot
      be compared.
  """
  if relevance_weight:
    if query is None or config.query_dim != config.embedding_dim:
      raise ValueError(
        f"relevance_weight={relevance_weight} compares frames with a question"
        f" of the same width, got query_dim={config.query_dim},"
        f" embedding_dim={config.embedding_dim} and"
        f" {'no' if query is None else 'a'} question; set it to 0"
      )
    settings |= dict(query=query, relevance_weight=relevance_weight)
  bonus = apply(config, params, embedding, mask, query)
  return tad.select_keyframes(embedding, mask, bonus=bonus, **settings)


def selection_logprob(
  config: SelectorConfig,
  params: dict,
  embedding: Array,
  order: Array,
  mask: Array | None = None,
  query: Array | None = None,
  **settings,
) -> Array:
  """Exact log-probability, under these parameters, of picks that were stored.

  What a policy gradient needs in an update after the draw: the log-probability
  of `Keyframes.order` as the parameters are now.

  Args:
    config: the scorer.
    params: its parameters, differentiable.
    embedding: float[T, E].
    order: int32[K] of `Keyframes.order`.
    mask: bool[T] or None.
    query: float[U] or None.
    **settings: those of `select` at the draw; selection, rng and num_keyframes
      may be among them and are not needed.

  Returns:
    float[] log-probability.
  """
  chex.assert_rank(order, 1)
  drawn = {
    name: settings[name]
    for name in ("temperature", "min_gap")
    if name in settings
  }
  settings = {k: v for k, v in settings.items() if k != "rng"}
  # The priority alone is used; XLA drops what makes the other fields.
  settings |= dict(selection="soft", num_keyframes=order.shape[0])
  score = select(config, params, embedding, mask, query, **settings).score
  return tad.selection_logprob(score, order, mask, **drawn)
