#!/usr/bin/env bash
# Everything to be checked and measured on a machine with a CUDA device, in one go: GPU tests, then benchmarks.
# Results go to docs/results (or to $OUT, where that is set). Without CUDA it runs the same benchmarks on the CPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

step() {
    echo "== $*"
    "$@" || { echo "failed ($?): $*"; failed=1; }
}

step "$PYTHON" tools/doctor.py
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    step "$PYTHON" -m pytest -q -m gpu
    step "$PYTHON" tools/bench/generate.py --dtype bfloat16 --save --name generate-gpu
    step "$PYTHON" tools/bench/kernels.py --save
else
    step "$PYTHON" tools/bench/generate.py --requests 4 --new-tokens 8 --repeats 1
    step "$PYTHON" tools/bench/kernels.py --tiny
fi
[ -z "${OUT:-}" ] || cp -r docs/results "$OUT/"
exit $failed
