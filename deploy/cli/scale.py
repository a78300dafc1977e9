"""`baton scale`: change the sizes of pools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from ...common.errors import BatonError, InvalidRequest
from ..control.status import ClusterStatus
from .client import AdminClient, AdminUrl, ClusterName, find
from .wait import Timeout, Wait, Yes, confirm, wait_until


def scale(
    pools: Annotated[list[str], typer.Argument(metavar="POOL=COUNT", help="How many workers each pool shall have.")],
    yes: Yes = False,
    wait: Wait = True,
    timeout: Timeout = 600.0,
    cluster: ClusterName = None,
    admin: AdminUrl = None,
) -> None:
    """Change the sizes of pools, without losing a request.

    Workers turn from one role to the other where that gets closer; then some
    are started, or let go; what was given up is tried again. Asks before a pool
    shrinks.

    Example: baton scale prefill=3 decode=5
    """
    counts = _parse(pools)
    with AdminClient(find(cluster, admin)) as client:
        sizes = {pool.name: pool.wanted for pool in client.status().pools}
        smaller = [f"{name} from {sizes[name]} to {n}" for name, n in counts.items() if n < sizes.get(name, 0)]
        if smaller:
            confirm(f"Shrink {', '.join(smaller)}?", yes)
        steps = client.scale(counts)
        print("\n".join(steps) if steps else "nothing to do")
        if wait:
            wait_until(client, lambda status: missing(status, counts), timeout)


def _parse(words: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in words:
        name, _, count = word.partition("=")
        if not (name and count.isdecimal()):
            raise InvalidRequest(f"{word!r} is not POOL=COUNT, such as decode=5")
        if name in counts:
            raise InvalidRequest(f"{name} is given twice")
        counts[name] = int(count)
    return counts


def missing(status: ClusterStatus, counts: Mapping[str, int]) -> str:
    """What of these pools is not as it shall be; empty: nothing. Raises `BatonError` if it never will be."""
    found = []
    for pool in (pool for pool in status.pools if pool.name in counts):
        if pool.wanted != counts[pool.name]:
            raise BatonError(f"somebody else changed {pool.name} meanwhile: it shall have {pool.wanted} workers now")
        if pool.ready != pool.wanted:
            found.append(f"{pool.name}: {pool.ready} of {pool.wanted} ready")
        ready = sum(worker.pool == pool.name and worker.state == "ready" for worker in status.workers)
        if ready > pool.wanted:  # one that shall go still works, until another one does its work
            found.append(f"{pool.name}: {ready} ready, which is {ready - pool.wanted} too many")
    for worker in (worker for worker in status.workers if worker.pool in counts):
        if worker.state == "failed":
            raise BatonError(f"{worker.name} was given up: {worker.detail}")
        if worker.state != "ready":
            found.append(f"{worker.name} {worker.state}" + (f" ({worker.detail})" if worker.detail else ""))
    return ", ".join(found)
