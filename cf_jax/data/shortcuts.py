"""Small probes that look for shortcuts in the built-in video questions.

Each is a ridge classifier (or a table of counts) trained on one half of the
videos and judged on the other. On an honest set none beats chance: nothing in a
picture tells when it was shown, and neither the question nor the times of what
happens tell the answer. Of questions without options, chance is what the same
probe reaches with what it sees of other videos (and `chance.py` says what the
best constant answer does).

Axes: `n` videos, `T` frames, `F` features; pixels are [..., height, width, 3].
"""

import collections
import itertools
import pathlib
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from cf_jax.data import chance, records, synthetic, synthetic_tasks
from cf_jax.data.synthetic_video import Spec

_PAIRS = 24  # pairs of frames drawn in each video
_RIDGE = 0.3  # penalty, as a share of the number of rows
_FEWEST = 16  # videos of a probe
_SHUFFLES = 8  # of what an open probe sees, to find its chance
# Kinds whose answers are times or all over the video: what happens when is no
# clue but the answer.
_TIMED = ("interval", "regression", "tracking")


class Probe(NamedTuple):
  """One probe on held-out videos.

  Attributes:
    accuracy: share of right predictions; of open questions the mean score.
    chance: what guessing reaches.
    half_interval: half the interval that holds for all probes of a call at
      once in 95 % of cases (Bonferroni), videos being the independent units.
  """

  accuracy: float
  chance: float
  half_interval: float


def specs_of(samples: Sequence[records.Sample]) -> list[Spec]:
  """The specifications of samples from `synthetic.load`."""
  found = {}
  for sample in samples:
    root, split = (
      pathlib.Path(sample.video).parents[2],
      sample.id.split("-")[0],
    )
    if (root, split) not in found:
      found[root, split] = {
        spec.id: spec for spec in synthetic.load_specs(root, split)
      }
  return [
    found[pathlib.Path(sample.video).parents[2], sample.id.split("-")[0]][
      sample.id
    ]
    for sample in samples
  ]


def shortcut_probes(
  specs: Sequence[Spec],
  frames: np.ndarray,
  rng: np.random.Generator,
) -> dict[str, Probe]:
  """Tries every shortcut we can think of.

  Args:
    specs: n videos, at least 16 of each of their tasks.
    frames: uint8[n, T, h, w, 3] their decoded frames (all of them, h and w at
      least 16).
    rng: numpy generator.

  Returns:
    Name of the shortcut -> Probe.

  Raises:
    ValueError: too few videos for a probe.
  """
  few = {
    task: count
    for task, count in collections.Counter(s.task for s in specs).items()
    if count < _FEWEST
  }
  if few:
    raise ValueError(
      f"got {few} videos, expected at least {_FEWEST} of a task; raise"
      " report.probe_videos or data.synthetic.num_test"
    )
  order = rng.permutation(len(specs))
  specs = [specs[n] for n in order]
  feature = np.stack([frame_features(frames[n]) for n in order])
  train = np.arange(len(specs)) < len(specs) // 2
  found = {"which of two frames came first": _frame_order(feature, train, rng)}
  if any(len(spec.events) > 1 for spec in specs):
    found["which of two events came first"] = _event_order(
      specs, feature, train, rng
    )
  found["a frame's half of the video"] = _position(feature, train, rng)
  for task in dict.fromkeys(spec.task for spec in specs):
    rows = [n for n, spec in enumerate(specs) if spec.task == task]
    # A frame inside an event is no shortcut but a part of the evidence.
    middle = [n for n in rows if not _shows_event(specs[n])]
    middle = middle if len(middle) >= _FEWEST else []
    some, dull = [specs[n] for n in rows], [specs[n] for n in middle]
    if some[0].options:
      half = _halves(some)
      found[f"{task}: letter alone"] = _letter(some, half)
      found[f"{task}: question and options"] = _content(some, half)
      found[f"{task}: times alone"] = _times(some, half)
      if dull:
        found[f"{task}: one middle frame"] = _one_frame(
          dull, feature[middle], _halves(dull)
        )
      continue
    if len({spec.question for spec in some}) > 1:
      found[f"{task}: question"] = _open(some, _questions(some), rng)
    if synthetic_tasks.TASKS[task].kind not in _TIMED:
      found[f"{task}: times alone"] = _open(some, _event_times(some), rng)
    if dull:
      found[f"{task}: one middle frame"] = _open(
        dull, _vivid(feature[middle]), rng
      )
  # Many probes: at 95 % each, one of them would often stray by luck.
  z = statistics.NormalDist().inv_cdf(1 - 0.05 / (2 * len(found)))
  return {
    name: probe._replace(half_interval=z * probe.half_interval)
    for name, probe in found.items()
  }


