"""What README and docs show works as written."""

import pathlib
import re
import runpy
import shlex

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
  """Every fenced block of a language, as parameters of a test."""
  return [
    pytest.param(match[1], id=f"{page.name}:{match.start()}")
    for page in PAGES
    for match in re.finditer(
      rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL
    )
  ]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code):
  exec(compile(code, "README", "exec"), {})  # our own pages, nobody else's


@pytest.mark.parametrize("code", blocks("bash"))
def test_commands_name_what_exists(code):
  """Scripts and configs exist, and every flag is a setting of its config."""
  for line in code.replace("\\\n", " ").splitlines():
    words = shlex.split(line, comments=True)
    for word in words:
      if word.endswith((".sh", ".py")) and "=" not in word:
        assert (ROOT / word).is_file(), line
    named = [w.split("=", 1)[1] for w in words if w.startswith("--config=")]
    if not named:
      continue
    path, _, arg = named[0].partition(":")
    module = runpy.run_path(str(ROOT / path))
    config = module["get_config"](*([arg] if arg else []))
    for word in words:
      if word.startswith("--config."):
        node = config
        for key in word.split("=")[0].removeprefix("--config.").split("."):
          assert key in node, f"{line}: no setting {key}"
          node = node[key]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text("utf-8")):
    if not target.startswith("http"):
      assert (page.parent / target).exists(), target
