"""What packing the samples of a cold start saves where their lengths differ.

  python -m benchmarks.packing [--out=FILE.json]

One forward and backward pass of the supervised loss over 16 samples of random
data: half of them pictures, half videos of 8 frames, questions and targets of
log-normal lengths. Padded, a sample a row; and packed into rows with the room
of 1, 2 and 4 padded samples. A small policy in float32 on this machine's cores;
interleaved rounds, medians. Tokens are real ones.
"""

import argparse
import os
import statistics

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from cf_jax.data import packing
from cf_jax.models import vlm
from cf_jax.programs import sft
from cf_jax.types import Prompt, Rollout, View

GRID, VISUAL = (8, 8), 16  # of a frame: patches, visual tokens
ROOMS = (1, 2, 4)


def draw(
  *, count: int, frames: int, slots: int, length: int, vocab_size: int
) -> sft.Targets:
  """Samples whose lengths differ, padded to the same shapes."""
  rng = np.random.default_rng(0)
  text = np.clip(rng.lognormal(3.2, 0.5, count), 8, slots - frames * VISUAL)
  told = np.clip(rng.lognormal(3.0, 0.8, count), 4, length).astype(int)
  shown = np.where(np.arange(count) % 2, frames, 1)
  read = text.astype(int) + shown * VISUAL
  place = np.arange(slots)
  mask = place < read[:, None]
  visual = np.where(place - 4 < (shown * VISUAL)[:, None], place - 4, -1)
  target_mask = (np.arange(length) < told[:, None])[:, None]
  patch = 3 * 2 * 14 * 14
  return sft.Targets(
    view=View(
      prompt=Prompt(
        token=rng.integers(0, vocab_size, (count, slots), np.int32),
        mask=mask,
        position=np.where(mask[:, None], place, 0)
        .repeat(3, axis=1)
        .astype(np.int32),
        visual=np.maximum(visual, -1).astype(np.int32),
      ),
      frame=np.tile(np.arange(frames, dtype=np.int32), (count, 1)),
    ),
    pixel=rng.standard_normal((count, frames, 64, patch), np.float32),
    target=Rollout(
      token=rng.integers(0, vocab_size, target_mask.shape, np.int32),
      mask=target_mask,
      logprob=np.zeros(target_mask.shape, np.float32),
      finished=np.ones((count, 1), bool),
    ),
  )


def measure(
  *, count: int, frames: int, slots: int, length: int, repeats: int
) -> dict:
  """Seconds of each form, and how much of its slots is real."""
  model = peers.make_config("tiny", vocab_size=1_024, scan_unroll=4)
  batch = draw(
    count=count,
    frames=frames,
    slots=slots,
    length=length,
    vocab_size=model.vocab_size,
  )
  params = jax.jit(lambda rng: vlm.init(model, rng))(jax.random.key(0))
  told = int(batch.target.mask.sum())
  tokens = int(batch.view.prompt.mask.sum()) + told
  how = dict(model=model, grid=GRID, banned=jnp.zeros(model.vocab_size, bool))

  def step(loss):
    return jax.jit(
      jax.value_and_grad(
        lambda params, batch: loss(params, batch, **how), has_aux=True
      )
    )

  padded = count * (slots + length - 1)
  forms = {"padded": (step(sft.sft_loss), batch, tokens / padded)}
  packed_step = step(sft.packed_loss)
  for room in ROOMS:
    rows = packing.lay(
      batch.view.prompt,
      batch.view.frame,
      batch.target,
      room=room,
      num_visual=VISUAL,
      on_prompt=False,
    )
    made = sft.PackedTargets(rows, batch.pixel[rows.sample, rows.frame])
    filled = float(np.mean(rows.segment > 0))
    forms[f"packed, room of {room}"] = packed_step, made, filled
  losses = {  # compiles
    name: float(run(params, made)[0][0])
    for name, (run, made, _) in forms.items()
  }
  np.testing.assert_allclose(list(losses.values()), losses["padded"], rtol=1e-4)
  taken = peers.interleave(
    {
      name: lambda run=run, made=made: {
        "update": peers.seconds(lambda: run(params, made))
      }
      for name, (run, made, _) in forms.items()
    },
    repeats,
  )
  return {
    "machine": peers.machine(),
    "samples": count,
    "tokens": tokens,
    "forms": {
      name: {"filled": filled, "seconds": taken[name]["update"]}
      for name, (_, _, filled) in forms.items()
    },
  }


def table(made: dict) -> str:
  """Markdown: tokens a second and the ratio to the padded form."""
  padded = made["forms"]["padded"]["seconds"]
  return peers.table(
    ("form", "slots filled, %", "s", "tokens/s", "ratio"),
    [
      (
        name,
        100 * form["filled"],
        statistics.median(form["seconds"]),
        made["tokens"] / statistics.median(form["seconds"]),
        peers.ratio(padded, form["seconds"]),
      )
      for name, form in made["forms"].items()
    ],
  )


def main() -> None:
  """Measures, prints and keeps."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", default="", help="results as JSON")
  parser.add_argument("--repeats", type=int, default=5, help="timed calls")
  args = parser.parse_args()
  made = measure(count=16, frames=8, slots=224, length=96, repeats=args.repeats)
  print(table(made))
  peers.write(args.out, made)


if __name__ == "__main__":
  main()
