"""The command: files that are as they should be, and files that are not."""

import inspect
import json
import os
import pathlib
import struct
import subprocess
import sys

import cv2
import jax
import matplotlib.image
import numpy as np
import pytest

from cf_jax import descriptor, tad
from cf_jax import policy as policy_lib
from cf_jax.data import frame_size, patches, prompts, video
from cf_jax.models import config as model_config
from cf_jax.models import hf_weights, vlm
from cf_jax.programs import keyframes, policies
from tests.conftest import ROOT, SMALLEST, load_config

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data" / "videos"
needs_data = pytest.mark.skipif(
  not DATA.is_dir(), reason=f"real videos are not at {DATA}"
)
FPS = 4.0
CUTS = (8, 20)  # frames at which a scene starts


@pytest.fixture(scope="module")
def scenes():
  """32 frames of 64 x 96 px at 4 a second: red, green, blue."""
  frames = np.zeros((32, 64, 96, 3), np.uint8)
  for channel, (first, last) in enumerate(
    zip((0, *CUTS), (*CUTS, 32), strict=True)
  ):
    frames[first:last, ..., channel] = 200
  return frames


@pytest.fixture(scope="module")
def clip(scenes, write_video, tmp_path_factory):
  return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", scenes, FPS)


@pytest.fixture
def config(clip):
  """configs/keyframes.py for the clip, unlocked."""
  config = load_config("configs/keyframes.py")
  config.video = str(clip)
  config.num_keyframes = 3
  return config


def _read(path):
  return json.loads(path.read_text("utf-8"))


def _picture(path):
  return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def test_one_file(config, clip, tmp_path):
  (record,) = keyframes.run(config.lock(), tmp_path)
  folder = tmp_path / "clip.mp4"
  assert _read(folder / "keyframes.json") == record
  about = record["video"]
  facts = dict(
    codec="FMP4", width=96, height=64, rotation=0, num_frames=32, fps=4.0
  )
  assert {name: about[name] for name in facts} == facts
  assert about["duration_s"] == 8 and about["start_s"] == 0
  assert not about["variable_fps"] and about["problem"] is None
  assert about["bytes"] == clip.stat().st_size
  # One frame of each scene; both cuts are apexes and open a segment.
  rows = record["keyframes"]
  number = [row["frame_index"] for row in rows]
  assert [sum(n >= cut for cut in CUTS) for n in number] == [0, 1, 2]
  assert [row["timestamp"] for row in rows] == [n / FPS for n in number]
  assert [row["frame_index"] for row in record["apexes"]] == list(CUTS)
  assert [row["apex"] and row["apex"]["frame_index"] for row in rows] == [
    None,
    *CUTS,
  ]
  assert [tuple(row["segment"].values()) for row in rows] == [
    (0, 7, 0.0, 1.75),
    (8, 19, 2.0, 4.75),
    (20, 31, 5.0, 7.75),
  ]
  assert rows[0]["saliency"] == 0 and max(r["saliency"] for r in rows) == 1
  assert sorted(row["rank"] for row in rows) == [1, 2, 3]
  assert record["num_scanned"] == 32
  assert record["settings"]["tad"]["gate"] == config.tad.gate
  # The pictures are the frames, every pixel of them.
  truth, _ = video.read_frames(clip, np.array(number))
  for row, frame in zip(rows, truth, strict=True):
    np.testing.assert_array_equal(_picture(folder / row["file"]), frame)
  strip = matplotlib.image.imread(folder / "film_strip.png")
  assert strip.shape[1] > 1000 and strip[..., :3].std() > 0.1
  page = (tmp_path / "index.html").read_text("utf-8")
  assert "clip.mp4/film_strip.png" in page and rows[1]["file"] in page
  held = _read(tmp_path / "videos.json")
  assert held["videos"] == [{"name": "clip.mp4", "error": None}]


