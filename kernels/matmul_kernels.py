"""A matrix product in Triton whose rows do not know of each other, for the deterministic mode.

cuBLAS chooses tiles, and cuts the sum over k, by the number of rows, so a row's bits change with its batch. Here all
is fixed: one tile, one loop over k from the front, one compiled program for any number of rows. See "Defeating
Nondeterminism in LLM Inference" (Thinking Machines, 2025).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# A kernel's parameters have Triton's types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE_ROWS, TILE_FEATURES, TILE_BYTES = 128, 64, 128
WARPS, STAGES = 4, 4
"""A compromise, since it may not depend on the batch. With few rows weights must stream, so the tile has few features:
64 programs of 4096 features, each with 8 KiB of weights a stage on their way. With many rows 128 of them share a tile
of weights: 43 operations a byte of L2 traffic. 24 KiB a stage leave room for two programs on a multiprocessor."""

_GROUP = 8


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] times weight [N, K], transposed, plus bias [N]: [M, N]; one float type, sums in float32.

    A row of the result depends on that row of x alone, bit for bit: not on M, nor on its place. Bytes: (M K + N K +
    M N) elements where M is at most `TILE_ROWS`; operations: 2 M N K.
    """
    rows, depth = x.shape
    features = len(weight)
    out = x.new_empty(rows, features)
    interpreted = not isinstance(_matmul, triton.runtime.JITFunction)
    grid = (triton.cdiv(rows, TILE_ROWS) * triton.cdiv(features, TILE_FEATURES),)
    _matmul[grid](
        x, weight, bias, out, rows, features, depth,
        TILE_ROWS, TILE_FEATURES, TILE_BYTES // x.itemsize, _GROUP, interpreted, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def _matmul(
    x, weight, bias, out, rows, features, depth,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # Programs that run side by side take GROUP tiles of rows and as many of features as there are, so that both stay
    # in the L2 cache.
    tiles = tl.cdiv(rows, ROWS)
    in_group = GROUP * tl.cdiv(features, FEATURES)
    group = tl.program_id(0) // in_group
    size = tl.minimum(tiles - group * GROUP, GROUP)
    row = (group * GROUP + tl.program_id(0) % in_group % size) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(0) % in_group // size * FEATURES + tl.arange(0, FEATURES)
    inner = tl.arange(0, DEPTH)
    from_x = x + row.to(tl.int64)[:, None] * depth + inner[None, :]
    from_weight = weight + feature.to(tl.int64)[None, :] * depth + inner[:, None]
    sum = tl.zeros((ROWS, FEATURES), tl.float32)
    for first in range(0, depth, DEPTH):
        left = inner < depth - first
        part = tl.load(from_x + first, (row < rows)[:, None] & left[None, :], 0.0)
        column = tl.load(from_weight + first, left[:, None] & (feature < features)[None, :], 0.0)
        if WIDEN:  # the interpreter multiplies bfloat16 wrongly
            part, column = part.to(tl.float32), column.to(tl.float32)
        sum = tl.dot(part, column, sum, input_precision="ieee")
    if bias is not None:
        sum += tl.load(bias + feature, feature < features, 0.0).to(tl.float32)[None, :]
    to = out + row.to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(to, sum.to(out.dtype.element_ty), (row < rows)[:, None] & (feature < features)[None, :])
