"""The launch scripts, with a stand-in for Python, and the lock."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from packaging import requirements, version

ROOT = pathlib.Path(__file__).parents[1]
TOOLS = (
  "awk",
  "bash",
  "cat",
  "cksum",
  "cp",
  "df",
  "dirname",
  "grep",
  "head",
  "ls",
  "mkdir",
  "mv",
  "rm",
  "sed",
  "tail",
  "tee",
  "touch",
)

# Behaves like Python for what setup.sh asks of it and logs what was done.
FAKE_PYTHON = r"""#!/usr/bin/env bash
self="$0"
version="$(cat "$self.version")"
case "$*" in
  --version) echo "Python $version" ;;
  *base_prefix*) echo "$version /somewhere" ;;
  *version_info*) [[ "$version" != 3.[0-9].* && "$version" != 3.10.* ]] ;;
  *ensurepip*) [[ "${FAKE_VENV:-}" != missing ]] ;;
  "-m venv --clear "*)
    echo "venv $version" >>"$FAKE_LOG"
    rm -rf "$4"; mkdir -p "$4/bin"
    touch "$4/pyvenv.cfg"
    cp "$self" "$4/bin/python"; cp "$self.version" "$4/bin/python.version" ;;
  "-m pip --version") ;;
  "-m pip install "*)
    echo "install" >>"$FAKE_LOG"
    printf '%s\n' "${FAKE_PIP_SAYS:-Collecting numpy}"
    exit "${FAKE_PIP_EXIT:-0}" ;;
  "-m cf_jax.main"*)
    shift 2
    printf 'main in %s:' "$PWD"; printf ' <%s>' "$@"; echo
    exit "${FAKE_MAIN_EXIT:-0}" ;;
  *) echo "ran: $*" ;;
esac
"""


class Machine:
  """A checkout's launch folder and a PATH with nothing but basic tools."""

  def __init__(self, folder):
    self.repo = folder / "my repo"  # a space, as in many a home
    self.bin = folder / "bin"
    self.log = folder / "log"
    self.bin.mkdir()
    shutil.copytree(ROOT / "launch", self.repo / "launch")
    (self.repo / "requirements.lock").write_text("numpy==2.4.6 --hash=x\n")
    shutil.copy(ROOT / "pyproject.toml", self.repo)
    for tool in TOOLS:
      (self.bin / tool).symlink_to(shutil.which(tool))

  def add_python(self, version_text, name="python3"):
    path = self.bin / name
    path.write_text(FAKE_PYTHON)
    path.chmod(0o755)
    (self.bin / f"{name}.version").write_text(version_text)

  def run(self, *arguments, script="run.sh", cwd="/", **env):
    self.log.write_text("")
    return subprocess.run(
      [self.bin / "bash", self.repo / "launch" / script, *arguments],
      capture_output=True,
      text=True,
      cwd=cwd,
      timeout=60,
      env={
        "PATH": str(self.bin),
        "HOME": str(self.bin),
        "FAKE_LOG": str(self.log),
      }
      | env,
    )

  def done(self):
    return self.log.read_text().split("\n")[:-1]


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


def one_sentence(ran):
  assert ran.returncode == 1, ran.stdout + ran.stderr
  (line,) = ran.stderr.splitlines()
  assert line.startswith("error: ") and line.endswith(".") or "bash" in line
  return line


# ------------------------------------------------------------ what goes well


def test_without_arguments_the_small_run_starts(machine):
  machine.add_python("3.11.2")
  ran = machine.run()
  assert ran.returncode == 0, ran.stderr
  assert ran.stdout.splitlines()[-1] == (
    f"main in {machine.repo}: <--config=configs/kfgrpo_cpu.py>"
    " <--workdir=runs/kfgrpo_cpu>"
  )
  assert machine.done() == ["venv 3.11.2", "install"]
  assert "-m pip install --require-hashes -r requirements.lock" in ran.stdout


def test_arguments_replace_the_defaults(machine, tmp_path):
  machine.add_python("3.11.2")
  ran = machine.run("--config=a b.py", "--x=*", cwd=tmp_path)
  assert ran.stdout.endswith(
    f"main in {machine.repo}: <--config=a b.py> <--x=*>\n"
  )


def test_the_programs_exit_status_is_passed_on(machine):
  machine.add_python("3.11.2")
  assert machine.run(FAKE_MAIN_EXIT="3").returncode == 3


def test_it_installs_only_when_something_changed(machine):
  machine.add_python("3.11.2")
  machine.run()
  machine.run()
  assert machine.done() == []
  (machine.repo / "requirements.lock").write_text("numpy==2.4.7 --hash=y\n")
  machine.run()
  assert machine.done() == ["install"]
  machine.run()
  assert machine.done() == []


def test_an_interrupted_installation_is_taken_up_again(machine):
  machine.add_python("3.11.2")
  assert machine.run(FAKE_PIP_EXIT="1").returncode == 1
  assert machine.run().returncode == 0
  assert machine.done() == ["install"]


