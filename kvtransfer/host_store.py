"""A KV pool in memory that the processor reaches: packing, unpacking and fetching pieces, checksums on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.kv_format import SCALE_BYTES, KvFormat
from ..kernels import move
from .layout import Cut, Route, as_kept, in_payload, in_pool, piece_bytes, tokens_of
from .ledger import Ledger
from .transport import Mark
from .wire import Checksums

Bytes = NDArray[np.uint8]

Convert = Callable[[Bytes, str, str, int, int], Bytes]
"""(rows [n, bytes of a row], KV type, wanted KV type, tokens in a row, head_dim) → rows [n, bytes of such a row]."""


class HostStore:
    """See `transport.Store`. `memory` is the pool of one rank, flat, layer after layer; `convert` changes the type of
    rows where the two ends keep different ones; `checked`: take checksums (0 otherwise)."""

    def __init__(
        self, memory: Bytes, format: KvFormat, rank: int, num_blocks: int, convert: Convert, checked: bool = True
    ) -> None:
        self.format = format
        self.rank = rank
        self.num_blocks = num_blocks
        self.memory = memory
        self._convert = convert
        self.checked = checked

    def mark(self) -> Mark:
        return _there

    def buffer(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def pack(self, layers: range, part: Cut, route: Route, target: KvFormat, out: memoryview) -> Checksums:
        data = np.frombuffer(out, dtype=np.uint8)
        piece = piece_bytes(target, route)
        into = in_payload(len(layers) * part.count, piece)
        if as_kept(self.format, target):
            at = self._at(layers, part.blocks, route.source_head, route.heads)
            return move.copy(self.memory, at, data, into, piece // 2, checked=self.checked, passing=True)
        for rows, layer in zip(data.reshape(len(layers), -1), layers, strict=True):
            rows[:] = self._recut(layer, part, route, target).reshape(-1)
        return self._sums(data, into, piece // 2)

    def unpack(self, layers: range, blocks: Sequence[int], route: Route, data: memoryview) -> Checksums:
        half = piece_bytes(self.format, route) // 2
        at = self._at(layers, blocks, route.target_head, route.heads)
        source = np.frombuffer(data, dtype=np.uint8)
        return move.copy(source, in_payload(at.pieces, 2 * half), self.memory, at, half, checked=self.checked)

    def checksums(self, layers: range, blocks: Sequence[int], route: Route) -> Checksums:
        at = self._at(layers, blocks, route.source_head, route.heads)
        return self._sums(self.memory, at, piece_bytes(self.format, route) // 2)

    def fetch(
        self, peer: Bytes, peer_format: KvFormat, peer_blocks: int, layers: range, theirs: Sequence[int],
        blocks: Sequence[int], route: Route,
    ) -> Checksums:  # fmt: skip
        source = in_pool(peer_format, peer_blocks, layers, theirs, route.source_head, route.heads)
        target = self._at(layers, blocks, route.target_head, route.heads)
        half = piece_bytes(self.format, route) // 2
        return move.copy(peer, source, self.memory, target, half, checked=self.checked)

    def keeps_step(self, route: Route) -> bool:
        """Whether pieces of this route can be fetched in step."""
        return move.keeps_step(2, piece_bytes(self.format, route) // 2)

    def lead(self, ledger: Ledger, done: int, layers: range, blocks: Sequence[int], route: Route) -> int:
        """Sum pieces for a peer that fetches them in step, from number `done` on. Returns how many are summed: fewer
        than all where it has to be waited for."""
        at = self._at(layers, blocks, route.source_head, route.heads)
        return move.lead(
            self.memory, at, piece_bytes(self.format, route) // 2, done, ledger.shared, ledger.first, ledger.turn
        )

    def follow(
        self, ledger: Ledger, done: int, peer: Bytes, peer_format: KvFormat, peer_blocks: int, layers: range,
        theirs: Sequence[int], blocks: Sequence[int], route: Route, sums: tuple[Checksums, Checksums],
        over: move.Flag,
    ) -> int:  # fmt: skip
        """`fetch` in step, from piece number `done` on: what was stored hashes to sums[0], what the peer has to
        sums[1]. Returns how many are there: fewer than all where the peer has to be waited for."""
        source = in_pool(peer_format, peer_blocks, layers, theirs, route.source_head, route.heads)
        target = self._at(layers, blocks, route.target_head, route.heads)
        half = piece_bytes(self.format, route) // 2
        return move.follow(
            peer, source, self.memory, target, half, done, ledger.shared, ledger.first, ledger.turn, sums, over
        )

    def _at(self, layers: range, blocks: Sequence[int], head: int, heads: int) -> move.Places:
        return in_pool(self.format, self.num_blocks, layers, blocks, head, heads)

    def _sums(self, memory: Bytes, at: move.Places, size: int) -> Checksums:
        return move.checksums(memory, at, size) if self.checked else np.zeros(at.pieces, dtype=np.uint64)

    def _recut(self, layer: int, part: Cut, route: Route, target: KvFormat) -> Bytes:
        """Rows of the target's length and type: [pieces × 2 × heads, bytes of a row]."""
        own = self.format
        pool = self.memory.reshape(own.num_layers, self.num_blocks, 2, own.heads_per_rank, own.row_bytes)[layer]
        elements = own.block_size * own.token_bytes
        columns = [self._tokens(pool[..., :elements], own.token_bytes, part, route, target)]
        if own.quantised:
            columns.append(self._tokens(pool[..., elements:], SCALE_BYTES, part, route, target))
        rows = np.concatenate(columns, axis=1)
        if own.dtype == target.dtype:
            return rows
        return self._convert(rows, own.dtype, target.dtype, target.block_size, own.head_dim)

    def _tokens(self, rows: NDArray[Any], width: int, part: Cut, route: Route, target: KvFormat) -> Bytes:
        """What each token of the target's blocks has in `rows`, `width` bytes: [pieces × 2 × heads, tokens × width]."""
        block, slot = tokens_of(part, self.format.block_size, target.block_size)
        heads = slice(route.source_head, route.source_head + route.heads)
        split = rows.reshape(*rows.shape[:3], self.format.block_size, width)
        tokens = split[block, :, heads, slot]  # [tokens, 2, heads, width]
        shaped = tokens.reshape(part.count, target.block_size, 2, route.heads, width).transpose(0, 2, 3, 1, 4)
        return shaped.reshape(part.count * 2 * route.heads, target.block_size * width)


def _there() -> None:
    """What a processor has computed is in memory."""
