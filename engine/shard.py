"""Tensor parallelism: which part of a model each rank computes with. Pure; no torch here.

Megatron-LM's division (arXiv 1909.08053), which needs two sums over the ranks a layer and no other exchange:

    qkv, gate_up        by rows, so that a rank has whole heads, and inner features, to itself
    output, down        by columns: each rank multiplies what it has, and the products are summed
    embedding, head     by rows of the vocabulary

Where there are fewer KV heads than ranks, neighbours hold copies of one (`KvFormat.heads`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..common.errors import InvalidRequest
from ..common.kv_format import KvFormat
from .model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a checkpoint's tensor: how long it is there, and the part that a rank reads."""

    size: int
    part: range


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a model, as the axes of its tensors.

    config            what the rank computes with: its own heads and inner features; the vocabulary is the whole one
    vocabulary_rows   rows of the rank's embedding and head, equal on all ranks: beyond `vocabulary.part` they are 0
    """

    config: ModelConfig
    tp: int
    rank: int
    hidden: Axis
    head_dim: Axis
    queries: Axis
    keys: Axis
    inner: Axis
    vocabulary: Axis
    vocabulary_rows: int


def shard(config: ModelConfig, tp: int = 1, rank: int = 0) -> Shard:
    """The part of rank `rank` of `tp`; with tp 1 it is the whole. Raises `InvalidRequest` where heads or inner
    features do not divide."""
    for count, what in ((config.num_heads, "query heads"), (config.intermediate_size, "inner features")):
        if count % tp:
            raise InvalidRequest(f"{count} {what} do not divide among {tp} ranks", param="tp")
    queries = _share(config.num_heads, tp, rank)
    keys = KvFormat(config.num_layers, config.num_kv_heads, config.head_dim, 1, "float32", tp).heads(rank)
    inner = _share(config.intermediate_size, tp, rank)
    rows = -(-config.vocab_size // tp)
    first = min(rank * rows, config.vocab_size)
    own = replace(config, num_heads=len(queries), num_kv_heads=len(keys), intermediate_size=len(inner))
    return Shard(
        config=own,
        tp=tp,
        rank=rank,
        hidden=_whole(config.hidden_size),
        head_dim=_whole(config.head_dim),
        queries=_heads(config.num_heads, queries, config.head_dim),
        keys=_heads(config.num_kv_heads, keys, config.head_dim),
        inner=Axis(config.intermediate_size, inner),
        vocabulary=Axis(config.vocab_size, range(first, min(first + rows, config.vocab_size))),
        vocabulary_rows=rows,
    )


def _share(count: int, tp: int, rank: int) -> range:
    each = count // tp
    return range(rank * each, (rank + 1) * each)


def _whole(size: int) -> Axis:
    return Axis(size, range(size))


def _heads(count: int, part: range, dim: int) -> Axis:
    """The axis of `count` heads of `dim` features each, one after the other."""
    return Axis(count * dim, range(part.start * dim, part.stop * dim))
