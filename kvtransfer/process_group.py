"""Bytes by `torch.distributed`, point to point: NCCL between GPUs, gloo between CPUs.

A lane's frames and credits go over its socket as ever; what follows a header there goes by a group of the two ranks
(`pair.py`) here, made when the first frame leaves. The target asks for bytes only when their header has come, so it is
the target that says whose come next. Each end has frames of its own at work while others are under way:

    source    packs n + 1 while n leaves, and waits for n when it has handed n + 1 over
    target    lets n + 1 and n + 2 come, once their headers are there, while n is written to its blocks

A watcher at each end gives the pair up as soon as the socket ends, because not every group notices by itself that the
other rank is gone. The source's watcher is the thread that counts credits.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..common import sockets
from ..common.errors import HandoverFailed, TransportFailed, WorkerLost
from ..common.kv_format import KvFormat
from ..kernels.move import Flag
from .layout import Cut, Route, piece_bytes
from .link import Greeting, SocketLink, waiting_headers
from .pair import Done, Pair
from .transport import Store
from .wire import MAX_FRAME, FrameHeader

_AHEAD = 2
"""Frames that a target lets come while it lands another."""

_LOOK_S = 0.5
"""How often a lane that has sent nothing yet looks whether its target is still there."""


@dataclass(frozen=True, slots=True)
class ProcessGroups:
    """Makes both ends of lanes. `device`: where the pool lies; `host`: the address that gloo is to listen at;
    `patience`: seconds that either end waits for the other."""

    device: torch.device
    host: str
    patience: float

    @property
    def is_nccl(self) -> bool:
        """Whether ranks meet by NCCL. Where they meet by gloo, only those let it in who ask for it: a source that sends
        more than it has announced ends its target's process there, which no check of ours can prevent."""
        return self.device.type == "cuda"

    @property
    def door(self) -> str:
        """What both ends must have in common."""
        return "nccl" if self.is_nccl else "gloo"

    def giver(self, link: SocketLink, store: Store, route: Route, target: KvFormat) -> GroupGiver:
        return GroupGiver(self, link, store, route, target)

    def taker(self, greeting: Greeting, connection: socket.socket) -> GroupTaker:
        """Raises `TransportFailed` where the source has another kind of group."""
        if greeting.door != self.door:
            raise TransportFailed(f"{greeting.door} cannot meet {self.door}")
        return GroupTaker(self, connection)

    def pair(self, connection: socket.socket, source: bool) -> Pair:
        return Pair(connection, source, self.device, self.host, self.patience)

    def side_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Where a lane's kernels and copies run, so that the engine's do not wait for them."""
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Bytes as a group takes them, and as a store does: memory of the host as a buffer, a device's as it is."""

    data: torch.Tensor
    stored: Any

    @classmethod
    def of(cls, data: torch.Tensor) -> _Buffer:
        return cls(data, data.numpy().data if data.device.type == "cpu" else data)


