"""The last lines of each process's log, by number, for `baton logs` and for whoever asks why a process died."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ...common.cluster import LogLines, LogQuestion
from ...common.errors import InvalidRequest

KEPT_LINES = 2000
"""Of each process, over its restarts."""
MAX_LINE = 4096
"""Characters of a line that are kept."""
MAX_PROCESSES = 128
"""Processes whose lines are kept; beyond, those go that have been silent for longest."""
MAX_ANSWER = 1000


@dataclass(slots=True)
class _Tail:
    """`count`: lines that there have been, also those that are no longer kept."""

    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    count: int = 0


class LogTails:
    """Takes what a launcher's processes log, passes it on to `sink`, and keeps the end of it."""

    def __init__(self, sink: Callable[[str, str], None]) -> None:
        self._sink = sink
        self._tails: OrderedDict[str, _Tail] = OrderedDict()

    def __call__(self, name: str, line: str) -> None:
        tail = self._tails.setdefault(name, _Tail())
        self._tails.move_to_end(name)
        tail.lines.append(line[:MAX_LINE])
        tail.count += 1
        while len(self._tails) > MAX_PROCESSES:
            self._tails.popitem(last=False)
        self._sink(name, line)

    def tail(self, question: LogQuestion) -> LogLines:
        """Raises `InvalidRequest` for a process that has logged nothing."""
        tail = self._tails.get(question.name)
        if tail is None:
            known = ", ".join(sorted(self._tails))
            raise InvalidRequest(f"no log of a process {question.name!r}; there are {known}", param="process")
        oldest = tail.count - len(tail.lines)
        first = question.after if question.after >= 0 else tail.count + question.after
        first = min(max(first, oldest), tail.count)
        lines = list(tail.lines)[first - oldest :][: min(max(question.limit, 0), MAX_ANSWER)]
        return LogLines(first + len(lines), tuple(lines))
