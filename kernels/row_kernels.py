"""Triton kernels of what is done with each row of a batch by itself: norms, the activation, rotation and the KV write.

All are bound by memory, so each fuses what can be done while a row is in registers. A row's numbers do not depend on
the others: its reductions run in one program, in one order. Computed in float32, rounded where a result is stored.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# A kernel's parameters have Triton's types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .ops import Heads, Rows
from .quantised import LARGEST, LEAST_SCALE, ROUND

_ACTIVATION_BLOCK = 1024
_HEADS = 16
"""Heads of a row that a program rotates: with 128 dimensions and 4 warps each thread has 8 pairs of them, 16 bytes of
bfloat16 on either side."""

_LEAST_SCALE = tl.constexpr(LEAST_SCALE)
_ROUND = tl.constexpr(ROUND)


def add_norm(x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, K] += residual [T, K]; returns each row of the sum over its root mean square, times gain [K].

    Any float type. The norm is of the sum as it is stored, and rounded before it meets the gain, as
    `reference.TorchOps` does it. Bytes: 4 T K elements.
    """
    out = torch.empty_like(x)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    _add_norm[(len(x),)](x, residual, gain, out, eps, width, block, num_warps=min(max(block // 512, 1), 16))
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 F] → [T, F]: silu of the first half times the second. Any float type. Bytes: 3 T F elements."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _silu_mul[(rows, triton.cdiv(width, _ACTIVATION_BLOCK))](gate_up, out, width, _ACTIVATION_BLOCK, num_warps=4)
    return out


def rotate_and_store(
    qkv: torch.Tensor, heads: Heads, table: torch.Tensor, rows: Rows, kv: torch.Tensor, kv_dtype: torch.dtype
) -> None:
    """See `ops.Ops.rotate_and_store`; head dimensions are powers of two from 16 on. `kv` is [blocks, 2, G, block_size,
    D] of a float type, or, where `kv_dtype` is quantised, whole rows [blocks, 2, G, row bytes] uint8, into which go the
    very bits that `quantised.quantise` computes of the values rounded to qkv's type.

    Queries are written back to qkv, keys and values only to the pool. A row whose slot is negative is not stored: so
    graphs are padded. Nothing here depends on the host's knowing anything.

    Bytes for a row: (H + 2 G) D elements read, H D written, 2 G D written in the pool's type, 4 D of the table.
    Idea: one launch for norm, rotation and KV write, as in FlashInfer's and TensorRT-LLM's fused kernels.
    """
    count = heads.queries + 2 * heads.keys
    grid = (len(qkv), triton.cdiv(count, _HEADS))
    largest = LARGEST.get(kv_dtype)
    block_size = kv.shape[3] // (heads.dim + torch.float32.itemsize) if largest else kv.shape[3]
    _rotate_and_store[grid](
        qkv, heads.query_gain, heads.key_gain, table, rows.positions, rows.slots, kv.view(kv_dtype), heads.eps,
        heads.queries, heads.keys, heads.dim, block_size, _HEADS, largest, num_warps=4,
    )  # fmt: skip


@triton.jit
def _add_norm(x, residual, gain, out, eps, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    there = column < width
    sum = tl.load(x + row + column, there, 0.0).to(tl.float32) + tl.load(residual + row + column, there, 0.0)
    sum = sum.to(x.dtype.element_ty)
    tl.store(x + row + column, sum, there)
    wide = sum.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)).to(x.dtype.element_ty)
    scaled = normed.to(tl.float32) * tl.load(gain + column, there, 0.0)
    tl.store(out + row + column, scaled.to(x.dtype.element_ty), there)


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    gate = tl.load(gate_up + 2 * row + column, there, 0.0).to(tl.float32)
    up = tl.load(gate_up + 2 * row + width + column, there, 0.0).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty)
    tl.store(out + row + column, (active.to(tl.float32) * up).to(out.dtype.element_ty), there)


@triton.jit
def _rotate_and_store(
    qkv, query_gain, key_gain, table, positions, slots, kv, eps,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, DIM // 2)[None, :]
    there = head < QUERIES + 2 * KEYS
    at = qkv + (row * (QUERIES + 2 * KEYS) + head) * DIM + lane
    first, second = tl.load(at, there, 0.0), tl.load(at + DIM // 2, there, 0.0)
    low, high = first.to(tl.float32), second.to(tl.float32)
    if query_gain is not None:
        squares = tl.sum(low * low + high * high, 1)
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        is_query = head < QUERIES
        low *= scale * tl.where(is_query, tl.load(query_gain + lane), tl.load(key_gain + lane)).to(tl.float32)
        gain = tl.where(is_query, tl.load(query_gain + DIM // 2 + lane), tl.load(key_gain + DIM // 2 + lane))
        high *= scale * gain.to(tl.float32)
    angle = table + tl.load(positions + row) * DIM + lane
    cosine, sine = tl.load(angle), tl.load(angle + DIM // 2)
    turned = head < QUERIES + KEYS
    first = tl.where(turned, (low * cosine - high * sine).to(first.dtype), first)
    second = tl.where(turned, (high * cosine + low * sine).to(second.dtype), second)
    tl.store(at, first, head < QUERIES)
    tl.store(at + DIM // 2, second, head < QUERIES)

    slot = tl.load(slots + row)
    if slot >= 0:
        # In a block lie the keys of all heads, then the values of all heads: here as in qkv.
        run = slot // BLOCK_SIZE * (2 * KEYS) + head - QUERIES
        _keep(first, second, kv, run, slot % BLOCK_SIZE, lane, there & (head >= QUERIES), DIM, BLOCK_SIZE, LARGEST)


@triton.jit
def _keep(
    first, second, kv, run, offset, lane, mine, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, LARGEST: tl.constexpr
):  # fmt: skip
    """Store halves of vectors [HEADS, DIM / 2] as token `offset` of the runs [HEADS, 1] of a pool, where `mine`."""
    if LARGEST is None:
        to = kv + (run * BLOCK_SIZE + offset) * DIM + lane
        tl.store(to, first.to(kv.dtype.element_ty), mine)
        tl.store(to + DIM // 2, second.to(kv.dtype.element_ty), mine)
    else:
        low, high = first.to(tl.float32), second.to(tl.float32)
        largest = tl.reduce(_larger(tl.abs(low), tl.abs(high)), 1, _larger)
        scale = _larger(largest * (1.0 / LARGEST), _LEAST_SCALE)[:, None]
        elements = kv + run * (BLOCK_SIZE * (DIM + 4))
        to = elements + offset * DIM + lane
        tl.store(to, _element(low, scale, kv.dtype.element_ty, LARGEST), mine)
        tl.store(to + DIM // 2, _element(high, scale, kv.dtype.element_ty, LARGEST), mine)
        scales = (elements + BLOCK_SIZE * DIM).to(tl.pointer_type(tl.float32), bitcast=True)
        tl.store(scales + offset, scale, mine)


@triton.jit
def _element(value, scale, ELEMENT: tl.constexpr, LARGEST: tl.constexpr):
    """As `quantised.quantise` rounds it."""
    quotient = tl.minimum(tl.maximum(tl.div_rn(value, scale), -LARGEST), LARGEST)
    if ELEMENT.is_int():
        quotient = (quotient + _ROUND) - _ROUND
    return quotient.to(ELEMENT)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
