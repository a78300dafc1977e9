#!/usr/bin/env bash
# What needs a GPU, in one call of under 9 minutes, the most important first: the tests in tests/gpu, the engine against
# the ceilings of the device, two worker processes on one GPU against one, each kernel against its roofline, and the
# speed of the KV handover.
#
# For an image with torch 2.11, triton 3.6 and Python 3.12, and nothing of ours installed. What it lacks can be carried:
# pip install --no-deps --target DIR cattrs, which is all Python, and PYTHONPATH=DIR there. It ends at once, with code 2, and names what is missing.
#
# Each part has a hard limit and writes what it has found as it goes, so that a part which is cut leaves results. They
# go to $OUT, or to bench/results/: *.json and gpu_check.log. The exit code is 0 only if everything ran and was
# right; otherwise the last lines say which parts did not.
#
#   bench/gpu_check.sh                          # all of it
#   PARTS="tests kernels" bench/gpu_check.sh    # only these
set -uo pipefail
cd "$(dirname "$0")/.."

export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE # some images set it, and float32 is compared with a CPU's
python=${PYTHON:-python3}
out=${OUT:-bench/results}
parts=${PARTS:-tests memory engine pair kernels kvtransfer}
failed=()

"$python" -m baton.bench.gpu_needs || exit 2
mkdir -p "$out"
log=$out/gpu_check.log
: >"$log"

# run PART SECONDS ARGUMENTS...: python with these, for so long at most.
run() {
    local part=$1 limit=$2 begin=$SECONDS
    shift 2
    [[ " $parts " == *" $part "* ]] || return 0
    echo "=== $part (at most $limit s)"
    timeout --kill-after=3 "$limit" "$python" "$@" 2>&1 | tee -a "$log"
    local code=${PIPESTATUS[0]}
    [[ $code -eq 0 ]] || failed+=("$part: code $code")
    echo "=== $part: code $code after $((SECONDS - begin)) s"
}

test=(-m pytest -p no:cacheprovider -o "addopts=--import-mode=importlib -q" --durations=10)
together=(tests/gpu --ignore=tests/gpu/test_memory.py)
"$python" -c 'import xdist' 2>/dev/null && together+=(-n 6) # most of their time goes into compiling

# 534 s in all, with the seconds that killing takes.
run tests 90 "${test[@]}" "${together[@]}"
run memory 56 "${test[@]}" tests/gpu/test_memory.py
run engine 165 -m baton.bench.engine --out "$out"
run pair 105 -m baton.bench.engine.pair --out "$out"
run kernels 70 -m baton.bench.kernels --sweep --out "$out"
run kvtransfer 30 -m baton.bench.gpu_kvtransfer --out "$out"

for part in "${failed[@]}"; do echo "not all right: $part" >&2; done
[[ ${#failed[@]} -eq 0 ]]