def frame_features(frames: np.ndarray) -> np.ndarray:
  """float32[t, F] of uint8[t, h, w, 3]: local colours, light, grain, blocks."""
  count = len(frames)
  cells = np.stack(
    [
      cv2.resize(frame, (8, 8), interpolation=cv2.INTER_AREA)
      for frame in frames
    ]
  ).reshape(count, -1)
  light = np.stack(
    [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
  ).astype(np.float32)
  mean_std = np.stack([np.ravel(cv2.meanStdDev(frame)) for frame in frames])
  rows = abs(np.diff(light, axis=1))
  columns = abs(np.diff(light, axis=2))
  ranked = np.sort(light[:, ::4, ::4].reshape(count, -1), axis=1)
  summary = np.stack(
    [
      *mean_std.T,
      *ranked[:, [0, ranked.shape[1] // 8, ranked.shape[1] // 2, -1]].T,
      rows.mean(axis=(1, 2)),
      columns.mean(axis=(1, 2)),
      (rows**2).mean(axis=(1, 2)),
      (columns**2).mean(axis=(1, 2)),
      rows[:, 7::8].mean(axis=(1, 2)),  # at the borders of the codec's blocks
      columns[:, :, 7::8].mean(axis=(1, 2)),
    ],
    axis=1,
  )
  return np.concatenate(
    [cells, summary, np.log1p(summary), summary**2], axis=1
  ).astype(np.float32)


def _ridge(
  feature: np.ndarray, target: np.ndarray, train: np.ndarray
) -> np.ndarray:
  """Ridge regression, float64[rows, outputs], fitted on the `train` rows."""
  mean, std = feature[train].mean(axis=0), feature[train].std(axis=0)
  x = ((feature - mean) / np.maximum(std, 1e-6)).astype(np.float64)
  bias = target[train].mean(axis=0)
  known = x[train]
  penalty = _RIDGE * len(known) * np.eye(x.shape[1])
  weight = np.linalg.solve(
    known.T @ known + penalty, known.T @ (target[train] - bias)
  )
  return x @ weight + bias


def _score(right: np.ndarray, video: np.ndarray, chance: float) -> Probe:
  """Accuracy over videos, and its standard error in place of the interval."""
  each = np.array([right[video == v].mean() for v in np.unique(video)])
  if len(each) == len(right):  # one guess a video: the spread of guessing
    spread = (chance * (1 - chance)) ** 0.5
  else:
    spread = each.std(ddof=1)
  return Probe(float(each.mean()), chance, float(spread / len(each) ** 0.5))


def _frame_order(feature, train, rng) -> Probe:
  count, length = feature.shape[:2]
  video = np.repeat(np.arange(count), _PAIRS)
  pair = np.stack([rng.permutation(length)[:2] for _ in range(len(video))])
  x = feature[video, pair[:, 0]] - feature[video, pair[:, 1]]
  first = np.where(pair[:, 0] < pair[:, 1], 1.0, -1.0)
  known = train[video]
  right = _ridge(x, first[:, None], known)[:, 0] * first > 0
  return _score(right[~known], video[~known], 0.5)


def _event_order(specs, feature, train, rng) -> Probe:
  video, pair = [], []
  for n, spec in enumerate(specs):
    middle = [(event.start + event.stop) // 2 for event in spec.events]
    for two in itertools.combinations(middle, 2):
      video.append(n)
      pair.append(rng.permutation(two))
  video, pair = np.array(video), np.array(pair)
  x = feature[video, pair[:, 0]] - feature[video, pair[:, 1]]
  first = np.where(pair[:, 0] < pair[:, 1], 1.0, -1.0)
  known = train[video]
  right = _ridge(x, first[:, None], known)[:, 0] * first > 0
  return _score(right[~known], video[~known], 0.5)


def _position(feature, train, rng) -> Probe:
  count, length = feature.shape[:2]
  video = np.repeat(np.arange(count), _PAIRS)
  frame = rng.integers(0, length // 2 * 2, len(video))
  late = np.where(frame < length // 2, -1.0, 1.0)
  known = train[video]
  guess = _ridge(feature[video, frame], late[:, None], known)[:, 0]
  return _score((guess * late > 0)[~known], video[~known], 0.5)


def _answers(specs) -> tuple[np.ndarray, int]:
  answer = np.array([synthetic_tasks.LETTERS.index(s.answer) for s in specs])
  return answer, len(specs[0].options)


def _halves(specs) -> np.ndarray:
  """bool[n]: training rows, every answer evenly on both sides.

  The whole set is balanced, so in halves drawn at random what is common in one
  would be rare in the other, and a probe would fall below chance.
  """
  answer, _ = _answers(specs)
  right = [spec.options[n] for spec, n in zip(specs, answer)]
  train = np.zeros(len(specs), dtype=bool)
  train[np.lexsort((answer, right))[::2]] = True
  return train


def _letter(specs, train) -> Probe:
  answer, options = _answers(specs)
  common = np.bincount(answer[train], minlength=options).argmax()
  rows = np.flatnonzero(~train)
  return _score(answer[rows] == common, rows, 1 / options)


def _content(specs, train) -> Probe:
  """Chooses the option that was right most often among its appearances."""
  answer, options = _answers(specs)
  right, seen = collections.Counter(), collections.Counter()
  for n in np.flatnonzero(train):
    for m, option in enumerate(specs[n].options):
      seen[specs[n].question, option] += 1
      right[specs[n].question, option] += int(answer[n] == m)
  rows = np.flatnonzero(~train)

  def rate(spec, option):
    key = spec.question, option
    return (right[key] + 1) / (seen[key] + options)

  guess = np.array(
    [
      np.argmax([rate(specs[n], option) for option in specs[n].options])
      for n in rows
    ]
  )
  return _score(guess == answer[rows], rows, 1 / options)


def _times(specs, train) -> Probe:
  """From the times and lengths of events, cuts and flickers."""
  answer, options = _answers(specs)
  x = _event_times(specs)
  guess = _ridge(x, np.eye(options)[answer], train).argmax(axis=1)
  rows = np.flatnonzero(~train)
  return _score(guess[rows] == answer[rows], rows, 1 / options)


def _one_frame(specs, feature, train) -> Probe:
  """From the middle frame, with what each letter stands for."""
  answer, options = _answers(specs)
  names = sorted({option for spec in specs for option in spec.options})
  vivid = _vivid(feature)
  letters = np.array(
    [[names.index(option) for option in spec.options] for spec in specs]
  )
  x = np.einsum("nf,nlo->nlfo", vivid, np.eye(len(names))[letters])
  guess = _ridge(
    x.reshape(len(specs), -1), np.eye(options)[answer], train
  ).argmax(axis=1)
  rows = np.flatnonzero(~train)
  return _score(guess[rows] == answer[rows], rows, 1 / options)


def _shows_event(spec: Spec) -> bool:
  """Whether something happens in the middle frame."""
  middle = spec.num_frames // 2
  return any(event.start <= middle < event.stop for event in spec.events)


def _event_times(specs) -> np.ndarray:
  """float32[n, times] of what happens."""
  return np.array(
    [
      [
        *itertools.chain.from_iterable((e.start, e.stop) for e in s.events),
        *(e.stop - e.start for e in s.events),
        len(s.cuts),
        s.cuts[0],
        s.cuts[-1],
        len(s.flickers),
        *(s.flickers[:1] or (0,)),
      ]
      for s in specs
    ],
    np.float32,
  )


def _vivid(feature: np.ndarray) -> np.ndarray:
  """float[n, 3]: the most saturated cell of the middle frame.

  It has the colour of an event, if there is one.
  """
  middle = feature[:, feature.shape[1] // 2]
  cells = middle[:, :192].reshape(len(middle), 64, 3)
  return cells[np.arange(len(cells)), np.ptp(cells, axis=2).argmax(axis=1)]


def _questions(specs) -> np.ndarray:
  """float[n, questions]: which question is asked."""
  texts = sorted({spec.question for spec in specs})
  return np.eye(len(texts))[[texts.index(spec.question) for spec in specs]]


def _open(specs, x: np.ndarray, rng: np.random.Generator) -> Probe:
  """From `x`, the constant answer that pays best, of those `chance` tries."""
  table = chance.score_table(
    [synthetic_tasks.to_sample(spec, "") for spec in specs]
  )
  # What is balanced is so in both halves (as in `_halves`): answers, or which
  # of the events a question about times asks for.
  timed = synthetic_tasks.TASKS[specs[0].task].kind in _TIMED
  factor = [str(spec.relevant) if timed else spec.answer for spec in specs]
  question = [spec.question for spec in specs]
  train = np.zeros(len(specs), dtype=bool)
  order = np.lexsort((rng.random(len(specs)), factor, question))
  train[order[::2]] = True

  def earned(x):
    guess = _ridge(x, table.T, train).argmax(axis=1)
    return table[guess, np.arange(len(specs))][~train]

  found = earned(x)
  other = np.mean(
    [earned(x[rng.permutation(len(x))]).mean() for _ in range(_SHUFFLES)]
  )
  # The spread of guessing: a probe that keeps to one answer shows too little.
  spread = table[:, ~train].std() * (1 + 1 / _SHUFFLES) ** 0.5
  return Probe(
    float(found.mean()), float(other), float(spread / len(found) ** 0.5)
  )
