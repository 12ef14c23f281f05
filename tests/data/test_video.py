"""Reading real and broken video files."""

import json
import pathlib

import cv2
import numpy as np
import pytest

from cf_jax.data import frame_size, video

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data" / "videos"
needs_data = pytest.mark.skipif(
  not DATA.is_dir(), reason=f"real videos are not at {DATA}"
)


def _write(path, num_frames, size=(32, 48), fps=10.0, fourcc="mp4v"):
  """A video whose frame k is grey of level 10 k (mod 256)."""
  height, width = size
  writer = cv2.VideoWriter(
    str(path), cv2.VideoWriter_fourcc(*fourcc), fps, (width, height)
  )
  assert writer.isOpened()
  for k in range(num_frames):
    writer.write(np.full((height, width, 3), 10 * k % 256, np.uint8))
  writer.release()
  return path


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
  return _write(tmp_path_factory.mktemp("video") / "grey.mp4", 24)


def test_probe(grey):
  assert video.probe(grey) == video.VideoInfo(24, 10.0, 48, 32, 2.4)


def test_reads_all_frames_with_times(grey):
  frames, time_s = video.read_frames(grey)
  assert frames.shape == (24, 32, 48, 3) and frames.dtype == np.uint8
  np.testing.assert_allclose(time_s, np.arange(24) / 10, atol=1e-9)
  np.testing.assert_allclose(
    frames.mean(axis=(1, 2, 3)), 10 * np.arange(24), atol=4.9
  )


def test_index_in_any_order_and_repeated(grey):
  everything, _ = video.read_frames(grey)
  frames, time_s = video.read_frames(grey, np.array([20, 3, 20, 0]))
  np.testing.assert_array_equal(frames, everything[[20, 3, 20, 0]])
  np.testing.assert_allclose(time_s, [2.0, 0.3, 2.0, 0.0], atol=1e-9)


def test_frames_are_rgb(tmp_path):
  path = tmp_path / "red.mp4"
  writer = cv2.VideoWriter(
    str(path), cv2.VideoWriter_fourcc(*"mp4v"), 5.0, (32, 32)
  )
  for _ in range(3):
    writer.write(np.full((32, 32, 3), (20, 30, 220), np.uint8))  # BGR
  writer.release()
  frames, _ = video.read_frames(path)
  np.testing.assert_allclose(frames[0, 16, 16], (220, 30, 20), atol=8)


def test_scan_takes_the_middles_of_equal_parts(grey):
  scan = video.scan_frames(grey, 8, (16, 24))
  np.testing.assert_array_equal(scan.frame_index, [1, 4, 7, 10, 13, 16, 19, 22])
  assert scan.frame_index.dtype == np.int32 and scan.mask.all()
  np.testing.assert_allclose(scan.time_s, scan.frame_index / 10, atol=1e-9)
  frames, _ = video.read_frames(grey, scan.frame_index, (16, 24))
  np.testing.assert_array_equal(scan.frames, frames)


@pytest.mark.parametrize("count", [1, 5, 8, 9, 100, 5402])
@pytest.mark.parametrize("num", [1, 8, 96])
def test_spread_is_the_stated_formula(count, num):
  expected = [int((k + 0.5) * count / num) for k in range(num)]
  if count <= num:
    expected = range(count)
  np.testing.assert_array_equal(frame_size.spread(count, num), list(expected))


@pytest.mark.parametrize(
  ("intervals", "num", "expected"),
  [
    # Twelve frames, one a second.
    ([(2, 9)], 4, [3, 5, 7, 9]),  # floor((k + 0.5) 8 / 4) of 2 to 9
    ([(8, 9), (2, 3)], 4, [2, 3, 8, 9]),  # in time order
    ([(2, 3), (8, 11)], 3, [3, 9, 11]),  # even over both: 1, 3, 5 of six
    ([(2, 6), (4, 9), (5, 5)], 4, [3, 5, 7, 9]),  # overlaps count once
    ([(2, 3)], 5, [0, 1, 2, 3, 4]),  # too few: the nearest, earlier first
    ([(10, 11)], 4, [8, 9, 10, 11]),
    ([(4.4, 4.6)], 1, [4]),  # between two: the nearest
    ([(4.6, 4.8)], 2, [4, 5]),
    ([(0.2, 0.3), (9.1, 9.2)], 2, [0, 9]),
    ([(3, 5)], 20, range(12)),  # never more than there are
  ],
)
def test_frames_within_intervals_by_hand(intervals, num, expected):
  found = frame_size.spread_within(np.arange(12.0), intervals, num)
  assert found.tolist() == list(expected)


