"""The planner of pool sizes at work on a simulated fleet: observations, decisions and changes in virtual time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..common.cluster import Traffic, WorkerState, WorkerStatus
from ..common.types import Role
from ..deploy.control.observation import observe
from ..deploy.control.planner import AutoscaleConfig, Decision, Memory, plan
from ..router.traffic import Meter
from .simulate import Simulated, Simulation
from .workload import Job

TRAFFIC_S = 1.0
"""How often a gateway tells of its traffic."""


@dataclass(frozen=True, slots=True)
class Step:
    """The fleet as it was `at` so many seconds, and what was decided."""

    at: float
    prefill: int
    decode: int
    decision: Decision


@dataclass(slots=True)
class Operator:
    """Does for a `Simulation` what the controller does for a cluster. A worker that is started takes `load_s`."""

    sim: Simulation
    config: AutoscaleConfig
    load_s: float = 20.0
    steps: list[Step] = field(default_factory=list)
    worker_seconds: float = 0.0
    """Sum over workers of the time for which they were there, or loading."""
    _traffic: deque[Traffic] = field(default_factory=lambda: deque(maxlen=600))
    _memory: Memory = field(default_factory=Memory)
    _under_way: list[str] = field(default_factory=list)
    _roles: dict[str, Role] = field(default_factory=dict)
    _meter: Meter = field(init=False)

    def __post_init__(self) -> None:
        self._meter = Meter(self.sim.world.now)
        self._roles = {name: worker.info.role for name, worker in self.sim.workers.items()}
        self.sim.world.every(TRAFFIC_S, self._look)
        self.sim.world.every(self.config.interval_s, self._decide)

    def _look(self) -> None:
        self._traffic.append(self._meter.take(self.sim.snapshot(), self.sim.world.now))
        self.worker_seconds += TRAFFIC_S * len(self._roles)

    def _decide(self) -> None:
        workers = [
            WorkerStatus(name, role, WorkerState.READY, load=self.sim.workers[name].load)
            for name, role in self._roles.items()
            if name in self.sim.workers
        ]
        changing = ", ".join(self._under_way)
        seen = observe({"gateway": list(self._traffic)}, workers, self.config, self.sim.world.now, changing)
        decision, self._memory = plan(seen, self._memory, self.config)
        self.steps.append(Step(self.sim.world.now, seen.prefill, seen.decode, decision))
        if decision.changes:
            self._carry_out(decision.prefill - seen.prefill, decision.decode - seen.decode)

    def _carry_out(self, prefill: int, decode: int) -> None:
        """So many more of each; the least busy are turned or let go."""
        turns = min(prefill, -decode) if prefill > 0 else -min(-prefill, decode)
        for name in self._idlest(Role.DECODE if turns > 0 else Role.PREFILL, abs(turns)):
            self._turn(name, Role.PREFILL if turns > 0 else Role.DECODE)
        for role, more in ((Role.PREFILL, prefill - turns), (Role.DECODE, decode + turns)):
            for _ in range(more):
                self._start(role)
            for name in self._idlest(role, -more):
                self._end(name)

    def _idlest(self, role: Role, count: int) -> list[str]:
        names = [name for name, its in self._roles.items() if its is role and name in self.sim.workers]
        loads = {name: self.sim.workers[name].load for name in names}
        names.sort(key=lambda name: (loads[name].queued_prefill_tokens, loads[name].running + loads[name].waiting))
        return names[: max(0, count)]

    def _turn(self, name: str, role: Role) -> None:
        def done() -> None:
            self._roles[name] = self.sim.workers[name].info.role
            self._under_way.remove(words)

        words = f"{name} becomes a {role} worker"
        self._under_way.append(words)
        self.sim.turn(name, role, done)

    def _start(self, role: Role) -> None:
        def ready() -> None:
            self.sim.join(name, role)
            self._under_way.remove(words)

        name = f"{role}-{sum(1 for known in {*self._roles, *self.sim.workers} if known.startswith(role))}"
        words = f"{name} loads"
        self._roles[name] = role
        self._under_way.append(words)
        self.sim.world.at(self.sim.world.now + self.load_s, ready)

    def _end(self, name: str) -> None:
        def done() -> None:
            del self._roles[name]
            self._under_way.remove(words)

        words = f"{name} leaves"
        self._under_way.append(words)
        self.sim.end(name, done)


def autoscaled(
    sim: Simulation, jobs: Sequence[Job], config: AutoscaleConfig, limit_s: float, load_s: float = 20.0
) -> tuple[Simulated, Operator]:
    """Serve the jobs on a fleet that the planner changes as it goes."""
    operator = Operator(sim, config, load_s)
    return sim.run(jobs, limit_s), operator
