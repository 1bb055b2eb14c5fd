#!/usr/bin/env bash
# Checks gkd_jax on the GPU of this machine, times a step beside torch, and writes one JSON file.
#
#   launch/one_gpu.sh RESULT.json [ROUNDS]
#
# It runs the tests that are marked `accelerator`, then the benchmarks of gin/bench/gpu1.gin (T5) and
# gpu2.gin (decoder-only), each ROUNDS times (3 without the argument) in turn with transformers on
# torch. It needs jax with CUDA, torch with CUDA, transformers and pytest, but neither TensorFlow
# nor seqio. By the time of its parts on an H200, one round takes about ten minutes, most of them for
# compiling.
set -euo pipefail
# shellcheck source=launch/shared.bash
source "$(dirname "${BASH_SOURCE[0]}")/shared.bash"

if [[ ${1:---help} == --help ]]; then
  usage
  exit 0
fi
[[ $1 != -* ]] || fail "unknown flag '$1': it takes RESULT.json and ROUNDS alone"
result=$(realpath "$1")
rounds=${2:-3}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# gkd_jax need not be installed; the benchmarks' processes import it from here.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

GKD_JAX_TEST_PLATFORMS=cuda,cpu python3 -m pytest -q -m accelerator -p no:cacheprovider \
  --junitxml="$work/tests.xml" tests/test_accelerator.py || echo "tests failed: see $result"
common=(--dtypes bfloat16 --rounds "$rounds" --runs 5)
python3 tests/benchmarks/peers.py --configs gpu1 "${common[@]}" --json "$work/gpu1.json"
python3 tests/benchmarks/decoder_peers.py --configs gpu2 "${common[@]}" --json "$work/gpu2.json"

python3 - "$work" "$result" <<'PYTHON'
import importlib.metadata
import json
import pathlib
import subprocess
import sys
from xml.etree import ElementTree

work, result = map(pathlib.Path, sys.argv[1:])
suite = ElementTree.parse(work / "tests.xml").getroot()[0]
# A test whose fixture or import fails is an error there.
bad = [case for kind in ("failure", "error") for case in suite.findall(f"testcase[{kind}]")]
query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
versions = {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers")}
found = {
    "gpu": subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip(),
    "versions": versions,
    "tests": {
        "run": int(suite.get("tests")) - int(suite.get("skipped")),
        "failed": [case.get("name") for case in bad],
    },
    "benchmarks": [
        *json.loads((work / "gpu1.json").read_text()),
        *json.loads((work / "gpu2.json").read_text()),
    ],
}
result.write_text(json.dumps(found, indent=1) + "\n")
print(f"wrote {result}")
PYTHON
