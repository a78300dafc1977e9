"""The operations that the model is made of, as an interface, and the choice between its implementations.

`reference.TorchOps` works on any device and type and is the oracle of all tests; `native.NativeOps` is compiled C for
float32 on CPU, `triton_ops.TritonOps` kernels for a GPU. This folder imports nothing of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the rows of a flat batch belong. T rows in S sequences; rows of a sequence are adjacent and in order.

    positions     [T] int64: position of each row in its sequence
    slots         [T] int64: block * block_size + offset, where the row's K and V are kept; -1, which only operations
                  that a graph is recorded of meet: nowhere
    starts        [S + 1] int32: first row of each sequence, then T
    lengths       [S] int32: tokens of the sequence whose K and V exist once this step's are stored
    tables        [N] int32: the blocks of all sequences, one sequence after the other
    table_starts  [S + 1] int32: where each sequence's blocks begin in `tables`, then N. It may hold more than it needs
    singles       sequences with one row; they come first
    row_starts, row_lengths      starts and lengths as Python integers
    """

    positions: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    table_starts: torch.Tensor
    singles: int
    row_starts: tuple[int, ...]
    row_lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of one attention layer, with the RMS gains of queries and keys where the model normalises them.

    `window`: tokens that a query sees, itself included; 0: all before it.
    """

    queries: int
    keys: int
    dim: int
    window: int = 0
    query_gain: torch.Tensor | None = None
    key_gain: torch.Tensor | None = None
    eps: float = 0.0


class Ops(Protocol):
    """`name` is the numeric choice that enters the fingerprint: equal names compute equal numbers."""

    name: str

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """Bring a weight [N, K] into the layout that `linear` and `rows` want."""
        ...

    def rows(self, packed: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Rows [T, K] of a packed weight: the embedding of `indices` [T]."""
        ...

    def linear(
        self, x: torch.Tensor, packed: torch.Tensor, features: int, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, K] times the packed weight [features, K], transposed, plus the bias [features]: [T, features]."""
        ...

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the residual [T, K] to x [T, K] in place, and divide each row of the sum by its root mean square, times
        the gain [K]: (norm, sum). The sum is x itself."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2 F] → [T, F]: silu of the first half times the second."""
        ...

    def rotate_and_store(
        self, qkv: torch.Tensor, heads: Heads, table: torch.Tensor, rows: Rows, kv: torch.Tensor
    ) -> None:
        """Normalise (where asked) and rotate queries and keys of qkv [T, (H + 2 G) D], queries in place, and copy keys
        and values into kv [blocks, 2, G, block_size, D]. What becomes of the keys in qkv is open. `table`:
        [positions, 2, D / 2] cos and sin."""
        ...

    def attention(self, qkv: torch.Tensor, heads: Heads, rows: Rows, kv: torch.Tensor) -> torch.Tensor:
        """Causal attention of each row's queries over its sequence's K and V, read through the block tables:
        [T, H D]."""
        ...
