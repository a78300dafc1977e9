"""The gateway and its router by themselves, in front of a stand-in worker that emits words at once.

Three measurements: the most streamed tokens a second, one event each, and what they cost in processor time; small
requests a second; and, at half the highest rate, how long a token takes from leaving the worker to reaching the
client. Gateway, stand-in and client are three processes on one machine and share its monotonic clock.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from ..common.clock import RealClock
from ..common.cluster import WorkerState, WorkerStatus
from ..common.config import GatewayConfig
from ..common.errors import BatonError, NotReady
from ..deploy.control.members import Gateways, GatewayStream
from ..deploy.launch.launcher import LocalLauncher, Spec
from ..protos.control import controller_handlers
from ..protos.rpc import listen, make_server
from .quantiles import Quantiles
from .standin import NAME
from .systems import free_port, wait_ready
from .wire import HttpClient
from .workload import Words

TOKEN = "bench"
WARM_UP_STREAMS = 8
REQUESTS_A_STREAM = 32
SMALL_REQUESTS_FROM = 10_000_000
"""Numbers of small requests begin here, those of streams at 0: no two share a prompt."""
PACE = 10_000.0
"""Tokens/s at which latency is measured, beside half the highest rate: half of what a core has to reach at least."""
START_TIMEOUT_S = 60.0

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens (or requests) a second, and for each second of the gateway's processor time, all its threads together."""

    per_s: float
    per_core: float


@dataclass(frozen=True, slots=True)
class Paced:
    """The stand-in at a fixed pace. `added`: seconds from a token's leaving it to its event's arrival."""

    tokens: Rate
    added: Quantiles


@dataclass(frozen=True, slots=True)
class GatewayResult:
    """The best of all rounds for the rates, all rounds together for the latencies."""

    streams: int
    tokens: Rate
    requests: Rate
    paced: list[Paced]


class StandinProcess:
    """The stand-in worker's process, seen from the bench."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child

    @classmethod
    async def start(cls, words: Words, vocab_size: int) -> tuple[StandinProcess, WorkerStatus]:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "baton.bench.standin"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 28,
        )
        process = cls(child)
        facts = await process.tell({"vocab_size": vocab_size, "words": list(words.ids), "token": TOKEN})
        status = WorkerStatus(
            NAME, "colocated", WorkerState.READY, address=facts["address"], epoch=facts["epoch"], pid=facts["pid"]
        )
        return process, status

    async def tell(self, command: dict[str, Any]) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises `NotReady` where the process ends instead."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(msgspec.json.encode(command) + b"\n")
        async with asyncio.timeout(START_TIMEOUT_S):
            line = await self._child.stdout.readline()
        if not line:
            raise NotReady("the stand-in worker has ended")
        return dict(msgspec.json.decode(line))

    async def stop(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        await asyncio.wait_for(self._child.wait(), 10.0)


@dataclass(frozen=True, slots=True)
class Rig:
    """A running gateway with its stand-in, and the client that measures them."""

    http: HttpClient
    standin: StandinProcess
    gateway_pid: int

    async def streams(self, count: int, tokens: int, first: int) -> list[tuple[str, list[float]]]:
        """Run `count` streams of `tokens` tokens at once; (key, arrival of each token) of each. Raises `BatonError`
        where a stream is not whole."""
        return await asyncio.gather(*(self._stream(first + i, tokens) for i in range(count)))

    async def _stream(self, number: int, tokens: int) -> tuple[str, list[float]]:
        key = (1000 + number // 10000, 1000 + number % 10000)
        body = msgspec.json.encode(
            {"model": NAME, "prompt": [*key, *range(2000, 2014)], "max_tokens": tokens, "stream": True,
             "temperature": 0, "ignore_eos": True}
        )  # fmt: skip
        arrivals: list[float] = []
        last = b""

        def on_event(now: float, data: bytes) -> None:
            nonlocal last
            arrivals.append(now)
            last = data

        response = await self.http.post("/v1/completions", body, on_event, timeout_s=120.0)
        if response.status != 200 or last != b"[DONE]" or not tokens < len(arrivals) <= tokens + 2:
            detail = response.body[:200].decode(errors="replace")
            raise BatonError(f"stream {number}: status {response.status}, {len(arrivals)} events. {detail}")
        return f"{key[0]}-{key[1]}", arrivals[:tokens]

    async def request(self, number: int) -> None:
        """One small request, not streamed: four tokens in, one out."""
        prompt = [1000 + number // 10000, 1000 + number % 10000, 2000, 2001]
        body = msgspec.json.encode({"model": NAME, "prompt": prompt, "max_tokens": 1, "temperature": 0})
        response = await self.http.post("/v1/completions", body, timeout_s=60.0)
        if response.status != 200:
            raise BatonError(f"request {number}: status {response.status} {response.body[:200].decode()}")


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used so far, user and system, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Controller:
    """Knows one worker, for ever."""

    def __init__(self, worker: WorkerStatus) -> None:
        self._gateways = Gateways(RealClock(), lambda: None)
        self._gateways.publish((worker,))

    async def report(self, status: WorkerStatus) -> None:
        """The stand-in reports to nobody."""

    async def attend(self, stream: GatewayStream) -> None:
        await self._gateways.attend(stream)


@asynccontextmanager
async def rig(model: Path) -> AsyncIterator[Rig]:
    """Start controller table, stand-in and the real gateway process on `model`'s tokenizer; end them afterwards."""
    words = Words.from_tokenizer(str(model))
    vocab_size = int(msgspec.json.decode((model / "config.json").read_bytes())["vocab_size"])
    standin, status = await StandinProcess.start(words, vocab_size)
    port = free_port()
    config = GatewayConfig(
        model=str(model), model_name=NAME, port=free_port(), controller=f"127.0.0.1:{port}", cluster_token=TOKEN,
        max_model_len=1 << 16,
    )  # fmt: skip
    gateway = await LocalLauncher(_print).start(Spec("gateway", config))
    # After its children are started: gRPC's threads do not like a fork.
    server = make_server(TOKEN, controller_handlers(_Controller(status)))
    listen(server, "127.0.0.1", port)
    await server.start()
    http = HttpClient(f"http://127.0.0.1:{config.port}")
    try:
        await wait_ready(http, START_TIMEOUT_S)
        yield Rig(http, standin, gateway.pid)
    finally:
        http.close()
        gateway.terminate()
        try:
            await asyncio.wait_for(gateway.wait(), 10.0)
        finally:
            gateway.kill()
            await standin.stop()
            await server.stop(grace=None)


