"""A latency in four numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of one latency, in seconds; NaN where nothing was measured."""

    p50: float
    p90: float
    p99: float
    mean: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Quantiles:
        data = np.fromiter(values, dtype=float)
        if not data.size:
            return cls(*[float("nan")] * 4)
        p50, p90, p99 = np.percentile(data, (50, 90, 99))
        return cls(float(p50), float(p90), float(p99), float(data.mean()))
