"""A model small enough to run in every test, and a filled one of it."""

import numpy as np
import pytest

from tests.conftest import fill_params, make_small_model


@pytest.fixture(scope="session")
def config():
  return make_small_model()


@pytest.fixture(scope="session")
def params(config):
  return fill_params(config, np.random.default_rng(0))
