"""Checkpoints in and out: which number goes where, and what is refused."""

import dataclasses
import errno
import json
import math
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from cf_jax.data import prompts
from cf_jax.models import config as model_config
from cf_jax.models import hf_config, hf_weights, lora, vlm

# One key head for five query heads, and no two axes of one size.
CONFIG = model_config.VLMConfig(
  vision=model_config.VisionConfig(
    depth=2,
    hidden_size=24,
    intermediate_size=20,
    num_heads=3,
    out_hidden_size=40,
    patch_size=2,
    window_size=8,
    fullatt_block_indexes=(1,),
  ),
  vocab_size=61,
  hidden_size=40,
  intermediate_size=36,
  num_hidden_layers=2,
  num_attention_heads=5,
  num_key_value_heads=1,
  mrope_section=(1, 2, 1),
  vision_start_token_id=1,
  vision_end_token_id=2,
  video_token_id=3,
  image_token_id=4,
)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)

# Names and shapes as torch's modules have them.
BLOCK = {
  "norm1.weight": (24,),
  "norm2.weight": (24,),
  "attn.qkv.weight": (72, 24),
  "attn.qkv.bias": (72,),
  "attn.proj.weight": (24, 24),
  "attn.proj.bias": (24,),
  "mlp.gate_proj.weight": (20, 24),
  "mlp.gate_proj.bias": (20,),
  "mlp.up_proj.weight": (20, 24),
  "mlp.up_proj.bias": (20,),
  "mlp.down_proj.weight": (24, 20),
  "mlp.down_proj.bias": (24,),
}
LAYER = {
  "input_layernorm.weight": (40,),
  "post_attention_layernorm.weight": (40,),
  "self_attn.q_proj.weight": (40, 40),
  "self_attn.q_proj.bias": (40,),
  "self_attn.k_proj.weight": (8, 40),
  "self_attn.k_proj.bias": (8,),
  "self_attn.v_proj.weight": (8, 40),
  "self_attn.v_proj.bias": (8,),
  "self_attn.o_proj.weight": (40, 40),
  "mlp.gate_proj.weight": (36, 40),
  "mlp.up_proj.weight": (36, 40),
  "mlp.down_proj.weight": (40, 36),
}
SHAPES = {
  "model.embed_tokens.weight": (61, 40),
  "model.norm.weight": (40,),
  "lm_head.weight": (61, 40),
  "visual.patch_embed.proj.weight": (24, 3, 2, 2, 2),
  "visual.merger.ln_q.weight": (24,),
  "visual.merger.mlp.0.weight": (96, 96),
  "visual.merger.mlp.0.bias": (96,),
  "visual.merger.mlp.2.weight": (40, 96),
  "visual.merger.mlp.2.bias": (40,),
  **{f"visual.blocks.{i}.{k}": v for i in (0, 1) for k, v in BLOCK.items()},
  **{f"model.layers.{i}.{k}": v for i in (0, 1) for k, v in LAYER.items()},
}


def make_tensors(config=CONFIG, dtype=np.float32):
  rng = np.random.default_rng(0)
  made = {
    name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()
  }
  if config.tie_word_embeddings:
    del made["lm_head.weight"]
  return made


def write(folder, tensors, config=CONFIG, dtype="float32"):
  """One file, without the code under test."""
  folder.mkdir(exist_ok=True)
  spec = hf_config.to_hf(config, dtype=dtype)
  (folder / "config.json").write_text(json.dumps(spec))
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  return folder


def write_shards(folder, tensors, config=CONFIG):
  """Every third tensor in a file of its own."""
  folder.mkdir(exist_ok=True)
  spec = hf_config.to_hf(config, dtype="float32")
  (folder / "config.json").write_text(json.dumps(spec))
  where = {}
  for i in range(3):
    part = dict(list(tensors.items())[i::3])
    safetensors.numpy.save_file(part, folder / f"{i}.safetensors")
    where |= dict.fromkeys(part, f"{i}.safetensors")
  index = {"metadata": {"total_size": 1}, "weight_map": where}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder


