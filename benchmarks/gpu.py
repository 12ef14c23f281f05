"""Update, prefill and decode of 3B and 7B policies on one GPU.

  python -m benchmarks.gpu [--sizes=3b,7b] [--out=FILE.json]

needs what `cf_jax.models` imports (jax, flax, optax, chex) and this repository,
no weights and no other package. Random bfloat16 parameters in the published
shapes. Numbers first: a small model's logits, gradient and greedy ids must
agree between the GPU and the CPU of the same machine, or nothing is timed.

- update: clipped loss with k3 KL, gradient of decoder and head, AdamW with
  moments in bfloat16. Utilisation counts three passes over the real tokens;
  what is computed again does not count.
- prefill, tower: one forward pass.
- decode: bytes of parameters, prompts and completions that one token of all
  rows has to read, over the time it took.

Shares are of a bfloat16 matmul and of a copy measured in the same run; the
data sheet's own peaks are for the reader. Without a GPU the table says
unmeasured; `--tiny` runs every piece at toy sizes on whatever there is.
"""

import functools
import gc
import os
import statistics
import time

# One program at a time, and nobody else on the card.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks import peers
from cf_jax import grpo, policy, sampling
from cf_jax.models import config as model_config
from cf_jax.models import flops, vlm
from cf_jax.types import Prompt, Rollout, View

_OUT = flags.DEFINE_string("out", "", "also write the results as JSON here")
_TINY = flags.DEFINE_bool("tiny", False, "toy sizes, on any device: a check")
_SIZES = flags.DEFINE_list("sizes", ["3b", "7b"], "of the policies")
_ATTENTION = flags.DEFINE_enum(
  "attention", "auto", model_config.ATTENTION, "kernel"
)
_REMAT = flags.DEFINE_enum("remat", "dots", model_config.REMAT, "in updates")
_PROMPTS = flags.DEFINE_integer("prompts", 4, "of an update, B")
_GROUP = flags.DEFINE_integer("group", 8, "completions of a prompt, G")
_SLOTS = flags.DEFINE_integer("slots", 2_048, "tokens of a prompt")
_TOKENS = flags.DEFINE_integer("tokens", 256, "tokens of a completion")
_FRAMES = flags.DEFINE_integer("frames", 32, "that the tower encodes")
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed calls of each phase")

PHASES = ("update", "prefill", "decode", "tower")
UNITS = {
  "update": "tokens/s",
  "prefill": "tokens/s",
  "decode": "tokens/s",
  "tower": "frames/s",
}
GRID = (16, 16)  # of a frame in patches: 64 visual tokens
NO_END = -1


class Sizes:
  """Shapes of one run; tiny ones where only the pieces are checked."""

  def __init__(self, tiny: bool):
    self.prompts = 2 if tiny else _PROMPTS.value
    self.group = 2 if tiny else _GROUP.value
    self.slots = 24 if tiny else _SLOTS.value
    self.tokens = 4 if tiny else _TOKENS.value
    self.frames = 2 if tiny else _FRAMES.value
    self.grid = (8, 8) if tiny else GRID


def make_config(name: str, tiny: bool) -> model_config.VLMConfig:
  """A published shape in bfloat16, or a toy."""
  settings = dict(
    dtype="bfloat16",
    param_dtype="bfloat16",
    attention=_ATTENTION.value,
    remat=_REMAT.value,
  )
  if tiny:
    return peers.make_config("tiny", **settings)
  return model_config.make(size=f"qwen2_5_vl_{name}", **settings)


def init(config) -> dict:
  return jax.jit(lambda rng: vlm.init(config, rng))(jax.random.key(0))


def make_prompt(config, rows: int, slots: int) -> Prompt:
  """Random text; where a slot's embedding is from does not change the cost."""
  rng = np.random.default_rng(0)
  return Prompt(
    token=jnp.asarray(
      rng.integers(1, min(config.vocab_size, 150_000), (rows, slots), np.int32)
    ),
    mask=jnp.ones((rows, slots), bool),
    position=jnp.broadcast_to(
      jnp.arange(slots, dtype=jnp.int32), (rows, 3, slots)
    ),
    visual=jnp.full((rows, slots), -1, jnp.int32),
  )


# --------------------------------------------------------------------- numbers


