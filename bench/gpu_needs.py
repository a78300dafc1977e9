"""Says which packages the GPU check lacks, and whether there is a GPU: `python -m baton.bench.gpu_needs`."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "msgspec", "pytest")


def problems() -> list[str]:
    """What stands in the way, one line each; empty where the check can run."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        wheels = " ".join(missing)
        return [f"missing packages: {wheels} (pip install --target DIR {wheels}, then PYTHONPATH=DIR)"]
    import torch

    return [] if torch.cuda.is_available() else [f"torch {torch.__version__} sees no CUDA device"]


if __name__ == "__main__":
    found = problems()
    for problem in found:
        print(f"gpu_check: {problem}", file=sys.stderr)
    sys.exit(1 if found else 0)
