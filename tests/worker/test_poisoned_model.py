"""A real model, whose free blocks are not a number: were one of them read, or the unwritten rest of one that is not
full, nothing that comes after would be right. Requests are handed over, preempted, moved and cancelled meanwhile, and
the answers are the reference's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from baton.common.clock import RealClock
from baton.common.cluster import Members, WorkerStatus
from baton.common.config import EngineConfig, HandoverConfig, RouterConfig, WorkerConfig
from baton.common.types import Request, Role, SamplingParams
from baton.router.service import Router
from baton.worker.assembly import Worker
from baton.worker.compute import build
from tests.e2e.reference import Judge, Tokens
from tests.house import hold
from tests.poison import Poison
from tests.tiny import make_checkpoint

DECODERS = ("decode-0", "decode-1")
BLOCKS = 44
LONG = [(3 + 5 * n % 61, 110) for n in range(16)]
"""Lengths of prompts, from less than a block to four of them, and of answers. While no decode worker plans, both have
room for twice these prompts. Side by side the answers need 140 blocks in the end, so one worker at least lacks many."""
SHORT = [(3 + 10 * n % 61, 24) for n in range(8)]
"""Those that come in when there is no room left."""
CANCELLED = 6
"""How many more come then and are given up, each a little later than the one before."""
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="module")
def judge(checkpoint: Path) -> Judge:
    return Judge.load(checkpoint)


@asynccontextmanager
async def running(
    name: str, role: Role, model: Path, transport: str, decoding: threading.Event
) -> AsyncIterator[Worker]:
    """A worker with the real engine and poison in its pool, its loop on a thread. It decodes once `decoding` is set."""
    block = 3 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, tokens, elements, bytes
    overlap = "on" if transport == "tcp" else "off"
    engine = EngineConfig(model=str(model), kv_memory=BLOCKS * block, threads=1, max_batch_tokens=32, overlap=overlap)
    handover = HandoverConfig(headroom_tokens=0, transport=transport)
    config = WorkerConfig(name=name, role=role, engine=engine, cluster_token="secret", handover=handover)
    compute = build(config, lambda _: None)
    assert compute.num_blocks == BLOCKS and compute.engine.pool.memory is not None
    worker = Worker(config, compute, RealClock())
    values = compute.engine.pool.memory.view(np.float32).reshape(3, BLOCKS, -1)
    poison = Poison(worker.loop.context.table.manager, values, float("nan"))
    assert np.isnan(compute.engine.pool.flat.view(torch.float32).numpy()).all()
    hold(worker, decoding)
    stop = threading.Event()
    thread = threading.Thread(target=worker.loop.run, args=(stop,))
    await worker.start()
    thread.start()
    try:
        yield worker
    finally:
        stop.set()
        await worker.stop()
        await asyncio.to_thread(thread.join, 5.0)
        poison.check()


async def members(workers: list[Worker]) -> AsyncIterator[Members]:
    yield Members(1, tuple(WorkerStatus(w.ref.name, "", "ready", w.ref.address, w.ref.epoch) for w in workers))


def request(number: int, length: int, answer: int) -> Request:
    generator = torch.Generator().manual_seed(number)
    tokens: list[int] = torch.randint(3, 300, (length,), generator=generator).tolist()
    params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
    return Request(str(number), tuple(tokens), length, params, deadline_s=TIMEOUT_S)


async def complete(router: Router, what: Request) -> Tokens:
    stream, tokens = router.submit(what), list[int]()
    while (batch := await stream.next()).finish is None:
        tokens += [t.token for t in batch.tokens]
    return (*tokens, *(t.token for t in batch.tokens))


async def give_up(router: Router, what: Request, after_s: float) -> None:
    stream = router.submit(what)
    await asyncio.sleep(after_s)
    stream.cancel()


async def balanced(worker: Worker) -> None:
    while True:
        report = await worker.check()
        assert report.ok, report.problem
        if report.pinned_blocks == report.reserved_blocks == report.sequences == report.handovers == 0:
            return
        await asyncio.sleep(0.02)


async def chase(router: Router) -> None:
    """Each decode worker in turn is to be emptied, every time for longer: who waits for a prompt's turn there is placed
    elsewhere, and must be computed in the end, however slow the machine."""
    try:
        for turn in count():
            router._core.set_draining((), {DECODERS[turn % 2]})
            await asyncio.sleep(0.1 * 1.1**turn)
    finally:
        router._core.set_draining(())


@pytest.mark.parametrize("transport", ["shm", "tcp", "process-group"])
async def test_nothing_is_read_that_was_not_written(checkpoint: Path, judge: Judge, transport: str) -> None:
    decoding = threading.Event()
    async with asyncio.timeout(TIMEOUT_S), AsyncExitStack() as stack:

        async def worker(name: str, role: Role) -> Worker:
            return await stack.enter_async_context(running(name, role, checkpoint, transport, decoding))

        prefill, decode = await worker("prefill-0", Role.PREFILL), [await worker(n, Role.DECODE) for n in DECODERS]
        router = Router("router", RouterConfig(max_attempts=1000, place_timeout_s=TIMEOUT_S), "secret")
        await router.start(members([prefill, *decode]))
        stack.push_async_callback(router.close)
        while sum(w.state == "ready" for w in router.snapshot().workers) < 3:
            await asyncio.sleep(0.02)

        async def preemptions() -> int:
            return sum([(await each.check()).preemptions for each in decode])

        asked = [request(number, *lengths) for number, lengths in enumerate(LONG + SHORT)]
        async with asyncio.TaskGroup() as clients:
            answers = [clients.create_task(complete(router, what)) for what in asked[: len(LONG)]]
            while not all(stream.handover_done for stream in router._streams) or len(router._streams) < len(LONG):
                await asyncio.sleep(0.02)
            chasing = clients.create_task(chase(router))
            while not router.snapshot().stats.moves["moved"]:
                await asyncio.sleep(0.02)
            chasing.cancel()
            decoding.set()
            ended = False
            while not await preemptions():
                assert not ended, "there was room for all"
                ended = any(answer.done() for answer in answers)
                await asyncio.sleep(0.02)
            chasing = clients.create_task(chase(router))
            answers += [clients.create_task(complete(router, what)) for what in asked[len(LONG) :]]
            for number in range(CANCELLED):
                clients.create_task(give_up(router, request(100 + number, 40, 40), 0.05 * number))
            await asyncio.wait(answers)
            chasing.cancel()
        for each in (prefill, *decode):
            await balanced(each)
        assert transport in {how for _, _, how in prefill.plane.outlet._lanes}
    judge.check([(what.tokens, answer.result()) for what, answer in zip(asked, answers, strict=True)])
