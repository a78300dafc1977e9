"""Workers that change their role in place, idle and under load: no request is lost, and what was cached stays."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator
from itertools import count

import pytest

from baton.common.config import RouterConfig
from baton.common.errors import DeadlineExceeded, InvalidRequest, NotReady, WorkerLost
from baton.common.messages import Hello, Turn
from baton.common.types import Role, WorkerInfo
from baton.protos.convert import FromRouter, FromWorker
from baton.protos.rpc import Peer
from baton.router.service import Router
from baton.worker.assembly import Worker
from tests.house import House, hold
from tests.toy import BLOCK_SIZE, ToyEngine, oracle, request

TIMEOUT_S = 40.0


@pytest.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    yield house
    await house.close()


@pytest.fixture
async def router(house: House) -> AsyncIterator[Router]:
    config = RouterConfig(lease_s=2.0, heartbeat_s=0.1, max_losses=3, max_attempts=50)
    router = Router("router", config, "secret")
    await router.start(house.members())
    yield router
    await router.close()


def slow() -> ToyEngine:
    engine = ToyEngine(num_blocks=1200)
    engine.runner.before = lambda plan: time.sleep(0.005)
    return engine


def prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(900) for _ in range(rng.randrange(3, 40))]


async def ready(router: Router, **roles: str) -> None:
    """Until the router sees these workers in these roles, and all of them usable."""
    wanted = {name.replace("_", "-"): role for name, role in roles.items()}
    async with asyncio.timeout(10):
        while {w.name: str(w.role) for w in router.snapshot().workers if w.state == "ready"} != wanted:
            await asyncio.sleep(0.01)


async def answer(router: Router, tokens: list[int], length: int) -> tuple[list[int], int]:
    """Output, and how much of the prompt was cached."""
    stream, output = router.submit(request("r", tokens, length)), []
    while True:
        batch = await stream.next()
        output += [token.token for token in batch.tokens]
        if batch.finish is not None:
            return output, batch.finish.usage.cached_tokens


async def turn(worker: Worker, role: str, within_s: float = 10.0) -> None:
    """Over the wire."""
    peer = Peer(worker.ref.address, "secret")
    try:
        await peer.turn(Turn(role, within_s))
    finally:
        await peer.close()


async def test_an_idle_worker_turns_and_keeps_what_it_cached(house: House, router: Router) -> None:
    await house.worker("a-0", Role.PREFILL)
    second = await house.worker("a-1", Role.PREFILL)
    await house.worker("b-0", Role.DECODE)
    await ready(router, a_0="prefill", a_1="prefill", b_0="decode")
    words = list(range(10 * BLOCK_SIZE))
    router._core.set_draining(["a-0"])
    assert await answer(router, words, 4) == (oracle(words, 4), 0)
    router._core.set_draining([])
    await turn(second, "colocated")
    await ready(router, a_0="prefill", a_1="colocated", b_0="decode")
    assert second.role is Role.COLOCATED
    router._core.set_draining(["a-0", "b-0"])
    output, cached = await answer(router, words, 4)
    assert output == oracle(words, 4) and cached >= 9 * BLOCK_SIZE
    assert router.snapshot().stats.retries == {}
    await house.balanced()


async def test_a_turned_worker_does_the_new_work_and_not_the_old(house: House, router: Router) -> None:
    prefill = await house.worker("a-0", Role.PREFILL)
    decode = await house.worker("b-0", Role.DECODE)
    await ready(router, a_0="prefill", b_0="decode")
    await turn(decode, "prefill")
    await turn(prefill, "decode")
    await ready(router, a_0="decode", b_0="prefill")
    assert await answer(router, prompt(1), 20) == (oracle(prompt(1), 20), 0)
    assert decode.load().prompt_tokens == len(prompt(1)) and prefill.load().prompt_tokens == 0
    await turn(decode, "prefill")  # it is that already
    await house.balanced()


async def test_a_busy_worker_turns_when_it_is_empty_or_says_no(house: House, router: Router) -> None:
    await house.worker("a-0", Role.PREFILL)
    busy = hold(await house.worker("b-0", Role.DECODE, slow()), decoding := threading.Event())
    await house.worker("b-1", Role.DECODE, slow())
    await ready(router, a_0="prefill", b_0="decode", b_1="decode")
    router._core.set_draining(["b-1"])
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        answers = [group.create_task(answer(router, prompt(seed), 150)) for seed in range(8)]
        while busy.load().running < 8:
            await asyncio.sleep(0.01)
        with pytest.raises(DeadlineExceeded, match="without requests"):
            await turn(busy, "prefill", 0.1)
        assert busy.role is Role.DECODE
        turning = group.create_task(turn(busy, "prefill"))
        await asyncio.sleep(0.1)
        with pytest.raises(NotReady, match="already"):
            await turn(busy, "prefill")
        router._core.set_draining([], ["b-0"])
        decoding.set()
        await turning
        assert not all(a.done() for a in answers), "it emptied because the requests ended"
    assert [a.result()[0] for a in answers] == [oracle(prompt(seed), 150) for seed in range(8)]
    assert router.snapshot().stats.retries == {}
    with pytest.raises(InvalidRequest):
        await turn(busy, "cook")
    await house.balanced()


async def test_no_request_is_to_blame_for_a_turn(house: House, router: Router) -> None:
    """A router that hears too early that nobody shall turn any more may place requests on a worker that just does."""
    decoding = threading.Event()
    for name in ("c-0", "c-1"):
        hold(await house.worker(name, Role.COLOCATED, slow()), decoding)
    await ready(router, c_0="colocated", c_1="colocated")
    asked = asyncio.create_task(answer(router, prompt(1), 60))
    while not (busy := [w for w in house.workers.values() if w.load().running]):
        await asyncio.sleep(0.01)
    busy[0]._turned(Role.COLOCATED, True)  # as if it held nothing
    decoding.set()
    assert (await asked)[0] == oracle(prompt(1), 60)
    assert set(router.snapshot().stats.retries) == {"handover_failed"}
    await house.balanced()


async def test_roles_change_all_the_time_under_load(house: House, router: Router) -> None:
    """Turned the way a controller does it: first no new work and the rest moves, then the turn."""
    names = ["w-0", "w-1", "w-2"]
    await house.worker("p", Role.PREFILL)
    await house.worker("d", Role.DECODE)
    for name in names:
        await house.worker(name, Role.DECODE, ToyEngine(late=name == "w-1"))
    await ready(router, p="prefill", d="decode", w_0="decode", w_1="decode", w_2="decode")
    rng, turns = random.Random(3), 0

    async def shuffle() -> None:
        nonlocal turns
        while True:
            name, role = rng.choice(names), rng.choice(["prefill", "decode", "colocated"])
            router._core.set_draining([], [name])
            await turn(house.workers[name], role)
            router._core.set_draining([])
            turns += 1
            await asyncio.sleep(rng.uniform(0.01, 0.05))

    async def client(seed: int) -> None:
        for number in count():
            if number >= 8 and turns > 5:
                break
            tokens = prompt(100 * seed + number)
            assert (await answer(router, tokens, 30))[0] == oracle(tokens, 30)

    shuffling = asyncio.create_task(shuffle())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.gather(*(client(seed) for seed in range(12)))
    finally:
        shuffling.cancel()
    assert router.snapshot().stats.failed == {}
    await asyncio.wait([shuffling])
    router._core.set_draining([])
    await house.balanced()


async def test_a_prompt_that_comes_too_late_is_refused_and_goes_elsewhere(house: House, router: Router) -> None:
    """A router that has not heard of the turn yet: its session is cut a moment later."""
    late = await house.worker("a-0", Role.PREFILL)
    await house.worker("c-0", Role.COLOCATED)
    await house.worker("b-0", Role.DECODE)
    await ready(router, a_0="prefill", b_0="decode", c_0="colocated")
    late._routers.renew = lambda role: None  # type: ignore[method-assign]  # and here it never is
    await turn(late, "decode")
    await asyncio.gather(*(answer(router, prompt(seed), 5) for seed in range(6)))
    stats = router.snapshot().stats
    assert set(stats.retries) == {"wrong_role"} and stats.failed == {}


async def test_a_router_that_joins_while_it_turns_does_not_keep_the_old_role(house: House) -> None:
    worker = await house.worker("a-0", Role.PREFILL)
    told: list[FromWorker] = []
    may_be_written = asyncio.Event()

    class Joining:
        """A router that is being told who this is when the role changes."""

        def __init__(self) -> None:
            self._said: list[FromRouter] = [Hello("late", 1, worker.ref.epoch)]

        async def read(self) -> FromRouter | None:
            return self._said.pop() if self._said else await asyncio.get_running_loop().create_future()

        async def write(self, message: FromWorker) -> None:
            told.append(message)
            await may_be_written.wait()

    session = asyncio.create_task(worker.session(Joining()))
    async with asyncio.timeout(5):
        while not told:
            await asyncio.sleep(0.01)
        await turn(worker, "decode")
        may_be_written.set()
        with pytest.raises(WorkerLost, match="decode worker now"):
            await session
    assert isinstance(told[0], WorkerInfo) and told[0].role is Role.PREFILL
