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

from ..common.errors import (
    BatonError,
    CorruptBlock,
    DeadlineExceeded,
    HandoverFailed,
    InvalidRequest,
    PoolFull,
    TransportFailed,
    from_code,
)
from ..common.messages import (
    Abort,
    Cancel,
    Committed,
    Endpoint,
    Refused,
    Reserve,
    Reserved,
    Submit,
    TargetMessage,
    TokenOut,
    TransportBroken,
)
from ..common.types import WorkerRef
from ..engine.mailbox import FromRouter, FromTarget, InboxItem, RouterGone, TargetGone
from ..engine.plan import Results, Sampled, StepPlan
from ..engine.role import Context, LocalBatch
from ..engine.sequence import Sequence, SequenceKey
from ..kvtransfer.sender import Outgoing, Sender
from ..kvtransfer.session import State
from ..kvtransfer.transport import Outlet
from .planner import ChunkedPrefill, turn

LOOKAHEAD_STEPS = 2
"""Handovers are opened for as many waiting tokens as this many steps compute: early enough that the decode worker's
answer is here when the turn comes, late enough that its memory is not held for a long queue."""


log = logging.getLogger(__name__)


class PrefillRole:
    """`local` takes the sequences that this worker decodes itself; None: it decodes none."""

    def __init__(self, context: Context, outlet: Outlet, local: LocalBatch | None = None) -> None:
        self._context = context
        self._outlet = outlet
        self._local = local
        self._planner = ChunkedPrefill(context.table, self._begin, context.limits.max_running, local)
        self._sequences: dict[SequenceKey, Sequence] = {}
        self._opening: list[tuple[Sequence, WorkerRef]] = []
        self._sender: Sender[Sequence] = Sender(
            outlet, context.handover, context.table.block_size, context.outbox.to_target, context.handover_ids
        )

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
                if outgoing := self._sender.answered(target, message.handover_id):
                    self._answer(outgoing, target, message, now)
            case TargetGone(target):
                self._outlet.forgive(target)
                for outgoing in self._sender.to(target):
                    # Whether it died is for the router to say, which has a line to it of its own.
                    self._fail(outgoing.subject, HandoverFailed(f"the line to {target.name} broke"))
            case TransportBroken():
                for outgoing in self._sender.broken(item):
                    self._fail(outgoing.subject, TransportFailed(f"{item.transport} to {item.target.name} broke"))

    def _submit(self, router: str, submit: Submit, now: float) -> None:
        request, limits = submit.request, self._context.limits
        key, deadline = (router, submit.ticket), now + request.deadline_s
        sequence = Sequence(
            key, request, submit.attempt, now, deadline, max_model_len=limits.max_model_len, eos_ids=limits.eos_ids
        )
        try:
            if not request.tokens or not 0 < request.prompt_len <= len(request.tokens):
                raise InvalidRequest("a request needs at least one prompt token")
            if len(request.tokens) >= limits.max_model_len or not self._context.table.fits(len(request.tokens) + 1):
                raise InvalidRequest(f"{len(request.tokens)} tokens do not fit this worker")
            request.validate(limits.vocab_size)
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

    def _answer(self, outgoing: Outgoing[Sequence], target: Endpoint, message: TargetMessage, now: float) -> None:
        match message:
            case Reserved(cached_blocks=cached):
                if self._sender.reserved(outgoing, target, message):
                    self._context.stats.handover_skipped_blocks += cached
                    self._planner.add(outgoing.subject)
            case Committed():
                if outgoing.state.committed():
                    self._handed_over(outgoing, now)
            case Refused(code=code, message=text) | Abort(code=code, message=text):
                error = from_code(code, f"{outgoing.target.name}: {text}")
                if isinstance(error, CorruptBlock):
                    self._context.table.manager.disown(outgoing.subject.blocks)
                if isinstance(error, TransportFailed):
                    self._outlet.forgive(outgoing.target)  # all have failed: begin again with the best
                self._fail(outgoing.subject, error, tell=False)

    def _handed_over(self, outgoing: Outgoing[Sequence], now: float) -> None:
        sequence, stats = outgoing.subject, self._context.stats
        stats.handovers += 1
        stats.handover_seconds += now - outgoing.opened
        stats.handover_exposed_seconds += now - outgoing.computed
        self._context.outbox.handed_over(sequence.key, now - outgoing.computed)
        log.info(
            "handed %d tokens over to %s by %s, %d blocks of them were there; %.0f ms after the first token",
            *(len(sequence.request.tokens), outgoing.target.name, outgoing.transport, outgoing.state.skip),
            (now - outgoing.computed) * 1e3,
            extra=sequence.named,
        )
        self._forget(sequence)

    # --- rounds ---

    def tick(self, now: float) -> None:
        """Deadlines, answers that are overdue, and handovers that are due to be opened."""
        if not self._sequences:
            return
        for sequence in [s for s in self._sequences.values() if now >= s.deadline]:
            self._fail(sequence, DeadlineExceeded("the deadline passed before the first token"))
        for outgoing in self._sender.overdue(now):
            self._fail(outgoing.subject, HandoverFailed(f"no answer from {outgoing.target.name} in time"))
        ahead = self._planner.queued_tokens + sum(
            o.subject.missing for o in self._sender.all() if o.state.state is State.RESERVING
        )
        open_to = Counter(o.target for o in self._sender.all())
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
        router, ticket = sequence.key

        def question(handover_id: int, avoid: tuple[str, ...]) -> Reserve:
            return Reserve(handover_id, ticket, sequence.attempt, router, sequence.request, target, avoid=avoid)

        self._sender.reserve(sequence, target, now, question)

    def plan(self, plan: StepPlan, now: float) -> None:
        """What a step computes is staged with it: whole blocks as soon as they are full, the last, partial one with the
        last chunk."""
        first = len(plan.slices)
        self._planner.plan(plan)
        offers = [
            self._sender.ready(outgoing, part.end, part.samples)
            for part in plan.slices[first:]
            if (outgoing := self._sender.of(part.sequence))
        ]
        self._outlet.stage([offer for offer in offers if offer is not None])

    def _begin(self, sequence: Sequence) -> None:
        self._context.outbox.started(sequence.key, sequence.cached)
        self._context.stats.prompt_tokens += len(sequence.tokens)
        self._context.stats.cached_tokens += sequence.cached

    def on_layer(self, layer: int) -> None:
        """This layer's KV of the running step is in the pool: it leaves while later layers compute."""
        self._outlet.layer(layer)

    def computed(self, sequences: list[Sequence], results: Results, now: float) -> None:
        self._context.stats.output_tokens += len(results.drawn)
        for sequence, sampled in zip(sequences, results, strict=True):
            if sampled is not None:
                self._drew(sequence, sampled, now)

    def _drew(self, sequence: Sequence, sampled: Sampled, now: float) -> None:
        """A prompt is computed, and this is the first token after it."""
        self._planner.remove(sequence)
        outgoing, position = self._sender.of(sequence), len(sequence.tokens)
        reason = sequence.accept(sampled.token)
        if reason is not None or outgoing is None:
            self._context.outbox.token(sequence.key, position, sampled.token, sampled.logprob)
        if reason is not None:
            self._context.outbox.finished(sequence.key, reason)
            self._end(sequence, "finished", "the request ended with its first token")
        elif outgoing is not None:
            first = TokenOut(sequence.key[1], position, sampled.token, sampled.logprob)
            self._sender.commit(outgoing, (first,), sequence.deadline - now, now)
        else:
            del self._sequences[sequence.key]
            assert self._local is not None
            self._local.join(sequence)

    def failed(self, sequence: Sequence, error: BatonError) -> None:
        self._fail(sequence, error)

    # --- ends ---

    def _fail(self, sequence: Sequence, error: BatonError, tell: bool = True) -> None:
        """Tell the router; `tell`: the target too (it does not know yet)."""
        level = logging.DEBUG if isinstance(error, PoolFull) else logging.WARNING  # a full pool is no news
        log.log(level, "failed here: %s (%s)", error, error.code, extra=sequence.named)
        self._context.outbox.failed(sequence.key, error)
        self._end(sequence, error.code, error.message, tell)

    def _end(self, sequence: Sequence, code: str, message: str, tell: bool = True) -> None:
        """Stop whatever is under way for a sequence, and free its blocks."""
        outgoing = self._sender.of(sequence)
        if outgoing is not None and self._sender.abort(outgoing, code, message, tell) and code != "finished":
            self._context.stats.aborted(code)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        if outgoing := self._sender.of(sequence):
            self._context.stats.handover_bytes += self._sender.end(outgoing)  # from here on nobody reads the blocks
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
        return len(self._sender)

    @property
    def reserved_blocks(self) -> int:
        return 0
