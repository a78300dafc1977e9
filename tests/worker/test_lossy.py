"""Whole workers whose handovers lose, double, delay and overtake their messages and frames at random: every stream
still ends with the oracle's tokens, soon, and the books balance. Nothing is written into a block after its release."""

from __future__ import annotations

import asyncio
import ctypes
import random
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from baton.common.config import RouterConfig
from baton.common.errors import BatonError
from baton.common.types import Role
from baton.engine.mailbox import FromSource, FromTarget, InboxItem
from baton.kvtransfer.fetched import FetchTaker
from baton.kvtransfer.in_step import StepTaker
from baton.kvtransfer.ledger import RING, wait_for
from baton.kvtransfer.transport import Taker
from baton.kvtransfer.wire import FrameHeader
from baton.router.service import Router
from baton.worker.assembly import Worker
from tests.house import House
from tests.toy import FORMAT, oracle, request
from tests.worker.toy_process import toy_engine
from tests.worker.world import Held

LOST, DOUBLED, DELAYED = 0.03, 0.06, 0.15
"""Shares of all messages, and of all frames."""
LATE_S = 0.08
LEASE_S = 0.6
LENGTH = 16
WITHIN_S = 45.0


class Weather:
    """Decides what becomes of each message. `count`: how many had a fate."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._timers: list[threading.Timer] = []
        self.count = 0

    def passes(self, deliver: Callable[[], None]) -> None:
        with self._lock:
            luck, late = self._rng.random(), self._rng.uniform(0.0, LATE_S)
            self.count += luck < LOST + DELAYED or luck > 1 - DOUBLED
        if luck < LOST:
            return
        if luck < LOST + DELAYED:
            self._later(late, deliver)
            return
        deliver()
        if luck > 1 - DOUBLED:
            self._later(late, deliver)

    def _later(self, seconds: float, deliver: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, deliver)
        self._timers.append(timer)
        timer.start()

    def settle(self) -> None:
        """Nothing is under way any more."""
        for timer in self._timers:
            timer.join()


def kept(header: FrameHeader, taker: Taker) -> tuple[FrameHeader, Taker]:
    """The same frame of a taker whose bytes are still there when the lane has gone on to the next one."""
    if isinstance(taker, StepTaker):  # what the source sums in step, brought along by the frame
        ledger = taker._ledger
        wait_for(lambda: ledger.summed(header.pieces - 1), lambda: False, LEASE_S)
        ring = np.ctypeslib.as_array((ctypes.c_uint64 * RING).from_address(ledger.shared.sums))
        sums = ring[np.arange(ledger.first, ledger.first + header.pieces) % RING]
        return replace(header, checksums=sums.tobytes()), FetchTaker(taker._peer, taker._format)
    data: Any = getattr(taker, "_data", getattr(taker, "data", None))
    return header, taker if data is None else Held(np.asarray(data).tobytes())


def expose(worker: Worker, weather: Weather) -> None:
    """Put the weather between this worker and its peers, both ways, control and frames."""
    post, receive = worker.inbox.post, worker.plane.inlet.receive

    def posted(item: InboxItem) -> None:
        if isinstance(item, FromSource | FromTarget):
            weather.passes(lambda: post(item))
        else:
            post(item)

    def received(source: tuple[str, int], rank: int, header: FrameHeader, taker: Taker) -> None:
        frame, mine = kept(header, taker)

        def land() -> None:
            try:
                receive(source, rank, frame, mine)
            except BatonError:  # a lane logs it and goes on
                return

        weather.passes(land)

    worker.inbox.post = posted  # type: ignore[method-assign]
    worker.plane.inlet.receive = received  # type: ignore[method-assign]


@pytest.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    yield house
    await house.close()


async def answer(router: Router, number: int) -> None:
    prompt = [number, *range(number, number + 9 + number % 14)]
    stream, tokens = router.submit(request(str(number), prompt, LENGTH)), []
    while True:
        batch = await stream.next()
        for token in batch.tokens:
            assert token.position == len(prompt) + len(tokens)
            tokens.append(token.token)
        if batch.finish is not None:
            break
    assert tokens == oracle(prompt, LENGTH), number


@pytest.mark.parametrize(("transport", "seed"), [("shm", 1), ("tcp", 2), ("grpc", 3), ("process-group", 4)])
async def test_bad_weather(house: House, transport: str, seed: int) -> None:
    weather = Weather(seed)
    for name, role in (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE), ("decode-1", Role.DECODE)):
        frame = 2 * FORMAT.block_bytes
        settings: dict[str, object] = {"transport": transport, "lease_s": LEASE_S, "frame_bytes": frame}
        engine = toy_engine(LEASE_S, num_blocks=48, late=seed % 2 == 0)
        expose(await house.worker(name, role, engine, **settings), weather)
    router = Router("router", RouterConfig(lease_s=2.0, heartbeat_s=0.1, max_attempts=1000), "secret")
    await router.start(house.members())
    try:
        async with asyncio.timeout(WITHIN_S), asyncio.TaskGroup() as clients:
            while router.ready()[0] != "ready":
                await asyncio.sleep(0.01)
            for number in range(24):
                clients.create_task(answer(router, number))
    finally:
        await router.close()
    await asyncio.to_thread(weather.settle)
    assert weather.count > 50
    assert transport in {how for _, _, how in house.workers["prefill-0"].plane.outlet._lanes}
    await house.balanced(within_s=10.0)
