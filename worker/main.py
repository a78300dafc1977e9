"""A worker's process: load the model, tell the controller, serve until told to stop.

Torch works on one thread, which builds the engine and then runs the loop; the main thread runs the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from ..common.clock import RealClock
from ..common.cluster import WorkerState, WorkerStatus
from ..common.config import WorkerConfig
from ..common.errors import BatonError, DeadlineExceeded
from ..protos.control import ControllerClient
from ..protos.rpc import Peer
from .assembly import Worker, new_epoch
from .compute import Compute, build
from .ranks import Ranks

log = logging.getLogger(__name__)

REPORT_EVERY_S = 1.0
REPORT_TIMEOUT_S = 2.0
STOP_TIMEOUT_S = 5.0
DRAIN_LOOK_S = 0.05
LINGER_S = 1.0
"""How long a worker that drains must have held nothing: the news that it drains takes its way to the routers."""

T = TypeVar("T")


class EngineThread(threading.Thread):
    """Builds the engine, then waits for the worker that is made around it and runs its loop."""

    def __init__(self, config: WorkerConfig, progress: Callable[[float], None], ranks: Ranks | None) -> None:
        super().__init__(name="engine", daemon=True)
        self._config = config
        self._progress = progress
        self._followers = None if ranks is None else ranks.followers
        self._stop_loop = threading.Event()
        self.engine: Future[Compute] = Future()
        self.worker: Future[Worker] = Future()
        self.ended: Future[None] = Future()

    def run(self) -> None:
        try:
            engine = build(self._config, self._progress, self._followers)
            gc.freeze()  # torch's objects live for ever: walking them all would stop the loop for a third of a second
            self.engine.set_result(engine)
        except Exception as error:  # a thread's edge: the main thread raises it
            self.engine.set_exception(error)
            return
        try:
            self.worker.result().loop.run(self._stop_loop)
            self.ended.set_result(None)
        except Exception as error:  # a thread's edge: the main thread raises it
            self.ended.set_exception(error)

    def stop(self) -> None:
        self._stop_loop.set()


class Reporter:
    """Tells the controller how this worker is: at each change, and every second."""

    def __init__(self, config: WorkerConfig) -> None:
        self._peer = Peer(config.controller, config.cluster_token) if config.controller else None
        self._status = WorkerStatus(config.name, config.role.value, WorkerState.STARTING, pid=os.getpid())
        self._changed = asyncio.Event()
        self.look: Callable[[], Mapping[str, object]] = dict
        """What is to be told anew each time, from the moment on at which there is a worker to look at."""
        self._told = False
        """The controller's silence has been logged."""

    def set(self, **changes: object) -> None:
        self._status = replace(self._status, **changes)  # type: ignore[arg-type]
        self._changed.set()

    async def run(self) -> None:
        """Report for ever; a controller that is away is no reason to stop working."""
        while self._peer is not None:
            self._changed.clear()
            self._status = replace(self._status, **self.look())  # type: ignore[arg-type]
            try:
                await ControllerClient(self._peer).report(self._status, REPORT_TIMEOUT_S)
            except BatonError as error:
                log.log(logging.DEBUG if self._told else logging.WARNING, "the controller does not hear: %s", error)
                self._told = True
            else:
                self._told = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_EVERY_S):
                    await self._changed.wait()

    async def close(self) -> None:
        if self._peer is not None:
            await self._peer.close()


async def run(config: WorkerConfig) -> None:
    """Be a worker until SIGTERM or SIGINT, of which the first is a request to drain and the second an order. Raises
    `BatonError` where the engine cannot be built or breaks."""
    events = asyncio.get_running_loop()
    stop, at_once = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        events.add_signal_handler(number, lambda: (at_once if stop.is_set() else stop).set())
    reporter = Reporter(config)
    reporting = events.create_task(reporter.run())
    reporter.set(state=WorkerState.LOADING)
    epoch = new_epoch()
    ranks = Ranks(config, epoch) if config.engine.tp > 1 else None
    thread = EngineThread(config, lambda share: _post(events, lambda: reporter.set(progress=share)), ranks)
    thread.start()
    try:
        engine = await _until(asyncio.wrap_future(thread.engine), stop)
        if engine is None:
            return
        worker = Worker(config, engine, RealClock(), epoch)
        await worker.start()
        thread.worker.set_result(worker)
        reporter.look = lambda: {"role": worker.role.value, "load": worker.load()}
        reporter.set(
            state=WorkerState.READY, address=worker.ref.address, epoch=worker.ref.epoch, progress=1.0,
            device=engine.device,
        )  # fmt: skip
        log.info("ready at %s, epoch %x, fingerprint %s", worker.ref.address, worker.ref.epoch, engine.fingerprint)
        if ranks is not None:  # while the engine was built, its thread noticed a loss by itself
            ranks.followers.lost.add_done_callback(lambda _: _post(events, stop.set))
        try:
            await _until(asyncio.wrap_future(thread.ended), stop)
            if ranks is not None:
                ranks.followers.check()
            if not thread.ended.done():
                reporter.set(state=WorkerState.LEAVING)
                draining = events.create_task(_drained(worker, thread.ended.done, config.drain_s))
                await _until(draining, at_once)
                draining.cancel()
            if thread.ended.done():
                thread.ended.result()
        finally:
            thread.stop()
            await asyncio.to_thread(thread.join, STOP_TIMEOUT_S)
            await worker.stop()
    finally:
        if ranks is not None:
            await asyncio.to_thread(ranks.close)
        reporting.cancel()
        await reporter.close()


async def _drained(worker: Worker, broken: Callable[[], bool], within_s: float) -> None:
    """Until routers have known for a while that nothing new may come, and nothing is left; or the time is up, or
    nothing can be done any more."""
    log.info("draining: what runs here moves or ends, for %.0f s at most", within_s)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            quiet = 0.0
            while quiet < LINGER_S and worker.asked and not broken():
                await asyncio.sleep(DRAIN_LOOK_S)
                try:
                    report = await worker.check()
                except DeadlineExceeded:  # a step takes long: that is no reason to cut what it works for
                    quiet = 0.0
                else:
                    quiet = quiet + DRAIN_LOOK_S if report.sequences == report.handovers == 0 else 0.0


def _post(events: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """From any thread, also when the loop has ended."""
    if not events.is_closed():
        events.call_soon_threadsafe(call)


async def _until(work: asyncio.Future[T], stop: asyncio.Event) -> T | None:
    """What `work` comes to, or None if `stop` is set first. Raises what `work` raises."""
    stopping = asyncio.ensure_future(stop.wait())
    waiting: set[asyncio.Future[Any]] = {work, stopping}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        stopping.cancel()
