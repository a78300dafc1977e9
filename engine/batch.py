"""One step's rows as one run of bytes: made once from the plan, the same on every rank, and one copy to a device."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..kernels.ops import Rows
from .plan import Slice, StepPlan
from .sequence import Sequence

_WIDE, _NARROW = 8, 4
_ALIGNED = 16
"""Every array begins at a multiple of this: kernels are compiled for pointers that do, and once more for others."""

NOT_DRAWN = -1
NO_SLOT = -1
"""Where a row that only fills a batch up keeps its K and V: nowhere."""


class Arrays(NamedTuple):
    """T rows of S sequences. `kernels.ops.Rows` says what the arrays are; beside them:

    tokens   [T] int64: what to embed
    drawn    [T] int64: the row of the step before that draws this row's token, which nobody knows yet; or `NOT_DRAWN`
    wanted   [W] int64: the rows whose logits are asked for
    """

    tokens: Any
    drawn: Any
    positions: Any
    slots: Any
    wanted: Any
    starts: Any
    lengths: Any
    table_starts: Any
    tables: Any


class Layout(NamedTuple):
    """Sizes of a batch, from which follows where its arrays lie. The block tables are last, so that only they can
    differ between two batches of as many rows, sequences and wanted rows."""

    rows: int
    sequences: int
    wanted: int
    blocks: int

    def cut(self, data: Any, wide: Any, narrow: Any) -> Arrays:
        """Views of `data`, an array of bytes in numpy or torch whose types int64 and int32 are given."""
        views, begin, found = {_WIDE: data.view(wide), _NARROW: data.view(narrow)}, 0, []
        for count, width in self._sizes():
            first = begin // width
            found.append(views[width][first : first + count])
            begin += _aligned(count * width)
        return Arrays(*found)

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(_aligned(count * width) for count, width in self._sizes())

    def _sizes(self) -> list[tuple[int, int]]:
        """Elements of each array, and their bytes."""
        rows, ends = self.rows, self.sequences + 1
        return [
            *((rows, _WIDE), (rows, _WIDE), (rows, _WIDE), (rows, _WIDE), (self.wanted, _WIDE)),
            *((ends, _NARROW), (self.sequences, _NARROW), (ends, _NARROW), (self.blocks, _NARROW)),
        ]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


class Inputs(NamedTuple):
    """A batch's arrays as tensors, on the device that computes."""

    tokens: torch.Tensor
    drawn: torch.Tensor
    wanted: torch.Tensor
    rows: Rows


