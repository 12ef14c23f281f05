"""Qwen2.5-VL's `config.json` <-> `VLMConfig`.

The file has had three forms: the decoder's fields at the top level (as
published, and as transformers 4.49 to 4.51 writes), under `text_config` (4.52
to 4.57), and under `text_config` with `rope_parameters` in place of
`rope_theta` and `rope_scaling` (5.x). All three are read. Written is the first,
which 4.49 to 5.2 all read alike.

A setting that would make this another function is an error, never ignored;
what changes only training in transformers (dropout, cache) is left out. What a
file leaves out of `vision_config` has the default of transformers' class.
"""

from typing import Any

from cf_jax.data import json_file, prompts
from cf_jax.models.config import DTYPES, VisionConfig, VLMConfig

_COUNT = "a positive integer"
_TEXT_SIZES = {
  "vocab_size": _COUNT,
  "hidden_size": _COUNT,
  "intermediate_size": _COUNT,
  "num_hidden_layers": _COUNT,
  "num_attention_heads": _COUNT,
  "num_key_value_heads": _COUNT,
  "max_position_embeddings": _COUNT,
  "rms_norm_eps": "a positive number",
}
# Qwen2_5_VLVisionConfig.__init__, the same from 4.49.0 to 5.2.0.
_VISION_DEFAULTS = {
  "depth": (32, _COUNT),
  "hidden_size": (3584, _COUNT),
  "intermediate_size": (3420, _COUNT),
  "num_heads": (16, _COUNT),
  "out_hidden_size": (3584, _COUNT),
  "in_channels": (3, _COUNT),
  "patch_size": (14, _COUNT),
  "temporal_patch_size": (2, _COUNT),
  "spatial_merge_size": (2, _COUNT),
  "window_size": (112, _COUNT),
  "fullatt_block_indexes": (
    (7, 15, 23, 31),
    "a list of integers of at least 0",
  ),
  "tokens_per_second": (4, "a positive number"),
  "initializer_range": (0.02, "a number of at least 0"),
}
# Constants of transformers' code, which no file can change.
_VISION_CONSTANTS = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
# Qwen2_5_VLTextConfig.default_theta; an argument's default before 5.0.
_DEFAULT_THETA = 1_000_000.0
_RELATIVES = {
  "qwen2_vl": "Qwen2-VL has another vision tower",
  "qwen2_5_vl_text": "this is the decoder alone, without its vision tower",
  "qwen2_5_omni": "Qwen2.5-Omni has other towers",
  "qwen3_vl": "Qwen3-VL has another vision tower and decoder",
  "qwen2": "this is a language model without a vision tower",
}


