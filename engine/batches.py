"""The batches of steps that follow one another: while the same sequences decode, almost nothing of a batch changes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .batch import Batch
from .pages import Pages
from .plan import StepPlan
from .sequence import Sequence

ROOM = 8
"""Blocks left free behind each table of a decode step: tables may grow for `ROOM * block_size` steps."""


class Batches:
    """Makes one batch after the other: anew from the plan, or from the batch before.

    After its wait for a device the loop finds little of what it needs in the processor's caches. What a step costs
    then is what it touches, so a step of the same decodes touches only what changes.
    """

    def __init__(self, block_size: int, pinned: bool = False) -> None:
        """`pinned`: in memory from which a device fetches by itself."""
        self._block_size = block_size
        self._pinned = pinned
        self._carried: _Carried | None = None

    def make(self, plan: StepPlan, drawn: Mapping[Sequence, int], fill: int = 0) -> Batch:
        """See `Batch.of`."""
        self.forget()
        batch = Batch.of(plan, self._block_size, drawn, fill, self._pinned, 0 if plan.slices else ROOM)
        if not plan.slices:
            self._carried = _Carried(plan, batch, self._block_size, self._pinned)
        return batch

    def carry_on(self, plan: StepPlan) -> Batch | None:
        """The batch of a plan that goes on from the one before: the same decodes and nothing else, each a token
        further in the same blocks. It takes all tokens from what the step before draws. None for any other plan."""
        return self._carried.next(plan) if self._carried and self._carried.leads_to(plan) else None

    def forget(self) -> None:
        """Nobody can go on from the step before, because it has failed."""
        self._carried = None


class _Carried:
    """A batch that goes from step to step. It says what `Batch.of` says of the same plan: with each step positions,
    lengths and slots are one further. Only a sequence that enters a block has its slot there, and finds the block in
    the room behind its table; the sequences that enter one with the same step do so again `block_size` steps later.
    """

    def __init__(self, plan: StepPlan, batch: Batch, block_size: int, pinned: bool) -> None:
        self._decodes = list(plan.decodes)
        self._held = [owner.blocks for owner in plan.decodes]
        self._starts = [start + 1 for start in plan.starts]  # of the plan to come
        self._batch = batch
        self._block_size = block_size
        self._pinned = pinned
        self._steps = 0
        self._pages: Pages | None = None

    def leads_to(self, plan: StepPlan) -> bool:
        """A sequence that has given its blocks up meanwhile has another array of them."""
        return (
            not plan.slices
            and plan.decodes == self._decodes
            and plan.starts == self._starts
            and [owner.blocks for owner in plan.decodes] == self._held
            and self._steps < ROOM * self._block_size
        )

    def next(self, plan: StepPlan) -> Batch:
        """What is returned stays as it is until the step after the next one: two are under way at most."""
        if self._pages is None:
            self._pages = self._open(plan)
        self._steps += 1
        self._positions += 1
        self._lengths += 1
        self._slots += 1
        size = self._block_size
        for row in self._entering[self._steps % size]:
            index = plan.starts[row] // size
            block = self._held[row][index]
            self._slots[row] = block * size
            self._tables[self._begins[row] + index] = block
        self._starts = self._lengths.tolist()
        return Batch(self._batch.layout, self._pages.write(self._bytes), self._batch.singles, pending=True)

    def _open(self, plan: StepPlan) -> Pages:
        """Take the batch over into memory of our own. Returns that from which a device gets it."""
        count, batch = len(self._decodes), self._batch
        data = batch.data.numpy().copy()
        self._bytes = data.data
        to = batch.layout.cut(data, np.int64, np.int32)
        to.drawn[:count] = np.arange(count)
        self._positions, self._lengths, self._slots = to.positions[:count], to.lengths[:count], to.slots[:count]
        self._tables, self._begins = to.tables, to.table_starts.tolist()
        self._entering: list[list[int]] = [[] for _ in range(self._block_size)]
        for row, start in enumerate(plan.starts):
            self._entering[(1 - start) % self._block_size].append(row)
        return Pages(len(data), self._pinned)
