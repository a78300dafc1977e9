from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from baton.common.clock import ManualClock
from baton.common.config import HandoverConfig
from baton.common.errors import WorkerLost
from baton.common.kv_format import KvFormat
from baton.common.messages import TransportBroken
from baton.kvtransfer.layout import Cut
from baton.kvtransfer.outlet import MOST_UNDER_WAY, LaneOutlet
from baton.kvtransfer.transport import Offer
from baton.kvtransfer.wire import FrameHeader
from tests.toy import endpoint


def test_a_target_whose_blocks_fit_no_frame_is_not_sent_any() -> None:
    """Nothing is connected, and no memory is taken for what its format says."""
    form = KvFormat(num_layers=2, num_kv_heads=8, head_dim=512, block_size=1 << 16, dtype="float32")
    store: Any = SimpleNamespace(format=replace(form, block_size=16), rank=0)
    broken, told = list[TransportBroken](), threading.Event()

    def hear(event: TransportBroken) -> None:
        broken.append(event)
        told.set()

    def connect(*_: object) -> Any:
        raise AssertionError("connected")

    outlet = LaneOutlet(store, HandoverConfig(), ManualClock(), connect, hear)
    outlet.open(1, 1, replace(endpoint("decode-0"), format=form), "tcp")
    assert told.wait(5) and "more than a frame holds" in broken[0].message
    outlet.close(1)


