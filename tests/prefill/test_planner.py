from __future__ import annotations

from dataclasses import dataclass

from baton.common.hashing import BlockHasher
from baton.engine.block_table import BlockTable
from baton.engine.plan import StepPlan
from baton.engine.sequence import Sequence
from baton.prefill.planner import ChunkedPrefill
from tests.toy import request

SIZE = 4


@dataclass
class Batch:
    """A decoding half."""

    headroom: int
    places: int

    def join(self, sequence: Sequence) -> None:
        raise AssertionError("the planner does not join")


def made(
    blocks: int = 64, local: Batch | None = None, most: int = 64
) -> tuple[ChunkedPrefill, BlockTable, list[Sequence]]:
    table, started = BlockTable(blocks, BlockHasher(SIZE)), []
    return ChunkedPrefill(table, started.append, most, local), table, started


def sequence(ticket: int, tokens: list[int], priority: int = 0) -> Sequence:
    from dataclasses import replace

    what = replace(request(str(ticket), tokens, 10), priority=priority)
    return Sequence(("r", ticket), what, 1, float(ticket), 99.0)


def step(planner: ChunkedPrefill, table: BlockTable, budget: int) -> list[tuple[int, int, int]]:
    """(ticket, start, count) of each slice; who is done leaves."""
    plan = StepPlan(budget)
    planner.plan(plan)
    done = [(p.sequence, p.samples) for p in plan.slices]
    for part in plan.slices:
        table.advance(part.sequence, part.count)
    for part_sequence, samples in done:
        if samples:
            planner.remove(part_sequence)
    return [(p.sequence.key[1], p.start, p.count) for p in plan.slices]


def test_long_prompts_go_in_chunks_and_short_ones_share_a_step() -> None:
    planner, table, _ = made()
    planner.add(sequence(1, list(range(20))))
    planner.add(sequence(2, list(range(100, 105))))
    assert step(planner, table, 8) == [(1, 0, 8)]
    assert step(planner, table, 8) == [(1, 8, 8)]
    assert step(planner, table, 8) == [(1, 16, 4), (2, 0, 4)]
    assert step(planner, table, 8) == [(2, 4, 1)]
    assert step(planner, table, 8) == []


def test_priority_then_order_of_arrival() -> None:
    planner, table, _ = made()
    planner.add(sequence(1, [1] * 4))
    planner.add(sequence(2, [2] * 4))
    planner.add(sequence(3, [3] * 4, priority=1))
    assert [t for t, _, _ in step(planner, table, 100)] == [3, 1, 2]


def test_one_prompt_many_times_is_computed_once() -> None:
    planner, table, started = made()
    prompt = list(range(18))
    for ticket in range(3):
        planner.add(sequence(ticket, prompt))
    assert step(planner, table, 100) == [(0, 0, 18)]
    assert step(planner, table, 100) == [(1, 16, 2), (2, 16, 2)]
    assert [s.cached for s in started] == [0, 16, 16]


def test_who_waits_for_anothers_block_does_not_hold_up_the_rest_and_survives_its_end() -> None:
    planner, table, _ = made()
    first = sequence(0, list(range(18)))
    planner.add(first)
    planner.add(sequence(1, list(range(18))))
    planner.add(sequence(2, [50] * 4))
    assert step(planner, table, 12) == [(0, 0, 12)]
    planner.remove(first)  # cancelled in mid-prefill
    table.drop(first)
    assert step(planner, table, 100) == [(1, 12, 6), (2, 0, 4)]


def test_a_full_pool_makes_all_wait_in_order() -> None:
    planner, table, _ = made(blocks=5)
    first = sequence(1, list(range(16)))
    planner.add(first)
    assert step(planner, table, 100) == [(1, 0, 16)]
    planner.add(sequence(2, list(range(100, 112))))
    planner.add(sequence(3, [9]))
    assert step(planner, table, 100) == []
    table.drop(first)
    assert step(planner, table, 100) == [(2, 0, 12), (3, 0, 1)]


def test_headroom_is_left_to_the_decoding_half() -> None:
    planner, table, _ = made(blocks=6, local=Batch(headroom=3, places=8))
    planner.add(sequence(1, list(range(8))))
    planner.add(sequence(2, list(range(100, 108))))
    assert step(planner, table, 100) == [(1, 0, 8)]


def test_no_more_are_started_than_find_a_place_in_the_batch() -> None:
    local = Batch(headroom=0, places=1)
    planner, table, _ = made(local=local)
    planner.add(sequence(1, list(range(8))))
    planner.add(sequence(2, list(range(100, 108))))
    assert step(planner, table, 100) == [(1, 0, 8)]
    local.places = 0  # it joined
    assert step(planner, table, 100) == []
    local.places = 1
    assert step(planner, table, 100) == [(2, 0, 8)]


def test_chunks_follow_each_other_before_the_first_has_ended() -> None:
    planner, table, _ = made()
    planner.add(sequence(1, list(range(20))))
    planned = []
    for _ in range(4):
        plan = StepPlan(8, ahead=True)
        planner.plan(plan)
        planned += [(part.start, part.count, part.samples) for part in plan.slices]
        table.launch(plan)
    assert planned == [(0, 8, False), (8, 8, False), (16, 4, True)]


def test_no_more_are_in_work_than_may_sample_in_a_step() -> None:
    planner, table, _ = made(most=2)
    for ticket in range(3):
        planner.add(sequence(ticket, list(range(100 * ticket, 100 * ticket + 8))))
    assert step(planner, table, 100) == [(0, 0, 8), (1, 0, 8)]
    assert step(planner, table, 100) == [(2, 0, 8)]
