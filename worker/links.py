"""A worker's lines to others, on the process's event loop: routers, sources and targets of handovers.

Everything that arrives is posted to the engine loop's inbox; a line that breaks or falls silent is posted as gone.
What the loop wants said goes out through bounded queues: a reader that stalls loses its line, never the worker. Who
says more than the loop reads has to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from ..common.errors import BatonError, DeadlineExceeded, InvalidRequest, Overloaded, StaleEpoch, WorkerLost
from ..common.messages import (
    Abort,
    Committed,
    Endpoint,
    Hello,
    Load,
    Ping,
    Refused,
    Renew,
    Reserve,
    SourceMessage,
    StepReport,
    TargetMessage,
)
from ..common.types import Role, WorkerInfo, WorkerRef
from ..engine.mailbox import (
    FromRouter,
    FromSource,
    FromTarget,
    Inbox,
    InboxItem,
    RouterGone,
    RouterJoined,
    SourceGone,
    TargetGone,
)
from ..kvtransfer.layout import routes
from ..protos.convert import FromRouter as RouterSays
from ..protos.convert import FromSource as SourceSays
from ..protos.convert import FromTarget as TargetSays
from ..protos.convert import FromWorker
from ..protos.rpc import Peer, Stream

log = logging.getLogger(__name__)

MAX_QUEUED = 4096
"""Messages that wait for a reader before its line is cut."""

STALL_S = 60.0
"""How long a peer waits for the loop to read what it has said, before its line is cut."""

LOOK_S = 0.01

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)


class _Writer(Protocol[T_contra]):
    async def write(self, message: T_contra) -> None: ...


class Line(Generic[T]):
    """Messages that wait to be written to one stream, in order."""

    def __init__(self) -> None:
        self._queue: deque[T] = deque()
        self._wake = asyncio.Event()
        self._cut = ""

    def put(self, message: T) -> None:
        """Nothing more, once the line is cut: what follows a gap means nothing."""
        if len(self._queue) >= MAX_QUEUED:
            self.cut(f"{MAX_QUEUED} messages wait for the other end")
        if not self._cut:
            self._queue.append(message)
            self._wake.set()

    def cut(self, why: str) -> None:
        """End the stream, once what waits has been written."""
        self._cut = self._cut or why
        self._wake.set()

    async def pump(self, stream: _Writer[T], every: float, beat: Callable[[], T | None]) -> None:
        """Write what is put, and each `every` seconds what `beat` says, if anything. A write has ten such periods.
        Raises `WorkerLost` where the reader does not keep up or is gone."""
        clock = asyncio.get_running_loop()
        next_beat = clock.time() + every
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(next_beat):
                    await self._wake.wait()
            self._wake.clear()
            batch = [self._queue.popleft() for _ in range(len(self._queue))]
            if clock.time() >= next_beat:
                next_beat = clock.time() + every
                if (message := beat()) is not None:
                    batch.append(message)
            for message in batch:
                try:
                    async with asyncio.timeout(10 * every):
                        await stream.write(message)
                except TimeoutError as error:
                    raise WorkerLost("the other end does not read") from error
            if self._cut and not self._queue:
                raise WorkerLost(self._cut)


async def _either(*work: Awaitable[None]) -> None:
    """Run all until the first ends; then cancel the others. Raises what the first raised."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _post(inbox: Inbox, item: InboxItem) -> None:
    """Post what a peer said. Where it says more than the loop reads, wait, and so read no more of it: flow control
    makes the peer wait as well. Raises `Overloaded` where the loop does not read for `STALL_S`."""
    deadline = time.monotonic() + STALL_S
    while True:
        try:
            return inbox.post(item)
        except Overloaded:
            if time.monotonic() >= deadline:
                raise
            await asyncio.sleep(LOOK_S)


class _Reader(Protocol[T_co]):
    async def read(self) -> T_co | None: ...


async def _first(stream: _Reader[T], within_s: float) -> T | None:
    """The first message of a stream. Raises `DeadlineExceeded` where it does not come in time."""
    try:
        async with asyncio.timeout(within_s):
            return await stream.read()
    except TimeoutError as error:
        raise DeadlineExceeded("a stream was opened and nothing was said") from error


