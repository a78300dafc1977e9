from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from baton.common.clock import ManualClock
from baton.common.errors import HandoverFailed, StaleAttempt
from baton.common.messages import Filled, Spoiled
from baton.kernels.move import Flag
from baton.kvtransfer import wire
from baton.kvtransfer.inlet import RankInlet
from baton.kvtransfer.layout import Route
from baton.kvtransfer.transport import Store
from baton.kvtransfer.wire import FrameHeader
from tests.toy import FORMAT, LAYERS, ToyPool

SOURCE = ("prefill-0", 11)
KEY = (*SOURCE, 5)
ROUTE = Route(0, 0, 0, 0, 1)


class Given:
    """A taker whose bytes are all one value. `at_landing` is called before they land."""

    def __init__(self, value: int = 7, at_landing: object = None) -> None:
        self.value, self.at_landing = value, at_landing

    def fetch(self, header: FrameHeader) -> None: ...

    def land(self, store: Store, header: FrameHeader, blocks: Sequence[int], route: Route, over: Flag) -> bool:
        if callable(self.at_landing):
            self.at_landing()
        data = memoryview(bytes([self.value]) * header.size)
        header.confirm(store.unpack(header.all_layers, blocks, route, data))
        return True

    def leave(self, header: FrameHeader) -> None: ...

    def close(self) -> None: ...


def frame(layer: int, first: int, count: int, value: int = 7, layers: int = 1) -> FrameHeader:
    size = layers * count * FORMAT.block_bytes
    scratch = ToyPool(layers * count)
    sums = scratch.store.unpack(range(1), range(layers * count), ROUTE, memoryview(bytes([value]) * size))
    return FrameHeader(5, 1, layer, layers, first, count, size, sums.tobytes())


@pytest.fixture
def posted() -> list[Filled | Spoiled]:
    return []


@pytest.fixture
def pool() -> ToyPool:
    return ToyPool(8)


@pytest.fixture
def inlet(pool: ToyPool, posted: list[Filled | Spoiled]) -> RankInlet:
    inlet = RankInlet(pool.store, ManualClock(3.0), posted.append)
    inlet.open(KEY, 1, FORMAT, 2, [6, 1, 4])  # the sequence's blocks 2, 3 and 4
    return inlet


def test_bytes_land_in_the_reserved_blocks_and_nowhere_else(
    inlet: RankInlet, pool: ToyPool, posted: list[Filled | Spoiled]
) -> None:
    assert inlet.touched(KEY) is None
    inlet.expect(KEY, 5)
    for layer in range(LAYERS):
        inlet.receive(SOURCE, 0, frame(layer, 2, 2, 10 + layer), Given(10 + layer))
        assert posted == []
    for layer in range(LAYERS):
        inlet.receive(SOURCE, 0, frame(layer, 4, 1, 20 + layer), Given(20 + layer))
    assert posted == [Filled(KEY)] and inlet.touched(KEY) == 3.0
    for layer in range(LAYERS):
        for block in range(8):
            value = {6: 10 + layer, 1: 10 + layer, 4: 20 + layer}.get(block, 0)
            assert (pool.bytes[layer, block] == value).all()


def test_a_frame_may_be_of_several_layers(inlet: RankInlet, pool: ToyPool, posted: list[Filled | Spoiled]) -> None:
    inlet.expect(KEY, 4)
    inlet.receive(SOURCE, 0, frame(0, 2, 3, 9, layers=LAYERS - 1), Given(9))
    assert posted == [] and (pool.bytes[: LAYERS - 1, [6, 1, 4]] == 9).all() and not pool.bytes[LAYERS - 1].any()
    with pytest.raises(HandoverFailed, match="no layer"):
        inlet.receive(SOURCE, 0, frame(1, 2, 3, layers=LAYERS), Given())


