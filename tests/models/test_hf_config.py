"""`config.json` in every form it has had, and what it may not say."""

import copy
import dataclasses
import json
import pathlib

import pytest

from cf_jax.models import config as model_config
from cf_jax.models import hf_config

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"

# As published (and as 4.49 to 4.51 write), made small.
FLAT = {
  "architectures": ["Qwen2_5_VLForConditionalGeneration"],
  "attention_dropout": 0.0,
  "bos_token_id": 10,
  "eos_token_id": 11,
  "hidden_act": "silu",
  "hidden_size": 40,
  "image_token_id": 4,
  "initializer_range": 0.03,
  "intermediate_size": 36,
  "max_position_embeddings": 512,
  "max_window_layers": 70,
  "model_type": "qwen2_5_vl",
  "num_attention_heads": 5,
  "num_hidden_layers": 2,
  "num_key_value_heads": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 1]},
  "rope_theta": 500000.0,
  "sliding_window": 32768,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.41.2",
  "use_cache": True,
  "use_sliding_window": False,
  "video_token_id": 3,
  "vision_config": {
    "depth": 3,
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_heads": 3,
    "in_chans": 3,
    "out_hidden_size": 40,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "spatial_patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [0, 2],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
  },
  "vision_end_token_id": 2,
  "vision_start_token_id": 1,
  "vision_token_id": 9,
  "vocab_size": 61,
}
EXPECTED = model_config.VLMConfig(
  vision=model_config.VisionConfig(
    depth=3,
    hidden_size=24,
    intermediate_size=20,
    num_heads=3,
    out_hidden_size=40,
    patch_size=4,
    window_size=16,
    fullatt_block_indexes=(0, 2),
    tokens_per_second=2,
  ),
  vocab_size=61,
  hidden_size=40,
  intermediate_size=36,
  num_hidden_layers=2,
  num_attention_heads=5,
  num_key_value_heads=1,
  max_position_embeddings=512,
  rms_norm_eps=1e-5,
  rope_theta=500_000.0,
  mrope_section=(1, 2, 1),
  tie_word_embeddings=True,
  initializer_range=0.03,
  bos_token_id=10,
  eos_token_id=11,
  pad_token_id=None,
  image_token_id=4,
  video_token_id=3,
  vision_start_token_id=1,
  vision_end_token_id=2,
  vision_token_id=9,
  dtype="bfloat16",
  param_dtype="bfloat16",
)
OUTSIDE = (
  "architectures",
  "model_type",
  "image_token_id",
  "video_token_id",
  "vision_start_token_id",
  "vision_end_token_id",
  "vision_token_id",
  "vision_config",
  "transformers_version",
)


def nested():
  """As 4.52 to 4.57 write: the decoder's fields under text_config."""
  flat = copy.deepcopy(FLAT)
  spec = {key: flat.pop(key) for key in OUTSIDE}
  flat["rope_scaling"] = {
    "type": "default",
    "rope_type": "default",
    "mrope_section": [1, 2, 1],
  }
  flat["layer_types"] = ["full_attention"] * 2
  flat["sliding_window"] = None
  spec["torch_dtype"] = flat.pop("torch_dtype")
  return spec | {"text_config": flat | {"model_type": "qwen2_5_vl_text"}}


def newest():
  """As 5.x writes: `rope_parameters`, `dtype`, ids in both places."""
  spec = nested()
  text = spec["text_config"]
  del text["rope_scaling"]
  text["rope_parameters"] = {
    "rope_type": "default",
    "rope_theta": text.pop("rope_theta"),
    "mrope_section": [1, 2, 1],
  }
  text["pad_token_id"] = None
  spec["dtype"] = spec.pop("torch_dtype")
  spec["tie_word_embeddings"] = True
  vision = spec["vision_config"]
  vision["in_channels"] = vision.pop("in_chans")
  return spec


@pytest.mark.parametrize("form", [lambda: FLAT, nested, newest])
def test_every_form_is_the_same_model(form):
  spec = copy.deepcopy(form())
  assert hf_config.from_hf(json.loads(json.dumps(spec))) == EXPECTED
  assert spec == form()  # an argument is not changed


def test_published_7b_file():
  path = SHARED / "qwen2_5_vl" / "config_qwen2_5_vl_7b.json"
  if not path.exists():
    pytest.skip(f"{path} is absent")
  found = hf_config.from_hf(json.loads(path.read_text()))
  # Only generation_config.json names the padding.
  assert found == dataclasses.replace(
    model_config.qwen2_5_vl_7b(),
    pad_token_id=None,
    dtype="bfloat16",
    param_dtype="bfloat16",
  )


