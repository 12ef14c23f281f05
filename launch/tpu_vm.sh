#!/usr/bin/env bash
# A TPU slice of Google Cloud from its creation to its deletion, all workers.
#
#   export TPU_NAME=cf TPU_ZONE=us-east5-a TPU_TYPE=v6e-64 TPU_BUCKET=my-bucket
#   bash launch/tpu_vm.sh create [--spot] [--queued]
#   bash launch/tpu_vm.sh setup                     code, packages, bucket
#   bash launch/tpu_vm.sh run --config=configs/kfgrpo_tpu.py ...
#   bash launch/tpu_vm.sh logs                      follows worker 0
#   bash launch/tpu_vm.sh stop                      saves, then stops the run
#   bash launch/tpu_vm.sh delete [--queued]
#   bash launch/tpu_vm.sh keep --spot --config=...  create, setup and run, again
#                                                   after every preemption
#
#   --dry-run, anywhere, only prints the commands
#   TPU_TYPE      as Google names it; v5p counts cores: v5p-128 is 64 chips
#   TPU_VERSION   runtime (default: that of the type)
#   TPU_PROJECT   default: gcloud's
#   TPU_BUCKET    mounted at /bucket on all workers: the workdir of a run on
#                 several hosts has to lie there
#   PASS_ENV      names of variables that the run gets, "HF_TOKEN JUDGE_KEY";
#                 their values are never printed or put into a command
#   WATCH_EVERY_S, RESTARTS, RESTART_AFTER_S    see `keep` and keep.sh
#
# A crash is started again on the workers themselves (keep.sh); so is nothing
# that the run says a user has to put right. `keep` ends with the run's exit code
# and waits out everything else: no capacity, a create that fails, no answer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

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
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" --worker=all \
    --command="$1"
}

create() {
  local -a command
  if has queued; then
    command=(
      gcloud compute tpus queued-resources create "$TPU_NAME"
      --node-id="$TPU_NAME" "${WHERE[@]}" --accelerator-type="$TPU_TYPE"
      --runtime-version="$VERSION"
    )
  else
    command=(
      gcloud compute tpus tpu-vm create "$TPU_NAME" "${WHERE[@]}"
      --accelerator-type="$TPU_TYPE" --version="$VERSION"
    )
  fi
  if has spot; then command+=(--spot); fi
  run "${command[@]}" || return
  if has queued; then
    say "it is in a queue: gcloud compute tpus queued-resources describe $TPU_NAME ${WHERE[*]}"
  fi
}

# gcsfuse refuses to rename folders of a flat bucket unless it is told how large
# they may be, and a checkpoint is committed by renaming its folder.
MOUNT='--implicit-dirs --rename-dir-limit=1000000'

# `keep` calls it where `set -e` does not hold: every step says what comes of it.
setup() {
  local folder=/tmp/cf_jax_launch
  [[ $DRY == yes ]] || folder="$(mktemp -d)"
  # What git knows, changes included; not what lies in ignored folders.
  say "+ git ls-files -z -co --exclude-standard | tar --null -T - -czf $folder/code.tgz"
  [[ $DRY == yes ]] \
    || git ls-files -z -co --exclude-standard \
    | tar --null --ignore-failed-read -T - -czf "$folder/code.tgz" \
    || die "the code could not be packed; is $ROOT a git checkout?"
  run gcloud compute tpus tpu-vm scp "$folder/code.tgz" "$TPU_NAME:code.tgz" \
    "${WHERE[@]}" --worker=all || return
  [[ $DRY == yes ]] || rm -rf "$folder"
  # The images of Ubuntu 22.04 have Python 3.10, which is too old.
  on_workers "mkdir -p cf_jax && tar -xzf code.tgz -C cf_jax && cd cf_jax && source launch/setup.sh && provide_python && EXTRA=tpu set_up" \
    || return
  [[ -n "${TPU_BUCKET:-}" ]] || return 0
  on_workers "command -v gcsfuse >/dev/null || { echo \"deb https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -c -s) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list && curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /etc/apt/trusted.gpg.d/gcsfuse.asc >/dev/null && sudo apt-get -o DPkg::Lock::Timeout=600 update -q && sudo apt-get -o DPkg::Lock::Timeout=600 install -qy gcsfuse; } && { mountpoint -q /bucket || { sudo mkdir -p /bucket && sudo chown \$(id -u) /bucket && gcsfuse $MOUNT $TPU_BUCKET /bucket; }; }"
}

