"""A worker that runs as the child of a Ray actor, as its supervisor sees it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from ray.exceptions import RayError

from .launcher import KEPT_LINES

ORDER_S = 30.0
"""How long the actor may take to pass on an order, before the order is given up."""
KILL_S = 2.0
"""How long the actor may take to kill its child, and again to tell of its end, before it is killed itself."""

T = TypeVar("T")


async def within(seconds: float, answer: Awaitable[T]) -> T:
    """Raises `TimeoutError`. `answer`: what an actor's method returns, among others."""
    async with asyncio.timeout(seconds):
        return await answer


@dataclass(slots=True)
class RayProcess:
    """Implements `Process`. When the actor or the worker ends, the other does, and what they held is given back."""

    name: str
    pid: int
    node: str
    actor: Any
    log: Callable[[str, str], None]
    lost: Callable[[], None]
    """Called when the actor is gone without a word of the worker's end."""
    give_back: Callable[[], Awaitable[None]]
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    _life: asyncio.Task[int] | None = None
    _orders: set[asyncio.Task[None]] = field(default_factory=set)

    def follow(self) -> None:
        """Begin to take in its log, until it ends."""
        self._life = asyncio.create_task(self._live(), name=f"life of {self.name}")

    async def wait(self) -> int:
        assert self._life is not None
        return await asyncio.shield(self._life)

    def terminate(self) -> None:
        self._order(self._terminate())

    def kill(self) -> None:
        self._order(self._kill())

    async def _live(self) -> int:
        code: int | None = None
        try:
            while code is None:
                lines, code = await self.actor.follow.remote()
                for line in lines:
                    self._take(line)
        except RayError as error:
            self.lost()
            self._take(own_line(self.name, f"lost with its Ray actor on {self.node}: {first_line(error)}"))
            code = -signal.SIGKILL
        except asyncio.CancelledError:  # by `_kill`
            self._take(own_line(self.name, f"killed with its Ray actor on {self.node}, which did not answer"))
            code = -signal.SIGKILL
        await self.give_back()
        return code

    async def _terminate(self) -> None:
        with contextlib.suppress(RayError, TimeoutError):  # `_live` hears of its end
            await within(ORDER_S, self.actor.terminate.remote())

    async def _kill(self) -> None:
        assert self._life is not None
        with contextlib.suppress(RayError, TimeoutError):
            await within(KILL_S, self.actor.kill.remote())
            await within(KILL_S, asyncio.shield(self._life))
        self._life.cancel()  # nothing, where it has ended

    def _order(self, order: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(order)
        self._orders.add(task)
        task.add_done_callback(self._orders.discard)

    def _take(self, line: str) -> None:
        self.last_lines.append(line)
        with contextlib.suppress(OSError):  # a full disk must not stop the reading
            self.log(self.name, line)


def own_line(name: str, text: str) -> str:
    """What is said of a worker, in the form of what workers log (`common/log.py`)."""
    return f"{datetime.now():%Y-%m-%d %H:%M:%S.%f}"[:-3] + f" {name} warning {text}"


def first_line(error: BaseException) -> str:
    """Ray's errors tell their whole story over many lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
