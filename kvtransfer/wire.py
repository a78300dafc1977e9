"""The header of one frame: which pieces come, and what they must hash to. msgpack; the bytes themselves follow it, or
are fetched, as the transport has it.

A frame is a run of one layer's pieces (`layout.py`) that begins with the sequence's block `first`, counted in blocks of
the target. Where they land is the target's business alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter

import msgpack
import numpy as np
from numpy.typing import NDArray

from ..common.errors import HandoverFailed

MAX_HEADER = 256 << 10
"""Bytes of a header at most."""

MAX_PIECES = 8192
"""Pieces of one frame at most: so many fit into a header."""

MAX_FRAME = 64 << 20
"""Bytes of one frame's pieces at most."""

Checksums = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """checksums   XXH3-64 of each of the `count` pieces, 8 bytes each, little-endian; 0 where checking is off
    size        bytes of all pieces together
    blocks      on transports that fetch: the source's blocks, one for each piece, int64 as their machine has it
    slot        on transports that fetch: where the source says for how long those blocks stay as they are
    """

    handover_id: int
    attempt: int
    layer: int
    first: int
    count: int
    size: int
    checksums: bytes
    blocks: bytes = b""
    slot: int = 0


_fields = attrgetter(*(field.name for field in fields(FrameHeader)))
"""In their order. `astuple` would take its time."""


def pack(header: FrameHeader) -> bytes:
    packed: bytes = msgpack.packb(_fields(header))
    return packed


def unpack(data: bytes | memoryview) -> FrameHeader:
    """Raises `HandoverFailed` on anything that is not a header."""
    try:
        handover_id, attempt, layer, first, count, size, checksums, blocks, slot = msgpack.unpackb(data, use_list=False)
        if type(blocks) is not bytes or type(checksums) is not bytes:
            raise ValueError("a field is not what it should be")
        numbers = (handover_id, attempt, layer, first, count, size, slot)
        if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) >= 1 << 63:
            raise ValueError("a number is not what it should be")
        header = FrameHeader(handover_id, attempt, layer, first, count, size, checksums, blocks, slot)
        if header.count == 0 or len(checksums) != 8 * header.count or len(blocks) not in (0, 8 * header.count):
            raise ValueError(f"{header.count} pieces, {len(checksums)} bytes of checksums, {len(blocks)} of blocks")
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise HandoverFailed(f"not the header of a frame: {error}") from error
    return header
