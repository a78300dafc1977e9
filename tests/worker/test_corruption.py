"""Bits that flip on the way of the KV, or in the memory that it comes from: noticed, told, computed again. No client
ever sees what comes of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from baton.common.config import RouterConfig
from baton.common.types import Role
from baton.kvtransfer.wire import FrameHeader
from baton.router.service import Router
from baton.worker.assembly import Worker
from tests.house import House
from tests.toy import FORMAT, LAYERS, ToyEngine, oracle, request

LENGTH = 12


@pytest.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    yield house
    await house.close()


@pytest.fixture
async def router(house: House) -> AsyncIterator[Router]:
    router = Router("router", RouterConfig(lease_s=1.0, heartbeat_s=0.1, max_attempts=100), "secret")
    await router.start(house.members())
    yield router
    await router.close()


async def answer(router: Router, number: int) -> None:
    prompt = [number, *range(200, 217)]
    async with asyncio.timeout(20):
        while router.ready()[0] != "ready":
            await asyncio.sleep(0.01)
        stream, tokens = router.submit(request(str(number), prompt, LENGTH)), []
        while True:
            batch = await stream.next()
            tokens += [t.token for t in batch.tokens]
            if batch.finish is not None:
                break
    assert tokens == oracle(prompt, LENGTH)


def flip(memory: Any, at: int) -> None:
    np.frombuffer(memory, np.uint8)[at] ^= 16


class Flips:
    """So many of them, each once."""

    def __init__(self, count: int) -> None:
        self.left = count

    def due(self) -> bool:
        self.left -= 1
        return self.left >= 0


def around_give(worker: Worker, hook: Callable[[Any, FrameHeader], None]) -> None:
    """Call `hook` with each giver and frame, when it has been read and hashed and is about to leave."""
    make = worker.plane.outlet._make_giver

    def made(*args: Any) -> Any:
        giver = make(*args)
        give = giver.give

        def wrapped(header: FrameHeader) -> None:
            hook(giver, header)
            give(header)

        giver.give = wrapped
        return giver

    worker.plane.outlet._make_giver = made


async def check(house: House, router: Router, decode: Worker, flips: Flips, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5):
        await answer(router, number)
    assert flips.left < 0, "nothing was damaged"
    aborts = dict(decode.loop.load().handover_aborts)
    assert aborts["corrupt_block"] > 0
    assert any("checksum" in r.message and r.levelname == "ERROR" for r in caplog.records)
    await house.balanced()


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
async def test_on_the_wire(house: House, router: Router, transport: str, caplog: pytest.LogCaptureFixture) -> None:
    prefill = await house.worker("prefill-0", Role.PREFILL)
    decode = await house.worker("decode-0", Role.DECODE, transport=transport)
    flips = Flips(2)
    around_give(prefill, lambda giver, header: flip(giver._staging, header.size // 2) if flips.due() else None)
    await check(house, router, decode, flips, caplog)


async def test_in_the_source_after_it_was_hashed(
    house: House, router: Router, caplog: pytest.LogCaptureFixture
) -> None:
    """And it stays so: the source's own cache must not serve it any more."""
    engine = ToyEngine()
    prefill = await house.worker("prefill-0", Role.PREFILL, engine)
    decode = await house.worker("decode-0", Role.DECODE, transport="shm")
    flips = Flips(2)
    memory = engine.pool.shared.memory.reshape(LAYERS, engine.num_blocks, FORMAT.block_bytes)

    def hook(_: object, header: FrameHeader) -> None:
        if flips.due():
            flip(memory[header.layer, header.blocks[0]], 3)

    around_give(prefill, hook)
    await check(house, router, decode, flips, caplog)


async def test_while_it_is_copied(house: House, router: Router, caplog: pytest.LogCaptureFixture) -> None:
    """In the target's block, between two pieces of the copy."""
    await house.worker("prefill-0", Role.PREFILL)
    engine = ToyEngine()
    decode = await house.worker("decode-0", Role.DECODE, engine)
    flips, fetch = Flips(2), engine.store.fetch

    def fetched(peer: Any, form: Any, blocks: int, layer: int, theirs: Any, ours: Any, route: Any) -> Any:
        if not flips.due():
            return fetch(peer, form, blocks, layer, theirs, ours, route)
        damaged = peer.copy()
        flip(damaged, (layer * blocks + theirs[0]) * FORMAT.block_bytes)
        return fetch(damaged, form, blocks, layer, theirs, ours, route)

    engine.store.fetch = fetched  # type: ignore[method-assign]
    await check(house, router, decode, flips, caplog)
