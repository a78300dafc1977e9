"""What the planner of pool sizes looks at: the traffic of all gateways and the loads of all workers, in one value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...common.cluster import Traffic, WorkerState, WorkerStatus
from ...common.messages import Load
from ...common.types import Role

RECENT_S = 4.0


class Targets(Protocol):
    """Of a `planner.AutoscaleConfig`: the SLO that attainment is measured against, and how far back to look."""

    @property
    def ttft_s(self) -> float: ...
    @property
    def tpot_s(self) -> float: ...
    @property
    def window_s(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The fleet and its traffic at one moment. Rates are of the last `seconds`; 0 seconds: nothing was heard.

    now                    seconds, monotonic, from an arbitrary origin
    changing               what is under way (a worker starts, turns or leaves); empty: nothing
    prefill, decode        workers that are ready
    prompt_tokens_per_s    of requests that arrived; `uncached_tokens_per_s`: without what caches hold
    uncached_len           tokens of a prompt that no cache holds, on average
    queue_p90_s            from arrival to the start of prefill, of requests that started
    oldest_wait_s          age of the oldest request that has no token yet, now
    backlog_tokens         uncached tokens of prompts that wait, with a worker or without, now; one prompt at each
                           prefill worker is no queue
    output_tokens_per_s    of the last `RECENT_S` only: tokens come evenly, and so fewer of them tell enough
    waiting, running       requests without and with a worker, now
    ttft_attained, …       share of the requests that kept to the SLO; 1 where there was none
    prefill_rate           tokens a second that one prefill worker computes; 0: not measured
    batch                  requests that decode workers have, now
    steps                  (batch, seconds) of each decode worker's recent steps
    kv_used                share of the decode workers' KV pools that requests hold
    """

    now: float
    seconds: float
    changing: str = ""
    prefill: int
    decode: int
    requests_per_s: float = 0.0
    failed_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    uncached_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    uncached_len: float = 0.0
    hit_rate: float = 0.0
    queue_p90_s: float = 0.0
    oldest_wait_s: float = 0.0
    backlog_tokens: float = 0.0
    waiting: int = 0
    running: int = 0
    ttft_attained: float = 1.0
    tpot_attained: float = 1.0
    prefill_rate: float = 0.0
    batch: int = 0
    steps: tuple[tuple[float, float], ...] = ()
    kv_used: float = 0.0


def observe(
    traffic: Mapping[str, Sequence[Traffic]], workers: Iterable[WorkerStatus], targets: Targets, now: float,
    changing: str = "",
) -> Observation:  # fmt: skip
    """Put together what was heard.

    traffic   gateway → its windows, oldest first; older ones than the last `targets.window_s` are left out here
    workers   as they report; only those that are ready count
    """
    recent = {name: _last(windows, targets.window_s) for name, windows in traffic.items()}
    last = [windows[-1] for windows in recent.values() if windows]
    every = [window for windows in recent.values() for window in windows]
    seconds = max((sum(w.seconds for w in windows) for windows in recent.values()), default=0.0)
    arrived, prompts = sum(w.arrived for w in every), sum(w.prompt_tokens for w in every)
    started, cached = sum(w.started for w in every), sum(w.cached_tokens for w in every)
    waiting = sum(w.waiting for w in last)
    mean_len = prompts / arrived if arrived else 0.0
    hit_rate = min(1.0, cached / (started * mean_len)) if started and mean_len else 0.0
    uncached_len = mean_len * (1.0 - hit_rate)
    ready = [w for w in workers if w.state is WorkerState.READY and w.load is not None]
    prefills = [w.load for w in ready if w.role == Role.PREFILL and w.load]
    decodes = [w.load for w in ready if w.role == Role.DECODE and w.load]
    queued = sum(max(0.0, load.queued_prefill_tokens * (1.0 - hit_rate) - uncached_len) for load in prefills)
    lately = [window for windows in traffic.values() for window in _last(windows, RECENT_S)]
    lately_s = max((sum(w.seconds for w in _last(windows, RECENT_S)) for windows in traffic.values()), default=0.0)
    per_s = 1.0 / seconds if seconds else 0.0
    return Observation(
        now=now,
        seconds=seconds,
        changing=changing,
        prefill=len(prefills),
        decode=len(decodes),
        requests_per_s=arrived * per_s,
        failed_per_s=sum(w.failed for w in every) * per_s,
        prompt_tokens_per_s=prompts * per_s,
        uncached_tokens_per_s=arrived * uncached_len * per_s,
        output_tokens_per_s=sum(w.output_tokens for w in lately) / lately_s if lately_s else 0.0,
        uncached_len=uncached_len,
        hit_rate=hit_rate,
        queue_p90_s=_quantile([s for w in every for s in w.queue_s], 0.9),
        oldest_wait_s=max((w.oldest_wait_s for w in last), default=0.0),
        backlog_tokens=queued + waiting * uncached_len,
        waiting=waiting,
        running=sum(w.running for w in last),
        ttft_attained=_share([s for w in every for s in w.ttft_s], targets.ttft_s),
        tpot_attained=_share([s for w in every for s in w.tpot_s], targets.tpot_s),
        prefill_rate=_rate(prefills, [w.load for w in ready if w.load]),
        batch=sum(load.running + load.waiting for load in decodes),
        steps=tuple((load.decode_batch, load.decode_step_s) for load in decodes if load.decode_step_s),
        kv_used=_kv_used(decodes),
    )


