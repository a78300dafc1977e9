"""Shared memory in step, between two planes in one process: their real lanes over pools of their own."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from baton.common.clock import RealClock
from baton.common.config import HandoverConfig
from baton.common.errors import TransportFailed
from baton.common.kv_format import KvFormat
from baton.common.messages import Endpoint, Filled, Spoiled, TransportBroken
from baton.common.types import WorkerRef
from baton.kernels import move
from baton.kvtransfer.convert import convert
from baton.kvtransfer.fetched import FetchGiver
from baton.kvtransfer.host_store import HostStore
from baton.kvtransfer.in_step import StepGiver
from baton.kvtransfer.layout import Cut
from baton.kvtransfer.plane import Plane
from baton.kvtransfer.shm import SharedMemory
from baton.kvtransfer.transport import Offer
from tests.kvtransfer.stores import values

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not move.keeps_step(2, 2048), reason="memory files are Linux's, and it takes a compiler"
)

FORMAT = KvFormat(num_layers=3, num_kv_heads=4, head_dim=16, block_size=16, dtype="float32")
BLOCKS = 40
SIZE = FORMAT.num_layers * BLOCKS * FORMAT.block_bytes
LEASE_S = 2.0
WAIT_S = 20.0


class End:
    def __init__(self, name: str, seed: int) -> None:
        self.shared = SharedMemory(SIZE)
        self.shared.memory[:] = values(FORMAT, BLOCKS, seed)
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.store = HostStore(self.shared.memory, FORMAT, 0, BLOCKS, convert)
        ref = WorkerRef(name, "", 1)
        self.plane = Plane(
            ref, self.store, HandoverConfig(lease_s=LEASE_S), "token", "127.0.0.1", RealClock(), None, self.said.put,
            self.shared, "",
        )  # fmt: skip
        self.endpoint = Endpoint(ref, "", FORMAT, "", (self.plane.door,))

    @property
    def blocks(self) -> Any:
        """[layers, blocks, bytes]"""
        return self.shared.memory.reshape(FORMAT.num_layers, BLOCKS, -1)

    def hears(self) -> Filled | Spoiled | TransportBroken:
        event: Filled | Spoiled | TransportBroken = self.said.get(timeout=WAIT_S)
        return event


class Two:
    def __init__(self) -> None:
        self.source, self.target = End("prefill-0", 1), End("decode-0", 2)
        self.outlet, self.inlet = self.source.plane.outlet, self.target.plane.inlet

    def reserve(self, number: int, blocks: list[int]) -> tuple[str, int, int]:
        key = ("prefill-0", 1, number)
        self.inlet.open(key, 1, FORMAT, 0, blocks)
        self.inlet.expect(key, len(blocks))
        return key

    def offer(self, number: int, blocks: list[int]) -> None:
        self.outlet.open(number, 1, self.target.endpoint, "shm")
        self.outlet.offer(Offer(number, 0, Cut(tuple(blocks), 0, len(blocks))))

    def arrives(self, number: int) -> None:
        """A handover of all but one block, in another order, comes whole."""
        random = np.random.default_rng(number)
        theirs, ours = random.permutation(BLOCKS)[1:].tolist(), random.permutation(BLOCKS)[1:].tolist()
        key = self.reserve(number, ours)
        self.offer(number, theirs)
        assert self.target.hears() == Filled(key)
        self.inlet.close(key)
        self.outlet.close(number)
        assert np.array_equal(self.target.blocks[:, ours], self.source.blocks[:, theirs])
        self.target.blocks[:] = 0

    @property
    def giver(self) -> Any:
        (lane,) = self.outlet._lanes.values()
        return lane._giver

    def close(self) -> None:
        for end in (self.source, self.target):
            end.plane.stop()


@pytest.fixture
def two() -> Iterator[Two]:
    both = Two()
    yield both
    both.close()


def never_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the source has to wait for the target."""
    for bytes_of in ("AHEAD_BYTES", "TURN_BYTES"):
        monkeypatch.setattr(f"baton.kvtransfer.ledger.{bytes_of}", 1)


def test_handovers_arrive_one_after_the_other(two: Two) -> None:
    for number in range(1, 6):
        two.arrives(number)
    assert type(two.giver) is StepGiver


def test_a_frame_that_is_refused_costs_nobody_the_step(two: Two) -> None:
    two.arrives(1)
    two.offer(2, [1, 2, 3])  # nobody has reserved anything
    key = two.reserve(3, [4, 5])
    two.offer(3, [1, 2, 3])  # more than is reserved
    assert isinstance(two.target.hears(), Spoiled)
    two.inlet.close(key)
    two.arrives(4)


