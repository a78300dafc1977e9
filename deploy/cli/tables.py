"""A cluster's state as tables, for `baton status` and `baton top`. Pure: a `ClusterStatus` in, something that rich can
print out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..control.status import ClusterStatus, Decision, Event, GatewayRow, PoolRow, TrafficRow, WorkerRow

PLAIN_WIDTH = 160
"""Columns where no terminal says how many there are: nothing is cut for `grep`."""

COLOURS = {
    **dict.fromkeys(("ready", "serving"), "green"),
    **dict.fromkeys(("starting", "loading", "draining", "leaving", "waiting", "warning"), "yellow"),
    **dict.fromkeys(("failed", "silent", "error"), "red"),
}


def console() -> Console:
    """Standard output."""
    here = Console(highlight=False)
    return here if here.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def overview(status: ClusterStatus, events: int) -> RenderableType:
    """All of it, with the last so many events."""
    parts: list[RenderableType] = [heading(status), Text(traffic(status.traffic)), ""]
    parts += [_pools(status.pools), "", _workers(status.workers), *_details(status.workers), ""]
    parts += [_gateways(status.gateways), *_details(status.gateways)]
    if events and status.events:
        parts += ["", Text("events", style="bold"), *map(_event, status.events[-events:])]
    return Group(*parts)


def heading(status: ClusterStatus) -> Text:
    """What it serves and how it stands, in one line."""
    facts = [f"launcher {status.launcher}", f"revision {status.revision}"]
    facts += [f"controller up {age(status.controller_age_s)}"]
    facts += ["autoscale on"] if status.autoscale else []
    facts += [f"rollout {status.rollout}"] if status.rollout else []
    return Text.assemble((status.model, "bold"), "  ", " · ".join(facts))


def traffic(row: TrafficRow) -> str:
    """The last minute, in three lines of less than 80 columns: requests, tokens, latencies."""
    lines = (
        (
            f"{row.requests_per_s:.1f} requests/s ({row.failed_per_s:.1f} failed)",
            f"{row.running} running, {row.waiting} waiting",
        ),
        (
            f"{count(row.prompt_tokens_per_s)} prompt tokens/s ({row.hit_rate:.0%} cached)",
            f"{count(row.output_tokens_per_s)} output tokens/s",
        ),
        (
            f"queue p90 {seconds(row.queue_p90_s)}",
            f"TTFT p50 {seconds(row.ttft_p50_s)} p99 {seconds(row.ttft_p99_s)}",
            f"time/token p50 {seconds(row.tpot_p50_s)} p99 {seconds(row.tpot_p99_s)}",
        ),
    )
    return "\n".join(" · ".join(line) for line in lines)


def why(decisions: Sequence[Decision]) -> RenderableType:
    """What the planner decided, the latest last."""
    if not decisions:
        return Text("the planner has decided nothing yet")
    return Group(*(Text(f"{age(decision.ago_s):>4} ago  {decision.text}") for decision in decisions))


def _pools(rows: Iterable[PoolRow]) -> Table:
    table = _table("pool", "role", ">tp", ">ready", ">wanted")
    for row in rows:
        style = "green" if row.ready == row.wanted else "yellow"
        table.add_row(escape(row.name), row.role, str(row.tp), f"[{style}]{row.ready}[/]", str(row.wanted))
    return table


def _workers(rows: Sequence[WorkerRow]) -> Table:
    """Columns that would be empty in all rows are left out."""
    columns = (
        "worker",
        "pool",
        "role",
        "state",
        "node",
        "device",
        ">req",
        ">wait",
        ">KV",
        ">hit",
        ">tok/s",
        ">age",
        ">died",
    )
    cells = [_worker(row) for row in rows]
    shown = [i for i in range(len(columns)) if i in (0, 2, 3) or any(row[i] for row in cells)]
    table = _table(*(columns[i] for i in shown))
    for row in cells:
        table.add_row(*(row[i] for i in shown))
    return table


def _worker(row: WorkerRow) -> tuple[str, ...]:
    state = row.state + (f" {row.progress:.0%}" if row.state == "loading" else "")
    rate = row.prompt_tokens_per_s + row.output_tokens_per_s if row.role == "colocated" else 0.0
    rate = rate or (row.prompt_tokens_per_s if row.role == "prefill" else row.output_tokens_per_s)
    load = row.load
    return (
        escape(row.name),
        escape(row.pool) if row.pool != row.role else "",
        row.role,
        _coloured(row.state, state),
        escape(row.node),
        escape(row.device),
        str(load.running) if load else "",
        str(load.waiting) if load else "",
        f"{row.kv_used:.0%}" if load else "",
        f"{row.hit_rate:.0%}" if load else "",
        count(rate) if load else "",
        age(row.age_s),
        str(row.restarts or ""),
    )


def _details(rows: Sequence[WorkerRow] | Sequence[GatewayRow]) -> list[Text]:
    """Why those are as they are that have a reason: a line each, since reasons are longer than columns."""
    return [Text(f"{row.name}: {row.detail}", COLOURS.get(row.state, "")) for row in rows if row.detail]


def _gateways(rows: Iterable[GatewayRow]) -> Table:
    table = _table("gateway", "state", "url", ">running", ">waiting", ">died")
    for row in rows:
        numbers = (str(row.running), str(row.waiting), str(row.restarts or ""))
        table.add_row(escape(row.name), _coloured(row.state, row.state), escape(row.url), *numbers)
    return table


def _event(event: Event) -> Text:
    return Text.assemble(f"{age(event.ago_s):>4} ago  ", (event.text, COLOURS.get(event.level, "")))


def _table(*columns: str) -> Table:
    """`>` before a name: numbers, to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return table


def _coloured(state: str, text: str) -> str:
    return f"[{COLOURS.get(state, 'default')}]{escape(text)}[/]"


def age(value: float) -> str:
    """`45s`, `12m`, `3h`, `2d`."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "m"), (172800, 3600, "h")):
        if value < limit:
            return f"{value / unit:.0f}{name}"
    return f"{value / 86400:.0f}d"


def seconds(value: float) -> str:
    """`0.8 ms`, `45 ms`, `1.24 s`; a dash where nothing was measured."""
    if value <= 0:
        return "–"
    if value < 0.01:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def count(value: float) -> str:
    """`87`, `5.3k`, `1.2M`."""
    if value < 1000:
        return f"{value:.0f}"
    return f"{value / 1e3:.1f}k" if value < 1e6 else f"{value / 1e6:.1f}M"


def size(value: int) -> str:
    """Bytes as `512 MiB`, `1.5 GiB`."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 1 << shift:
            return f"{value / (1 << shift):.3g} {unit}"
    return f"{value} B"
