"""Files that are whole or not there: the one way in which anything is written.

A file is written beside its name, forced to disk, and renamed; then the folder
is forced to disk too. Whoever is killed, or whose machine loses power, leaves
the old file or the new one, and at most a `.NAME.*.tmp` that nothing reads;
`sweep` takes it away where a training run starts again.
"""

import contextlib
import os
import pathlib
import re
import threading
from collections.abc import Callable
from typing import BinaryIO

_PARTIAL = re.compile(r"\..+\.\d+\.\d+\.tmp")  # as `write` names it


def write(
  path: str | os.PathLike, data: bytes | Callable[[BinaryIO], object]
) -> None:
  """Writes a whole file or leaves the old one.

  Args:
    path: of the file; its folder is made if missing.
    data: the content, or what writes it into an open file.

  Raises:
    OSError: it cannot be written; the old file is as it was.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  writer = f"{os.getpid()}.{threading.get_native_id()}"
  partial = path.with_name(f".{path.name}.{writer}.tmp")
  try:
    with partial.open("wb") as file:
      if callable(data):
        data(file)
      else:
        file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except OSError as error:
    # A full disk is told by what it was to hold, not by a temporary name.
    if error.errno is None or error.filename not in (None, str(partial)):
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()
  sync(path.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a whole UTF-8 text file or leaves the old one."""
  # A completion may hold half a surrogate pair, which UTF-8 cannot.
  write(path, text.encode("utf-8", errors="replace"))


def sweep(folder: str | os.PathLike) -> None:
  """Takes away what writers left in a folder when they were killed.

  Not what lies in folders of it: another run may be writing there.

  Args:
    folder: nobody else may be writing into it.
  """
  for path in pathlib.Path(folder).glob(".*.tmp"):
    if _PARTIAL.fullmatch(path.name) and path.is_file():
      with contextlib.suppress(OSError):  # of somebody else's
        path.unlink()


def replace(partial: str | os.PathLike, path: str | os.PathLike) -> None:
  """Gives a file or folder that is written whole elsewhere its name.

  Args:
    partial: on the same file system as `path`; what is in a folder is forced
      to disk file by file.
    path: of the result; a file there is replaced, a folder must be empty.
  """
  partial, path = pathlib.Path(partial), pathlib.Path(path)
  sync_tree(partial)
  os.replace(partial, path)
  sync(path.parent)


def sync_tree(path: pathlib.Path) -> None:
  """Forces a file, or a folder with all that is in it, to disk."""
  for inside in path.rglob("*"):
    if inside.is_file() or inside.is_dir():  # no pipe, no link to nothing
      sync(inside)
  sync(path)


def sync(path: pathlib.Path) -> None:
  """Forces a file's content, or a folder's list of names, to disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError:
    if not path.is_dir():  # some file systems do not sync folders
      raise
  finally:
    os.close(descriptor)
