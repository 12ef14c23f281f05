"""Regexes with which a config picks parameters by their paths."""

import re
from collections.abc import Sequence


def compile_all(patterns: Sequence[str], setting: str) -> list[re.Pattern[str]]:
  """The compiled patterns, in their order.

  Args:
    patterns: a list or tuple of regexes.
    setting: where they are from, for the error.

  Raises:
    ValueError: not a list or tuple of strings, or a broken regex.
  """
  if not isinstance(patterns, list | tuple) or not all(
    isinstance(pattern, str) for pattern in patterns
  ):
    raise ValueError(
      f"{setting} must be a tuple of regexes, got {patterns!r}; write"
      " ('one',) for a single one"
    )
  compiled = []
  for pattern in patterns:
    try:
      compiled.append(re.compile(pattern))
    except re.error as error:
      raise ValueError(
        f"{setting} has the broken regex {pattern!r} ({error}); expected one"
        " that Python's re can compile, with \\ before a literal bracket"
      ) from error
  return compiled
