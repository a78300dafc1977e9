"""What tests of peers that lie have in common: a worker among honest others, and the two ways to talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from baton.common import sockets
from baton.common.config import RouterConfig
from baton.common.errors import BatonError
from baton.common.messages import Endpoint, Reserve, Reserved, TargetMessage
from baton.common.types import Role
from baton.kvtransfer import wire
from baton.kvtransfer.layout import Route
from baton.kvtransfer.link import Greeting
from baton.kvtransfer.pair import Pair
from baton.kvtransfer.wire import FrameHeader
from baton.protos import rpc
from baton.router.service import Router
from baton.worker.assembly import Worker
from tests.house import House
from tests.toy import FORMAT, LAYERS, ToyPool, endpoint, oracle, request
from tests.worker.toy_process import toy_engine

PROMPT = tuple(range(30, 40))  # three blocks, the last of them partial
PIECE = FORMAT.block_bytes
EVIL = replace(endpoint("evil", epoch=66), host="")
WAIT_S = 20.0
PATIENCE_S = 1.5
"""How long the worker waits for the other rank of a process group."""


@dataclass
class Scene:
    """A decode worker, an honest pair's router, and what the worker's pool held before."""

    house: House
    router: Router
    worker: Worker
    pool: ToyPool

    def held(self, blocks: list[int]) -> np.ndarray[Any, Any]:
        """The pool but for these blocks."""
        return np.delete(self.pool.shared.memory.reshape(LAYERS, -1, PIECE), blocks, axis=1).copy()

    async def serves(self, seed: int) -> None:
        prompt = [seed, *PROMPT]
        stream, tokens = self.router.submit(request(f"honest-{seed}", prompt, 5)), []
        async with asyncio.timeout(WAIT_S):
            while True:
                batch = await stream.next()
                tokens += [t.token for t in batch.tokens]
                if batch.finish is not None:
                    break
        assert tokens == oracle(prompt, 5)

    async def soon(self, condition: Any) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def a_scene() -> AsyncIterator[Scene]:
    house = House()
    await house.worker("prefill-0", Role.PREFILL)
    worker = await house.worker("decode-0", Role.DECODE, toy_engine(PATIENCE_S), transport="process-group")
    router = Router("router", RouterConfig(lease_s=1.0, heartbeat_s=0.1), "secret")
    await router.start(house.members())
    pool = worker.plane.store.memory  # type: ignore[attr-defined]
    engine = worker.loop._runner.pool  # type: ignore[attr-defined]
    assert engine.shared.memory is pool
    made = Scene(house, router, worker, engine)
    await made.soon(lambda: router.ready()[0] == "ready")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        await made.serves(1)
        yield made
        await made.serves(2)
        await house.balanced()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"
    finally:
        await router.close()
        await house.close()


class Control:
    """The control stream of a source that does as it likes."""

    def __init__(self, worker: Worker, token: str = "secret", own: Endpoint = EVIL) -> None:
        self._peer = rpc.Peer(worker.ref.address, token)
        self.stream = self._peer.control()
        self.own = own
        self.worker = worker

    async def __aenter__(self) -> Control:
        await self.stream.write(self.own)
        assert isinstance(await self.hear(), Endpoint)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        self.stream.cancel()
        await self._peer.close()

    async def hear(self) -> Any:
        return await asyncio.wait_for(self.stream.read(), WAIT_S)

    async def ask(self, message: Any) -> TargetMessage:
        await self.stream.write(message)
        return await self.hear()  # type: ignore[no-any-return]

    def reserve(self, handover_id: int, **changes: object) -> Reserve:
        router = min(self.worker.loop.context.outbox.routers)
        return replace(
            Reserve(handover_id, 10_000 + handover_id, 1, router, request("evil", PROMPT, 20), self.worker.ref),
            **changes,
        )

    async def reserved(self, handover_id: int) -> list[int]:
        """Have a reservation; its blocks."""
        assert isinstance(await self.ask(self.reserve(handover_id)), Reserved)
        for role in self.worker.loop.roles:
            for sequence in role.sequences():
                if sequence.key[1] == 10_000 + handover_id:
                    return sequence.blocks.tolist()
        raise AssertionError("granted, and not there")


def greeting(worker: Worker, **changes: object) -> Greeting:
    honest = Greeting("evil", 66, 0, worker.ref.epoch, 0, "tcp", "", FORMAT)
    return replace(honest, **changes)


def paired(worker: Worker, **changes: object) -> Greeting:
    """Of a lane whose bytes go by a process group."""
    return greeting(worker, transport="process-group", door="gloo", **changes)


class Lane:
    """A lane whose source does as it likes. Blocking calls with a timeout, off the event loop."""

    def __init__(self, worker: Worker, hello: Greeting | bytes, token: str = "secret") -> None:
        self.socket = sockets.connect(worker.plane.door["tcp"], token, WAIT_S)
        self._by_pair = isinstance(hello, Greeting) and hello.transport == "process-group"
        self._pair: Pair | None = None
        sockets.send(self.socket, hello if isinstance(hello, bytes) else hello.packed())

    def answer(self) -> str:
        """What the worker says to the greeting: "" is welcome."""
        return sockets.receive(self.socket, 1 << 16).decode()

    def announce(self, head: bytes, payload: bytes = b"") -> None:
        """A frame's header, and on the lane's own socket what follows."""
        sockets.send_all(self.socket, len(head).to_bytes(4, "little"), head, payload)

    def meet(self) -> Pair:
        """Once a header is there, the worker comes to meet us."""
        self._pair = self._pair or Pair(self.socket, True, torch.device("cpu"), "127.0.0.1", PATIENCE_S)
        return self._pair

    def frame(self, head: bytes, payload: bytes = b"") -> bool:
        """Whether the lane goes on: the frame was taken in, or refused by itself."""
        try:
            if self._by_pair:
                self.announce(head)
                self.meet().send(torch.frombuffer(bytearray(payload), dtype=torch.uint8))()
            else:
                self.announce(head, payload)
            return bool(self.socket.recv(1))
        except (BatonError, OSError):
            return False


@contextlib.contextmanager
def lane(worker: Worker, hello: Greeting | bytes) -> Iterator[Lane]:
    made = Lane(worker, hello)
    try:
        yield made
    finally:
        made.socket.close()


def frame(which: int, first: int = 0, count: int = 1, value: int = 66, **changes: object) -> tuple[bytes, bytes]:
    """A frame as it should be, but for the changes, and its payload."""
    payload, scratch = bytes([value]) * (count * PIECE), ToyPool(count)
    sums = scratch.store.unpack(range(1), range(count), Route(0, 0, 0, 0, 1), memoryview(payload)).tobytes()
    header = replace(FrameHeader(which, 1, 0, 1, first, count, len(payload), sums), **changes)
    return wire.pack(header), payload
