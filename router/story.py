"""What happened to one request, and when: stages that follow one another from its arrival to its end.

    waiting ─▶ queued ─▶ prefill ─▶ handover ─▶ decode ─▶ (decode, elsewhere) ─▶ end
       ▲          └─────────┴─────── failed ──────┴── lost, refused
       └─────────────────────────────┘

As the router saw it, on its clock; where a worker knows better when something was, its message says so. Pure.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..common.cluster import Span

MAX_MARKS = 128
"""Stages that are kept of one request; of one that is refused for ever the first fall out."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A stage begins, and the one before it ends. `worker`: who has the request; empty: nobody."""

    what: str
    worker: str
    at: float
    note: str = ""


class Story:
    """Each stage ends where the next begins, so that together they fill the request's time without a gap."""

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: deque[Mark] = deque(maxlen=MAX_MARKS)

    def waits(self, now: float) -> None:
        """No worker has it."""
        self._marks.append(Mark("waiting", "", now))

    def placed(self, worker: str, reason: str, now: float) -> None:
        """It was sent to a prefill worker, which was chosen for `reason`."""
        self._marks.append(Mark("queued", worker, now, reason))

    def prefills(self, cached_tokens: int, now: float) -> None:
        """The worker that it is queued at begins to compute it. Said again, as after a preemption, it is no news. The
        first token, which comes from another worker, may have come before this word."""
        late = self._late_word()
        last = self._marks[-1]
        if last.what == "queued":
            note = f"{cached_tokens} tokens cached" if cached_tokens else ""
            self._marks.append(Mark("prefill", last.worker, min(now, late.at) if late else now, note))
        if late:
            self._marks.append(late)

    def decodes(self, worker: str, now: float, note: str = "") -> None:
        """Tokens come from this worker from now on."""
        self._marks.append(Mark("decode", worker, now, note))

    def handed_over(self, target: str, exposed_s: float, now: float) -> None:
        """The prefill worker says that `target` has it, `exposed_s` after all was computed. The first token, which
        comes from the target, may have come before this word of the source."""
        late = self._late_word()
        last = self._marks[-1]
        if last.what == "prefill":
            begin = max(last.at, now - exposed_s)
            self._marks.append(Mark("handover", last.worker, min(begin, late.at) if late else begin, f"to {target}"))
        if late:
            self._marks.append(late)

    def _late_word(self) -> Mark | None:
        """The last mark, if it is of tokens: taken out, for what is told now came before it."""
        return self._marks.pop() if len(self._marks) > 1 and self._marks[-1].what == "decode" else None

    def fails(self, worker: str, code: str, now: float) -> None:
        """An attempt is over; `worker` is whom it is laid to."""
        self._marks.append(Mark("failed", worker, now, code))

    def spans(self, received: float, end: float | None) -> tuple[Span, ...]:
        """The stages, in seconds since `received`. `end`: when the request ended; None while it runs."""
        marks = list(self._marks)
        ends = [*(mark.at for mark in marks[1:]), end]
        return tuple(
            Span(mark.what, mark.worker, mark.at - received, None if until is None else until - received, mark.note)
            for mark, until in zip(marks, ends, strict=True)
        )
