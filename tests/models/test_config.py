"""Sizes of the presets, and what a config refuses."""

import dataclasses
import json
import pathlib

import jax
import pytest

from cf_jax.models import config as model_config
from cf_jax.models import vlm

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
  ("size", "count"),
  [
    ("tiny", 1_201_856),
    # The bytes that the published checkpoints' indices state, halved.
    ("qwen2_5_vl_3b", 3_754_622_976),
    ("qwen2_5_vl_7b", 8_292_166_656),
  ],
)
def test_parameter_count(size, count):
  config = model_config.make(size=size)
  shapes = jax.eval_shape(lambda rng: vlm.init(config, rng), jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("size", model_config.SIZES)
def test_presets_are_hashable_and_static(size):
  config = model_config.make(size=size)
  assert hash(config) == hash(model_config.make(size=size))
  assert config.head_dim == 2 * sum(config.mrope_section)


def test_published_7b_config():
  path = SHARED / "qwen2_5_vl" / "config_qwen2_5_vl_7b.json"
  if not path.exists():
    pytest.skip(f"{path} is absent")
  published = json.loads(path.read_text())
  config = dataclasses.asdict(model_config.qwen2_5_vl_7b())
  for ours, theirs in (
    (config, published),
    (config["vision"], published["vision_config"]),
  ):
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 10
    for name in shared:
      value = ours[name]
      value = list(value) if isinstance(value, tuple) else value
      assert value == theirs[name], name
  section = published["rope_scaling"]["mrope_section"]
  assert list(config["mrope_section"]) == section


def test_lists_become_tuples():
  config = model_config.make(
    size="tiny",
    mrope_section=[4, 6, 6],
    vision=dict(fullatt_block_indexes=[0, 1]),
  )
  assert config.vision.fullatt_block_indexes == (0, 1)
  hash(config)


@pytest.mark.parametrize(
  ("change", "names"),
  [
    (dict(num_attention_heads=3), "num_attention_heads"),
    (dict(num_key_value_heads=3), "num_key_value_heads"),
    (dict(mrope_section=(4, 6, 7)), "mrope_section"),
    (dict(attention="flash"), "attention"),
    (dict(remat="all"), "remat"),
    (dict(dtype="int8"), "dtype"),
    (dict(scan_unroll=0), "scan_unroll"),
    (dict(vocab_chunk=-1), "vocab_chunk"),
    (dict(size="8b"), "size"),
    (dict(vision=dict(window_size=27)), "window_size"),
    (
      dict(vision=dict(fullatt_block_indexes=(2,))),
      "fullatt_block_indexes",
    ),
    (dict(vision=dict(out_hidden_size=64)), "out_hidden_size"),
    (dict(vision=dict(num_heads=5)), "num_heads"),
    (dict(vision=dict(num_heads=32)), "num_heads"),
  ],
)
def test_errors_name_the_setting(change, names):
  with pytest.raises(ValueError, match=rf"config\.model\.(\w+\.)?{names}"):
    model_config.make(**(dict(size="tiny") | change))


def test_unknown_field():
  with pytest.raises(TypeError, match="num_layers"):
    model_config.make(size="tiny", num_layers=2)
