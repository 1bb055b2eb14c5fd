# shellcheck shell=bash
# The functions that the scripts of this folder share.

# Prints the comment at the head of the script.
usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
}

fail() {
  echo "$(basename "$0"): error: $*" >&2
  exit 2
}

unknown_flag() {
  fail "unknown flag '$1': write --FLAG=VALUE; the command to start stands behind --; --help lists the flags"
}

# Checks the value $2 of the flag $1.
check_positive() {
  [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1 must be positive, got '$2'"
}

# Runs a command, or prints it if the script's `dry_run` is set.
run() {
  if [[ -n "${dry_run}" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
