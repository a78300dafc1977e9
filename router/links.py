"""The wire under the core: one gRPC session with each worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from ..common.errors import BatonError, StaleEpoch, WorkerLost, WrongRole
from ..common.messages import Hello, Ping, RouterMessage, StepReport
from ..common.types import WorkerInfo, WorkerRef
from ..protos.convert import FromRouter, FromWorker
from ..protos.rpc import CalledStream, Peer

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
"""A worker that has not answered a Hello for this long is tried again."""
MIN_RETRY_S = 0.1
MAX_RETRY_S = 1.0
MAX_QUEUED = 8192
"""Messages to a worker that does not read them; one more, and it is taken for gone."""

Session = CalledStream[FromWorker, FromRouter]


class Listener(Protocol):
    """Who is told what happens on the sessions."""

    def worker_up(self, info: WorkerInfo) -> None: ...
    def worker_lost(self, name: str, why: BatonError) -> None: ...
    def on_report(self, name: str, report: StepReport) -> None: ...


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: what all links of one router have in common."""

    router: str
    epoch: int
    cluster_token: str
    heartbeat_s: float


class Link:
    """Keeps a session with one worker: Hello, its WorkerInfo, then messages down and reports up. A session that
    breaks is opened again, for as long as the worker is a member."""

    def __init__(self, ref: WorkerRef, caller: Caller, listener: Listener) -> None:
        self.ref = ref
        self.connected = False
        self._caller = caller
        self._listener = listener
        self._queue: deque[RouterMessage] = deque()
        self._wake = asyncio.Event()
        self._forsaken = False
        self._session: asyncio.Task[None] | None = None
        self._task = asyncio.create_task(self._run(), name=f"link to {ref.name}")

    def send(self, message: RouterMessage) -> None:
        """Queue a message for the session that stands now; without one it is dropped, for its tickets are void."""
        if not self.connected:
            return
        if len(self._queue) >= MAX_QUEUED:
            self.disconnect()
            return
        self._queue.append(message)
        self._wake.set()

    def aim(self, ref: WorkerRef) -> None:
        """The member is (still, or now) this incarnation."""
        self._forsaken = False
        if ref != self.ref:
            self.ref = ref
            self.disconnect()

    def forsake(self) -> None:
        """The worker is no member any more. A session that stands is kept: a controller that lost its memory must not
        cost the fleet its work. A broken one is not opened again."""
        self._forsaken = True
        if not self.connected:
            self._task.cancel()

    def disconnect(self) -> None:
        """Break the session; a new one is opened."""
        if self._session is not None:
            self._session.cancel()

    @property
    def over(self) -> bool:
        """It has ended, or was told to and is about to: it can not be aimed again."""
        return self._task.done() or self._task.cancelling() > 0

    async def close(self) -> None:
        """End the session and do not open another."""
        self._forsaken = True
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        pause = MIN_RETRY_S
        while not self._forsaken:
            self._session = asyncio.create_task(self._converse(), name=f"session with {self.ref.name}")
            try:
                await asyncio.wait({self._session})
            finally:  # cancelled: take the session along
                self._session.cancel()
                await asyncio.wait({self._session})
                was_up, self.connected = self.connected, False
                why = _why(self._session)
                if was_up:
                    log.log(
                        logging.INFO if self._forsaken else logging.WARNING,
                        "worker %s: session over: %s",
                        self.ref.name,
                        why,
                    )
                    self._listener.worker_lost(self.ref.name, why)
            pause = MIN_RETRY_S if was_up else min(2 * pause, MAX_RETRY_S)
            await asyncio.sleep(pause)

    async def _converse(self) -> None:
        """One session, from Hello to its end. Raises a `BatonError` where it does not end well."""
        peer = Peer(self.ref.address, self._caller.cluster_token)
        try:
            stream = peer.session()
            info = await self._greet(stream)
            self._queue.clear()
            self.connected = True
            log.info("session with worker %s (%s) stands", info.ref.name, info.role)
            self._listener.worker_up(info)
            async with asyncio.TaskGroup() as both:
                writer = both.create_task(self._write(stream))
                await self._read(stream)
                writer.cancel()
        finally:
            await peer.close()

    async def _greet(self, stream: Session) -> WorkerInfo:
        caller, ref = self._caller, self.ref
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                await stream.write(Hello(caller.router, caller.epoch, ref.epoch))
                info = await stream.read()
        except TimeoutError as error:
            raise WorkerLost(f"no answer to Hello for {HANDSHAKE_S:.0f} s") from error
        if not isinstance(info, WorkerInfo):
            raise WorkerLost("the first message was no WorkerInfo")
        if info.ref.name != ref.name or info.ref.epoch != ref.epoch:
            raise StaleEpoch(f"{ref.name} of epoch {ref.epoch} was meant, {info.ref.name} of {info.ref.epoch} answers")
        return info

    async def _read(self, stream: Session) -> None:
        while (message := await stream.read()) is not None:
            if isinstance(message, WorkerInfo):  # its last word on this session
                raise WrongRole(f"it is a {message.role} worker now")
            self._listener.on_report(self.ref.name, message)

    async def _write(self, stream: Session) -> None:
        while True:
            try:
                async with asyncio.timeout(self._caller.heartbeat_s):
                    await self._wake.wait()
            except TimeoutError:
                self._queue.append(Ping())
            self._wake.clear()
            with contextlib.suppress(WorkerLost):  # it is over then, and what there is to read says why
                while self._queue:
                    await stream.write(self._queue.popleft())


def _why(session: asyncio.Task[None]) -> BatonError:
    """Why a session is over."""
    if session.cancelled():
        return WorkerLost("disconnected")
    error = session.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is None:
        return WorkerLost("the worker ended it")
    if isinstance(error, BatonError):
        return error
    log.error("a session failed in our own code", exc_info=error)  # say so, and treat the worker as lost
    return WorkerLost(str(error))
