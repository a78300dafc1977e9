"""The planner of pool sizes at work on a simulated fleet: observations, decisions and changes in virtual time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..common.cluster import MAX_SAMPLES, Traffic, WorkerState, WorkerStatus
from ..common.errors import BatonError
from ..common.types import Role
from ..deploy.control.observation import observe
from ..deploy.control.planner import AutoscaleConfig, Decision, Memory, plan
from ..router.request import RequestState
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
        self._meter = Meter(self.sim)
        self._roles = {name: worker.info.role for name, worker in self.sim.workers.items()}
        self.sim.world.every(TRAFFIC_S, self._look)
        self.sim.world.every(self.config.interval_s, self._decide)

    def _look(self) -> None:
        self._traffic.append(self._meter.window(TRAFFIC_S))
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


@dataclass(slots=True)
class _Seen:
    """How far a request was when it was last looked at."""

    started: bool = False
    answered: bool = False
    tokens: int = 0


class Meter:
    """Watches the requests of a simulation as a gateway does, and sums up what happened since it last did."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._known = 0
        self._open: dict[RequestState, _Seen] = {}

    def window(self, seconds: float) -> Traffic:
        """Everything since the last call, which was so many seconds ago."""
        now, states = self._sim.world.now, list(self._sim.states)
        new, self._known = states[self._known :], len(states)
        self._open |= {state: _Seen() for state in new}
        started = [s for s, seen in self._open.items() if not seen.started and s.prefill_start is not None]
        answered = [s for s, seen in self._open.items() if not seen.answered and s.first_token is not None]
        tokens = sum(len(s.output) - seen.tokens for s, seen in self._open.items())
        ended = [s for s in self._open if s.outcome is not None]
        for state, seen in self._open.items():
            seen.started, seen.answered = state.prefill_start is not None, state.first_token is not None
            seen.tokens = len(state.output)
        for state in ended:
            del self._open[state]
        well = [s for s in ended if not isinstance(s.outcome, BatonError)]
        silent = [s for s in self._open if s.first_token is None]
        return Traffic(
            seconds=seconds,
            arrived=len(new),
            prompt_tokens=sum(s.request.prompt_len for s in new),
            started=len(started),
            cached_tokens=sum(s.cached_tokens or 0 for s in started),
            finished=len(well),
            output_tokens=tokens,
            failed=len(ended) - len(well),
            queue_s=_since([(s.received, s.prefill_start) for s in started]),
            ttft_s=_since([(s.received, s.first_token) for s in answered]),
            tpot_s=tuple(
                (s.last_token - s.first_token) / (len(s.output) - 1)
                for s in well[:MAX_SAMPLES]
                if s.first_token is not None and s.last_token is not None and len(s.output) > 1
            ),
            waiting=sum(1 for s in self._open if s.attempt is None),
            running=sum(1 for s in self._open if s.attempt is not None),
            oldest_wait_s=max((now - s.received for s in silent), default=0.0),
        )


def _since(pairs: Sequence[tuple[float, float | None]]) -> tuple[float, ...]:
    return tuple(end - begin for begin, end in pairs[:MAX_SAMPLES] if end is not None)


def autoscaled(
    sim: Simulation, jobs: Sequence[Job], config: AutoscaleConfig, limit_s: float, load_s: float = 20.0
) -> tuple[Simulated, Operator]:
    """Serve the jobs on a fleet that the planner changes as it goes."""
    operator = Operator(sim, config, load_s)
    return sim.run(jobs, limit_s), operator
