"""Copying blocks of KV between two memories of one host, with their checksums in the same pass (`move.c`).

A *piece* is what one checksum covers: `segments` runs of `size` bytes each, which may lie anywhere. Its checksum is
XXH3-64 with seed 0, as `xxhash.xxh3_64_intdigest` gives it, of the segments one after the other, so the two ends of a
transfer may cut and place the same bytes differently.

A plain copy of much memory is bound by memory, not by the processor, so the checksum costs next to nothing there.
Segments of a multiple of 64 bytes in pieces of more than 240 go this way; all others, and machines without a C
compiler, take a plain one with the same results. Calls leave the interpreter lock to other threads, use one thread
and share nothing.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from .build import load

log = logging.getLogger(__name__)

Memory: TypeAlias = NDArray[np.uint8]
"""[bytes], contiguous: a whole memory, such as a mapped KV pool."""

Places: TypeAlias = NDArray[np.int64]
"""[pieces, segments]: where each segment begins, in bytes from the front of its memory."""

_SOURCE = Path(__file__).with_name("move.c")
_STRIPE = 64
_LONG_PIECE = 240
"""XXH3 sums pieces of up to so many bytes in other ways."""

_STREAM_FROM = 256 << 10
"""Copies of more bytes than this go past the caches where the target is aligned. Otherwise each line of the target is
read before it is written, and a handover pushes out of the caches what the engine computes with."""


def copy(
    source: Memory, source_at: Places, target: Memory, target_at: Places, size: int, *, checked: bool = True,
    passing: bool = False,
) -> NDArray[np.uint64]:  # fmt: skip
    """Copy each piece's segments of `size` bytes and return [pieces] checksums, zeros where `checked` is not asked for.
    `passing`: the target is read again at once and then of no more use, so that it had best stay in a cache.

    The checksums are those of the bytes as they were stored, even if somebody writes to the source meanwhile. Source
    and target must not overlap; the source may be read-only. Raises `IndexError`, with nothing copied, where a segment
    does not lie in its memory, and `ValueError` where the arguments do not fit together.
    """
    if source_at.shape != target_at.shape:
        raise ValueError(f"segments from places {source_at.shape} to places {target_at.shape}")
    if not target.flags.writeable:
        raise ValueError("the target is read-only")
    source_at, target_at = _places(source, source_at, size), _places(target, target_at, size)
    sums = np.zeros(len(source_at), np.uint64)
    library = _library()
    if library is None or (checked and not _fits(source_at, size)):
        for one, other in zip(source_at.flat, target_at.flat, strict=True):
            target[other : other + size] = source[one : one + size]
        return _plain_checksums(target, target_at, size) if checked else sums
    streamed = not passing and source_at.size * size > _STREAM_FROM and size % _STRIPE == 0
    library.move(
        *(source.ctypes.data, source_at.ctypes.data, target.ctypes.data, target_at.ctypes.data),
        *(*source_at.shape, size, streamed, sums.ctypes.data if checked else None),
    )
    return sums


def checksums(source: Memory, source_at: Places, size: int) -> NDArray[np.uint64]:
    """[pieces] checksums, as `copy` would return them. Raises `IndexError` and `ValueError` as it does."""
    source_at = _places(source, source_at, size)
    library = _library()
    if library is None or not _fits(source_at, size):
        return _plain_checksums(source, source_at, size)
    sums = np.zeros(len(source_at), np.uint64)
    library.move(
        *(source.ctypes.data, source_at.ctypes.data, None, None),
        *(*source_at.shape, size, False, sums.ctypes.data),
    )
    return sums


def _places(memory: Memory, places: Places, size: int) -> Places:
    """`places` as the compiled loop reads them: dense, and all within the memory."""
    if memory.dtype != np.uint8 or memory.ndim != 1 or not memory.flags.c_contiguous:
        raise ValueError(f"a memory is contiguous bytes, not {memory.dtype} {memory.shape}")
    if places.dtype != np.int64 or places.ndim != 2 or size < 0:
        raise ValueError(f"segments are int64 [pieces, segments], not {places.dtype} {places.shape}, of size {size}")
    places = np.ascontiguousarray(places)
    # Read as unsigned, a place before the front is one far behind the end.
    if places.size and not int(places.view(np.uint64).max()) <= memory.size - size:
        raise IndexError(
            f"segments of {size} bytes from {places.min()} to {places.max()} in a memory of {memory.size} bytes"
        )
    return places


def _fits(places: Places, size: int) -> bool:
    """Whether the compiled loop can sum these pieces."""
    return size % _STRIPE == 0 and places.shape[1] * size > _LONG_PIECE


def _plain_checksums(memory: Memory, places: Places, size: int) -> NDArray[np.uint64]:
    sums = np.empty(len(places), np.uint64)
    for piece, segments in enumerate(places):
        state = xxhash.xxh3_64()
        for at in segments:
            state.update(memory[at : at + size].data)
        sums[piece] = state.intdigest()
    return sums


@functools.cache
def _library(*flags: str) -> ctypes.CDLL | None:
    """The compiled loop; None, with a line in the log, where it cannot be had. Flags make it one for a processor that
    can do less than this one."""
    try:
        library = load(_SOURCE, *flags)
    except OSError as error:
        log.warning("the compiled copy is not available, a slower one is used: %s", error)
        return None
    pointer, long = ctypes.c_void_p, ctypes.c_long
    library.move.argtypes = (pointer, pointer, pointer, pointer, long, long, long, ctypes.c_int, pointer)
    library.move.restype = None
    return library