def test_another_interpreter_makes_the_environment_anew(machine):
  machine.add_python("3.11.2")
  machine.add_python("3.12.1", "python3.12")
  machine.run()
  ran = machine.run(PYTHON="python3.12")
  assert machine.done() == ["venv 3.12.1", "install"]
  assert "another Python" in ran.stdout
  machine.run(PYTHON="python3.12")
  assert machine.done() == []
  machine.run()  # no wish: the environment that is there serves
  assert machine.done() == []
  machine.run(PYTHON="python3")
  assert machine.done() == ["venv 3.11.2", "install"]


def test_two_environments_can_stand_side_by_side(machine):
  machine.add_python("3.11.2")
  machine.add_python("3.12.1", "python3.12")
  machine.run()
  machine.run(PYTHON="python3.12", VENV=".venv-3.12")
  assert machine.done() == ["venv 3.12.1", "install"]
  machine.run()
  assert machine.done() == []


def test_an_environment_whose_python_is_gone_is_made_anew(machine):
  machine.add_python("3.11.2")
  machine.run()
  (machine.repo / ".venv" / "bin" / "python").unlink()
  machine.run()
  assert machine.done() == ["venv 3.11.2", "install"]


def test_an_old_python3_is_passed_over_for_a_newer_one(machine):
  machine.add_python("3.9.2")
  machine.add_python("3.12.1", "python3.12")
  assert machine.run().returncode == 0
  assert machine.done() == ["venv 3.12.1", "install"]


def test_a_pyenv_shim_that_is_switched_off_is_resolved(machine):
  shim = machine.bin / "python3.12"
  shim.write_text(
    "#!/usr/bin/env bash\necho 'pyenv: not found' >&2; exit 127\n"
  )
  shim.chmod(0o755)
  versions = machine.bin / ".pyenv" / "versions" / "3.12.1" / "bin"
  versions.mkdir(parents=True)
  machine.add_python("3.12.1", versions / "python3.12")
  ran = machine.run(PYTHON="python3.12")
  assert ran.returncode == 0, ran.stderr
  assert machine.done() == ["venv 3.12.1", "install"]


def test_an_extra_is_installed_once_and_stays(machine):
  machine.add_python("3.11.2")
  machine.run()
  stamp = machine.repo / ".venv" / ".cf_jax_stamp"
  plain = stamp.read_text()
  ran = machine.run(EXTRA="cuda")
  assert ran.returncode == 0, ran.stderr
  assert "-m pip install jax[cuda13]" in ran.stdout
  assert machine.done() == ["install", "install"]  # the lock, and behind it
  assert stamp.read_text() == plain + "extra cuda\n"
  for env in ({"EXTRA": "cuda"}, {}):
    machine.run(**env)
    assert machine.done() == []
  (machine.repo / "requirements.lock").write_text("numpy==2.4.7 --hash=y\n")
  assert "jax[cuda13]" in machine.run().stdout
  line = one_sentence(machine.run(EXTRA="cudda"))
  assert "EXTRA=cudda is no extra" in line


def test_a_machine_without_a_new_python_gets_one(machine):
  """provide_python, with stand-ins for uv, sudo and apt-get."""

  def provide():
    return subprocess.run(
      [
        machine.bin / "bash",
        "-c",
        f"set -eu; source '{machine.repo}/launch/setup.sh';"
        " provide_python; echo chose $PYTHON",
      ],
      env={"PATH": str(machine.bin), "HOME": str(machine.bin)},
      capture_output=True,
      text=True,
    )

  machine.add_python("3.10.12")
  uv = machine.bin / "python3"
  uv.write_text(
    FAKE_PYTHON.replace(
      'case "$*" in',
      'case "$*" in\n  *pip*uv | "-m uv"*) exit 1 ;;',
    )
  )
  sudo = machine.bin / "sudo"
  sudo.write_text(
    "#!/usr/bin/env bash\n"
    '[[ "$*" == *"install python3.12 python3.12-venv" ]] || exit 1\n'
    f"cp {machine.bin}/python3 {machine.bin}/python3.12\n"
    f"echo 3.12.3 >{machine.bin}/python3.12.version\n"
  )
  sudo.chmod(0o755)
  ran = provide()
  assert ran.stdout.endswith("chose python3.12\n"), ran.stdout + ran.stderr
  for path in machine.bin.glob("python3.12*"):
    path.unlink()
  sudo.write_text("#!/usr/bin/env bash\nexit 1\n")
  assert "neither by uv nor by apt-get" in provide().stderr
  # uv comes first.
  machine.add_python("3.12.9", "uvs_python")
  uv.write_text(
    FAKE_PYTHON.replace(
      'case "$*" in',
      'case "$*" in\n  *pip*uv | "-m uv python install"*) touch ~/has_uv ;;\n'
      '  "-m uv python find"*) [[ -e ~/has_uv ]] || exit 1\n'
      f"    echo {machine.bin}/uvs_python ;;",
    )
  )
  for _ in range(2):
    ran = provide()
    assert ran.stdout.endswith(f"chose {machine.bin}/uvs_python\n"), ran.stderr
  assert "installing" not in ran.stdout  # the second time


