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

from cf_jax.models.config import DTYPES, VisionConfig, VLMConfig

_TEXT_SIZES = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "max_position_embeddings",
  "rms_norm_eps",
)
# Where transformers looks for an id: beside the decoder's fields, or outside.
_TEXT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MEDIA_IDS = (
  "image_token_id",
  "video_token_id",
  "vision_start_token_id",
  "vision_end_token_id",
  "vision_token_id",
)
# Qwen2_5_VLVisionConfig.__init__, the same from 4.49.0 to 5.2.0.
_VISION_DEFAULTS = {
  "depth": 32,
  "hidden_size": 3584,
  "intermediate_size": 3420,
  "num_heads": 16,
  "out_hidden_size": 3584,
  "in_channels": 3,
  "patch_size": 14,
  "temporal_patch_size": 2,
  "spatial_merge_size": 2,
  "window_size": 112,
  "fullatt_block_indexes": (7, 15, 23, 31),
  "tokens_per_second": 4,
  "initializer_range": 0.02,
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
    raise ValueError(f"config.json: {message}")


def from_hf(spec: dict[str, Any]) -> VLMConfig:
  """The config of a parsed `config.json`.

  Args:
    spec: in any of the forms above.

  Returns:
    VLMConfig; `dtype` and `param_dtype` are the file's `dtype` (`torch_dtype`)
    where that is float32 or bfloat16, else float32.

  Raises:
    ValueError: another model, a missing key, or a setting that is not
      implemented.
  """
  _check_model(spec)
  text = _section(spec, "text_config") or spec
  vision = _section(spec, "vision_config") or {}
  where = "text_config." if text is not spec else ""
  missing = [where + key for key in _TEXT_SIZES if text.get(key) is None]
  _fail_unless(
    not missing,
    f"missing {', '.join(missing)}; expected every size of the decoder",
  )
  _check_decoder(text, where)
  sizes = {key: text[key] for key in _TEXT_SIZES}
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
      tie_word_embeddings=_tied(spec, text),
      initializer_range=text.get("initializer_range", 0.02),
      **{key: _token_id(spec, text, key) for key in _TEXT_IDS + _MEDIA_IDS},
      dtype=dtype,
      param_dtype=dtype,
    )
  except ValueError as error:
    message = str(error).replace("config.model.vision.", "vision_config.")
    message = message.replace("config.model.", where)
    raise ValueError("config.json: " + message.split("json: ")[-1]) from error


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
    for key in _TEXT_IDS + _MEDIA_IDS
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
    why = f" ({_RELATIVES[kind]})" if kind in _RELATIVES else ""
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


def _section(spec, key):
  found = spec.get(key)
  _fail_unless(
    found is None or isinstance(found, dict),
    f"{key} must be an object, got {found!r}",
  )
  return found


def _check_decoder(text, where):
  def refuse(key, value, supported):
    _fail_unless(
      False,
      f"{where}{key} {value!r} is not supported; supported is {supported}",
    )

  act = text.get("hidden_act", "silu")
  if act != "silu":
    refuse("hidden_act", act, "'silu'")
  if text.get("use_sliding_window"):
    refuse("use_sliding_window", True, "false: every layer sees all slots")
  kinds = set(text.get("layer_types") or ()) - {"full_attention"}
  if kinds:
    refuse("layer_types", sorted(kinds), "'full_attention' in every layer")
  width = text.get("head_dim")
  heads = text["num_attention_heads"]
  if width is not None and width * heads != text["hidden_size"]:
    refuse("head_dim", width, "hidden_size / num_attention_heads")


def _rope(text, where):
  """(theta, mrope_section)."""
  key = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
  rope = text.get(key) or {}
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
  _fail_unless(
    rope.get("mrope_section") is not None,
    f"missing {where}{key}.mrope_section; expected three counts that add up to"
    " half a head, [16, 24, 24] in the published models",
  )
  theta = rope.get("rope_theta", text.get("rope_theta"))
  return (
    float(_DEFAULT_THETA if theta is None else theta),
    tuple(rope["mrope_section"]),
  )


def _tied(spec, text):
  """4.x writes it where it differs from a default; absent means untied."""
  found = {
    bool(part["tie_word_embeddings"])
    for part in (spec, text)
    if part.get("tie_word_embeddings") is not None
  }
  _fail_unless(
    len(found) < 2,
    "tie_word_embeddings and text_config.tie_word_embeddings contradict each"
    " other: transformers 4.x reads the inner one, 5.x the outer; make them"
    " equal, true if the weights have no lm_head.weight",
  )
  return found == {True}


def _token_id(spec, text, key):
  found = spec.get(key) if spec.get(key) is not None else text.get(key)
  # Several ends are generation's business; the first is the chat's own.
  return found[0] if isinstance(found, list) else found


def _vision(vision):
  act = vision.get("hidden_act", "silu")
  _fail_unless(
    act == "silu",
    f"vision_config.hidden_act {act!r} is not supported; supported is 'silu'",
  )
  values = {
    key: vision[key] if vision.get(key) is not None else default
    for key, default in _VISION_DEFAULTS.items()
  }
  for key, synonym in (
    ("in_channels", "in_chans"),
    ("patch_size", "spatial_patch_size"),
  ):
    other = vision.get(synonym)
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
