"""Workers of one and of two ranks hand over to each other while their ranks are killed: every stream ends with the
oracle's tokens, a worker dies as one, and the books of all balance afterwards."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from baton.common.config import RouterConfig
from baton.common.types import Role, WorkerRef
from baton.router.service import Router
from tests.worker.asking import ready
from tests.worker.processes import CASE_S, Fleet, answer, fork, prompt, until
from tests.worker.toy_ranks import Spec, first, second

LEASE_S = 1.0
KILLS = 6
CLIENTS = 8
LENGTH = 30


class RankedWorker:
    """The processes of one worker: of its first incarnation, and of those that follow when one has been killed."""

    def __init__(self, name: str, role: Role, tp: int, transport: str, fleet: Fleet) -> None:
        self._name, self._role, self._tp = name, role, tp
        self._handover: dict[str, object] = {"lease_s": LEASE_S, "frame_bytes": 32, "transport": transport}
        self._fleet = fleet
        self._epoch = 0
        self.ranks: list[Any] = []

    async def start(self) -> None:
        """It is there, and others are told."""
        self._epoch += 1
        spec = Spec(self._name, self._role, self._tp, self._epoch, self._handover)
        hears, says = fork.Pipe()
        self.ranks = [_started(first, spec, says)]
        says.close()
        if self._tp == 2:
            self.ranks.append(_started(second, spec, *await asyncio.to_thread(hears.recv)))
        self.ref: WorkerRef = await asyncio.to_thread(hears.recv)
        hears.close()
        self._fleet.add(self.ref)

    async def kill(self, rank: int) -> None:
        """One process is ended, and the others end with it."""
        self.ranks[rank].kill()
        for each in self.ranks:
            await asyncio.to_thread(each.join, CASE_S)
            assert not each.is_alive(), "a rank has outlived its worker"
        self._fleet.remove(self.ref)


def _started(target: Any, *args: object) -> Any:
    process = fork.Process(target=target, args=args, daemon=True)
    process.start()
    return process


@asynccontextmanager
async def workers(prefill: int, decode: int, transport: str) -> AsyncIterator[tuple[Router, list[RankedWorker]]]:
    """Two of each role, with so many ranks, and a router that knows them."""
    fleet = Fleet()
    config = RouterConfig(lease_s=LEASE_S, heartbeat_s=0.1, place_timeout_s=20.0, max_attempts=1000, max_losses=100)
    router = Router("router", config, "secret")
    roles = [(Role.PREFILL, prefill), (Role.DECODE, decode)] * 2
    made = [RankedWorker(f"{role.value}-{i // 2}", role, tp, transport, fleet) for i, (role, tp) in enumerate(roles)]
    try:
        await asyncio.gather(*(worker.start() for worker in made))
        await router.start(fleet.members())
        async with asyncio.timeout(CASE_S):
            await ready(router, len(made))
            yield router, made
    finally:
        await router.close()
        for process in (rank for worker in made for rank in worker.ranks):
            process.kill()


async def busy(workers: list[RankedWorker]) -> RankedWorker:
    """The first of them that has something to do. One of those of a role soon has, while there are clients."""

    async def asked(worker: RankedWorker) -> RankedWorker:
        await until(worker.ref, lambda r: r.sequences + r.handovers > 0)
        return worker

    asking = [asyncio.create_task(asked(worker)) for worker in workers]
    done, late = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return done.pop().result()


@pytest.mark.parametrize(("prefill", "decode", "transport"), [(1, 2, "shm"), (2, 1, "tcp"), (2, 2, "grpc")])
async def test_storm(prefill: int, decode: int, transport: str) -> None:
    rng, numbers = random.Random(prefill + 10 * decode), itertools.count()

    async def client(until_then: asyncio.Task[None]) -> None:
        while not until_then.done():
            await answer(router, prompt(next(numbers)), LENGTH)

    async def killer() -> None:
        for number in range(KILLS):
            await asyncio.sleep(rng.uniform(0.05, 0.3))
            worker = await busy(made[number % 2 :: 2])  # of the one role and of the other
            await worker.kill(rng.randrange(len(worker.ranks)))
            await worker.start()

    async with workers(prefill, decode, transport) as (router, made):
        async with asyncio.TaskGroup() as tasks:
            killing = tasks.create_task(killer())
            for _ in range(CLIENTS):
                tasks.create_task(client(killing))
        assert router.snapshot().stats.retries, "nobody was disturbed"
        for worker in made:
            await until(worker.ref, lambda r: r.pinned_blocks == r.reserved_blocks == r.sequences == r.handovers == 0)
