"""What a Qwen2.5-VL model is, and how it is to be run.

Fields keep the names of the model's public `config.json`. The last block of
`VLMConfig` says how to run it and changes no number beyond rounding. Both
classes are frozen and hashable, so a config can be a static argument of a
jitted function.
"""

import dataclasses
from typing import Any, Literal

import jax

ATTENTION = ("auto", "xla", "cudnn", "splash")
REMAT = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


def _divides(name: str, size: int, by_name: str, by: int) -> None:
  _require(
    by > 0 and size % by == 0,
    f"{name} must be a multiple of {by_name}, got {size} and {by}; change"
    f" config.model.{name} or config.model.{by_name}",
  )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower.

  Attributes:
    depth: transformer blocks.
    hidden_size: width of a patch.
    intermediate_size: width of the SwiGLU.
    num_heads: attention heads.
    out_hidden_size: width of a visual token, the decoder's width.
    in_channels: colours of a pixel.
    patch_size: side of a patch, in pixels.
    temporal_patch_size: frames of a patch.
    spatial_merge_size: side of the square of patches that the merger joins
      into one visual token.
    window_size: side of an attention window, in pixels.
    fullatt_block_indexes: blocks that attend to the whole slice instead of a
      window.
    tokens_per_second: steps of the M-RoPE time axis per second of video.
    rms_norm_eps: added to the mean square in the norms.
    rope_theta: base of the two-dimensional rotary embedding.
    initializer_range: standard deviation of freshly drawn kernels.
  """

  depth: int = 32
  hidden_size: int = 1280
  intermediate_size: int = 3420
  num_heads: int = 16
  out_hidden_size: int = 3584
  in_channels: int = 3
  patch_size: int = 14
  temporal_patch_size: int = 2
  spatial_merge_size: int = 2
  window_size: int = 112
  fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
  tokens_per_second: float = 2
  rms_norm_eps: float = 1e-6
  rope_theta: float = 10_000.0
  initializer_range: float = 0.02

  def __post_init__(self):
    # JSON and ConfigDict give lists; a list would not hash.
    object.__setattr__(
      self, "fullatt_block_indexes", tuple(self.fullatt_block_indexes)
    )
    _divides(
      "vision.hidden_size", self.hidden_size, "vision.num_heads", self.num_heads
    )
    # Two axes, and each rotates pairs.
    _require(
      self.head_dim % 4 == 0,
      "a vision head's width must be a multiple of 4, got"
      f" {self.head_dim}; change config.model.vision.num_heads",
    )
    _require(
      self.window_units > 0,
      f"window_size {self.window_size} px is smaller than one visual token"
      f" ({self.patch_size * self.spatial_merge_size} px); change"
      " config.model.vision.window_size",
    )
    _require(
      all(0 <= i < self.depth for i in self.fullatt_block_indexes),
      f"fullatt_block_indexes {self.fullatt_block_indexes} must lie in [0,"
      f" {self.depth}); change config.model.vision.fullatt_block_indexes",
    )

  @property
  def head_dim(self) -> int:
    """Width of one attention head."""
    return self.hidden_size // self.num_heads

  @property
  def patch_dim(self) -> int:
    """Numbers in one flattened patch: colours x frames x height x width."""
    return self.in_channels * self.temporal_patch_size * self.patch_size**2

  @property
  def window_units(self) -> int:
    """Side of an attention window, in visual tokens."""
    return self.window_size // self.spatial_merge_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class VLMConfig:
  """The whole model: decoder at the top level, tower under `vision`.

  Attributes:
    vision: the vision tower.
    vocab_size: rows of the embedding table.
    hidden_size: width of the residual stream.
    intermediate_size: width of the SwiGLU.
    num_hidden_layers: decoder layers.
    num_attention_heads: query heads.
    num_key_value_heads: key/value heads.
    max_position_embeddings: longest sequence the model was made for.
    rms_norm_eps: added to the mean square in the norms.
    rope_theta: base of the rotary embedding.
    mrope_section: how many rotary frequencies follow the time, height and
      width position; they add up to half a head.
    tie_word_embeddings: is the output head the embedding table?
    initializer_range: standard deviation of freshly drawn kernels.
    bos_token_id: None where a tokenizer has none; so for all ids below.
    eos_token_id: ends a completion.
    pad_token_id: fills masked slots.
    image_token_id: written in the prompt where an image's tokens go.
    video_token_id: written in the prompt where a video's tokens go.
    vision_start_token_id: before a media span.
    vision_end_token_id: after a media span.
    vision_token_id: written by nobody, but reserved.
    dtype: what matmuls run in. Norms, softmax, rotary angles and logits are
      float32 whatever this says.
    param_dtype: what freshly drawn parameters are stored in.
    remat: what the backward pass recomputes: "none"; "dots", all but the
      matmuls; "full", everything but the input of each layer.
    scan_unroll: layers per iteration of the loop over layers.
    attention: what is behind `layers.attend` and `layers.attend_packed`, of
      both towers: "xla", anywhere; "cudnn", fused on NVIDIA GPUs, in bfloat16;
      "splash", fused on a TPU, where a row has at least 128 slots (else
      "xla"); "auto", the kernel of this process's devices that can serve, else
      "xla". Steps of decoding are XLA's in any case.
    vocab_chunk: words that log-probabilities of completions look at together:
      a larger vocabulary is worked through in chunks, forward and backward, so
      that no array of tokens x vocabulary is held. 0: always all at once.
    mesh: the devices of a run that has several, for what the compiler does not
      find out by itself; no setting of a config.
  """

  vision: VisionConfig = VisionConfig()
  vocab_size: int = 152_064
  hidden_size: int = 3584
  intermediate_size: int = 18_944
  num_hidden_layers: int = 28
  num_attention_heads: int = 28
  num_key_value_heads: int = 4
  max_position_embeddings: int = 128_000
  rms_norm_eps: float = 1e-6
  rope_theta: float = 1_000_000.0
  mrope_section: tuple[int, int, int] = (16, 24, 24)
  tie_word_embeddings: bool = False
  initializer_range: float = 0.02
  bos_token_id: int | None = 151_643
  eos_token_id: int | None = 151_645
  pad_token_id: int | None = 151_643
  image_token_id: int | None = 151_655
  video_token_id: int | None = 151_656
  vision_start_token_id: int | None = 151_652
  vision_end_token_id: int | None = 151_653
  vision_token_id: int | None = 151_654

  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: Literal["none", "dots", "full"] = "none"
  scan_unroll: int = 1
  attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
  vocab_chunk: int = 16_384
  mesh: jax.sharding.Mesh | None = None

  def __post_init__(self):
    object.__setattr__(self, "mrope_section", tuple(self.mrope_section))
    _divides(
      "hidden_size",
      self.hidden_size,
      "num_attention_heads",
      self.num_attention_heads,
    )
    _divides(
      "num_attention_heads",
      self.num_attention_heads,
      "num_key_value_heads",
      self.num_key_value_heads,
    )
    _require(
      len(self.mrope_section) == 3
      and 2 * sum(self.mrope_section) == self.head_dim,
      "mrope_section must be three counts that add up to half the head"
      f" width {self.head_dim}, got {self.mrope_section}; change"
      " config.model.mrope_section",
    )
    _require(
      self.vision.out_hidden_size == self.hidden_size,
      "vision.out_hidden_size must equal hidden_size, got"
      f" {self.vision.out_hidden_size} and {self.hidden_size}; change"
      " config.model.vision.out_hidden_size",
    )
    _require(
      self.scan_unroll > 0,
      f"scan_unroll must be positive, got {self.scan_unroll}; change"
      " config.model.scan_unroll",
    )
    _require(
      self.vocab_chunk >= 0,
      f"vocab_chunk must not be negative, got {self.vocab_chunk}; change"
      " config.model.vocab_chunk",
    )
    for name, allowed in (
      ("attention", ATTENTION),
      ("remat", REMAT),
      ("dtype", DTYPES),
      ("param_dtype", DTYPES),
    ):
      value = getattr(self, name)
      _require(
        value in allowed,
        f"{name} must be one of {allowed}, got {value!r}; change"
        f" config.model.{name}",
      )

  @property
  def head_dim(self) -> int:
    """Width of one attention head."""
    return self.hidden_size // self.num_attention_heads

  @property
  def context(self) -> int:
    """Parts into which a prompt's slots are split, each on its devices."""
    return 1 if self.mesh is None else self.mesh.shape["context"]


