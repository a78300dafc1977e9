"""Running requests that move from one decode worker to another under load, and cached KV that goes back to prefill:
the oracle's tokens, each once, and nothing computed twice."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from itertools import count

import pytest

from baton.common.config import RouterConfig
from baton.common.types import Role
from baton.router.service import Router
from tests.house import House, hold
from tests.toy import BLOCK_SIZE, ToyEngine, oracle, request
from tests.worker.asking import ask, ready

TIMEOUT_S = 40.0


def slow(num_blocks: int = 1200, seconds: float = 0.01, late: bool = False) -> ToyEngine:
    engine = ToyEngine(num_blocks=num_blocks, late=late)
    engine.runner.before = lambda plan: time.sleep(seconds)
    return engine


def prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(900) for _ in range(rng.randrange(3, 40))]


async def drained(house: House, name: str) -> None:
    """Until the worker holds no request."""
    async with asyncio.timeout(TIMEOUT_S):
        while (await house.workers[name].check()).sequences:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("transport", "late"), [("shm", True), ("tcp", False)])
async def test_a_drain_takes_its_requests_along(house: House, router: Router, transport: str, late: bool) -> None:
    prefill, decoding = await house.worker("prefill-0", Role.PREFILL), threading.Event()
    for name in ("decode-0", "decode-1"):
        hold(await house.worker(name, Role.DECODE, slow(seconds=0.02, late=late), transport=transport), decoding)
    await ready(router, 3)
    seeds, length = range(24), 140
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        answers = [group.create_task(ask(router, request(str(seed), prompt(seed), length))) for seed in seeds]
        # What the router does not know to have begun would go elsewhere, and not move.
        while prefill.load().handovers < len(seeds) or not all(state.handover_done for state in router._streams):
            await asyncio.sleep(0.01)
        assert all(w.loop.load().running > 2 for n, w in house.workers.items() if n != "prefill-0")
        decoding.set()
        router._core.set_draining((), {"decode-0"})
        await drained(house, "decode-0")
        assert not any(a.done() for a in answers), "it emptied because the requests ended"
    for seed, tokens in zip(seeds, answers, strict=True):
        assert tokens.result() == oracle(prompt(seed), length)
    stats, load = router.snapshot().stats, house.workers["decode-0"].loop.load()
    assert stats.moves["moved"] == load.moves > 2 and not stats.retries
    assert prefill.loop.load().prompt_tokens == sum(len(prompt(seed)) for seed in seeds)  # nothing twice
    await house.balanced()


async def test_to_and_fro_until_the_end(house: House, router: Router) -> None:
    """The same requests are chased around, while their neighbours come and go."""
    await house.worker("prefill-0", Role.PREFILL)
    names = ["decode-0", "decode-1", "colocated-0"]
    for name in names:
        await house.worker(name, Role.DECODE if name[0] == "d" else Role.COLOCATED, slow(120))
    await ready(router, 4)
    rng, length = random.Random(5), 120

    async def chase() -> None:
        for turn in count():  # every time for longer: who waits for a prompt's turn there is placed elsewhere
            router._core.set_draining((), {rng.choice(names)})
            await asyncio.sleep(rng.uniform(0.02, 0.2) * 1.05**turn)

    chasing, first = asyncio.create_task(chase()), 40
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while router.snapshot().stats.moves["moved"] <= 10:
                seeds = range(first, first := first + 30)
                asked = (ask(router, request(str(seed), prompt(seed), length)) for seed in seeds)
                for seed, tokens in zip(seeds, await asyncio.gather(*asked), strict=True):
                    assert tokens == oracle(prompt(seed), length)
    finally:
        chasing.cancel()
    await house.balanced()


@pytest.mark.parametrize("victim", ["decode-0", "decode-1"])
async def test_either_side_dies_while_requests_move(house: House, router: Router, victim: str) -> None:
    await house.worker("prefill-0", Role.PREFILL)
    for name in ("decode-0", "decode-1", "decode-2"):
        await house.worker(name, Role.DECODE, slow())
    await ready(router, 4)
    seeds, length = range(80, 104), 120
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        answers = [group.create_task(ask(router, request(str(seed), prompt(seed), length))) for seed in seeds]
        await asyncio.sleep(0.2)
        router._core.set_draining((), {"decode-0"})
        await asyncio.sleep(0.03)
        await house.kill(victim)
    for seed, tokens in zip(seeds, answers, strict=True):
        assert tokens.result() == oracle(prompt(seed), length)
    await house.balanced()


async def test_who_finds_no_room_stays(house: House, router: Router) -> None:
    await house.worker("prefill-0", Role.PREFILL)
    await house.worker("decode-0", Role.DECODE, slow())
    await ready(router, 2)
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        answers = [group.create_task(ask(router, request(str(seed), prompt(seed), 60))) for seed in range(6)]
        await asyncio.sleep(0.1)
        await house.worker("decode-1", Role.DECODE, ToyEngine(num_blocks=6))
        await ready(router, 3)
        router._core.set_draining((), {"decode-0"})
    for seed, tokens in enumerate(answers):
        assert tokens.result() == oracle(prompt(seed), 60)
    await house.balanced()


async def test_an_answer_goes_back_to_where_its_prompt_was_computed(house: House) -> None:
    """The next turn of a conversation finds the answer in prefill's cache, though prefill never computed it."""
    router = Router("router", RouterConfig(return_answers=True), "secret")
    await router.start(house.members())
    try:
        prefill = await house.worker("prefill-0", Role.PREFILL)
        await house.worker("decode-0", Role.DECODE)
        await ready(router, 2)
        first = prompt(1)
        said = await ask(router, request(str(1), prompt(1), 40))
        async with asyncio.timeout(TIMEOUT_S):
            while prefill.loop.load().cached_blocks < (len(first) + 39) // BLOCK_SIZE:
                await asyncio.sleep(0.01)
        await house.balanced()
        stream = router.submit(request("again", [*first, *said, 5, 6], 4))
        while (batch := await stream.next()).finish is None:
            pass
        assert batch.finish.usage.cached_tokens >= (len(first) + 39) // BLOCK_SIZE * BLOCK_SIZE
        await house.balanced()
    finally:
        await router.close()
