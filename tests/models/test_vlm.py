"""One model, three uses: whole sequences, shared prompts, cached decoding.

Axes: `B` prompts, `G` completions, `S` prompt slots, `C` completion slots.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from cf_jax.models import lora, vlm

B, G, S, C = 3, 2, 9, 4
LENGTH = (9, 5, 7)  # real prompt slots
TOKENS = ((4, 2), (1, 3), (4, 4))  # real completion tokens
JIT = pytest.mark.parametrize(
  "transform", [jax.jit, lambda f: f], ids=["jit", "no_jit"]
)


class Case(NamedTuple):
  token: jax.Array  # int32[B, S]
  position: jax.Array  # int32[B, 3, S]
  mask: jax.Array  # bool[B, S]
  visual: jax.Array  # int32[B, S]
  visual_tokens: jax.Array  # float32[B, 4, D]
  completion: jax.Array  # int32[B, G, C]
  completion_mask: jax.Array  # bool[B, G, C]


@pytest.fixture(scope="module")
def case(config):
  """Prompts with one 2 x 2 picture after their first token, then text.

  The time axis of row 0 runs past its other axes, as in a long video.
  """
  rng = np.random.default_rng(0)
  mask = np.arange(S) < np.array(LENGTH)[:, None]
  visual = np.full((B, S), -1)
  visual[:, 1:5] = rng.permuted(np.tile(np.arange(4), (B, 1)), axis=1)
  position = np.empty((B, 3, S), np.int64)
  position[:, :, 0] = 0
  position[:, :, 1:5] = [[1, 1, 1, 1], [1, 1, 2, 2], [1, 2, 1, 2]]
  position[:, :, 5:] = 3 + np.arange(S - 5)
  position[0, 0, 1:5] = [1, 1, 6, 6]
  position[0, :, 5:] += 4
  position = np.where(mask[:, None], position, 99)  # nothing may read these
  return Case(
    token=jnp.asarray(rng.integers(0, config.vocab_size, (B, S))),
    position=jnp.asarray(position),
    mask=jnp.asarray(mask),
    visual=jnp.asarray(visual),
    visual_tokens=jnp.asarray(
      rng.normal(size=(B, 4, config.hidden_size)), jnp.float32
    ),
    completion=jnp.asarray(rng.integers(0, config.vocab_size, (B, G, C))),
    completion_mask=jnp.asarray(np.arange(C) < np.array(TOKENS)[:, :, None]),
  )


def start_of(case):
  """Where the completions' positions start: [B]."""
  return 1 + jnp.max(
    jnp.where(case.mask[:, None], case.position, 0), axis=(1, 2)
  )


def packed_logits(config, params, case):
  embedded = vlm.embed(
    config, params, case.token, case.visual, case.visual_tokens
  )
  _, hidden = vlm.packed(
    config,
    params,
    embedded,
    case.position,
    case.mask,
    case.completion,
    case.completion_mask,
  )
  return vlm.logits(config, params, hidden)


def repeated_logits(config, params, case):
  """Each completion behind its own copy of the prompt, no gap between."""
  fixed = jax.tree.map(np.asarray, case._replace(visual_tokens=None))
  token, position, mask, visual = [], [], [], []
  for b, length in enumerate(LENGTH):
    # A prompt's real slots, then the completion's, then padding.
    source = np.r_[:length, S : S + C - 1, length:S]
    start = 1 + np.max(fixed.position[b][:, :length])
    after = np.tile(start + np.arange(C - 1), (3, 1))
    for g in range(G):
      token.append(np.r_[fixed.token[b], fixed.completion[b, g, :-1]][source])
      mask.append(
        np.r_[fixed.mask[b], fixed.completion_mask[b, g, :-1]][source]
      )
      visual.append(np.r_[fixed.visual[b], np.full(C - 1, -1)][source])
      position.append(
        np.concatenate([fixed.position[b], after], axis=1)[:, source]
      )
  logits = FORWARD(
    config,
    params,
    *map(np.array, (token, position, mask, visual)),
    jnp.repeat(case.visual_tokens, G, axis=0),
  )
  slot = np.array(LENGTH)[:, None] - 1 + np.arange(C)
  row = np.arange(B * G).reshape(B, G, 1)
  return logits[row, slot[:, None]]


