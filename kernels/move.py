"""Copying blocks of KV between two memories of one host, with their checksums in the same pass (`move.c`).

A *piece* is what one checksum covers: `segments` runs of `size` bytes each, all in one block of a `Grid`. Its checksum
is XXH3-64 with seed 0, as `xxhash.xxh3_64_intdigest` gives it, of the segments one after the other, so the two ends of
a transfer may cut and place the same bytes differently. A call takes numbers of blocks and leaves the arithmetic to the
loop: a frame's Python runs with caches that are full of the frame before it, and costs several times what it seems to.

A plain copy of much memory is bound by memory, not by the processor, so the checksum costs next to nothing there.
Segments of a multiple of 64 bytes in pieces of more than 240 go this way; all others, and machines without a C
compiler, take a plain one with the same results. Calls leave the interpreter lock to other threads, use one thread
and share nothing.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from .build import load

log = logging.getLogger(__name__)

Memory: TypeAlias = NDArray[np.uint8]
"""[bytes], contiguous: a whole memory, such as a mapped KV pool."""

Offsets: TypeAlias = NDArray[np.int64]
"""[pieces, segments]: where each segment begins, in bytes from the front of its memory."""


Flag: TypeAlias = NDArray[np.int32]
"""[1]: 0, until somebody sets it. Calls that are under way see it, too."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A memory as `layers` layers of `blocks` blocks, each of which holds `segments` segments of a piece: segment s of
    block b of layer l begins at `begin + l × layer + b × stride + s × step`, in bytes from the front. None of these is
    negative."""

    begin: int
    stride: int
    step: int
    segments: int
    blocks: int
    layers: int = 1
    layer: int = 0


@dataclass(frozen=True, slots=True)
class Places:
    """Where pieces lie: in the same `blocks` [blocks of a layer] of each of a grid's layers, layer after layer."""

    grid: Grid
    blocks: NDArray[np.int64]

    @property
    def pieces(self) -> int:
        return self.grid.layers * self.blocks.size

    def offsets(self) -> Offsets:
        """One by one. Raises `IndexError` where the grid has no such block."""
        grid = self.grid
        if self.blocks.size and not 0 <= self.blocks.min() <= self.blocks.max() < grid.blocks:
            raise IndexError(f"blocks from {self.blocks.min()} to {self.blocks.max()} where there are {grid.blocks}")
        layers = grid.begin + np.arange(grid.layers, dtype=np.int64) * grid.layer
        pieces = (layers[:, None] + self.blocks * grid.stride).reshape(-1, 1)
        return pieces + np.arange(grid.segments, dtype=np.int64) * grid.step


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
    and target must not overlap; the source may be read-only. Raises `IndexError`, with nothing copied, where a grid
    does not fit its memory or has no such block, and `ValueError` where the arguments do not fit together.
    """
    pieces, segments = source_at.pieces, source_at.grid.segments
    if (pieces, segments) != (target_at.pieces, target_at.grid.segments):
        raise ValueError(f"{pieces} × {segments} segments to {target_at.pieces} × {target_at.grid.segments} places")
    if not target.flags.writeable:
        raise ValueError("the target is read-only")
    source_there, target_there = _there(source, source_at, size), _there(target, target_at, size)
    sums = np.zeros(pieces, np.uint64)
    library = _library()
    if library is None or (checked and not _fits(segments, size)):
        into = target_at.offsets()
        for one, other in zip(source_at.offsets().flat, into.flat, strict=True):
            target[other : other + size] = source[one : one + size]
        return _plain_checksums(target, into, size) if checked else sums
    streamed = not passing and pieces * segments * size > _STREAM_FROM and size % _STRIPE == 0
    wanted = sums.ctypes.data if checked else None
    if not library.move(source_there, target_there, pieces, segments, size, streamed, wanted):
        source_at.offsets(), target_at.offsets()  # one of the two says what is wrong
    return sums


def checksums(source: Memory, source_at: Places, size: int) -> NDArray[np.uint64]:
    """[pieces] checksums, as `copy` would return them. Raises `IndexError` and `ValueError` as it does."""
    pieces, segments = source_at.pieces, source_at.grid.segments
    there = _there(source, source_at, size)
    library = _library()
    if library is None or not _fits(segments, size):
        return _plain_checksums(source, source_at.offsets(), size)
    sums = np.zeros(pieces, np.uint64)
    if not library.move(there, None, pieces, segments, size, False, sums.ctypes.data):
        source_at.offsets()
    return sums


class Counters(ctypes.Structure):
    """What the two ends of a copy in step share: `ledger` in move.c. Two counters of pieces, 8 bytes each, where the
    leading end writes the one and the following end the other, and a ring of `ring` sums; the leading end may be
    `ahead` pieces ahead, at most as many as the ring has."""

    _fields_ = (
        ("summed", ctypes.c_void_p), ("taken", ctypes.c_void_p), ("sums", ctypes.c_void_p),
        ("ring", ctypes.c_uint64), ("ahead", ctypes.c_uint64),
    )  # fmt: skip


MOST_AT_ONCE = 256
"""Pieces that are summed in step before the other end is told: so many at most."""


def keeps_step(segments: int, size: int) -> bool:
    """Whether pieces of so many segments of `size` bytes can be copied in step here."""
    return _library() is not None and _fits(segments, size)


def lead(source: Memory, at: Places, size: int, done: int, ledger: Counters, first: int, turn: int) -> int:
    """Sum the pieces from number `done` on, for a process that copies them and says how far it is: `turn` at a time, so
    that it finds them in the cache that both share. Number 0 is the ledger's `first`. Returns how many are done: fewer
    than all where the other end did not follow within some 300 µs. Only where `keeps_step`. Raises as `copy` does."""
    library = _library()
    _step(library, at.grid.segments, size)
    assert library is not None
    done = library.lead(_there(source, at, size), done, at.pieces, at.grid.segments, size, ledger, first, turn)
    if done < 0:
        at.offsets()  # says what is wrong
    return int(done)


def follow(
    source: Memory, source_at: Places, target: Memory, target_at: Places, size: int, done: int, ledger: Counters,
    first: int, turn: int, sums: tuple[NDArray[np.uint64], NDArray[np.uint64]], over: Flag,
) -> int:  # fmt: skip
    """The other end: copy the pieces from number `done` on as they are summed, until somebody says that it is `over`.
    Into the two `sums` [pieces] go those of what was stored and those that the leading end found. Returns as `lead`
    does."""
    library = _library()
    _step(library, source_at.grid.segments, size)
    assert library is not None
    pieces, ours, theirs = source_at.pieces, *sums
    if not pieces == target_at.pieces == ours.size == theirs.size or not target.flags.writeable:
        raise ValueError(f"{pieces} pieces to {target_at.pieces} places, or the target is read-only")
    there = (_there(source, source_at, size), _there(target, target_at, size))
    done = library.follow(
        *there, done, pieces, source_at.grid.segments, size, ledger, first, turn, ours.ctypes.data, theirs.ctypes.data,
        over.ctypes.data,
    )  # fmt: skip
    if done < 0:
        source_at.offsets(), target_at.offsets()  # one of the two says what is wrong
    return int(done)


def _step(library: ctypes.CDLL | None, segments: int, size: int) -> None:
    """The compiled loop would not end with segments that are no whole stripes."""
    if library is None or not _fits(segments, size):
        raise ValueError(f"{segments} segments of {size} bytes cannot be copied in step")


class _Places(ctypes.Structure):
    """`places` in move.c."""

    _fields_ = (
        ("base", ctypes.c_void_p), ("blocks", ctypes.c_void_p), ("count", ctypes.c_int64), ("layer", ctypes.c_int64),
        ("stride", ctypes.c_int64), ("step", ctypes.c_int64), ("limit", ctypes.c_int64),
    )  # fmt: skip


def _there(memory: Memory, at: Places, size: int) -> _Places:
    """`at` as the compiled loop reads it; the whole grid is within the memory."""
    grid, blocks = at.grid, at.blocks
    if memory.dtype != np.uint8 or memory.ndim != 1 or not memory.flags.c_contiguous:
        raise ValueError(f"a memory is contiguous bytes, not {memory.dtype} {memory.shape}")
    if blocks.dtype != np.int64 or blocks.ndim != 1 or not blocks.flags.c_contiguous:
        raise ValueError(f"numbers of blocks are contiguous int64 [pieces], not {blocks.dtype} {blocks.shape}")
    if min(grid.begin, grid.layer, grid.stride, grid.step, grid.segments, grid.blocks, grid.layers, size) < 0:
        raise ValueError(f"{grid} of segments of {size} bytes")
    last = (grid.layers - 1) * grid.layer + (grid.blocks - 1) * grid.stride + (grid.segments - 1) * grid.step
    if grid.begin + last + size > memory.size:
        raise IndexError(f"{grid} of segments of {size} bytes in a memory of {memory.size} bytes")
    base, numbers = memory.ctypes.data + grid.begin, blocks.ctypes.data
    return _Places(base, numbers, blocks.size, grid.layer, grid.stride, grid.step, grid.blocks)


def _fits(segments: int, size: int) -> bool:
    """Whether the compiled loop can sum such pieces."""
    return size % _STRIPE == 0 and segments * size > _LONG_PIECE


def _plain_checksums(memory: Memory, places: Offsets, size: int) -> NDArray[np.uint64]:
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
    at, long = ctypes.POINTER(_Places), ctypes.c_long
    library.move.argtypes = (at, at, long, long, long, ctypes.c_int, ctypes.c_void_p)
    ledger, number = ctypes.POINTER(Counters), ctypes.c_uint64
    library.lead.argtypes = (at, long, long, long, long, ledger, number, long)
    library.follow.argtypes = (at, at, long, long, long, long, ledger, number, long, *[ctypes.c_void_p] * 3)
    library.lead.restype = library.follow.restype = long
    return library
