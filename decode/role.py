"""Being a decode worker: grant reservations, take the KV in, join each request to the running batch, stream tokens.

Reserve ──▶ incoming (blocks reserved, inlet open) ──Commit and all bytes──▶ planner (running, preempted) ──▶ gone
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from ..common.errors import (
    BatonError,
    DeadlineExceeded,
    FingerprintMismatch,
    HandoverFailed,
    InvalidRequest,
    PoolFull,
    StaleAttempt,
    StaleEpoch,
    WorkerLost,
)
from ..common.messages import (
    Abort,
    Cancel,
    Commit,
    Committed,
    Endpoint,
    Filled,
    HandoverKey,
    Refused,
    Renew,
    Reserve,
    Reserved,
    SourceMessage,
    Spoiled,
)
from ..common.types import WorkerRef
from ..engine.mailbox import FromRouter, FromSource, InboxItem, RouterGone, SourceGone
from ..engine.plan import Sampled, Slice, StepPlan
from ..engine.role import Context
from ..engine.sequence import Sequence, SequenceKey
from ..kvtransfer.choose import choose
from ..kvtransfer.layout import routes
from ..kvtransfer.session import TargetHandover
from ..kvtransfer.transport import Inlet
from .planner import ContinuousBatching

log = logging.getLogger(__name__)

REMEMBERED = 4096
"""Committed handovers that are remembered, so that a commit that comes twice gets its answer twice."""


@dataclass(eq=False, slots=True)
class Incoming:
    """One handover, seen from its target."""

    key: HandoverKey
    source: WorkerRef
    sequence: Sequence
    state: TargetHandover

    @property
    def kv_tokens(self) -> int:
        """Once the commit is here: tokens whose KV the source has. The last token's is not computed yet."""
        assert self.state.pending is not None
        return len(self.sequence.tokens) + len(self.state.pending.tokens) - 1


