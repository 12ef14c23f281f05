#!/usr/bin/env bash
# Lint, tests and an audit (launch/audit.sh), as CI runs them; sets everything up
# the first time.
#
#   bash launch/test.sh                     everything
#   bash launch/test.sh tests/test_tad.py   arguments go to pytest
#   bash launch/test.sh --dry-run           only prints the commands
#   AUDIT=0 bash launch/test.sh             without the audit
#   TEST_WORKERS=0 bash launch/test.sh --pdb ...   in one process
#   PYTHON=python3.12 VENV=.venv-3.12 bash launch/test.sh   see setup.sh
#
# `ruff check --fix . && ruff format .` repairs most of what lint finds.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

own_flags "dry-run" "$@"
set -- "${REST[@]}"
set_up
run "$VENV_PYTHON" -m ruff check .
run "$VENV_PYTHON" -m ruff format --check .
if [[ $# -eq 0 && "${AUDIT:-1}" != 0 ]]; then
  if [[ $DRY == yes ]]; then dry=--dry-run; else dry=; fi
  bash "$ROOT/launch/audit.sh" $dry
fi
run "$VENV_PYTHON" -m pytest -q -n "${TEST_WORKERS:-2}" --dist=loadfile \
  --no-loadscope-reorder "$@"
