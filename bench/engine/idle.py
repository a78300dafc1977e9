"""How much of the time a device does nothing, from a profile of what ran on it.

Two shares are told apart. `idle`: no kernel and no copy runs. `late`: of that, gaps so long that the device must have
waited for its host, and not for the next kernel of a graph.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LATE_US = 20.0
"""A longer gap is the host's: kernels of one graph follow each other within 1 to 2 µs."""
ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
"""Categories of the trace that the profiler writes."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Of `seconds`, from the first to the last thing that ran."""

    seconds: float
    events: int
    idle_share: float
    late_share: float


def profile(work: Callable[[], object]) -> Idle:
    """Of `work`, on CUDA. It must end with nothing under way."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return idle_of(intervals(json.loads(path.read_bytes())))


def intervals(trace: dict[str, Any]) -> list[tuple[float, float]]:
    """Begin and end, in µs, of all that ran on the device."""
    events = (event for event in trace["traceEvents"] if event.get("cat") in ON_DEVICE and "dur" in event)
    return [(float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in events]


def idle_of(ran: Iterable[tuple[float, float]]) -> Idle:
    """Intervals may overlap, in any order. NaN where there are none."""
    ordered = sorted(ran)
    if not ordered:
        return Idle(0.0, 0, float("nan"), float("nan"))
    first, last = ordered[0]
    gaps = []
    for begin, end in ordered[1:]:
        if begin > last:
            gaps.append(begin - last)
        last = max(last, end)
    whole = max(last - first, 1e-9)
    return Idle(whole / 1e6, len(ordered), sum(gaps) / whole, sum(gap for gap in gaps if gap > LATE_US) / whole)
