"""The workers' and the router's numbers for /metrics, read from the router at the moment somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..common.cluster import WorkerState
from ..common.messages import Load
from ..router.stats import Snapshot, Stats, WorkerSnapshot

_WORKER_GAUGES: tuple[tuple[str, str, Callable[[Load], float]], ...] = (
    ("baton_requests_running", "Requests that the worker computes.", lambda load: load.running),
    ("baton_requests_waiting", "Requests that wait at the worker.", lambda load: load.waiting),
    ("baton_queued_prefill_tokens", "Prompt tokens that wait to be computed.", lambda load: load.queued_prefill_tokens),
    ("baton_engine_loop_age_seconds", "Since the engine loop last went round.", lambda load: load.loop_age_s),
)
_WORKER_COUNTERS: tuple[tuple[str, str, Callable[[Load], float]], ...] = (
    ("baton_engine_steps", "Engine steps.", lambda load: load.steps),
    ("baton_preemptions", "Requests preempted because the KV pool ran out.", lambda load: load.preemptions),
    ("baton_worker_prompt_tokens", "Prompt tokens of requests that the worker began.", lambda load: load.prompt_tokens),
    ("baton_worker_cached_tokens", "Those of them found in its prefix cache.", lambda load: load.cached_tokens),
    ("baton_worker_output_tokens", "Tokens that the worker sampled.", lambda load: load.output_tokens),
    ("baton_handovers", "KV handovers committed.", lambda load: load.handovers),
    ("baton_moves", "Running requests that moved to another worker.", lambda load: load.moves),
    ("baton_shared_tokens", "Tokens whose cached KV went to another cache.", lambda load: load.shared_tokens),
    ("baton_handover_bytes", "KV bytes handed over.", lambda load: load.handover_bytes),
    ("baton_handover_seconds", "From reservation to commit, of all handovers.", lambda load: load.handover_seconds),
    (
        "baton_handover_exposed_seconds",
        "The part of it that does not hide behind compute: from the first token to the commit.",
        lambda load: load.handover_exposed_seconds,
    ),
    (
        "baton_handover_skipped_blocks",
        "KV blocks not sent because the target had them.",
        lambda load: load.handover_skipped_blocks,
    ),
)
_BLOCK_STATES: tuple[tuple[str, Callable[[Load], int]], ...] = (
    ("total", lambda load: load.total_blocks),
    ("free", lambda load: load.free_blocks),
    ("cached", lambda load: load.cached_blocks),
    ("reserved", lambda load: load.reserved_blocks),
)
_WORKER_STATES = (*WorkerState, "stalled", "unreachable")
"""stalled: its engine loop hangs; unreachable: it says that it serves, but no session with it stands."""
_LABELS = ("worker", "role")


class FleetNumbers(Collector):
    """Collects from `snapshot` and `oldest_wait_s`, both the router's, each time it is asked."""

    def __init__(self, snapshot: Callable[[], Snapshot], oldest_wait_s: Callable[[], float]) -> None:
        self._snapshot = snapshot
        self._oldest_wait_s = oldest_wait_s

    def describe(self) -> list[Metric]:
        """Nothing: the registry would otherwise collect once at the start, to see the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot()
        yield _members(snapshot)
        yield from _of_workers(snapshot.workers)
        yield from _of_router(snapshot.stats)
        states = GaugeMetricFamily("baton_router_requests", "Requests in the router.", labels=["state"])
        states.add_metric(["running"], snapshot.running)
        states.add_metric(["waiting"], snapshot.waiting)
        yield states
        yield GaugeMetricFamily(
            "baton_router_oldest_wait_seconds",
            "Age of the oldest request that has no token yet: grows where requests queue.",
            value=self._oldest_wait_s(),
        )
        yield GaugeMetricFamily("baton_prefix_index_entries", "(hash, worker) pairs.", value=snapshot.index_entries)


def _members(snapshot: Snapshot) -> Metric:
    """A role that is there has a row for each state, also where it is 0: what is not there raises no alarm."""
    gauge = GaugeMetricFamily("baton_workers", "Workers, as this gateway sees them.", labels=["role", "state"])
    for role in sorted({role for role, _ in snapshot.members}):
        for state in _WORKER_STATES:
            gauge.add_metric([role, state], snapshot.members.get((role, state), 0))
    return gauge


def _of_workers(workers: tuple[WorkerSnapshot, ...]) -> Iterator[Metric]:
    for name, what, value in _WORKER_GAUGES:
        gauge = GaugeMetricFamily(name, what, labels=_LABELS)
        for worker in workers:
            gauge.add_metric([worker.name, worker.role], value(worker.load))
        yield gauge
    for name, what, value in _WORKER_COUNTERS:
        counter = CounterMetricFamily(name, what, labels=_LABELS)
        for worker in workers:
            counter.add_metric([worker.name, worker.role], value(worker.load))
        yield counter
    blocks = GaugeMetricFamily("baton_kv_blocks", "KV blocks of the worker's pool.", labels=(*_LABELS, "state"))
    used = GaugeMetricFamily(
        "baton_kv_used_ratio", "Share of the KV blocks that requests hold; what is only cached is free.", labels=_LABELS
    )
    aborts = CounterMetricFamily("baton_handover_aborts", "Handovers aborted.", labels=(*_LABELS, "reason"))
    for worker in workers:
        for state, count in _BLOCK_STATES:
            blocks.add_metric([worker.name, worker.role, state], count(worker.load))
        used.add_metric([worker.name, worker.role], _used(worker.load))
        for reason, number in worker.load.handover_aborts:
            aborts.add_metric([worker.name, worker.role, reason], number)
    yield blocks
    yield used
    yield aborts


def _used(load: Load) -> float:
    return 1.0 - (load.free_blocks + load.cached_blocks) / load.total_blocks if load.total_blocks else 0.0


def _of_router(stats: Stats) -> Iterator[Metric]:
    decisions = CounterMetricFamily("baton_router_decisions", "Placements, by what decided them.", labels=["reason"])
    for reason, count in stats.decisions.items():
        decisions.add_metric([reason], count)
    yield decisions
    retries = CounterMetricFamily("baton_router_retries", "Attempts given up, by error.", labels=["code"])
    for code, count in stats.retries.items():
        retries.add_metric([code], count)
    yield retries
    moves = CounterMetricFamily("baton_router_moves", "Running requests that were to move.", labels=["result"])
    for result, count in stats.moves.items():
        moves.add_metric([result], count)
    yield moves
    yield CounterMetricFamily("baton_router_lost_workers", "Sessions lost.", value=stats.losses)
    yield CounterMetricFamily("baton_router_resyncs", "Gaps in the workers' KV events.", value=stats.resyncs)
    yield CounterMetricFamily("baton_routed_tokens", "Prompt tokens placed.", value=stats.routed_tokens)
    yield CounterMetricFamily(
        "baton_prefix_hit_tokens",
        "Those of them that the chosen worker was known to have cached.",
        value=stats.prefix_hit_tokens,
    )
