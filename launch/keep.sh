# Sourced by the other scripts: runs a command again until it is done.
#
#   RESTARTS=20         how often at most (default: 20)
#   RESTART_AFTER_S=10  how long to wait before each
#
# A run that is started again goes on from its last checkpoint, so what a crash
# costs is the time since then.

# Exit codes of cf_jax.main that starting again does not change.
final_exit() {
  case "$1" in
    0) return 0 ;;      # done
    2) return 0 ;;      # something that the user has to put right
    75) return 0 ;;     # was asked to stop, and everything is saved
    130) return 0 ;;    # interrupted at the keyboard
  esac
  return 1
}

# keep_running COMMAND...: its last exit code.
keep_running() {
  local code=0 tried=0
  while true; do
    code=0
    "$@" || code=$?
    final_exit "$code" && return "$code"
    if ((tried >= ${RESTARTS:-20})); then
      printf 'error: exit code %d, and started again %d times already (RESTARTS).\n' \
        "$code" "$tried" >&2
      return "$code"
    fi
    tried=$((tried + 1))
    printf 'exit code %d: starting again (%d of %d) in %s s\n' "$code" "$tried" \
      "${RESTARTS:-20}" "${RESTART_AFTER_S:-10}" >&2
    sleep "${RESTART_AFTER_S:-10}"
  done
}
