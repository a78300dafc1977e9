"""A closed loop of requests on the engine loop in this process: so many at any time, all lengths known.

Prompts are random tokens and share nothing. To see a steady state at once, the first requests come as if they had
answered a part already: their prompts are longer and their answers shorter, by lengths that are spread evenly.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ...common.errors import BatonError
from ...common.messages import StepReport
from ...common.types import Request, SamplingParams
from ...engine.runner import Engine
from .local import MAX_POSTS, LocalWorker


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
    """`load` on a worker of its own."""

    def __init__(
        self, engine: Engine, load: Load, max_batch_tokens: int, overlap: bool, spread: bool, seed: int = 0
    ) -> None:
        """`spread`: see the top of this file."""
        self._worker = LocalWorker(engine, max_batch_tokens, load.concurrency, overlap, self._hear)
        self._rng = random.Random(seed)
        self._vocab = engine.vocab_size
        self._load = load
        self._live: set[int] = set()
        self._ending = False
        self._finished = 0
        self._due = [load.output * number // load.concurrency if spread else 0 for number in range(load.concurrency)]
        self.loop = self._worker.loop

    @property
    def live(self) -> int:
        """Requests that have begun, or are about to, and have not ended."""
        return len(self._live) + len(self._due)

    def fill(self) -> None:
        """Go round until all of the first requests decode."""
        self.step(1)
        while self._due or self.loop.load().waiting:
            self.step(1)

    def run(self, seconds: float) -> Window:
        """Go round for so long. Raises `BatonError` where a request fails."""
        stats = self.loop.context.stats
        steps, tokens, preemptions, finished = stats.steps, stats.output_tokens, stats.preemptions, self._finished
        begin = time.perf_counter()
        while (now := time.perf_counter()) < begin + seconds:
            self.step(1)
        return Window(
            now - begin, stats.steps - steps, stats.output_tokens - tokens, self._finished - finished,
            stats.preemptions - preemptions,
        )  # fmt: skip

    def step(self, count: int) -> None:
        """Rounds of the loop, each with the requests that are due before it."""
        for _ in range(count):
            now, self._due = self._due[:MAX_POSTS], self._due[MAX_POSTS:]
            for answered in now:
                self._submit(answered)
            self.loop.step()

    def close(self) -> None:
        """Cancel what runs; nothing is left."""
        self._ending, self._due = True, []
        self._worker.close(list(self._live))

    def _submit(self, answered: int) -> None:
        count = self._load.prompt + answered
        tokens = tuple(self._rng.choices(range(self._vocab), k=count))
        params = SamplingParams(max_tokens=self._load.output - answered, temperature=0.0, ignore_eos=True)
        self._live.add(self._worker.submit(Request("bench", tokens, count, params)))

    def _hear(self, report: StepReport) -> None:
        if report.failed and not self._ending:
            raise BatonError(f"a request failed: {report.failed[0].message}")
        for done in report.finished:
            self._live.discard(done.ticket)
            self._finished += 1
            if not self._ending:
                self._due.append(0)


@contextmanager
def closed_loop(
    engine: Engine, load: Load, max_batch_tokens: int, overlap: bool, spread: bool = True
) -> Iterator[ClosedLoop]:
    """One in its steady state, and nothing of it left afterwards."""
    loop = ClosedLoop(engine, load, max_batch_tokens, overlap, spread)
    try:
        loop.fill()
        yield loop
    finally:
        loop.close()
