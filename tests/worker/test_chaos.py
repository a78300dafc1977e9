"""The real router and real workers with the toy model, while things go wrong: every stream that is not cancelled
ends with the oracle's tokens, and every worker's books balance afterwards."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from baton.common.config import RouterConfig
from baton.common.errors import PoisonRequest
from baton.common.types import Role
from baton.kvtransfer.transport import Taker
from baton.kvtransfer.wire import FrameHeader
from baton.router.service import Router
from tests.house import Crash, House, hold
from tests.toy import ToyEngine, oracle, request
from tests.worker.asking import ask, ready

TIMEOUT_S = 40.0


def prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    shared = list(range(1, 1 + rng.choice([0, 6, 12])))
    return shared + [rng.randrange(900) for _ in range(rng.randrange(1, 30))]


def slowly(engine: ToyEngine, seconds: float) -> ToyEngine:
    """Each step takes some time, so that failures find requests in every state."""
    engine.runner.before = lambda plan: time.sleep(seconds)
    return engine


async def check(router: Router, seeds: Sequence[int], length: int) -> None:
    """Serve these all at once and compare with the oracle."""
    async with asyncio.timeout(TIMEOUT_S):
        answers = await asyncio.gather(*(ask(router, request(str(s), prompt(s), length)) for s in seeds))
    for seed, tokens in zip(seeds, answers, strict=True):
        assert tokens == oracle(prompt(seed), length), seed


async def test_quiet(house: House, router: Router) -> None:
    for name, role in (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE), ("colocated-0", Role.COLOCATED)):
        await house.worker(name, role)
    await ready(router)
    await check(router, range(30), 20)
    await house.balanced()


async def test_pools_too_small_for_all(house: House, router: Router) -> None:
    """Refusals, waiting and preemptions, and everybody is served."""
    await house.worker("prefill-0", Role.PREFILL, ToyEngine(num_blocks=24))
    decode = await house.worker("decode-0", Role.DECODE, slowly(ToyEngine(num_blocks=40), 0.005), max_sending=3)
    hold(decode, decoding := threading.Event())
    await ready(router)
    async with asyncio.TaskGroup() as group:
        group.create_task(check(router, range(24), 60))
        while decode.loop.load().running < 3:  # in the end these want 48 blocks
            await asyncio.sleep(0.01)
        decoding.set()
    assert (await decode.check()).preemptions > 0
    await house.balanced()


@pytest.mark.parametrize("seed", range(3))
async def test_storm(house: House, router: Router, seed: int) -> None:
    """Workers of both roles die and come back under the same name, clients leave, all at random. Two of three storms
    with two steps under way."""
    rng = random.Random(seed)

    def engine() -> ToyEngine:
        return slowly(ToyEngine(num_blocks=80, late=seed > 0), 0.002)

    roles = {"prefill-0": Role.PREFILL, "prefill-1": Role.PREFILL, "decode-0": Role.DECODE, "decode-1": Role.DECODE}
    for name, role in roles.items():
        await house.worker(name, role, engine())
    await ready(router)

    async def killer() -> None:
        for _ in range(6):
            await asyncio.sleep(rng.uniform(0.05, 0.4))
            name = rng.choice(sorted(roles))
            await house.kill(name)
            await asyncio.sleep(rng.uniform(0.0, 0.2))
            await house.worker(name, roles[name], engine())

    async def client(number: int) -> None:
        await asyncio.sleep(rng.uniform(0.0, 2.0))
        leaves = rng.randrange(1, 30) if rng.random() < 0.3 else None
        tokens = await ask(router, request(str(number), prompt(number), 60), leaves)
        assert tokens == oracle(prompt(number), 60)[: None if leaves is None else len(tokens)]

    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(killer(), *(client(n) for n in range(40)))
    await house.balanced()


async def test_damaged_bytes_are_noticed_and_computed_again(house: House, router: Router) -> None:
    await house.worker("prefill-0", Role.PREFILL)
    decode = await house.worker("decode-0", Role.DECODE, transport="tcp")  # whose frames bring their sums along
    inlet, damaged = decode.plane.inlet, []
    receive = inlet.receive

    def damage(source: tuple[str, int], rank: int, header: FrameHeader, taker: Taker) -> None:
        if len(damaged) < 3:
            header = replace(header, checksums=header.checksums[:-1] + bytes([header.checksums[-1] ^ 64]))
            damaged.append(source)
        receive(source, rank, header, taker)

    inlet.receive = damage  # type: ignore[method-assign]
    await ready(router)
    await check(router, range(6), 20)
    aborts = dict(decode.loop.load().handover_aborts)
    assert damaged and aborts["corrupt_block"] > 0
    await house.balanced()


async def test_a_request_that_kills_workers_is_given_up(house: House) -> None:
    """Its neighbours live."""
    config = RouterConfig(lease_s=1.0, heartbeat_s=0.1, max_losses=3)
    router = Router("router", config, "secret")
    await router.start(house.members())
    deadly = 950

    def made() -> ToyEngine:
        engine = ToyEngine()

        def die(plan: object) -> None:
            if any(deadly in s.request.tokens for s in plan.sequences):  # type: ignore[attr-defined]
                raise Crash

        engine.runner.before = die
        return engine

    async def nurse() -> None:
        """What a supervisor does."""
        while True:
            await asyncio.sleep(0.05)
            for name in list(house.workers):
                if not house.alive(name):
                    await house.kill(name)
                    await house.worker(name, Role.COLOCATED, made())

    for number in range(2):
        await house.worker(f"colocated-{number}", Role.COLOCATED, made())
    await ready(router)
    nursing = asyncio.create_task(nurse())
    try:
        with pytest.raises(PoisonRequest):
            async with asyncio.timeout(TIMEOUT_S):
                await ask(router, request("bad", [1, deadly, 2], 10))
        await check(router, range(8), 10)
        # Neighbours die with it again and again, and still live to the end.
        async with asyncio.timeout(TIMEOUT_S):
            bad, *good = await asyncio.gather(
                ask(router, request("worse", [3, deadly], 10)),
                *(ask(router, request(str(s), prompt(s), 40)) for s in range(10, 22)),
                return_exceptions=True,
            )
        assert isinstance(bad, PoisonRequest)
        assert good == [oracle(prompt(s), 40) for s in range(10, 22)]
    finally:
        nursing.cancel()
        await router.close()
