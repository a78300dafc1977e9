"""Cached KV that goes from one worker's prefix cache to another's: an answer's, say, that prefill never saw.

The handover is the usual one; but nobody waits for it, and nothing goes on with the tokens. What goes wrong is given
up: a cache that lacks something computes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from ..common.errors import CorruptBlock, PoolFull
from ..common.messages import Abort, Committed, Purpose, Refused, Reserve, Reserved, Share, TokenOut, TransportBroken
from ..engine.mailbox import FromRouter, FromTarget, InboxItem, RouterGone, TargetGone
from ..engine.role import Computeless, Context
from ..engine.sequence import Sequence
from ..kvtransfer.sender import Outgoing, Sender
from ..kvtransfer.transport import Outlet

log = logging.getLogger(__name__)


class CacheHost:
    """Implements `engine.role.Host`: what is taken stays in the prefix cache, and is otherwise forgotten."""

    def __init__(self, context: Context) -> None:
        self._table = context.table

    def admit(self, sequence: Sequence) -> None:
        if not self._table.admit(sequence, len(sequence.tokens), len(sequence.tokens)):
            raise PoolFull(f"no room to keep {len(sequence.tokens)} tokens")

    def take(self, sequence: Sequence, tokens: tuple[TokenOut, ...]) -> None:
        self._table.drop(sequence)


class Sharing(Computeless):
    """The giving side."""

    def __init__(self, context: Context, outlet: Outlet) -> None:
        self._context = context
        self._outlet = outlet
        self._sender: Sender[Sequence] = Sender(
            outlet, context.handover, context.table.block_size, context.outbox.to_target, context.handover_ids
        )

    def receive(self, item: InboxItem, now: float) -> None:
        match item:
            case FromRouter(router, Share() as share):
                self._share(router, share, now)
            case RouterGone(router):
                self._give_up([o for o in self._sender.all() if o.subject.key[0] == router], "the router is gone")
            case FromTarget(target, message):
                if (outgoing := self._sender.answered(target, message.handover_id)) is None:
                    return
                match message:
                    case Reserved():
                        if self._sender.reserved(outgoing, target, message):
                            self._give(outgoing, now)
                    case Committed():
                        if outgoing.state.committed():
                            self._context.stats.shared_tokens += len(outgoing.subject.tokens)
                            self._end(outgoing)
                    case Refused() | Abort():
                        log.debug("%s does not keep it: %s", outgoing.target.name, message.message)
                        if message.code == CorruptBlock.code:
                            self._context.table.manager.disown(outgoing.subject.blocks)
                        self._sender.abort(outgoing, message.code, message.message, tell=False)
                        self._end(outgoing)
            case TargetGone(target):
                self._outlet.forgive(target)
                self._give_up(self._sender.to(target), "the line broke")
            case TransportBroken():
                self._give_up(self._sender.broken(item), "the transport broke")

    def _share(self, router: str, share: Share, now: float) -> None:
        """Pin what is cached of the tokens and ask the target. More at a time than it would take in are let go."""
        table, request = self._context.table, share.request
        if len(self._sender.to(share.target)) >= self._context.handover.max_sending:
            return
        whole = Sequence((router, share.ticket), request, 0, now, now + request.deadline_s)
        count = len(table.cached_prefix(whole, len(request.tokens))) * table.block_size
        if count == 0:
            return
        kept = replace(request, tokens=request.tokens[:count], prompt_len=min(request.prompt_len, count))
        sequence = Sequence(whole.key, kept, 0, now, whole.deadline)
        if not table.admit(sequence, count, count):
            return

        def question(handover_id: int, avoid: tuple[str, ...]) -> Reserve:
            return Reserve(handover_id, share.ticket, 0, router, kept, share.target, Purpose.CACHE, avoid)

        self._sender.reserve(sequence, share.target, now, question)

    def _give(self, outgoing: Outgoing[Sequence], now: float) -> None:
        sequence = outgoing.subject
        if offer := self._sender.ready(outgoing, len(sequence.tokens), last=True):
            self._outlet.offer(offer)
        self._sender.commit(outgoing, (), sequence.deadline - now, now)

    def tick(self, now: float) -> None:
        self._give_up(self._sender.overdue(now), "no answer in time")
        self._give_up([o for o in self._sender.all() if now >= o.subject.deadline], "the deadline passed")

    def _give_up(self, those: Iterable[Outgoing[Sequence]], why: str) -> None:
        for outgoing in list(those):
            self._sender.abort(outgoing, "handover_failed", why, tell=True)
            self._end(outgoing)

    def _end(self, outgoing: Outgoing[Sequence]) -> None:
        self._context.stats.handover_bytes += self._sender.end(outgoing)
        self._context.table.drop(outgoing.subject)

    def sequences(self) -> Iterable[Sequence]:
        return [o.subject for o in self._sender.all()]

    @property
    def handovers(self) -> int:
        return len(self._sender)
