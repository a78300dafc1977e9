#!/usr/bin/env bash
# What needs a GPU, in one call of under 9 minutes: the tests in tests/gpu, then the engine on CUDA against the engine
# on CPU, then tokens/s of models with real shapes and made-up weights.
#
# For images that have torch, triton, transformers, tokenizers, safetensors, grpcio, protobuf, msgpack, typer and rich,
# and nothing of ours installed. msgspec, xxhash or pytest, where the image lacks them, can be put on PYTHONPATH
# beforehand. Results go to $OUT, or to bench/results/; the exit code is 0 only if everything ran and was right.
#
#   bench/gpu_check.sh                              # all of it
#   MODELS="llama-3.1-8b" bench/gpu_check.sh        # only this shape
set -uo pipefail
cd "$(dirname "$0")/.."

export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python=${PYTHON:-python}
out=${OUT:-bench/results}
failed=0

"$python" -m baton.bench.gpu_needs || exit 2
mkdir -p "$out"

if "$python" -c "import pytest" 2>/dev/null; then
    timeout 180 "$python" -m pytest tests/gpu -p no:cacheprovider -o addopts="--import-mode=importlib -q" || failed=1
else
    echo "gpu_check: pytest is missing: tests/gpu did not run"
    failed=1
fi

timeout 330 "$python" -m baton.bench.gpu_engine --out "$out" ${MODELS:+--models "$MODELS"} || failed=1
exit "$failed"
