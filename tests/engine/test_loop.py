"""What the loop measures of its steps, and what it does when they fail."""

from __future__ import annotations

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
from baton.engine.mailbox import Inbox, Mail, Outbox, Recast
from baton.engine.plan import Ended, Launched, OnLayer, Runner, Sampled, StepPlan
from baton.engine.role import Context, Limits
from baton.engine.sequence import Sequence
from tests.toy import endpoint, request

NOBODY: Any = Mock()


class Timed:
    """A runner whose steps take these times, one after the other."""

    def __init__(self, clock: ManualClock, seconds: list[float]) -> None:
        self._clock = clock
        self.seconds = seconds

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Launched:
        self._clock.advance(self.seconds.pop(0))
        return Ended([Sampled(1) for _ in plan.slices])


class Failing:
    """A runner whose every step fails."""

    def __init__(self, error: EngineFailure) -> None:
        self._error = error

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Launched:
        raise self._error


def decoding(runner: Runner, clock: ManualClock, mail: list[Mail], streams: int = 1) -> EngineLoop:
    """A loop over a decode worker's role, in whose batch are these many requests."""
    table = BlockTable(64, BlockHasher(16))
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
    return EngineLoop(context, [role], runner, Inbox(), clock, mail.append)


def decode_step_s(seconds: list[float]) -> float:
    """What the loop says of one stream's steps that took these times."""
    clock = ManualClock()
    runner = Timed(clock, list(seconds))
    loop = decoding(runner, clock, [])
    while runner.seconds:
        assert loop.step()
    return loop.load().decode_step_s


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
