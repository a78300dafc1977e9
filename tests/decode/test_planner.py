from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.common.hashing import BlockHasher
from baton.decode.planner import ContinuousBatching
from baton.engine.block_table import BlockTable
from baton.engine.plan import StepPlan
from baton.engine.sequence import Sequence
from tests.toy import request

SIZE = 4


def joined(planner: ContinuousBatching, table: BlockTable, ticket: int, length: int, max_tokens: int = 50) -> Sequence:
    """A sequence with its prompt's KV in the pool and its first token known."""
    sequence = Sequence(("r", ticket), request(str(ticket), [ticket] * length, max_tokens), 1, float(ticket), 99.0)
    assert table.admit(sequence, 0, length)
    table.advance(sequence, length)
    sequence.tokens.append(7)
    planner.join(sequence)
    return sequence


def step(planner: ContinuousBatching, table: BlockTable, budget: int = 64) -> StepPlan:
    plan = StepPlan(budget)
    planner.plan(plan)
    for part in plan.parts:
        samples = part.samples
        table.advance(part.sequence, part.count)
        if samples:
            part.sequence.tokens.append(len(part.sequence.tokens))
    return plan


def test_every_running_request_gets_one_token() -> None:
    table = BlockTable(32, BlockHasher(SIZE))
    planner = ContinuousBatching(table)
    sequences = [joined(planner, table, t, 5) for t in range(3)]
    plan = step(planner, table)
    assert plan.decodes == sequences and plan.starts == [5] * 3 and not plan.slices


def test_the_youngest_gives_way_and_comes_back() -> None:
    table = BlockTable(6, BlockHasher(SIZE))
    planner = ContinuousBatching(table)
    old, young = joined(planner, table, 1, 8), joined(planner, table, 2, 8)
    while planner.preemptions == 0:
        step(planner, table)
    assert planner.preempted == [young] and planner.running == [old] and not young.blocks
    planner.remove(old)
    plan = step(planner, table)
    assert plan.sequences == [young] and planner.preempted == []
    table.check()


@settings(max_examples=80, deadline=None)
@given(
    blocks=st.integers(6, 20),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    budget=st.integers(1, 16),
)
def test_all_finish_whatever_the_pool(blocks: int, lengths: list[int], budget: int) -> None:
    """No livelock: with any pool that holds each request alone, all get their tokens within a bounded number of
    steps, and nothing leaks."""
    table = BlockTable(blocks, BlockHasher(SIZE))
    planner = ContinuousBatching(table)
    todo = []
    waiting = [(t, n) for t, n in enumerate(lengths) if table.fits(n + 12)]
    for _ in range(2000):
        if waiting and table.blocks_for(waiting[0][1]) <= table.manager.available and not planner.preempted:
            ticket, length = waiting.pop(0)
            todo.append(joined(planner, table, ticket, length, max_tokens=10))
        step(planner, table, budget)
        table.check()
        for sequence in [s for s in todo if s.output_len >= 10]:
            planner.remove(sequence)
            todo.remove(sequence)
        if not todo and not waiting:
            break
    assert not todo and not waiting
    assert table.manager.pinned == 0


def test_nobody_is_preempted_while_a_step_is_under_way() -> None:
    """It may end somebody, whose blocks then do."""
    table = BlockTable(6, BlockHasher(SIZE))
    planner = ContinuousBatching(table)
    old, young = joined(planner, table, 1, 11), joined(planner, table, 2, 11)
    plan = StepPlan(64, ahead=True)
    planner.plan(plan)
    assert plan.decodes == [old, young] and not plan.short
    table.launch(plan)
    plan = StepPlan(64, ahead=True)
    planner.plan(plan)
    assert plan.short and planner.preemptions == 0 and planner.running == [old, young]


def test_what_a_step_under_way_draws_is_gone_on_with() -> None:
    table = BlockTable(6, BlockHasher(SIZE))
    planner = ContinuousBatching(table)
    sequence = joined(
        planner, table, 1, 5, max_tokens=4
    )  # the first is drawn; so two steps draw more, and a third the last
    starts = []
    for _ in range(4):
        plan = StepPlan(64, ahead=True)
        planner.plan(plan)
        starts += plan.starts
        table.launch(plan)
    assert starts == [5, 6, 7] and sequence.length == sequence.limit == 9
