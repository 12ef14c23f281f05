"""Still pictures as videos of one frame, against OpenCV's own reader."""

import cv2
import numpy as np
import pytest
from PIL import Image

from cf_jax.data import images, video

SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6  # to be turned a quarter clockwise


def _picture():
  """uint8[40, 60, 3]: red on the left, a green corner, a gradient."""
  made = np.zeros((40, 60, 3), np.uint8)
  made[:, :30, 0] = 200
  made[:20, 30:, 1] = 150
  made[..., 2] = np.arange(60) * 4
  return made


@pytest.mark.parametrize(
  ("name", "how"),
  [
    ("a.jpg", dict(quality=90)),
    ("a.JPEG", dict(quality=90, exif=SIDEWAYS)),
    ("a.png", {}),
    ("b.png", dict(exif=SIDEWAYS)),
    ("a.webp", dict(lossless=True, exif=SIDEWAYS)),
    ("a.bmp", {}),
    ("frame_%03d.png", {}),  # no pattern, the name of one file
  ],
)
def test_pixels_are_those_of_imread(tmp_path, name, how):
  path = tmp_path / name
  Image.fromarray(_picture()).save(path, **how)
  assert images.is_image(path)
  found = images.read_image(path)
  expected = cv2.imread(str(path))[..., ::-1]
  assert (
    found.shape
    == expected.shape
    == ((60, 40, 3) if "exif" in how else (40, 60, 3))
  )
  # Of JPEG there are two decoders.
  assert np.abs(found.astype(int) - expected).max() <= 3


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "16 bit"])
def test_other_modes(tmp_path, mode):
  path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
  if mode == "16 bit":
    deep = _picture()[..., 2].astype(np.uint16) << 8
    Image.fromarray(deep).save(path)
  else:
    Image.fromarray(_picture()).convert(mode).save(path)
  found = images.read_image(path)
  assert found.dtype == np.uint8
  expected = cv2.imread(str(path))[..., ::-1]
  assert np.abs(found.astype(int) - expected).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pictures_lie_on_white(tmp_path, mode):
  grey = np.full((28, 28, 1), 51, np.uint8)
  alpha = np.zeros((28, 28, 1), np.uint8)
  alpha[:14], alpha[14:20] = 255, 102  # opaque, two fifths, clear
  layers = [grey] * (len(mode) - 1) + [alpha]
  path = tmp_path / "a.png"
  Image.fromarray(np.concatenate(layers, axis=2), mode=mode).save(path)
  rows = images.read_image(path)[[0, 15, 25], 3]
  np.testing.assert_allclose(rows, [[51] * 3, [173] * 3, [255] * 3], atol=1)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp"])
def test_cut_short(tmp_path, name):
  path = tmp_path / name
  Image.fromarray(_picture()).save(path)
  content = path.read_bytes()
  path.write_bytes(content[: len(content) * 2 // 3])
  with pytest.raises(video.VideoError, match=f"{name}: not a whole picture"):
    images.scan_frames(path, 4, (28, 28))


def test_what_is_no_picture(tmp_path):
  (tmp_path / "text.png").write_text("no picture")
  (tmp_path / "empty.png").write_bytes(b"")
  (tmp_path / "folder.png").mkdir()
  for name in ("text.png", "empty.png", "folder.png", "gone.png"):
    with pytest.raises(video.VideoError, match=name):
      images.read_image(tmp_path / name)


def test_a_video_of_one_frame(tmp_path):
  path = tmp_path / "a.bmp"
  Image.fromarray(_picture()).save(path)
  scan = images.scan_frames(path, 3, (20, 30))
  assert scan.mask.tolist() == [True, False, False]
  assert scan.time_s.tolist() == [0, 0, 0] and scan.num_frames == 1
  assert scan.frame_index.tolist() == [0, 0, 0]
  np.testing.assert_array_equal(
    scan.frames[0],
    cv2.resize(_picture(), (30, 20), interpolation=cv2.INTER_AREA),
  )
  assert not scan.frames[1:].any()
  frames, time_s = images.read_frames(path, np.zeros(2, int), resize="bicubic")
  np.testing.assert_array_equal(frames, [_picture()] * 2)
  assert time_s.tolist() == [0, 0]
  assert images.probe(path) == (1, 1.0, 60, 40, 0.0)
  with pytest.raises(video.VideoError, match=r"frame 0 alone, got \[1\]"):
    images.read_frames(path, [1])
