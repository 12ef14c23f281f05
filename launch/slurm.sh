#!/usr/bin/env bash
#SBATCH --job-name=cf_jax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm_%j.log
#SBATCH --signal=B:TERM@180
# GPUs of a Slurm cluster: one process for each GPU, on as many nodes as asked.
#
#   NODES=2 GPUS=8 bash launch/slurm.sh --config=configs/kfgrpo_gpu.py ...
#   bash launch/slurm.sh --dry-run --config=...   only prints the commands
#   EXTRA=cuda          installs jax's packages for GPUs too; needed once
#   TIME=12:00:00       wall time of one job (default)
#   PARTITION=, ACCOUNT=, QOS=   given to sbatch where set
#   SBATCH_EXTRA="--mem=0 --exclusive"   further words for sbatch
#
# On a login node it submits itself; within the job it starts the processes.
# Batch sizes of a config are those of the whole run. The environment is set up
# by the login node: .venv must lie on a shared disk, and so must the workdir.
# Three minutes before its time is up, and when it is preempted with a time of
# grace, the processes are asked to save and stop, and the job is put back into
# the queue. A crash puts it back too, RESTARTS times (20); what the run says a
# user has to put right (2) does not, nor does `scancel JOB`.
set -euo pipefail
if [[ -n "${SLURM_JOB_ID:-}" ]]; then
  # Slurm runs a copy of this file.
  HERE="${CF_JAX_ROOT:?CF_JAX_ROOT is set by launch/slurm.sh on the login node}/launch"
else
  HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
fi
source "$HERE/setup.sh"
source "$HERE/keep.sh"

own_flags "dry-run" "$@"
set -- "${REST[@]}"
[[ $# -gt 0 ]] || die "say what to run: bash launch/slurm.sh --config=configs/kfgrpo_gpu.py ..."
NODES="${NODES:-1}"
GPUS="${GPUS:-8}"
for name in NODES GPUS; do
  [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || die "$name must be a number of at least 1, got '${!name}'."
done
check_main_arguments "$@"

# Each process, with a shell around it that notes the exit code 2: srun itself
# tells only the highest code of all, and others may end with another one.
# The trap keeps the shell where Slurm's signal goes to the two of them.
TASK='trap : TERM
code=0
"$@" || code=$?
[[ $code != 2 ]] || echo "process $SLURM_PROCID" >>"$CF_JAX_MISTAKES"
exit "$code"'
# Where one ends, the others hear why and end by themselves (docs/sharding.md):
# killed at once, as some clusters have it, they would neither hear nor say.
start=(
  srun --kill-on-bad-exit=0 bash -c "$TASK" task "$VENV_PYTHON" -m cf_jax.main
  "$@" --config.distributed=True
)
say_start() { say "+ srun --kill-on-bad-exit=0 $(printf '%q ' "${start[@]:6}")"; }

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
    set_up
    run "${submit[@]}"
    say "  and in the job:"
    say_start
    exit
  fi
  command -v sbatch >/dev/null || die "there is no sbatch on this machine; run this on a login node of a Slurm cluster."
  set_up
  mkdir -p runs
  run "${submit[@]}"
  exit
fi

cd "$ROOT"
say_start
[[ $DRY == no ]] || exit 0
mkdir -p runs
export CF_JAX_MISTAKES="$ROOT/runs/slurm_$SLURM_JOB_ID.mistakes"
rm -f "$CF_JAX_MISTAKES"
"${start[@]}" &
step=$!
asked=no interrupted=no
# Slurm's signal comes to this shell alone (B:). It goes on to all processes,
# which save and stop; not by way of srun, which answers SIGTERM by killing them.
ask() {
  asked=yes interrupted=yes
  scancel --signal=TERM "$SLURM_JOB_ID" \
    || say "the processes could not be asked to save and stop"
}
trap ask TERM
while true; do  # a wait that the signal interrupts says nothing of srun
  code=0 interrupted=no
  wait "$step" || code=$?
  [[ $interrupted == yes ]] || break
done
if [[ -s "$CF_JAX_MISTAKES" ]]; then
  say "something has to be put right, so the job is not started again: see the errors above ($(head -n 1 "$CF_JAX_MISTAKES"))"
  code=2
fi
rm -f "$CF_JAX_MISTAKES"
tried="${SLURM_RESTART_COUNT:-0}"
again=no
case "$code" in
  0 | 2) ;;
  75) again=yes ;;  # of a preemption Slurm tells only the processes
  *)
    if [[ $asked == yes ]]; then
      again=yes  # there was no time to save
    elif ! final_exit "$code" && ((tried < ${RESTARTS:-20})); then
      again=yes
    fi
    ;;
esac
# To the processes a cancellation is a preemption; Slurm knows which it is.
if [[ $again == yes && "$(squeue -h -j "$SLURM_JOB_ID" -o %T 2>/dev/null || true)" == CANCELLED* ]]; then
  again=no
fi
if [[ $again == yes ]]; then
  run scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
