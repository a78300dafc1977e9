"""The event loop and the server that a rank other than rank 0 has for lanes over gRPC: they go with its plane."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from baton.common.clock import RealClock
from baton.common.config import HandoverConfig
from baton.common.errors import TransportFailed
from baton.common.messages import Endpoint, Filled
from baton.common.types import WorkerRef
from baton.kvtransfer.layout import Cut
from baton.kvtransfer.plane import Plane
from baton.kvtransfer.transport import Offer
from baton.worker.rank_plane import reached_by_grpc
from tests.toy import ENTRY, LAYERS, ToyPool

HOST = "127.0.0.1"
TOKEN = "secret"


def maker(name: str, pool: ToyPool, post: Callable[[Any], None], seen: list[Any] | None = None) -> Any:
    """See `rank_plane.MakePlane`. `seen` gets what it is called with."""

    def make(events: asyncio.AbstractEventLoop, grpc: str) -> Plane:
        if seen is not None:
            seen.extend((events, grpc))
        return Plane(
            WorkerRef(name, "", 1), pool.store, HandoverConfig(), TOKEN, HOST, RealClock(), events, post, None, grpc
        )

    return make


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_blocks_cross_by_grpc_between_processes_without_event_loops() -> None:
    ours, theirs = ToyPool(4), ToyPool(4)
    for layer in range(LAYERS):
        ours.write(layer, 2, 0, bytes(range(layer, layer + ENTRY)))
    said: queue.SimpleQueue[Any] = queue.SimpleQueue()
    seen: list[Any] = []
    with (
        reached_by_grpc(HOST, TOKEN, maker("p", ours, said.put, seen)) as source,
        reached_by_grpc(HOST, TOKEN, maker("d", theirs, said.put)) as target,
    ):
        target.inlet.open(("p", 1, 7), 1, ours.format, 0, [1])
        target.inlet.expect(("p", 1, 7), 1)
        end = Endpoint(WorkerRef("d", "", 1), "", theirs.format, "here", (target.door,))
        source.outlet.open(7, 1, end, "grpc")
        source.outlet.offer(Offer(7, 0, Cut((2,), 0, 1)))
        assert said.get(timeout=20) == Filled(("p", 1, 7))
    assert theirs.bytes[:, 1].tobytes() == ours.bytes[:, 2].tobytes()
    assert "events" not in names() and seen[0].is_closed()


@pytest.mark.parametrize("where", ["plane", "start", "user"])
def test_an_error_leaves_nothing_behind(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    make = maker("d", ToyPool(4), lambda event: None, seen)

    def fails(*arguments: Any) -> Plane:
        make(*arguments).stop()
        raise TransportFailed("no room")

    async def never(server: Any) -> None:
        raise TransportFailed("no room")

    def use() -> None:
        if where == "start":
            monkeypatch.setattr("grpc.aio._server.Server.start", never)
        with reached_by_grpc(HOST, TOKEN, fails if where == "plane" else make):
            raise TransportFailed("no room")

    with pytest.raises(TransportFailed, match="no room"):
        use()
    assert "events" not in names() and "lane door" not in names() and seen[0].is_closed()


def test_the_event_loop_ends_even_where_the_plane_does_not_end_well(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, seen = Plane.stop, list[Any]()

    def badly(plane: Plane) -> None:
        stop(plane)
        raise RuntimeError("not well")

    monkeypatch.setattr(Plane, "stop", badly)
    with (
        pytest.raises(RuntimeError, match="not well"),
        reached_by_grpc(HOST, TOKEN, maker("d", ToyPool(4), lambda event: None, seen)),
    ):
        pass
    assert "events" not in names() and seen[0].is_closed()


def test_a_host_that_is_not_ours_is_a_typed_error() -> None:
    with (
        pytest.raises(TransportFailed, match="no lanes can come in"),
        reached_by_grpc("192.0.2.1", TOKEN, maker("d", ToyPool(4), print)),
    ):
        pass
    assert "events" not in names()
