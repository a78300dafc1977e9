"""The data plane of a rank that is not rank 0. Its process has no event loop, which lanes over gRPC need: it gets one
here, on a thread of its own, and a server that answers to nothing but lanes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from ..common.errors import TransportFailed
from ..kvtransfer.plane import Plane
from ..protos import rpc

TIMEOUT_S = 10.0
"""For what the event loop does at the start and at the end, which is little."""

T = TypeVar("T")

MakePlane = Callable[[asyncio.AbstractEventLoop, str], Plane]
"""From the event loop that gRPC runs on, and the address at which it takes lanes in."""


@contextmanager
def reached_by_grpc(host: str, token: str, make_plane: MakePlane) -> Iterator[Plane]:
    """A plane that takes lanes in by gRPC as well, and hangs up on everybody afterwards. `token` is the cluster's.
    Raises `TransportFailed` where nothing can listen at `host`."""
    with ExitStack() as begun:  # what began last ends first, and each ends whether or not the others did so well
        events = begun.enter_context(_event_loop())
        server, address = _do(events, _listening(host, token, lambda: plane))
        begun.callback(lambda: _do(events, server.stop(grace=0)))
        plane = make_plane(events, address)
        begun.callback(plane.stop)  # it waits for lanes, of which those over gRPC need the event loop
        _do(events, server.start())
        yield plane


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One that runs on a thread of its own, and is closed afterwards."""
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def run() -> None:
        over = asyncio.Event()
        running.set_result((asyncio.get_running_loop(), over))
        await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="events", daemon=True)
    thread.start()
    events, over = running.result(TIMEOUT_S)
    try:
        yield events
    finally:
        events.call_soon_threadsafe(over.set)
        thread.join(TIMEOUT_S)


async def _listening(host: str, token: str, plane: Callable[[], Plane]) -> tuple[Any, str]:
    """A server that is not started, and its address. It belongs to the event loop on which it is made."""
    server = rpc.make_server(token, rpc.data_handlers(lambda stream: plane().serve_grpc(stream)))
    try:
        return server, rpc.listen(server, host, 0)
    except RuntimeError as error:
        raise TransportFailed(f"no lanes can come in at {host}: {error}") from error


def _do(events: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(work, events).result(TIMEOUT_S)
