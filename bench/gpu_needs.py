"""Says which packages the GPU check lacks, and whether there is a GPU: `python -m baton.bench.gpu_needs`."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = {
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "cattrs": "cattrs",
    "rich": "rich",
    "msgpack": "msgpack",
    "xxhash": "xxhash",
    "grpc": "grpcio",
    "google.protobuf": "protobuf",
    "yaml": "pyyaml",
    "triton": "triton",
    "pytest": "pytest",
}
"""What is imported, and the package that it comes in."""


def problems() -> list[str]:
    """What stands in the way, one line each; empty where the check can run."""
    missing = [package for name, package in NEEDED.items() if not _there(name)]
    if missing:
        wheels = " ".join(missing)
        return [f"missing packages: {wheels} (pip install --target DIR {wheels}, then PYTHONPATH=DIR)"]
    import torch

    return [] if torch.cuda.is_available() else [f"torch {torch.__version__} sees no CUDA device"]


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in is missing
        return False


if __name__ == "__main__":
    found = problems()
    for problem in found:
        print(f"gpu_check: {problem}", file=sys.stderr)
    sys.exit(1 if found else 0)
