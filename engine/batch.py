"""One step's rows as plain arrays: made once from the plan, and the same on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..kernels.ops import Rows
from .plan import Slice

Int32 = np.ndarray[Any, np.dtype[np.int32]]
Int64 = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Batch:
    """T rows of S sequences. `kernels.ops.Rows` says what the arrays are; beside them:

    tokens   [T]: what to embed
    wanted   indices of the rows whose logits are asked for
    """

    tokens: Int64
    positions: Int64
    slots: Int64
    wanted: Int64
    starts: Int32
    lengths: Int32
    tables: Int32
    singles: int

    @classmethod
    def of(cls, slices: Listing[Slice], block_size: int) -> Batch:
        """Those that have one row must come first. Built with a handful of array operations."""
        counts = np.asarray([part.count for part in slices])
        ends = np.asarray([part.end for part in slices])
        starts = np.zeros(len(slices) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        owner = np.repeat(np.arange(len(slices)), counts)
        positions = np.arange(starts[-1]) - starts[owner] + (ends - counts)[owner]
        held = [-(-part.end // block_size) for part in slices]
        tables = np.zeros((len(slices), max(held)), dtype=np.int32)
        for row, (part, blocks) in enumerate(zip(slices, held, strict=True)):
            tables[row, :blocks] = part.sequence.blocks[:blocks]
        slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
        tokens = itertools.chain.from_iterable(part.sequence.tokens[part.start : part.end] for part in slices)
        return cls(
            tokens=np.fromiter(tokens, dtype=np.int64, count=int(starts[-1])),
            positions=positions,
            slots=slots,
            wanted=np.asarray([starts[i + 1] - 1 for i, part in enumerate(slices) if part.samples], dtype=np.int64),
            starts=starts,
            lengths=ends.astype(np.int32),
            tables=tables,
            singles=int((counts == 1).sum()),
        )

    def pack(self) -> list[bytes | int]:
        """What `unpack` takes on another rank."""
        wide = [array.tobytes() for array in (self.tokens, self.positions, self.slots, self.wanted)]
        return [*wide, self.starts.tobytes(), self.lengths.tobytes(), self.tables.tobytes(), self.singles]

    @classmethod
    def unpack(
        cls, tokens: bytes, positions: bytes, slots: bytes, wanted: bytes,
        starts: bytes, lengths: bytes, tables: bytes, singles: int,
    ) -> Batch:  # fmt: skip
        def array(data: bytes, dtype: type[Any]) -> np.ndarray[Any, Any]:
            return np.frombuffer(bytearray(data), dtype)  # of its own memory, since torch wants to be able to write

        return cls(
            tokens=array(tokens, np.int64),
            positions=array(positions, np.int64),
            slots=array(slots, np.int64),
            wanted=array(wanted, np.int64),
            starts=array(starts, np.int32),
            lengths=array(lengths, np.int32),
            tables=array(tables, np.int32).reshape(len(lengths) // np.int32().itemsize, -1),
            singles=singles,
        )

    def rows(self, device: torch.device) -> Rows:
        return Rows(
            positions=on_device(self.positions, device),
            slots=on_device(self.slots, device),
            starts=on_device(self.starts, device),
            lengths=on_device(self.lengths, device),
            tables=on_device(self.tables, device),
            singles=self.singles,
            row_starts=tuple(self.starts.tolist()),
            row_lengths=tuple(self.lengths.tolist()),
        )


def on_device(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
