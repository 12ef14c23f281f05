"""Parts of videos, folders of pictures, and what files may be."""

import json
import pathlib

import cv2
import numpy as np
import pytest
from PIL import Image

from cf_jax.data import decoding, images, picture_folder, records, video
from cf_jax.data import footage as footage_lib
from cf_jax.data.footage import Footage

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data" / "videos"
needs_data = pytest.mark.skipif(
  not DATA.is_dir(), reason=f"real videos are not at {DATA}"
)
HERE = decoding.Decoder()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """60 frames of noise at 10 a second, a key frame every 12."""
  path = tmp_path_factory.mktemp("footage") / "noise.mp4"
  writer = cv2.VideoWriter(
    str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10.0, (48, 32)
  )
  rng = np.random.default_rng(0)
  for picture in rng.integers(0, 256, (60, 32, 48, 3), dtype=np.uint8):
    writer.write(picture)
  writer.release()
  return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """11 pictures, whose order is not that of the alphabet; a note beside."""
  path = tmp_path_factory.mktemp("pictures")
  for n in range(1, 12):
    Image.new("RGB", (40, 30), (20 * n, 0, 0)).save(path / f"img{n}.png")
  (path / "groundtruth.txt").write_text("1,2,3,4")
  return path


@pytest.mark.parametrize(
  ("part", "expected"),
  [
    ((1.0, 2.0), [11, 13, 16, 18]),  # frames 10 to 19
    ((0.95, 1.55), [10, 12, 13, 15]),  # 10 to 15
    ((5.6, 6.0), [56, 57, 58, 59]),
    ((5.71, 6.05), [58, 59]),  # two of four slots; the end is rounded
  ],
)
def test_a_clip_by_hand(clip, part, expected):
  scan = HERE.scan_frames(Footage(str(clip), clip=part), 4, (16, 24))
  real = len(expected)
  assert scan.frame_index[:real].tolist() == expected
  assert scan.mask.tolist() == [n < real for n in range(4)]
  np.testing.assert_allclose(
    scan.time_s[:real], np.array(expected) / 10 - part[0], atol=1e-9
  )
  frames, _ = video.read_frames(clip, np.array(expected), (16, 24))
  np.testing.assert_array_equal(scan.frames[:real], frames)


@pytest.mark.parametrize("part", [(7.0, 8.0), (5.0, 9.0)])
def test_a_clip_that_is_not_there(clip, part):
  with pytest.raises(video.VideoError, match=r"noise.mp4: its clip is from"):
    HERE.scan_frames(Footage(str(clip), clip=part), 4, (16, 24))


@pytest.mark.parametrize("part", [(2.0, 1.0), (-1.0, 1.0), (0.0, float("inf"))])
def test_a_clip_that_is_none(clip, part):
  with pytest.raises(video.VideoError, match="from a second to a later one"):
    HERE.scan_frames(Footage(str(clip), clip=part), 4, (16, 24))


@needs_data
def test_a_clip_of_a_variable_rate():
  """tree.avi says 444 frames at 15 a second, and has 68 at any time."""
  path = DATA / "tree.avi"
  whole = video.scan_frames(path, 68, (16, 16))
  scan = video.scan_frames(path, 68, (16, 16), clip=(10.0, 20.0))
  inside = (whole.time_s >= 10.0) & (whole.time_s < 20.0)
  assert 10 < inside.sum() == scan.mask.sum() == scan.num_frames < 40
  np.testing.assert_array_equal(
    scan.frame_index[scan.mask], whole.frame_index[inside]
  )
  np.testing.assert_allclose(
    scan.time_s[scan.mask], whole.time_s[inside] - 10.0, atol=1e-9
  )
  np.testing.assert_array_equal(scan.frames[scan.mask], whole.frames[inside])


@pytest.mark.parametrize(
  ("part", "within", "expected"),
  [
    # Ten frames a second: 20 to 27, and 50 to 53, twelve together.
    (None, [(5.0, 5.3), (2.0, 2.7)], [21, 24, 27, 52]),
    ((1.0, 4.0), [(1.0, 1.7)], [21, 23, 25, 27]),  # seconds of the clip
    ((1.0, 4.0), [(2.9, 9.0)], [36, 37, 38, 39]),  # and none behind it
    (None, [(2.0, 2.1)], [19, 20, 21, 22]),  # too few: the nearest
    ((5.7, 6.0), [(0.0, 0.1)], [57, 58, 59]),  # all of a short clip
  ],
)
def test_parts_of_a_video_by_hand(clip, part, within, expected):
  one = Footage(str(clip), clip=part)
  scan = HERE.scan_frames(one, 4, (16, 24), within)
  real = len(expected)
  assert scan.frame_index[:real].tolist() == expected
  assert scan.mask.tolist() == [n < real for n in range(4)]
  start_s = part[0] if part else 0
  np.testing.assert_allclose(
    scan.time_s[:real], np.array(expected) / 10 - start_s, atol=1e-9
  )
  frames, _ = video.read_frames(clip, np.array(expected), (16, 24))
  np.testing.assert_array_equal(scan.frames[:real], frames)


