"""What bfloat16 costs, ours and transformers', and what float32 pieces save.

  python -m benchmarks.bf16_drift

needs the `parity` extra. A random Qwen2.5-VL of a few million parameters and
weights that are exact in bfloat16 reads a prompt whose positions go beyond
1000. Every line compares logits of a bfloat16 forward pass with those of
transformers in float32: root mean square and maximum of the difference, the
mean KL divergence, and the root mean square of the error of a token's
log-probability. The lower lines take float32 away from one piece at a time.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from cf_jax.models import config as model_config
from cf_jax.models import decoder, layers, rope, vlm
from tests.parity import conftest, reference, specs

SEED = 0
SPEC = specs.Spec(
  text=dict(
    vocab_size=1009,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_parameters=dict(
      rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12]
    ),
  ),
  vision=dict(
    depth=8,
    hidden_size=128,
    intermediate_size=320,
    num_heads=4,
    patch_size=14,
    temporal_patch_size=2,
    spatial_merge_size=2,
    window_size=112,
    fullatt_block_indexes=[3, 7],
    tokens_per_second=2,
  ),
  tied=False,
  side="right",
  rows=(
    (40, specs.Media((4, 10, 14), 120.0), 300),
    (200, specs.Media((1, 18, 10)), 300),
  ),
)


def _short(x):
  """Rounded to bfloat16."""
  return x.astype(jnp.bfloat16)


@contextlib.contextmanager
def short_positions() -> Iterator[None]:
  """Positions and the angles made of them."""
  exact = rope.mrope

  def mrope(position, **settings):
    return exact(_short(position), **settings)

  with mock.patch.object(rope, "mrope", mrope):
    yield


@contextlib.contextmanager
def short_rotation() -> Iterator[None]:
  """Sines, cosines and the rotated sums (as transformers has them)."""

  def rotate(x, cos, sin):
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = (a[..., None, :].astype(x.dtype) for a in (cos, sin))
    return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1
    )

  with mock.patch.object(rope, "rotate", rotate):
    yield


@contextlib.contextmanager
def short_norms() -> Iterator[None]:
  """Squares, their mean and the root."""

  def rms_norm(self, x):
    scale = self.get_variable("params", "scale")
    square = jnp.mean(jnp.square(x), axis=-1, keepdims=True, dtype=x.dtype)
    return x * jax.lax.rsqrt(square + self.eps) * scale.astype(x.dtype)

  with mock.patch.object(layers.RMSNorm, "__call__", rms_norm):
    yield


@contextlib.contextmanager
def short_softmax() -> Iterator[None]:
  """Scores, exponentials and their sum."""

  def attend(query, key, value, mask, *, implementation, causal=False):
    del implementation
    rows, slots, heads, width = query.shape
    query = query.reshape(rows, slots, key.shape[2], -1, width)
    score = jnp.einsum("BQMRH,BSMH->BMRQS", query, key) * width**-0.5
    if mask is not None:
      score = jnp.where(mask[:, None, None], score, -1e30)
    if causal:
      score = jnp.where(jnp.tri(slots, dtype=bool), score, -1e30)
    weight = jax.nn.softmax(_short(score), axis=-1)
    mixed = jnp.einsum("BMRQS,BSMH->BQMRH", weight, value)
    return mixed.reshape(rows, slots, heads, width)

  with mock.patch.object(layers, "attend", attend):
    yield


@contextlib.contextmanager
def short_logits() -> Iterator[None]:
  """The head's output."""
  exact = decoder.logits

  def logits(config, params, hidden):
    return _short(exact(config, params, hidden)).astype(jnp.float32)

  with mock.patch.object(decoder, "logits", logits):
    yield


PIECES = {
  "positions": short_positions,
  "rotation": short_rotation,
  "norm statistics": short_norms,
  "scores and softmax": short_softmax,
  "logits": short_logits,
}


def measure(
  logits: np.ndarray, exact: np.ndarray, batch: dict[str, np.ndarray]
) -> tuple[float, float, float, float]:
  """RMS and maximum over real slots, KL, RMS of the ids' log-probabilities."""
  real = conftest.real_slots(batch)
  error = (logits - exact)[real]
  ids = batch["input_ids"][:, 1:, None]
  score, exact_score = (
    np.take_along_axis(conftest.logprob(x[:, :-1]), ids, axis=-1)[..., 0]
    for x in (logits, exact)
  )
  off = (score - exact_score)[real[:, 1:]]
  kl = conftest.divergence(exact[real], logits[real])
  return (
    float(np.sqrt(np.mean(error**2))),
    float(np.abs(error).max()),
    float(kl.mean()),
    float(np.sqrt(np.mean(off**2))),
  )


def run_ours(
  config: model_config.VLMConfig,
  params: dict,
  batch: dict[str, np.ndarray],
  piece: Callable[[], contextlib.AbstractContextManager],
) -> np.ndarray:
  """Logits with a piece changed; nothing compiled before is used again."""
  with piece():
    jax.clear_caches()
    logits = vlm.forward(config, params, **batch)
  return np.asarray(logits)


def main():
  weights = reference.draw_weights(SPEC, SEED)
  batch = specs.draw_batch(SPEC, SEED)
  config, params = conftest.load_checkpoint(
    reference.hf_config(SPEC).to_json_string(), weights
  )
  short = dataclasses.replace(config, dtype="bfloat16")
  position = rope.rope_index(
    config, **{k: v for k, v in batch.items() if "pixel" not in k}
  )
  exact = reference.run(reference.load(SPEC, weights, "float32"), batch)
  print(
    f"{sum(w.size for w in weights.values()) / 1e6:.1f}M parameters, positions"
    f" up to {position.max()}, logits std {exact.std():.2f}\n"
  )
  print("| | RMS | max | KL, nats | log-prob RMS |\n|---|---|---|---|---|")
  nothing = contextlib.nullcontext
  lines = {
    "transformers": reference.run(
      reference.load(SPEC, weights, "bfloat16"), batch
    ),
    "cf_jax": run_ours(short, params, batch, nothing),
  }
  with jax.default_matmul_precision("highest"):
    lines["cf_jax in float32"] = run_ours(config, params, batch, nothing)
  for name, piece in PIECES.items():
    lines[f"cf_jax, {name} too"] = run_ours(short, params, batch, piece)
  for name, logits in lines.items():
    rms, largest, kl, score = measure(logits, exact, batch)
    print(f"| {name} | {rms:.2g} | {largest:.2g} | {kl:.2g} | {score:.2g} |")


if __name__ == "__main__":
  main()
