"""The border between the engine loop and the rest of its process.

RPC handlers and transports post to the inbox and never touch the loop's state; the loop drains it between steps, and
at the end of a step hands over all that it has to say in one go. Only plain messages cross, so that the two sides can
live in one process or in two.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING

from ..common.errors import BatonError, Overloaded
from ..common.messages import (
    CheckReport,
    Endpoint,
    Failed,
    Filled,
    Finished,
    HandedOver,
    KvEvents,
    Load,
    RouterMessage,
    SourceMessage,
    Spoiled,
    Started,
    Stayed,
    StepReport,
    TargetMessage,
    Tokens,
    TransportBroken,
)
from ..common.types import FinishReason, TokenLogprob, WorkerRef
from .cohort import Cohort
from .sequence import SequenceKey

if TYPE_CHECKING:
    from .role import Role

# --- what comes in ---


@dataclass(frozen=True, slots=True)
class FromRouter:
    router: str
    message: RouterMessage


@dataclass(frozen=True, slots=True)
class RouterJoined:
    """A router opened its stream; it is owed the whole prefix cache and the load."""

    router: str


@dataclass(frozen=True, slots=True)
class RouterGone:
    """A router's stream broke or fell silent: its requests end here."""

    router: str


@dataclass(frozen=True, slots=True)
class FromSource:
    """From the worker that hands over to us."""

    source: Endpoint
    message: SourceMessage


@dataclass(frozen=True, slots=True)
class FromTarget:
    """From the worker that we hand over to."""

    target: Endpoint
    message: TargetMessage


@dataclass(frozen=True, slots=True)
class SourceGone:
    source: WorkerRef


@dataclass(frozen=True, slots=True)
class TargetGone:
    target: WorkerRef


@dataclass(frozen=True, slots=True)
class Inspect:
    """Prove the books and tell; `reply` is called on the loop's thread."""

    reply: Callable[[CheckReport], None]


@dataclass(frozen=True, slots=True)
class Recast:
    """Change the worker's role: run the policies that `cast` makes, from the first moment on at which nothing is held,
    if that comes before `until`, on the loop's clock. `reply` is called on the loop's thread: whether it came."""

    cast: Callable[[], Listing[Role]]
    until: float
    reply: Callable[[bool], None]


InboxItem = (
    FromRouter
    | RouterJoined
    | RouterGone
    | FromSource
    | FromTarget
    | SourceGone
    | TargetGone
    | Filled
    | Spoiled
    | TransportBroken
    | Inspect
    | Recast
)


MAX_UNREAD = 512
"""Messages of one peer that may wait for the loop. One that says more than this in a step has to wait itself."""


class Inbox:
    """Posted to by any thread, drained by the loop. What peers say is bounded here, for each of them; what this process
    says itself, by the handovers and connections that there are."""

    def __init__(self) -> None:
        self._items: list[InboxItem] = []
        self._unread: Counter[object] = Counter()
        self._lock = threading.Lock()
        self._wake = threading.Event()

    def post(self, item: InboxItem) -> None:
        """Raises `Overloaded` where `MAX_UNREAD` messages of the same peer are waiting."""
        with self._lock:
            if isinstance(item, FromRouter | FromSource | FromTarget):
                peer = _peer(item)
                if self._unread[peer] >= MAX_UNREAD:
                    raise Overloaded(f"{MAX_UNREAD} messages wait to be read")
                self._unread[peer] += 1
            self._items.append(item)
        self._wake.set()

    def drain(self) -> list[InboxItem]:
        """All that has been posted, in order."""
        if not self._wake.is_set():  # as in most rounds
            return []
        self._wake.clear()
        with self._lock:
            items, self._items = self._items, []
            self._unread.clear()
        return items

    def wait(self, timeout: float) -> None:
        """Return when something has been posted, or after `timeout` seconds."""
        self._wake.wait(timeout)


