#!/usr/bin/env bash
# A TPU slice of Google Cloud from its creation to its deletion, all workers.
#
#   export TPU_NAME=cf TPU_ZONE=us-east5-a TPU_TYPE=v6e-64 TPU_BUCKET=my-bucket
#   bash launch/tpu_vm.sh create [--spot] [--queued]
#   bash launch/tpu_vm.sh setup                     code, packages, bucket
#   bash launch/tpu_vm.sh run --config=configs/kfgrpo_tpu.py ...
#   bash launch/tpu_vm.sh logs                      follows worker 0
#   bash launch/tpu_vm.sh stop                      saves, then stops the run
#   bash launch/tpu_vm.sh delete
#   bash launch/tpu_vm.sh keep --spot --config=...  create, setup and run, again
#                                                   after every preemption
#
#   --dry-run after the verb only prints the commands
#   TPU_TYPE      as Google names it; v5p counts cores: v5p-128 is 64 chips
#   TPU_VERSION   runtime (default: that of the type)
#   TPU_PROJECT   default: gcloud's
#   TPU_BUCKET    mounted at ~/bucket on all workers: the workdir of a run on
#                 several hosts has to lie there
#   PASS_ENV      names of variables that the run gets, "HF_TOKEN JUDGE_KEY";
#                 their values are never printed or put into a command
#   WATCH_EVERY_S, RESTARTS, RESTART_AFTER_S    see `keep` and keep.sh
#
# A crash is started again on the workers themselves (keep.sh); so is nothing
# that the run says a user has to put right.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

VERB="${1:-}"
[[ $# -eq 0 ]] || shift
DRY=no SPOT=no QUEUED=no
while [[ "${1:-}" =~ ^--(dry-run|spot|queued)$ ]]; do
  case "$1" in
    --dry-run) DRY=yes ;;
    --spot) SPOT=yes ;;
    --queued) QUEUED=yes ;;
  esac
  shift
done

# Prints a command; runs it unless this is a dry run.
act() {
  say "+ $(printf '%q ' "$@")"
  [[ $DRY == yes ]] || "$@"
}

need() {
  local name
  for name in "$@"; do
    [[ -n "${!name:-}" ]] \
      || die "$name is not set; export it first, for example: export TPU_NAME=cf TPU_ZONE=us-east5-a TPU_TYPE=v6e-64."
  done
}

version_of() {
  case "$1" in
    v4-*) say tpu-ubuntu2204-base ;;
    v5p-*) say v2-alpha-tpuv5 ;;
    v5litepod-*) say v2-alpha-tpuv5-lite ;;
    v6e-*) say v2-alpha-tpuv6e ;;
    *) die "no runtime is known for TPU_TYPE=$1; set TPU_VERSION." ;;
  esac
}

place() {
  WHERE=(--zone="$TPU_ZONE")
  [[ -z "${TPU_PROJECT:-}" ]] || WHERE+=(--project="$TPU_PROJECT")
}

# A command for all workers.
on_workers() {
  act gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" --worker=all \
    --command="$1"
}

create() {
  need TPU_NAME TPU_ZONE TPU_TYPE
  local version="${TPU_VERSION:-}"
  [[ -n "$version" ]] || version="$(version_of "$TPU_TYPE")"
  if [[ $QUEUED == yes ]]; then
    local -a command=(
      gcloud compute tpus queued-resources create "$TPU_NAME"
      --node-id="$TPU_NAME" "${WHERE[@]}" --accelerator-type="$TPU_TYPE"
      --runtime-version="$version"
    )
  else
    local -a command=(
      gcloud compute tpus tpu-vm create "$TPU_NAME" "${WHERE[@]}"
      --accelerator-type="$TPU_TYPE" --version="$version"
    )
  fi
  [[ $SPOT == no ]] || command+=(--spot)
  act "${command[@]}"
  [[ $QUEUED == no ]] \
    || say "it is in a queue: gcloud compute tpus queued-resources describe $TPU_NAME ${WHERE[*]}"
}

setup() {
  need TPU_NAME TPU_ZONE
  local folder=/tmp/cf_jax_launch
  [[ $DRY == yes ]] || { rm -rf "$folder" && mkdir -p "$folder"; }
  # What git knows, changes included; not what lies in ignored folders.
  say "+ git ls-files -z -co --exclude-standard | tar --null -T - -czf $folder/code.tgz"
  [[ $DRY == yes ]] \
    || git ls-files -z -co --exclude-standard \
    | tar --null --ignore-failed-read -T - -czf "$folder/code.tgz"
  act gcloud compute tpus tpu-vm scp "$folder/code.tgz" "$TPU_NAME:code.tgz" \
    "${WHERE[@]}" --worker=all
  on_workers "mkdir -p cf_jax && tar -xzf code.tgz -C cf_jax && cd cf_jax && source launch/setup.sh && set_up && \$VENV_PYTHON -m pip install 'jax[tpu]'"
  if [[ -n "${TPU_BUCKET:-}" ]]; then
    on_workers "command -v gcsfuse >/dev/null || { echo \"deb https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -c -s) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list && curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /etc/apt/trusted.gpg.d/gcsfuse.asc >/dev/null && sudo apt-get update -q && sudo apt-get install -qy gcsfuse; }; mkdir -p bucket && { mountpoint -q bucket || gcsfuse --implicit-dirs $TPU_BUCKET bucket; }"
  fi
}

