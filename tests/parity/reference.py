"""Small Qwen2.5-VL checkpoints, and what transformers makes of them.

Needs torch and transformers, so only `make_goldens`, the live half of the tests
and a benchmark import this. Weights are drawn at a scale at which attention is
peaked and logits spread, as in a trained model.

Weights are bfloat16 values, so that a drift measured in bfloat16 is that of
the arithmetic and not the rounding of the weights.
"""

import types
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

from tests.parity import specs


def hf_config(
  spec: specs.Spec, dtype: str = "float32"
) -> transformers.Qwen2_5_VLConfig:
  """The checkpoint's config."""
  return transformers.Qwen2_5_VLConfig(
    text_config=dict(
      spec.text,
      max_position_embeddings=4096,
      bos_token_id=None,
      eos_token_id=None,
      dtype=dtype,
    ),
    vision_config=dict(
      spec.vision, out_hidden_size=spec.text["hidden_size"], dtype=dtype
    ),
    vision_start_token_id=specs.VISION_START,
    vision_end_token_id=specs.VISION_END,
    image_token_id=specs.IMAGE,
    video_token_id=specs.VIDEO,
    tie_word_embeddings=spec.tied,
    dtype=dtype,
  )


def draw_weights(spec: specs.Spec, seed: int) -> dict[str, np.ndarray]:
  """float32 weights under transformers' names, all exact in bfloat16."""
  rng = np.random.default_rng(seed)
  with torch.device("meta"):
    shapes = {
      name: tuple(parameter.shape)
      for name, parameter in modeling.Qwen2_5_VLForConditionalGeneration(
        hf_config(spec)
      ).named_parameters()
    }
  weights = {}
  for name, shape in shapes.items():
    if spec.tied and name == "lm_head.weight":
      continue
    noise = rng.normal(size=shape)
    if len(shape) == 1:
      is_norm = name.endswith("weight")
      value = 1 + 0.3 * noise if is_norm else 0.3 * noise
    elif "embed_tokens" in name:
      value = noise * (3 / np.sqrt(shape[1]) if spec.tied else 1)
    elif "lm_head" in name:
      value = noise * 3 / np.sqrt(shape[1])
    else:
      value = noise * 1.3 / np.sqrt(np.prod(shape[1:]))
    # Five bits are fewer to store, and exact in float16 and bfloat16.
    fraction, exponent = np.frexp(value)
    value = np.ldexp(np.round(fraction * 32) / 32, exponent)
    weights[name] = value.astype(np.float16).astype(np.float32)
  return weights


def load(
  spec: specs.Spec, weights: dict[str, np.ndarray], dtype: str
) -> modeling.Qwen2_5_VLForConditionalGeneration:
  """The reference model; its rotary frequencies stay float32, as on loading."""
  model = modeling.Qwen2_5_VLForConditionalGeneration._from_config(
    hf_config(spec, dtype)
  )
  missing, unexpected = model.load_state_dict(
    {name: torch.tensor(value) for name, value in weights.items()},
    strict=False,
  )
  assert not unexpected and set(missing) <= {"lm_head.weight"}, missing
  model.tie_weights()
  assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
  return model.eval()


def tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
  """The batch for transformers."""
  return {name: torch.tensor(value) for name, value in batch.items()}


def run(
  model: modeling.Qwen2_5_VLForConditionalGeneration,
  batch: dict[str, np.ndarray],
) -> np.ndarray:
  """float32[B, S, V] logits."""
  model.model.rope_deltas = None  # of an earlier batch
  with torch.no_grad():
    return model(**tensors(batch)).logits.float().numpy()


