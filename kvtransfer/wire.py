"""The header of one frame: which pieces come, and what they must hash to. msgpack; the bytes themselves follow it, or
are fetched, as the transport has it.

A frame is a run of pieces (`layout.py`) that begins with the sequence's block `first`, counted in blocks of the target,
and these of one layer after the other. Where they land is the target's business alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter

import msgpack
import numpy as np
from numpy.typing import NDArray

from ..common.errors import CorruptBlock, HandoverFailed

MAX_HEADER = 256 << 10
"""Bytes of a header at most."""

MAX_PIECES = 8192
"""Pieces of one frame at most: so many checksums fit into a header."""

MAX_FRAME = 64 << 20
"""Bytes of one frame's pieces at most, where they travel."""

Checksums = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """layer       the first of `layers`
    first       of `count` blocks, which are in this frame with each of the layers
    checksums   XXH3-64 of each piece, 8 bytes each, little-endian; 0 where checking is off, none where the lane has a
                ledger for them
    size        bytes of all pieces together
    blocks      on transports that fetch: the source's blocks, `count` of them, int64 as their machine has it
    slot        on transports that fetch: where the source says for how long those blocks stay as they are
    """

    handover_id: int
    attempt: int
    layer: int
    layers: int
    first: int
    count: int
    size: int
    checksums: bytes
    blocks: bytes = b""
    slot: int = 0

    @property
    def pieces(self) -> int:
        return self.layers * self.count

    @property
    def all_layers(self) -> range:
        return range(self.layer, self.layer + self.layers)

    def confirm(self, landed: Checksums, sent: Checksums | None = None) -> None:
        """Raises `CorruptBlock` where what landed does not hash to what was sent, which is what this header says unless
        something else does."""
        if landed.tobytes() != (self.checksums if sent is None else sent.tobytes()):
            raise CorruptBlock(f"checksums of layers from {self.layer}, blocks from {self.first} on do not match")


_fields = attrgetter(*(field.name for field in fields(FrameHeader)))
"""In their order. `astuple` would take its time."""

_numbers = attrgetter(*(field.name for field in fields(FrameHeader) if field.type == "int"))


def pack(header: FrameHeader) -> bytes:
    packed: bytes = msgpack.packb(_fields(header))
    return packed


def unpack(data: bytes | memoryview) -> FrameHeader:
    """Raises `HandoverFailed` on anything that is not a header."""
    try:
        header = FrameHeader(*msgpack.unpackb(data, use_list=False))
        checksums, blocks = header.checksums, header.blocks
        if type(blocks) is not bytes or type(checksums) is not bytes:
            raise ValueError("a field is not what it should be")
        numbers = _numbers(header)
        if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) >= 1 << 63:
            raise ValueError("a number is not what it should be")
        if not 0 < header.pieces <= MAX_PIECES:
            raise ValueError(f"{header.count} blocks of {header.layers} layers")
        if len(checksums) not in (0, 8 * header.pieces) or len(blocks) not in (0, 8 * header.count):
            raise ValueError(f"{header.pieces} pieces, {len(checksums)} bytes of checksums, {len(blocks)} of blocks")
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise HandoverFailed(f"not the header of a frame: {error}") from error
    return header
