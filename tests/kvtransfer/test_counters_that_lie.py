"""What a peer may write into the memory that the two ends of a lane share: it must cost its handover or its lane, and
nothing of ours. A counter is any number at all."""

from __future__ import annotations

import socket
import sys
import threading
from array import array
from collections.abc import Iterator

import numpy as np
import pytest

from baton.common.clock import ManualClock
from baton.common.errors import BatonError, WorkerLost
from baton.common.kv_format import KvFormat
from baton.common.messages import Filled, Spoiled
from baton.common.types import WorkerRef
from baton.kernels import move
from baton.kvtransfer.host_store import Bytes, HostStore
from baton.kvtransfer.in_step import StepTaker
from baton.kvtransfer.inlet import RankInlet
from baton.kvtransfer.layout import Route
from baton.kvtransfer.ledger import OwnLedger, open_ledger
from baton.kvtransfer.link import Greeting, LaneServer
from baton.kvtransfer.shm import SharedMemory
from baton.kvtransfer.wire import FrameHeader

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's"),
    pytest.mark.skipif(not move.keeps_step(2, 4096), reason="nobody can keep step here"),
]

FORMAT = KvFormat(3, 1, 128, 16, "float16", 1)
KEY = ("prefill-0", 11, 5)
BLOCKS = 8
PATIENCE = 0.2
GREETING = Greeting(*KEY[:2], 0, 1, 0, "shm", "", FORMAT)


def _never(*_: object) -> Bytes:
    raise AssertionError("both ends keep one type")


class Target:
    """One that waits for a frame of all layers of four blocks, from a source that only writes numbers."""

    def __init__(self) -> None:
        size = FORMAT.num_layers * BLOCKS * FORMAT.block_bytes
        self.source, pool = SharedMemory(size), SharedMemory(size)
        self.source.memory[:] = 7
        self.memory = pool.memory
        self.posted: list[Filled | Spoiled] = []
        store = HostStore(pool.memory, FORMAT, 0, BLOCKS, _never)
        self.inlet = RankInlet(store, ManualClock(), self.posted.append)
        self.inlet.open(KEY, 1, FORMAT, 0, [3, 1, 4, 6])
        self.inlet.expect(KEY, 4)
        self.ledger = OwnLedger()
        self.lane, self._there = socket.socketpair()
        peer = self.source.peer(self.source.address(BLOCKS), FORMAT)
        self.taker = StepTaker(peer, GREETING, store, open_ledger(self.ledger.address), self._there, PATIENCE)
        self.server = LaneServer(WorkerRef("decode-0", "", 1), 0, self.inlet, {}, PATIENCE)

    def take(self) -> BatonError | None:
        """What taking the frame in ends with, which it does."""
        slot = self.source.claim(KEY[2])
        blocks = array("q", [0, 2, 5, 7]).tobytes()
        header = FrameHeader(KEY[2], 1, 0, 3, 0, 4, 12 * FORMAT.block_bytes, b"", blocks, slot)
        ended: list[BatonError | None] = []

        def run() -> None:
            try:
                self.server.take(GREETING, header, self.taker)
            except BatonError as error:
                ended.append(error)
            else:
                ended.append(None)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(20)
        self.inlet.close(KEY)  # or a thread that goes on for ever would
        thread.join(20)
        return ended[0]

    def close(self) -> None:
        self.ledger.close()
        self.lane.close()
        self._there.close()


@pytest.fixture
def target() -> Iterator[Target]:
    made = Target()
    yield made
    made.close()


@pytest.mark.parametrize("counter", [0, (1 << 63) + 5, (1 << 64) - 1])
def test_a_counter_that_is_behind_is_no_progress(target: Target, counter: int) -> None:
    """The lane ends, as if the source were frozen: nobody goes round and round, and keeps the reservation alive."""
    target.ledger._summed[0] = counter
    assert isinstance(target.take(), WorkerLost)
    assert target.posted == [] and not target.memory.any()


@pytest.mark.parametrize("counter", [1, 11, 12, 13, 1 << 32, 1 << 62, (1 << 63) - 1])
def test_a_counter_that_is_ahead_finds_wrong_sums(target: Target, counter: int) -> None:
    target.ledger._summed[0] = counter
    assert target.take() is None
    assert [type(event) for event in target.posted] == [Spoiled]
    assert target.ledger._taken[0] == 12, "a source would wait for what is not taken"
    assert not np.delete(target.memory.reshape(FORMAT.num_layers, BLOCKS, -1), [3, 1, 4, 6], axis=1).any()


def test_a_source_that_stops_in_the_middle_ends_the_lane_and_spoils_nothing(target: Target) -> None:
    """The two ends have lost step: the next frame would be read as the rest of this one."""
    store = HostStore(target.source.memory, FORMAT, 0, BLOCKS, _never)
    target.ledger.begin(FORMAT.block_bytes)
    target.ledger.shared.ahead = 4
    assert store.lead(target.ledger, 0, range(3), [0, 2, 5, 7], Route(0, 0, 0, 0, 1)) == 4
    assert isinstance(target.take(), WorkerLost)
    assert target.posted == []
    rows = target.memory.reshape(FORMAT.num_layers, BLOCKS, -1)
    assert (rows[0, [3, 1, 4, 6]] == 7).all() and not rows[1:].any()
