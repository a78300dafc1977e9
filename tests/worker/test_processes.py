"""Real processes, ended or frozen on purpose in every state of a handover: each stream ends with the oracle's tokens,
each of them once, everybody's books balance, and what the frozen one says when it wakes changes nothing."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import product
from typing import Any

import pytest

from baton.common.cluster import Members, WorkerStatus
from baton.common.config import RouterConfig
from baton.common.messages import CheckReport
from baton.common.types import Role, WorkerRef
from baton.protos.rpc import Peer
from baton.router.service import Router
from tests.house import House
from tests.toy import BLOCK_SIZE, ToyEngine, oracle, request
from tests.worker import toy_process
from tests.worker.toy_process import SOURCE, TARGET, Sick

LEASE_S = 0.75
FREEZE_S = 2 * LEASE_S
CASE_S = 40.0
"""How long a case may take on a machine that is busy with others."""
ABREAST = 6
LENGTH = 24

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload([toy_process.__name__])


class Process:
    """A worker that strikes itself."""

    def __init__(self, sick: Sick) -> None:
        self.hears, says = _fork.Pipe()
        self._process = _fork.Process(target=toy_process.main, args=(sick, says), daemon=True)
        self._process.start()
        says.close()

    async def ref(self) -> WorkerRef:
        assert await asyncio.to_thread(self.hears.poll, CASE_S), "it never started"
        ref: WorkerRef = self.hears.recv()
        return ref

    async def struck(self) -> None:
        """It is at its point."""
        assert await asyncio.to_thread(self.hears.poll, CASE_S), "it never came there"

    def wake(self) -> None:
        os.kill(self._process.pid or 0, signal.SIGCONT)

    async def end(self) -> None:
        self._process.kill()
        await asyncio.to_thread(self._process.join)


class Fleet:
    """Who is there, as a controller would say it."""

    def __init__(self) -> None:
        self._refs: list[WorkerRef] = []
        self._changed = asyncio.Event()

    def add(self, ref: WorkerRef) -> None:
        self._refs.append(ref)
        self._changed.set()

    async def members(self) -> AsyncIterator[Members]:
        while True:
            self._changed.clear()
            statuses = tuple(WorkerStatus(r.name, "", "ready", r.address, r.epoch) for r in self._refs)
            yield Members(len(statuses), statuses)
            await self._changed.wait()


async def answer(router: Router, number: int) -> None:
    """One stream, token by token."""
    prompt = [number, *range(100, 100 + 5 * BLOCK_SIZE + 2)]
    stream, tokens = router.submit(request(str(number), prompt, LENGTH)), []
    while True:
        batch = await stream.next()
        for token in batch.tokens:
            assert token.position == len(prompt) + len(tokens)
            tokens.append(token.token)
        if batch.finish is not None:
            break
    assert tokens == oracle(prompt, LENGTH)


async def balanced(ref: WorkerRef) -> CheckReport:
    """The worker's own account, once it holds nothing any more."""
    peer = Peer(ref.address, "secret")
    try:
        while True:
            report = await peer.check(CASE_S)
            assert report.ok, report.problem
            if report.pinned_blocks == report.reserved_blocks == report.sequences == report.handovers == 0:
                return report
            await asyncio.sleep(0.05)
    finally:
        await peer.close()


@asynccontextmanager
async def scene(sick: Sick) -> AsyncIterator[tuple[Process, Fleet, House, Router]]:
    house, fleet, process = House(), Fleet(), Process(sick)
    config = RouterConfig(lease_s=LEASE_S, heartbeat_s=0.1, max_attempts=1000, max_losses=100)
    router = Router("router", config, "secret")
    try:
        await router.start(fleet.members())
        yield process, fleet, house, router
    finally:
        await process.end()
        await router.close()
        await house.close()


async def _case(role: Role, point: str, number: int, transport: str) -> None:
    handover: dict[str, object] = {"lease_s": LEASE_S, "frame_bytes": 64, "transport": transport}
    sick = Sick(f"{role.value}-sick", role, point, number, handover)
    other = Role.DECODE if role is Role.PREFILL else Role.PREFILL

    async def healthy(name: str, role: Role) -> WorkerRef:
        return (await house.worker(name, role, ToyEngine(), **handover)).ref

    async with scene(sick) as (process, fleet, house, router), asyncio.timeout(CASE_S), asyncio.TaskGroup() as streams:
        ref = await process.ref()
        fleet.add(ref)
        fleet.add(await healthy("other", other))
        while router.ready()[0] != "ready":
            await asyncio.sleep(0.01)
        first = [streams.create_task(answer(router, n)) for n in range(4)]
        await process.struck()
        fleet.add(await healthy("instead", role))
        if number == signal.SIGSTOP:
            await asyncio.sleep(FREEZE_S)
            second = [streams.create_task(answer(router, n)) for n in range(4, 8)]
            process.wake()
            await asyncio.gather(*second)
        await asyncio.gather(*first)
        await house.balanced(within_s=CASE_S)
        if number == signal.SIGSTOP:
            await balanced(ref)


async def _all(role: Role, points: dict[str, Any], number: int, transport: str) -> None:
    """Every point, some side by side."""
    places = asyncio.Semaphore(ABREAST)

    async def one(point: str) -> None:
        async with places:
            await _case(role, point, number, transport)

    ended = await asyncio.gather(*map(one, points), return_exceptions=True)
    failed = [f"{point}: {error!r}" for point, error in zip(points, ended, strict=True) if error is not None]
    assert not failed, "\n".join(failed)


CASES = [*product(("source", "target"), ("SIGKILL", "SIGSTOP"), ("shm", "tcp")), ("target", "SIGSTOP", "grpc")]


@pytest.mark.parametrize(("side", "name", "transport"), CASES)
async def test_in_every_state(side: str, name: str, transport: str) -> None:
    number = getattr(signal, name)
    if side == "source":
        await _all(Role.PREFILL, SOURCE, number, transport)
    else:
        await _all(Role.DECODE, TARGET, number, transport)
