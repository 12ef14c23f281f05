"""Nobody is let in: no code in data, no way out of a folder, no told secrets.

What users type never becomes a special token: tests/data/test_prompts.py.
"""

import ast
import html.parser
import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest
from PIL import Image

from cf_jax import amplify_page, comparison_page, keyframe_page, report
from cf_jax.data import decoding, images, records
from cf_jax.data import video as video_lib
from cf_jax.runtime import telemetry
from tests.conftest import ROOT

OURS = [
  path
  for folder in ("cf_jax", "configs", "launch", "benchmarks")
  for path in sorted((ROOT / folder).rglob("*.py"))
]

# ------------------------------------------------------------- no code in data

# Builtins and functions that turn data into code, or a string into a command.
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
CALLS |= {"torch.load", "yaml.load", "pty.spawn", "shelve.open"}
CALLS |= {"runpy.run_path", "runpy.run_module", "importlib.import_module"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal"}
MODULES |= {"shelve", "yaml", "code", "codeop"}
# A config is a program that the user names on the command line; one of this
# package is found by its name, after a look at the list.
NAMED_BY_USERS = {
  ("cf_jax/main.py", "runpy.run_path"),
  ("cf_jax/main.py", "importlib.import_module"),
  ("cf_jax/programs/plan.py", "runpy.run_path"),
  ("launch/sweep.py", "runpy.run_path"),
  # Of a table in the file; of a training config that lies beside it.
  ("benchmarks/kills.py", "importlib.import_module"),
  ("configs/cache_frames.py", "importlib.import_module"),
}


def _dotted(node):
  parts = []
  while isinstance(node, ast.Attribute):
    parts.append(node.attr)
    node = node.value
  return ".".join([getattr(node, "id", "?"), *reversed(parts)])


def _doors(path):
  """What in a file could run data as code, in words."""
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = [a.name for a in node.names]
      if isinstance(node, ast.ImportFrom):
        names = [node.module]
      for name in names:
        if name.split(".")[0] in MODULES:
          yield name
    if not isinstance(node, ast.Call):
      continue
    name = _dotted(node.func)
    if name in CALLS:
      yield name
    for keyword in node.keywords:
      value = getattr(keyword.value, "value", True)
      if (
        keyword.arg in ("allow_pickle", "trust_remote_code", "shell") and value
      ):
        yield f"{name}({keyword.arg}=...)"


def test_no_data_is_run_as_code():
  found = {
    (str(path.relative_to(ROOT)), door)
    for path in OURS
    for door in _doors(path)
  }
  assert found <= NAMED_BY_USERS, found - NAMED_BY_USERS


def test_the_search_finds_what_it_is_for(tmp_path):
  path = tmp_path / "bad.py"
  path.write_text(
    "import pickle\nfrom yaml import load\neval('1')\nnp.load(x,"
    " allow_pickle=True)\nrun('ls', shell=True)\nmodel.eval()\n"
    "np.load(x, allow_pickle=False)\nAutoModel.x(trust_remote_code=flag)\n"
  )
  assert sorted(_doors(path)) == [
    "AutoModel.x(trust_remote_code=...)",
    "eval",
    "np.load(allow_pickle=...)",
    "pickle",
    "run(shell=...)",
    "yaml",
  ]


# ------------------------------------------------------ no way out of a folder


def _manifest(folder, video):
  row = {"video": video, "question": "?", "options": ["x", "y"], "answer": "A"}
  (folder / "my.jsonl").write_text(json.dumps(row) + "\n")
  return folder / "my.jsonl"


@pytest.fixture
def folders(tmp_path):
  """A manifest's folder with links inside and out, and one beside it."""
  inside, outside = tmp_path / "inside", tmp_path / "inside_not"
  for folder in (inside, outside):
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"")
  (inside / "link.mp4").symlink_to(outside / "a.mp4")
  (inside / "folder").symlink_to(outside)
  (inside / "same.mp4").symlink_to("a.mp4")
  return inside, outside


@pytest.mark.parametrize(
  "video",
  [
    "../inside_not/a.mp4",
    "folder/a.mp4",
    "link.mp4",
    "folder/../a.mp4",  # of the folder that the link leads to: tmp_path
    "/etc/passwd",
    "~/a.mp4",
  ],
)
def test_a_manifest_names_nothing_outside_unless_allowed(folders, video):
  path = _manifest(folders[0], video)
  with pytest.raises(ValueError, match="my.jsonl:1.*allow_outside=True"):
    records.load_jsonl(path)
  assert len(records.load_jsonl(path, allow_outside=True)) == 1


