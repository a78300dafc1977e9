"""One end of a handover by itself: a rank's real data plane over a pool in shared memory, without an engine."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from ...common.clock import RealClock
from ...common.config import HandoverConfig
from ...common.errors import HandoverFailed
from ...common.kv_format import KvFormat
from ...common.messages import Endpoint, Filled, Spoiled, TransportBroken
from ...common.types import WorkerRef
from ...kvtransfer.host_store import HostStore
from ...kvtransfer.plane import Plane, this_host
from ...kvtransfer.process_group import ProcessGroups
from ...kvtransfer.shm import SharedMemory
from ...protos import rpc

T = TypeVar("T")

HOST = "127.0.0.1"
TOKEN = "bench"
TIMEOUT_S = 120.0
"""For one handover, however large."""

LLAMA_8B = KvFormat(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
"""Llama-3.1-8B: 128 KiB a token, 64 KiB a block of one layer."""


class Events:
    """An event loop on a thread of its own: gRPC's."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="events", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` comes to. Raises `TimeoutError`."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_S)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(TIMEOUT_S)


class End:
    """`endpoint` is what the other end has to know. Two ends may share one pool."""

    def __init__(self, name: str, format: KvFormat, shared: SharedMemory, checked: bool, events: Events) -> None:
        self.shared = shared
        self.num_blocks = shared.memory.size // (format.num_layers * format.block_bytes)
        self._events = events
        self._said: queue.SimpleQueue[Filled | Spoiled | TransportBroken] = queue.SimpleQueue()
        store = HostStore(shared.memory, format, 0, self.num_blocks, no_conversion, checked)
        address = events.run(self._serve())
        ref = WorkerRef(name, address, 1)
        config = HandoverConfig(checksums=checked, transport="process-group")  # asks for gloo: else it is not let in
        self.plane = Plane(
            ref, store, config, TOKEN, HOST, RealClock(), events.loop, self._said.put, shared,
            address, ProcessGroups(torch.device("cpu"), HOST, TIMEOUT_S),
        )  # fmt: skip
        self.endpoint = Endpoint(ref, "", format, this_host(), (self.plane.door,))

    async def _serve(self) -> str:
        self._server = rpc.make_server(TOKEN, rpc.data_handlers(lambda stream: self.plane.serve_grpc(stream)))
        address = rpc.listen(self._server, HOST, 0)
        await self._server.start()
        return address

    def wait_filled(self) -> None:
        """Until a handover is here. Raises `HandoverFailed` where it is damaged or does not come."""
        try:
            said = self._said.get(timeout=TIMEOUT_S)
        except queue.Empty as error:
            raise HandoverFailed("the bytes did not come") from error
        if not isinstance(said, Filled):
            raise HandoverFailed(said.message)

    def stop(self) -> None:
        self.plane.stop()
        with contextlib.suppress(TimeoutError):
            self._events.run(self._server.stop(grace=0))


@contextlib.contextmanager
def on_core(number: int) -> Iterator[None]:
    """Keep this process to one of the cores that it may use, if there are several. Two processes that wake each other
    for every frame are now and then put on one core, and left there: then they take turns, and nothing is measured."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def make_pool(format: KvFormat, num_blocks: int, seed: int) -> SharedMemory:
    """A pool all of whose pages are real, full of numbers between -2 and 2: KV of some kind in any float type."""
    shared = SharedMemory(format.num_layers * num_blocks * format.block_bytes)
    numbers = np.random.default_rng(seed).integers(0, 256, min(shared.memory.size, 1 << 24), dtype=np.uint8)
    numbers[1::2] = numbers[1::2] & 0x80 | 0x3F
    for at in range(0, shared.memory.size, numbers.size):
        part = shared.memory[at : at + numbers.size]
        part[:] = numbers[: part.size]
    return shared


def scattered(num_blocks: int, seed: int) -> list[int]:
    """All blocks of a pool, in an order in which a busy pool could have given them out."""
    return [int(block) for block in np.random.default_rng(seed).permutation(num_blocks)]


def layer_hash(shared: SharedMemory, format: KvFormat, blocks: Sequence[int], layer: int) -> str:
    """Of what these blocks hold in one layer, in this order."""
    rows = shared.memory.reshape(format.num_layers, -1, format.block_bytes)
    return hashlib.blake2b(rows[layer][list(blocks)].tobytes(), digest_size=16).hexdigest()


def no_conversion(*_: object) -> NoReturn:
    raise AssertionError("both ends keep one type")