@dataclass(frozen=True, slots=True)
class StepLine:
    """Seconds of a decode step by its batch, as a line: `alone` + `each` · batch. Least squares over what was measured,
    in which what is old fades; while that has been about one batch only, each request costs a fixed share of a step."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def learn(self, points: Sequence[tuple[float, float]]) -> StepLine:
        """With these (batch, seconds) as well."""
        if not points:
            return self
        sums = [self.weight, self.x, self.y, self.xx, self.xy]
        new = [sum(terms) for terms in zip(*((1.0, b, s, b * b, b * s) for b, s in points), strict=True)]
        return StepLine(*(FADE * old + term for old, term in zip(sums, new, strict=True)))

    def batch(self, seconds: float) -> float:
        """Requests that may decode together in steps of so many seconds; infinite while nothing is known."""
        if not self.weight:
            return math.inf
        x, y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - x * x
        least = DEFAULT_SLOPE * y / (1.0 + DEFAULT_SLOPE * x)
        each = (self.xy / self.weight - x * y) / spread if spread > 1.0 + 0.01 * x * x else least
        each = min(max(each, least / 4), y / max(x, 1.0))  # never flat, and never through less than nothing
        return x + (seconds - y) / each


FADE = 0.97
"""Weight of what was learnt, at each call."""
DEFAULT_SLOPE = 1 / 32
"""Growth of a decode step with each request in it, as a share of the step of one, until it is measured."""


def _last(windows: Sequence[Traffic], seconds: float) -> list[Traffic]:
    kept: list[Traffic] = []
    for window in reversed(windows):
        if seconds <= 0:
            break
        kept.append(window)
        seconds -= window.seconds
    return kept[::-1]


def _rate(prefills: Sequence[Load], ready: Sequence[Load]) -> float:
    """Of the prefill workers that have measured it; else of any that has computed prompts before it was turned."""
    for loads in (prefills, ready):
        if rates := [load.prefill_tokens_per_s for load in loads if load.prefill_tokens_per_s]:
            return sum(rates) / len(rates)
    return 0.0


def _kv_used(loads: Sequence[Load]) -> float:
    total = sum(load.total_blocks for load in loads)
    return 1.0 - sum(load.free_blocks + load.cached_blocks for load in loads) / total if total else 0.0


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else 0.0


def _share(values: list[float], bound: float) -> float:
    return sum(value <= bound for value in values) / len(values) if values else 1.0
