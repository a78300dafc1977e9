"""`baton logs`: what a process logged."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from .client import AdminClient, AdminUrl, ClusterName, find
from .exits import NoCluster

POLL_S = 0.5
PAGE = 1000
"""Lines asked for at a time."""


def logs(
    process: Annotated[str, typer.Argument(metavar="PROCESS", help="A worker, a gateway, or 'controller'.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=PAGE, help="Last lines to begin with.")] = 100,
    cluster: ClusterName = None,
    admin: AdminUrl = None,
) -> None:
    """Show the end of a process's log.

    The cluster keeps a bounded number of lines of each process.

    Example: baton logs decode-0 -f -n 20
    """
    with AdminClient(find(cluster, admin)) as client:
        found = client.logs(process, -lines, lines)
        _print(found.lines)
        while follow:
            try:
                found = client.logs(process, found.next, PAGE)
            except NoCluster:
                if client.place.dead:  # it has ended, and with it the log
                    return
            else:
                _print(found.lines)
                if len(found.lines) == PAGE:
                    continue
            time.sleep(POLL_S)


def _print(lines: tuple[str, ...]) -> None:
    for line in lines:
        print(line, flush=True)
