"""Elements with scales: how keys and values are kept in eight bits, and how they lie in memory.

Symmetric, one scale for each token and head, so that a token can be stored, moved and read without its neighbours.
Everything here is plain torch and runs on any device; the arithmetic is elementwise in float32, so that the same
values give the same bits wherever they are quantised.
"""

from __future__ import annotations

import torch

TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8_e4m3": torch.float8_e4m3fn,
}
"""KV types by name."""

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The quantised types, and the element that a token's largest value becomes."""

LEAST_SCALE = torch.finfo(torch.float32).tiny
ROUND = 1.5 * 2**23
"""Added and taken away, it rounds a small float32 to the nearest whole number, halves to the even one. `torch.round`
would start a team of threads from 2048 elements on, where all else here does from 32768 on."""


def quantise(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """values [..., D] of a float type → elements [..., D] of `dtype`, a key of `LARGEST`, and scales [...] float32.

    An element is off by at most half a step: scale / 2 in int8, 1/16 of the value in float8 (or scale / 1024, where
    that is more). Zeros stay zeros. A value that is not finite makes its scale, and so all its token's values,
    not finite either: a broken computation stays visible.
    """
    wide = values.float()
    # Times the reciprocal, because a device may well make that of a division by a number.
    scales = (wide.abs().amax(-1) * (1.0 / LARGEST[dtype])).clamp_(min=LEAST_SCALE)
    wide = (wide / scales[..., None]).clamp_(-LARGEST[dtype], LARGEST[dtype])  # a quotient may round to beyond it
    if dtype == torch.int8:
        wide.add_(ROUND).sub_(ROUND)
    return wide.to(dtype), scales


def dequantise(elements: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """elements [..., D] and scales [...] → values [..., D] float32."""
    return elements.float().mul_(scales[..., None])


def split_rows(rows: torch.Tensor, dtype: torch.dtype, head_dim: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Views into rows [..., row bytes] uint8 of any number of tokens: elements [..., tokens, head_dim], and scales
    [..., tokens] float32 where `dtype` has them. `common/kv_format.py` says what a row is."""
    if dtype not in LARGEST:
        tokens = rows.shape[-1] // (head_dim * dtype.itemsize)
        return rows.view(dtype).view(*rows.shape[:-1], tokens, head_dim), None
    tokens = rows.shape[-1] // (head_dim + torch.float32.itemsize)
    size = tokens * head_dim
    elements = rows[..., :size].view(dtype).view(*rows.shape[:-1], tokens, head_dim)
    return elements, rows[..., size:].view(torch.float32)
