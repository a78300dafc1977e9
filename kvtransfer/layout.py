"""The layout plan: which bytes go where when the two ends keep their KV differently. Pure arithmetic.

    route    heads that travel from one rank of the source to one rank of the target
    piece    one target block of one layer along one route, as the target keeps it: [2 (K, V), heads, row]

With equal tensor parallelism a piece is a whole block. Intersecting the heads of two shardings is DistServe's idea
(OSDI '24); heads that several source ranks hold copies of are taken from whichever has least to send.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..common.errors import FingerprintMismatch
from ..common.kv_format import KvFormat
from ..kernels.move import Grid, Places


@dataclass(frozen=True, slots=True)
class Route:
    """`heads` heads, from `source_head` on of the source rank's own to `target_head` on of the target rank's own."""

    source_rank: int
    target_rank: int
    source_head: int
    target_head: int
    heads: int


def routes(source: KvFormat, target: KvFormat) -> tuple[Route, ...]:
    """What each rank of the source sends to each rank of the target: every head that a target rank keeps, once.
    Raises `FingerprintMismatch` where the two do not hold the KV of one model."""
    if (source.num_layers, source.num_kv_heads, source.head_dim) != (
        target.num_layers, target.num_kv_heads, target.head_dim,
    ):  # fmt: skip
        raise FingerprintMismatch(f"KV of different models: {source} and {target}")
    sent = [0] * source.tp
    found: list[Route] = []
    for target_rank in range(target.tp):
        for target_head, head in enumerate(target.heads(target_rank)):
            holders = [rank for rank in range(source.tp) if head in source.heads(rank)]
            rank = min(holders, key=lambda r: sent[r])
            sent[rank] += 1
            source_head = head - source.heads(rank).start
            last = found[-1] if found else None
            if last and (last.source_rank, last.target_rank) == (rank, target_rank) and (
                last.source_head + last.heads == source_head and last.target_head + last.heads == target_head
            ):  # fmt: skip
                found[-1] = Route(rank, target_rank, last.source_head, last.target_head, last.heads + 1)
            else:
                found.append(Route(rank, target_rank, source_head, target_head, 1))
    return tuple(found)


def piece_bytes(target: KvFormat, route: Route) -> int:
    return 2 * route.heads * target.row_bytes


def as_kept(source: KvFormat, target: KvFormat) -> bool:
    """Whether rows travel as the source keeps them: nothing to cut, nothing to convert."""
    return (source.block_size, source.dtype) == (target.block_size, target.dtype)


def in_pool(format: KvFormat, num_blocks: int, layers: range, blocks: Sequence[int], head: int, heads: int) -> Places:
    """Where the pieces of these blocks lie in a pool of one rank, layer after layer: their K and V halves, each
    `heads × row_bytes` long, from `head` on of the rank's own heads."""
    size = format.block_bytes
    layer = num_blocks * size
    begin = layers.start * layer + head * format.row_bytes
    grid = Grid(begin, size, size // 2, 2, num_blocks, len(layers), layer)
    return Places(grid, np.asarray(blocks, dtype=np.int64))


@functools.lru_cache
def in_payload(count: int, piece: int) -> Places:
    """Where the halves of `count` pieces lie that follow each other."""
    return Places(Grid(0, piece, piece // 2, 2, count), np.arange(count, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Cut:
    """Blocks of the source that cover `count` blocks of the target: where block sizes differ, the first target block
    begins `offset` tokens into the first source block."""

    blocks: Sequence[int]
    offset: int
    count: int


def cut(source_blocks: Sequence[int], source_size: int, target_size: int, first: int, last: int) -> Cut:
    """What covers the target's blocks `first` to `last` (exclusive) of a sequence that lives in `source_blocks`."""
    begin, end = first * target_size, last * target_size
    blocks = tuple(source_blocks[begin // source_size : -(-end // source_size)])
    return Cut(blocks, begin % source_size, last - first)


def split(part: Cut, source_size: int, target_size: int, most: int) -> Iterator[tuple[int, Cut]]:
    """`part` in pieces of at most `most` target blocks, each with the number of its first one within `part`."""
    if source_size == target_size:
        for i in range(0, part.count, most):
            blocks = part.blocks[i : i + most]
            yield i, Cut(blocks, 0, len(blocks))
        return
    for i in range(0, part.count, most):
        count = min(most, part.count - i)
        begin = part.offset + i * target_size
        end = begin + count * target_size
        blocks = part.blocks[begin // source_size : -(-end // source_size)]
        yield i, Cut(blocks, begin % source_size, count)


def frames(layers: range, part: Cut, source_size: int, target_size: int, most: int) -> Iterator[tuple[range, int, Cut]]:
    """`part` of these layers in frames of at most `most` pieces: of several whole layers, where they fit, or of some of
    one layer's blocks, with the number of their first one within `part`."""
    step = max(1, most // part.count)
    parts = list(split(part, source_size, target_size, most))
    for i in range(0, len(layers), step):
        for first, some in parts:
            yield layers[i : i + step], first, some


def count_frames(layers: int, blocks: int, most: int) -> int:
    """How many `frames` cuts so many layers of so many blocks of the target into."""
    return math.ceil(blocks / most) * math.ceil(layers / max(1, most // blocks))


def tokens_of(part: Cut, source_size: int, target_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Block number and slot in it, for each token of the target's blocks, in order. Tokens beyond the source's last
    block (the target's last block is larger than what is left) repeat its last slot: nobody reads them."""
    tokens = part.offset + np.arange(part.count * target_size, dtype=np.int64)
    tokens = np.minimum(tokens, len(part.blocks) * source_size - 1)
    return np.asarray(part.blocks, dtype=np.int64)[tokens // source_size], tokens % source_size
