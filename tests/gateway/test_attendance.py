"""The stream to the controller: over real gRPC, with a controller that leaves, forgets and freezes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from baton.common.cluster import GatewayHello, Members, Trace, TraceQuestion, Traffic, WorkerState, WorkerStatus
from baton.gateway import attendance
from baton.gateway.attendance import attend
from baton.protos.rpc import Stream
from tests.gateway.controllers import FakeController, controlled

HELLO = GatewayHello("gateway-0", "http://127.0.0.1:8000", 5)
WORKER = WorkerStatus("decode-0", "decode", WorkerState.READY, "127.0.0.1:1", 1)
TRACE = Trace("req-1", "gateway-0", 1.0, "stop", 3, 0, 5, ())


class Seen:
    """Traffic that counts how often it was asked for; one trace."""

    def __init__(self) -> None:
        self.asked = 0
        self.mistake: Exception | None = None

    def traffic(self) -> Traffic:
        if self.mistake is not None:
            raise self.mistake
        self.asked += 1
        return Traffic(1.0, arrived=self.asked)

    def trace(self, request_id: str) -> Trace | None:
        return TRACE if request_id in (TRACE.request_id, "") else None


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "EVERY_S", 0.02)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def attending(address: str, seen: Seen) -> AsyncIterator[list[Members]]:
    """A gateway that attends; all memberships that it has heard."""
    heard: list[Members] = []

    async def follow() -> None:
        async for members in membership:
            heard.append(members)  # noqa: PERF401 (it is looked at while it grows)

    membership = attend(address, "", HELLO, seen)
    task = asyncio.create_task(follow())
    try:
        yield heard
    finally:
        task.cancel()
        await asyncio.wait({task})
        await membership.aclose()


async def test_it_says_who_it_is_and_tells_its_traffic_and_hears_the_membership() -> None:
    controller = FakeController(WORKER)
    async with controlled(controller) as address, attending(address, Seen()) as heard:
        await until(lambda: len(controller.traffic) >= 3)
        assert controller.hellos == [HELLO]
        assert [traffic.arrived for traffic in controller.traffic[:3]] == [1, 2, 3]
        await controller.say(Members(2))
        await until(lambda: len(heard) == 2)
        assert heard == [Members(1, (WORKER,)), Members(2)]


@pytest.mark.parametrize("name", ["req-1", "chatcmpl-1", "cmpl-1", ""])
async def test_it_finds_a_request_by_any_of_its_names(name: str) -> None:
    controller = FakeController()
    async with controlled(controller) as address, attending(address, Seen()) as heard:
        await until(lambda: bool(heard))
        assert (await controller.ask(TraceQuestion(7, name))).trace == TRACE
        assert (await controller.ask(TraceQuestion(8, "other"))).trace is None


async def test_a_controller_that_leaves_is_attended_again() -> None:
    controller = FakeController(WORKER)
    async with controlled(controller) as address, attending(address, Seen()) as heard:
        await until(lambda: bool(heard))
        controller.members = Members(0)
        controller.leave()
        await until(lambda: len(heard) == 2)
        assert heard[1] == Members(0) and controller.hellos == [HELLO, HELLO]


async def test_a_controller_that_dies_and_comes_back_is_attended_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    controller = FakeController(WORKER)
    async with controlled(controller) as address:
        port = int(address.rpartition(":")[2])

    def absences() -> int:
        return len([r for r in caplog.records if "no controller" in r.message])

    async with attending(address, Seen()) as heard:
        await until(lambda: absences() == 1)
        assert not heard
        async with controlled(controller, port=port):
            await until(lambda: len(heard) == 1)
        await until(lambda: absences() == 2)
        await asyncio.sleep(0.2)
        async with controlled(controller, port=port):
            await until(lambda: len(heard) == 2)
            assert absences() == 2  # once each, however often it is looked for


async def test_a_controller_that_takes_no_message_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(FakeController):
        """Never reads again after the first message of its first gateway."""

        async def _listen(self, stream: Stream[object, object]) -> None:
            if len(self.hellos) == 1:
                await asyncio.Event().wait()
            await super()._listen(stream)  # type: ignore[arg-type]

    class Chatty(Seen):
        def traffic(self) -> Traffic:
            self.asked += 1
            return Traffic(1.0, queue_s=(1.0,) * 100_000)

    monkeypatch.setattr(attendance, "WRITE_S", 0.3)
    controller = Deaf()
    async with controlled(controller) as address, attending(address, Chatty()):
        await until(lambda: bool(controller.traffic))
        assert len(controller.hellos) == 2


async def test_silence_is_no_news() -> None:
    controller = FakeController(WORKER)
    async with controlled(controller) as address, attending(address, seen := Seen()) as heard:
        await until(lambda: seen.asked > 10)
        assert len(heard) == len(controller.hellos) == 1


async def test_a_mistake_of_ours_is_logged_and_costs_no_membership(caplog: pytest.LogCaptureFixture) -> None:
    controller, seen = FakeController(WORKER), Seen()
    seen.mistake = ZeroDivisionError("oh")
    async with controlled(controller) as address, attending(address, seen) as heard:
        await until(lambda: len(heard) >= 2)
    assert "in our own code" in caplog.text


async def test_ending_it_ends_the_stream() -> None:
    controller = FakeController(WORKER)
    async with controlled(controller) as address:
        membership = attend(address, "", HELLO, seen := Seen())
        assert await anext(membership) == Members(1, (WORKER,))
        await membership.aclose()
        asked = seen.asked
        await asyncio.sleep(0.1)
        assert seen.asked == asked and len(asyncio.all_tasks()) <= 4
