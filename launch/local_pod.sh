#!/usr/bin/env bash
# N processes on this machine, joined by jax.distributed as on a pod.
#
#   bash launch/local_pod.sh 2 --config=configs/kfgrpo_cpu.py:smoke
#   bash launch/local_pod.sh 2 --dry-run --config=...   only prints the commands
#   DEVICES=4 bash launch/local_pod.sh 2 ...   fake CPU devices in each process
#   PORT=29500          of the coordinator (default: a free one)
#   LOGS=runs/pod_logs  one file a process (default)
#   RESTARTS=0          see keep.sh; here the default is 0
#
# Arguments go to `python -m cf_jax.main`, with --config.distributed=True behind
# them. Processes are of CPUs unless JAX_PLATFORMS says otherwise. Where one
# fails the others are stopped. The exit code is that of the first to fail.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source "$ROOT/launch/keep.sh"

COUNT="${1:-}"
[[ "$COUNT" =~ ^[1-9][0-9]*$ ]] \
  || die "say how many processes: bash launch/local_pod.sh 2 --config=configs/kfgrpo_cpu.py:smoke."
shift
DRY=no
if [[ "${1:-}" == --dry-run ]]; then
  DRY=yes
  shift
fi
[[ $# -gt 0 ]] || set -- --config=configs/kfgrpo_cpu.py:smoke
LOGS="${LOGS:-runs/pod_logs}"
export RESTARTS="${RESTARTS:-0}"
[[ $DRY == yes ]] || set_up

if [[ -z "${PORT:-}" ]]; then
  PORT=29500
  [[ $DRY == yes ]] || PORT="$("$VENV_PYTHON" -c 'import socket
s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
fi
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
if [[ -n "${DEVICES:-}" ]]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
  say "+ export XLA_FLAGS='$XLA_FLAGS'"
fi

PIDS=()
stop_all() {
  local pid
  for pid in "${PIDS[@]}"; do
    kill -TERM "$pid" 2>/dev/null || true
  done
}
trap 'stop_all' INT TERM

one_pod() {
  local rank code=0 first=0
  PIDS=()
  for ((rank = 0; rank < COUNT; rank++)); do
    local -a environment=(
      "JAX_COORDINATOR_ADDRESS=127.0.0.1:$PORT"
      "JAX_NUM_PROCESSES=$COUNT"
      "JAX_PROCESS_ID=$rank"
    )
    local -a command=(
      "$VENV_PYTHON" -m cf_jax.main "$@" --config.distributed=True
    )
    say "+ ${environment[*]} $(printf '%q ' "${command[@]}")>> $LOGS/$rank.log"
    [[ $DRY == no ]] || continue
    env "${environment[@]}" "${command[@]}" >>"$LOGS/$rank.log" 2>&1 &
    PIDS+=("$!")
  done
  [[ $DRY == no ]] || return 0
  for ((rank = 0; rank < COUNT; rank++)); do
    code=0
    wait -n "${PIDS[@]}" || code=$?
    if ((code != 0 && first == 0)); then
      first=$code
      stop_all
    elif ((first == 76 && code != 0 && code != 75)); then
      first=$code  # 76 says that another one failed: this one
    fi
  done
  wait || true
  return "$first"
}

if [[ $DRY == no ]]; then
  mkdir -p "$LOGS"
  # A restart adds to what the start before it said.
  for ((rank = 0; rank < COUNT; rank++)); do
    : >"$LOGS/$rank.log"
  done
fi
code=0
keep_running one_pod "$@" || code=$?
if ((code != 0)); then
  say "the last lines of each process ($LOGS):"
  for ((rank = 0; rank < COUNT; rank++)); do
    say "-- $rank"
    tail -n 5 "$LOGS/$rank.log" || true
  done
fi
exit "$code"