def assert_equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for path, value in jax.tree_util.tree_leaves_with_path(expected):
    got = found
    for key in path:
      got = got[key.key]
    assert got.dtype == value.dtype, path
    np.testing.assert_array_equal(
      np.asarray(got).view(np.uint8), np.asarray(value).view(np.uint8), path
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return write(tmp_path_factory.mktemp("hf") / "plain", make_tensors())


@pytest.fixture(scope="module")
def params(directory):
  return hf_weights.load_hf(directory)[1]


# ----------------------------------------------------------- the table


def test_every_number_lands_where_torch_uses_it(params):
  """Indices by hand: y[o] = sum over i of weight[o, i] x[i], heads of 8."""
  w = make_tensors()
  tower, decoder = params["vision"], params["decoder"]
  block, layer = tower["layers"], decoder["layers"]
  qkv = w["visual.blocks.1.attn.qkv.weight"]
  for third, name in enumerate(("query", "key", "value")):
    kernel, bias = block[name]["kernel"], block[name]["bias"]
    assert kernel.shape == (2, 24, 3, 8)
    assert kernel[1, 5, 2, 7] == qkv[24 * third + 8 * 2 + 7, 5]
    assert (
      bias[0, 1, 3] == (w["visual.blocks.0.attn.qkv.bias"][24 * third + 8 + 3])
    )
  proj = w["visual.blocks.0.attn.proj.weight"]
  assert block["out"]["kernel"][0, 2, 3, 11] == proj[11, 8 * 2 + 3]
  gate = w["visual.blocks.1.mlp.gate_proj.weight"]
  assert block["mlp"]["gate"]["kernel"][1, 3, 19] == gate[19, 3]
  down = w["visual.blocks.1.mlp.down_proj.weight"]
  assert block["mlp"]["down"]["kernel"][1, 19, 3] == down[3, 19]
  assert (
    block["mlp"]["up"]["bias"][1, 4]
    == (w["visual.blocks.1.mlp.up_proj.bias"][4])
  )
  assert (
    block["attention_norm"]["scale"][1, 4]
    == (w["visual.blocks.1.norm1.weight"][4])
  )
  assert (
    block["mlp_norm"]["scale"][1, 4] == w["visual.blocks.1.norm2.weight"][4]
  )
  # A patch is (colour, frame, row, column): 3 x 2 x 2 x 2.
  patch = w["visual.patch_embed.proj.weight"]
  kernel = tower["patch_embed"]["proj"]["kernel"]
  assert kernel[2 * 8 + 1 * 4 + 0 * 2 + 1, 9] == patch[9, 2, 1, 0, 1]
  merger = tower["merger"]
  assert merger["up"]["kernel"][7, 90] == w["visual.merger.mlp.0.weight"][90, 7]
  assert (
    merger["down"]["kernel"][90, 7] == (w["visual.merger.mlp.2.weight"][7, 90])
  )
  assert merger["norm"]["scale"][3] == w["visual.merger.ln_q.weight"][3]

  query = w["model.layers.1.self_attn.q_proj.weight"]
  assert layer["query"]["kernel"][1, 30, 4, 6] == query[8 * 4 + 6, 30]
  value = w["model.layers.0.self_attn.v_proj.bias"]
  assert layer["value"]["bias"][0, 0, 6] == value[6]
  key = w["model.layers.0.self_attn.k_proj.weight"]
  assert layer["key"]["kernel"][0, 39, 0, 6] == key[6, 39]
  out = w["model.layers.1.self_attn.o_proj.weight"]
  assert layer["out"]["kernel"][1, 4, 6, 30] == out[30, 8 * 4 + 6]
  assert "bias" not in layer["out"]
  up = w["model.layers.1.mlp.up_proj.weight"]
  assert layer["mlp"]["up"]["kernel"][1, 39, 35] == up[35, 39]
  assert (
    layer["attention_norm"]["scale"][1, 3]
    == (w["model.layers.1.input_layernorm.weight"][3])
  )
  assert (
    layer["mlp_norm"]["scale"][1, 3]
    == (w["model.layers.1.post_attention_layernorm.weight"][3])
  )
  assert (
    decoder["embed"]["embedding"][60, 3]
    == (w["model.embed_tokens.weight"][60, 3])
  )
  assert decoder["head"]["embedding"][60, 3] == w["lm_head.weight"][60, 3]
  assert decoder["norm"]["scale"][3] == w["model.norm.weight"][3]


@pytest.mark.parametrize(
  ("size", "count", "numbers"),
  [
    # Counted by transformers 5.2.0 on the meta device.
    ("qwen2_5_vl_3b", 824, 3_754_622_976),
    ("qwen2_5_vl_7b", 729, 8_292_166_656),
    ("qwen2_5_vl_32b", 1161, 33_452_718_336),
    ("qwen2_5_vl_72b", 1353, 73_410_777_344),
  ],
)
def test_published_sizes(size, count, numbers):
  config = model_config.make(size=size)
  shapes = hf_weights.tensor_shapes(config)
  assert len(shapes) == count
  assert sum(math.prod(shape) for shape in shapes.values()) == numbers


def test_names_and_shapes():
  assert hf_weights.tensor_shapes(CONFIG) == SHAPES


def test_rows_are_the_parameters(params):
  """No parameter without a row, no row without a parameter."""
  expected = jax.eval_shape(lambda: vlm.init(CONFIG, jax.random.key(0)))
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  for found, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(expected)):
    assert found.shape == leaf.shape


