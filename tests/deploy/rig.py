"""A controller at work, with a parent, workers and gateways that are only pretended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from baton.common.clock import ManualClock
from baton.common.cluster import (
    End,
    FromController,
    FromGateway,
    GatewayHello,
    Launch,
    LogLines,
    LogQuestion,
    Members,
    Phase,
    Processes,
    ProcessStatus,
    WorkerState,
    WorkerStatus,
)
from baton.common.config import ControllerConfig
from baton.common.errors import BatonError, NotReady
from baton.common.messages import Load, Turn
from baton.deploy.control.controller import Controller
from baton.deploy.control.desired import Desired, load, save
from tests.deploy.stage import until


class Household:
    """A parent whose processes run as soon as they are launched, and end as soon as they are ended."""

    def __init__(self, saved: Desired) -> None:
        self.saved = save(saved)
        self.processes: dict[str, ProcessStatus] = {}
        self.orders: list[Launch | End] = []
        self.closed = False
        self._pids = 100
        self._version = 0
        self._changed = asyncio.Event()

    def change(self, name: str, **changes: object) -> None:
        self.processes[name] = replace(self.processes[name], **changes)  # type: ignore[arg-type]
        self.announce()

    def announce(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def launch(self, order: Launch) -> None:
        if self.closed:
            raise NotReady("the cluster is ending")
        self.orders.append(order)
        self._pids += 1
        self.processes[order.name] = ProcessStatus(order.name, Phase.RUNNING, order.digest, pid=self._pids)
        self.announce()

    async def end(self, order: End) -> None:
        self.orders.append(order)
        self.processes.pop(order.name, None)
        self.announce()

    async def watch(self) -> AsyncIterator[Processes]:
        while True:
            changed = self._changed
            yield Processes(self._version, tuple(self.processes.values()))
            await changed.wait()

    async def tail(self, question: LogQuestion) -> LogLines:
        return LogLines(7, (f"{question.name} from {question.after}",))

    async def save(self, data: bytes) -> None:
        self.saved = data

    async def load(self) -> bytes:
        return self.saved


class GatewayStream:
    """The controller's end of a gateway's stream."""

    def __init__(self, name: str) -> None:
        self.incoming: asyncio.Queue[FromGateway | None] = asyncio.Queue()
        self.heard: list[FromController] = []
        self.incoming.put_nowait(GatewayHello(name, "http://here", 1))

    async def read(self) -> FromGateway | None:
        return await self.incoming.get()

    async def write(self, message: FromController) -> None:
        self.heard.append(message)

    @property
    def states(self) -> dict[str, str]:
        members = [m for m in self.heard if isinstance(m, Members)]
        return {w.name: str(w.state) for w in members[-1].workers} if members else {}


@dataclass
class Rig:
    """A controller at work."""

    house: Household
    clock: ManualClock = field(default_factory=lambda: ManualClock(1000.0))
    asked: list[tuple[str, Turn]] = field(default_factory=list)
    refusal: BatonError | None = None
    stopped: int = 0

    @asynccontextmanager
    async def controller(self) -> AsyncIterator[Controller]:
        config = ControllerConfig(parent="", round_s=0.005, silence_s=60.0, model_name="n")
        controller = Controller(config, self.house, self.clock, self.turn, self.stop)
        await controller.load()
        task = asyncio.create_task(controller.run())
        try:
            async with asyncio.timeout(20):
                yield controller
        finally:
            if task.done():
                task.result()
            task.cancel()
            await asyncio.wait({task})

    async def turn(self, address: str, order: Turn) -> None:
        self.asked.append((address, order))
        if self.refusal is not None:
            raise self.refusal

    def stop(self) -> None:
        self.stopped += 1

    def word(self, name: str, **changes: object) -> WorkerStatus:
        assignment = next(a for a in load(self.house.saved).assignments if a.name == name)
        role = str(assignment.worker.role)
        status = WorkerStatus(name, role, WorkerState.READY, "a:1", 1, pid=self.house.processes[name].pid, load=Load())
        return replace(status, **changes)  # type: ignore[arg-type]

    async def report(self, controller: Controller) -> None:
        """All workers say that they are ready."""
        for name in [name for name in self.house.processes if not name.startswith("gateway")]:
            await controller.report(self.word(name))

    async def up(self, controller: Controller) -> None:
        names = {a.name for a in load(self.house.saved).assignments}
        await until(lambda: names <= self.house.processes.keys())
        await self.report(controller)
        await until(lambda: all(w.state == "ready" for w in controller.status().workers))


async def attend(controller: Controller, name: str = "gateway-0") -> tuple[GatewayStream, asyncio.Task[None]]:
    stream = GatewayStream(name)
    return stream, asyncio.create_task(controller.attend(stream))
