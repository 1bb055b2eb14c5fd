#!/usr/bin/env bash
# Runs gkd-jax on one or several slices of Cloud TPU VMs, through queued resources.
#
#   launch/tpu_vm.sh create --name=gkd --zone=us-west4-a --accelerator_type=v5litepod-64 \
#     --runtime_version=v2-alpha-tpuv5-lite [--num_slices=2] [--spot] [--reserved] [--project=P]
#   launch/tpu_vm.sh status --name=gkd --zone=us-west4-a     # repeat until it prints ACTIVE
#   launch/tpu_vm.sh install --name=gkd --zone=us-west4-a [--python=3.11]
#   launch/tpu_vm.sh run --name=gkd --zone=us-west4-a -- \
#     gkd-jax train --gin_file=gin/models/large_teacher.gin --gin.MODEL_DIR=gs://BUCKET/run ...
#   launch/tpu_vm.sh delete --name=gkd --zone=us-west4-a
#
# `install` copies this checkout to every worker and installs it into an environment made by uv,
# because the Python of the images may be too old. `run` starts the same command on all workers of all
# slices, in the folder of the checkout, with GKD_JAX_DISTRIBUTED=1. Every worker must reach MODEL_DIR, the
# data and the models: name models as on the Hugging Face hub, and put MODEL_DIR and JSONL files into a bucket
# (docs/configuration.md has the whole way). What `precompile` calls v5e:4x4 is --accelerator_type=v5litepod-16.
# --dry_run prints the gcloud commands and runs nothing.
set -euo pipefail
# shellcheck source=launch/shared.bash
source "$(dirname "${BASH_SOURCE[0]}")/shared.bash"

name="" zone="" project="" accelerator_type="" runtime_version="" num_slices=1 dry_run=""
python=3.11
extra=() command=()
[[ $# -gt 0 ]] || { usage >&2; exit 2; }
action="$1"
shift
while [[ $# -gt 0 ]]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --accelerator_type=*) accelerator_type="${1#*=}" ;;
    --runtime_version=*) runtime_version="${1#*=}" ;;
    --num_slices=*) num_slices="${1#*=}" ;;
    --python=*) python="${1#*=}" ;;
    --spot) extra+=(--spot) ;;
    --reserved) extra+=(--reserved) ;;
    --dry_run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; command=("$@"); break ;;
    *) unknown_flag "$1" ;;
  esac
  shift
done
case "${action}" in
  --help | -h | help) usage; exit 0 ;;
  create | status | install | run | delete) ;;
  *) fail "unknown action '${action}', expected create, status, install, run or delete" ;;
esac
[[ -n "${name}" ]] || fail "--name is missing"
[[ -n "${zone}" ]] || fail "--zone is missing"
check_positive --num_slices "${num_slices}"

where=("--zone=${zone}")
[[ -z "${project}" ]] || where+=("--project=${project}")
resources=(gcloud compute tpus queued-resources)
# --batch-size=all starts all workers at once, because they wait for each other.
everywhere=(--node=all --worker=all --batch-size=all)

case "${action}" in
  create)
    [[ -n "${accelerator_type}" ]] || fail "create needs --accelerator_type"
    [[ -n "${runtime_version}" ]] || fail "create needs --runtime_version"
    if [[ "${num_slices}" -eq 1 ]]; then
      nodes=("--node-id=${name}")
    else
      nodes=("--node-count=${num_slices}" "--node-prefix=${name}")
    fi
    run "${resources[@]}" create "${name}" "${where[@]}" "${nodes[@]}" \
      "--accelerator-type=${accelerator_type}" "--runtime-version=${runtime_version}" \
      ${extra[@]+"${extra[@]}"}
    ;;
  status)
    run "${resources[@]}" describe "${name}" "${where[@]}" "--format=value(state.state)"
    ;;
  install)
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    archive="${TMPDIR:-/tmp}/gkd_jax_${name}.tar.gz"
    run tar -czf "${archive}" -C "${root}" --exclude=.git --exclude=.venv --exclude=__pycache__ .
    run "${resources[@]}" scp "${archive}" "${name}:gkd_jax.tar.gz" "${where[@]}" "${everywhere[@]}"
    run "${resources[@]}" ssh "${name}" "${where[@]}" "${everywhere[@]}" \
      "--command=mkdir -p gkd_jax && tar -xzf gkd_jax.tar.gz -C gkd_jax && cd gkd_jax &&\
 python3 -m pip install -q --user uv && python3 -m uv venv -q --python ${python} .venv &&\
 python3 -m uv pip install -q --python .venv -c constraints.txt -e '.[tpu,gcs]'"
    ;;
  run)
    [[ "${#command[@]}" -gt 0 ]] || fail "run needs -- COMMAND"
    run "${resources[@]}" ssh "${name}" "${where[@]}" "${everywhere[@]}" \
      "--command=cd gkd_jax && . .venv/bin/activate &&\
 GKD_JAX_DISTRIBUTED=1 $(printf '%q ' "${command[@]}")"
    ;;
  delete)
    run "${resources[@]}" delete "${name}" "${where[@]}" --force --quiet
    ;;
esac