@pytest.mark.parametrize("size", model_config.SIZES)
def test_there_and_back(size):
  config = dataclasses.replace(
    model_config.make(size=size), dtype="bfloat16", param_dtype="bfloat16"
  )
  spec = json.loads(json.dumps(hf_config.to_hf(config, dtype="bfloat16")))
  assert hf_config.from_hf(spec) == config


def test_written_form_is_the_published_one():
  spec = hf_config.to_hf(EXPECTED, dtype="bfloat16")
  for key in (
    "architectures",
    "model_type",
    "rope_scaling",
    "rope_theta",
    "vision_config",
    "tie_word_embeddings",
    "torch_dtype",
    "image_token_id",
    "vocab_size",
  ):
    if isinstance(FLAT[key], dict):
      assert FLAT[key].items() <= spec[key].items(), key
    else:
      assert spec[key] == FLAT[key], key
  assert "pad_token_id" not in spec
  assert spec["vision_config"]["in_channels"] == 3


def test_what_a_tower_leaves_out_is_transformers_default():
  spec = copy.deepcopy(FLAT)
  spec["hidden_size"] = 3584
  spec["num_attention_heads"] = 28
  spec["num_key_value_heads"] = 4
  spec["rope_scaling"]["mrope_section"] = [16, 24, 24]
  spec["vision_config"] = {"hidden_size": 1280, "in_chans": 3}
  vision = hf_config.from_hf(spec).vision
  # Qwen2_5_VLVisionConfig: not the published files' 2 but 4.
  assert vision.tokens_per_second == 4
  assert (vision.depth, vision.num_heads, vision.out_hidden_size) == (
    32,
    16,
    3584,
  )
  assert vision.fullatt_block_indexes == (7, 15, 23, 31)
  assert (vision.patch_size, vision.window_size) == (14, 112)


def test_spatial_patch_size_stands_in():
  spec = copy.deepcopy(FLAT)
  del spec["vision_config"]["patch_size"]
  assert hf_config.from_hf(spec).vision.patch_size == 4


@pytest.mark.parametrize(
  ("outer", "inner", "tied"),
  [
    (None, None, False),
    (True, None, True),
    (None, True, True),
    (True, True, True),
    (False, False, False),
  ],
)
def test_tied(outer, inner, tied):
  spec = nested()
  spec["tie_word_embeddings"] = outer
  spec["text_config"]["tie_word_embeddings"] = inner
  assert hf_config.from_hf(spec).tie_word_embeddings is tied


def test_several_ends():
  config = hf_config.from_hf(FLAT | {"eos_token_id": [11, 10]})
  assert config.eos_token_id == 11


def test_an_end_beyond_the_vocabulary_is_generations_business():
  spec = FLAT | {"eos_token_id": 151645, "bos_token_id": 151643}
  assert hf_config.from_hf(spec).eos_token_id == 151645


def test_dtype_that_is_none_of_ours_runs_in_float32():
  assert hf_config.from_hf(FLAT | {"torch_dtype": "float16"}).dtype == "float32"


def _vision(**fields):
  return {"vision_config": FLAT["vision_config"] | fields}


