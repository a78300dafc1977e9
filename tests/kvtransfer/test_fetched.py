"""Pieces that are fetched at one go, where the two ends keep no step."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator

import numpy as np
import pytest

from baton.common.errors import HandoverFailed
from baton.common.kv_format import KvFormat
from baton.kvtransfer import fetched
from baton.kvtransfer.fetched import FetchTaker
from baton.kvtransfer.host_store import Bytes, HostStore
from baton.kvtransfer.layout import Route
from baton.kvtransfer.shm import SharedMemory
from baton.kvtransfer.wire import Checksums, FrameHeader

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")

FORMAT = KvFormat(3, 1, 128, 16, "float16", 1)
WHOLE = Route(0, 0, 0, 0, 1)
NUM_BLOCKS = 8
THEIRS, OURS = [0, 2, 5, 7, 1], [3, 1, 4, 6, 0]


def never(*_: object) -> Bytes:
    raise AssertionError("both ends keep one type")


class Target(HostStore):
    """Says `over` at its call number `last`."""

    over = np.zeros(1, np.int32)
    last = 0

    def fetch(self, *arguments: object) -> Checksums:
        self.last -= 1
        self.over[0] = self.last == 0
        return super().fetch(*arguments)  # type: ignore[arg-type]


@pytest.fixture(params=[1, 2, 5, 6, 7, 10, 15, 99])
def pieces_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(fetched, "AT_ONCE", request.param * FORMAT.block_bytes)
    yield request.param


def land(source: SharedMemory, store: Target) -> bool:
    whole = HostStore(source.memory, FORMAT, 0, NUM_BLOCKS, never)
    sums = whole.checksums(range(1, 3), THEIRS, WHOLE).tobytes()
    blocks, slot = array("q", THEIRS).tobytes(), source.claim(5)
    header = FrameHeader(5, 1, 1, 2, 0, 5, 10 * FORMAT.block_bytes, sums, blocks, slot)
    taker = FetchTaker(source.peer(source.address(NUM_BLOCKS), FORMAT), FORMAT)
    return taker.land(store, header, array("q", OURS), WHOLE, store.over)


def pools() -> tuple[SharedMemory, Target]:
    source = SharedMemory(FORMAT.num_layers * NUM_BLOCKS * FORMAT.block_bytes)
    source.memory[:] = np.random.default_rng(0).integers(0, 256, source.memory.size, dtype=np.uint8)
    target = Target(np.zeros_like(source.memory), FORMAT, 0, NUM_BLOCKS, never)
    target.over = np.zeros(1, np.int32)
    return source, target


def test_portions_make_a_whole(pieces_at_once: int) -> None:
    source, target = pools()
    assert land(source, target)
    rows, theirs = (m.reshape(FORMAT.num_layers, NUM_BLOCKS, -1) for m in (target.memory, source.memory))
    assert (rows[1:, OURS] == theirs[1:, THEIRS]).all()
    rows[1:, OURS] = 0
    assert not rows.any()


def test_nobody_copies_on_into_blocks_that_are_wanted_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine loop waits for who copies: a frame is as long as 256 MiB."""
    monkeypatch.setattr(fetched, "AT_ONCE", 2 * FORMAT.block_bytes)
    source, target = pools()
    target.last = 2
    assert not land(source, target)
    written = target.memory.reshape(FORMAT.num_layers, NUM_BLOCKS, -1).any(axis=2)
    assert np.argwhere(written).tolist() == [[1, block] for block in sorted(OURS[:4])]


def test_what_the_source_changed_is_found_in_any_portion(pieces_at_once: int) -> None:
    source, target = pools()

    class Gone(SharedMemory):
        def claim(self, handover_id: int) -> int:
            slot = super().claim(handover_id)
            self.release(slot)
            return slot

    gone = Gone(source.memory.size)
    with pytest.raises(HandoverFailed, match="gave the blocks up"):
        land(gone, target)
