"""M-RoPE positions against `get_rope_index`, equal to the last step."""

import dataclasses
import json

import numpy as np
import pytest

from cf_jax.data import prompts
from cf_jax.models import config as model_config
from cf_jax.models import rope
from tests.parity import conftest, specs

ARGUMENTS = (
  "input_ids",
  "attention_mask",
  "image_grid_thw",
  "video_grid_thw",
  "second_per_grid_ts",
)
with np.load(conftest.GOLDENS / "positions.npz") as _arrays:
  LAYOUTS = json.loads(str(_arrays["layouts"]))
VIDEO, IMAGE = specs.VIDEO, specs.IMAGE
CONFIG = dataclasses.replace(
  model_config.tiny(), image_token_id=IMAGE, video_token_id=VIDEO
)


def arguments(layout):
  return {key: np.array(layout[key]) for key in ARGUMENTS if key in layout}


def assert_equal(layout, expected):
  """Over real slots; ours are [B, 3, S], theirs [3, B, S]."""
  ours = rope.rope_index(CONFIG, **arguments(layout))
  assert ours.dtype == np.int32
  real = np.ones_like(layout["input_ids"], bool)
  if "attention_mask" in layout:
    real = conftest.real_slots(layout)
  np.testing.assert_array_equal(
    np.moveaxis(ours, 1, 0)[:, real], np.array(expected)[:, real]
  )
  assert not np.any(np.moveaxis(ours, 1, 0)[:, ~real])


@pytest.mark.parametrize("name", LAYOUTS)
def test_rope_index(name):
  layout = LAYOUTS[name]
  assert_equal(layout, layout["trained"])
  if "installed" in layout:
    assert_equal(layout, layout["installed"])


def test_rope_index_live():
  reference = conftest.import_reference()
  config = reference.hf_config(specs.SPECS["tied"])
  asked = 0
  for layout in LAYOUTS.values():
    if "installed" in layout:  # whole seconds, which 5.2.0 keeps
      asked += 1
      inputs = arguments(layout)
      assert_equal(layout, reference.positions(config, inputs))
  assert asked > 20


def test_text_continues_after_the_largest_axis():
  # Slices of 1 x 2 tokens, 3 s apart at 2 steps a second: time 1 and 7.
  position = rope.rope_index(
    CONFIG,
    [[9, VIDEO, VIDEO, VIDEO, VIDEO, 9]],
    None,
    video_grid_thw=[[2, 2, 4]],
    second_per_grid_ts=[3.0],
  )
  np.testing.assert_array_equal(
    position[0],
    [[0, 1, 1, 7, 7, 8], [0, 1, 1, 1, 1, 8], [0, 1, 2, 1, 2, 8]],
  )


def test_seconds_below_one_count():
  """5.2.0 cuts 0.5 s to 0, and all slices would share one time."""
  position = rope.rope_index(
    CONFIG,
    [[VIDEO] * 3],
    video_grid_thw=[[3, 2, 2]],
    second_per_grid_ts=[0.5],
  )
  np.testing.assert_array_equal(position[0, 0], [0, 1, 2])


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(image_grid_thw=[[1, 2, 4]]), "repeats the image id 1 times"),
    (dict(image_grid_thw=None), "expected a grid for every image"),
    (dict(image_grid_thw=[[1, 2, 2]] * 3), "has 1 images, image_grid_thw"),
    (dict(image_grid_thw=[[1, 3, 2]]), "multiples of 2 patches"),
    (dict(image_grid_thw=[1, 2, 2]), r"must be \[images, 3\]"),
    (dict(second_per_grid_ts=[1.0, 1.0]), "must be 1 finite seconds"),
    (dict(second_per_grid_ts=[-1.0]), "must be 1 finite seconds"),
    (dict(attention_mask=[[1, 1]]), "attention_mask must be"),
    (dict(input_ids=[9, IMAGE]), r"must be \[B, S\]"),
  ],
)
def test_what_does_not_match_is_named(change, message):
  batch = dict(
    input_ids=[[9, IMAGE, 9, VIDEO, VIDEO]],
    attention_mask=None,
    image_grid_thw=[[1, 2, 2]],
    video_grid_thw=[[2, 2, 2]],
    second_per_grid_ts=[1.0],
  )
  rope.rope_index(CONFIG, **batch)
  with pytest.raises(ValueError, match=message):
    rope.rope_index(CONFIG, **batch | change)
  with pytest.raises(ValueError, match="set config.model.image_token_id"):
    rope.rope_index(model_config.tiny(), **batch)


# ------------------------------------------------------ our own prompts


def build(time_s, tokens_per_second=2):
  """A prompt of one video span of 2 x 3 tokens a keyframe."""
  tokenizer = prompts.load_tokenizer("tiny")
  row = prompts.build_prompt(
    tokenizer,
    "What?",
    (),
    frame_time_s=np.array(time_s),
    grid=(2, 3),
    tokens_per_second=tokens_per_second,
    show_time=False,
  )
  return tokenizer.special["<|video_pad|>"], row


@pytest.mark.parametrize("tokens_per_second", [2, 4])
@pytest.mark.parametrize(
  "seconds", [10, 2, 1, 2 / 3, 0.7, 0.5, 0.4, 1 / 3, 0.1, 1 / 15, 1 / 30]
)
def test_regular_keyframes_are_the_reference(seconds, tokens_per_second):
  """Hence of transformers, by the tests above. Qwen2.5-VL has 2 a second."""
  time_s = 3.2 + seconds * np.arange(60)
  video_id, row = build(time_s, tokens_per_second)
  config = model_config.make(
    size="tiny",
    video_token_id=video_id,
    vision=dict(tokens_per_second=tokens_per_second),
  )
  expected = rope.rope_index(
    config,
    row.token[None],
    video_grid_thw=[[60, 4, 6]],
    second_per_grid_ts=[seconds],
  )
  np.testing.assert_array_equal(row.position, expected[0])


def test_irregular_keyframes_lie_at_their_seconds():
  video_id, row = build([7.5, 7.9, 8.0, 11.24, 30.5])
  shown = row.position[:, row.token == video_id]
  start = shown[1, 0]
  # floor(2 * (t - 7.5)): 0, 0.8, 1, 7.48, 46.
  np.testing.assert_array_equal(
    shown[0], start + np.repeat([0, 0, 1, 7, 46], 6)
  )
  np.testing.assert_array_equal(shown[1, :6] - start, [0, 0, 0, 1, 1, 1])
  np.testing.assert_array_equal(shown[2, :6] - start, [0, 1, 2, 0, 1, 2])
  after = np.flatnonzero(row.token == video_id)[-1] + 1
  np.testing.assert_array_equal(row.position[:, after], [start + 47] * 3)
