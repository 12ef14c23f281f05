"""Whole files in chunks, and the way back to a few of their frames."""

import json
import threading

import cv2
import numpy as np
import pytest

from cf_jax.data import frame_size, video, video_stream
from tests.data.test_video import DATA, _write, needs_data


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
  """90 frames of noise at 25 a second; every twelfth is a key frame."""
  path = tmp_path_factory.mktemp("video") / "noise.mp4"
  writer = cv2.VideoWriter(
    str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25.0, (48, 32)
  )
  rng = np.random.default_rng(0)
  for picture in rng.integers(0, 256, (90, 32, 48, 3), dtype=np.uint8):
    writer.write(picture)
  writer.release()
  return path


def _gone_through(path, **settings):
  stream = video_stream.FrameStream(path, (16, 16), **{"chunk": 32} | settings)
  return stream, list(stream)


def test_every_frame_once_and_in_order(noise):
  stream, chunks = _gone_through(noise)
  assert [len(chunk.frames) for chunk in chunks] == [32, 32, 26]
  number = np.concatenate([chunk.number for chunk in chunks])
  np.testing.assert_array_equal(number, np.arange(90))
  assert chunks[-1].num_decoded == 90
  full, time_s = video.read_frames(noise)
  np.testing.assert_array_equal(stream.time_s, time_s)
  frames = np.concatenate([chunk.frames for chunk in chunks])
  for small, frame in zip(frames, full, strict=True):
    np.testing.assert_array_equal(
      small, frame_size.shrink_frame(frame, (16, 16))
    )
  assert stream.info == video.probe(noise)
  assert (stream.codec, stream.rotation, stream.start_s) == ("FMP4", 0, 0)
  assert stream.seekable


def test_the_size_of_chunks_and_threads_change_nothing(noise):
  one = _gone_through(noise, chunk=90)[1][0]
  for settings in (dict(chunk=7), dict(chunk=1, num_threads=3)):
    chunks = _gone_through(noise, **settings)[1]
    frames = np.concatenate([chunk.frames for chunk in chunks])
    np.testing.assert_array_equal(frames, one.frames)


def test_so_many_a_second(tmp_path):
  """At 10 a second the first frames from 0, 0.25, 0.5, 0.75, 1, ... s on."""
  path = _write(tmp_path / "grey.mp4", 24)
  number = _gone_through(path, fps=4.0)[1][0].number
  assert number.tolist() == [0, 3, 5, 8, 10, 13, 15, 18, 20, 23]
  # More than there are: all. And frames that are not taken are counted.
  assert len(_gone_through(path, fps=60.0)[1][0].frames) == 24
  stream, (chunk,) = _gone_through(path, fps=0.5)
  assert chunk.number.tolist() == [0, 20] and len(stream.time_s) == 24


def _same(path, settings, **parted):
  """What a divided file gives is what the whole one gives."""
  one, whole = _gone_through(path, **settings)
  stream, chunks = _gone_through(path, **settings, **parted)
  rows = {}
  for chunk in chunks:
    assert len(chunk.number) == len(chunk.frames)
    rows.setdefault(chunk.part, []).append(chunk.frames)
  joined = np.concatenate([chunk.frames for chunk in whole])
  np.testing.assert_array_equal(stream.join(rows), joined)
  for name in ("time_s", "number", "key", "info", "codec", "rotation"):
    assert getattr(stream, name) == getattr(one, name), name
  assert stream.seekable == one.seekable and stream.start_s == one.start_s
  return chunks


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("fps", [None, 10.0])
def test_parts_are_the_whole(noise, parts, fps):
  chunks = _same(noise, dict(fps=fps, chunk=7), parts=parts)
  assert {chunk.part for chunk in chunks} == set(range(parts))
  # Each goes through its own part and no further.
  assert chunks[-1].num_decoded <= 90


def test_a_slot_over_two_parts_gives_one_frame(tmp_path):
  """At 10 frames a second the second of two parts starts amid a slot."""
  path = _write(tmp_path / "grey.mp4", 24)
  for fps in (0.5, 0.9, 3.0, 4.0):
    _same(path, dict(fps=fps), parts=2)


def test_parts_that_do_not_meet_count_for_nothing(noise, monkeypatch):
  class Elsewhere(video_stream._Part):
    """As if its seek had ended at another picture."""

    def __setattr__(self, name, value):
      other = name == "first" and value is not None
      super().__setattr__(name, 255 - value if other else value)

  monkeypatch.setattr(video_stream, "_Part", Elsewhere)
  _same(noise, {}, parts=3)


def test_a_header_that_promises_more_than_there_is(noise, monkeypatch):
  told = video.probe(noise)
  monkeypatch.setattr(
    video, "probe", lambda path, limits: told._replace(num_frames=400)
  )
  chunks = _same(noise, {}, parts=3)
  assert {chunk.part for chunk in chunks} == {0}