def test_frames_within_intervals_by_brute_force():
  """Random times and intervals: inside and even, or all inside and nearest."""
  rng = np.random.default_rng(0)
  kinds = set()
  for _ in range(300):
    time_s = np.cumsum(rng.uniform(0.1, 1.5, rng.integers(1, 40)))
    num = int(rng.integers(1, 12))
    intervals = [
      tuple(sorted(rng.uniform(0, 40, 2))) for _ in range(rng.integers(1, 4))
    ]
    found = frame_size.spread_within(time_s, intervals, num).tolist()
    assert len(found) == len(set(found)) == min(num, len(time_s))
    assert found == sorted(found)

    def away(n, time_s=time_s, intervals=intervals):
      apart_s = [max(s - time_s[n], time_s[n] - e, 0) for s, e in intervals]
      return round(min(apart_s), 6)

    inside = [n for n in range(len(time_s)) if away(n) == 0]
    kinds.add(len(inside) >= num)
    if len(inside) >= num:
      picked = [int((k + 0.5) * len(inside) / num) for k in range(num)]
      assert found == [inside[k] for k in picked]
    else:
      near = sorted(range(len(time_s)), key=lambda n: (away(n), n))
      assert found == sorted(near[:num]) and {*inside} <= {*found}
  assert kinds == {True, False}


def test_scan_of_a_short_video_is_masked(grey):
  scan = video.scan_frames(grey, 30, (16, 16))
  assert scan.num_frames == 24 and scan.mask.sum() == 24
  np.testing.assert_array_equal(scan.frame_index[:24], np.arange(24))
  assert not scan.frames[24:].any() and not scan.frame_index[24:].any()


def test_one_frame(tmp_path):
  path = _write(tmp_path / "one.mp4", 1)
  scan = video.scan_frames(path, 4, (16, 16))
  np.testing.assert_array_equal(scan.mask, [True, False, False, False])
  assert scan.time_s[0] == 0


def test_seeking_gives_the_frames_of_decoding_through(tmp_path, monkeypatch):
  path = tmp_path / "long.mp4"
  writer = cv2.VideoWriter(
    str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25.0, (32, 32)
  )
  rng = np.random.default_rng(0)
  for picture in rng.integers(0, 256, (90, 32, 32, 3), dtype=np.uint8):
    writer.write(picture)
  writer.release()
  index = np.array([2, 40, 41, 77, 89])
  through = video.read_frames(path, index)
  scan = video.scan_frames(path, 5, (32, 32))
  monkeypatch.setattr(video, "_SEEK_GAIN", 2)
  sought = video.read_frames(path, index)
  np.testing.assert_array_equal(through[0], sought[0])
  np.testing.assert_array_equal(through[1], sought[1])
  again = video.scan_frames(path, 5, (32, 32))
  np.testing.assert_array_equal(scan.frames, again.frames)
  assert again.num_frames == 90


def test_missing_and_folder(tmp_path):
  with pytest.raises(video.VideoError, match=r"no_such.mp4: there is no such"):
    video.probe(tmp_path / "no_such.mp4")
  with pytest.raises(video.VideoError, match="is a folder"):
    video.scan_frames(tmp_path, 4, (16, 16))