class RouterLines:
    """The streams to routers: requests in, one report a step out, a sign of life in between."""

    def __init__(self, info: WorkerInfo, inbox: Inbox, load: Callable[[], Load], heartbeat_s: float, lease_s: float):
        self._info = info
        self._inbox = inbox
        self._load = load
        self._heartbeat_s = heartbeat_s
        self._lease_s = lease_s
        self._lines: dict[str, Line[FromWorker]] = {}

    def tell(self, router: str, report: StepReport) -> None:
        if line := self._lines.get(router):
            line.put(report)

    def renew(self, role: Role) -> None:
        """The worker has another role: the last that routers hear on the lines that there are. They come anew at once,
        and know until then that nobody is to blame."""
        self._info = replace(self._info, role=role)
        for line in self._lines.values():
            line.put(self._info)
            line.cut(f"it is a {role} worker now")

    async def serve(self, stream: Stream[RouterSays, FromWorker]) -> None:
        """One router's stream, for as long as it lives."""
        hello = await _first(stream, self._lease_s)
        if not isinstance(hello, Hello):
            raise InvalidRequest("the first message of a session is a hello")
        if hello.worker_epoch not in (0, self._info.ref.epoch):
            raise StaleEpoch(f"{self._info.ref.name} has been restarted")
        router = f"{hello.router}@{hello.router_epoch:x}"
        line: Line[FromWorker] = Line()
        line.put(self._info)  # by the line, which is cut where this is not true any more
        if router in self._lines:
            self._inbox.post(RouterGone(router))
        self._lines[router] = line
        self._inbox.post(RouterJoined(router))
        log.info("router %s joined", router)
        try:
            beat = line.pump(stream, self._heartbeat_s, lambda: StepReport(load=self._load()))
            await _either(self._listen(stream, router), beat)
        finally:
            if self._lines.get(router) is line:
                del self._lines[router]
                self._inbox.post(RouterGone(router))
                log.info("router %s is gone", router)

    async def _listen(self, stream: Stream[RouterSays, FromWorker], router: str) -> None:
        while True:
            try:
                async with asyncio.timeout(self._lease_s):
                    message = await stream.read()
            except TimeoutError as error:
                raise WorkerLost(f"router {router} fell silent") from error
            if message is None:
                return
            if isinstance(message, Hello):
                raise InvalidRequest("only the first message of a session is a hello")
            if not isinstance(message, Ping):
                await _post(self._inbox, FromRouter(router, message))


class SourceLines:
    """The control streams that sources opened to us."""

    def __init__(self, own: Endpoint, inbox: Inbox, heartbeat_s: float, lease_s: float) -> None:
        self._own = own
        self._inbox = inbox
        self._heartbeat_s = heartbeat_s
        self._lease_s = lease_s
        self._lines: dict[WorkerRef, Line[TargetSays]] = {}

    def send(self, source: WorkerRef, message: TargetMessage) -> None:
        if line := self._lines.get(source):
            line.put(message)

    async def serve(self, stream: Stream[SourceSays, TargetSays]) -> None:
        """One source's stream, for as long as it lives."""
        hello = await _first(stream, self._lease_s)
        if not isinstance(hello, Endpoint):
            raise InvalidRequest("the first message of a control stream is a hello")
        await stream.write(self._own)
        source = hello.ref
        if source in self._lines:  # the old stream broke, and the source noticed first
            self._inbox.post(SourceGone(source))
        line = self._lines[source] = Line()
        try:
            await _either(self._listen(stream, hello), line.pump(stream, self._heartbeat_s, lambda: None))
        finally:
            if self._lines.get(source) is line:
                del self._lines[source]
                self._inbox.post(SourceGone(source))

    async def _listen(self, stream: Stream[SourceSays, TargetSays], source: Endpoint) -> None:
        while (message := await stream.read()) is not None:
            if isinstance(message, Endpoint):
                raise InvalidRequest("only the first message of a control stream is a hello")
            await _post(self._inbox, FromSource(source, message))


class TargetLines:
    """The control streams that we open to targets, each on first use. Renews the leases of what is under way."""

    def __init__(self, own: Endpoint, inbox: Inbox, cluster_token: str, lease_s: float) -> None:
        self._own = own
        self._inbox = inbox
        self._token = cluster_token
        self._lease_s = lease_s
        self._lines: dict[WorkerRef, Line[SourceSays]] = {}
        self._under_way: dict[WorkerRef, set[int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, target: WorkerRef, message: SourceMessage) -> None:
        line = self._lines.get(target)
        if line is None:
            if isinstance(message, Abort):
                return  # the line broke, and with it the handover that this would end
            line = self._lines[target] = Line()
            self._under_way[target] = set()
            task = asyncio.get_running_loop().create_task(self._run(target, line))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if isinstance(message, Reserve):
            self._under_way[target].add(message.handover_id)
        elif isinstance(message, Abort):
            self._under_way[target].discard(message.handover_id)
        line.put(message)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, target: WorkerRef, line: Line[SourceSays]) -> None:
        peer = Peer(target.address, self._token)
        stream = peer.control()
        try:
            async with asyncio.timeout(self._lease_s):
                await stream.write(self._own)
                hello = await stream.read()
            if not isinstance(hello, Endpoint) or hello.ref != target:
                raise StaleEpoch(f"{target.name} has been restarted")
            routes(self._own.format, hello.format)  # raises where it keeps the KV of another model
            await _either(
                self._listen(stream, hello), line.pump(stream, self._lease_s / 3, lambda: self._renewal(target))
            )
        except (BatonError, TimeoutError) as error:
            log.warning("control stream to %s broke: %s", target.name, error or "no answer")
        finally:
            del self._lines[target]
            del self._under_way[target]
            self._inbox.post(TargetGone(target))
            stream.cancel()
            await peer.close()

    def _renewal(self, target: WorkerRef) -> Renew | None:
        under_way = self._under_way[target]
        return Renew(tuple(under_way)) if under_way else None

    async def _listen(self, stream: Stream[TargetSays, SourceSays], target: Endpoint) -> None:
        while (message := await stream.read()) is not None:
            if isinstance(message, Endpoint):
                raise InvalidRequest("only the first message of a control stream is a hello")
            if isinstance(message, Committed | Refused | Abort):
                self._under_way[target.ref].discard(message.handover_id)
            await _post(self._inbox, FromTarget(target, message))
