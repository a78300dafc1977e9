"""Whatever our types can say survives the wire, and nothing malformed gets in."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.common import cluster as c
from baton.common import messages as m
from baton.common import types as t
from baton.common.errors import InvalidRequest
from baton.common.kv_format import ITEM_BYTES, KvFormat
from baton.protos import cluster, convert
from baton.protos.compile import COMPILED, compiled
from baton.protos.schema import pb

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
number = st.floats(allow_nan=False)
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
some_u32 = st.lists(u32, max_size=5).map(tuple)
pairs = st.lists(st.tuples(u32, number), max_size=3).map(tuple)
logprob = st.builds(t.TokenLogprob, number, pairs)
params = st.builds(
    t.SamplingParams,
    max_tokens=u32, temperature=number, top_p=number, top_k=u32, min_p=number, seed=u64, presence_penalty=number,
    frequency_penalty=number, repetition_penalty=number, logit_bias=pairs, min_tokens=u32, ignore_eos=st.booleans(),
    stop_token_ids=some_u32, logprobs=st.none() | u32,
)  # fmt: skip
request = st.builds(
    lambda tokens, cut, **rest: t.Request(tokens=tokens, prompt_len=1 + cut % len(tokens), **rest),
    st.lists(u32, min_size=1, max_size=5).map(tuple),
    st.integers(0, 100),
    request_id=text, params=params, tenant=text, priority=st.integers(-(2**31), 2**31 - 1), deadline_s=number,
)  # fmt: skip
ref = st.builds(t.WorkerRef, text, text, u64)
labels = st.dictionaries(text, text, max_size=3).map(lambda d: tuple(sorted(d.items())))
info = st.builds(
    t.WorkerInfo, ref, st.sampled_from(t.Role), text, text, u32, u32, u32, u64, u32, text, u32, labels
)  # fmt: skip
token = st.builds(m.TokenOut, u64, u32, u32, st.none() | logprob)
hashes = st.lists(st.binary(min_size=16, max_size=16), max_size=3).map(tuple)
counts = st.dictionaries(text, u64, max_size=2).map(lambda d: tuple(sorted(d.items())))
load = st.builds(
    m.Load, u32, u32, u64, u32, u32, u32, u32, number, number, u64, u64, u64, u64, u64, u64, u64, number, u64, counts,
    number, number, number,
)  # fmt: skip


def several(part: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(part, max_size=3).map(tuple)


report = st.builds(
    m.StepReport,
    several(token).map(m.Tokens.of),
    several(st.builds(m.Started, u64, u32)),
    several(st.builds(m.HandedOver, u64, number)),
    several(st.builds(m.Finished, u64, st.sampled_from(t.FinishReason))),
    several(st.builds(m.Failed, u64, text, text)),
    several(st.builds(m.KvEvents, u64, hashes, hashes, st.booleans())),
    st.none() | load,
    several(st.builds(m.Stayed, u64, text, text)),
)
abort = st.builds(m.Abort, u64, text, text)
status = st.builds(
    c.WorkerStatus, text, text, st.sampled_from(c.WorkerState), text, u64, number, text, u32, text, st.none() | load
)
numbers = st.lists(number, max_size=4).map(tuple)
traffic = st.builds(c.Traffic, number, u64, u64, u64, u64, u64, u64, u64, numbers, numbers, numbers, u32, u32, number)
span = st.builds(c.Span, text, text, number, st.none() | number, text)
trace = st.builds(c.Trace, text, text, number, text, u32, u32, u32, several(span))
lines = several(text)
process = st.builds(c.ProcessStatus, text, st.sampled_from(c.Phase), text, u32, text, u32, text, lines, number)
tps = st.sampled_from([1, 2])
formats = st.builds(KvFormat, *[st.integers(1, 9).map(lambda n: 2 * n)] * 4, st.sampled_from(list(ITEM_BYTES)), tps)
door = st.dictionaries(text, text, max_size=2)
endpoint = formats.flatmap(lambda f: st.builds(m.Endpoint, ref, text, st.just(f), text, st.tuples(*[door] * f.tp)))
MESSAGES = {
    "FROM_ROUTER": st.one_of(
        st.builds(m.Hello, text, u64, u64),
        st.builds(m.Submit, u64, u32, request, st.none() | ref),
        st.builds(m.Cancel, u64),
        st.builds(m.Move, u64, ref),
        st.builds(m.Share, u64, request, ref),
        st.just(m.Ping()),
        st.just(m.Resync()),
    ),
    "FROM_WORKER": info | report,
    "FROM_SOURCE": st.one_of(
        endpoint,
        st.builds(m.Reserve, u64, u64, u32, text, request, ref, st.sampled_from(m.Purpose), several(text)),
        st.builds(m.Commit, u64, several(token), number),
        abort,
        st.builds(m.Renew, st.lists(u64, max_size=3).map(tuple)),
    ),
    "FROM_TARGET": st.one_of(
        endpoint,
        st.builds(m.Reserved, u64, u32, text),
        st.builds(m.Refused, u64, text, text),
        st.builds(m.Committed, u64),
        abort,
    ),
    "FROM_GATEWAY": st.one_of(
        st.builds(c.GatewayHello, text, text, u64),
        traffic,
        st.builds(c.TraceAnswer, u64, st.none() | trace),
    ),
    "FROM_CONTROLLER": st.one_of(
        st.builds(c.Members, u64, several(status)),
        st.builds(c.TraceQuestion, u64, text),
    ),
    "STATUS_REPORT": status,
    "PROCESSES": st.builds(c.Processes, u64, several(process)),
    "LAUNCH_ORDER": st.builds(c.Launch, text, text, st.binary(), u32, st.binary(), text),
    "END_ORDER": st.builds(c.End, text, number),
    "LOG_REQUEST": st.builds(c.LogQuestion, text, st.integers(-(2**31), 2**63 - 1), u32),
    "LOG_LINES": st.builds(c.LogLines, u64, lines),
    "STORED": st.binary(),
    "TURN_ORDER": st.builds(m.Turn, text, number),
    "CHECK_REPORT": st.builds(m.CheckReport, st.booleans(), text, u32, u32, u32, u32, u32, u32, u32, u64),
    "EMPTY": st.none(),
    "RAW": st.binary(),
}


def _codec(name: str) -> convert.Codec[Any]:
    codec: convert.Codec[Any] = getattr(cluster if hasattr(cluster, name) else convert, name)
    return codec


@pytest.mark.parametrize("name", MESSAGES)
def test_round_trip(name: str) -> None:
    codec = _codec(name)

    @settings(max_examples=60, deadline=None)
    @given(MESSAGES[name])
    def check(value: object) -> None:
        assert codec.decode(codec.encode(value)) == value

    check()


def test_tokens_in_columns_are_the_tokens_that_were_put_in() -> None:
    tokens = [m.TokenOut(1, 5, 7), m.TokenOut(2, 6, 8, t.TokenLogprob(-0.5, ((8, -0.5),))), m.TokenOut(1, 6, 9)]
    assert list(m.Tokens.of(tokens)) == tokens
    assert list(m.Tokens.of(tokens[::2])) == tokens[::2]
    assert len(m.Tokens.of(tokens)) == 3 and not m.Tokens()


@pytest.mark.parametrize("name", [name for name in MESSAGES if name != "RAW"])
def test_garbage_is_refused_with_a_typed_error_or_read_as_a_message(name: str) -> None:
    codec = _codec(name)
    rng = random.Random(name)
    for _ in range(300):
        try:
            codec.decode(rng.randbytes(rng.randrange(40)))
        except InvalidRequest as error:
            assert str(error)
    with pytest.raises(InvalidRequest):
        codec.decode(b"\xff\xff")


def _ok_format() -> Any:
    return pb.KvFormat(num_layers=1, num_kv_heads=1, head_dim=1, block_size=1, dtype="int8", tp=1)


def _ok_request() -> Any:
    return pb.Request(tokens=[1, 2], prompt_len=2, params=pb.SamplingParams(max_tokens=1))


@pytest.mark.parametrize(
    "message",
    [
        pb.FromRouter(),
        pb.FromRouter(submit=pb.Submit(ticket=1)),
        pb.FromRouter(submit=pb.Submit(request=pb.Request(tokens=[1], prompt_len=1))),
        pb.FromRouter(submit=pb.Submit(request=pb.Request(tokens=[1], prompt_len=2, params=pb.SamplingParams()))),
        pb.FromRouter(submit=pb.Submit(request=pb.Request(params=pb.SamplingParams()))),
        pb.FromRouter(
            submit=pb.Submit(
                request=pb.Request(tokens=[1], prompt_len=1, params=pb.SamplingParams(), deadline_s=float("nan"))
            )
        ),
        pb.FromRouter(
            submit=pb.Submit(request=pb.Request(tokens=[1], prompt_len=1, params=pb.SamplingParams(bias_tokens=[1, 2])))
        ),
        pb.FromWorker(),
        pb.FromWorker(info=pb.WorkerInfo(ref=pb.WorkerRef(), role="cook")),
        pb.FromWorker(info=pb.WorkerInfo(role="prefill")),
        pb.FromWorker(report=pb.StepReport(tickets=[1, 2], positions=[1, 2], tokens=[1])),
        pb.FromWorker(report=pb.StepReport(logprobs={3: pb.Logprob()}, tickets=[1], positions=[1], tokens=[1])),
        pb.FromWorker(report=pb.StepReport(finished=[pb.Event(ticket=1, reason="bored")])),
        pb.FromWorker(report=pb.StepReport(kv=[pb.KvEvents(stored=b"x" * 17)])),
        pb.FromSource(),
        pb.FromSource(reserve=pb.Reserve(request=_ok_request(), purpose="decode")),
        pb.FromSource(reserve=pb.Reserve(request=_ok_request(), purpose="feed", target=pb.WorkerRef())),
        pb.FromSource(hello=pb.Endpoint(ref=pb.WorkerRef(), format=pb.KvFormat(dtype="int8"))),
        pb.FromTarget(hello=pb.Endpoint(ref=pb.WorkerRef(), format=_ok_format())),
        pb.FromTarget(),
        pb.FromGateway(),
        pb.FromController(),
        pb.FromController(members=pb.Members(workers=[pb.WorkerStatus(state="asleep")])),
    ],
    ids=lambda message: str(message).replace("\n", " ").replace(" ", "") or f"empty{message.DESCRIPTOR.name}",
)
def test_malformed_messages_are_refused(message: Any) -> None:
    codec = _codec(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", message.DESCRIPTOR.name).upper())
    with pytest.raises(InvalidRequest):
        codec.decode(message.SerializeToString())


@pytest.mark.parametrize("value", [m.Cancel(-1), m.Cancel(2**64), m.Hello("\ud800", 0, 0)])
def test_values_that_do_not_fit_the_wire_are_refused(value: convert.FromRouter) -> None:
    with pytest.raises(InvalidRequest):
        convert.FROM_ROUTER.encode(value)


def test_the_committed_description_is_that_of_the_proto_file() -> None:
    assert FileDescriptorSet.FromString(COMPILED.read_bytes()) == FileDescriptorSet.FromString(compiled())
