"""Requests that leave one decode worker for another while they run: nothing is computed again, no token is lost.

    start ──Reserve──▶ asked ──Reserved──▶ following ──caught up──▶ paused, Commit ──Committed──▶ gone

While blocks travel the request goes on decoding here, and what fills up meanwhile follows. Once nothing is under way
it pauses. When the step that was launched before has ended, its last, partial block and the tokens drawn since
`Reserve` go with the commit. So the pause is one small transfer, unless the context takes longer to travel than half
the room that the target keeps for new tokens lasts: then it waits for the rest. The room grows with the context
(`headroom`), as the time does that it takes to travel. (Live migration of requests is Llumnix's, OSDI '24.)

Until the commit is out, whatever goes wrong ends the move and not the request, which stays. After that only the target
knows whether it has it: an answer that does not come makes it the router's case, as with any handover.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from ..common.config import HandoverConfig
from ..common.errors import BatonError, CorruptBlock, HandoverFailed, TransportFailed, from_code
from ..common.messages import (
    Abort,
    Committed,
    Endpoint,
    Refused,
    Reserve,
    Reserved,
    TargetMessage,
    TokenOut,
    TransportBroken,
)
from ..common.types import WorkerRef
from ..engine.plan import Results
from ..engine.role import Context
from ..engine.sequence import Sequence
from ..kvtransfer.sender import Outgoing, Sender
from ..kvtransfer.session import State
from ..kvtransfer.transport import Outlet
from .planner import ContinuousBatching

log = logging.getLogger(__name__)

SHARE = 16
"""A request that moves has room for a 16th of what it has. While it travels at 0.3 GB/s and 128 KiB a token, it draws
about a 46th, in steps of 20 ms."""


def headroom(config: HandoverConfig, running: int) -> int:
    """Tokens for which a reservation has room beside what a request has: `running` of them if it runs already, or 0.
    Both ends of a move count on it, with the same configuration."""
    return max(config.headroom_tokens, running // SHARE)


class Moves:
    """`gone` is called with a sequence that another worker has taken; `lost` with one of which nobody here knows who
    has it."""

    def __init__(
        self, context: Context, planner: ContinuousBatching, outlet: Outlet,
        gone: Callable[[Sequence], None], lost: Callable[[Sequence, BatonError], None],
    ) -> None:  # fmt: skip
        self._context = context
        self._planner = planner
        self._outlet = outlet
        self._gone = gone
        self._lost = lost
        self._sender: Sender[Sequence] = Sender(
            outlet, context.handover, context.table.block_size, context.outbox.to_target, context.handover_ids
        )
        self._drawn: dict[int, list[TokenOut]] = {}  # tokens since Reserve, by handover

    def __len__(self) -> int:
        return len(self._sender)

    # --- what the role tells ---

    def start(self, sequence: Sequence, target: WorkerRef, now: float) -> None:
        """Begin to move a running sequence. Does nothing if it is on its way already."""
        if self._sender.of(sequence) is not None:
            return
        router, ticket = sequence.key
        request = replace(sequence.request, tokens=tuple(sequence.tokens), deadline_s=sequence.deadline - now)

        def question(handover_id: int, avoid: tuple[str, ...]) -> Reserve:
            return Reserve(handover_id, ticket, sequence.attempt, router, request, target, avoid=avoid)

        outgoing = self._sender.reserve(sequence, target, now, question)
        self._drawn[outgoing.id] = []

    def drew(self, sequences: list[Sequence], results: Results) -> None:
        """These have one more token each, where they drew one."""
        if not self._drawn:
            return
        for sequence, sampled in zip(sequences, results, strict=True):
            if sampled is not None and (outgoing := self._sender.of(sequence)):
                token = TokenOut(sequence.key[1], len(sequence.tokens) - 1, sampled.token, sampled.logprob)
                self._drawn[outgoing.id].append(token)

    def interrupt(self, sequence: Sequence, code: str, message: str) -> None:
        """The sequence has ended here, and so has its move. No error if it is not on its way."""
        if outgoing := self._sender.of(sequence):
            self._sender.abort(outgoing, code, message, tell=True)
            self._end(outgoing)

    def preempted(self, sequence: Sequence) -> None:
        """The sequence has lost its blocks and stays. No error if it is not on its way."""
        if outgoing := self._sender.of(sequence):
            self._stay(outgoing, HandoverFailed("its blocks were needed"), tell=True)

    # --- what others tell ---

    def answer(self, target: Endpoint, message: TargetMessage, now: float) -> None:
        outgoing = self._sender.answered(target, message.handover_id)
        if outgoing is None:
            return
        match message:
            case Reserved(cached_blocks=cached):
                if self._sender.reserved(outgoing, target, message):
                    self._context.stats.handover_skipped_blocks += cached
            case Committed():
                if outgoing.state.committed():
                    self._moved(outgoing, now)
            case Refused(code=code, message=text) | Abort(code=code, message=text):
                error = from_code(code, f"{outgoing.target.name}: {text}")
                if isinstance(error, TransportFailed):
                    self._outlet.forgive(outgoing.target)
                self._stay(outgoing, error, tell=False)  # the target says that it has it not
                if isinstance(error, CorruptBlock):
                    self._planner.recompute(outgoing.subject)

    def target_gone(self, target: WorkerRef) -> None:
        self._outlet.forgive(target)
        for outgoing in self._sender.to(target):
            self._give_up(outgoing, HandoverFailed(f"the line to {target.name} broke"))

    def transport_broken(self, event: TransportBroken) -> None:
        for outgoing in self._sender.broken(event):
            self._give_up(outgoing, TransportFailed(f"{event.transport} to {event.target.name} broke"))

    # --- rounds ---

    def tick(self, now: float) -> None:
        """Offer what has filled up, and commit what has caught up."""
        if not self._drawn:
            return
        for outgoing in self._sender.overdue(now):
            self._give_up(outgoing, HandoverFailed(f"no answer from {outgoing.target.name} in time"))
        for outgoing in self._sender.all():
            sequence = outgoing.subject
            if outgoing.state.state is not State.SENDING:
                continue
            if sequence.computed != len(sequence.tokens) - 1:
                continue  # it was preempted before, and its KV is computed again just now
            if offer := self._sender.ready(outgoing, sequence.computed, last=False):
                self._outlet.offer(offer)
            elif self._outlet.pending(outgoing.id) == 0 or self._far_ahead(outgoing):
                self._planner.pause(sequence)
            if self._planner.paused(sequence) and not sequence.in_flight:
                self._commit(outgoing, now)

    def _far_ahead(self, outgoing: Outgoing[Sequence]) -> bool:
        """The target reserved room for so many tokens more: do not outrun it."""
        drawn = len(self._drawn[outgoing.id])
        return 2 * drawn >= headroom(self._context.handover, len(outgoing.subject.tokens) - drawn)

    def _commit(self, outgoing: Outgoing[Sequence], now: float) -> None:
        sequence = outgoing.subject
        if offer := self._sender.ready(outgoing, sequence.computed, last=True):
            self._outlet.offer(offer)
        self._sender.commit(outgoing, tuple(self._drawn[outgoing.id]), sequence.deadline - now, now)

    # --- ends ---

    def _moved(self, outgoing: Outgoing[Sequence], now: float) -> None:
        sequence, stats = outgoing.subject, self._context.stats
        stats.moves += 1
        self._context.outbox.handed_over(sequence.key)
        log.info(
            "moved at %d tokens to %s by %s; paused for %.0f ms",
            *(len(sequence.tokens), outgoing.target.name, outgoing.transport, (now - outgoing.computed) * 1e3),
            extra=sequence.named,
        )
        self._end(outgoing)
        self._gone(sequence)

    def _give_up(self, outgoing: Outgoing[Sequence], error: BatonError) -> None:
        """The target does not answer any more. Once the commit is out it may have the request."""
        if outgoing.state.state is State.COMMITTING:
            self._sender.abort(outgoing, error.code, error.message, tell=True)
            self._end(outgoing)
            self._lost(outgoing.subject, error)
        else:
            self._stay(outgoing, error, tell=True)

    def _stay(self, outgoing: Outgoing[Sequence], error: BatonError, tell: bool) -> None:
        self._sender.abort(outgoing, error.code, error.message, tell)
        self._context.stats.aborted(error.code)
        self._end(outgoing)
        self._planner.resume(outgoing.subject)
        self._context.outbox.stayed(outgoing.subject.key, error)
        log.info("stays here: %s (%s)", error, error.code, extra=outgoing.subject.named)

    def _end(self, outgoing: Outgoing[Sequence]) -> None:
        self._context.stats.handover_bytes += self._sender.end(outgoing)
        del self._drawn[outgoing.id]
