"""What the cluster shall be, and the edits of it. An operation of an operator or of the planner is one edit; what then
happens follows from `reconcile`, however often the controller dies in between.

Everything here is pure. An edit returns a new `Desired`, or raises and has changed nothing. Whatever the order of
edits, there is always a worker wanted that prefills and one that decodes.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ...common.cluster import Launch
from ...common.config import GatewayConfig, WorkerConfig
from ...common.errors import Conflict, InvalidRequest
from ...common.json_form import from_json, to_json
from ...common.types import Role
from ..launch.launcher import Config, Resources, kind_of
from .planner import AutoscaleConfig


class Leaving(enum.StrEnum):
    """How a worker goes, if it does."""

    NO = ""
    FINISH = "finish"
    """It takes nothing new, and ends when what runs there has ended."""
    MOVE = "move"
    """What runs there moves to other workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Workers that are alike. `worker` is how the next one is configured, but for its name. The planner keeps between
    `min` and `max` workers here."""

    name: str
    worker: WorkerConfig
    resources: Resources
    min: int = 0
    max: int = 64

    @property
    def role(self) -> Role:
        return self.worker.role


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One worker that shall be. `worker` is what its process was launched with, and stays so when it is turned: that it
    is to have another role than it began with follows from its `pool`."""

    name: str
    pool: str
    revision: int
    worker: WorkerConfig
    resources: Resources
    leaving: Leaving = Leaving.NO


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A rolling restart under way (`rollout.py`). `sizes`: workers that each pool had when it began."""

    previous: tuple[Pool, ...]
    previous_revision: int
    sizes: tuple[tuple[str, int], ...]
    back: bool = False
    """It failed, and returns to what was before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """The whole. Assignments are in the order of their age, the oldest first."""

    pools: tuple[Pool, ...]
    assignments: tuple[Assignment, ...] = ()
    gateways: tuple[GatewayConfig, ...] = ()
    revision: int = 1
    rollout: Rollout | None = None
    autoscale: AutoscaleConfig = field(default_factory=AutoscaleConfig)

    def pool(self, name: str) -> Pool:
        """Raises `InvalidRequest` if there is none of this name."""
        for pool in self.pools:
            if pool.name == name:
                return pool
        known = ", ".join(pool.name for pool in self.pools)
        raise InvalidRequest(f"no pool {name!r}; there are {known}", param=name)

    def role(self, assignment: Assignment) -> Role:
        """What it shall do."""
        return self.pool(assignment.pool).role

    @property
    def staying(self) -> tuple[Assignment, ...]:
        return tuple(a for a in self.assignments if not a.leaving)

    def size(self, pool: str) -> int:
        """Workers that this pool shall have."""
        return sum(a.pool == pool for a in self.staying)

    def edit(self, name: str, **changes: object) -> Desired:
        """With one assignment changed."""
        changed = (replace(a, **changes) if a.name == name else a for a in self.assignments)  # type: ignore[arg-type]
        return replace(self, assignments=tuple(changed))


def save(desired: Desired) -> bytes:
    return to_json(desired)


def load(data: bytes) -> Desired:
    """Raises `InvalidRequest` if this was not saved by this version."""
    return from_json(data, Desired)


def launch_order(name: str, config: Config, resources: Resources, threads: int = 1) -> Launch:
    """What the parent is told to keep running. Its digest is the same as long as nothing of it changes."""
    kind, line, needs = kind_of(config), to_json(config), to_json(resources)
    digest = hashlib.blake2b(b"\0".join((kind.encode(), line, needs)), digest_size=16).hexdigest()
    return Launch(name, kind, line, threads, needs, digest)


# --- edits -----------------------------------------------------------------------------------------------------------


def add(desired: Desired, pool: Pool) -> Desired:
    """One more worker, under the smallest number that is free."""
    taken = {a.name for a in desired.assignments}
    name = next(n for i in range(len(taken) + 1) if (n := f"{pool.name}-{i}") not in taken)
    new = Assignment(
        name=name,
        pool=pool.name,
        revision=desired.revision,
        worker=replace(pool.worker, name=name),
        resources=pool.resources,
    )
    return replace(desired, assignments=(*desired.assignments, new))


def gone(desired: Desired, name: str) -> Desired:
    """A worker that was to leave has ended."""
    return replace(desired, assignments=tuple(a for a in desired.assignments if a.name != name))


def drain(desired: Desired, name: str, now: bool) -> Desired:
    """Let this worker go, and start no other for it. `now`: what runs there moves elsewhere. Raises `InvalidRequest` if
    there is no such worker or the cluster needs it, `Conflict` during a rollout."""
    _no_rollout(desired)
    if name not in {a.name for a in desired.assignments}:
        known = ", ".join(a.name for a in desired.assignments)
        raise InvalidRequest(f"no worker {name!r}; there are {known}", param="worker")
    return _usable(desired.edit(name, leaving=Leaving.MOVE if now else Leaving.FINISH), "worker")


