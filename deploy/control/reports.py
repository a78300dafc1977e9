"""What workers say of themselves, and since when they have not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ...common.clock import Clock
from ...common.cluster import Phase, ProcessStatus, WorkerStatus
from ...common.types import Role

LIVES = (Phase.RUNNING, Phase.ENDING)
RATE_WINDOW = 10
"""Reports, one a second, over which rates are measured."""
FORGET_S = 30.0
"""What a process has said is kept this long after its last word, unless it is known to live."""
MAX_VOICES = 10_000

Key = tuple[str, int]
"""Name and process id: a late word of a dead incarnation is not its successor's."""


@dataclass(slots=True)
class _Voice:
    """One process. `counts`: (when, prompt tokens, output tokens) of its last reports."""

    status: WorkerStatus
    at: float
    counts: deque[tuple[float, int, int]] = field(default_factory=lambda: deque(maxlen=RATE_WINDOW))


class Reports:
    """Takes in reports. `changed` is called where one tells something new, loads apart: those come each second."""

    def __init__(self, clock: Clock, changed: Callable[[], None]) -> None:
        self._clock = clock
        self._changed = changed
        self._voices: dict[Key, _Voice] = {}
        self._listening_since = clock.now()

    async def report(self, status: WorkerStatus) -> None:
        """A worker's word. It may come before the parent's that there is such a process."""
        key, now = (status.name, status.pid), self._clock.now()
        voice = self._voices.get(key)
        old = None if voice is None else replace(voice.status, load=None)
        if voice is None:
            if len(self._voices) >= MAX_VOICES:
                return
            voice = self._voices[key] = _Voice(status, now)
        voice.status, voice.at = status, now
        if status.load is not None:
            voice.counts.append((now, status.load.prompt_tokens, status.load.output_tokens))
        if old != replace(status, load=None):
            self._changed()

    def turned(self, name: str, address: str, role: Role) -> None:
        """The worker at this address has answered that it has turned; its own word comes within a second."""
        for voice in self._voices.values():
            if (voice.status.name, voice.status.address) == (name, address):
                voice.status = replace(voice.status, role=role.value)
                self._changed()

    def deaf(self) -> None:
        """The controller itself has been away: nobody's silence counts so far."""
        self._listening_since = self._clock.now()

    def words(self, processes: Mapping[str, ProcessStatus]) -> dict[str, WorkerStatus]:
        """The last word of each process that lives, by name; what others said is forgotten after a while."""
        now = self._clock.now()
        living = {(p.name, p.pid) for p in processes.values() if p.phase in LIVES and p.pid}
        for key in [k for k, v in self._voices.items() if k not in living and now - v.at > FORGET_S]:
            del self._voices[key]
        return {key[0]: self._voices[key].status for key in living if key in self._voices}

    def heard_at(self, process: ProcessStatus) -> float | None:
        """When its last word came; None: none has."""
        voice = self._voices.get((process.name, process.pid))
        return None if voice is None else voice.at

    def silence(self, process: ProcessStatus, age_s: float) -> float:
        """Seconds for which this process, which has run for `age_s`, could have been heard and has not."""
        now = self._clock.now()
        last = self.heard_at(process)
        since = now - age_s if last is None else last
        return now - max(since, self._listening_since)

    def rates(self, process: ProcessStatus) -> tuple[float, float]:
        """Prompt and output tokens a second, lately."""
        voice = self._voices.get((process.name, process.pid))
        if voice is None or len(voice.counts) < 2:
            return 0.0, 0.0
        (begin, *before), (end, *after) = voice.counts[0], voice.counts[-1]
        seconds = max(end - begin, 1e-3)
        return (after[0] - before[0]) / seconds, (after[1] - before[1]) / seconds

    def all_heard(self, processes: Iterable[ProcessStatus]) -> bool:
        """Whether each of these has said something."""
        return all(self.heard_at(process) is not None for process in processes)
