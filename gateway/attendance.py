"""The gateway's stream to the controller: what it sees goes out each second, the membership comes back.

The controller may be away, or frozen, for as long as it likes: requests go on with the last known membership, and the
gateway tries again each second. Silence is no news: a cluster in which nothing changes says nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Protocol

from ..common.cluster import FromController, FromGateway, GatewayHello, Members, Trace, TraceAnswer, Traffic
from ..common.errors import BatonError, DeadlineExceeded
from ..protos.control import ControllerClient
from ..protos.rpc import CalledStream, Peer
from .ids import meant_by

log = logging.getLogger(__name__)

EVERY_S = 1.0
"""How often traffic is told, and a controller that is away tried again."""
WRITE_S = 5.0
"""After this long a controller that takes no message is left, and tried again."""

_Stream = CalledStream[FromController, FromGateway]


class Seen(Protocol):
    """What the controller may ask a gateway for; the router has it."""

    def traffic(self) -> Traffic:
        """Since this was asked last."""
        ...

    def trace(self, request_id: str) -> Trace | None:
        """Of one request; an empty id means the slowest."""
        ...


async def attend(address: str, cluster_token: str, hello: GatewayHello, seen: Seen) -> AsyncGenerator[Members, None]:
    """The controller's membership, now and at each change, for ever. To be closed when nobody wants it any more."""
    said = False  # that it is away: once, for it may stay away for long
    while True:
        peer = Peer(address, cluster_token)
        stream = ControllerClient(peer).attend()
        speaking = asyncio.create_task(_speak(stream, hello, seen), name="traffic to the controller")
        try:
            while (message := await stream.read()) is not None:
                if isinstance(message, Members):
                    said = False
                    yield message
                else:
                    await _write(stream, TraceAnswer(message.question, _find(seen, message.request_id)))
        except BatonError as error:
            log.log(logging.DEBUG if said else logging.WARNING, "no controller at %s: %s", address, error)
            said = True
        finally:
            speaking.cancel()
            await asyncio.wait({speaking})
            await peer.close()
            if not speaking.cancelled() and (mistake := speaking.exception()):
                log.error("telling the controller failed in our own code", exc_info=mistake)
        await asyncio.sleep(EVERY_S)


async def _speak(stream: _Stream, hello: GatewayHello, seen: Seen) -> None:
    """Say who this is, then the traffic of each second. Whatever ends this ends the stream."""
    try:
        with suppress(BatonError):  # the reader of the stream meets the same, and says so
            await _write(stream, hello)
            while True:
                await asyncio.sleep(EVERY_S)
                await _write(stream, seen.traffic())
    finally:
        stream.cancel()


async def _write(stream: _Stream, message: FromGateway) -> None:
    try:
        async with asyncio.timeout(WRITE_S):
            await stream.write(message)
    except TimeoutError:
        raise DeadlineExceeded(f"the controller has taken no message for {WRITE_S:.0f} s") from None


def _find(seen: Seen, request_id: str) -> Trace | None:
    found = (trace for name in meant_by(request_id) if (trace := seen.trace(name)) is not None)
    return next(found, None)