def test_tests_run_after_lint(machine):
  machine.add_python("3.11.2")
  ran = machine.run("tests/test_a.py", "-k", "x", script="test.sh")
  assert ran.returncode == 0, ran.stderr
  lines = [x for x in ran.stdout.splitlines() if x.startswith("ran:")]
  assert lines == [
    "ran: -m ruff check .",
    "ran: -m ruff format --check .",
    "ran: -m pytest -q -n 2 --dist=loadfile --no-loadscope-reorder"
    " tests/test_a.py -k x",
  ]


def test_ci_calls_the_test_script_and_nothing_else():
  commands = [
    line
    for line in (ROOT / ".ci" / "run").read_text().splitlines()
    if line and not line.startswith("#")
  ]
  assert len(commands) == 1 and commands[0].startswith("exec bash ")
  assert commands[0].endswith('launch/test.sh"')
  assert os.access(ROOT / ".ci" / "run", os.X_OK)


# ------------------------------------------------------------ what goes wrong


def test_no_python(machine):
  assert "no Python found" in one_sentence(machine.run())


def test_an_old_python(machine):
  machine.add_python("3.9.2")
  line = one_sentence(machine.run())
  assert "python3 is Python 3.9.2" in line and "3.11 or newer" in line


def test_a_named_python_that_is_old_or_absent_or_broken(machine):
  machine.add_python("3.11.2")
  machine.add_python("3.10.4", "python3.10")
  line = one_sentence(machine.run(PYTHON="python3.10"))
  assert "PYTHON=python3.10 is Python 3.10.4" in line
  line = one_sentence(machine.run(PYTHON="python3.99"))
  assert "PYTHON=python3.99 is not a program" in line
  broken = machine.bin / "python3.12"
  broken.write_text("#!/usr/bin/env bash\necho 'pyenv: no' >&2; exit 127\n")
  broken.chmod(0o755)
  line = one_sentence(machine.run(PYTHON="python3.12"))
  assert "does not run (pyenv: no)" in line
  assert machine.done() == []


def test_no_venv_module(machine):
  machine.add_python("3.11.2")
  line = one_sentence(machine.run(FAKE_VENV="missing"))
  assert "apt install python3-venv" in line


def test_no_room_before_installing(machine):
  machine.add_python("3.11.2")
  df = machine.bin / "df"
  df.unlink()
  df.write_text(
    "#!/usr/bin/env bash\n"
    "echo 'Filesystem 1024-blocks Used Available Capacity Mounted'\n"
    "echo '/dev/x 9000000 8700000 300000 97% /'\n"
  )
  df.chmod(0o755)
  line = one_sentence(machine.run())
  assert "300 MB are free, 2000 MB are needed" in line
  assert machine.done() == []


@pytest.mark.parametrize(
  "said, words",
  [
    (
      "ERROR: Could not install packages due to an OSError: [Errno 28] No space"
      " left on device",
      "the disk ran full",
    ),
    (
      "WARNING: Retrying after connection broken by 'NewConnectionError(...):"
      " Temporary failure in name resolution'\nERROR: No matching distribution"
      " found for numpy==2.4.6",
      "check the network",
    ),
    (
      "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE FILE",
      "does not match its hash",
    ),
    (
      "ERROR: No matching distribution found for numpy==2.4.6",
      "No matching distribution found for numpy==2.4.6 on Python 3.11.2",
    ),
    ("ERROR: something else", "could not be installed: ERROR: something else"),
  ],
)
def test_pip_fails(machine, said, words):
  machine.add_python("3.11.2")
  line = one_sentence(machine.run(FAKE_PIP_SAYS=said, FAKE_PIP_EXIT="1"))
  assert words in line
  assert (machine.repo / ".venv" / "install.log").read_text() == said + "\n"


def test_a_folder_that_is_no_environment_is_never_emptied(machine):
  machine.add_python("3.11.2")
  kept = machine.repo / "precious" / "file"
  kept.parent.mkdir()
  kept.write_text("mine")
  line = one_sentence(machine.run(VENV="precious"))
  assert "precious is not a virtual environment" in line
  assert kept.read_text() == "mine"


def test_a_checkout_without_lock(machine):
  machine.add_python("3.11.2")
  (machine.repo / "requirements.lock").unlink()
  assert "requirements.lock is missing" in one_sentence(machine.run())


# ------------------------------------------------------------------- the lock


def locked():
  """name -> (requirement, number of hashes) of requirements.lock."""
  text = (ROOT / "requirements.lock").read_text()
  found = {}
  for block in re.split(r"\n(?=[A-Za-z0-9])", text.replace("\\\n", " ")):
    line = block.split("\n")[0]
    if not line.startswith("#"):
      pin = requirements.Requirement(line.split("--hash")[0].strip())
      found[canonical(pin.name)] = (pin, line.count("--hash=sha256:"))
  return found


