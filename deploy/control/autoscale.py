"""Where the planner of pool sizes meets the cluster: what it is shown, and what its decisions become."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...common.cluster import Phase, Traffic
from ...common.types import Role
from . import planner
from .desired import Desired
from .observation import observe
from .planner import Memory
from .reconcile import World, serving
from .status import Decision

KEPT_DECISIONS = 50
PATIENCE_S = 60.0
"""How long everything waits for workers that are not ready. One that loads for minutes, or finds no room, must not keep
the others from changing their roles; only nothing more is started, and nothing let go, until it is ready."""


class Autoscaler:
    """Asks the planner at each interval, and keeps its lines. `decisions`: how often it changed something."""

    def __init__(self) -> None:
        self._memory = Memory()
        self._next = 0.0
        self._late: tuple[tuple[str, ...], float] = (), 0.0
        self._lines: deque[tuple[float, planner.Decision]] = deque(maxlen=KEPT_DECISIONS)
        self.decisions = 0

    def step(
        self, desired: Desired, world: World, traffic: Mapping[str, Sequence[Traffic]], now: float
    ) -> dict[str, int]:
        """The pools that shall have another size; mostly none."""
        config = desired.autoscale
        if not config.enabled or now < self._next:
            return {}
        self._next = now + config.interval_s
        words = [world.words[name] for name in sorted(serving(desired, world))]
        changing, late = under_way(desired, world), missing(desired, world)
        if late != self._late[0]:
            self._late = late, now
        if late and not changing:
            if now - self._late[1] <= PATIENCE_S:
                changing = f"{late[0]} is not ready yet"
            else:
                config = replace(config, max_workers=0)
        seen = observe(traffic, words, config, now, changing)
        decision, self._memory = planner.plan(seen, self._memory, config)
        if late and not changing:
            decision = replace(decision, why=f"{decision.why}; only turns, while {', '.join(late)} is not ready")
        sizes = fit(desired, decision.prefill - seen.prefill, decision.decode - seen.decode)
        if decision.changes and not sizes:
            decision = replace(decision, changes=False, why=f"{decision.why}; but min and max of the pools forbid it")
        if self._lines and not self._lines[-1][1].changes:  # of what stays as it is, only the last word is of interest
            self._lines.pop()
        self._lines.append((now, decision))
        if not decision.changes:
            return {}
        self.decisions += 1
        return sizes

    def why(self, now: float) -> tuple[Decision, ...]:
        """What it decided and why, oldest first."""
        return tuple(Decision(ago_s=now - at, text=decision.why) for at, decision in self._lines)


def under_way(desired: Desired, world: World) -> str:
    """What an operator or the planner has begun and is not over, in words; empty: nothing."""
    if desired.rollout is not None:
        return "a rollout is under way"
    if leaving := [a.name for a in desired.assignments if a.leaving]:
        return f"{', '.join(leaving)} is about to leave"
    return ""


def missing(desired: Desired, world: World) -> tuple[str, ...]:
    """Workers that are still to become ready. One that was given up is not."""
    lost = {process.name for process in world.processes.values() if process.phase is Phase.GIVEN_UP}
    here = serving(desired, world) | lost
    return tuple(a.name for a in desired.staying if a.name not in here)


def fit(desired: Desired, prefill: int, decode: int) -> dict[str, int]:
    """New sizes of the pools where there shall be so many prefill and decode workers more, or less. Of workers that are
    to turn, as many as both sides' limits allow: else one that nothing takes would be let go."""
    if prefill + decode == 0:
        granted = min(
            abs(sum(size - desired.size(pool) for pool, size in spread(desired, role, more).items()))
            for role, more in ((Role.PREFILL, prefill), (Role.DECODE, decode))
        )
        prefill, decode = (granted, -granted) if prefill > 0 else (-granted, granted)
    return spread(desired, Role.PREFILL, prefill) | spread(desired, Role.DECODE, decode)


def spread(desired: Desired, role: Role, more: int) -> dict[str, int]:
    """New sizes of the pools of a role that shall have so many workers more, or less, in sum: the first that has room
    grows, the last that can shrinks. What no pool's limits allow is left out."""
    sizes: dict[str, int] = {}
    pools = [pool for pool in desired.pools if pool.role is role]
    for pool in pools if more > 0 else reversed(pools):
        size = desired.size(pool.name)
        new = min(max(size + more, pool.min), pool.max) if more else size
        if (new - size) * more > 0:
            sizes[pool.name] = new
            more -= new - size
    return sizes