def tiny(vocab_size: int = 1024) -> VLMConfig:
  """About a million parameters: the same architecture, for a laptop."""
  return VLMConfig(
    vision=VisionConfig(
      depth=2,
      hidden_size=64,
      intermediate_size=192,
      num_heads=4,
      out_hidden_size=128,
      window_size=28,
      fullatt_block_indexes=(1,),
      initializer_range=0.05,
    ),
    vocab_size=vocab_size,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    mrope_section=(4, 6, 6),
    tie_word_embeddings=True,
    initializer_range=0.05,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    image_token_id=None,
    video_token_id=None,
    vision_start_token_id=None,
    vision_end_token_id=None,
    vision_token_id=None,
  )


def qwen2_5_vl_3b() -> VLMConfig:
  """Qwen2.5-VL-3B."""
  return VLMConfig(
    vision=VisionConfig(out_hidden_size=2048),
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=11_008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    tie_word_embeddings=True,
  )


def qwen2_5_vl_7b() -> VLMConfig:
  """Qwen2.5-VL-7B."""
  return VLMConfig()


def qwen2_5_vl_32b() -> VLMConfig:
  """Qwen2.5-VL-32B."""
  return VLMConfig(
    vision=VisionConfig(intermediate_size=3456, out_hidden_size=5120),
    hidden_size=5120,
    intermediate_size=27_648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
  )


def qwen2_5_vl_72b() -> VLMConfig:
  """Qwen2.5-VL-72B."""
  return VLMConfig(
    vision=VisionConfig(intermediate_size=3456, out_hidden_size=8192),
    hidden_size=8192,
    intermediate_size=29_568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
  )


SIZES = {
  "tiny": tiny,
  "qwen2_5_vl_3b": qwen2_5_vl_3b,
  "qwen2_5_vl_7b": qwen2_5_vl_7b,
  "qwen2_5_vl_32b": qwen2_5_vl_32b,
  "qwen2_5_vl_72b": qwen2_5_vl_72b,
}


def make(
  *, size: str, vision: dict[str, Any] | None = None, **fields: Any
) -> VLMConfig:
  """A preset with some fields changed.

  Args:
    size: a key of `SIZES`.
    vision: fields of `VisionConfig` to change.
    **fields: fields of `VLMConfig` to change.

  Raises:
    ValueError: an unknown size or fields that do not fit together.
    TypeError: an unknown field.
  """
  _require(
    size in SIZES,
    f"size must be one of {tuple(SIZES)}, got {size!r}; change"
    " config.model.size",
  )
  preset = SIZES[size]()
  tower = dataclasses.replace(preset.vision, **dict(vision or {}))
  return dataclasses.replace(preset, vision=tower, **fields)