def _fail_unless(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


def from_hf(spec: dict[str, Any]) -> VLMConfig:
  """The config of a parsed `config.json`.

  Args:
    spec: in any of the forms above.

  Returns:
    VLMConfig; `dtype` and `param_dtype` are the file's `dtype` (`torch_dtype`)
    where that is float32 or bfloat16, else float32.

  Raises:
    ValueError: another model, a missing key, a value of another type, or a
      setting that is not implemented; names the key, and not the file.
  """
  _check_model(spec)
  text = json_file.field(spec, "text_config", "an object") or spec
  vision = json_file.field(spec, "vision_config", "an object", default={})
  where = "text_config." if text is not spec else ""
  missing = [where + key for key in _TEXT_SIZES if text.get(key) is None]
  _fail_unless(
    not missing,
    f"missing {', '.join(missing)}; expected every size of the decoder",
  )
  sizes = {
    key: json_file.field(text, key, kind, prefix=where)
    for key, kind in _TEXT_SIZES.items()
  }
  _check_decoder(text, where)
  theta, section = _rope(text, where)
  dtype = str(spec.get("dtype") or spec.get("torch_dtype") or "float32")
  dtype = dtype.removeprefix("torch.")
  dtype = dtype if dtype in DTYPES else "float32"
  try:
    return VLMConfig(
      vision=_vision(vision),
      **sizes,
      rope_theta=theta,
      mrope_section=section,
      tie_word_embeddings=_tied(spec, text, where),
      initializer_range=json_file.field(
        text,
        "initializer_range",
        "a number of at least 0",
        prefix=where,
        default=0.02,
      ),
      **{
        key: _token_id(spec, text, where, key, sizes["vocab_size"])
        for key in prompts.ID_FIELDS
      },
      dtype=dtype,
      param_dtype=dtype,
    )
  except ValueError as error:
    # The model's own checks, in terms of the file.
    message = str(error).replace("config.model.vision.", "vision_config.")
    raise ValueError(message.replace("config.model.", where)) from error


def to_hf(config: VLMConfig, *, dtype: str) -> dict[str, Any]:
  """What `config.json` says about a model, for transformers 4.49 and later.

  Args:
    config: the model.
    dtype: of the weights beside it, "float32" or "bfloat16".

  Raises:
    ValueError: the model has a setting that the file cannot say.
  """
  for name, value in _VISION_CONSTANTS.items():
    if getattr(config.vision, name) != value:
      raise ValueError(
        f"vision.{name} must be {value} in a Qwen2.5-VL directory, got"
        f" {getattr(config.vision, name)}; change config.model.vision.{name}"
      )
  ids = {
    key: getattr(config, key)
    for key in prompts.ID_FIELDS
    if getattr(config, key) is not None
  }
  text = {key: getattr(config, key) for key in _TEXT_SIZES}
  vision = {key: getattr(config.vision, key) for key in _VISION_DEFAULTS}
  vision["fullatt_block_indexes"] = list(config.vision.fullatt_block_indexes)
  return {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    **text,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": config.initializer_range,
    # "mrope" is the one word for it that 4.49 to 5.2 all know.
    "rope_scaling": {
      "type": "mrope",
      "mrope_section": list(config.mrope_section),
    },
    "rope_theta": config.rope_theta,
    "tie_word_embeddings": config.tie_word_embeddings,
    "torch_dtype": dtype,
    "use_cache": True,
    "use_sliding_window": False,
    **ids,
    "vision_config": {
      "model_type": "qwen2_5_vl",
      "hidden_act": "silu",
      **vision,
      # Its name in the published files; transformers reads in_channels.
      "in_chans": config.vision.in_channels,
      "spatial_patch_size": config.vision.patch_size,
    },
  }


def _check_model(spec):
  kind = spec.get("model_type")
  if kind != "qwen2_5_vl":
    known = isinstance(kind, str) and kind in _RELATIVES
    why = f" ({_RELATIVES[kind]})" if known else ""
    _fail_unless(
      False,
      f"model_type {kind!r} is not supported{why}; supported is 'qwen2_5_vl':"
      " Qwen2.5-VL 3B, 7B, 32B and 72B and models of that architecture",
    )
  _fail_unless(
    not spec.get("quantization_config"),
    "quantization_config: quantised weights are not supported; take the"
    " directory in bfloat16",
  )


def _check_decoder(text, where):
  def refuse(key, value, supported):
    _fail_unless(
      False,
      f"{where}{key} {value!r} is not supported; supported is {supported}",
    )

  act = text.get("hidden_act", "silu")
  if act != "silu":
    refuse("hidden_act", act, "'silu'")
  if json_file.field(text, "use_sliding_window", "true or false", prefix=where):
    refuse("use_sliding_window", True, "false: every layer sees all slots")
  kinds = json_file.field(
    text, "layer_types", "a list of strings", prefix=where, default=()
  )
  others = sorted(set(kinds) - {"full_attention"})
  if others:
    refuse("layer_types", others, "'full_attention' in every layer")
  width = json_file.field(text, "head_dim", _COUNT, prefix=where)
  heads = text["num_attention_heads"]
  if width is not None and width * heads != text["hidden_size"]:
    refuse("head_dim", width, "hidden_size / num_attention_heads")


def _rope(text, where):
  """(theta, mrope_section)."""
  key = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
  rope = json_file.field(text, key, "an object", prefix=where, default={})
  for name in ("rope_type", "type"):
    kind = rope.get(name, "default")
    _fail_unless(
      kind in ("default", "mrope"),
      f"{where}{key}.{name} {kind!r} is not supported; supported are 'mrope'"
      " and 'default': positions are not rescaled",
    )
  factor = rope.get("partial_rotary_factor", 1.0)
  _fail_unless(
    factor == 1.0,
    f"{where}{key}.partial_rotary_factor {factor} is not supported; supported"
    " is 1: the whole head rotates",
  )
  section = json_file.field(
    rope,
    "mrope_section",
    "a list of integers of at least 0",
    prefix=f"{where}{key}.",
  )
  _fail_unless(
    section is not None,
    f"missing {where}{key}.mrope_section; expected three counts that add up to"
    " half a head, [16, 24, 24] in the published models",
  )
  theta = _DEFAULT_THETA
  for part, prefix in ((text, where), (rope, f"{where}{key}.")):
    theta = json_file.field(
      part, "rope_theta", "a positive number", prefix=prefix, default=theta
    )
  return float(theta), tuple(section)


def _tied(spec, text, where):
  """4.x writes it where it differs from a default; absent means untied."""
  found = {
    json_file.field(part, "tie_word_embeddings", "true or false", prefix=prefix)
    for part, prefix in ((spec, ""), (text, where))
  }
  _fail_unless(
    not {True, False} <= found,
    "tie_word_embeddings and text_config.tie_word_embeddings contradict each"
    " other: transformers 4.x reads the inner one, 5.x the outer; make them"
    " equal, true if the weights have no lm_head.weight",
  )
  return True in found


def _token_id(spec, text, where, key, vocab_size):
  """An id, which stands beside the decoder's fields or outside of them."""
  outside = spec.get(key) is not None
  found = spec[key] if outside else text.get(key)
  if found is None:
    return None
  listed = found if isinstance(found, list) else [found]
  name = key if outside else where + key
  _fail_unless(
    listed and all(type(one) is int and one >= 0 for one in listed),
    f"{name} must be an id (an integer of at least 0) or a list of ids, got"
    f" {found!r:.60}",
  )
  # The others are never looked up: small models keep the large ones' ids.
  _fail_unless(
    key not in prompts.SPELLED_FIELDS or listed[0] < vocab_size,
    f"{name} must be an id below vocab_size {vocab_size}, got {listed[0]}",
  )
  # Several ends are generation's business; the first is the chat's own.
  return listed[0]


def _vision(vision):
  act = vision.get("hidden_act", "silu")
  _fail_unless(
    act == "silu",
    f"vision_config.hidden_act {act!r} is not supported; supported is 'silu'",
  )
  prefix = "vision_config."
  values = {
    key: json_file.field(vision, key, kind, prefix=prefix, default=default)
    for key, (default, kind) in _VISION_DEFAULTS.items()
  }
  for key, synonym in (
    ("in_channels", "in_chans"),
    ("patch_size", "spatial_patch_size"),
  ):
    other = json_file.field(vision, synonym, _COUNT, prefix=prefix)
    if other is None:
      continue
    if vision.get(key) is None:
      values[key] = other
    _fail_unless(
      values[key] == other,
      f"vision_config.{key} is {values[key]} and {synonym} {other}; expected"
      " them to be equal",
    )
  return VisionConfig(**values)
