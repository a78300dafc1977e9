"""Lanes over gRPC: works wherever the control messages do, needs no door of its own, and is what others fall back to.

Frames are raw messages, header and bytes in one; each is answered by an empty-handed credit. A lane's thread waits for
what the process's event loop does.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import struct
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from ..common.errors import BatonError, DeadlineExceeded, HandoverFailed, TransportFailed, WorkerLost
from ..kernels.move import Flag
from ..protos.rpc import CalledStream, Peer, Stream
from . import wire
from .layout import Route
from .link import Greeting, LaneServer
from .transport import Store
from .wire import FrameHeader

T = TypeVar("T")

_LENGTH = struct.Struct("<I")
_CREDIT = b"+"


class GrpcLink:
    """See `inline.Link`. Raises as `link.SocketLink` does. Use it on any thread but the event loop's."""

    def __init__(
        self, address: str, token: str, greeting: Greeting, patience: float, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._loop = loop
        self._patience = patience
        self._stream: CalledStream[bytes, bytes] | None = None
        self._peer = self._wait(self._open(address, token), patience)
        try:
            why = self._wait(self._greet(greeting), patience)
            if why:
                raise TransportFailed(why.decode(errors="replace"))
        except BatonError:
            self.close()
            raise

    async def _open(self, address: str, token: str) -> Peer:
        return Peer(address, token)  # a channel belongs to the event loop on which it is made

    async def _greet(self, greeting: Greeting) -> bytes | None:
        self._stream = self._peer.data()
        await self._stream.write(greeting.packed())
        return await self._stream.read()

    def send(self, header: FrameHeader, payload: memoryview | None = None) -> None:
        assert self._stream is not None
        head = wire.pack(header)
        frame = b"".join((_LENGTH.pack(len(head)), head, payload or b""))
        self._wait(self._stream.write(frame), self._patience)

    def credits(self) -> int:
        assert self._stream is not None
        if self._wait(self._stream.read(), None) is None:
            raise WorkerLost("the target hung up")
        return 1

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._close)

    def release(self) -> None:
        """The event loop has let go of the stream and its channel."""

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
        self._closing = self._loop.create_task(self._peer.close())

    def _wait(self, work: Coroutine[Any, Any, T], timeout: float | None) -> T:
        """What `work` comes to on the event loop. No timeout: until the stream breaks, of which gRPC's keepalive sees
        to it that it does."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout)
        except TimeoutError as error:
            future.cancel()
            raise WorkerLost("no answer over gRPC in time") from error
        except concurrent.futures.CancelledError as error:
            raise WorkerLost("the event loop has ended") from error


class _Held:
    """See `transport.Taker`. The bytes came with the message."""

    def __init__(self) -> None:
        self.data = memoryview(b"")

    def fetch(self, header: FrameHeader) -> None:
        if self.data.nbytes != header.size:
            raise HandoverFailed(f"{self.data.nbytes} bytes came, {header.size} were announced")

    def land(self, store: Store, header: FrameHeader, blocks: Sequence[int], route: Route, over: Flag) -> bool:
        sums = store.unpack(header.all_layers, blocks, route, self.data)
        if store.checked:
            header.confirm(sums)
        return True

    def leave(self, header: FrameHeader) -> None:
        """The next message brings what is next."""

    def close(self) -> None:
        """Nothing is held."""


async def serve(stream: Stream[bytes, bytes], server: LaneServer, within_s: float) -> None:
    """The target's end of one lane. Raises what ends it."""
    try:
        async with asyncio.timeout(within_s):
            hello = await stream.read()
    except TimeoutError as error:
        raise DeadlineExceeded("a stream was opened and nothing was said") from error
    if hello is None:
        return
    greeting, taker = Greeting.read(hello), _Held()
    try:
        server.admit(greeting)
    except BatonError as error:
        await stream.write(error.message.encode() or b"no")
        raise
    await stream.write(b"")
    while (frame := await stream.read()) is not None:
        header, taker.data = _split(frame)
        await asyncio.to_thread(server.take, greeting, header, taker)
        await stream.write(_CREDIT)


def _split(frame: bytes) -> tuple[FrameHeader, memoryview]:
    view = memoryview(frame)
    if len(view) < _LENGTH.size:
        raise HandoverFailed("not a frame")
    (length,) = _LENGTH.unpack_from(view)
    if length > min(wire.MAX_HEADER, len(view) - _LENGTH.size):
        raise HandoverFailed("a header that is longer than its frame")
    return wire.unpack(view[_LENGTH.size : _LENGTH.size + length]), view[_LENGTH.size + length :]
