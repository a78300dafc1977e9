"""The gateway's process: HTTP door and router on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
import signal
import socket
from collections.abc import Iterator

import uvicorn

from ..common.config import GatewayConfig
from ..common.errors import BatonError
from ..router.links import watch_members
from ..router.service import Router
from .app import build
from .fleet_metrics import FleetNumbers
from .metrics import Metrics
from .model import Model
from .service import Service

log = logging.getLogger(__name__)

_UNREAD_TIMEOUT_MS = 60_000
"""After this long without any progress the kernel drops a client that does not read what lies in its socket."""


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which would close the door before the streams are done."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run(config: GatewayConfig) -> None:
    """Serve until SIGTERM or SIGINT; then refuse what is new, let running streams finish for `drain_s`, and return.
    Raises `BatonError` where the model's folder or the address does not allow to begin."""
    model = Model.load(config)
    router = Router(f"gateway-{secrets.token_hex(4)}", config.router, config.cluster_token)
    service = Service(config, model, router, Metrics(FleetNumbers(router.snapshot)))
    listener = _listen(config.host, config.port)
    server = _Server(
        uvicorn.Config(
            build(service),
            lifespan="off",
            ws="none",
            http="httptools",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    gc.freeze()  # the vocabulary's tables live for ever: collections need not walk them while tokens wait
    await router.start(watch_members(config.controller, config.cluster_token))
    log.info("serving %s on http://%s:%d", model.name, *listener.getsockname()[:2])
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        log.info("draining: no new requests, %.0f s for those that run", config.drain_s)
        await service.drain()
    finally:
        stopping.cancel()
        await router.close()  # what still runs ends with an error that its client can read
        server.should_exit = True
        await serving
        model.tokenizer.close()
    log.info("stopped")


def _listen(host: str, port: int) -> socket.socket:
    """Raises `BatonError` if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise BatonError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; elsewhere the request's own deadline is the bound
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_TIMEOUT_MS)
    return listener
