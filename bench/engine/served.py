"""The loop while it serves: a whole worker in this process, and a router in another that all tokens are streamed to.

The engine loop runs on the thread that calls, as the engine must (it is that thread's CUDA stream that steps go to);
gRPC runs on a thread of its own beside it, as in a worker's process.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ...common.clock import RealClock
from ...common.config import EngineConfig, WorkerConfig
from ...common.errors import NotReady
from ...common.events import new_event_loop
from ...common.types import Role
from ...engine.runner import Engine
from ...worker.assembly import Worker
from ...worker.compute import Compute, store_of
from .host import TIMEOUT_S, TOKEN, asking

WAIT_S = 0.01
UNTIL_TOLD = 2
"""Steps after which all tokens of those before are told: so many are under way at most."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Streams:
    """`count` requests that decode all the time, each with a prompt of `prompt` tokens and so long an answer."""

    count: int
    prompt: int
    output: int


@contextmanager
def served_loop(engine: Engine, config: EngineConfig, streams: Streams) -> Iterator[ServedLoop]:
    """With all streams running, and nothing left of it afterwards. The router has had a token of each: what is measured
    from here on is a way that is filled. Raises `NotReady` where they do not run within a minute."""
    loop = ServedLoop()
    try:
        loop.begin(engine, config, streams)
        yield loop
    finally:
        loop.close()


class ServedLoop:
    """A worker over an engine, and who asks it."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._events = new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, name="events", daemon=True)
        self._thread.start()

    def begin(self, engine: Engine, config: EngineConfig, streams: Streams) -> None:
        """See `served_loop`."""
        compute = Compute(engine, store_of(engine.pool, checked=False), None, None, None)
        own = replace(config, max_running=streams.count, overlap="on")
        worker_config = WorkerConfig(name="served", role=Role.COLOCATED, engine=own, cluster_token=TOKEN)
        self.worker = self._do(self._start(worker_config, compute))
        asked = asking(self.worker, streams.count, streams.prompt, streams.output, engine.vocab_size)
        self._asking = self._do(self._stack.enter_async_context(asked))
        self._until(lambda load: load.running == streams.count and not load.waiting and not load.queued_prefill_tokens)
        self.step(UNTIL_TOLD)
        self._do(self._asking.begun())

    def step(self, count: int) -> None:
        """Go round until so many steps were computed."""
        while count:
            if self.worker.loop.step():
                count -= 1
            else:
                self.worker.inbox.wait(WAIT_S)

    def said(self) -> dict[str, Any]:
        """See `host.Asking.said`."""
        return self._do(self._asking.said())

    def close(self) -> None:
        """End the router, and the worker after it."""
        self._do(self._stack.aclose())
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join(TIMEOUT_S)
        self._events.close()

    async def _start(self, config: WorkerConfig, compute: Compute) -> Worker:
        worker = Worker(config, compute, RealClock())
        await worker.start()
        self._stack.push_async_callback(worker.stop)
        return worker

    def _until(self, true: Callable[[Any], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not true(self.worker.loop.load()):
            if time.monotonic() > deadline:
                raise NotReady(f"not all streams run after {TIMEOUT_S:.0f} s")
            if not self.worker.loop.step():
                self.worker.inbox.wait(WAIT_S)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        """On the thread of the events."""
        return asyncio.run_coroutine_threadsafe(work, self._events).result(TIMEOUT_S)
