"""What two ends of a lane share; that it counts right is shown in `tests/kernels/test_move.py`."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

import pytest

from baton.common.errors import TransportFailed, WorkerLost
from baton.kernels import move
from baton.kvtransfer import ledger
from baton.kvtransfer.ledger import RING, OwnLedger, open_ledger, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")

SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if sys.platform == "linux" else 0


def test_both_ends_see_what_either_counts() -> None:
    own = OwnLedger()
    other = open_ledger(own.address)
    own.close()
    own.close()
    assert not other.summed(0)
    own._summed[0] = 3
    assert other.summed(2) and not other.summed(3)
    other.leave(10)
    own.end(10)
    assert own._taken[0] == own.first == other.first == 10 and not other.summed(0)


def test_an_address_holds_until_its_ledger_is_closed() -> None:
    own = OwnLedger()
    address = own.address
    own.close()
    with pytest.raises(TransportFailed):
        open_ledger(address)


def memory_file(size: int, seals: int, begins: bytes = b"") -> int:
    file = os.memfd_create("test-ledger", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size)
    os.pwrite(file, begins, 0)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def test_what_is_no_ledger_is_refused_and_not_written_to(tmp_path: Path) -> None:
    magic, size = ledger._MAGIC.to_bytes(8, sys.byteorder), ledger._SIZE
    os.mkfifo(tmp_path / "pipe")
    files = [
        memory_file(size, fcntl.F_SEAL_SHRINK, magic),
        memory_file(size - 1, SEALED, magic),
        memory_file(size + 1, SEALED, magic),
        memory_file(size, SEALED),
        memory_file(size, SEALED | fcntl.F_SEAL_WRITE, magic),
        os.open(tmp_path / "plain", os.O_CREAT | os.O_RDWR),
        os.open(tmp_path / "pipe", os.O_RDWR),
        os.open("/dev/zero", os.O_RDWR),
    ]
    addresses = [f"/proc/{os.getpid()}/fd/{file}" for file in files]
    for address in [*addresses, "", "/etc/passwd", "/proc/1/fd/../fd/0", f"/proc/{os.getpid()}/fd/9999"]:
        with pytest.raises(TransportFailed):
            open_ledger(address)
    for file in files:
        os.close(file)


@pytest.mark.parametrize("piece", [256, 4096, 65_536, 1 << 20, 64 << 20])
def test_a_turn_is_some_pieces_and_what_is_ahead_fits_the_ring(piece: int) -> None:
    own = OwnLedger()
    own.begin(piece)
    assert 4 <= own.turn <= move.MOST_AT_ONCE
    assert 2 * own.turn <= own.shared.ahead <= RING
    own.close()


def test_waiting_ends_with_progress_with_the_other_end_or_with_patience() -> None:
    answers = iter([False, False, True])
    wait_for(lambda: next(answers), lambda: False, 30.0)
    with pytest.raises(WorkerLost, match="hung up"):
        wait_for(lambda: False, lambda: True, 30.0)
    with pytest.raises(WorkerLost, match="has not gone on"):
        wait_for(lambda: False, lambda: False, 0.01)
