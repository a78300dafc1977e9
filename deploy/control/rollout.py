"""A rolling restart, as edits of what is desired: new workers beside the old ones first, then the old ones go.

In each pool one worker is started beyond its size, in all pools at once. When all new workers are ready, one old
worker of each pool takes nothing new any more and ends when it is done, and the next new one is started in its place.
The last old workers of all pools go together: workers of two generations never hand over to each other, so a generation
that lacks one of its halves is of no use. A rollout that fails is one back to what was before.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

from ...common.cluster import Phase
from ...common.errors import Conflict
from .desired import Assignment, Desired, Leaving, Pool, Rollout, add
from .reconcile import World

STALL_S = 600.0
"""How long new workers may make no progress before a rollout is taken back."""


def begin(desired: Desired, pools: tuple[Pool, ...]) -> Desired:
    """All workers shall be replaced by those that `pools` describe, which have the names of the pools that there are.
    Raises `Conflict` if one is under way; but one that failed and finds no way back either may be replaced."""
    if desired.rollout is not None and not desired.rollout.back:
        raise Conflict("a rollout is under way already")
    sizes = tuple((pool.name, desired.size(pool.name)) for pool in desired.pools)
    if desired.rollout is not None:
        sizes = desired.rollout.sizes
    rollout = Rollout(previous=desired.pools, previous_revision=desired.revision, sizes=sizes)
    revision = 1 + max([desired.revision, *(a.revision for a in desired.assignments)])
    return replace(desired, pools=pools, revision=revision, rollout=rollout)


def abort(desired: Desired) -> Desired:
    """The new workers will not do: return to what was before. Old workers that were about to leave stay, as many as the
    pools had. Does nothing if that is under way already."""
    rollout = desired.rollout
    if rollout is None or rollout.back:
        return desired
    back = replace(rollout, previous=desired.pools, previous_revision=desired.revision, back=True)
    desired = replace(desired, pools=rollout.previous, revision=rollout.previous_revision, rollout=back)
    for worker in desired.assignments:
        if worker.leaving and worker.revision == desired.revision and _missing(desired, worker.pool) > 0:
            desired = desired.edit(worker.name, leaving=Leaving.NO)
    return desired


def advance(desired: Desired, ready: Set[str], lost: Set[str] = frozenset()) -> Desired:
    """What can be done now, given who is ready and who was given up. To be called again and again; when it is over,
    `rollout` is None."""
    rollout = desired.rollout
    if rollout is None:
        return desired
    if rollout.back:  # what failed is replaced at once where it serves nobody
        for worker in _outdated(desired):
            if worker.name not in ready:
                desired = desired.edit(worker.name, leaving=Leaving.MOVE)
                if _missing(desired, worker.pool) > 0:
                    desired = add(desired, desired.pool(worker.pool))
        ready = ready | lost  # nobody waits for an old one that cannot be kept running, new ones or not
    if waits_for(desired, ready):
        return desired
    fronts = [_Front.of(desired, pool) for pool, _ in rollout.sizes]
    if all(front.over for front in fronts):
        return replace(desired, rollout=None)
    last = all(front.at_last for front in fronts)
    for front in fronts:
        desired = front.advance(desired, last)
    return desired


def waits_for(desired: Desired, ready: Set[str]) -> tuple[str, ...]:
    """New workers that are not ready yet: without them nothing goes on."""
    if desired.rollout is None:
        return ()
    return tuple(worker.name for worker in _current(desired) if worker.name not in ready)


class Patience:
    """Tells when a rollout has failed: a new worker was given up, or none of them gets any further."""

    def __init__(self) -> None:
        self._seen: object = None
        self._since = 0.0

    def failure(self, desired: Desired, world: World, ready: Set[str], now: float) -> str:
        """Why it must be taken back; empty: it need not."""
        waits = waits_for(desired, ready)
        words = [world.words.get(name) for name in waits]
        seen = desired, waits, [None if word is None else (word.state, word.progress) for word in words]
        if not waits or seen != self._seen:
            self._seen, self._since = seen, now
        for name in waits:
            if name in world.processes and world.processes[name].phase is Phase.GIVEN_UP:
                return f"{name} cannot be kept running"
        return f"no progress for {STALL_S:.0f} s" if now - self._since > STALL_S else ""


def progress(desired: Desired, ready: Set[str]) -> str:
    """How far it is, in words; empty: there is none."""
    if desired.rollout is None:
        return ""
    total = sum(size for _, size in desired.rollout.sizes)
    what = "failed, back to" if desired.rollout.back else "to"
    done = sum(worker.name in ready for worker in _current(desired))
    return f"{what} revision {desired.revision}: {min(done, total)} of {total} workers ready"


@dataclass(frozen=True, slots=True)
class _Front:
    """How far one pool is. `missing`: new workers that are still to come; `going`: an old one is about to end."""

    pool: str
    missing: int
    old: tuple[Assignment, ...]
    going: bool

    @classmethod
    def of(cls, desired: Desired, pool: str) -> _Front:
        return cls(
            pool=pool,
            missing=_missing(desired, pool),
            old=tuple(a for a in _outdated(desired) if a.pool == pool),
            going=any(a.pool == pool and a.leaving and a.revision != desired.revision for a in desired.assignments),
        )

    @property
    def at_last(self) -> bool:
        return self.missing <= 0 and len(self.old) <= 1 and not self.going

    @property
    def over(self) -> bool:
        return self.at_last and not self.old

    def advance(self, desired: Desired, last: bool) -> Desired:
        if self.going:  # one at a time: the next may need the room of this one
            return desired
        if self.missing > 0 and len(self.old) <= self.missing:  # there are no more than the size of the pool, yet
            return add(desired, desired.pool(self.pool))
        if self.old and (last or len(self.old) > 1):
            return desired.edit(self.old[0].name, leaving=Leaving.FINISH)
        return desired


def _missing(desired: Desired, pool: str) -> int:
    """Workers of the revision under way that are still to come; less than 0: there are more than the pool had."""
    assert desired.rollout is not None
    return dict(desired.rollout.sizes)[pool] - sum(a.pool == pool for a in _current(desired))


def _current(desired: Desired) -> list[Assignment]:
    return [a for a in desired.staying if a.revision == desired.revision]


def _outdated(desired: Desired) -> list[Assignment]:
    return [a for a in desired.staying if a.revision != desired.revision]
