"""What a comparison says: the table, the ratios against transformers, the limits, and the handover's share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from .compare import COLOCATED, HALF, LONG_PROMPT, PAIR, TRANSFORMERS, Measured
from .quantiles import Quantiles

BARS = {1: 2.0, 8: 1.8, 32: 1.5}
"""Tokens/s of Baton colocated over transformers that a run has to reach, by concurrency."""
TTFT_BAR = 1.05
"""TTFT of a long prompt over that of transformers that it may not exceed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One system at one width. Ratios against transformers in the same run; NaN where that did not run."""

    system: str
    concurrency: int
    tokens_per_s: float
    ratio: float
    ttft: Quantiles
    itl: Quantiles


@dataclass(frozen=True, slots=True)
class Handover:
    """1P1D's handover of a long prompt with an idle decode worker; seconds and bytes are means of one request.

    seconds       from the reservation to the acknowledged commit, the prompt's computing included
    after_prefill how much later the first token comes than from a colocated worker with the prefill worker's threads:
                  what is not hidden behind computing
    ttft_share    of `after_prefill` in TTFT
    hidden        share of `seconds` that costs the client nothing
    gb_per_s      bytes over `seconds`: how fast they had to go, not how fast they could
    """

    bytes: float
    seconds: float
    gb_per_s: float
    after_prefill: float
    ttft_share: float
    hidden: float


def rows(results: Mapping[str, Measured]) -> list[Row]:
    base = results.get(TRANSFORMERS)
    found = []
    for system, measured in results.items():
        for width in measured.bursts:
            rate = measured.tokens_per_s(width)
            ratio = rate / base.tokens_per_s(width) if base and width in base.bursts else float("nan")
            ttft, itl = Quantiles.of(measured.pooled(width, "ttft")), Quantiles.of(measured.pooled(width, "itl"))
            found.append(Row(system, width, rate, ratio, ttft, itl))
    return sorted(found, key=lambda row: row.concurrency)


def handover(results: Mapping[str, Measured]) -> Handover | None:
    """None where 1P1D was not measured, or handed nothing over."""
    pair, half = results.get(PAIR), results.get(HALF)
    if pair is None or half is None or not pair.handover.get("handover_seconds"):
        return None
    count = pair.handover["requests"]
    size, seconds = pair.handover["handover_bytes"] / count, pair.handover["handover_seconds"] / count
    ttft = statistics.median(pair.long_ttft)
    after = ttft - statistics.median(half.long_ttft)
    return Handover(size, seconds, size / seconds / 1e9, after, after / ttft, 1 - after / seconds)


def stages(measured: Measured) -> dict[str, float]:
    """Median seconds from receipt to each stage of a long prompt's timeline."""
    names = {name: None for line in measured.timelines for name in line}
    values = {name: [v for line in measured.timelines if (v := line.get(name)) is not None] for name in names}
    return {name: statistics.median(found) for name, found in values.items() if found}


def long_ttft(results: Mapping[str, Measured]) -> dict[str, float]:
    """Median TTFT of a long prompt alone, by system, in seconds."""
    return {name: statistics.median(measured.long_ttft) for name, measured in results.items() if measured.long_ttft}


def bars(results: Mapping[str, Measured]) -> dict[str, bool]:
    """Each bar in words, and whether this run reached it. Empty without transformers or without Baton colocated."""
    if TRANSFORMERS not in results or COLOCATED not in results:
        return {}
    ttft = long_ttft(results)
    held = {
        f"{row.ratio:.2f}× transformers at {row.concurrency}, wanted {BARS[row.concurrency]}×": row.ratio
        >= BARS[row.concurrency]
        for row in rows(results)
        if row.system == COLOCATED and row.concurrency in BARS
    }
    over = ttft[COLOCATED] / ttft[TRANSFORMERS]
    held[f"TTFT({LONG_PROMPT}) {over:.2f}× transformers, wanted at most {TTFT_BAR}×"] = over <= TTFT_BAR
    return held


def table(results: Mapping[str, Measured], limit_tokens_per_s: float) -> Group:
    """For people: the systems at each width, then the TTFT of long prompts."""
    grid = Table(caption=f"memory bandwidth allows at most {limit_tokens_per_s:.1f} tokens/s at 1; latencies in ms")
    for name in ("at", "system", "tokens/s", "× trf", "TTFT p50", "p99", "ITL p50", "p99"):
        grid.add_column(name, justify="left" if name == "system" else "right")
    last = None
    for row in rows(results):
        if last not in (None, row.concurrency):
            grid.add_section()
        last = row.concurrency
        milliseconds = (f"{t * 1e3:.0f}" for t in (row.ttft.p50, row.ttft.p99, row.itl.p50, row.itl.p99))
        ratio = "–" if math.isnan(row.ratio) else f"{row.ratio:.2f}"
        grid.add_row(str(row.concurrency), row.system, f"{row.tokens_per_s:.1f}", ratio, *milliseconds)
    long = Table("system", f"TTFT of {LONG_PROMPT} tokens")
    for name, seconds in long_ttft(results).items():
        long.add_row(name, f"{seconds * 1e3:.0f}")
    return Group(grid, long)


def document(results: Mapping[str, Measured], bandwidth: float, weights: int) -> dict[str, Any]:
    """For the result file."""
    moved = handover(results)
    return {
        "rows": [asdict(row) for row in rows(results)],
        "rounds_tokens_per_s": {
            name: {width: [burst.tokens_per_s for burst in bursts] for width, bursts in measured.bursts.items()}
            for name, measured in results.items()
        },
        f"ttft_{LONG_PROMPT}_s": long_ttft(results),
        f"timeline_{LONG_PROMPT}_s": {name: stages(m) for name, m in results.items() if m.timelines},
        "handover": asdict(moved) if moved else None,
        "handover_counters": {name: m.handover for name, m in results.items() if m.handover},
        "read_bandwidth_bytes_per_s": bandwidth,
        "weight_bytes": weights,
        "limit_tokens_per_s_at_1": bandwidth / weights,
        "bars": bars(results),
    }
