"""Being a decode worker: grant reservations, join each request that has been handed over to the running batch, stream
tokens, and let go of requests that are to run elsewhere.

intake (worker/intake.py) ──take──▶ planner (running, preempted) ──▶ gone, or by `moves` to another decode worker
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Protocol

from ..common.errors import BatonError, DeadlineExceeded, PoolFull, StaleAttempt
from ..common.messages import Cancel, Move, Purpose, TokenOut, TransportBroken
from ..common.types import WorkerRef
from ..engine.cohort import Cohort
from ..engine.mailbox import FromRouter, FromTarget, InboxItem, RouterGone, TargetGone
from ..engine.plan import Results, StepPlan
from ..engine.role import Context
from ..engine.sequence import Sequence, SequenceKey
from ..kvtransfer.transport import Outlet
from .moves import Moves, headroom
from .planner import ContinuousBatching

log = logging.getLogger(__name__)


class Reservations(Protocol):
    """Handovers that come in, as the role sees them that goes on with them: `worker.intake.Intake`."""

    def holds(self, key: SequenceKey) -> bool: ...

    def coming(self, purpose: Purpose) -> int: ...


class DecodeRole:
    """Implements `engine.role.Host` for what comes in, and `engine.role.LocalBatch` for a colocated worker."""

    def __init__(self, context: Context, incoming: Reservations, outlet: Outlet) -> None:
        self._context = context
        self._incoming = incoming
        self._planner = ContinuousBatching(context.table)
        self._moves = Moves(context, self._planner, outlet, self._remove, self._fail)
        self._decoding: dict[SequenceKey, Sequence] = {}
        self._cohort = Cohort.of([])
        """Who drew in the step that was collected last."""
        self._soonest = math.inf
        """No deadline of theirs is before this."""

    # --- messages ---

    def receive(self, item: InboxItem, now: float) -> None:
        match item:
            case FromRouter(router, Cancel(ticket)):
                self._end((router, ticket), "cancelled", "cancelled by the router")
            case FromRouter(router, Move(ticket, target)):
                self._move((router, ticket), target, now)
            case RouterGone(router):
                for key in [key for key in self._decoding if key[0] == router]:
                    self._end(key, "router_lost", "the router is gone")
            case FromTarget(target, message):
                self._moves.answer(target, message, now)
            case TargetGone(target):
                self._moves.target_gone(target)
            case TransportBroken():
                self._moves.transport_broken(item)

    def _move(self, key: SequenceKey, target: WorkerRef, now: float) -> None:
        sequence = self._decoding.get(key)
        if sequence is None or sequence not in self._planner.running:
            self._context.outbox.stayed(key, StaleAttempt("not running here"))
        else:
            self._moves.start(sequence, target, now)

    # --- from reservation to batch ---

    def admit(self, sequence: Sequence) -> None:
        """Blocks for what it has and some output; see `engine.role.Host`."""
        context, table, tokens = self._context, self._context.table, len(sequence.tokens)
        if sequence.key in self._decoding:
            raise StaleAttempt("this attempt is here already")
        if self._planner.preempted:
            raise PoolFull("preempted requests wait for room here")
        if self.places <= 0:
            raise PoolFull(f"the batch is full: {context.limits.max_running} requests")
        running = tokens if sequence.output_len else 0
        limit = min(sequence.limit, table.manager.num_blocks * table.block_size)
        most, least = (min(tokens + headroom(context.handover, n), limit) for n in (running, 0))
        # The last token's block does not count as cached: should the commit bring no token, its KV is computed here.
        # With the least room, one that moves may outrun it and stay where it is, as it would if it were refused.
        if not any(table.admit(sequence, tokens - 1, room) for room in (most, least)):
            raise PoolFull(f"no room for {least} tokens; {table.manager.available} blocks are available")

    def take(self, sequence: Sequence, tokens: tuple[TokenOut, ...]) -> None:
        """See `engine.role.Host`."""
        for token in tokens:
            self._context.outbox.token(sequence.key, token.position, token.token, token.logprob)
        self.join(sequence)

    def join(self, sequence: Sequence) -> None:
        """Take a sequence whose next token is known into the batch."""
        self._decoding[sequence.key] = sequence
        self._soonest = min(self._soonest, sequence.deadline)
        self._planner.join(sequence)

    # --- rounds ---

    def tick(self, now: float) -> None:
        """Deadlines, and requests on their way elsewhere."""
        if now >= self._soonest:
            for sequence in [s for s in self._decoding.values() if now >= s.deadline]:
                self._fail(sequence, DeadlineExceeded("the deadline passed"))
            self._soonest = min((s.deadline for s in self._decoding.values()), default=math.inf)
        self._moves.tick(now)

    def plan(self, plan: StepPlan, now: float) -> None:
        count, waiting = self._planner.preemptions, self._planner.preempted.copy()
        self._planner.plan(plan)
        self._context.stats.preemptions += self._planner.preemptions - count
        for sequence in self._planner.preempted:
            if sequence not in waiting:
                self._moves.preempted(sequence)
                log.info(
                    "preempted at %d tokens while %d handovers come in",
                    *(len(sequence.tokens), self._incoming.coming(Purpose.DECODE)),
                    extra=sequence.named,
                )

    def on_layer(self, layer: int) -> None:
        """Nothing leaves a decode worker layer by layer."""

    def computed(self, sequences: list[Sequence], results: Results, now: float) -> None:
        tokens = results.drawn
        if len(tokens) < len(sequences):  # a chunk of a recompute draws nothing
            rows = [row for row, token in enumerate(results.tokens) if token is not None]
            sequences, results = [sequences[row] for row in rows], results.pick(rows)
        if sequences is not self._cohort.sequences:
            self._cohort = Cohort.of(sequences)
        positions, ended = self._cohort.accept(tokens)
        self._context.outbox.tokens(self._cohort, positions, tokens, results.logprobs)
        self._context.stats.output_tokens += len(tokens)
        self._moves.drew(sequences, results)
        for sequence, reason in ended:
            self._context.outbox.finished(sequence.key, reason)
            self._moves.interrupt(sequence, "finished", "the request ended before it had moved")
            self._remove(sequence)

    def failed(self, sequence: Sequence, error: BatonError) -> None:
        self._fail(sequence, error)

    # --- ends ---

    def _fail(self, sequence: Sequence, error: BatonError) -> None:
        log.warning("failed here: %s (%s)", error, error.code, extra=sequence.named)
        self._context.outbox.failed(sequence.key, error)
        self._moves.interrupt(sequence, error.code, error.message)
        self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        self._planner.remove(sequence)
        self._decoding.pop(sequence.key, None)

    def _end(self, key: SequenceKey, code: str, message: str) -> None:
        if sequence := self._decoding.get(key):
            self._moves.interrupt(sequence, code, message)
            self._remove(sequence)

    # --- numbers ---

    @property
    def places(self) -> int:
        """Requests that may still come in: none while preempted ones wait, whose room they would take."""
        if self._planner.preempted:
            return 0
        return self._context.limits.max_running - len(self._decoding) - self._incoming.coming(Purpose.DECODE)

    @property
    def headroom(self) -> int:
        """Blocks that those that run should find available: one each."""
        return len(self._planner.running)

    def sequences(self) -> Iterable[Sequence]:
        return self._decoding.values()

    @property
    def waiting(self) -> int:
        return len(self._planner.preempted)

    @property
    def running(self) -> int:
        return len(self._decoding) - len(self._planner.preempted)

    @property
    def queued_tokens(self) -> int:
        return sum(s.missing for s in self._planner.preempted)

    @property
    def handovers(self) -> int:
        return len(self._moves)

    @property
    def reserved_blocks(self) -> int:
        return 0
