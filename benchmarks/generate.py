"""Sampling, ours and transformers', on the same weights and the same prompts.

  python -m benchmarks.generate [--size=100m] [--out=FILE.json]

needs the `parity` extra. A random Qwen2.5-VL in float32 on two cores continues
prompts of text and one image: eight completions of one prompt, and one each of
eight prompts. Greedy ids of all forms are compared before anything is timed;
then the forms take turns, and the table shows best times, their ratios, and the
median of the ratios of the rounds.

- cf_jax: as KF-GRPO samples, `sampling.start`, the decoder's layers taken
  apart and turned ("layers apart"; counted end to end, although a policy needs
  it once for all its prompts), and `sampling.advance`.
- cf_jax, one program: `sampling.generate` over stacked layers.
- transformers: `generate` over repeated rows. (`num_return_sequences` repeats
  the rows too, images included, and refuses greedy search.)
- transformers, own loop: what one can write around the model: the prompt once,
  its cache repeated, then a plain loop of single tokens.

Decode tokens a second are those after the first. The bound of the decode loop
is the decoder's layers and head, read once a token, at the bandwidth of a copy.
"""

import functools
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import app, flags

from benchmarks import peers
from cf_jax import sampling
from cf_jax.models import vlm

_OUT = flags.DEFINE_string("out", "", "also write the results as JSON here")
_SIZE = flags.DEFINE_enum("size", "100m", peers.SIZES, "of the model")
_ROWS = flags.DEFINE_integer("rows", 8, "completions")
_TEXT = flags.DEFINE_integer("text", 256, "text tokens of a prompt")
_SIDE = flags.DEFINE_integer("side", 8, "of the image, in visual tokens")
_TOKENS = flags.DEFINE_integer("tokens", 64, "new tokens")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "of the timed forms")
_CORES = flags.DEFINE_integer("cores", 2, "of both sides")

NO_END = -1  # an id that nobody draws: all rows run to the limit
OURS = "cf_jax"
THEIRS = "transformers"


class Ours:
  """Our forms, jitted for prompts of one shape and `group` rows of each."""

  def __init__(self, config, params, prompts, group, num_tokens):
    self._params = params
    self._args = jax.tree.map(
      jnp.asarray,
      (
        prompts.ours,
        prompts.pixel,
        jnp.zeros((len(prompts.token), 2), jnp.uint32),
        jnp.zeros(config.vocab_size, bool),
      ),
    )
    self._limit = num_tokens
    drawing = dict(eos_id=NO_END, temperature=0.0)
    sizes = dict(num_completions=group, max_tokens=num_tokens)

    def encode(params, pixel):
      return vlm.encode_vision(config, params, pixel, prompts.grid)

    @jax.jit
    def start(params, prompt, pixel, seed, banned):
      visual = encode(params, pixel)
      return sampling.start(
        config, params, prompt, visual, seed, banned, **sizes, **drawing
      )

    @functools.partial(jax.jit, donate_argnums=1)
    def advance(params, decoding, banned):
      return sampling.advance(
        config, params, decoding, num_tokens, banned, **drawing
      )

    @jax.jit
    def whole(params, prompt, pixel, seed, banned):
      visual = encode(params, pixel)
      return sampling.generate(
        config, params, prompt, visual, seed, banned, **sizes, **drawing
      )

    self._start, self._advance, self._whole = start, advance, whole
    self._unstack = jax.jit(
      functools.partial(vlm.unstacked, config, rows=_ROWS.value)
    )

  def in_steps(self) -> tuple[np.ndarray, dict[str, float]]:
    """Ids [rows, tokens] and seconds of the phases."""
    begin = time.perf_counter()
    begun = jax.block_until_ready(self._start(self._params, *self._args))
    prefilled = time.perf_counter()
    apart = jax.block_until_ready(self._unstack(self._params))
    unstacked = time.perf_counter()
    done = self._advance(apart, begun, self._args[-1])
    jax.block_until_ready(done)
    end = time.perf_counter()
    return np.asarray(done.token).reshape(-1, self._limit), {
      "prefill": prefilled - begin,
      "unstack": unstacked - prefilled,
      "decode": end - unstacked,
      "whole": end - begin,
    }

  def at_once(self) -> tuple[np.ndarray, dict[str, float]]:
    """The same by one program over stacked layers."""
    begin = time.perf_counter()
    rollout = jax.block_until_ready(self._whole(self._params, *self._args))
    whole_s = time.perf_counter() - begin
    return np.asarray(rollout.token).reshape(-1, self._limit), {
      "whole": whole_s
    }


class _Clock(transformers.StoppingCriteria):
  """Notes when the first token is there; stops nothing."""

  def __init__(self):
    self.first = None

  def __call__(self, input_ids, scores, **_):
    self.first = self.first or time.perf_counter()
    return torch.zeros(len(input_ids), dtype=torch.bool)


