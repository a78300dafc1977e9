"""Handovers that come in: reserved for, received, committed, or given up. Every worker has one intake, whatever its
role; what becomes of a request that has been taken is its host's business.

    Reserve ──▶ open (blocks reserved, inlet open) ──Commit and all bytes──▶ host.take
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
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
    from_code,
)
from ..common.messages import (
    Abort,
    Cancel,
    Commit,
    Committed,
    Endpoint,
    Filled,
    HandoverKey,
    Purpose,
    Refused,
    Renew,
    Reserve,
    Reserved,
    SourceMessage,
    Spoiled,
)
from ..common.types import WorkerRef
from ..engine.mailbox import FromRouter, FromSource, InboxItem, RouterGone, SourceGone
from ..engine.role import Computeless, Context, Host
from ..engine.sequence import Sequence, SequenceKey
from ..kvtransfer.choose import choose
from ..kvtransfer.layout import routes
from ..kvtransfer.session import State, TargetHandover
from ..kvtransfer.transport import Inlet

log = logging.getLogger(__name__)

REMEMBERED = 4096
"""Handovers that are remembered when they are over, so that what comes twice or late finds no second life, and a commit
that comes twice gets its answer twice."""


@dataclass(eq=False, slots=True)
class Incoming:
    """One handover, seen from its target."""

    key: HandoverKey
    source: WorkerRef
    sequence: Sequence
    purpose: Purpose
    state: TargetHandover

    @property
    def kv_tokens(self) -> int:
        """Once the commit is here: tokens whose KV the source has. Of a request that goes on, the last one's is still
        to be computed."""
        assert self.state.pending is not None
        known = len(self.sequence.tokens) + len(self.state.pending.tokens)
        return known - 1 if self.purpose is Purpose.DECODE else known


class Intake(Computeless):
    """`hosts` says who takes requests of each purpose here; one without a host is refused."""

    def __init__(self, context: Context, inlet: Inlet, hosts: Mapping[Purpose, Host]) -> None:
        self._context = context
        self._inlet = inlet
        self._hosts = hosts
        self._incoming: dict[HandoverKey, Incoming] = {}
        self._over: dict[HandoverKey, State] = {}

    # --- messages ---

    def receive(self, item: InboxItem, now: float) -> None:
        match item:
            case FromRouter(router, Cancel(ticket)):
                self._cancel((router, ticket), "cancelled", "cancelled by the router")
            case RouterGone(router):
                for key in [i.sequence.key for i in self._incoming.values() if i.sequence.key[0] == router]:
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
            case Spoiled(key, text, code):
                if spoiled := self._incoming.get(key):
                    self._abort(spoiled, from_code(code, text))

    def _from_source(self, source: Endpoint, message: SourceMessage, now: float) -> None:
        name, epoch = source.ref.name, source.ref.epoch
        if isinstance(message, Renew):
            for handover_id in message.handover_ids:
                if incoming := self._incoming.get((name, epoch, handover_id)):
                    incoming.state.alive(now)
            return
        key = (name, epoch, message.handover_id)
        if isinstance(message, Reserve):
            if key not in self._incoming and key not in self._over:
                self._reserve(key, source, message, now)
        elif incoming := self._incoming.get(key):
            if isinstance(message, Abort):
                self._abort(incoming, HandoverFailed(message.message), tell=False, code=message.code)
            elif incoming.state.commit(message):
                self._expect(incoming, message)
        elif isinstance(message, Commit):
            self._late_commit(key, source.ref, message)

    def _late_commit(self, key: HandoverKey, source: WorkerRef, message: Commit) -> None:
        """A commit for what is not open here: done already, or given up."""
        if self._over.get(key) is State.COMMITTED:
            self._context.outbox.to_source(source, Committed(message.handover_id))
        else:
            error = StaleAttempt("no such reservation is open (any more)")
            self._context.outbox.to_source(source, Abort(message.handover_id, error.code, error.message))

    def _expect(self, incoming: Incoming, commit: Commit) -> None:
        """All is announced. A commit that does not follow from what was reserved for ends the handover."""
        known, tokens, limits = len(incoming.sequence.tokens), commit.tokens, self._context.limits
        if [t.position for t in tokens] != list(range(known, known + len(tokens))):
            self._abort(incoming, HandoverFailed(f"the commit's tokens do not follow the {known} that are known"))
        elif known + len(tokens) > limits.max_model_len:
            self._abort(incoming, HandoverFailed(f"{known + len(tokens)} tokens do not fit this worker"))
        elif any(t.token >= limits.vocab_size for t in tokens):
            self._abort(incoming, HandoverFailed(f"a token that is none of the model's {limits.vocab_size}"))
        else:
            self._inlet.expect(incoming.key, self._context.table.blocks_for(incoming.kv_tokens))

    def _reserve(self, key: HandoverKey, source: Endpoint, message: Reserve, now: float) -> None:
        """Blocks, the cached prefix among them pinned; or no, at once."""
        request, table = message.request, self._context.table
        name, deadline = (message.router, message.ticket), now + request.deadline_s
        limits = self._context.limits
        sequence = Sequence(
            name, request, message.attempt, now, deadline, max_model_len=limits.max_model_len, eos_ids=limits.eos_ids
        )
        try:
            self._check(source, message, sequence)
            transport = choose(source, self._context.endpoint, self._context.handover.transport, message.avoid)
            self._hosts[message.purpose].admit(sequence)
        except BatonError as error:
            self._context.outbox.to_source(source.ref, Refused(message.handover_id, error.code, error.message))
            return
        lease = self._context.handover.lease_s
        self._incoming[key] = Incoming(key, source.ref, sequence, message.purpose, TargetHandover(lease, now + lease))
        cached = sequence.computed // table.block_size
        self._inlet.open(key, message.attempt, source.format, cached, sequence.blocks[cached:])
        self._context.outbox.to_source(source.ref, Reserved(message.handover_id, cached, transport))

    def _check(self, source: Endpoint, message: Reserve, sequence: Sequence) -> None:
        """Raises what speaks against this handover, whoever is its host."""
        context, request = self._context, message.request
        if message.target != context.ref:
            raise StaleEpoch(f"meant for another incarnation of {message.target.name}")
        if source.fingerprint != context.endpoint.fingerprint:
            raise FingerprintMismatch("weights or numeric choices differ")
        routes(source.format, context.endpoint.format)  # raises where they hold the KV of different models
        if message.purpose not in self._hosts:
            raise HandoverFailed(f"this worker takes no request to {message.purpose.value}")
        if message.router not in context.outbox.routers:
            raise HandoverFailed(f"router {message.router} has no stream to this worker")
        if self.holds(sequence.key):
            raise StaleAttempt("this attempt is here already")
        if not context.table.fits(len(request.tokens) + 1):
            raise PoolFull(f"{len(request.tokens)} tokens are more than this worker's whole pool")
        if not request.tokens or len(request.tokens) >= context.limits.max_model_len:
            raise InvalidRequest(f"{len(request.tokens)} tokens do not fit this worker")
        request.validate(context.limits.vocab_size)
        if message.purpose is Purpose.CACHE and source.format.dtype != context.endpoint.format.dtype:
            raise HandoverFailed("KV of another type would make answers depend on what is cached")
        if len(self._incoming) >= context.handover.max_sending:
            raise PoolFull(f"{len(self._incoming)} handovers are coming in already")

    # --- ends ---

    def _conclude(self, incoming: Incoming, now: float) -> None:
        commit = incoming.state.conclude()
        if commit is None:
            return
        sequence, here = incoming.sequence, incoming.kv_tokens
        self._close(incoming)
        sequence.tokens += [token.token for token in commit.tokens]
        self._context.table.advance(sequence, here - sequence.computed)
        sequence.deadline = now + commit.deadline_s
        self._context.outbox.to_source(incoming.source, Committed(commit.handover_id))
        self._hosts[incoming.purpose].take(sequence, commit.tokens)

    def _close(self, incoming: Incoming) -> None:
        self._inlet.close(incoming.key)  # from here on nobody writes the blocks
        del self._incoming[incoming.key]
        self._over[incoming.key] = incoming.state.state
        if len(self._over) > REMEMBERED:
            del self._over[next(iter(self._over))]

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

    def _cancel(self, key: SequenceKey, code: str, message: str) -> None:
        for incoming in [i for i in self._incoming.values() if i.sequence.key == key]:
            self._abort(incoming, HandoverFailed(message), code=code)

    # --- rounds ---

    def tick(self, now: float) -> None:
        """Leases and deadlines."""
        for incoming in list(self._incoming.values()):
            if (touched := self._inlet.touched(incoming.key)) is not None:
                incoming.state.fed(touched)
            if incoming.state.expired(now):
                self._abort(incoming, HandoverFailed("the lease ran out"))
            elif now >= incoming.sequence.deadline:  # a source that hangs in a step still renews
                self._abort(incoming, DeadlineExceeded("the deadline passed before the handover was done"))

    # --- numbers ---

    def holds(self, key: SequenceKey) -> bool:
        """Whether a handover of this attempt is coming in."""
        return any(i.sequence.key == key for i in self._incoming.values())

    def coming(self, purpose: Purpose) -> int:
        """Handovers of this purpose that are open."""
        return sum(i.purpose is purpose for i in self._incoming.values())

    def sequences(self) -> Iterable[Sequence]:
        return [i.sequence for i in self._incoming.values()]

    @property
    def handovers(self) -> int:
        return len(self._incoming)

    @property
    def reserved_blocks(self) -> int:
        return sum(len(i.sequence.blocks) for i in self._incoming.values())
