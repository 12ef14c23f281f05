"""What a user gets wrong on the command line: one sentence, exit code 2."""

import os
import subprocess
import sys

import pytest

from cf_jax import main
from tests.conftest import ROOT

CONFIG = "--config=configs/kfgrpo_cpu.py:smoke"


def _run(*argv):
  ran = subprocess.run(
    [sys.executable, "-m", "cf_jax.main", *argv],
    cwd=ROOT,
    text=True,
    capture_output=True,
    env=os.environ,
    timeout=120,
  )
  return ran


def _sentence(*argv):
  """The one line that a wrong command line gives."""
  ran = _run(*argv)
  assert ran.returncode == 2, ran.stdout + ran.stderr
  assert "Traceback" not in ran.stderr and ran.stdout == ""
  *logged, line = ran.stderr.strip().splitlines()
  assert line.startswith("error: ")
  assert all(entry.startswith("I") for entry in logged), ran.stderr  # absl
  return line


@pytest.mark.parametrize(
  ("key", "right"),
  [
    ("rl.step", "rl.steps"),
    ("samplng.temperature", "sampling.temperature"),
    ("num_completions", "sampling.num_completions"),
    (
      "temperature",
      "judge.temperature or --config.sampling.temperature"
      " or --config.selector.temperature",
    ),
    ("data.synthetic.num_trian", "data.synthetic.num_train"),
  ],
)
def test_a_misspelt_key_suggests_the_right_one(key, right):
  argv = ["main", CONFIG, f"--config.{key}=3"]
  said = main.explain_flag_error(AttributeError("?"), argv)
  assert f"--config.{key} is not a setting of configs/kfgrpo_cpu.py" in said
  assert said.endswith(f"did you mean --config.{right}?")


def test_misspelt_key_from_the_command_line():
  said = _sentence(CONFIG, "--config.rl.step=3")
  assert "did you mean --config.rl.steps?" in said


def test_missing_config():
  assert "--config is missing" in _sentence()


def test_config_file_that_is_not_there():
  said = _sentence("--config=configs/nothing.py", "--config.seed=1")
  assert "configs/nothing.py" in said


def test_config_file_that_is_not_there_and_no_override():
  assert "no file 'nothing.py'" in _sentence("--config", "nothing.py")


def test_unknown_config_argument():
  said = _sentence("--config=configs/kfgrpo_cpu.py:smoek")
  assert "'smoek'" in said


def test_value_of_the_wrong_type():
  said = _sentence(CONFIG, "--config.seed=zero")
  assert "seed" in said and "zero" in said


def test_unknown_flag():
  assert "wrokdir" in _sentence(CONFIG, "--wrokdir=x")


def test_stray_argument():
  assert "['sft']" in _sentence(CONFIG, "sft")


def test_unknown_program():
  said = _sentence(CONFIG, "--config.program=tarin")
  assert "config.program must be one of" in said and "'tarin'" in said


def test_a_secret_in_a_setting_is_written_nowhere(tmp_path):
  workdir = f"--workdir={tmp_path / 'run'}"
  secret = "http://me:sk-very-secret@host/v1"  # pragma: allowlist secret
  said = _sentence(CONFIG, workdir, f"--config.judge.url={secret}")
  assert "config.judge.url holds a user" in said and "sk-" not in said
  assert not (tmp_path / "run").exists()


def test_missing_tokenizer(tmp_path):
  """Found before any video is generated."""
  said = _sentence(
    CONFIG,
    f"--workdir={tmp_path}",
    "--config.tokenizer=no/such/folder",
    f"--config.data.cache_dir={tmp_path / 'data'}",
  )
  assert not (tmp_path / "data").exists()
  assert "no/such/folder'; expected a folder that has one" in said
  assert "no tokenizer.json in " in said and "config.tokenizer" in said


def test_bad_data_source(tmp_path):
  said = _sentence(
    CONFIG, f"--workdir={tmp_path}", "--config.data.source=synthetik"
  )
  assert "got 'synthetik'; change config.data.source" in said


def test_nothing_to_ask():
  said = _sentence("--config=configs/ask.py", "--config.video=clip.mp4")
  assert "set --config.checkpoint= to a Qwen2.5-VL directory" in said


def test_help_is_not_an_error():
  ran = _run("--help")
  assert "--config" in ran.stdout and "Traceback" not in ran.stderr
