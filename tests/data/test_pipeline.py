"""The loader: order, resume, shards, unreadable videos; the frame reader."""

import json

import numpy as np
import pytest
from PIL import Image

from cf_jax.data import decoding, pipeline, records, synthetic, video

SCAN = dict(scan_frames=8, scan_size_px=(16, 16))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
  root = synthetic.ensure(
    tmp_path_factory.mktemp("cache"),
    seed=5,
    num_train=10,
    num_dev=1,
    num_test=1,
  )
  return synthetic.load(root, "train")


_OPEN = []


@pytest.fixture(autouse=True)
def _closing():
  """No loader reads on while the next test counts."""
  yield
  while _OPEN:
    _OPEN.pop().close()


def _loader(samples, **settings):
  loader = pipeline.make_loader(
    samples, **(SCAN | dict(batch_size=4, seed=0, num_threads=1) | settings)
  )
  _OPEN.append(loader)
  return loader


def _equal(left, right):
  return all(
    np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
    for a, b in zip(left, right)
  )


def test_batches_and_epochs(samples):
  loader = _loader(samples, batch_size=5)
  batches = [next(loader) for _ in range(4)]
  for batch in batches:
    assert batch.scan.shape == (5, 8, 16, 16, 3)
    assert batch.scan.dtype == np.uint8 and batch.scan_mask.all()
    assert batch.scan_time_s.dtype == np.float32
    assert batch.frame_index.dtype == batch.sample_index.dtype == np.int32
    np.testing.assert_array_equal(
      batch.frame_index, np.tile(np.arange(6, 96, 12), (5, 1))
    )
    assert [samples[n] for n in batch.sample_index] == batch.samples
  epochs = [
    np.concatenate([a.sample_index, b.sample_index])
    for a, b in (batches[:2], batches[2:])
  ]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert epochs[0].tolist() != epochs[1].tolist()


def test_without_shuffle_one_epoch_ends_with_a_smaller_batch(samples):
  batches = list(_loader(samples, shuffle=False, num_epochs=1))
  assert [b.sample_index.tolist() for b in batches] == [
    [0, 1, 2, 3],
    [4, 5, 6, 7],
    [8, 9],
  ]


def test_resume_is_exact_and_json(samples):
  loader = _loader(samples)
  for _ in range(4):  # into the second epoch
    next(loader)
  state = json.loads(json.dumps(loader.get_state()))
  expected = [next(loader) for _ in range(3)]
  resumed = _loader(samples)
  resumed.set_state(state)
  assert all(_equal(next(resumed), batch) for batch in expected)


def test_state_of_other_samples_is_refused(samples):
  state = _loader(samples).get_state()
  for other in (_loader(samples[:9]), _loader(samples, seed=1)):
    with pytest.raises(ValueError, match="other samples"):
      other.set_state(state)


def test_second_epoch_decodes_nothing(samples, monkeypatch):
  scan, calls = video.scan_frames, []

  def counted(path, num_frames, *args, **kwargs):
    if num_frames == 9:  # and not what an earlier test's threads still do
      calls.append(path)
    return scan(path, num_frames, *args, **kwargs)

  monkeypatch.setattr(video, "scan_frames", counted)
  loader = _loader(samples, batch_size=5, scan_frames=9)
  first = [next(loader) for _ in range(6)]
  assert len(calls) == 10
  calls.clear()
  loader = _loader(samples, batch_size=5, scan_frames=9, scan_cache_mib=0)
  assert all(_equal(next(loader), batch) for batch in first)
  assert len(calls) >= 30


def test_unreadable_videos_are_skipped_counted_and_listed(samples, tmp_path):
  bad = tmp_path / "bad.mp4"
  bad.write_text("no video")
  mixed = list(samples)
  mixed[3] = mixed[3]._replace(video=str(bad))
  mixed[7] = mixed[7]._replace(video=str(tmp_path / "gone.mp4"))
  loader = _loader(mixed, max_skip_fraction=0.2)
  for _ in range(5):
    batch = next(loader)
    assert len(batch.samples) == 4
    assert not {3, 7} & set(batch.sample_index.tolist())
  assert loader.skipped_total == 2 and str(bad) in loader.skipped
  resumed = _loader(mixed, max_skip_fraction=0.2)
  resumed.set_state(json.loads(json.dumps(loader.get_state())))
  assert resumed.skipped == loader.skipped
  assert _equal(next(resumed), next(loader))

  loader = _loader(mixed, max_skip_fraction=0.1)
  with pytest.raises(ValueError, match="max_skip_fraction.*gone.mp4"):
    for _ in range(5):
      next(loader)


