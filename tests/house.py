"""Some toy workers in this process, each with its loop on a thread, all on loopback gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from functools import partial

from baton.common.clock import RealClock
from baton.common.cluster import Members, WorkerStatus
from baton.common.types import Role
from baton.decode.role import DecodeRole
from baton.worker.assembly import Worker
from tests.poison import Poison
from tests.toy import LAYERS, ToyEngine, worker_config


class Crash(BaseException):
    """Raised in a step, it ends the loop's thread, as a fault in native code ends a process."""


def _run(worker: Worker, stop: threading.Event) -> None:
    with contextlib.suppress(Crash):
        worker.loop.run(stop)


def hold(worker: Worker, decoding: threading.Event) -> Worker:
    """Its decode role takes requests in and lets them go, but plans no token before `decoding` is set: what shall be
    together comes together, however slow the machine."""
    for role in worker.loop.roles:
        if isinstance(role, DecodeRole):
            plan = partial(lambda plan, *step: plan(*step) if decoding.is_set() else None, role.plan)
            role.plan = plan  # type: ignore[method-assign]
    return worker


class House:
    """`workers` by name; a name that is used again is another incarnation. Blocks that nobody owns are poisoned."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self._poison: dict[str, Poison] = {}
        self._loops: dict[str, tuple[threading.Thread, threading.Event]] = {}
        self._changed = asyncio.Event()
        self._version = 0

    async def worker(self, name: str, role: Role, engine: ToyEngine | None = None, **handover: object) -> Worker:
        engine = engine or ToyEngine()
        worker = Worker(worker_config(name, role, engine.block_size, **handover), engine, RealClock())
        blocks = engine.pool.shared.memory.reshape(LAYERS, engine.num_blocks, -1)
        poison = Poison(worker.loop.context.table.manager, blocks)
        await worker.start()
        stop = threading.Event()
        thread = threading.Thread(target=_run, args=(worker, stop))
        thread.start()
        self.workers[name] = worker
        self._poison[name] = poison
        self._loops[name] = (thread, stop)
        self._tell()
        return worker

    async def kill(self, name: str) -> None:
        """As a process dies: nothing is said to anybody, connections break."""
        thread, stop = self._loops.pop(name)
        stop.set()
        await self.workers.pop(name).stop()
        await asyncio.to_thread(thread.join, 5.0)
        self._poison.pop(name).check()
        self._tell()

    def alive(self, name: str) -> bool:
        """Whether the loop still goes round."""
        return self._loops[name][0].is_alive()

    async def members(self) -> AsyncIterator[Members]:
        """What a controller would say."""
        while True:
            self._changed.clear()
            refs = [(w.ref, name) for name, w in self.workers.items()]
            yield Members(
                self._version, tuple(WorkerStatus(name, "", "ready", ref.address, ref.epoch) for ref, name in refs)
            )
            await self._changed.wait()

    async def balanced(self, within_s: float = 20.0) -> None:
        """Every worker's books balance and nothing is held, soon."""
        for worker in self.workers.values():
            report = None
            for _ in range(int(within_s / 0.02)):
                report = await worker.check()
                assert report.ok, report.problem
                if report.pinned_blocks == report.reserved_blocks == report.sequences == report.handovers == 0:
                    break
                await asyncio.sleep(0.02)
            assert report is not None and report.free_blocks + report.cached_blocks == report.total_blocks, report

    async def close(self) -> None:
        for name in list(self.workers):
            await self.kill(name)

    def _tell(self) -> None:
        self._version += 1
        self._changed.set()
