from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from baton.common.clock import ManualClock
from baton.common.config import HandoverConfig
from baton.common.errors import WorkerLost
from baton.common.kv_format import KvFormat
from baton.common.messages import TransportBroken
from baton.kvtransfer.outlet import LaneOutlet
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
