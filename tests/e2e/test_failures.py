"""A worker is killed, or frozen past its lease and woken, while it serves: every stream goes on as if nothing were."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing

import psutil
import pytest

from tests.e2e.cluster import OUTPUT, Answer, Cluster, connected, running
from tests.e2e.prompts import ALL, LONG, Prompt
from tests.e2e.reference import Judge
from tests.e2e.serving import Serve

pytestmark = pytest.mark.timeout(300)

LEASE_S = 2.0
CONFIG = f"""
router: {{lease_s: {LEASE_S}, heartbeat_s: 0.25}}
worker: {{lease_s: {LEASE_S}, heartbeat_s: 0.25}}
handover: {{lease_s: {LEASE_S}}}
"""
WORKERS = 4
OTHER = {"prefill-0": "prefill-1", "prefill-1": "prefill-0", "decode-0": "decode-1", "decode-1": "decode-0"}
STREAMS = 16
BEGUN = 6
"""Tokens that every stream has when a decode worker is hit."""
ENDLESS = 1500
"""More tokens than a stream will ever wait for."""
AFTERWARDS = 16
"""Tokens of each stream after all that is done to it."""

RETRIES = "baton_router_retries_total"

MIXED: list[Prompt] = ALL[5 : 5 + STREAMS]
HEAVY: list[Prompt] = (LONG * 2)[:STREAMS]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Two workers of each role, with short leases and prompts in small chunks."""
    flags = ("--prefill", "2", "--decode", "2", "--max-batch-tokens", "64", "--kv-memory", "256MiB")
    with running(tmp_path_factory.mktemp("four"), *flags, config=CONFIG) as serve:
        yield serve


@pytest.fixture
async def cluster(serve: Serve) -> AsyncIterator[Cluster]:
    """All four are there, before and after; and afterwards their books are empty."""
    async with connected(serve) as cluster:
        await cluster.whole(WORKERS)
        yield cluster
        await cluster.whole(WORKERS)
        await cluster.quiet()


