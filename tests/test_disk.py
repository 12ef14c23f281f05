"""Files are whole or not there, and nothing in the project writes otherwise."""

import ast
import os
import re
import resource
import signal
import subprocess
import sys

import pytest

from cf_jax import disk
from tests.conftest import ROOT


def test_writes_and_makes_folders(tmp_path):
  path = tmp_path / "a" / "b" / "c.txt"
  disk.write_text(path, "é\ud800")  # half a surrogate pair is no text
  assert path.read_bytes() == "é?".encode()
  disk.write(path, lambda file: file.write(b"second"))
  assert path.read_bytes() == b"second"
  assert [p.name for p in path.parent.iterdir()] == ["c.txt"]


def test_a_full_disk_leaves_the_old_file_and_names_the_new_one(tmp_path):
  """The system itself refuses: no file may grow past 1000 bytes."""
  path = tmp_path / "old.json"
  disk.write(path, b"old")
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
  try:
    with pytest.raises(OSError) as caught:
      disk.write(path, b"x" * 5000)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)
  assert caught.value.filename == str(path)
  assert path.read_bytes() == b"old"
  assert [p.name for p in tmp_path.iterdir()] == ["old.json"]


def test_replace_takes_a_file_or_a_folder(tmp_path):
  (tmp_path / "new").write_bytes(b"1")
  (tmp_path / "old").write_bytes(b"0")
  disk.replace(tmp_path / "new", tmp_path / "old")
  assert (tmp_path / "old").read_bytes() == b"1"
  (tmp_path / "partial" / "deep").mkdir(parents=True)
  (tmp_path / "partial" / "deep" / "x").write_bytes(b"2")
  (tmp_path / "whole").mkdir()
  disk.replace(tmp_path / "partial", tmp_path / "whole")
  assert (tmp_path / "whole" / "deep" / "x").read_bytes() == b"2"
  assert not (tmp_path / "partial").exists()


_WRITER = """
import sys
from cf_jax import disk
for n in range(10**6):
  disk.write(sys.argv[1], str(n % 10).encode() * 200_000)
  if not n:
    print("begun", flush=True)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
  path = tmp_path / "file"
  for _ in range(3):
    with subprocess.Popen(
      [sys.executable, "-c", _WRITER, str(path)],
      stdout=subprocess.PIPE,
      cwd=ROOT,
    ) as process:
      assert process.stdout.readline() == b"begun\n"
      process.kill()
    held = path.read_bytes()
    assert len(held) == 200_000 and len(set(held)) == 1


# What writes a file as it goes: rows are appended, and a cut-off one is dropped
# when they are read; the lock is not a record; a video is renamed when whole.
APPENDED = {
  ("cf_jax/runtime/telemetry.py", "open('ab')"),
  ("cf_jax/programs/select_data.py", "open('ab')"),
  ("cf_jax/programs/evaluate.py", "open('ab')"),
  ("cf_jax/runtime/lifecycle.py", "open('a+')"),
  ("launch/sweep.py", "open('a')"),  # its claims
  ("cf_jax/data/synthetic.py", "open('w')"),  # its lock
  ("cf_jax/data/frame_cache.py", "open('w')"),  # its lock
  ("cf_jax/data/synthetic_video.py", "VideoWriter"),
  ("cf_jax/disk.py", "open('wb')"),
}
WRITERS = ("write_text", "write_bytes", "savefig", "imwrite", "savez", "tofile")
WRITERS += ("VideoWriter", "rename", "NamedTemporaryFile", "mkstemp")


def _writes(path):
  """Calls in a file that may leave half a file, as words."""
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if not isinstance(node, ast.Call):
      continue
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    module = getattr(getattr(node.func, "value", None), "id", "")
    if name == "open":
      values = [
        *node.args,
        *(k.value for k in node.keywords if k.arg == "mode"),
      ]
      for value in values:
        mode = str(getattr(value, "value", None))
        if re.fullmatch("[rwaxbt+]{1,3}", mode) and set(mode) & set("wax+"):
          yield f"open({mode!r})"
    elif name in WRITERS and module != "disk":
      yield name
    elif name == "replace" and module == "os":
      yield "os.replace"


def test_everything_is_written_whole():
  found = {
    (str(path.relative_to(ROOT)), call)
    for folder in ("cf_jax", "launch")
    for path in (ROOT / folder).rglob("*.py")
    for call in _writes(path)
  }
  # Drawn into an open file of disk.write, or into memory.
  drawing = {(f"cf_jax/{name}.py", "savefig") for name in ("figures", "pages")}
  found -= drawing | {("cf_jax/disk.py", "os.replace")}
  assert found <= APPENDED, found - APPENDED


def test_temporary_names_differ_between_threads_and_processes(tmp_path):
  seen = set()

  def note(file):
    seen.add(os.path.basename(file.name))

  disk.write(tmp_path / "x", note)
  (name,) = seen
  assert str(os.getpid()) in name and name.startswith(".x.")