def test_an_absolute_path_inside_is_inside(folders):
  for video in (str(folders[0] / "a.mp4"), "a.mp4", "./a.mp4", "same.mp4"):
    (sample,) = records.load_jsonl(_manifest(folders[0], video))
    assert os.path.samefile(sample.video, folders[0] / "a.mp4")


@pytest.mark.parametrize(
  "video",
  [
    "http://x.example/a.mp4",
    "concat:a.mp4|b.mp4",
    "file:///etc/passwd",
    "a\0b",
  ],
)
def test_a_video_is_a_file(folders, video):
  """FFmpeg would open all of these."""
  path = _manifest(folders[0], video)
  for allowed in (False, True):
    with pytest.raises(ValueError, match="path of a local file"):
      records.load_jsonl(path, allow_outside=allowed)


@pytest.mark.parametrize("video", ["~nobody-of-this-name/a.mp4", "itself/a"])
def test_a_path_that_leads_nowhere_is_said(folders, video):
  (folders[0] / "itself").symlink_to("itself")
  path = _manifest(folders[0], video)
  for allowed in (False, True):
    with pytest.raises(ValueError, match="my.jsonl:1: field 'video'"):
      records.load_jsonl(path, allow_outside=allowed)


def test_pictures_of_a_folder_are_inside(folders):
  pictures = folders[0] / "pictures"
  pictures.mkdir()
  (pictures / "1.png").write_bytes(b"")
  path = _manifest(folders[0], "pictures")
  assert len(records.load_jsonl(path)) == 1
  (pictures / "2.png").symlink_to(folders[1] / "a.mp4")
  with pytest.raises(ValueError, match="inside_not.*allow_outside=True"):
    records.load_jsonl(path)
  assert len(records.load_jsonl(path, allow_outside=True)) == 1


def test_no_program_is_started_for_a_picture(tmp_path):
  """Pillow reads EPS by Ghostscript, whatever the file is called."""
  path = tmp_path / "a.png"
  Image.new("RGB", (8, 8)).save(path, format="EPS")
  with pytest.raises(video_lib.VideoError, match="cannot identify image file"):
    images.read_image(path)


def test_a_pipe_is_no_picture(tmp_path):
  os.mkfifo(tmp_path / "a.png")  # opening it would wait for a writer
  with pytest.raises(video_lib.VideoError, match="no file"):
    images.read_image(tmp_path / "a.png")


# ---------------------------------------------------------- pages show, not run

OWNED = "document.body.dataset.owned=1"
PAYLOADS = (
  f"<script>{OWNED}</script>",
  f"</script><script>{OWNED}</script>",
  f'"><img src=x onerror="{OWNED}">',
  f"' onmouseover='{OWNED}' autofocus onfocus='{OWNED}",
  f"</pre></code></td><svg onload={OWNED}>",
  f"javascript:{OWNED}",
  f"&lt;script&gt;{OWNED}&lt;/script&gt;",
  "{title} {0.__class__} %s",
  r"$\frac{$ $x_$",  # of which matplotlib would make a formula, and fail
)


def _hostile_run(folder):
  """A workdir in which every text is a payload."""
  bad = " ".join(PAYLOADS)
  with telemetry.MetricWriter(folder, resume={}) as writer:
    for step in (1, 2, 3):
      metrics = {"loss": 1.0, "reward/mean": 0.5, f"accuracy/{bad}": 0.5}
      writer.write(step, "rl", metrics | {f"time/{bad}_s": 1.0, bad: 1.0})
    record = dict.fromkeys(("sample_id", "task", "prompt", "answer"), bad)
    record |= {"completion": bad, "rewards": {bad: 1.0, "total": 1.0}}
    record |= {"keyframe_s": [0.5], "advantage": 0.1, "view": bad}
    writer.write_rollouts(1, "rl", [record])
  row = dict(accuracy=0.5, low=0.4, high=0.6, count=8)
  results = {
    "chance": {bad: 0.25, "all": 0.25},
    "evaluations": [
      row | dict(stage=stage, view=view, task=task)
      for stage in ("sft", "rl")
      for view in ("keyframes", bad)
      for task in (bad, "all")
    ],
    "goals": [dict(name=bad, value=1.0, goal=2.0, met=False)],
    "probes": {bad: dict(accuracy=0.5, chance=0.25, half_interval=0.1)},
    "hit_rates": {"keyframes": 0.5, "uniform": 0.25},
    "timing": {"this_start_s": 3.0},
  }
  telemetry.write_json(folder / "results.json", results)
  telemetry.write_manifest(
    folder,
    config={"name": bad, bad: bad, "deep": {bad: [bad]}},
    seed=0,
    data_hash=bad,
    argv=[bad],
  )
  return report.write_report(folder)


