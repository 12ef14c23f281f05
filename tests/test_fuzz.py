"""benchmarks/fuzz.py with few examples: every door stands."""

import json
import re

import pytest

from benchmarks import fuzz
from cf_jax.data import answers, records

EXAMPLES = {
  "manifest": 200,
  "annotations": 150,
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
  if name in ("manifest", "annotations"):  # most of a door lies behind it
    assert count["refused"] < 0.9 * count["tried"]


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-1" + "0" * 400, "1e400"])
def test_a_number_that_no_float_holds_is_said(number, tmp_path):
  """In every field of a manifest that holds one."""
  path, tried = tmp_path / "a.jsonl", 0
  for line in fuzz.LINES.values():
    text = json.dumps(line)
    for match in re.finditer(r"(?<![\w.\"])\d+(\.\d+)?(?![\w.\"])", text):
      path.write_text(text[: match.start()] + number + text[match.end() :])
      tried += 1
      try:
        samples = records.load_jsonl(path)
        answers.check_sample(samples[0])
      except ValueError as error:
        assert str(path) in str(error) or "sample 'line-1'" in str(error)
      else:
        pytest.fail(f"taken: {path.read_text()[:300]}")
  assert tried > 20


def test_half_a_character_is_said(tmp_path):
  path = tmp_path / "a.jsonl"
  line = fuzz.LINES["numerical"] | {"question": "Why \ud83d?"}
  path.write_text(json.dumps(line))
  with pytest.raises(ValueError, match="a.jsonl:1: .*half a character"):
    records.load_jsonl(path)
  path.write_text(json.dumps(line | {"question": "Why \U0001f600?"}))
  assert records.load_jsonl(path)[0].question == "Why \U0001f600?"