pass_environment() {
  [[ -n "${PASS_ENV:-}" ]] || return 0
  local name file
  for name in $PASS_ENV; do
    [[ -n "${!name:-}" ]] || die "PASS_ENV names $name, which is not set."
  done
  say "  the workers get, in a file that only you can read: $PASS_ENV"
  file=/tmp/cf_jax_env
  if [[ $DRY == no ]]; then
    file="$(mktemp)"  # nobody else can read it
    for name in $PASS_ENV; do
      printf 'export %s=%q\n' "$name" "${!name}" >>"$file"
    done
  fi
  act gcloud compute tpus tpu-vm scp "$file" "$TPU_NAME:.cf_jax_env" \
    "${WHERE[@]}" --worker=all || { rm -f "$file"; die "the variables could not be copied."; }
  [[ $DRY == yes ]] || rm -f "$file"
  on_workers "chmod 600 .cf_jax_env"
}

start() {
  need TPU_NAME TPU_ZONE
  [[ $# -gt 0 ]] || die "say what to run: bash launch/tpu_vm.sh run --config=configs/kfgrpo_tpu.py ..."
  pass_environment
  local inner
  inner="source launch/setup.sh; source launch/keep.sh; keep_running \$VENV_PYTHON -m cf_jax.main $(printf '%q ' "$@")--config.distributed=True; echo \"exit code \$?\""
  # A session of its own: it outlives the connection, and `stop` finds it.
  on_workers "cd cf_jax && { [[ ! -f ~/.cf_jax_env ]] || . ~/.cf_jax_env; } && RESTARTS=${RESTARTS:-20} RESTART_AFTER_S=${RESTART_AFTER_S:-10} nohup setsid bash -c $(printf '%q' "$inner") >~/cf_jax.log 2>&1 </dev/null & sleep 2"
  say "it runs; bash launch/tpu_vm.sh logs shows how"
}

logs() {
  need TPU_NAME TPU_ZONE
  act gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" --worker=0 \
    --command="tail -n 100 -F cf_jax.log"
}

stop() {
  need TPU_NAME TPU_ZONE
  # The run saves and ends with 75, which keep.sh does not start again.
  on_workers "pkill -TERM -u \$USER -f 'python -m cf_jax[.]main' || echo 'nothing runs here'"
}

delete() {
  need TPU_NAME TPU_ZONE
  if [[ $QUEUED == yes ]]; then
    act gcloud compute tpus queued-resources delete "$TPU_NAME" "${WHERE[@]}" \
      --force --quiet
  else
    act gcloud compute tpus tpu-vm delete "$TPU_NAME" "${WHERE[@]}" --quiet
  fi
}

state() {
  gcloud compute tpus tpu-vm describe "$TPU_NAME" "${WHERE[@]}" \
    --format='value(state)' 2>/dev/null || say MISSING
}

is_done() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" --worker=0 \
    --command="tail -n 1 cf_jax.log" 2>/dev/null | grep '^exit code' || true
}

keep() {
  need TPU_NAME TPU_ZONE TPU_TYPE TPU_BUCKET  # a deleted VM's disk is gone
  local said
  while true; do
    say "+ gcloud compute tpus tpu-vm describe $TPU_NAME ${WHERE[*]} --format='value(state)'"
    said=MISSING
    [[ $DRY == yes ]] || said="$(state)"
    case "$said" in
      READY) ;;
      CREATING | STARTING | RESTARTING | REPAIRING) ;;
      MISSING)
        create
        [[ $QUEUED == yes && $DRY == no ]] && until [[ "$(state)" == READY ]]; do
          sleep "${WATCH_EVERY_S:-60}"
        done
        setup
        start "$@"
        ;;
      *)  # PREEMPTED, TERMINATED, STOPPED, ...
        say "the slice is $said: making it anew"
        delete
        continue
        ;;
    esac
    [[ $DRY == no ]] || return 0
    sleep "${WATCH_EVERY_S:-60}"
    if [[ "$said" == READY ]]; then
      said="$(is_done)"
      if [[ "$said" == 'exit code 75' ]]; then  # stopped: is the slice going?
        sleep "${WATCH_EVERY_S:-60}"
        [[ "$(state)" == READY ]] || continue
      fi
      if [[ -n "$said" ]]; then
        say "the run ended: $said"
        return 0
      fi
    fi
  done
}

case "$VERB" in
  create | setup | run | logs | stop | delete | keep) ;;
  *) die "say what to do: bash launch/tpu_vm.sh create, setup, run, logs, stop, delete or keep." ;;
esac
need TPU_NAME TPU_ZONE
place
[[ $DRY == yes ]] || command -v gcloud >/dev/null \
  || die "there is no gcloud on this machine; install the Google Cloud CLI and run gcloud auth login, or add --dry-run."
case "$VERB" in
  run) start "$@" ;;
  *) "$VERB" "$@" ;;
esac
