"""What the loop measures of its steps."""

from __future__ import annotations

from typing import Any

from baton.common.clock import ManualClock
from baton.common.config import HandoverConfig
from baton.common.hashing import BlockHasher
from baton.decode.role import DecodeRole
from baton.engine.block_table import BlockTable
from baton.engine.loop import EngineLoop
from baton.engine.mailbox import Inbox, Outbox
from baton.engine.plan import OnLayer, Sampled, StepPlan
from baton.engine.role import Context, Limits
from baton.engine.sequence import Sequence
from tests.toy import endpoint, request

NO_INLET: Any = None


class Timed:
    """A runner whose steps take these times, one after the other."""

    def __init__(self, clock: ManualClock, seconds: list[float]) -> None:
        self._clock = clock
        self.seconds = seconds

    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> list[Sampled | None]:
        self._clock.advance(self.seconds.pop(0))
        return [Sampled(1) for _ in plan.slices]


def decode_step_s(seconds: list[float]) -> float:
    """What the loop says of one stream's steps that took these times."""
    clock, table = ManualClock(), BlockTable(64, BlockHasher(16))
    limits = Limits(
        eos_ids=frozenset(), max_model_len=1000, max_batch_tokens=64, max_running=8, max_waiting=8
    )  # fmt: skip
    context = Context(
        endpoint=endpoint("w"), table=table, outbox=Outbox(), limits=limits, handover=HandoverConfig(),
    )  # fmt: skip
    role = DecodeRole(context, NO_INLET)
    sequence = Sequence(("router", 1), request("r", [1, 2, 3], 500), 1, 0.0, 1e9)
    assert table.admit(sequence, 0, 3)
    table.advance(sequence, 3)
    sequence.tokens.append(4)
    role.join(sequence)
    runner = Timed(clock, list(seconds))
    loop = EngineLoop(context, [role], runner, Inbox(), clock, lambda mail: None)
    while runner.seconds:
        assert loop.step()
    return loop.load().decode_step_s


def test_a_frozen_step_is_soon_forgotten() -> None:
    """A worker that was stopped for seconds must not look slow for ever: nobody would ask it again."""
    assert decode_step_s([0.01] * 10 + [60.0]) < 0.02
    assert decode_step_s([0.01] * 10 + [60.0] + [0.01] * 10) < 0.011


def test_steps_that_become_slower_for_good_are_believed() -> None:
    assert decode_step_s([0.01] * 10 + [1.0] * 30) > 0.9
