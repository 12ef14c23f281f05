"""Writes the goldens that the parity tests read without torch.

  python -m tests.parity.make_goldens --trained_rule=FILE

in an environment with the `parity` extra. FILE is modeling_qwen2_5_vl.py of
transformers 4.49.0 (in `pip download --no-deps transformers==4.49.0`, a zip
archive): its `get_rope_index` is the last kind that keeps fractions of a
second, see `cf_jax.models.rope.rope_index`. Everything else is made by the
installed transformers.

Weights, pixels and ids are stored as the small numbers that they are; gradients
with 16 bits of fraction, all of one checkpoint and a part of the others; the
towers' hidden states for every fifth patch.
"""

import ast
import json
import pathlib
import sys
import typing

import numpy as np
import torch
import transformers
from absl import app, flags

from tests.parity import reference, specs

FOLDER = pathlib.Path(__file__).parent / "goldens"
SEED = 3
# The smallest gap between the best two logits of any greedy choice: rounding
# must not decide which ids are golden.
MIN_MARGIN = 1e-3
# Of a gradient that is stored in part.
NUM_ENTRIES = 16

_RULE = flags.DEFINE_string(
  "trained_rule", None, "modeling_qwen2_5_vl.py of 4.49.0.", required=True
)


def trained_rule(path: str) -> typing.Callable:
  """`get_rope_index` cut out of a source file of another version."""
  tree = ast.parse(pathlib.Path(path).read_text())
  found = [
    node
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef) and node.name == "get_rope_index"
  ]
  module = ast.Module(body=found[:1], type_ignores=[])
  names = {name: getattr(typing, name) for name in ("Optional", "Tuple")}
  names["torch"] = torch
  exec(compile(module, path, "exec"), names)  # a file the caller chose
  return names["get_rope_index"]


def draw_layouts() -> dict[str, dict]:
  """Batches for positions: arguments of `get_rope_index`, by name."""
  image, video = specs.Media((1, 4, 6)), specs.Media((3, 4, 6), 1.0)

  def film(slices, height, width, seconds):
    return specs.Media((slices, height, width), seconds)

  rows = {
    "text": [(7,), (3,)],
    "image": [(4, image, 5), (image, 2)],
    "video": [(4, video, 5), (1, film(2, 6, 4, 2.0), 1)],
    "outrun": [(4, film(4, 4, 4, 9.0), 5)],  # time ends beyond the width
    "wide": [(4, film(2, 4, 30, 1.0), 5)],  # and here before it
    "several": [(1, image, image, 2, image), (2, video, video, 3)],
    "mixed": [(1, video, 1, image, 2, film(2, 4, 4, 7.0), image), (2, image)],
    "no_text": [(image,), (video,)],
    "half": [(2, film(5, 4, 6, 0.5), 3)],
    "fps_3": [(2, film(7, 4, 4, 2 / 3), 3, film(4, 4, 4, 0.4), 1)],
    "fps_30": [(2, film(40, 4, 4, 1 / 15), 3)],
    "float32": [(2, film(50, 2, 2, 0.7), 3)],
  }
  rng = np.random.default_rng(SEED)
  for number in range(8):
    rows[f"random_{number}"] = [
      [
        int(rng.integers(1, 9))
        if rng.random() < 0.5
        else specs.Media((1, *(2 * rng.integers(1, 6, 2)).tolist()))
        if rng.random() < 0.5
        else film(
          int(rng.integers(1, 5)),
          *(2 * rng.integers(1, 6, 2)).tolist(),
          float(rng.choice([1, 2, 3, 10] if number % 2 else [0.3, 0.9, 2.5])),
        )
        for _ in range(rng.integers(1, 7))
      ]
      for _ in range(3)
    ]
  layouts = {}
  for name, batch in rows.items():
    for side in ("left", "right"):
      spec = specs.Spec(
        text=dict(vocab_size=99),
        vision=dict(spatial_merge_size=2, temporal_patch_size=1, patch_size=1),
        tied=False,
        side=side,
        rows=tuple(batch),
      )
      drawn = specs.draw_batch(spec, SEED)
      layouts[f"{name}_{side}"] = {
        key: value for key, value in drawn.items() if "pixel" not in key
      }
  unnamed = dict(layouts["video_left"])
  del unnamed["second_per_grid_ts"]
  layouts["no_seconds"] = unnamed
  unmasked = dict(layouts["outrun_left"])
  del unmasked["attention_mask"]
  return layouts | {"no_mask": unmasked}


def make_positions(rule: typing.Callable) -> str:
  """JSON: layout -> arguments, `trained` and, in whole seconds, `installed`."""
  config = reference.hf_config(specs.SPECS["tied"])
  layouts = {}
  for name, inputs in draw_layouts().items():
    layout = dict(inputs, trained=reference.positions(config, inputs, rule))
    seconds = inputs.get("second_per_grid_ts", np.zeros(0))
    if np.all(seconds == np.round(seconds)):
      layout["installed"] = reference.positions(config, inputs)
    layouts[name] = {key: value.tolist() for key, value in layout.items()}
  return json.dumps(layouts)


def _smaller(key, value):
  """The least type that keeps every value."""
  if key.startswith("weight/"):
    small = value.astype(np.float16)
  elif "pixel_values" in key:
    small = np.round(value / specs.PIXEL_UNIT).astype(np.int8)
    assert np.array_equal(small * np.float32(specs.PIXEL_UNIT), value)
    return small
  elif value.dtype.kind == "i":
    small = value.astype(np.int16)
  elif key.startswith("gradient/"):
    # 16 bits of each fraction: the lowest byte is 0 and takes no space.
    return (value.view(np.uint32) + 0x80 & 0xFFFFFF00).view(np.float32)
  elif key.startswith("hidden/"):
    return value[:, :: specs.PATCH_STEP]
  else:
    return value
  assert np.array_equal(small.astype(value.dtype), value), key
  return small


def _part(gradient):
  """Some entries of a gradient, NaN elsewhere (which compresses to nothing)."""
  kept = np.full(gradient.size, np.nan, np.float32)
  index = np.unique(np.linspace(0, gradient.size - 1, NUM_ENTRIES).astype(int))
  kept[index] = gradient.reshape(-1)[index]
  return kept.reshape(gradient.shape)


def _save(name, arrays):
  arrays = {key: _smaller(key, value) for key, value in arrays.items()}
  arrays["versions"] = np.array(
    [f"transformers {transformers.__version__}", f"torch {torch.__version__}"]
  )
  path = FOLDER / f"{name}.npz"
  np.savez_compressed(path, **arrays)
  print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


def main(argv):
  del argv
  if transformers.__version__ != specs.VERSION:
    sys.exit(
      f"transformers is {transformers.__version__}, expected"
      f" {specs.VERSION}; install the parity extra"
    )
  FOLDER.mkdir(exist_ok=True)
  for number, name in enumerate(specs.SPECS):
    case = reference.make_case(name, SEED)
    margin = float(case["generated_margin"])
    print(
      f"{name}: logits std {case['logits'].std():.2f}, margin {margin:.4f},"
      f" {len(np.unique(case['generated']))} ids generated, bfloat16 drift"
      f" {case['bfloat16_drift']}"
    )
    assert margin > MIN_MARGIN, "draw again: change SEED"
    if number:
      case |= {
        key: _part(value)
        for key, value in case.items()
        if key.startswith("gradient/")
      }
    _save(name, case)
  layouts = make_positions(trained_rule(_RULE.value))
  _save("positions", dict(layouts=np.array(layouts)))


if __name__ == "__main__":
  app.run(main)
