from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baton.common import sockets
from baton.common.clock import RealClock
from baton.common.config import HandoverConfig
from baton.common.errors import BatonError, HandoverFailed, TransportFailed, WorkerLost
from baton.common.kv_format import KvFormat
from baton.common.messages import Endpoint, Filled, Spoiled, TransportBroken
from baton.common.types import WorkerRef
from baton.kvtransfer import pair
from baton.kvtransfer.choose import choose
from baton.kvtransfer.host_store import HostStore
from baton.kvtransfer.layout import Cut
from baton.kvtransfer.link import Greeting
from baton.kvtransfer.pair import Pair
from baton.kvtransfer.plane import Plane
from baton.kvtransfer.process_group import ProcessGroups
from baton.kvtransfer.transport import Offer

HOST = "127.0.0.1"
CPU = torch.device("cpu")
FORMAT = KvFormat(num_layers=3, num_kv_heads=2, head_dim=16, block_size=16, dtype="bfloat16")
BLOCKS = 64
LEASE_S = 2.0


class End:
    """A rank with its data plane. Needs no event loop that runs, as gRPC is not used here."""

    def __init__(self, name: str, transport: str = "process-group") -> None:
        self.said: queue.SimpleQueue[Filled | Spoiled | TransportBroken] = queue.SimpleQueue()
        self.memory = np.zeros(FORMAT.num_layers * BLOCKS * FORMAT.block_bytes, np.uint8)
        store = HostStore(self.memory, FORMAT, 0, BLOCKS, lambda rows, *_: rows)
        ref = WorkerRef(name, f"{HOST}:1", 1)
        frame = 8 * FORMAT.block_bytes
        config = HandoverConfig(transport=transport, lease_s=LEASE_S, frame_bytes=frame, window_frames=4)
        self.plane = Plane(
            ref, store, config, "secret", HOST, RealClock(), asyncio.new_event_loop(), self.said.put, None, "",
            ProcessGroups(CPU, HOST, LEASE_S),
        )  # fmt: skip
        self.endpoint = Endpoint(ref, "", FORMAT, name, (self.plane.door,))

    def layers(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return self.memory.reshape(FORMAT.num_layers, BLOCKS, FORMAT.block_bytes)

    def give(self, handover_id: int, target: Endpoint, blocks: list[int], times: int = 1) -> None:
        self.plane.outlet.open(handover_id, 1, target, "process-group")
        for _ in range(times):
            self.plane.outlet.offer(Offer(handover_id, 0, Cut(tuple(blocks), 0, len(blocks))))

    def take(self, source: str, handover_id: int, blocks: list[int]) -> None:
        self.plane.inlet.open((source, 1, handover_id), 1, FORMAT, 0, blocks)
        self.plane.inlet.expect((source, 1, handover_id), len(blocks))

    def hears(self) -> Filled | Spoiled | TransportBroken:
        return self.said.get(timeout=10 * LEASE_S)

    def stop(self) -> None:
        self.plane.stop()
        self.plane._loop.close()


def elsewhere(name: str, door: dict[str, str]) -> Endpoint:
    """The end of that name in another process."""
    return Endpoint(WorkerRef(name, f"{HOST}:1", 1), "", FORMAT, name, (door,))


@pytest.fixture
def ends() -> Iterator[Callable[..., End]]:
    made: list[End] = []

    def make(name: str) -> End:
        made.append(End(name))
        return made[-1]

    yield make
    for end in made:
        end.stop()


def soon(holds: Callable[[], bool], within_s: float = 20.0) -> bool:
    end = time.monotonic() + within_s
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def met(patience: float = 5.0) -> tuple[Pair, Pair]:
    """Both ends of a pair."""
    with ThreadPoolExecutor() as pool:
        one, other = socket.socketpair()
        with one, other:
            making = [pool.submit(Pair, s, s is one, CPU, HOST, patience) for s in (one, other)]
            return making[0].result(), making[1].result()


# --- pairs ---


def test_what_is_sent_is_received_in_order() -> None:
    source, target = met()
    sent = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in (1, 70_000, 3)]
    received = [torch.empty_like(data) for data in sent]
    waits = [target.receive(data) for data in received] + [source.send(data) for data in sent]
    for wait in waits:
        wait()
    assert all(torch.equal(a, b) for a, b in zip(sent, received, strict=True))


