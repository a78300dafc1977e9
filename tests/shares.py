"""How several processes share the tests (`pytest -n 2`): each takes a file at a time, a whole room, or a test."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

WHOLE = ("e2e", "ray")
"""Rooms whose files share clusters, which one process starts."""
SINGLE = ("tests/gpu/test_engine.py", "tests/gpu/test_kernels.py")
"""Files whose tests share nothing, and spend their time on compiling kernels."""


class Shares(LoadScopeScheduling):
    """What is given away at once: tests of the same scope."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        room = file.split("/")[1]
        if file in SINGLE:
            return nodeid
        return room if room in WHOLE else file
