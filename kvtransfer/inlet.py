"""The only door through which bytes from outside enter the pool.

The loop opens a reservation here when it grants one, and closes it when the handover ends; a transport's receiving
thread may write only through an open reservation, only blocks that it names, only once, only what the checksum
confirms. `close` returns when no write is under way any more, so the blocks can be given to others at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..common.clock import Clock
from ..common.errors import BatonError, HandoverFailed, StaleAttempt
from ..common.messages import Filled, HandoverKey, Spoiled
from . import wire
from .transport import BlockStore


@dataclass(slots=True)
class _Reservation:
    attempt: int
    first: int
    blocks: Sequence[int]
    missing: int
    touched: float | None = None
    arrived: set[tuple[int, int]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    open: bool = True


class Inlet:
    """Receives into `store`. `post` is told when a reservation is complete (`Filled`) or damaged (`Spoiled`)."""

    def __init__(self, store: BlockStore, clock: Clock, post: Callable[[Filled | Spoiled], None]) -> None:
        self._store = store
        self._clock = clock
        self._post = post
        self._reservations: dict[HandoverKey, _Reservation] = {}

    def open(self, key: HandoverKey, attempt: int, first: int, blocks: Sequence[int]) -> None:
        """Let bytes in for the sequence's blocks number `first` and on, which live in `blocks`."""
        missing = len(blocks) * self._store.num_layers
        self._reservations[key] = _Reservation(attempt, first, blocks, missing)
        if missing == 0:
            self._post(Filled(key))

    def close(self, key: HandoverKey) -> None:
        """Let nothing more in. Waits for a write that is under way: at most one frame's copy."""
        reservation = self._reservations.pop(key, None)
        if reservation is not None:
            with reservation.lock:
                reservation.open = False

    def touched(self, key: HandoverKey) -> float | None:
        """When bytes last arrived; None if none have."""
        return self._reservations[key].touched

    def receive(self, source: tuple[str, int], frame: bytes) -> wire.FrameHeader:
        """Take one frame of a source (name, epoch). Raises `StaleAttempt` where there is no such reservation (any
        more), `HandoverFailed` where the frame breaks the protocol or is damaged; then nothing is written."""
        header, payload = wire.unpack(frame)
        key = (*source, header.handover_id)
        reservation = self._reservations.get(key)
        if reservation is None or reservation.attempt != header.attempt:
            raise StaleAttempt(f"no reservation {header.handover_id} of attempt {header.attempt} is open here")
        with reservation.lock:
            if not reservation.open:
                raise StaleAttempt(f"reservation {header.handover_id} has just been closed")
            try:
                complete = self._write(reservation, header, payload)
            except BatonError as error:
                self._post(Spoiled(key, error.message))
                raise
        if complete:
            self._post(Filled(key))
        return header

    def _write(self, reservation: _Reservation, header: wire.FrameHeader, payload: memoryview) -> bool:
        """Whether this frame was the last that was missing."""
        start = header.first - reservation.first
        if header.layer >= self._store.num_layers or header.count == 0:
            raise HandoverFailed(f"layer {header.layer}, {header.count} blocks: no such thing")
        if start < 0 or start + header.count > len(reservation.blocks):
            raise HandoverFailed(f"blocks {header.first} to {header.first + header.count} are not reserved")
        if len(payload) != header.count * self._store.block_bytes:
            raise HandoverFailed(f"{len(payload)} bytes for {header.count} blocks of {self._store.block_bytes}")
        if wire.checksum(payload) != header.checksum:
            raise HandoverFailed(f"checksum of layer {header.layer}, block {header.first} does not match")
        numbers = {(header.layer, i) for i in range(start, start + header.count)}
        if numbers <= reservation.arrived:
            return False  # the same again
        if numbers & reservation.arrived:
            raise HandoverFailed(f"layer {header.layer}, block {header.first}: overlaps what came before")
        self._store.scatter(header.layer, reservation.blocks[start : start + header.count], payload)
        reservation.arrived |= numbers
        reservation.missing -= header.count
        reservation.touched = self._clock.now()
        return reservation.missing == 0
