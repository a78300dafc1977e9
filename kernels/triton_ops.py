"""The operations on an accelerator: kernels in Triton, and matrix products by cuBLAS through torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import matmul_kernels, row_kernels
from .attention import attend
from .ops import Heads, Rows


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
