"""The handover's two state machines, explored together: every order of messages, losses and deaths that fits the
search, against the rules that must always hold."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.common.messages import Commit, TokenOut
from baton.kvtransfer.session import SourceHandover, State, TargetHandover

COMMIT = Commit(1, (TokenOut(1, 9, 5),), 1.0)
LEASE = 5.0


def pair() -> tuple[SourceHandover, TargetHandover]:
    return SourceHandover(LEASE, LEASE), TargetHandover(LEASE, LEASE)


@dataclass
class World:
    """Both sides and the messages between them; a message may be lost, doubled or overtaken, and either side may die,
    unnoticed by the other."""

    source: SourceHandover
    target: TargetHandover
    to_target: list[str] = field(default_factory=list)
    to_source: list[str] = field(default_factory=lambda: ["reserved"])
    sent_all: bool = False
    now: float = 0.0
    doubled: int = 0
    renewed: bool = False
    dead: frozenset[str] = frozenset()
    arrived: frozenset[str] = frozenset()

    def fork(self) -> World:
        """One that goes its own way from here."""
        twin = copy.copy(self)
        twin.source, twin.target = copy.copy(self.source), copy.copy(self.target)
        twin.to_target, twin.to_source = self.to_target.copy(), self.to_source.copy()
        return twin

    def moves(self) -> list[tuple[str, int]]:
        moves = [("deliver_t", i) for i in range(len(self.to_target))]
        moves += [("deliver_s", i) for i in range(len(self.to_source))]
        moves += [("lose_t", i) for i in range(len(self.to_target))]
        moves += [("lose_s", i) for i in range(len(self.to_source))]
        if self.doubled < 1:
            moves += [("double_t", i) for i in range(len(self.to_target))]
            moves += [("double_s", i) for i in range(len(self.to_source))]
        if self.source.state is State.SENDING and not self.sent_all:
            moves.append(("send", 0))
        if not self.dead:
            moves += [("source_dies", 0), ("target_dies", 0)]
        if not self.renewed and "source" not in self.dead and not self.source.state.final:
            moves.append(("renew", 0))
        return [*moves, ("source_aborts", 0), ("target_aborts", 0), ("time", 0)]

    def play(self, move: str, index: int) -> None:
        match move:
            case "deliver_t":
                self._target_gets(self.to_target.pop(index))
            case "deliver_s":
                self._source_gets(self.to_source.pop(index))
            case "double_t":
                self.doubled += 1
                self.to_target.append(self.to_target[index])
            case "double_s":
                self.doubled += 1
                self.to_source.append(self.to_source[index])
            case "lose_t":
                self.to_target.pop(index)
            case "lose_s":
                self.to_source.pop(index)
            case "source_dies" | "target_dies":
                self.dead |= {move.removesuffix("_dies")}
            case "renew":
                self.renewed = True
                self.to_target.append("renew")
            case "send" if "source" not in self.dead:
                self.sent_all = True
                self.to_target += ["bytes 0", "bytes 1"]
                if self.source.commit(self.now):
                    self.to_target.append("commit")
            case "source_aborts":
                if "source" not in self.dead and self.source.abort():
                    self.to_target.append("abort")
            case "target_aborts":
                if "target" not in self.dead and self.target.abort():
                    self.to_source.append("abort")
            case "time":
                self.now += LEASE
                if "source" not in self.dead and self.source.overdue(self.now) and self.source.abort():
                    self.to_target.append("abort")
                if "target" not in self.dead and self.target.expired(self.now) and self.target.abort():
                    self.to_source.append("abort")

    def _target_gets(self, message: str) -> None:
        if "target" in self.dead:
            return
        match message:
            case "bytes 0" | "bytes 1":
                self.target.fed(self.now)
                self.arrived |= {message}
                if len(self.arrived) == 2:
                    self.target.fill()
            case "renew":
                self.target.alive(self.now)
            case "commit":
                self.target.commit(COMMIT)
            case "abort":
                self.target.abort()
        if self.target.conclude() is not None:
            self.to_source.append("committed")

    def _source_gets(self, message: str) -> None:
        if "source" in self.dead:
            return
        match message:
            case "reserved":
                self.source.reserved(0)
            case "committed":
                self.source.committed()
            case "abort":
                self.source.abort()

    def key(self) -> tuple[object, ...]:
        sides = (self.source.state, self.target.state, self.target.filled, self.target.pending is not None)
        return (
            *sides,
            tuple(self.to_target),
            tuple(self.to_source),
            self.sent_all,
            self.now,
            self.doubled,
            self.arrived,
            self.renewed,
            self.dead,
            self.source.due,
            self.target.expires,
        )

    @property
    def at_rest(self) -> bool:
        """Nobody waits: whoever lives is done, or computes and owes the next word itself."""
        source = self.source.state.final or self.source.state is State.SENDING or "source" in self.dead
        return source and (self.target.state.final or "target" in self.dead)


def test_every_reachable_state() -> None:
    """Breadth-first over all interleavings with two leases' time. The source believes in a commit only if the
    target made it; final states are final; after silence of a lease both sides are at rest."""
    frontier, seen = [World(*pair())], set()
    commits = 0
    while frontier:
        world = frontier.pop()
        if world.key() in seen:
            continue
        seen.add(world.key())
        if world.source.state is State.COMMITTED:
            commits += 1
            assert world.target.state is State.COMMITTED
        quiet = world.fork()
        quiet.to_source.clear()
        quiet.to_target.clear()
        while not quiet.at_rest:
            assert quiet.now <= world.now + 2 * LEASE, "somebody waits for ever"
            quiet.play("time", 0)
            quiet.to_source.clear()
            quiet.to_target.clear()
        if world.now > LEASE:
            continue
        for move, index in world.moves():
            following = world.fork()
            following.play(move, index)
            for before, after in ((world.source, following.source), (world.target, following.target)):
                assert not before.state.final or after.state is before.state
            frontier.append(following)
    assert commits > 0 and len(seen) > 2000


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["fed", "fill", "commit", "conclude", "abort", "alive"]), max_size=12))
def test_target_commits_once_and_only_when_complete(calls: list[str]) -> None:
    target = TargetHandover(LEASE, LEASE)
    concluded = 0
    for call in calls:
        match call:
            case "commit":
                target.commit(COMMIT)
            case "fed" | "alive":
                getattr(target, call)(1.0)
            case "conclude":
                complete = target.filled and target.pending is not None and not target.state.final
                assert (target.conclude() is not None) == complete
                concluded += complete
            case _:
                getattr(target, call)()
    assert concluded <= 1
    assert (target.state is State.COMMITTED) == (concluded == 1)


def test_a_source_that_computes_is_not_overdue() -> None:
    source, _ = pair()
    assert source.overdue(LEASE)
    source.reserved(2)
    assert not source.overdue(100 * LEASE) and source.skip == 2
    source.commit(100.0)
    assert not source.overdue(100.0) and source.overdue(100.0 + LEASE)
    source.moving(103.0)  # a slow wire is not a dead one
    assert not source.overdue(100.0 + LEASE) and source.overdue(103.0 + LEASE)


def test_renewal_and_bytes_extend_the_lease() -> None:
    _, target = pair()
    target.alive(3.0)
    assert not target.expired(7.9) and target.expired(8.0)
    target.fed(6.0)
    assert target.state is State.SENDING and not target.expired(10.9)
