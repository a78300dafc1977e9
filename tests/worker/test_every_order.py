"""The real roles of a source and a target in every order of messages that fits the search: none lost, doubled, late,
overtaken, or with a worker dying between, breaks a rule of the handover."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from baton.common.messages import Abort, Commit, Failed, Finished, HandedOver, Move, Reserve, Stayed, Submit
from baton.common.types import Role
from baton.engine.mailbox import FromRouter
from tests.toy import logprob, oracle, request
from tests.worker.world import LEASE_S, World

PROMPT = list(range(20, 25))  # a full block and a partial one
LENGTH = 5
EXPECTED = [*PROMPT, *oracle(PROMPT, 2 * LENGTH)]

Step = list[Any]


def begin(source: Role, transport: str, length: int = LENGTH, overlap: bool = False) -> World:
    """A request is at the source; if that decodes, it is told to let it go."""
    world = World(source, transport, overlap)
    what = request("r", PROMPT, length, logprobs=0)
    if source is Role.PREFILL:
        world.source.post(FromRouter("router", Submit(1, 1, what, world.target.own.ref)))
    else:
        world.source.post(FromRouter("router", Submit(1, 1, what)))
        while not world.source.tokens:
            world.source.step()
        world.source.post(FromRouter("router", Move(1, world.target.own.ref)))
    world.target.step()
    return world


def rules(world: World) -> None:
    """What holds at all times."""
    for bench in (world.source, world.target):
        for token in bench.tokens:
            assert token.token == EXPECTED[token.position], f"{bench.own.ref.name} read what was not there"
            assert token.logprob == logprob(token.position, token.token)
    drawn = [t.position for t in world.target.tokens]
    assert drawn == list(range(drawn[0], drawn[0] + len(drawn))) if drawn else True, "once each, in order"
    assert not (world.source.running and world.target.running), "both go on with it"
    if world.source.heard(HandedOver):
        assert world.target.tokens or not world.target.alive, "the target has it"
    assert len(world.source.heard(HandedOver)) + len(world.source.heard(Failed)) <= 1, "one word on it"


def ends(world: World, history: list[Step]) -> None:
    """Nothing arrives any more: everything that waits stops waiting, and whoever has the request goes on with it."""
    world.silence()
    for _ in range(2 * LENGTH + 3):
        world.wait(1.01 * LEASE_S)
        world.silence()
    rules(world)
    for bench in (world.source, world.target):
        report = bench.loop.inspect()
        if bench.alive:
            assert report.handovers == report.reserved_blocks == report.sequences == 0, (bench.own.ref.name, history)
            assert report.free_blocks + report.cached_blocks == report.total_blocks
    got = bool(world.target.heard(Finished))
    kept = bool(world.source.heard(Finished))
    assert not (got and kept), "both went on with it"
    if world.source.alive and not world.cancelled:
        words = [type(w) for w in world.source.said if isinstance(w, HandedOver | Failed | Finished)]
        assert len(words) == 1, ("the router is told once", words, history)


@dataclass
class Search:
    """Depth first over all that can happen within a budget of faults. A path is played again from its beginning for
    each turn that it takes."""

    source: Role
    transport: str
    seen: set[str] = field(default_factory=set)
    ended: int = 0
    handed_over: int = 0

    def run(self, budget: int) -> None:
        work: list[tuple[list[Step], int]] = [([], budget)]
        while work:
            path, left = work.pop()
            with begin(self.source, self.transport) as world:
                for step in path:
                    world.play(*step)
                key = repr((*world.key(), left))
                if key in self.seen:
                    continue
                self.seen.add(key)
                rules(world)
                work += [([*path, step], left - cost) for *step, cost in world.moves() if cost <= left]
                self.handed_over += bool(world.source.heard(HandedOver))
                ends(world, path)
            self.ended += 1


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of handovers fail here on purpose."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("source", "transport", "faults"),
    [(Role.PREFILL, "tcp", 1), (Role.PREFILL, "shm", 1), (Role.COLOCATED, "tcp", 1), (Role.COLOCATED, "shm", 1)],
)
def test_every_order(source: Role, transport: str, faults: int) -> None:
    search = Search(source, transport)
    search.run(faults)
    assert search.handed_over > 5 and search.ended > 200


def _likely(what: str, where: str, which: int, cost: int) -> float:
    """So that most get far: faults are rare, and the source does not run ahead of its messages."""
    return 0.5 if cost else 1.0 if what == "step" else 20.0


@pytest.mark.parametrize("source", [Role.PREFILL, Role.COLOCATED])
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_many_faults_at_random(source: Role, transport: str) -> None:
    handed_over = 0
    for seed in range(400):
        rng = random.Random(seed)
        budget, path = rng.randrange(6), list[Step]()
        with begin(source, transport, 2 * LENGTH, overlap=seed % 2 == 1) as world:
            while moves := [move for move in world.moves() if move[-1] <= budget and len(path) < 40]:
                *step, cost = rng.choices(moves, [_likely(*move) for move in moves])[0]
                budget -= cost
                path.append(step)
                world.play(*step)
                rules(world)
            handed_over += bool(world.source.heard(HandedOver))
            ends(world, path)
    assert 40 < handed_over < 400


def test_what_has_ended_has_no_second_life() -> None:
    """The reservation comes twice, the second time after the target gave it up; then come the bytes, the commit, and
    only then the target's abort, by which the source believes that it may go on."""
    with begin(Role.COLOCATED, "tcp", 2 * LENGTH) as world:
        world.play("double", "control", 0)
        world.play("deliver", "answer", 0)
        world.play("wait", "", 60)
        while len(world.source.to_targets) == 1:
            world.play("step", "source", 0)
        world.play("wait", "", 60)
        assert [type(m) for m in world.source.to_targets] == [Reserve, Commit]
        assert [type(m) for m in world.target.to_sources] == [Abort]
        for channel in ("control", "frame", "control", "answer"):
            while world.channels[channel][0]:
                world.play("deliver", channel, 0)
                rules(world)
                if channel == "control" and world.source.frames.flying:
                    break
        assert world.source.running and not world.target.running
        ends(world, [])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_source_that_decodes_does_not_trust_what_it_sent_damaged(overlap: bool) -> None:
    """The memory went wrong, not the wire: the request stays, and its KV is computed again before the next token. One
    that was drawn from the damaged KV, and is not known yet, nobody hears of."""
    with begin(Role.COLOCATED, "tcp", 2 * LENGTH, overlap) as world:
        world.play("deliver", "control", 0)
        world.play("deliver", "answer", 0)
        header, data = world.source.frames.flying[0]
        world.source.frames.flying[0] = (header, bytes([data[0] ^ 1]) + data[1:])
        world.play("deliver", "frame", 0)
        (abort,) = world.target.to_sources
        assert isinstance(abort, Abort) and abort.code == "corrupt_block"
        block = next(s for role in world.source.roles for s in role.sequences()).blocks[0]
        world.source.pool.bytes[header.layer, block] ^= 1
        world.play("deliver", "answer", 0)
        assert world.source.heard(Stayed)
        ends(world, [])
        assert [t.position for t in world.source.tokens][-1] == len(EXPECTED) - 1


