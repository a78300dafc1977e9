"""The whole router over real gRPC on loopback, with stand-in workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from baton.common.cluster import Members, WorkerState, WorkerStatus
from baton.common.config import RouterConfig
from baton.common.errors import NotReady, PoisonRequest
from baton.common.types import FinishReason, Request, Role
from baton.router.request import Finish
from baton.router.service import RequestStream, Router
from tests.fake_worker import FakeWorker, expected, fleet, members_of
from tests.router.fakes import request

FAST = RouterConfig(lease_s=1.0, heartbeat_s=0.1, place_timeout_s=5.0)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def routed(
    *workers: FakeWorker, config: RouterConfig = FAST, members: AsyncIterator[Members] | None = None
) -> AsyncIterator[Router]:
    """Workers that are started, and a router that knows them all."""
    async with fleet(*workers):
        router = Router("router", config, "")
        await router.start(members or members_of(*workers))
        try:
            await until(
                lambda: all(w.state == "ready" for w in router.snapshot().workers) and router.ready()[0] == "ready"
            )
            await until(lambda: len(router.snapshot().workers) == len(workers))
            yield router
        finally:
            await router.close()


async def collect(stream: RequestStream) -> tuple[list[int], Finish]:
    tokens: list[int] = []
    while True:
        batch = await stream.next()
        tokens += [token.token for token in batch.tokens]
        if batch.finish is not None:
            return tokens, batch.finish


def roles() -> list[FakeWorker]:
    step = 0.005
    return [
        FakeWorker("p", Role.PREFILL), FakeWorker("q", Role.PREFILL),
        FakeWorker("d", Role.DECODE, step_s=step), FakeWorker("e", Role.DECODE, step_s=step),
    ]  # fmt: skip


def some_requests(count: int, max_tokens: int = 20) -> list[Request]:
    return [request(range(1, i + 5), max_tokens, name=f"r{i}") for i in range(count)]


@pytest.mark.parametrize("workers", [[FakeWorker("c")], roles()], ids=["colocated", "two pairs"])
async def test_streams_come_back_whole(workers: list[FakeWorker]) -> None:
    async with routed(*workers) as router:
        requests = some_requests(16)
        results = await asyncio.gather(*(collect(router.submit(r)) for r in requests))
        for req, (tokens, finish) in zip(requests, results, strict=True):
            assert tokens == expected(req)
            assert finish.reason is FinishReason.LENGTH and finish.usage.completion_tokens == 20
            assert finish.timeline.first_token is not None
        snapshot = router.snapshot()
        assert (snapshot.running, snapshot.waiting) == (0, 0)
        limits = router.limits()
        assert limits is not None and limits.max_model_len == 4096 and limits.model == "fake"


@pytest.mark.parametrize("victim", [0, 2], ids=["prefill", "decode"])
async def test_streams_survive_the_death_of_a_worker(victim: int) -> None:
    workers = roles()
    async with routed(*workers) as router:
        requests = some_requests(16, max_tokens=60)
        results = [asyncio.create_task(collect(router.submit(r))) for r in requests]
        await until(lambda: workers[2].running > 4 and workers[3].running > 4)
        await workers[victim].kill()
        for req, result in zip(requests, results, strict=True):
            tokens, _ = await result
            assert tokens == expected(req)
        assert router.snapshot().stats.losses == 1


async def test_a_frozen_worker_is_left_and_comes_back_into_service() -> None:
    one, other = FakeWorker("a", step_s=0.005), FakeWorker("b", step_s=0.005)
    async with routed(one, other) as router:
        requests = some_requests(8, max_tokens=60)
        results = [asyncio.create_task(collect(router.submit(r))) for r in requests]
        await until(lambda: one.running > 2 and other.running > 2)
        one.freeze()
        for req, result in zip(requests, results, strict=True):
            tokens, _ = await result
            assert tokens == expected(req)
        assert [w.name for w in router.snapshot().workers] == ["b"]
        one.thaw()
        await until(lambda: len(router.snapshot().workers) == 2)
        await until(lambda: one.running == 0)


async def test_a_restarted_worker_is_another_one() -> None:
    old = FakeWorker("a")
    changes: asyncio.Queue[Members] = asyncio.Queue()

    async def members() -> AsyncIterator[Members]:
        while True:
            yield await changes.get()

    await changes.put(Members(1))
    async with fleet(old):
        router = Router("router", FAST, "")
        await router.start(members())
        await changes.put(Members(1, (old.status,)))
        await until(lambda: router.ready()[0] == "ready")
        await old.kill()
        await until(lambda: router.ready()[0] == "unhealthy")
        new = FakeWorker("a")
        async with fleet(new):
            await changes.put(Members(2, (new.status,)))
            await until(lambda: router.ready()[0] == "ready")
            assert [w.epoch for w in router.snapshot().workers] == [new.epoch]
            await router.close()


async def test_cancel_frees_the_worker_at_once() -> None:
    worker = FakeWorker("a", step_s=0.01)
    async with routed(worker) as router:
        stream = router.submit(request(max_tokens=1000))
        await stream.next()
        stream.cancel()
        stream.cancel()
        await until(lambda: worker.running == 0)
        assert len(set(worker.cancels)) == 1
        _, finish = await collect(stream)
        assert finish.reason is FinishReason.CANCELLED


async def test_a_backlog_grows_while_nobody_reads() -> None:
    async with routed(FakeWorker("a")) as router:
        stream = router.submit(request(max_tokens=50))
        await until(lambda: stream.backlog == 50)
        batch = await stream.next()
        assert len(batch.tokens) == 50 and batch.finish is not None and stream.backlog == 0


async def test_refusals_are_tried_again() -> None:
    worker = FakeWorker("a")
    worker.refuse = 3
    async with routed(worker) as router:
        tokens, _ = await collect(router.submit(req := request()))
        assert tokens == expected(req) and len(worker.submits) == 4
        assert router.snapshot().stats.retries == {"pool_full": 3}


async def test_a_failure_reaches_the_consumer_with_its_type() -> None:
    workers = [FakeWorker(name, step_s=0.05) for name in "abc"]
    async with routed(*workers) as router:
        stream = router.submit(request(max_tokens=1000))
        for _ in workers:
            await until(lambda: any(w.running for w in workers))
            await next(w for w in workers if w.running).kill()
        with pytest.raises(PoisonRequest):
            await collect(stream)


async def test_closing_fails_streams_and_leaves_no_session() -> None:
    worker = FakeWorker("a", step_s=0.01)
    async with routed(worker) as router:
        stream = router.submit(request(max_tokens=1000))
        await stream.next()
        await router.close()
        with pytest.raises(NotReady):
            await collect(stream)
        await until(lambda: not worker._routers)


async def test_readiness_says_what_is_missing() -> None:
    def status(name: str, state: str, **rest: float) -> WorkerStatus:
        return WorkerStatus(name, "decode", WorkerState(state), "127.0.0.1:1", 1, **rest)

    router = Router("router", FAST, "")
    assert router.ready() == ("loading", "no word from the controller yet")
    with pytest.raises(NotReady):
        router.submit(request())
    for workers, state, words in (
        ((), "loading", "no workers"),
        ((status("d", "loading", progress=0.25),), "loading", "d loading 25%"),
        ((status("d", "draining"),), "loading", "d draining"),
        ((status("d", "failed"),), "unhealthy", "d failed"),
    ):

        async def members(found: tuple[WorkerStatus, ...] = workers) -> AsyncIterator[Members]:
            yield Members(1, found)

        await router.start(members())
        await until(lambda: router._tasks[0].done())
        assert router.ready()[0] == state and words in router.ready()[1]
        await router.close()


async def test_pairs_with_different_fingerprints_are_not_ready() -> None:
    workers = [FakeWorker("p", Role.PREFILL, fingerprint="x"), FakeWorker("d", Role.DECODE, fingerprint="y")]
    async with fleet(*workers):
        router = Router("router", FAST, "")
        await router.start(members_of(*workers))
        await until(lambda: len(router.snapshot().workers) == 2)
        await asyncio.sleep(0.2)
        assert router.ready()[0] != "ready"
        await router.close()


async def test_a_worker_that_is_named_again_at_once_is_linked_again() -> None:
    """A link that is not up is given up with its worker's membership, and has not ended yet when that comes back."""
    async with fleet(worker := FakeWorker("a")):
        there = Members(3, (worker.status,))
        gone = Members(2)
        unreachable = Members(1, (replace(worker.status, address="127.0.0.1:9"),))

        async def members() -> AsyncIterator[Members]:
            yield unreachable
            await asyncio.sleep(0.2)
            yield gone
            yield there
            await asyncio.Event().wait()

        router = Router("router", FAST, "")
        await router.start(members())
        try:
            await until(lambda: router.ready()[0] == "ready")
        finally:
            await router.close()