def test_several_layers_complete_what_is_expected_of_them(inlet: RankInlet, posted: list[Filled | Spoiled]) -> None:
    inlet.expect(KEY, 4)
    inlet.receive(SOURCE, 0, frame(0, 2, 1), Given())
    inlet.receive(SOURCE, 0, frame(0, 3, 2), Given())
    inlet.receive(SOURCE, 0, frame(1, 4, 1, layers=LAYERS - 1), Given())  # beyond what is expected
    assert posted == []
    inlet.receive(SOURCE, 0, frame(1, 2, 2, layers=LAYERS - 1), Given())
    assert posted == [Filled(KEY)]


def test_several_layers_may_come_again(inlet: RankInlet, posted: list[Filled | Spoiled]) -> None:
    inlet.expect(KEY, 5)
    for _ in range(2):
        inlet.receive(SOURCE, 0, frame(0, 2, 3, layers=LAYERS), Given())
    assert posted == [Filled(KEY)]


def test_the_loop_need_not_wait_for_a_landing_to_say_what_it_expects(
    inlet: RankInlet, posted: list[Filled | Spoiled]
) -> None:
    with ThreadPoolExecutor() as threads:
        taker = Given(at_landing=lambda: threads.submit(inlet.expect, KEY, 5).result(20))
        inlet.receive(SOURCE, 0, frame(0, 2, 3, layers=LAYERS), taker)
    assert posted == [Filled(KEY)]


