#!/usr/bin/env bash
# Runs an experiment on this machine; sets everything up the first time.
#
#   bash launch/run.sh                                  the small run on a CPU
#   bash launch/run.sh --config=configs/kfgrpo_cpu.py:smoke
#   bash launch/run.sh --dry-run ...                    only prints the commands
#   EXTRA=cuda bash launch/run.sh ...                   on GPUs; tpu on TPUs
#   PYTHON=python3.12 bash launch/run.sh ...            see setup.sh
#
# Arguments go to `python -m cf_jax.main` as they are; relative paths count from
# the repository's root. The same command again continues an interrupted run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

own_flags "dry-run" "$@"
set -- "${REST[@]}"
if [[ $# -eq 0 ]]; then
  set -- --config=configs/kfgrpo_cpu.py --workdir=runs/kfgrpo_cpu
fi
set_up
# Huge pages for the compiler's big temporary buffers: fresh memory is what a
# step on a CPU waits for (docs/results.md).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
say "+ cd $ROOT"
say "+ $VENV_PYTHON -m cf_jax.main $*"
[[ $DRY == no ]] || exit 0
exec "$VENV_PYTHON" -m cf_jax.main "$@"
