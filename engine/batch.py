"""One step's rows as one run of bytes: made once from the plan, the same on every rank, and one copy to a device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..kernels.ops import Rows
from .plan import Slice

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_WIDE, _NARROW = 8, 4
_ALIGNED = 16
"""Every array begins at a multiple of this: kernels are compiled for pointers that do, and once more for others."""


class Arrays(NamedTuple):
    """T rows of S sequences. `kernels.ops.Rows` says what the arrays are; beside them:

    tokens   [T] int64: what to embed
    wanted   [W] int64: the rows whose logits are asked for
    """

    tokens: Any
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
        rows, ends = self.rows, self.sequences + 1
        narrows = (ends, self.sequences, ends, self.blocks)
        sizes = [(count, _WIDE, wide) for count in (rows, rows, rows, self.wanted)]
        sizes += [(count, _NARROW, narrow) for count in narrows]
        begin, found = 0, []
        for count, width, kind in sizes:
            found.append(data[begin : begin + count * width].view(kind))
            begin += -(-count * width // _ALIGNED) * _ALIGNED
        return Arrays(*found)

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        rows, ends = self.rows, self.sequences + 1
        sizes = [_WIDE * count for count in (rows, rows, rows, self.wanted)]
        sizes += [_NARROW * count for count in (ends, self.sequences, ends, self.blocks)]
        return sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes)


@dataclass(frozen=True, slots=True)
class Batch:
    """`data` holds the arrays as `layout` says; `singles`: sequences with one row, which come first."""

    layout: Layout
    data: Bytes
    singles: int

    @classmethod
    def of(cls, slices: Listing[Slice], block_size: int) -> Batch:
        """Those that have one row must come first. Built with a handful of array operations."""
        counts = np.asarray([part.count for part in slices])
        ends = np.asarray([part.start for part in slices]) + counts
        held = [part.sequence.blocks for part in slices]
        table_ends = list(itertools.accumulate(map(len, held)))
        wanted = [i for i, part in enumerate(slices) if part.samples]
        layout = Layout(int(counts.sum()), len(slices), len(wanted), table_ends[-1])
        data = np.empty(layout.size, np.uint8)
        to = layout.cut(data, np.int64, np.int32)
        to.starts[0] = to.table_starts[0] = 0
        np.cumsum(counts, out=to.starts[1:])
        to.lengths[:] = ends
        to.table_starts[1:] = table_ends
        to.tables[:] = np.frombuffer(b"".join(held), np.int32)
        owner = np.repeat(np.arange(len(slices)), counts)
        to.positions[:] = np.arange(layout.rows) + (ends - to.starts[1:])[owner]
        block = to.tables[to.table_starts[owner] + to.positions // block_size]
        to.slots[:] = block.astype(np.int64) * block_size + to.positions % block_size
        to.wanted[:] = to.starts[1:][wanted] - 1
        singles = int((counts == 1).sum())
        tokens = [part.sequence.tokens[part.start] for part in slices[:singles]]
        for part in slices[singles:]:
            tokens += part.sequence.tokens[part.start : part.end]
        to.tokens[:] = tokens
        return cls(layout, data, singles)

    def arrays(self) -> Arrays:
        return self.layout.cut(self.data, np.int64, np.int32)

    def pack(self) -> list[Any]:
        """What `unpack` takes on another rank."""
        return [list(self.layout), self.data.tobytes(), self.singles]

    @classmethod
    def unpack(cls, layout: list[int], data: bytes, singles: int) -> Batch:
        return cls(Layout(*layout), np.frombuffer(bytearray(data), np.uint8), singles)  # torch wants it writable

    def on(self, device: torch.device) -> tuple[torch.Tensor, Rows, torch.Tensor]:
        """Tokens, rows and wanted rows on the device."""
        data = torch.from_numpy(self.data).to(device, non_blocking=True)
        there, here = self.layout.cut(data, torch.int64, torch.int32), self.arrays()
        rows = Rows(
            positions=there.positions,
            slots=there.slots,
            starts=there.starts,
            lengths=there.lengths,
            table_starts=there.table_starts,
            tables=there.tables,
            singles=self.singles,
            row_starts=tuple(here.starts.tolist()),
            row_lengths=tuple(here.lengths.tolist()),
        )
        return there.tokens, rows, there.wanted