def test_empty_text_and_truncated(tmp_path, grey):
  path = tmp_path / "empty.mp4"
  path.touch()
  with pytest.raises(video.VideoError, match=r"empty.mp4: the file is empty"):
    video.read_frames(path)
  path = tmp_path / "text.mp4"
  path.write_text("this is not a video\n" * 50)
  with pytest.raises(video.VideoError, match=r"text.mp4: not a video"):
    video.probe(path)
  # By this name FFmpeg takes it for what a terminal shows.
  path = path.rename(tmp_path / "notes.txt")
  with pytest.raises(video.VideoError, match=r"notes.txt: not a video"):
    video.scan_frames(path, 4, (16, 16))
  path = tmp_path / "cut.mp4"
  path.write_bytes(grey.read_bytes()[:600])
  with pytest.raises(video.VideoError, match=r"cut.mp4: not a video"):
    video.probe(path)


def test_data_that_ends_before_the_header_says(tmp_path):
  whole = _write(tmp_path / "whole.avi", 60, fourcc="MJPG")
  path = tmp_path / "short.avi"
  data = whole.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(video.VideoError, match=r"short.avi.*(cut short|decoded)"):
    video.scan_frames(path, 60, (16, 16))


def test_frame_beyond_the_end(grey):
  with pytest.raises(video.VideoError, match="frame 24 cannot be decoded"):
    video.read_frames(grey, np.array([3, 24]))
  with pytest.raises(video.VideoError, match="at least 0"):
    video.read_frames(grey, np.array([-1]))


@pytest.mark.parametrize(
  ("size", "limits", "expected"),
  [
    ((480, 854), {}, (476, 840)),  # 17.1 and 30.5 squares: halves to even
    ((100, 100), {}, (112, 112)),  # 3.57 squares round to 4
    ((20, 20), {}, (56, 56)),  # up to the smallest area
    ((1080, 1920), {"max_pixels": 200 * 28 * 28}, (280, 504)),
    ((28, 2800), {}, (28, 2800)),
    ((10, 70), {}, (28, 168)),  # 0 squares high: too small, and scaled up
  ],
)
def test_smart_resize_by_hand(size, limits, expected):
  assert frame_size.smart_resize(*size, **limits) == expected


def test_smart_resize_refuses_a_thread():
  with pytest.raises(ValueError, match="ratio of at most 200"):
    frame_size.smart_resize(10, 2010)


def test_smart_resize_refuses_limits_without_room():
  with pytest.raises(ValueError, match="min_pixels is 900, max_pixels 800"):
    frame_size.smart_resize(100, 100, min_pixels=900, max_pixels=800)


def test_frames_of_a_video_share_its_budget():
  """As qwen-vl-utils 0.0.14 has it, with neighbours paired."""
  settings = dict(num_frames=32, total_pixels=3200 * 28 * 28)
  # 200 squares a frame.
  assert frame_size.fit_size(1080, 1920, **settings) == (280, 504)
  # 100 squares a frame are below the smallest area, 128: 134.4 then.
  alone = frame_size.fit_size(1080, 1920, **settings, frames_per_slice=1)
  assert alone == (224, 420)
  # No budget, or one that is never reached: at most 768 squares.
  free = frame_size.fit_size(1080, 1920, num_frames=32)
  assert free == (560, 1008)
  assert (
    frame_size.fit_size(1080, 1920, num_frames=2, total_pixels=10**9) == free
  )
  # A limit of the caller's that is lower holds.
  assert frame_size.fit_size(
    1080, 1920, **settings, min_pixels=28 * 28, max_pixels=64 * 28 * 28
  ) == (168, 280)


