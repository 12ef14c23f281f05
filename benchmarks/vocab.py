"""Memory and time of log-probabilities over a large vocabulary.

  python -m benchmarks.vocab [--out=FILE.json] [--dtype=bfloat16] [--tiny]

Log-probabilities and entropies of tokens from hidden states and the head, with
both gradients, in three forms: `plain` holds logits of all words
(`grpo.token_logprobs`), `words` goes over the vocabulary in chunks
(`vocabulary.token_logprobs`), `tokens` runs the plain form over blocks of
tokens and makes each block's logits again in the backward pass.

Memory is what the compiler reserves beside arguments and results
(`memory_analysis`), for a vocabulary of 151,936 words and a width of 2,048;
these programs are compiled and not run. Time is measured at a smaller width,
all forms in turn in every round, next to a square matmul; ratios are taken
round by round and their median is shown. Useful work is that of the plain
form's three matmuls, 6 x tokens x words x width.
"""

import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from cf_jax import grpo, vocabulary

_OUT = flags.DEFINE_string("out", "", "also write the results as JSON here")
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "of hidden states and head"
)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "of the timed forms")
_WIDTH = flags.DEFINE_integer("width", 256, "of the timed forms")
_TOKENS = flags.DEFINE_integer("tokens", 512, "of the timed forms")
_TINY = flags.DEFINE_bool("tiny", False, "a small vocabulary: is all in order?")

BLOCKS = (4, 16)


class Case(NamedTuple):
  """What is compared.

  Attributes:
    words: of the vocabulary.
    width: of the programs whose memory is told.
    tokens: of these programs.
    chunks: words at once.
    default: what `model.vocab_chunk` becomes.
    matmul: side of the square one beside the timed forms.
  """

  words: int = 151_936
  width: int = 2_048
  tokens: tuple[int, ...] = (512, 1_024, 2_048, 4_096, 8_192)
  chunks: tuple[int, ...] = (4_748, 9_496, 18_992, 37_984)
  default: int = 9_496  # of a vocab_chunk of 16,384
  matmul: int = 2_048


TINY = Case(1_024, 64, (64,), (256,), 256, 128)


def case() -> Case:
  return TINY if _TINY.value else Case()


def plain(hidden, table, token, banned):
  logits = jnp.einsum(
    "ND,VD->NV", hidden, table, preferred_element_type=jnp.float32
  )
  return grpo.token_logprobs(logits, token, banned)


def in_token_blocks(num_blocks, hidden, table, token, banned):
  block = jax.checkpoint(plain, prevent_cse=False)
  logprob, entropy = jax.lax.map(
    lambda part: block(part[0], table, part[1], banned),
    (
      hidden.reshape(num_blocks, -1, hidden.shape[-1]),
      token.reshape(num_blocks, -1),
    ),
  )
  return logprob.reshape(-1), entropy.reshape(-1)


def forms() -> dict[str, Callable]:
  """Name -> function of hidden, table, token and banned."""
  made = {"plain": plain}
  for chunk in case().chunks:
    made[f"words, {chunk:,} at once"] = functools.partial(
      vocabulary.token_logprobs, chunk=chunk
    )
  for count in BLOCKS:
    made[f"tokens, in {count} blocks"] = functools.partial(
      in_token_blocks, count
    )
  return made


def update(form, hidden, table, token, banned, weight):
  """A loss of both results, and its gradients by hidden and table."""

  def loss(hidden, table):
    logprob, entropy = form(hidden, table, token, banned)
    return jnp.sum(weight * (logprob + 0.1 * entropy))

  return jax.value_and_grad(loss, argnums=(0, 1))(hidden, table)


def score(form, hidden, table, token, banned, weight):
  """Log-probabilities alone, as of a reference policy."""
  del weight
  return form(hidden, table, token, banned)[0]


