"""Preprocessor files, and the arrays for the reference-shaped door.

Their values are compared with transformers' in tests/parity/test_inputs.py.
"""

import json
import pathlib

import numpy as np
import pytest

from cf_jax.data import patches, vision_input

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"


def write(folder, **files):
  for name, spec in files.items():
    (folder / f"{name}.json").write_text(json.dumps(spec))
  return [
    vision_input.read_preprocessor(folder, media)[3:5]
    for media in ("image", "video")
  ]


def test_areas_of_every_kind_of_file(tmp_path):
  older = {"min_pixels": 784, "max_pixels": 7840}
  assert write(tmp_path, preprocessor_config=older) == [(784, 7840)] * 2
  newer = {"size": {"shortest_edge": 1568, "longest_edge": 78400}}
  assert write(tmp_path, video_preprocessor_config=newer) == [
    (784, 7840),
    (1568, 78400),
  ]
  # One that names no parts is of an older kind, and says nothing here.
  assert write(tmp_path, processor_config={"processor_class": "x"})[0][0] == 784
  both = {"image_processor": newer, "video_processor": newer | older}
  assert write(tmp_path, processor_config=both) == [(1568, 78400), (784, 7840)]


def test_areas_that_a_file_leaves_out(tmp_path):
  """The defaults of transformers' image and video processors."""
  assert write(tmp_path, preprocessor_config={}) == [
    (3136, 1003520),
    (100352, 602112),
  ]


def test_the_rest_of_a_file(tmp_path):
  spec = dict(
    patch_size=16,
    merge_size=3,
    temporal_patch_size=1,
    image_mean=[0.5, 0.25, 0.125],
    image_std=[1, 2, 4],
  )
  write(tmp_path, preprocessor_config=spec)
  found = vision_input.read_preprocessor(tmp_path, "image")
  assert found[:3] == (16, 3, 1)
  assert found.mean == (0.5, 0.25, 0.125) and found.std == (1, 2, 4)


def test_the_published_file():
  folder = SHARED / "qwen2_5_vl"
  if not folder.is_dir():
    pytest.skip(f"no {folder}")
  for media in ("image", "video"):
    found = vision_input.read_preprocessor(folder, media)
    assert found == vision_input.Preprocessor()


def test_other_preprocessing_is_refused(tmp_path):
  with pytest.raises(ValueError, match="expected preprocessor_config.json"):
    vision_input.read_preprocessor(tmp_path, "image")
  with pytest.raises(ValueError, match="do_normalize is False, expected True"):
    write(tmp_path, preprocessor_config={"do_normalize": False})


def test_where_the_settings_are_found(tmp_path):
  find = vision_input.find_preprocessor
  assert find(tmp_path, "image") is None
  older, newer = tmp_path / "preprocessor_config.json", {"patch_size": 14}
  older.write_text('{"merge_size": 2}')
  for media in ("image", "video"):
    assert find(str(tmp_path), media) == (older, {"merge_size": 2})
  parts = tmp_path / "processor_config.json"
  parts.write_text(json.dumps({"image_processor": newer}))
  assert find(tmp_path, "image") == (parts, newer)
  assert find(tmp_path, "video") == (older, {"merge_size": 2})


@pytest.mark.parametrize(
  ("name", "text", "says"),
  [
    ("preprocessor_config.json", "[]", r"must hold an object, got \[\]"),
    ("preprocessor_config.json", '{"a": ', "is not JSON .*line 1"),
    ("preprocessor_config.json", "", "is not JSON"),
    ("video_preprocessor_config.json", "7", "must hold an object, got 7"),
    ("processor_config.json", "null", "must hold an object, got None"),
    (
      "processor_config.json",
      '{"video_processor": [1]}',
      r"video_processor must be an object, got \[1\]",
    ),
    (
      "preprocessor_config.json",
      '{"patch_size": "14"}',
      "patch_size must be a positive integer, got '14'",
    ),
    (
      "preprocessor_config.json",
      '{"size": [28, 28]}',
      r"size must be an object, got \[28, 28\]",
    ),
    (
      "preprocessor_config.json",
      '{"size": {"longest_edge": "28"}}',
      r"size\.longest_edge must be a number of at least 0, got '28'",
    ),
    (
      "preprocessor_config.json",
      '{"min_pixels": [1]}',
      r"min_pixels must be a number of at least 0, got \[1\]",
    ),
    (
      "preprocessor_config.json",
      '{"image_mean": 0.5}',
      r"image_mean must be a list of three numbers, got 0\.5",
    ),
    (
      "preprocessor_config.json",
      '{"image_std": [1, 1]}',
      r"image_std must be a list of three numbers, got \[1, 1\]",
    ),
  ],
)
def test_broken_files_are_named(tmp_path, name, text, says):
  (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=f"{name}.*{says}"):
    vision_input.read_preprocessor(tmp_path, "video")


def test_a_picture_and_a_video_of_one_frame_are_the_same():
  settings = vision_input.Preprocessor(min_pixels=784)
  rng = np.random.default_rng(0)
  sizes = ((28, 56), (84, 28))
  pictures = [rng.integers(0, 256, (*s, 3), dtype=np.uint8) for s in sizes]
  images = vision_input.image_inputs(pictures, settings)
  films = vision_input.video_inputs(
    [picture[None] for picture in pictures], [2.0, 0.5], settings
  )
  assert images["image_grid_thw"].tolist() == [[1, 2, 4], [1, 6, 2]]
  np.testing.assert_array_equal(
    images["image_grid_thw"], films["video_grid_thw"]
  )
  np.testing.assert_array_equal(
    images["pixel_values"], films["pixel_values_videos"]
  )
  assert films["second_per_grid_ts"].tolist() == [1.0, 4.0]
  # Nothing is resized: the patches of each, one after the other.
  whole = [patches.frames_to_patches(picture[None])[0] for picture in pictures]
  np.testing.assert_array_equal(images["pixel_values"], np.concatenate(whole))


def test_bad_pictures():
  settings = vision_input.Preprocessor()
  with pytest.raises(ValueError, match="uint8"):
    vision_input.image_inputs([np.zeros((28, 28, 3))], settings)
  with pytest.raises(ValueError, match="uint8"):
    vision_input.image_inputs([np.zeros((28, 28, 4), np.uint8)], settings)
  with pytest.raises(ValueError, match="uint8"):
    vision_input.video_inputs(
      [np.zeros((0, 28, 28, 3), np.uint8)], [1.0], settings
    )
  with pytest.raises(ValueError, match="1 videos and fps of 2"):
    vision_input.video_inputs(
      [np.zeros((1, 28, 28, 3), np.uint8)], [1.0, 2.0], settings
    )
