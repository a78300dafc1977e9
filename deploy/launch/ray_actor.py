"""What runs in a Ray actor: it starts one worker as its child, as on one machine, and tells of its log and its end.

The actor holds the worker's resources and passes on words about the process. Tokens and KV go past it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from ...common.config import WorkerConfig
from ...common.json_form import from_json
from .launcher import LocalLauncher, LocalProcess, Spec

FOLLOW_S = 5.0
"""How long `follow` waits for something to tell: the driver hears at least this often that the actor lives."""
BATCH_S = 0.1
"""Lines that come within this time travel together."""
BATCH_LINES = 256
KEPT_LINES = 2048
"""Lines that wait to be fetched at most; the oldest are dropped."""


class WorkerHost:
    """The actor. Its death, however it comes, ends the worker: the worker's standard input ends and the kernel kills
    it (`common/child.py`). Methods take and return plain texts, numbers and bytes."""

    def __init__(self, command: list[str]) -> None:
        """`command` starts the worker; empty: this node's Python, with this module's own package."""
        self._command = command
        self._process: LocalProcess | None = None
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._code: int | None = None
        self._news = asyncio.Event()
        self._waiting: asyncio.Task[None] | None = None

    async def begin(self, name: str, config: bytes, threads: int) -> int:
        """Start the worker; its process id. `config` is the JSON of a `WorkerConfig`. Raises `OSError`."""
        launcher = LocalLauncher(self._take)
        if self._command:
            launcher = LocalLauncher(self._take, tuple(self._command))
        self._process = await launcher.start(Spec(name, from_json(config, WorkerConfig), threads))
        self._waiting = asyncio.create_task(self._wait(self._process))
        return self._process.pid

    async def follow(self) -> tuple[list[str], int | None]:
        """The next lines of its log and, after the last of them, its exit code. Waits a while for either."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FOLLOW_S):
                await self._news.wait()
        if self._code is None:
            await asyncio.sleep(BATCH_S)
        lines = [self._lines.popleft() for _ in range(min(BATCH_LINES, len(self._lines)))]
        if self._dropped:
            lines.insert(0, f"({self._dropped} lines came too fast and were dropped)")
            self._dropped = 0
        if not self._lines and self._code is None:
            self._news.clear()
        return lines, None if self._lines else self._code

    async def terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()

    async def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def _wait(self, process: LocalProcess) -> None:
        self._code = await process.wait()
        self._news.set()

    def _take(self, _: str, line: str) -> None:
        if len(self._lines) == KEPT_LINES:
            self._lines.popleft()
            self._dropped += 1
        self._lines.append(line)
        self._news.set()
