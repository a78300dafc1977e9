"""A stand-in worker: the real protocol on loopback, tokens from a formula instead of a model.

The next token is a function of the prompt and the position alone (`oracle`), so a request that is resumed elsewhere
must come out the same. A prefill worker hands over by calling the decode worker of the same `Fleet` in process.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from baton.common.cluster import Members, WorkerState, WorkerStatus
from baton.common.errors import PoolFull, StaleEpoch
from baton.common.messages import (
    Cancel,
    CheckReport,
    Failed,
    Finished,
    HandedOver,
    Hello,
    KvEvents,
    Load,
    Resync,
    Started,
    StepReport,
    Submit,
    TokenOut,
    Tokens,
    Turn,
)
from baton.common.types import FinishReason, Request, Role, WorkerInfo, WorkerRef
from baton.protos.convert import FromRouter, FromSource, FromTarget, FromWorker
from baton.protos.rpc import Stream, listen, make_server, worker_handlers

VOCAB = 32_000
HEARTBEAT_S = 0.1


def oracle(prompt: Sequence[int], position: int) -> int:
    """The token at an absolute position of the continuation of `prompt`."""
    return (sum(prompt) * 31 + position * 7) % VOCAB


def expected(request: Request) -> list[int]:
    """All output tokens of a request that ends by length."""
    prompt = request.tokens[: request.prompt_len]
    return [oracle(prompt, request.prompt_len + i) for i in range(request.params.max_tokens)]


@dataclass(slots=True)
class Running:
    """A request that decodes here."""

    request: Request
    ticket: int
    position: int
    end: int


@dataclass(eq=False, slots=True)
class _Router:
    """One router's session: what runs for it, and what is to be told."""

    stream: Stream[FromRouter, FromWorker]
    running: dict[int, Running] = field(default_factory=dict)
    events: dict[str, list[Any]] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, kind: str, event: object) -> None:
        self.events.setdefault(kind, []).append(event)
        self.news.set()


