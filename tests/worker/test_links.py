"""What waits to be written to one stream, and what becomes of it when the line is cut."""

from __future__ import annotations

import asyncio

import pytest

from baton.common.errors import WorkerLost
from baton.worker import links
from baton.worker.links import Line


class Slow:
    """A stream that takes a message each time it is let."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.let = asyncio.Semaphore(0)

    async def write(self, message: int) -> None:
        self.written.append(message)
        await self.let.acquire()


@pytest.fixture
def stream() -> Slow:
    return Slow()


async def test_a_line_that_is_cut_writes_what_came_before_and_nothing_after(stream: Slow) -> None:
    line: Line[int] = Line()
    line.put(1)
    pumping = asyncio.create_task(line.pump(stream, 60.0, lambda: None))
    async with asyncio.timeout(20):
        while not stream.written:
            await asyncio.sleep(0)
        line.put(2)  # while the first is being written
        line.cut("enough")
        line.put(3)
        stream.let.release()
        stream.let.release()
        with pytest.raises(WorkerLost, match="enough"):
            await pumping
    assert stream.written == [1, 2]


async def test_a_line_that_nobody_reads_is_cut_where_it_is_full(stream: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MAX_QUEUED", 3)
    line: Line[int] = Line()
    for number in range(5):
        line.put(number)
        stream.let.release()
    async with asyncio.timeout(20):
        with pytest.raises(WorkerLost, match="3 messages wait"):
            await line.pump(stream, 60.0, lambda: None)
    assert stream.written == [0, 1, 2]
