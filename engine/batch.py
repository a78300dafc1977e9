"""One step's rows as one run of bytes: made once from the plan, the same on every rank, and one copy to a device."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..kernels.ops import Rows
from .plan import Slice
from .sequence import Sequence
from .tables import Tables

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
        cls, slices: Listing[Slice], block_size: int, drawn: Mapping[Sequence, int], fill: int = 0,
        pinned: bool = False, tables: Tables | None = None,
    ) -> Batch:  # fmt: skip
        """Those that have one row must come first. `drawn`: each sequence's row in the step before. `fill`: make it
        this many sequences by adding empty ones, of one row, no token and no block each: only for batches in which
        all have one row. `tables` joins their tables; give it the same again. Built with a handful of array
        operations, since each costs as much as a dozen rows."""
        real, total = len(slices), max(len(slices), fill)
        counts = [part.count for part in slices]
        singles = counts.count(1)
        tokens = _tokens(slices, singles, drawn)
        sizes, joined = (tables or Tables()).join([part.sequence.blocks for part in slices])
        wanted = range(total) if fill else [i for i, part in enumerate(slices) if part.samples]
        layout = Layout(len(tokens) + total - real, total, len(wanted), len(joined) // _NARROW)
        data = torch.empty(layout.size, dtype=torch.uint8, pin_memory=pinned)
        to = layout.cut(data.numpy(), np.int64, np.int32)
        rows, first = len(tokens), np.array([part.start for part in slices])
        to.starts[:] = np.arange(total + 1)
        owner: Any = slice(real)  # row i is of sequence i
        positions = first
        if singles < real:
            np.cumsum(counts[singles:], out=to.starts[singles + 1 :])
            to.starts[singles + 1 :] += singles
            owner = np.repeat(np.arange(real), counts)
            positions = np.arange(rows) + (first - to.starts[:real])[owner]
        np.add(first, counts, out=to.lengths[:real], casting="same_kind")
        to.table_starts[0] = 0
        np.cumsum(sizes, out=to.table_starts[1 : real + 1])
        to.tables[:] = np.frombuffer(joined, np.int32)
        to.wanted[:] = to.starts[1:][wanted] - 1 if len(wanted) < total else to.starts[1:] - 1
        block, place = np.divmod(positions, block_size)
        to.positions[:rows] = positions
        to.slots[:rows] = to.tables[to.table_starts[owner] + block] * np.int64(block_size) + place
        to.tokens[:rows] = tokens
        if real < total:
            to.lengths[real:], to.table_starts[real + 1 :] = 0, layout.blocks
            for array, empty in ((to.tokens, 0), (to.positions, 0), (to.slots, NO_SLOT)):
                array[rows:] = empty
        pending = min(tokens) < 0
        np.maximum(~to.tokens, NOT_DRAWN, out=to.drawn)
        np.maximum(to.tokens, 0, out=to.tokens)
        return cls(layout, data, singles + total - real, pending)

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


def _tokens(slices: Listing[Slice], singles: int, drawn: Mapping[Sequence, int]) -> list[int]:
    """What each row embeds: a token, or ~r if nobody knows it and row r of the step before draws it."""
    tokens = [
        known[start] if (start := part.start) < len(known := part.sequence.tokens) else ~drawn[part.sequence]
        for part in slices[:singles]
    ]
    for part in slices[singles:]:
        known = part.sequence.tokens
        tokens += known[part.start : part.end]
        if part.end > len(known):
            tokens.append(~drawn[part.sequence])
    return tokens
