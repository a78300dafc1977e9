"""A worker's outgoing handovers: opened, fed, committed, ended. The role that uses it decides when.

Knows nothing of what is handed over but its blocks and how it is called; what it has to say goes to `post`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..common.config import HandoverConfig
from ..common.messages import Abort, Commit, Endpoint, Reserve, Reserved, SourceMessage, TokenOut, TransportBroken
from ..common.types import WorkerRef
from .layout import cut
from .session import SourceHandover, State
from .transport import Offer, Outlet


class Subject(Protocol):
    """What is handed over: `engine.sequence.Sequence`. `key` tells it from all others."""

    @property
    def key(self) -> Hashable: ...

    @property
    def blocks(self) -> Sequence[int]: ...

    @property
    def attempt(self) -> int: ...


S = TypeVar("S", bound=Subject)

Question = Callable[[int, tuple[str, ...]], Reserve]
"""(id of the handover, transports to avoid) → what to ask the target."""


@dataclass(eq=False, slots=True)
class Outgoing(Generic[S]):
    """One handover, seen from its source."""

    id: int
    subject: S
    target: WorkerRef
    state: SourceHandover
    opened: float
    computed: float = 0.0
    """When the commit went out: what the handover takes from here on delays the client."""
    across: int = 0
    """Bytes that had got across when last looked at."""
    endpoint: Endpoint | None = None
    """What the target said of itself."""
    transport: str = ""
    offered: int = 0
    """Blocks of the target's size that it has or has been offered."""


class Sender(Generic[S]):
    """`block_size`: of our own blocks; `ids`: names of handovers, never used twice in this incarnation of the worker.
    Only the worker's loop calls this."""

    def __init__(
        self, outlet: Outlet, config: HandoverConfig, block_size: int,
        post: Callable[[WorkerRef, SourceMessage], None], ids: Iterator[int],
    ) -> None:  # fmt: skip
        self._outlet = outlet
        self._config = config
        self._block_size = block_size
        self._post = post
        self._open: dict[int, Outgoing[S]] = {}
        self._by_key: dict[Hashable, Outgoing[S]] = {}
        self._ids = ids

    def __len__(self) -> int:
        return len(self._open)

    def all(self) -> list[Outgoing[S]]:
        return list(self._open.values())

    def of(self, subject: S) -> Outgoing[S] | None:
        """The handover that is under way for a subject, if there is one."""
        return self._by_key.get(subject.key)

    def to(self, target: WorkerRef) -> list[Outgoing[S]]:
        return [o for o in self._open.values() if o.target == target]

    # --- the way of one handover ---

    def reserve(self, subject: S, target: WorkerRef, now: float, question: Question) -> Outgoing[S]:
        """Ask `target` for room."""
        state = SourceHandover(self._config.lease_s, now + self._config.lease_s)
        outgoing = Outgoing(next(self._ids), subject, target, state, now)
        self._open[outgoing.id] = self._by_key[subject.key] = outgoing
        self._post(target, question(outgoing.id, self._outlet.failed(target)))
        return outgoing

    def answered(self, target: Endpoint, handover_id: int) -> Outgoing[S] | None:
        """The handover that an answer of `target` is about; None if it is none of ours (any more)."""
        outgoing = self._open.get(handover_id)
        return outgoing if outgoing is not None and outgoing.target == target.ref else None

    def reserved(self, outgoing: Outgoing[S], target: Endpoint, message: Reserved) -> bool:
        """The target has kept room: bytes may leave. False if that is no news."""
        if not outgoing.state.reserved(message.cached_blocks):
            return False
        outgoing.endpoint, outgoing.transport, outgoing.offered = target, message.transport, message.cached_blocks
        self._outlet.open(outgoing.id, outgoing.subject.attempt, target, message.transport)
        return True

    def ready(self, outgoing: Outgoing[S], tokens: int, last: bool) -> Offer | None:
        """What of the KV of the first `tokens` tokens can be offered and has not been: whole blocks of the target; if
        these are the `last`, the partial one as well. To be passed to the outlet."""
        assert outgoing.endpoint is not None
        size, first = outgoing.endpoint.format.block_size, outgoing.offered
        end = -(-tokens // size) if last else tokens // size
        if end <= first:
            return None
        outgoing.offered = end
        return Offer(outgoing.id, first, cut(outgoing.subject.blocks, self._block_size, size, first, end))

    def commit(self, outgoing: Outgoing[S], tokens: tuple[TokenOut, ...], deadline_s: float, now: float) -> None:
        """All has been offered, or is staged in the step that has just run."""
        outgoing.state.commit(now)
        outgoing.computed = now
        self._post(outgoing.target, Commit(outgoing.id, tokens, deadline_s))

    def end(self, outgoing: Outgoing[S]) -> int:
        """Forget a handover that is over; the source's blocks may be given away. Returns the bytes that got across."""
        across = self._outlet.progress(outgoing.id) if outgoing.endpoint else 0
        self._outlet.close(outgoing.id)
        del self._open[outgoing.id]
        del self._by_key[outgoing.subject.key]
        return across

    def abort(self, outgoing: Outgoing[S], code: str, message: str, tell: bool) -> bool:
        """End a handover that is not done; `tell` the target, if it does not know. False if it was over already."""
        if not outgoing.state.abort():
            return False
        if tell:
            self._post(outgoing.target, Abort(outgoing.id, code, message))
        return True

    # --- what happens to all ---

    def overdue(self, now: float) -> list[Outgoing[S]]:
        """Handovers whose target owes an answer and has not given it in time. While bytes get across it owes none."""
        for outgoing in self._open.values():
            if outgoing.state.state is State.COMMITTING:
                across = self._outlet.progress(outgoing.id)
                if across != outgoing.across:
                    outgoing.across = across
                    outgoing.state.moving(now)
        return [o for o in self._open.values() if o.state.overdue(now)]

    def broken(self, event: TransportBroken) -> list[Outgoing[S]]:
        """The handovers that were carried by a transport that broke."""
        return [o for o in self.to(event.target) if o.transport == event.transport]