def canonical(name):
  return re.sub(r"[-_.]+", "-", name).lower()


def wanted():
  import tomllib

  settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
  lines = (ROOT / "requirements.txt").read_text().splitlines()
  lines = [line.split("#")[0].strip() for line in lines]
  return [
    requirements.Requirement(line)
    for line in lines + settings["project"]["optional-dependencies"]["dev"]
    if line
  ]


def test_every_pin_is_exact_and_hashed():
  pins = locked()
  assert len(pins) > 50
  for name, (pin, hashes) in pins.items():
    (spec,) = pin.specifier
    assert spec.operator == "==" and hashes > 0, name


@pytest.mark.parametrize("requirement", wanted(), ids=lambda r: r.name)
def test_the_lock_covers_the_direct_requirements(requirement):
  assert requirement.specifier, f"{requirement.name} has no bound"
  pin, _ = locked()[canonical(requirement.name)]
  (spec,) = pin.specifier
  assert requirement.specifier.contains(spec.version)
  for python in ("3.11", "3.12"):
    assert pin.marker is None or pin.marker.evaluate(
      {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
      }
    )


def test_the_lock_names_no_index():
  text = (ROOT / "requirements.lock").read_text()
  assert not re.search(r"https?://|file:|--index-url|--find-links", text)


def test_this_python_is_one_of_the_supported():
  assert version.Version(".".join(map(str, sys.version_info[:2]))) >= (
    version.Version("3.11")
  )


@pytest.mark.parametrize(
  "name",
  [
    "run.sh",
    "test.sh",
    "setup.sh",
    "audit.sh",
    "keep.sh",
    "local_pod.sh",
    "slurm.sh",
    "tpu_vm.sh",
  ],
)
def test_scripts_parse(name):
  subprocess.run(["bash", "-n", ROOT / "launch" / name], check=True)


# ---------------------------------------------------------------- many machines


def dry(script, *arguments, **env):
  """(exit code, lines said, the error) of a script that must do nothing."""
  ran = subprocess.run(
    ["bash", ROOT / "launch" / script, *arguments],
    capture_output=True,
    text=True,
    timeout=60,
    env={"PATH": os.environ["PATH"], "HOME": "/nowhere"} | env,
  )
  return ran.returncode, ran.stdout.splitlines(), ran.stderr


TPU = dict(
  TPU_NAME="cf", TPU_ZONE="us-east5-a", TPU_TYPE="v6e-64", TPU_BUCKET="runs"
)

WORKDIR = "--workdir=/bucket/runs/x"


@pytest.mark.parametrize(
  ("arguments", "commands"),
  [
    (
      ["create", "--spot", "--dry-run"],
      [
        "gcloud compute tpus tpu-vm create cf --zone=us-east5-a"
        " --accelerator-type=v6e-64 --version=v2-alpha-tpuv6e --spot"
      ],
    ),
    (
      ["create", "--dry-run", "--queued"],
      [
        "gcloud compute tpus queued-resources create cf --node-id=cf"
        " --zone=us-east5-a --accelerator-type=v6e-64"
        " --runtime-version=v2-alpha-tpuv6e"
      ],
    ),
    (
      ["stop", "--dry-run"],
      ["gcloud compute tpus tpu-vm ssh cf --zone=us-east5-a --worker=all"],
    ),
    (
      ["delete", "--dry-run", "--queued"],
      [
        "gcloud compute tpus queued-resources delete cf --zone=us-east5-a"
        " --force --quiet"
      ],
    ),
    (
      ["logs", "--dry-run"],
      ["gcloud compute tpus tpu-vm ssh cf --zone=us-east5-a --worker=0"],
    ),
  ],
)
def test_a_slice_command_by_command(arguments, commands):
  code, said, error = dry("tpu_vm.sh", *arguments, **TPU)
  assert code == 0, error
  ran = [line.removeprefix("+ ") for line in said if line.startswith("+ ")]
  assert len(ran) == len(commands)
  for line, command in zip(ran, commands, strict=True):
    assert line.strip().startswith(command)


def test_a_preempted_slice_is_made_set_up_and_started():
  code, said, error = dry(
    "tpu_vm.sh",
    "keep",
    "--config=a b.py",
    WORKDIR,
    "--spot",
    "--dry-run",
    **TPU,
  )
  assert code == 0, error
  text = "\n".join(said)
  places = [
    text.index(word)
    for word in ("tpu-vm create cf", "code.tgz", "gcsfuse", "keep_running")
  ]
  assert places == sorted(places)
  # The argument is one word on the worker too, through two shells.
  (start,) = (line for line in said if "keep_running" in line)
  (command,) = (
    word.removeprefix("--command=")
    for word in shlex.split(start)
    if word.startswith("--command=")
  )
  inner = shlex.split(command)
  script = inner[inner.index("-c") + 1]
  assert "--config=a b.py" in shlex.split(script)
  assert "--config.distributed=True" in script