class Streams:
    """Streams of some prompts, under way at the same time until `finish`: none ends by itself, however long that takes.
    `async with` ends them whatever happens."""

    def __init__(self, cluster: Cluster, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts
        self._answers = [Answer() for _ in prompts]
        self._enough: list[float] = [math.inf for _ in prompts]
        self._cluster = cluster

    async def __aenter__(self) -> Streams:
        self._tasks = [asyncio.create_task(self._follow(number)) for number in range(len(self._prompts))]
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _follow(self, number: int) -> None:
        prompt, answer = self._prompts[number], self._answers[number]
        async with aclosing(self._cluster.follow(prompt, answer, max_tokens=ENDLESS)) as events:
            async for _ in events:
                if len(answer.tokens) >= self._enough[number]:
                    return
        raise AssertionError("a stream ended by itself")

    async def begun(self, tokens: int) -> None:
        """Until each of them has so many tokens."""
        while min(len(answer.tokens) for answer in self._answers) < tokens:
            for task in self._tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(0.01)

    async def finish(self, judge: Judge) -> None:
        """Until each of them has gone on for some time: exactly the reference's tokens, which leaves no room for a gap
        or a repeat."""
        self._enough = [max(OUTPUT, len(answer.tokens) + AFTERWARDS) for answer in self._answers]
        await asyncio.gather(*self._tasks)
        judge.check(
            [(judge.encode(p), tuple(answer.tokens)) for p, answer in zip(self._prompts, self._answers, strict=True)]
        )


async def serve_all(cluster: Cluster, judge: Judge, prompts: Sequence[Prompt]) -> None:
    """Answers that end by themselves."""
    answers = await cluster.ask_all(prompts, stream=True)
    assert {len(answer.tokens) for answer in answers} == {OUTPUT}
    judge.check([(judge.encode(p), tuple(answer.tokens)) for p, answer in zip(prompts, answers, strict=True)])


async def busiest(cluster: Cluster, role: str) -> str:
    """The worker of this role that computes most requests, once one is known to compute some."""
    while True:
        running = {i: await cluster.metric("baton_requests_running", worker=f"{role}-{i}") for i in (0, 1)}
        if any(running.values()):
            return f"{role}-{max(running, key=running.__getitem__)}"


async def sending(cluster: Cluster) -> str:
    """A prefill worker in the middle of a handover."""
    while True:
        for name, report in (await cluster.reports()).items():
            if name.startswith("prefill") and report.handovers > 0:
                return name


async def hit(cluster: Cluster, role: str, number: signal.Signals) -> tuple[str, psutil.Process]:
    """Send a signal to a worker that has work, and say which one it was."""
    name = await (sending(cluster) if role == "prefill" else busiest(cluster, role))
    process = cluster.serve.children()[name]
    process.send_signal(number)
    return name, process


@pytest.mark.parametrize(("role", "prompts"), [("decode", MIXED), ("prefill", HEAVY)])
async def test_kill_9(cluster: Cluster, judge: Judge, role: str, prompts: list[Prompt]) -> None:
    before = await cluster.metric(RETRIES)
    async with Streams(cluster, prompts) as streams:
        await streams.begun(BEGUN if role == "decode" else 0)
        await hit(cluster, role, signal.SIGKILL)
        await streams.finish(judge)
    assert await cluster.metric(RETRIES) > before, "the one that was killed had nothing to do"


@pytest.mark.parametrize(("role", "prompts"), [("decode", MIXED), ("prefill", HEAVY)])
async def test_frozen_for_twice_the_lease(cluster: Cluster, judge: Judge, role: str, prompts: list[Prompt]) -> None:
    before = await cluster.metric(RETRIES)
    async with Streams(cluster, prompts) as streams:
        await streams.begun(BEGUN if role == "decode" else 0)
        name, process = await hit(cluster, role, signal.SIGSTOP)
        frozen = time.monotonic()
        try:
            await streams.finish(judge)
            assert await cluster.metric(RETRIES) > before, "the one that was frozen had nothing to do"
            # Others use what it held, while it still believes that it is in the middle of its work. Not for long: who
            # is silent for a minute is replaced.
            await serve_all(cluster, judge, MIXED[:8])
            await asyncio.sleep(frozen + 2 * LEASE_S - time.monotonic())
        finally:
            process.send_signal(signal.SIGCONT)
    await serve_all(cluster, judge, MIXED[:8])  # while its late words arrive
    await cluster.whole(WORKERS)
    assert cluster.serve.children()[name] == process, "it is the same process"
    await cluster.quiet()
    worked = await cluster.metric("baton_engine_steps_total", worker=name)
    cluster.serve.children()[OTHER[name]].kill()
    await serve_all(cluster, judge, MIXED[:4])
    assert await cluster.metric("baton_engine_steps_total", worker=name) > worked, "it is back in service"


async def test_a_worker_that_is_told_to_stop_hands_its_requests_over(cluster: Cluster, judge: Judge) -> None:
    """No token is lost, and nothing is computed twice: what ran there goes on elsewhere with its KV."""
    tokens, retries = await cluster.metric("baton_worker_prompt_tokens_total"), await cluster.metric(RETRIES)
    moved = await cluster.metric("baton_router_moves_total", result="moved")
    prompts = MIXED[:12]
    async with Streams(cluster, prompts) as streams:
        await streams.begun(BEGUN)
        _, process = await hit(cluster, "decode", signal.SIGTERM)
        await asyncio.to_thread(process.wait, 30)
        assert await cluster.metric("baton_router_moves_total", result="moved") - moved >= 2
        await streams.finish(judge)
        assert await cluster.metric(RETRIES) == retries
        computed = await cluster.metric("baton_worker_prompt_tokens_total") - tokens
        assert computed == sum(len(judge.encode(prompt)) for prompt in prompts)
