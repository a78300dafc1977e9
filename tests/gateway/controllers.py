"""A controller that names workers and notes what gateways say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from baton.common.cluster import (
    FromController,
    FromGateway,
    GatewayHello,
    Members,
    TraceAnswer,
    TraceQuestion,
    Traffic,
    WorkerStatus,
)
from baton.common.errors import BatonError
from baton.protos.control import controller_handlers
from baton.protos.rpc import Stream, listen, make_server


class FakeController:
    """`say` goes to the gateway that attends; `leave()` ends its stream with an error."""

    def __init__(self, *workers: WorkerStatus) -> None:
        self.members = Members(1, workers)
        self.hellos: list[GatewayHello] = []
        self.traffic: list[Traffic] = []
        self.answers: list[TraceAnswer] = []
        self._stream: Stream[FromGateway, FromController] | None = None
        self._over = asyncio.Event()

    async def report(self, status: WorkerStatus) -> None:
        raise NotImplementedError  # these workers do not report

    async def attend(self, stream: Stream[FromGateway, FromController]) -> None:
        hello = await stream.read()
        assert isinstance(hello, GatewayHello)
        self.hellos.append(hello)
        await stream.write(self.members)
        self._stream, self._over = stream, asyncio.Event()
        reading = asyncio.create_task(self._listen(stream))
        over = asyncio.create_task(self._over.wait())
        try:
            await asyncio.wait((reading, over), return_when=asyncio.FIRST_COMPLETED)
        finally:
            reading.cancel()
            over.cancel()
        raise BatonError("I am leaving")

    async def _listen(self, stream: Stream[FromGateway, FromController]) -> None:
        while (message := await stream.read()) is not None:
            if isinstance(message, Traffic):
                self.traffic.append(message)
            if isinstance(message, TraceAnswer):
                self.answers.append(message)

    async def say(self, message: FromController) -> None:
        assert self._stream is not None
        await self._stream.write(message)

    async def ask(self, question: TraceQuestion) -> TraceAnswer:
        await self.say(question)
        async with asyncio.timeout(10):
            while not any(answer.question == question.question for answer in self.answers):
                await asyncio.sleep(0.01)
        return next(answer for answer in self.answers if answer.question == question.question)

    def leave(self) -> None:
        self._over.set()


@asynccontextmanager
async def controlled(controller: FakeController, token: str = "", port: int = 0) -> AsyncIterator[str]:
    """The controller on loopback; its address."""
    server = make_server(token, controller_handlers(controller))
    address = listen(server, "127.0.0.1", port)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(0)
