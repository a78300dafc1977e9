"""A step's arrays: what lies where in the one buffer, here and on another rank."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.batch import NO_SLOT, NOT_DRAWN, Batch, Layout
from baton.engine.plan import Slice, StepPlan
from baton.engine.sequence import Sequence

from .test_model import sequence

BLOCK = 16


def made() -> Batch:
    """Two decodes and a chunk that samples nothing."""
    first, second, third = sequence(range(40), 0), sequence(range(100, 117), 30), sequence(range(200, 300), 60)
    return Batch.of(StepPlan(0, [Slice(third, 20, 30, False)], [first, second], [39, 16]), BLOCK, {})


def test_rows_of_all_sequences_lie_one_after_the_other() -> None:
    batch = made()
    arrays = batch.arrays()
    assert batch.layout == Layout(rows=32, sequences=3, wanted=2, blocks=60)
    assert batch.singles == 2
    assert arrays.tokens.tolist() == [39, 116, *range(220, 250)]
    assert arrays.positions.tolist() == [39, 16, *range(20, 50)]
    assert arrays.starts.tolist() == [0, 1, 2, 32]
    assert arrays.lengths.tolist() == [40, 17, 50]
    assert arrays.wanted.tolist() == [0, 1]


def test_each_slot_is_where_the_block_table_says() -> None:
    arrays = made().arrays()
    assert arrays.table_starts.tolist() == [0, 20, 40, 60]
    assert arrays.tables.tolist() == [first + (i * 7) % 20 for first in (0, 30, 60) for i in range(20)]
    owners = [0, 1, *[2] * 30]
    for owner, position, slot in zip(owners, arrays.positions, arrays.slots, strict=True):
        block = arrays.tables[arrays.table_starts[owner] + position // BLOCK]
        assert slot == block * BLOCK + position % BLOCK


def test_another_rank_and_a_device_find_the_same() -> None:
    batch = made()
    packed = batch.pack()
    there = Batch.unpack(*packed)
    assert (there.layout, there.singles) == (batch.layout, batch.singles)
    for found, expected in zip(there.arrays(), batch.arrays(), strict=True):
        assert np.array_equal(found, expected)
    there_now = there.on(torch.device("cpu"))
    assert there_now.tokens.tolist() == batch.arrays().tokens.tolist()
    assert there_now.wanted.tolist() == [0, 1]
    rows = there_now.rows
    assert (rows.row_starts, rows.row_lengths) == ((0, 1, 2, 32), (40, 17, 50))
    assert rows.tables.dtype == rows.table_starts.dtype == torch.int32


def test_every_array_begins_where_vectors_may() -> None:
    layout = Layout(rows=5, sequences=3, wanted=1, blocks=7)
    data = torch.zeros(layout.size, dtype=torch.uint8)
    begins = [array.data_ptr() - data.data_ptr() for array in layout.cut(data, torch.int64, torch.int32)]
    assert all(begin % 16 == 0 for begin in begins)
    assert begins == sorted(set(begins))
    assert layout.size == begins[-1] + 32


def test_tokens_that_the_step_before_draws_are_named_by_its_rows() -> None:
    known, drawing, chunk = sequence(range(40), 0), sequence(range(100, 117), 30), sequence(range(200, 230), 60)
    plan = StepPlan(0, [Slice(chunk, 28, 3, True)], [known, drawing], [39, 17])
    batch = Batch.of(plan, BLOCK, {drawing: 5, chunk: 2, known: 9})
    assert batch.pending
    assert batch.arrays().drawn.tolist() == [-1, 5, -1, -1, 2]
    batch.complete([10, 11, 12, 13, 14, 15])
    assert batch.arrays().tokens.tolist() == [39, 15, 228, 229, 12]


def test_a_batch_is_filled_up_with_rows_that_store_nothing() -> None:
    first, second = sequence(range(40), 0), sequence(range(100, 117), 30)
    plan = StepPlan(0, [], [first, second], [39, 16])
    batch, plain = Batch.of(plan, BLOCK, {}, fill=4), Batch.of(plan, BLOCK, {})
    assert batch.layout == Layout(rows=4, sequences=4, wanted=4, blocks=40)
    assert (batch.singles, batch.pending) == (4, False)
    arrays, alone = batch.arrays(), plain.arrays()
    for name in ("tokens", "drawn", "positions", "slots", "lengths", "wanted", "starts", "table_starts"):
        of_both = getattr(alone, name).tolist()
        assert getattr(arrays, name).tolist()[: len(of_both)] == of_both
    assert arrays.slots[2:].tolist() == arrays.drawn[2:].tolist() == [-1, -1]
    assert arrays.lengths[2:].tolist() == arrays.tokens[2:].tolist() == arrays.positions[2:].tolist() == [0, 0]
    assert arrays.table_starts.tolist() == [0, 20, 40, 40, 40]
    assert arrays.starts.tolist() == [0, 1, 2, 3, 4]
    assert arrays.wanted.tolist() == [0, 1, 2, 3]


@dataclass
class Rowwise:
    """What a batch should hold, written down row by row."""

    tokens: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    lengths: list[int] = field(default_factory=list)
    table_starts: list[int] = field(default_factory=lambda: [0])
    tables: list[int] = field(default_factory=list)

    def add(self, part: Slice, drawn: dict[Sequence, int]) -> None:
        owner = part.sequence
        for position in range(part.start, part.end):
            known = position < len(owner.tokens)
            self.tokens.append(owner.tokens[position] if known else 0)
            self.drawn.append(NOT_DRAWN if known else drawn[owner])
            self.positions.append(position)
            self.slots.append(owner.blocks[position // BLOCK] * BLOCK + position % BLOCK)
        self.wanted += [len(self.tokens) - 1] * part.samples
        self.starts.append(len(self.tokens))
        self.lengths.append(part.end)
        self.tables += owner.blocks
        self.table_starts.append(len(self.tables))

    def fill(self) -> None:
        """One more row that stores nothing."""
        for column, empty in ((self.tokens, 0), (self.drawn, NOT_DRAWN), (self.positions, 0), (self.slots, NO_SLOT)):
            column.append(empty)
        self.wanted.append(len(self.wanted))
        self.starts.append(len(self.tokens))
        self.lengths.append(0)
        self.table_starts.append(len(self.tables))


@given(decodes=st.integers(0, 5), chunks=st.lists(st.booleans(), max_size=5), seed=st.integers(0, 1 << 30))
def test_any_plan_is_laid_out_row_by_row(decodes: int, chunks: list[bool], seed: int) -> None:
    """Decodes, then slices of one row, then longer ones; some sample, some embed what the step before draws."""
    rng = random.Random(seed)
    owners = [sequence(rng.choices(range(99), k=rng.randrange(2, 60)), 20 * i) for i in range(decodes + len(chunks))]
    for owner in owners:
        del owner.blocks[rng.randrange(len(owner.tokens) // BLOCK + 1, 21) :]
        owner.pending = rng.randrange(2)
    drawn = {owner: row for row, owner in enumerate(rng.sample(owners, len(owners))) if owner.pending}
    plan = StepPlan(999)
    for owner in owners[:decodes]:
        owner.launched = owner.length - 1
        plan.decode(owner)
    for owner, whole in zip(owners[decodes:], chunks, strict=True):
        owner.launched = rng.randrange(owner.length)
        plan.add(owner, owner.missing if whole else rng.randrange(1, owner.missing + 1))
    if not plan:
        return
    fill = 0 if plan.slices else rng.choice([0, len(plan) + rng.randrange(4)])
    expected = Rowwise()
    single, longer = ([part for part in plan.slices if (part.count == 1) is one] for one in (True, False))
    for part in [*plan.parts[:decodes], *single, *longer]:
        expected.add(part, drawn)
    for _ in range(fill - len(plan)):
        expected.fill()
    batch = Batch.of(plan, BLOCK, drawn, fill)
    for name, found in batch.arrays()._asdict().items():
        assert found.tolist() == getattr(expected, name), name
    assert batch.singles == max(fill, decodes + len(single))
    assert batch.pending == any(row != NOT_DRAWN for row in expected.drawn)
