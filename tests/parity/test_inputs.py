"""Pictures, videos and prompts against transformers' processors.

`make_input_goldens` wrote the goldens. Where transformers and torchvision are
installed, the same comparisons run against them live.
"""

import json
import pathlib

import numpy as np
import pytest

from cf_jax.data import frame_size, prompts, video, vision_input
from tests.parity import input_cases

FOLDER = pathlib.Path(__file__).parent / "goldens"
SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"
SETTINGS = vision_input.Preprocessor(**input_cases.PIXELS)


@pytest.fixture(scope="module", params=["golden", "live"])
def reference(request):
  """The module that asks transformers, or None: read the files."""
  if request.param == "golden":
    return None
  pytest.importorskip("transformers")
  pytest.importorskip("torchvision")
  from tests.parity import make_input_goldens

  return make_input_goldens


@pytest.fixture(scope="module")
def pixels(reference):
  if reference:
    return reference.pixels()
  with np.load(FOLDER / "inputs.npz") as file:
    return dict(file)


@pytest.fixture(scope="module")
def rules(reference):
  if reference:
    return {"sizes": reference.sizes(), "samplings": reference.samplings()}
  return json.loads((FOLDER / "inputs.json").read_text("utf-8"))


@pytest.fixture(scope="module", params=["tiny", "qwen"])
def prompt_case(request, reference, tmp_path_factory):
  """A tokenizer, and what transformers makes of every wording with it."""
  folder = prompts.TINY_TOKENIZER
  if request.param == "qwen":
    if not SHARED.is_dir():
      pytest.skip(f"no {SHARED}")
    made = tmp_path_factory.mktemp("qwen")
    folder = input_cases.qwen_tokenizer(SHARED, made)
  if reference:
    expected = reference.wordings(folder)
  else:
    written = json.loads((FOLDER / "inputs.json").read_text("utf-8"))
    expected = written[request.param]
  assert expected.keys() == input_cases.WORDINGS.keys()
  return prompts.load_tokenizer(folder), expected


def levels(values):
  """Normalised values -> levels of 255, float."""
  channel = values.reshape(len(values), 3, -1)
  mean, std = (np.reshape(x, (3, 1)) for x in (SETTINGS.mean, SETTINGS.std))
  return 255 * (channel * std + mean)


# -- pixels


def test_images(pixels):
  made = vision_input.image_inputs(input_cases.images(), SETTINGS)
  np.testing.assert_array_equal(
    made["image_grid_thw"], pixels["slow.image_grid_thw"]
  )
  expected = pixels["slow.pixel_values"]
  assert made["pixel_values"].dtype == expected.dtype == np.float32
  np.testing.assert_allclose(made["pixel_values"], expected, rtol=0, atol=1e-6)


def test_images_by_torchvision(pixels):
  """Its integer kernel rounds some pixels otherwise than Pillow."""
  made = vision_input.image_inputs(input_cases.images()[:2], SETTINGS)
  np.testing.assert_array_equal(
    made["image_grid_thw"], pixels["fast.image_grid_thw"]
  )
  off = levels(made["pixel_values"]) - levels(pixels["fast.pixel_values"])
  assert np.abs(off).max() < 2.01
  assert np.abs(off).mean() < 0.02


def test_videos(pixels):
  made = vision_input.video_inputs(
    input_cases.videos(), [fps for _, fps in input_cases.VIDEOS], SETTINGS
  )
  grid = pixels["video.video_grid_thw"]
  np.testing.assert_array_equal(made["video_grid_thw"], grid)
  values = made["pixel_values_videos"]
  expected = pixels["video.pixel_values_videos"]
  ends = np.cumsum(np.prod(grid, axis=1))
  resized, whole = slice(0, ends[0]), slice(ends[0], ends[1])
  # Where nothing is resized, no kernel is in the way.
  np.testing.assert_allclose(values[whole], expected[whole], rtol=0, atol=1e-6)
  off = levels(values[resized]) - levels(expected[resized])
  assert np.abs(off).max() < 2.01
  assert np.abs(off).mean() < 0.02


@pytest.fixture(params=["bikes.mp4", "testvideo.mp4"])
def real_frame(request):
  path = SHARED / "videos" / request.param
  if not path.is_file():
    pytest.skip(f"no {path}")
  frame = video.read_frames(path, np.array([40]))[0][0]
  size_px = frame_size.smart_resize(*frame.shape[:2], max_pixels=64 * 28 * 28)
  return frame, size_px, frame_size.resize_frame(frame, size_px, "bicubic")


def test_area_is_near_bicubic(real_frame):
  frame, size_px, bicubic = real_frame
  area = frame_size.resize_frame(frame, size_px, "area")
  off = np.abs(area.astype(int) - bicubic)
  assert 0.1 < off.mean() < 1 and off.max() < 42


