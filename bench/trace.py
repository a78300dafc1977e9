"""Readers for published request traces: arrival, lengths and, where there are any, prefix ids. No text in any of them.

Mooncake (Qin et al., FAST'25), Azure (Splitwise, Patel et al., ISCA'24), ServeGen (arXiv 2505.09999) and WEKA's
recorded coding-agent sessions. The kind is told by the file's first line; .gz is unpacked on the way.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

MOONCAKE_TICK_S = 3.0
MOONCAKE_BLOCK = 512
SESSION_RATE = 0.1
"""Sessions that begin each second, where a trace of sessions has no common clock."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace.

    arrival     seconds since the first
    runs        ids of the prompt's blocks of `block` tokens, run-length coded as (first, count)
    scope       within which ids mean something; empty: everywhere
    """

    arrival: float
    input_len: int
    output_len: int
    runs: tuple[tuple[int, int], ...] = ()
    block: int = 0
    scope: str = ""

    @property
    def prefix(self) -> list[str]:
        """One name for each block of the prompt, the last partial one included; equal name = equal prefix so far."""
        return [f"{self.scope}/{i}" for first, count in self.runs for i in range(first, first + count)]


def read_trace(path: Path, seed: int = 0) -> list[TraceRow]:
    """All requests of a trace, by arrival. Raises `ValueError` where no reader knows the file.

    `seed` draws what a trace leaves open: Mooncake's arrivals within a tick, and when WEKA's sessions begin.
    """
    with _open(path) as lines:
        first = next(lines, "")
        rest = _chain(first, lines)
        if first.startswith("TIMESTAMP,"):
            rows = list(_azure(rest))
        elif first.startswith("timestamp_s,"):
            rows = list(_servegen(rest))
        elif first.startswith("{") and "hash_ids" in first:
            rows = list(_mooncake(rest, random.Random(seed)))
        elif first.startswith("{") and "hash_id_scope" in first:
            rows = list(_weka(rest, random.Random(seed)))
        else:
            raise ValueError(f"{path.name}: no reader knows a trace that begins with {first[:40]!r}")
    rows.sort(key=lambda row: row.arrival)
    origin = rows[0].arrival if rows else 0.0
    return [replace(row, arrival=row.arrival - origin) for row in rows]


def fit(rows: Iterable[TraceRow], *, shrink: int = 1, max_len: int = 0, limit: int = 0) -> list[TraceRow]:
    """The part of a trace that a model can take: lengths divided by `shrink` (blocks too, so sharing is kept), rows
    longer than `max_len` tokens in all left out, and the first `limit` of what remains. 0: no bound."""
    kept: list[TraceRow] = []
    for row in rows:
        small = replace(
            row,
            input_len=max(1, row.input_len // shrink),
            output_len=max(1, row.output_len // shrink),
            block=row.block // shrink,
        )
        if not max_len or small.input_len + small.output_len <= max_len:
            kept.append(small)
        if limit and len(kept) == limit:
            break
    return kept


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _chain(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _azure(lines: Iterable[str]) -> Iterator[TraceRow]:
    for row in csv.DictReader(lines):
        stamp = row["TIMESTAMP"]
        whole, _, digits = stamp.partition(".")
        seconds = datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{digits or 0}")
        yield TraceRow(seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _servegen(lines: Iterable[str]) -> Iterator[TraceRow]:
    for row in csv.DictReader(lines):
        yield TraceRow(float(row["timestamp_s"]), int(row["input_length"]), int(row["output_length"]))


def _mooncake(lines: Iterable[str], rng: random.Random) -> Iterator[TraceRow]:
    """Timestamps come in ticks of three seconds; requests of one tick are spread over it, or each would be a burst."""
    for line in lines:
        row = json.loads(line)
        arrival = row["timestamp"] / 1000 + rng.uniform(0, MOONCAKE_TICK_S)
        runs = tuple((i, 1) for i in row["hash_ids"])
        yield TraceRow(arrival, row["input_length"], row["output_length"], runs, MOONCAKE_BLOCK)


def _weka(lines: Iterable[str], rng: random.Random) -> Iterator[TraceRow]:
    """Sessions begin at random, `SESSION_RATE` a second; within one, requests keep their recorded times. Ids are
    local to a session, so its own id goes in front."""
    begin = 0.0
    for line in lines:
        session = json.loads(line)
        yield from _weka_requests(session["requests"], begin, session["id"], session["block_size"])
        begin += rng.expovariate(SESSION_RATE)


def _weka_requests(requests: list[dict[str, Any]], begin: float, name: str, block: int) -> Iterator[TraceRow]:
    for entry in requests:
        at = begin + entry.get("t", 0.0)
        if entry.get("type") == "subagent":
            yield from _weka_requests(entry["requests"], at, name, block)
        elif entry.get("in") and entry.get("out"):
            runs = tuple((first, count) for first, count in entry.get("hash_runs", []))
            yield TraceRow(at, entry["in"], entry["out"], runs, block, name)
