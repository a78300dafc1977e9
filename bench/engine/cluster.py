"""A cluster on this machine as `baton serve` starts it: settings, desired state, launch orders, `Keeper`, the local
launcher, real worker processes. Only the controller and the gateway are missing, which need a web server; in their
place this process hears the workers' reports and runs the gateway's `Router`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ...common.clock import RealClock
from ...common.cluster import FromController, FromGateway, Members, WorkerState, WorkerStatus
from ...common.config import RouterConfig
from ...common.errors import NotReady
from ...deploy.cluster import Place, desired_state
from ...deploy.control.desired import launch_order
from ...deploy.launch.keeper import Keeper, Loss
from ...deploy.launch.launcher import LocalLauncher
from ...deploy.launch.logs import LogTails
from ...deploy.launch.supervisor import RestartPolicy
from ...deploy.settings import Setting, resolve
from ...protos import rpc
from ...protos.control import controller_handlers
from ...router.service import Router

HOST, TOKEN = "127.0.0.1", "bench"
READY_TIMEOUT_S = 120.0
STOP_S = 10.0
LOOK_S = 0.02
MAX_REQUESTS = 4096

log = logging.getLogger(__name__)


class Reports:
    """Implements `protos.control.ControllerService`: remembers what workers say of themselves."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerStatus] = {}
        self.lost = ""
        self._news = asyncio.Event()

    async def report(self, status: WorkerStatus) -> None:
        self.workers[status.name] = status
        self._news.set()

    async def attend(self, stream: rpc.Stream[FromGateway, FromController]) -> None:
        raise NotReady("no gateway belongs to this cluster")

    def lose(self, loss: Loss) -> None:
        self.lost = "\n  ".join((str(loss), *loss.last_lines))
        self._news.set()

    async def ready(self, count: int) -> None:
        """Until so many workers are. Raises `NotReady` where one cannot be kept running, or they take too long."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while sum(status.state is WorkerState.READY for status in self.workers.values()) < count:
                    self._news.clear()
                    await self._news.wait()
                    if self.lost:
                        raise NotReady(self.lost)
        except TimeoutError as error:
            states = ", ".join(f"{w.name} {w.state} {w.progress:.0%}" for w in self.workers.values())
            raise NotReady(f"not ready after {READY_TIMEOUT_S:.0f} s: {states or 'nobody reports'}") from error


@asynccontextmanager
async def cluster(model: Path, settings: Mapping[str, Any]) -> AsyncIterator[Router]:
    """`settings`: by path, as in a configuration file. Yields once all workers are ready, and ends all in order."""
    config = resolve(Setting(path, value, "bench") for path, value in settings.items())
    reports = Reports()
    server = rpc.make_server(TOKEN, controller_handlers(reports))
    place = Place(model, model.name, rpc.listen(server, HOST, 0), 0, TOKEN)
    logs = LogTails(lambda name, line: log.info("%s: %s", name, line))
    keeper = Keeper(
        {"": LocalLauncher(logs)}, logs, RestartPolicy(max_deaths=1), RealClock(), log.warning, reports.lose
    )
    router = Router("bench", RouterConfig(max_requests=MAX_REQUESTS), TOKEN)
    await server.start()
    try:
        workers = desired_state(config, place).assignments
        for one in workers:
            await keeper.launch(launch_order(one.name, one.worker, one.resources, one.worker.engine.threads))
        await reports.ready(len(workers))
        await router.start(_members(tuple(reports.workers.values())))
        async with asyncio.timeout(READY_TIMEOUT_S):
            while router.ready()[0] != "ready":  # noqa: ASYNC110 - the router has no event of it
                await asyncio.sleep(LOOK_S)
        yield router
    finally:
        await router.close()
        await keeper.close("worker", STOP_S)
        await server.stop(grace=0)


async def _members(workers: tuple[WorkerStatus, ...]) -> AsyncGenerator[Members, None]:
    yield Members(1, workers)
