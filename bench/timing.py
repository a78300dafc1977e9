"""How long work on a device takes: medians, by the device's own events, over inputs that no cache holds.

Work on an accelerator is asynchronous and its launch costs the host some 10 µs. So calls are timed by events in the
device's stream, and short ones as a CUDA graph of all of them, which the device starts by itself. On a CPU all of this
is a wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]

SHORT_S = 3e-4
"""Calls that take less are timed in a graph."""
CACHE_BYTES = 128 << 20
"""More than twice the second-level cache of an H100 or H200: so many bytes between two uses of one input."""


def sets_beyond_cache(device: torch.device, size: int, most: int = 40) -> int:
    """How many sets of inputs of `size` bytes to rotate through, so that each use finds none of its own in a cache."""
    return max(2, min(most, CACHE_BYTES // max(1, size) + 2)) if device.type == "cuda" else 1


def wait(device: torch.device) -> None:
    """Until all that was launched has ended. A CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_s(device: torch.device, calls: Sequence[Call], repeats: int = 7, warm: int = 2) -> float:
    """Seconds of one call: the median over `repeats` rounds, of which each runs all `calls` once."""
    for _ in range(warm):
        for call in calls:
            call()
    wait(device)
    if device.type != "cuda":
        return statistics.median(_on_host(calls) for _ in range(repeats)) / len(calls)
    estimate = _by_events(calls) / len(calls)
    if estimate >= SHORT_S:
        return statistics.median(_by_events([call]) for _ in range(repeats) for call in calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return statistics.median(_by_events([graph.replay]) for _ in range(repeats)) / len(calls)


def _on_host(calls: Sequence[Call]) -> float:
    begin = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - begin


def _by_events(calls: Sequence[Call]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
