"""The paged KV pool: where all keys and values of a worker live.

    layer 0  ┌ block 0: K [heads, row] V [heads, row] ┐┌ block 1 ┐ ... ┌ block N-1 ┐
    layer 1  └ ...

A row holds K or V of one head: the elements of a block's tokens and, where they are quantised, their scales
(`common/kv_format.py`). One block of one layer is one contiguous run of bytes. Paging is vLLM's (PagedAttention, SOSP
2023). Who may use which block is the block manager's business, not the pool's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..common.kv_format import KvFormat
from ..kernels.quantised import TYPES, split_rows

Allocator = Callable[[int], torch.Tensor]
"""Number of bytes → a contiguous uint8 tensor of that many, on the pool's device, aligned to 64 bytes. Handed in, so
that the pool can be shared memory or an exportable device allocation."""


def cpu_allocator(size: int) -> torch.Tensor:
    """Plain zeroed host memory; pages become real when they are first written."""
    return torch.zeros(size, dtype=torch.uint8)


def device_allocator(device: torch.device) -> Allocator:
    """Host memory for a CPU, torch's own caching allocator for anything else."""
    if device.type == "cpu":
        return cpu_allocator
    return lambda size: torch.zeros(size, dtype=torch.uint8, device=device)


def type_name(dtype: torch.dtype) -> str:
    """The name by which `KvFormat` knows one of `TYPES`."""
    return next(name for name, kind in TYPES.items() if kind == dtype)


class KvPool:
    """The memory of one rank.

    layers   one tensor a layer, [num_blocks, 2 (K, V), heads_per_rank, block_size, head_dim]: a view of the elements,
             with gaps between rows where they are quantised
    scales   one float32 tensor a layer, [num_blocks, 2, heads_per_rank, block_size]; none where nothing is quantised
    kv       what the operations take: `layers`, or whole quantised rows [num_blocks, 2, heads_per_rank, row_bytes]
    flat     the pool as one flat tensor of bytes
    memory   the same as an array; None on an accelerator
    """

    def __init__(self, format: KvFormat, rank: int, num_blocks: int, allocator: Allocator) -> None:
        self.format = format
        self.rank = rank
        self.num_blocks = num_blocks
        self.flat = flat = allocator(format.num_layers * num_blocks * format.block_bytes)
        self.memory: np.ndarray[Any, np.dtype[np.uint8]] | None = flat.numpy() if flat.device.type == "cpu" else None
        rows = flat.view(format.num_layers, num_blocks, 2, format.heads_per_rank, format.row_bytes)
        elements, scales = split_rows(rows, TYPES[format.dtype], format.head_dim)
        self.layers = elements.unbind()
        self.scales: tuple[torch.Tensor, ...] = () if scales is None else scales.unbind()
        self.kv = rows.unbind() if format.quantised else self.layers

    def fill(self, blocks: Sequence[int], value: float) -> None:
        """Overwrite K and V of these blocks in every layer: tests poison free blocks with NaN."""
        for layer in self.layers:
            layer[list(blocks)] = 1.0 if self.scales else value
        for layer in self.scales:
            layer[list(blocks)] = value
