"""The cluster as an operator sees it: `ClusterStatus` out of what is desired and what is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...common.cluster import Phase, ProcessStatus, Traffic
from .desired import Assignment, Desired
from .members import Attendance, Gateways
from .reconcile import World, departing, members, serving
from .reports import Reports
from .status import GatewayRow, PoolRow, TrafficRow, WorkerRow

QUIET_S = 5.0
"""A worker that has not reported for this long is shown as silent; it reports each second."""
TRAFFIC_S = 60.0


def pool_rows(desired: Desired, world: World) -> tuple[PoolRow, ...]:
    ready = serving(desired, world)
    return tuple(
        PoolRow(
            name=pool.name,
            role=str(pool.role),
            tp=pool.worker.engine.tp,
            wanted=desired.size(pool.name),
            ready=sum(a.pool == pool.name and a.name in ready for a in desired.assignments),
        )
        for pool in desired.pools
    )


def worker_rows(desired: Desired, world: World, reports: Reports) -> tuple[WorkerRow, ...]:
    shown = {member.name: str(member.state) for member in members(desired, world)}
    depart = departing(desired, world)
    return tuple(
        _worker_row(a, desired, world, reports, shown.get(a.name, "starting"), a.name in depart)
        for a in desired.assignments
    )


def _worker_row(
    assignment: Assignment, desired: Desired, world: World, reports: Reports, state: str, may: bool
) -> WorkerRow:
    process = world.processes.get(assignment.name) or ProcessStatus(assignment.name, Phase.STARTING)
    word = world.words.get(assignment.name)
    role = str(desired.role(assignment))
    detail = word.detail if word is not None else ""
    if process.phase in _STATES:
        state, detail = _STATES[process.phase], _why(process)
        if process.phase is Phase.GIVEN_UP:
            detail += f"; to try again: baton scale {assignment.pool}={desired.size(assignment.pool)}"
    elif word is not None and reports.silence(process, process.age_s) > QUIET_S:
        state = "silent"
    elif state == "ready" and not may and (assignment.leaving or (word is not None and word.role != role)):
        detail = f"to {'leave' if assignment.leaving else 'turn'} as soon as another worker is ready in its place"
    prompt, output = reports.rates(process)
    return WorkerRow(
        name=assignment.name,
        pool=assignment.pool,
        role=role if word is None else word.role,
        state=state,
        revision=assignment.revision,
        node=process.node,
        device=word.device if word is not None else "",
        pid=process.pid,
        age_s=process.age_s,
        restarts=process.restarts,
        progress=word.progress if word is not None else 0.0,
        detail=detail,
        load=word.load if word is not None else None,
        prompt_tokens_per_s=prompt,
        output_tokens_per_s=output,
    )


def gateway_rows(desired: Desired, world: World, gateways: Gateways) -> tuple[GatewayRow, ...]:
    return tuple(
        _gateway_row(config.name, world.processes.get(config.name), gateways.present.get(config.name), gateways)
        for config in desired.gateways
    )


def _gateway_row(name: str, process: ProcessStatus | None, here: Attendance | None, gateways: Gateways) -> GatewayRow:
    state, detail = "starting", ""
    if process is not None and process.phase in _STATES:
        state, detail = _STATES[process.phase], _why(process)
    elif here is not None:
        state = "silent" if gateways.is_silent(here) else "serving"
    last = here.traffic[-1] if here is not None and here.traffic else Traffic(seconds=0.0)
    return GatewayRow(
        name=name,
        url=here.hello.url if here is not None else "",
        state=state,
        pid=process.pid if process is not None else 0,
        running=last.running,
        waiting=last.waiting,
        restarts=process.restarts if process is not None else 0,
        detail=detail,
    )


_STATES = {Phase.STARTING: "starting", Phase.WAITING: "waiting", Phase.GIVEN_UP: "failed"}
"""What there is to say of a process that does not run."""


def _why(process: ProcessStatus) -> str:
    last = f": {process.last_lines[-1]}" if process.last_lines else ""
    return f"{process.why}{last}" if process.why else ""


def traffic_row(traffic: Mapping[str, Sequence[Traffic]]) -> TrafficRow:
    """The last minute, over all gateways."""
    recent = [_last(windows) for windows in traffic.values()]
    every = [window for windows in recent for window in windows]
    seconds = max((sum(w.seconds for w in windows) for windows in recent), default=0.0)
    if not seconds:
        return TrafficRow()
    prompt, started, arrived = (sum(getattr(w, n) for w in every) for n in ("prompt_tokens", "started", "arrived"))
    computed = prompt / arrived * started if arrived else 0.0  # prompt tokens of the requests that started, about
    cached = sum(w.cached_tokens for w in every)
    ttft = sorted(s for w in every for s in w.ttft_s)
    tpot = sorted(s for w in every for s in w.tpot_s)
    return TrafficRow(
        requests_per_s=arrived / seconds,
        failed_per_s=sum(w.failed for w in every) / seconds,
        prompt_tokens_per_s=prompt / seconds,
        output_tokens_per_s=sum(w.output_tokens for w in every) / seconds,
        hit_rate=min(1.0, cached / computed) if computed else 0.0,
        queue_p90_s=_quantile(sorted(s for w in every for s in w.queue_s), 0.9),
        ttft_p50_s=_quantile(ttft, 0.5),
        ttft_p99_s=_quantile(ttft, 0.99),
        tpot_p50_s=_quantile(tpot, 0.5),
        tpot_p99_s=_quantile(tpot, 0.99),
        running=sum(windows[-1].running for windows in recent if windows),
        waiting=sum(windows[-1].waiting for windows in recent if windows),
    )


def _last(windows: Sequence[Traffic]) -> list[Traffic]:
    kept: list[Traffic] = []
    seconds = 0.0
    for window in reversed(windows):
        if seconds >= TRAFFIC_S:
            break
        kept.append(window)
        seconds += window.seconds
    return kept[::-1]


def _quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0
