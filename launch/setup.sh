# Sourced by the other scripts: makes .venv and installs requirements.lock.
#
#   PYTHON=python3.12   which interpreter (default: the one .venv has, else the
#                       first of python3, python3.12, ... that is new enough)
#   VENV=.venv-3.12     where the environment lies (default: .venv)
#   EXTRA=cuda          an extra of pyproject.toml, behind the lock: cuda, tpu.
#                       The environment keeps it: say it once
#
# Nothing is installed when the lock, the interpreter and the extra are those of
# the last time. An interrupted installation is taken up again.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
VENV="${VENV:-.venv}"
[[ "$VENV" == /* ]] || VENV="$ROOT/$VENV"
VENV_PYTHON="$VENV/bin/python"
LOCK="$ROOT/requirements.lock"
STAMP="$VENV/.cf_jax_stamp"
LOG="$VENV/install.log"
NEEDED_KB=2000000  # downloads, their unpacked form and the compiled modules

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "error: bash 4.4 or newer is needed, this is $BASH_VERSION" >&2
  exit 1
}

say() { printf '%s\n' "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

DRY=no

# Prints a command as it can be typed, then runs it; a dry run only prints.
run() {
  say "+ $(printf '%q ' "$@")"
  [[ $DRY == yes ]] || "$@"
}

# own_flags "NAME ..." "$@": a script's own flags, which may stand anywhere
# before a `--`, are in FLAGS then; --dry-run sets DRY; the others are in REST.
own_flags() {
  local names=" $1 " word name
  shift
  FLAGS=" " REST=()
  while (($#)) && [[ "$1" != -- ]]; do
    word="${1#--}"
    if [[ "$1" == --* && "$names" == *" $word "* ]]; then
      FLAGS+="$word "
    else
      for name in $names; do  # --dryrun must not run for real
        word="${1//[-_]/}"
        [[ "$1" != -* || "${word,,}" != "${name//-/}" ]] \
          || die "$1 is not known; did you mean --$name?"
      done
      REST+=("$1")
    fi
    shift
  done
  [[ $# -eq 0 ]] || shift
  REST+=("$@")
  if has dry-run; then DRY=yes; fi
}

has() { [[ "$FLAGS" == *" $1 "* ]]; }

# Are these words arguments of cf_jax.main? What it would refuse after minutes
# in a queue or on a slice that is paid for is refused here.
check_main_arguments() {
  local word
  while (($#)); do
    word="$1"
    shift
    case "$word" in
      --config=* | --config.* | --noconfig.* | --workdir=*) ;;
      --config | --workdir)
        (($#)) || die "$word needs a value."
        shift
        continue
        ;;
      --v=* | --verbosity=* | --stderrthreshold=* | --log_dir=*) ;;
      --logtostderr* | --alsologtostderr* | --showprefixforinfo*) ;;
      --flagfile=* | --undefok=* | --only_check_args | --pdb* | --jax_*) ;;
      *) die "$word is no argument of $(basename "$0") and none of cf_jax.main (--config=..., --config.NAME=..., --workdir=...)." ;;
    esac
    # `--config.name value`, in two words.
    if [[ "$word" == --config.* && "$word" != *=* && "${1:---}" != --* ]]; then
      shift
    fi
  done
}

# "3.12.1 /where/it/lies" of an interpreter; the place tells two builds apart.
identity() {
  "$1" -c 'import os, platform, sys
print(platform.python_version(), os.path.realpath(sys.base_prefix))' 2>/dev/null
}

new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Sets CHOSEN to the interpreter to build with.
choose_python() {
  local name said
  if [[ -n "${PYTHON:-}" ]]; then
    command -v "$PYTHON" >/dev/null \
      || die "PYTHON=$PYTHON is not a program on this machine; name a Python 3.11 or newer, or leave PYTHON unset."
    if ! said="$("$PYTHON" --version 2>&1)"; then
      # A pyenv shim answers only for the versions that are switched on.
      name="$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/"$PYTHON" 2>/dev/null | tail -n 1 || true)"
      [[ -n "$name" ]] && new_enough "$name" \
        || die "PYTHON=$PYTHON does not run (${said%%$'\n'*}); name a Python 3.11 or newer, or leave PYTHON unset."
      CHOSEN="$name"
      return
    fi
    new_enough "$PYTHON" \
      || die "PYTHON=$PYTHON is $said, but 3.11 or newer is needed; name another one."
    CHOSEN="$PYTHON"
    return
  fi
  for name in python3 python3.12 python3.11 python3.13 python3.14 python; do
    if command -v "$name" >/dev/null && new_enough "$name"; then
      CHOSEN="$name"
      return
    fi
  done
  if command -v python3 >/dev/null && said="$(python3 --version 2>&1)"; then
    die "python3 is $said, but 3.11 or newer is needed; install one, or name it: PYTHON=/path/to/python3.12 bash $0"
  fi
  die "no Python found; install Python 3.11 or newer (Debian: apt install python3 python3-venv), or name it: PYTHON=/path/to/python3 bash $0"
}

check_disk() {
  local free_kb
  free_kb="$(df -Pk "$ROOT" 2>/dev/null | awk 'NR == 2 { print $4 }' || true)"
  if [[ "$free_kb" =~ ^[0-9]+$ ]] && ((free_kb < NEEDED_KB)); then
    die "not enough disk space in $ROOT: $((free_kb / 1000)) MB are free, $((NEEDED_KB / 1000)) MB are needed to install."
  fi
}

make_venv() {
  "$CHOSEN" -c 'import ensurepip, venv' 2>/dev/null \
    || die "$CHOSEN has no venv module; install it (Debian: apt install python3-venv) and run this again."
  # --clear empties the folder: only ever one that holds an environment.
  if [[ -n "$(ls -A "$VENV" 2>/dev/null || true)" && ! -f "$VENV/pyvenv.cfg" ]]; then
    die "$VENV is not a virtual environment; remove it, or name another folder: VENV=.venv-2 bash $0"
  fi
  say "+ $CHOSEN -m venv --clear $VENV"
  local said
  said="$("$CHOSEN" -m venv --clear "$VENV" 2>&1)" || {
    rm -rf "$VENV"  # half an environment; and its room is needed
    [[ "$said" == *"No space left"* ]] \
      && die "the disk is full: $VENV could not be made; free about $((NEEDED_KB / 1000)) MB."
    check_disk
    die "$VENV could not be made: ${said##*$'\n'}"
  }
}

install_lock() {
  local count
  count="$(grep -c '^[a-zA-Z0-9].*==' "$LOCK" || true)"
  say "+ $VENV_PYTHON -m pip install --require-hashes -r requirements.lock"
  say "  $count packages, about 300 MB to download; the log is $LOG"
  pip_install --require-hashes -r "$LOCK"
}

# The packages of an extra, as pyproject.toml names them; "" of none.
packages_of() {
  local line
  line="$(sed -n "s/^$1 = \[\(.*\)\].*/\1/p" "$ROOT/pyproject.toml" 2>/dev/null || true)"
  say "${line//[\",]/}"
}

# jax stays the lock's; its extra asks for the plugins of just that version.
install_extra() {
  local -a packages
  read -r -a packages <<<"$(packages_of "$1")"
  say "+ $VENV_PYTHON -m pip install ${packages[*]}"
  say "  the extra $1 of pyproject.toml; the log is $LOG"
  pip_install "${packages[@]}"
}

# pip's long output goes to a log; the terminal shows the package at hand.
pip_install() {
  if [[ -t 1 ]]; then
    "$VENV_PYTHON" -m pip install --progress-bar off "$@" 2>&1 \
      | tee "$LOG" | awk '
        /^(Collecting|Installing)/ { printf "\r\033[K  %.70s", $0; fflush() }
        END { printf "\r\033[K" }'
  else
    "$VENV_PYTHON" -m pip install --progress-bar off "$@" >"$LOG" 2>&1
  fi && return

  if grep -qi 'No space left on device' "$LOG"; then
    die "the disk ran full while installing; free about $((NEEDED_KB / 1000)) MB and run this again."
  elif grep -qiE 'name resolution|Name or service not known|NewConnectionError|Failed to establish a new connection|ConnectTimeout|Network is unreachable|ProxyError|Connection refused|Read timed out' "$LOG"; then
    die "the packages could not be downloaded: no connection to the package index; check the network (or pip's index and proxy settings) and run this again."
  elif grep -qi 'DO NOT MATCH THE HASHES' "$LOG"; then
    die "a downloaded package does not match its hash in requirements.lock; clear pip's cache ($VENV_PYTHON -m pip cache purge) and run this again."
  elif grep -q 'No matching distribution' "$LOG"; then
    die "$(grep -m 1 -o 'No matching distribution.*' "$LOG") on $("$VENV_PYTHON" --version); try PYTHON=python3.12, and see $LOG."
  fi
  die "the packages could not be installed: $(grep -m 1 '^ERROR' "$LOG" || tail -n 1 "$LOG"); see $LOG."
}

# What the environment was built from; equal means nothing is to be done.
wanted_stamp() {
  identity "$VENV_PYTHON"
  cksum <"$LOCK"
  [[ -z "${1:-}" ]] || say "extra $1"
}

# A machine that is ours alone and has sudo (a TPU VM): sets PYTHON to one that
# is new enough and has venv, and installs one where there is none. uv's comes
# first: it needs no root, and 22.04's own python3.11 is a release candidate.
provide_python() {
  local name
  [[ -x "$VENV_PYTHON" ]] && new_enough "$VENV_PYTHON" && return
  find_python && return
  say "no Python 3.11 or newer with venv here: installing one"
  if python3 -m pip install -q --user uv \
    && python3 -m uv python install 3.12 \
    && name="$(python3 -m uv python find --python-preference only-managed 3.12)" \
    && has_venv "$name"; then
    PYTHON="$name"
    return
  fi
  # A fresh VM updates itself: wait for its lock.
  local -a get=(sudo DEBIAN_FRONTEND=noninteractive apt-get -qy -o "DPkg::Lock::Timeout=600")
  "${get[@]}" update || true
  for name in python3 python3.12 python3.11; do
    "${get[@]}" install "$name" "$name-venv" && find_python && return
  done
  die "no Python 3.11 or newer could be installed, neither by uv nor by apt-get; install one with its venv module on every worker, and run this again."
}

has_venv() { new_enough "$1" && "$1" -c 'import ensurepip, venv' 2>/dev/null; }

find_python() {
  local name
  for name in python3 python3.12 python3.11 python3.13 python3.14; do
    if command -v "$name" >/dev/null && has_venv "$name"; then
      PYTHON="$name"
      return
    fi
  done
  # What uv has installed before.
  name="$(python3 -m uv python find --python-preference only-managed 3.12 2>/dev/null)" \
    && has_venv "$name" && PYTHON="$name"
}

set_up() {
  [[ -f "$LOCK" ]] || die "$LOCK is missing; this checkout is not whole."
  if [[ $DRY == yes ]]; then
    say "  (into $VENV, unless it is there: requirements.lock${EXTRA:+ and the extra $EXTRA})"
    return
  fi
  unset PYTHONHOME
  local usable=no extra="${EXTRA:-}"
  if [[ -n "$extra" && -z "$(packages_of "$extra")" ]]; then
    die "EXTRA=$extra is no extra of pyproject.toml; name cuda or tpu."
  fi
  if [[ -x "$VENV_PYTHON" ]] && new_enough "$VENV_PYTHON"; then
    usable=yes
  fi
  if [[ $usable == no || -n "${PYTHON:-}" ]]; then
    choose_python
    if [[ $usable == yes && "$(identity "$CHOSEN")" != "$(identity "$VENV_PYTHON")" ]]; then
      say "$VENV is of another Python ($("$VENV_PYTHON" --version)): making it anew"
      usable=no
    fi
  fi
  if [[ -z "$extra" && -f "$STAMP" ]]; then  # no wish: what is there stays
    extra="$(sed -n 's/^extra //p' "$STAMP")"
  fi
  if [[ $usable == yes && -f "$STAMP" && "$(<"$STAMP")" == "$(wanted_stamp "$extra")" ]]; then
    return
  fi
  check_disk
  if [[ $usable == yes ]] && ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
    usable=no  # was interrupted before pip was in it
    choose_python
  fi
  if [[ $usable == no ]]; then
    make_venv
  fi
  # Where only the extra is missing, pip finds the packages of the lock there.
  rm -f "$STAMP"
  install_lock
  [[ -z "$extra" ]] || install_extra "$extra"
  wanted_stamp "$extra" >"$STAMP.new"
  mv "$STAMP.new" "$STAMP"  # last: its absence means "not finished"
}
