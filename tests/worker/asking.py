"""A client of the router: one stream, token by token."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from baton.common.types import FinishReason, Request
from baton.router.service import Router
from tests.toy import oracle, request

READY_S = 10.0


async def ready(router: Router, workers: int = 1) -> None:
    """Requests can be served, and so many workers are there."""
    async with asyncio.timeout(READY_S):
        while router.ready()[0] != "ready" or sum(w.state == "ready" for w in router.snapshot().workers) < workers:
            await asyncio.sleep(0.01)


async def ask(router: Router, what: Request, leave_after: int | None = None) -> list[int]:
    """The tokens of one request, each of them once and in order; all of them, unless it is cancelled after some."""
    stream, tokens = router.submit(what), []
    while True:
        batch = await stream.next()
        for token in batch.tokens:
            assert token.position == what.prompt_len + len(tokens)
            tokens.append(token.token)
        if leave_after is not None and len(tokens) >= leave_after:
            stream.cancel()
            return tokens
        if batch.finish is not None:
            assert batch.finish.reason is FinishReason.LENGTH
            assert batch.finish.usage.completion_tokens == len(tokens)
            return tokens


async def answered(router: Router, name: str, prompt: Sequence[int], length: int) -> None:
    """One request, once requests can be served: the oracle's tokens come back."""
    await ready(router)
    assert await ask(router, request(name, prompt, length)) == oracle(prompt, length)