@pytest.fixture(scope="module")
def mixed(samples, tmp_path_factory):
  """A video, a picture, another video and a picture that was cut short."""
  folder = tmp_path_factory.mktemp("pictures")
  pixels = np.random.default_rng(0).integers(0, 256, (28, 56, 3), np.uint8)
  for name in ("whole.png", "cut.jpg"):
    Image.fromarray(pixels).save(folder / name)
  content = (folder / "cut.jpg").read_bytes()
  (folder / "cut.jpg").write_bytes(content[:-300])
  rows = [
    samples[0],
    samples[1]._replace(video=str(folder / "whole.png")),
    samples[2],
    samples[3]._replace(video=str(folder / "cut.jpg")),
  ]
  return pixels, rows


def test_pictures_and_videos_in_one_batch(mixed):
  pixels, rows = mixed
  loader = _loader(rows, shuffle=False, batch_size=3, max_skip_fraction=0.25)
  batch = next(loader)
  assert batch.sample_index.tolist() == [0, 1, 2]
  assert batch.scan_mask.sum(axis=1).tolist() == [8, 1, 8]
  assert not batch.scan_time_s[1].any() and not batch.frame_index[1].any()
  assert not batch.scan[1, 1:].any()
  next(loader)  # past the picture that cannot be read
  assert list(loader.skipped) == [rows[3].video]
  assert "not a whole picture" in loader.skipped[rows[3].video]
  kept, skipped = pipeline.readable(rows, max_skip_fraction=0.25)
  assert kept == rows[:3] and skipped == loader.skipped
  assert _equal(pipeline.collate(kept, np.arange(3), **SCAN), batch)
  again, lost = pipeline.collate_readable(
    rows[1:], np.arange(1, 4), batch_size=3, **SCAN
  )
  assert again.samples == [rows[1], rows[2], rows[2]] and lost == skipped
  np.testing.assert_array_equal(again.scan[0], batch.scan[1])


def test_the_reader_reads_pictures(mixed):
  pixels, rows = mixed
  reader = pipeline.FrameReader((28, 56), cache_mib=1, num_threads=2)
  frames = reader.read(rows[:2], np.array([[3, 5], [0, 0]]))
  np.testing.assert_array_equal(frames[1], [pixels] * 2)
  assert np.any(frames[0, 0] != frames[0, 1])


def test_sizes_that_cannot_work(samples):
  with pytest.raises(ValueError, match="batch_size is 11"):
    _loader(samples, batch_size=11)
  with pytest.raises(ValueError, match="at least one sample a host"):
    _loader(samples, shard_count=11)


def test_worker_processes_give_the_same_batches(samples):
  loader = _loader(samples, num_workers=1, num_epochs=1)
  try:
    for batch, expected in zip(loader, _loader(samples)):
      if len(batch.samples) == 4:
        assert _equal(batch, expected)
  finally:
    loader.close()


def test_collate_is_what_the_loader_gives(samples):
  batch = next(_loader(samples, shuffle=False))
  assert _equal(pipeline.collate(samples[:4], np.arange(4), **SCAN), batch)
  with pytest.raises(video.VideoError, match="no such file"):
    pipeline.collate(
      [records.Sample("a", "/no/such.mp4", "?", (), "")], [0], **SCAN
    )


@pytest.mark.parametrize("resize", ["area", "bicubic"])
def test_reader_reads_and_remembers(samples, monkeypatch, resize):
  reader = pipeline.FrameReader(
    (28, 56), resize=resize, cache_mib=1, num_threads=2
  )
  index = np.array([[5, 90, 5], [0, 1, 2]])
  frames = reader.read(samples[:2], index)
  assert frames.shape == (2, 3, 28, 56, 3) and reader.size_px == (28, 56)
  for row in range(2):
    expected, _ = video.read_frames(
      samples[row].video, index[row], (28, 56), resize=resize
    )
    np.testing.assert_array_equal(frames[row], expected)

  def refuse(*args, **kwargs):
    raise AssertionError("decoded again")

  monkeypatch.setattr(video, "read_frames", refuse)
  np.testing.assert_array_equal(reader.read(samples[:2], index), frames)


