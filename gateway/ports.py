"""The router as the gateway needs it; `router/service.py` fits, and so does a stand-in in a test."""

from __future__ import annotations

from typing import Protocol

from ..common.types import Request
from ..router.request import Batch
from ..router.stats import Limits


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


class Router(Protocol):
    def submit(self, request: Request) -> RequestStream:
        """Raises a `BatonError` for what cannot be served."""
        ...

    def ready(self) -> tuple[str, str]:
        """State (loading, ready, draining, unhealthy) and the reason for it."""
        ...

    def limits(self) -> Limits | None:
        """What the workers can take; None while no worker is known."""
        ...
