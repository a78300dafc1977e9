"""A worker that computes nothing: it answers every request with words, one token a request and step, at a set pace.

With it, gateway and router are measured by themselves. It speaks the real protocol (`Worker.Session`), in a process of
its own: `python -m baton.bench.standin`. Commands come as JSON lines on standard input and end with it; answers leave
as JSON lines on standard output.

    {"vocab_size": 49152, "words": [ids], "token": secret}   first of all → {"address": …, "epoch": …, "pid": …}
    {"step_s": 0.004}    time between steps from now on; 0: as fast as the router reads → {"step_s": 0.004}
    {"stamps": true}     when each token left, and forget → {"stamps": {key: [seconds, monotonic]}}

The key of a request is its first two prompt tokens: "17-4".
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import NotReady
from ..common.json_form import to_json
from ..common.messages import (
    Cancel,
    CheckReport,
    Finished,
    Hello,
    Load,
    Ping,
    Started,
    StepReport,
    Submit,
    Tokens,
    Turn,
)
from ..common.types import FinishReason, Role, WorkerInfo, WorkerRef
from ..protos.convert import FromRouter, FromSource, FromTarget, FromWorker
from ..protos.rpc import Stream, listen, make_server, worker_handlers

NAME = "standin"
BLOCKS = 1 << 16
HEARTBEAT_S = 0.5
IDLE_S = 0.002


@dataclass(slots=True)
class _Answer:
    """One request under way: the position of its next token, and how many are left."""

    ticket: int
    position: int
    left: int
    stamps: list[float]


@dataclass(slots=True)
class Standin:
    """Serves any number of routers. Implements `protos.rpc.WorkerService`."""

    words: Sequence[int]
    vocab_size: int
    ref: WorkerRef
    step_s: float = 0.0
    stamps: dict[str, list[float]] = field(default_factory=dict)

    async def session(self, stream: Stream[FromRouter, FromWorker]) -> None:
        hello = await stream.read()
        assert isinstance(hello, Hello), "the first message of a session is Hello"
        info = WorkerInfo(
            ref=self.ref, role=Role.COLOCATED, fingerprint=NAME, model=NAME, block_size=16, total_blocks=BLOCKS,
            max_model_len=1 << 16, kv_bytes_per_token=1, vocab_size=self.vocab_size, pid=os.getpid(),
        )  # fmt: skip
        await stream.write(info)
        answers: dict[int, _Answer] = {}
        started: list[Started] = []
        reader = asyncio.create_task(self._read(stream, answers, started))
        try:
            await self._write(stream, answers, started, reader)
        finally:
            reader.cancel()

    async def control(self, stream: Stream[FromSource, FromTarget]) -> None:
        """Nobody hands over to a stand-in: the stream ends at once."""

    async def check(self) -> CheckReport:
        return CheckReport(ok=True, total_blocks=BLOCKS, free_blocks=BLOCKS)

    async def turn(self, order: Turn) -> None:
        raise NotReady("a stand-in keeps its role")

    async def _read(
        self, stream: Stream[FromRouter, FromWorker], answers: dict[int, _Answer], started: list[Started]
    ) -> None:
        while (message := await stream.read()) is not None:
            match message:
                case Submit(ticket=ticket, request=request):
                    stamps = self.stamps.setdefault(f"{request.tokens[0]}-{request.tokens[1]}", [])
                    answers[ticket] = _Answer(ticket, len(request.tokens), request.params.max_tokens, stamps)
                    started.append(Started(ticket, 0))
                case Cancel(ticket):
                    answers.pop(ticket, None)
                case Ping():
                    pass

    async def _write(
        self, stream: Stream[FromRouter, FromWorker], answers: dict[int, _Answer], started: list[Started],
        reader: asyncio.Task[None],
    ) -> None:  # fmt: skip
        """One report a step, until the router ends the stream."""
        due = spoken = time.monotonic()
        while not reader.done():
            now = time.monotonic()
            if not answers:
                if now - spoken > HEARTBEAT_S:
                    await stream.write(StepReport(load=self._load(0)))
                    spoken = now
                await asyncio.sleep(IDLE_S)
                due = time.monotonic()
                continue
            report = self._step(answers, started, now)
            await stream.write(report)
            spoken = now
            due = max(due + self.step_s, now - self.step_s)  # a step that came late is caught up, not a long pause
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    def _step(self, answers: dict[int, _Answer], started: list[Started], now: float) -> StepReport:
        tokens = Tokens()
        finished: list[Finished] = []
        for answer in answers.values():
            word = self.words[answer.position % len(self.words)]
            tokens.add(answer.ticket, answer.position, word)
            answer.stamps.append(now)
            answer.position += 1
            answer.left -= 1
            if answer.left == 0:
                finished.append(Finished(answer.ticket, FinishReason.LENGTH))
        for end in finished:
            del answers[end.ticket]
        begun = tuple(started)
        started.clear()
        return StepReport(tokens, begun, (), tuple(finished), (), (), self._load(len(answers)))

    def _load(self, running: int) -> Load:
        return Load(running=running, total_blocks=BLOCKS, free_blocks=BLOCKS)


async def main() -> None:
    """Serve until standard input ends."""
    lines = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    setup = json.loads(await lines.readline())
    standin = Standin(setup["words"], setup["vocab_size"], WorkerRef(NAME, "", 0))
    server = make_server(setup["token"], worker_handlers(standin))
    address = listen(server, "127.0.0.1", 0)
    standin.ref = WorkerRef(NAME, address, secrets.randbits(63))
    await server.start()
    _say({"address": address, "epoch": standin.ref.epoch, "pid": os.getpid()})
    while line := await lines.readline():
        match json.loads(line):
            case {"step_s": step_s}:
                standin.step_s = step_s
                _say({"step_s": step_s})
            case {"stamps": _}:
                _say({"stamps": {key: list(times) for key, times in standin.stamps.items()}})
                standin.stamps.clear()
    await server.stop(grace=None)


def _say(message: dict[str, Any]) -> None:
    sys.stdout.buffer.write(to_json(message) + b"\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
