#!/usr/bin/env bash
# Runs gkd-jax as several CPU processes on this machine, to try what a pod would do.
#
#   launch/local_multiprocess.sh --num_processes=2 [--devices_per_process=2] [--port=12345] \
#     [--log_dir=DIR] -- \
#     gkd-jax train --gin_file=gin/gkd.gin --gin.MODEL_DIR=/tmp/gkd ...
#
# Every process runs the same command with GKD_JAX_COORDINATOR, GKD_JAX_NUM_PROCESSES and
# GKD_JAX_PROCESS_ID. Process 0 writes to the terminal, and process N to LOG_DIR/process_N.txt. The
# default LOG_DIR is a new temporary folder, whose path is printed. When a process fails, the script
# ends the others and exits with the status of the first failure. SIGTERM is passed on to every
# process. --dry_run prints the commands and starts nothing.
set -euo pipefail
# shellcheck source=launch/shared.bash
source "$(dirname "${BASH_SOURCE[0]}")/shared.bash"

num_processes="" devices=1 port=12345 log_dir="" dry_run=""
command=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --num_processes=*) num_processes="${1#*=}" ;;
    --devices_per_process=*) devices="${1#*=}" ;;
    --port=*) port="${1#*=}" ;;
    --log_dir=*) log_dir="${1#*=}" ;;
    --dry_run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; command=("$@"); break ;;
    *) unknown_flag "$1" ;;
  esac
  shift
done
check_positive --num_processes "${num_processes}"
check_positive --devices_per_process "${devices}"
check_positive --port "${port}"
[[ "${#command[@]}" -gt 0 ]] || fail "-- COMMAND is missing"

settings() { # Prints the environment variables of process $1.
  echo JAX_PLATFORMS=cpu
  echo "XLA_FLAGS=${XLA_FLAGS:+${XLA_FLAGS} }--xla_force_host_platform_device_count=${devices}"
  echo "GKD_JAX_COORDINATOR=127.0.0.1:${port}"
  echo "GKD_JAX_NUM_PROCESSES=${num_processes}"
  echo "GKD_JAX_PROCESS_ID=$1"
}

if [[ -n "${dry_run}" ]]; then
  for ((id = 0; id < num_processes; id++)); do
    mapfile -t environment < <(settings "${id}")
    printf '%q ' env "${environment[@]}" "${command[@]}"
    echo
  done
  exit 0
fi

if [[ -z "${log_dir}" ]]; then
  log_dir="$(mktemp -d)"
  echo "logs of the other processes: ${log_dir}" >&2
fi
mkdir -p "${log_dir}"
pids=()
trap '[[ "${#pids[@]}" -eq 0 ]] || kill -TERM "${pids[@]}" 2>/dev/null || true' EXIT INT TERM
for ((id = 0; id < num_processes; id++)); do
  mapfile -t environment < <(settings "${id}")
  if [[ "${id}" -eq 0 ]]; then
    env "${environment[@]}" "${command[@]}" &
  else
    env "${environment[@]}" "${command[@]}" >"${log_dir}/process_${id}.txt" 2>&1 &
  fi
  pids+=("$!")
done

status=0
left="${num_processes}"
while [[ "${left}" -gt 0 ]]; do
  one=0
  wait -n -p ended "${pids[@]}" || one=$?
  # A signal to this script also ends `wait`. The trap has passed the signal on, and the processes are
  # still running in order to save: wait again.
  [[ -n "${ended:-}" ]] || continue
  left=$((left - 1))
  remaining=()
  for pid in "${pids[@]}"; do
    [[ "${pid}" == "${ended}" ]] || remaining+=("${pid}")
  done
  pids=("${remaining[@]}")
  if [[ "${one}" -ne 0 && "${status}" -eq 0 ]]; then
    status="${one}"
    [[ "${left}" -eq 0 ]] || kill -TERM "${pids[@]}" 2>/dev/null || true
  fi
done
exit "${status}"
