"""Directories that pass between this project and transformers."""

import copy
import json

import jax
import numpy as np
import pytest

from cf_jax.data import prompts
from cf_jax.models import hf_config, hf_weights, vlm
from tests.parity import conftest as cases

SIZES = {
  "3b": dict(
    hidden_size=2048,
    intermediate_size=11_008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    vocab_size=151_936,
    tie_word_embeddings=True,
    vision_config=dict(hidden_size=1280, out_hidden_size=2048, in_chans=3),
  ),
  "7b": dict(
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152_064,
    tie_word_embeddings=False,
    vision_config=dict(hidden_size=1280, out_hidden_size=3584, in_chans=3),
  ),
  "32b": dict(
    hidden_size=5120,
    intermediate_size=27_648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
    vocab_size=152_064,
    tie_word_embeddings=False,
    vision_config=dict(
      hidden_size=1280, intermediate_size=3456, out_hidden_size=5120
    ),
  ),
  "72b": dict(
    hidden_size=8192,
    intermediate_size=29_568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=152_064,
    tie_word_embeddings=False,
    vision_config=dict(
      hidden_size=1280, intermediate_size=3456, out_hidden_size=8192
    ),
  ),
}
PUBLISHED = dict(
  model_type="qwen2_5_vl",
  max_position_embeddings=128_000,
  rms_norm_eps=1e-6,
  rope_theta=1_000_000.0,
  rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
)
# 5 query heads on 1 key head, nothing square, patches of 3 x 4 x 4.
SMALL = dict(
  text_config=dict(
    vocab_size=61,
    hidden_size=40,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=5,
    num_key_value_heads=1,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    rope_parameters=dict(
      rope_type="default", rope_theta=1e6, mrope_section=[1, 2, 1]
    ),
  ),
  vision_config=dict(
    depth=2,
    hidden_size=24,
    intermediate_size=20,
    num_heads=3,
    out_hidden_size=40,
    patch_size=4,
    window_size=16,
    fullatt_block_indexes=[1],
    tokens_per_second=2,
  ),
  image_token_id=4,
  video_token_id=3,
  vision_start_token_id=1,
  vision_end_token_id=2,
)
GRID = (1, 4, 6)


@pytest.fixture(scope="module", autouse=True)
def transformers():
  """The pinned version, or one skip for the whole file."""
  cases.import_reference()
  import transformers

  transformers.utils.logging.disable_progress_bar()
  return transformers


@pytest.fixture(scope="module")
def make_model(transformers):
  """A small model with weights at which logits spread."""
  import torch

  def make(tied, dtype="float32"):
    spec = copy.deepcopy(SMALL) | {"tie_word_embeddings": tied}
    spec["text_config"]["tie_word_embeddings"] = tied
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(
      transformers.Qwen2_5_VLConfig(**spec)
    )
    with torch.no_grad():
      for name, value in model.named_parameters():
        value.copy_(torch.randn_like(value) * 0.2 + ("norm" in name))
    return model.to(getattr(torch, dtype)).eval()

  return make


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(1)
  ids = rng.integers(5, 61, (1, 14))
  ids[0, 3:11] = [1, 4, 4, 4, 4, 4, 4, 2]
  return {
    "input_ids": ids,
    "attention_mask": np.ones_like(ids),
    "pixel_values": rng.normal(size=(24, 96)).astype(np.float32),
    "image_grid_thw": np.array([GRID]),
  }


def theirs(model, batch):
  import torch

  tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
  with torch.no_grad():
    return model(**tensors).logits.float().numpy()


def text_only(batch):
  ids = np.where(batch["input_ids"] < 5, 7, batch["input_ids"])
  return {"input_ids": ids, "attention_mask": batch["attention_mask"]}


def assert_same_logits(model, config, params, batch):
  for part in (batch, text_only(batch)):
    expected = theirs(model, part)
    with jax.default_matmul_precision("highest"):
      found = np.asarray(vlm.forward(config, params, **part))
    assert expected.std() > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_of_the_published_sizes(transformers, size):
  import torch

  spec = PUBLISHED | SIZES[size]
  with torch.device("meta"):
    model = transformers.Qwen2_5_VLForConditionalGeneration(
      transformers.Qwen2_5_VLConfig(**copy.deepcopy(spec))
    )
  expected = {
    hf_weights.published_name(name): tuple(value.shape)
    for name, value in model.state_dict().items()
  }
  if spec["tie_word_embeddings"]:
    del expected["lm_head.weight"]
  assert hf_weights.tensor_shapes(hf_config.from_hf(spec)) == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
  "settings",
  [{}, {"save_original_format": False}, {"max_shard_size": "40KB"}],
  ids=["published names", "module names", "shards"],
)
def test_reads_what_transformers_writes(
  make_model, batch, tmp_path, tied, settings
):
  model = make_model(tied)
  model.save_pretrained(tmp_path, **settings)
  config, params = hf_weights.load_hf(tmp_path)
  assert config.tie_word_embeddings is tied
  assert ("head" in params["decoder"]) is not tied
  assert_same_logits(model, config, params, batch)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_what_is_written(
  transformers, make_model, batch, tmp_path, tied
):
  model = make_model(tied)
  model.save_pretrained(tmp_path / "theirs")
  config, params = hf_weights.load_hf(tmp_path / "theirs")
  hf_weights.save_hf(tmp_path / "ours", config, params, max_shard_bytes=40_000)
  found, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
    tmp_path / "ours", dtype="auto", output_loading_info=True
  )
  for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not info[kind], kind
  state = found.state_dict()
  for name, value in model.state_dict().items():
    assert (state[name] == value).all(), name
  assert_same_logits(found.eval(), config, params, batch)
  assert found.config.tie_word_embeddings is tied
  rope = found.config.text_config.rope_parameters
  assert rope["rope_theta"] == config.rope_theta
  assert rope["mrope_section"] == list(config.mrope_section)
  assert found.config.vision_config.tokens_per_second == 2
  assert found.config.image_token_id == 4