def _peer(item: FromRouter | FromSource | FromTarget) -> object:
    """Whose message it is. A worker may be a source and a target, on two streams."""
    match item:
        case FromRouter(router):
            return router
        case FromSource(source):
            return FromSource, source.ref
        case FromTarget(target):
            return FromTarget, target.ref


# --- what goes out ---


@dataclass(slots=True)
class _Report:
    tokens: Tokens = field(default_factory=Tokens)
    started: list[Started] = field(default_factory=list)
    handed_over: list[HandedOver] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    kv: list[KvEvents] = field(default_factory=list)
    stayed: list[Stayed] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Mail:
    """All that one step has to say: a report for each router, and messages to other workers in order."""

    reports: dict[str, StepReport]
    to_targets: list[tuple[WorkerRef, SourceMessage]]
    to_sources: list[tuple[WorkerRef, TargetMessage]]


class Outbox:
    """Filled by the roles during a step; knows which routers are there to be told."""

    def __init__(self) -> None:
        self.routers: set[str] = set()
        self._reports: defaultdict[str, _Report] = defaultdict(_Report)
        self._to_targets: list[tuple[WorkerRef, SourceMessage]] = []
        self._to_sources: list[tuple[WorkerRef, TargetMessage]] = []

    def token(self, key: SequenceKey, position: int, token: int, logprob: TokenLogprob | None) -> None:
        router, ticket = key
        self._reports[router].tokens.add(ticket, position, token, logprob)

    def tokens(
        self, cohort: Cohort, positions: list[int], tokens: list[int], logprobs: Mapping[int, TokenLogprob]
    ) -> None:
        """Tell of each of these sequences one token; `logprobs` by index."""
        for router, readers in cohort.routers.items():
            mine = readers.rows
            rows = compress(range(len(mine)), mine) if logprobs else ()
            asked = {index: logprobs[row] for index, row in enumerate(rows) if row in logprobs}
            report = self._reports[router].tokens
            report.extend(readers.tickets, compress(positions, mine), compress(tokens, mine), asked)

    def started(self, key: SequenceKey, cached_tokens: int) -> None:
        self._reports[key[0]].started.append(Started(key[1], cached_tokens))

    def handed_over(self, key: SequenceKey, exposed_s: float = 0.0) -> None:
        self._reports[key[0]].handed_over.append(HandedOver(key[1], exposed_s))

    def finished(self, key: SequenceKey, reason: FinishReason) -> None:
        self._reports[key[0]].finished.append(Finished(key[1], reason))

    def failed(self, key: SequenceKey, error: BatonError) -> None:
        self._reports[key[0]].failed.append(Failed(key[1], error.code, error.message))

    def stayed(self, key: SequenceKey, error: BatonError) -> None:
        self._reports[key[0]].stayed.append(Stayed(key[1], error.code, error.message))

    def __bool__(self) -> bool:
        """Whether there is anything to say."""
        return bool(self._reports or self._to_targets or self._to_sources)

    def kv(self, router: str, events: KvEvents) -> None:
        self._reports[router].kv.append(events)

    def to_target(self, target: WorkerRef, message: SourceMessage) -> None:
        self._to_targets.append((target, message))

    def to_source(self, source: WorkerRef, message: TargetMessage) -> None:
        self._to_sources.append((source, message))

    def flush(self, load: Load) -> Mail | None:
        """Everything since the last flush, the load with each report; None if there is nothing to say."""
        if not self:
            return None
        reports = {
            router: StepReport(
                r.tokens,
                tuple(r.started),
                tuple(r.handed_over),
                tuple(r.finished),
                tuple(r.failed),
                tuple(r.kv),
                load,
                tuple(r.stayed),
            )
            for router, r in self._reports.items()
            if router in self.routers
        }
        mail = Mail(reports, self._to_targets, self._to_sources)
        self._reports, self._to_targets, self._to_sources = defaultdict(_Report), [], []
        return mail
