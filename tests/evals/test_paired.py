"""Paired intervals and Holm's correction against printed values and scipy."""

import numpy as np
import pytest
from scipy import stats

from cf_jax.evals import paired


def test_the_sleep_data():
  """Student 1908: ten patients, two drugs; mean 1.58, t = 4.0621, 9 df."""
  first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
  second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
  found = paired.paired(np.subtract(second, first))
  assert found.mean == pytest.approx(1.58)
  # The interval and the p-value that R prints for t.test(paired = TRUE).
  assert found.low == pytest.approx(0.7001142, abs=1e-6)
  assert found.high == pytest.approx(2.4598858, abs=1e-6)
  assert found.p == pytest.approx(0.002833, abs=1e-6)
  assert found.p == pytest.approx(stats.ttest_rel(second, first).pvalue)
  assert found.count == 10


def test_a_single_seed_is_no_interval():
  with pytest.raises(ValueError, match="at least 2 seeds"):
    paired.paired([0.1])


def test_differences_that_are_all_the_same():
  assert paired.paired([0.1, 0.1]).p == pytest.approx(0, abs=1e-12)
  assert paired.paired([0.0, 0.0]).p == 1.0


def test_holm_by_hand():
  """0.01 * 4, 0.02 * 3, then max(0.06, 0.03 * 2), then max(0.06, 0.04)."""
  found = paired.holm([0.03, 0.01, 0.04, 0.02])
  np.testing.assert_allclose(found, [0.06, 0.04, 0.06, 0.06])
  assert paired.holm([0.6, 0.9]) == [1.0, 1.0]
