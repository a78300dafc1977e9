"""Bits that flip on the way of the KV, or in the memory that it comes from: noticed, told, computed again. No client
ever sees what comes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from baton.common.types import Role
from baton.kvtransfer.wire import FrameHeader
from baton.router.service import Router
from baton.worker.assembly import Worker
from tests.house import House
from tests.toy import FORMAT, LAYERS, ToyEngine
from tests.worker.asking import answered

LENGTH = 12


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
        send = giver._link.send

        def wrapped(header: FrameHeader, *payload: memoryview) -> None:
            hook(giver, header)
            send(header, *payload)

        giver._link.send = wrapped
        return giver

    worker.plane.outlet._make_giver = made


async def check(house: House, router: Router, decode: Worker, flips: Flips, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5):
        await answered(router, str(number), [number, *range(200, 217)], LENGTH)
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
    await house.worker("prefill-0", Role.PREFILL, engine)
    decode = await house.worker("decode-0", Role.DECODE, transport="shm")
    flips, store, lead = Flips(2), engine.store, engine.store.lead
    shared = store.memory
    memory = shared.reshape(LAYERS, engine.num_blocks, FORMAT.block_bytes)

    def led(ledger: Any, done: int, layers: range, blocks: Any, route: Any) -> int:
        if done or not flips.due():
            return lead(ledger, done, layers, blocks, route)
        store.memory = shared.copy()  # is summed, while the target copies what has been damaged since
        flip(memory[layers.start, blocks[0]], 3)
        try:
            return lead(ledger, done, layers, blocks, route)
        finally:
            store.memory = shared

    store.lead = led  # type: ignore[method-assign]
    await check(house, router, decode, flips, caplog)


async def test_while_it_is_copied(house: House, router: Router, caplog: pytest.LogCaptureFixture) -> None:
    """In the target's block, between two pieces of the copy."""
    await house.worker("prefill-0", Role.PREFILL)
    engine = ToyEngine()
    decode = await house.worker("decode-0", Role.DECODE, engine)
    flips, follow = Flips(2), engine.store.follow

    def followed(
        ledger: Any, done: int, peer: Any, form: Any, blocks: int, layers: range, theirs: Any, *rest: Any
    ) -> int:
        if not flips.due():
            return follow(ledger, done, peer, form, blocks, layers, theirs, *rest)
        damaged = peer.copy()
        flip(damaged, (layers.start * blocks + theirs[0]) * FORMAT.block_bytes)
        return follow(ledger, done, damaged, form, blocks, layers, theirs, *rest)

    engine.store.follow = followed  # type: ignore[method-assign]
    await check(house, router, decode, flips, caplog)
