"""Attention over the paged pool: decode, verify and prefill, each against its roofline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ...kernels import attention
from ...kernels.ops import Rows
from ...kernels.reference import TorchOps
from ..timing import sets_beyond_cache
from .cases import Case, relative_error
from .shapes import Shape, pool, random, rows

MOST_BYTES = 36 << 30
"""Of one case's pools. What does not fit is left out."""
CHECKED_BYTES = 6 << 30
"""Cases for which the reference would need more are not compared with it: it gathers contexts in float32, and keeps
all scores of a prompt."""


def cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """All of the shape's that fit the device."""
    for batch, context in shape.decodes:
        if batch * context * shape.token_bytes <= MOST_BYTES:
            yield decode(shape, device, [context] * batch, f"batch {batch}, context {context}")
    yield decode(shape, device, shape.ragged, f"ragged batch of {len(shape.ragged)}, {sum(shape.ragged)} tokens")
    for batch, context, draft in shape.drafts:
        yield verify(shape, device, batch, context, draft)
    for prompt, cached in shape.prefills:
        yield prefill(shape, device, prompt, cached)


def decode(
    shape: Shape, device: torch.device, lengths: Sequence[int], name: str, config: attention.Config | None = None
) -> Case:
    """One row of each sequence. Reads each key and value once."""
    size = sum(lengths) * shape.token_bytes
    tables = _tables(shape, device, [1] * len(lengths), lengths)
    heads = shape.heads
    calls = [
        partial(attention.decode, _queries(shape, device, len(lengths)), heads, own, kv, shape.dtype, config=config)
        for own, kv in tables
    ]
    own, kv = tables[0]

    def error() -> float:
        query = _queries(shape, device, len(lengths))
        out = torch.full_like(query, float("nan"))
        attention.decode(query, heads, own, kv, shape.dtype, out=out, config=config)
        return relative_error(out, _reference(shape, query, own, kv))

    gathered = len(lengths) * max(lengths) * shape.token_bytes * 4 // shape.dtype.itemsize
    checked = error if gathered <= CHECKED_BYTES else None
    flops = 4 * sum(lengths) * heads.queries * heads.dim
    return Case("decode attention", name, size + 2 * len(lengths) * shape.row_bytes, flops, calls, checked)


def verify(shape: Shape, device: torch.device, batch: int, context: int, draft: int) -> Case:
    """The last `draft` tokens of each sequence, as a chain: no more KV bytes than decode, so no more time."""
    lengths = [context] * batch
    tables = _tables(shape, device, [draft] * batch, lengths)
    heads, size = shape.heads, (batch, draft, shape.heads.queries, shape.heads.dim)
    calls = [
        partial(attention.verify, random(*size, like=shape.dtype, device=device), heads, own, kv, shape.dtype)
        for own, kv in tables
    ]
    own, kv = tables[0]

    def error() -> float:
        query = random(*size, like=shape.dtype, device=device)
        out = torch.full_like(query, float("nan"))
        attention.verify(query, heads, own, kv, shape.dtype, out=out)
        return relative_error(out.flatten(0, 1), _reference(shape, query.flatten(0, 1), own, kv))

    name = f"batch {batch}, context {context}, {draft} queries"
    size_bytes = batch * (context * shape.token_bytes + 2 * draft * shape.row_bytes)
    flops = 4 * batch * draft * context * heads.queries * heads.dim
    return Case("verify attention", name, size_bytes, flops, calls, error)


def prefill(
    shape: Shape, device: torch.device, prompt: int, cached: int, config: attention.Config = attention.PREFILL
) -> Case:
    """One sequence's prompt, causal, behind `cached` tokens that are in the pool."""
    heads, whole = shape.heads, prompt + cached
    tables = _tables(shape, device, [prompt], [whole])

    def call(query: torch.Tensor, own: Rows, kv: torch.Tensor, out: torch.Tensor) -> None:
        attention.prefill(query, heads, own, kv, shape.dtype, out=out, config=config)

    queries = [_queries(shape, device, prompt) for _ in tables]
    calls = [partial(call, query, *own, torch.empty_like(query)) for query, own in zip(queries, tables, strict=True)]
    own, kv = tables[0]

    def error() -> float:
        query = _queries(shape, device, prompt)
        out = torch.full_like(query, float("nan"))
        call(query, own, kv, out)
        return relative_error(out, _reference(shape, query, own, kv))

    name = f"{prompt} tokens" + (f" behind {cached}" if cached else "")
    pairs = prompt * cached + prompt * (prompt + 1) // 2
    size = whole * shape.token_bytes + 2 * prompt * shape.row_bytes
    checked = error if 4 * prompt * whole * heads.queries <= CHECKED_BYTES else None
    return Case("prefill attention", name, size, 4 * pairs * heads.queries * heads.dim, calls, checked)


def _tables(
    shape: Shape, device: torch.device, counts: Sequence[int], lengths: Sequence[int]
) -> list[tuple[Rows, torch.Tensor]]:
    """Sets of sequences, each with a pool of its own, so that no cache holds what is read next."""
    tokens = sum(-(-length // 16) * 16 for length in lengths)
    size = tokens * shape.token_bytes
    count = 1 if 2 * size > MOST_BYTES else sets_beyond_cache(device, size)
    pools = [pool(shape, tokens, device) for _ in range(count)]
    return [(rows(counts, lengths, kv), kv) for kv in pools]


def _queries(shape: Shape, device: torch.device, count: int) -> torch.Tensor:
    return random(count, shape.heads.queries, shape.heads.dim, like=shape.dtype, device=device)


def _reference(shape: Shape, query: torch.Tensor, own: Rows, kv: torch.Tensor) -> torch.Tensor:
    """[T, H, D] float32, from the same numbers."""
    heads = shape.heads
    qkv = torch.zeros(len(query), heads.queries + 2 * heads.keys, heads.dim, device=query.device)
    qkv[:, : heads.queries] = query
    return TorchOps().attention(qkv.flatten(1), heads, own, kv.float()).view(query.shape)