GENERATIONS = {
  "4.49 to 4.53": lambda name: name,
  "5.4.0 to 5.5.3": lambda name: re.sub("^visual", "model.visual", name),
  "modules since 4.52": lambda name: re.sub(
    "^visual",
    "model.visual",
    re.sub("^model", "model.language_model", name),
  ),
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_of_names(tmp_path, params, generation):
  rename = GENERATIONS[generation]
  tensors = {rename(name): value for name, value in make_tensors().items()}
  found = hf_weights.load_hf(write(tmp_path / "a", tensors))[1]
  assert_equal(found, params)


def test_headless_class(tmp_path):
  tensors = make_tensors(TIED)
  expected = hf_weights.load_hf(write(tmp_path / "a", tensors, TIED))[1]
  tensors = {
    re.sub("^model", "language_model", name): value
    for name, value in tensors.items()
  }
  found = hf_weights.load_hf(write(tmp_path / "b", tensors, TIED))[1]
  assert_equal(found, expected)


# ------------------------------------------------------------------ in


def test_several_files(tmp_path, params):
  config, found = hf_weights.load_hf(
    write_shards(tmp_path / "a", make_tensors())
  )
  assert config == CONFIG
  assert_equal(found, params)


def test_rotary_tables_are_left_out(tmp_path, params):
  tensors = make_tensors() | {
    "model.rotary_emb.inv_freq": np.ones(4, np.float32),
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    "visual.rotary_pos_emb.inv_freq": np.ones(2, np.float32),
  }
  assert_equal(hf_weights.load_hf(write(tmp_path / "a", tensors))[1], params)


def test_tied_head_must_be_the_embedding(tmp_path):
  tensors = make_tensors(TIED)
  expected = hf_weights.load_hf(write(tmp_path / "a", tensors, TIED))[1]
  assert "head" not in expected["decoder"]
  head = tensors["model.embed_tokens.weight"].copy()
  tensors["lm_head.weight"] = head
  found = hf_weights.load_hf(write(tmp_path / "b", tensors, TIED))[1]
  assert_equal(found, expected)
  head[60, 39] = np.nextafter(head[60, 39], np.float32(9))
  with pytest.raises(ValueError, match="lm_head.weight differs.*tie_word"):
    hf_weights.load_hf(write(tmp_path / "c", tensors, TIED))


def test_dtype_is_the_files(tmp_path, params):
  tensors = make_tensors(dtype=ml_dtypes.bfloat16)
  folder = write(tmp_path / "a", tensors, dtype="bfloat16")
  config, found = hf_weights.load_hf(folder)
  assert (config.dtype, config.param_dtype) == ("bfloat16", "bfloat16")
  assert_equal(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
  config, wide = hf_weights.load_hf(folder, dtype="float32")
  assert (config.dtype, config.param_dtype) == ("float32", "float32")
  assert_equal(wide, jax.tree.map(lambda x: x.astype(jnp.float32), found))


def test_dtype_may_differ_between_parameters(tmp_path):
  tensors = {
    name: value.astype(
      np.float32 if name.startswith("visual") else ml_dtypes.bfloat16
    )
    for name, value in make_tensors().items()
  }
  config, found = hf_weights.load_hf(write(tmp_path / "a", tensors))
  assert config.dtype == "float32"  # the tower is the larger half here
  assert found["vision"]["layers"]["out"]["kernel"].dtype == jnp.float32
  assert found["decoder"]["layers"]["out"]["kernel"].dtype == jnp.bfloat16
  name = "model.layers.1.mlp.up_proj.weight"
  tensors[name] = tensors[name].astype(np.float32)
  with pytest.raises(ValueError, match="decoder/layers/mlp/up/kernel.*dtype="):
    hf_weights.load_hf(write(tmp_path / "b", tensors))
  hf_weights.load_hf(write(tmp_path / "b", tensors), dtype="bfloat16")


def test_float16_needs_a_dtype(tmp_path):
  tensors = make_tensors(dtype=np.float16)
  folder = write(tmp_path / "a", tensors)
  with pytest.raises(ValueError, match=r"float16.*dtype='float32'"):
    hf_weights.load_hf(folder)
  found = hf_weights.load_hf(folder, dtype="float32")[1]
  np.testing.assert_array_equal(
    found["decoder"]["norm"]["scale"],
    tensors["model.norm.weight"].astype(np.float32),
  )


_SHARDED = """
import sys
import jax, numpy as np
from cf_jax.models import hf_weights
from cf_jax.runtime import sharding

assert jax.device_count() == 8
config, params = hf_weights.load_hf(sys.argv[1])
mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4, context=1)
_, spread = hf_weights.load_hf(sys.argv[1], mesh)
expected = sharding.tree_shardings(params, mesh, sharding.PARTITION_RULES)
split = 0
def check(one, other, where):
    global split
    assert other.sharding.is_equivalent_to(where, other.ndim), where
    np.testing.assert_array_equal(one, other)
    split += not where.is_fully_replicated
jax.tree.map(check, params, spread, expected)
hf_weights.save_hf(sys.argv[2], config, spread)
_, again = hf_weights.load_hf(sys.argv[2])
jax.tree.map(np.testing.assert_array_equal, params, again)
print("split", split)
"""


def test_eight_devices_hold_the_same(directory, with_devices, tmp_path):
  printed = with_devices(8, _SHARDED, str(directory), str(tmp_path / "out"))
  assert int(printed.split()[-1]) >= 15


_PROCESSES = """
import sys
import jax, numpy as np, safetensors.numpy
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from cf_jax.models import hf_weights
from cf_jax.runtime import sharding

assert jax.process_count() == 2 and jax.device_count() == 4
mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, context=1)
config, params = hf_weights.load_hf(sys.argv[3], mesh)
kernel = params["decoder"]["layers"]["mlp"]["up"]["kernel"]
assert len(kernel.addressable_shards) == 2 and not kernel.is_fully_addressable
hf_weights.save_hf(sys.argv[4], config, params)
one, other = (
    safetensors.numpy.load_file(folder + "/model.safetensors")
    for folder in sys.argv[3:])
assert one.keys() == other.keys()
for name in one:
    np.testing.assert_array_equal(one[name], other[name])
"""


def test_two_processes_read_and_write_their_parts(directory, tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
  running = [
    subprocess.Popen(
      [
        sys.executable,
        "-c",
        _PROCESSES,
        address,
        str(rank),
        str(directory),
        str(tmp_path / "out"),
      ],
      cwd=pathlib.Path(__file__).parents[2],
      env=os.environ | {"XLA_FLAGS": flags},
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank in (0, 1)
  ]
  for process in running:
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log[-3000:]


# ----------------------------------------------------------------- out


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["head", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bitwise(tmp_path, config, dtype):
  tensors = make_tensors(config)
  config, params = hf_weights.load_hf(
    write(tmp_path / "a", tensors, config), dtype=dtype
  )
  hf_weights.save_hf(tmp_path / "b", config, params, max_shard_bytes=20_000)
  found_config, found = hf_weights.load_hf(tmp_path / "b")
  assert found_config == config
  assert_equal(found, params)
  index = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
  files = sorted(set(index["weight_map"].values()))
  count = len(files)
  assert count > 3
  assert files[0] == f"model-00001-of-{count:05d}.safetensors"
  assert sorted(index["weight_map"]) == sorted(tensors)
  total = 0
  for file in files:
    with safetensors.safe_open(tmp_path / "b" / file, framework="np") as opened:
      assert opened.metadata() == {"format": "pt"}
      sizes = {
        name: opened.get_tensor(name).nbytes for name in opened.offset_keys()
      }
    assert {index["weight_map"][name] for name in sizes} == {file}
    assert sum(sizes.values()) <= 20_000 or len(sizes) == 1
    total += sum(sizes.values())
  assert index["metadata"]["total_size"] == total


def test_a_small_model_is_one_file_with_the_tensors(tmp_path, params):
  hf_weights.save_hf(tmp_path / "a", CONFIG, params)
  found = safetensors.numpy.load_file(tmp_path / "a" / "model.safetensors")
  expected = make_tensors()
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, name)
  assert not (tmp_path / "a" / "model.safetensors.index.json").exists()


def test_dtype_of_the_copy(tmp_path, params):
  hf_weights.save_hf(tmp_path / "a", CONFIG, params, dtype="bfloat16")
  config, found = hf_weights.load_hf(tmp_path / "a")
  assert config.param_dtype == "bfloat16"
  assert_equal(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
  spec = json.loads((tmp_path / "a" / "config.json").read_text())
  assert spec["torch_dtype"] == "bfloat16"


def test_parameters_on_the_host(tmp_path, params):
  hf_weights.save_hf(tmp_path / "a", CONFIG, jax.tree.map(np.asarray, params))
  assert_equal(hf_weights.load_hf(tmp_path / "a")[1], params)


def test_tokenizer_and_settings_come_along(tmp_path):
  tokenizer = prompts.load_tokenizer("tiny")
  config = model_config.make(
    size="tiny", vocab_size=tokenizer.vocab_size, num_hidden_layers=1
  )
  params = jax.jit(lambda: vlm.init(config, jax.random.key(0)))()
  out = tmp_path / "a"
  hf_weights.save_hf(out, config, params, tokenizer=prompts.TINY_TOKENIZER)
  found = prompts.load_tokenizer(out)
  assert found.chat_template == tokenizer.chat_template
  text = "Which colour? <think>red</think>"
  assert found.encode(text) == tokenizer.encode(text)

  def read(name):
    return json.loads((out / name).read_text())

  # What the config leaves out is the tokenizer's.
  assert read("config.json")["image_token_id"] == found.special["<|image_pad|>"]
  assert read("generation_config.json")["eos_token_id"] == found.eos_id
  image = read("preprocessor_config.json")
  assert (image["patch_size"], image["merge_size"]) == (14, 2)
  assert (image["min_pixels"], image["max_pixels"]) == (3136, 12845056)
  assert image["image_mean"] == [0.48145466, 0.4578275, 0.40821073]
  assert image["processor_class"] == "Qwen2_5_VLProcessor"
  video = read("video_preprocessor_config.json")
  assert video["video_processor_type"] == "Qwen2VLVideoProcessor"
  # Settings of a folder that has them win; the patch is the model's.
  shutil.copytree(prompts.TINY_TOKENIZER, tmp_path / "tok")
  mine = {"max_pixels": 50176, "patch_size": 16, "image_processor_type": "X"}
  (tmp_path / "tok/preprocessor_config.json").write_text(json.dumps(mine))
  (tmp_path / "tok/generation_config.json").write_text('{"top_k": 1}')
  out = tmp_path / "b"
  hf_weights.save_hf(out, config, params, tokenizer=tmp_path / "tok")
  image = read("preprocessor_config.json")
  assert (image["max_pixels"], image["patch_size"]) == (50176, 14)
  assert read("video_preprocessor_config.json")["max_pixels"] == 50176
  assert read("generation_config.json") == {"top_k": 1}


# -------------------------------------------------------------- errors


def _without(count):
  tensors = make_tensors()
  for name in list(tensors)[-count:]:
    del tensors[name]
  return tensors


def _with(**tensors):
  return make_tensors() | {
    name.replace("__", "."): value for name, value in tensors.items()
  }


@pytest.mark.parametrize(
  ("make", "says"),
  [
    (lambda: _without(1), "1 of 57 tensors are missing: model.layers.1.mlp"),
    (lambda: _without(12), "12 of 57 tensors are missing: .* and 2 more"),
    (
      lambda: make_tensors(TIED),
      "1 of 57 .*: lm_head.weight; .*tie_word_embeddings true",
    ),
    (
      lambda: _with(visual__extra=np.ones(1, np.float32)),
      "1 tensors are not of this model: visual.extra",
    ),
    (
      lambda: _with(base__lora_A=np.ones(1, np.float32)),
      r"base\.lora_A; merge adapters",
    ),
    (
      lambda: _with(
        model__layers__0__mlp__up_proj__weight=np.ones((36, 41), np.float32)
      ),
      r"model.layers.0.mlp.up_proj.weight has shape \[36, 41\], config.json"
      r" says \[36, 40\]; check intermediate_size, hidden_size",
    ),
    (
      lambda: _with(
        visual__patch_embed__proj__weight=np.ones((24, 24), np.float32)
      ),
      r"shape \[24, 24\], .*\[24, 3, 2, 2, 2\]; .*temporal_patch_size",
    ),
    (
      lambda: _with(model__norm__weight=np.ones(40, np.int8)),
      "model.norm.weight is I8; supported are F32",
    ),
    (
      lambda: _with(model__visual__merger__ln_q__weight=np.ones(24)),
      "are the same tensor",
    ),
  ],
)
def test_tensors_that_do_not_fit(tmp_path, make, says):
  with pytest.raises(ValueError, match=says):
    hf_weights.load_hf(write(tmp_path / "a", make()))


_INDICES = {
  "file elsewhere": '{"weight_map": {"a": "../other.safetensors"}}',
  "file of the system": '{"weight_map": {"a": "/etc/hostname"}}',
  "number as a file": '{"weight_map": {"a": 1}}',
  "deep index": '{"a":' * 60_000,
}


def _break(folder, kind):
  """Replaces the weights by something else."""
  weights = folder / "model.safetensors"
  whole = weights.read_bytes()
  weights.unlink()
  if kind == "truncated":
    weights.write_bytes(whole[:-7])
  elif kind == "not one":
    weights.write_bytes(b"PK\x03\x04" + bytes(60))
  elif kind == "empty file":
    weights.write_bytes(b"")
  elif kind == "pointer":
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid 1\n")
  elif kind == "pickle":
    (folder / "pytorch_model.bin").write_bytes(b"")
  elif kind == "gguf":
    (folder / "model-q4.gguf").write_bytes(b"")
  elif kind == "adapter":
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
  elif kind == "no config":
    (folder / "config.json").unlink()
    weights.write_bytes(whole)
  elif kind == "empty":
    (folder / "config.json").unlink()
  elif kind == "broken config":
    (folder / "config.json").write_text("{")
  elif kind == "index alone":
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "1.safetensors").write_bytes(whole)
  elif kind == "broken index":
    (folder / "model.safetensors.index.json").write_text("[]")
  elif kind in _INDICES:
    (folder / "model.safetensors.index.json").write_text(_INDICES[kind])
    (folder.parent / "other.safetensors").write_bytes(whole)


@pytest.mark.parametrize(
  ("kind", "says"),
  [
    ("truncated", r"truncated or not a safetensors file.*copy it again"),
    ("not one", "truncated or not a safetensors file"),
    ("empty file", "truncated or not a safetensors file"),
    ("pointer", "git lfs pull"),
    ("pickle", "pytorch_model.bin: pickles.*save_pretrained"),
    ("gguf", "GGUF"),
    ("adapter", "adapters alone.*merge_and_unload"),
    ("no config", "no config.json"),
    ("empty", "the directory is empty"),
    ("broken config", "config.json is not JSON"),
    ("index alone", "names 1 of 2 files that are not there: 2.safetensors"),
    ("broken index", "expected an object with weight_map"),
    ("file elsewhere", "not beside it: .*other.safetensors"),
    ("file of the system", "not beside it: .*hostname"),
    ("number as a file", "expected an object with weight_map"),
    ("deep index", "expected an object with weight_map"),
  ],
)
def test_directories_that_are_something_else(tmp_path, directory, kind, says):
  folder = shutil.copytree(directory, tmp_path / "a")
  _break(folder, kind)
  with pytest.raises(ValueError, match=says):
    hf_weights.load_hf(folder)


def test_no_directory_and_bad_dtype(tmp_path, directory):
  with pytest.raises(ValueError, match="there is no such directory"):
    hf_weights.load_hf(tmp_path / "nothing")
  with pytest.raises(ValueError, match="dtype must be one of.*'int8'"):
    hf_weights.load_hf(directory, dtype="int8")


def test_what_cannot_be_written(tmp_path, params):
  out = tmp_path / "a"
  adapted = lora.init(
    params, jax.random.key(0), rank=2, alpha=2.0, modules=("query",)
  )
  for wrong, says in (
    (adapted, r"lora\.merge"),
    (params | {"extra": {"scale": jnp.ones(3)}}, "unknown extra/scale"),
    ({"vision": params["vision"]}, "missing decoder/embed/embedding"),
    (jax.tree.map(lambda x: x[..., :1], params), "has shape.*config says"),
    (jax.tree.map(lambda x: x.astype(jnp.float16), params), "is float16"),
  ):
    with pytest.raises(ValueError, match=says):
      hf_weights.save_hf(out, CONFIG, wrong)
  with pytest.raises(ValueError, match="dtype must be one of"):
    hf_weights.save_hf(out, CONFIG, params, dtype="float16")
  small = model_config.make(size="tiny", vocab_size=61)
  shapes = jax.eval_shape(lambda: vlm.init(small, jax.random.key(0)))
  with pytest.raises(ValueError, match="model has 61 token embeddings"):
    hf_weights.save_hf(out, small, shapes, tokenizer=prompts.TINY_TOKENIZER)
  assert not list(tmp_path.iterdir())


def test_ids_of_another_tokenizer(tmp_path):
  size = prompts.load_tokenizer("tiny").vocab_size
  config = model_config.make(size="tiny", vocab_size=size, image_token_id=3)
  params = jax.eval_shape(lambda: vlm.init(config, jax.random.key(0)))
  with pytest.raises(
    ValueError, match="image_token_id is 3 in the model's config"
  ):
    hf_weights.save_hf(
      tmp_path / "a", config, params, tokenizer=prompts.TINY_TOKENIZER
    )


def test_a_directory_with_something_in_it_is_left_alone(tmp_path, params):
  (tmp_path / "note").write_text("mine")
  with pytest.raises(ValueError, match="not empty"):
    hf_weights.save_hf(tmp_path, CONFIG, params)
  with pytest.raises(ValueError, match="not empty"):
    hf_weights.save_hf(tmp_path / "note", CONFIG, params)
  assert [path.name for path in tmp_path.iterdir()] == ["note"]
  (tmp_path / "empty").mkdir()
  hf_weights.save_hf(tmp_path / "empty", CONFIG, params)


def test_what_a_killed_export_left_is_replaced(tmp_path, params):
  (tmp_path / "a.partial").mkdir()
  (tmp_path / "a.partial" / "model.safetensors").write_text("half")
  hf_weights.save_hf(tmp_path / "a", CONFIG, params)
  assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_no_space_is_seen_before_writing(tmp_path, params, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(
    shutil, "disk_usage", lambda path: usage._replace(free=1000)
  )
  with pytest.raises(ValueError, match="no space left.*1e-06 GB are free"):
    hf_weights.save_hf(tmp_path / "a", CONFIG, params)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, "No space left on device"),
    # As safetensors words it, on a real full disk.
    safetensors.SafetensorError(
      "Error while serializing: I/O error: No space left (os error 28)"
    ),
  ],
)
def test_no_space_while_writing_leaves_nothing(
  tmp_path, params, monkeypatch, error
):
  real, calls = safetensors.numpy.save_file, []

  def save_file(*args, **kwargs):
    calls.append(args)
    if len(calls) == 3:
      raise error
    real(*args, **kwargs)

  monkeypatch.setattr(safetensors.numpy, "save_file", save_file)
  with pytest.raises(ValueError, match="no space left"):
    hf_weights.save_hf(tmp_path / "a", CONFIG, params, max_shard_bytes=20_000)
  assert len(calls) == 3
  assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(tmp_path, params, monkeypatch):
  def save_file(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(safetensors.numpy, "save_file", save_file)
  with pytest.raises(KeyboardInterrupt):
    hf_weights.save_hf(tmp_path / "a", CONFIG, params)
  assert not list(tmp_path.iterdir())