def make_case(name: str, seed: int) -> dict[str, np.ndarray]:
  """Everything that one comparison reads, as flat arrays.

  Returns:
    config (JSON), weight/NAME float32, batch/NAME, and of transformers:
    position int64[3, B, S], hidden/IMAGE-OR-VIDEO float32[L, patches, D] in
    the order of the patches, visual/... float32[tokens, D], logits, loss,
    gradient/NAME, generated int64[B, 64], generated_margin, eos_id,
    generated_eos, bfloat16_drift (RMS and maximum over real slots).
  """
  spec = specs.SPECS[name]
  weights, batch = draw_weights(spec, seed), specs.draw_batch(spec, seed + 1)
  model = load(spec, weights, "float32")
  inputs = tensors(batch)
  case = dict(config=np.array(hf_config(spec).to_json_string()))
  case |= {f"weight/{key}": value for key, value in weights.items()}
  case |= {f"batch/{key}": value for key, value in batch.items()}
  case["position"] = (
    model.model.get_rope_index(
      **{k: v for k, v in inputs.items() if "pixel" not in k}
    )[0]
    .numpy()
    .astype(np.int32)
  )
  for kind, suffix in (("image", ""), ("video", "_videos")):
    case |= (
      _tower(
        model, kind, inputs[f"pixel_values{suffix}"], inputs[f"{kind}_grid_thw"]
      )
      if f"{kind}_grid_thw" in inputs
      else {}
    )
  case |= _language(model, inputs)
  case |= _generation(model, inputs)
  case["bfloat16_drift"] = bfloat16_drift(spec, weights, batch)
  return case


def _tower(model, kind, pixels, grids):
  """Every block's output and the merger's, blocks in the patches' order."""
  tower = model.model.visual
  hidden = []
  hooks = [
    block.register_forward_hook(lambda _, __, out: hidden.append(out))
    for block in tower.blocks
  ]
  with torch.no_grad():
    visual = tower(pixels, grid_thw=grids, return_dict=True).pooler_output
  for hook in hooks:
    hook.remove()
  area = tower.spatial_merge_unit
  window, _ = tower.get_window_index(grids)
  order = torch.argsort(window)
  hidden = torch.stack(hidden)
  blocks = hidden.unflatten(1, (-1, area))[:, order].flatten(1, 2)
  return {
    f"hidden/{kind}": blocks.numpy(),
    f"visual/{kind}": visual.numpy(),
  }


def labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
  """The text's own ids; -100 where the loss does not look."""
  ids = batch["input_ids"]
  return torch.where(
    (batch["attention_mask"] == 1) & (ids >= specs.FIRST_TEXT), ids, -100
  )


def _language(model, inputs):
  model.model.rope_deltas = None  # of an earlier batch
  out = model(**inputs, labels=labels(inputs))
  out.loss.backward()
  case = dict(
    logits=out.logits.detach().numpy(), loss=out.loss.detach().numpy()
  )
  for name, parameter in model.named_parameters():
    case[f"gradient/{name}"] = parameter.grad.numpy().copy()
  model.zero_grad()
  return case


def _generation(model, inputs):
  """Greedy ids, with no end and with one; right-padded rows are shifted."""
  shift = (inputs["attention_mask"].flip(1).cumsum(1) == 0).sum(1).tolist()
  inputs = dict(inputs)
  for name in ("input_ids", "attention_mask"):
    inputs[name] = torch.stack(
      [row.roll(by) for row, by in zip(inputs[name], shift, strict=True)]
    )

  def generate(**settings):
    model.model.rope_deltas = None
    with torch.no_grad():
      out = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=specs.NUM_GENERATED,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
      )
    return out.sequences[:, inputs["input_ids"].shape[1] :], out.logits

  token, logits = generate()
  best = torch.stack(logits).topk(2, dim=-1).values
  # The id that the first row says half-way ends the second generation.
  eos_id = int(token[0, specs.NUM_GENERATED // 2])
  token_eos, _ = generate(eos_token_id=eos_id)
  return dict(
    generated=token.numpy(),
    generated_margin=(best[..., 0] - best[..., 1]).min().numpy(),
    eos_id=np.array(eos_id),
    generated_eos=token_eos.numpy(),
  )


def bfloat16_drift(
  spec: specs.Spec, weights: dict[str, np.ndarray], batch: dict[str, np.ndarray]
) -> np.ndarray:
  """float32[2] RMS and maximum of bfloat16 logits minus float32 logits."""
  real = batch["attention_mask"] == 1
  exact, short = (
    run(load(spec, weights, dtype), batch)[real]
    for dtype in ("float32", "bfloat16")
  )
  error = np.abs(short - exact)
  return np.array([np.sqrt(np.mean(error**2)), error.max()], np.float32)


def positions(
  config: Any,
  inputs: dict[str, np.ndarray],
  rule: Any = modeling.Qwen2_5_VLModel.get_rope_index,
) -> np.ndarray:
  """`get_rope_index` of one version, without a model: int64[3, B, S]."""
  model = types.SimpleNamespace(config=config)
  return rule(model, **tensors(inputs))[0].numpy()
