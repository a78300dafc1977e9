"""`baton status`: the cluster at one moment."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ...common.json_form import to_plain
from ..control.status import ClusterStatus
from . import tables
from .client import AdminClient, AdminUrl, ClusterName, find

EVENTS = 10


def status(
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything, for scripts: the fields of ClusterStatus; they only grow.")
    ] = False,
    why: Annotated[bool, typer.Option("--why", help="What the planner of pool sizes decided, and why.")] = False,
    cluster: ClusterName = None,
    admin: AdminUrl = None,
) -> None:
    """Show pools, workers, gateways, traffic and events.

    Traffic is that of the last minute. Columns of a worker: req and wait,
    requests with it that run and that wait; KV, the share of its pool that
    requests use; hit, the share of prompt tokens found in its cache; tok/s,
    prompt tokens where it prefills, else output tokens; died, how often it was
    started again.

    Example: baton status --json | jq '.workers[] | select(.state != "ready") | .name'
    """
    with AdminClient(find(cluster, admin)) as client:
        found = client.status()
    if as_json:
        print(json.dumps(as_dict(found), indent=2))
    elif why:
        tables.console().print(tables.why(found.why))
    else:
        tables.console().print(tables.overview(found, EVENTS))


def as_dict(found: ClusterStatus) -> dict[str, Any]:
    """The status in plain types, with `kv_used` and `hit_rate` of each worker."""
    plain: dict[str, Any] = to_plain(found)
    for worker, row in zip(found.workers, plain["workers"], strict=True):
        row |= {"kv_used": round(worker.kv_used, 4), "hit_rate": round(worker.hit_rate, 4)}
    return plain