def anew(desired: Desired, name: str) -> Desired:
    """Start this worker again, as the workers of its pool are: it would not be turned. Nothing if there is none."""
    for old in desired.assignments:
        if old.name == name:
            pool = desired.pool(old.pool)
            return desired.edit(name, worker=replace(pool.worker, name=name), resources=pool.resources)
    return desired


def untangle(desired: Desired, roles: Mapping[str, Role]) -> Desired:
    """Two workers that shall each take the role that the other one has (`roles`: what they do now) change pools
    instead. It saves two turns, and where they are the only pair, neither could begin."""
    turning = [a for a in desired.staying if roles.get(a.name, desired.role(a)) is not desired.role(a)]
    for one in turning:
        for other in turning:
            mine, its = desired.pool(one.pool), desired.pool(other.pool)
            crossed = roles[one.name] is its.role and roles[other.name] is mine.role
            if crossed and _alike(one, its) and _alike(other, mine):
                swapped = desired.edit(one.name, pool=its.name).edit(other.name, pool=mine.name)
                return untangle(swapped, roles)
    return desired


def scale(desired: Desired, counts: Mapping[str, int], held: Mapping[str, int]) -> tuple[Desired, tuple[str, ...]]:
    """Change the sizes of some pools: by turning workers where that gets closer, then by starting and letting go.
    Returns the steps in words as well.

    held    requests of each worker that is ready. Those that are not ready go first, then those that hold least; of
            these, those that had been turned, and then the youngest.

    Raises `InvalidRequest` where a pool is unknown or would have too many workers, or no worker would prefill or
    decode; `Conflict` during a rollout.
    """
    _no_rollout(desired)
    for name, count in counts.items():
        limit = desired.pool(name).max
        if not 0 <= count <= limit:
            raise InvalidRequest(f"{name}={count} is out of range: 0 to {limit}", param=name)
    wanted = desired
    surplus = [a for name, count in counts.items() for a in _surplus(desired, name, count, held)]
    steps: list[str] = []
    for pool in (desired.pool(name) for name in counts):
        for worker in surplus[:]:
            if wanted.size(pool.name) < counts[pool.name] and _alike(worker, pool):
                surplus.remove(worker)
                wanted = wanted.edit(worker.name, pool=pool.name)
                steps.append(f"turn {worker.name} to {pool.name}")
        while wanted.size(pool.name) < counts[pool.name]:
            wanted = add(wanted, pool)
            steps.append(f"start {wanted.assignments[-1].name}")
    for worker in surplus:  # all of them, before it is asked who stays
        wanted = wanted.edit(worker.name, leaving=Leaving.MOVE)
    for worker in surplus:
        how = Leaving.MOVE if _takers(wanted, worker) else Leaving.FINISH
        wanted = wanted.edit(worker.name, leaving=how)
        steps.append(f"let {worker.name} go, " + ("its requests move" if how is Leaving.MOVE else "when it is done"))
    return _usable(wanted, ", ".join(counts)), tuple(steps)


def _surplus(desired: Desired, pool: str, count: int, held: Mapping[str, int]) -> list[Assignment]:
    youngest_first = [a for a in desired.staying if a.pool == pool][::-1]
    by_loss = sorted(youngest_first, key=lambda a: (held.get(a.name, -1), a.worker.role is desired.role(a)))
    return by_loss[: max(0, len(by_loss) - count)]


def _alike(worker: Assignment, pool: Pool) -> bool:
    """Whether a worker can be turned into one of this pool: all is equal but names, role, and its share of threads."""

    def core(config: WorkerConfig) -> WorkerConfig:
        return replace(config, name="", role=Role.COLOCATED, engine=replace(config.engine, threads=0))

    return core(worker.worker) == core(pool.worker) and replace(worker.resources, pool="") == replace(
        pool.resources, pool=""
    )


def _takers(desired: Desired, leaver: Assignment) -> bool:
    """Whether another worker stays to which what runs there can move: one that decodes, with the same numbers."""

    def numbers(config: WorkerConfig) -> tuple[str, str, bool]:
        return config.engine.model, config.engine.dtype, config.engine.dummy_weights

    stay = (a for a in desired.staying if numbers(a.worker) == numbers(leaver.worker))
    return not desired.role(leaver).decodes or any(desired.role(a).decodes for a in stay)


def _usable(desired: Desired, param: str) -> Desired:
    roles = [desired.role(a) for a in desired.staying]
    for does, what in SIDES:
        if not any(map(does, roles)):
            raise InvalidRequest(f"no worker would {what}", param=param)
    return desired


def _no_rollout(desired: Desired) -> None:
    if desired.rollout is not None:
        raise Conflict("a rollout is under way; wait until it has ended (`baton status` shows how far it is)")


def covered(roles: Iterable[Role], role: Role) -> bool:
    """Whether each side of a pair that `role` takes is taken by one of `roles` as well."""
    others = list(roles)
    return all(any(map(does, others)) for does, _ in SIDES if does(role))


SIDES: tuple[tuple[Callable[[Role], bool], str], ...] = (
    (lambda role: role.prefills, "prefill"),
    (lambda role: role.decodes, "decode"),
)
"""What a cluster needs at least one worker for, each."""
