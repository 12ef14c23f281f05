"""The language decoder: whole sequences, shared prompts, and cached decoding.

One layer serves every use; what differs is the function `mix` that a use gives
it, from rotated queries, keys and values to the attended values. The cache is
an argument and a result.

Axes: `B` videos, `G` completions per video, `S` prompt slots, `C` completion
slots, `D` model width, `N` query heads, `M` key/value heads, `H` head width,
`V` vocabulary, `L` layers.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from cf_jax.models import layers, rope
from cf_jax.models.config import VLMConfig
from cf_jax.runtime import sharding

# Caches are {"key", "value"}, each a tuple of one buffer a layer: a loop over
# tokens reads, and writes, each where it lies. Heads come before slots, as
# matmuls want them; otherwise every step would copy them so.
# L float[B, M, S, H].
PrefixCache = dict[str, tuple[jax.Array, ...]]
# L float[B, G, M, C, H].
CompletionCache = dict[str, tuple[jax.Array, ...]]
Mix = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class DecoderLayer(nn.Module):
  """One layer; its parameters are stacked over the layers by the caller."""

  config: VLMConfig

  @nn.compact
  def __call__(self, x, cos, sin, mix: Mix):
    """[B, S, D], [B, S, H / 2] twice -> [B, S, D]."""
    config = self.config
    settings = dict(
      std=config.initializer_range,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
    )

    def norm(name):
      return layers.RMSNorm(config.rms_norm_eps, config.param_dtype, name=name)

    def project(num_heads, name):
      return layers.linear(
        (num_heads, config.head_dim), use_bias=True, name=name, **settings
      )

    x = sharding.over_batch(x, config.mesh)
    y = norm("attention_norm")(x)
    query = project(config.num_attention_heads, "query")(y)
    key = project(config.num_key_value_heads, "key")(y)
    value = project(config.num_key_value_heads, "value")(y)
    mixed = mix(rope.rotate(query, cos, sin), rope.rotate(key, cos, sin), value)
    x = x + layers.linear(
      config.hidden_size,
      axis=(-2, -1),
      use_bias=False,
      name="out",
      **settings,
    )(mixed)
    mlp = layers.SwiGLU(
      width=config.intermediate_size, use_bias=False, name="mlp", **settings
    )
    return sharding.over_batch(x + mlp(norm("mlp_norm")(x)), config.mesh)


def init(config: VLMConfig, rng: jax.Array) -> dict:
  """Fresh parameters of the decoder, the embedding table and the head."""
  x = jnp.zeros((1, 1, config.hidden_size), config.dtype)
  angle = jnp.zeros((1, 1, config.head_dim // 2))
  embed_rng, layer_rng, head_rng = jax.random.split(rng, 3)

  def mix(query, key, value):
    return layers.attend(query, key, value, None, implementation="xla")

  def table(key):
    draw = nn.initializers.normal(config.initializer_range)
    shape = (config.vocab_size, config.hidden_size)
    return {"embedding": draw(key, shape, config.param_dtype)}

  params = {
    "embed": table(embed_rng),
    "layers": layers.init_stack(
      DecoderLayer(config),
      layer_rng,
      config.num_hidden_layers,
      x,
      angle,
      angle,
      mix,
    ),
    "norm": _final_norm(config).init(rng, x)["params"],
  }
  if not config.tie_word_embeddings:
    params["head"] = table(head_rng)
  return params


def _final_norm(config):
  return layers.RMSNorm(config.rms_norm_eps, config.param_dtype)


def _angles(config, position):
  return rope.mrope(
    position, section=config.mrope_section, theta=config.rope_theta
  )


def run(
  config: VLMConfig,
  params: dict,
  x: jax.Array,
  position: jax.Array,
  mask: jax.Array,
  *,
  with_cache: bool,
) -> tuple[jax.Array, PrefixCache | None]:
  """Whole sequences, causal, without a cache to start from.

  Args:
    config: the model.
    params: the decoder's parameters.
    x: float[B, S, D] embeddings.
    position: int32[B, 3, S].
    mask: bool[B, S] real slots, at the start of a row (only the attention of
      "cudnn" needs them there).
    with_cache: also return every layer's keys and values.

  Returns:
    float[B, S, D] hidden states after the last norm, finite and without
    meaning in padded slots, and the cache or None.
  """
  cos, sin = _angles(config, position)
  x = _split(config, x)

  def body(x, layer_params):
    cache = {}

    def mix(query, key, value):
      if with_cache:
        cache.update(key=key.swapaxes(1, 2), value=value.swapaxes(1, 2))
      if config.context > 1:
        return layers.attend_packed_split(
          query,
          key,
          value,
          mask,
          jnp.zeros((len(mask), 0, 0), bool),  # no completions
          mesh=config.mesh,
          implementation=config.attention,
        )
      return layers.attend(
        query,
        key,
        value,
        mask[:, None],
        implementation=config.attention,
        causal=True,
        mesh=config.mesh,
      )

    x = DecoderLayer(config).apply({"params": layer_params}, x, cos, sin, mix)
    return _split(config, x), cache or None

  x, cache = layers.scan_stack(
    body,
    x.astype(config.dtype),
    params["layers"],
    remat=config.remat,
    unroll=config.scan_unroll,
  )
  if cache is not None:
    cache = {name: tuple(stacked) for name, stacked in cache.items()}
  return _final_norm(config).apply({"params": params["norm"]}, x), cache


def run_packed(
  config: VLMConfig,
  params: dict,
  prompt: jax.Array,
  position: jax.Array,
  mask: jax.Array,
  completion: jax.Array,
  completion_position: jax.Array,
  completion_mask: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """A prompt once, and G completions that continue it.

  Prompt slots are causal; a completion's slots attend to the real prompt slots
  and to their own earlier ones. The same numbers and gradients as G repeated
  prompts.

  Args:
    config: the model.
    params: the decoder's parameters.
    prompt: float[B, S, D] embeddings.
    position: int32[B, 3, S].
    mask: bool[B, S], padding at the end.
    completion: float[B, G, C, D] embeddings.
    completion_position: int32[B, 3, G, C].
    completion_mask: bool[B, G, C], padding at the end.

  Returns:
    Hidden states after the last norm: float[B, S, D] and float[B, G, C, D].
  """
  if config.context > 1:
    return _run_packed_split(
      config,
      params,
      prompt,
      position,
      mask,
      completion,
      completion_position,
      completion_mask,
    )
  rows, slots, width = prompt.shape
  x = jnp.concatenate([prompt, completion.reshape(rows, -1, width)], axis=1)
  position = jnp.concatenate(
    [position, completion_position.reshape(rows, 3, -1)], axis=2
  )

  def mix(query, key, value):
    return layers.attend_packed(
      query,
      key,
      value,
      mask,
      completion_mask,
      implementation=config.attention,
      mesh=config.mesh,
    )

  x = _through(config, params, x, position, mix)
  return x[:, :slots], x[:, slots:].reshape(completion.shape)


def _run_packed_split(
  config,
  params,
  prompt,
  position,
  mask,
  completion,
  completion_position,
  completion_mask,
):
  """`run_packed` over the context axis; groups are filled up to its size."""
  rows, slots, width = prompt.shape
  group, length = completion_mask.shape[1:]
  more = -group % config.context

  def fill(x, axis):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, more)
    return jnp.pad(x, widths)

  completion_mask = fill(completion_mask, 1)
  x = layers.weave(
    prompt,
    fill(completion, 1).reshape(rows, -1, width),
    config.context,
  )
  position = layers.weave(
    position.swapaxes(1, 2),
    fill(completion_position, 2).reshape(rows, 3, -1).swapaxes(1, 2),
    config.context,
  ).swapaxes(1, 2)

  def mix(query, key, value):
    return layers.attend_packed_split(
      query,
      key,
      value,
      mask,
      completion_mask,
      mesh=config.mesh,
      implementation=config.attention,
    )

  x = _through(config, params, x, position, mix)
  hidden, own = layers.unweave(x, slots, config.context)
  return hidden, own.reshape(rows, -1, length, width)[:, :group]


def run_segments(
  config: VLMConfig,
  params: dict,
  x: jax.Array,
  position: jax.Array,
  segment: jax.Array,
) -> jax.Array:
  """Rows of several sequences, each causal and blind to the others.

  Args:
    config: the model.
    params: the decoder's parameters.
    x: float[B, S, D] embeddings.
    position: int32[B, 3, S].
    segment: int32[B, S] number of a slot's sequence, 0 for padding.

  Returns:
    float[B, S, D] hidden states after the last norm, finite and without
    meaning in padded slots.
  """

  def mix(query, key, value):
    if config.context > 1:
      return layers.attend_segments_split(
        query,
        key,
        value,
        segment,
        mesh=config.mesh,
        implementation=config.attention,
      )
    return layers.attend_segments(
      query,
      key,
      value,
      segment,
      implementation=config.attention,
      mesh=config.mesh,
    )

  return _through(config, params, x, position, mix)


def _through(config, params, x, position, mix):
  """All layers and the last norm, without a cache."""
  cos, sin = _angles(config, position)
  x = _split(config, x)

  def body(x, layer_params):
    x = DecoderLayer(config).apply({"params": layer_params}, x, cos, sin, mix)
    return _split(config, x), None

  x, _ = layers.scan_stack(
    body,
    x.astype(config.dtype),
    params["layers"],
    remat=config.remat,
    unroll=config.scan_unroll,
  )
  return _final_norm(config).apply({"params": params["norm"]}, x)


def _split(config, x):
  """[B, slots, D], over the devices of the context axis where there are some.

  Raises:
    ValueError: they cannot have equal parts.
  """
  if config.context == 1:
    return x
  if x.shape[1] % config.context:
    raise ValueError(
      f"a row of {x.shape[1]} slots does not divide over"
      f" config.mesh.context={config.context} devices; make"
      " config.prompt.max_tokens a multiple of it"
    )
  return layers.split_slots(x, config.mesh)


def init_completion_cache(
  config: VLMConfig, num_videos: int, num_completions: int, max_tokens: int
) -> CompletionCache:
  """Empty slots for G completions of C tokens each."""
  shape = (
    num_videos,
    num_completions,
    config.num_key_value_heads,
    max_tokens,
    config.head_dim,
  )
  return {
    name: tuple(
      jnp.zeros(shape, config.dtype) for _ in range(config.num_hidden_layers)
    )
    for name in ("key", "value")
  }


def decode(
  config: VLMConfig,
  params: dict,
  x: jax.Array,
  position: jax.Array,
  prefix_cache: PrefixCache,
  prefix_mask: jax.Array,
  completion_cache: CompletionCache,
  step: jax.Array,
) -> tuple[jax.Array, CompletionCache]:
  """One token of each of G completions that share a prompt's cache.

  The loop over layers is unrolled: inside the caller's loop over tokens, a
  layer's slice of the parameters and of the prompt's cache is then taken once.

  Args:
    config: the model.
    params: the decoder's parameters.
    x: float[B, G, D] embeddings of the newest tokens.
    position: int32[B, 3, G].
    prefix_cache: of the prompt, from `run`; read in place.
    prefix_mask: bool[B, S] real prompt slots.
    completion_cache: the tokens' keys and values go to slot `step`.
    step: int32[] how many tokens the completions already hold.

  Returns:
    float[B, G, D] hidden states after the last norm, and the updated cache.
  """
  cos, sin = _angles(config, position)
  slots = completion_cache["key"][0].shape[3]
  own_mask = (jnp.arange(slots) <= step)[None, None, None]  # [1, 1, 1, C]
  updated = {"key": [], "value": []}
  x = x.astype(config.dtype)
  for layer in range(config.num_hidden_layers):

    def write(name, new, layer=layer):
      updated[name].append(
        jax.lax.dynamic_update_slice_in_dim(
          completion_cache[name][layer], new[:, :, :, None], step, axis=3
        )
      )
      return updated[name][-1].swapaxes(2, 3)

    def mix(query, key, value, layer=layer, write=write):
      mixed = layers.attend_shared(
        query[:, :, None],
        prefix_cache["key"][layer].swapaxes(1, 2),
        prefix_cache["value"][layer].swapaxes(1, 2),
        prefix_mask,
        write("key", key),
        write("value", value),
        own_mask,
      )
      return mixed[:, :, 0]

    layer_params = layers.take_layer(params["layers"], layer)
    x = DecoderLayer(config).apply({"params": layer_params}, x, cos, sin, mix)
  hidden = _final_norm(config).apply({"params": params["norm"]}, x)
  return hidden, {name: tuple(rows) for name, rows in updated.items()}


def head(config: VLMConfig, params: dict) -> jax.Array:
  """The output table, float[V, D] as it is stored."""
  name = "embed" if config.tie_word_embeddings else "head"
  return params[name]["embedding"]


def logits(config: VLMConfig, params: dict, hidden: jax.Array) -> jax.Array:
  """Scores of the next token, float[..., D] -> float32[..., V].

  float32 because differences of log-probabilities of rare tokens are what the
  policy gradient is made of.
  """
  return layers.times_table(
    hidden.astype(config.dtype),
    head(config, params).astype(config.dtype),
    jnp.float32,
  )