def test_secrets_are_named_and_never_said():
  code, said, error = dry(
    "tpu_vm.sh",
    "run",
    "--dry-run",
    "--config=x.py",
    WORKDIR,
    **TPU,
    PASS_ENV="JUDGE_KEY",
    JUDGE_KEY="hunter2",
  )
  assert code == 0
  assert "JUDGE_KEY" in "\n".join(said)
  assert "hunter2" not in "\n".join(said) + error


@pytest.mark.parametrize(
  ("script", "arguments", "env", "words"),
  [
    ("tpu_vm.sh", [], TPU, "create, setup, run"),
    ("tpu_vm.sh", ["create", "--dry-run"], {}, "TPU_NAME is not set"),
    ("tpu_vm.sh", ["run", "--dry-run"], TPU, "say what to run"),
    (
      "tpu_vm.sh",
      ["create", "--dry-run"],
      TPU | {"TPU_TYPE": "v99-8"},
      "TPU_VERSION",
    ),
    (
      "tpu_vm.sh",
      ["run", "--dry-run", "--config=x"],
      TPU | {"PASS_ENV": "NO_SUCH"},
      "NO_SUCH, which is not set",
    ),
    (
      "tpu_vm.sh",
      ["run", "--dry-run", "--config=x"],
      TPU,
      "add --workdir=/bucket/runs/NAME",
    ),
    (
      "tpu_vm.sh",
      ["run", "--dry-run", "--config=x", "--workdir", "runs/x"],
      {k: v for k, v in TPU.items() if k != "TPU_TYPE"},
      "add --workdir=/bucket/runs/NAME",
    ),
    (
      "tpu_vm.sh",
      ["keep", "--dry-run", "--config=x"],
      TPU | {"TPU_TYPE": "v6e-8"},  # one host, but the next slice is another
      "add --workdir=/bucket/runs/NAME",
    ),
    ("slurm.sh", ["--dry-run"], {}, "say what to run"),
    ("slurm.sh", ["--dry-run", "x"], {"NODES": "two"}, "NODES must be"),
    ("local_pod.sh", ["two"], {}, "say how many"),
    # Nothing that is misspelt runs for real.
    ("tpu_vm.sh", ["delete", "--dryrun"], TPU, "did you mean --dry-run?"),
    ("tpu_vm.sh", ["create", "--sopt"], TPU, "takes no argument --sopt"),
    ("tpu_vm.sh", ["create", "spot"], TPU, "takes no argument spot"),
    ("tpu_vm.sh", ["delete", "--spot"], TPU, "--spot means nothing to"),
    ("tpu_vm.sh", ["stop", "--queued"], TPU, "--queued means nothing to"),
    ("tpu_vm.sh", ["keep", "--config=x", "--sopt"], TPU, "--sopt is no arg"),
    ("tpu_vm.sh", ["run", "--config", "x", "y"], TPU, "y is no argument of"),
    ("slurm.sh", ["--config=x", "--dry_run"], {}, "did you mean --dry-run?"),
    ("slurm.sh", ["--config=x", "--nodes=2"], {}, "--nodes=2 is no argument"),
    ("local_pod.sh", ["2", "--dryrun"], {}, "did you mean --dry-run?"),
    ("run.sh", ["--dry_run"], {}, "did you mean --dry-run?"),
    ("test.sh", ["--dryrun"], {}, "did you mean --dry-run?"),
    ("audit.sh", ["--all"], {}, "takes no argument --all"),
  ],
)
def test_what_is_missing_is_one_sentence(script, arguments, env, words):
  code, _, error = dry(script, *arguments, **env)
  assert code == 1
  (line,) = error.splitlines()
  assert line.startswith("error: ") and words in line


def test_one_host_needs_no_shared_workdir():
  code, said, error = dry(
    "tpu_vm.sh",
    "run",
    "--config",
    "x.py",
    "--config.rl.steps",
    "5",
    "--noconfig.a",
    "--dry-run",
    **TPU | {"TPU_TYPE": "v6e-8"},
  )
  assert code == 0, error
  assert any("--config.rl.steps 5" in line.replace("\\", "") for line in said)


@pytest.mark.parametrize(
  ("script", "arguments", "words"),
  [
    ("run.sh", ["--config=x.py", "--dry-run"], "-m cf_jax.main --config=x.py"),
    ("test.sh", ["--dry-run"], "+ pip-audit -r requirements.lock"),
    (
      "test.sh",
      ["tests/x.py", "--dry-run"],
      "loadscope-reorder tests/x.py",
    ),
    ("audit.sh", ["--dry-run"], "+ detect-secrets-hook"),
    ("slurm.sh", ["--config=x.py", "--dry-run"], "+ sbatch --nodes=1"),
    ("local_pod.sh", ["2", "--config=x.py", "--dry-run"], "JAX_PROCESS_ID=1"),
    ("local_pod.sh", ["--dry-run", "2"], "JAX_PROCESS_ID=1"),
  ],
)
def test_a_dry_run_prints_and_does_nothing(tmp_path, script, arguments, words):
  shutil.copytree(ROOT / "launch", tmp_path / "launch")
  shutil.copy(ROOT / "requirements.lock", tmp_path)
  before = sorted(tmp_path.rglob("*"))
  ran = subprocess.run(
    ["bash", tmp_path / "launch" / script, *arguments],
    capture_output=True,
    text=True,
    env={"PATH": os.environ["PATH"], "HOME": "/nowhere"},
  )
  assert ran.returncode == 0, ran.stderr
  assert words in ran.stdout and "dry-run" not in ran.stdout
  assert sorted(tmp_path.rglob("*")) == before


