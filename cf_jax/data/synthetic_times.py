"""When things happen in the videos of the built-in set.

Times are drawn apart from everything else, by laws that are the same backwards
in time: they tell no answer, and which of two came first shows nowhere but in
the order of the pictures.

All times are in frames.
"""

from collections.abc import Sequence

import numpy as np

BRIEF = (4, 5, 6)  # frames of a short event
_EVENT_GAP = 10  # frames from the end of an event to the start of the next
_MARGIN = 6  # frames from an event to a cut or to an end of the video
_FLICKER_GAP = 3  # frames from a flicker to anything else
CUT_GAP = 16  # frames from a cut to a cut or to an end of the video


def draw_times(
  rng: np.random.Generator, *, num_frames: int, num_events: int, num_cuts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Uniform times of events and cuts that keep their distances.

  All of them are drawn independently and uniformly and drawn again until the
  distances hold, a rule that is the same backwards in time.

  Returns:
    Start and stop frames of the events int[num_events], ascending, and cuts
    int[num_cuts], ascending.

  Raises:
    ValueError: the video is too short for its events.
  """
  tries = 512
  for _ in range(64):
    length = rng.choice(BRIEF, (tries, num_events))
    # The last start depends on the length, so that both ends are alike.
    start = _MARGIN + np.floor(
      rng.random(length.shape) * (num_frames - 2 * _MARGIN - length + 1)
    ).astype(int)
    cut = rng.integers(CUT_GAP, num_frames - CUT_GAP + 1, (tries, num_cuts))
    order = np.argsort(start, axis=1)
    start = np.take_along_axis(start, order, axis=1)
    stop = start + np.take_along_axis(length, order, axis=1)
    cut = np.sort(cut, axis=1)
    good = np.all(start[:, 1:] - stop[:, :-1] >= _EVENT_GAP, axis=1)
    good &= np.all(np.diff(cut, axis=1) >= CUT_GAP, axis=1)
    before = cut[:, :, None] <= start[:, None] - _MARGIN
    after = cut[:, :, None] >= stop[:, None] + _MARGIN
    good &= np.all(before | after, axis=(1, 2))
    if good.any():
      n = int(np.argmax(good))
      return start[n], stop[n], cut[n]
  raise _too_short(num_events, num_cuts, num_frames)


def arrange(
  rng: np.random.Generator,
  *,
  lengths: Sequence[int],
  num_cuts: int,
  num_frames: int,
  gap: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Times at which events and cuts stand apart, all such times equally likely.

  Events keep their order; the cuts lie anywhere between them. The frames that
  lengths and gaps leave over are dealt to the gaps, every way of dealing being
  equally likely.

  Args:
    rng: numpy generator.
    lengths: frames of the events, in time order.
    num_cuts: cuts, which take no frame.
    num_frames: T.
    gap: fewest frames between neighbours, and to both ends.

  Returns:
    Start and stop frames of the events, int[num_events], and cuts
    int[num_cuts], each ascending.

  Raises:
    ValueError: the video is too short for its events.
  """
  count = len(lengths) + num_cuts
  spare = num_frames - sum(lengths) - gap * (count + 1)
  if spare < 0:
    raise _too_short(len(lengths), num_cuts, num_frames)
  is_event = rng.permutation(np.arange(count) < len(lengths))
  length = np.zeros(count, int)
  length[is_event] = lengths
  # Bars between the spare frames cut them into a share for every gap.
  bar = np.sort(rng.permutation(spare + count)[:count])
  share = np.diff(bar, prepend=-1) - 1
  stop = np.cumsum(gap + share + length)
  start = stop - length
  return start[is_event], stop[is_event], start[~is_event]


def draw_flickers(
  rng: np.random.Generator,
  num_frames: int,
  *,
  start: Sequence[int],
  stop: Sequence[int],
  cut: Sequence[int],
) -> tuple[int, ...]:
  """Frames of 2 to 4 flickers, fewer where there is no room.

  They stand at least `_FLICKER_GAP` from every event, cut, end, and flicker.
  """
  free = np.ones(num_frames, dtype=bool)
  free[:_FLICKER_GAP] = free[num_frames - _FLICKER_GAP :] = False
  for first, last in [*zip(start, stop), *zip(cut, cut)]:
    free[max(first - _FLICKER_GAP, 0) : last + _FLICKER_GAP] = False
  chosen = []
  for _ in range(rng.integers(2, 5)):
    if not free.any():
      break
    frame = int(rng.choice(np.flatnonzero(free)))
    chosen.append(frame)
    free[max(frame - _FLICKER_GAP, 0) : frame + _FLICKER_GAP + 1] = False
  return tuple(sorted(chosen))


def _too_short(num_events, num_cuts, num_frames) -> ValueError:
  return ValueError(
    f"{num_events} events and {num_cuts} cuts do not fit into {num_frames}"
    " frames; raise data.synthetic.num_frames or lower num_events"
  )