class Slow:
    """A giver that takes its time to end, on both threads."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self.ended: list[str] = []

    def credits(self) -> int:
        assert self.closed.wait(5)
        time.sleep(0.05)
        self.ended.append("credits")
        raise WorkerLost("closed")

    def close(self) -> None:
        self.closed.set()

    def release(self) -> None:
        assert "credits" in self.ended


def test_no_thread_of_a_lane_outlives_its_outlet() -> None:
    form = KvFormat(num_layers=2, num_kv_heads=1, head_dim=16, block_size=16, dtype="float32")
    store: Any = SimpleNamespace(format=form, rank=0)
    giver, connected, before = Slow(), threading.Event(), threading.active_count()

    def connect(*_: object) -> Any:
        connected.set()
        return giver

    outlet = LaneOutlet(store, HandoverConfig(), ManualClock(), connect, lambda event: None)
    outlet.open(1, 1, replace(endpoint("decode-0"), format=form), "tcp")
    assert connected.wait(5)
    outlet.stop()
    assert giver.ended == ["credits"] and threading.active_count() == before


FORM = KvFormat(num_layers=2, num_kv_heads=1, head_dim=16, block_size=16, dtype="float32")
END = 0


@dataclass
class Recorder:
    """A giver whose target answers when the test says so: `answers` gets numbers of credits, and `END`."""

    piece: int = 0
    prepared: queue.SimpleQueue[tuple[int, int, int, list[int]]] = field(default_factory=queue.SimpleQueue)
    answers: queue.SimpleQueue[int] = field(default_factory=queue.SimpleQueue)

    def prepare(self, handover_id: int, attempt: int, layers: range, first: int, part: Cut) -> FrameHeader:
        for layer in layers:
            self.prepared.put((handover_id, layer, first, list(part.blocks)))
        size = len(layers) * part.count * self.piece
        return FrameHeader(handover_id, attempt, layers.start, len(layers), first, part.count, size, b"")

    def give(self, header: FrameHeader) -> None:
        """It leaves."""

    def withdraw(self, handover_id: int) -> None:
        """Nothing is vouched for."""

    def credits(self) -> int:
        count = self.answers.get(timeout=20)
        if count == END:
            raise WorkerLost("closed")
        return count

    def close(self) -> None:
        self.answers.put(END)

    def release(self) -> None:
        """Nothing is held."""

    def sees(self, count: int) -> list[tuple[int, int, int, list[int]]]:
        return [self.prepared.get(timeout=20) for _ in range(count)]


@contextmanager
def recorded(
    window: int, target_size: int = 16, giver: Recorder | None = None
) -> Iterator[tuple[LaneOutlet, Recorder]]:
    """An outlet with handover 1 open, to a target with blocks of `target_size` tokens. Two of these fit a frame."""
    store: Any = SimpleNamespace(format=FORM, rank=0, mark=lambda: lambda: None)
    form, giver = replace(FORM, block_size=target_size), giver or Recorder()
    giver.piece = form.block_bytes
    config = HandoverConfig(frame_bytes=2 * form.block_bytes, window_frames=window)
    outlet = LaneOutlet(store, config, ManualClock(), lambda *_: giver, lambda event: None)  # type: ignore[arg-type]
    outlet.open(1, 1, replace(endpoint("decode-0"), format=form), "tcp")
    try:
        yield outlet, giver
    finally:
        outlet.stop()


def settled(holds: Any) -> bool:
    end = time.monotonic() + 20
    while not holds() and time.monotonic() < end:
        time.sleep(0.001)
    return bool(holds())


@pytest.mark.parametrize(
    ("target_size", "cut", "parts"),
    [
        (16, Cut((9, 4, 7, 1, 2), 0, 5), [(3, [9, 4]), (5, [7, 1]), (7, [2])]),
        (8, Cut((9, 4, 7), 8, 5), [(3, [9, 4]), (5, [4, 7]), (7, [7])]),
        (32, Cut((9, 4, 7, 1, 2), 0, 3), [(3, [9, 4, 7, 1]), (5, [2])]),
    ],
)
def test_an_offer_is_as_many_frames_as_it_counts(
    target_size: int, cut: Cut, parts: list[tuple[int, list[int]]]
) -> None:
    with recorded(100, target_size) as (outlet, giver):
        outlet.offer(Offer(1, 3, cut))
        frames = 2 * len(parts)
        assert outlet.pending(1) == frames
        assert giver.sees(frames) == [(1, layer, first, blocks) for layer in (0, 1) for first, blocks in parts]
        for done in range(1, frames):
            giver.answers.put(1)
            assert settled(lambda done=done: outlet.pending(1) == frames - done)  # type: ignore[misc]
        giver.answers.put(1)
        assert settled(lambda: outlet.progress(1) == 2 * giver.piece * cut.count) and outlet.pending(1) == 0
        assert giver.prepared.empty()


def test_no_block_is_read_once_its_handover_is_closed() -> None:
    """Not even where its frames are half sent; what is behind them in the lane goes its way."""
    with recorded(window=1) as (outlet, giver):
        outlet.open(2, 1, replace(endpoint("decode-0"), format=FORM), "tcp")
        for number in (1, 2):
            outlet.stage([Offer(number, 0, Cut((10 * number, 10 * number + 1, 10 * number + 2), 0, 3))])
            outlet.layer(0)
        assert giver.sees(1) == [(1, 0, 0, [10, 11])]
        outlet.close(1)
        giver.answers.put(1)
        assert giver.sees(1) == [(2, 0, 0, [20, 21])]
        giver.answers.put(1)
        assert giver.sees(1) == [(2, 0, 2, [22])]
        giver.answers.put(1)
        assert settled(lambda: outlet.pending(2) == 0) and giver.prepared.empty()


def test_a_lane_waits_for_credits_when_its_window_is_full() -> None:
    with recorded(window=2) as (outlet, giver):
        outlet.offer(Offer(1, 0, Cut((5, 6, 7), 0, 3)))
        assert giver.sees(2) == [(1, 0, 0, [5, 6]), (1, 0, 2, [7])]
        (lane,) = outlet._lanes.values()
        assert settled(lambda: len(lane._under_way) == 2) and giver.prepared.empty()
        giver.answers.put(2)
        assert giver.sees(2) == [(1, 1, 0, [5, 6]), (1, 1, 2, [7])]


def test_the_window_counts_bytes_so_that_short_frames_keep_the_target_as_busy() -> None:
    with recorded(window=2) as (outlet, giver):
        for block in range(4):
            outlet.stage([Offer(1, block, Cut((block,), 0, 1))])
            outlet.layer(0)
        outlet.stage([Offer(1, 4, Cut((4, 5), 0, 2))])
        outlet.layer(0)
        assert giver.sees(4) == [(1, 0, block, [block]) for block in range(4)]
        (lane,) = outlet._lanes.values()
        giver.answers.put(1)
        assert settled(lambda: len(lane._under_way) == 3) and giver.prepared.empty(), "no room for two"
        giver.answers.put(1)
        assert giver.sees(1) == [(1, 0, 4, [4, 5])]


def test_there_is_a_bound_on_short_frames_as_well() -> None:
    with recorded(window=MOST_UNDER_WAY) as (outlet, giver):
        for block in range(MOST_UNDER_WAY + 1):
            outlet.stage([Offer(1, block, Cut((block,), 0, 1))])
            outlet.layer(0)
        assert giver.sees(MOST_UNDER_WAY)[-1] == (1, 0, MOST_UNDER_WAY - 1, [MOST_UNDER_WAY - 1])
        (lane,) = outlet._lanes.values()
        assert settled(lambda: len(lane._under_way) == MOST_UNDER_WAY) and giver.prepared.empty()
        giver.answers.put(1)
        assert giver.sees(1) == [(1, 0, MOST_UNDER_WAY, [MOST_UNDER_WAY])]


def test_a_frame_that_is_made_keeps_nobody_from_offering_more() -> None:
    """Not even where an answer to the one before it waits to be counted."""
    making, made = threading.Event(), threading.Event()

    class Busy(Recorder):
        def prepare(self, handover_id: int, attempt: int, layers: range, first: int, part: Cut) -> FrameHeader:
            if 1 in layers:
                making.set()
                assert made.wait(30)
            return super().prepare(handover_id, attempt, layers, first, part)

    with recorded(window=3, giver=Busy()) as (outlet, giver):
        offer = Offer(1, 0, Cut((5,), 0, 1))
        outlet.offer(offer)
        assert making.wait(20)
        giver.answers.put(1)
        (lane,) = outlet._lanes.values()
        assert settled(lambda: not lane._under_way)
        offering = threading.Thread(target=outlet.offer, args=(offer,), daemon=True)
        offering.start()
        offering.join(10)
        try:
            assert not offering.is_alive()
        finally:
            made.set()
