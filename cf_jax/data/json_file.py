"""JSON that others wrote: objects, and fields of a known kind, or an error.

The files of a model's directory are edited by hand. What is wrong in one is
said in terms of the file, before it becomes an error of the code that uses it.
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any


def _integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
  return _integer(value) or isinstance(value, float) and math.isfinite(value)


def _list_of(check: Callable[[Any], bool], value: Any) -> bool:
  return isinstance(value, list | tuple) and all(map(check, value))


# What an error calls a kind -> is a value of it?
_KINDS: dict[str, Callable[[Any], bool]] = {
  "an object": lambda value: isinstance(value, dict),
  "true or false": lambda value: isinstance(value, bool),
  "a string": lambda value: isinstance(value, str),
  "a positive integer": lambda value: _integer(value) and value > 0,
  "an integer of at least 0": lambda value: _integer(value) and value >= 0,
  "a positive number": lambda value: _number(value) and value > 0,
  "a number of at least 0": lambda value: _number(value) and value >= 0,
  "a list of strings": lambda value: _list_of(
    lambda item: isinstance(item, str), value
  ),
  "a list of objects": lambda value: _list_of(
    lambda item: isinstance(item, dict), value
  ),
  "a list of integers of at least 0": lambda value: _list_of(
    lambda item: _integer(item) and item >= 0, value
  ),
  "a list of three numbers": lambda value: (
    _list_of(_number, value) and len(value) == 3
  ),
}


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """The object that a JSON file holds.

  Raises:
    ValueError: not JSON, or another thing than an object; names the file.
  """
  try:
    spec = json.loads(path.read_text("utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{path} is not JSON ({error}); take the file of the model's repository"
    ) from error
  if not isinstance(spec, dict):
    raise ValueError(
      f"{path} must hold an object, got {spec!r:.60}; take the file of the"
      " model's repository"
    )
  return spec


def field(
  spec: Mapping[str, Any],
  key: str,
  kind: str,
  *,
  prefix: str = "",
  default: Any = None,
) -> Any:
  """`spec[key]`, or `default` where it is absent or null.

  Args:
    spec: an object of a parsed file.
    key: of the field.
    kind: what it must be, a key of `_KINDS`. An integer is written without a
      decimal point, and neither true nor false is one.
    prefix: stands before the key in the error.
    default: not checked.

  Raises:
    ValueError: another kind of value.
  """
  value = spec.get(key)
  if value is None:
    return default
  if not _KINDS[kind](value):
    raise ValueError(f"{prefix}{key} must be {kind}, got {value!r:.60}")
  return value
