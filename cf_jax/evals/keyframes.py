"""How well chosen frames show the shots of a video, and apexes find its cuts.

A transition is a pair (start, end): the frames `start` to `end - 1` are mixed
of both shots, and `end` is the first that shows the new one alone. A hard cut
at frame c, the first of the new shot, is (c, c). A video with N transitions has
N + 1 shots, which meet half-way through the transitions.

Axes: `N` transitions, ascending; `K` keyframes; `T` frames.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Found(NamedTuple):
  """Cuts that were found, counted one to one; add two to pool videos.

  Attributes:
    right: found cuts that are true ones.
    found: all found cuts.
    true: all true cuts.
  """

  right: int
  found: int
  true: int

  @property
  def precision(self) -> float:
    """Share of the found cuts that are right; 1 where none was found."""
    return self.right / self.found if self.found else 1.0

  @property
  def recall(self) -> float:
    """Share of the true cuts that were found; 1 where there is none."""
    return self.right / self.true if self.true else 1.0

  @property
  def f1(self) -> float:
    """Harmonic mean of both; 1 where nothing was to find, and nothing was."""
    total = self.found + self.true
    return 2 * self.right / total if total else 1.0


def pool(parts: Sequence[Found]) -> Found:
  """Counts of several videos together."""
  return Found(*(sum(part[n] for part in parts) for n in range(3)))


def _transitions(
  cuts: Sequence[tuple[int, int]], num_frames: int | None = None
) -> np.ndarray:
  """int[N, 2], checked."""
  pairs = np.asarray(cuts, int).reshape((-1, 2))
  flat = pairs.reshape(-1)
  if np.any(np.diff(flat) < 0) or np.any(np.diff(pairs[:, 0]) < 1):
    raise ValueError(
      f"transitions {pairs.tolist()}: expected (start, end) pairs in order of"
      " time that do not overlap"
    )
  if flat.size and (
    flat[0] < 1 or (num_frames is not None and flat[-1] >= num_frames)
  ):
    raise ValueError(
      f"transitions {pairs.tolist()} of a video of {num_frames} frames:"
      " expected every one to have a frame before and after it"
    )
  return pairs


def shot_bounds(
  cuts: Sequence[tuple[int, int]], num_frames: int
) -> list[tuple[int, int]]:
  """[start, end) of the N + 1 shots, which meet half-way through transitions.

  Raises:
    ValueError: transitions out of order or at the video's edge.
  """
  middle = _transitions(cuts, num_frames).sum(axis=1) // 2
  edges = [0, *middle.tolist(), num_frames]
  return list(zip(edges[:-1], edges[1:]))


def clean_frames(
  cuts: Sequence[tuple[int, int]], num_frames: int
) -> np.ndarray:
  """bool[T] frames that no transition mixes."""
  clean = np.ones(num_frames, bool)
  for start, end in _transitions(cuts, num_frames):
    clean[start:end] = False
  return clean


def shots_seen(
  index: Sequence[int],
  cuts: Sequence[tuple[int, int]],
  num_frames: int,
  clean: np.ndarray | None = None,
) -> np.ndarray:
  """bool[N + 1] which shots have at least one of the frames.

  Args:
    index: int[K] frame numbers in any order.
    cuts: transitions.
    num_frames: T.
    clean: bool[T] frames that count; None counts all.

  Raises:
    ValueError: a frame number outside the video, or bad transitions.
  """
  index = np.asarray(index, int)
  if index.size and (index.min() < 0 or index.max() >= num_frames):
    raise ValueError(
      f"frames {index.tolist()} of a video of {num_frames}: expected numbers"
      f" from 0 to {num_frames - 1}"
    )
  if clean is not None:
    index = index[np.asarray(clean)[index]]
  starts = [start for start, _ in shot_bounds(cuts, num_frames)]
  seen = np.zeros(len(starts), bool)
  seen[np.searchsorted(starts, index, side="right") - 1] = True
  return seen


def match_cuts(
  found: Sequence[int],
  cuts: Sequence[tuple[int, int]],
  tolerance: int = 2,
) -> Found:
  """Matches found cuts with true ones, each at most once, as many as possible.

  A found cut is right within `tolerance` frames of a transition: from
  `start - tolerance` to `end + tolerance`.

  Args:
    found: first frames of what is held for new shots, in any order.
    cuts: the true transitions.
    tolerance: in frames.
  """
  pairs = _transitions(cuts)
  left = sorted(int(frame) for frame in found)
  right = 0
  # Windows are ordered at both ends, so the earliest frame that fits is the
  # one that later windows can best do without.
  for start, end in pairs:
    while left and left[0] < start - tolerance:
      left.pop(0)
    if left and left[0] <= end + tolerance:
      left.pop(0)
      right += 1
  return Found(right, len(found), len(pairs))


def evidence_hits(
  evidence: Sequence[Sequence[tuple[float, float]]], time_s: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """How many annotated intervals of each question got a keyframe.

  Args:
    evidence: of R questions: (start, end) seconds of what the answer rests on.
    time_s: float[R, K] seconds of the keyframes, NaN where there is none.

  Returns:
    int[R] intervals with a keyframe inside, int[R] intervals.
  """
  hits = [
    sum(
      bool(np.any((seconds >= start) & (seconds <= end)))
      for start, end in intervals
    )
    for intervals, seconds in zip(evidence, time_s, strict=True)
  ]
  return np.array(hits), np.array([len(intervals) for intervals in evidence])