def test_it_is_what_the_layer_says(config, scenes, clip, tmp_path):
  """The curve, by hand from the file: chunks and padding change nothing."""
  config.scan.chunk = 5
  (record,) = keyframes.run(config, tmp_path)
  frames, _ = video.read_frames(clip)
  small = np.stack(
    [frame_size.shrink_frame(frame, (64, 64)) for frame in frames]
  )
  embedding = jax.jit(descriptor.pixel_descriptor)(small)
  chosen = tad.select_videos(embedding[None], num_keyframes=3)
  chosen = jax.tree.map(lambda leaf: leaf[0], chosen)
  rows = record["keyframes"]
  assert [r["frame_index"] for r in rows] == chosen.index.tolist()
  for name, value in (
    ("score", chosen.score[chosen.index]),
    ("variation", chosen.variation[chosen.index]),
    ("saliency", chosen.saliency),
  ):
    found = [row[name] for row in rows]
    np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-4)


def test_settings_are_the_layers_own():
  """What the config leaves as it is, is the default of the layer."""
  parameters = inspect.signature(tad.select_keyframes).parameters
  for name, value in load_config("configs/keyframes.py").tad.items():
    assert value == parameters[name].default, name


def test_uniform_beside_it(config, tmp_path):
  config.select = "uniform"
  config.num_keyframes = 4
  config.picture = "jpg"
  (record,) = keyframes.run(config, tmp_path)
  rows = record["keyframes"]
  assert [row["frame_index"] for row in rows] == [4, 12, 20, 28]
  assert record["apexes"] == [] and {row["apex"] for row in rows} == {None}
  picture = tmp_path / "clip.mp4" / rows[0]["file"]
  assert picture.suffix == ".jpg"
  assert np.abs(_picture(picture) - (200, 0, 0)).mean() < 10


def test_so_many_frames_a_second(config, tmp_path):
  config.fps = 2.0
  (record,) = keyframes.run(config, tmp_path)
  assert record["num_scanned"] == 16 and record["video"]["num_frames"] == 32
  assert all(row["frame_index"] % 2 == 0 for row in record["keyframes"])


def test_the_same_call_again(config, tmp_path, monkeypatch):
  keyframes.run(config, tmp_path)
  path = tmp_path / "clip.mp4" / "keyframes.json"
  record = _read(path)
  with monkeypatch.context() as patch:
    patch.delattr(keyframes, "look")  # nothing is left to look at
    assert keyframes.run(config, tmp_path) == [record]
  # A picture that is gone is made again.
  picture = tmp_path / "clip.mp4" / record["keyframes"][1]["file"]
  picture.unlink()
  keyframes.run(config, tmp_path)
  assert picture.exists()
  # Threads may differ, the settings may not.
  config.scan.num_threads = 2
  keyframes.run(config, tmp_path)
  config.tad.gate = 5.0
  config.num_keyframes = 2
  with pytest.raises(ValueError) as error:
    keyframes.run(config, tmp_path)
  said = str(error.value)
  assert "num_keyframes (there 3, now 2); tad.gate (there 4.0, now 5.0)" in said
  assert said.endswith("give another --workdir or the same settings")


def test_a_file_that_changed_is_looked_at_again(
  config, scenes, write_video, tmp_path
):
  path = write_video(tmp_path / "new.mp4", scenes, FPS)
  config.video = str(path)
  keyframes.run(config, tmp_path / "out")
  write_video(path, scenes[:25], FPS)
  (record,) = keyframes.run(config, tmp_path / "out")
  assert record["video"]["num_frames"] == 25
  pictures = (tmp_path / "out" / "new.mp4" / "keyframes").iterdir()
  assert len(list(pictures)) == 3


def _write_avi(path, frames):
  height, width = frames.shape[1:3]
  writer = cv2.VideoWriter(
    str(path), cv2.VideoWriter_fourcc(*"MJPG"), FPS, (width, height)
  )
  for frame in frames:
    writer.write(frame[..., ::-1])
  writer.release()


