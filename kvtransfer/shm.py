"""Shared memory between processes of one machine: the target copies straight out of the source's pool.

The pool lies in a memory file of its owner's. Peers map it to read, and only to read: the file is sealed against new
writers, and against shrinking, so that neither end can harm the other. It has no name that could be left behind; peers
reach it through the owner's entry in /proc.

    file    [ pool, page-aligned ][ SLOTS × u64 ][ stamp: u64 ]

A slot holds the handover for which blocks are kept as they are, and is cleared before they may change. So a copy counts
only if, after it, the slot still names its handover: a seqlock whose writer never waits. The stamp is part of the
address, so that a process that was given a dead owner's numbers is not taken for it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import sys
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..common.errors import HandoverFailed, TransportFailed
from ..common.kv_format import KvFormat
from .host_store import HostStore
from .inline import Link
from .layout import Cut, Route, piece_bytes
from .transport import Store
from .wire import Checksums, FrameHeader

SLOTS = 4096
"""Handovers that can be open at a time, over all targets."""

_TAIL = (SLOTS + 1) * 8
_SEAL_FUTURE_WRITE = 0x0010  # Linux 5.1; not in Python's fcntl
_ADDRESS = re.compile(r"(/proc/[0-9]{1,10}/fd/[0-9]{1,10}):([0-9]{1,18}):([0-9a-f]{16})")


def available() -> bool:
    """Whether this system has what it takes."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


class SharedMemory:
    """`memory`: `size` bytes, zeroed; pages become real when they are first written. Made once, for a process's life.
    Raises `OSError` where the system has no room for it."""

    def __init__(self, size: int) -> None:
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._file = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._file, whole + _TAIL)
        everything = np.frombuffer(mmap.mmap(self._file, whole + _TAIL), dtype=np.uint8)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, seals)
        self.memory: NDArray[np.uint8] = everything[:size]
        tail = everything[whole:].view(np.uint64)
        self._slots: NDArray[np.uint64] = tail[:SLOTS]
        self._stamp = tail[SLOTS] = secrets.randbits(64)
        self._free = list(range(SLOTS - 1, -1, -1))
        self._lock = threading.Lock()

    def address(self, num_blocks: int) -> str:
        """How peers find it, and how many blocks they find."""
        return f"/proc/{os.getpid()}/fd/{self._file}:{num_blocks}:{self._stamp:016x}"

    def claim(self, handover_id: int) -> int:
        """A slot that says that this handover's blocks stay as they are. Raises `TransportFailed` if none is left."""
        with self._lock:
            if not self._free:
                raise TransportFailed(f"{SLOTS} handovers are open")
            slot = self._free.pop()
        self._slots[slot] = handover_id
        return slot

    def release(self, slot: int) -> None:
        """From here on they may change."""
        self._slots[slot] = 0
        with self._lock:
            self._free.append(slot)


class PeerMemory:
    """Somebody else's `SharedMemory`, mapped to read. Raises `TransportFailed` where it cannot be seen, or is not what
    its owner says."""

    def __init__(self, address: str, format: KvFormat) -> None:
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise TransportFailed(f"{address!r} is no shared pool")
        self.num_blocks = int(match[2])
        size = format.num_layers * self.num_blocks * format.block_bytes
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            file = os.open(match[1], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # should it be a pipe
            try:
                if not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                    raise TransportFailed("the peer's pool could shrink under its reader")
                if os.fstat(file).st_size != whole + _TAIL:
                    raise TransportFailed("the peer's pool has another size than it says")
                mapped = mmap.mmap(file, whole + _TAIL, prot=mmap.PROT_READ)
            finally:
                os.close(file)
        except OSError as error:  # another container, another user, or the peer is gone
            raise TransportFailed(f"the peer's pool cannot be seen: {error}") from error
        everything = np.frombuffer(mapped, dtype=np.uint8)
        self.memory: NDArray[np.uint8] = everything[:size]
        tail = everything[whole:].view(np.uint64)
        self._slots: NDArray[np.uint64] = tail[:SLOTS]
        if int(tail[SLOTS]) != int(match[3], 16):
            raise TransportFailed("the pool that is found there is another one")

    def kept(self, slot: int, handover_id: int) -> bool:
        """Whether the blocks of this handover were as they should be until now."""
        return slot < SLOTS and int(self._slots[slot]) == handover_id


class ShmGiver:
    """See `transport.Giver`. Sends no bytes: says where they are, and vouches for them."""

    def __init__(self, link: Link, store: Store, shared: SharedMemory, route: Route) -> None:
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
        return FrameHeader(handover_id, attempt, layer, first, part.count, size, sums.tobytes(), part.blocks, slot)

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


class ShmTaker:
    """See `transport.Taker`."""

    def __init__(self, peer: PeerMemory, format: KvFormat) -> None:
        """`format`: of the source."""
        self._peer = peer
        self._format = format

    def fetch(self, header: FrameHeader) -> None:
        """Everything is there already."""

    def land(self, store: Store, header: FrameHeader, blocks: Sequence[int], route: Route) -> Checksums:
        assert isinstance(store, HostStore), "shared memory is between pools in host memory"
        if len(header.blocks) != header.count:
            raise HandoverFailed("the frame does not say which blocks to fetch")
        if max(header.blocks) >= self._peer.num_blocks:
            raise HandoverFailed(f"the source has no block {max(header.blocks)}")
        try:
            sums = store.fetch(
                self._peer.memory, self._format, self._peer.num_blocks, header.layer, header.blocks, blocks, route
            )
        except IndexError as error:  # it told others that it keeps its KV in another way
            raise HandoverFailed(f"heads that the source does not have: {error}") from error
        if not self._peer.kept(header.slot, header.handover_id):
            raise HandoverFailed("the source gave the blocks up while they were copied")
        return sums

    def close(self) -> None:
        """The mapping goes with its last reader."""
