"""A peer that is malicious, or broken, and is handed over to: the source gives up with a reason, and serves others."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from baton.common import sockets
from baton.common.kv_format import KvFormat
from baton.common.messages import Abort, Committed, Endpoint, Failed, Refused, Reserve, Reserved, StepReport, Submit
from baton.common.sockets import Listener
from baton.common.types import Role, WorkerRef
from baton.engine.mailbox import FromRouter, RouterJoined
from baton.kvtransfer.pair import Pair
from baton.protos import rpc
from baton.protos.convert import RAW
from baton.worker.assembly import Worker
from tests.house import House
from tests.toy import FORMAT, LAYERS, oracle, request
from tests.worker.toy_process import toy_engine

PROMPT = list(range(50, 63))
WAIT_S = 20.0
LEASE_S = 0.5
Answer = Callable[[Reserve], Sequence[Any]]


class Target:
    """A decode worker that answers each `Reserve` as it likes, and is an endpoint as it likes."""

    def __init__(self, answer: Answer, lane: Callable[[socket.socket], None], **own: object) -> None:
        self._answer = answer
        self._own = own
        self._listener = Listener("127.0.0.1", 0, "secret", lane, "evil")
        self._server = rpc.make_server("secret", {rpc.CONTROL: rpc.stream_handler(self._control, RAW, RAW)})
        self.ref = WorkerRef("evil", rpc.listen(self._server, "127.0.0.1", 0), 66)

    async def __aenter__(self) -> Target:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(grace=0)
        self._listener.close()

    async def _control(self, stream: rpc.Stream[bytes, bytes]) -> None:
        door = {"tcp": self._listener.address, "process-group": "gloo"}
        own = replace(Endpoint(self.ref, "toy", FORMAT, "elsewhere", (door,)), **self._own)
        await stream.read()
        await stream.write(rpc.FROM_TARGET.encode(own))
        while (data := await stream.read()) is not None:
            message = rpc.FROM_SOURCE.decode(data)
            if isinstance(message, Reserve):
                for said in self._answer(message):
                    await stream.write(said if isinstance(said, bytes) else rpc.FROM_TARGET.encode(said))


def quiet(connection: socket.socket) -> None:
    """A lane that reads and never answers."""
    with contextlib.suppress(OSError):
        while connection.recv(1 << 16):
            pass


def generous(connection: socket.socket) -> None:
    """A lane that gives more credits than it was sent frames."""
    connection.recv(1 << 16)
    connection.sendall(b"\0\0\0\0" + b"+" * 1000)
    quiet(connection)


def rude(connection: socket.socket) -> None:
    """A lane that answers the greeting with a long story."""
    connection.recv(1 << 16)
    connection.sendall((1 << 31).to_bytes(4, "little") + b"once upon a time")
    quiet(connection)


def grants(transport: str, cached: int = 0, *more: Any) -> Answer:
    return lambda reserve: [Reserved(reserve.handover_id, cached, transport), *more]


def welcoming(then: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    """A lane that takes the greeting and the first frame's header; then the two ranks of a process group meet."""

    def lane(connection: socket.socket) -> None:
        sockets.receive(connection, 1 << 16)
        sockets.send(connection, b"")
        sockets.receive(connection, 1 << 16)
        then(connection)

    return lane


def meet(connection: socket.socket) -> Pair:
    return Pair(connection, False, torch.device("cpu"), "127.0.0.1", WAIT_S)


def comes_and_asks_for_nothing(connection: socket.socket) -> None:
    pair = meet(connection)
    quiet(connection)
    pair.abort()


HUGE = KvFormat(LAYERS, 1, FORMAT.head_dim, 1 << 16, "float32")