# Sentences about what a run needs, before anything is made that is paid for.
check_start() {
  local name word workdir=
  [[ $# -gt 0 ]] || die "say what to run: bash launch/tpu_vm.sh run --config=configs/kfgrpo_tpu.py ..."
  check_main_arguments "$@"
  for name in ${PASS_ENV:-}; do
    [[ -n "${!name:-}" ]] || die "PASS_ENV names $name, which is not set."
  done
  # Every type has its slices of up to eight on one host.
  name="${TPU_TYPE:-several hosts}"
  if [[ $VERB == run && "${name##*-}" =~ ^[1-8]$ ]]; then
    return
  fi
  for word in "$@"; do
    [[ "$workdir" != next ]] || workdir="$word"
    case "$word" in
      --workdir) workdir=next ;;
      --workdir=*) workdir="${word#*=}" ;;
    esac
  done
  [[ "$workdir" == /* ]] \
    || die "add --workdir=/bucket/runs/NAME, where all hosts write and a new slice reads: a folder of a VM's own disk (TPU_TYPE=${TPU_TYPE:-unknown}) is neither."
}

# On a worker: is there something of the run, a process or what restarts it?
# It has a session of its own, whose number start() notes.
SESSION="\"\$(cat ~/.cf_jax_session 2>/dev/null || echo 1)\""
LIVE="pgrep -s $SESSION -f 'cf_jax[.]main' >/dev/null"

pass_environment() {
  [[ -n "${PASS_ENV:-}" ]] || return 0
  local name file code=0
  say "  the workers get, in a file that only you can read: $PASS_ENV"
  file=/tmp/cf_jax_env
  if [[ $DRY == no ]]; then
    file="$(mktemp)"  # nobody else can read it
    for name in $PASS_ENV; do
      printf 'export %s=%q\n' "$name" "${!name}" >>"$file"
    done
  fi
  run gcloud compute tpus tpu-vm scp "$file" "$TPU_NAME:.cf_jax_env" \
    "${WHERE[@]}" --worker=all || code=$?
  [[ $DRY == yes ]] || rm -f "$file"
  ((code == 0)) || return "$code"
  on_workers "chmod 600 .cf_jax_env"
}

start() {
  pass_environment || return
  local inner
  # What stop() leaves holds where keep.sh is about to start the run again.
  inner="echo \$\$ >~/.cf_jax_session; source launch/setup.sh; source launch/keep.sh; once() { [[ ! -e ~/.cf_jax_stop ]] || return 75; \"\$VENV_PYTHON\" -m cf_jax.main $(printf '%q ' "$@")--config.distributed=True; }; keep_running once; echo \"exit code \$?\""
  # A session of its own: it outlives the connection, and `stop` finds it.
  on_workers "cd cf_jax || exit 1; if $LIVE; then echo 'a run is here already'; exit 0; fi; rm -f ~/.cf_jax_stop; [[ ! -f ~/.cf_jax_env ]] || . ~/.cf_jax_env; RESTARTS=${RESTARTS:-20} RESTART_AFTER_S=${RESTART_AFTER_S:-10} nohup setsid bash -c $(printf '%q' "$inner") >~/cf_jax.log 2>&1 </dev/null & sleep 2" \
    || return
  say "it runs; bash launch/tpu_vm.sh logs shows how"
}

logs() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" --worker=0 \
    --command="tail -n 100 -F cf_jax.log"
}

stop() {
  # The run saves and ends with 75, which keep.sh does not start again. Between
  # two starts there is no process to ask; the file ends it then.
  on_workers "touch ~/.cf_jax_stop; said='nothing runs here'; for n in 1 2 3; do if pkill -TERM -s $SESSION -f 'python -m cf_jax[.]main'; then echo 'asked to save and stop'; exit 0; fi; $LIVE || break; said='it was about to start again, and ends instead'; sleep 1; done; echo \"\$said\""
}

delete() {
  if has queued; then
    run gcloud compute tpus queued-resources delete "$TPU_NAME" "${WHERE[@]}" \
      --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$TPU_NAME" "${WHERE[@]}" --quiet
  fi
}

# What gcloud says of a thing; MISSING: there is none; UNKNOWN: no answer, and
# the reason is in $ERRORS.
look() {
  local said
  if said="$(gcloud compute tpus "$1" describe "$TPU_NAME" "${WHERE[@]}" \
    --format="value($2)" 2>"$ERRORS")" && [[ -n "$said" ]]; then
    say "$said"
  elif grep -q NOT_FOUND "$ERRORS"; then
    say MISSING
  else
    say UNKNOWN
  fi
}

state() { look tpu-vm state; }

# What the workers are at: none, running, unknown, or "ended CODE", to which
# " asked" is added where `stop` did it. One worker without a run is enough for
# none: start() leaves the others alone.
doing() {
  local said codes code
  # In two words, so that a command that is printed is not taken for an answer.
  said="$(gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" --worker=all \
    --command="if $LIVE; then echo 'cf_jax is' running; elif said=\$(tail -n 1 ~/cf_jax.log 2>/dev/null | grep -xE 'exit code [0-9]+'); then [[ -e ~/.cf_jax_stop ]] && asked=' asked' || asked=; echo 'cf_jax is' ended \${said##* }\$asked; else echo 'cf_jax is' none; fi" \
    2>"$ERRORS")" || said=
  if [[ "$said" == *"cf_jax is none"* ]]; then
    say none
  elif [[ "$said" == *"cf_jax is running"* ]]; then
    say running
  elif [[ "$said" == *"cf_jax is ended"* ]]; then
    # The code of who failed, rather than 76 of those who heard of it.
    codes="$(grep -o 'cf_jax is ended [0-9]*' <<<"$said" | grep -o '[0-9]*$' | sort -n)"
    code="$(grep -vx 76 <<<"$codes" | tail -n 1 || true)"
    [[ "${code:-0}" != 0 ]] || code="${codes##*$'\n'}"
    if [[ "$said" == *" asked"* ]]; then code+=" asked"; fi
    say "ended $code"
  else
    say unknown
  fi
}

keep() {
  local said before='' every="${WATCH_EVERY_S:-60}"
  if [[ $DRY == yes ]]; then
    say "+ gcloud compute tpus tpu-vm describe $TPU_NAME ${WHERE[*]} --format='value(state)'"
    create
    setup
    start "$@"
    return
  fi
  ERRORS="$(mktemp)"
  trap 'rm -f "$ERRORS"' EXIT
  while true; do
    said="$(state)"
    case "$said" in
      READY)
        said="$(doing)"
        case "$said" in
          none)
            { setup && start "$@"; } \
              || say "that did not work; again in $every s"
            ;;
          unknown)
            say "the workers do not answer; again in $every s: $(tail -n 1 "$ERRORS")"
            ;;
          ended*)
            # Stopped, and not by `stop`: is the slice going?
            if [[ "$said" != 'ended 75' || "$before" == "$said" ]]; then
              say "the run ended: exit code ${said#ended }; the slice is still there and costs: bash launch/tpu_vm.sh delete"
              said="${said% asked}"
              return "${said##* }"
            fi
            ;;
        esac
        ;;
      CREATING | STARTING | RESTARTING | REPAIRING | DELETING | STOPPING) ;;
      UNKNOWN)
        say "gcloud cannot say what the slice is at; again in $every s: $(tail -n 1 "$ERRORS")"
        ;;
      MISSING) make ;;
      *)  # PREEMPTED, TERMINATED, STOPPED, ...
        say "the slice is $said: making it anew"
        delete || say "it could not be deleted; again in $every s"
        ;;
    esac
    before="$said"
    sleep "$every"
  done
}

# There is no slice: asks for one, unless that is under way.
make() {
  local said=MISSING
  if has queued; then
    said="$(look queued-resources state.state)"
  fi
  case "$said" in
    MISSING)
      create || say "it could not be made; again in $every s"
      ;;
    ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES) ;;
    DELETING | SUSPENDING) ;;
    UNKNOWN)
      say "gcloud cannot say what the queue is at; again in $every s: $(tail -n 1 "$ERRORS")"
      ;;
    *)  # SUSPENDED, FAILED; ACTIVE, where the slice came a moment ago or went
      if [[ "$said" != ACTIVE || "$(state)" == MISSING ]]; then
        say "the queued resource is $said and has no slice: making it anew"
        delete || say "it could not be deleted; again in $every s"
      fi
      ;;
  esac
}

own_flags "dry-run spot queued" "$@"
VERB="${REST[0]:-}"
set -- "${REST[@]:1}"
case "$VERB" in
  create | keep) ;;
  delete) has spot && die "--spot means nothing to tpu_vm.sh delete." ;;
  setup | run | logs | stop)
    for name in spot queued; do
      has "$name" && die "--$name means nothing to tpu_vm.sh $VERB."
    done
    ;;
  *) die "say what to do: bash launch/tpu_vm.sh create, setup, run, logs, stop, delete or keep." ;;
esac
case "$VERB" in
  run | keep) ;;
  *) [[ $# -eq 0 ]] || die "tpu_vm.sh $VERB takes no argument $1; its own are --dry-run, --spot (create, keep) and --queued (create, delete, keep)." ;;
esac
need TPU_NAME TPU_ZONE
place
case "$VERB" in
  create | keep)
    need TPU_TYPE
    VERSION="${TPU_VERSION:-}"
    [[ -n "$VERSION" ]] || VERSION="$(version_of "$TPU_TYPE")"
    ;;
esac
[[ $VERB != keep ]] || need TPU_BUCKET  # a deleted VM's disk is gone
case "$VERB" in
  run | keep) check_start "$@" ;;
esac
[[ $DRY == yes ]] || command -v gcloud >/dev/null \
  || die "there is no gcloud on this machine; install the Google Cloud CLI and run gcloud auth login, or add --dry-run."
case "$VERB" in
  run) start "$@" ;;
  *) "$VERB" "$@" ;;
esac
