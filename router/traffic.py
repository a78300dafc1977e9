"""From a router's books, which only grow, to what it saw in a window of time: what the planner of pool sizes looks at.

No clock of its own: the gateway asks each second, the simulator in virtual time.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..common.cluster import Traffic
from .stats import Snapshot, Stats


@dataclass(frozen=True, slots=True)
class _Totals:
    """The books at one moment."""

    at: float
    arrived: int = 0
    prompt_tokens: int = 0
    started: int = 0
    cached_tokens: int = 0
    first_tokens: int = 0
    output_tokens: int = 0
    paced: int = 0
    finished: int = 0
    failed: int = 0

    @classmethod
    def of(cls, stats: Stats, now: float) -> _Totals:
        return cls(
            at=now,
            arrived=stats.submitted,
            prompt_tokens=stats.prompt_tokens,
            started=stats.queue_s.count,
            cached_tokens=stats.cached_tokens,
            first_tokens=stats.ttft_s.count,
            output_tokens=stats.output_tokens,
            paced=stats.tpot_s.count,
            finished=stats.finished.total(),
            failed=stats.failed.total(),
        )


class Meter:
    """Each `take` gives the time since the one before; the first, since `now`."""

    def __init__(self, now: float) -> None:
        self._totals = _Totals(now)

    def take(self, snapshot: Snapshot, now: float) -> Traffic:
        """The window that ends now, of the router that `snapshot` is of; the next one begins."""
        stats, last = snapshot.stats, self._totals
        self._totals = this = _Totals.of(stats, now)
        return Traffic(
            seconds=this.at - last.at,
            arrived=this.arrived - last.arrived,
            prompt_tokens=this.prompt_tokens - last.prompt_tokens,
            started=this.started - last.started,
            cached_tokens=this.cached_tokens - last.cached_tokens,
            finished=this.finished - last.finished,
            output_tokens=this.output_tokens - last.output_tokens,
            failed=this.failed - last.failed,
            queue_s=stats.queue_s.since(last.started),
            ttft_s=stats.ttft_s.since(last.first_tokens),
            tpot_s=stats.tpot_s.since(last.paced),
            waiting=snapshot.waiting,
            running=snapshot.running,
            oldest_wait_s=0.0 if snapshot.oldest is None else now - snapshot.oldest,
        )
