"""The handover as two pure state machines, one on each side. No I/O, no clock of their own, no blocks.

    source   RESERVING ──reserved──▶ SENDING ──commit sent──▶ COMMITTING ──committed──▶ COMMITTED
    target                RESERVED ──first bytes──▶ SENDING ──commit received, all bytes here──▶ COMMITTED

and from every state but COMMITTED an abort leads to ABORTED. Both ends are final. Each method says whether the
message made a difference; one that comes late, twice, or out of order does not, and changes nothing.

Until COMMITTED the source holds the request; from COMMITTED on the target does; at no time both. Should the source
die or lose its way between, the lease (Gray & Cheriton, SOSP '89) ends the target's side.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..common.messages import Commit


class State(enum.Enum):
    RESERVING = "reserving"
    RESERVED = "reserved"
    SENDING = "sending"
    COMMITTING = "committing"
    COMMITTED = "committed"
    ABORTED = "aborted"

    @property
    def final(self) -> bool:
        return self in (State.COMMITTED, State.ABORTED)


@dataclass(slots=True)
class SourceHandover:
    """The giving side. `patience`: seconds to wait for an answer of the target where one is due."""

    patience: float
    due: float
    """When an answer that is outstanding is overdue."""
    state: State = State.RESERVING
    skip: int = 0
    """Leading blocks that the target holds already."""

    def reserved(self, cached_blocks: int) -> bool:
        if self.state is not State.RESERVING:
            return False
        self.state, self.skip = State.SENDING, cached_blocks
        return True

    def commit(self, now: float) -> bool:
        """All KV is computed and queued for sending; the commit goes out."""
        if self.state is not State.SENDING:
            return False
        self.state, self.due = State.COMMITTING, now + self.patience
        return True

    def moving(self, now: float) -> bool:
        """Bytes still leave: the target owes its answer only after the last of them."""
        if self.state is not State.COMMITTING:
            return False
        self.due = now + self.patience
        return True

    def committed(self) -> bool:
        if self.state is not State.COMMITTING:
            return False
        self.state = State.COMMITTED
        return True

    def abort(self) -> bool:
        if self.state.final:
            return False
        self.state = State.ABORTED
        return True

    def overdue(self, now: float) -> bool:
        """The target owes an answer and has not given it in time. (While SENDING it owes none.)"""
        return self.state in (State.RESERVING, State.COMMITTING) and now >= self.due


@dataclass(slots=True)
class TargetHandover:
    """The taking side. `lease`: seconds without a sign of life of the source after which it ends."""

    lease: float
    expires: float
    state: State = State.RESERVED
    filled: bool = False
    """All bytes that were missing are here."""
    pending: Commit | None = None

    def alive(self, now: float) -> bool:
        """The source gave a sign of life: a renewal, or bytes."""
        if self.state.final:
            return False
        self.expires = max(self.expires, now + self.lease)
        return True

    def fed(self, now: float) -> bool:
        """Some bytes arrived."""
        if self.state is State.RESERVED:
            self.state = State.SENDING
        return self.alive(now)

    def fill(self) -> bool:
        """The last missing bytes arrived."""
        if self.state.final or self.filled:
            return False
        self.filled = True
        return True

    def commit(self, message: Commit) -> bool:
        """The source's commit arrived, perhaps ahead of the last bytes."""
        if self.state.final or self.pending is not None:
            return False
        self.pending = message
        return True

    def conclude(self) -> Commit | None:
        """Become COMMITTED if nothing is missing any more, and return the commit; None otherwise."""
        if self.state.final or not self.filled or self.pending is None:
            return None
        self.state = State.COMMITTED
        return self.pending

    def abort(self) -> bool:
        if self.state.final:
            return False
        self.state = State.ABORTED
        return True

    def expired(self, now: float) -> bool:
        return not self.state.final and now >= self.expires