def decoded_logits(config, params, case):
  embedded = vlm.embed(
    config, params, case.token, case.visual, case.visual_tokens
  )
  hidden, cache = vlm.prefill(
    config, params, embedded, case.position, case.mask
  )
  last = hidden[jnp.arange(B), jnp.array(LENGTH) - 1]
  hidden = jnp.broadcast_to(last[:, None], (B, G, last.shape[-1]))

  def body(carry, step):
    cache_own = carry
    position = jnp.broadcast_to(
      (start_of(case) + step)[:, None, None], (B, 3, G)
    )
    hidden, cache_own = vlm.decode_step(
      config,
      params,
      case.completion[:, :, step],
      position,
      cache,
      case.mask,
      cache_own,
      step,
    )
    return cache_own, hidden

  own = vlm.init_completion_cache(config, B, G, C)
  _, later = jax.lax.scan(body, own, jnp.arange(C - 1))
  hidden = jnp.concatenate([hidden[None], later])
  return vlm.logits(config, params, jnp.moveaxis(hidden, 0, 2))


PACKED = jax.jit(packed_logits, static_argnums=0)
FORWARD = jax.jit(vlm.sequence_logits, static_argnums=0)
DECODED = jax.jit(decoded_logits, static_argnums=0)


def assert_close(ours, expected, atol=2e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4),
    ours,
    expected,
  )


def real(case, logits):
  """Only the slots that predict a real token."""
  return jnp.where(case.completion_mask[..., None], logits, 0)


@pytest.mark.parametrize(
  "packed", [PACKED, packed_logits], ids=["jit", "no_jit"]
)
def test_packed_equals_repeated_prompts(config, params, case, packed):
  ours = packed(config, params, case)
  expected = repeated_logits(config, params, case)
  assert ours.shape == (B, G, C, config.vocab_size)
  assert ours.dtype == jnp.float32
  assert np.std(ours) > 0.5  # else any tolerance passes
  assert_close(ours, expected)


@pytest.mark.parametrize(
  "decoded", [DECODED, decoded_logits], ids=["jit", "no_jit"]
)
def test_cached_decode_equals_packed(config, params, case, decoded):
  ours = decoded(config, params, case)
  expected = PACKED(config, params, case)
  assert_close(real(case, ours), real(case, expected))


def test_decode_with_layers_apart_equals_packed(config, params, case):
  """Also where adapters lie beside the kernels, which are turned."""
  rng = jax.random.key(1)
  adapters = lora.init(
    params, rng, rank=2, alpha=4.0, modules=["^decoder/layers/"]
  )
  adapters = jax.tree.map(
    lambda x: x + 0.3 * jax.random.normal(rng, x.shape), adapters
  )
  joined = traverse_util.unflatten_dict(
    traverse_util.flatten_dict(params) | traverse_util.flatten_dict(adapters)
  )

  @jax.jit
  def decoded(params):
    apart = params | vlm.unstacked(
      config, params, rows=case.completion[..., 0].size
    )
    return decoded_logits(config, apart, case)

  for tree in (params, joined):
    expected = real(case, PACKED(config, tree, case))
    assert_close(real(case, decoded(tree)), expected)
  assert np.abs(decoded(joined) - decoded(params)).max() > 0.1


def test_packed_gradient_equals_repeated_prompts(config, params, case):
  def grads(logits):
    def loss(params, visual_tokens):
      shown = case._replace(visual_tokens=visual_tokens)
      logprob = jax.nn.log_softmax(logits(config, params, shown))
      logprob = jnp.take_along_axis(
        logprob, case.completion[..., None], axis=-1
      )[..., 0]
      return jnp.sum(jnp.where(case.completion_mask, logprob, 0))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
      params, case.visual_tokens
    )

  (loss, ours), (expected_loss, expected) = map(
    grads, (packed_logits, repeated_logits)
  )
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, atol=1e-4 * max(np.abs(b).max(), 1e-3)
    ),
    ours,
    expected,
  )
  assert np.abs(ours[1]).max() > 0
  # the vision tower had no part in this loss
  assert not any(np.any(g) for g in jax.tree.leaves(ours[0]["vision"]))