def test_a_folder_goes_on(config, scenes, clip, write_video, tmp_path):
  """Names that could clash, and files that are no videos."""
  folder = tmp_path / "in"
  for name in ("a", "b", ".hidden"):
    (folder / name).mkdir(parents=True)
  (folder / "a" / "x.mp4").write_bytes(clip.read_bytes())
  write_video(folder / "b" / "x.mp4", scenes[:20], FPS)
  write_video(folder / "x.mp4", scenes[:1], FPS)  # one frame
  _write_avi(folder / "X.AVI", scenes)
  data = (folder / "X.AVI").read_bytes()
  (folder / "short.avi").write_bytes(data[: len(data) * 2 // 3])
  (folder / "empty.mp4").touch()
  (folder / "text.mp4").write_text("this is not a video\n" * 50)
  (folder / "cut.mp4").write_bytes(clip.read_bytes()[:600])
  (folder / "notes.txt").write_text("nobody reads this")
  (folder / ".hidden" / "x.mp4").write_text("nor this")
  config.video = str(folder)
  out = folder / "out"  # not looked into, the second time
  for _ in range(2):
    with pytest.raises(ValueError) as error:
      keyframes.run(config, out)
    said = str(error.value)
    assert said.startswith("3 of 8 videos failed: ")
    for name, why in (
      ("cut.mp4", "not a video that OpenCV can open, or cut short"),
      ("empty.mp4", "the file is empty"),
      ("text.mp4", "not a video"),
    ):
      assert f"{name}: {why}" in said
    assert said.endswith(f"all others are in {out}") and "\n" not in said
  made = sorted(
    path.parent.relative_to(out).as_posix()
    for path in out.rglob("keyframes.json")
  )
  assert made == ["X.AVI", "a/x.mp4", "b/x.mp4", "short.avi", "x.mp4"]
  whole, cut, one = (
    _read(out / name / "keyframes.json")
    for name in ("X.AVI", "short.avi", "x.mp4")
  )
  # What can be decoded is used, and the rest is said.
  assert whole["video"]["problem"] is None
  num = cut["video"]["num_frames"]
  assert CUTS[0] < num < 32 and len(cut["keyframes"]) == 3
  assert cut["video"]["problem"] == (
    f"cut short: the header says 8.00 s, {num / FPS:.2f} s can be decoded"
  )
  assert [row["frame_index"] for row in one["keyframes"]] == [0]
  assert one["keyframes"][0]["segment"]["last_frame"] == 0
  page = (out / "index.html").read_text("utf-8")
  assert "a/x.mp4/film_strip.png" in page and "the file is empty" in page
  assert "cut short: the header says 8.00 s" in page
  errors = {
    row["name"]: row["error"] for row in _read(out / "videos.json")["videos"]
  }
  assert sum(error is not None for error in errors.values()) == 3


def _index_in_front(data):
  """An MP4 with its index, `moov`, before its frames; and where those are."""
  at, place = {}, 0
  while place < len(data):
    size, kind = struct.unpack_from(">I4s", data, place)
    at[kind] = place
    place += size
  assert list(at)[-1] == b"moov" and place == len(data)
  index = bytearray(data[at[b"moov"] :])
  table = index.index(b"stco")
  (count,) = struct.unpack_from(">I", index, table + 8)
  for n in range(count):
    (offset,) = struct.unpack_from(">I", index, table + 12 + 4 * n)
    struct.pack_into(">I", index, table + 12 + 4 * n, offset + len(index))
  first = at[b"mdat"]
  moved = data[:first] + bytes(index) + data[first : at[b"moov"]]
  return moved, first + len(index) + 8


def test_a_file_cut_short_behind_its_index(config, write_video, tmp_path):
  """As a download that stopped: the header still promises every frame."""
  frames = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), np.uint8)
  path = write_video(tmp_path / "noise.mp4", frames, FPS)
  data, start = _index_in_front(path.read_bytes())
  truth, _ = video.read_frames(path)
  config.video = str(tmp_path / "moved.mp4")
  for n, share in enumerate((1.0, 0.9, 0.4)):
    size = start + int(share * (len(data) - start))
    (tmp_path / "moved.mp4").write_bytes(data[:size])
    (record,) = keyframes.run(config, tmp_path / f"out{n}")
    num, problem = record["video"]["num_frames"], record["video"]["problem"]
    if share == 1:
      assert num == 40 and problem is None
      continue
    assert 0 < num < 40
    # The last one may be half there; the others are what they were.
    found, _ = video.read_frames(tmp_path / "moved.mp4")
    np.testing.assert_array_equal(found[: num - 1], truth[: num - 1])
    assert problem == (
      f"cut short: the header says 10.00 s, {num / FPS:.2f} s can be decoded"
    )
  (tmp_path / "moved.mp4").write_bytes(data[:start])
  with pytest.raises(ValueError, match=r"moved.mp4: no frame can be decoded"):
    keyframes.run(config, tmp_path / "none")


