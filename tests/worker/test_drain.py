"""A worker that is told to stop waits for what it has promised room to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from baton.common.errors import DeadlineExceeded
from baton.common.messages import Abort, CheckReport
from baton.common.types import Role
from baton.worker import main
from tests.house import House
from tests.worker.hostile import WAIT_S, Control, Scene, a_scene


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with a_scene() as made:
        yield made


async def test_a_drain_waits_for_handovers_that_come_in(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs here yet; a request is about to."""
    monkeypatch.setattr(main, "DRAIN_LOOK_S", 0.005)
    monkeypatch.setattr(main, "LINGER_S", 0.02)
    worker, looks = scene.worker, list[CheckReport]()
    check = worker.check

    async def looked() -> CheckReport:
        looks.append(await check())
        return looks[-1]

    monkeypatch.setattr(worker, "check", looked)
    async with Control(worker) as control:
        await control.reserved(1)
        draining = asyncio.create_task(main._drained(worker, lambda: False, 60.0))
        await scene.soon(lambda: len(looks) > 20)
        assert not draining.done() and {(r.sequences, r.handovers) for r in looks} == {(0, 1)}
        await control.stream.write(Abort(1, "handover_failed", "changed its mind"))
        async with asyncio.timeout(WAIT_S):
            await draining
    assert looks[-1].handovers == 0


async def test_a_step_that_takes_long_does_not_end_a_drain(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop does not answer in time; what it works for goes on."""
    monkeypatch.setattr(main, "DRAIN_LOOK_S", 0.005)
    monkeypatch.setattr(main, "LINGER_S", 0.02)
    worker, check, late = scene.worker, scene.worker.check, [True] * 3

    async def looked() -> CheckReport:
        if late:
            late.pop()
            raise DeadlineExceeded("the engine loop has not come round")
        return await check()

    monkeypatch.setattr(worker, "check", looked)
    async with asyncio.timeout(WAIT_S):
        await main._drained(worker, lambda: False, 60.0)
    assert not late


async def test_lanes_over_grpc_end_while_their_worker_stops() -> None:
    """Their threads wait for the event loop, which must not wait for them."""
    house, seen = House(), list[bool]()
    worker = await house.worker("decode-0", Role.DECODE)
    stop, events = worker.plane.stop, asyncio.get_running_loop()

    def stopping() -> None:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), events).result(WAIT_S)
        seen.append(True)
        stop()

    worker.plane.stop = stopping  # type: ignore[method-assign]
    await house.kill("decode-0")
    assert seen


async def test_a_drain_of_a_broken_engine_ends(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "LINGER_S", 10 * WAIT_S)
    async with asyncio.timeout(WAIT_S):
        await main._drained(scene.worker, lambda: True, 60.0)
