"""The only door through which bytes from outside enter the pool.

The loop opens a reservation here when it grants one, and closes it when the handover ends; a transport's receiving
thread may write only through an open reservation, only blocks that it names, only once, and only what the checksum
confirms counts as arrived. `close` returns when no write is under way any more, so the blocks can be given to others
at once.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..common.clock import Clock
from ..common.errors import BatonError, CorruptBlock, HandoverFailed, StaleAttempt
from ..common.kv_format import KvFormat
from ..common.messages import Filled, HandoverKey, Spoiled
from .layout import Route, piece_bytes, routes
from .transport import Mark, Store, Taker
from .wire import FrameHeader

REMEMBERED = 4096
"""Handovers that are over and remembered, so that no frame of theirs waits for them to begin."""


@dataclass(slots=True)
class _Reservation:
    """`arrived` [source ranks that send to us, layers, blocks]; `missing` counts what is expected and not there; from
    `settled` on nothing that was computed earlier writes into the blocks."""

    attempt: int
    first: int
    blocks: array[int]
    routes: dict[int, tuple[int, Route]]
    arrived: NDArray[np.bool_]
    settled: Mark
    expected: int | None = None
    missing: int = 0
    touched: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    open: bool = True


class RankInlet:
    """Implements `transport.Inlet` for one rank: receives into `store`. `post` is told when a reservation is complete
    (`Filled`) or damaged (`Spoiled`)."""

    def __init__(
        self, store: Store, clock: Clock, post: Callable[[Filled | Spoiled], None], late_s: float = 0.0
    ) -> None:
        """`late_s`: how long a frame waits for its reservation, where that may come later than its bytes."""
        self._store = store
        self._clock = clock
        self._post = post
        self._late_s = late_s
        self._opened = threading.Condition()
        self._over: OrderedDict[HandoverKey, None] = OrderedDict()
        self._reservations: dict[HandoverKey, _Reservation] = {}

    # --- called by the loop ---

    def open(self, key: HandoverKey, attempt: int, source: KvFormat, first: int, blocks: Sequence[int]) -> None:
        mine = [r for r in routes(source, self._store.format) if r.target_rank == self._store.rank]
        reservation = _Reservation(
            attempt, first, array("q", blocks), {r.source_rank: (i, r) for i, r in enumerate(mine)},
            np.zeros((len(mine), self._store.format.num_layers, len(blocks)), dtype=np.bool_), self._store.mark(),
        )  # fmt: skip
        with self._opened:
            self._reservations[key] = reservation
            self._opened.notify_all()

    def expect(self, key: HandoverKey, last: int) -> None:
        reservation = self._reservations[key]
        with reservation.lock:
            count = reservation.expected = max(0, last - reservation.first)
            wanted = reservation.arrived[:, :, :count]
            reservation.missing = wanted.size - int(np.count_nonzero(wanted))
            short = count > len(reservation.blocks)
        if short:
            self._post(Spoiled(key, f"{count} blocks are announced, {len(reservation.blocks)} reserved"))
        elif reservation.missing == 0:
            self._post(Filled(key))

    def close(self, key: HandoverKey) -> None:
        with self._opened:
            reservation = self._reservations.pop(key, None)
            if self._late_s:
                self._over[key] = None
                if len(self._over) > REMEMBERED:
                    self._over.popitem(last=False)
                self._opened.notify_all()
        if reservation is not None:
            with reservation.lock:
                reservation.open = False

    def touched(self, key: HandoverKey) -> float | None:
        return self._reservations[key].touched

    # --- called by receiving threads ---

    def receive(self, source: tuple[str, int], rank: int, header: FrameHeader, taker: Taker) -> None:
        """Take one frame of a source (name, epoch) and its rank. Raises `StaleAttempt` where there is no such
        reservation (any more); `HandoverFailed` where the frame breaks the protocol, and then nothing is written, or
        is damaged, and then nobody will read what was. Such a frame spoils its reservation, which is closed then."""
        key = (*source, header.handover_id)
        if self._late_s:
            with self._opened:
                self._opened.wait_for(lambda: key in self._reservations or key in self._over, self._late_s)
        reservation = self._reservations.get(key)
        if reservation is None or reservation.attempt != header.attempt:
            raise StaleAttempt(f"no reservation {header.handover_id} of attempt {header.attempt} is open here")
        reservation.settled()  # without the lock, which the engine loop may want
        with reservation.lock:
            if not reservation.open:
                raise StaleAttempt(f"reservation {header.handover_id} is spoiled, or has just been closed")
            try:
                complete = self._write(reservation, rank, header, taker)
            except BatonError as error:
                reservation.open = False  # it is told once, and nothing more is written
                self._post(Spoiled(key, error.message, error.code))
                raise
        if complete:
            self._post(Filled(key))

    def _write(self, reservation: _Reservation, rank: int, header: FrameHeader, taker: Taker) -> bool:
        """Whether this frame was the last that was missing."""
        start, end = header.first - reservation.first, header.first - reservation.first + header.count
        if rank not in reservation.routes:
            raise HandoverFailed(f"rank {rank} of the source has nothing to send here")
        index, route = reservation.routes[rank]
        if header.layer >= self._store.format.num_layers:
            raise HandoverFailed(f"there is no layer {header.layer}")
        if start < 0 or end > len(reservation.blocks):
            raise HandoverFailed(f"blocks {header.first} to {header.first + header.count} are not reserved")
        if header.size != header.count * piece_bytes(self._store.format, route):
            raise HandoverFailed(f"{header.size} bytes for {header.count} pieces: not what this route carries")
        arrived = reservation.arrived[index, header.layer, start:end]
        if there := np.count_nonzero(arrived):
            if there == header.count:
                return False  # the same again
            raise HandoverFailed(f"layer {header.layer}, block {header.first}: overlaps what came before")
        sums = taker.land(self._store, header, reservation.blocks[start:end], route)
        if self._store.checked and sums.tobytes() != header.checksums:
            raise CorruptBlock(f"checksum of layer {header.layer}, blocks from {header.first} on does not match")
        arrived[:] = True
        reservation.touched = self._clock.now()
        if reservation.expected is None or start >= reservation.expected:
            return False
        reservation.missing -= min(end, reservation.expected) - start
        return reservation.missing == 0
