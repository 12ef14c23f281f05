"""The one command: `python -m cf_jax.main --config=configs/NAME.py`.

Flags, `jax.distributed`, and the program that the config names; everything
else is a library, so that tests and notebooks call the programs themselves.

Exit codes: 0 done, 1 something else went wrong (a traceback), 2 something that
the user can put right (one sentence; all processes of the run end so), 75
stopped on request with everything saved, 76 because another process of the run
failed or is gone, 130 interrupted.
"""

import difflib
import errno
import importlib
import os
import pathlib
import re
import runpy
import sys

from absl import app, flags, logging
from ml_collections import config_flags

PROGRAMS = (
  "train",
  "ask",
  "export",
  "export_stablehlo",
  "keyframes",
  "select_data",
  "amplify",
  "evaluate",
  "compare",
  "plan",
  "check_data",
  "score",
  "cache_frames",
)

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "The experiment: configs/NAME.py or configs/NAME.py:ARG.",
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run is kept; runs/<config.name> by default."
)


def _leaves(config, prefix="") -> list[str]:
  """Every dotted key of a config."""
  keys = []
  for name, value in config.items():
    dotted = f"{prefix}{name}"
    keys.append(dotted)
    if hasattr(value, "items"):
      keys += _leaves(value, dotted + ".")
  return keys


def _config_path(argv: list[str]) -> str | None:
  """What `--config=PATH` or `--config PATH` names, if it is there."""
  for entry, following in zip(argv, [*argv[1:], None], strict=True):
    name, equals, value = entry.partition("=")
    if name in ("--config", "-config"):
      return value if equals else following
  return None


def explain_flag_error(error: Exception, argv: list[str]) -> str | None:
  """One sentence for a misspelt `--config.x.y`, with the nearest right key.

  Args:
    error: what absl or ml_collections raised.
    argv: the command line.

  Returns:
    The sentence, or None where the error is about something else.
  """
  path = _config_path(argv)
  if path is None:
    return None
  file, colon, arg = path.partition(":")
  if not os.path.isfile(file):
    return f"--config: there is no file {file!r}"
  try:  # the flag would put a traceback into the message
    config = runpy.run_path(file)["get_config"](*([arg] if colon else []))
  except ValueError as wrong_argument:
    return str(wrong_argument)
  given = [re.match(r"--?config\.([\w.\[\]]+)", entry) for entry in argv]
  known = _leaves(config)
  for match in given:
    if match and match.group(1) not in known:
      wrong = match.group(1)
      near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
      last = [k for k in known if k.split(".")[-1] == wrong.split(".")[-1]]
      # A bare name may stand in several places.
      hints = last[:3] if "." not in wrong and last else near or last[:1]
      advice = " or ".join(f"--config.{hint}" for hint in hints)
      advice = f"; did you mean {advice}?" if hints else ""
      return f"--config.{wrong} is not a setting of {path}{advice}"
  return str(error)


def run(argv: list[str]) -> None:
  """Dispatches on `config.program`.

  Raises:
    ValueError: something that the user can put right.
  """
  if len(argv) > 1:
    raise ValueError(f"unexpected arguments {argv[1:]}")
  if _CONFIG.value is None:
    raise ValueError("--config is missing; try --config=configs/kfgrpo_cpu.py")
  config = _CONFIG.value
  workdir = pathlib.Path(_WORKDIR.value or f"runs/{config.name}")
  if config.program not in PROGRAMS:
    raise ValueError(
      f"config.program must be one of {PROGRAMS}, got {config.program!r}"
    )
  import jax  # after flags, so that a misspelt key answers at once

  from cf_jax.data import judge
  from cf_jax.runtime import lifecycle, processes

  if "judge" in config:  # before anything is written
    judge.check_no_secret(config.judge.url, config.judge.key_variable)

  if config.distributed:
    processes.start()
  if config.compilation_cache_dir:
    jax.config.update(
      "jax_compilation_cache_dir",
      os.path.abspath(os.path.expanduser(config.compilation_cache_dir)),
    )
  program = importlib.import_module(f"cf_jax.programs.{config.program}")

  try:
    program.run(config, workdir)
    processes.part()
  except lifecycle.Stopped as stopped:
    try:
      processes.part()
    except Exception as error:  # all is saved, whatever the others do
      logging.warning("another process went before it was done: %s", error)
    print(
      f"stopped: {stopped}; all is saved, the same command goes on from there",
      file=sys.stderr,
    )
    sys.exit(lifecycle.EXIT_STOPPED)
  except Exception as error:
    if processes.count() > 1:  # others may be waiting for this one
      leave_together(error)
    raise


def leave_together(error: Exception) -> None:
  """Ends all processes of a run in which one met an error; does not return."""
  from cf_jax.data import judge
  from cf_jax.runtime import processes

  said = processes.lost(error)
  if said:
    processes.leave(
      f"another process of this run is gone ({said[:200]}). Start all of them"
      " again with the same command: the run goes on from its newest"
      " checkpoint",
      processes.EXIT_PEER,
    )
  passing = isinstance(error, OSError) and (
    isinstance(error, ConnectionError | TimeoutError | judge.JudgeError)
    or error.errno in (errno.EIO, errno.ESTALE)
  )
  ours = isinstance(error, ValueError | FloatingPointError | OSError)
  if ours and not passing:  # it would meet the next start, too
    processes.leave(explain_error(error), processes.EXIT_USER)
  logging.error("this process failed", exc_info=True)
  processes.leave(f"{type(error).__name__}: {error}", 1)


# errno -> what is the matter, and what to do.
_TROUBLES = {
  errno.ENOSPC: "the disk is full: make room",
  errno.EDQUOT: "the quota is used up: make room",
  errno.EFBIG: "a file may not grow so large here: raise the limit (ulimit -f)",
  errno.EROFS: "it can only be read there: name another place",
  errno.EACCES: "permission is missing: change it, or name another place",
  errno.EPERM: "permission is missing: change it, or name another place",
  errno.EEXIST: "a file is in the way: move it, or name another place",
  errno.ENOTDIR: "a folder of that path is a file: name another place",
  errno.EISDIR: "a folder is in the way: move it, or name another place",
  errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
}


def explain_error(error: Exception) -> str:
  """One sentence for what a program raised."""
  trouble = _TROUBLES.get(getattr(error, "errno", None))
  if trouble is None:
    return str(error)
  name = str(error.filename or "a file")
  return (
    f"{name}: {trouble}. What was saved before is whole, and the same command"
    f" goes on from there ({error.strerror})"
  )


def _own_or_warning(record) -> bool:
  """Libraries that log through absl too are heard from warnings on."""
  own = str(pathlib.Path(__file__).parent)
  return record.levelno >= 30 or record.pathname.startswith(own)


def main() -> None:
  """Entry point: user errors become one sentence and exit code 2."""
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_own_or_warning)
  try:
    app.run(run, flags_parser=_parse)
  except (ValueError, FloatingPointError, OSError) as error:
    logging.debug("traceback", exc_info=True)
    print(f"error: {explain_error(error)}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def _parse(argv):
  try:
    arguments = flags.FLAGS(argv)
    path = _config_path(argv)
    if path is not None and not os.path.isfile(path.partition(":")[0]):
      raise FileNotFoundError(path)  # the flag would tell at its first use
    return arguments
  except (AttributeError, KeyError, OSError, flags.Error) as error:
    sentence = explain_flag_error(error, argv)
    print(f"error: {sentence or error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  main()