@pytest.mark.parametrize("waits", ["send", "receive"])
def test_who_waits_is_woken_by_abort(waits: str) -> None:
    """Long before the patience ends, and the other end learns of it as well."""
    source, target = met(patience=60)
    much = torch.zeros(64 << 20, dtype=torch.uint8)
    waiting, other = (source, target) if waits == "send" else (target, source)
    with ThreadPoolExecutor() as pool:
        result = pool.submit(getattr(waiting, waits)(much))
        waiting.abort()
        assert isinstance(result.exception(10), WorkerLost)
    with pytest.raises(WorkerLost):
        other.receive(much)()


def test_a_pair_that_is_not_met_is_a_typed_error() -> None:
    one, other = socket.socketpair()
    with one, other, pytest.raises(BatonError):
        Pair(one, True, CPU, HOST, 0.2)


def test_one_that_hangs_up_while_the_pair_is_made_is_noticed_at_once() -> None:
    one, other = socket.socketpair()
    with one, ThreadPoolExecutor() as pool:
        making = pool.submit(Pair, one, True, CPU, HOST, 60)
        other.close()
        assert isinstance(making.exception(10), WorkerLost)


def test_a_socket_that_has_just_been_closed_is_a_typed_error() -> None:
    one, other = socket.socketpair()
    one.close()
    with other, pytest.raises(WorkerLost):
        Pair(one, True, CPU, HOST, 5.0)


def test_one_that_cannot_be_connected_to_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport is then avoided for a while, not for good."""

    class Gloo(torch.distributed.ProcessGroupGloo):  # type: ignore[misc]
        def __init__(self, store: object, rank: int, size: int, options: Any) -> None:
            raise RuntimeError("Gloo connectFullMesh failed with Connection refused")

    monkeypatch.setattr(torch.distributed, "ProcessGroupGloo", Gloo)
    one, other = socket.socketpair()
    with one, other, pytest.raises(WorkerLost, match="Connection refused"):
        Pair(one, True, CPU, HOST, 5.0)


def come_late(count: int = 8) -> None:
    """Of each pair, one end connects when the other has given up. Which of them listens is chance."""
    given_up, get = threading.Event(), pair._Meeting.get

    def slow(meeting: pair._Meeting, key: str) -> bytes:
        heard = get(meeting, key)
        if key == "0/0":  # where the source listens, which the target asks
            assert given_up.wait(30)
        return heard

    def make(end: socket.socket, source: bool, patience: float) -> Exception | None:
        try:
            Pair(end, source, CPU, HOST, patience)
        except BatonError as error:
            return error
        return None

    pair._Meeting.get = slow  # type: ignore[method-assign]
    ends = [socket.socketpair() for _ in range(count)]
    with ThreadPoolExecutor(2 * count) as pool:
        late = [pool.submit(make, target, False, 8.0) for _, target in ends]
        early = [pool.submit(make, source, True, 0.5) for source, _ in ends]
        errors: list[Any] = [making.result() for making in early]  # each holds what its frames do
        given_up.set()
        for source, _ in ends:
            source.close()
        errors += [making.result() for making in late]
    assert all(isinstance(error, WorkerLost) for error in errors), errors


def test_pairs_that_were_given_up_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps a thread until gloo gives up, too."""
    begun, end = threading.Semaphore(0), threading.Event()

    class Gloo(torch.distributed.ProcessGroupGloo):  # type: ignore[misc]
        def __init__(self, *_: object) -> None:
            begun.release()
            assert end.wait(30)
            raise RuntimeError("Gloo connectFullMesh failed with timed out connecting")

    monkeypatch.setattr(torch.distributed, "ProcessGroupGloo", Gloo)
    monkeypatch.setattr(pair, "_connecting", threading.BoundedSemaphore(2))

    def why() -> str:
        one, other = socket.socketpair()
        with one, other, pytest.raises(WorkerLost) as raised:
            Pair(one, True, CPU, HOST, 0.1)
        return raised.value.message

    try:
        told = [why() for _ in range(3)]
        assert ["takes too long" in each for each in told] == [True, True, False] and "too many" in told[2]
    finally:
        end.set()
    assert soon(lambda: "connectFullMesh" in why()), "there is room again"
    assert all(begun.acquire(timeout=5) for _ in range(3))


