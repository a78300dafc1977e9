"""The operations in plain torch: every device, every type, and the oracle of the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .ops import Heads, Rows


class TorchOps:
    """See `ops.Ops` for what each operation computes. The numeric form is the framework's own: `F.linear`, SDPA."""

    name = "torch"

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.contiguous()

    def rows(self, packed: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return packed[indices]

    def linear(
        self, x: torch.Tensor, packed: torch.Tensor, features: int, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.linear(x, packed, bias)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _normalise(x.add_(residual), gain, eps), x

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rotate_and_store(
        self, qkv: torch.Tensor, heads: Heads, table: torch.Tensor, rows: Rows, kv: torch.Tensor
    ) -> None:
        count = len(qkv)
        split = qkv.view(count, heads.queries + 2 * heads.keys, heads.dim)
        query, key, value = torch.split(split, [heads.queries, heads.keys, heads.keys], dim=1)
        if heads.query_gain is not None and heads.key_gain is not None:
            query.copy_(_normalise(query, heads.query_gain, heads.eps))
            key.copy_(_normalise(key, heads.key_gain, heads.eps))
        cos, sin = table[rows.positions].to(qkv.dtype)[:, :, None].unbind(1)  # [T, 1, D / 2] each
        turned = split[:, : heads.queries + heads.keys]
        low, high = turned.chunk(2, dim=-1)
        turned.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))
        block_size = kv.shape[3]
        block, offset = rows.slots // block_size, rows.slots % block_size
        kv[block, 0, :, offset] = key
        kv[block, 1, :, offset] = value

    def attention(self, qkv: torch.Tensor, heads: Heads, rows: Rows, kv: torch.Tensor) -> torch.Tensor:
        count = len(qkv)
        query = qkv.view(count, -1, heads.dim)[:, : heads.queries]
        parts = []
        if rows.singles:
            parts.append(_decode(query[: rows.singles], heads, rows, kv))
        parts.extend(
            _prefill(query[rows.row_starts[i] : rows.row_starts[i + 1]], heads, rows, kv, i)
            for i in range(rows.singles, len(rows.row_lengths))
        )
        return torch.cat(parts).view(count, heads.queries * heads.dim)


def _normalise(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """The last dimension over its root mean square, computed in float32 and rounded before it meets the gain."""
    wide = x.float()
    return gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _decode(query: torch.Tensor, heads: Heads, rows: Rows, kv: torch.Tensor) -> torch.Tensor:
    """All sequences with one row at once: gather their contexts, padded to the longest. [B, H, D] → [B, H, D]"""
    batch, block_size = len(query), kv.shape[3]
    longest = max(rows.row_lengths[:batch])
    places = rows.table_starts[:batch, None] + torch.arange(-(-longest // block_size), device=query.device)
    blocks = rows.tables[places.clamp_(max=len(rows.tables) - 1)]  # beyond a sequence's own: masked below
    context = kv[blocks].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # [2, B, G, W * block_size, D]
    seen = torch.arange(context.shape[3], device=query.device)
    length = rows.lengths[:batch, None]
    mask = seen < length
    if heads.window:
        mask &= seen >= length - heads.window
    # Padding holds whatever its block holds, perhaps NaN, which no mask on the scores would undo.
    key, value = context.masked_fill_(~mask[:, None, :, None], 0.0)
    out = F.scaled_dot_product_attention(
        query[:, :, None], key, value, attn_mask=mask[:, None, None], enable_gqa=heads.queries != heads.keys
    )
    return out[:, :, 0]


def _prefill(query: torch.Tensor, heads: Heads, rows: Rows, kv: torch.Tensor, sequence: int) -> torch.Tensor:
    """One sequence's chunk, whose first row may lie behind a computed or cached prefix. [N, H, D] → [N, H, D]"""
    length, block_size, count = rows.row_lengths[sequence], kv.shape[3], len(query)
    begin = int(rows.table_starts[sequence])
    blocks = rows.tables[begin : begin + -(-length // block_size)]
    key, value = kv[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]  # [G, length, D] each
    mask = None
    if count < length or heads.window:
        seen = torch.arange(length, device=query.device)
        place = torch.arange(length - count, length, device=query.device)[:, None]
        mask = seen <= place
        if heads.window:
            mask &= seen > place - heads.window
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=heads.queries != heads.keys,
    )
    return out[0].transpose(0, 1)


def verify(
    query: torch.Tensor, heads: Heads, rows: Rows, kv: torch.Tensor, trees: torch.Tensor | None = None
) -> torch.Tensor:
    """What `attention.verify` computes, over a pool of the queries' type: one sequence after the other, each token's
    sight written down as a mask. [B, Q, H, D] → [B, Q, H, D]"""
    out = torch.zeros_like(query)
    count, block_size = query.shape[1], kv.shape[3]
    draft = torch.arange(count, device=query.device)
    chain = (1 << draft + 1) - 1  # bits of a token and those before it
    for i, length in enumerate(rows.lengths[: len(query)].tolist()):
        if length == 0:
            continue
        bits = (chain if trees is None else trees[i])[:, None] >> draft & 1  # [Q, Q]
        begin = int(rows.table_starts[i])
        blocks = rows.tables[begin : begin + -(-length // block_size)]
        key, value = kv[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]  # [G, length, D] each
        seen = torch.arange(length - count, device=query.device)
        place = length - count + bits.sum(1, keepdim=True) - 1
        before = seen > place - heads.window if heads.window else torch.ones_like(seen, dtype=torch.bool)
        mask = torch.cat((before.expand(count, -1), bits.bool()), dim=1)
        out[i] = F.scaled_dot_product_attention(
            query[i].transpose(0, 1)[None],
            key[None],
            value[None],
            attn_mask=mask,
            enable_gqa=heads.queries != heads.keys,
        )[0].transpose(0, 1)
    return out