@dataclass(frozen=True, slots=True)
class Batch:
    """`data` holds the arrays as `layout` says, in memory from which a device can fetch it by itself where there is
    one. `singles`: sequences with one row, which come first. `pending`: whether there are tokens that nobody knows."""

    layout: Layout
    data: torch.Tensor
    singles: int
    pending: bool

    @classmethod
    def of(
        cls, plan: StepPlan, block_size: int, drawn: Mapping[Sequence, int], fill: int = 0, pinned: bool = False,
        room: int = 0,
    ) -> Batch:  # fmt: skip
        """Decodes come first, then slices as in `row_order`. `drawn`: each sequence's row in the step before. `fill`:
        make it this many sequences by adding empty ones, of one row, no token and no block each: only for batches in
        which all have one row. `room`: blocks left free behind each table. Built with a handful of array operations,
        each of which costs as much as a dozen rows."""
        slices = row_order(plan.slices)
        held = [owner.blocks for owner in plan.decodes] + [part.sequence.blocks for part in slices]
        free = bytes(room * _NARROW)
        joined = free.join([*held, b""])
        tokens = _tokens(plan, slices, drawn)
        counts = [part.count for part in slices]
        rows, real, total = len(tokens), len(held), max(len(held), fill)
        silent = [i for i, part in enumerate(slices, len(plan.decodes)) if not part.samples]
        layout = Layout(rows + total - real, total, total - len(silent), len(joined) // _NARROW)
        data = torch.empty(layout.size, dtype=torch.uint8, pin_memory=pinned)
        to = layout.cut(data.numpy(), np.int64, np.int32)

        to.starts[:] = np.arange(total + 1)
        to.table_starts[0] = 0
        np.cumsum([len(blocks) + room for blocks in held], out=to.table_starts[1 : real + 1])
        to.tables[:] = np.frombuffer(joined, np.int32)
        positions, begins = np.array(plan.starts + [part.start for part in slices]), to.table_starts[:real]
        np.add(positions, 1, out=to.lengths[:real], casting="same_kind")
        singles = len(plan.decodes) + counts.count(1)
        if singles < real:  # else row i is the one of sequence i
            several = counts[singles - real :]
            to.starts[singles + 1 :] = singles + np.cumsum(several)
            to.lengths[singles:] = positions[singles:] + several
            owner = np.repeat(np.arange(real), np.diff(to.starts))
            positions = np.arange(rows) + (positions - to.starts[:-1])[owner]
            begins = begins[owner]
        to.wanted[:] = np.delete(to.starts[1:] - 1, silent) if silent else to.starts[1:] - 1
        block, place = np.divmod(positions, block_size)
        np.add(to.tables[begins + block] * np.int64(block_size), place, out=to.slots[:rows])
        to.positions[:rows] = positions
        to.tokens[:rows] = tokens
        if real < total:
            to.lengths[real:], to.table_starts[real + 1 :] = 0, layout.blocks
            to.tokens[rows:], to.positions[rows:], to.slots[rows:] = 0, 0, NO_SLOT
        np.maximum(~to.tokens, NOT_DRAWN, out=to.drawn)
        np.maximum(to.tokens, 0, out=to.tokens)
        return cls(layout, data, singles + total - real, min(tokens) < 0)

    def arrays(self) -> Arrays:
        return self.layout.cut(self.data.numpy(), np.int64, np.int32)

    def complete(self, drawn: Listing[int]) -> None:
        """The step before has ended, and its rows drew these tokens."""
        arrays = self.arrays()
        (rows,) = np.nonzero(arrays.drawn != NOT_DRAWN)
        arrays.tokens[rows] = np.asarray(drawn)[arrays.drawn[rows]]

    def pack(self) -> list[Any]:
        """What `unpack` takes on another rank, of a batch without tokens that nobody knows."""
        return [list(self.layout), self.data.numpy().tobytes(), self.singles]

    @classmethod
    def unpack(cls, layout: list[int], data: bytes, singles: int) -> Batch:
        return cls(Layout(*layout), torch.frombuffer(bytearray(data), dtype=torch.uint8), singles, False)

    def on(self, device: torch.device) -> Inputs:
        """The arrays on the device, which may still be fetching them."""
        here = self.arrays()
        starts, lengths = tuple(here.starts.tolist()), tuple(here.lengths.tolist())
        return inputs(self.layout, self.data.to(device, non_blocking=True), self.singles, starts, lengths)


def inputs(
    layout: Layout, data: torch.Tensor, singles: int, row_starts: tuple[int, ...], row_lengths: tuple[int, ...]
) -> Inputs:
    """Views of a batch's bytes."""
    there = layout.cut(data, torch.int64, torch.int32)
    rows = Rows(
        positions=there.positions,
        slots=there.slots,
        starts=there.starts,
        lengths=there.lengths,
        table_starts=there.table_starts,
        tables=there.tables,
        singles=singles,
        row_starts=row_starts,
        row_lengths=row_lengths,
    )
    return Inputs(there.tokens, there.drawn, there.wanted, rows)


def row_order(slices: Listing[Slice]) -> list[Slice]:
    """Those of one row come first."""
    return sorted(slices, key=lambda part: part.count != 1)


def _tokens(plan: StepPlan, slices: Listing[Slice], drawn: Mapping[Sequence, int]) -> list[int]:
    """What each row embeds: a token, or ~r if nobody knows it and row r of the step before draws it."""
    tokens = [
        known[start] if start < len(known := owner.tokens) else ~drawn[owner]
        for owner, start in zip(plan.decodes, plan.starts, strict=True)
    ]
    for part in slices:
        known = part.sequence.tokens
        tokens += known[part.start : part.end]
        if part.end > len(known):
            tokens.append(~drawn[part.sequence])
    return tokens