@pytest.mark.parametrize("overlap", [False, True])
def test_who_moves_draws_nothing_more_once_the_commit_is_out(overlap: bool) -> None:
    with begin(Role.COLOCATED, "tcp", 2 * LENGTH, overlap) as world:
        source = world.source
        for channel in ("control", "answer"):
            world.play("deliver", channel, 0)
        while world.source.frames.flying:
            world.play("deliver", "frame", 0)
        while not source.to_targets:
            source.step()
        (commit,), known = source.to_targets, source.tokens[-1].position
        assert isinstance(commit, Commit) and commit.tokens[-1].position == known
        for _ in range(3):
            source.step()
        assert source.tokens[-1].position == known


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("reserved", [False, True])
def test_who_is_preempted_on_its_way_stays_and_says_so(reserved: bool, overlap: bool) -> None:
    """The router waits for a word on the move, or it would never move that request again."""
    with World(Role.COLOCATED, "tcp", overlap) as world:
        source, target, table = world.source, world.target, world.source.context.table
        for ticket, length in ((1, 30), (2, 20)):
            prompt = [ticket, *PROMPT]
            source.post(FromRouter("router", Submit(ticket, 1, request(str(ticket), prompt, length))))
        while table.manager.available > 1:
            source.step()
        source.post(FromRouter("router", Move(2, target.own.ref)))
        if reserved:
            world.play("deliver", "control", 0)
            world.play("deliver", "answer", 0)
        assert not source.heard(Stayed)
        while not source.loop.inspect().preemptions:
            source.step()
        (stayed,) = source.heard(Stayed)
        assert stayed.ticket == 2 and len(source.roles[1]._moves) == 0  # type: ignore[attr-defined]
        while world.channels["control"][0]:
            world.play("deliver", "control", 0)
        assert target.loop.inspect().handovers == 0
        world.silence()
        while len(source.heard(Finished)) < 2:
            source.step()
        for ticket, length in ((1, 30), (2, 20)):
            prompt = [ticket, *PROMPT]
            assert [t.token for t in source.tokens if t.ticket == ticket] == oracle(prompt, length)
        assert not target.tokens