def test_one_that_comes_after_the_other_gave_up_ends_nobody() -> None:
    """In a process of its own: gloo ends it where a pair is gone that a listener still knows."""
    script = "from tests.kvtransfer.test_process_group import come_late; come_late()"
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=90)
    assert ended.returncode == 0, ended.stderr


def test_what_two_send_each_other_may_take_the_whole_patience() -> None:
    """Longer than gloo may take to connect."""
    source, target = met(patience=2.0)
    data = torch.ones(3, dtype=torch.uint8)
    came = torch.zeros_like(data)
    with ThreadPoolExecutor() as pool:
        receiving = pool.submit(target.receive(came))
        time.sleep(0.6)
        source.send(data)()
        assert receiving.exception(5) is None and torch.equal(came, data)


@pytest.mark.parametrize("source", [True, False])
def test_who_came_to_the_port_but_is_not_at_the_socket_is_refused(
    monkeypatch: pytest.MonkeyPatch, source: bool
) -> None:
    """It speaks as gloo does and does not know what was said by the socket."""
    proven = pair._Meeting.get

    def get(meeting: pair._Meeting, key: str) -> bytes:
        heard = proven(meeting, key)
        return bytes(32) if key == f"said by {int(source)}" else heard  # the other one's key

    monkeypatch.setattr(pair._Meeting, "get", get)
    with ThreadPoolExecutor() as pool:
        one, other = socket.socketpair()
        with one, other:
            making = [pool.submit(Pair, s, s is one, CPU, HOST, 5.0) for s in (one, other)]
            with pytest.raises(TransportFailed, match="somebody else"):
                making[0 if source else 1].result()
            assert isinstance(making[1 if source else 0].exception(10), BatonError | None)


@pytest.mark.parametrize("junk", [b"", b"\xc1", b"\x92\x01\x02", b"\x93\xa1a\xa1b\xa1c"])
def test_junk_where_ranks_should_meet_is_refused(junk: bytes) -> None:
    one, other = socket.socketpair()
    with one, other:
        sockets.send(other, junk)
        with pytest.raises(HandoverFailed, match="not what two ranks tell each other"):
            Pair(one, True, CPU, HOST, 5.0)


# --- lanes ---


def test_blocks_arrive_as_they_left(ends: Callable[..., End]) -> None:
    """More frames than buffers and than the window, by lanes of two sources into one inlet."""
    target = ends("target")
    for number, name in enumerate(("one", "other")):
        source = ends(name)
        source.memory[:] = np.random.default_rng(number).integers(0, 255, source.memory.size, dtype=np.uint8)
        order = np.random.default_rng(7).permutation(BLOCKS).tolist()
        target.take(name, 5, list(range(BLOCKS)))
        source.give(5, target.endpoint, order)
        assert target.hears() == Filled((name, 1, 5))
        assert np.array_equal(target.layers(), source.layers()[:, order])
        assert soon(lambda source=source: source.plane.outlet.progress(5) == source.memory.size)  # type: ignore[misc]


