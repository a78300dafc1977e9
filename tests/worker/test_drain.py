"""A worker that is told to stop waits for what it has promised room to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from baton.common.messages import Abort, CheckReport
from baton.worker import main
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


async def test_a_drain_of_a_broken_engine_ends(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "LINGER_S", 10 * WAIT_S)
    async with asyncio.timeout(WAIT_S):
        await main._drained(scene.worker, lambda: True, 60.0)
