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


class Autoscaler:
    """Asks the planner at each interval, and keeps its lines. `decisions`: how often it changed something."""

    def __init__(self) -> None:
        self._memory = Memory()
        self._next = 0.0
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
        seen = observe(traffic, words, config, now, under_way(desired, world))
        decision, self._memory = planner.plan(seen, self._memory, config)
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
    """What is still changing, in words; empty: nothing. A worker that was given up changes no more."""
    if desired.rollout is not None:
        return "a rollout is under way"
    if leaving := [a.name for a in desired.assignments if a.leaving]:
        return f"{', '.join(leaving)} is about to leave"
    serve = serving(desired, world)
    for assignment in desired.staying:
        process = world.processes.get(assignment.name)
        if assignment.name not in serve and (process is None or process.phase is not Phase.GIVEN_UP):
            return f"{assignment.name} is not ready yet"
    return ""


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
