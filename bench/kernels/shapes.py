"""Shapes that kernels are measured on, and inputs of them: random, in pools whose blocks lie in no order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...kernels.ops import Heads, Rows

BLOCK = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one layer, and what of it is measured. `dtype`: of activations, weights and pool.

    decodes     (batch, context) of decode attention
    ragged      lengths of one batch
    drafts      (batch, context, draft tokens) of verify
    prefills    (prompt, tokens before it that are cached)
    rows        of the small operations
    sampled     batch sizes of sampling
    packed      bytes of a pool that is packed
    """

    heads: Heads
    hidden: int
    inner: int
    vocab: int
    dtype: torch.dtype
    decodes: tuple[tuple[int, int], ...]
    ragged: tuple[int, ...]
    drafts: tuple[tuple[int, int, int], ...]
    prefills: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    sampled: tuple[int, ...]
    packed: int

    @property
    def token_bytes(self) -> int:
        """K and V of one token in this layer."""
        return 2 * self.heads.keys * self.heads.dim * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Queries of one row, and as much again for what attention writes."""
        return self.heads.queries * self.heads.dim * self.dtype.itemsize


LLAMA_8B = Shape(
    heads=Heads(queries=32, keys=8, dim=128),
    hidden=4096,
    inner=14336,
    vocab=128256,
    dtype=torch.bfloat16,
    decodes=tuple((batch, context) for context in (1024, 4096, 32768) for batch in (1, 8, 64, 128, 256)),
    ragged=tuple(64 + (index * 7919) % 8000 for index in range(128)),
    drafts=((64, 1024, 4), (64, 1024, 8), (64, 4096, 8)),
    prefills=((4096, 0), (16384, 0), (2048, 14336)),
    rows=(1, 64, 256, 8192),
    sampled=(1, 64, 256),
    packed=1 << 30,
)

TINY = Shape(
    heads=Heads(queries=4, keys=2, dim=32),
    hidden=64,
    inner=96,
    vocab=512,
    dtype=torch.float32,
    decodes=((2, 40),),
    ragged=(1, 16, 17, 70),
    drafts=((2, 40, 4),),
    prefills=((24, 20),),
    rows=(3,),
    sampled=(3,),
    packed=1 << 16,
)
"""For Triton's interpreter: the same code from end to end, in seconds."""


def random(*size: int, like: torch.dtype, device: torch.device) -> torch.Tensor:
    """Fresh each time."""
    return torch.randn(size, dtype=torch.float32 if device.type == "cpu" else like, device=device).to(like)


def pool(shape: Shape, tokens: int, device: torch.device) -> torch.Tensor:
    """[blocks, 2, G, BLOCK, D] of one layer, with room for at least so many tokens."""
    heads = shape.heads
    return random(-(-tokens // BLOCK), 2, heads.keys, BLOCK, heads.dim, like=shape.dtype, device=device)


def rows(counts: Sequence[int], lengths: Sequence[int], kv: torch.Tensor, first: int = 0) -> Rows:
    """Sequences with the last `counts[i]` of `lengths[i]` tokens as rows, whose blocks are drawn from those of `kv`
    from number `first` on, each in use once. Sequences with one row must come first."""
    device = kv.device
    held = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(len(kv) - first)[: sum(held)] + first
    ends = torch.tensor([0, *held]).cumsum(0)
    starts = torch.tensor([0, *counts]).cumsum(0)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    before = torch.tensor(lengths) - torch.tensor(counts)
    positions = torch.arange(int(starts[-1])) - starts[owner] + before[owner]
    slots = order[ends[owner] + positions // BLOCK] * BLOCK + positions % BLOCK
    return Rows(
        positions=positions.to(device),
        slots=slots.to(device),
        starts=starts.int().to(device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        tables=order.int().to(device),
        table_starts=ends.int().to(device),
        singles=sum(count == 1 for count in counts),
        row_starts=tuple(starts.tolist()),
        row_lengths=tuple(lengths),
    )
