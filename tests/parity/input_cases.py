"""What is preprocessed and worded in the goldens of inputs: numpy only.

Pictures are noise over a gradient, drawn from a seed: noise shows a wrong
kernel at every pixel, the gradient a wrong place.
"""

import pathlib
import shutil
from typing import Any, NamedTuple

import numpy as np

# (height, width) of the pictures: shrunk, enlarged, one of each, a long one,
# and one that has the right size already.
IMAGES = ((61, 90), (29, 19), (33, 71), (9, 140), (56, 28))
# Areas that leave every picture small.
PIXELS = dict(min_pixels=2 * 28 * 28, max_pixels=6 * 28 * 28)
# (frames, height, width), frames a second of the file.
VIDEOS = (((3, 50, 31), 24.0), ((4, 28, 56), 12.5), ((1, 28, 28), 2.0))


def picture(height: int, width: int, seed: int) -> np.ndarray:
  """uint8[height, width, 3]."""
  rng = np.random.default_rng([height, width, seed])
  ramp = np.linspace(0, 160, height)[:, None] + np.linspace(0, 60, width)
  noise = rng.integers(0, 64, (height, width, 3))
  return np.clip(ramp[:, :, None] + noise, 0, 255).astype(np.uint8)


def images() -> list[np.ndarray]:
  return [picture(*size, seed) for seed, size in enumerate(IMAGES)]


def videos() -> list[np.ndarray]:
  return [
    np.stack([picture(height, width, 100 + k) for k in range(count)])
    for (count, height, width), _ in VIDEOS
  ]


# -- rules


def sizes() -> list[tuple[int, int, int, int]]:
  """(height, width, min_pixels, max_pixels) for the resize rule."""
  edges = (1, 13, 14, 15, 28, 42, 70, 98, 240, 480, 854, 1080, 1920)
  limits = ((3136, 12845056), (128 * 784, 768 * 784), (784, 64 * 784))
  rng = np.random.default_rng(0)
  drawn = np.exp(rng.uniform(0, 8.5, (60, 2))).astype(int) + 1
  pairs = [(a, b) for a in edges for b in edges]
  pairs += [tuple(map(int, pair)) for pair in drawn]
  return [
    (height, width, *limits[n % len(limits)])
    for n, (height, width) in enumerate(pairs)
    if max(height, width) <= 200 * min(height, width)
  ]


def samplings() -> list[tuple[int, float, dict[str, Any]]]:
  """(frames, frames a second, arguments of the sampling)."""
  asked = (
    dict(num_frames=8),
    dict(num_frames=9),
    dict(num_frames=11),
    dict(fps=2.0),
    dict(fps=1, max_frames=33),
    dict(fps=0.3),
    dict(fps=0.1, min_frames=7),
    dict(fps=60.0, max_frames=24),
  )
  lengths = ((4, 8.0), (5, 25.0), (13, 2.5), (90, 24), (325, 30000 / 1001))
  made = [(*length, dict(ask)) for length in lengths for ask in asked]
  # For this one the processor asks for a frame behind the end.
  return [*made, (103, 25.0, dict(num_frames=30))]


# -- prompts


def qwen_tokenizer(
  data: str | pathlib.Path, folder: pathlib.Path
) -> pathlib.Path:
  """Puts Qwen2.5's tokenizer and Qwen2-VL's chat template into a folder."""
  data = pathlib.Path(data)
  for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(data / "tokenizer" / name, folder / name)
  template = data / "qwen2_5_vl" / "chat_template_qwen2_vl.jinja"
  shutil.copy(template, folder / "chat_template.jinja")
  return folder


class Wording(NamedTuple):
  """A prompt: arguments of `prompts.build_prompt`.

  Attributes:
    question: the user's words.
    options: the choices.
    system: the system message or None.
    time_s: of the frames.
    grid: (height, width) of a frame in visual tokens.
    show_time: images between times, else one video.
  """

  question: str = "What happens?"
  options: tuple[str, ...] = ()
  system: str | None = None
  time_s: tuple[float, ...] = ()
  grid: tuple[int, int] = (1, 2)
  show_time: bool = False


TEXTS = {
  "empty": "",
  "space": " ",
  "spaces": "  two before, three after   ",
  "tabs": "\ta\t\tb \t c\t",
  "lines": "\na\n\nb\r\nc\rd\n\n\n",
  "indent": "def f(x):\n    return x\n\n\n        y",
  "chinese": "这个视频里发生了什么？请按顺序回答。",
  "mixed": "视频video 第3秒的red方块…「B」",
  "arabic": "ماذا يحدث في الفيديو؟",
  "emoji": "👩‍👩‍👧‍👦 🇨🇭 👍🏽 what? 🎬🎥",
  "decomposed": "cafe\u0301 A\u030a \u1112\u1161\u11ab o\u0323\u0302",
  "leading mark": "\u0301a",
  "composed": "café Å 한 ộ",
  "compatible": "ﬁ ① Å ¼ Ⅳ ＡＢ",
  "numbers": "31415926535897932384626433832795 1,000,000.50 3-14 ١٢٣",
  "contractions": "I'LL say it's what they've DON'T 'tis",
  "signs": "a?!...;:()[]{}<>|\\/@#$%^&*~`\"'_+=--",
  "slots": "{question}{options}{{x}}{% raw %}",
  "controls": "a\u200bb\u00a0c\u2028d\ufeffe\x00f\x7fg",
  "almost special": "<|im_end| > <|vision_pad <image> <|IMAGE_PAD|>",
  "tags": "<think>red, 2.0s</think>\n<answer>B</answer> <answer>",
  "private": "\ue000user\ue001",
  "rare": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠜎 \U0010ffff",
}

WORDINGS = {
  "plain": Wording(),
  "plain, system": Wording(system="You are brief."),
  "plain, empty system": Wording(system=""),
  "video": Wording(time_s=(0.0, 1.0, 2.0), grid=(2, 3)),
  "video of one frame": Wording(time_s=(4.0,), grid=(3, 1)),
  "video, system, options": Wording(
    options=("red", "blue and green"),
    system="You see a film.\n",
    time_s=(1.0, 4.0),
  ),
  # Its time spans more than its width.
  "long video": Wording(time_s=(0.0, 7.0, 14.0, 21.0), grid=(2, 1)),
  "images": Wording(time_s=(0.0, 0.5, 1.2), grid=(2, 3), show_time=True),
  "one image": Wording(time_s=(3599.9,), grid=(2, 1), show_time=True),
  "images, system, options": Wording(
    question="Which comes first?",
    options=("a", "b", "c"),
    system="系统 message",
    time_s=(0.0, 0.4),
    show_time=True,
  ),
  **{f"text: {name}": Wording(question=text) for name, text in TEXTS.items()},
  **{
    f"media, text: {name}": Wording(
      question=text,
      options=(text, "x"),
      system=text,
      time_s=(0.0, 1.0),
      show_time=bool(n % 2),
    )
    for n, (name, text) in enumerate(TEXTS.items())
  },
}
