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
from ..common.errors import BatonError, HandoverFailed, StaleAttempt
from ..common.kv_format import KvFormat
from ..common.messages import Filled, HandoverKey, Spoiled
from ..kernels.move import Flag
from .layout import Route, piece_bytes, routes
from .transport import Mark, Store, Taker
from .wire import FrameHeader

REMEMBERED = 4096
"""Handovers that are over and remembered, so that no frame of theirs waits for them to begin."""


@dataclass(slots=True)
class _Reservation:
    """`arrived` [source ranks that send to us, layers, blocks]; `missing` counts what is expected and not there; from
    `settled` on nothing that was computed earlier writes into the blocks. Who writes to them holds `writing`, and may
    until it is `over`; `counting` is held for a moment only, for the engine loop waits for it."""

    attempt: int
    first: int
    blocks: array[int]
    routes: dict[int, tuple[int, Route]]
    arrived: NDArray[np.bool_]
    settled: Mark
    expected: int | None = None
    missing: int = 0
    touched: float | None = None
    over: Flag = field(default_factory=lambda: np.zeros(1, np.int32))
    writing: threading.Lock = field(default_factory=threading.Lock)
    counting: threading.Lock = field(default_factory=threading.Lock)


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
        with reservation.counting:
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
            reservation.over[0] = 1
            with reservation.writing:
                """Nobody writes any more."""

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
        reservation.settled()  # without the lock, which the engine loop may want, like all that waits
        while not self._take(key, reservation, rank, header, taker):
            if not reservation.over[0]:
                taker.fetch(header)

    def _take(self, key: HandoverKey, reservation: _Reservation, rank: int, header: FrameHeader, taker: Taker) -> bool:
        """Whether the frame is through, and not some of it yet to come."""
        with reservation.writing:
            if reservation.over[0]:
                raise StaleAttempt(f"reservation {header.handover_id} is spoiled, or has just been closed")
            try:
                place = self._place(reservation, rank, header)
                through = place is None or taker.land(self._store, header, *place, reservation.over)
            except BatonError as error:
                reservation.over[0] = 1  # it is told once, and nothing more is written
                self._post(Spoiled(key, error.message, error.code))
                raise
            reservation.touched = self._clock.now()
            complete = place is not None and through and self._count(reservation, rank, header)
        if complete:
            self._post(Filled(key))
        return through

    def _place(self, reservation: _Reservation, rank: int, header: FrameHeader) -> tuple[Sequence[int], Route] | None:
        """The blocks that a frame is for, and the route that its pieces take; None if they are there already. Raises
        `HandoverFailed` where the frame breaks the protocol."""
        start, end = header.first - reservation.first, header.first - reservation.first + header.count
        if rank not in reservation.routes:
            raise HandoverFailed(f"rank {rank} of the source has nothing to send here")
        index, route = reservation.routes[rank]
        if header.layer + header.layers > self._store.format.num_layers:
            raise HandoverFailed(f"there is no layer {header.layer + header.layers - 1}")
        if start < 0 or end > len(reservation.blocks):
            raise HandoverFailed(f"blocks {header.first} to {header.first + header.count} are not reserved")
        if header.size != header.pieces * piece_bytes(self._store.format, route):
            raise HandoverFailed(f"{header.size} bytes for {header.pieces} pieces: not what this route carries")
        if there := np.count_nonzero(reservation.arrived[index, _span(header.all_layers), start:end]):
            if there == header.pieces:
                return None
            raise HandoverFailed(f"layer {header.layer}, block {header.first}: overlaps what came before")
        return reservation.blocks[start:end], route

    def _count(self, reservation: _Reservation, rank: int, header: FrameHeader) -> bool:
        """Whether this frame, which has landed, was the last that was missing."""
        start, end = header.first - reservation.first, header.first - reservation.first + header.count
        index, _ = reservation.routes[rank]
        with reservation.counting:
            reservation.arrived[index, _span(header.all_layers), start:end] = True
            if reservation.expected is None or start >= reservation.expected:
                return False
            reservation.missing -= header.layers * (min(end, reservation.expected) - start)
            return reservation.missing == 0


def _span(layers: range) -> slice:
    return slice(layers.start, layers.stop)
