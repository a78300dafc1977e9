"""Real workers as processes, and in place of a router somebody who tells them exactly what to do and takes times."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count

import numpy as np

from ...common.cluster import FromController, FromGateway, WorkerStatus
from ...common.config import WorkerConfig
from ...common.errors import BatonError, NotReady
from ...common.messages import Load, RouterMessage, StepReport
from ...common.types import Request, SamplingParams, WorkerInfo, WorkerRef
from ...deploy.launch.launcher import LocalLauncher, LocalProcess, Spec
from ...protos import rpc
from ...protos.control import controller_handlers
from ...router.links import Caller, Link
from .end import HOST, TOKEN

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
VOCAB = 40_000
"""Prompts are made of tokens below this."""


class Fleet:
    """Processes and lines to them.

    arrivals   when each token of a ticket came, by `time.monotonic`
    loads      what each worker said last of itself
    """

    def __init__(self) -> None:
        self.arrivals: defaultdict[int, list[float]] = defaultdict(list)
        self.finished: set[int] = set()
        self.loads: dict[str, Load] = {}
        self.infos: dict[str, WorkerInfo] = {}
        self._refs: dict[str, WorkerRef] = {}
        self._links: dict[str, Link] = {}
        self._processes: list[LocalProcess] = []
        self._caller = Caller("bench", 1, TOKEN, 0.5)
        self._tickets = count(1)
        self._news = asyncio.Event()
        self._failure = ""
        self._server = rpc.make_server(TOKEN, controller_handlers(self))
        self._address = rpc.listen(self._server, HOST, 0)

    async def start(self, config: WorkerConfig, module: str = "baton.deploy.process", *arguments: str) -> WorkerRef:
        """Start a worker and wait until it is ready. Raises `NotReady` where it does not become so."""
        if not self._processes:
            await self._server.start()
        config = replace(config, controller=self._address, cluster_token=TOKEN)
        launcher = LocalLauncher(lambda name, line: None, (sys.executable, "-P", "-m", module, *arguments))
        process = await launcher.start(Spec(config.name, config, max(1, config.engine.threads)))
        self._processes.append(process)
        try:
            await self.until(lambda: config.name in self._refs, START_TIMEOUT_S)
            ref = self._refs[config.name]
            self._links[config.name] = Link(ref, self._caller, self)
            await self.until(lambda: config.name in self.infos, START_TIMEOUT_S)
        except BatonError as error:
            raise NotReady(f"{config.name}: {error.message}\n" + "\n".join(process.last_lines)) from error
        return ref

    def send(self, name: str, message: RouterMessage) -> None:
        self._links[name].send(message)

    def ticket(self) -> int:
        return next(self._tickets)

    async def until(self, condition: Callable[[], bool], within_s: float) -> None:
        """Wait for what a report brings. Raises `BatonError` where a request fails or it does not come."""
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    self._news.clear()
                    await self._news.wait()
                    if self._failure:
                        raise BatonError(self._failure)
        except TimeoutError as error:
            raise NotReady(f"nothing came of it in {within_s:.0f} s") from error

    # --- router.links.Listener ---

    def worker_up(self, info: WorkerInfo) -> None:
        self.infos[info.ref.name] = info
        self._news.set()

    def worker_lost(self, name: str, why: BatonError) -> None:
        self._fail(f"{name} is lost: {why}")

    def on_report(self, name: str, report: StepReport) -> None:
        now = time.monotonic()
        for token in report.tokens:
            self.arrivals[token.ticket].append(now)
        self.finished.update(done.ticket for done in report.finished)
        if report.load is not None:
            self.loads[name] = report.load
        for failed in report.failed:
            self._fail(f"a request failed at {name}: {failed.message} ({failed.code})")
        self._news.set()

    # --- protos.control.ControllerService ---

    async def report(self, status: WorkerStatus) -> None:
        if status.state == "ready":
            self._refs[status.name] = WorkerRef(status.name, status.address, status.epoch)
            self._news.set()

    async def attend(self, stream: rpc.Stream[FromGateway, FromController]) -> None:
        raise NotReady("no gateway belongs to this fleet")

    def _fail(self, why: str) -> None:
        self._failure = self._failure or why
        self._news.set()

    async def close(self) -> None:
        await asyncio.gather(*(link.close() for link in self._links.values()))
        for process in self._processes:
            process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        await self._server.stop(grace=0)


@asynccontextmanager
async def fleet() -> AsyncIterator[Fleet]:
    """Ends all that was started in it."""
    workers = Fleet()
    try:
        yield workers
    finally:
        await workers.close()


def request(tokens: int, max_tokens: int, rng: np.random.Generator) -> Request:
    """A prompt that shares nothing with any other, and an answer of exactly `max_tokens`."""
    prompt = tuple(int(token) for token in rng.integers(100, VOCAB, tokens))
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request("bench", prompt, len(prompt), params)
