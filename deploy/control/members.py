"""The gateways' side of the controller: each attends by one stream, hears who is in the cluster, and tells of its
traffic."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ...common.clock import Clock
from ...common.cluster import (
    FromController,
    FromGateway,
    GatewayHello,
    Members,
    Trace,
    TraceAnswer,
    TraceQuestion,
    Traffic,
    WorkerStatus,
)
from ...common.errors import BatonError, InvalidRequest
from ...protos.rpc import Stream

KEPT_WINDOWS = 120
"""Windows of traffic that are kept of each gateway: two minutes."""
SILENT_S = 5.0
"""A gateway that tells nothing for this long is shown as silent; it speaks each second."""
TRACE_TIMEOUT_S = 2.0

GatewayStream = Stream[FromGateway, FromController]


@dataclass(slots=True)
class Attendance:
    """One gateway, for as long as its stream lives."""

    hello: GatewayHello
    heard: float
    traffic: deque[Traffic] = field(default_factory=lambda: deque(maxlen=KEPT_WINDOWS))
    questions: deque[TraceQuestion] = field(default_factory=lambda: deque(maxlen=32))
    wake: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Inquiry:
    """A question that was put to `asked` gateways."""

    asked: int
    answers: list[Trace | None] = field(default_factory=list)
    complete: asyncio.Event = field(default_factory=asyncio.Event)


class Gateways:
    """Who attends. `changed` is called when a gateway comes or goes.

    Nothing is told before the first `publish`: a controller that has just come back must not say that there are no
    workers. `version` is where versions begin, so that they grow over restarts of the controller as well.
    """

    def __init__(self, clock: Clock, changed: Callable[[], None], version: int = 0) -> None:
        self._clock = clock
        self._changed = changed
        self._version = version
        self._numbers = itertools.count(1)
        self._inquiries: dict[int, _Inquiry] = {}
        self._told: dict[str, tuple[WorkerStatus, float]] = {}
        self.members: Members | None = None
        self.present: dict[str, Attendance] = {}

    # --- membership --------------------------------------------------------------------------------------------------

    def publish(self, workers: tuple[WorkerStatus, ...]) -> None:
        """This is who there is. Gateways hear of it if it is new."""
        if self.members is not None and self.members.workers == workers:
            return
        now, old = self._clock.now(), self._told
        self._told = {w.name: old[w.name] if w.name in old and old[w.name][0] == w else (w, now) for w in workers}
        self._version += 1
        self.members = Members(self._version, workers)
        for gateway in self.present.values():
            gateway.wake.set()

    def told_at(self, name: str) -> float:
        """Since when gateways know what they know now of a worker; infinite where they know nothing."""
        return self._told[name][1] if name in self._told else float("inf")

    # --- ControllerService -------------------------------------------------------------------------------------------

    async def attend(self, stream: GatewayStream) -> None:
        """A gateway's stream, for as long as it lives. Raises `InvalidRequest` if it does not begin with a hello."""
        hello = await stream.read()
        if not isinstance(hello, GatewayHello):
            raise InvalidRequest("the first message of a gateway must say who it is")
        gateway = Attendance(hello, self._clock.now())
        self.present[hello.name] = gateway
        self._changed()
        telling = asyncio.create_task(self._tell(gateway, stream), name=f"telling {hello.name}")
        try:
            while (message := await stream.read()) is not None:
                self._hear(gateway, message)
        finally:
            telling.cancel()
            if self.present.get(hello.name) is gateway:  # a new stream of its may be here already
                del self.present[hello.name]
                self._changed()

    def _hear(self, gateway: Attendance, message: FromGateway) -> None:
        gateway.heard = self._clock.now()
        match message:
            case Traffic():
                gateway.traffic.append(message)
            case TraceAnswer():
                inquiry = self._inquiries.get(message.question)
                if inquiry is not None:
                    inquiry.answers.append(message.trace)
                    if len(inquiry.answers) == inquiry.asked:
                        inquiry.complete.set()
            case GatewayHello():
                gateway.hello = message

    async def _tell(self, gateway: Attendance, stream: GatewayStream) -> None:
        told = None
        try:
            while True:
                gateway.wake.clear()
                if self.members is not told:
                    told = self.members
                    if told is not None:
                        await stream.write(told)
                while gateway.questions:
                    await stream.write(gateway.questions.popleft())
                await gateway.wake.wait()
        except BatonError:
            return  # the stream is over; whoever reads it sees the same

    # --- what gateways know ------------------------------------------------------------------------------------------

    def is_silent(self, gateway: Attendance) -> bool:
        return self._clock.now() - gateway.heard > SILENT_S

    def traffic(self) -> Mapping[str, Sequence[Traffic]]:
        """Windows by gateway, oldest first."""
        return {name: tuple(gateway.traffic) for name, gateway in self.present.items()}

    async def trace(self, request_id: str) -> Trace | None:
        """What any gateway knows of a request; with an empty id, the slowest that any of them remembers."""
        if not self.present:
            return None
        number, inquiry = next(self._numbers), _Inquiry(len(self.present))
        self._inquiries[number] = inquiry
        try:
            for gateway in self.present.values():
                gateway.questions.append(TraceQuestion(number, request_id))
                gateway.wake.set()
            async with asyncio.timeout(TRACE_TIMEOUT_S):
                await inquiry.complete.wait()
        except TimeoutError:
            pass  # one of them is silent; the others' answers count
        finally:
            del self._inquiries[number]
        return max((trace for trace in inquiry.answers if trace is not None), key=_duration, default=None)


def _duration(trace: Trace) -> float:
    return max((trace.ago_s if span.end is None else span.end for span in trace.spans), default=0.0)
