"""Shot coverage and cut F1 on cases worked by hand, and against a search."""

import itertools

import numpy as np
import pytest

from cf_jax.evals import keyframes


def test_shots_meet_half_way_through_a_transition():
  # Hard cut at 10; a dissolve whose frames 20 to 27 are mixed.
  cuts = [(10, 10), (20, 28)]
  assert keyframes.shot_bounds(cuts, 40) == [(0, 10), (10, 24), (24, 40)]
  assert keyframes.shot_bounds([], 5) == [(0, 5)]
  dirty = np.flatnonzero(~keyframes.clean_frames(cuts, 40))
  assert dirty.tolist() == list(range(20, 28))


@pytest.mark.parametrize(
  ("index", "seen", "seen_clean"),
  [
    ([0, 9], [1, 0, 0], [1, 0, 0]),  # twice in one shot
    ([10], [0, 1, 0], [0, 1, 0]),  # the cut belongs to the new shot
    ([39, 5], [1, 0, 1], [1, 0, 1]),  # in any order
    ([23, 24], [0, 1, 1], [0, 0, 0]),  # both in the dissolve
    ([19, 28], [0, 1, 1], [0, 1, 1]),  # just outside it
    ([], [0, 0, 0], [0, 0, 0]),
  ],
)
def test_shots_seen(index, seen, seen_clean):
  cuts = [(10, 10), (20, 28)]
  found = keyframes.shots_seen(index, cuts, 40)
  assert found.tolist() == list(map(bool, seen))
  clean = keyframes.clean_frames(cuts, 40)
  found = keyframes.shots_seen(index, cuts, 40, clean)
  assert found.tolist() == list(map(bool, seen_clean))


@pytest.mark.parametrize(
  ("found", "cuts", "right"),
  [
    ([12, 27], [(10, 10), (30, 30)], 1),  # 2 away counts, 3 does not
    ([9, 10, 11], [(10, 10)], 1),  # one cut is found once
    ([11], [(10, 10), (12, 12)], 1),  # one apex finds one cut
    ([11, 12], [(10, 10), (12, 12)], 2),
    ([12, 8], [(10, 10), (11, 11)], 2),  # the nearest first would lose one
    ([17, 32], [(19, 30)], 1),  # both ends of a dissolve: it is one cut
    ([16, 33], [(19, 30)], 0),
    ([], [(10, 10)], 0),
    ([3], [], 0),
  ],
)
def test_match_cuts(found, cuts, right):
  assert keyframes.match_cuts(found, cuts) == (right, len(found), len(cuts))


def test_scores_by_hand():
  found = keyframes.Found(right=3, found=4, true=6)
  assert found.precision == 3 / 4 and found.recall == 1 / 2
  assert found.f1 == pytest.approx(0.6)  # 2 * 0.75 * 0.5 / 1.25
  nothing = keyframes.match_cuts([], [])
  assert (nothing.precision, nothing.recall, nothing.f1) == (1, 1, 1)
  assert keyframes.match_cuts([5], []).f1 == 0
  pooled = keyframes.pool([found, keyframes.Found(1, 1, 2)])
  assert pooled == (4, 5, 8)


def test_matching_is_the_largest_there_is():
  rng = np.random.default_rng(0)
  for _ in range(150):
    edges = np.sort(rng.choice(np.arange(1, 24), 4, replace=False))
    pairs = [(int(edges[0]),) * 2, tuple(edges[1:3].tolist())]
    pairs.append((int(edges[3]),) * 2)
    found = rng.choice(28, rng.integers(0, 5), replace=False).tolist()
    tolerance = int(rng.integers(0, 4))

    def fits(frame, pair, tolerance=tolerance):
      return pair[0] - tolerance <= frame <= pair[1] + tolerance

    padded = [*found, *[-99] * 3]
    best = max(
      sum(map(fits, chosen, pairs))
      for chosen in itertools.permutations(padded, 3)
    )
    assert keyframes.match_cuts(found, pairs, tolerance).right == best


@pytest.mark.parametrize(
  ("cuts", "says"),
  [
    ([(10, 8)], "do not overlap"),
    ([(10, 14), (12, 20)], "do not overlap"),
    ([(10, 10), (10, 10)], "do not overlap"),
    ([(0, 0)], "before and after"),
    ([(40, 40)], "before and after"),
  ],
)
def test_impossible_transitions_are_an_error(cuts, says):
  with pytest.raises(ValueError, match=says):
    keyframes.shot_bounds(cuts, 40)


def test_a_frame_outside_the_video_is_an_error():
  with pytest.raises(ValueError, match="from 0 to 39"):
    keyframes.shots_seen([40], [(10, 10)], 40)


def test_evidence_hits():
  """Ends count; two keyframes in one interval are one hit; NaN is none."""
  evidence = [((1.0, 2.0), (4.0, 4.5)), (), ((0.0, 9.0),)]
  time_s = np.array([[1.0, 1.5, 4.6], [1.0, 2.0, 3.0], [np.nan] * 3])
  hits, count = keyframes.evidence_hits(evidence, time_s)
  assert hits.tolist() == [1, 0, 0] and count.tolist() == [2, 0, 1]
