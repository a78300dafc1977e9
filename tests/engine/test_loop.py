"""What the loop measures of its steps, and what it does when they fail."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest

from baton.common.clock import ManualClock
from baton.common.config import HandoverConfig
from baton.common.errors import EngineBroken, EngineFailure
from baton.common.hashing import BlockHasher
from baton.decode.role import DecodeRole
from baton.engine.block_table import BlockTable
from baton.engine.loop import EngineLoop
from baton.engine.mailbox import Inbox, InboxItem, Mail, Outbox, Recast
from baton.engine.plan import Launched, OnLayer, Results, Runner, StepPlan
from baton.engine.role import Computeless, Context, Limits
from baton.engine.sequence import Sequence
from tests.toy import endpoint, request

NOBODY: Any = Mock()


class Timed:
    """A runner whose steps take these times, one after the other, on a device of its own."""

    def __init__(self, clock: ManualClock, seconds: list[float]) -> None:
        self._clock = clock
        self._end = 0.0
        self.seconds = seconds

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Launched:
        self._end = max(self._end, self._clock.now()) + self.seconds.pop(0)
        return Ending(self._clock, self._end, len(plan))


@dataclass
class Ending:
    clock: ManualClock
    end: float
    slices: int

    def results(self) -> Results:
        self.clock.advance(max(0.0, self.end - self.clock.now()))
        return Results([1] * self.slices)


class Failing:
    """A runner whose every step fails."""

    def __init__(self, error: EngineFailure) -> None:
        self._error = error

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Launched:
        raise self._error


def decoding(
    runner: Runner, clock: ManualClock, mail: list[Mail], streams: int = 1, overlap: bool = False, num_blocks: int = 64
) -> EngineLoop:
    """A loop over a decode worker's role, in whose batch are these many requests."""
    table = BlockTable(num_blocks, BlockHasher(16))
    limits = Limits(
        vocab_size=1000, eos_ids=frozenset(), max_model_len=1000, max_batch_tokens=64, max_running=8, max_waiting=8
    )  # fmt: skip
    context = Context(
        endpoint=endpoint("w"), table=table, outbox=Outbox(), limits=limits, handover=HandoverConfig(),
    )  # fmt: skip
    context.outbox.routers.add("router")
    role = DecodeRole(context, NOBODY, NOBODY)
    for number in range(streams):
        sequence = Sequence(("router", number), request("r", [1, 2, 3], 500), 1, 0.0, 1e9)
        assert table.admit(sequence, 0, 3)
        table.advance(sequence, 3)
        sequence.tokens.append(4)
        role.join(sequence)
    return EngineLoop(context, [role], runner, Inbox(), clock, mail.append, overlap)


def decode_step_s(seconds: list[float], overlap: bool = False) -> float:
    """What the loop says of one stream's steps that took these times."""
    clock = ManualClock()
    runner = Timed(clock, list(seconds))
    loop = decoding(runner, clock, [], overlap=overlap)
    while runner.seconds:
        assert loop.step()
    return loop.load().decode_step_s


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_takes_as_long_as_the_device_is_at_it(overlap: bool) -> None:
    """Not as long as it waits for the step before."""
    assert decode_step_s([0.01] * 10, overlap) == pytest.approx(0.01)


def test_a_frozen_step_is_soon_forgotten() -> None:
    """A worker that was stopped for seconds must not look slow for ever: nobody would ask it again."""
    assert decode_step_s([0.01] * 10 + [60.0]) < 0.02
    assert decode_step_s([0.01] * 10 + [60.0] + [0.01] * 10) < 0.011


def test_steps_that_become_slower_for_good_are_believed() -> None:
    assert decode_step_s([0.01] * 10 + [1.0] * 30) > 0.9


def test_a_broken_engine_ends_the_loop_at_once_and_its_requests_are_told() -> None:
    mail: list[Mail] = []
    loop = decoding(Failing(EngineBroken("a rank is gone")), ManualClock(), mail, streams=2)
    with pytest.raises(EngineBroken, match="a rank is gone"):
        loop.step()
    failed = [failure for each in mail for report in each.reports.values() for failure in report.failed]
    assert len(failed) == 2


