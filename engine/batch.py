"""One step's rows as one run of bytes: made once from the plan, the same on every rank, and one copy to a device."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..kernels.ops import Rows
from .plan import Slice
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
        begin, found = 0, []
        for count, width in self._sizes():
            found.append(data[begin : begin + count * width].view(wide if width == _WIDE else narrow))
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
        pinned: bool = False,
    ) -> Batch:  # fmt: skip
        """Those that have one row must come first. `drawn`: each sequence's row in the step before. `fill`: make it
        this many sequences by adding empty ones, of one row, no token and no block each: only for batches in which
        all have one row. Built with a handful of array operations."""
        counts = np.ones(max(len(slices), fill), np.int64)
        ends = np.zeros_like(counts)
        real = len(slices)
        counts[:real] = [part.count for part in slices]
        ends[:real] = [part.start for part in slices]
        ends[:real] += counts[:real]
        held = [part.sequence.blocks for part in slices]
        table_ends = list(itertools.accumulate(map(len, held)))
        wanted = range(fill) if fill else [i for i, part in enumerate(slices) if part.samples]
        layout = Layout(int(counts.sum()), len(counts), len(wanted), table_ends[-1])
        data = torch.empty(layout.size, dtype=torch.uint8, pin_memory=pinned)
        to = layout.cut(data.numpy(), np.int64, np.int32)
        to.starts[0] = to.table_starts[0] = 0
        np.cumsum(counts, out=to.starts[1:])
        to.lengths[:] = ends
        to.table_starts[1 : real + 1] = table_ends
        to.table_starts[real + 1 :] = table_ends[-1]
        to.tables[:] = np.frombuffer(b"".join(held), np.int32)
        owner = np.repeat(np.arange(real), counts[:real])
        rows = len(owner)
        to.positions[:rows] = np.arange(rows) + (ends - to.starts[1:])[owner]
        block = to.tables[to.table_starts[owner] + to.positions[:rows] // block_size]
        to.slots[:rows] = block.astype(np.int64) * block_size + to.positions[:rows] % block_size
        to.wanted[:] = to.starts[1:][wanted] - 1
        singles = int((counts == 1).sum())
        pending = _tokens(slices, min(singles, real), drawn, to)
        for array, empty in ((to.tokens, 0), (to.positions, 0), (to.slots, NO_SLOT)):
            array[rows:] = empty
        return cls(layout, data, singles, pending)

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


def _tokens(slices: Listing[Slice], singles: int, drawn: Mapping[Sequence, int], to: Arrays) -> bool:
    """Write the tokens that are known, and who draws the others; whether there are others."""
    known = [part.sequence.tokens for part in slices]
    tokens = [
        mine[part.start] if part.start < len(mine) else 0 for mine, part in zip(known, slices[:singles], strict=False)
    ]
    for part in slices[singles:]:
        tokens += part.sequence.tokens[part.start : part.end]
        tokens += [0] * (part.end - max(part.start, len(part.sequence.tokens)))
    to.tokens[: len(tokens)] = tokens
    (pending,) = np.nonzero(to.lengths[: len(known)] > np.asarray(list(map(len, known))))
    to.drawn[:] = NOT_DRAWN
    to.drawn[to.starts[1:][pending] - 1] = [drawn[slices[i].sequence] for i in pending.tolist()]
    return len(pending) > 0
