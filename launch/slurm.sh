#!/usr/bin/env bash
# Runs gkd-jax on GPUs through SLURM, with one process per GPU (the default) or one per node.
#
#   launch/slurm.sh --nodes=2 --gpus_per_node=8 [--per=gpu|node] [--partition=P] [--account=A] \
#     [--time=24:00:00] [--cpus_per_gpu=8] [--job_name=gkd_jax] [--log=%x-%j.txt] -- \
#     gkd-jax train --gin_file=gin/gkd.gin --gin.MODEL_DIR=/shared/runs/gkd ...
#
# Every process runs the same command with GKD_JAX_DISTRIBUTED=1 and finds the others through the
# variables of SLURM. Two minutes before the time limit the processes get SIGTERM and save a
# checkpoint; submit the job again to continue. A job that is preempted or loses a node is queued
# again and resumes by itself. --dry_run prints the sbatch command and submits nothing.
set -euo pipefail
# shellcheck source=launch/shared.bash
source "$(dirname "${BASH_SOURCE[0]}")/shared.bash"

nodes=1 gpus_per_node="" per=gpu cpus_per_gpu=8 job_name=gkd_jax log=%x-%j.txt dry_run=""
extra=() command=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --nodes=*) nodes="${1#*=}" ;;
    --gpus_per_node=*) gpus_per_node="${1#*=}" ;;
    --per=*) per="${1#*=}" ;;
    --cpus_per_gpu=*) cpus_per_gpu="${1#*=}" ;;
    --job_name=*) job_name="${1#*=}" ;;
    --log=*) log="${1#*=}" ;;
    --partition=*) extra+=("--partition=${1#*=}") ;;
    --account=*) extra+=("--account=${1#*=}") ;;
    --time=*) extra+=("--time=${1#*=}") ;;
    --dry_run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; command=("$@"); break ;;
    *) unknown_flag "$1" ;;
  esac
  shift
done
check_positive --nodes "${nodes}"
check_positive --gpus_per_node "${gpus_per_node}"
check_positive --cpus_per_gpu "${cpus_per_gpu}"
[[ "${#command[@]}" -gt 0 ]] || fail "-- COMMAND is missing"

variables="ALL,GKD_JAX_DISTRIBUTED=1"
case "${per}" in
  gpu) tasks="${gpus_per_node}" cpus="${cpus_per_gpu}" setting="" ;;
  node)
    # Under SLURM, JAX uses one GPU per process unless JAX_LOCAL_DEVICE_IDS lists more.
    tasks=1 cpus=$((cpus_per_gpu * gpus_per_node))
    setting="JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus_per_node - 1))) "
    ;;
  *) fail "--per must be gpu or node, got '${per}'" ;;
esac
# --kill-on-bad-exit ends the job when one process fails; the others would wait for it in vain.
sbatch=(sbatch "--nodes=${nodes}" "--ntasks-per-node=${tasks}" "--gpus-per-node=${gpus_per_node}"
  "--cpus-per-task=${cpus}" "--job-name=${job_name}" "--output=${log}" --open-mode=append
  --requeue --signal=TERM@120 "--export=${variables}" "${extra[@]}"
  "--wrap=${setting}srun --kill-on-bad-exit=1 $(printf '%q ' "${command[@]}")")
run "${sbatch[@]}"
