"""How the cost of each phase grows with the prompt, the group and the frames.

  python -m benchmarks.growth [--out=FILE.json] [--plot=docs/images/growth.png]

A small random policy in float32 on this machine's cores. Three sweeps, each
around the same point: tokens of a prompt of text, completions G, keyframes K of
16 visual tokens each. Phases: `prefill` (with the tower, where there are
frames), `decode` of one token of every completion, `score` of the completions
by teacher forcing, and `update`, loss and gradient with every layer computed
again in the backward pass. Medians; a point that is in the JSON file is not
measured again.
"""

import functools
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import peers
from cf_jax import grpo, policy, sampling
from cf_jax.models import flops, vlm
from cf_jax.types import Prompt, Rollout, View

_OUT = flags.DEFINE_string("out", "", "results as JSON, read if it is there")
_PLOT = flags.DEFINE_string("plot", "", "write the curves as a PNG file")
_TINY = flags.DEFINE_bool("tiny", False, "few small points: is all in order?")
_REPEATS = flags.DEFINE_integer("repeats", 3, "timed calls of each phase")

PHASES = ("prefill", "decode", "score", "update")
SWEEPS = {  # sweep -> what is changed, and its values
  "prompt": ("prompt tokens", (256, 512, 1_024, 2_048, 4_096, 8_192)),
  "group": ("completions, G", (1, 2, 4, 8, 16)),
  "keyframes": ("keyframes, K", (4, 8, 16, 32, 64)),
}
FEW = {
  "prompt": ("prompt tokens", (32, 64)),
  "group": ("completions, G", (1, 2)),
  "keyframes": ("keyframes, K", (1, 2)),
}
GRID = (8, 8)  # of a frame in patches: 16 visual tokens
TEXT = 64  # tokens beside the frames


def make_config(tiny: bool):
  """A policy of 3M parameters whose longest update fits a laptop."""
  return peers.make_config(
    "tiny",
    vocab_size=512 if tiny else 8_192,
    remat="full",
    num_hidden_layers=2 if tiny else 4,
    max_position_embeddings=16_384,
  )


