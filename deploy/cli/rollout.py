"""`baton rollout`: replace all workers, one after the other, under traffic."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ...common.errors import BatonError, InvalidRequest
from ..control.status import ClusterStatus
from ..settings import checked, from_text
from .client import AdminClient, AdminUrl, ClusterName, find
from .wait import Timeout, Wait, Yes, confirm, wait_until

OPTION = re.compile(r"((?:[a-z0-9-]+\.)?((?:engine|handover|worker)\.\w+))=(.*)", re.DOTALL)
"""A path, the field that it ends with, and the value."""


def rollout(
    weights: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with other weights, same tokenizer.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="OPTION=VALUE", help="As engine.tp=2, decode.engine.tp=2; repeatable."),
    ] = None,
    yes: Yes = False,
    wait: Wait = True,
    timeout: Timeout = 1800.0,
    cluster: ClusterName = None,
    admin: AdminUrl = None,
) -> None:
    """Replace all workers under traffic, with other weights or options if you
    like.

    Each pool gets a new worker first, then the old ones leave one by one. No
    request is lost. If the new ones do not become ready, it is undone. Asks
    first.

    Example: baton rollout --weights ./model-v2 --set engine.max_running=64
    """
    values = _parse(changes or [])
    model = _folder(weights) if weights else None
    with AdminClient(find(cluster, admin)) as client:
        before = client.status()
        confirm(f"Replace all {len(before.workers)} workers?", yes)
        client.rollout(model, values)
        print(f"revision {before.revision} is being replaced")
        if wait:
            wait_until(client, lambda status: missing(status, before.revision), timeout)


def _parse(words: list[str]) -> dict[str, Any]:
    values = {}
    for word in words:
        found = OPTION.fullmatch(word)
        if found is None:
            raise InvalidRequest(f"--set: {word!r} is not OPTION=VALUE with an option of engine, handover or worker")
        path, field, text = found.groups()
        values[path] = checked(from_text(field, text, f"--set {path}"))
    return values


def _folder(path: Path) -> str:
    """As the cluster will find it, if it is on this machine."""
    return str(path.expanduser().absolute())


def missing(status: ClusterStatus, before: int) -> str:
    """What is still to come; empty: nothing. Raises `BatonError` if it was undone."""
    if status.rollout:
        return status.rollout
    if status.revision == before:
        why = next((f": {event.text}" for event in reversed(status.events) if event.level != "info"), "")
        raise BatonError(f"it was undone, all is as before{why}")
    return ""