def shapes(num_tokens: int, width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
  """The arguments of `update` and `score`."""
  return (
    jax.ShapeDtypeStruct((num_tokens, width), _DTYPE.value),
    jax.ShapeDtypeStruct((case().words, width), _DTYPE.value),
    jax.ShapeDtypeStruct((num_tokens,), jnp.int32),
    jax.ShapeDtypeStruct((case().words,), bool),
    jax.ShapeDtypeStruct((num_tokens,), jnp.float32),
  )


def compile_form(step, form, num_tokens, width):
  return (
    jax.jit(functools.partial(step, form))
    .lower(*shapes(num_tokens, width))
    .compile()
  )


def measure_memory() -> list[dict]:
  """Temporary bytes of every form, program and number of tokens."""
  chosen = {
    "plain": plain,
    "words": functools.partial(vocabulary.token_logprobs, chunk=case().default),
    "tokens": functools.partial(in_token_blocks, BLOCKS[-1]),
  }
  rows = []
  for num_tokens in case().tokens:
    row = {"tokens": num_tokens}
    for name, form in chosen.items():
      for step in (update, score):
        made = compile_form(step, form, num_tokens, case().width)
        row[f"{name}_{step.__name__}_bytes"] = (
          made.memory_analysis().temp_size_in_bytes
        )
    rows.append(row)
  return rows


def seconds(program: Callable, *args: jax.Array) -> float:
  begin = time.perf_counter()
  jax.block_until_ready(program(*args))
  return time.perf_counter() - begin


def measure_time() -> dict:
  """Seconds of every form in every round, and of the matmul beside them.

  Raises:
    AssertionError: the forms do not agree.
  """
  num_tokens, width, words = _TOKENS.value, _WIDTH.value, case().words
  rng = np.random.default_rng(0)
  args = jax.device_put(
    (
      jnp.asarray(rng.standard_normal((num_tokens, width)), _DTYPE.value),
      jnp.asarray(0.1 * rng.standard_normal((words, width)), _DTYPE.value),
      rng.integers(8, words, num_tokens, np.int32),
      np.arange(words) < 8,
      rng.standard_normal(num_tokens).astype(np.float32),
    )
  )
  programs = {
    (step.__name__, name): compile_form(step, form, num_tokens, width)
    for step in (update, score)
    for name, form in forms().items()
  }
  tolerance = 1e-4 if _DTYPE.value == "float32" else 0.02
  wanted = None
  for (step, name), program in programs.items():  # also the warm-up
    found = jax.tree.leaves(jax.block_until_ready(program(*args)))
    if name == "plain":
      wanted = found
    for left, right in zip(found, wanted, strict=True):
      left, right = (x.astype(jnp.float32) for x in (left, right))
      error = jnp.max(jnp.abs(left - right)) / jnp.max(jnp.abs(right))
      assert error < tolerance, (step, name, float(error))
    del found
  square = jnp.ones((case().matmul, case().matmul), _DTYPE.value)
  matmul = jax.jit(jnp.matmul)
  jax.block_until_ready(matmul(square, square))
  rounds = []
  for _ in range(_ROUNDS.value):
    took = {"matmul": seconds(matmul, square, square)}
    for key, program in programs.items():
      took[key] = seconds(program, *args)
    rounds.append(took)
  peak = 2 * case().matmul ** 3 / min(took["matmul"] for took in rounds)
  rows = []
  for step, name in programs:
    ratio = [took[step, "plain"] / took[step, name] for took in rounds]
    work = (6 if step == "update" else 2) * num_tokens * words * width
    best = min(took[step, name] for took in rounds)
    rows.append(
      {
        "program": step,
        "form": name,
        "seconds": [took[step, name] for took in rounds],
        "best_s": best,
        "speed_median": statistics.median(ratio),
        "speed_range": [min(ratio), max(ratio)],
        "matmul_peak_share": work / best / peak,
      }
    )
  matmul_s = [took["matmul"] for took in rounds]
  return {
    "tokens": num_tokens,
    "width": width,
    "matmul_flops": peak,
    "matmul_spread": max(matmul_s) / min(matmul_s),
    "rows": rows,
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  device = jax.devices()[0]
  result = {
    "device": device.device_kind,
    "dtype": _DTYPE.value,
    "words": case().words,
    "memory": {
      "width": case().width,
      "chunk": case().default,
      "token_blocks": BLOCKS[-1],
      "rows": measure_memory(),
    },
    "time": measure_time(),
  }
  mib = 2**20
  print(
    f"{device.device_kind}, {_DTYPE.value}, {case().words:,} words\n\nTemporary"
    f" MiB at width {case().width:,}; words: {case().default:,} at once,"
    f" tokens: {BLOCKS[-1]} blocks\n"
  )
  print("| tokens | program | plain | words | plain / words | tokens |")
  print("|---|---|---|---|---|---|")
  for row in result["memory"]["rows"]:
    for step in ("update", "score"):
      whole, words, blocks = (
        row[f"{name}_{step}_bytes"] for name in ("plain", "words", "tokens")
      )
      print(
        f"| {row['tokens']:,} | {step} | {whole / mib:,.0f} |"
        f" {words / mib:,.0f} | {whole / words:.1f} | {blocks / mib:,.0f} |"
      )
  timed = result["time"]
  print(
    f"\nTime of {timed['tokens']:,} tokens at width {timed['width']:,};"
    f" matmul peak {timed['matmul_flops'] / 1e9:,.0f} GFLOP/s, its slowest"
    f" round {timed['matmul_spread']:.2f} times its best\n"
  )
  print("| program | form | best, ms | speed to plain (range) | of peak |")
  print("|---|---|---|---|---|")
  for row in timed["rows"]:
    low, high = row["speed_range"]
    print(
      f"| {row['program']} | {row['form']} | {1e3 * row['best_s']:,.0f} |"
      f" {row['speed_median']:.2f} ({low:.2f} to {high:.2f}) |"
      f" {row['matmul_peak_share']:.0%} |"
    )
  if _OUT.value:
    pathlib.Path(_OUT.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
