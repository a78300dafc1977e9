"""The controller's process: gRPC for workers and gateways, HTTP for operators, and the rounds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from ...common.clock import RealClock
from ...common.config import ControllerConfig
from ...common.errors import BatonError
from ...common.messages import Turn
from ...protos.control import ParentClient, controller_handlers
from ...protos.rpc import Peer, listen, make_server
from .admin import build
from .controller import Controller

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run(config: ControllerConfig) -> None:
    """Control until SIGTERM or SIGINT. Raises as `control` does."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await control(config, stop, _end_cluster)


async def control(config: ControllerConfig, stop: asyncio.Event, end_cluster: Callable[[], None]) -> None:
    """Control until `stop` is set. Raises `BatonError` where the state or an address cannot be had."""
    parent = Peer(config.parent, config.cluster_token)

    async def turn(address: str, order: Turn) -> None:
        worker = Peer(address, config.cluster_token)
        try:
            await worker.turn(order)
        finally:
            await worker.close()

    controller = Controller(config, ParentClient(parent), RealClock(), turn, end_cluster)
    await controller.load()
    server = make_server(config.cluster_token, controller_handlers(controller))
    try:
        listen(server, config.host, config.port)
        family = socket.AF_INET6 if ":" in config.admin_host else socket.AF_INET
        door = socket.create_server((config.admin_host, config.admin_port), family=family)
    except (OSError, RuntimeError) as error:
        raise BatonError(f"cannot listen: {error}") from error
    await server.start()
    options = uvicorn.Config(
        build(controller, config.admin_token),
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    admin = _Server(options)
    log.info("controlling at %s:%d, for operators at %s:%d", config.host, config.port, *door.getsockname()[:2])
    serving = asyncio.create_task(admin.serve(sockets=[door]))
    rounds = asyncio.create_task(controller.run())
    stopping = asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait({serving, rounds, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    rounds.cancel()
    admin.should_exit = True
    await server.stop(grace=None)
    await asyncio.wait({serving, rounds})
    await parent.close()
    for task in done - {stopping}:  # neither ends by itself, but by an error of ours
        task.result()


def _end_cluster() -> None:
    """The parent, which owns all processes, ends them in order when it is told to; this process is its child."""
    os.kill(os.getppid(), signal.SIGTERM)
