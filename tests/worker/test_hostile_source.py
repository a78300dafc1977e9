"""A peer that is malicious, or broken, and hands over to a worker: each thing it says gets a typed refusal, writes
nothing outside what was reserved for it, and costs nobody else anything."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from baton.common import sockets
from baton.common.config import RouterConfig
from baton.common.errors import BatonError, FingerprintMismatch, InvalidRequest, Unauthorized, WorkerLost
from baton.common.kv_format import KvFormat
from baton.common.messages import Abort, Commit, Endpoint, Refused, Renew, Reserve, Reserved, TargetMessage, TokenOut
from baton.common.types import Role
from baton.kvtransfer import wire
from baton.kvtransfer.layout import Route
from baton.kvtransfer.link import Greeting
from baton.kvtransfer.wire import FrameHeader
from baton.protos import rpc
from baton.protos.convert import RAW
from baton.protos.schema import pb
from baton.protos.values import endpoint_to_wire
from baton.router.service import Router
from baton.worker.assembly import Worker
from tests.house import House
from tests.toy import FORMAT, LAYERS, VOCAB, ToyPool, endpoint, oracle, request

PROMPT = tuple(range(30, 40))  # three blocks, the last of them partial
BLOCKS = 3
PIECE = FORMAT.block_bytes
EVIL = replace(endpoint("evil", epoch=66), host="")
WAIT_S = 5.0


@dataclass
class Scene:
    """A decode worker, an honest pair's router, and what the worker's pool held before."""

    house: House
    router: Router
    worker: Worker
    pool: ToyPool

    def held(self, blocks: list[int]) -> np.ndarray[Any, Any]:
        """The pool but for these blocks."""
        return np.delete(self.pool.shared.memory.reshape(LAYERS, -1, PIECE), blocks, axis=1).copy()

    async def serves(self, seed: int) -> None:
        prompt = [seed, *PROMPT]
        stream, tokens = self.router.submit(request(f"honest-{seed}", prompt, 5)), []
        async with asyncio.timeout(WAIT_S):
            while True:
                batch = await stream.next()
                tokens += [t.token for t in batch.tokens]
                if batch.finish is not None:
                    break
        assert tokens == oracle(prompt, 5)

    async def soon(self, condition: Any) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    house = House()
    await house.worker("prefill-0", Role.PREFILL)
    worker = await house.worker("decode-0", Role.DECODE)
    router = Router("router", RouterConfig(lease_s=1.0, heartbeat_s=0.1), "secret")
    await router.start(house.members())
    pool = worker.plane.store.memory  # type: ignore[attr-defined]
    engine = worker.loop._runner.pool  # type: ignore[attr-defined]
    assert engine.shared.memory is pool
    made = Scene(house, router, worker, engine)
    await made.soon(lambda: router.ready()[0] == "ready")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        await made.serves(1)
        yield made
        await made.serves(2)
        await house.balanced()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"
    finally:
        await router.close()
        await house.close()


class Control:
    """The control stream of a source that does as it likes."""

    def __init__(self, worker: Worker, token: str = "secret", own: Endpoint = EVIL) -> None:
        self._peer = rpc.Peer(worker.ref.address, token)
        self.stream = self._peer.control()
        self.own = own
        self.worker = worker

    async def __aenter__(self) -> Control:
        await self.stream.write(self.own)
        assert isinstance(await self.hear(), Endpoint)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        self.stream.cancel()
        await self._peer.close()

    async def hear(self) -> Any:
        return await asyncio.wait_for(self.stream.read(), WAIT_S)

    async def ask(self, message: Any) -> TargetMessage:
        await self.stream.write(message)
        return await self.hear()  # type: ignore[no-any-return]

    def reserve(self, handover_id: int, **changes: object) -> Reserve:
        router = min(self.worker.loop.context.outbox.routers)
        return replace(
            Reserve(handover_id, 10_000 + handover_id, 1, router, request("evil", PROMPT, 20), self.worker.ref),
            **changes,
        )

    async def reserved(self, handover_id: int) -> list[int]:
        """Have a reservation; its blocks."""
        assert isinstance(await self.ask(self.reserve(handover_id)), Reserved)
        for role in self.worker.loop.roles:
            for sequence in role.sequences():
                if sequence.key[1] == 10_000 + handover_id:
                    return sequence.blocks
        raise AssertionError("granted, and not there")


def greeting(worker: Worker, **changes: object) -> Greeting:
    honest = Greeting("evil", 66, 0, worker.ref.epoch, 0, "tcp", "", FORMAT)
    return replace(honest, **changes)


class Lane:
    """A lane whose source does as it likes. Blocking calls with a timeout, off the event loop."""

    def __init__(self, worker: Worker, hello: Greeting | bytes, token: str = "secret") -> None:
        self.socket = sockets.connect(worker.plane.door["tcp"], token, WAIT_S)
        sockets.send(self.socket, hello if isinstance(hello, bytes) else hello.packed())

    def answer(self) -> str:
        """What the worker says to the greeting: "" is welcome."""
        return sockets.receive(self.socket, 1 << 16).decode()

    def frame(self, head: bytes, payload: bytes = b"") -> bool:
        """Whether the lane goes on: the frame was taken in, or refused by itself."""
        try:
            sockets.send_all(self.socket, len(head).to_bytes(4, "little"), head, payload)
            return bool(self.socket.recv(1))
        except (WorkerLost, OSError):
            return False


@contextlib.contextmanager
def lane(worker: Worker, hello: Greeting | bytes) -> Iterator[Lane]:
    made = Lane(worker, hello)
    try:
        yield made
    finally:
        made.socket.close()


def frame(which: int, first: int = 0, count: int = 1, value: int = 66, **changes: object) -> tuple[bytes, bytes]:
    """A frame as it should be, but for the changes, and its payload."""
    payload, scratch = bytes([value]) * (count * PIECE), ToyPool(count)
    sums = scratch.store.unpack(0, range(count), Route(0, 0, 0, 0, 1), memoryview(payload)).tobytes()
    header = replace(FrameHeader(which, 1, 0, first, count, len(payload), sums), **changes)
    return wire.pack(header), payload


BAD_FRAMES: dict[str, dict[str, Any]] = {
    "a layer that is not there": {"layer": LAYERS},
    "a layer far away": {"layer": 2**62},
    "blocks that are not reserved": {"first": 50},
    "blocks far away": {"first": 2**62},
    "more blocks than are reserved": {"count": 12},
    "fewer bytes than pieces": {"count": 2, "size": PIECE},
    "more bytes than pieces": {"size": 2 * PIECE},
    "checksums of something else": {"checksums": bytes(8)},
}
"""Each of them ends its handover and not the lane."""


@pytest.mark.parametrize("what", BAD_FRAMES)
async def test_a_bad_frame_ends_its_handover_and_writes_nothing_elsewhere(scene: Scene, what: str) -> None:
    async with Control(scene.worker) as control:
        blocks = await control.reserved(1)
        before = scene.held(blocks)
        changes = dict(BAD_FRAMES[what])
        head, payload = frame(1, **{k: changes.pop(k) for k in ("first", "count") if k in changes}, **changes)
        payload = payload.ljust(wire.unpack(head).size, b"!")[: wire.unpack(head).size]
        with lane(scene.worker, greeting(scene.worker)) as evil:
            assert await asyncio.to_thread(evil.answer) == ""
            assert await asyncio.to_thread(evil.frame, head, payload)
        said = await control.hear()
        assert isinstance(said, Abort) and said.code == "handover_failed"
        assert np.array_equal(scene.held(blocks), before)
    assert dict(scene.worker.loop.load().handover_aborts) == {"handover_failed": 1}


STALE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "an attempt that was given up": ({"attempt": 2}, {}),
    "a handover that nobody knows": ({"which": 7}, {}),
    "the handover of another source": ({}, {"name": "prefill-0"}),
    "the handover of another incarnation": ({}, {"epoch": 67}),
}


@pytest.mark.parametrize("what", STALE)
async def test_frames_for_what_is_not_theirs_change_nothing(scene: Scene, what: str) -> None:
    header, hello = STALE[what]
    async with Control(scene.worker) as control:
        await control.reserved(1)
        before = scene.pool.shared.memory.copy()
        with lane(scene.worker, greeting(scene.worker, **hello)) as evil:
            assert await asyncio.to_thread(evil.answer) == ""
            assert await asyncio.to_thread(evil.frame, *frame(**{"which": 1, **header}))
            assert np.array_equal(scene.pool.shared.memory, before)
        assert (await scene.worker.check()).handovers == 1, "the reservation stands"


async def test_pieces_that_overlap_end_the_handover(scene: Scene) -> None:
    async with Control(scene.worker) as control:
        blocks = await control.reserved(1)
        before = scene.held(blocks)
        with lane(scene.worker, greeting(scene.worker)) as evil:
            evil.answer()
            assert await asyncio.to_thread(evil.frame, *frame(1, 0, 2))
            assert await asyncio.to_thread(evil.frame, *frame(1, 1, 2, value=99))
        assert isinstance(await control.hear(), Abort)
        assert np.array_equal(scene.held(blocks), before)
        assert not (scene.pool.shared.memory == 99).any()


JUNK = {
    "nothing": b"",
    "noise": os.urandom(64),
    "no header": msgpack.packb([1, 2, 3]),
    "a negative block": msgpack.packb((1, 1, 0, -1, 1, PIECE, bytes(8), (), 0)),
    "a number beyond all": msgpack.packb((1, 1, 0, 2**64 - 1, 1, PIECE, bytes(8), (), 0)),
    "no pieces": msgpack.packb((1, 1, 0, 0, 0, 0, b"", (), 0)),
    "a thousand million pieces": msgpack.packb((1, 1, 0, 0, 10**9, PIECE, bytes(8), (), 0)),
    "text for blocks": msgpack.packb((1, 1, 0, 0, 1, PIECE, bytes(8), "a", 0)),
    "bytes for blocks": msgpack.packb((1, 1, 0, 0, 1, PIECE, bytes(8), b"a", 0)),
    "a map for blocks": msgpack.packb((1, 1, 0, 0, 1, PIECE, bytes(8), {1: 1}, 0)),
    "nested without end": b"\x91" * 2000,
    "more bytes than any frame": msgpack.packb((1, 1, 0, 0, 1, wire.MAX_FRAME + 1, bytes(8), (), 0)),
    "a header too long": bytes(wire.MAX_HEADER + 1),
}


@pytest.mark.parametrize("what", JUNK)
async def test_junk_ends_the_lane(scene: Scene, what: str, caplog: pytest.LogCaptureFixture) -> None:
    async with Control(scene.worker) as control:
        await control.reserved(1)
        before = scene.pool.shared.memory.copy()
        with lane(scene.worker, greeting(scene.worker)) as evil:
            evil.answer()
            assert not await asyncio.to_thread(evil.frame, JUNK[what])
        assert np.array_equal(scene.pool.shared.memory, before)
        await scene.soon(lambda: "connection ended" in caplog.text)


def _greetings(worker: Worker) -> dict[str, Greeting | bytes]:
    good = greeting(worker)
    fields = (
        *(getattr(good, f) for f in ("name", "epoch", "rank", "target_epoch", "target_rank", "transport", "door")),
    )
    other = replace(FORMAT, num_layers=99)
    return {
        "noise": b"\xc1 what?",
        "an empty one": b"",
        "numbers for names": msgpack.packb((1, 2, 3, 4, 5, 6, 7, astuple(FORMAT))),
        "half a layer": msgpack.packb((*fields, (0.5, 1, 4, 4, "int8", 1))),
        "a thousand million layers": msgpack.packb((*fields, (10**9, 1, 4, 4, "int8", 1))),
        "a rank that is not there": replace(good, rank=1),
        "another incarnation": replace(good, target_epoch=1),
        "another rank of ours": replace(good, target_rank=1),
        "a transport that nobody has": replace(good, transport="pigeon"),
        "shared memory of another model": replace(good, transport="shm", format=other),
        "shared memory kept in another way": replace(good, transport="shm", format=replace(FORMAT, block_size=8)),
    }


async def test_bad_greetings_are_refused(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    for what, hello in _greetings(scene.worker).items():
        caplog.clear()
        with lane(scene.worker, hello) as evil:
            with contextlib.suppress(WorkerLost):  # hung up without a word, and a line in the log
                assert await asyncio.to_thread(evil.answer), what
            await scene.soon(lambda: "connection ended" in caplog.text)


async def test_who_does_not_know_the_token_is_not_listened_to(scene: Scene) -> None:
    with pytest.raises((WorkerLost, Unauthorized)):
        await asyncio.to_thread(lambda: Lane(scene.worker, greeting(scene.worker), token="guess").answer())
    for kind in ("control", "data"):
        peer = rpc.Peer(scene.worker.ref.address, "guess")
        stream: Any = getattr(peer, kind)()
        with pytest.raises(Unauthorized):
            await asyncio.wait_for(stream.read(), WAIT_S)
        await peer.close()


# --- shared memory ---


def _memory_file(size: int, seal: bool) -> int:
    file = os.memfd_create("evil", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size)
    if seal:
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return file


async def test_doors_that_are_no_shared_pool(scene: Scene, tmp_path: Path) -> None:
    """Each is refused in words, at once, and nothing is mapped."""
    shared = ToyPool(8).shared
    address = shared.address(8)
    file, _, stamp = address.split(":")
    whole = os.fstat(shared._file).st_size
    os.mkfifo(tmp_path / "pipe")
    files = [
        _memory_file(whole, seal=False),
        _memory_file(whole, seal=True),
        _memory_file(64, seal=True),
        os.open(tmp_path / "plain", os.O_CREAT | os.O_RDWR),
        os.open(tmp_path / "pipe", os.O_RDWR),
        os.open("/dev/zero", os.O_RDONLY),
    ]
    doors = [f"/proc/{os.getpid()}/fd/{f}:8:{stamp}" for f in files]
    doors += ["", "pool", f"/etc/passwd:8:{stamp}", f"/proc/1/fd/0:8:{stamp}"]
    doors += [f"/proc/{os.getpid()}/fd/9999:8:{stamp}"]
    doors += [
        f"{file}:9000:{stamp}",
        f"{file}:{10**17}:{stamp}",
        f"{file}:{'9' * 5000}:{stamp}",
        f"{file}:8:{'0' * 16}",
    ]
    for door in doors:
        with lane(scene.worker, greeting(scene.worker, transport="shm", door=door)) as evil:
            assert await asyncio.to_thread(evil.answer), door
    for f in files:
        os.close(f)


@pytest.mark.parametrize(
    "wrong", [{"blocks": (8,)}, {"blocks": (2**62,)}, {"blocks": ()}, {"slot": 4096}, {"slot": 2**62}, {"slot": 3}]
)
async def test_frames_of_shared_memory_that_point_elsewhere(scene: Scene, wrong: dict[str, Any]) -> None:
    theirs = ToyPool(8)
    slot = theirs.shared.claim(1)
    theirs.bytes[:] = 66
    async with Control(scene.worker) as control:
        blocks = await control.reserved(1)
        before = scene.held(blocks)
        sums = theirs.store.checksums(0, [5], Route(0, 0, 0, 0, 1)).tobytes()
        header = replace(FrameHeader(1, 1, 0, 0, 1, PIECE, sums, (5,), slot), **wrong)
        with lane(scene.worker, greeting(scene.worker, transport="shm", door=theirs.shared.address(8))) as evil:
            assert await asyncio.to_thread(evil.answer) == ""
            assert await asyncio.to_thread(evil.frame, wire.pack(header))
        said = await control.hear()
        assert isinstance(said, Abort) and said.code == "handover_failed"
        assert np.array_equal(scene.held(blocks), before)


# --- gRPC lanes ---


async def _grpc_lane(worker: Worker, *messages: bytes) -> BatonError | None:
    """Say these things; how the lane ended, None: it goes on."""
    peer = rpc.Peer(worker.ref.address, "secret")
    stream = peer.data()
    try:
        for message in messages:
            await stream.write(message)
            await asyncio.wait_for(stream.read(), WAIT_S)
        return None
    except BatonError as error:
        return error
    finally:
        stream.cancel()
        await peer.close()


async def test_bad_frames_over_grpc(scene: Scene) -> None:
    before = scene.pool.shared.memory.copy()
    hello = greeting(scene.worker, transport="grpc").packed()
    head, payload = frame(1)
    whole = len(head).to_bytes(4, "little") + head + payload
    assert await _grpc_lane(scene.worker, hello, whole) is None  # of no reservation: dropped
    for junk in (b"", b"abc", b"\xff\xff\xff\xff" + head, whole[:-1], whole + b"!", b"\x01\x00\x00\x00\xc1"):
        assert await _grpc_lane(scene.worker, hello, junk) is not None
    for bad in (b"", b"what?", greeting(scene.worker, target_epoch=1).packed()):
        assert await _grpc_lane(scene.worker, bad, whole) is not None
    assert np.array_equal(scene.pool.shared.memory, before)


# --- control ---


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
    stream = peer._stream(rpc.CONTROL, RAW, RAW)
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


async def test_a_lane_that_says_nothing_holds_up_nobody(scene: Scene) -> None:
    """Half a greeting, half a frame: the thread waits, with a deadline, and others are served."""
    with lane(scene.worker, greeting(scene.worker)) as quiet, lane(scene.worker, greeting(scene.worker)) as half:
        half.answer()
        head, payload = frame(1)
        sockets.send_all(half.socket, len(head).to_bytes(4, "little"), head, payload[:10])
        bare = socket.create_connection(tuple(scene.worker.plane.door["tcp"].split(":")))  # type: ignore[arg-type]
        await scene.serves(3)
        bare.close()
        quiet.answer()
