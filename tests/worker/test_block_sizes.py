"""Workers whose blocks are of different sizes hand over to each other."""

from __future__ import annotations

import asyncio

import pytest

from baton.common.config import RouterConfig
from baton.common.types import Role
from baton.router.service import Router
from tests.house import House
from tests.toy import ToyEngine, oracle, request

LENGTH = 15


@pytest.mark.parametrize(("prefill", "decode"), [(4, 8), (8, 4), (4, 6), (6, 4), (5, 7), (16, 1)])
@pytest.mark.parametrize("transport", ["tcp", "grpc"])
async def test_any_two_sizes(prefill: int, decode: int, transport: str) -> None:
    """Prompts that end at the border of a block and beside it, and some that share a cached prefix."""
    house = House()
    await house.worker("prefill-0", Role.PREFILL, ToyEngine(block_size=prefill))
    await house.worker("decode-0", Role.DECODE, ToyEngine(num_blocks=128, block_size=decode), transport=transport)
    router = Router("router", RouterConfig(lease_s=1.0, heartbeat_s=0.1), "secret")
    await router.start(house.members())

    async def answer(length: int) -> None:
        prompt = list(range(300, 300 + length))
        stream, tokens = router.submit(request(str(length), prompt, LENGTH)), []
        while True:
            batch = await stream.next()
            tokens += [t.token for t in batch.tokens]
            if batch.finish is not None:
                assert tokens == oracle(prompt, LENGTH), length
                return

    try:
        async with asyncio.timeout(20):
            while router.ready()[0] != "ready":
                await asyncio.sleep(0.01)
            for lengths in ((24,), (1, 3, 7, 8, 12), (23, 25, 32)):
                await asyncio.gather(*map(answer, lengths))
        await house.balanced()
    finally:
        await router.close()
        await house.close()
