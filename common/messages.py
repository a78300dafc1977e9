"""The messages between processes, as our own types. `protos/convert.py` puts them on the wire and takes them off.

Router and worker share one stream; `ticket` names one attempt of one request on it, chosen by the router and never
used twice, so that what an abandoned attempt still says is recognised and dropped. Prefill and decode share another;
`handover_id` names one handover of one incarnation of the source.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import HandoverFailed
from .hashing import BlockHash
from .kv_format import KvFormat
from .types import FinishReason, Request, TokenLogprob, WorkerRef

# --- router → worker ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message on the stream: who calls, and which incarnation of the worker it means (0: any)."""

    router: str
    router_epoch: int
    worker_epoch: int


@dataclass(frozen=True, slots=True)
class Submit:
    """Run this request. `decode` is the worker to hand it to; None: this worker decodes it itself."""

    ticket: int
    attempt: int
    request: Request
    decode: WorkerRef | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget this ticket and free its blocks; a ticket that is not known (any more) is no error."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Resync:
    """The router missed a KV event: send the whole set of cached hashes."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Sent while nothing else is; silence longer than the lease means that the peer is gone."""


@dataclass(frozen=True, slots=True)
class Move:
    """Hand this running request over to `target` and go on with the others; it is answered by `HandedOver` or `Stayed`,
    unless the request ends before."""

    ticket: int
    target: WorkerRef


@dataclass(frozen=True, slots=True)
class Share:
    """Hand what is cached of this request's tokens to `target`, for its prefix cache. It is not answered: a cache that
    lacks something computes it."""

    ticket: int
    request: Request
    target: WorkerRef


RouterMessage = Submit | Cancel | Move | Share | Resync | Ping

# --- worker → router ------------------------------------------------------------------------------------------------


class TokenOut(NamedTuple):
    """One output token at an absolute position. (A router makes thousands a second: a frozen dataclass takes five times
    as long to make.)"""

    ticket: int
    position: int
    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """Output tokens in columns, as they travel: a step of 256 requests makes no object for each of them on its way to
    the router. Entry i of each column is token i; `logprobs` has those that were asked for, by index. Iterating makes
    the `TokenOut`s."""

    tickets: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens: Iterable[TokenOut]) -> Tokens:
        columns = cls()
        for token in tokens:
            columns.add(token.ticket, token.position, token.token, token.logprob)
        return columns

    def add(self, ticket: int, position: int, token: int, logprob: TokenLogprob | None = None) -> None:
        if logprob is not None:
            self.logprobs[len(self.tickets)] = logprob
        self.tickets.append(ticket)
        self.positions.append(position)
        self.tokens.append(token)

    def extend(
        self, tickets: Iterable[int], positions: Iterable[int], tokens: Iterable[int],
        logprobs: Mapping[int, TokenLogprob],
    ) -> None:  # fmt: skip
        """Add columns; `logprobs` by index in these."""
        first = len(self.tickets)
        self.logprobs.update({first + index: logprob for index, logprob in logprobs.items()})
        self.tickets.extend(tickets)
        self.positions.extend(positions)
        self.tokens.extend(tokens)

    def __len__(self) -> int:
        return len(self.tickets)

    def __iter__(self) -> Iterator[TokenOut]:
        if not self.logprobs:
            return map(TokenOut, self.tickets, self.positions, self.tokens)
        logprobs = map(self.logprobs.get, range(len(self.tickets)))
        return map(TokenOut, self.tickets, self.positions, self.tokens, logprobs)


