"""Files mapped at addresses where huge pages fit, and made of such pages.

Blocks of a pool are read here and there. Of pages of 4 KiB a pool of 4 GiB has a million, and where they lie takes as
long to find out as what they hold; of pages of 2 MiB it has two thousand. Linux gives a memory file huge pages when it
is asked for them outright (madvise with MADV_COLLAPSE, since 6.1), whatever `shmem_enabled` is but deny, and every
process that maps the file at a multiple of their size finds its way by them.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

HUGE = 2 << 20
"""Bytes of a huge page."""

_MAP_FIXED, _MAP_NORESERVE, _MADV_COLLAPSE = 0x10, 0x4000, 25  # Linux; not in every Python's mmap
_ROOM = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


def mapped(file: int, size: int, writable: bool) -> NDArray[np.uint8]:
    """The first `size` bytes of a file, shared with all who map it; they begin at a multiple of `HUGE`. The mapping
    goes with its last reader. Raises `OSError` where the system refuses."""
    prot = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    room = np.frombuffer(mmap.mmap(-1, size + HUGE, flags=_ROOM, prot=prot), dtype=np.uint8)
    begin = -room.ctypes.data % HUGE
    address = room.ctypes.data + begin
    # Python's mmap cannot be told where. This takes the place of a part of `room`, and is unmapped with it.
    if _libc().mmap(address, size, prot, mmap.MAP_SHARED | _MAP_FIXED, file, 0) != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return room[begin : begin + size]


def in_huge_pages(memory: NDArray[np.uint8]) -> bool:
    """Make what `mapped` gave, still unused, of huge pages, as far as whole ones fit: all of it becomes real, at some
    10 GB/s. Where the system has none, pages stay small and become real when they are first written: slower, no error.
    Returns whether it worked."""
    whole = memory.size // HUGE * HUGE
    memory[:whole:HUGE] = 0  # what holds nothing at all is not made huge
    if whole == 0 or _libc().madvise(memory.ctypes.data, whole, _MADV_COLLAPSE) == 0:
        return True
    log.info("%d bytes stay in small pages: %s", whole, os.strerror(ctypes.get_errno()))
    return False


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc
