"""Somebody else's pool in shared memory; what else is refused stands in `tests/worker/test_hostile_source.py`."""

from __future__ import annotations

import fcntl
import os
import sys

import pytest

from baton.common.errors import TransportFailed
from baton.kvtransfer.shm import SLOTS, PeerMemory
from tests.toy import FORMAT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")


def test_a_pool_that_no_address_space_holds_is_refused() -> None:
    """A file takes no memory until somebody writes to it, so it may have almost any size."""
    unit, tail = FORMAT.num_layers * FORMAT.block_bytes, (SLOTS + 1) * 8
    num_blocks = ((1 << 63) - 4096 - tail) // unit
    file = os.memfd_create("test-shm", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, -(-num_blocks * unit // 4096) * 4096 + tail)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with pytest.raises(TransportFailed, match="cannot be seen"):
            PeerMemory(f"/proc/{os.getpid()}/fd/{file}:{num_blocks}:{'0' * 16}", FORMAT)
    finally:
        os.close(file)
