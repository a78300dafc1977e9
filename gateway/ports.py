"""What the gateway needs of the router, as it sees it; `router/service.py` fits without knowing of this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..common.messages import TokenOut
from ..common.types import FinishReason, Request, Timeline, Usage


class Finish(Protocol):
    """The last word on a request that ended well."""

    @property
    def reason(self) -> FinishReason: ...
    @property
    def usage(self) -> Usage: ...
    @property
    def timeline(self) -> Timeline: ...


class Batch(Protocol):
    """What has arrived since the last call."""

    @property
    def tokens(self) -> Sequence[TokenOut]: ...
    @property
    def finish(self) -> Finish | None: ...


class RequestStream(Protocol):
    """One request's output."""

    @property
    def backlog(self) -> int:
        """Tokens that have arrived and were not taken."""
        ...

    async def next(self) -> Batch:
        """Wait for tokens or the end. Raises a `BatonError` when the request has failed."""
        ...

    def cancel(self) -> None:
        """Give the request up and free what it holds; nothing happens if it has ended."""
        ...


class Limits(Protocol):
    """What the workers can take."""

    @property
    def max_model_len(self) -> int: ...


class Router(Protocol):
    def submit(self, request: Request) -> RequestStream:
        """Raises a `BatonError` for what cannot be served."""
        ...

    def ready(self) -> tuple[str, str]:
        """State (loading, ready, draining, unhealthy) and the reason for it."""
        ...

    def limits(self) -> Limits | None:
        """None while no worker is known."""
        ...