@dataclass(frozen=True, slots=True)
class Started:
    """Prefill began to compute the request; `cached_tokens` of it were found in the prefix cache."""

    ticket: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The target acknowledged the commit: from here on it alone holds the request. `exposed_s`: seconds from the last
    token that was computed here to the acknowledgement, the part of the handover that does not hide behind compute."""

    ticket: int
    exposed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Stayed:
    """A `Move` came to nothing; the request goes on where it is."""

    ticket: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last word on a ticket that ended well."""

    ticket: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Failed:
    """The last word on a ticket that did not; `code` as in `common.errors`."""

    ticket: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class KvEvents:
    """What entered and left this worker's prefix cache since the last event. `seq` counts events without a gap;
    `reset` says that `stored` is the whole cache and that everything known before is void."""

    seq: int
    stored: tuple[BlockHash, ...] = ()
    evicted: tuple[BlockHash, ...] = ()
    reset: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a worker is. Counters run since the worker's start; rates are smoothed, 0 until measured."""

    waiting: int = 0
    running: int = 0
    queued_prefill_tokens: int = 0
    total_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    reserved_blocks: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    handovers: int = 0
    handover_bytes: int = 0
    handover_seconds: float = 0.0
    """Sum over handovers, from the request to reserve to the acknowledged commit."""
    handover_skipped_blocks: int = 0
    handover_aborts: tuple[tuple[str, int], ...] = ()
    loop_age_s: float = 0.0
    """Seconds since the engine loop last went round: a loop that hangs while the process answers shows here."""
    handover_exposed_seconds: float = 0.0
    """The part of `handover_seconds` that does not hide behind compute: from the first token to the acknowledgement."""
    decode_batch: float = 0.0
    """Requests in the steps that `decode_step_s` is the time of, smoothed alike."""
    moves: int = 0
    """Running requests that were handed over to another decode worker."""
    shared_tokens: int = 0
    """Tokens whose cached KV was handed to another worker's cache."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """All that one engine step has to tell one router, in one message."""

    tokens: Tokens = field(default_factory=Tokens)
    started: tuple[Started, ...] = ()
    handed_over: tuple[HandedOver, ...] = ()
    finished: tuple[Finished, ...] = ()
    failed: tuple[Failed, ...] = ()
    kv: tuple[KvEvents, ...] = ()
    load: Load | None = None
    stayed: tuple[Stayed, ...] = ()


# --- source ↔ target of a handover ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What one end of a control stream says of itself in its first message: all that the other needs to know to choose
    a transport and to lay out the bytes.

    fingerprint   weights and numeric choices: ends that differ in it never hand over
    host          names the machine (and what of it a process sees): ends with the same one can share memory
    doors         for each rank, {transport: where that rank's KV is reached by it}; a transport without an entry is
                  not to be had there
    """

    ref: WorkerRef
    fingerprint: str
    format: KvFormat
    host: str
    doors: tuple[Mapping[str, str], ...]


class Purpose(enum.Enum):
    """What the target does with a request whose KV it has been handed."""

    DECODE = "decode"
    """Goes on with it."""
    CACHE = "cache"
    """Keeps its full blocks in the prefix cache; the request itself has ended or goes on elsewhere."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Source → target: keep room for this request. From prefill it is sent when the request is scheduled, before
    anything is computed. `avoid`: transports that failed between these two."""

    handover_id: int
    ticket: int
    attempt: int
    router: str
    request: Request
    target: WorkerRef
    purpose: Purpose = Purpose.DECODE
    avoid: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reserved:
    """Target → source: room is kept, and the rest shall come by `transport`. The first `cached_blocks` blocks (of the
    target's size) are here already, pinned, and need not come."""

    handover_id: int
    cached_blocks: int
    transport: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Target → source: no; `code` as in `common.errors`."""

    handover_id: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Commit:
    """Source → target: all KV has been offered. `tokens` were drawn since the request was reserved for, and the target
    tells the router of them: the first token from prefill; from another decode worker whatever it drew meanwhile,
    perhaps nothing. `deadline_s` is what remains now."""

    handover_id: int
    tokens: tuple[TokenOut, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Committed:
    """Target → source: the request is mine; free your side."""

    handover_id: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Either way: this handover is over; neither side reads or writes the other's blocks any more."""

    handover_id: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Renew:
    """Source → target: these handovers still live. Extends their lease."""

    handover_ids: tuple[int, ...]


SourceMessage = Reserve | Commit | Abort | Renew
TargetMessage = Reserved | Refused | Committed | Abort

# --- transport → engine loop, inside one worker -----------------------------------------------------------------------

HandoverKey = tuple[str, int, int]
"""(source name, source epoch, handover id): one handover, for its target."""


@dataclass(frozen=True, slots=True)
class Filled:
    """All bytes that a reservation waits for have arrived."""

    key: HandoverKey


@dataclass(frozen=True, slots=True)
class Spoiled:
    """Bytes for a reservation arrived damaged, break the protocol, or can not be fetched; `code` as in
    `common.errors`."""

    key: HandoverKey
    message: str
    code: str = HandoverFailed.code


@dataclass(frozen=True, slots=True)
class TransportBroken:
    """The bytes to this target stopped flowing by this transport. `lasting`: it can not be had between the two;
    otherwise an answer did not come, or the line broke, and it may do again later."""

    target: WorkerRef
    transport: str
    message: str
    lasting: bool = True


# --- a worker's own state, for operators and tests ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `check()` of a worker's block table found. `ok`: free + cached + those in use = all, and every reference
    count is explained; otherwise `problem` says what is not."""

    ok: bool
    problem: str = ""
    total_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    pinned_blocks: int = 0
    reserved_blocks: int = 0
    sequences: int = 0
    handovers: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """Operator's side → worker: be a `role` from now on. The weights, the KV pool and what is cached stay. The worker
    does it at a moment at which it holds no request, and answers then; within `within_s`, or not at all."""

    role: str
    within_s: float