class _Tags(html.parser.HTMLParser):
  """Every tag of a page, with its attributes."""

  def __init__(self, text):
    super().__init__()
    self.tags = []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))


def _inert(text, least=50):
  """Nothing in a page is a script, or an attribute that is one."""
  tags = _Tags(text).tags
  assert len(tags) > least
  for tag, attributes in tags:
    assert tag not in ("script", "iframe", "object", "embed", "svg", "base")
    for name, value in attributes.items():
      assert not name.startswith("on") and name != "autofocus", (tag, name)
      if name in ("href", "src"):
        assert not value.strip().lower().startswith("javascript:")


def test_a_hostile_run_has_a_harmless_page(tmp_path):
  text = _hostile_run(tmp_path).read_text("utf-8")
  _inert(text)
  assert "&lt;script&gt;document.body" in text  # and is shown


def _other_pages(folder):
  """The pages of other programs, of which every text is a script."""
  bad = " ".join(PAYLOADS)
  video = dict.fromkeys(("codec", "problem"), bad) | dict(
    variable_fps=True, rotation=90, num_frames=3, fps=3.0, duration_s=1.0
  )
  frame = dict(file=bad, frame_index=1, timestamp=0.1, apex=None)
  frame |= dict(segment=dict(start=0.0, end=1.0), score=0.1, saliency=0.2)
  record = dict(video=video | dict(width=4, height=5), num_scanned=3)
  record |= dict(apexes=[], film_strip=bad, keyframes=[frame])
  yield keyframe_page.write(
    folder / "keyframes.html",
    title=bad,
    records={bad: record},
    failed={bad: bad},
    settings={bad: {bad: [bad]}},
  )
  share = dict(accuracy=0.5, low=0.4, high=0.6)
  names = ("accuracy/chosen", "accuracy/uniform", "evidence/chosen")
  row = dict.fromkeys(names, share) | dict(after=bad, task=bad)
  row |= {"lists/hit": 0.5, "lists/readable": 0.5}
  yield amplify_page.write(folder / "amplify.html", bad, [row])
  said = dict.fromkeys(("key", "policy", "weights", "unreadable"), bad)
  answer = dict.fromkeys(("name", "note", "read", "response"), bad)
  asked = ("heading", "id", "task", "video", "question", "truth")
  change = dict.fromkeys(("group", "metric", "test", "first_name"), bad)
  change |= dict(low=0.1, high=0.2, mean=0.1, p=0.1, p_holm=None, units=3)
  yield comparison_page.write(
    folder / "compare.html",
    title=bad,
    words=[bad],
    evaluations=[said | dict(name=bad), said | dict(name=f"{bad}2")],
    differences=[
      change
      | dict(second_name=f"{bad}2", main=True, first=0.1, second=0.2)
      | dict(gained=1, lost=2, count=3)
    ],
    figures=[dict(metric=bad, group=bad, value={bad: 0.1})],
    settings=[dict(setting=bad, value={bad: bad, f"{bad}2": bad})],
    changed=[
      dict.fromkeys(asked, bad)
      | dict(options=[bad])
      | dict(answers=[answer | dict(better=True, score=None, frames=[])])
    ],
  )


def test_the_other_pages_are_harmless(tmp_path):
  for page in _other_pages(tmp_path):
    text = page.read_text("utf-8")
    _inert(text, least=15)
    assert "&lt;script&gt;document.body" in text, page.name


def _browser():
  names = ("chromium", "chromium-browser", "google-chrome", "chrome")
  return next(filter(None, map(shutil.which, names)), None)


def test_a_real_browser_runs_nothing(tmp_path):
  browser = _browser()
  if browser is None:
    pytest.skip("no chromium on this machine")
  page = _hostile_run(tmp_path / "run")
  # The same text unescaped is run: the browser would tell.
  control = tmp_path / "control.html"
  control.write_text(f"<body>{PAYLOADS[0]}</body>")
  owned = []
  for path in (control, page, *_other_pages(tmp_path)):
    ran = subprocess.run(
      [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=2000",
        "--dump-dom",
        path.as_uri(),
      ],
      capture_output=True,
      text=True,
      timeout=60,
    )
    assert "<body" in ran.stdout, ran.stderr[-1000:]
    owned.append(bool(re.search(r"<body[^>]*data-owned", ran.stdout)))
  assert owned == [True] + [False] * 4


