#!/usr/bin/env bash
# Secrets in the files of the checkout, and known holes in what requirements.lock
# installs. launch/test.sh calls it; AUDIT=0 leaves it out there.
#
#   bash launch/audit.sh [--dry-run]
#
# The tools (detect-secrets, pip-audit) have an environment of their own,
# .venv-audit, from launch/audit.lock. Without a network the part that needs one is
# left out, and says so: what is offline is no hole.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

own_flags "dry-run" "$@"
[[ ${#REST[@]} -eq 0 ]] || die "launch/audit.sh takes no argument ${REST[0]}; --dry-run is its only one."
TOOLS="$ROOT/.venv-audit"
TOOLS_LOCK="$ROOT/launch/audit.lock"
# What pip-audit and its libraries say where there is no way to the list.
OFFLINE='connection ?error|connecttimeout|readtimeout|timed out|max retries|proxyerror|name resolution|name or service not known|network is unreachable|connection (refused|reset|aborted)|failed to (connect|establish)|could not connect|HTTP (502|503|504)|(502|503|504) server error'

# Installed once for each lock; false where that cannot be.
install_tools() {
  local wanted
  wanted="$(cksum <"$TOOLS_LOCK")"
  [[ -f "$TOOLS/.stamp" && "$(<"$TOOLS/.stamp")" == "$wanted" ]] && return
  "$VENV_PYTHON" -m venv --clear "$TOOLS" >/dev/null 2>&1 || return
  "$TOOLS/bin/python" -m pip install --require-hashes --retries 0 --timeout 5 \
    --progress-bar off -r "$TOOLS_LOCK" >"$TOOLS/install.log" 2>&1 || return
  printf '%s\n' "$wanted" >"$TOOLS/.stamp"
}

# Files that git knows; numbers and hashes that others made are no secrets.
audit_secrets() {
  local skipped='(^|/)(requirements\.lock|launch/audit\.lock|.*tokenizer\.json|.*\.ipynb|tests/parity/goldens/.*|docs/(results|images)/.*)$'
  local files found
  mapfile -d '' files < <(git -C "$ROOT" ls-files -z | grep -zvE "$skipped")
  [[ ${#files[@]} -gt 0 ]] || die "git names no file of $ROOT to look at (whose checkout is it?)"
  say "+ detect-secrets-hook (${#files[@]} files)"
  found="$("$TOOLS/bin/detect-secrets-hook" "${files[@]}" 2>&1)" || {
    printf '%s\n' "$found" >&2
    die "this looks like a secret; take it out (and change it where it was used), or end its line with the comment 'pragma: allowlist secret'."
  }
}

audit_dependencies() {
  local said code=0 unknown
  say "+ pip-audit -r requirements.lock"
  said="$(timeout 90 "$TOOLS/bin/pip-audit" -r "$LOCK" --disable-pip \
    --require-hashes --progress-spinner off --timeout 5 2>&1)" || code=$?
  if [[ "$said" == *"known vulnerabilit"* && "$said" != *"No known"* ]]; then
    printf '%s\n' "$said" >&2
    die "requirements.lock has packages with known holes; raise their bounds in requirements.txt and make the lock anew."
  fi
  unknown="$(grep -c 'could not be audited' <<<"$said" || true)"
  if ((unknown)); then
    say "  left out: the index does not know $unknown packages"
  elif ((code == 124)) || { ((code)) && grep -qiE "$OFFLINE" <<<"$said"; }; then
    say "  left out: the list of holes cannot be reached (${said##*$'\n'})"
  elif ((code)); then
    printf '%s\n' "$said" >&2
    die "pip-audit failed (code $code), and not for want of a network; its last words are above."
  fi
}

if [[ $DRY == yes ]]; then
  say "  (into $TOOLS, unless it is there: launch/audit.lock)"
  say "+ detect-secrets-hook (the files that git knows)"
  say "+ pip-audit -r requirements.lock"
  exit 0
fi
if ! install_tools; then
  say "audit left out: its tools cannot be installed (offline?); see $TOOLS/install.log"
  exit 0
fi
[[ -e "$ROOT/.git" ]] && audit_secrets
audit_dependencies
