#!/usr/bin/env bash
#SBATCH --job-name=cf_jax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm_%j.log
#SBATCH --signal=B:TERM@180
# GPUs of a Slurm cluster: one process for each GPU, on as many nodes as asked.
#
#   NODES=2 GPUS=8 bash launch/slurm.sh --config=configs/kfgrpo_gpu.py ...
#   ... bash launch/slurm.sh --dry-run --config=...   only prints the commands
#   TIME=12:00:00       wall time of one job (default)
#   PARTITION=, ACCOUNT=, QOS=   given to sbatch where set
#   SBATCH_EXTRA="--mem=0 --exclusive"   further words for sbatch
#
# On a login node it submits itself; within the job it starts the processes.
# Batch sizes of a config are those of the whole run. The environment is set up
# by the login node: .venv must lie on a shared disk, and so must the workdir.
# Three minutes before its time is up, and when it is preempted, the job is
# asked to save and stop, and is put back into the queue;
# a crash puts it back too, RESTARTS times (20).
set -euo pipefail
if [[ -n "${SLURM_JOB_ID:-}" ]]; then
  # Slurm runs a copy of this file.
  HERE="${CF_JAX_ROOT:?CF_JAX_ROOT is set by launch/slurm.sh on the login node}/launch"
else
  HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
fi
source "$HERE/setup.sh"
source "$HERE/keep.sh"

DRY=no
if [[ "${1:-}" == --dry-run ]]; then
  DRY=yes
  shift
fi
[[ $# -gt 0 ]] || die "say what to run: bash launch/slurm.sh --config=configs/kfgrpo_gpu.py ..."
NODES="${NODES:-1}"
GPUS="${GPUS:-8}"
for name in NODES GPUS; do
  [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || die "$name must be a number of at least 1, got '${!name}'."
done

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
  submit=(
    sbatch --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS"
    --time="${TIME:-12:00:00}"
  )
  for name in PARTITION ACCOUNT QOS; do
    [[ -z "${!name:-}" ]] || submit+=("--${name,,}=${!name}")
  done
  read -r -a extra <<<"${SBATCH_EXTRA:-}"
  # The job inherits the environment, secrets too: none is an argument.
  submit+=(
    "${extra[@]}"
    "--export=ALL,CF_JAX_ROOT=$ROOT,NODES=$NODES,GPUS=$GPUS"
    "$HERE/slurm.sh" "$@"
  )
  if [[ $DRY == yes ]]; then
    say "+ $(printf '%q ' "${submit[@]}")"
    say "  and in the job:"
    say "+ srun --kill-on-bad-exit=1 $VENV_PYTHON -m cf_jax.main $(printf '%q ' "$@" --config.distributed=True)"
    exit
  fi
  command -v sbatch >/dev/null || die "there is no sbatch on this machine; run this on a login node of a Slurm cluster."
  set_up
  mkdir -p runs
  run "${submit[@]}"
  exit
fi

cd "$ROOT"
start=(
  srun --kill-on-bad-exit=1 "$VENV_PYTHON" -m cf_jax.main "$@"
  --config.distributed=True
)
say "+ $(printf '%q ' "${start[@]}")"
[[ $DRY == no ]] || exit 0
"${start[@]}" &
step=$!
asked=no
# Slurm's signal goes on to all processes, which save and stop.
trap 'asked=yes; kill -TERM "$step" 2>/dev/null || true' TERM
code=0
wait "$step" || code=$?
if [[ $asked == yes ]]; then
  wait "$step" 2>/dev/null && code=0 || code=$?  # the first wait was interrupted
fi
tried="${SLURM_RESTART_COUNT:-0}"
if ((code != 0)) && { [[ $asked == yes ]] || { ! final_exit "$code" && ((tried < ${RESTARTS:-20})); }; }; then
  run scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
