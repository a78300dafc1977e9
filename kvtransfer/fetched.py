"""Pieces that the target fetches out of the source's pool: how `shm` and `cuda-ipc` carry them.

The source sends no bytes. It says which blocks they are in and vouches, in a slot that both ends see, that these stay
as they are; the target copies them and then looks whether the slot still says so.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Protocol

from ..common.errors import HandoverFailed, TransportFailed
from ..common.kv_format import KvFormat
from .inline import Link
from .layout import Cut, Route, as_kept, piece_bytes, routes
from .transport import Store
from .wire import Checksums, FrameHeader


class Peer(Protocol):
    """Somebody else's pool, as we see it. `memory`: what our `Store.fetch` copies from."""

    @property
    def memory(self) -> Any: ...

    @property
    def num_blocks(self) -> int: ...

    def kept(self, slot: int, handover_id: int) -> bool:
        """Whether the blocks of this handover were as they should be until now."""
        ...

    def close(self) -> None:
        """We read it no more."""
        ...


class Shared(Protocol):
    """Our own pool, where peers can see it. `transport`: by which they reach it."""

    @property
    def transport(self) -> str: ...

    def address(self, num_blocks: int) -> str:
        """How peers find it, and how many blocks they find."""
        ...

    def claim(self, handover_id: int) -> int:
        """A slot that says that this handover's blocks stay as they are. Raises `TransportFailed` if none is left."""
        ...

    def release(self, slot: int) -> None:
        """From here on they may change."""
        ...

    def peer(self, address: str, format: KvFormat) -> Peer:
        """Such a pool of somebody else's. Raises `TransportFailed` where it cannot be seen, or is not what its owner
        says."""
        ...


class FetchGiver:
    """See `transport.Giver`. Sends no bytes: says where they are, and vouches for them."""

    def __init__(self, link: Link, store: Store, shared: Shared, route: Route) -> None:
        self._link = link
        self._store = store
        self._shared = shared
        self._route = route
        self._piece = piece_bytes(store.format, route)
        self._slots: dict[int, int] = {}

    def prepare(self, handover_id: int, attempt: int, layer: int, first: int, part: Cut) -> FrameHeader:
        slot = self._slots.get(handover_id)
        if slot is None:
            slot = self._slots[handover_id] = self._shared.claim(handover_id)
        sums = self._store.checksums(layer, part.blocks, self._route)
        size = part.count * self._piece
        blocks = array("q", part.blocks).tobytes()
        return FrameHeader(handover_id, attempt, layer, first, part.count, size, sums.tobytes(), blocks, slot)

    def give(self, header: FrameHeader) -> None:
        self._link.send(header)

    def withdraw(self, handover_id: int) -> None:
        slot = self._slots.pop(handover_id, None)
        if slot is not None:
            self._shared.release(slot)

    def credits(self) -> int:
        return self._link.credits()

    def close(self) -> None:
        self._link.close()

    def release(self) -> None:
        self._link.release()


class FetchTaker:
    """See `transport.Taker`."""

    def __init__(self, peer: Peer, format: KvFormat) -> None:
        """`format`: of the source."""
        self._peer = peer
        self._format = format

    def fetch(self, header: FrameHeader) -> None:
        """Everything is there already."""

    def land(self, store: Store, header: FrameHeader, blocks: Sequence[int], route: Route) -> Checksums:
        if not header.blocks:
            raise HandoverFailed("the frame does not say which blocks to fetch")
        theirs = array("q", header.blocks)
        try:
            sums = store.fetch(
                self._peer.memory, self._format, self._peer.num_blocks, header.layer, theirs, blocks, route
            )
        except IndexError as error:  # blocks, or heads if it told others that it keeps its KV in another way
            raise HandoverFailed(f"what the source does not have: {error}") from error
        if not self._peer.kept(header.slot, header.handover_id):
            raise HandoverFailed("the source gave the blocks up while they were copied")
        return sums

    def close(self) -> None:
        self._peer.close()


def fetch_taker(shared: Shared, address: str, source: KvFormat, own: KvFormat) -> FetchTaker:
    """The receiving end of a lane from a source that keeps its pool at `address`. Raises `TransportFailed` where it
    cannot be fetched from, `FingerprintMismatch` where it holds the KV of another model."""
    routes(source, own)
    if not as_kept(source, own):
        raise TransportFailed("rows that are kept in another way cannot be fetched")
    return FetchTaker(shared.peer(address, source), source)
