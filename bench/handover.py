"""How fast KV crosses from one process to another: the real outlet, gRPC on loopback, the real inlet, checksums on.

No model and no engine: blocks of the given layout are offered all at once, layer by layer, and the clock stops when
the target has them all. What a plain copy of the same bytes in memory takes is measured beside it.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..common.clock import RealClock
from ..common.config import HandoverConfig
from ..common.errors import HandoverFailed
from ..common.types import WorkerRef
from ..kvtransfer.grpc_transport import GrpcOutlet, receive
from ..kvtransfer.inlet import Inlet
from ..kvtransfer.transport import Offer
from ..protos import rpc

TOKEN = "bench"
SOURCE = WorkerRef("source", "", 1)
TIMEOUT_S = 60.0


class Store:
    """Blocks of plain bytes."""

    def __init__(self, layers: int, blocks: int, block_bytes: int) -> None:
        self.num_layers, self.num_blocks, self.block_bytes = layers, blocks, block_bytes
        self._bytes = np.ones((layers, blocks, block_bytes), dtype=np.uint8)

    def gather(self, layer: int, blocks: Sequence[int]) -> memoryview:
        return np.take(self._bytes[layer], np.asarray(blocks), axis=0).reshape(-1).data

    def scatter(self, layer: int, blocks: Sequence[int], data: bytes | memoryview) -> None:
        self._bytes[layer, np.asarray(blocks)] = np.frombuffer(data, np.uint8).reshape(len(blocks), -1)


@dataclass(frozen=True, slots=True)
class Layout:
    """What is handed over: `blocks` KV blocks of `block_bytes` in each of `layers`."""

    layers: int
    blocks: int
    block_bytes: int

    @property
    def size(self) -> int:
        return self.layers * self.blocks * self.block_bytes


@dataclass(frozen=True, slots=True)
class Speed:
    """Gigabytes a second: of the handover (median of the rounds) and of a copy in memory."""

    bytes: int
    handover: float
    memcpy: float


async def measure(layout: Layout, rounds: int) -> Speed:
    """Hand the same layout over `rounds` times, after one for warm-up. Raises `HandoverFailed` where it breaks."""
    shape = (str(n) for n in (layout.layers, layout.blocks, layout.block_bytes))
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, *shape, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        address = await _line(child.stdout)
        target = WorkerRef("target", address, 2)
        broken = asyncio.Event()
        store = Store(layout.layers, layout.blocks, layout.block_bytes)
        outlet = GrpcOutlet(
            store, SOURCE, HandoverConfig(), TOKEN, RealClock(), asyncio.get_running_loop(), lambda _: broken.set()
        )
        seconds = []
        for number in range(1, rounds + 2):
            child.stdin.write(b"%d\n" % number)
            await _line(child.stdout)  # the reservation is open
            begin = time.perf_counter()
            outlet.open(number, target)
            for layer in range(layout.layers):
                outlet.offer(Offer(number, 1, layer, 0, tuple(range(layout.blocks))))
            await _line(child.stdout)
            seconds.append(time.perf_counter() - begin)
            outlet.close(number)
            if broken.is_set():
                raise HandoverFailed("the data stream broke")
        await outlet.stop()
    finally:
        child.stdin.close()
        async with asyncio.timeout(TIMEOUT_S):
            await child.wait()
    return Speed(layout.size, layout.size / statistics.median(seconds[1:]) / 1e9, _memcpy(layout.size))


async def _line(stream: asyncio.StreamReader) -> str:
    async with asyncio.timeout(TIMEOUT_S):
        line = await stream.readline()
    if not line:
        raise HandoverFailed("the receiving process is gone")
    return line.decode().strip()


def _memcpy(size: int) -> float:
    source, target = np.ones(size, dtype=np.uint8), np.empty(size, dtype=np.uint8)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begin)
    return size / min(times) / 1e9


async def _target(layout: Layout) -> None:
    """The receiving process: a reservation for each number on standard input, a line when it is open and when full."""
    filled = asyncio.Event()
    inlet = Inlet(Store(layout.layers, layout.blocks, layout.block_bytes), RealClock(), lambda _: filled.set())
    server = rpc.make_server(TOKEN, rpc.data_handlers(lambda stream: receive(stream, inlet)))
    print(rpc.listen(server, "127.0.0.1", 0), flush=True)
    await server.start()
    while line := await asyncio.to_thread(sys.stdin.readline):
        key = (SOURCE.name, SOURCE.epoch, int(line))
        inlet.open(key, 1, 0, list(range(layout.blocks)))
        print("open", flush=True)
        async with asyncio.timeout(TIMEOUT_S):
            await filled.wait()
        filled.clear()
        inlet.close(key)
        print("filled", flush=True)
    await server.stop(grace=0)


if __name__ == "__main__":
    asyncio.run(_target(Layout(*map(int, sys.argv[1:4]))))
