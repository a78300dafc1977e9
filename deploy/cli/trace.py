"""`baton trace`: where one request's time went."""

from __future__ import annotations

import json
import shutil
from typing import Annotated

import typer

from ...common.json_form import to_plain
from .client import AdminClient, AdminUrl, ClusterName, find
from .picture import picture

MAX_WIDTH = 120


def trace(
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="Its id, or 'slowest' of the recent ones.")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts: the fields of Trace; they only grow.")] = False,
    cluster: ClusterName = None,
    admin: AdminUrl = None,
) -> None:
    """Show where one request's time went, in one picture.

    Where it waited, was queued, computed, handed over and tried again, and on
    which workers. Gateways remember a bounded number of requests.

    Example: baton trace slowest
    """
    with AdminClient(find(cluster, admin)) as client:
        found = client.trace(request_id)
    if as_json:
        print(json.dumps(to_plain(found), indent=2))
    else:
        print(picture(found, min(shutil.get_terminal_size().columns, MAX_WIDTH)))
