"""What has happened lately, for `baton status`: a bounded list of lines, and how they follow from what changed."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator

from ...common.clock import Clock
from ...common.cluster import Phase, ProcessStatus, WorkerState
from .reconcile import World
from .status import Event

KEPT = 200

log = logging.getLogger(__name__)

Line = tuple[str, str]
"""Level (info, warning, error) and text."""


class Events:
    """The last `KEPT` of them, numbered from 1. Each goes to the log as well."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lines: deque[tuple[int, float, Line]] = deque(maxlen=KEPT)
        self._count = 0

    def add(self, text: str, level: str = "info") -> None:
        self._count += 1
        self._lines.append((self._count, self._clock.now(), (level, text)))
        log.log(logging.getLevelNamesMapping()[level.upper()], "%s", text)

    def list(self) -> tuple[Event, ...]:
        """Oldest first."""
        now = self._clock.now()
        return tuple(Event(number=n, ago_s=now - at, level=line[0], text=line[1]) for n, at, line in self._lines)


def changes(before: World, after: World) -> Iterator[Line]:
    """What a person would say of the difference."""
    for name, process in after.processes.items():
        yield from _process(before.processes.get(name), process)
    for name in before.processes.keys() - after.processes.keys():
        yield "info", f"{name} has ended"
    for name, word in after.words.items():
        old = before.words.get(name)
        if word.state is WorkerState.READY and (old is None or old.state is not WorkerState.READY):
            yield "info", f"{name} is ready, as a {word.role} worker"
    for name in sorted(after.silence - before.silence):
        yield "error", f"{name} has been silent for too long, and is killed"


def _process(old: ProcessStatus | None, new: ProcessStatus) -> Iterator[Line]:
    if old is not None and (old.phase, old.pid) == (new.phase, new.pid):
        return
    match new.phase:
        case Phase.RUNNING:
            yield "info", f"{new.name} runs, process {new.pid}" + (f" on {new.node}" if new.node else "")
        case Phase.WAITING:
            yield "warning", f"{new.name} ended ({new.why}) and starts again soon"
        case Phase.GIVEN_UP:
            last = f": {new.last_lines[-1]}" if new.last_lines else ""
            yield "error", f"{new.name} is given up ({new.why}){last}"
