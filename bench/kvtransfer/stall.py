"""Whether handovers that arrive slow down a decode worker's steps: inter-token latency with and without them.

A real decode worker decodes a steady batch on one thread. A second process (`replay.py`) hands recorded KV over to its
prefix cache at a limited rate, computing nothing and decoding nothing, so that only the transfer counts; the other
core is its, and that of the threads that take the bytes in. Quiet windows and windows in which KV arrives take turns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from ...common.config import EngineConfig, HandoverConfig, WorkerConfig
from ...common.errors import BatonError
from ...common.messages import Share, Submit
from ...common.types import Role, WorkerRef
from .fleet import Fleet, fleet, request

SETTLE_S = 0.3
"""At the begin of each window, what still comes of the one before is let pass."""

TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the decode worker has to do. `rate`: handovers of `tokens` tokens a second, in windows of `window_s`, as
    many quiet as busy ones."""

    streams: int = 8
    prompt: int = 128
    answer: int = 6000
    tokens: int = 1024
    rate: float = 2.0
    windows: int = 20
    window_s: float = 2.5


@dataclass(frozen=True, slots=True)
class Stall:
    """Gaps between tokens, of all streams, in seconds. `arrived`: bytes of all handovers, which took `arriving_s`."""

    transport: str
    quiet: list[float]
    arriving: list[float]
    arrived: int
    arriving_s: float

    @property
    def ratio(self) -> float:
        """By how much handovers lengthen the 99th percentile."""
        return percentile(self.arriving, 99) / percentile(self.quiet, 99)

    @property
    def gb_per_s(self) -> float:
        return self.arrived / self.arriving_s / 1e9


def percentile(values: Iterable[float], share: float) -> float:
    return float(np.percentile(list(values), share))


@dataclass(frozen=True, slots=True)
class Window:
    begin: float
    end: float
    busy: bool


def gaps(arrivals: Iterable[list[float]], windows: list[Window], busy: bool) -> list[float]:
    """Of tokens that follow each other within one window of that kind, its first moments left out."""
    spans = [(w.begin + SETTLE_S, w.end) for w in windows if w.busy == busy]
    return [
        after - before
        for times in arrivals
        for before, after in pairwise(times)
        if any(begin <= before and after <= end for begin, end in spans)
    ]


async def measure(model: Path, transport: str, load: Load) -> Stall:
    """Raises `BatonError` where a worker does not start, a request fails or KV does not arrive."""
    engine = EngineConfig(model=str(model), kv_memory=2 << 30, threads=1)
    handover = HandoverConfig(transport=transport)
    rng, windows = np.random.default_rng(0), []
    async with fleet() as workers:
        decode = await workers.start(WorkerConfig(name="decode", role=Role.DECODE, engine=engine, handover=handover))
        source = WorkerConfig(
            name="source", role=Role.COLOCATED, handover=handover, engine=replace(engine, kv_memory=1 << 29)
        )
        await workers.start(source, "baton.bench.kvtransfer.replay", workers.infos["decode"].fingerprint)
        tickets = [workers.ticket() for _ in range(load.streams)]
        for ticket in tickets:
            workers.send("source", Submit(ticket, 1, request(load.prompt, load.answer, rng), decode))
        await workers.until(lambda: all(len(workers.arrivals[t]) > 2 for t in tickets), TIMEOUT_S)
        await _window(workers, decode, load, rng)  # opens the connections
        before = workers.loads["source"].handover_bytes
        for number in range(load.windows):
            order = (False, True) if number % 2 else (True, False)
            windows += [await _window(workers, decode, load if busy else None, rng, load.window_s) for busy in order]
        if workers.finished & set(tickets):
            raise BatonError("the streams ended before measuring was over: give them longer answers")
        arrived = workers.loads["source"].handover_bytes - before
        if (
            arrived
            < 0.9 * load.windows * load.rate * load.window_s * load.tokens * workers.infos["decode"].kv_bytes_per_token
        ):
            raise BatonError(f"only {arrived} bytes arrived")
        times = [workers.arrivals[ticket] for ticket in tickets]
    busy_s = sum(w.end - w.begin for w in windows if w.busy)
    return Stall(transport, gaps(times, windows, False), gaps(times, windows, True), arrived, busy_s)


async def _window(
    workers: Fleet, decode: WorkerRef, load: Load | None, rng: np.random.Generator, seconds: float = 1.0
) -> Window:
    """`load`: with handovers at its rate; None: without."""
    begin = time.monotonic()
    if load is None:
        await asyncio.sleep(seconds)
        return Window(begin, time.monotonic(), False)
    for number in range(max(1, round(seconds * load.rate))):
        await asyncio.sleep(begin + number / load.rate - time.monotonic())
        await _hand_over(workers, decode, load.tokens, rng)
    await asyncio.sleep(begin + seconds - time.monotonic())
    return Window(begin, time.monotonic(), True)


async def _hand_over(workers: Fleet, decode: WorkerRef, tokens: int, rng: np.random.Generator) -> None:
    """Have the source take a prompt into its cache, which costs it nothing, and hand it over from there."""
    asked = request(tokens, 1, rng)
    cached = workers.ticket()
    workers.send("source", Submit(cached, 1, asked))
    await workers.until(lambda: cached in workers.finished, TIMEOUT_S)
    workers.send("source", Share(workers.ticket(), asked, decode))
