# Sourced by the other scripts: makes .venv and installs requirements.lock.
#
#   PYTHON=python3.12   which interpreter (default: the one .venv has, else the
#                       first of python3, python3.12, ... that is new enough)
#   VENV=.venv-3.12     where the environment lies (default: .venv)
#
# Nothing is installed when the lock and the interpreter are those of the last
# time. An interrupted installation is taken up again.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
VENV="${VENV:-.venv}"
[[ "$VENV" == /* ]] || VENV="$ROOT/$VENV"
VENV_PYTHON="$VENV/bin/python"
LOCK="$ROOT/requirements.lock"
STAMP="$VENV/.cf_jax_stamp"
LOG="$VENV/install.log"
NEEDED_KB=2000000  # downloads, their unpacked form and the compiled modules

say() { printf '%s\n' "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Prints a command as it can be typed, then becomes it.
run() {
  say "+ $(printf '%q ' "$@")"
  "$@"
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

# pip's long output goes to a log; the terminal shows the package at hand.
install_lock() {
  local count
  count="$(grep -c '^[a-zA-Z0-9].*==' "$LOCK" || true)"
  say "+ $VENV_PYTHON -m pip install --require-hashes -r requirements.lock"
  say "  $count packages, about 300 MB to download; the log is $LOG"
  if [[ -t 1 ]]; then
    "$VENV_PYTHON" -m pip install --require-hashes --progress-bar off \
      -r "$LOCK" 2>&1 | tee "$LOG" | awk '
        /^(Collecting|Installing)/ { printf "\r\033[K  %.70s", $0; fflush() }
        END { printf "\r\033[K" }'
  else
    "$VENV_PYTHON" -m pip install --require-hashes --progress-bar off \
      -r "$LOCK" >"$LOG" 2>&1
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
}

set_up() {
  [[ -f "$LOCK" ]] || die "$LOCK is missing; this checkout is not whole."
  unset PYTHONHOME
  local usable=no
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
  if [[ $usable == yes && -f "$STAMP" && "$(<"$STAMP")" == "$(wanted_stamp)" ]]; then
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
  rm -f "$STAMP"
  install_lock
  wanted_stamp >"$STAMP.new"
  mv "$STAMP.new" "$STAMP"  # last: its absence means "not finished"
}
