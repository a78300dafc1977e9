"""The answer to a request for text, as an ASGI response that generates while it is sent.

FastAPI hands over here: from the first token on, a stream is bytes that go straight to the server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..common.errors import BatonError
from .choice import Choice, Shown
from .errors import error_body
from .formats import (
    DONE,
    Envelope,
    EventWriter,
    Format,
    encode,
    error_event,
    usage_event,
    whole_body,
)
from .generation import Generation

_LOOK_S = 1.0
"""How often a stream's unread tokens are counted."""
_GRACE_S = 5.0
"""The router ends a request at its deadline; a client that has not read the end by then is given this much longer."""


class ClientGone(Exception):
    """The client has disconnected, or does not read: nobody is there to be told."""


class InFlight:
    """Counts what runs (`with`); `idle` is set while that is nothing."""

    def __init__(self) -> None:
        self.count = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def __enter__(self) -> None:
        self.count += 1
        self.idle.clear()

    def __exit__(self, *error: object) -> None:
        self.count -= 1
        if self.count == 0:
            self.idle.set()


class EventSink:
    """Writes server-sent events. The status line waits for the first token, so that whatever goes wrong before it has
    a proper status."""

    def __init__(self, send: Send, form: Format, envelope: Envelope, generation: Generation) -> None:
        self._send = send
        self._form = form
        self._envelope = envelope
        self._generation = generation
        self._writers = [EventWriter(form, envelope, choice.index) for choice in generation.choices]
        self._opened: set[int] = set()
        self._starting = asyncio.Lock()
        self.started = False
        self._with_logprobs = generation.choices[0].params.logprobs is not None
        self._detailed = self._with_logprobs or envelope.token_ids

    async def show(self, choice: Choice, shown: Shown) -> None:
        writer = self._writers[choice.index]
        if self._detailed:
            body = writer.detailed_tokens(shown, with_logprobs=self._with_logprobs)
        else:
            body = writer.tokens(shown)
        if choice.finish_reason is not None:
            body += writer.finish(choice)
        if choice.index not in self._opened:
            self._opened.add(choice.index)
            body = writer.opening() + body
            await self._start()
        if body:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _start(self) -> None:
        async with self._starting:
            if not self.started:
                headers = [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),
                ]
                self.started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def close(self) -> None:
        body = DONE
        if self._envelope.include_usage:
            usage, timeline = self._generation.usage(), self._generation.timeline()
            body = usage_event(self._form, self._envelope, usage, timeline) + DONE
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def fail(self, error: BatonError) -> None:
        """End a stream that has begun: an event that says why, and no [DONE]."""
        await self._send({"type": "http.response.body", "body": error_event(error_body(error)), "more_body": False})


class BodySink:
    """Keeps everything and sends it at the end."""

    def __init__(self, send: Send, form: Format, envelope: Envelope, generation: Generation) -> None:
        self._send = send
        self._form = form
        self._envelope = envelope
        self._generation = generation
        self._shown: list[Shown] = [[] for _ in generation.choices]
        self.started = False

    async def show(self, choice: Choice, shown: Shown) -> None:
        self._shown[choice.index] += shown

    async def close(self) -> None:
        choices = self._generation.choices
        with_logprobs = choices[0].params.logprobs is not None
        usage = self._generation.usage()
        body = whole_body(self._form, self._envelope, choices, self._shown, usage, with_logprobs=with_logprobs)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"baton-timeline", encode(self._generation.timeline())),
        ]
        self.started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def fail(self, error: BatonError) -> None:
        raise error  # close() sends everything or nothing, so this is before the first byte


class Reply(Response):
    """Generates and sends. Whatever way it ends (done, failed, client gone, server stopping), all choices are
    cancelled that have not ended."""

    background = None

    def __init__(
        self,
        generation: Generation,
        form: Format,
        envelope: Envelope,
        *,
        stream: bool,
        max_backlog: int,
        running: InFlight,
    ) -> None:
        self._generation = generation
        self._form = form
        self._envelope = envelope
        self._sink_kind = EventSink if stream else BodySink
        self._max_backlog = max_backlog
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "aborted"
        try:
            with self._running:
                outcome = await self._attended(self._generate(send), receive)
        except ClientGone as gone:
            outcome = f"client_{gone}"
        except BatonError as error:
            outcome = error.code
            raise
        finally:
            self._generation.cancel()
            self._generation.account(outcome)

    async def _generate(self, send: Send) -> str:
        """Returns the outcome: why the first choice ended, or the code of the error that ended the stream."""
        sink = self._sink_kind(send, self._form, self._envelope, self._generation)
        try:
            await self._generation.run(sink)
            await sink.close()
        except BatonError as error:
            if not sink.started:
                raise
            await sink.fail(error)
            return error.code
        return str(self._generation.choices[0].finish_reason)

    async def _attended(self, work: Coroutine[Any, Any, str], receive: Receive) -> str:
        """Do the work while the client is there. Raises `ClientGone` when it disconnects, when it leaves more tokens
        unread than it may, or when it has not read the end long after the request's deadline."""
        task = asyncio.create_task(work)
        gone = asyncio.create_task(_disconnect(receive))
        until = self._generation.job.received + self._generation.job.timeout_s + _GRACE_S
        try:
            while True:
                await asyncio.wait((task, gone), timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                if task.done():
                    return task.result()
                if gone.done():
                    raise ClientGone("disconnected")
                if self._generation.backlog > self._max_backlog or time.perf_counter() > until:
                    raise ClientGone("not_reading")
        finally:
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
