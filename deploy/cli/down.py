"""`baton down`: end a cluster."""

from __future__ import annotations

from .client import AdminClient, AdminUrl, ClusterName, find
from .wait import Timeout, Wait, Yes, confirm, wait_for_end


def down(
    yes: Yes = False,
    wait: Wait = True,
    timeout: Timeout = 120.0,
    cluster: ClusterName = None,
    admin: AdminUrl = None,
) -> None:
    """End a cluster in order.

    Requests under way finish, then all processes end. Asks first.

    Example: baton down --yes
    """
    with AdminClient(find(cluster, admin)) as client:
        status = client.status()
        confirm(f"End the cluster that serves {status.model} with {len(status.workers)} workers?", yes)
        client.down()
        if wait:
            wait_for_end(client, timeout)
        print("ended" if wait else "it ends")