def test_a_frame_that_nobody_expects_costs_the_lane_nothing(ends: Callable[..., End]) -> None:
    source, target = ends("source"), ends("target")
    source.give(5, target.endpoint, [1, 2, 3])
    target.take("source", 6, [7])
    source.memory[:] = 9
    source.give(6, target.endpoint, [4])
    assert target.hears() == Filled(("source", 1, 6))
    assert [block for block in range(BLOCKS) if target.layers()[0, block].any()] == [7]


def test_nccl_and_gloo_do_not_meet(ends: Callable[..., End]) -> None:
    source, target = ends("source"), ends("target")
    nccl = replace(target.endpoint, doors=({**target.plane.door, "process-group": "nccl"},))
    assert choose(source.endpoint, target.endpoint, "process-group") == "process-group"
    assert choose(source.endpoint, nccl, "process-group") == "tcp"
    greeting = Greeting("source", 1, 0, 1, 0, "process-group", "nccl", FORMAT)
    with socket.socket() as connection, pytest.raises(TransportFailed):
        ProcessGroups(CPU, HOST, LEASE_S).taker(greeting, connection)


def test_nothing_stays_of_lanes_that_have_ended(ends: Callable[..., End]) -> None:
    """Threads and descriptors of twenty lanes are gone with them."""

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    target = ends("target")
    before = held()
    for number in range(20):
        source = End(f"source-{number}")
        target.take(f"source-{number}", 5, [1, 2])
        source.give(5, target.endpoint, [1, 2])
        assert isinstance(target.hears(), Filled)
        source.stop()
    assert soon(lambda: all(now <= then + 2 for now, then in zip(held(), before, strict=True))), (before, held())


def test_a_target_that_stops_in_the_middle_is_noticed_and_the_next_lane_works(ends: Callable[..., End]) -> None:
    source, target = ends("source"), ends("target")
    source.give(5, target.endpoint, list(range(BLOCKS)), times=300)
    assert soon(lambda: source.plane.outlet.progress(5) > 0)
    target.stop()
    broken = source.hears()
    assert isinstance(broken, TransportBroken) and broken.transport == "process-group"
    again = ends("target-again")
    again.take("source", 6, [3])
    source.give(6, again.endpoint, [4])
    assert again.hears() == Filled(("source", 1, 6))


# --- death ---


OTHER = """
import sys
from tests.kvtransfer.test_process_group import *
end = End("other")
print(json.dumps(dict(end.plane.door)), flush=True)
here = elsewhere("here", json.loads(sys.stdin.readline()))
while True:
    end.give(5, here, list(range(BLOCKS)), times=3000)
    end.said.get()
"""
"""A process that gives for a long time, and again whenever its lane has broken."""


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", OTHER], stdin=pipe, stdout=pipe, cwd=root, text=True) as process:
        yield process
        process.kill()


def test_a_process_that_freezes_and_one_that_dies(ends: Callable[..., End], other: subprocess.Popen[str]) -> None:
    """Bytes flow both ways. Each time what we send ends with a typed error, soon; when the other process is back,
    new lanes work; when it is dead, no thread of ours stays."""
    assert other.stdin is not None and other.stdout is not None
    here = ends("here")
    threads = set(threading.enumerate())
    door = json.loads(other.stdout.readline())
    other.stdin.write(json.dumps(dict(here.plane.door)) + "\n")
    other.stdin.flush()
    for number, death in enumerate((signal.SIGSTOP, signal.SIGKILL)):
        here.take("other", 5, list(range(BLOCKS)))
        here.give(number, elsewhere("other", door), list(range(BLOCKS)), times=3000)
        assert here.hears() == Filled(("other", 1, 5))
        assert soon(lambda number=number: here.plane.outlet.progress(number) > 0)  # type: ignore[misc]
        other.send_signal(death)
        assert isinstance(here.hears(), TransportBroken)
        other.send_signal(signal.SIGCONT)
        here.plane.inlet.close(("other", 1, 5))
    assert soon(lambda: set(threading.enumerate()) <= threads), threading.enumerate()
