"""The outermost layer of the HTTP door, in plain ASGI: a name for every request, and the key.

Both come before anything of a request is read, so that a caller without a key costs next to nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..common.errors import BatonError, Unauthorized
from .errors import error_body, error_headers
from .ids import request_id
from .service import Caller

_OPEN = frozenset(("/health", "/ready", "/metrics", "/version", "/docs", "/openapi.json"))
"""What probes and scrapers read, and what the API looks like: needs no key."""


class Door:
    """Wraps the application. It leaves a `Caller` in the scope's state, under "caller", and answers every request with
    its `x-request-id`. While it is `closing`, each answer is the last on its connection: a client that keeps one comes
    anew, and the port may have other gateways."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], closing: Callable[[], bool]) -> None:
        self._app = app
        self._closing = closing
        self._keys = tuple(key.encode() for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received = time.perf_counter()
        headers = Headers(scope=scope)
        name = request_id(headers.get("x-request-id", ""))

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = name
                if self._closing():
                    answer["connection"] = "close"
            await send(message)

        try:
            tenant = "" if scope["path"] in _OPEN else self._tenant(headers.get("authorization", ""))
        except Unauthorized as error:
            await error_response(error)(scope, receive, send_named)
            return
        scope.setdefault("state", {})["caller"] = Caller(name, tenant, received)
        await self._app(scope, receive, send_named)

    def _tenant(self, authorization: str) -> str:
        """The name under which this caller's KV blocks are cached: from the key, which it must not give away.
        Raises `Unauthorized`."""
        if not self._keys:
            return ""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("no API key: send it as `Authorization: Bearer KEY`")
        sent = key.strip().encode()
        if not sum(hmac.compare_digest(sent, known) for known in self._keys):  # a sum compares them all, at equal time
            raise Unauthorized("the API key is not known here")
        return hashlib.sha256(sent).hexdigest()[:16]


def error_response(error: BatonError) -> JSONResponse:
    return JSONResponse(error_body(error), error.http_status, error_headers(error))
