"""Pieces that the target fetches out of the source's pool: how `shm` and `cuda-ipc` carry them.

The source sends no bytes. It says which blocks they are in and vouches, in a slot that both ends see, that these stay
as they are; the target copies them and then looks whether the slot still says so.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ..common.errors import HandoverFailed, TransportFailed
from ..common.kv_format import KvFormat
from ..kernels.move import Flag
from .inline import Link
from .layout import Cut, Route, as_kept, frames, piece_bytes, routes
from .transport import Store
from .wire import FrameHeader

AT_ONCE = 32 << 20
"""Bytes that are copied before the target looks whether its blocks are wanted back: the engine loop waits as long."""


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
        self._blocks: Sequence[int] = ()
        """Of the frame that was prepared last."""

    def prepare(self, handover_id: int, attempt: int, layers: range, first: int, part: Cut) -> FrameHeader:
        slot = self._slots.get(handover_id)
        if slot is None:
            slot = self._slots[handover_id] = self._shared.claim(handover_id)
        self._blocks = part.blocks
        size, blocks = len(layers) * part.count * self._piece, array("q", part.blocks).tobytes()
        return FrameHeader(handover_id, attempt, layers.start, len(layers), first, part.count, size, b"", blocks, slot)

    def give(self, header: FrameHeader) -> None:
        """Sums are taken without the handover's lock, as long as that may take: once it is closed, its slot says that
        they are of no worth."""
        sums = self._store.checksums(header.all_layers, self._blocks, self._route)
        self._link.send(replace(header, checksums=sums.tobytes()))

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

    def land(self, store: Store, header: FrameHeader, blocks: Sequence[int], route: Route, over: Flag) -> bool:
        peer, sums, most = self._peer, [], max(1, AT_ONCE * header.pieces // header.size)
        with self._vouched(header) as theirs:
            for layers, i, some in frames(header.all_layers, Cut(theirs, 0, header.count), 1, 1, most):
                if over[0]:
                    return False
                ours = blocks[i : i + some.count]
                sums.append(store.fetch(peer.memory, self._format, peer.num_blocks, layers, some.blocks, ours, route))
        if store.checked:
            header.confirm(np.concatenate(sums))
        return True

    def leave(self, header: FrameHeader) -> None:
        """What was fetched is ours."""

    def close(self) -> None:
        self._peer.close()

    @contextlib.contextmanager
    def _vouched(self, header: FrameHeader) -> Iterator[array[int]]:
        """The source's blocks, to be fetched within. Raises `HandoverFailed` where it has none such, or the source did
        not vouch for them to the end."""
        if not header.blocks:
            raise HandoverFailed("the frame does not say which blocks to fetch")
        try:
            yield array("q", header.blocks)
        except IndexError as error:  # blocks, or heads if it told others that it keeps its KV in another way
            raise HandoverFailed(f"what the source does not have: {error}") from error
        if not self._peer.kept(header.slot, header.handover_id):
            raise HandoverFailed("the source gave the blocks up while they were copied")


def check_fetchable(source: KvFormat, own: KvFormat) -> None:
    """Raises `TransportFailed` where what `source` keeps cannot be fetched as it is, `FingerprintMismatch` where it is
    the KV of another model."""
    routes(source, own)
    if not as_kept(source, own):
        raise TransportFailed("rows that are kept in another way cannot be fetched")
