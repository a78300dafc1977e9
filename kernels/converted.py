"""Operations over a KV pool of another type than they compute in: around any `ops.Ops`, without its knowing.

Each step's keys and values pass through a small scratch pool of the compute type, which the base operations write and
read as if it were the whole. Correct everywhere, and the measure for kernels that convert while they read.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .ops import Heads, Ops, Rows
from .quantised import LARGEST, dequantise, quantise, split_rows


class ConvertedKvOps:
    """See `ops.Ops`. `kv` is [blocks, 2, G, block_size, D] of `kv_dtype`, or where that is a quantised type whole rows
    [blocks, 2, G, row bytes] uint8. All but the two operations that see it are the base's own, and so is the name: it
    tells how numbers are computed, and a `KvFormat` how they are kept.

    Attention reads even the step's own keys and values as they were stored, so that a prompt computed in chunks, at
    once or taken over from another worker has the same numbers.
    """

    def __init__(self, base: Ops, kv_dtype: torch.dtype) -> None:
        self._base = base
        self._dtype = kv_dtype
        self.name = base.name
        self.pack, self.rows, self.linear = base.pack, base.rows, base.linear
        self.add_norm, self.silu_mul = base.add_norm, base.silu_mul

    def rotate_and_store(
        self, qkv: torch.Tensor, heads: Heads, table: torch.Tensor, rows: Rows, kv: torch.Tensor
    ) -> None:
        elements, scales = self._split(kv, heads)
        count, block_size = len(qkv), elements.shape[3]
        scratch = qkv.new_zeros(-(-count // block_size), *elements.shape[1:])
        local = replace(rows, slots=torch.arange(count, device=qkv.device))
        self._base.rotate_and_store(qkv, heads, table, local, scratch)
        values = scratch.permute(0, 3, 1, 2, 4).flatten(0, 1)[:count]  # [T, 2, G, D]
        block, offset = rows.slots // block_size, rows.slots % block_size
        if scales is None:
            elements[block, :, :, offset] = values.to(self._dtype)
        else:
            elements[block, :, :, offset], scales[block, :, :, offset] = quantise(values, self._dtype)

    def attention(self, qkv: torch.Tensor, heads: Heads, rows: Rows, kv: torch.Tensor) -> torch.Tensor:
        used, places = torch.unique(rows.tables, return_inverse=True)
        elements, scales = self._split(kv[used], heads)
        values = elements if scales is None else dequantise(elements, scales)
        local = replace(rows, tables=places.to(rows.tables.dtype))
        return self._base.attention(qkv, heads, local, values.to(qkv.dtype).contiguous())

    def _split(self, kv: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Elements [blocks, 2, G, block_size, D], with their scales [blocks, 2, G, block_size] where they have any."""
        if self._dtype not in LARGEST:
            return kv, None
        return split_rows(kv, self._dtype, heads.dim)