# What cf_jax.main does here: a line of `plan` for each start (or, in Slurm, for
# each process), an exit code, or `wait` for SIGTERM, which it answers with 75.
FAKE_MAIN = r"""#!/usr/bin/env bash
case "$*" in
  *base_prefix*) echo "3.12.0 /somewhere"; exit ;;
  "-m cf_jax.main"*) ;;
  *) exit 0 ;;
esac
plan="$FAKE/plan"
echo "start ${SLURM_PROCID:-}" >>"$FAKE/starts"
n="$(wc -l <"$FAKE/starts")"
code="$(sed -n "$((${SLURM_PROCID:-n - 1} + 1))p" "$plan")"
if [[ "$code" == wait ]]; then
  trap 'exit 75' TERM
  echo ready >>"$FAKE/ready"
  for ((i = 0; i < 300; i++)); do sleep 0.1; done
  exit 99
fi
exit "$code"
"""

# A cloud of one worker, whose home is $FAKE/home: commands run there for real.
# `describe`, `create` and `setup` answer with the next line of their file;
# !WORDS is an error. The last line stays.
FAKE_GCLOUD = r"""#!/usr/bin/env bash
answer() {
  local line
  line="$(head -n 1 "$FAKE/$1")"
  [[ "$(wc -l <"$FAKE/$1")" == 1 ]] || sed -i 1d "$FAKE/$1"
  if [[ "$line" == !* ]]; then
    echo "ERROR: (gcloud) ${line#!}" >&2
    exit 1
  fi
  echo "$line"
}
case "$*" in
  *"tpu-vm describe"*) answer states ;;
  *"queued-resources describe"*) answer queue ;;
  *create*) echo create >>"$FAKE/done"; answer creates ;;
  *delete*) echo "delete $3" >>"$FAKE/done" ;;
  *" scp "*) ;;
  *code.tgz*) echo setup >>"$FAKE/done"; answer setups ;;
  *gcsfuse*) echo mount >>"$FAKE/done" ;;
  *" ssh "*)
    cd "$FAKE/home"
    command="${!#}"
    HOME="$FAKE/home" bash -c "${command#--command=}" ;;
esac
"""

FAKE_SLURM = {
  # As the real one: a SIGTERM of its own kills all tasks.
  "srun": r"""#!/usr/bin/env bash
[[ "$1" == --kill-on-bad-exit=0 ]] || exit 64
shift
pids=()
trap 'kill -KILL "${pids[@]}"' TERM
for rank in 0 1; do
  SLURM_PROCID=$rank setsid "$@" &
  pids+=("$!")
done
echo "${pids[@]}" >"$FAKE/pids"
highest=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  ((code <= highest)) || highest=$code
done
exit "$highest"
""",
  "scancel": r"""#!/usr/bin/env bash
[[ "$*" == "--signal=TERM 7" ]] || exit 64
for pid in $(<"$FAKE/pids"); do kill -TERM -- "-$pid"; done
""",
  "scontrol": r"""#!/usr/bin/env bash
echo "$*" >>"$FAKE/done"
""",
  "squeue": r"""#!/usr/bin/env bash
[[ "$*" == "-h -j 7 -o %T" ]] || exit 64
echo "${SLURM_STATE:-RUNNING}"
""",
}