def test_shrinking_is_a_mean_of_sixteen():
  rng = np.random.default_rng(0)
  frame = rng.integers(0, 256, (128, 192, 3), dtype=np.uint8)
  # Factors 4 and 6: bilinear samples lie in the middle of four pixels, at
  # offsets 0.5 and 2.5 of 4, and at 1 and 4 of 6 (on a pixel's centre).
  rows = frame.reshape(32, 4, 192, 3).astype(float)
  rows = rows[:, [0, 1, 2, 3]].mean(1)
  columns = rows.reshape(32, 32, 6, 3)[:, :, [1, 4]].mean(2)
  found = frame_size.shrink_frame(frame, (32, 32))
  assert np.abs(found - columns).max() <= 1.5  # rounded twice


def _steps(monkeypatch):
  """Counts the frames that readers step to."""
  count = []
  step = video.Reader.step

  def counted(reader):
    count.append(reader.position)
    return step(reader)

  monkeypatch.setattr(video.Reader, "step", counted)
  return count


WANTED = [2, 40, 41, 77, 89]


def test_seeking_lands_exactly(noise, monkeypatch):
  stream, _ = _gone_through(noise)
  full, _ = video.read_frames(noise)
  through = list(video_stream.pick_frames(noise, WANTED, stream))
  np.testing.assert_array_equal(through, full[WANTED])
  monkeypatch.setattr(video_stream, "_SEEK_MARGIN", 1)
  monkeypatch.setattr(video_stream, "_SEEK_GAIN", 2)
  stream.key = list(range(0, 90, 12))
  count = _steps(monkeypatch)
  sought = list(video_stream.pick_frames(noise, WANTED, stream))
  np.testing.assert_array_equal(sought, full[WANTED])
  assert len(count) < 30  # of 90


def test_a_seek_that_ends_elsewhere_is_noticed(noise, monkeypatch):
  stream, _ = _gone_through(noise)
  full, _ = video.read_frames(noise)
  monkeypatch.setattr(video_stream, "_SEEK_GAIN", 2)
  stream.key = list(range(0, 90, 12))
  # As if the stamps of this second opening were others.
  stream.time_s = [t + 0.013 for t in stream.time_s]
  found = list(video_stream.pick_frames(noise, WANTED, stream))
  np.testing.assert_array_equal(found, full[WANTED])


def test_a_file_that_changed(noise, tmp_path):
  stream, _ = _gone_through(noise)
  short = _write(tmp_path / "short.mp4", 10)
  with pytest.raises(video.VideoError, match="frame 40 cannot be decoded a"):
    list(video_stream.pick_frames(short, WANTED, stream))


def test_leaving_early_ends_the_thread(noise):
  chunks = iter(video_stream.FrameStream(noise, (16, 16), chunk=1))
  next(chunks)
  assert "decode" in [thread.name for thread in threading.enumerate()]
  chunks.close()
  assert "decode" not in [thread.name for thread in threading.enumerate()]


def test_errors_come_out_of_the_thread(tmp_path):
  path = tmp_path / "text.mp4"
  path.write_text("this is not a video\n" * 50)
  with pytest.raises(video.VideoError, match=r"text.mp4: not a video"):
    _gone_through(path)
  with pytest.raises(video.VideoError, match="there is no such file"):
    _gone_through(tmp_path / "missing.mp4")


@needs_data
@pytest.mark.parametrize(
  ("name", "count"),
  [
    ("bikes.mp4", 250),
    ("nasa_13013.mp4", 325),
    ("tree.avi", 68),
    ("issue-134-rotate.mp4", 240),
    ("fades.mp4", 250),
  ],
)
def test_real_files_both_ways(name, count, monkeypatch):
  """Frames sought, in several codecs, are those of decoding through."""
  monkeypatch.setattr(video_stream, "_SEEK_GAIN", 8)
  _same(DATA / name, {}, parts=3)
  stream, _ = _gone_through(DATA / name)
  assert len(stream.time_s) == count
  wanted = frame_size.spread(count, 5)
  full, time_s = video.read_frames(DATA / name, wanted)
  np.testing.assert_array_equal(np.array(stream.time_s)[wanted], time_s)
  found = list(video_stream.pick_frames(DATA / name, wanted.tolist(), stream))
  np.testing.assert_array_equal(found, full)


@needs_data
def test_what_real_files_say_of_themselves():
  stream, _ = _gone_through(DATA / "issue-134-rotate.mp4")
  assert stream.rotation == 90
  assert (stream.info.height, stream.info.width) == (1280, 544)
  stream, _ = _gone_through(DATA / "delayed_start.mp4")
  assert stream.start_s == pytest.approx(27 / 25)  # its first stamp
  assert stream.time_s[0] == 0
  # The first of two video streams, 320 x 180; the other one is 480 x 270.
  stream, _ = _gone_through(DATA / "nasa_13013.mp4")
  assert (stream.info.height, stream.info.width) == (180, 320)
  truth = json.loads(
    (DATA / "nasa_13013.mp4.stream0.all_frames_info.json").read_text()
  )
  np.testing.assert_allclose(
    stream.time_s, [float(row["pts_time"]) for row in truth], atol=1e-5
  )
