"""HTTP/1.1 from the client's side, with as little work per event as Python allows.

A load generator that shares its cores with the server it measures must cost almost nothing: one asyncio protocol
object for each connection, parsed by httptools, and one callback for each server-sent event. No retries, no
redirects, no pooling beyond reuse of idle connections.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

OnEvent = Callable[[float, bytes], None]
"""Called with the monotonic time at which the event's bytes were read, and what follows `data:` on its line."""


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer. `body` is empty where the answer was an event stream."""

    status: int
    body: bytes


class _Connection(asyncio.Protocol):
    """One connection; at most one request on it at a time."""

    def __init__(self) -> None:
        self.reusable = True
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Response] | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._on_event: OnEvent | None = None
        self._now = 0.0

    def send(self, data: bytes, on_event: OnEvent | None) -> asyncio.Future[Response]:
        """Send one request; the future has the answer, or a `ConnectionError`."""
        assert self._transport is not None, "send before connection_made"
        self._done = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._on_event, self._events = on_event, False
        self._rest, self._body = b"", bytearray()
        self._transport.write(data)
        return self._done

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.close()

    # --- asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from asyncio's

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        if self._parser is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("connection closed before the end of the answer")

    # --- httptools ---

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._events = value.startswith(b"text/event-stream")

    def on_body(self, data: bytes) -> None:
        if not self._events or self._on_event is None:
            self._body += data
            return
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._on_event(self._now, line[5:].strip())

    def on_message_complete(self) -> None:
        assert self._parser is not None
        self.reusable = self.reusable and bool(self._parser.should_keep_alive())
        if self._done is not None and not self._done.done():
            self._done.set_result(Response(self._parser.get_status_code(), bytes(self._body)))

    def _fail(self, why: str) -> None:
        self.reusable = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(why))


class HttpClient:
    """Requests to one server. `url` is its root, with or without a trailing `/v1`."""

    def __init__(self, url: str, api_key: str = "") -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = f"Host: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
        if api_key:
            self._headers += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[_Connection] = []

    async def get(self, path: str, timeout_s: float = 30.0) -> Response:
        """Raises `ConnectionError`, `OSError` or `TimeoutError`."""
        return await self._exchange("GET", path, b"", None, timeout_s)

    async def post(self, path: str, body: bytes, on_event: OnEvent | None = None, timeout_s: float = 600.0) -> Response:
        """Send JSON and wait for the end of the answer; the events of a stream go to `on_event` as they arrive.
        Raises `ConnectionError`, `OSError` or `TimeoutError`."""
        return await self._exchange("POST", path, body, on_event, timeout_s)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _exchange(
        self, method: str, path: str, body: bytes, on_event: OnEvent | None, timeout_s: float
    ) -> Response:
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        async with asyncio.timeout(timeout_s):
            connection = await self._connect()
            try:
                response = await connection.send(head.encode() + body, on_event)
            except BaseException:  # a cancelled wait leaves an answer half read: the connection is of no more use
                connection.close()
                raise
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return response

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return connection
