"""`baton top`: the cluster, live."""

from __future__ import annotations

import contextlib
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from . import tables
from .client import AdminClient, AdminUrl, ClusterName, find
from .exits import NoCluster

INTERVAL_S = 1.0
EVENTS = 8


def top(cluster: ClusterName = None, admin: AdminUrl = None) -> None:
    """Show the cluster once a second, until q or Ctrl-C.

    Where the output is no terminal, one overview after the other.

    Example: baton top
    """
    console = tables.console()
    with AdminClient(find(cluster, admin)) as client:
        if not console.is_terminal:
            while True:
                console.print(_frame(client), "")
                time.sleep(INTERVAL_S)
        with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(Group(_frame(client), Text("\nq ends", style="dim")), refresh=True)
                if pressed(INTERVAL_S) in ("q", "Q"):
                    return


def _frame(client: AdminClient) -> RenderableType:
    """Raises `NoCluster` once the cluster is known to have ended; a controller that is away comes back."""
    try:
        return tables.overview(client.status(), EVENTS)
    except NoCluster as error:
        if client.place.dead:
            raise
        return Text(error.message, style="red")


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """What reads a key, waiting for at most so many seconds; empty: none came. Without a terminal to read from it only
    waits."""
    if not sys.stdin.isatty():

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait
        return

    def read(seconds: float) -> str:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return sys.stdin.read(1) if ready else ""

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)  # keys come at once; Ctrl-C still interrupts
        yield read
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
