"""What the two ends of a lane share that copies in step: by shared memory, the source sums what the target copies.

The target finds in the cache that both have what the source has just summed, unless that is far ahead; and a source
that waits for credits is either far ahead or often idle. So the two count pieces in memory that both see. Neither
believes what the other writes there: a counter that lies makes its reader stop, or find wrong sums, and then the frame
is late or damaged like any other.

    file    [ magic: u64 | summed: u64 | taken: u64, each in a cache line of its own ][ RING × u64: sums ]
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sys
import time
from collections.abc import Callable

import numpy as np

from ..common.errors import TransportFailed, WorkerLost
from ..kernels import move
from .mapping import mapped

RING = 4096
"""Sums that are kept: more than can be between the two ends."""

TURN_BYTES = 512 << 10
"""After so many the other end is told."""

AHEAD_BYTES = 2 << 20
"""How far the source may be ahead: enough that the target need not wait, little enough that what was summed is still in
the cache."""

_LINE = 64
_SIZE = 3 * _LINE + 8 * RING
_MAGIC = 0x4261746F6E4C6564
_ADDRESS = re.compile(r"/proc/[0-9]{1,10}/fd/[0-9]{1,10}")

_PAUSE_S = 50e-6
_LONGEST_PAUSE_S = 2e-3


class Ledger:
    """One end's, used by one thread. `first`: the number of the frame's first piece since the lane began, which both
    ends count by themselves; `turn`: pieces of one turn."""

    def __init__(self, file: int) -> None:
        """The file is sealed, and of the right size; it stays the caller's."""
        memory = mapped(file, _SIZE, writable=True).view(np.uint64)  # Python's own would keep a descriptor
        self.magic, self._summed, self._taken = (memory[i * _LINE // 8 :][:1] for i in range(3))
        at = memory.ctypes.data
        self.shared = move.Counters(at + _LINE, at + 2 * _LINE, at + 3 * _LINE, RING, 0)
        self.first = self.turn = 0

    def begin(self, piece: int) -> None:
        """A frame of pieces of so many bytes."""
        self.turn = max(4, min(move.MOST_AT_ONCE, TURN_BYTES // piece // 4 * 4))
        self.shared.ahead = max(2 * self.turn, min(AHEAD_BYTES // piece, RING))

    def summed(self, done: int) -> bool:
        """Whether the source has more of the frame than its first `done` pieces. As the compiled loop counts: what is
        ahead by more than half of all numbers is behind, or a counter that lies would be waited for as progress."""
        return 0 < (int(self._summed[0]) - self.first - done) % (1 << 64) < 1 << 63

    def end(self, pieces: int) -> None:
        """The frame, of so many, is through."""
        self.first += pieces

    def leave(self, pieces: int) -> None:
        """The same for the target: what it did not take, the source need not wait for."""
        self.end(pieces)
        self._taken[0] = self.first


class OwnLedger(Ledger):
    """The source's, who makes it. Raises `OSError` where the system has no room for it."""

    def __init__(self) -> None:
        self._file = os.memfd_create("baton-lane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._file, _SIZE)
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, _seals())
            super().__init__(self._file)
        except OSError:
            self.close()
            raise
        self.magic[0] = _MAGIC

    @property
    def address(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def close(self) -> None:
        """Nobody opens it any more. Idempotent."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def open_ledger(address: str) -> Ledger:
    """The target's. Raises `TransportFailed` where that is none."""
    if _ADDRESS.fullmatch(address) is None:
        raise TransportFailed(f"{address!r} is no ledger")
    try:
        file = os.open(address, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)  # should it be a pipe
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, file)
            if fcntl.fcntl(file, fcntl.F_GET_SEALS) & _seals() != _seals() or os.fstat(file).st_size != _SIZE:
                raise TransportFailed("a ledger has a size that nobody can change")
            if os.pread(file, 8, 0) != _MAGIC.to_bytes(8, sys.byteorder):
                raise TransportFailed("that file is something else")
            return Ledger(file)
    except OSError as error:  # another container, another user, the source is gone, or it lies
        raise TransportFailed(f"the lane's ledger cannot be seen: {error}") from error


def wait_for(progress: Callable[[], bool], gone: Callable[[], bool], patience: float) -> None:
    """Ask for progress again and again, until there is some. Raises `WorkerLost` where the other end is `gone`, or
    there is none for `patience` seconds."""
    pause, give_up = _PAUSE_S, time.monotonic() + patience
    while not progress():
        if gone():
            raise WorkerLost("the other end of the lane hung up")
        if time.monotonic() > give_up:
            raise WorkerLost(f"the other end of the lane has not gone on for {patience:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