# ---------------------------------------------------------------------- secrets


def test_a_command_line_is_kept_without_its_secrets(monkeypatch):
  monkeypatch.setenv("SOME_API_KEY", "planted-in-the-environment")
  kept = telemetry.without_secrets(
    [
      "main",
      "--config=configs/a.py",
      "--config.sampling.max_tokens=64",
      "--config.judge.key_variable=SOME_API_KEY",
      "--config.judge.api_key=abc",
      "--config.hub.token",
      "abc",
      "--config.name=planted-in-the-environment",
      "--config.judge.url=https://me:word@host/v1",  # pragma: allowlist secret
      "--config.note=sk-0123456789abcdef",  # pragma: allowlist secret
      "--config.PGPASSWORD",
      "-abc",
      "--config.judge.url=https://host/v1?model=a&api_key=abc&b=c",
      "--config.header=Authorization: Bearer abcdefgh01234567",
      "--config.ask=What does the torch bearer carry?",
    ]
  )
  assert kept == [
    "main",
    "--config=configs/a.py",
    "--config.sampling.max_tokens=64",
    "--config.judge.key_variable=SOME_API_KEY",
    "--config.judge.api_key=***",
    "--config.hub.token",
    "***",
    "--config.name=***",
    "--config.judge.url=https://***@host/v1",
    "--config.note=***",
    "--config.PGPASSWORD",
    "***",
    "--config.judge.url=https://host/v1?model=a&api_key=***&b=c",
    "--config.header=Authorization: Bearer ***",
    "--config.ask=What does the torch bearer carry?",
  ]


def test_a_decoder_is_told_no_secret(monkeypatch):
  """Who takes one over by a file of his finds no key in it."""
  monkeypatch.setenv("PLANTED_KEY", "planted")
  monkeypatch.setenv("PYTHON_KEYRING_TOKEN", "planted")
  monkeypatch.setenv("DATABASE_URL", "planted")
  monkeypatch.setenv("LC_TIME", "C")
  settings = dict(timeout_s=20.0, max_memory_mib=1024, accept_damaged=False)
  worker = decoding._Worker(settings | {"limits": {}})
  try:
    path = pathlib.Path(f"/proc/{worker._process.pid}/environ")
    if not path.exists():
      pytest.skip("no /proc on this system")
    said = path.read_bytes()
  finally:
    worker.kill()
  assert b"planted" not in said and b"LC_TIME=C" in said


AUDIT = """
say() { echo "$*"; }
die() { echo "die: $*"; exit 1; }
timeout() { shift; "$@"; }
LOCK=lock TOOLS="$1"
set -euo pipefail
"""


@pytest.mark.parametrize(
  ("says", "code", "passes", "told"),
  [
    ("No known vulnerabilities found", 0, True, ""),
    ("Found 1 known vulnerability in 1 package", 1, False, "known holes"),
    ("ConnectionError: Max retries exceeded", 1, True, "cannot be reached"),
    ("slow", 124, True, "cannot be reached"),
    (
      "ERROR: lock: invalid requirement on line 3",
      1,
      False,
      "pip-audit failed",
    ),
    ("Traceback: KeyError: 'vulns'", 1, False, "pip-audit failed"),
  ],
)
def test_an_audit_that_fails_is_not_called_offline(
  says, code, passes, told, tmp_path
):
  text = (ROOT / "launch" / "audit.sh").read_text()
  parts = [
    re.search(pattern, text, re.MULTILINE | re.DOTALL)[0]
    for pattern in (r"^OFFLINE='[^']*'", r"^audit_dependencies\(\) \{.*?^\}")
  ]
  tool = tmp_path / "bin" / "pip-audit"
  tool.parent.mkdir()
  tool.write_text(f'#!/bin/sh\necho "{says}"\nexit {code}\n')
  tool.chmod(0o755)
  script = "\n".join([AUDIT, *parts, "audit_dependencies"])
  ran = subprocess.run(
    ["bash", "-c", script, "audit", tmp_path], capture_output=True, text=True
  )
  assert (ran.returncode == 0) == passes, ran
  assert told in ran.stdout