class Theirs:
  """transformers' forms for the same prompts."""

  def __init__(self, model, prompts, group, num_tokens):
    self._model, self._group, self._limit = model, group, num_tokens
    self._single = self._inputs(prompts)
    self._repeated = self._inputs(prompts.repeat(group))
    position = prompts.ours.position
    self._next = torch.from_numpy(1 + position.max((1, 2))).repeat_interleave(
      group
    )

  def _inputs(self, prompts):
    token = torch.from_numpy(prompts.token).long()
    inputs = dict(input_ids=token, attention_mask=torch.ones_like(token))
    if prompts.pixel.size:
      rows, patches, width = prompts.pixel.shape
      pixels = torch.from_numpy(prompts.pixel).reshape(rows * patches, width)
      inputs["pixel_values"] = pixels
      inputs["image_grid_thw"] = torch.tensor([[1, *prompts.grid]] * rows)
    return inputs

  @torch.inference_mode()
  def generate(self) -> tuple[np.ndarray, dict[str, float]]:
    """`generate` over repeated rows."""
    clock = _Clock()
    begin = time.perf_counter()
    ids = self._model.generate(
      **self._repeated,
      max_new_tokens=self._limit,
      do_sample=False,
      eos_token_id=None,
      pad_token_id=0,
      stopping_criteria=transformers.StoppingCriteriaList([clock]),
    )
    end = time.perf_counter()
    return ids[:, -self._limit :].numpy(), {
      "prefill": clock.first - begin,
      "decode": end - clock.first,
      "whole": end - begin,
    }

  @torch.inference_mode()
  def loop(self) -> tuple[np.ndarray, dict[str, float]]:
    """The prompt once, its cache repeated, then token by token."""
    begin = time.perf_counter()
    out = self._model(**self._single, use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    token = out.logits[:, -1].argmax(-1)
    if self._group > 1:
      cache.batch_repeat_interleave(self._group)
      token = token.repeat_interleave(self._group)
    prefilled = time.perf_counter()
    ids = [token]
    for step in range(self._limit - 1):
      out = self._model(
        input_ids=token[:, None],
        position_ids=(self._next + step).expand(3, -1)[..., None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
      )
      token = out.logits[:, -1].argmax(-1)
      ids.append(token)
    end = time.perf_counter()
    return torch.stack(ids, 1).numpy(), {
      "prefill": prefilled - begin,
      "decode": end - prefilled,
      "whole": end - begin,
    }


def measure(config, params, model, prompts, group) -> dict:
  """Checks that ids are equal, then times all forms of one setting."""
  ours = Ours(config, params, prompts, group, _TOKENS.value)
  theirs = Theirs(model, prompts, group, _TOKENS.value)
  cases = {
    OURS: ours.in_steps,
    f"{OURS}, one program": ours.at_once,
    THEIRS: theirs.generate,
    f"{THEIRS}, own loop": theirs.loop,
  }
  expected = theirs.generate()[0]
  for name, run in cases.items():
    differ = int(np.sum(run()[0] != expected))
    if differ:
      raise SystemExit(f"{name}: {differ} of {expected.size} ids differ")
  taken = peers.interleave(
    {name: lambda run=run: run()[1] for name, run in cases.items()},
    _ROUNDS.value,
  )
  # One program shows no phases; its prefill is that of the steps.
  at_once = taken[f"{OURS}, one program"]
  prefill = taken[OURS]["prefill"]
  at_once["decode"] = [
    whole - first for whole, first in zip(at_once["whole"], prefill)
  ]
  return {"ids_equal": int(expected.size), "seconds": taken}


def rows_of(result: dict) -> list[list]:
  """Lines of the table."""
  rows = []
  for setting in ("group", "different"):
    if setting not in result:
      continue
    taken = result[setting]["seconds"]
    base = taken[THEIRS]
    for name, phases in taken.items():
      rate = result["rows"] * (result["tokens"] - 1) / min(phases["decode"])
      bound = result["rows"] / (
        result["read_bytes_per_token"] / result["copy_bytes_per_s"]
      )
      line = [setting, name]
      for phase in ("prefill", "unstack"):
        line.append(min(phases[phase]) if phase in phases else "-")
      line += [rate, rate / bound, min(phases["whole"])]
      for phase in ("decode", "whole"):
        line.append(min(base[phase]) / min(phases[phase]))
        line.append(peers.ratio(base[phase], phases[phase]))
      rows.append(line)
  return rows


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  peers.use_cores(_CORES.value)
  torch.set_num_threads(_CORES.value)
  config = peers.make_config(_SIZE.value)
  params = jax.jit(lambda rng: vlm.init(config, rng))(jax.random.key(0))
  result = {
    "machine": peers.machine(),
    "size": _SIZE.value,
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "rows": _ROWS.value,
    "text": _TEXT.value,
    "visual": _SIDE.value**2,
    "tokens": _TOKENS.value,
    "read_bytes_per_token": peers.read_bytes(config, params),
  }
  model = peers.to_torch(config, params)
  rng = np.random.default_rng(0)
  copies = [peers.copy_bandwidth()]
  for setting, prompt_rows in (("group", 1), ("different", _ROWS.value)):
    prompts = peers.make_prompts(
      config, rng, rows=prompt_rows, text=_TEXT.value, side=_SIDE.value
    )
    result[setting] = measure(
      config, params, model, prompts, _ROWS.value // prompt_rows
    )
    copies.append(peers.copy_bandwidth())
    result["copy_bytes_per_s"] = max(copies)
    result["load_average_end"] = os.getloadavg()[0]
    peers.write(_OUT.value, result)
  print(
    f"{result['parameters'] / 1e6:.0f}M parameters, float32,"
    f" {_CORES.value} cores, {_TEXT.value} + {_SIDE.value**2} prompt tokens,"
    f" {_ROWS.value} x {_TOKENS.value} new ones, {_ROUNDS.value} rounds; copy"
    f" {result['copy_bytes_per_s'] / 1e9:.0f} GB/s; load"
    f" {result['machine']['load_average']:.1f} at the start,"
    f" {result['load_average_end']:.1f} at the end\n"
  )
  print(
    peers.table(
      [
        "prompts",
        "form",
        "prefill, s",
        "layers apart, s",
        "decode tok/s",
        "of the bound",
        "end to end, s",
        "decode, ratio of best",
        "median ratio",
        "end to end, ratio of best",
        "median ratio",
      ],
      rows_of(result),
    )
  )


if __name__ == "__main__":
  app.run(main)
