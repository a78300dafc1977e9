"""What tests of real processes have in common that are ended or frozen on purpose: the process, who else is there, and
what must hold in the end."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

from baton.common.cluster import Members, WorkerStatus
from baton.common.config import RouterConfig
from baton.common.messages import CheckReport
from baton.common.types import Role, WorkerRef
from baton.protos.rpc import Peer
from baton.router.service import Router
from tests.house import House
from tests.toy import BLOCK_SIZE
from tests.worker import toy_process
from tests.worker.asking import answered
from tests.worker.toy_process import Reach, Sick, toy_engine

LEASE_S = 0.75
FREEZE_S = 2 * LEASE_S
CASE_S = 40.0
"""How long a case may take on a machine that is busy with others."""

fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload([toy_process.__name__])


class Process:
    """A worker that strikes itself."""

    def __init__(self, sick: Sick) -> None:
        self.hears, says = fork.Pipe()
        self._process = fork.Process(target=toy_process.main, args=(sick, says), daemon=True)
        self._process.start()
        says.close()

    async def ref(self) -> WorkerRef:
        assert await asyncio.to_thread(self.hears.poll, CASE_S), "it never started"
        ref: WorkerRef = self.hears.recv()
        return ref

    async def struck(self) -> None:
        """It is at its point."""
        assert await asyncio.to_thread(self.hears.poll, CASE_S), "it never came there"

    def reach(self, tokens: float) -> None:
        with contextlib.suppress(OSError):  # it may have killed itself
            self.hears.send(tokens)

    def wake(self) -> None:
        os.kill(self._process.pid or 0, signal.SIGCONT)

    async def end(self) -> None:
        self._process.kill()
        await asyncio.to_thread(self._process.join)


class Fleet:
    """Who is there, as a controller would say it."""

    def __init__(self) -> None:
        self._states: dict[WorkerRef, str] = {}
        self._changed = asyncio.Event()

    def add(self, ref: WorkerRef, state: str = "ready") -> None:
        """It is there, or is in another state now."""
        self._states[ref] = state
        self._changed.set()

    def remove(self, ref: WorkerRef) -> None:
        """It is there no more."""
        del self._states[ref]
        self._changed.set()

    async def members(self) -> AsyncIterator[Members]:
        while True:
            self._changed.clear()
            statuses = tuple(WorkerStatus(r.name, "", state, r.address, r.epoch) for r, state in self._states.items())
            yield Members(len(statuses), statuses)
            await self._changed.wait()


class Scene:
    """A worker that will strike itself, healthy ones, and the router of all."""

    def __init__(self, sick: Sick, process: Process, config: RouterConfig) -> None:
        self.sick = sick
        self.process, self.fleet, self.house = process, Fleet(), House()
        self._reach = Reach(sick.reach)
        self.router = Router("router", config, "secret")
        self._ref: WorkerRef | None = None

    async def admit(self) -> WorkerRef:
        """The worker that strikes itself joins the others."""
        ref = self._ref = await self.process.ref()
        self.fleet.add(ref)
        return ref

    async def healthy(self, name: str, role: Role) -> WorkerRef:
        """A worker that stays as it is joins the others."""
        engine = toy_engine(LEASE_S, self.sick.step_s if role is Role.DECODE else 0.0)
        worker = await self.house.worker(name, role, engine, **self.sick.handover)
        self._reach.of(worker)
        self.fleet.add(worker.ref)
        return worker.ref

    def reach(self, tokens: float) -> None:
        """From now on requests may have so many tokens, wherever they run."""
        self._reach.tokens = tokens
        self.process.reach(tokens)

    async def ready(self, workers: int) -> None:
        """So many workers are there and can be used."""
        while sum(w.state == "ready" for w in self.router.snapshot().workers) < workers:
            await asyncio.sleep(0.01)

    async def answers(self, numbers: Iterable[int], length: int) -> None:
        """Some streams side by side, token by token."""
        await asyncio.gather(*(answer(self.router, prompt(number), length) for number in numbers))

    async def wakes(self, numbers: Iterable[int], length: int) -> None:
        """It was frozen for longer than anybody waits for it, and wakes while these streams run."""
        await asyncio.sleep(FREEZE_S)
        running = asyncio.create_task(self.answers(numbers, length))
        self.process.wake()
        await running

    async def balanced(self) -> None:
        """Everybody's books balance, also those of the one that woke."""
        await self.house.balanced(within_s=CASE_S)
        if self.sick.signal == signal.SIGSTOP and self._ref is not None:
            await until(self._ref, lambda r: r.pinned_blocks == r.reserved_blocks == r.sequences == r.handovers == 0)


@asynccontextmanager
async def scene(sick: Sick, **config: object) -> AsyncIterator[Scene]:
    router = RouterConfig(**{"lease_s": LEASE_S, "heartbeat_s": 0.1, "max_attempts": 1000, "max_losses": 100, **config})  # type: ignore[arg-type]
    made = Scene(sick, await asyncio.to_thread(Process, sick), router)  # the first one waits for the imports of all
    try:
        await made.router.start(made.fleet.members())
        async with asyncio.timeout(CASE_S):
            yield made
    finally:
        await made.process.end()
        await made.router.close()
        await made.house.close()


def prompt(number: int) -> list[int]:
    """Five blocks and a bit, no two alike."""
    return [number, *range(100, 100 + 5 * BLOCK_SIZE + 2)]


async def answer(router: Router, tokens: list[int], length: int) -> None:
    """One stream that begins with these tokens."""
    await answered(router, str(tokens[0]), tokens, length)


async def until(ref: WorkerRef, holds: Callable[[CheckReport], bool]) -> None:
    """A worker's own account, asked for again and again. Its books balance all the while."""
    peer = Peer(ref.address, "secret")
    try:
        while not holds(report := await peer.check(CASE_S)):
            assert report.ok, report.problem
            await asyncio.sleep(0.02)
        assert report.ok, report.problem
    finally:
        await peer.close()


async def every(points: Iterable[str], case: Callable[[str], Awaitable[None]], abreast: int) -> None:
    """Every point, some side by side."""
    names, places = list(points), asyncio.Semaphore(abreast)

    async def one(point: str) -> None:
        async with places:
            await case(point)

    ended = await asyncio.gather(*map(one, names), return_exceptions=True)
    failed = [f"{point}: {error!r}" for point, error in zip(names, ended, strict=True) if error is not None]
    assert not failed, "\n".join(failed)