EVIL: dict[str, tuple[Answer, Callable[[socket.socket], None], dict[str, object]]] = {
    "another model's KV": (grants("tcp"), quiet, {"format": KvFormat(LAYERS, 2, 2, 4, "int8")}),
    "blocks beyond measure": (grants("tcp"), quiet, {"format": HUGE}),
    "a transport that nobody has": (grants("pigeon"), quiet, {}),
    "a transport without a door": (grants("shm"), quiet, {}),
    "no doors": (grants("tcp"), quiet, {"doors": ({},)}),
    "a door to nowhere": (grants("tcp"), quiet, {"doors": ({"tcp": "127.0.0.1:1"},)}),
    "a door that is none": (grants("tcp"), quiet, {"doors": ({"tcp": "here!"},)}),
    "a lane that never answers": (grants("tcp"), quiet, {}),
    "a lane that answers too much": (grants("tcp"), generous, {}),
    "a group that nobody comes to": (grants("process-group"), welcoming(quiet), {}),
    "a group that hangs up": (grants("process-group"), welcoming(lambda _: None), {}),
    "a group that talks nonsense": (grants("process-group"), welcoming(lambda c: sockets.send(c, b"\xc1 what?")), {}),
    "a group that tells stories": (grants("process-group"), welcoming(rude), {}),
    "a group that comes and goes": (grants("process-group"), welcoming(lambda c: meet(c).abort()), {}),
    "a group that asks for nothing": (grants("process-group"), welcoming(comes_and_asks_for_nothing), {}),
    "a lane that tells stories": (grants("tcp"), rude, {}),
    "more blocks than the request has": (grants("tcp", 10**9), quiet, {}),
    "a commit before its time": (lambda r: [Committed(r.handover_id), Reserved(r.handover_id, 0, "tcp")], quiet, {}),
    "everything twice": (grants("tcp", 0, *[Reserved(1, 0, "tcp")] * 5), quiet, {}),
    "a refusal in words of its own": (lambda r: [Refused(r.handover_id, "because", "x" * 100_000)], quiet, {}),
    "an abort": (lambda r: [Abort(r.handover_id, "poison", "")], quiet, {}),
    "noise": (lambda r: [b"\xff" * 40], quiet, {}),
    "nothing": (lambda r: [], quiet, {}),
    "another name": (grants("tcp"), quiet, {"ref": WorkerRef("somebody", "127.0.0.1:1", 5)}),
}


class Listening:
    """The router, as the worker sees it: what was said of each ticket."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.reports = worker, list[StepReport]()
        worker._routers.tell = lambda _, report: self.reports.append(report)  # type: ignore[method-assign]
        worker.inbox.post(RouterJoined("router"))

    def submit(self, ticket: int, target: WorkerRef | None) -> None:
        what = request(str(ticket), PROMPT, 8)
        self.worker.inbox.post(FromRouter("router", Submit(ticket, 1, what, target)))

    async def failure(self, ticket: int) -> Failed:
        async with asyncio.timeout(WAIT_S):
            while True:
                for failed in (f for r in self.reports for f in r.failed if f.ticket == ticket):
                    return failed
                await asyncio.sleep(0.01)

    async def tokens(self, ticket: int, count: int) -> list[int]:
        async with asyncio.timeout(WAIT_S):
            while True:
                found = [t.token for r in self.reports for t in r.tokens if t.ticket == ticket]
                if len(found) >= count:
                    return found
                await asyncio.sleep(0.01)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    yield house
    await house.close()


@pytest.mark.parametrize("what", EVIL)
async def test_a_target_that_is_not_to_be_trusted(house: House, what: str) -> None:
    answer, lane, own = EVIL[what]
    settings: dict[str, object] = {"lease_s": LEASE_S, "window_frames": 1, "frame_bytes": 64}
    worker = await house.worker("colocated-0", Role.COLOCATED, toy_engine(LEASE_S), **settings)
    up = Listening(worker)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with Target(answer, lane, **own) as evil:
        up.submit(1, evil.ref)
        failed = await up.failure(1)
        assert failed.code in ("handover_failed", "transport_failed", "internal_error")
        up.submit(2, None)
        assert await up.tokens(2, 8) == oracle(PROMPT, 8)
        await house.balanced()
    assert not [r for r in up.reports for t in r.tokens if t.ticket == 1], "its token went to nobody"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"
