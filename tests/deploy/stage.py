"""A launcher whose processes are only pretended, for tests of what starts and ends processes."""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from baton.deploy.launch.launcher import Spec

Play = Callable[[Spec, "Pretended"], Awaitable[None]]
"""What a pretended process does, until it is cancelled."""


async def nothing(spec: Spec, process: Pretended) -> None:
    """A process that only is there."""


class Pretended:
    """A process that ends when it is told to, unless `heeds_term` is false."""

    node = ""

    def __init__(self, spec: Spec, pid: int, diary: list[str]) -> None:
        self.pid = pid
        self.last_lines: deque[str] = deque([f"{spec.name} says goodbye"])
        self.heeds_term = True
        self._name, self._diary = spec.name, diary
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.life: asyncio.Task[None] | None = None

    def end(self, code: int) -> None:
        if not self._exit.done():
            self._diary.append(f"{self._name} ended {code}")
            self._exit.set_result(code)
            if self.life is not None:
                self.life.cancel()

    async def wait(self) -> int:
        return await asyncio.shield(self._exit)

    def terminate(self) -> None:
        if self.heeds_term:
            self.end(0)

    def kill(self) -> None:
        self.end(-signal.SIGKILL)


@dataclass
class Stage:
    """A launcher. `fails`: exit codes with which the named process ends at once, each time it is started."""

    play: Play = nothing
    fails: dict[str, int] = field(default_factory=dict)
    diary: list[str] = field(default_factory=list)
    live: dict[str, Pretended] = field(default_factory=dict)
    starts: list[str] = field(default_factory=list)
    lives: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self, spec: Spec) -> Pretended:
        self.starts.append(spec.name)
        process = Pretended(spec, 1000 + len(self.starts), self.diary)
        self.live[spec.name] = process
        if spec.name in self.fails:
            process.end(self.fails[spec.name])
        else:
            process.life = asyncio.ensure_future(self.play(spec, process))
            self.lives.append(process.life)
        return process


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)
