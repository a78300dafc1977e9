"""How several processes share the tests (`pytest -n 2`): each takes a file at a time, a whole room, or a test."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

WHOLE = ("e2e", "ray")
"""Rooms whose files share clusters, which one process starts."""
SINGLE = ("gpu",)
"""Rooms whose tests share nothing, and take long to compile their kernels: more processes than there are files help."""


class Shares(LoadScopeScheduling):
    """What is given away at once: tests of the same scope."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        room = file.split("/")[1]
        if room in SINGLE:
            return nodeid
        return room if room in WHOLE else file