class Cramped(Computeless):
    """A role that has no room for another step while one is under way."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self.seen: list[str] = []

    def receive(self, item: InboxItem, now: float) -> None: ...

    def plan(self, plan: StepPlan, now: float) -> None:
        self.seen.append("short" if plan.ahead else "plan")
        if plan.ahead:
            plan.short = True
        else:
            plan.add(self._sequence, 1)

    def computed(self, sequences: list[Sequence], results: Results, now: float) -> None:
        self.seen.append("computed")
        for sequence, token in zip(sequences, results.tokens, strict=True):
            sequence.tokens += [] if token is None else [token]


def test_a_plan_that_lacks_room_is_made_again_when_nothing_is_under_way() -> None:
    clock = ManualClock()
    loop = decoding(Timed(clock, [0.1] * 9), clock, [], overlap=True)
    role = Cramped(loop.context.table.holders()[0])
    loop.roles = [role]
    for _ in range(3):
        assert loop.step()
    assert role.seen == ["plan", "short", "computed", "plan", "short", "computed", "plan"]


class Noted(Timed):
    """Writes down what the loop does with it."""

    def __init__(self, clock: ManualClock, order: list[str]) -> None:
        super().__init__(clock, [0.1] * 9)
        self._order = order

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Launched:
        self._order.append("launch")
        launched = super().launch(plan, on_layer)

        def results() -> Results:
            self._order.append("wait")
            return launched.results()

        return Mock(results=results)


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [(False, ["launch", "wait", "tell"] * 3), (True, ["launch", "launch", "wait", "launch", "tell", "wait"])],
)
def test_what_a_step_drew_is_told_before_the_loop_waits_again(overlap: bool, expected: list[str]) -> None:
    clock, order = ManualClock(), list[str]()
    loop = decoding(Noted(clock, order), clock, [], overlap=overlap)
    loop._deliver = lambda mail: order.append("tell")
    for _ in range(3):
        loop.step()
    assert order == expected


def test_who_waits_for_room_has_told_before() -> None:
    """Two streams in two blocks: when the first is full, the step under way must end before one of them may go."""
    clock, order = ManualClock(), list[str]()
    runner = Noted(clock, order)
    runner.seconds = [0.1] * 20
    loop = decoding(runner, clock, [], streams=2, overlap=True, num_blocks=2)
    loop._deliver = lambda mail: order.append("tell")
    while not loop.load().preemptions:
        loop.step()
    assert ("wait", "wait") not in pairwise([what for what in order if what != "launch"])


def test_a_step_that_fails_is_not_the_end() -> None:
    loop = decoding(Failing(EngineFailure("out of memory")), ManualClock(), [])
    assert loop.step()
    assert not loop.step()


def recast(loop: EngineLoop, until: float) -> list[bool]:
    """Ask for another role until then; what is answered."""
    said: list[bool] = []
    loop.inbox.post(Recast(list, until, said.append))
    return said


def test_roles_change_when_nothing_is_held_or_not_at_all() -> None:
    clock = ManualClock()
    loop = decoding(Timed(clock, [0.1] * 10), clock, [])
    said, roles = recast(loop, until=clock.now() + 0.25), loop.roles
    for _ in range(3):
        loop.step()
    assert said == [] and loop.roles is roles
    loop.step()
    assert said == [False] and loop.roles is roles
    loop = decoding(Timed(clock, []), clock, [], streams=0)
    said = recast(loop, until=clock.now() + 0.25)
    loop.step()
    assert said == [True] and loop.roles == []


def test_a_loop_that_slept_over_its_time_to_change_does_not_change() -> None:
    """Whoever asked has given up meanwhile, and may have asked for something else."""
    clock = ManualClock()
    loop = decoding(Timed(clock, []), clock, [], streams=0)
    said, roles = recast(loop, until=clock.now() + 1.0), loop.roles
    clock.advance(2.0)
    loop.step()
    assert said == [False] and loop.roles is roles


def test_what_the_old_role_has_to_say_goes_out_before_the_new_one_is_announced() -> None:
    """The announcement ends the sessions with routers."""
    clock, order = ManualClock(), list[object]()
    loop = decoding(Timed(clock, []), clock, [])
    loop._deliver = order.append
    loop.inbox.post(Recast(list, 3e9, order.append))
    clock.advance(2e9)  # the deadline of the one request that runs
    loop.step()
    last, turned = order
    assert isinstance(last, Mail) and last.reports["router"].failed and turned is True
