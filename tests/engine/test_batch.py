"""A step's arrays: what lies where in the one buffer, here and on another rank."""

from __future__ import annotations

import numpy as np
import torch

from baton.engine.batch import Batch, Layout
from baton.engine.plan import Slice

from .test_model import sequence

BLOCK = 16


def made() -> Batch:
    """Two decodes and a chunk that samples nothing."""
    first, second, third = sequence(range(40), 0), sequence(range(100, 117), 30), sequence(range(200, 300), 60)
    return Batch.of([Slice(first, 39, 1), Slice(second, 16, 1), Slice(third, 20, 30)], BLOCK)


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
    tokens, rows, wanted = there.on(torch.device("cpu"))
    assert tokens.tolist() == batch.arrays().tokens.tolist()
    assert wanted.tolist() == [0, 1]
    assert (rows.row_starts, rows.row_lengths) == ((0, 1, 2, 32), (40, 17, 50))
    assert rows.tables.dtype == rows.table_starts.dtype == torch.int32


def test_every_array_begins_where_vectors_may() -> None:
    layout = Layout(rows=5, sequences=3, wanted=1, blocks=7)
    data = torch.zeros(layout.size, dtype=torch.uint8)
    begins = [array.data_ptr() - data.data_ptr() for array in layout.cut(data, torch.int64, torch.int32)]
    assert all(begin % 16 == 0 for begin in begins)
    assert begins == sorted(set(begins))
    assert layout.size == begins[-1] + 32