def test_reader_memory_is_bounded(samples):
  reader = pipeline.FrameReader((128, 128), cache_mib=1, num_threads=2)
  for start in range(0, 96, 12):
    reader.read(samples[:2], np.tile(np.arange(start, start + 12), (2, 1)))
  kept = reader._cache.values()
  assert sum(frame.nbytes for frame in kept) <= 2**20
  assert all(frame.base is None for frame in kept)


def test_reader_refuses_other_shapes(samples):
  reader = pipeline.FrameReader((28, 28), cache_mib=1, num_threads=1)
  with pytest.raises(ValueError, match="index must be int"):
    reader.read(samples[:2], np.zeros((3, 2), int))


def _order(samples, count, **settings):
  """Numbers that a loader takes, without scanning anything."""
  order = pipeline._in_order(
    samples, **dict(seed=0, shuffle=True, num_epochs=None, mix="") | settings
  )
  return [int(order[n]) for n in range(count)]


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 7, 10])
@pytest.mark.parametrize("shuffle", [True, False])
def test_hosts_share_every_epoch(samples, monkeypatch, hosts, shuffle):
  """Without overlap and without loss, whether or not they divide it."""
  monkeypatch.setattr(
    pipeline._Scanner, "__call__", lambda scanner, number: (int(number), None)
  )
  monkeypatch.setattr(
    pipeline, "_stack", lambda samples, index, scans: list(index)
  )
  rounds, taken = 3 * 10 // hosts + 1, []
  for host in range(hosts):
    loader = _loader(
      samples,
      batch_size=1,
      shard_index=host,
      shard_count=hosts,
      shuffle=shuffle,
      seed=3,
    )
    taken.append([next(loader)[0] for _ in range(rounds)])
  # Round by round, the hosts stand side by side in one order.
  whole = [number for step in zip(*taken, strict=True) for number in step]
  epochs = [whole[start : start + 10] for start in (0, 10, 20)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert whole == _order(samples, len(whole), seed=3, shuffle=shuffle)
  assert (epochs[0] == epochs[1]) != shuffle
  ended = [
    len(
      list(
        _loader(
          samples,
          batch_size=1,
          shard_index=host,
          shard_count=hosts,
          num_epochs=1,
        )
      )
    )
    for host in range(hosts)
  ]
  assert sum(ended) == 10 and max(ended) - min(ended) <= 1


def test_sources_are_mixed_by_their_weights(samples):
  """Three to one, of six samples and of four: not what an epoch would give."""
  rows = [
    row._replace(source="few" if n < 4 else "many")
    for n, row in enumerate(samples)
  ]
  order = _order(rows, 160, mix="few=3,many=1")
  share = np.cumsum(np.array(order) < 4) / np.arange(1, 161)
  assert share[-1] == pytest.approx(0.75, abs=0.01)
  assert np.abs(share[40:] - 0.75).max() < 0.03  # all the way
  few = [number for number in order if number < 4]
  for start in range(0, 112, 4):  # each source in epochs of its own
    assert sorted(few[start : start + 4]) == [0, 1, 2, 3]
  assert few[:4] != few[4:8] or few[4:8] != few[8:12]
  loader = _loader(rows, mix="few=3,many=1")
  assert next(loader).sample_index.tolist() == order[:4]
  with pytest.raises(ValueError, match="other samples"):
    _loader(rows).set_state(loader.get_state())


@pytest.mark.parametrize(
  ("mix", "message"),
  [
    ("few=3", r"the sources \['few', 'many'\].*data\.loader\.mix"),
    ("few=3,many=1,none=1", r"gives weights to .*'none'"),
    ("few=3,many=0", "positive weight"),
    ("few=3,many", "positive weight"),
    ("few=3,few=1", "every source once"),
    ("few=nan,many=1", "positive weight"),
  ],
)
def test_a_mix_that_does_not_fit(samples, mix, message):
  rows = [
    row._replace(source="few" if n < 4 else "many")
    for n, row in enumerate(samples)
  ]
  with pytest.raises(ValueError, match=message):
    _loader(rows, mix=mix)


@pytest.mark.parametrize(
  "settings", [{}, dict(shard_index=1, shard_count=2), dict(mix="a=2,b=1")]
)
def test_resuming_after_any_batch_is_the_straight_run(
  samples, tmp_path, settings
):
  rows = [
    row._replace(source="a" if n < 5 else "b") for n, row in enumerate(samples)
  ]
  rows[2] = rows[2]._replace(video=str(tmp_path / "gone.mp4"))
  how = dict(batch_size=3, max_skip_fraction=0.5, **settings)
  loader, states, straight = _loader(rows, **how), [], []
  for _ in range(7):
    states.append(json.loads(json.dumps(loader.get_state())))
    straight.append(next(loader))
  for start, state in enumerate(states):
    resumed = _loader(rows, **how)
    resumed.set_state({"hosts": [state] * settings.get("shard_count", 1)})
    for batch in straight[start : start + 2]:
      assert _equal(next(resumed), batch)
  assert list(loader.skipped) == [rows[2].video] and loader.skipped_total == 1


def test_a_video_that_scans_and_does_not_read(samples):
  """It is replaced, counted once, and not met again."""
  loader = _loader(samples, max_skip_fraction=0.2)
  straight = _loader(samples)
  batch, expected = next(loader), [next(straight) for _ in range(6)]
  bad = batch.samples[1].video
  order = np.concatenate([b.sample_index for b in expected]).tolist()
  number = order[1]
  left = [n for n in order if n != number]
  found = loader.without(batch, bad, f"{bad}: frame 3 cannot be decoded")
  assert found.sample_index.tolist() == left[:4]
  same = batch.scan[[0, 2, 3]]
  np.testing.assert_array_equal(found.scan[:3], same)
  assert next(loader).sample_index.tolist() == left[4:8]
  assert next(loader).sample_index.tolist() == left[8:12]
  assert loader.skipped == {bad: f"{bad}: frame 3 cannot be decoded"}
  few = _loader(samples, max_skip_fraction=0.05)
  with pytest.raises(
    ValueError, match="1 of 10 videos cannot be read, at most"
  ):
    few.without(next(few), bad, "reason")


def test_skipped_videos_are_counted_of_what_was_met(samples, tmp_path):
  """A host of two meets half of the bad videos in the first epoch."""
  rows = list(samples)
  for n in (1, 4, 6, 8):
    rows[n] = rows[n]._replace(video=str(tmp_path / f"{n}.mp4"))
  how = dict(batch_size=1, shard_count=2, seed=2)
  for host in range(2):
    loader = _loader(rows, shard_index=host, max_skip_fraction=0.8, **how)
    for _ in range(30):
      next(loader)
    assert loader.skipped_total == 4
    with pytest.raises(ValueError, match=r"may be skipped \(data\.max_skip"):
      loader = _loader(rows, shard_index=host, max_skip_fraction=0.3, **how)
      for _ in range(30):
        next(loader)


def test_nothing_readable_is_an_end(samples, tmp_path):
  rows = [row._replace(video=str(tmp_path / row.id)) for row in samples]
  with pytest.raises(ValueError, match="10 of 10 videos cannot be read"):
    next(_loader(rows, max_skip_fraction=1.0))


def test_questions_about_one_video_scan_it_once(samples):
  class Counting(decoding.Decoder):
    asked = 0

    def scan_frames(self, *args):
      self.asked += 1
      return super().scan_frames(*args)

  decoder = Counting()
  rows = [samples[0], samples[0]._replace(id="b"), samples[1]]
  rows.append(samples[0]._replace(id="c", clip=(1.0, 3.0)))
  batch = pipeline.collate(rows, np.arange(4), decoder=decoder, **SCAN)
  assert decoder.asked == 3
  np.testing.assert_array_equal(batch.scan[0], batch.scan[1])
  assert batch.frame_index[3].tolist() == [9, 11, 13, 15, 17, 19, 21, 23]
  assert batch.scan_time_s[3].max() < 2.0