def test_run_settings_change_no_number(config, params, case):
  def grads(**change):
    run = dataclasses.replace(config, **change)
    return jax.jit(
      jax.grad(
        lambda decoder: jnp.sum(
          jnp.sin(
            vlm.sequence_logits(
              run,
              {"decoder": decoder},
              case.token,
              case.position,
              case.mask,
              case.visual,
              case.visual_tokens,
            )
          )
        )
      )
    )(params["decoder"])

  expected = grads()
  assert_close(grads(remat="dots"), expected, atol=1e-3)
  assert_close(grads(remat="full", scan_unroll=2), expected, atol=1e-3)


def test_single_token_completions(config, params, case):
  short = case._replace(
    completion=case.completion[:, :, :1],
    completion_mask=case.completion_mask[:, :, :1],
  )
  assert_close(
    PACKED(config, params, short), PACKED(config, params, case)[:, :, :1]
  )


def test_padding_changes_nothing_and_has_no_gradient(config, params, case):
  def run(mask, embedded):
    _, hidden = vlm.packed(
      config,
      params,
      embedded,
      case.position,
      mask,
      case.completion,
      case.completion_mask,
    )
    return jnp.sum(jnp.sin(hidden) * case.completion_mask[..., None]), hidden

  embedded = vlm.embed(
    config, params, case.token, case.visual, case.visual_tokens
  )
  garbage = jnp.where(case.mask[..., None], embedded, 1e3)
  step = jax.jit(jax.value_and_grad(run, argnums=1, has_aux=True))
  (_, hidden), grad = step(case.mask, embedded)
  (_, other), other_grad = step(case.mask, garbage)
  shown = case.completion_mask[..., None]
  assert_close(hidden * shown, other * shown)
  assert_close(grad, other_grad)
  np.testing.assert_array_equal(
    np.where(case.mask[..., None], 0, other_grad), 0
  )

  # A row without any real slot: finite, and it touches no other row.
  (_, hidden), grad = step(case.mask.at[1].set(False), embedded)
  assert np.isfinite(hidden).all() and np.isfinite(grad).all()
  rows = jnp.array([0, 2])
  assert_close(hidden[rows] * shown[rows], other[rows] * shown[rows])


def test_tokens_after_the_end_change_nothing(config, params, case):
  other = case._replace(
    completion=jnp.where(case.completion_mask, case.completion, 7)
  )
  assert_close(
    real(case, PACKED(config, params, case)),
    real(case, PACKED(config, params, other)),
  )


def test_left_padding_equals_right_padding(config, params, case):
  def forward(shift):
    def roll(x):
      return jnp.stack(
        [
          jnp.roll(row, shift * (S - n), axis=-1)
          for row, n in zip(x, LENGTH, strict=True)
        ]
      )

    logits = FORWARD(
      config,
      params,
      roll(case.token),
      roll(case.position),
      roll(case.mask),
      roll(case.visual),
      case.visual_tokens,
    )
    return [
      row[S - n :] if shift else row[:n]
      for row, n in zip(logits, LENGTH, strict=True)
    ]

  assert_close(forward(1), forward(0))


def test_vmap_equals_a_loop_over_prompts(config, params, case):
  def one(row):
    row = jax.tree.map(lambda x: x[None], row)
    return packed_logits(config, params, row)[0]

  mapped = jax.jit(jax.vmap(one))(case)
  one = jax.jit(one)
  for b in range(B):
    assert_close(mapped[b], one(jax.tree.map(lambda x, b=b: x[b], case)))
  assert_close(mapped, PACKED(config, params, case))


