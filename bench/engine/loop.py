"""The real engine loop in this process, fed in a closed loop: no server, no wire, every answer's length known.

Prompts are random tokens and share nothing. To see a steady state at once, the first requests come as if they had
answered a part already: their prompts are longer and their answers shorter, by lengths that are spread evenly.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ...common.clock import RealClock
from ...common.config import HandoverConfig
from ...common.errors import BatonError
from ...common.hashing import BlockHasher
from ...common.messages import Cancel, Endpoint, Submit
from ...common.types import Request, Role, SamplingParams, WorkerRef
from ...engine.block_table import BlockTable
from ...engine.loop import EngineLoop
from ...engine.mailbox import FromRouter, Inbox, Mail, Outbox, RouterJoined
from ...engine.role import Context, Limits
from ...engine.runner import Engine
from ...kvtransfer.plane import Plane, this_host
from ...worker.cast import Cast
from ...worker.compute import store_of

ROUTER = "bench"
MAX_POSTS = 256
"""Requests that are posted in one round: fewer than the inbox takes of one router."""


@dataclass(frozen=True, slots=True)
class Load:
    """`concurrency` requests at any time, with prompts and answers of these lengths."""

    concurrency: int
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen in some seconds of a steady state. `preemptions` should be 0."""

    seconds: float
    steps: int
    tokens: int
    finished: int
    preemptions: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class ClosedLoop:
    """A colocated worker's loop over `engine`, which it alone uses while it lives."""

    def __init__(self, engine: Engine, max_batch_tokens: int, max_running: int, overlap: bool, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._vocab = engine.vocab_size
        self._load = Load(0, 0, 0)
        self._tickets = 0
        self._live: set[int] = set()
        self.finished = 0
        ref = WorkerRef("bench", "", 1)
        inbox, clock, handover = Inbox(), RealClock(), HandoverConfig()
        store = store_of(engine.pool, checked=False)
        self._plane = Plane(ref, store, handover, "", "127.0.0.1", clock, None, inbox.post, None, "")
        context = Context(
            endpoint=Endpoint(ref, engine.fingerprint, engine.format, this_host(), (self._plane.door,)),
            table=BlockTable(engine.num_blocks, BlockHasher(engine.format.block_size)),
            outbox=Outbox(),
            limits=Limits(
                vocab_size=engine.vocab_size, eos_ids=engine.eos_ids, max_model_len=engine.max_model_len,
                max_batch_tokens=max_batch_tokens, max_running=max_running, max_waiting=1 << 16,
            ),
            handover=handover,
        )  # fmt: skip
        roles = Cast(context, self._plane.inlet, self._plane.outlet).play(Role.COLOCATED)
        self.loop = EngineLoop(context, roles, engine.runner, inbox, clock, self._deliver, overlap)
        self._post = inbox.post
        self._post(RouterJoined(ROUTER))

    @property
    def live(self) -> int:
        """Requests that have been submitted and not ended."""
        return len(self._live)

    def fill(self, load: Load, spread: bool = True) -> None:
        """Submit the first requests, and go round until all of them decode. `spread`: see the top of this file."""
        self._load = load
        for number in range(load.concurrency):
            self._submit(load.output * number // load.concurrency if spread else 0)
            if number % MAX_POSTS == MAX_POSTS - 1:
                self.loop.step()
        self.loop.step()
        while self.loop.load().waiting:
            self.loop.step()

    def run(self, seconds: float) -> Window:
        """Go round for so long. Raises `BatonError` where a request fails."""
        stats = self.loop.context.stats
        steps, tokens, preemptions, finished = stats.steps, stats.output_tokens, stats.preemptions, self.finished
        begin = time.perf_counter()
        while (now := time.perf_counter()) < begin + seconds:
            self.loop.step()
        return Window(
            now - begin, stats.steps - steps, stats.output_tokens - tokens, self.finished - finished,
            stats.preemptions - preemptions,
        )  # fmt: skip

    def step(self, count: int) -> None:
        for _ in range(count):
            self.loop.step()

    def close(self) -> None:
        """Cancel what runs, go round until nothing is left, and hang up."""
        self._load = Load(0, 0, 0)
        for number, ticket in enumerate(self._live):
            self._post(FromRouter(ROUTER, Cancel(ticket)))
            if number % MAX_POSTS == MAX_POSTS - 1:
                self.loop.step()
        while self.loop.step() or self._busy():
            pass
        self._plane.stop()

    def _busy(self) -> bool:
        load = self.loop.load()
        return bool(load.running or load.waiting)

    def _submit(self, answered: int = 0) -> None:
        self._tickets += 1
        self._live.add(self._tickets)
        count = self._load.prompt + answered
        tokens = tuple(self._rng.choices(range(self._vocab), k=count))
        params = SamplingParams(max_tokens=self._load.output - answered, temperature=0.0, ignore_eos=True)
        request = Request(str(self._tickets), tokens, count, params)
        self._post(FromRouter(ROUTER, Submit(self._tickets, 1, request)))

    def _deliver(self, mail: Mail) -> None:
        for report in mail.reports.values():
            for failed in report.failed:
                if failed.ticket in self._live and self._load.concurrency:
                    raise BatonError(f"a request failed: {failed.message}")
            for done in report.finished:
                self._live.discard(done.ticket)
                self.finished += 1
                if len(self._live) < self._load.concurrency:
                    self._submit()


@contextmanager
def closed_loop(
    engine: Engine, load: Load, max_batch_tokens: int, overlap: bool, spread: bool = True
) -> Iterator[ClosedLoop]:
    """One in its steady state, and nothing of it left afterwards."""
    loop = ClosedLoop(engine, max_batch_tokens, load.concurrency, overlap)
    try:
        loop.fill(load, spread)
        yield loop
    finally:
        loop.close()
