"""The parts that messages are made of, to and from their protobuf form. Used by `convert.py` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Generic, TypeVar

from ..common.errors import InvalidRequest
from ..common.hashing import HASH_BYTES, BlockHash
from ..common.kv_format import KvFormat
from ..common.messages import (
    Abort,
    CheckReport,
    Endpoint,
    Hello,
    KvEvents,
    Load,
    Refused,
    Reserved,
    TokenOut,
    Turn,
)
from ..common.types import Request, Role, SamplingParams, TokenLogprob, WorkerInfo, WorkerRef
from .schema import pb

T = TypeVar("T")


class Flat(Generic[T]):
    """A dataclass whose listed fields have the same names and plain values in its message."""

    def __init__(self, own: type[T], wire: Any, fields: str) -> None:
        self.own, self.wire, self.names = own, wire, tuple(fields.split())
        self._read = attrgetter(*self.names)

    def to_wire(self, value: T, **others: Any) -> Any:
        return self.wire(**dict(zip(self.names, self._read(value), strict=True)), **others)

    def from_wire(self, message: Any, **others: Any) -> T:
        return self.own(**dict(zip(self.names, self._read(message), strict=True)), **others)


def required(message: Any, field: str) -> Any:
    if not message.HasField(field):
        raise InvalidRequest(f"{message.DESCRIPTOR.name}.{field} is missing", param=field)
    return getattr(message, field)


def _pairs(first: Sequence[int], second: Sequence[float], what: str) -> tuple[tuple[int, float], ...]:
    if len(first) != len(second):
        raise InvalidRequest(f"{what}: {len(first)} tokens and {len(second)} values", param=what)
    return tuple(zip(first, second, strict=True))


def _hashes(data: bytes) -> tuple[BlockHash, ...]:
    if len(data) % HASH_BYTES:
        raise InvalidRequest(f"block hashes: {len(data)} bytes are not a multiple of {HASH_BYTES}")
    return tuple(data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES))


# --- the parts of messages ------------------------------------------------------------------------------------------

REF = Flat(WorkerRef, pb.WorkerRef, "name address epoch")
_FORMAT = Flat(KvFormat, pb.KvFormat, "num_layers num_kv_heads head_dim block_size dtype tp")
HELLO = Flat(Hello, pb.Hello, "router router_epoch worker_epoch")
_PARAMS = Flat(
    SamplingParams,
    pb.SamplingParams,
    "max_tokens temperature top_p top_k min_p seed presence_penalty frequency_penalty repetition_penalty min_tokens "
    "ignore_eos",
)
_INFO = Flat(
    WorkerInfo,
    pb.WorkerInfo,
    "fingerprint model block_size total_blocks max_model_len kv_bytes_per_token vocab_size host pid",
)
LOAD = Flat(
    Load,
    pb.Load,
    "waiting running queued_prefill_tokens total_blocks free_blocks cached_blocks reserved_blocks prefill_tokens_per_s "
    "decode_step_s decode_batch steps preemptions prompt_tokens cached_tokens output_tokens handovers handover_bytes "
    "handover_seconds handover_exposed_seconds handover_skipped_blocks loop_age_s moves shared_tokens",
)
ABORT = Flat(Abort, pb.Ended, "handover_id code message")
REFUSED = Flat(Refused, pb.Ended, "handover_id code message")
RESERVED = Flat(Reserved, pb.Reserved, "handover_id cached_blocks transport")
TURN = Flat(Turn, pb.Turn, "role within_s")
CHECK = Flat(
    CheckReport,
    pb.CheckReport,
    "ok problem total_blocks free_blocks cached_blocks pinned_blocks reserved_blocks sequences handovers preemptions",
)


def _params_to_wire(params: SamplingParams) -> Any:
    return _PARAMS.to_wire(
        params,
        bias_tokens=[token for token, _ in params.logit_bias],
        bias_values=[value for _, value in params.logit_bias],
        stop_token_ids=params.stop_token_ids,
        logprobs=params.logprobs,
    )


def _params_from_wire(message: Any) -> SamplingParams:
    return _PARAMS.from_wire(
        message,
        logit_bias=_pairs(message.bias_tokens, message.bias_values, "logit_bias"),
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def request_to_wire(request: Request) -> Any:
    return pb.Request(
        request_id=request.request_id,
        tokens=request.tokens,
        prompt_len=request.prompt_len,
        params=_params_to_wire(request.params),
        tenant=request.tenant,
        priority=request.priority,
        deadline_s=request.deadline_s,
    )


def request_from_wire(message: Any) -> Request:
    if not 1 <= message.prompt_len <= len(message.tokens):
        raise InvalidRequest(f"prompt_len {message.prompt_len} of {len(message.tokens)} tokens", param="prompt_len")
    if math.isnan(message.deadline_s):
        raise InvalidRequest("deadline_s is not a number", param="deadline_s")
    return Request(
        request_id=message.request_id,
        tokens=tuple(message.tokens),
        prompt_len=message.prompt_len,
        params=_params_from_wire(required(message, "params")),
        tenant=message.tenant,
        priority=message.priority,
        deadline_s=message.deadline_s,
    )


def logprob_to_wire(value: TokenLogprob) -> Any:
    return pb.Logprob(
        logprob=value.logprob,
        top_tokens=[token for token, _ in value.top],
        top_logprobs=[logprob for _, logprob in value.top],
    )


def logprob_from_wire(message: Any) -> TokenLogprob:
    return TokenLogprob(message.logprob, _pairs(message.top_tokens, message.top_logprobs, "top_logprobs"))


def token_to_wire(value: TokenOut) -> Any:
    logprob = None if value.logprob is None else logprob_to_wire(value.logprob)
    return pb.Token(ticket=value.ticket, position=value.position, token=value.token, logprob=logprob)


def token_from_wire(message: Any) -> TokenOut:
    logprob = logprob_from_wire(message.logprob) if message.HasField("logprob") else None
    return TokenOut(message.ticket, message.position, message.token, logprob)


def endpoint_to_wire(value: Endpoint) -> Any:
    return pb.Endpoint(
        ref=REF.to_wire(value.ref),
        fingerprint=value.fingerprint,
        format=_FORMAT.to_wire(value.format),
        host=value.host,
        doors=[pb.Door(addresses=dict(door)) for door in value.doors],
    )


def endpoint_from_wire(message: Any) -> Endpoint:
    format = _FORMAT.from_wire(required(message, "format"))
    if len(message.doors) != format.tp:
        raise InvalidRequest(f"{len(message.doors)} doors for {format.tp} ranks", param="doors")
    return Endpoint(
        ref=REF.from_wire(required(message, "ref")),
        fingerprint=message.fingerprint,
        format=format,
        host=message.host,
        doors=tuple(dict(door.addresses) for door in message.doors),
    )


def info_to_wire(info: WorkerInfo) -> Any:
    return _INFO.to_wire(info, ref=REF.to_wire(info.ref), role=info.role.value, labels=dict(info.labels))


def info_from_wire(message: Any) -> WorkerInfo:
    return _INFO.from_wire(
        message,
        ref=REF.from_wire(required(message, "ref")),
        role=Role(message.role),
        labels=tuple(sorted(message.labels.items())),
    )


def kv_to_wire(events: KvEvents) -> Any:
    return pb.KvEvents(
        seq=events.seq, stored=b"".join(events.stored), evicted=b"".join(events.evicted), reset=events.reset
    )


def kv_from_wire(message: Any) -> KvEvents:
    return KvEvents(message.seq, _hashes(message.stored), _hashes(message.evicted), message.reset)


def load_to_wire(load: Load) -> Any:
    return LOAD.to_wire(load, handover_aborts=dict(load.handover_aborts))


def load_from_wire(message: Any) -> Load:
    return LOAD.from_wire(message, handover_aborts=tuple(sorted(message.handover_aborts.items())))
