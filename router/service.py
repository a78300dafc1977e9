"""The router as the gateway uses it: the pure core, driven by asyncio, real sessions and a real clock."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from ..common.clock import Clock, RealClock
from ..common.cluster import Members, Trace, Traffic, WorkerState, WorkerStatus
from ..common.config import RouterConfig
from ..common.errors import BatonError
from ..common.messages import StepReport
from ..common.types import Request, WorkerInfo, WorkerRef
from .core import RouterCore
from .links import Caller, Link
from .request import Batch, RequestState
from .stats import Limits, Snapshot
from .traces import Traces
from .traffic import Meter

log = logging.getLogger(__name__)

TICK_S = 0.05


class RequestStream:
    """The consumer's end of one request."""

    def __init__(self, router: Router, state: RequestState) -> None:
        self._router = router
        self._state = state
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> Batch:
        """All tokens that have arrived since the last call; waits until there is one or the request has ended. The
        last batch carries `finish`. Raises the `BatonError` that the request failed with, once all tokens that came
        before it are taken. The request's deadline bounds the wait. One consumer at a time."""
        state = self._state
        while not state.fresh and state.outcome is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return state.take()

    def cancel(self) -> None:
        """Nobody wants the rest: free everything at once. Idempotent; after the end it does nothing."""
        self._router.cancel(self._state)

    @property
    def backlog(self) -> int:
        """Tokens that have arrived and are not taken."""
        return len(self._state.fresh)

    def wake(self) -> None:
        """For the router: there is news."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Router:
    """Serves requests on the workers that `members` names. All methods belong to the event loop's thread."""

    def __init__(self, name: str, config: RouterConfig, cluster_token: str, clock: Clock | None = None) -> None:
        self._clock = clock or RealClock()
        # Tickets of an earlier process of this name must not be taken for ours.
        self._core = RouterCore(config, cluster_token, first_ticket=secrets.randbits(31) << 32 | 1)
        self._caller = Caller(name, secrets.randbits(63), cluster_token, config.heartbeat_s)
        self._links: dict[str, Link] = {}
        self._streams: dict[RequestState, RequestStream] = {}
        self._traces = Traces(name, self._streams.keys())
        self._meter = Meter(self._clock.now())
        self._members: Members | None = None
        self._was_ready = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, members: AsyncGenerator[Members, None]) -> None:
        """Begin to follow the membership. When it ends, the last one holds."""
        self._tasks = [
            asyncio.create_task(self._follow(members), name="membership"),
            asyncio.create_task(self._tick(), name="router tick"),
        ]

    async def close(self) -> None:
        """Fail what is not done, and leave all workers."""
        self._core.close()
        self._flush()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.gather(*(link.close() for link in self._links.values()))
        self._links.clear()

    def submit(self, request: Request) -> RequestStream:
        """Admit a request. Raises `Overloaded`, `NotReady` or `PromptTooLong` at the door."""
        state = self._core.submit(request, self._clock.now())
        stream = self._streams[state] = RequestStream(self, state)
        self._flush()
        return stream

    def cancel(self, state: RequestState) -> None:
        """What `RequestStream.cancel` does."""
        self._core.cancel(state, self._clock.now())
        self._flush()

    # --- how it stands ---

    def ready(self) -> tuple[str, str]:
        """(state, reason): ready, loading, draining or unhealthy. Ready: a usable pair of workers is there."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                return "unhealthy", f"{task.get_name()} failed: {error}"
        if self._core.ready:
            self._was_ready = True
            return "ready", ""
        if self._members is None:
            return "loading", "no word from the controller yet"
        states = {worker.state for worker in self._members.workers}
        reason = "no usable pair of workers: " + (", ".join(map(_in_words, self._members.workers)) or "no workers")
        if states & {"starting", "loading"} or not (self._was_ready or "failed" in states):
            return "loading", reason
        return ("draining" if states <= {"draining", "leaving"} else "unhealthy"), reason

    def limits(self) -> Limits | None:
        """What the fleet can take; None before the first worker."""
        return self._core.limits

    def snapshot(self) -> Snapshot:
        """For metrics and people."""
        snapshot = self._core.snapshot()
        linked = {worker.name: (str(worker.role), worker.state) for worker in snapshot.workers}
        named = {w.name: (w.role, _unlinked(w.state)) for w in self._members.workers} if self._members else {}
        return replace(snapshot, members=Counter((named | linked).values()))

    def oldest_wait_s(self) -> float:
        """Age of the oldest request that has no token yet; 0 where there is none."""
        oldest = self._core.snapshot().oldest
        return 0.0 if oldest is None else self._clock.now() - oldest

    def traffic(self) -> Traffic:
        """What was seen since this was asked last."""
        return self._meter.take(self._core.snapshot(), self._clock.now())

    def trace(self, request_id: str) -> Trace | None:
        """What happened to a request that runs, or to one of the last that ended; None where it is not (any more)
        known. An empty id: the slowest."""
        now = self._clock.now()
        return self._traces.find(request_id, now) if request_id else self._traces.slowest(now)

    # --- what the links tell ---

    def worker_up(self, info: WorkerInfo) -> None:
        self._core.worker_up(info, self._clock.now())
        self._flush()

    def worker_lost(self, name: str, why: BatonError) -> None:
        self._core.worker_lost(name, why, self._clock.now())
        self._flush()

    def on_report(self, name: str, report: StepReport) -> None:
        self._core.on_report(name, report, self._clock.now())
        self._flush()

    # --- running ---

    def _flush(self) -> None:
        """Do what the core wants done."""
        effects = self._core.drain()
        for name in effects.disconnects:
            if link := self._links.get(name):
                link.disconnect()
        for name, message in effects.sends:
            if link := self._links.get(name):
                link.send(message)
        for state in effects.news:
            if state.outcome is not None:
                self._traces.ended(state, self._clock.now())
            # A request that fails in its own submit has no stream yet: `next` finds the outcome without being woken.
            if stream := self._streams.get(state):
                stream.wake()
                if state.outcome is not None:
                    del self._streams[state]

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._core.tick(self._clock.now())
            self._flush()

    async def _follow(self, membership: AsyncGenerator[Members, None]) -> None:
        async with aclosing(membership):
            async for members in membership:
                self._members = members
                await self._relink(members)

    async def _relink(self, members: Members) -> None:
        reachable = {w.name: w for w in members.workers if w.address and w.state in ("ready", "draining", "leaving")}
        known = {w.name for w in members.workers}
        for name, link in list(self._links.items()):
            if name not in known:
                link.forsake()
            elif name not in reachable:
                await link.close()
            if link.over:
                del self._links[name]
        for name, worker in reachable.items():
            ref = WorkerRef(name, worker.address, worker.epoch)
            if name in self._links:
                self._links[name].aim(ref)
            else:
                self._links[name] = Link(ref, self._caller, self)
        by_state = {s: [n for n, worker in reachable.items() if worker.state == s] for s in ("draining", "leaving")}
        self._core.set_draining(by_state["draining"], by_state["leaving"])


def _unlinked(state: WorkerState) -> str:
    """The state of a worker with which no session stands, though it may say that it is ready."""
    return "unreachable" if state in (WorkerState.READY, WorkerState.DRAINING, WorkerState.LEAVING) else state


def _in_words(worker: WorkerStatus) -> str:
    progress = f" {worker.progress:.0%}" if worker.state == "loading" else ""
    return f"{worker.name} {worker.state}{progress}" + (f" ({worker.detail})" if worker.detail else "")