class Cloud:
  """A cloud, or a cluster, of stand-ins."""

  def __init__(self, folder):
    self.folder = folder
    self.repo = folder / "home" / "cf_jax"
    shutil.copytree(ROOT / "launch", self.repo / "launch")
    (self.repo / "requirements.lock").write_text("numpy==2.4.6 --hash=x\n")
    self.write("home/cf_jax/.venv/bin/python", FAKE_MAIN)
    self.write("bin/gcloud", FAKE_GCLOUD)
    self.write("bin/git", "#!/usr/bin/env bash\nprintf 'launch/run.sh\\0'\n")
    for name, text in FAKE_SLURM.items():
      self.write(f"bin/{name}", text)
    self.env = TPU | {
      "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
      "HOME": "/nowhere",
      "FAKE": str(folder),
      "WATCH_EVERY_S": "0.1",
      "RESTART_AFTER_S": "0",
    }

  def write(self, name, text):
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

  def plan(self, **answers):
    for name, lines in answers.items():
      self.write(name, "".join(f"{line}\n" for line in lines))

  def start(self, script, *arguments, **env):
    return subprocess.Popen(
      ["bash", self.repo / "launch" / script, *arguments],
      env=self.env | env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def run(self, script, *arguments, **env):
    running = self.start(script, *arguments, **env)
    try:
      said, _ = running.communicate(timeout=60)
    finally:
      running.kill()
    return running.returncode, said

  def read(self, name):
    path = self.folder / name
    return path.read_text().splitlines() if path.exists() else []

  def wait_for(self, name, words, count=1):
    for _ in range(200):
      if sum(words in line for line in self.read(name)) >= count:
        return
      time.sleep(0.1)
    raise AssertionError(f"{name}: {self.read(name)}")


@pytest.fixture
def cloud(tmp_path):
  return Cloud(tmp_path)


def test_keep_waits_out_what_passes_and_ends_with_the_runs_code(cloud):
  gone = "!NOT_FOUND: Resource 'projects/p/nodes/cf' was not found"
  cloud.plan(
    states=[gone, "!UNAVAILABLE: try later", gone, "CREATING", "READY"],
    creates=["!there is no more capacity in the zone", "made"],
    setups=["!ssh: connect: Connection refused", "done"],
    plan=["9", "2"],
  )
  code, said = cloud.run("tpu_vm.sh", "keep", "--config=x.py", WORKDIR)
  assert code == 2, said
  assert cloud.read("done") == ["create", "create", "setup", "setup", "mount"]
  assert len(cloud.read("starts")) == 2  # keep.sh, after the crash
  assert "UNAVAILABLE: try later" in said and "exit code 2" in said


def test_keep_makes_a_slice_anew_that_was_taken(cloud):
  cloud.plan(
    states=["PREEMPTED", "!NOT_FOUND: x", "READY"],
    creates=["made"],
    setups=["done"],
    plan=["0"],
  )
  code, said = cloud.run("tpu_vm.sh", "keep", "--config=x.py", WORKDIR)
  assert code == 0, said
  assert cloud.read("done") == ["delete tpu-vm", "create", "setup", "mount"]


def test_keep_deletes_a_queued_resource_whose_slice_is_gone(cloud):
  gone = "!NOT_FOUND: x"
  cloud.plan(
    states=[gone] * 5 + ["READY"],
    queue=["SUSPENDED", gone, "WAITING_FOR_RESOURCES", "!DEADLINE", "ACTIVE"],
    creates=["queued"],
    setups=["done"],
    plan=["75"],
  )
  code, said = cloud.run("tpu_vm.sh", "keep", "--queued", "--config=x", WORKDIR)
  assert code == 75, said  # still there a while later: it was not preempted
  assert cloud.read("done") == [
    "delete queued-resources",
    "create",
    "setup",
    "mount",
  ]


def test_a_run_is_stopped_and_started_once(cloud):
  cloud.plan(states=["READY"], plan=["wait"])
  arguments = ["--config=x.py", WORKDIR]
  code, said = cloud.run("tpu_vm.sh", "run", *arguments)
  assert code == 0, said
  cloud.wait_for("ready", "ready")
  _, said = cloud.run("tpu_vm.sh", "run", *arguments)
  assert "a run is here already" in said
  _, said = cloud.run("tpu_vm.sh", "stop")
  assert "asked to save and stop" in said
  cloud.wait_for("home/cf_jax.log", "exit code 75")
  assert len(cloud.read("starts")) == 1
  _, said = cloud.run("tpu_vm.sh", "stop")
  assert "nothing runs here" in said
  code, _ = cloud.run("tpu_vm.sh", "keep", *arguments)
  assert code == 75  # at once: it was asked to


def test_a_run_that_waits_for_its_next_start_is_stopped_too(cloud):
  cloud.plan(plan=["9", "wait"])
  cloud.run("tpu_vm.sh", "run", "--config=x", WORKDIR, RESTART_AFTER_S="4")
  cloud.wait_for("home/cf_jax.log", "starting again")
  _, said = cloud.run("tpu_vm.sh", "stop")
  assert "ends instead" in said
  cloud.wait_for("home/cf_jax.log", "exit code 75")
  assert len(cloud.read("starts")) == 1


@pytest.mark.parametrize(
  ("plan", "env", "ends", "requeued"),
  [
    (["0", "0"], {}, 0, False),
    (["2", "137"], {}, 2, False),  # yours to put right, whoever else died
    (["76", "1"], {}, 0, True),  # a crash
    (["76", "1"], {"SLURM_RESTART_COUNT": "20"}, 76, False),
    (["75", "75"], {}, 0, True),  # preempted: Slurm told the processes alone
    (["75", "75"], {"SLURM_STATE": "CANCELLED"}, 75, False),
  ],
)
def test_a_slurm_job_is_put_back_where_that_helps(
  cloud, plan, env, ends, requeued
):
  cloud.plan(plan=plan)
  code, said = cloud.run(
    "slurm.sh",
    "--config=x.py",
    SLURM_JOB_ID="7",
    CF_JAX_ROOT=str(cloud.repo),
    **env,
  )
  assert code == ends, said
  assert cloud.read("done") == (["requeue 7"] if requeued else [])


def test_a_slurm_job_whose_time_is_up_saves_first(cloud):
  cloud.plan(plan=["wait", "wait"])
  job = cloud.start(
    "slurm.sh", "--config=x.py", SLURM_JOB_ID="7", CF_JAX_ROOT=str(cloud.repo)
  )
  cloud.wait_for("ready", "ready", 2)
  job.send_signal(signal.SIGTERM)
  said, _ = job.communicate(timeout=60)
  assert job.returncode == 0 and "Killed" not in said, said
  assert cloud.read("done") == ["requeue 7"]


def test_slurm_submits_itself_and_starts_a_process_for_each_gpu():
  code, said, error = dry(
    "slurm.sh",
    "--dry-run",
    "--config=a b.py",
    NODES="2",
    GPUS="4",
    PARTITION="gpu",
    SBATCH_EXTRA="--mem=0",
  )
  assert code == 0, error
  submit, start = (shlex.split(line) for line in said if line[0] == "+")
  for word in (
    "--nodes=2",
    "--ntasks-per-node=4",
    "--gpus-per-node=4",
    "--partition=gpu",
    "--mem=0",
    "--config=a b.py",
  ):
    assert word in submit
  assert start[1] == "srun" and start[-2:] == [
    "--config=a b.py",
    "--config.distributed=True",
  ]
  directives = (ROOT / "launch" / "slurm.sh").read_text()
  assert "#SBATCH --requeue" in directives and "--signal=B:TERM" in directives


@pytest.mark.parametrize(
  ("codes", "ends", "starts"),
  [
    ((0,), 0, 1),
    ((9, 1, 0), 0, 3),  # two crashes
    ((9, 2), 2, 2),  # something the user has to put right
    ((75,), 75, 1),  # was asked to stop
    ((9, 9, 9, 9, 9), 9, 4),  # RESTARTS=3
  ],
)
def test_a_crash_is_started_again_and_a_mistake_is_not(
  tmp_path, codes, ends, starts
):
  log = tmp_path / "log"
  (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
  (tmp_path / "program").write_text(
    f"""n=$(wc -l <{log} 2>/dev/null || echo 0)
echo started >>{log}
exit $(sed -n "$((n + 1))p" {tmp_path / "codes"})
"""
  )
  ran = subprocess.run(
    [
      "bash",
      "-c",
      f"set -e; source {ROOT / 'launch' / 'keep.sh'};"
      f" keep_running bash {tmp_path / 'program'}",
    ],
    env={"PATH": os.environ["PATH"], "RESTARTS": "3", "RESTART_AFTER_S": "0"},
    capture_output=True,
    text=True,
  )
  assert ran.returncode == ends
  assert len(log.read_text().splitlines()) == starts


def test_processes_of_a_pod_know_each_other(machine):
  """For real, with a stand-in for Python."""
  machine.add_python("3.11.2")
  for tool in ("env", "seq", "sleep"):
    (machine.bin / tool).symlink_to(shutil.which(tool))
  ran = machine.run("3", "--config=x.py", script="local_pod.sh", PORT="29511")
  assert ran.returncode == 0, ran.stderr
  for rank in range(3):
    assert f"JAX_NUM_PROCESSES=3 JAX_PROCESS_ID={rank}" in ran.stdout
    log = machine.repo / "runs" / "pod_logs" / f"{rank}.log"
    assert log.read_text().endswith(
      "<--config=x.py> <--config.distributed=True>\n"
    )


def test_a_pod_ends_with_the_code_of_what_failed(machine):
  machine.add_python("3.11.2")
  (machine.bin / "env").symlink_to(shutil.which("env"))
  ran = machine.run(
    "2", "--config=x.py", script="local_pod.sh", PORT="1", FAKE_MAIN_EXIT="2"
  )
  assert ran.returncode == 2
  assert "the last lines of each process" in ran.stdout


@pytest.mark.parametrize("restarts", ["0", "3"])
def test_a_pod_that_is_stopped_saves_and_is_not_started_again(cloud, restarts):
  cloud.plan(plan=["wait", "wait"])
  stamp = subprocess.run(
    ["bash", "-c", "source launch/setup.sh; wanted_stamp"],
    cwd=cloud.repo,
    env=cloud.env,
    capture_output=True,
    text=True,
  ).stdout
  cloud.write("home/cf_jax/.venv/.cf_jax_stamp", stamp)
  pod = cloud.start(
    "local_pod.sh", "2", "--config=x", PORT="1", RESTARTS=restarts
  )
  cloud.wait_for("ready", "ready", 2)
  pod.send_signal(signal.SIGTERM)
  said, _ = pod.communicate(timeout=60)
  assert pod.returncode == 75, said
  assert len(cloud.read("starts")) == 2