def check_numbers() -> dict[str, float]:
  """A small model on the default device against the CPU; raises SystemExit."""
  config = peers.make_config("tiny")
  prompts = peers.make_prompts(
    config, np.random.default_rng(0), rows=2, text=24, side=4
  )
  params = jax.device_get(init(config))

  def loss(params, prompt, pixel):
    visual = vlm.encode_vision(config, params, pixel, prompts.grid)
    logits = vlm.sequence_logits(
      config, params, prompt.token, prompt.position, prompt.mask,
      prompt.visual, visual,
    )  # fmt: skip
    logprob, _ = grpo.token_logprobs(
      logits[:, :-1], prompt.token[:, 1:], jnp.zeros(config.vocab_size, bool)
    )
    rollout = sampling.generate(
      config,
      params,
      prompt,
      visual,
      jnp.zeros((2, 2), jnp.uint32),
      jnp.zeros(config.vocab_size, bool),
      num_completions=2,
      max_tokens=8,
      eos_id=NO_END,
      temperature=0.0,
    )
    return -jnp.mean(logprob), (logits, rollout.token)

  found = []
  for device in (jax.devices("cpu")[0], jax.devices()[0]):
    args = jax.device_put((params, prompts.ours, prompts.pixel), device)
    with jax.default_matmul_precision("highest"):
      (_, (logits, token)), grad = jax.jit(
        jax.value_and_grad(loss, has_aux=True)
      )(*args)
    found.append(jax.device_get((logits, grad, token)))
  (logits, grad, token), (other, other_grad, other_token) = found
  norm = float(optax.tree.norm(grad))
  apart = jax.tree.map(lambda a, b: a - b, grad, other_grad)
  result = {
    "logits_off": float(np.abs(logits - other).max()),
    "gradient_off": float(optax.tree.norm(apart)) / norm,
    "ids_differ": int(np.sum(token != other_token)),
  }
  if (
    not result["logits_off"] < 1e-3
    or not result["gradient_off"] < 1e-3
    or result["ids_differ"]
  ):
    raise SystemExit(
      f"numbers differ between this device and the CPU: {result}"
    )
  return result


# ---------------------------------------------------------------------- phases


def time_phase(run, repeats: int) -> float:
  """Median seconds of `run`, which waits for its own results."""
  run()  # compiles
  taken = []
  for _ in range(repeats):
    begin = time.perf_counter()
    run()
    taken.append(time.perf_counter() - begin)
  return statistics.median(taken)


def measure_update(config, sizes: Sizes) -> dict:
  params = {"decoder": init(config)["decoder"]}
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(1e-6, mu_dtype="bfloat16")
  )
  shape = (sizes.prompts, sizes.group, sizes.tokens)
  rng = np.random.default_rng(1)
  mask = jnp.ones(shape, bool)
  rollout = Rollout(
    token=jnp.asarray(rng.integers(1, config.vocab_size, shape, np.int32)),
    mask=mask,
    logprob=jnp.full(shape, -np.log(config.vocab_size), jnp.float32),
    finished=mask[..., 0],
  )
  view = View(
    prompt=make_prompt(config, sizes.prompts, sizes.slots),
    frame=jnp.zeros((sizes.prompts, 1), jnp.int32),
  )
  advantage = jnp.asarray(rng.standard_normal(shape[:2]), jnp.float32)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, opt_state, view, rollout, advantage):
    def loss(params):
      logprob, _ = policy.completion_logprobs(
        config,
        params,
        view,
        jnp.zeros((sizes.prompts, 1, 1, config.hidden_size), config.dtype),
        rollout,
        jnp.zeros(config.vocab_size, bool),
      )
      return grpo.policy_loss(
        logprob,
        rollout.logprob,
        rollout.logprob,
        advantage,
        rollout.mask,
        clip_low=0.2,
        clip_high=0.2,
        aggregate="sequence_mean",
        kl_weight=0.04,
        kl_kind="k3",
      )[0]

    value, grad = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grad, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  args = [params, jax.jit(optimizer.init)(params)]
  del params
  compiled = update.lower(*args, view, rollout, advantage).compile()

  def run():
    args[:] = [*compiled(*args, view, rollout, advantage)]
    value = args.pop()
    if not np.isfinite(value):
      raise SystemExit(f"the update's loss is {value}")

  step_s = time_phase(run, _REPEATS.value)
  prompt = np.full(sizes.prompts, sizes.slots)
  forward = flops.prompts(config, prompt) + flops.completions(
    config, prompt, np.full(shape[:2], sizes.tokens)
  )
  return {
    "seconds": step_s,
    "rate": sizes.prompts * (sizes.slots + sizes.group * sizes.tokens) / step_s,
    "flops_per_s": 3 * forward / step_s,
    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
  }


def measure_tower(config, params, sizes: Sizes) -> dict:
  patches = sizes.grid[0] * sizes.grid[1]
  pixel = jnp.ones(
    (sizes.frames, patches, config.vision.patch_dim), config.dtype
  )
  encode = jax.jit(
    lambda params, pixel: vlm.encode_vision(config, params, pixel, sizes.grid)
  )
  taken = time_phase(
    lambda: jax.block_until_ready(encode(params, pixel)), _REPEATS.value
  )
  return {
    "seconds": taken,
    "rate": sizes.frames / taken,
    "flops_per_s": flops.vision(config, sizes.frames, sizes.grid) / taken,
  }


