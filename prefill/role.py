"""Being a prefill worker: take requests, reserve at the decode worker, compute the prompt, hand over.

    opening ──Reserve──▶ reserving ──Reserved──▶ planner (ready, computing) ──first token, Commit──▶ committing ──▶ gone

A request without a decode worker (colocated) skips the handover and joins this worker's own decode batch. A request
that ends with its first token hands nothing over. Whatever goes wrong is told to the router, which tries elsewhere.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..common.errors import (
    BatonError,
    DeadlineExceeded,
    HandoverFailed,
    InvalidRequest,
    PoolFull,
    from_code,
)
from ..common.messages import Abort, Cancel, Commit, Committed, Refused, Reserve, Reserved, Submit, TokenOut
from ..common.types import WorkerRef
from ..engine.mailbox import FromRouter, FromTarget, InboxItem, RouterGone, TargetGone
from ..engine.plan import Sampled, Slice, StepPlan
from ..engine.role import Context, LocalBatch
from ..engine.sequence import Sequence, SequenceKey
from ..kvtransfer.session import SourceHandover, State
from ..kvtransfer.transport import Offer, Outlet
from .planner import ChunkedPrefill, turn

LOOKAHEAD_STEPS = 2
"""Handovers are opened for as many waiting tokens as this many steps compute: early enough that the decode worker's
answer is here when the turn comes, late enough that its memory is not held for a long queue."""


log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Outgoing:
    """One handover, seen from its source."""

    id: int
    sequence: Sequence
    target: WorkerRef
    state: SourceHandover
    opened: float
    computed: float = 0.0
    """When the first token was sampled: what the handover takes from here on delays the client."""
    sent: int = 0
    """Bytes that had left when last looked at."""
    offered: list[int] = field(default_factory=list)
    """For each layer: blocks offered so far (a logical block number)."""


class PrefillRole:
    """`local` takes the sequences that this worker decodes itself; None: it decodes none."""

    def __init__(self, context: Context, outlet: Outlet, num_layers: int, local: LocalBatch | None = None) -> None:
        self._context = context
        self._outlet = outlet
        self._num_layers = num_layers
        self._local = local
        self._planner = ChunkedPrefill(context.table, self._begin, local)
        self._sequences: dict[SequenceKey, Sequence] = {}
        self._opening: list[tuple[Sequence, WorkerRef]] = []
        self._outgoing: dict[int, Outgoing] = {}
        self._by_key: dict[SequenceKey, Outgoing] = {}
        self._step: list[tuple[Slice, Outgoing]] = []  # slices of the running step whose KV is to leave
        self._next_id = 0

    # --- messages ---

    def receive(self, item: InboxItem, now: float) -> None:
        match item:
            case FromRouter(router, Submit() as submit):
                self._submit(router, submit, now)
            case FromRouter(router, Cancel(ticket)):
                if sequence := self._sequences.get((router, ticket)):
                    self._end(sequence, "cancelled", "cancelled by the router")
            case RouterGone(router):
                for sequence in [s for s in self._sequences.values() if s.key[0] == router]:
                    self._end(sequence, "router_lost", "the router is gone")
            case FromTarget(target, message):
                outgoing = self._outgoing.get(message.handover_id)
                if outgoing is not None and outgoing.target == target:
                    self._answer(outgoing, message, now)
            case TargetGone(target):
                for outgoing in [o for o in self._outgoing.values() if o.target == target]:
                    # Whether it died is for the router to say, which has a line to it of its own.
                    self._fail(outgoing.sequence, HandoverFailed(f"the line to {target.name} broke"))

    def _submit(self, router: str, submit: Submit, now: float) -> None:
        request, limits = submit.request, self._context.limits
        sequence = Sequence((router, submit.ticket), request, submit.attempt, now, now + request.deadline_s)
        try:
            if not request.tokens or not 0 < request.prompt_len <= len(request.tokens):
                raise InvalidRequest("a request needs at least one prompt token")
            if len(request.tokens) >= limits.max_model_len or not self._context.table.fits(len(request.tokens) + 1):
                raise InvalidRequest(f"{len(request.tokens)} tokens do not fit this worker")
            if submit.decode is None and self._local is None:
                raise HandoverFailed("this worker does not decode, and no decode worker was named")
            if len(self._sequences) >= limits.max_waiting:
                raise PoolFull(f"{limits.max_waiting} requests wait here already")
        except BatonError as error:
            self._context.outbox.failed(sequence.key, error)
            return
        self._sequences[sequence.key] = sequence
        if submit.decode is None:
            self._planner.add(sequence)
        else:
            insort(self._opening, (sequence, submit.decode), key=lambda entry: turn(entry[0]))

    def _answer(self, outgoing: Outgoing, message: Reserved | Refused | Committed | Abort, now: float) -> None:
        match message:
            case Reserved(cached_blocks=cached):
                if outgoing.state.reserved(cached):
                    outgoing.offered = [cached] * self._num_layers
                    self._context.stats.handover_skipped_blocks += cached
                    self._outlet.open(outgoing.id, outgoing.target)
                    self._planner.add(outgoing.sequence)
            case Committed():
                if outgoing.state.committed():
                    self._context.stats.handovers += 1
                    self._context.stats.handover_bytes += self._outlet.bytes_sent(outgoing.id)
                    self._context.stats.handover_seconds += now - outgoing.opened
                    self._context.stats.handover_exposed_seconds += now - outgoing.computed
                    self._context.outbox.handed_over(outgoing.sequence.key)
                    log.info(
                        "handed %d tokens over to %s, %d blocks of them were there; %.0f ms after the first token",
                        *(len(outgoing.sequence.request.tokens), outgoing.target.name, outgoing.state.skip),
                        (now - outgoing.computed) * 1e3,
                        extra=outgoing.sequence.named,
                    )
                    self._forget(outgoing.sequence)
            case Refused(code=code, message=text) | Abort(code=code, message=text):
                self._fail(outgoing.sequence, from_code(code, f"{outgoing.target.name}: {text}"), tell=False)

    # --- rounds ---

    def tick(self, now: float) -> None:
        """Deadlines, answers that are overdue, and handovers that are due to be opened."""
        for sequence in [s for s in self._sequences.values() if now >= s.deadline]:
            self._fail(sequence, DeadlineExceeded("the deadline passed before the first token"))
        for outgoing in self._outgoing.values():
            if outgoing.state.state is State.COMMITTING and outgoing.sent != (
                sent := self._outlet.bytes_sent(outgoing.id)
            ):
                outgoing.sent = sent
                outgoing.state.moving(now)
        for outgoing in [o for o in self._outgoing.values() if o.state.overdue(now)]:
            self._fail(outgoing.sequence, HandoverFailed(f"no answer from {outgoing.target.name} in time"))
        ahead = self._planner.queued_tokens + sum(
            o.sequence.missing for o in self._outgoing.values() if o.state.state is State.RESERVING
        )
        open_to = Counter(o.target for o in self._outgoing.values())
        for entry in list(self._opening):
            if ahead >= LOOKAHEAD_STEPS * self._context.limits.max_batch_tokens:
                break
            sequence, target = entry
            if open_to[target] < self._context.handover.max_sending:  # one more, and it would refuse
                self._opening.remove(entry)
                open_to[target] += 1
                ahead += sequence.missing
                self._reserve(sequence, target, now)

    def _reserve(self, sequence: Sequence, target: WorkerRef, now: float) -> None:
        self._next_id += 1
        patience = self._context.handover.lease_s
        state = SourceHandover(patience, now + patience)
        outgoing = Outgoing(self._next_id, sequence, target, state, now)
        self._outgoing[outgoing.id] = self._by_key[sequence.key] = outgoing
        router, ticket = sequence.key
        message = Reserve(
            outgoing.id, ticket, sequence.attempt, router, sequence.request, self._context.ref, target,
            self._context.fingerprint,
        )  # fmt: skip
        self._context.outbox.to_target(target, message)

    def plan(self, plan: StepPlan, now: float) -> None:
        first = len(plan.slices)
        self._planner.plan(plan)
        self._step = [(part, o) for part in plan.slices[first:] if (o := self._by_key.get(part.sequence.key))]

    def _begin(self, sequence: Sequence) -> None:
        self._context.outbox.started(sequence.key, sequence.cached)
        self._context.stats.prompt_tokens += len(sequence.tokens)
        self._context.stats.cached_tokens += sequence.cached

    def on_layer(self, layer: int) -> None:
        """This layer's KV of the running step is in the pool: offer what is final, while later layers compute. The
        last, partial block goes with the last chunk; all others as soon as they are full."""
        size = self._context.table.block_size
        for part, outgoing in self._step:
            ready = self._context.table.blocks_for(part.end) if part.samples else part.end // size
            first = outgoing.offered[layer]
            if ready > first:
                blocks = tuple(part.sequence.blocks[first:ready])
                self._outlet.offer(Offer(outgoing.id, part.sequence.attempt, layer, first, blocks))
                outgoing.offered[layer] = ready

    def computed(self, part: Slice, sampled: Sampled | None, now: float) -> None:
        sequence = part.sequence
        if sampled is None:
            return
        self._planner.remove(sequence)
        outgoing = self._by_key.get(sequence.key)
        reason = self._context.accept(sequence, sampled)
        if reason is not None or outgoing is None:
            self._context.emit(sequence, sampled)
        if reason is not None:
            self._context.outbox.finished(sequence.key, reason)
            self._end(sequence, "finished", "the request ended with its first token")
        elif outgoing is not None:
            outgoing.state.commit(now)
            outgoing.computed = now
            first = TokenOut(sequence.key[1], len(sequence.tokens) - 1, sampled.token, sampled.logprob)
            self._context.outbox.to_target(outgoing.target, Commit(outgoing.id, first, sequence.deadline - now))
        else:
            del self._sequences[sequence.key]
            assert self._local is not None
            self._local.join(sequence)

    def failed(self, part: Slice, error: BatonError) -> None:
        self._fail(part.sequence, error)

    # --- ends ---

    def _fail(self, sequence: Sequence, error: BatonError, tell: bool = True) -> None:
        """Tell the router; `tell`: the target too (it does not know yet)."""
        level = logging.DEBUG if isinstance(error, PoolFull) else logging.WARNING  # a full pool is no news
        log.log(level, "failed here: %s (%s)", error, error.code, extra=sequence.named)
        self._context.outbox.failed(sequence.key, error)
        self._end(sequence, error.code, error.message, tell)

    def _end(self, sequence: Sequence, code: str, message: str, tell: bool = True) -> None:
        """Stop whatever is under way for a sequence, and free its blocks."""
        outgoing = self._by_key.get(sequence.key)
        if outgoing is not None and outgoing.state.abort():
            if code != "finished":
                self._context.stats.aborted(code)
            if tell:
                self._context.outbox.to_target(outgoing.target, Abort(outgoing.id, code, message))
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        outgoing = self._by_key.pop(sequence.key, None)
        if outgoing is not None:
            self._outlet.close(outgoing.id)  # from here on nobody reads the blocks
            del self._outgoing[outgoing.id]
        self._opening = [entry for entry in self._opening if entry[0] is not sequence]
        self._planner.remove(sequence)
        self._sequences.pop(sequence.key, None)
        self._context.table.drop(sequence)

    # --- numbers ---

    def sequences(self) -> Iterable[Sequence]:
        return self._sequences.values()

    @property
    def waiting(self) -> int:
        return len(self._sequences) - len(self._planner.computing)

    @property
    def running(self) -> int:
        return len(self._planner.computing)

    @property
    def queued_tokens(self) -> int:
        return sum(max(0, len(s.request.tokens) - s.computed) for s in self._sequences.values())

    @property
    def handovers(self) -> int:
        return len(self._outgoing)

    @property
    def reserved_blocks(self) -> int:
        return 0
