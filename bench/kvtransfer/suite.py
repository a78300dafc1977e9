"""Everything that `baton bench kvtransfer` measures, in order; what it comes to, and which bars it reaches."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ...common.config import TRANSPORTS
from ...common.kv_format import KvFormat
from . import hiding, speed, stall
from .end import LLAMA_8B
from .hiding import Hiding
from .speed import Note, Speed
from .stall import Load, Stall, percentile

PARTS = ("speed", "hiding", "stall")

LIMIT_SHARES = {"shm": 0.9, "process-group": 0.9}
"""Of their medium's limit, at every size."""
LONG_TOKENS, LONG_SHARE, SHORT_SHARE = 32768, 0.7, 0.5
"""Of a plain socket, by whichever of tcp and grpc is faster: from so many tokens on, and below."""
CHECKSUM_SHARE = 0.05
HIDING_SHARE = 0.05
STALL_RATIO = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`sizes`: tokens and rounds of each speed measurement. `model`: a checkpoint folder, for real workers."""

    model: Path
    parts: Collection[str] = PARTS
    format: KvFormat = LLAMA_8B
    sizes: tuple[tuple[int, int], ...] = ((1024, 16), (4096, 10), (32768, 4))
    transports: tuple[str, ...] = TRANSPORTS
    prompt: int = 4096
    prompts: int = 3
    load: Load = field(default_factory=Load)
    stalling: tuple[str, ...] = ("shm", "tcp")


@dataclass(slots=True)
class Results:
    speeds: list[Speed] = field(default_factory=list)
    hiding: Hiding | None = None
    stalls: list[Stall] = field(default_factory=list)


def run(plan: Plan, note: Note) -> Results:
    """Raises `BatonError` where something breaks."""
    results = Results()
    if "speed" in plan.parts:
        for tokens, rounds in plan.sizes:
            results.speeds += speed.measure(plan.format, tokens, rounds, note, plan.transports)
    if "hiding" in plan.parts:
        note(f"hiding behind the prefill of {plan.prompt} tokens")
        results.hiding = asyncio.run(hiding.measure(plan.model, plan.prompt, plan.prompts))
    if "stall" in plan.parts:
        for transport in plan.stalling:
            note(f"decoding while KV arrives by {transport}")
            results.stalls.append(asyncio.run(stall.measure(plan.model, transport, plan.load)))
    return results


def bars(results: Results) -> dict[str, bool]:
    """Each bar in words, and whether it is reached."""
    held: dict[str, bool] = {}
    sockets: dict[int, float] = {}
    for s in results.speeds:
        if s.transport in LIMIT_SHARES:
            least = LIMIT_SHARES[s.transport]
            held[f"{s.transport} at {s.tokens} tokens: {s.share:.0%} of {s.medium}, at least {least:.0%}"] = (
                s.share >= least
            )
        else:
            sockets[s.tokens] = max(s.share, sockets.get(s.tokens, 0.0))
        words = f"checksums by {s.transport} at {s.tokens} tokens: {s.checksums:.1%}, at most {CHECKSUM_SHARE:.0%}"
        held[words] = s.checksums <= CHECKSUM_SHARE
    for tokens, share in sockets.items():
        least = LONG_SHARE if tokens >= LONG_TOKENS else SHORT_SHARE
        held[f"tcp or grpc at {tokens} tokens: {share:.0%} of a plain socket, at least {least:.0%}"] = share >= least
    if results.hiding is not None:
        share = results.hiding.share
        held[f"not hidden at {results.hiding.tokens} tokens: {share:.1%} of TTFT, at most {HIDING_SHARE:.0%}"] = (
            share <= HIDING_SHARE
        )
    for x in results.stalls:
        held[f"ITL p99 while KV arrives by {x.transport}: {x.ratio:.2f}×, at most {STALL_RATIO}×"] = (
            x.ratio <= STALL_RATIO
        )
    return held


def tables(results: Results) -> list[Table]:
    """For a terminal."""
    made = []
    if results.speeds:
        ways = dict.fromkeys(way for s in results.speeds for way in s.beside)
        table = Table(
            "transport", "tokens", "GB/s", "limit", "GB/s", "share", *(f"of {way}" for way in ways), "checksums",
            title="from the first offer",
        )  # fmt: skip
        for s in results.speeds:
            table.add_row(
                s.transport, str(s.tokens), f"{s.gb_per_s:.2f}", s.medium, f"{s.limit_gb_per_s:.2f}", f"{s.share:.0%}",
                *(f"{s.other_shares[way]:.0%}" if way in s.beside else "" for way in ways), f"{s.checksums:+.1%}",
            )  # fmt: skip
        made.append(table)
    if results.stalls:
        table = Table("", "GB/s", "ITL p50 (ms)", "p99", title="decoding while KV arrives")
        for x in results.stalls:
            for name, gaps, rate in (("quiet", x.quiet, 0.0), (f"by {x.transport}", x.arriving, x.gb_per_s)):
                table.add_row(name, f"{rate:.3f}", *(f"{percentile(gaps, p) * 1e3:.1f}" for p in (50, 99)))
        made.append(table)
    return made


def document(results: Results) -> dict[str, Any]:
    """For `record.write`."""
    stalls = [
        {
            "transport": x.transport, "gb_per_s": x.gb_per_s, "ratio_p99": x.ratio, "gaps": len(x.arriving),
            **{
                name: {f"p{p}": percentile(gaps, p) for p in (50, 90, 99)}
                for name, gaps in (("quiet", x.quiet), ("arriving", x.arriving))
            },
        }
        for x in results.stalls
    ]  # fmt: skip
    return {
        "speed": [
            asdict(s) | {"gb_per_s": s.gb_per_s, "limit_gb_per_s": s.limit_gb_per_s, "share": s.share,
                         "other_shares": s.other_shares, "checksum_share": s.checksums}
            for s in results.speeds
        ],
        "hiding": asdict(results.hiding) | {"share": results.hiding.share} if results.hiding else None,
        "stall": stalls,
        "bars": bars(results),
    }  # fmt: skip
