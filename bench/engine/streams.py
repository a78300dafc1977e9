"""A router in a process of its own, which one worker streams all its tokens to: `python -m baton.bench.engine.streams`.

It reads what to do as one JSON line from standard input: the worker's name, address, epoch and token, how many streams,
how long prompts and answers are, the size of the vocabulary, the temperature. It says an empty line when every stream
has had its first token. The next line that it reads is how many tokens the worker has sent: once so many have come, it
says in one JSON line how many came in how many seconds, and the time between two batches of a stream. It ends with
standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from ...common.cluster import Members, WorkerState, WorkerStatus
from ...common.config import RouterConfig
from ...common.errors import NotReady
from ...common.json_form import to_json
from ...common.types import Request, SamplingParams
from ...router.service import RequestStream, Router
from ..quantiles import Quantiles

LOOKS, LOOK_S = 1000, 0.02


def request(number: int, prompt: int, max_tokens: int, vocab: int, temperature: float) -> Request:
    """A prompt that shares no block with another's, and an answer of `max_tokens` tokens."""
    tokens = tuple(1 + (number * 7919 + i * 104_729) % (vocab - 1) for i in range(prompt))
    params = SamplingParams(max_tokens, temperature, top_p=0.95, seed=number, ignore_eos=True)
    return Request(f"stream-{number}", tokens, prompt, params, deadline_s=600.0)


async def _members(name: str, address: str, epoch: int) -> AsyncGenerator[Members, None]:
    worker = WorkerStatus(name, "colocated", WorkerState.READY, address=address, epoch=epoch)
    yield Members(1, (worker,))


async def _until(true: Callable[[], bool], lacking: str) -> None:
    for _ in range(LOOKS):
        if true():
            return
        await asyncio.sleep(LOOK_S)
    raise NotReady(f"{lacking} for {LOOKS * LOOK_S:.0f} s")


@dataclass(slots=True)
class Seen:
    """What has come, by all streams together. `begun`: how many of them have had their first token."""

    begun: int = 0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)


async def _take(stream: RequestStream, seen: Seen) -> None:
    last = 0.0
    while True:
        batch = await stream.next()
        now = time.perf_counter()
        if last:
            seen.gaps.append(now - last)
        else:
            seen.begun += 1
        seen.tokens += len(batch.tokens)
        last = now
        if batch.finish is not None:
            return


async def main() -> None:
    """Be asked, and say what came."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    setup: dict[str, Any] = json.loads(await lines.readline())
    router = Router("bench", RouterConfig(max_requests=4096), setup["token"])
    await router.start(_members(setup["name"], setup["address"], setup["epoch"]))
    await _until(lambda: router.ready()[0] == "ready", "no worker")
    seen = Seen()
    begin = time.perf_counter()
    what = [setup[name] for name in ("prompt", "output", "vocab", "temperature")]
    takers = [asyncio.create_task(_take(router.submit(request(i, *what)), seen)) for i in range(setup["streams"])]
    await _until(lambda: seen.begun == len(takers), "streams without a token")
    _say(b"")
    sent = int(await lines.readline() or 0)  # 0: nobody wants to know
    await _until(lambda: seen.tokens >= sent, "tokens missing")
    for taker in takers:
        taker.cancel()
    await asyncio.gather(*takers, return_exceptions=True)
    said = {"tokens": seen.tokens, "seconds": time.perf_counter() - begin, "gap": asdict(Quantiles.of(seen.gaps))}
    _say(to_json(said))
    await router.close()


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
