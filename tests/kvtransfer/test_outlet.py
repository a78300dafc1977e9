from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from baton.common.clock import ManualClock
from baton.common.config import HandoverConfig
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