class DecodeRole:
    """Takes handovers in through `inlet`, and on a colocated worker sequences through `join`."""

    def __init__(self, context: Context, inlet: Inlet) -> None:
        self._context = context
        self._inlet = inlet
        self._planner = ContinuousBatching(context.table)
        self._incoming: dict[HandoverKey, Incoming] = {}
        self._decoding: dict[SequenceKey, Sequence] = {}
        self._committed: dict[HandoverKey, None] = {}

    # --- messages ---

    def receive(self, item: InboxItem, now: float) -> None:
        match item:
            case FromRouter(router, Cancel(ticket)):
                self._cancel((router, ticket), "cancelled", "cancelled by the router")
            case RouterGone(router):
                keys = [s.key for s in self.sequences() if s.key[0] == router]
                for key in keys:
                    self._cancel(key, "router_lost", "the router is gone")
            case FromSource(source, message):
                self._from_source(source, message, now)
            case SourceGone(source):
                for incoming in [i for i in self._incoming.values() if i.source == source]:
                    self._abort(incoming, WorkerLost(f"{source.name} is gone"))
            case Filled(key):
                if filled := self._incoming.get(key):
                    filled.state.fill()
                    self._conclude(filled, now)
            case Spoiled(key, text):
                if spoiled := self._incoming.get(key):
                    self._abort(spoiled, HandoverFailed(text))

    def _from_source(self, source: Endpoint, message: SourceMessage, now: float) -> None:
        if isinstance(message, Renew):
            for handover_id in message.handover_ids:
                if incoming := self._incoming.get((source.ref.name, source.ref.epoch, handover_id)):
                    incoming.state.alive(now)
            return
        key = (source.ref.name, source.ref.epoch, message.handover_id)
        if isinstance(message, Reserve):
            if key not in self._incoming and key not in self._committed:
                self._reserve(key, source, message, now)
        elif incoming := self._incoming.get(key):
            if isinstance(message, Abort):
                self._abort(incoming, HandoverFailed(message.message), tell=False, code=message.code)
            elif incoming.state.commit(message):
                self._inlet.expect(key, self._context.table.blocks_for(incoming.kv_tokens))
        elif isinstance(message, Commit):
            self._late_commit(key, source.ref, message)

    def _late_commit(self, key: HandoverKey, source: WorkerRef, message: Commit) -> None:
        """A commit for what is not open here: done already, or given up."""
        if key in self._committed:
            self._context.outbox.to_source(source, Committed(message.handover_id))
        else:
            error = StaleAttempt("no such reservation is open (any more)")
            self._context.outbox.to_source(source, Abort(message.handover_id, error.code, error.message))

    def _reserve(self, key: HandoverKey, source: Endpoint, message: Reserve, now: float) -> None:
        """Blocks for the prompt and some output, the cached prefix among them pinned; or no, at once."""
        request, table = message.request, self._context.table
        sequence = Sequence((message.router, message.ticket), request, message.attempt, now, now + request.deadline_s)
        try:
            self._may_reserve(source, message, sequence)
            transport = choose(source, self._context.endpoint, self._context.handover.transport, message.avoid)
            room = min(
                len(request.tokens) + self._context.handover.headroom_tokens, sequence.max_len,
                self._context.limits.max_model_len, table.manager.num_blocks * table.block_size,
            )  # fmt: skip
            if not table.admit(sequence, len(request.tokens), room):
                raise PoolFull(f"no room for {room} tokens; {table.manager.available} blocks are available")
        except BatonError as error:
            self._context.outbox.to_source(source.ref, Refused(message.handover_id, error.code, error.message))
            return
        lease = self._context.handover.lease_s
        self._incoming[key] = Incoming(key, source.ref, sequence, TargetHandover(lease, now + lease))
        cached = sequence.computed // table.block_size
        self._inlet.open(key, message.attempt, source.format, cached, sequence.blocks[cached:])
        self._context.outbox.to_source(source.ref, Reserved(message.handover_id, cached, transport))

    def _may_reserve(self, source: Endpoint, message: Reserve, sequence: Sequence) -> None:
        context, request = self._context, message.request
        if message.target != context.ref:
            raise StaleEpoch(f"meant for another incarnation of {message.target.name}")
        if source.fingerprint != context.endpoint.fingerprint:
            raise FingerprintMismatch("weights or numeric choices differ")
        routes(source.format, context.endpoint.format)  # raises where they hold the KV of different models
        if message.router not in context.outbox.routers:
            raise HandoverFailed(f"router {message.router} has no stream to this worker")
        if sequence.key in self._decoding or any(i.sequence.key == sequence.key for i in self._incoming.values()):
            raise StaleAttempt("this attempt is here already")
        if not context.table.fits(len(request.tokens) + 1):
            raise PoolFull(f"{len(request.tokens)} tokens are more than this worker's whole pool")
        if not request.tokens or len(request.tokens) >= context.limits.max_model_len:
            raise InvalidRequest(f"{len(request.tokens)} tokens do not fit this worker")
        if len(self._incoming) >= context.handover.max_sending:
            raise PoolFull(f"{len(self._incoming)} handovers are coming in already")
        if self._planner.preempted:
            raise PoolFull("preempted requests wait for room here")
        if self.places <= 0:
            raise PoolFull(f"the batch is full: {context.limits.max_running} requests")

    # --- from reservation to batch ---

    def _conclude(self, incoming: Incoming, now: float) -> None:
        commit = incoming.state.conclude()
        if commit is None:
            return
        sequence = incoming.sequence
        self._close(incoming)
        self._committed[incoming.key] = None
        if len(self._committed) > REMEMBERED:
            del self._committed[next(iter(self._committed))]
        self._context.table.advance(sequence, incoming.kv_tokens - sequence.computed)
        sequence.deadline = now + commit.deadline_s
        for token in commit.tokens:
            sequence.tokens.append(token.token)
            self._context.emit(sequence, Sampled(token.token, token.logprob))
        self._context.outbox.to_source(incoming.source, Committed(commit.handover_id))
        self.join(sequence)

    def join(self, sequence: Sequence) -> None:
        """Take a sequence whose first token is known into the batch."""
        self._decoding[sequence.key] = sequence
        self._planner.join(sequence)

    def _close(self, incoming: Incoming) -> None:
        self._inlet.close(incoming.key)  # from here on nobody writes the blocks
        del self._incoming[incoming.key]

    def _abort(self, incoming: Incoming, error: BatonError, tell: bool = True, code: str = "") -> None:
        incoming.state.abort()
        self._close(incoming)
        self._context.table.drop(incoming.sequence)
        if code != "finished":
            self._context.stats.aborted(code or error.code)
            log.info(
                "handover from %s aborted: %s (%s)",
                *(incoming.source.name, error, code or error.code),
                extra=incoming.sequence.named,
            )
        if tell:
            abort = Abort(incoming.key[2], error.code, error.message)
            self._context.outbox.to_source(incoming.source, abort)

    # --- rounds ---

    def tick(self, now: float) -> None:
        """Leases and deadlines."""
        for incoming in list(self._incoming.values()):
            if (touched := self._inlet.touched(incoming.key)) is not None:
                incoming.state.fed(touched)
            if incoming.state.expired(now):
                self._abort(incoming, HandoverFailed("the lease ran out"))
            elif now >= incoming.sequence.deadline:  # a source that hangs in a step still renews
                self._abort(incoming, DeadlineExceeded("the deadline passed before the first token"))
        for sequence in [s for s in self._decoding.values() if now >= s.deadline]:
            self._fail(sequence, DeadlineExceeded("the deadline passed"))

    def plan(self, plan: StepPlan, now: float) -> None:
        count, waiting = self._planner.preemptions, self._planner.preempted.copy()
        self._planner.plan(plan)
        self._context.stats.preemptions += self._planner.preemptions - count
        for sequence in self._planner.preempted:
            if sequence not in waiting:
                log.info(
                    "preempted at %d tokens while %d handovers come in", len(sequence.tokens), len(self._incoming),
                    extra=sequence.named,
                )  # fmt: skip

    def on_layer(self, layer: int) -> None:
        """Nothing leaves a decode worker layer by layer."""

    def computed(self, part: Slice, sampled: Sampled | None, now: float) -> None:
        if sampled is None:
            return  # a chunk of a recompute
        sequence = part.sequence
        reason = self._context.accept(sequence, sampled)
        self._context.emit(sequence, sampled)
        if reason is not None:
            self._context.outbox.finished(sequence.key, reason)
            self._remove(sequence)

    def failed(self, part: Slice, error: BatonError) -> None:
        self._fail(part.sequence, error)

    # --- ends ---

    def _fail(self, sequence: Sequence, error: BatonError) -> None:
        log.warning("failed here: %s (%s)", error, error.code, extra=sequence.named)
        self._context.outbox.failed(sequence.key, error)
        self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        self._planner.remove(sequence)
        self._decoding.pop(sequence.key, None)

    def _cancel(self, key: SequenceKey, code: str, message: str) -> None:
        if sequence := self._decoding.get(key):
            self._remove(sequence)
        for incoming in [i for i in self._incoming.values() if i.sequence.key == key]:
            self._abort(incoming, HandoverFailed(message), code=code)

    # --- numbers ---

    @property
    def places(self) -> int:
        """Requests that may still come in: none while preempted ones wait, whose room they would take."""
        if self._planner.preempted:
            return 0
        return self._context.limits.max_running - len(self._decoding) - len(self._incoming)

    @property
    def headroom(self) -> int:
        """Blocks that those that run should find available: one each."""
        return len(self._planner.running)

    def sequences(self) -> Iterable[Sequence]:
        return [*self._decoding.values(), *(i.sequence for i in self._incoming.values())]

    @property
    def waiting(self) -> int:
        return len(self._planner.preempted)

    @property
    def running(self) -> int:
        return len(self._planner.running)

    @property
    def queued_tokens(self) -> int:
        return sum(s.missing for s in self._planner.preempted)

    @property
    def handovers(self) -> int:
        return len(self._incoming)

    @property
    def reserved_blocks(self) -> int:
        return sum(len(i.sequence.blocks) for i in self._incoming.values())
