"""Finds what happened to a request: one that runs, or one of the last that ended."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ..common.cluster import Trace
from ..common.errors import BatonError
from .request import RequestState

MAX_ENDED = 1024
"""Requests that are remembered after their end."""


class Traces:
    """`running` is a view of the requests that have not ended. Their ids are the clients': of two with the same id the
    later one is found. Pure: time is passed in."""

    def __init__(self, router: str, running: Collection[RequestState]) -> None:
        self._router = router
        self._running = running
        self._ended: dict[str, tuple[float, Trace]] = {}  # by id, the latest end last

    def ended(self, state: RequestState, now: float) -> None:
        """Remember a request that has just ended; the oldest is forgotten."""
        self._ended.pop(state.request.request_id, None)
        self._ended[state.request.request_id] = state.received, self._trace(state, now)
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    def find(self, request_id: str, now: float) -> Trace | None:
        """None: unknown, or forgotten."""
        named = [state for state in self._running if state.request.request_id == request_id]
        if named:
            return self._trace(named[-1], now)
        if request_id not in self._ended:
            return None
        received, trace = self._ended[request_id]
        return replace(trace, ago_s=now - received)

    def slowest(self, now: float) -> Trace | None:
        """The request that took longest, running ones included; None where there was none."""
        running = min(self._running, key=lambda state: state.received, default=None)
        ended = max(self._ended.values(), key=lambda entry: _duration(entry[1]), default=None)
        if ended is None or (running is not None and now - running.received > _duration(ended[1])):
            return None if running is None else self._trace(running, now)
        return replace(ended[1], ago_s=now - ended[0])

    def _trace(self, state: RequestState, now: float) -> Trace:
        ended = state.outcome is not None
        return Trace(
            request_id=state.request.request_id,
            gateway=self._router,
            ago_s=now - state.received,
            outcome=_outcome(state),
            prompt_tokens=state.request.prompt_len,
            cached_tokens=state.cached_tokens or 0,
            output_tokens=len(state.output),
            spans=state.story.spans(state.received, now if ended else None),
        )


def _outcome(state: RequestState) -> str:
    if state.outcome is None:
        return ""
    return state.outcome.code if isinstance(state.outcome, BatonError) else state.outcome.reason.value


def _duration(trace: Trace) -> float:
    """Seconds from the arrival of a request that has ended to its end."""
    return trace.spans[-1].end or 0.0
