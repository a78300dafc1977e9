"""Result files: what was measured, on which machine, at which commit, by which command, when."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .machine import provenance

RESULTS = Path(__file__).parent / "results"


def write(name: str, kind: str, results: Any, parameters: dict[str, Any], folder: Path | None = None) -> Path:
    """Write NAME.json into `folder`, by default bench/results/. Returns its path."""
    path = (folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"kind": kind, **provenance(), "parameters": parameters, "results": results}
    path.write_text(json.dumps(_finite(document), indent=1) + "\n")
    return path


def _finite(value: Any) -> Any:
    """JSON has no NaN: what was not measured becomes null. Floats keep six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
