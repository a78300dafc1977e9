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

import numpy as np
from numpy.typing import NDArray

from ..common.errors import TransportFailed
from ..common.kv_format import KvFormat
from .mapping import in_huge_pages, mapped

SLOTS = 4096
"""Handovers that can be open at a time, over all targets."""

_TAIL = (SLOTS + 1) * 8
_SEAL_FUTURE_WRITE = 0x0010  # Linux 5.1; not in Python's fcntl
_ADDRESS = re.compile(r"(/proc/[0-9]{1,10}/fd/[0-9]{1,10}):([0-9]{1,18}):([0-9a-f]{16})")


def available() -> bool:
    """Whether this system has what it takes."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


class SharedMemory:
    """See `fetched.Shared`. `memory`: `size` bytes, zeroed: in huge pages, and so real from the start, where
    the system has them. Made once, for a process's life. Raises `OSError` where the system has no room for it."""

    transport = "shm"

    def __init__(self, size: int) -> None:
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._file = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._file, whole + _TAIL)
        everything = mapped(self._file, whole + _TAIL, writable=True)
        in_huge_pages(everything[:whole])
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, seals)
        self.memory: NDArray[np.uint8] = everything[:size]
        tail = everything[whole:].view(np.uint64)
        self._slots: NDArray[np.uint64] = tail[:SLOTS]
        self._stamp = tail[SLOTS] = secrets.randbits(64)
        self._free = list(range(SLOTS - 1, -1, -1))
        self._lock = threading.Lock()

    def address(self, num_blocks: int) -> str:
        return f"/proc/{os.getpid()}/fd/{self._file}:{num_blocks}:{self._stamp:016x}"

    def claim(self, handover_id: int) -> int:
        with self._lock:
            if not self._free:
                raise TransportFailed(f"{SLOTS} handovers are open")
            slot = self._free.pop()
        self._slots[slot] = handover_id
        return slot

    def release(self, slot: int) -> None:
        self._slots[slot] = 0
        with self._lock:
            self._free.append(slot)

    def peer(self, address: str, format: KvFormat) -> PeerMemory:
        return PeerMemory(address, format)


class PeerMemory:
    """See `fetched.Peer`. Somebody else's `SharedMemory`, mapped to read. Raises `TransportFailed` where it cannot be
    seen, or is not what its owner says."""

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
                everything = mapped(file, whole + _TAIL, writable=False)
            finally:
                os.close(file)
        except (OSError, OverflowError) as error:  # another container, another user, the peer is gone, or it lies
            raise TransportFailed(f"the peer's pool cannot be seen: {error}") from error
        self.memory: NDArray[np.uint8] = everything[:size]
        tail = everything[whole:].view(np.uint64)
        self._slots: NDArray[np.uint64] = tail[:SLOTS]
        if int(tail[SLOTS]) != int(match[3], 16):
            raise TransportFailed("the pool that is found there is another one")

    def kept(self, slot: int, handover_id: int) -> bool:
        return slot < SLOTS and int(self._slots[slot]) == handover_id

    def close(self) -> None:
        """The mapping goes with its last reader."""
