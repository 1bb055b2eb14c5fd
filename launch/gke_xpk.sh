#!/usr/bin/env bash
# Runs gkd-jax on one or several TPU slices of a GKE cluster, through XPK (pip install xpk).
#
#   launch/gke_xpk.sh --cluster=C --workload=gkd-1 --tpu_type=v5litepod-64 \
#     --base_docker_image=IMAGE [--num_slices=2] [--zone=Z] [--project=P] [--priority=medium] \
#     [--max_restarts=10] -- gkd-jax train --gin_file=gin/gkd.gin --gin.MODEL_DIR=/runs/gkd ...
#
# XPK adds this checkout to the base image, which must hold the dependencies of gkd_jax[tpu]. With
# --docker_image=IMAGE the image is used as it is. Every worker runs the same command with
# GKD_JAX_DISTRIBUTED=1. A preempted workload is restarted and resumes the run. --dry_run prints the
# XPK command and starts nothing.
set -euo pipefail
# shellcheck source=launch/shared.bash
source "$(dirname "${BASH_SOURCE[0]}")/shared.bash"

cluster="" workload="" tpu_type="" num_slices=1 image=() dry_run=""
extra=() command=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --cluster=*) cluster="${1#*=}" ;;
    --workload=*) workload="${1#*=}" ;;
    --tpu_type=*) tpu_type="${1#*=}" ;;
    --num_slices=*) num_slices="${1#*=}" ;;
    --base_docker_image=*) image=("--base-docker-image=${1#*=}") ;;
    --docker_image=*) image=("--docker-image=${1#*=}") ;;
    --zone=*) extra+=("--zone=${1#*=}") ;;
    --project=*) extra+=("--project=${1#*=}") ;;
    --priority=*) extra+=("--priority=${1#*=}") ;;
    --max_restarts=*) extra+=("--max-restarts=${1#*=}") ;;
    --dry_run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; command=("$@"); break ;;
    *) unknown_flag "$1" ;;
  esac
  shift
done
[[ -n "${cluster}" ]] || fail "--cluster is missing"
[[ -n "${workload}" ]] || fail "--workload is missing"
[[ -n "${tpu_type}" ]] || fail "--tpu_type is missing"
check_positive --num_slices "${num_slices}"
[[ "${#image[@]}" -gt 0 ]] || fail "--base_docker_image or --docker_image is missing"
[[ "${#command[@]}" -gt 0 ]] || fail "-- COMMAND is missing"

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[[ "${image[0]}" != --base-* ]] || image+=("--script-dir=${root}")
# A run that gets SIGTERM has five minutes to save a checkpoint.
xpk=(xpk workload create "--cluster=${cluster}" "--workload=${workload}"
  "--tpu-type=${tpu_type}" "--num-slices=${num_slices}" "${image[@]}"
  ${extra[@]+"${extra[@]}"}
  --termination-grace-period-seconds=300 --env=GKD_JAX_DISTRIBUTED=1
  "--command=$(printf '%q ' "${command[@]}")")
run "${xpk[@]}"
