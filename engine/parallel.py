"""Tensor parallelism from outside: operations over one rank's shard, which the model takes for the whole.

gpt-fast's way: the model is written once, without ranks. It computes with its own heads and inner features
(`shard.py`), and where a product needs what the others have, these operations exchange it.
"""

from __future__ import annotations

import torch

from ..kernels.ops import Ops
from .group import RankGroup
from .model import Weights
from .shard import Shard


class ParallelOps:
    """See `kernels.ops.Ops`: those of `base`, but for four products. `weights` are the rank's own, and tell by which
    matrix an operation is called with what is to be done.

    - The embedding: each rank looks up the tokens of its part of the vocabulary; the sum has them all.
    - output and down: partial products are summed over the ranks.
    - The head: rank 0 gathers all logits; on other ranks the result is of no use.

    `deterministic`: a row's sums have the same bits in every batch. They depend on the number of ranks, which therefore
    is part of the name.
    """

    def __init__(
        self, base: Ops, group: RankGroup, shard: Shard, weights: Weights, deterministic: bool = False
    ) -> None:
        self._base = base
        self._group = group
        self._sum = group.sum_in_order if deterministic else group.sum
        self._shard = shard
        self._head = weights.head
        self._summed = {id(matrix) for layer in weights.layers for matrix in (layer.output, layer.down)}
        self.name = f"{base.name}-tp{group.size}" if deterministic else base.name
        self.pack, self.add_norm, self.silu_mul = base.pack, base.add_norm, base.silu_mul
        self.rotate_and_store, self.attention = base.rotate_and_store, base.attention

    def rows(self, packed: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        part = self._shard.vocabulary.part
        mine = (indices >= part.start) & (indices < part.stop)
        found = self._base.rows(packed, torch.where(mine, indices - part.start, 0))
        return self._group.sum(found.mul_(mine[:, None]))

    def linear(
        self, x: torch.Tensor, packed: torch.Tensor, features: int, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if packed is self._head:
            return self._logits(x, features)
        if id(packed) not in self._summed:
            return self._base.linear(x, packed, features, bias)
        once = bias if self._group.rank == 0 else None  # all ranks hold the same
        return self._sum(self._base.linear(x, packed, features, once))

    def _logits(self, x: torch.Tensor, features: int) -> torch.Tensor:
        part = self._base.linear(x, self._head, self._shard.vocabulary_rows)
        if not len(x):  # nobody samples in this step
            return part
        parts = self._group.gather(part)
        return torch.cat(parts, dim=1)[:, :features] if parts else part
