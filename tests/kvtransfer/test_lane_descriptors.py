"""What a lane by shared memory holds of the system, and what becomes of it where there is no more."""

from __future__ import annotations

import errno
import os
import queue
import sys

import pytest

from baton.common.clock import RealClock
from baton.common.config import HandoverConfig
from baton.common.kv_format import KvFormat
from baton.common.messages import Endpoint, TransportBroken
from baton.common.types import WorkerRef
from baton.kernels import move
from baton.kvtransfer import plane as planes
from baton.kvtransfer.host_store import Bytes, HostStore
from baton.kvtransfer.ledger import OwnLedger, open_ledger
from baton.kvtransfer.shm import SharedMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")


def ledgers_open() -> int:
    """Descriptors of this process."""
    there = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum("baton-lane" in os.readlink(path) for path in there if os.path.islink(path))


def test_a_ledger_that_both_ends_have_keeps_no_descriptor() -> None:
    """A lane that broke may lie about until garbage is collected."""
    before = ledgers_open()
    own = OwnLedger()
    theirs = open_ledger(own.address)
    own.close()
    own.leave(5)
    assert theirs._taken[0] == 5, "they do not share"
    assert ledgers_open() == before


@pytest.mark.skipif(not move.keeps_step(2, 4096), reason="nobody can keep step here")
def test_a_source_that_is_out_of_descriptors_tries_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    form, num_blocks = KvFormat(3, 1, 128, 16, "float16", 1), 4

    def never(*_: object) -> Bytes:
        raise AssertionError("both ends keep one type")

    def full() -> OwnLedger:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(planes, "OwnLedger", full)
    said: queue.SimpleQueue[object] = queue.SimpleQueue()
    shared = SharedMemory(form.num_layers * num_blocks * form.block_bytes)
    store = HostStore(shared.memory, form, 0, num_blocks, never)
    ref = WorkerRef("both", "", 1)
    made = planes.Plane(
        ref, store, HandoverConfig(), "secret", "127.0.0.1", RealClock(), None, said.put, shared, ""
    )  # fmt: skip
    try:
        made.outlet.open(1, 1, Endpoint(ref, "", form, "here", (made.door,)), "shm")
        broken = said.get(timeout=20)
    finally:
        made.stop()
    assert isinstance(broken, TransportBroken) and not broken.lasting
