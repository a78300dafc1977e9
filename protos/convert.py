"""Our own types to bytes on the wire, and back: one `Codec` for each kind of wire message.

Both directions raise `InvalidRequest` where a value does not fit its type or a message is malformed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import DecodeError

from ..common.errors import InvalidRequest
from ..common.messages import (
    Abort,
    Cancel,
    CheckReport,
    Commit,
    Committed,
    Endpoint,
    Failed,
    Finished,
    HandedOver,
    Hello,
    Move,
    Ping,
    Purpose,
    Refused,
    Renew,
    Reserve,
    Reserved,
    Resync,
    RouterMessage,
    Share,
    SourceMessage,
    Started,
    Stayed,
    StepReport,
    Submit,
    TargetMessage,
    Tokens,
    Turn,
)
from ..common.types import FinishReason, WorkerInfo
from .schema import pb
from .values import (
    ABORT,
    CHECK,
    HELLO,
    REF,
    REFUSED,
    RESERVED,
    TURN,
    endpoint_from_wire,
    endpoint_to_wire,
    info_from_wire,
    info_to_wire,
    kv_from_wire,
    kv_to_wire,
    load_from_wire,
    load_to_wire,
    logprob_from_wire,
    logprob_to_wire,
    request_from_wire,
    request_to_wire,
    required,
    token_from_wire,
    token_to_wire,
)

T = TypeVar("T")

FromRouter = Hello | RouterMessage
FromWorker = WorkerInfo | StepReport
FromSource = Endpoint | SourceMessage
FromTarget = Endpoint | TargetMessage

# --- step reports: the hot path -------------------------------------------------------------------------------------


def _report_to_wire(report: StepReport) -> Any:
    tokens = report.tokens
    message = pb.StepReport(
        tickets=tokens.tickets,
        positions=tokens.positions,
        tokens=tokens.tokens,
        started=[pb.Event(ticket=e.ticket, cached_tokens=e.cached_tokens) for e in report.started],
        handed_over=[pb.Event(ticket=e.ticket, exposed_s=e.exposed_s) for e in report.handed_over],
        finished=[pb.Event(ticket=e.ticket, reason=e.reason.value) for e in report.finished],
        failed=[pb.Event(ticket=e.ticket, code=e.code, message=e.message) for e in report.failed],
        kv=[kv_to_wire(e) for e in report.kv],
        stayed=[pb.Event(ticket=e.ticket, code=e.code, message=e.message) for e in report.stayed],
    )
    for index, logprob in tokens.logprobs.items():
        message.logprobs[index].CopyFrom(logprob_to_wire(logprob))
    if report.load is not None:
        message.load.CopyFrom(load_to_wire(report.load))
    return message


def _tokens_from_wire(message: Any) -> Tokens:
    tickets, positions, tokens = list(message.tickets), list(message.positions), list(message.tokens)
    if not len(tickets) == len(positions) == len(tokens):
        raise InvalidRequest(f"step report: {len(tickets)} tickets, {len(positions)} positions, {len(tokens)} tokens")
    logprobs = {index: logprob_from_wire(logprob) for index, logprob in message.logprobs.items()}
    if max(logprobs, default=-1) >= len(tokens):
        raise InvalidRequest(f"step report: a log-probability for token {max(logprobs)} of {len(tokens)}")
    return Tokens(tickets, positions, tokens, logprobs)


def _report_from_wire(message: Any) -> StepReport:
    load = load_from_wire(message.load) if message.HasField("load") else None
    return StepReport(
        tokens=_tokens_from_wire(message),
        started=tuple(Started(e.ticket, e.cached_tokens) for e in message.started),
        handed_over=tuple(HandedOver(e.ticket, e.exposed_s) for e in message.handed_over),
        finished=tuple(Finished(e.ticket, FinishReason(e.reason)) for e in message.finished),
        failed=tuple(Failed(e.ticket, e.code, e.message) for e in message.failed),
        kv=tuple(map(kv_from_wire, message.kv)),
        load=load,
        stayed=tuple(Stayed(e.ticket, e.code, e.message) for e in message.stayed),
    )


# --- whole messages -------------------------------------------------------------------------------------------------


def _from_router_to_wire(value: FromRouter) -> Any:
    match value:
        case Submit():
            submit = pb.Submit(ticket=value.ticket, attempt=value.attempt, request=request_to_wire(value.request))
            if value.decode is not None:
                submit.decode.CopyFrom(REF.to_wire(value.decode))
            return pb.FromRouter(submit=submit)
        case Cancel():
            return pb.FromRouter(cancel=value.ticket)
        case Move():
            return pb.FromRouter(move=pb.Move(ticket=value.ticket, target=REF.to_wire(value.target)))
        case Share():
            request, target = request_to_wire(value.request), REF.to_wire(value.target)
            return pb.FromRouter(share=pb.Share(ticket=value.ticket, request=request, target=target))
        case Ping():
            return pb.FromRouter(ping=True)
        case Resync():
            return pb.FromRouter(resync=True)
        case Hello():
            return pb.FromRouter(hello=HELLO.to_wire(value))


def _from_router_from_wire(message: Any) -> FromRouter:
    match message.WhichOneof("message"):
        case "submit":
            submit = message.submit
            decode = REF.from_wire(submit.decode) if submit.HasField("decode") else None
            return Submit(submit.ticket, submit.attempt, request_from_wire(required(submit, "request")), decode)
        case "cancel":
            return Cancel(message.cancel)
        case "move":
            return Move(message.move.ticket, REF.from_wire(required(message.move, "target")))
        case "share":
            share = message.share
            request, target = request_from_wire(required(share, "request")), REF.from_wire(required(share, "target"))
            return Share(share.ticket, request, target)
        case "ping":
            return Ping()
        case "resync":
            return Resync()
        case "hello":
            return HELLO.from_wire(message.hello)
        case _:
            raise InvalidRequest("an empty or unknown message from a router")


def _from_worker_to_wire(value: FromWorker) -> Any:
    if isinstance(value, StepReport):
        return pb.FromWorker(report=_report_to_wire(value))
    return pb.FromWorker(info=info_to_wire(value))


def _from_worker_from_wire(message: Any) -> FromWorker:
    match message.WhichOneof("message"):
        case "report":
            return _report_from_wire(message.report)
        case "info":
            return info_from_wire(message.info)
        case _:
            raise InvalidRequest("an empty or unknown message from a worker")


def _reserve_to_wire(value: Reserve) -> Any:
    return pb.Reserve(
        handover_id=value.handover_id,
        ticket=value.ticket,
        attempt=value.attempt,
        router=value.router,
        request=request_to_wire(value.request),
        target=REF.to_wire(value.target),
        purpose=value.purpose.value,
        avoid=value.avoid,
    )


def _reserve_from_wire(message: Any) -> Reserve:
    return Reserve(
        handover_id=message.handover_id,
        ticket=message.ticket,
        attempt=message.attempt,
        router=message.router,
        request=request_from_wire(required(message, "request")),
        target=REF.from_wire(required(message, "target")),
        purpose=Purpose(message.purpose),
        avoid=tuple(message.avoid),
    )


def _commit_to_wire(value: Commit) -> Any:
    return pb.Commit(
        handover_id=value.handover_id, tokens=map(token_to_wire, value.tokens), deadline_s=value.deadline_s
    )


def _commit_from_wire(message: Any) -> Commit:
    if math.isnan(message.deadline_s):
        raise InvalidRequest("deadline_s is not a number", param="deadline_s")
    return Commit(message.handover_id, tuple(map(token_from_wire, message.tokens)), message.deadline_s)


def _from_source_to_wire(value: FromSource) -> Any:
    match value:
        case Renew():
            return pb.FromSource(renew=pb.Renew(handover_ids=value.handover_ids))
        case Reserve():
            return pb.FromSource(reserve=_reserve_to_wire(value))
        case Commit():
            return pb.FromSource(commit=_commit_to_wire(value))
        case Abort():
            return pb.FromSource(abort=ABORT.to_wire(value))
        case Endpoint():
            return pb.FromSource(hello=endpoint_to_wire(value))


def _from_source_from_wire(message: Any) -> FromSource:
    match message.WhichOneof("message"):
        case "renew":
            return Renew(tuple(message.renew.handover_ids))
        case "reserve":
            return _reserve_from_wire(message.reserve)
        case "commit":
            return _commit_from_wire(message.commit)
        case "abort":
            return ABORT.from_wire(message.abort)
        case "hello":
            return endpoint_from_wire(message.hello)
        case _:
            raise InvalidRequest("an empty or unknown message from a source")


def _from_target_to_wire(value: FromTarget) -> Any:
    match value:
        case Reserved():
            return pb.FromTarget(reserved=RESERVED.to_wire(value))
        case Refused():
            return pb.FromTarget(refused=REFUSED.to_wire(value))
        case Committed():
            return pb.FromTarget(committed=value.handover_id)
        case Abort():
            return pb.FromTarget(abort=ABORT.to_wire(value))
        case Endpoint():
            return pb.FromTarget(hello=endpoint_to_wire(value))


def _from_target_from_wire(message: Any) -> FromTarget:
    match message.WhichOneof("message"):
        case "reserved":
            return RESERVED.from_wire(message.reserved)
        case "refused":
            return REFUSED.from_wire(message.refused)
        case "committed":
            return Committed(message.committed)
        case "abort":
            return ABORT.from_wire(message.abort)
        case "hello":
            return endpoint_from_wire(message.hello)
        case _:
            raise InvalidRequest("an empty or unknown message from a target")


# --- codecs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """One kind of message on the wire. `encode` and `decode` raise `InvalidRequest`."""

    encode: Callable[[T], bytes]
    decode: Callable[[bytes], T]


def codec(wire: Any, to_wire: Callable[[T], Any], from_wire: Callable[[Any], T]) -> Codec[T]:
    """The codec of a protobuf message, and of our own type on its other side."""

    def encode(value: T) -> bytes:
        try:
            data: bytes = to_wire(value).SerializeToString()
        except (ValueError, TypeError) as error:  # a number that does not fit, a string that is not unicode
            raise InvalidRequest(f"{wire.DESCRIPTOR.name}: {error}") from error
        return data

    def decode(data: bytes) -> T:
        try:
            return from_wire(wire.FromString(data))
        except (DecodeError, ValueError) as error:  # not protobuf, or not a member of an enumeration
            raise InvalidRequest(f"{wire.DESCRIPTOR.name}: {error}") from error

    return Codec(encode, decode)


FROM_ROUTER: Codec[FromRouter] = codec(pb.FromRouter, _from_router_to_wire, _from_router_from_wire)
FROM_WORKER: Codec[FromWorker] = codec(pb.FromWorker, _from_worker_to_wire, _from_worker_from_wire)
FROM_SOURCE: Codec[FromSource] = codec(pb.FromSource, _from_source_to_wire, _from_source_from_wire)
FROM_TARGET: Codec[FromTarget] = codec(pb.FromTarget, _from_target_to_wire, _from_target_from_wire)
TURN_ORDER: Codec[Turn] = codec(pb.Turn, TURN.to_wire, TURN.from_wire)
CHECK_REPORT: Codec[CheckReport] = codec(pb.CheckReport, CHECK.to_wire, CHECK.from_wire)
EMPTY: Codec[None] = codec(pb.Empty, lambda _: pb.Empty(), lambda _: None)
RAW: Codec[bytes] = Codec(bytes, bytes)
"""KV payloads travel as they are."""