def test_prefill_states_are_causal(config, params, case):
  @jax.jit
  def hidden(token):
    embedded = vlm.embed(config, params, token, case.visual, case.visual_tokens)
    return vlm.prefill(config, params, embedded, case.position, case.mask)[0]

  changed = hidden(case.token.at[0, 6].set((case.token[0, 6] + 1) % 40))
  before = hidden(case.token)
  np.testing.assert_array_equal(changed[0, :6], before[0, :6])
  assert (np.abs(changed[0, 6:] - before[0, 6:]).max(axis=-1) > 1e-4).all()


def test_prefix_cache_is_not_copied_to_completions(config, params, case):
  embedded = vlm.embed(
    config, params, case.token, case.visual, case.visual_tokens
  )
  _, cache = jax.eval_shape(
    lambda embedded: vlm.prefill(
      config, params, embedded, case.position, case.mask
    ),
    embedded,
  )
  assert len(cache["key"]) == config.num_hidden_layers
  assert cache["key"][0].shape == (
    B,
    config.num_key_value_heads,
    S,
    config.head_dim,
  )
  own = vlm.init_completion_cache(config, B, G, C)
  assert len(own["value"]) == config.num_hidden_layers
  assert own["value"][0].shape == (
    B,
    G,
    config.num_key_value_heads,
    C,
    config.head_dim,
  )


@JIT
def test_media_are_merged_by_index_only(config, params, case, transform):
  # The id of an image slot is spelled in every slot; only `visual` counts.
  config = dataclasses.replace(config, image_token_id=7, video_token_id=7)
  token = jnp.full((B, S), 7)
  table = params["decoder"]["embed"]["embedding"]

  @transform
  def embed(visual):
    return vlm.embed(config, params, token, visual, case.visual_tokens)

  plain = embed(jnp.full((B, S), -1))
  np.testing.assert_array_equal(plain, jnp.broadcast_to(table[7], plain.shape))
  merged = embed(case.visual)
  for b in range(B):
    np.testing.assert_array_equal(
      merged[b, 1:5], case.visual_tokens[b, case.visual[b, 1:5]]
    )
  np.testing.assert_array_equal(merged[:, 5:], plain[:, 5:])


def test_prompts_without_media(config, params, case):
  text = jnp.full((B, S), -1)
  none = jnp.zeros((B, 0, config.hidden_size))
  np.testing.assert_array_equal(
    vlm.embed(config, params, case.token, text, none),
    vlm.embed(config, params, case.token, text, case.visual_tokens),
  )


def test_a_visual_index_out_of_range_is_loud(config, params, case):
  embedded = vlm.embed(
    config,
    params,
    case.token,
    case.visual.at[0, 1].set(4),
    case.visual_tokens,
  )
  assert np.isnan(embedded[0, 1]).all()
  assert np.isfinite(embedded[0, 2:]).all()


def test_untied_head(config, params, case):
  untied = dataclasses.replace(config, tie_word_embeddings=False)
  fresh = jax.eval_shape(lambda rng: vlm.init(untied, rng), jax.random.key(0))
  shape = (config.vocab_size, config.hidden_size)
  assert fresh["decoder"]["head"]["embedding"].shape == shape
  assert "head" not in params["decoder"]
  own = dict(params["decoder"])
  own["head"] = {"embedding": 2 * own["embed"]["embedding"]}
  hidden = case.visual_tokens
  assert_close(
    vlm.logits(untied, {"decoder": own}, hidden),
    2 * vlm.logits(config, params, hidden),
  )


def test_bfloat16_keeps_float32_where_it_counts(config, params, case):
  low = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
  assert all(
    leaf.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves(
      jax.eval_shape(lambda rng: vlm.init(low, rng), jax.random.key(0))
    )
  )
  cast = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  expected = PACKED(config, params, case)
  for logits in (PACKED, DECODED):
    ours = logits(low, cast, case)
    assert ours.dtype == jnp.float32
    drift = np.abs(real(case, ours) - real(case, expected)).max()
    assert drift < 0.15 * np.std(expected)
