"""How several processes share the tests (`pytest -n 2`): each takes a file at a time, a whole room, or a test."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

WHOLE = ("e2e", "ray")
"""Rooms whose files share clusters, which one process starts."""
WAITING = ("worker",)
"""Rooms whose tests wait for processes and leases: who else has something to compute, uses the time."""
SINGLE = ("tests/gpu/test_engine.py", "tests/gpu/test_kernels.py")
"""Files whose tests share nothing, and spend their time on compiling kernels."""


class Shares(LoadScopeScheduling):
    """What is given away at once: tests of the same scope. What takes longest comes first, so that all end together."""

    def _assign_work_unit(self, node: WorkerController) -> None:
        self.workqueue.move_to_end(min(self.workqueue, key=_turn), last=False)
        super()._assign_work_unit(node)

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        room = file.split("/")[1]
        if file in SINGLE:
            return nodeid
        return room if room in WHOLE else file


def _turn(scope: str) -> int:
    room = scope if scope in WHOLE else scope.split("/")[1]
    return 0 if room in WHOLE else 1 if room in WAITING else 2