class _Staging:
    """Buffers that take turns, on the pool's device."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._whole = [torch.empty(0, dtype=torch.uint8, device=device)] * count
        self._fitting = [_Buffer.of(whole) for whole in self._whole]
        self._turn = 0

    def next(self, size: int) -> _Buffer:
        """`size` bytes, which stay as they are until all other buffers have had their turns."""
        turn = self._turn = (self._turn + 1) % len(self._whole)
        if self._fitting[turn].data.numel() != size:  # most frames are of one size
            if self._whole[turn].numel() < size:
                self._whole[turn] = self._whole[turn].new_empty(size)
            self._fitting[turn] = _Buffer.of(self._whole[turn][:size])
        return self._fitting[turn]


class GroupGiver:
    """See `transport.Giver`. Packs as `inline.InlineGiver` does."""

    def __init__(self, groups: ProcessGroups, link: SocketLink, store: Store, route: Route, target: KvFormat) -> None:
        self._groups = groups
        self._link = link
        self._store = store
        self._route = route
        self._target = target
        self._piece = piece_bytes(target, route)
        self._stream = groups.side_stream()
        self._staging = _Staging(groups.device, 2)
        self._packed = self._staging.next(0)
        self._before: Done | None = None
        self._pair: Pair | None = None
        self._met = threading.Event()
        self._closed = False

    def prepare(self, handover_id: int, attempt: int, layers: range, first: int, part: Cut) -> FrameHeader:
        size = len(layers) * part.count * self._piece
        with self._stream:
            self._packed = self._staging.next(size)
            sums = self._store.pack(layers, part, self._route, self._target, self._packed.stored)
        return FrameHeader(handover_id, attempt, layers.start, len(layers), first, part.count, size, sums.tobytes())

    def give(self, header: FrameHeader) -> None:
        """Returns when the frame before this one has left, whose buffer is then free for the next."""
        self._link.send(header)
        with self._stream:
            pair = self._pair or self._meet()
            before, self._before = self._before, pair.send(self._packed.data)
            if before is not None:
                before()

    def _meet(self) -> Pair:
        pair = self._pair = self._groups.pair(self._link.socket, source=True)
        self._met.set()
        if self._closed:  # nobody else would give it up
            self.close()
        return pair

    def withdraw(self, handover_id: int) -> None:
        """What was packed may leave: the target takes it no more."""

    def credits(self) -> int:
        while not self._met.wait(_LOOK_S):  # until then the socket is the pair's; `close` ends this
            if sockets.hung_up(self._link.socket):
                self.close()
                raise WorkerLost("the target hung up")
        try:
            return self._link.credits()
        except WorkerLost:
            self.close()
            raise

    def close(self) -> None:
        self._closed = True
        self._link.close()
        pair, self._pair, self._before = self._pair, None, None
        if pair is not None:
            pair.abort()
        self._met.set()

    def release(self) -> None:
        self._link.release()


class GroupTaker:
    """See `transport.Taker`. `connection`: the lane's socket, which is read by this thread only."""

    def __init__(self, groups: ProcessGroups, connection: socket.socket) -> None:
        self._groups = groups
        self._connection = connection
        self._stream = groups.side_stream()
        self._staging = _Staging(groups.device, _AHEAD + 1)
        self._coming: deque[tuple[_Buffer, Done]] = deque()
        self._data = self._staging.next(0).stored
        self._pair: Pair | None = None
        self._watcher: threading.Thread | None = None

    def fetch(self, header: FrameHeader) -> None:
        with self._stream:
            pair = self._pair or self._meet()
            for due in (header, *waiting_headers(self._connection, _AHEAD))[len(self._coming) :]:
                self._let_come(pair, due)
            buffer, arrived = self._coming.popleft()
            self._data = buffer.stored
            arrived()

    def _let_come(self, pair: Pair, header: FrameHeader) -> None:
        if header.size > MAX_FRAME:
            raise HandoverFailed(f"a frame of {header.size} bytes")
        buffer = self._staging.next(header.size)
        self._coming.append((buffer, pair.receive(buffer.data)))

    def _meet(self) -> Pair:
        pair = self._pair = self._groups.pair(self._connection, source=False)
        watcher = threading.Thread(target=_watch, args=(self._connection, pair), name="pair", daemon=True)
        watcher.start()
        self._watcher = watcher
        return pair

    def land(self, store: Store, header: FrameHeader, blocks: Sequence[int], route: Route, over: Flag) -> bool:
        with self._stream:
            sums = store.unpack(header.all_layers, blocks, route, self._data)
        if store.checked:
            header.confirm(sums)
        return True

    def leave(self, header: FrameHeader) -> None:
        """Its bytes have come, whatever became of them."""

    def close(self) -> None:
        sockets.hang_up(self._connection)
        if self._watcher is not None:
            self._watcher.join()  # it looks at the socket, which is closed next
        self._coming.clear()
        self._pair = None


def _watch(connection: socket.socket, pair: Pair) -> None:
    """On a thread of its own: give the pair up as soon as the socket ends, at either end."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.poll()
    pair.abort()