def _print(name: str, line: str) -> None:
    """What the gateway logs, but for its line a request."""
    if " info " not in line:
        print(line, file=sys.stderr)


async def _rate(pid: int, count: int, work: Awaitable[Any]) -> tuple[Any, Rate]:
    """Result of some work that makes the gateway do `count` things, and how fast it did."""
    cpu, begin = cpu_seconds(pid), time.monotonic()
    result = await work
    wall = time.monotonic() - begin
    return result, Rate(count / wall, count / max(cpu_seconds(pid) - cpu, 1e-2))


async def measure(model: Path, streams: int, tokens: int, rounds: int, note: Note) -> GatewayResult:
    """The whole benchmark."""
    async with rig(model) as bench:
        numbers = itertools.count(step=streams)
        await bench.streams(min(streams, WARM_UP_STREAMS), tokens, first=next(numbers))
        rates = []
        for turn in range(rounds):
            note(f"streams at full speed, {turn + 1} of {rounds}")
            work = bench.streams(streams, tokens, next(numbers))
            rates.append((await _rate(bench.gateway_pid, streams * tokens, work))[1])
        best = max(rates, key=lambda rate: rate.per_s)

        note("small requests")
        many = REQUESTS_A_STREAM * streams
        _, requests = await _rate(bench.gateway_pid, many, _many_requests(bench, many, streams))

        paced = []
        for pace in (PACE, best.per_s / 2):
            note(f"streams at {pace:.0f} tokens/s")
            paced.append(await _paced(bench, streams, tokens, [next(numbers) for _ in range(rounds)], pace))
    return GatewayResult(streams, best, requests, paced)


async def _paced(bench: Rig, streams: int, tokens: int, firsts: Sequence[int], pace: float) -> Paced:
    """A round for each of `firsts`, at `pace` tokens/s over all streams."""
    await bench.standin.tell({"step_s": streams / pace})
    await bench.standin.tell({"stamps": True})
    delays: list[float] = []
    rates = []
    for first in firsts:
        got, rate = await _rate(bench.gateway_pid, streams * tokens, bench.streams(streams, tokens, first))
        rates.append(rate)
        left = (await bench.standin.tell({"stamps": True}))["stamps"]
        delays += [there - here for key, times in got for here, there in zip(left[key], times, strict=True)]
    return Paced(Rate(fmean(r.per_s for r in rates), fmean(r.per_core for r in rates)), Quantiles.of(delays))


async def _many_requests(bench: Rig, count: int, width: int) -> None:
    numbers = iter(range(SMALL_REQUESTS_FROM, SMALL_REQUESTS_FROM + count))

    async def lane() -> None:
        for number in numbers:
            await bench.request(number)

    await asyncio.gather(*(lane() for _ in range(width)))