@needs_data
def test_parts_of_a_variable_rate():
  """True times, not those of a header that is wrong: see above."""
  path = DATA / "tree.avi"
  whole = video.scan_frames(path, 68, (16, 16))
  within = [(10.0, 12.0), (18.0, 21.0)]
  inside = np.any(
    [(whole.time_s >= s) & (whole.time_s <= e) for s, e in within], 0
  )
  count = inside.sum()
  scan = video.scan_frames(path, count, (16, 16), within=within)
  assert 10 < count < 40 and scan.mask.all()
  np.testing.assert_array_equal(scan.frame_index, whole.frame_index[inside])
  np.testing.assert_allclose(scan.time_s, whole.time_s[inside], atol=1e-9)
  np.testing.assert_array_equal(scan.frames, whole.frames[inside])


@needs_data
def test_stamps_are_those_of_the_container():
  truth = json.loads(
    (DATA / "nasa_13013.mp4.stream0.all_frames_info.json").read_text()
  )
  stamp_s = np.array([float(row["pts_time"]) for row in truth])
  scan = video.scan_frames(DATA / "nasa_13013.mp4", 24, (16, 16))
  np.testing.assert_allclose(scan.time_s, stamp_s[scan.frame_index], atol=1e-5)
  # Its stream starts 27 frames late; times count from there.
  scan = video.scan_frames(DATA / "delayed_start.mp4", 24, (16, 16))
  np.testing.assert_allclose(scan.time_s, np.arange(24) / 25, atol=1e-6)


@needs_data
def test_frames_show_their_number():
  """counter.mp4 shows frame 17 as it shows it when read through."""
  path = DATA / "counter.mp4"
  every, time_s = video.read_frames(path, None, (90, 160))
  assert len(every) == 30 and len(np.unique(every, axis=0)) == 30
  scan = video.scan_frames(path, 7, (90, 160))
  np.testing.assert_array_equal(scan.frames, every[scan.frame_index])
  np.testing.assert_allclose(scan.time_s, time_s[scan.frame_index])


@needs_data
@pytest.mark.parametrize(
  "name", ["wannaworktogether.mp4", "fades.mp4", "nasa_13013.mp4"]
)
def test_seeking_is_cheaper_and_changes_nothing(name, monkeypatch):
  steps = []
  step = video.Reader.step

  def counted(reader):
    steps.append(1)
    return step(reader)

  monkeypatch.setattr(video.Reader, "step", counted)
  through = video.scan_frames(DATA / name, 3, (16, 16), may_seek=False)
  decoded = len(steps)
  steps.clear()
  sought = video.scan_frames(DATA / name, 3, (16, 16))
  for left, right in zip(sought, through, strict=True):
    np.testing.assert_array_equal(left, right)
  if name == "wannaworktogether.mp4":  # key frames 300 apart at most, of 5402
    assert decoded == 5403 and len(steps) < 1000


def test_a_folder_of_pictures(folder):
  one = Footage(str(folder), fps=2.0)
  assert HERE.probe(one) == video.VideoInfo(11, 2.0, 40, 30, 5.5)
  scan = HERE.scan_frames(one, 4, (15, 20))
  # floor((k + 0.5) 11 / 4)
  assert scan.frame_index.tolist() == [1, 4, 6, 9]
  assert scan.time_s.tolist() == [0.5, 2.0, 3.0, 4.5]
  assert scan.frames[:, 7, 7, 0].tolist() == [40, 100, 140, 200]
  part = HERE.scan_frames(one._replace(clip=(2.0, 3.5)), 4, (15, 20))
  assert part.frame_index.tolist() == [4, 5, 6, 0] and part.num_frames == 3
  assert part.time_s[part.mask].tolist() == [0, 0.5, 1.0]
  assert HERE.probe(one._replace(clip=(2.0, 3.5))).duration_s == 1.5
  some = HERE.scan_frames(one, 3, (15, 20), [(4.0, 5.0), (0.0, 0.6)])
  assert some.frame_index.tolist() == [0, 8, 10]  # of 0, 1, 8, 9, 10
  assert some.time_s.tolist() == [0.0, 4.0, 5.0]
  some = HERE.scan_frames(one._replace(clip=(2.0, 5)), 2, (15, 20), [(1, 1.4)])
  assert some.frame_index.tolist() == [6, 7]  # beside it, one more
  assert some.time_s.tolist() == [1.0, 1.5]
  frames = HERE.read_frames(one, np.array([10, 0, 10]), (15, 20))
  assert frames[:, 7, 7, 0].tolist() == [220, 20, 220]


