#!/usr/bin/env bash
# What needs a GPU, in one call of under 9 minutes: the tests in tests/gpu, then the engine on CUDA against the engine
# on CPU, then tokens/s of models with real shapes and made-up weights, then the speed of the KV handover.
#
# For images that have torch, transformers, tokenizers, safetensors and numpy, and nothing of ours installed. What an
# image lacks can be carried: pip install --target DIR --only-binary=:all: --python-version 3.12 \
# msgspec msgpack xxhash grpcio protobuf pytest, with the image's version of Python, and PYTHONPATH=DIR there.
# It ends at once, with code 2, and names what is missing. Results go to $OUT, or to bench/results/; the exit code is 0
# only if everything ran and was right.
#
#   bench/gpu_check.sh                              # all of it
#   MODELS="llama-3.1-8b" bench/gpu_check.sh        # only this shape
set -uo pipefail
cd "$(dirname "$0")/.."

export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
out=${OUT:-bench/results}
failed=0

"$python" -m baton.bench.gpu_needs || exit 2
mkdir -p "$out"

timeout 180 "$python" -m pytest tests/gpu -p no:cacheprovider -o addopts="--import-mode=importlib -q" || failed=1
timeout 240 "$python" -m baton.bench.gpu_engine --out "$out" ${MODELS:+--models "$MODELS"} || failed=1
timeout 110 "$python" -m baton.bench.gpu_kvtransfer --out "$out" || failed=1
exit "$failed"
