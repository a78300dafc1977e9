"""From what shall be and what is to what must be done. Pure, and to be asked again each round: what was asked for and
has not come about yet is asked for again, and where nothing is to be done nothing is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...common.cluster import End, Launch, Phase, ProcessStatus, WorkerState, WorkerStatus
from ...common.types import Role
from ..launch.launcher import Resources
from .desired import Assignment, Desired, Leaving, covered, launch_order

LEAVE_GRACE_S = 5.0
"""What a worker gets beyond its own `drain_s` before it is killed."""
GATEWAY_GRACE_S = 5.0
STOP_S = 5.0
"""What a worker gets that holds no request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is, as far as it is known.

    processes   of the parent, by name: workers and gateways
    words       what each worker said last of itself, as long as the process that said it lives
    silence     workers that live and have not been heard of for too long
    settled     workers that have said something since gateways know what they shall know of them
    turning     workers that have been told to turn and have not answered yet, or shall not be asked again so soon
    """

    processes: Mapping[str, ProcessStatus]
    words: Mapping[str, WorkerStatus]
    silence: frozenset[str] = frozenset()
    settled: frozenset[str] = frozenset()
    turning: frozenset[str] = frozenset()

    def is_ready(self, name: str) -> bool:
        word, process = self.words.get(name), self.processes.get(name)
        lives = process is not None and process.phase is Phase.RUNNING
        return lives and name not in self.silence and word is not None and word.state is WorkerState.READY

    def roles(self) -> dict[str, Role]:
        """What each worker that is ready does now."""
        return {name: Role(word.role) for name, word in self.words.items() if self.is_ready(name)}

    def held(self, name: str) -> int:
        """Requests that a worker holds, as it said last."""
        word = self.words.get(name)
        return word.load.running + word.load.waiting if word is not None and word.load is not None else 0


@dataclass(frozen=True, slots=True)
class TurnWorker:
    """Ask a worker to take another role."""

    name: str
    address: str
    role: Role


@dataclass(frozen=True, slots=True)
class Forget:
    """A worker that was to leave has ended: it is wanted no more."""

    name: str


Action = Launch | End | TurnWorker | Forget


def serving(desired: Desired, world: World) -> frozenset[str]:
    """Workers that are ready, stay, and have the role that they shall have."""
    return frozenset(a.name for a in desired.staying if world.is_ready(a.name) and not _turns(desired, world, a))


def departing(desired: Desired, world: World) -> frozenset[str]:
    """Workers that are to leave or to turn, and may: what they do now is done by another one as well. The others wait
    until it is, so that nothing that anybody asks for can leave a cluster without a ready pair."""
    known = {a.name for a in desired.assignments}
    roles = {name: role for name, role in world.roles().items() if name in known}
    turning = [a.name for a in desired.assignments if _turns(desired, world, a)]
    leaving = [a.name for a in desired.assignments if a.leaving]
    may: set[str] = set()
    for name in (*turning, *leaving):  # whoever turns may be the one that another waits for
        role = roles.pop(name, None)
        if role is None or covered(roles.values(), role):
            may.add(name)
        else:
            roles[name] = role
    return frozenset(may)


def members(desired: Desired, world: World) -> tuple[WorkerStatus, ...]:
    """The workers as gateways shall see them: what each says of itself, but that one which is about to leave or to
    turn, or is being ended, takes nothing new. Without loads, which change all the time."""
    depart = departing(desired, world)
    rows = []
    for assignment in desired.assignments:
        word = world.words.get(assignment.name)
        if word is None:
            continue
        state = word.state
        if state is WorkerState.READY and (assignment.name in depart or not world.is_ready(assignment.name)):
            state = WorkerState.DRAINING if assignment.leaving is Leaving.FINISH else WorkerState.LEAVING
        rows.append(replace(word, state=state, load=None, progress=0.0))
    return tuple(rows)


def reconcile(desired: Desired, world: World) -> tuple[Action, ...]:
    """What is to be done now. Processes that nobody wants end; so do workers that are silent for too long, which are
    started again in the next round."""
    wanted = {a.name for a in desired.assignments} | {g.name for g in desired.gateways}
    actions: list[Action] = [
        End(name, STOP_S)
        for name, process in world.processes.items()
        if name not in wanted and process.phase is not Phase.ENDING
    ]
    for gateway in desired.gateways:
        order = launch_order(gateway.name, gateway, Resources())
        actions += _keep(order, world.processes.get(gateway.name), gateway.drain_s + GATEWAY_GRACE_S)
    depart = departing(desired, world)
    for assignment in desired.assignments:
        if assignment.leaving:
            actions += _leave(assignment, world, assignment.name in depart)
        else:
            actions += _stay(desired, world, assignment, assignment.name in depart)
    return tuple(actions)


def worker_order(assignment: Assignment) -> Launch:
    """What the parent is told of a worker."""
    worker = assignment.worker
    return launch_order(assignment.name, worker, assignment.resources, worker.engine.threads)


def _keep(order: Launch, process: ProcessStatus | None, within_s: float) -> list[Action]:
    """One process with one configuration: where another runs under the name, that ends first."""
    if process is None:
        return [order]
    if process.config != order.digest and process.phase is not Phase.ENDING:
        return [End(order.name, within_s)]
    return []


def _leave(assignment: Assignment, world: World, may: bool) -> list[Action]:
    name, process = assignment.name, world.processes.get(assignment.name)
    if process is None:
        return [Forget(name)]
    if process.phase is Phase.ENDING:
        return []
    if not world.is_ready(name):
        return [End(name, STOP_S)]
    if may and (assignment.leaving is Leaving.MOVE or (name in world.settled and not world.held(name))):
        return [End(name, assignment.worker.drain_s + LEAVE_GRACE_S)]
    return []


def _stay(desired: Desired, world: World, assignment: Assignment, may: bool) -> list[Action]:
    name, process = assignment.name, world.processes.get(assignment.name)
    if actions := _keep(worker_order(assignment), process, assignment.worker.drain_s + LEAVE_GRACE_S):
        return actions
    if name in world.silence:
        return [End(name, 0.0)]
    if may and name not in world.turning:
        return [TurnWorker(name, world.words[name].address, desired.role(assignment))]
    return []


def _turns(desired: Desired, world: World, assignment: Assignment) -> bool:
    """Whether it is ready, but has the role that it had before."""
    is_other = world.is_ready(assignment.name) and world.words[assignment.name].role != desired.role(assignment)
    return is_other and not assignment.leaving
