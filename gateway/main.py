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

from ..common.cluster import GatewayHello
from ..common.config import GatewayConfig
from ..common.errors import BatonError
from ..router.service import Router
from .app import build
from .attendance import attend
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
    router = Router(config.name, config.router, config.cluster_token)
    service = Service(config, model, router, Metrics(config.name, FleetNumbers(router.snapshot, router.oldest_wait_s)))
    listeners = [_listen(config.host, config.port, shared=config.reuse_port)]
    if config.own_port:
        listeners.append(_listen(config.host, config.own_port))
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
    hello = GatewayHello(config.name, _url(listeners[0]), secrets.randbits(63))
    await router.start(attend(config.controller, config.cluster_token, hello, router))
    log.info("serving %s on %s", model.name, " and ".join(map(_url, listeners)))
    serving = asyncio.create_task(server.serve(sockets=listeners))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        log.info("draining: no new requests, %.0f s for those that run", config.drain_s)
        if config.reuse_port and server.started:
            server.servers[0].close()  # new connections go to the other gateways
        await service.drain()
    finally:
        stopping.cancel()
        await router.close()  # what still runs ends with an error that its client can read
        server.should_exit = True
        await serving
        model.tokenizer.close()
    log.info("stopped")


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """`shared`: other processes of this user may listen there as well. Raises `BatonError` if the address cannot be
    had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048, reuse_port=shared)
    except OSError as error:
        raise BatonError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; elsewhere the request's own deadline is the bound
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_TIMEOUT_MS)
    return listener
