"""The workers as the router knows them: what they said last, and what this router gave them since."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..common.messages import Load, TokenOut
from ..common.types import Role, WorkerInfo


@dataclass(slots=True)
class Attempt:
    """One try of one request on a pair of workers, and what it is charged with there.

    `tokens` (of prefill) and `blocks` (of the decode worker) are charged until the first token is here: `begun`.
    `begins`: output tokens that the request had before. `source` is False once the prefill worker is out of it.
    """

    ticket: int
    prefill: str
    decode: str | None
    tokens: int = 0
    blocks: int = 0
    begins: int = 0
    computing: bool = False
    """Prefill has begun."""
    begun: bool = False
    source: bool = True
    moving: Worker | None = None
    """Where it is on its way to, while it runs."""
    early: list[TokenOut] = field(default_factory=list)
    """What came from there ahead of what it left says last."""
    not_before: float = 0.0
    """When it may be moved: not at once after that could not be done."""

    @property
    def decoder(self) -> str:
        """The worker that decodes."""
        return self.decode or self.prefill


@dataclass(eq=False, slots=True)
class Worker:
    """One session with one incarnation of a worker. What it had of us by an earlier session, it has given up.

    A load report lags by a step, and this router's own books know nothing of other routers; so each quantity is the
    larger of what the worker reports and what this router has there.
    """

    info: WorkerInfo
    heard: float
    load: Load | None = None
    """None until the first report: not usable yet."""
    draining: bool = False
    """It takes nothing new."""
    leaving: bool = False
    """Nor does it keep what it has: running requests move to others."""
    stalled: bool = False
    tickets: set[int] = field(default_factory=set)
    own_tokens: int = 0
    own_blocks: int = 0
    own_batch: int = 0

    @property
    def name(self) -> str:
        return self.info.ref.name

    @property
    def usable(self) -> bool:
        """May take new requests."""
        return self.load is not None and not (self.draining or self.leaving or self.stalled)

    @property
    def state(self) -> str:
        """For people: loading, ready, draining, leaving or stalled."""
        if self.stalled:
            return "stalled"
        if self.leaving or self.draining:
            return "leaving" if self.leaving else "draining"
        return "ready" if self.load is not None else "loading"

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that wait here to be computed."""
        return max(self.load.queued_prefill_tokens if self.load else 0, self.own_tokens)

    @property
    def batch(self) -> int:
        """Requests that decode here or soon will."""
        return max(self.load.running + self.load.waiting if self.load else 0, self.own_batch)

    @property
    def available_blocks(self) -> int:
        """KV blocks that a new request can get: free, or cached and not in use."""
        if self.load is None:
            return 0
        load = self.load
        return load.free_blocks + load.cached_blocks + load.reserved_blocks - max(load.reserved_blocks, self.own_blocks)

    @property
    def longest(self) -> int:
        """Tokens of one request, prompt and output, that this worker can hold at most."""
        return min(self.info.max_model_len, self.info.total_blocks * self.info.block_size)


class Fleet:
    """All workers with which a session stands, by name."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self._draining: frozenset[str] = frozenset()
        self._leaving: frozenset[str] = frozenset()

    def enter(self, worker: Worker) -> None:
        """A session with it stands."""
        self.workers[worker.name] = worker
        self.mark(self._draining, self._leaving)

    def mark(self, draining: frozenset[str], leaving: frozenset[str]) -> None:
        """Exactly these take nothing new, now and when they come anew."""
        self._draining, self._leaving = draining, leaving
        for name, worker in self.workers.items():
            worker.draining, worker.leaving = name in draining, name in leaving

    def usable(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.usable]

    def charge(self, attempt: Attempt) -> None:
        """Enter an attempt in the books of its workers."""
        source, decoder = self.workers[attempt.prefill], self.workers[attempt.decoder]
        for worker in (source, decoder):
            worker.tickets.add(attempt.ticket)
        source.own_tokens += attempt.tokens
        decoder.own_blocks += attempt.blocks
        decoder.own_batch += 1

    def begun(self, attempt: Attempt) -> None:
        """The first token is here: prefill is done, and the decode worker reports its blocks itself."""
        if source := self._holder(attempt, attempt.prefill):
            source.own_tokens -= attempt.tokens
        if decoder := self._holder(attempt, attempt.decoder):
            decoder.own_blocks -= attempt.blocks
        attempt.tokens = attempt.blocks = 0
        attempt.begun = True

    def handed_over(self, attempt: Attempt) -> None:
        """The prefill worker is out of it."""
        if attempt.decode is None or not attempt.source:
            return
        attempt.source = False
        if source := self._holder(attempt, attempt.prefill):
            source.own_tokens -= attempt.tokens
            source.tickets.discard(attempt.ticket)
        attempt.tokens = 0

    def moved(self, attempt: Attempt, target: Worker) -> None:
        """Another worker decodes it from here on."""
        if worker := self._holder(attempt, attempt.decoder):
            worker.tickets.discard(attempt.ticket)
            worker.own_batch -= 1
        target.tickets.add(attempt.ticket)
        target.own_batch += 1
        attempt.decode, attempt.source, attempt.moving = target.name, False, None

    def release(self, attempt: Attempt) -> list[str]:
        """Take an attempt out of all books. Returns the workers that are there and still held it."""
        self.begun(attempt)
        holders = []
        for name in dict.fromkeys((attempt.prefill, attempt.decoder)):
            if worker := self._holder(attempt, name):
                worker.tickets.discard(attempt.ticket)
                worker.own_batch -= name == attempt.decoder
                holders.append(name)
        return holders

    def _holder(self, attempt: Attempt, name: str) -> Worker | None:
        """The worker of that name, unless it is gone or is another incarnation, which knows nothing of this attempt."""
        worker = self.workers.get(name)
        return worker if worker is not None and attempt.ticket in worker.tickets else None


def has_pair(workers: list[Worker]) -> bool:
    """Whether some of these can serve a request together: one that does both, or two with equal fingerprints."""
    prefills = {w.info.fingerprint for w in workers if w.info.role is Role.PREFILL}
    decodes = {w.info.fingerprint for w in workers if w.info.role is Role.DECODE}
    return bool(prefills & decodes) or any(w.info.role is Role.COLOCATED for w in workers)