class FakeWorker:
    """step_s: seconds between two steps (0: as fast as the wire takes them). `refuse`: that many Submits are answered
    with PoolFull. `freeze()` stops all output while the connection stays; `kill()` breaks everything at once."""

    _epochs = itertools.count(1)

    def __init__(
        self, name: str, role: Role = Role.COLOCATED, *, step_s: float = 0.0, token: str = "", fingerprint: str = "f",
        max_model_len: int = 4096, total_blocks: int = 4096,
    ) -> None:  # fmt: skip
        self.name, self.role, self.step_s, self.token = name, role, step_s, token
        self.epoch = next(self._epochs)
        self.fingerprint, self.max_model_len, self.total_blocks = fingerprint, max_model_len, total_blocks
        self.refuse = 0
        self.loop_age_s = 0.0
        self.address = ""
        self.peers: dict[str, FakeWorker] = {}
        self.submits: list[Submit] = []
        self.cancels: list[int] = []
        self._routers: dict[str, _Router] = {}
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._server: Any = None

    async def start(self) -> None:
        self._server = make_server(self.token, worker_handlers(self))
        self.address = listen(self._server, "127.0.0.1", 0)
        await self._server.start()

    async def kill(self) -> None:
        """Die: all streams break."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(0)
        self._routers.clear()

    def freeze(self) -> None:
        self._thawed.clear()

    def thaw(self) -> None:
        self._thawed.set()

    @property
    def running(self) -> int:
        return sum(len(router.running) for router in self._routers.values())

    @property
    def status(self) -> WorkerStatus:
        return WorkerStatus(self.name, self.role.value, WorkerState.READY, self.address, self.epoch, 1.0)

    @property
    def ref(self) -> WorkerRef:
        return WorkerRef(self.name, self.address, self.epoch)

    # --- the protocol ---

    async def session(self, stream: Stream[FromRouter, FromWorker]) -> None:
        hello = await stream.read()
        assert isinstance(hello, Hello)
        if hello.worker_epoch not in (0, self.epoch):
            raise StaleEpoch(f"this is epoch {self.epoch}")
        await self._thawed.wait()
        await stream.write(
            WorkerInfo(
                self.ref, self.role, self.fingerprint, "fake", 16, self.total_blocks, self.max_model_len, 1024, VOCAB
            )
        )
        await stream.write(StepReport(kv=(KvEvents(0, reset=True),), load=self._load()))
        router = self._routers[hello.router] = _Router(stream)
        steps = asyncio.create_task(self._steps(router))
        try:
            while (message := await stream.read()) is not None:
                await self._thawed.wait()
                self._receive(hello.router, router, message)
        finally:
            steps.cancel()
            if self._routers.get(hello.router) is router:
                del self._routers[hello.router]

    async def control(self, stream: Stream[FromSource, FromTarget]) -> None:
        raise NotImplementedError  # handovers stay in this process

    async def check(self) -> CheckReport:
        return CheckReport(ok=not self.running, sequences=self.running)

    async def turn(self, order: Turn) -> None:
        raise NotImplementedError  # these keep their roles

    def _receive(self, name: str, router: _Router, message: FromRouter) -> None:
        match message:
            case Submit():
                self._submit(name, router, message)
            case Cancel(ticket):
                self.cancels.append(ticket)
                router.running.pop(ticket, None)
            case Resync():
                router.tell("kv", KvEvents(0, reset=True))

    def _submit(self, name: str, router: _Router, submit: Submit) -> None:
        self.submits.append(submit)
        if self.refuse > 0:
            self.refuse -= 1
            router.tell("failed", Failed(submit.ticket, PoolFull.code, "no room"))
            return
        router.tell("started", Started(submit.ticket, 0))
        target = self if submit.decode is None else self.peers.get(submit.decode.name)
        home = target._routers.get(name) if target else None
        if target is None or home is None:
            router.tell("failed", Failed(submit.ticket, "worker_lost", "the decode worker is gone"))
            return
        request = submit.request
        home.running[submit.ticket] = Running(
            request, submit.ticket, len(request.tokens), request.prompt_len + request.params.max_tokens
        )
        home.news.set()
        if submit.decode is not None:
            router.tell("handed_over", HandedOver(submit.ticket))

    async def _steps(self, router: _Router) -> None:
        while True:
            if router.running:
                await asyncio.sleep(self.step_s)
            else:
                with suppress(TimeoutError):
                    await asyncio.wait_for(router.news.wait(), HEARTBEAT_S)
            await self._thawed.wait()
            router.news.clear()
            tokens = [self._next(router, running) for running in list(router.running.values())]
            events = {kind: tuple(found) for kind, found in router.events.items()}
            router.events = {}
            await router.stream.write(StepReport(tokens=Tokens.of(tokens), **events, load=self._load()))

    def _next(self, router: _Router, running: Running) -> TokenOut:
        request = running.request
        token = TokenOut(
            running.ticket, running.position, oracle(request.tokens[: request.prompt_len], running.position)
        )
        running.position += 1
        if running.position >= running.end:
            router.running.pop(running.ticket)
            router.events.setdefault("finished", []).append(Finished(running.ticket, FinishReason.LENGTH))
        return token

    def _load(self) -> Load:
        return Load(
            running=self.running,
            total_blocks=self.total_blocks,
            free_blocks=self.total_blocks,
            prefill_tokens_per_s=10_000,
            decode_step_s=self.step_s or 0.001,
            loop_age_s=self.loop_age_s,
        )


@asynccontextmanager
async def fleet(*workers: FakeWorker) -> AsyncIterator[dict[str, FakeWorker]]:
    """Start these workers, each knowing all others, and kill them at the end."""
    peers = {worker.name: worker for worker in workers}
    for worker in workers:
        worker.peers = peers
        await worker.start()
    try:
        yield peers
    finally:
        for worker in workers:
            worker.thaw()
            await worker.kill()


async def members_of(*workers: FakeWorker) -> AsyncIterator[Members]:
    """A membership that names these workers once."""
    yield Members(1, tuple(worker.status for worker in workers))
