"""What a medium can do at most: the same bytes between the same two processes, with nothing of ours in the way."""

from __future__ import annotations

import ctypes
import functools
import socket
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray

from ...common import sockets
from .end import HOST, TIMEOUT_S

_c10d: Any = torch.distributed
"""Any: torch's type stubs do not know what its single backends can do."""

CHUNK = 1 << 20
"""Bytes of one send on a plain socket."""

LIMITS = {"shm": "memcpy", "tcp": "socket", "grpc": "socket", "process-group": "gloo"}
"""What a transport is held against."""

Bytes = NDArray[np.uint8]


def memcpy(source: Bytes, target: Bytes) -> float:
    """Seconds of one thread for all of it, in the order of the addresses: the faster of numpy's and the C library's."""
    seconds = []
    for copy in (_numpy_copy, _libc_copy):
        begin = time.monotonic()
        copy(source, target)
        seconds.append(time.monotonic() - begin)
    return min(seconds)


def _numpy_copy(source: Bytes, target: Bytes) -> None:
    np.copyto(target, source)


def _libc_copy(source: Bytes, target: Bytes) -> None:
    ctypes.memmove(target.ctypes.data, source.ctypes.data, source.size)


@functools.cache
def small(size: int) -> Bytes:
    """A buffer to send from, or to receive into, over and over: always the same, all of whose pages are there."""
    return np.ones(size, dtype=np.uint8)


class Receiver:
    """The target's end of plain streams, numbered as they were accepted."""

    def __init__(self) -> None:
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._connections: list[socket.socket] = []

    def accept(self) -> None:
        self._listener.settimeout(TIMEOUT_S)
        connection, _ = self._listener.accept()
        self._connections.append(connection)

    def receive(self, number: int, memory: Bytes, size: int) -> float:
        """When the last byte was there that came on this connection. Fills `memory` from front to back, and again."""
        done = 0
        while done < size:
            at = done % memory.size
            count = self._connections[number].recv_into(memory[at : at + CHUNK].data)
            if count == 0:
                raise ConnectionError("the source hung up")
            done += count
        return time.monotonic()


class Sender:
    """The source's end of it. `tuned`: by a socket as lanes have it, and not as the system does."""

    def __init__(self, port: int, tuned: bool) -> None:
        self._connection = sockets.unconnected(HOST) if tuned else socket.socket()
        self._connection.settimeout(TIMEOUT_S)
        self._connection.connect((HOST, port))
        self._connection.setblocking(True)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, memory: Bytes, size: int) -> None:
        """`size` bytes: `memory` from front to back, and then again."""
        for part in _parts(memory, size, CHUNK):
            self._connection.sendall(part.data)


class Group:
    """Either end of a bare gloo pair; the source is rank 0 and keeps the store, at `port`."""

    def __init__(self, rank: int, port: int) -> None:
        patience = timedelta(seconds=TIMEOUT_S)
        self._store = _c10d.TCPStore(HOST, port, is_master=rank == 0, timeout=patience, wait_for_workers=False)
        self.port: int = self._store.port
        self._rank = rank
        self._options = _c10d.ProcessGroupGloo._Options()
        self._options._timeout = patience
        self._options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=HOST)]

    def join(self) -> None:
        """Returns when the other end has joined, too."""
        self._group = _c10d.ProcessGroupGloo(self._store, self._rank, 2, self._options)

    def move(self, memory: Bytes, size: int, message: int, under_way: int) -> float:
        """Send or receive `size` bytes in messages of `message` bytes, so many of them under way at a time: `memory`
        from front to back, and then again. When the last was through."""
        begun: deque[Any] = deque()
        for part in _parts(memory, size, message):
            data = [torch.from_numpy(part)]
            begun.append(self._group.send(data, 1, 0) if self._rank == 0 else self._group.recv(data, 0, 0))
            if len(begun) == under_way:
                begun.popleft().wait()
        while begun:
            begun.popleft().wait()
        return time.monotonic()


def _parts(memory: Bytes, size: int, each: int) -> Iterator[Bytes]:
    for done in range(0, size, each):
        at = done % memory.size
        yield memory[at : at + min(each, size - done)]
