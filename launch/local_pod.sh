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
# SIGTERM and Ctrl-C go on to all of them, which save and stop: exit code 75.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source "$ROOT/launch/keep.sh"

own_flags "dry-run" "$@"
set -- "${REST[@]}"
COUNT="${1:-}"
[[ "$COUNT" =~ ^[1-9][0-9]*$ ]] \
  || die "say how many processes: bash launch/local_pod.sh 2 --config=configs/kfgrpo_cpu.py:smoke."
shift
[[ $# -gt 0 ]] || set -- --config=configs/kfgrpo_cpu.py:smoke
LOGS="${LOGS:-runs/pod_logs}"
export RESTARTS="${RESTARTS:-0}"
set_up

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
# Asked to stop: nothing is started again.
ASKED=no INTERRUPTED=0
trap 'ASKED=yes INTERRUPTED=143 RESTARTS=0; stop_all' TERM
trap 'ASKED=yes INTERRUPTED=130 RESTARTS=0; stop_all' INT

one_pod() {
  local rank code=0 first=0 ended=0
  PIDS=()
  [[ $ASKED == no ]] || return 75  # before another start: all is saved
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
  [[ $ASKED == no ]] || stop_all  # some were started after the signal
  while ((ended < COUNT)); do
    code=0 INTERRUPTED=0
    wait -n "${PIDS[@]}" 2>/dev/null || code=$?
    # Interrupted by the signal, it says nothing of a process.
    ((code != INTERRUPTED || code == 0)) || continue
    ((code != 127)) || break  # none is left: one ended just as the signal came
    ended=$((ended + 1))
    if ((code != 0 && first == 0)); then
      first=$code
      stop_all
    elif ((first == 76 && code != 0 && code != 75)); then
      first=$code  # 76 says that another one failed: this one
    fi
  done
  wait || true
  ((ended == COUNT || first != 0)) || first=143
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