def _rope(**fields):
  return {"rope_scaling": FLAT["rope_scaling"] | fields}


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"model_type": "qwen2_vl"}, "'qwen2_vl'.*another vision tower.*7B"),
    ({"model_type": "qwen3_vl"}, "'qwen3_vl'.*supported is 'qwen2_5_vl'"),
    ({"model_type": "qwen2"}, "without a vision tower"),
    ({"model_type": "llama"}, "'llama'.*supported is 'qwen2_5_vl'"),
    ({"model_type": None}, "None.*supported is 'qwen2_5_vl'"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*'silu'"),
    (_vision(hidden_act="gelu"), "vision_config.hidden_act 'gelu'"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
    ({"head_dim": 16}, "head_dim 16"),
    (_rope(type="yarn", factor=4.0), "rope_scaling.type 'yarn'"),
    (_rope(rope_type="linear"), "rope_scaling.rope_type 'linear'"),
    (_rope(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    ({"rope_scaling": None}, "missing rope_scaling.mrope_section"),
    (_rope(mrope_section=[1, 1, 1]), "mrope_section must be three counts"),
    (_rope(mrope_section=[2, 2]), "mrope_section must be three counts"),
    ({"hidden_size": None}, "missing hidden_size"),
    ({"rms_norm_eps": None, "vocab_size": None}, "vocab_size, rms_norm_eps"),
    (_vision(in_channels=1), "in_channels is 1 and in_chans 3"),
    (_vision(spatial_patch_size=7), "patch_size is 4 and spatial_patch_size 7"),
    (_vision(out_hidden_size=24), "vision_config.out_hidden_size"),
    ({"vision_config": [1]}, "vision_config must be an object"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    # Values of another type.
    ({"model_type": ["qwen2_5_vl"]}, r"model_type \['qwen2_5_vl'\] is not"),
    (
      {"vocab_size": 512.0},
      "^vocab_size must be a positive integer, got 512.0",
    ),
    (
      {"vocab_size": "512"},
      "^vocab_size must be a positive integer, got '512'",
    ),
    ({"num_hidden_layers": True}, "num_hidden_layers .* integer, got True"),
    ({"num_attention_heads": 0}, "num_attention_heads .* integer, got 0"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps must be a positive number, got 'x'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps .* number, got nan"),
    ({"rope_theta": "1e6"}, "rope_theta must be a positive number, got '1e6'"),
    ({"initializer_range": True}, "initializer_range .* number .*, got True"),
    ({"tie_word_embeddings": "false"}, "tie_word.* true or false, got 'false'"),
    ({"use_sliding_window": "no"}, "use_sliding_.* true or false, got 'no'"),
    ({"layer_types": 2}, "layer_types must be a list of strings, got 2"),
    ({"layer_types": [[]]}, r"layer_types must be a list of str.* \[\[\]\]"),
    ({"head_dim": "8"}, "head_dim must be a positive integer, got '8'"),
    ({"rope_scaling": [1]}, r"rope_scaling must be an object, got \[1\]"),
    (_rope(mrope_section="abc"), "rope_scaling.mrope_section .*, got 'abc'"),
    (_rope(mrope_section=[1, True, 2]), r"mrope_section .* \[1, True, 2\]"),
    (_rope(rope_theta=[]), r"rope_scaling.rope_theta .* number, got \[\]"),
    (_vision(fullatt_block_indexes=7), "vision_config.fullatt_.*, got 7"),
    (_vision(fullatt_block_indexes=[False]), r"fullatt_.*, got \[False\]"),
    (_vision(fullatt_block_indexes=[3]), r"fullatt_.* must lie in \[0, 3\)"),
    (_vision(depth="2"), "vision_config.depth .* integer, got '2'"),
    (_vision(patch_size=0), "vision_config.patch_size .* integer, got 0"),
    (_vision(in_chans="3"), "vision_config.in_chans .* integer, got '3'"),
    (_vision(tokens_per_second="2"), "tokens_per_second .* number, got '2'"),
    ({"image_token_id": []}, r"image_token_id must be an id .*, got \[\]"),
    (
      {"image_token_id": 61},
      "image_token_id must .* below vocab_size 61, got 61",
    ),
    ({"image_token_id": True}, "image_token_id must be an id .*, got True"),
    ({"image_token_id": 4.0}, r"image_token_id must be an id .*, got 4\.0"),
    ({"pad_token_id": -1}, "pad_token_id must be an id .*, got -1"),
    ({"eos_token_id": [11, "x"]}, r"eos_token_id must .* \[11, 'x'\]"),
  ],
)
def test_errors_name_the_key(change, says):
  with pytest.raises(ValueError, match=says) as caught:
    hf_config.from_hf(copy.deepcopy(FLAT) | change)
  # Whoever opened the file says which one it was.
  assert "config.json" not in str(caught.value)


def test_errors_in_a_nested_file():
  spec = nested()
  del spec["text_config"]["num_hidden_layers"]
  with pytest.raises(ValueError, match=r"missing text_config\.num_hidden_lay"):
    hf_config.from_hf(spec)
  spec = nested()
  spec["text_config"]["vocab_size"] = "61"
  with pytest.raises(ValueError, match=r"^text_config\.vocab_size must be"):
    hf_config.from_hf(spec)
  spec = nested()
  spec["text_config"]["eos_token_id"] = "11"
  with pytest.raises(ValueError, match=r"^text_config\.eos_token_id must be"):
    hf_config.from_hf(spec)
  spec = newest()
  spec["text_config"]["rope_parameters"]["rope_theta"] = "5"
  with pytest.raises(ValueError, match=r"text_config\.rope_parameters\.rope_t"):
    hf_config.from_hf(spec)
  spec = nested() | {"tie_word_embeddings": False}
  with pytest.raises(ValueError, match="contradict"):
    hf_config.from_hf(spec)


@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps"])
def test_what_the_file_cannot_say(field):
  config = model_config.make(size="tiny", vision={field: 3.0})
  with pytest.raises(ValueError, match=rf"config\.model\.vision\.{field}"):
    hf_config.to_hf(config, dtype="float32")
