"""benchmarks/fuzz.py with few examples: every door stands."""

import pytest

from benchmarks import fuzz

EXAMPLES = {
  "manifest": 200,
  "tokenizer": 12,
  "safetensors": 25,
  "checkpoint": 60,  # the names of its files are drawn anew each time
  "override": 10,
}


@pytest.mark.parametrize("name", fuzz.DOORS)
def test_a_door_takes_or_refuses(name):
  count, error = fuzz.run(name, EXAMPLES.get(name, 40))
  if error is not None:
    raise error
  assert count["tried"] > 0
  if name != "answers":  # any text is an answer
    assert count["refused"] > 0
  if name in ("manifest", "hf_config", "checkpoint"):  # not all of it is read
    assert count["refused"] < count["tried"]
