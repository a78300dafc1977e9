"""The real engine loop in this process, over a real engine: no server, no wire. Who calls goes round himself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ...common.clock import RealClock
from ...common.config import HandoverConfig
from ...common.errors import BatonError
from ...common.hashing import BlockHasher
from ...common.messages import Cancel, Endpoint, StepReport, Submit, TokenOut
from ...common.types import Request, Role, WorkerRef
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
"""Messages that are posted in one round: fewer than the inbox takes of one router."""


class LocalWorker:
    """A colocated worker's loop. It alone uses `engine` while it lives; `hear` gets what it would tell a router."""

    def __init__(
        self, engine: Engine, max_batch_tokens: int, max_running: int, overlap: bool, hear: Callable[[StepReport], None]
    ) -> None:
        self._hear = hear
        self._tickets = 0
        self._inbox = Inbox()
        ref, clock, handover = WorkerRef("bench", "", 1), RealClock(), HandoverConfig()
        store = store_of(engine.pool, checked=False)
        self._plane = Plane(ref, store, handover, "", "127.0.0.1", clock, None, self._inbox.post, None, "")
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
        self.loop = EngineLoop(context, roles, engine.runner, self._inbox, clock, self._deliver, overlap)
        self._inbox.post(RouterJoined(ROUTER))

    def submit(self, request: Request) -> int:
        """Its ticket. At most `MAX_POSTS` may be submitted in one round."""
        self._tickets += 1
        self._inbox.post(FromRouter(ROUTER, Submit(self._tickets, 1, request)))
        return self._tickets

    def close(self, tickets: Iterable[int] = ()) -> None:
        """Cancel what still runs, go round until nothing is left, and hang up."""
        for number, ticket in enumerate(tickets, 1):
            self._inbox.post(FromRouter(ROUTER, Cancel(ticket)))
            if number % MAX_POSTS == 0:
                self.loop.step()
        while self.loop.step() or self.loop.load().running + self.loop.load().waiting:
            pass
        self._plane.stop()

    def _deliver(self, mail: Mail) -> None:
        for report in mail.reports.values():
            self._hear(report)


def answers(engine: Engine, requests: Sequence[Request], max_batch_tokens: int, overlap: bool) -> list[list[TokenOut]]:
    """What each request is answered, all of them (`MAX_POSTS` at most) running together. Raises `BatonError` where one
    fails."""
    heard: dict[int, list[TokenOut]] = {}
    failures: list[str] = []

    def hear(report: StepReport) -> None:
        for token in report.tokens:
            heard.setdefault(token.ticket, []).append(token)
        failures.extend(failed.message for failed in report.failed)

    worker = LocalWorker(engine, max_batch_tokens, len(requests), overlap, hear)
    tickets = [worker.submit(request) for request in requests]
    worker.close()
    if failures:
        raise BatonError(f"a request failed: {failures[0]}")
    return [heard.get(ticket, []) for ticket in tickets]