def measure_sampling(config, params, sizes: Sizes) -> dict[str, dict]:
  """Prefill and decode; the parameters are used up."""
  prompt = make_prompt(config, sizes.prompts, sizes.slots)
  visual = jnp.zeros((sizes.prompts, 1, config.hidden_size), config.dtype)
  seed = jnp.zeros((sizes.prompts, 2), jnp.uint32)
  banned = jnp.zeros(config.vocab_size, bool)
  drawing = dict(eos_id=NO_END, temperature=1.0)

  @jax.jit
  def start(params, prompt, visual):
    return sampling.start(
      config,
      params,
      prompt,
      visual,
      seed,
      banned,
      num_completions=sizes.group,
      max_tokens=sizes.tokens,
      **drawing,
    )

  @functools.partial(jax.jit, donate_argnums=1)
  def advance(params, begun):
    return sampling.advance(
      config, params, begun, sizes.tokens, banned, **drawing
    )

  prefill_s = time_phase(
    lambda: jax.block_until_ready(start(params, prompt, visual)),
    _REPEATS.value,
  )
  begun = jax.device_get(start(params, prompt, visual))
  weight_bytes = peers.read_bytes(config, params)
  apart = vlm.unstack(params)
  taken = []
  for _ in range(1 + _REPEATS.value):  # the first compiles
    state = jax.block_until_ready(jax.device_put(begun))
    begin = time.perf_counter()
    jax.block_until_ready(advance(apart, state))
    taken.append(time.perf_counter() - begin)
  token_s = statistics.median(taken[1:]) / (sizes.tokens - 1)
  held = sizes.slots + sizes.group * sizes.tokens / 2  # halfway
  cache_bytes = sizes.prompts * held * vlm.cache_bytes(config, 1)
  forward = flops.prompts(config, np.full(sizes.prompts, sizes.slots))
  return {
    "prefill": {
      "seconds": prefill_s,
      "rate": sizes.prompts * sizes.slots / prefill_s,
      "flops_per_s": forward / prefill_s,
    },
    "decode": {
      "seconds": token_s,
      "rate": sizes.prompts * sizes.group / token_s,
      "bytes_per_s": (weight_bytes + cache_bytes) / token_s,
      "weight_bytes": weight_bytes,
      "cache_bytes": cache_bytes,
    },
  }


def measure(config, sizes: Sizes) -> dict[str, dict]:
  """All phases of one policy; what does not fit says so."""
  found = {}

  def attempt(name, work):
    try:
      return work()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      found[name] = {"why": "out of memory"}
      return {}
    finally:
      gc.collect()

  update = attempt("update", lambda: measure_update(config, sizes))
  found |= {"update": update} if update else {}
  params = init(config)
  tower = attempt("tower", lambda: measure_tower(config, params, sizes))
  found |= {"tower": tower} if tower else {}
  return found | attempt(
    "decode", lambda: measure_sampling(config, params, sizes)
  )


def rows_of(result: dict) -> list[list]:
  """Lines of the table."""
  rows = []
  for name in _SIZES.value:
    found = result["policies"].get(name, {})
    for phase in PHASES:
      point = found.get(phase, {})
      share = None
      if "flops_per_s" in point:
        share = point["flops_per_s"] / result["matmul_flops_per_s"]
      elif "bytes_per_s" in point:
        share = point["bytes_per_s"] / result["copy_bytes_per_s"]
      seconds = point.get("seconds", point.get("why"))
      of = "copy" if phase == "decode" else "matmul"
      rows.append(
        [name, phase, seconds, point.get("rate"), UNITS[phase], share, of]
      )
  return rows


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  device = jax.devices()[0]
  sizes = Sizes(_TINY.value)
  result = {"machine": peers.machine(), "policies": {}}
  if device.platform == "gpu" or _TINY.value:
    result |= {
      "tiny": _TINY.value,
      "shapes": vars(sizes),
      "remat": _REMAT.value,
      "attention": _ATTENTION.value,
      "numbers": check_numbers(),
      "matmul_flops_per_s": peers.matmul_peak(
        256 if _TINY.value else 8_192, "bfloat16"
      ),
      "copy_bytes_per_s": peers.copy_bandwidth(
        1 << (20 if _TINY.value else 31)
      ),
    }
    print(
      f"{device.device_kind}: numbers agree with the CPU"
      f" {result['numbers']}; bfloat16 matmul"
      f" {result['matmul_flops_per_s'] / 1e12:.4g} TFLOP/s, copy"
      f" {result['copy_bytes_per_s'] / 1e9:.4g} GB/s; {result['shapes']},"
      f" remat {_REMAT.value}, attention {_ATTENTION.value}",
      flush=True,
    )
    for name in _SIZES.value:
      result["policies"][name] = measure(make_config(name, _TINY.value), sizes)
      peers.write(_OUT.value, result)
  else:
    print(f"no GPU here, only {device.platform}: nothing is measured")
    peers.write(_OUT.value, result)
  if _TINY.value:
    print("toy sizes: these numbers say that the pieces run, and no more")
  print()
  print(
    peers.table(
      ["policy", "phase", "seconds", "rate", "unit", "share", "of"],
      rows_of(result),
    )
  )


if __name__ == "__main__":
  app.run(main)
