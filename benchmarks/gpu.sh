#!/usr/bin/env bash
# Everything to be checked and measured on a machine with a CUDA device, in one go and within a time:
#
#     benchmarks/gpu.sh [--tiny] [--budget-s 570] [STEP...]
#
# Steps, in this order: doctor tests ranks kernels model sanitizer generate (the default: all but generate). Each has a
# limit of its own, and one that fails or hangs does not stop the others. What was measured goes to docs/results, or to
# $OUT where that is set, with the whole log; a table of the steps comes last. --tiny starts everything at sizes that a
# CPU takes too: its numbers mean nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$(command -v python || command -v python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

tiny=
budget=570
steps=()
while [ $# -gt 0 ]; do
    case $1 in
        --tiny) tiny=--tiny ;;
        --budget-s) budget=${2:?--budget-s needs a number of seconds}; shift ;;
        doctor | tests | ranks | kernels | model | sanitizer | generate) steps+=("$1") ;;
        *) echo "gpu.sh: no step $1: there are doctor tests ranks kernels model sanitizer generate" >&2; exit 2 ;;
    esac
    shift
done
[ ${#steps[@]} -gt 0 ] || steps=(doctor tests ranks kernels model sanitizer)
results=${OUT:-docs/results}
[ -z "$tiny" ] || results=${OUT:-$(mktemp -d)}
mkdir -p "$results"
log=$results/gpu.log
: > "$log"
SECONDS=0
table=
failed=0

# step NAME SHARE LAST COMMAND...: at most SHARE seconds, less where fewer are left; shows the last LAST lines of what
# the command wrote.
step() {
    local name=$1 limit=$2 last=$3 began=$SECONDS code left
    shift 3
    left=$((budget - SECONDS))
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        table+="$name|skipped: no time left|0"$'\n'
        failed=1
        return
    fi
    echo "== $name, at most $limit s: $*" | tee -a "$log"
    timeout --kill-after=5 "$limit" "$@" > "$results/.step" 2>&1
    code=$?
    cat "$results/.step" >> "$log"
    tail -n "$last" "$results/.step" | cut -c 1-220
    rm -f "$results/.step"
    local said="ended"
    [ $code -eq 0 ] || { said="exit status $code"; failed=1; }
    [ $code -ne 124 ] && [ $code -ne 137 ] || said="stopped after $limit s"
    table+="$name|$said|$((SECONDS - began))"$'\n'
}

without() {
    table+="$1|needs a CUDA device|0"$'\n'
}

has_cuda() {
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
}

# Quick ones first, so that an early stop says most: kernels in one process, then what starts ranks.
gpu_tests() {
    "$PYTHON" -m pytest -q -m gpu --maxfail=20 --tb=short tests/kernels || code=1
    "$PYTHON" -m pytest -q -m gpu --maxfail=10 --tb=short --continue-on-collection-errors tests/unit \
        tests/dist --deselect tests/dist/test_two_ranks_one_gpu.py || code=1
    return ${code:-0}
}

sanitizer() {
    local tool
    tool=$(command -v compute-sanitizer) || { echo "no compute-sanitizer here"; return 0; }
    # The allocator of torch hides reads past the end of a tensor; without it each tensor has its own memory.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --error-exitcode 9 --print-limit 5 \
        "$PYTHON" -m pytest -q -m gpu -x tests/kernels/test_paged_decode_triton.py \
        tests/kernels/test_paged_kv_triton.py tests/kernels/test_lse_triton.py \
        tests/kernels/test_rotary_append.py -k 'bfloat16'
}

model_seconds() { # what the steps after the model need is kept for them
    local kept=0 name
    for name in "${steps[@]}"; do [ "$name" != sanitizer ] || kept=40; done
    echo $((budget - SECONDS - kept))
}

export -f gpu_tests sanitizer
export PYTHON
for name in "${steps[@]}"; do
    case $name in
        doctor) step doctor 30 30 "$PYTHON" tools/doctor.py ;;
        tests) if has_cuda; then step tests 150 40 bash -c gpu_tests; else without tests; fi ;;
        ranks) step ranks 120 15 "$PYTHON" -m pytest -q --tb=short tests/dist/test_two_ranks_one_gpu.py ;;
        kernels)
            step kernels 90 60 "$PYTHON" benchmarks/kernels.py $tiny --out "$results" ;;
        model)
            seconds=$(model_seconds)
            step model "$((seconds > 0 ? seconds : 0))" 75 "$PYTHON" benchmarks/gpu_model.py $tiny \
                --budget-s "$((seconds - 5))" --out "$results" ;;
        sanitizer) if has_cuda; then step sanitizer 60 15 bash -c sanitizer; else without sanitizer; fi ;;
        generate)
            if has_cuda; then
                step generate 120 30 "$PYTHON" benchmarks/generate.py --dtype bfloat16 --save --name generate-gpu
                [ "$results" = docs/results ] || cp docs/results/generate-gpu.* "$results/" || failed=1
            else
                step generate 120 30 "$PYTHON" benchmarks/generate.py --requests 4 --new-tokens 8 --repeats 1
            fi ;;
    esac
done

echo
echo "step        seconds  how it ended      (all results and the log: $results)"
while IFS='|' read -r name said seconds; do
    [ -z "$name" ] || printf '%-10s %8s  %s\n' "$name" "$seconds" "$said"
done <<< "$table"
exit $failed
