"""The operations on an accelerator: kernels in Triton, and matrix products by cuBLAS through torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import matmul_kernels, row_kernels
from .attention import attend
from .ops import Heads, Rows
from .quantised import LARGEST, split_rows


class TritonOps:
    """See `ops.Ops`. Any float type; the KV pool is read and written as it is kept, in any of `quantised.TYPES`.

    `deterministic`: a row's numbers are the same bits alone and in any batch, decoded or prefilled, in chunks of any
    size. Matrix products and attention then have one fixed form, which costs speed; the other operations are so anyway.
    """

    def __init__(self, kv_dtype: torch.dtype, deterministic: bool = False) -> None:
        self.name = "triton-deterministic" if deterministic else "triton"
        self._kv_dtype = kv_dtype
        self._deterministic = deterministic
        self._product = matmul_kernels.matmul if deterministic else F.linear
        self.silu_mul = row_kernels.silu_mul

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.contiguous()

    def rows(self, packed: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return packed[indices]

    def linear(
        self, x: torch.Tensor, packed: torch.Tensor, features: int, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._product(x, packed, bias)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return row_kernels.add_norm(x, residual, gain, eps), x

    def rotate_and_store(
        self, qkv: torch.Tensor, heads: Heads, table: torch.Tensor, rows: Rows, kv: torch.Tensor
    ) -> None:
        row_kernels.rotate_and_store(qkv, heads, table, rows, kv, self._kv_dtype)

    def attention(self, qkv: torch.Tensor, heads: Heads, rows: Rows, kv: torch.Tensor) -> torch.Tensor:
        query = qkv.view(len(qkv), -1, heads.dim)[:, : heads.queries]
        return attend(query, heads, rows, kv, self._kv_dtype, self._deterministic).flatten(1)

    def rehearse(self, device: torch.device, dtype: torch.dtype, heads: Heads, block_size: int) -> None:
        """One sequence's decode and another's prompt, of nothing, through every kernel. Raises `triton.TritonError`
        where one of them does not compile for this device, or wants more of its shared memory than it has."""
        places = torch.tensor([0, 0, 1], device=device)
        starts, lengths, tables, table_starts = (
            torch.tensor(values, dtype=torch.int32, device=device)
            for values in ((0, 1, 3), (1, 2), (0, 1, 2), (0, 1, 3))
        )  # two blocks for two tokens, should a block hold no more than one
        slots = torch.tensor([0, block_size, block_size + 1], device=device)
        rows = Rows(places, slots, starts, lengths, tables, table_starts, 1, (0, 1, 3), (1, 2))
        row_bytes = block_size * (heads.dim * self._kv_dtype.itemsize + (4 if self._kv_dtype in LARGEST else 0))
        pool = torch.zeros(3, 2, heads.keys, row_bytes, dtype=torch.uint8, device=device)
        elements, scales = split_rows(pool, self._kv_dtype, heads.dim)
        kv = elements if scales is None else pool
        x = torch.zeros(3, heads.dim, dtype=dtype, device=device)
        qkv = x.repeat(1, heads.queries + 2 * heads.keys)
        table = torch.zeros(2, 2, heads.dim // 2, device=device)
        norm, total = self.add_norm(x, x.clone(), x[0], 1e-6)
        self.linear(norm, total, len(total))
        self.silu_mul(x)
        self.rotate_and_store(qkv, heads, table, rows, kv)
        self.attention(qkv, heads, rows, kv)