async def test_a_controller_that_forgets_costs_no_session() -> None:
    """It has begun anew, with a table that knows no worker yet."""
    worker = FakeWorker("a")
    begun_anew = asyncio.Event()

    async def members() -> AsyncIterator[Members]:
        yield Members(5, (worker.status,))
        await begun_anew.wait()
        yield Members(0)
        await asyncio.Event().wait()

    async with fleet(worker):
        router = Router("router", FAST, "")
        await router.start(members())
        await until(lambda: router.ready()[0] == "ready")
        begun_anew.set()
        await until(lambda: router._members == Members(0))
        tokens, _ = await collect(router.submit(req := request()))
        assert tokens == expected(req)
        await worker.kill()
        await until(lambda: router._links["a"].over)
        await router.close()


async def test_closing_ends_the_membership(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the router is busy with a change of it: its stream is not left to the garbage collector."""
    ended = asyncio.Event()

    async def busy(router: Router, members: Members) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Router, "_relink", busy)

    async def members() -> AsyncIterator[Members]:
        try:
            yield Members(1)
            await asyncio.Event().wait()
        finally:
            ended.set()

    router = Router("router", FAST, "")
    await router.start(members())
    await until(lambda: router._members is not None)
    await router.close()
    assert ended.is_set()


async def test_what_happened_to_a_request_can_be_asked_while_it_runs_and_after() -> None:
    workers = [FakeWorker("p", Role.PREFILL), FakeWorker("d", Role.DECODE, step_s=0.1)]
    async with routed(*workers) as router:
        assert router.trace("") is None
        stream = router.submit(request([1, 2, 3], 1000, name="long"))
        await collect(router.submit(request([1, 2, 3], 3, name="short")))
        running, ended = router.trace("long"), router.trace("short")
        assert running is not None and running.outcome == "" and running.spans[-1].end is None
        assert ended is not None and (ended.outcome, ended.gateway, ended.output_tokens) == ("length", "router", 3)
        await until(lambda: any(span.what == "prefill" for span in router.trace("short").spans))  # p may be heard last
        ended = router.trace("short")
        assert [(span.what, span.worker) for span in ended.spans if span.what != "handover"] == [
            ("waiting", ""), ("queued", "p"), ("prefill", "p"), ("decode", "d"),
        ]  # fmt: skip
        assert router.trace("other") is None
        assert (slowest := router.trace("")) is not None and slowest.request_id == "long"
        stream.cancel()
        assert (cancelled := router.trace("long")) is not None and cancelled.outcome == "cancelled"
        traffic = router.traffic()
        assert (traffic.arrived, traffic.finished, traffic.started) == (2, 2, 2)
        assert len(traffic.ttft_s) == 2 and traffic.oldest_wait_s == 0
        assert router.traffic().arrived == 0


async def test_the_oldest_that_waits_has_an_age() -> None:
    worker = FakeWorker("a", step_s=0.01)
    async with routed(worker) as router:
        worker.freeze()
        router.submit(request(max_tokens=2))
        await until(lambda: router.oldest_wait_s() > 0.05)
        worker.thaw()
        await until(lambda: router.oldest_wait_s() == 0)


async def test_workers_are_counted_by_what_they_say_and_whether_they_can_be_reached() -> None:
    up = FakeWorker("a")

    async def members() -> AsyncIterator[Members]:
        rest = [
            WorkerStatus("b", "decode", WorkerState.LOADING),
            WorkerStatus("c", "decode", WorkerState.FAILED),
            WorkerStatus("d", "prefill", WorkerState.READY, "127.0.0.1:9", 1),
        ]
        yield Members(1, (up.status, *rest))

    async with fleet(up):
        router = Router("router", FAST, "")
        await router.start(members())
        await until(lambda: router.ready()[0] == "ready")
        assert router.snapshot().members == {
            ("colocated", "ready"): 1, ("decode", "loading"): 1, ("decode", "failed"): 1, ("prefill", "unreachable"): 1
        }  # fmt: skip
        await router.close()


@pytest.mark.parametrize("state", [WorkerState.DRAINING, WorkerState.LEAVING])
async def test_a_fleet_that_goes_on_purpose_is_not_unhealthy(state: WorkerState) -> None:
    worker = FakeWorker("a")
    going = asyncio.Event()

    async def members() -> AsyncIterator[Members]:
        yield Members(1, (worker.status,))
        await going.wait()
        yield Members(2, (replace(worker.status, state=state),))

    async with fleet(worker):
        router = Router("router", FAST, "")
        await router.start(members())
        await until(lambda: router.ready()[0] == "ready")
        going.set()
        await until(lambda: router.ready()[0] == "draining")
        assert router.snapshot().members == {("colocated", state): 1}
        await router.close()
