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

# {"key", "value"}, each float[L, B, S, M, H].
PrefixCache = dict[str, jax.Array]
# {"key", "value"}, each a tuple of L float[B, G, C, M, H]: one buffer a layer
# can be written in place inside a loop.
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
    return x + mlp(norm("mlp_norm")(x))


def init(config: VLMConfig, rng: jax.Array) -> dict:
  """Fresh parameters of the decoder, the embedding table and the head."""
  x = jnp.zeros((1, 1, config.hidden_size), config.dtype)
  angle = jnp.zeros((1, 1, config.head_dim // 2))
  embed_rng, layer_rng, head_rng = jax.random.split(rng, 3)

  def mix(query, key, value):
    return layers.attend(
      query, key, value, None, implementation=config.attention
    )

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


def causal_mask(mask: jax.Array) -> jax.Array:
  """bool[B, S] real slots -> bool[B, S, S]: no later slot, no padding."""
  slots = mask.shape[-1]
  earlier = jnp.tril(jnp.ones((slots, slots), bool))
  return earlier & mask[:, None, :]


def run(
  config: VLMConfig,
  params: dict,
  x: jax.Array,
  position: jax.Array,
  mask: jax.Array,
  *,
  with_cache: bool,
) -> tuple[jax.Array, PrefixCache | None]:
  """Whole sequences, without a cache to start from.

  Args:
    config: the model.
    params: the decoder's parameters.
    x: float[B, S, D] embeddings.
    position: int32[B, 3, S].
    mask: bool[B, S, S] which slots (last axis) a slot attends to.
    with_cache: also return every layer's keys and values.

  Returns:
    float[B, S, D] hidden states after the last norm, and the cache or None.
  """
  cos, sin = _angles(config, position)

  def body(x, layer_params):
    cache = {}

    def mix(query, key, value):
      if with_cache:
        cache.update(key=key, value=value)
      return layers.attend(
        query, key, value, mask, implementation=config.attention
      )

    x = DecoderLayer(config).apply({"params": layer_params}, x, cos, sin, mix)
    return x, cache or None

  x, cache = layers.scan_stack(
    body,
    x.astype(config.dtype),
    params["layers"],
    remat=config.remat,
    unroll=config.scan_unroll,
  )
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
    mask: bool[B, S].
    completion: float[B, G, C, D] embeddings.
    completion_position: int32[B, 3, G, C].
    completion_mask: bool[B, G, C].

  Returns:
    Hidden states after the last norm: float[B, S, D] and float[B, G, C, D].
  """
  rows, slots, width = prompt.shape
  shape = completion.shape[1:3]
  x = jnp.concatenate([prompt, completion.reshape(rows, -1, width)], axis=1)
  position = jnp.concatenate(
    [position, completion_position.reshape(rows, 3, -1)], axis=2
  )
  cos, sin = _angles(config, position)
  prompt_mask = causal_mask(mask)
  own_mask = jnp.tril(jnp.ones((shape[1], shape[1]), bool))
  own_mask = own_mask & completion_mask[:, :, None, :]

  def mix(query, key, value):
    def split(y):
      own = y[:, slots:].reshape(rows, *shape, *y.shape[2:])
      return y[:, :slots], own

    (prompt_query, own_query) = split(query)
    (prompt_key, own_key) = split(key)
    (prompt_value, own_value) = split(value)
    prompt_mixed = layers.attend(
      prompt_query,
      prompt_key,
      prompt_value,
      prompt_mask,
      implementation=config.attention,
    )
    own_mixed = layers.attend_shared(
      own_query,
      prompt_key,
      prompt_value,
      mask,
      own_key,
      own_value,
      own_mask,
      implementation=config.attention,
    )
    own_mixed = own_mixed.reshape(rows, -1, *query.shape[2:])
    return jnp.concatenate([prompt_mixed, own_mixed], axis=1)

  def body(x, layer_params):
    x = DecoderLayer(config).apply({"params": layer_params}, x, cos, sin, mix)
    return x, None

  x, _ = layers.scan_stack(
    body,
    x.astype(config.dtype),
    params["layers"],
    remat=config.remat,
    unroll=config.scan_unroll,
  )
  x = _final_norm(config).apply({"params": params["norm"]}, x)
  return x[:, :slots], x[:, slots:].reshape(completion.shape)


def init_completion_cache(
  config: VLMConfig, num_videos: int, num_completions: int, max_tokens: int
) -> CompletionCache:
  """Empty slots for G completions of C tokens each."""
  shape = (
    num_videos,
    num_completions,
    max_tokens,
    config.num_key_value_heads,
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
  slots = completion_cache["key"][0].shape[2]
  own_mask = (jnp.arange(slots) <= step)[None, None, None]  # [1, 1, 1, C]
  updated = {"key": [], "value": []}
  x = x.astype(config.dtype)
  for layer in range(config.num_hidden_layers):

    def write(name, new, layer=layer):
      updated[name].append(
        jax.lax.dynamic_update_slice_in_dim(
          completion_cache[name][layer], new[:, :, None], step, axis=2
        )
      )
      return updated[name][-1]

    def mix(query, key, value, layer=layer, write=write):
      mixed = layers.attend_shared(
        query[:, :, None],
        prefix_cache["key"][layer],
        prefix_cache["value"][layer],
        prefix_mask,
        write("key", key),
        write("value", value),
        own_mask,
        implementation=config.attention,
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
  return jnp.einsum(
    "...D,VD->...V",
    hidden.astype(config.dtype),
    head(config, params).astype(config.dtype),
    preferred_element_type=jnp.float32,
  )