def test_folders_that_will_not_do(folder, tmp_path):
  with pytest.raises(video.VideoError, match="field fps"):
    HERE.probe(Footage(str(folder)))
  with pytest.raises(video.VideoError, match="without pictures"):
    HERE.probe(Footage(str(tmp_path), fps=2.0))
  with pytest.raises(video.VideoError, match="No such file"):
    HERE.probe(Footage(str(tmp_path / "gone"), fps=2.0))
  with pytest.raises(video.VideoError, match="positive fps"):
    HERE.probe(Footage(str(folder), fps=0.0))
  with pytest.raises(
    video.VideoError, match="frame 11 is not there; it has 11"
  ):
    HERE.read_frames(Footage(str(folder), fps=2.0), np.array([11]), (15, 20))
  with pytest.raises(video.VideoError, match="no picture lies in its clip"):
    HERE.scan_frames(Footage(str(folder), (6.0, 7.0), 2.0), 4, (15, 20))
  with pytest.raises(video.VideoError, match="a picture has no clip"):
    HERE.scan_frames(Footage(str(folder / "img1.png"), (0.0, 1.0)), 4, (15, 20))
  with pytest.raises(video.VideoError, match="a picture has no clip"):
    HERE.scan_frames(Footage(str(folder / "img1.png")), 4, (15, 20), [(0, 1)])


def test_a_sample_says_what_it_looks_at():
  sample = records.Sample("a", "v.mp4", "?", (), "", clip=(1.0, 2.0), fps=3.0)
  assert footage_lib.of_sample(sample) == ("v.mp4", (1.0, 2.0), 3.0)


@pytest.mark.parametrize(
  ("limits", "message"),
  [
    (dict(max_file_mib=0.001), r"file_mib is .*raise limits\.max_file"),
    (dict(max_pixels=1535), r"pixels is 1536, above the limit of 1535; "),
    (dict(max_duration_s=5.9), r"duration_s is 6, above .*max_duration_s"),
    (dict(max_frames=59), r"frames is 60, above the limit of 59.*max_frames"),
  ],
)
def test_limits_of_a_video(clip, limits, message):
  refuses = decoding.Decoder(limits=limits)
  one = Footage(str(clip))
  for ask in (
    lambda: refuses.probe(one),
    lambda: refuses.scan_frames(one, 4, (16, 16)),
    lambda: refuses.read_frames(one, np.array([1]), (16, 16)),
  ):
    with pytest.raises(video.VideoError, match=message):
      ask()
  exact = dict(max_pixels=1536, max_duration_s=6.0, max_frames=60)
  assert decoding.Decoder(limits=exact).probe(one).num_frames == 60


def test_a_header_that_promises_less(clip, monkeypatch):
  """Decoding is held to the limits as well."""
  monkeypatch.setattr(video, "header", lambda capture: (10.0, 20))
  limits = video.Limits(max_frames=40)
  with pytest.raises(video.VideoError, match="frames is 41, above"):
    video.scan_frames(clip, 4, (16, 16), limits=limits)


def test_limits_of_pictures(folder, monkeypatch):
  path = folder / "img1.png"

  def refuse(*_):
    raise AssertionError("decoded")

  monkeypatch.setattr(Image.Image, "load", refuse)
  with pytest.raises(video.VideoError, match=r"pixels is 1200, above"):
    images.probe(path, limits=video.Limits(max_pixels=1000))
  with pytest.raises(video.VideoError, match=r"file_mib is .*, above"):
    images.probe(path, limits=video.Limits(max_file_mib=1e-6))
  with pytest.raises(video.VideoError, match=r"frames is 11, above"):
    picture_folder.probe(folder, fps=1.0, limits=video.Limits(max_frames=10))


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("a.m3u8", "#EXTM3U\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"),
    ("a.mp4", "ffconcat version 1.0\nfile '{}'\n"),
    ("a.sdp", "v=0\nm=video 0 RTP/AVP 96\n{}\n"),
  ],
)
def test_nothing_but_the_file_is_opened(clip, tmp_path, name, text):
  path = tmp_path / name
  path.write_text(text.format(clip))
  with pytest.raises(video.VideoError, match=f"{name}: not a video"):
    video.probe(path)
