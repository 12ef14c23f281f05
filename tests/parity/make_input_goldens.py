"""Writes what transformers makes of pictures, videos and messages.

  python -m tests.parity.make_input_goldens --data=FOLDER

in an environment with the `parity` extra and torchvision, which the video
processor needs. FOLDER holds Qwen2.5's tokenizer and chat template (see
`input_cases.qwen_tokenizer`); their ids go into goldens/inputs.json beside
those of the shipped tokenizer.
"""

import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from absl import app, flags
from transformers import video_utils
from transformers.models.qwen2_vl import image_processing_qwen2_vl

from cf_jax.data import prompts
from tests.parity import input_cases

FOLDER = pathlib.Path(__file__).parent / "goldens"
TOKENS_PER_SECOND = 2

_DATA = flags.DEFINE_string(
  "data", None, "Folder of tokenizer/ and qwen2_5_vl/.", required=True
)


# -- pixels


def pixels() -> dict[str, np.ndarray]:
  """Outputs of the three processors, `slow`, `fast` and `video`."""
  slow = transformers.Qwen2VLImageProcessor(**input_cases.PIXELS)
  fast = transformers.Qwen2VLImageProcessorFast(**input_cases.PIXELS)
  film = transformers.Qwen2VLVideoProcessor(**input_cases.PIXELS)
  images = input_cases.images()
  settings = dict(return_tensors="pt", input_data_format="channels_last")
  found = {
    "slow": slow(images, **settings),
    "fast": fast(images[:2], **settings),  # enough to see how it differs
    "video": film(input_cases.videos(), **settings),
  }
  return {
    f"{kind}.{name}": value.numpy()
    for kind, made in found.items()
    for name, value in made.items()
  }


# -- rules


def sizes() -> list[list[int]]:
  return [
    [*case, *image_processing_qwen2_vl.smart_resize(*case[:2], 28, *case[2:])]
    for case in input_cases.sizes()
  ]


def samplings() -> list[list]:
  """Frame numbers, or None where the processor refuses."""
  film = transformers.Qwen2VLVideoProcessor()
  rows = []
  for count, fps, asked in input_cases.samplings():
    metadata = video_utils.VideoMetadata(total_num_frames=count, fps=fps)
    try:
      index = film.sample_frames(metadata, **asked).tolist()
    except ValueError:
      index = None
    rows.append([count, fps, asked, index])
  return rows


# -- prompts


def processor(folder: pathlib.Path) -> transformers.Qwen2_5_VLProcessor:
  """The whole processor, with the chat template that we use of a folder."""
  template = prompts.load_tokenizer(folder).chat_template
  return transformers.Qwen2_5_VLProcessor(
    image_processor=transformers.Qwen2VLImageProcessor(
      min_pixels=784, max_pixels=2**24
    ),
    tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
    video_processor=transformers.Qwen2VLVideoProcessor(
      min_pixels=784, max_pixels=2**24
    ),
    chat_template=template,
  )


def messages(wording: input_cases.Wording) -> list[dict[str, Any]]:
  """What a user of transformers writes for the same prompt."""
  user = wording.question + prompts.option_lines(wording.options)
  content = [{"type": "text", "text": user}]
  if wording.time_s and wording.show_time:
    shown = []
    for seconds in wording.time_s:
      shown += [
        {"type": "text", "text": f"{seconds:.1f}s"},
        {"type": "image"},
      ]
    content = shown + content
  elif wording.time_s:
    content = [{"type": "video"}, *content]
  rows = [{"role": "user", "content": content}]
  if wording.system is not None:
    text = [{"type": "text", "text": wording.system}]
    rows.insert(0, {"role": "system", "content": text})
  return rows


def ids_and_positions(
  made: transformers.Qwen2_5_VLProcessor,
  rope_index: Callable,
  wording: input_cases.Wording,
) -> dict[str, Any]:
  """Ids of the processor, and positions of `get_rope_index`."""
  text = made.apply_chat_template(
    messages(wording), add_generation_prompt=True, tokenize=False
  )
  height, width = (28 * side for side in wording.grid)
  media = {}
  if wording.time_s and wording.show_time:
    shape = (height, width, 3)
    media["images"] = [np.zeros(shape, np.uint8) for _ in wording.time_s]
  elif wording.time_s:
    # Every frame twice: it fills both slots of its temporal slice.
    count = 2 * len(wording.time_s)
    gap_s = wording.time_s[1] - wording.time_s[0] if count > 2 else 1.0
    media["videos"] = [np.zeros((count, height, width, 3), np.uint8)]
    media["video_metadata"] = [
      dict(
        fps=2 / gap_s, total_num_frames=count, frames_indices=[*range(count)]
      )
    ]
  found = made(
    text=[text],
    return_tensors="pt",
    **media,
    **({"input_data_format": "channels_last"} if media else {}),
  )
  position, _ = rope_index(
    input_ids=found["input_ids"],
    image_grid_thw=found.get("image_grid_thw"),
    video_grid_thw=found.get("video_grid_thw"),
    second_per_grid_ts=found.get("second_per_grid_ts"),
    attention_mask=found["attention_mask"],
  )
  seconds = found.get("second_per_grid_ts")
  if seconds is not None:
    seconds = torch.as_tensor(seconds).tolist()
  return {
    "ids": found["input_ids"][0].tolist(),
    "position": position[:, 0].tolist(),
    "second_per_grid_ts": seconds,
  }


def _rope_index(tokenizer) -> Callable:
  """`get_rope_index` of a model that has no weights."""
  config = transformers.Qwen2_5_VLConfig(
    text_config=dict(
      vocab_size=8,
      hidden_size=8,
      intermediate_size=8,
      num_hidden_layers=1,
      num_attention_heads=1,
      num_key_value_heads=1,
    ),
    vision_config=dict(
      depth=1,
      hidden_size=8,
      num_heads=1,
      intermediate_size=8,
      out_hidden_size=8,
      tokens_per_second=TOKENS_PER_SECOND,
    ),
    **{
      f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
      for name, token in (
        ("image", "<|image_pad|>"),
        ("video", "<|video_pad|>"),
        ("vision_start", "<|vision_start|>"),
        ("vision_end", "<|vision_end|>"),
      )
    },
  )
  with torch.device("meta"):
    return transformers.Qwen2_5_VLModel(config).get_rope_index


def wordings(folder: pathlib.Path) -> dict[str, dict]:
  made = processor(folder)
  rope_index = _rope_index(made.tokenizer)
  return {
    name: ids_and_positions(made, rope_index, wording)
    for name, wording in input_cases.WORDINGS.items()
  }


def main(argv):
  del argv
  np.savez_compressed(FOLDER / "inputs.npz", **pixels())
  with tempfile.TemporaryDirectory() as folder:
    qwen = wordings(
      input_cases.qwen_tokenizer(_DATA.value, pathlib.Path(folder))
    )
  written = {
    "transformers": transformers.__version__,
    "sizes": sizes(),
    "samplings": samplings(),
    "tiny": wordings(prompts.TINY_TOKENIZER),
    "qwen": qwen,
  }
  (FOLDER / "inputs.json").write_text(
    json.dumps(written, separators=(",", ":")), "utf-8"
  )
  for name in ("inputs.npz", "inputs.json"):
    print(name, (FOLDER / name).stat().st_size)


if __name__ == "__main__":
  app.run(main)
