"""The notebooks run, find what they say, and hold the outputs of their code.

Cells are executed in order, in one namespace, without Jupyter. Outputs are made
anew with

  pip install -e '.[notebooks]'
  jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb
"""

import base64
import contextlib
import glob
import importlib.util
import io
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import cv2
import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
TAD = ROOT / "notebooks/01_tad.ipynb"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path: pathlib.Path) -> list[dict[str, Any]]:
  cells = json.loads(path.read_text("utf-8"))["cells"]
  return [cell for cell in cells if cell["cell_type"] == "code"]


def kept_pictures(cell: dict[str, Any]) -> list[bytes]:
  """The PNG files among the outputs of a cell."""
  kept = [output.get("data", {}).get("image/png") for output in cell["outputs"]]
  return [base64.b64decode("".join(png)) for png in kept if png]


class Ran(NamedTuple):
  """What is left when a notebook has been executed.

  Attributes:
    names: its variables.
    printed: what each code cell wrote.
    figures: how many figures each code cell drew.
  """

  names: dict[str, Any]
  printed: list[str]
  figures: list[int]


def execute(path: pathlib.Path, num_cells: int | None = None) -> Ran:
  ran = Ran({"__name__": "__main__"}, [], [])
  plt.switch_backend("agg")
  with matplotlib.rc_context():
    for number, cell in enumerate(code_cells(path)[:num_cells], start=1):
      code = compile("".join(cell["source"]), f"{path.name}:{number}", "exec")
      with contextlib.redirect_stdout(io.StringIO()) as written:
        exec(code, ran.names)  # our own notebook, nobody else's
      ran.printed.append(written.getvalue())
      ran.figures.append(len(plt.get_fignums()))
      plt.close("all")
  return ran


@pytest.fixture(scope="module")
def made():
  """The notebook with the video that it makes."""
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv("VIDEO", raising=False)
    yield execute(TAD)


def test_outputs_are_of_this_code(made):
  cells = code_cells(TAD)
  counts = [cell["execution_count"] for cell in cells]
  assert counts == list(range(1, len(cells) + 1)), "run all, from the top"
  for cell, printed, figures in zip(
    cells, made.printed, made.figures, strict=True
  ):
    kinds = {output["output_type"] for output in cell["outputs"]}
    assert "error" not in kinds
    kept = [
      "".join(output["text"])
      for output in cell["outputs"]
      if output["output_type"] == "stream"
    ]
    assert "".join(kept) == printed, "make the outputs anew, see above"
    # A cell may also end with a picture that is no figure.
    assert len(kept_pictures(cell)) >= figures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_pictures_are_small(path):
  pictures = [png for cell in code_cells(path) for png in kept_pictures(cell)]
  assert 0 < sum(map(len, pictures)) < 400_000
  for png in pictures:
    picture = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert picture.std() > 5, "a picture of nothing"


def test_apexes_are_where_something_happened(made):
  spec = made.names["spec"]
  happened = [
    *spec.cuts,
    *(frame for event in spec.events for frame in (event.start, event.stop)),
  ]
  found = made.names["found"]
  near = np.abs(found[:, None] - np.array(happened)).min(axis=1) <= 2
  assert len(found) > len(spec.events)
  assert near.mean() >= 0.75
  assert made.names["chosen"].tolist() == made.names["batch"].index[0].tolist()


def test_tad_shows_more_than_uniform(made):
  spec, shots = made.names["spec"], made.names["shots"]
  for name in ("tad", "uniform"):
    index = made.names["picks"][name]
    edges = [0, *(start for start, _ in made.names["cuts"]), spec.num_frames]
    seen = [
      any(start <= frame < end for frame in index)
      for start, end in zip(edges[:-1], edges[1:])
    ]
    assert shots[name] == sum(seen)
  assert shots["tad"] > shots["uniform"]


def test_gradients_reach_the_encoder(made):
  over_time = {}
  for name, (params, frame) in made.names["gradients"].items():
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))
    assert np.abs(params["encoder"]).max() > 0
    over_time[name] = np.linalg.norm(frame, axis=1)
  assert np.count_nonzero(over_time["uniform"]) == 4
  for name in ("soft", "straight_through"):
    assert np.count_nonzero(over_time[name]) > len(over_time[name]) / 2


def test_training_moves_the_selection(made):
  losses, moved = made.names["losses"], made.names["moved"]
  assert losses[-1] < 0.8 * losses[0] or losses[-1] < losses[0] - 0.2
  event = made.names["spec"].events[0]

  def shown(index):
    return np.sum((event.start <= index) & (index < event.stop))

  assert shown(moved[-1]) > shown(moved[0])


def test_sliders_draw(made):
  made.names["explore"](gate=1.0, num_keyframes=5, min_gap=8, shown="first")
  assert len(plt.get_fignums()) == 1
  plt.close("all")


def test_video_of_the_user(write_video, tmp_path, monkeypatch):
  """Another shape, fewer frames than are asked for, and no truth known."""
  rng = np.random.default_rng(0)
  shots = rng.integers(0, 256, (4, 1, 6, 8, 3), np.uint8)
  small = np.broadcast_to(shots, (4, 10, 6, 8, 3)).reshape((-1, 6, 8, 3))
  path = write_video(
    tmp_path / "clip.mp4", small.repeat(12, axis=1).repeat(12, axis=2)
  )
  monkeypatch.setenv("VIDEO", str(path))
  ran = execute(TAD, num_cells=7)
  assert ran.names["strip"].is_file()
  assert len(ran.names["time_s"]) == 40
  assert {10, 20, 30} <= set(ran.names["found"].tolist())


class TestInstallation:
  """The first cell, where the package is not there."""

  @pytest.fixture
  def install(self, monkeypatch, tmp_path):
    """Runs the cell: (folder, REPOSITORY) -> the arguments of pip."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(glob, "glob", lambda pattern: [])  # no TPU
    monkeypatch.setattr(sys, "path", list(sys.path))
    commands = []
    monkeypatch.setattr(
      subprocess, "run", lambda command, check: commands.append(command)
    )
    source = "".join(code_cells(TAD)[0]["source"])
    assert source.count('REPOSITORY = ""') == 1

    def run(folder, repository="", gpu=False):
      monkeypatch.setattr(
        shutil, "which", lambda name: "/bin/nvidia-smi" if gpu else None
      )
      monkeypatch.chdir(folder)
      code = source.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
      exec(code, {})
      (command,) = commands
      assert command[:4] == [sys.executable, "-m", "pip", "install"]
      return command[4:]

    return run

  def test_clone_above_the_notebook(self, install):
    assert install(ROOT / "notebooks") == ["--editable", str(ROOT)]
    assert sys.path[0] == str(ROOT)

  def test_clone_elsewhere(self, install, tmp_path):
    arguments = install(tmp_path, str(ROOT), gpu=True)
    assert arguments == ["--editable", f"{ROOT}[cuda]"]

  def test_address(self, install, tmp_path):
    (wanted,) = install(tmp_path, "https://example.org/cf_jax.git")
    assert wanted == "cf_jax @ git+https://example.org/cf_jax.git"

  @pytest.mark.parametrize("repository", ["", "not/there"])
  def test_nowhere_is_said(self, install, tmp_path, repository):
    with pytest.raises(RuntimeError, match="set REPOSITORY to its folder"):
      install(tmp_path, repository)