def test_a_divided_file_gives_the_same(
  config, scenes, write_video, tmp_path, monkeypatch
):
  noise = np.random.default_rng(0).integers(-9, 9, (90, 64, 96, 3))
  frames = np.clip(np.repeat(scenes, 3, 0)[:90] + 9 + noise, 0, 255)
  path = write_video(tmp_path / "long.mp4", frames.astype(np.uint8), FPS)
  config.video = str(path)
  (whole,) = keyframes.run(config, tmp_path / "whole")
  monkeypatch.setattr(keyframes, "_PART_FRAMES", 20)
  config.scan.parts = 3
  (divided,) = keyframes.run(config, tmp_path / "divided")
  del whole["seconds"], divided["seconds"]
  assert divided == whole


def test_more_keyframes_than_frames(config, scenes, write_video, tmp_path):
  config.video = str(write_video(tmp_path / "few.mp4", scenes[5:7], FPS))
  (record,) = keyframes.run(config, tmp_path / "out")
  rows = record["keyframes"]
  assert [row["frame_index"] for row in rows] == [0, 1]


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (dict(video=""), "config.video is empty"),
    (dict(video="no/such.mp4"), "no/such.mp4: there is no such file or folder"),
    (dict(num_keyframes=0), "config.num_keyframes must be at least 1, got 0"),
    (dict(select="best"), "config.select must be one of"),
    (dict(fps=0.0), "config.fps must be above 0"),
    (dict(picture="gif"), "config.picture must be one of"),
    (dict(scan=dict(size_px=(64,))), r"size_px must be .*got \(64,\)"),
    (dict(tad=dict(softness=0.0)), r"softness=0\.0, expected a number above 0"),
    (dict(checkpoint="no/model"), "no/model is not a directory with"),
  ],
)
def test_what_a_user_gets_wrong(config, tmp_path, change, said):
  config.update(change)
  with pytest.raises(ValueError, match=said):
    keyframes.run(config, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_the_workdir_is_not_the_folder_of_the_videos(config, clip):
  with pytest.raises(ValueError, match="is the folder of the videos; give an"):
    keyframes.run(config, clip.parent)


def test_a_folder_without_videos(config, tmp_path):
  (tmp_path / "notes.txt").write_text("nothing")
  config.video = str(tmp_path)
  with pytest.raises(ValueError, match=r"no video below this folder.*\*\.mp4"):
    keyframes.run(config, tmp_path / "out")


def test_from_the_command_line(scenes, write_video, tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  write_video(folder / "good.mp4", scenes, FPS)
  (folder / "bad.mp4").write_text("no video")
  ran = subprocess.run(
    [
      sys.executable,
      "-m",
      "cf_jax.main",
      "--config=configs/keyframes.py",
      f"--workdir={tmp_path / 'out'}",
      f"--config.video={folder}",
      "--config.num_keyframes=3",
      "--config.scan.size_px=(32,48)",
      "--config.fps=2",
      "--config.compilation_cache_dir=",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ,
  )
  assert ran.returncode == 2 and ran.stdout == ""
  *logged, last = ran.stderr.strip().splitlines()
  assert last.startswith("error: 1 of 2 videos failed: ") and "bad.mp4" in last
  assert "Traceback" not in ran.stderr and "moov" not in ran.stderr
  assert any("files 1/1" in line or "frame 32 of 32" in line for line in logged)
  record = _read(tmp_path / "out" / "good.mp4" / "keyframes.json")
  assert record["settings"]["size_px"] == [32, 48]
  assert record["num_scanned"] == 16 and len(record["keyframes"]) == 3


# --------------------------------------------------------------- vision tower


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A small random Qwen2.5-VL directory, and its parameters."""
  tokenizer = prompts.load_tokenizer("tiny")
  model = model_config.make(
    vocab_size=tokenizer.vocab_size,
    **SMALLEST,
    **tokenizer.config_ids,
  )
  params = jax.jit(lambda: vlm.init(model, jax.random.key(3)))()
  folder = tmp_path_factory.mktemp("model") / "qwen"
  hf_weights.save_hf(folder, model, params, tokenizer=tokenizer.folder)
  return folder, model, params


def test_the_vision_tower_alone_is_read(checkpoint):
  folder, _, params = checkpoint
  model, found, source = policies.load_vision(str(folder), None)
  assert list(found) == ["vision"] and source == str(folder)
  jax.tree.map(np.testing.assert_array_equal, found["vision"], params["vision"])
  assert model.dtype == "float32"


def test_a_frame_is_the_mean_of_its_visual_tokens(checkpoint):
  _, model, params = checkpoint
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 256, (3, 56, 84, 3), dtype=np.uint8)
  embed = policy_lib.make_frame_embedder(model, params, (56, 84))
  token = jax.jit(
    lambda pixel: policy_lib.encode_frames(model, params, pixel, grid=(4, 6))
  )(patches.frames_to_patches(frames)[None])
  expected = np.asarray(token[0], np.float64).mean(axis=1)
  np.testing.assert_allclose(embed(frames), expected, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match="do not divide"):
    policy_lib.make_frame_embedder(model, params, (64, 64))


def test_with_a_checkpoint(checkpoint, config, tmp_path):
  config.checkpoint = str(checkpoint[0])
  config.scan.update(size_px=(28, 56), chunk=16)
  (record,) = keyframes.run(config, tmp_path)
  assert record["settings"]["embedding"] == str(checkpoint[0])
  assert [row["frame_index"] for row in record["apexes"]] == list(CUTS)


# ----------------------------------------------------------------- drawn curve


def test_the_envelope_keeps_what_is_seen():
  rng = np.random.default_rng(0)
  score = rng.random(50_000)
  apex = np.zeros(50_000, bool)
  apex[[7, 12_345, 49_998]] = True
  keep = keyframes._envelope(score, apex)
  assert len(keep) < 5000 and np.all(np.diff(keep) > 0)
  assert {0, 7, 12_345, 49_998, 49_999} <= set(keep.tolist())
  # In every stretch of it the highest and the lowest point are there.
  for start in range(0, 50_000, 1000):
    part = keep[(keep >= start) & (keep < start + 1000)]
    whole = score[start : start + 1000]
    assert score[part].max() == whole.max()
    assert score[part].min() == whole.min()
  few = keyframes._envelope(score[:100], apex[:100])
  np.testing.assert_array_equal(few, np.arange(100))


# ----------------------------------------------------------------- real videos


@needs_data
def test_times_are_the_containers(config, tmp_path):
  """Of the first video stream; its frames are listed beside the file."""
  config.video = str(DATA / "nasa_13013.mp4")
  config.num_keyframes = 16
  (record,) = keyframes.run(config, tmp_path)
  rows = _read(DATA / "nasa_13013.mp4.stream0.all_frames_info.json")
  assert record["video"]["num_frames"] == len(rows) == 325
  for row in record["keyframes"] + record["apexes"]:
    truth = float(rows[row["frame_index"]]["pts_time"])
    assert row["timestamp"] == pytest.approx(truth, abs=1e-5)


@needs_data
def test_a_stream_that_starts_late(config, tmp_path):
  """Its 24 frames are shown from 1.08 s on."""
  config.video = str(DATA / "delayed_start.mp4")
  config.select = "uniform"
  config.num_keyframes = 24
  (record,) = keyframes.run(config, tmp_path)
  times = [row["timestamp"] for row in record["keyframes"]]
  np.testing.assert_allclose(times, 1.08 + np.arange(24) / 25, atol=1e-6)
  assert record["video"]["start_s"] == pytest.approx(1.08)


@needs_data
def test_an_old_codec_with_variable_rate(config, tmp_path):
  config.video = str(DATA / "tree.avi")
  (record,) = keyframes.run(config, tmp_path)
  about = record["video"]
  assert (about["num_frames"], about["header_frames"]) == (68, 444)
  assert about["variable_fps"] and about["problem"] is None
  assert about["codec"] == "cvid"


@needs_data
def test_a_video_on_its_side(config, tmp_path):
  config.video = str(DATA / "issue-134-rotate.mp4")
  (record,) = keyframes.run(config, tmp_path)
  about = record["video"]
  assert (about["rotation"], about["height"], about["width"]) == (90, 1280, 544)
  row = record["keyframes"][0]
  picture = _picture(tmp_path / record["name"] / row["file"])
  assert picture.shape == (1280, 544, 3)