def test_bfloat16_both_ways(transformers, make_model, tmp_path):
  import torch

  make_model(True, "bfloat16").save_pretrained(tmp_path / "theirs")
  config, params = hf_weights.load_hf(tmp_path / "theirs")
  assert config.dtype == config.param_dtype == "bfloat16"
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
  hf_weights.save_hf(tmp_path / "ours", config, params)
  load = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained
  ours = load(tmp_path / "ours", dtype="auto").state_dict()
  for name, value in (
    load(tmp_path / "theirs", dtype="auto").state_dict().items()
  ):
    assert ours[name].dtype == torch.bfloat16
    assert (ours[name] == value).all(), name


def test_config_of_the_newest_form(transformers, tmp_path):
  """What 5.x writes is read back to what the flat file says."""
  spec = PUBLISHED | SIZES["72b"]
  transformers.Qwen2_5_VLConfig(**copy.deepcopy(spec)).save_pretrained(tmp_path)
  written = json.loads((tmp_path / "config.json").read_text())
  assert "rope_parameters" in written["text_config"]
  found, expected = hf_config.from_hf(written), hf_config.from_hf(spec)
  # 5.x adds its defaults of the ids that the flat file above leaves out.
  assert found.image_token_id == 151_655
  for field in (
    "vision",
    "rope_theta",
    "mrope_section",
    "hidden_size",
    "num_key_value_heads",
    "tie_word_embeddings",
    "rms_norm_eps",
  ):
    assert getattr(found, field) == getattr(expected, field)


@pytest.fixture(scope="module")
def export(transformers, make_model, tmp_path_factory):
  """An export with the shipped tokenizer."""
  folder = tmp_path_factory.mktemp("export")
  tokenizer = prompts.load_tokenizer("tiny")
  spec = copy.deepcopy(SMALL)
  spec["text_config"]["vocab_size"] = tokenizer.vocab_size + 3
  for key in list(spec):
    if key.endswith("token_id"):
      del spec[key]
  spec["vision_config"]["patch_size"] = 14
  spec["vision_config"]["window_size"] = 56
  config = hf_config.from_hf(spec | {"model_type": "qwen2_5_vl"})
  params = jax.jit(lambda: vlm.init(config, jax.random.key(0)))()
  hf_weights.save_hf(
    folder / "made", config, params, tokenizer=prompts.TINY_TOKENIZER
  )
  return folder / "made"


TEXTS = (
  "<think>red</think><answer>B</answer>",
  "Which colour appears first? \u00e9\u4e2d\n\n  3.5s",
  "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>",
)


def test_tokenizer_of_an_export(transformers, export):
  own = prompts.load_tokenizer(export)
  found = transformers.AutoTokenizer.from_pretrained(export)
  for text in TEXTS:
    # Trusted text: the names of added tokens are the tokens.
    expected = []
    for part in own.split_special(text):
      expected += own.encode(part) if isinstance(part, str) else [part]
    assert found.encode(text, add_special_tokens=False) == expected
    assert found.decode(expected) == own.decode(expected)
  assert found.eos_token_id == own.eos_id
  assert found.pad_token_id == own.pad_id


def test_processor_and_model_of_an_export(transformers, export):
  pytest.importorskip(
    "torchvision", reason="the video processor of transformers needs it"
  )
  own = prompts.load_tokenizer(export)
  processor = transformers.AutoProcessor.from_pretrained(export)
  messages = [
    {
      "role": "user",
      "content": [
        {"type": "image"},
        {"type": "text", "text": "Which colour appears first?"},
      ],
    }
  ]
  text = processor.apply_chat_template(messages, add_generation_prompt=True)
  image = np.arange(56 * 84 * 3, dtype=np.uint8).reshape(56, 84, 3)
  inputs = processor(text=[text], images=[image], return_tensors="pt")
  row = prompts.build_prompt(
    own,
    "Which colour appears first?",
    (),
    frame_time_s=np.zeros(1),
    grid=(2, 3),
    tokens_per_second=2,
    time_format="",
    question_template="{question}{options}",
  )
  assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]]
  assert inputs["input_ids"][0].tolist() == row.token.tolist()
  config, params = hf_weights.load_hf(export)
  model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
    export
  ).eval()
  batch = {key: np.asarray(value) for key, value in inputs.items()}
  with jax.default_matmul_precision("highest"):
    ours = vlm.forward(config, params, **batch)
  np.testing.assert_allclose(ours, theirs(model, batch), atol=1e-4)
  assert model.generation_config.eos_token_id == own.eos_id
