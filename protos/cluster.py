"""What processes say of themselves (`common/cluster.py`), to bytes on the wire and back."""

from __future__ import annotations

from typing import Any

from ..common.cluster import (
    End,
    FromController,
    FromGateway,
    GatewayHello,
    Launch,
    LogLines,
    LogQuestion,
    Members,
    Phase,
    Processes,
    ProcessStatus,
    Span,
    Trace,
    TraceAnswer,
    TraceQuestion,
    Traffic,
    WorkerState,
    WorkerStatus,
)
from ..common.errors import InvalidRequest
from .convert import Codec, codec
from .schema import pb
from .values import Flat, load_from_wire, load_to_wire

_STATUS = Flat(WorkerStatus, pb.WorkerStatus, "name role address epoch progress detail pid device")
_HELLO = Flat(GatewayHello, pb.GatewayHello, "name url epoch")
_TRAFFIC = Flat(
    Traffic,
    pb.Traffic,
    "seconds arrived prompt_tokens started cached_tokens finished output_tokens failed waiting running oldest_wait_s",
)
_SPAN = Flat(Span, pb.Span, "what worker begin note")
_TRACE = Flat(Trace, pb.Trace, "request_id gateway ago_s outcome prompt_tokens cached_tokens output_tokens")
_QUESTION = Flat(TraceQuestion, pb.TraceQuestion, "question request_id")
_PROCESS = Flat(ProcessStatus, pb.ProcessStatus, "name config pid node restarts why age_s")
_LAUNCH = Flat(Launch, pb.Launch, "name kind config threads resources digest")
_END = Flat(End, pb.End, "name within_s")
_LOG_QUESTION = Flat(LogQuestion, pb.LogQuestion, "name after limit")


def _status_to_wire(status: WorkerStatus) -> Any:
    load = None if status.load is None else load_to_wire(status.load)
    return _STATUS.to_wire(status, state=str(status.state), load=load)


def _status_from_wire(message: Any) -> WorkerStatus:
    load = load_from_wire(message.load) if message.HasField("load") else None
    return _STATUS.from_wire(message, state=WorkerState(message.state), load=load)


def _traffic_to_wire(value: Traffic) -> Any:
    return _TRAFFIC.to_wire(value, queue_s=value.queue_s, ttft_s=value.ttft_s, tpot_s=value.tpot_s)


def _traffic_from_wire(message: Any) -> Traffic:
    samples = {name: tuple(getattr(message, name)) for name in ("queue_s", "ttft_s", "tpot_s")}
    return _TRAFFIC.from_wire(message, **samples)


def _trace_to_wire(value: Trace) -> Any:
    return _TRACE.to_wire(value, spans=[_SPAN.to_wire(span, end=span.end) for span in value.spans])


def _trace_from_wire(message: Any) -> Trace:
    spans = tuple(_SPAN.from_wire(s, end=s.end if s.HasField("end") else None) for s in message.spans)
    return _TRACE.from_wire(message, spans=spans)


def _process_to_wire(value: ProcessStatus) -> Any:
    return _PROCESS.to_wire(value, phase=value.phase.value, last_lines=value.last_lines)


def _process_from_wire(message: Any) -> ProcessStatus:
    return _PROCESS.from_wire(message, phase=Phase(message.phase), last_lines=tuple(message.last_lines))


def _log_lines_to_wire(value: LogLines) -> Any:
    return pb.LogLines(next=value.next, lines=value.lines)


def _log_lines_from_wire(message: Any) -> LogLines:
    return LogLines(message.next, tuple(message.lines))


def _members_to_wire(value: Members) -> Any:
    return pb.Members(version=value.version, workers=map(_status_to_wire, value.workers))


def _members_from_wire(message: Any) -> Members:
    return Members(message.version, tuple(map(_status_from_wire, message.workers)))


def _from_gateway_to_wire(value: FromGateway) -> Any:
    match value:
        case GatewayHello():
            return pb.FromGateway(hello=_HELLO.to_wire(value))
        case Traffic():
            return pb.FromGateway(traffic=_traffic_to_wire(value))
        case TraceAnswer():
            trace = None if value.trace is None else _trace_to_wire(value.trace)
            return pb.FromGateway(trace=pb.TraceAnswer(question=value.question, trace=trace))


def _from_gateway_from_wire(message: Any) -> FromGateway:
    match message.WhichOneof("message"):
        case "hello":
            return _HELLO.from_wire(message.hello)
        case "traffic":
            return _traffic_from_wire(message.traffic)
        case "trace":
            answer = message.trace
            return TraceAnswer(answer.question, _trace_from_wire(answer.trace) if answer.HasField("trace") else None)
        case _:
            raise InvalidRequest("an empty or unknown message from a gateway")


def _from_controller_to_wire(value: FromController) -> Any:
    match value:
        case Members():
            return pb.FromController(members=_members_to_wire(value))
        case TraceQuestion():
            return pb.FromController(trace=_QUESTION.to_wire(value))


def _from_controller_from_wire(message: Any) -> FromController:
    match message.WhichOneof("message"):
        case "members":
            return _members_from_wire(message.members)
        case "trace":
            return _QUESTION.from_wire(message.trace)
        case _:
            raise InvalidRequest("an empty or unknown message from the controller")


def _processes_to_wire(value: Processes) -> Any:
    return pb.Processes(version=value.version, processes=map(_process_to_wire, value.processes))


def _processes_from_wire(message: Any) -> Processes:
    return Processes(message.version, tuple(map(_process_from_wire, message.processes)))


FROM_GATEWAY: Codec[FromGateway] = codec(pb.FromGateway, _from_gateway_to_wire, _from_gateway_from_wire)
FROM_CONTROLLER: Codec[FromController] = codec(pb.FromController, _from_controller_to_wire, _from_controller_from_wire)
STATUS_REPORT: Codec[WorkerStatus] = codec(pb.WorkerStatus, _status_to_wire, _status_from_wire)
PROCESSES: Codec[Processes] = codec(pb.Processes, _processes_to_wire, _processes_from_wire)
LAUNCH_ORDER: Codec[Launch] = codec(pb.Launch, _LAUNCH.to_wire, _LAUNCH.from_wire)
END_ORDER: Codec[End] = codec(pb.End, _END.to_wire, _END.from_wire)
LOG_REQUEST: Codec[LogQuestion] = codec(pb.LogQuestion, _LOG_QUESTION.to_wire, _LOG_QUESTION.from_wire)
LOG_LINES: Codec[LogLines] = codec(pb.LogLines, _log_lines_to_wire, _log_lines_from_wire)
STORED: Codec[bytes] = codec(pb.Stored, lambda data: pb.Stored(data=data), lambda message: bytes(message.data))
