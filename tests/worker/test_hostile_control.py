"""A peer that is malicious, or broken, and says things on the control stream: each gets a typed refusal, and costs
nobody else anything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from baton.common.errors import FingerprintMismatch, InvalidRequest
from baton.common.kv_format import KvFormat
from baton.common.messages import Abort, Commit, Refused, Renew, Reserve, TokenOut
from baton.protos import rpc
from baton.protos.convert import RAW
from baton.protos.schema import pb
from baton.protos.values import endpoint_to_wire
from tests.toy import LAYERS, VOCAB, request
from tests.worker.hostile import EVIL, PROMPT, WAIT_S, Control, Scene, a_scene


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with a_scene() as made:
        yield made


def _absurd(**changes: object) -> bytes:
    """A hello with a format that our own types would not even hold."""
    message = endpoint_to_wire(EVIL)
    for name, value in changes.items():
        setattr(message.format, name, value)
    data: bytes = pb.FromSource(hello=message).SerializeToString()
    return data


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"\xff" * 50,
        _absurd(num_layers=2**32 - 1),
        _absurd(tp=2**32 - 1),
        _absurd(block_size=2**32 - 1, head_dim=2**32 - 1),
        _absurd(num_kv_heads=0),
        _absurd(dtype="float128"),
        pb.FromSource(renew=pb.Renew(handover_ids=[1])).SerializeToString(),
        pb.FromSource(commit=pb.Commit(handover_id=1)).SerializeToString(),
    ],
)
async def test_a_control_stream_begins_with_a_hello_that_makes_sense(scene: Scene, first: bytes) -> None:
    peer = rpc.Peer(scene.worker.ref.address, "secret")
    stream = peer.stream(rpc.CONTROL, RAW, RAW)
    await stream.write(first)
    with pytest.raises(InvalidRequest):
        await asyncio.wait_for(stream.read(), WAIT_S)
    await peer.close()


@pytest.mark.parametrize(
    "later",
    [
        b"\xff" * 50,
        b"",
        _absurd(),
        pb.FromSource(commit=pb.Commit(handover_id=1, deadline_s=float("nan"))).SerializeToString(),
        pb.FromSource(reserve=pb.Reserve(handover_id=1, purpose="theft")).SerializeToString(),
    ],
)
async def test_what_makes_no_sense_ends_the_control_stream(scene: Scene, later: bytes) -> None:
    async with Control(scene.worker) as control:
        await control.reserved(1)
        await control.stream.call.write(later)
        with pytest.raises(InvalidRequest):
            await control.hear()
    await scene.house.balanced()


def _reserves(control: Control) -> list[tuple[str, Reserve]]:
    ref, make = control.worker.ref, control.reserve
    evil = request("evil", PROMPT, 20)
    return [
        ("stale_epoch", make(2, target=replace(ref, epoch=1))),
        ("handover_failed", make(3, router="nobody")),
        ("invalid_value", make(4, request=replace(evil, tokens=(1,) * 200, prompt_len=200))),
        ("invalid_value", make(5, request=replace(evil, tokens=(VOCAB,), prompt_len=1))),
        ("pool_full", make(6, request=replace(evil, tokens=(1,) * 10_000, prompt_len=10_000))),
        ("transport_failed", make(7, avoid=("cuda-ipc", "shm", "process-group", "tcp", "grpc", "pigeon"))),
        ("stale_attempt", make(8, ticket=10_001)),
    ]


async def test_reservations_that_are_refused(scene: Scene) -> None:
    async with Control(scene.worker) as control:
        await control.reserved(1)
        for code, reserve in _reserves(control):
            said = await control.ask(reserve)
            assert isinstance(said, Refused) and (said.handover_id, said.code) == (reserve.handover_id, code), said
        with pytest.raises(InvalidRequest):  # no numbers below 0 on the wire
            await control.stream.write(control.reserve(-1))
    other_model = replace(EVIL, format=KvFormat(LAYERS, 2, 2, 4, "int8"))
    for own in (other_model, replace(EVIL, fingerprint="other weights")):
        async with Control(scene.worker, own=own) as control:
            said = await control.ask(control.reserve(9))
            assert isinstance(said, Refused) and said.code == FingerprintMismatch.code


async def test_nobody_takes_more_places_than_there_are(scene: Scene) -> None:
    async with Control(scene.worker) as control:
        said = [await control.ask(control.reserve(n)) for n in range(1, 30)]
        refused = [s for s in said if isinstance(s, Refused)]
        assert refused and {s.code for s in refused} == {"pool_full"}
    await scene.house.balanced()


COMMITS: dict[str, tuple[TokenOut, ...]] = {
    "tokens beyond what was reserved": tuple(TokenOut(1, len(PROMPT) + i, 5) for i in range(100)),
    "a token at another position": (TokenOut(1, len(PROMPT) + 1, 5),),
    "a token that is known": (TokenOut(1, len(PROMPT) - 1, 5),),
    "a token of no model": (TokenOut(1, len(PROMPT), VOCAB),),
    "a token twice": (TokenOut(1, len(PROMPT), 5), TokenOut(1, len(PROMPT), 5)),
    "more tokens than the model can": tuple(TokenOut(1, len(PROMPT) + i, 5) for i in range(5000)),
}


@pytest.mark.parametrize("what", COMMITS)
async def test_commits_that_do_not_follow(scene: Scene, what: str) -> None:
    async with Control(scene.worker) as control:
        await control.reserved(1)
        said = await control.ask(Commit(1, COMMITS[what], 5.0))
        assert isinstance(said, Abort) and said.code == "handover_failed"


async def test_control_messages_about_nothing(scene: Scene) -> None:
    async with Control(scene.worker) as control:
        await control.stream.write(Renew(tuple(range(1, 1000))))
        await control.stream.write(Abort(77, "because", "of nothing"))
        said = await control.ask(Commit(88, (), 5.0))
        assert isinstance(said, Abort) and said.code == "stale_attempt"


async def test_reasons_of_its_own_making_do_not_fill_the_books(scene: Scene) -> None:
    async with Control(scene.worker) as control:
        for n in range(1, 200):
            await control.reserved(n)
            await control.stream.write(Abort(n, f"reason {n}", ""))
    assert len(scene.worker.loop.load().handover_aborts) <= 65
