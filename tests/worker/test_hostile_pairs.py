"""A source that is malicious, or broken, on a lane whose bytes go by a process group: what it does not say, or says
wrong, costs it its lane or its handover, and nobody else anything.

There is one thing that it can do: send more by gloo than it announced. gloo ends the process that receives it, in its
own code, as it would for any mismatch; to the others, that worker has died.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from baton.common import sockets
from baton.common.errors import BatonError
from baton.common.messages import Abort
from tests.worker.hostile import Control, Lane, Scene, a_scene, frame, lane, paired


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with a_scene() as made:
        yield made


def says_nothing(_: Lane) -> None:
    """It never comes to meet the worker."""


def talks_nonsense(evil: Lane) -> None:
    sockets.send(evil.socket, b"\xc1 what?")


def talks_without_end(evil: Lane) -> None:
    """Names that no rank waits for."""
    for number in range(1000):
        sockets.send(evil.socket, b"\x92\xa4" + f"{number:04}".encode() + b"\xc4\x00")


def sends_no_bytes(evil: Lane) -> None:
    """The two meet, and then nothing comes."""
    evil.meet()


def announces_junk_next(evil: Lane) -> None:
    """The worker sees it when it looks what else it may let come."""
    pair = evil.meet()
    evil.announce(b"\xc1 what?")
    pair.abort()


TURNS: list[Callable[[Lane], None]] = [
    says_nothing, talks_nonsense, talks_without_end, sends_no_bytes, announces_junk_next,
]  # fmt: skip


@pytest.mark.parametrize("turn", TURNS)
async def test_whoever_does_not_do_its_part_loses_its_lane(scene: Scene, turn: Callable[[Lane], None]) -> None:
    """Soon, and while it still has the right to write."""

    def until_it_ends(evil: Lane) -> None:
        evil.announce(frame(1)[0])
        with contextlib.suppress(BatonError):  # it is hung up on in the middle
            turn(evil)
        with contextlib.suppress(ConnectionResetError):
            while evil.socket.recv(1 << 16):  # what the worker says to the other rank; raises where it says nothing
                pass

    async with Control(scene.worker) as control:
        await control.reserved(1)
        before = scene.pool.shared.memory.copy()
        with lane(scene.worker, paired(scene.worker)) as evil:
            assert await asyncio.to_thread(evil.answer) == ""
            await asyncio.to_thread(until_it_ends, evil)
        assert np.array_equal(scene.pool.shared.memory, before)
        with lane(scene.worker, paired(scene.worker)) as again:
            assert await asyncio.to_thread(again.answer) == ""
            assert await asyncio.to_thread(again.frame, *frame(1))


async def test_fewer_bytes_than_were_announced_are_not_taken_for_the_whole(scene: Scene) -> None:
    """The rest of the buffer holds whatever was there."""
    async with Control(scene.worker) as control:
        blocks = await control.reserved(1)
        before = scene.held(blocks)
        with lane(scene.worker, paired(scene.worker)) as evil:
            assert await asyncio.to_thread(evil.answer) == ""
            head, payload = frame(1)
            assert await asyncio.to_thread(evil.frame, head, payload[:7])
        said = await control.hear()
        assert isinstance(said, Abort) and said.code == "corrupt_block"
        assert np.array_equal(scene.held(blocks), before)
