"""`baton drain`: let one worker go."""

from __future__ import annotations

from typing import Annotated

import typer

from ..control.status import ClusterStatus
from .client import AdminClient, AdminUrl, ClusterName, find
from .wait import Timeout, Wait, Yes, confirm, wait_until


def drain(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="Its name, as `baton status` shows it.")],
    now: Annotated[bool, typer.Option("--now", help="Hand its requests to other workers, KV and all.")] = False,
    yes: Yes = False,
    wait: Wait = True,
    timeout: Timeout = 600.0,
    cluster: ClusterName = None,
    admin: AdminUrl = None,
) -> None:
    """Let a worker go, without losing a request.

    It takes nothing new; its requests finish there, or move to other workers
    with --now; then it ends, and its pool is one smaller. Asks first.

    Example: baton drain decode-1 --now
    """
    with AdminClient(find(cluster, admin)) as client:
        who = described(client.status(), worker)
        confirm(f"Drain {who}?", yes)
        client.drain(worker, now)
        print(f"{who} takes nothing new; its requests {'move' if now else 'finish there'}")
        if wait:
            wait_until(client, lambda status: missing(status, worker), timeout)


def described(status: ClusterStatus, name: str) -> str:
    """A worker with the pool that gets smaller without it: one that was turned keeps the name that it began with."""
    return next((f"{name} of pool {worker.pool}" for worker in status.workers if worker.name == name), name)


def missing(status: ClusterStatus, name: str) -> str:
    """What keeps this worker there; empty: it is gone."""
    for worker in status.workers:
        if worker.name == name:
            held = worker.load.running + worker.load.waiting if worker.load else 0
            why = f" ({worker.detail})" if worker.detail else ""
            return f"{name} {worker.state}, requests: {held}{why}"
    return ""