@pytest.mark.parametrize(
  ("asked", "expected"),
  [
    (dict(num_frames=4), [0, 3, 6, 9]),  # 13 / 4 = 3.25
    (dict(num_frames=5), [0, 3, 6, 9]),  # 2.5 pairs round to 2
    (dict(num_frames=7), [0, 1, 3, 4, 6, 8, 9, 11]),  # 3.5 pairs round to 4
    (dict(sample_fps=1.5), [0, 2, 4, 6, 8, 10]),  # 7.8 frames: 6
    (dict(sample_fps=0.1), [0, 3, 6, 9]),  # at least 4
    (dict(sample_fps=50, max_frames=7), [0, 2, 4, 6, 8, 10]),
    (dict(sample_fps=50), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
  ],
)
def test_sample_index_by_hand(asked, expected):
  """13 frames at 2.5 frames a second."""
  found = frame_size.sample_index(13, 2.5, **asked)
  assert found.tolist() == expected


def test_sample_index_refuses():
  with pytest.raises(ValueError, match="give one of them"):
    frame_size.sample_index(13, 2.5)
  with pytest.raises(ValueError, match="give one of them"):
    frame_size.sample_index(13, 2.5, num_frames=4, sample_fps=1.0)
  for asked in (dict(num_frames=14), dict(num_frames=1)):
    with pytest.raises(ValueError, match="cannot be taken from a video of 13"):
      frame_size.sample_index(13, 2.5, **asked)
  with pytest.raises(ValueError, match="cannot be taken from a video of 1;"):
    frame_size.sample_index(1, 2.5, sample_fps=2.0)


def _antialiased_bicubic(length, size):
  """float[size, length]: Keys' kernel, a = -1/2, widened when shrinking."""
  scale = length / size
  middle = (np.arange(size)[:, None] + 0.5) * scale
  x = np.abs(np.arange(length) + 0.5 - middle) / max(scale, 1)
  near = 1.5 * x**3 - 2.5 * x**2 + 1
  far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
  weight = np.where(x < 1, near, np.where(x < 2, far, 0))
  return weight / weight.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size_px", [(28, 56), (56, 28), (84, 84)])
def test_bicubic_is_antialiased(size_px):
  rng = np.random.default_rng(0)
  frame = rng.integers(60, 200, (61, 75, 3), dtype=np.uint8)
  found = frame_size.resize_frame(frame, size_px, "bicubic")
  assert found.shape == (*size_px, 3) and found.dtype == np.uint8
  rows, columns = map(_antialiased_bicubic, frame.shape[:2], size_px)
  expected = np.einsum("yh,xw,hwc->yxc", rows, columns, frame, optimize=True)
  assert np.abs(found - expected).max() < 1.5  # rounded after each axis
  assert np.abs(found - expected).mean() < 0.5
  area = frame_size.resize_frame(frame, size_px, "area")
  assert np.abs(area - expected).max() > 5


def test_kernel_is_used_when_reading(grey, tmp_path):
  path = tmp_path / "noise.avi"
  writer = cv2.VideoWriter(
    str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 48)
  )
  rng = np.random.default_rng(0)
  for picture in rng.integers(0, 256, (3, 48, 64, 3), dtype=np.uint8):
    writer.write(picture)
  writer.release()
  whole, _ = video.read_frames(path)
  for index in (None, np.arange(3)):
    made = {
      kernel: video.read_frames(path, index, (28, 28), resize=kernel)[0]
      for kernel in ("area", "bicubic")
    }
    for kernel, frames in made.items():
      for frame, full in zip(frames, whole, strict=True):
        np.testing.assert_array_equal(
          frame, frame_size.resize_frame(full, (28, 28), kernel)
        )
    assert np.any(made["area"] != made["bicubic"])
  with pytest.raises(ValueError, match=r"config\.data\.reader\.resize"):
    video.read_frames(grey, resize="nearest")


@needs_data
def test_times_of_a_real_file_with_two_streams():
  path = DATA / "nasa_13013.mp4"
  truth = json.loads(
    (DATA / "nasa_13013.mp4.stream0.all_frames_info.json").read_text()
  )
  frames, time_s = video.read_frames(path, None, (16, 16))
  assert len(frames) == len(truth) == 325
  np.testing.assert_allclose(
    time_s, [float(row["pts_time"]) for row in truth], atol=1e-5
  )


@needs_data
def test_header_that_counts_too_many_frames():
  scan = video.scan_frames(DATA / "tree.avi", 96, (16, 16))
  assert scan.num_frames == scan.mask.sum() == 68
  assert np.all(np.diff(scan.time_s[:68]) > 0)  # variable frame rate
  assert scan.time_s[67] == pytest.approx(29.53, abs=0.01)


@needs_data
def test_rotation_metadata():
  info = video.probe(DATA / "issue-134-rotate.mp4")
  assert (info.height, info.width) == (1280, 544)