class InPart(Given):
    """Of whose frame only some is at hand: `lacking` times more has to be fetched."""

    def __init__(self, lacking: int, at_fetch: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.lacking, self.at_fetch = lacking, at_fetch

    def fetch(self, header: FrameHeader) -> None:
        self.at_fetch()

    def land(self, store: Store, header: FrameHeader, blocks: Sequence[int], route: Route, over: Flag) -> bool:
        self.lacking -= 1
        return self.lacking < 0 and super().land(store, header, blocks, route, over)


def test_what_has_landed_in_part_has_not_arrived(inlet: RankInlet, posted: list[Filled | Spoiled]) -> None:
    inlet.expect(KEY, 5)
    fetched: list[int] = []
    taker = InPart(3, lambda: fetched.append(len(posted)))
    inlet.receive(SOURCE, 0, frame(0, 2, 3, layers=LAYERS), taker)
    assert fetched == [0, 0, 0] and posted == [Filled(KEY)]


def test_nobody_waits_for_the_rest_of_what_is_wanted_no_more(inlet: RankInlet) -> None:
    """The loop may close a reservation while its bytes are waited for: no lock is held then."""
    fetched: list[int] = []

    def close() -> None:
        fetched.append(1)
        inlet.close(KEY)

    with pytest.raises(StaleAttempt):
        inlet.receive(SOURCE, 0, frame(0, 2, 3), InPart(1000, close))
    assert fetched == [1]


def test_a_landing_is_told_that_it_is_over(inlet: RankInlet) -> None:
    inside, seen = threading.Event(), threading.Event()

    class Long(Given):
        def land(self, store: Store, header: FrameHeader, blocks: Sequence[int], route: Route, over: Flag) -> bool:
            inside.set()
            end = time.monotonic() + 20
            while not over[0] and time.monotonic() < end:
                time.sleep(0.001)
            seen.set()
            return False

    with ThreadPoolExecutor() as threads:
        landing = threads.submit(inlet.receive, SOURCE, 0, frame(0, 2, 3), Long())
        assert inside.wait(20)
        inlet.close(KEY)
        assert seen.is_set(), "close returned while somebody was writing"
        assert isinstance(landing.exception(20), StaleAttempt)


@pytest.mark.parametrize("expected", [2, 3, 4, 5])
@pytest.mark.parametrize("early", [True, False])
def test_complete_means_all_that_is_expected(
    inlet: RankInlet, posted: list[Filled | Spoiled], expected: int, early: bool
) -> None:
    """The end is announced before the bytes or after them; what was reserved beyond it is not waited for."""
    if early:
        inlet.expect(KEY, expected)
    for layer in range(LAYERS):
        for block in range(2, expected):
            assert posted == []
            inlet.receive(SOURCE, 0, frame(layer, block, 1), Given())
    if not early:
        assert posted == []
        inlet.expect(KEY, expected)
    assert posted == [Filled(KEY)]


def test_more_than_reserved_spoils(inlet: RankInlet, posted: list[Filled | Spoiled]) -> None:
    inlet.expect(KEY, 6)
    assert isinstance(posted[0], Spoiled)


def test_the_same_frame_twice_counts_once(inlet: RankInlet, posted: list[Filled | Spoiled]) -> None:
    inlet.expect(KEY, 5)
    for layer in (0, 0, 1, 1, 2):
        inlet.receive(SOURCE, 0, frame(layer, 2, 3), Given())
    assert posted == [Filled(KEY)]


@pytest.mark.parametrize(
    "wrong",
    [{"layer": LAYERS}, {"first": 1}, {"first": 4}, {"size": 1}, {"size": 3 * FORMAT.block_bytes}],
    ids=str,
)
def test_wrong_frames_are_refused_and_spoil_the_handover(
    inlet: RankInlet, pool: ToyPool, posted: list[Filled | Spoiled], wrong: dict[str, int]
) -> None:
    with pytest.raises(HandoverFailed):
        inlet.receive(SOURCE, 0, replace(frame(0, 2, 2), **wrong), Given())
    assert isinstance(posted[0], Spoiled) and not pool.bytes.any()


def test_damaged_bytes_spoil_the_handover(inlet: RankInlet, posted: list[Filled | Spoiled]) -> None:
    with pytest.raises(HandoverFailed, match="checksum"):
        inlet.receive(SOURCE, 0, frame(0, 2, 2), Given(8))
    inlet.expect(KEY, 2)
    assert isinstance(posted[0], Spoiled)


def test_a_source_that_goes_on_after_a_bad_frame_says_nothing_more(
    inlet: RankInlet, pool: ToyPool, posted: list[Filled | Spoiled]
) -> None:
    """Otherwise it could fill the loop's inbox, and write on where nobody will read."""
    for error in (HandoverFailed, StaleAttempt, StaleAttempt):
        with pytest.raises(error):
            inlet.receive(SOURCE, 0, replace(frame(0, 2, 2), size=1), Given())
    with pytest.raises(StaleAttempt):
        inlet.receive(SOURCE, 0, frame(0, 2, 2), Given())
    assert len(posted) == 1 and isinstance(posted[0], Spoiled) and not pool.bytes.any()
    assert inlet.touched(KEY) is None
    inlet.close(KEY)


def test_a_frame_that_waits_for_its_reservation_is_let_go_when_that_is_closed(pool: ToyPool) -> None:
    """A handover that ends before this rank has heard of its beginning."""
    inlet = RankInlet(pool.store, ManualClock(), lambda _: None, late_s=10.0)
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(inlet.receive, SOURCE, 0, frame(0, 2, 1), Given())
        with pytest.raises(TimeoutError):
            waiting.result(0.05)
        inlet.close(KEY)
        assert isinstance(waiting.exception(5), StaleAttempt)


def test_overlaps_are_refused(inlet: RankInlet) -> None:
    inlet.receive(SOURCE, 0, frame(0, 2, 2), Given())
    with pytest.raises(HandoverFailed, match="overlaps"):
        inlet.receive(SOURCE, 0, frame(0, 3, 2), Given())


def test_a_rank_that_has_nothing_to_send_is_refused(inlet: RankInlet, pool: ToyPool) -> None:
    with pytest.raises(HandoverFailed):
        inlet.receive(SOURCE, 1, frame(0, 2, 1), Given())
    assert not pool.bytes.any()


@pytest.mark.parametrize("stranger", [("prefill-0", 12), ("prefill-1", 11)])
def test_another_incarnation_cannot_write(inlet: RankInlet, pool: ToyPool, stranger: tuple[str, int]) -> None:
    with pytest.raises(StaleAttempt):
        inlet.receive(stranger, 0, frame(0, 2, 1), Given())
    with pytest.raises(StaleAttempt):
        inlet.receive(SOURCE, 0, replace(frame(0, 2, 1), attempt=2), Given())
    with pytest.raises(StaleAttempt):
        inlet.receive(SOURCE, 0, replace(frame(0, 2, 1), handover_id=6), Given())
    assert not pool.bytes.any()


def test_nothing_is_written_after_close(inlet: RankInlet) -> None:
    """A writer that is in the middle finishes before `close` returns; one that comes later is refused."""
    inside, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        inside.set()
        assert go_on.wait(5)

    writer = threading.Thread(target=inlet.receive, args=(SOURCE, 0, frame(0, 2, 1), Given(7, slow)))
    writer.start()
    assert inside.wait(5)
    closer = threading.Thread(target=lambda: (inlet.close(KEY), closed.set()))
    closer.start()
    assert not closed.wait(0.05)
    go_on.set()
    assert closed.wait(5)
    writer.join()
    closer.join()
    with pytest.raises(StaleAttempt):
        inlet.receive(SOURCE, 0, frame(1, 2, 1), Given())


def test_a_source_of_two_ranks_is_complete_with_both(pool: ToyPool, posted: list[Filled | Spoiled]) -> None:
    """Two heads of one rank here come from two ranks there."""
    form = replace(FORMAT, num_kv_heads=2, head_dim=2)
    store = type(pool.store)(np.zeros(LAYERS * 8 * form.block_bytes, np.uint8), form, 0, 8, lambda *_: np.zeros(1))
    inlet = RankInlet(store, ManualClock(), posted.append)
    inlet.open(KEY, 1, replace(form, tp=2), 0, [3])
    inlet.expect(KEY, 1)
    size = form.block_bytes // 2
    for rank in (0, 1):
        for layer in range(LAYERS):
            assert posted == []
            route = Route(rank, 0, 0, rank, 1)
            sums = store.unpack(range(layer, layer + 1), [3], route, memoryview(bytes([7]) * size))
            inlet.receive(SOURCE, rank, FrameHeader(5, 1, layer, 1, 0, 1, size, sums.tobytes()), Given())
    assert posted == [Filled(KEY)]


def test_headers_travel_whole() -> None:
    header = FrameHeader(5, 1, 2, 1, 3, 2, 64, b"0123456789abcdef", array("q", [7, 9]).tobytes(), 11)
    assert wire.unpack(wire.pack(header)) == header


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"abc",
        b"\xff\xff\xff\xff",
        b"\xc1",
        wire.pack(FrameHeader(5, 1, 2, 1, 3, 2, 64, b"short")),
        wire.pack(FrameHeader(5, 1, 2, 1, 3, 2, 64, bytes(16), bytes(15))),
        wire.pack(FrameHeader(5, 1, 2, 1, 3, 2, 64, bytes(16), bytes(8))),  # blocks of one piece of two
        wire.pack(FrameHeader(5, 1, 2, 1, 3, 2, 64, bytes(16), "x" * 16)),  # type: ignore[arg-type]
        wire.pack(FrameHeader(5, 1, 2, 1, 3, 0, 0, b"")),
        wire.pack(FrameHeader(5, 1, 2, 0, 3, 2, 64, b"")),
        wire.pack(FrameHeader(5, 1, 2, wire.MAX_PIECES, 3, 2, 64, b"")),
        wire.pack(FrameHeader(5, 1, 2, 3, 3, 2, 64, bytes(16))),  # checksums of one layer of three
        wire.pack(FrameHeader(5, 1, 2, 1, -3, 2, 64, bytes(16))),
        wire.pack(FrameHeader(5, 1, 1 << 63, 1, 3, 2, 64, bytes(16))),
        wire.pack(FrameHeader(5, 1, True, 1, 3, 2, 64, bytes(16))),
    ],
)
def test_junk_is_a_typed_error(junk: bytes) -> None:
    with pytest.raises(HandoverFailed):
        wire.unpack(junk)
