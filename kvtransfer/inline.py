"""Bytes that follow their frame: how `tcp` and `grpc` carry pieces. Packed and unpacked through a staging buffer at
each end, so that no lock is held while somebody else is waited for, and nobody else's stream writes into the pool.

By `tcp` the buffer stays in a cache, and the way through it costs less than it saves: a socket that receives straight
into the pool first reads each line from memory that it is about to write, and then it has to be hashed, while
`kernels/move.c` hashes and stores past the caches in one pass. Tried side by side, the straight way was a sixth slower.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Protocol

from ..common import sockets
from ..common.errors import HandoverFailed
from ..common.kv_format import KvFormat
from ..kernels.move import Flag
from .layout import Cut, Route, piece_bytes
from .transport import Store
from .wire import MAX_FRAME, FrameHeader


class Link(Protocol):
    """A lane's connection, seen from its source: `link.SocketLink` or `grpc_link.GrpcLink`."""

    def send(self, header: FrameHeader, payload: memoryview | None = None) -> None: ...

    def credits(self) -> int: ...

    def close(self) -> None: ...

    def release(self) -> None: ...


class InlineGiver:
    """See `transport.Giver`. Packs pieces as `target` keeps them."""

    def __init__(self, link: Link, store: Store, route: Route, target: KvFormat) -> None:
        self._link = link
        self._store = store
        self._route = route
        self._target = target
        self._piece = piece_bytes(target, route)
        self._staging = store.buffer(0)

    def prepare(self, handover_id: int, attempt: int, layers: range, first: int, part: Cut) -> FrameHeader:
        size = len(layers) * part.count * self._piece
        if len(self._staging) < size:
            self._staging = self._store.buffer(size)
        sums = self._store.pack(layers, part, self._route, self._target, self._staging[:size])
        return FrameHeader(handover_id, attempt, layers.start, len(layers), first, part.count, size, sums.tobytes())

    def give(self, header: FrameHeader) -> None:
        self._link.send(header, self._staging[: header.size])

    def withdraw(self, handover_id: int) -> None:
        """What was packed may leave: the target takes it no more."""

    def credits(self) -> int:
        return self._link.credits()

    def close(self) -> None:
        self._link.close()

    def release(self) -> None:
        self._link.release()


class InlineTaker:
    """See `transport.Taker`. The bytes come out of the lane's own socket."""

    def __init__(self, connection: socket.socket, store: Store) -> None:
        self._connection = connection
        self._store = store
        self._staging = self._data = store.buffer(0)

    def fetch(self, header: FrameHeader) -> None:
        if header.size > MAX_FRAME:
            raise HandoverFailed(f"a frame of {header.size} bytes")
        if len(self._staging) < header.size:
            self._staging = self._store.buffer(header.size)
        self._data = self._staging[: header.size]
        sockets.receive_exactly(self._connection, self._data)

    def land(self, store: Store, header: FrameHeader, blocks: Sequence[int], route: Route, over: Flag) -> bool:
        sums = store.unpack(header.all_layers, blocks, route, self._data)
        if store.checked:
            header.confirm(sums)
        return True

    def leave(self, header: FrameHeader) -> None:
        """Its bytes have been read from the socket, whatever became of them."""

    def close(self) -> None:
        """The lane closes its socket."""
