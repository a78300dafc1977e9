"""A peer that is malicious, or broken, and sends frames to a worker: each gets a typed refusal, writes nothing outside
what was reserved for it, and costs nobody else anything."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from baton.common import sockets
from baton.common.errors import BatonError, Unauthorized, WorkerLost
from baton.common.messages import Abort
from baton.kvtransfer import wire
from baton.kvtransfer.layout import Route
from baton.kvtransfer.link import Greeting
from baton.kvtransfer.wire import FrameHeader
from baton.protos import rpc
from baton.worker.assembly import Worker
from tests.toy import FORMAT, LAYERS, ToyPool
from tests.worker.hostile import PIECE, WAIT_S, Control, Lane, Scene, a_scene, frame, greeting, lane, paired


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with a_scene() as made:
        yield made


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


@pytest.mark.parametrize("hello", [greeting, paired], ids=["tcp", "process-group"])
@pytest.mark.parametrize("what", BAD_FRAMES)
async def test_a_bad_frame_ends_its_handover_and_writes_nothing_elsewhere(
    scene: Scene, what: str, hello: Callable[[Worker], Greeting]
) -> None:
    async with Control(scene.worker) as control:
        blocks = await control.reserved(1)
        before = scene.held(blocks)
        changes = dict(BAD_FRAMES[what])
        head, payload = frame(1, **{k: changes.pop(k) for k in ("first", "count") if k in changes}, **changes)
        payload = payload.ljust(wire.unpack(head).size, b"!")[: wire.unpack(head).size]
        with lane(scene.worker, hello(scene.worker)) as evil:
            assert await asyncio.to_thread(evil.answer) == ""
            assert await asyncio.to_thread(evil.frame, head, payload)
        said, code = await control.hear(), "corrupt_block" if "checksums" in changes else "handover_failed"
        assert isinstance(said, Abort) and said.code == code
        assert np.array_equal(scene.held(blocks), before)
    assert dict(scene.worker.loop.load().handover_aborts) == {code: 1}


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
    "a header of old": msgpack.packb((1, 1, 0, 0, 1, PIECE, bytes(8), b"", 0)),
    "a negative block": msgpack.packb((1, 1, 0, 1, -1, 1, PIECE, bytes(8), b"", 0)),
    "a number beyond all": msgpack.packb((1, 1, 0, 1, 2**64 - 1, 1, PIECE, bytes(8), b"", 0)),
    "no blocks": msgpack.packb((1, 1, 0, 1, 0, 0, 0, b"", b"", 0)),
    "no layers": msgpack.packb((1, 1, 0, 0, 0, 1, 0, b"", b"", 0)),
    "a thousand million blocks": msgpack.packb((1, 1, 0, 1, 0, 10**9, PIECE, b"", b"", 0)),
    "a thousand million layers": msgpack.packb((1, 1, 0, 10**9, 0, 1, PIECE, b"", b"", 0)),
    "text for blocks": msgpack.packb((1, 1, 0, 1, 0, 1, PIECE, bytes(8), "aaaaaaaa", 0)),
    "too few bytes for blocks": msgpack.packb((1, 1, 0, 1, 0, 1, PIECE, bytes(8), b"a", 0)),
    "a map for blocks": msgpack.packb((1, 1, 0, 1, 0, 1, PIECE, bytes(8), {1: 1}, 0)),
    "nested without end": b"\x91" * 2000,
    "more bytes than any frame": msgpack.packb((1, 1, 0, 1, 0, 1, wire.MAX_FRAME + 1, bytes(8), b"", 0)),
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
        good.ledger,
    )
    other = replace(FORMAT, num_layers=99)
    return {
        "noise": b"\xc1 what?",
        "an empty one": b"",
        "numbers for names": msgpack.packb((1, 2, 3, 4, 5, 6, 7, 8, astuple(FORMAT))),
        "half a layer": msgpack.packb((*fields, (0.5, 1, 4, 4, "int8", 1))),
        "a thousand million layers": msgpack.packb((*fields, (10**9, 1, 4, 4, "int8", 1))),
        "a rank that is not there": replace(good, rank=1),
        "another incarnation": replace(good, target_epoch=1),
        "another rank of ours": replace(good, target_rank=1),
        "a transport that nobody has": replace(good, transport="pigeon"),
        "a process group of another kind": replace(paired(worker), door="nccl"),
        "a ledger that is none": replace(
            good, transport="shm", door=ToyPool(8).shared.address(8), ledger="/proc/1/fd/1"
        ),
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
    "wrong",
    [*({"blocks": array("q", [b]).tobytes()} for b in (8, -1, 2**62)), {"blocks": b""}, {"slot": 4096},
     {"slot": 2**62}, {"slot": 3}],
)  # fmt: skip
async def test_frames_of_shared_memory_that_point_elsewhere(scene: Scene, wrong: dict[str, Any]) -> None:
    theirs = ToyPool(8)
    slot = theirs.shared.claim(1)
    theirs.bytes[:] = 66
    async with Control(scene.worker) as control:
        blocks = await control.reserved(1)
        before = scene.held(blocks)
        sums = theirs.store.checksums(range(1), [5], Route(0, 0, 0, 0, 1)).tobytes()
        header = replace(FrameHeader(1, 1, 0, 1, 0, 1, PIECE, sums, array("q", [5]).tobytes(), slot), **wrong)
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
