"""Keeps a process running: starts it, and again when it died, ever more slowly, until it dies too often."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from ...common.child import EXIT_CONFIG, EXIT_FAILED
from ...common.clock import Clock
from .launcher import Launcher, Process, Spec

KILL_TIMEOUT_S = 5.0
"""How long the kernel may take to end a process that was sent SIGKILL."""


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """The delay doubles from `first_delay_s` to `max_delay_s`, and begins anew after the process has lived for
    `window_s`. `max_deaths` within `window_s` are a crash loop: then it is given up; 0: it never is."""

    first_delay_s: float = 0.5
    max_delay_s: float = 30.0
    max_deaths: int = 5
    window_s: float = 60.0


FOR_EVER = RestartPolicy(max_delay_s=5.0, max_deaths=0)
"""For a process without which others go on, and which must come back: the controller."""


class Restarts:
    """The deaths of one process, and what follows from them. Pure: time is passed in."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._deaths: deque[float] = deque(maxlen=policy.max_deaths)
        self._delay = 0.0

    def died(self, now: float, lived_s: float) -> float | None:
        """Seconds to wait before the next start; None: give it up."""
        policy = self._policy
        self._deaths.append(now)
        if policy.max_deaths and len(self._deaths) == policy.max_deaths and now - self._deaths[0] <= policy.window_s:
            return None
        starts_anew = self._delay == 0.0 or lived_s >= policy.window_s
        self._delay = policy.first_delay_s if starts_anew else min(2 * self._delay, policy.max_delay_s)
        return self._delay


class Listener(Protocol):
    """Hears what becomes of a process. Called on the event loop, must not wait."""

    def started(self, spec: Spec, process: Process) -> None: ...
    def ended(self, spec: Spec, why: str, delay_s: float) -> None:
        """It died and starts again in `delay_s`."""
        ...

    def gave_up(self, spec: Spec, why: str, last_lines: tuple[str, ...]) -> None:
        """It died and will not be started again."""
        ...


class Supervisor:
    """Runs one process until it is stopped or given up."""

    def __init__(self, spec: Spec, launcher: Launcher, listener: Listener, policy: RestartPolicy, clock: Clock) -> None:
        self.spec = spec
        self._launcher = launcher
        self._listener = listener
        self._clock = clock
        self._restarts = Restarts(policy)
        self._stopping = asyncio.Event()
        self._process: Process | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; returns at once."""
        self._task = asyncio.create_task(self._run(), name=f"supervisor of {self.spec.name}")

    async def stop(self, deadline_s: float, hurry: asyncio.Event) -> None:
        """Ask the process to end; kill it after `deadline_s`, or as soon as `hurry` is set."""
        self._stopping.set()
        if self._task is None:
            return
        if self._process is not None:
            self._process.terminate()
        else:  # it waits for its next start, or for a place: nothing is there that would hear of it
            self._task.cancel()
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait({self._task, hurried}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not self._task.done() and self._process is not None:
            self._process.kill()
        await asyncio.wait({self._task}, timeout=KILL_TIMEOUT_S)
        self._task.cancel()

    async def _run(self) -> None:
        while not self._stopping.is_set():
            began = self._clock.now()
            try:
                code, why, lines = await self._live()
            except Exception as error:  # the edge of a launcher: what breaks there is a death, and not the end of this
                log.exception("the launcher of %s broke", self.spec.name)
                code, why, lines = EXIT_FAILED, f"its launcher broke: {error!r}", ()
                self._let_go()
            if self._stopping.is_set():
                return
            now = self._clock.now()
            delay = None if code == EXIT_CONFIG else self._restarts.died(now, now - began)
            if delay is None:
                self._listener.gave_up(self.spec, why, lines)
                return
            self._listener.ended(self.spec, why, delay)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stopping.wait()

    async def _live(self) -> tuple[int, str, tuple[str, ...]]:
        """One life of the process: its exit code, what that means, and its last words."""
        try:
            process = await self._launcher.start(self.spec)
        except OSError as error:
            return EXIT_FAILED, f"cannot start: {error}", ()
        self._process = process
        if self._stopping.is_set():  # `stop` came while the process was being made
            process.terminate()
        self._listener.started(self.spec, process)
        code = await process.wait()
        self._process = None
        return code, _describe(code), tuple(process.last_lines)

    def _let_go(self) -> None:
        """Nothing is known of the process any more."""
        if self._process is not None:
            self._process.kill()
            self._process = None


def _describe(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
