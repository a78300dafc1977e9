"""A peer that says more than the loop reads: it waits, and nobody else does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from baton.common.errors import BatonError, Overloaded, WorkerLost
from baton.common.messages import Renew, Reserved
from baton.engine.mailbox import MAX_UNREAD, Inspect
from baton.worker import links
from tests.worker.hostile import EVIL, WAIT_S, Control, Scene, a_scene


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with a_scene() as made:
        yield made


@contextmanager
def a_long_step(scene: Scene) -> Iterator[None]:
    """The loop does not come round meanwhile."""
    over = threading.Event()
    scene.worker.inbox.post(Inspect(lambda _: over.wait(WAIT_S)))
    try:
        yield
    finally:
        over.set()


async def say_too_much(control: Control) -> None:
    for _ in range(4 * MAX_UNREAD):
        await control.stream.write(Renew(tuple(range(500))))


async def test_who_says_more_than_the_loop_reads_has_to_wait(scene: Scene) -> None:
    inbox = scene.worker.inbox
    async with Control(scene.worker) as control:
        with a_long_step(scene):
            flood = asyncio.create_task(say_too_much(control))
            await scene.soon(lambda: len(inbox._items) >= MAX_UNREAD)
            await asyncio.sleep(0.2)
            assert len(inbox._items) == MAX_UNREAD
            async with Control(scene.worker, own=replace(EVIL, ref=replace(EVIL.ref, name="neighbour"))) as neighbour:
                await neighbour.stream.write(Renew((2,)))
                await scene.soon(lambda: len(inbox._items) > MAX_UNREAD)
        await flood  # all of it is read in the end
        assert isinstance(await control.ask(control.reserve(1)), Reserved)


async def test_who_waits_too_long_loses_its_line(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "STALL_S", 0.1)
    async with Control(scene.worker) as control:
        with a_long_step(scene):
            flood = asyncio.create_task(say_too_much(control))
            with pytest.raises((Overloaded, WorkerLost)):  # the latter where a write of our own meets the end first
                await control.hear()
            await scene.soon(lambda: EVIL.ref not in scene.worker._sources._lines)
        with pytest.raises(BatonError):
            await flood
