"""Update, prefill and decode of 3B and 7B policies on one GPU.

  python -m benchmarks.gpu [--sizes=3b,7b] [--out=FILE.json]

needs this repository and jax, flax, optax, chex, numpy and absl-py, with what
these import themselves; no weights, nothing to read videos or text with. Random
bfloat16 parameters in the published shapes. Numbers first, see `check_numbers`:
what is timed (the same functions, attention, remat and list of layers, in
bfloat16) must agree, on two narrow layers with heads as wide as the policy's,
with XLA's form in float32 on the CPU of the same machine, or nothing is timed.

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

import dataclasses
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

# A number rounded to bfloat16 is off by at most 2^-8 / sqrt(3) of itself, root
# mean square. One layer rounds about 15 times on the way to its output (norms,
# projections, rotations, weights, gates, sums), the head 3 times; a gradient
# has its forward pass, the same one again (remat) and the way back. Roundings
# are independent: so many are off by the root of their number. The limits are
# twice that; XLA's own form on a CPU is off by a quarter to two thirds of them.
ROUNDING = 2**-8 / 3**0.5
LAYERS = 2
ROUNDINGS = 15 * LAYERS + 3
LIMITS = {
  "logprob": 2 * ROUNDING * ROUNDINGS**0.5,
  "gradient": 2 * ROUNDING * (3 * ROUNDINGS) ** 0.5,
  "decode": 2 * ROUNDING * ROUNDINGS**0.5,
  "tower": 2 * ROUNDING * ROUNDINGS**0.5,
}


class Sizes:
  """Shapes of one run; tiny ones to check numbers and pieces with."""

  def __init__(self, tiny: bool):
    self.prompts = 2 if tiny else _PROMPTS.value
    self.group = 2 if tiny else _GROUP.value
    self.slots = 72 if tiny else _SLOTS.value
    self.tokens = 16 if tiny else _TOKENS.value
    self.frames = 2 if tiny else _FRAMES.value


def make_config(name: str) -> model_config.VLMConfig:
  """A published shape in bfloat16."""
  return model_config.make(
    size=f"qwen2_5_vl_{name}",
    dtype="bfloat16",
    param_dtype="bfloat16",
    attention=_ATTENTION.value,
    remat=_REMAT.value,
  )


def narrow(config: model_config.VLMConfig) -> model_config.VLMConfig:
  """The same settings and widths of heads in a model that a CPU can run."""
  width, tower = 2 * config.head_dim, config.vision.head_dim
  return dataclasses.replace(
    config,
    vision=dataclasses.replace(
      config.vision,
      depth=LAYERS,
      hidden_size=tower,
      intermediate_size=2 * tower,
      num_heads=1,
      out_hidden_size=width,
      fullatt_block_indexes=(LAYERS - 1,),
    ),
    vocab_size=1_024,
    vocab_chunk=512,  # several chunks, as of the whole vocabulary
    hidden_size=width,
    intermediate_size=2 * width,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=1,
  )


def init(config) -> dict:
  return jax.jit(lambda rng: vlm.init(config, rng))(jax.random.key(0))


def make_prompt(config, rows: int, slots: int, length=None) -> Prompt:
  """Random text; where a slot's embedding is from does not change the cost.

  Args:
    config: the model.
    rows: B.
    slots: S.
    length: int[B] real slots; None for all.
  """
  rng = np.random.default_rng(0)
  mask = np.ones((rows, slots), bool)
  if length is not None:
    mask = np.arange(slots) < np.asarray(length)[:, None]
  place = np.where(mask, np.arange(slots, dtype=np.int32), 0)
  return Prompt(
    token=jnp.asarray(
      rng.integers(1, min(config.vocab_size, 150_000), (rows, slots), np.int32)
    ),
    mask=jnp.asarray(mask),
    position=jnp.asarray(np.repeat(place[:, None], 3, axis=1)),
    visual=jnp.full((rows, slots), -1, jnp.int32),
  )


# ------------------------------------------------------------- what is measured


def score(config, params, prompt: Prompt, rollout: Rollout) -> jax.Array:
  """float32[B, G, C] log-probabilities, the prompt run once."""
  rows = len(prompt.token)
  return policy.completion_logprobs(
    config,
    params,
    View(prompt=prompt, frame=jnp.zeros((rows, 1), jnp.int32)),
    jnp.zeros((rows, 1, 1, config.hidden_size), config.dtype),
    rollout,
    jnp.zeros(config.vocab_size, bool),
  )[0]


def loss(config, params, prompt: Prompt, rollout: Rollout, advantage):
  """Clipped policy loss with k3 KL; the sampler is the reference too."""
  return grpo.policy_loss(
    score(config, params, prompt, rollout),
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


class Sampler:
  """Sampling in the steps of the loop, see `experiment.make_sample_steps`.

  Attributes:
    start: params, Prompt -> Decoding with one token.
    unstack: params -> params for `advance`, whose layers lie apart: a copy.
    advance: params of `unstack`, Decoding (donated) -> Decoding at its end.
  """

  def __init__(self, config, sizes: "Sizes"):
    banned = jnp.zeros(config.vocab_size, bool)
    drawing = dict(eos_id=NO_END, temperature=1.0)

    def start(params, prompt):
      rows = len(prompt.token)
      return sampling.start(
        config,
        params,
        prompt,
        jnp.zeros((rows, 1, config.hidden_size), config.dtype),
        jnp.zeros((rows, 2), jnp.uint32),
        banned,
        num_completions=sizes.group,
        max_tokens=sizes.tokens,
        **drawing,
      )

    def advance(params, begun):
      return sampling.advance(
        config, params, begun, sizes.tokens, banned, **drawing
      )

    self.start = jax.jit(start)
    self.unstack = jax.jit(
      functools.partial(vlm.unstacked, config, rows=sizes.prompts * sizes.group)
    )
    self.advance = jax.jit(advance, donate_argnums=1)


# --------------------------------------------------------------------- numbers


def check_numbers(config) -> dict[str, float]:
  """What will be timed, on two narrow layers, against float32 on the CPU.

  Log-probabilities of completions of unequal length after padded prompts, the
  gradient of their loss, sampled tokens' log-probabilities against teacher
  forcing, and the tower.

  Args:
    config: of the policy that will be timed.

  Returns:
    How far each is off: of the gradient the worst parameter's, by its norm; of
    log-probabilities by the norm of what differs between tokens.

  Raises:
    SystemExit: more than `LIMITS`.
  """
  ours = narrow(config)
  plain = dataclasses.replace(
    ours, dtype="float32", param_dtype="float32", attention="xla", remat="none"
  )
  sizes = Sizes(tiny=True)
  rng = np.random.default_rng(2)
  # No bias, norm or flat row of scores may hide a mistake.
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(
      (path[-1].key == "scale") + 0.05 * rng.standard_normal(leaf.shape),
      jnp.bfloat16,
    ),
    jax.eval_shape(lambda: vlm.init(ours, jax.random.key(0))),
  )
  prompt = make_prompt(ours, sizes.prompts, sizes.slots, length=(72, 50))
  shape = (sizes.prompts, sizes.group, sizes.tokens)
  rollout = Rollout(
    token=jnp.asarray(rng.integers(1, ours.vocab_size, shape, np.int32)),
    mask=jnp.arange(shape[2]) < jnp.asarray([[16, 5], [9, 1]])[..., None],
    logprob=jnp.zeros(shape, jnp.float32),
    finished=jnp.ones(shape[:2], bool),
  )
  advantage = jnp.asarray(rng.standard_normal(shape[:2]), jnp.float32)
  pixel = rng.standard_normal(
    (sizes.frames, GRID[0] * GRID[1], ours.vision.patch_dim), np.float32
  )

  @functools.partial(jax.jit, static_argnums=0)
  def teach(config, params, prompt, rollout):
    return score(config, params, prompt, rollout)

  @functools.partial(jax.jit, static_argnums=0)
  def differentiate(config, params, prompt, rollout, advantage):
    def of(decoder):
      return loss(config, {"decoder": decoder}, prompt, rollout, advantage)

    return jax.grad(of)(params["decoder"])

  @functools.partial(jax.jit, static_argnums=0)
  def encode(config, params, pixel):
    pixel = pixel.astype(config.dtype)
    return vlm.encode_vision(config, params, pixel, GRID)

  def on_cpu(function, *args):
    """In float32, XLA's form, without a device's shorter products."""
    args = jax.device_put(jax.device_get(args), jax.devices("cpu")[0])
    wide = jax.tree.map(
      lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, args
    )
    with jax.default_matmul_precision("highest"):
      return jax.device_get(function(plain, *wide))

  found = {}

  def compare(name, mine, wanted, mask=None):
    pairs = jax.tree.map(lambda *pair: _off(*pair, mask), mine, wanted)
    found[name] = max(jax.tree.leaves(pairs))
    if not found[name] < LIMITS[name]:
      raise SystemExit(
        f"attention {ours.attention!r}, remat {ours.remat!r}: {name} is off by"
        f" {found[name]:.3g}, allowed {LIMITS[name]:.3g}; before it {found}"
      )

  wanted = on_cpu(teach, params, prompt, rollout)
  compare("logprob", teach(ours, params, prompt, rollout), wanted, rollout.mask)
  # The sampler is the policy: no ratio is clipped on one side alone.
  rollout = rollout.replace(logprob=jnp.asarray(wanted))
  args = (params, prompt, rollout, advantage)
  compare("gradient", differentiate(ours, *args), on_cpu(differentiate, *args))
  sampler = Sampler(ours, sizes)
  drawn = sampler.advance(
    sampler.unstack(params), sampler.start(params, prompt)
  ).rollout
  forced = on_cpu(teach, params, prompt, drawn)
  compare("decode", drawn.logprob, forced, drawn.mask)
  compare("tower", encode(ours, params, pixel), on_cpu(encode, params, pixel))
  return found


def _off(ours, wanted, mask=None) -> float:
  """Norm of the difference by the norm of what is wanted.

  With a mask, of its entries, and by what is left of them without their mean.
  """
  ours, wanted = (np.asarray(x, np.float32) for x in (ours, wanted))
  if mask is not None:
    ours, wanted = ours[np.asarray(mask)], wanted[np.asarray(mask)]
  apart = np.linalg.norm(ours - wanted)
  if mask is not None:
    wanted = wanted - wanted.mean()
  return float(apart / np.linalg.norm(wanted))


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
  prompt = make_prompt(config, sizes.prompts, sizes.slots)
  advantage = jnp.asarray(rng.standard_normal(shape[:2]), jnp.float32)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, opt_state, prompt, rollout, advantage):
    value, grad = jax.value_and_grad(functools.partial(loss, config))(
      params, prompt, rollout, advantage
    )
    updates, opt_state = optimizer.update(grad, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  args = [params, jax.jit(optimizer.init)(params)]
  del params
  compiled = update.lower(*args, prompt, rollout, advantage).compile()

  def run():
    args[:] = [*compiled(*args, prompt, rollout, advantage)]
    value = args.pop()
    if not np.isfinite(value):
      raise SystemExit(f"the update's loss is {value}")

  step_s = time_phase(run, _REPEATS.value)
  slots = np.full(sizes.prompts, sizes.slots)
  forward = flops.prompts(config, slots) + flops.completions(
    config, slots, np.full(shape[:2], sizes.tokens)
  )
  return {
    "seconds": step_s,
    "rate": sizes.prompts * (sizes.slots + sizes.group * sizes.tokens) / step_s,
    "flops_per_s": 3 * forward / step_s,
    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
  }


def measure_tower(config, params, sizes: Sizes) -> dict:
  patches = GRID[0] * GRID[1]
  pixel = jnp.ones(
    (sizes.frames, patches, config.vision.patch_dim), config.dtype
  )
  encode = jax.jit(
    lambda params, pixel: vlm.encode_vision(config, params, pixel, GRID)
  )
  taken = time_phase(
    lambda: jax.block_until_ready(encode(params, pixel)), _REPEATS.value
  )
  return {
    "seconds": taken,
    "rate": sizes.frames / taken,
    "flops_per_s": flops.vision(config, sizes.frames, GRID) / taken,
  }


def measure_sampling(config, params, sizes: Sizes) -> dict[str, dict]:
  """Prefill and decode."""
  prompt = make_prompt(config, sizes.prompts, sizes.slots)
  sampler = Sampler(config, sizes)
  prefill_s = time_phase(
    lambda: jax.block_until_ready(sampler.start(params, prompt)),
    _REPEATS.value,
  )
  begun = jax.device_get(sampler.start(params, prompt))
  weight_bytes = peers.read_bytes(config, params)
  apart = sampler.unstack(params)
  taken = []
  for _ in range(1 + _REPEATS.value):  # the first compiles
    state = jax.block_until_ready(jax.device_put(begun))
    begin = time.perf_counter()
    jax.block_until_ready(sampler.advance(apart, state))
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
      "limits": LIMITS,
      "matmul_flops_per_s": peers.matmul_peak(
        256 if _TINY.value else 8_192, "bfloat16"
      ),
      "copy_bytes_per_s": peers.copy_bandwidth(
        1 << (20 if _TINY.value else 31)
      ),
    }
    print(
      f"{device.device_kind}: bfloat16 matmul"
      f" {result['matmul_flops_per_s'] / 1e12:.4g} TFLOP/s, copy"
      f" {result['copy_bytes_per_s'] / 1e9:.4g} GB/s; {result['shapes']},"
      f" remat {_REMAT.value}, attention {_ATTENTION.value}",
      flush=True,
    )
    for name in _SIZES.value:
      config = make_config(name)
      numbers = check_numbers(config)
      if _TINY.value:
        config = narrow(config)
      told = ", ".join(f"{what} {off:.2g}" for what, off in numbers.items())
      print(f"{name}: off from float32 by {told}", flush=True)
      result["policies"][name] = measure(config, sizes) | {"numbers": numbers}
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