def make_prompt(config, rng, text: int, frames: int) -> Prompt:
  """A prompt of text with `frames` spans of visual tokens before its end."""
  visual_tokens = frames * GRID[0] * GRID[1] // 4
  slots = text + visual_tokens
  visual = np.full((1, slots), -1, np.int32)
  visual[:, text // 2 : text // 2 + visual_tokens] = np.arange(visual_tokens)
  return Prompt(
    token=rng.integers(1, config.vocab_size - 8, (1, slots), np.int32),
    mask=np.ones((1, slots), bool),
    # What a slot's position is does not change what it costs.
    position=np.broadcast_to(np.arange(slots, dtype=np.int32), (1, 3, slots)),
    visual=visual,
  )


def measure(config, params, *, text, frames, group, tokens) -> dict:
  """Seconds of each phase at one point, and its useful operations."""
  rng = np.random.default_rng(0)
  prompt = jax.tree.map(jnp.asarray, make_prompt(config, rng, text, frames))
  patches = GRID[0] * GRID[1]
  pixel = jnp.asarray(
    rng.standard_normal(
      (1, frames, patches, config.vision.patch_dim), np.float32
    )
  )
  banned = jnp.zeros(config.vocab_size, bool)
  seed = jnp.zeros((1, 2), jnp.uint32)
  view = View(
    prompt=prompt, frame=jnp.arange(max(frames, 1), dtype=jnp.int32)[None]
  )
  drawing = dict(eos_id=-1, temperature=1.0)

  def encode(params, pixel):
    if not frames:
      return jnp.zeros((1, 1, 1, config.hidden_size))
    return policy.encode_frames(config, params, pixel, grid=GRID)

  @jax.jit
  def prefill(params, pixel):
    shown = policy.show(encode(params, pixel), view.frame)
    return sampling.start(
      config,
      params,
      prompt,
      shown,
      seed,
      banned,
      num_completions=group,
      max_tokens=tokens,
      **drawing,
    )

  @functools.partial(jax.jit, donate_argnums=1)
  def decode(params, begun):
    return sampling.advance(config, params, begun, tokens, banned, **drawing)

  def logprobs(params, pixel, rollout):
    return policy.completion_logprobs(
      config, params, view, encode(params, pixel), rollout, banned
    )[0]

  score = jax.jit(logprobs)

  @jax.jit
  def update(params, pixel, rollout):
    def loss(params):
      logprob = logprobs(params, pixel, rollout)
      return grpo.policy_loss(
        logprob,
        rollout.logprob,
        rollout.logprob,
        jnp.linspace(-1, 1, group)[None],
        rollout.mask,
        clip_low=0.2,
        clip_high=0.2,
        aggregate="sequence_mean",
        kl_weight=0.04,
        kl_kind="k3",
      )[0]

    return jax.value_and_grad(loss)(params)

  apart = jax.jit(  # the tower is not in it, nor does decoding want one
    functools.partial(vlm.unstacked, config, rows=group)
  )(params)
  taken = {phase: [] for phase in PHASES}
  for index in range(1 + _REPEATS.value):  # the first compiles
    times = {}
    begin = time.perf_counter()
    begun = jax.block_until_ready(prefill(params, pixel))
    times["prefill"] = time.perf_counter() - begin
    begin = time.perf_counter()
    rollout: Rollout = jax.block_until_ready(decode(apart, begun)).rollout
    times["decode"] = (time.perf_counter() - begin) / (tokens - 1)
    times["score"] = peers.seconds(lambda r=rollout: score(params, pixel, r))
    times["update"] = peers.seconds(lambda r=rollout: update(params, pixel, r))
    if index:
      for phase, seconds in times.items():
        taken[phase].append(seconds)
  slots = prompt.token.shape[1]
  lengths = np.full((1, group), tokens)
  tower = flops.vision(config, frames, GRID)
  begun_flops = flops.prompts(config, np.array([slots]))
  forward = begun_flops + flops.completions(config, np.array([slots]), lengths)
  return {
    "slots": slots,
    "seconds": {
      phase: statistics.median(values) for phase, values in taken.items()
    },
    "flops": {
      "prefill": tower + begun_flops,
      "score": tower + forward,
      "update": 3 * (tower + forward),
    },
  }


def plot(path: str, result: dict, sweeps: dict) -> None:
  """One panel a sweep, seconds over what grows, both logarithmic."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, panels = plt.subplots(
    1, len(sweeps), figsize=(9, 3.2), sharey=True, layout="constrained"
  )
  for panel, (sweep, (label, values)) in zip(panels, sweeps.items()):
    for phase, marker in zip(PHASES, "osD^"):
      panel.plot(
        values,
        [result["points"][f"{sweep}={v}"]["seconds"][phase] for v in values],
        marker=marker,
        markersize=4,
        linewidth=1.5,
        label="decode, per token" if phase == "decode" else phase,
      )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(values, [str(v) for v in values], fontsize=8)
    panel.set_xlabel(label)
    panel.grid(alpha=0.3)
  panels[0].set_ylabel("seconds")
  handles, labels = panels[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside upper center", ncols=4, frameon=False
  )
  figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  sweeps = FEW if _TINY.value else SWEEPS
  config = make_config(_TINY.value)
  params = jax.jit(lambda rng: vlm.init(config, rng))(jax.random.key(0))
  base = dict(text=1_024, frames=0, group=8, tokens=64)
  if _TINY.value:
    base = dict(text=32, frames=0, group=2, tokens=4)
  result = peers.read(_OUT.value) or {
    "machine": peers.machine(),
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "base": base,
    "matmul_flops_per_s": peers.matmul_peak(),
    "points": {},
  }
  for sweep, (_, values) in sweeps.items():
    for value in values:
      name = f"{sweep}={value}"
      if name in result["points"]:
        continue
      point = dict(base)
      if sweep == "prompt":
        point["text"] = value
      elif sweep == "group":
        point["group"] = value
      else:
        point |= dict(text=min(TEXT, base["text"]), frames=value)
      load = os.getloadavg()[0]
      result["points"][name] = measure(config, params, **point) | {
        "load_average": load
      }
      jax.clear_caches()
      peers.write(_OUT.value, result)
  rows = []
  peak = result["matmul_flops_per_s"]
  for name, point in result["points"].items():
    taken = point["seconds"]
    rows.append(
      [name, point["slots"]]
      + [1e3 * taken[phase] for phase in PHASES]
      + [point["flops"]["update"] / taken["update"] / peak]
    )
  print(
    f"{result['parameters'] / 1e6:.1f}M parameters, float32, otherwise"
    f" {result['base']}; matmul {peak / 1e9:.0f} GFLOP/s\n"
  )
  print(
    peers.table(
      ["point", "prompt slots"]
      + [f"{p}, ms" + (" a token" * (p == "decode")) for p in PHASES]
      + ["update, of the matmul peak"],
      rows,
    )
  )
  if _PLOT.value:
    plot(_PLOT.value, result, sweeps)


if __name__ == "__main__":
  app.run(main)
