"""Asking before something is destroyed, and waiting until the cluster is where it shall be."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ...common.errors import InvalidRequest
from ..control.status import ClusterStatus
from .client import AdminClient
from .exits import NoCluster, NotReached

POLL_S = 0.5

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is done.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait at most.")]


def confirm(question: str, yes: bool) -> None:
    """Go on only if a person agrees, or has agreed by `--yes`. Raises `typer.Abort` on a no, and `InvalidRequest` where
    there is nobody to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidRequest(f"{question} This is not a terminal, so nobody can be asked: say --yes")
    typer.confirm(question, abort=True, err=True)


def wait_until(client: AdminClient, missing: Callable[[ClusterStatus], str], timeout_s: float) -> None:
    """Look until `missing` finds nothing any more, and show meanwhile what it finds. It may raise as well.

    An answer that fails to come is waited for too, since a controller that died is started again; raises `NoCluster`
    once the cluster is known to have ended, `NotReached` after `timeout_s`."""
    began = time.monotonic()
    with _progress() as show:
        while True:
            try:
                what = missing(client.status())
            except NoCluster as error:
                if client.place.dead:
                    raise
                what = error.message
            if not what:
                break
            if time.monotonic() - began >= timeout_s:
                raise NotReached(f"not reached within {timeout_s:g} s: {what}")
            show(what)
            time.sleep(POLL_S)
    print(f"done after {time.monotonic() - began:.1f} s")


def wait_for_end(client: AdminClient, timeout_s: float) -> None:
    """Until the cluster is gone. Raises `NotReached`."""
    deadline = time.monotonic() + timeout_s
    with _progress() as show:
        while not client.place.dead:
            try:
                status = client.status()
                left = [worker.name for worker in status.workers]
                show(f"ending: {', '.join(left) or 'no worker is left'}")
            except NoCluster:
                if not client.place.pid:  # elsewhere: its silence is all that can be known
                    return
                show("ending")
            if time.monotonic() >= deadline:
                raise NotReached(f"it has not ended within {timeout_s:g} s")
            time.sleep(POLL_S)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Says what is waited for, on standard error: in one line that changes, or, where it is no terminal, in a line for
    each change."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("") as line:
            yield lambda text: line.update(escape(text))
        return
    said = ""

    def say(text: str) -> None:
        nonlocal said
        if text != said:
            said = text
            print(text, file=sys.stderr, flush=True)

    yield say