def test_torchvision_is_nearer(real_frame):
  frame, size_px, bicubic = real_frame
  torch = pytest.importorskip("torch")
  pytest.importorskip("torchvision")
  from torchvision.transforms.v2 import functional

  other = functional.resize(
    torch.from_numpy(frame).permute(2, 0, 1),
    size_px,
    interpolation=functional.InterpolationMode.BICUBIC,
    antialias=True,
  )
  off = np.abs(other.permute(1, 2, 0).numpy().astype(int) - bicubic)
  assert off.mean() < 0.1 and off.max() <= 5


# -- rules


def test_resize_rule(rules):
  assert len(rules["sizes"]) > 150
  for height, width, smallest, largest, *expected in rules["sizes"]:
    limits = dict(min_pixels=smallest, max_pixels=largest)
    assert list(frame_size.smart_resize(height, width, **limits)) == expected
    assert expected == list(
      frame_size.fit_size(height, width, num_frames=9, **limits)
    )


def test_frame_sampling(rules):
  """One golden asks for a frame behind the end, see `sample_index`."""
  behind = 0
  for count, fps, asked, expected in rules["samplings"]:
    given = dict(asked)
    if "fps" in given:
      given["sample_fps"] = given.pop("fps")
    if expected is None:
      with pytest.raises(ValueError, match="cannot be taken"):
        frame_size.sample_index(count, fps, **given)
      continue
    if expected[-1] == count:
      behind += 1
      expected = expected[:-1]
    assert frame_size.sample_index(count, fps, **given).tolist() == expected
  assert behind == 1


# -- prompts


def test_ids_and_positions(prompt_case):
  tokenizer, expected = prompt_case
  wrong = []
  for name, wording in input_cases.WORDINGS.items():
    row = prompts.build_prompt(
      tokenizer,
      wording.question,
      wording.options,
      frame_time_s=np.array(wording.time_s),
      grid=wording.grid,
      tokens_per_second=2,
      show_time=wording.show_time,
      question_template="{question}{options}",
      system=wording.system,
    )
    per_frame = wording.grid[0] * wording.grid[1]
    if (
      row.token.tolist() != expected[name]["ids"]
      or row.position.tolist() != expected[name]["position"]
      or row.visual[row.visual >= 0].tolist()
      != [*range(per_frame * len(wording.time_s))]
    ):
      wrong.append(name)
  assert not wrong


def test_special_tokens_in_text_are_the_one_difference():
  """transformers takes a typed `<|image_pad|>` for the token."""
  transformers = pytest.importorskip("transformers")
  made = transformers.AutoTokenizer.from_pretrained(prompts.TINY_TOKENIZER)
  tokenizer = prompts.load_tokenizer("tiny")
  for name in prompts.ADDED_TOKENS:
    text = f"a{name} b"
    assert made(text)["input_ids"].count(tokenizer.special[name]) == 1
    assert tokenizer.special[name] not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_seconds_of_a_slice(prompt_case):
  """Of videos whose every frame stands twice, as the goldens show them."""
  _, expected = prompt_case
  for name in ("video", "long video"):
    wording = input_cases.WORDINGS[name]
    count = 2 * len(wording.time_s)
    made = vision_input.video_inputs(
      [np.zeros((count, 28, 56, 3), np.uint8)],
      [2 / (wording.time_s[1] - wording.time_s[0])],
      vision_input.Preprocessor(min_pixels=28 * 28),
    )
    assert made["second_per_grid_ts"] == expected[name]["second_per_grid_ts"]
    assert made["video_grid_thw"].tolist() == [[len(wording.time_s), 2, 4]]


@pytest.mark.parametrize("kind", ["tiny", "qwen"])
def test_a_directory_that_transformers_wrote(kind, tmp_path):
  """Its tokenizer, chat template and areas are found again."""
  pytest.importorskip("transformers")
  pytest.importorskip("torchvision")
  from tests.parity import make_input_goldens

  folder = prompts.TINY_TOKENIZER
  if kind == "qwen":
    if not SHARED.is_dir():
      pytest.skip(f"no {SHARED}")
    (tmp_path / "from").mkdir()
    folder = input_cases.qwen_tokenizer(SHARED, tmp_path / "from")
  make_input_goldens.processor(folder).save_pretrained(tmp_path / "to")
  given, found = map(prompts.load_tokenizer, (folder, tmp_path / "to"))
  assert found.special == given.special
  assert found.vocab_size == given.vocab_size
  for system in (True, False):
    assert found.chat_pieces(system) == given.chat_pieces(system)
  for text in (*input_cases.TEXTS.values(), *prompts.ADDED_TOKENS):
    assert found.encode(text) == given.encode(text)
  for media in ("image", "video"):
    settings = vision_input.read_preprocessor(tmp_path / "to", media)
    assert settings == vision_input.Preprocessor(
      min_pixels=784, max_pixels=2**24
    )