def test_pieces_that_cannot_be_copied_in_step_are_refused(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the greeting said: the route is the reservation's."""
    two.arrives(1)
    monkeypatch.setattr(two.target.store, "keeps_step", lambda route: False)
    key = two.reserve(2, [4, 5])
    two.offer(2, [1, 2])
    said = two.target.hears()
    assert isinstance(said, Spoiled) and "in step" in said.message
    monkeypatch.undo()
    two.inlet.close(key)
    two.arrives(3)


def test_what_is_altered_on_the_way_is_found_out(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    two.arrives(1)
    follow = HostStore.follow

    def flip(store: HostStore, *arguments: Any) -> int:
        done = follow(store, *arguments)
        arguments[-2][1][0] ^= 1  # a bit of what the source says, which is as good as one of what came
        return done

    monkeypatch.setattr(HostStore, "follow", flip)
    key = two.reserve(2, [4, 5])
    two.offer(2, [1, 2])
    said = two.target.hears()
    assert isinstance(said, Spoiled) and said.code == "corrupt_block"
    monkeypatch.undo()
    two.inlet.close(key)
    two.arrives(3)


def test_what_the_source_gives_up_meanwhile_does_not_arrive(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    two.arrives(1)
    follow = HostStore.follow

    def slow(store: HostStore, *arguments: Any) -> int:
        done = follow(store, *arguments)
        two.outlet.close(2)
        two.source.blocks[:, 1] = 0
        return done

    monkeypatch.setattr(HostStore, "follow", slow)
    two.reserve(2, [4, 5])
    two.offer(2, [1, 2])
    said = two.target.hears()
    assert isinstance(said, Spoiled) and "gave the blocks up" in said.message
    monkeypatch.undo()
    two.arrives(3)


def test_a_target_that_stands_still_is_given_up(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane ends within the lease; another is made for what comes next."""
    two.arrives(1)
    inside, go_on = threading.Event(), threading.Event()
    follow = HostStore.follow

    def frozen(store: HostStore, *arguments: Any) -> int:
        inside.set()
        assert go_on.wait(WAIT_S)
        return follow(store, *arguments)

    monkeypatch.setattr(HostStore, "follow", frozen)
    never_far_ahead(monkeypatch)
    two.reserve(2, list(range(20)))
    two.offer(2, list(range(20)))
    assert inside.wait(WAIT_S)
    broken = two.source.hears()
    assert isinstance(broken, TransportBroken) and not broken.lasting
    two.outlet.close(2)
    go_on.set()
    assert isinstance(two.target.hears(), Spoiled)
    monkeypatch.undo()
    two.inlet.close(("prefill-0", 1, 2))
    two.arrives(3)


@pytest.fixture
def halfway(two: Two, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A source that stands still when it has summed four pieces of handover 2; call this for it to go on."""
    two.arrives(1)
    inside, go_on = threading.Event(), threading.Event()
    lead = HostStore.lead

    def frozen(store: HostStore, ledger: Any, done: int, layers: range, blocks: Any, route: Any) -> int:
        if done == 0:
            return lead(store, ledger, done, layers[:1], blocks[:4], route)
        inside.set()
        assert go_on.wait(WAIT_S)
        return done

    monkeypatch.setattr(HostStore, "lead", frozen)
    two.reserve(2, list(range(20)))
    two.offer(2, list(range(20)))
    assert inside.wait(WAIT_S)

    def wake() -> None:
        monkeypatch.undo()
        go_on.set()

    yield wake
    go_on.set()


def test_a_source_that_stands_still_holds_up_nobody(two: Two, halfway: Callable[[], None]) -> None:
    """The engine loop takes the blocks back at once, though the lane waits for the rest of them."""
    two.inlet.close(("prefill-0", 1, 2))
    two.target.blocks[:] = 0
    halfway()
    two.outlet.close(2)
    two.arrives(3)


def test_a_source_that_stands_still_is_given_up(two: Two, halfway: Callable[[], None]) -> None:
    broken = two.source.hears()
    assert isinstance(broken, TransportBroken) and not broken.lasting
    halfway()
    two.outlet.close(2)
    two.inlet.close(("prefill-0", 1, 2))
    two.arrives(3)


def test_who_hangs_up_in_the_middle_ends_the_lane_at_once(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    two.arrives(1)
    inside = threading.Event()

    def stuck(store: HostStore, ledger: Any, done: int, *_: Any) -> int:
        inside.set()
        return done

    monkeypatch.setattr(HostStore, "follow", stuck)
    never_far_ahead(monkeypatch)
    two.reserve(2, list(range(20)))
    two.offer(2, list(range(20)))
    assert inside.wait(WAIT_S)
    two.target.plane.stop()
    broken = two.source.hears()
    assert isinstance(broken, TransportBroken) and "hung up" in broken.message


@pytest.mark.parametrize("why", ["no compiler", "not checked"])
def test_without_it_frames_bring_their_sums_along(two: Two, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "no compiler":
        monkeypatch.setattr(move, "_library", lambda: None)
    else:
        two.source.store.checked = two.target.store.checked = False
    for number in (1, 2):
        two.arrives(number)
    assert type(two.giver) is FetchGiver


def test_a_target_that_cannot_keep_step_fetches_what_brings_its_sums_along(
    two: Two, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(address: str) -> None:
        raise TransportFailed("not here")

    caplog.set_level("INFO")
    monkeypatch.setattr("baton.kvtransfer.plane.open_ledger", refuse)
    for number in (1, 2):
        two.arrives(number)
    assert type(two.giver) is FetchGiver and "not copied in step: not here" in caplog.text
