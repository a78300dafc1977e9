"""A lane's connection: frames one way, credits the other, on an authenticated socket.

source ── Greeting ──▶ target ── "" or why not ──▶ source ── header [, bytes] ──▶ target ── one byte ──▶ source ...
"""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass

import msgpack

from ..common import sockets
from ..common.errors import BatonError, HandoverFailed, InvalidRequest, StaleEpoch, TransportFailed, WorkerLost
from ..common.kv_format import KvFormat
from ..common.types import WorkerRef
from . import wire
from .inlet import RankInlet
from .transport import Taker
from .wire import FrameHeader

log = logging.getLogger(__name__)

_CREDIT = b"+"
_MAX_GREETING = 64 << 10
_LOOK_AHEAD = 16 << 10


@dataclass(frozen=True, slots=True)
class Greeting:
    """A lane's first message: whose it is, which incarnation it means, and how the bytes are to be had.
    `door`: where the source's rank is reached by `transport`, for those that fetch from it. `ledger`: where the memory
    is that the two ends share, if they copy in step (`ledger.py`)."""

    name: str
    epoch: int
    rank: int
    target_epoch: int
    target_rank: int
    transport: str
    door: str
    format: KvFormat
    ledger: str = ""

    def packed(self) -> bytes:
        data: bytes = msgpack.packb((*(getattr(self, f) for f in _PLAIN), astuple(self.format)))
        return data

    @classmethod
    def read(cls, data: bytes) -> Greeting:
        """Raises `InvalidRequest` where that is none."""
        try:
            name, epoch, rank, target_epoch, target_rank, transport, door, ledger, form = msgpack.unpackb(data)
            layers, heads, head_dim, block_size, dtype, tp = form
            texts = (name, transport, door, ledger, dtype)
            counts = (epoch, rank, target_epoch, target_rank, layers, heads, head_dim, block_size, tp)
            if not all(type(t) is str for t in texts) or not all(type(c) is int and c >= 0 for c in counts):
                raise ValueError("a field is not what it should be")
            form = KvFormat(*form)
            greeting = cls(name, epoch, rank, target_epoch, target_rank, transport, door, form, ledger)
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            raise InvalidRequest(f"the first message of a lane is a greeting: {error}") from error
        if greeting.rank >= greeting.format.tp:
            raise InvalidRequest(f"rank {greeting.rank} of {greeting.format.tp}")
        return greeting


_PLAIN = ("name", "epoch", "rank", "target_epoch", "target_rank", "transport", "door", "ledger")


class SocketLink:
    """The source's end. Raises `TransportFailed` where the target does not want this lane, `WorkerLost` where it does
    not answer within `patience` seconds."""

    def __init__(self, address: str, token: str, greeting: Greeting, patience: float) -> None:
        self._socket = sockets.connect(address, token, patience)
        try:
            sockets.send(self._socket, greeting.packed())
            if why := sockets.receive(self._socket, _MAX_GREETING):
                raise TransportFailed(why.decode(errors="replace"))
        except BatonError:
            self._socket.close()
            raise
        sockets.limit_waits(self._socket, sending=patience, receiving=0)  # credits come when they come

    @property
    def socket(self) -> socket.socket:
        """For what the two ends have to say to each other before the first frame."""
        return self._socket

    def send(self, header: FrameHeader, payload: memoryview | None = None) -> None:
        """Raises `WorkerLost` where the target does not read within the patience, or is gone."""
        head = wire.pack(header)
        if payload is None:
            sockets.send(self._socket, head)
        else:
            sockets.send_all(self._socket, len(head).to_bytes(4, "little"), head, payload)

    def credits(self) -> int:
        """Wait for credits and count them. Raises `WorkerLost` where the target hung up."""
        try:
            data = self._socket.recv(4096)
        except OSError as error:
            data, why = b"", str(error)
        else:
            why = "the target hung up"
        if not data:
            self.close()  # the other thread may wait for the target to read; its socket must stay its own until then
            raise WorkerLost(why)
        return len(data)

    def close(self) -> None:
        """Wake whoever waits here. Idempotent."""
        sockets.hang_up(self._socket)

    def release(self) -> None:
        """When nobody waits here any more."""
        self._socket.close()


def waiting_headers(connection: socket.socket, most: int) -> list[FrameHeader]:
    """Headers that have come and still wait to be read, up to `most`, on a lane whose socket carries no bytes."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not poll.poll(0):
        return []
    try:
        rest = connection.recv(_LOOK_AHEAD, socket.MSG_PEEK)
    except OSError as error:
        raise WorkerLost(f"the source is gone: {error}") from error
    headers: list[FrameHeader] = []
    while len(rest) >= 4 and len(headers) < most:
        end = 4 + int.from_bytes(rest[:4], "little")
        if end > len(rest):
            break
        headers.append(wire.unpack(rest[4:end]))
        rest = rest[end:]
    return headers


MakeTaker = Callable[[Greeting, socket.socket], Taker]
"""Raises `TransportFailed` where the bytes cannot be had that way."""


class LaneServer:
    """The target's end: `serve` is a `sockets.Listener`'s, one call for each lane."""

    def __init__(
        self, ref: WorkerRef, rank: int, inlet: RankInlet, takers: Mapping[str, MakeTaker], patience: float
    ) -> None:
        self._ref = ref
        self._rank = rank
        self._inlet = inlet
        self._takers = takers
        self._patience = patience

    def serve(self, connection: socket.socket) -> None:
        """Raises what ends the lane."""
        sockets.limit_waits(connection, sending=self._patience, receiving=self._patience)
        greeting = Greeting.read(sockets.receive(connection, _MAX_GREETING))
        try:
            taker = self._taker(greeting, connection)
        except BatonError as error:
            sockets.send(connection, error.message.encode() or b"no")
            raise
        try:
            sockets.send(connection, b"")
            while True:
                sockets.wait(connection)  # a lane may be idle for as long as its ends live
                head = sockets.receive(connection, wire.MAX_HEADER)
                self.take(greeting, wire.unpack(head), taker)
                sockets.send_all(connection, _CREDIT)
        finally:
            taker.close()

    def admit(self, greeting: Greeting) -> None:
        """Raises `StaleEpoch` where another is meant than we are."""
        if (greeting.target_epoch, greeting.target_rank) != (self._ref.epoch, self._rank):
            raise StaleEpoch(f"{self._ref.name} has been restarted, or another rank is meant")

    def _taker(self, greeting: Greeting, connection: socket.socket) -> Taker:
        self.admit(greeting)
        if greeting.transport not in self._takers:
            raise TransportFailed(f"there is no {greeting.transport} here")
        return self._takers[greeting.transport](greeting, connection)

    def take(self, greeting: Greeting, header: FrameHeader, taker: Taker) -> None:
        """A frame that the inlet refuses costs its handover and not the lane."""
        taker.fetch(header)
        try:
            self._inlet.receive((greeting.name, greeting.epoch), greeting.rank, header, taker)
        except WorkerLost:
            raise
        except HandoverFailed as error:
            log.error("frame from %s refused: %s", greeting.name, error)
        except BatonError as error:
            log.info("frame from %s dropped: %s", greeting.name, error)
        taker.leave(header)
