"""The floors of the code, and what must not be in it.

  programs -> runtime, views, policy, sampling, report -> models
    -> tad, descriptor, rewards, grpo, vocabulary | data, evals
    -> types, masked, windows, disk

A module imports only from floors below its own; inside a floor there are no
circles, and in `models` and `data` the order below holds.
"""

import ast
import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "cf_jax"

FLOORS = (
  ("types", "masked", "windows", "disk"),
  (
    "tad",
    "descriptor",
    "selectors",
    "rewards",
    "grpo",
    "vocabulary",
    "data.",
    "evals.",
  ),
  ("models.", "runtime.sharding"),  # parameters and where they lie
  (
    "policy",
    "sampling",
    "views",
    "runtime.",
    "figures",
    "pages",
    "report",
    "keyframe_page",
    "comparison_page",
    "amplify_page",
  ),
  ("programs.",),
  ("main",),
)
ORDER = {
  "models": (
    "config",
    "flops",
    "rope",
    "lora",
    "layers",
    "selector",
    "vision",
    "decoder",
    "vlm",
    "hf_config",
    "hf_weights",
  ),
  "data": (
    "json_file",
    "frame_size",
    "video",
    "video_stream",
    "images",
    "picture_folder",
    "patches",
    "vision_input",
    "prompts",
    "text_scores",
    "grounding_answers",
    "answers",
    "judge",
    "records",
    "footage",
    "decode_worker",
    "decoding",
    "frame_cache",
    "synthetic",
    "pipeline",
  ),
}
MATH = (
  "tad",
  "descriptor",
  "selectors",
  "rewards",
  "grpo",
  "vocabulary",
  "types",
  "masked",
  "windows",
)
MATH_IMPORTS = {
  "jax",
  "chex",
  "numpy",
  "flax",  # flax: struct only, in types
  "cf_jax",
  "collections",
  "dataclasses",
  "functools",
  "math",
  "numbers",
  "typing",
}


def modules():
  """name -> path of every module: `tad`, `data.video`, ..."""
  return {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
  }


MODULES = modules()


def floor(name):
  for height, prefixes in enumerate(FLOORS):
    for prefix in prefixes:
      if name == prefix or prefix.endswith(".") and name.startswith(prefix):
        return height
  pytest.fail(f"cf_jax/{name}: give it a floor in tests/test_layout.py")


def imports(path):
  """(module, name or None) of every import in a file, at any depth."""
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, None
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      for alias in node.names:
        yield node.module, alias.name


def own_imports(path):
  """Modules of this package that a file imports: `tad`, `data.video`, ..."""
  found = set()
  for module, name in imports(path):
    if module.split(".")[0] != "cf_jax":
      continue
    inside = module.split(".", 1)[1] if "." in module else ""
    whole = ".".join(part for part in (inside, name) if part)
    found.add(whole if whole in MODULES else inside)
  return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_come_from_below(name):
  for other in own_imports(MODULES[name]):
    assert other in MODULES, f"{name} imports cf_jax.{other}: no such module"
    assert floor(other) <= floor(name), f"{name} imports {other} from above"
    folder = name.split(".")[0]
    listed = ORDER.get(folder, ())
    if other.startswith(f"{folder}.") and listed:
      mine, theirs = (n.split(".")[1] for n in (name, other))
      if mine in listed and theirs in listed:
        assert listed.index(theirs) < listed.index(mine), (
          f"{name} imports {other}, which stands after it in {listed}"
        )


def test_no_circles():
  below = {name: own_imports(path) for name, path in MODULES.items()}
  done = set()

  def visit(name, trail):
    assert name not in trail, " -> ".join([*trail, name])
    if name not in done:
      for other in below[name] & below.keys():
        visit(other, [*trail, name])
      done.add(name)

  for name in below:
    visit(name, [])


@pytest.mark.parametrize(
  "name", [n for n in MODULES if n.startswith(("data.", "evals."))]
)
def test_host_code_makes_no_jax_arrays(name):
  for module, _ in imports(MODULES[name]):
    assert module.split(".")[0] not in (
      "jax",
      "jaxlib",
      "flax",
      "chex",
      "optax",
    )
  assert own_imports(MODULES[name]) <= {
    n for n in MODULES if n.startswith(("data.", "evals."))
  } | {"types", "disk"}


@pytest.mark.parametrize("name", [n for n in MATH if n in MODULES])
def test_math_needs_jax_only(name):
  used = {module.split(".")[0] for module, _ in imports(MODULES[name])}
  assert used <= MATH_IMPORTS
  assert own_imports(MODULES[name]) <= {
    "types",
    "masked",
    "windows",
    "tad",
    "grpo",
  }


def test_linen_is_used_in_models_only():
  for name, path in MODULES.items():
    for module, imported in imports(path):
      if module == "flax.linen" or (module, imported) == ("flax", "linen"):
        assert name.startswith("models."), name


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_imported_not_names(name):
  """`from cf_jax import grpo`, not `from cf_jax.grpo import advantages`."""
  for module, imported in imports(MODULES[name]):
    if module.split(".")[0] == "cf_jax" and imported:
      inside = ".".join([*module.split(".")[1:], imported])
      assert inside in MODULES or imported[0].isupper(), (
        f"{name}: from {module} import {imported}"
      )


def test_inits_are_empty_and_nothing_is_called_utils():
  folders = {path.parent for path in MODULES.values()}
  for folder in folders:
    assert (folder / "__init__.py").read_text() == "", folder
  assert not [name for name in MODULES if re.search(r"\butils?\b", name)]


def test_nothing_happens_at_import():
  """No module initialises a backend, reads flags or opens a window."""
  script = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
  importlib.import_module(f"cf_jax.{name}")
from jax._src import xla_bridge
print(json.dumps([sorted(xla_bridge._backends), "matplotlib.pyplot" in
                  sys.modules, "tensorflow" in sys.modules]))
"""
  ran = subprocess.run(
    [sys.executable, "-c", script, json.dumps(list(MODULES))],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert ran.returncode == 0, ran.stderr[-2000:]
  assert json.loads(ran.stdout) == [[], False, False]


def texts():
  names = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=True,
  ).stdout.splitlines()
  for name in names:
    path = ROOT / name
    if not path.is_file():
      continue
    try:
      yield name, path.read_text("utf-8")
    except UnicodeDecodeError:
      continue  # a picture or an array


def test_no_machine_paths_and_no_local_indexes():
  if not (ROOT / ".git").exists():
    pytest.skip("not a checkout: nothing says which files are ours")
  folders = "|".join(("root", "home", "Users", "work", "opt", "mnt"))
  found = re.compile(rf"(?<![\w./*~-])/(?:{folders})/[\w.]")
  hits = [
    f"{name}: {match.group()}"
    for name, text in texts()
    for match in found.finditer(text)
    if not name.endswith((".ipynb", "tokenizer.json"))
  ]
  assert not hits, hits


def test_package_data_reaches_every_asset():
  import tomllib

  settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
  shipped = {
    path
    for package, globs in settings["tool"]["setuptools"]["package-data"].items()
    for pattern in globs
    for path in ROOT.joinpath(*package.split(".")).glob(pattern + "/*")
  }
  assets = {
    path
    for path in PACKAGE.rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc")
  }
  assert assets <= shipped
