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

from benchmarks import contrasts
from tests.conftest import draw_no_panels

ROOT = pathlib.Path(__file__).parents[1]
TAD = ROOT / "notebooks/01_tad.ipynb"
ABLATIONS = ROOT / "notebooks/02_ablations.ipynb"
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


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
  """The notebook on ablations, at the test suite's size."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", list(sys.path))
    patch.setenv("ABLATION_SIZE", "tiny")
    patch.setenv("SWEEP", "not/there")
    draw_no_panels(patch)  # of the runs' reports
    patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # made videos
    yield execute(ABLATIONS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_all_cells_were_run(path):
  cells = code_cells(path)
  counts = [cell["execution_count"] for cell in cells]
  assert counts == list(range(1, len(cells) + 1)), "run all, from the top"
  for cell in cells:
    kinds = {output["output_type"] for output in cell["outputs"]}
    assert "error" not in kinds
    told = [o["name"] for o in cell["outputs"] if o["output_type"] == "stream"]
    assert "stderr" not in told


def test_outputs_are_of_this_code(made):
  for cell, printed, figures in zip(
    code_cells(TAD), made.printed, made.figures, strict=True
  ):
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


def test_arms_share_a_cold_start(ablated):
  out, names = ablated.names["out"], ["cold_start", "grpo", "kfgrpo"]
  points = json.loads((out / "sweep.json").read_text())
  assert [point["name"] for point in points] == names
  said = "".join(ablated.printed)
  assert "\ngrpo: GRPO, 2 updates" in "\n" + said
  assert "kfgrpo: KF-GRPO, 2 updates" in said
  for view in ("keyframes", "shuffled", "reversed"):
    assert f"| kfgrpo | rl | {view} |" in said
  rows = {
    arm: [
      json.loads(line)
      for line in (out / arm / "metrics.jsonl").read_text().splitlines()
    ]
    for arm in names
  }
  assert [row["stage"] for row in rows["cold_start"]] == ["sft"] * 2
  assert not any("bonus/mean" in row for row in rows["grpo"])
  assert all("bonus/mean" in row for row in rows["kfgrpo"])
  # Their first completions are the same.
  first = [rows[arm][0] for arm in names[1:]]
  for name in ("reward/accuracy", "length/mean"):
    assert first[0][name] == first[1][name]
  assert ablated.figures[-1] == ablated.figures[-2] == 1


def test_what_is_not_there_is_said(ablated):
  said = "".join(ablated.printed)
  assert "sweep.json is not in the folder 'there'" in said
  for path in (ROOT / "docs/results").glob("*.json"):
    assert f"\n{path.stem} " in "\n" + said
  measured = (ROOT / "docs/results/contrasts.json").is_file()
  assert ("have not been measured" in said) == (not measured)


def test_outputs_have_the_kept_contrasts():
  text = (ROOT / "docs/results/contrasts.json").read_text("utf-8")
  kept = json.loads(text)
  said = "".join(
    "".join(output["text"])
    for cell in code_cells(ABLATIONS)
    for output in cell["outputs"]
    if output["output_type"] == "stream"
  )
  for table in (
    contrasts.describe(kept["cells"]),
    contrasts.table(kept["contrasts"]),
  ):
    assert table in said, "make the outputs anew, see above"


def test_contrasts_are_drawn(ablated, capsys):
  row = dict(mean=0.02, low=-0.01, high=0.05, p_holm=0.2, each=[0.01, 0.03])
  ablated.names["show_contrasts"]({"a) TAD - uniform": row})
  assert "| a) TAD - uniform | 2.0 | -1.0 to 5.0 |" in capsys.readouterr().out
  (axis,) = plt.gcf().axes
  assert axis.get_yticklabels()[0].get_text() == "a) TAD - uniform"
  views = {
    arm: {f"{view} order_two": [0.5, 0.75] for view in contrasts.VIEWS}
    for arm in contrasts.SHOWN
  }
  ablated.names["show_views"](views)
  assert len(plt.gcf().axes[0].get_lines()) == 3  # two seeds and chance
  plt.close("all")


class TestClone:
  """The first cell of the notebook that needs more than the package."""

  @pytest.fixture
  def start(self, monkeypatch, tmp_path):
    """Runs it in an empty folder: REPOSITORY -> commands, root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = "".join(code_cells(ABLATIONS)[0]["source"])
    assert source.count('REPOSITORY = ""') == 1
    commands = []

    def run(command, check):
      commands.append(command)
      if command[0] == "git":
        made = tmp_path / command[-1] / "cf_jax"
        made.mkdir(parents=True)
        (made / "tad.py").touch()

    monkeypatch.setattr(subprocess, "run", run)

    def start(repository):
      names = {}
      code = source.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
      exec(code, names)
      assert sys.path[0] == str(names["root"])
      return commands, names["root"]

    return start

  def test_folder(self, start):
    assert start(str(ROOT)) == ([], ROOT)

  def test_address(self, start, tmp_path, monkeypatch):
    address = "https://example.org/cf_jax.git"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (clone, pip), root = start(address)
    assert clone[:2] == ["git", "clone"] and address in clone
    assert root == tmp_path / "cf_jax_clone"
    assert pip[-2] == "--editable" and pip[-1].startswith(str(root))

  def test_nowhere_is_said(self, start):
    with pytest.raises(RuntimeError, match="set REPOSITORY to its folder"):
      start("")


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
