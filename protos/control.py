"""gRPC of the control plane: what controller and parent answer, and how they are asked. No request of a client and no
KV passes here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from ..common.cluster import End, FromController, FromGateway, Launch, LogLines, LogQuestion, Processes, WorkerStatus
from .cluster import (
    END_ORDER,
    FROM_CONTROLLER,
    FROM_GATEWAY,
    LAUNCH_ORDER,
    LOG_LINES,
    LOG_REQUEST,
    PROCESSES,
    STATUS_REPORT,
    STORED,
)
from .convert import EMPTY
from .rpc import CalledStream, Handlers, Peer, Stream, call_handler, stream_handler, watch_handler

REPORT = "/baton.v1.Controller/Report"
ATTEND = "/baton.v1.Controller/Attend"
KEEP_RUNNING = "/baton.v1.Parent/KeepRunning"
END_PROCESS = "/baton.v1.Parent/EndProcess"
WATCH = "/baton.v1.Parent/Watch"
TAIL = "/baton.v1.Parent/Tail"
SAVE = "/baton.v1.Parent/Save"
LOAD = "/baton.v1.Parent/Load"

CALL_TIMEOUT_S = 5.0


class ControllerService(Protocol):
    """What the controller answers. `attend` runs for as long as a gateway's stream lives."""

    async def report(self, status: WorkerStatus) -> None: ...
    async def attend(self, stream: Stream[FromGateway, FromController]) -> None: ...


class ParentService(Protocol):
    """What the owner of the processes answers. `watch` yields at once what is known, then each change."""

    async def launch(self, order: Launch) -> None: ...
    async def end(self, order: End) -> None: ...
    def watch(self) -> AsyncIterator[Processes]: ...
    async def tail(self, question: LogQuestion) -> LogLines: ...
    async def save(self, data: bytes) -> None: ...
    async def load(self) -> bytes: ...


def controller_handlers(service: ControllerService) -> Handlers:
    """Report and Attend of the controller."""
    return {
        REPORT: call_handler(service.report, STATUS_REPORT, EMPTY),
        ATTEND: stream_handler(service.attend, FROM_GATEWAY, FROM_CONTROLLER),
    }


def parent_handlers(service: ParentService) -> Handlers:
    """KeepRunning, EndProcess, Watch, Tail, Save and Load of the parent."""
    return {
        KEEP_RUNNING: call_handler(service.launch, LAUNCH_ORDER, EMPTY),
        END_PROCESS: call_handler(service.end, END_ORDER, EMPTY),
        WATCH: watch_handler(service.watch, PROCESSES),
        TAIL: call_handler(service.tail, LOG_REQUEST, LOG_LINES),
        SAVE: call_handler(service.save, STORED, EMPTY),
        LOAD: call_handler(lambda _: service.load(), EMPTY, STORED),
    }


@dataclass(frozen=True, slots=True)
class ControllerClient:
    """The controller, as workers and gateways ask it. Calls raise as `Peer`'s do."""

    peer: Peer

    async def report(self, status: WorkerStatus, timeout_s: float) -> None:
        """A worker's word on itself."""
        await self.peer.call(REPORT, status, STATUS_REPORT, EMPTY, timeout_s)

    def attend(self) -> CalledStream[FromController, FromGateway]:
        """A gateway's stream: what it sees, and the membership back."""
        return self.peer.stream(ATTEND, FROM_CONTROLLER, FROM_GATEWAY)


@dataclass(frozen=True, slots=True)
class ParentClient:
    """The parent, as the controller asks it. Calls raise as `Peer`'s do."""

    peer: Peer

    async def launch(self, order: Launch) -> None:
        """Keep this process running. Does nothing if it runs with the same digest already."""
        await self.peer.call(KEEP_RUNNING, order, LAUNCH_ORDER, EMPTY, CALL_TIMEOUT_S)

    async def end(self, order: End) -> None:
        """End it for good; the answer comes at once, the end shows in `watch`."""
        await self.peer.call(END_PROCESS, order, END_ORDER, EMPTY, CALL_TIMEOUT_S)

    def watch(self) -> AsyncIterator[Processes]:
        """Its processes, now and at each change."""
        return self.peer.watch(WATCH, PROCESSES)

    async def tail(self, question: LogQuestion) -> LogLines:
        """Lines of a log."""
        return await self.peer.call(TAIL, question, LOG_REQUEST, LOG_LINES, CALL_TIMEOUT_S)

    async def save(self, data: bytes) -> None:
        """Keep this for me: the controller's desired state, which outlives it there."""
        await self.peer.call(SAVE, data, STORED, EMPTY, CALL_TIMEOUT_S)

    async def load(self) -> bytes:
        """What was saved last; empty: nothing yet."""
        return await self.peer.call(LOAD, None, EMPTY, STORED, CALL_TIMEOUT_S)
