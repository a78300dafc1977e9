"""One data frame: a run of one layer's blocks, as a msgpack header and raw bytes.

    u32 length of header │ header │ payload

The payload is `count` blocks of `layer`, in the pool's own layout, beginning with the sequence's block number
`first` (a logical number: where the bytes land is the target's business alone). The checksum is XXH3 over it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgpack
import xxhash

from ..common.errors import HandoverFailed

_LENGTH = struct.Struct("<I")
_MAX_HEADER = 256


@dataclass(frozen=True, slots=True)
class FrameHeader:
    handover_id: int
    attempt: int
    layer: int
    first: int
    count: int
    checksum: int


def checksum(payload: bytes | memoryview) -> int:
    """XXH3, 64 bits."""
    return xxhash.xxh3_64_intdigest(payload)


def pack(header: FrameHeader, payload: bytes | memoryview) -> bytes:
    head = msgpack.packb(
        (header.handover_id, header.attempt, header.layer, header.first, header.count, header.checksum)
    )
    return b"".join((_LENGTH.pack(len(head)), head, payload))


def unpack(frame: bytes) -> tuple[FrameHeader, memoryview]:
    """Header, and payload without a copy. Raises `HandoverFailed` on anything that is not a frame."""
    try:
        (length,) = _LENGTH.unpack_from(frame)
        if length > _MAX_HEADER:
            raise ValueError("header too long")
        fields = msgpack.unpackb(frame[_LENGTH.size : _LENGTH.size + length], use_list=False)
        if len(fields) != 6 or not all(type(f) is int and f >= 0 for f in fields):
            raise ValueError("header is not six counts")
        return FrameHeader(*fields), memoryview(frame)[_LENGTH.size + length :]
    except (struct.error, ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise HandoverFailed(f"not a data frame: {error}") from error
