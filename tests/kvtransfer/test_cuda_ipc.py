"""Pools in device memory that peers open, over a driver that has host memory. The real one is tried in
`tests/gpu/test_kvtransfer.py`."""

from __future__ import annotations

import itertools
from array import array

import numpy as np
import pytest
import torch

from baton.common.errors import HandoverFailed, TransportFailed
from baton.kvtransfer.cuda_ipc import CudaMemory, PeerCudaMemory
from baton.kvtransfer.device_store import DeviceStore
from baton.kvtransfer.fetched import FetchTaker
from baton.kvtransfer.layout import piece_bytes
from baton.kvtransfer.wire import FrameHeader
from tests.kvtransfer.stores import FORMAT, WHOLE, values

BLOCKS = 6
GOING_ON = np.zeros(1, np.int32)
SIZE = FORMAT.num_layers * BLOCKS * FORMAT.block_bytes


class HostDriver:
    """Implements `cuda_ipc.Driver`; `refuse`: says no to who opens."""

    def __init__(self) -> None:
        self.memories: dict[bytes, torch.Tensor] = {}
        self.open_now = 0
        self.refuse = False
        self._numbers = itertools.count(1)

    def allocate(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def export(self, memory: torch.Tensor) -> bytes:
        handle = next(self._numbers).to_bytes(64, "big")
        self.memories[handle] = memory
        return handle

    def open(self, handle: bytes) -> torch.Tensor:
        if self.refuse or handle not in self.memories:
            raise TransportFailed("cuIpcOpenMemHandle: CUDA_ERROR_PEER_ACCESS_UNSUPPORTED")
        self.open_now += 1
        return self.memories[handle]

    def close(self, memory: torch.Tensor) -> None:
        assert any(memory is known for known in self.memories.values())
        self.open_now -= 1


@pytest.fixture
def driver() -> HostDriver:
    return HostDriver()


@pytest.fixture
def source(driver: HostDriver) -> CudaMemory:
    pool = CudaMemory(driver, SIZE)
    pool.memory.copy_(torch.from_numpy(values(FORMAT, BLOCKS)))
    return pool


def frame(source: CudaMemory, slot: int, blocks: tuple[int, ...], handover_id: int = 7) -> FrameHeader:
    sums = DeviceStore(source.memory, FORMAT, 0, BLOCKS).checksums(range(1, 2), blocks, WHOLE)
    size = len(blocks) * piece_bytes(FORMAT, WHOLE)
    return FrameHeader(handover_id, 1, 1, 1, 0, len(blocks), size, sums.tobytes(), array("q", blocks).tobytes(), slot)


def test_a_peer_fetches_what_is_vouched_for(driver: HostDriver, source: CudaMemory) -> None:
    target = CudaMemory(driver, SIZE)
    store = DeviceStore(target.memory, FORMAT, 0, BLOCKS)
    taker = FetchTaker(target.peer(source.address(BLOCKS), FORMAT), FORMAT)
    header = frame(source, source.claim(7), (4, 1))
    assert taker.land(store, header, (0, 5), WHOLE, GOING_ON)
    ours, theirs = (memory.view(FORMAT.num_layers, BLOCKS, -1)[1] for memory in (target.memory, source.memory))
    assert torch.equal(ours[[0, 5]], theirs[[4, 1]])
    taker.close()
    taker.close()
    assert driver.open_now == 0


def test_what_is_given_up_while_it_is_copied_does_not_count(driver: HostDriver, source: CudaMemory) -> None:
    store = DeviceStore(torch.zeros(SIZE, dtype=torch.uint8), FORMAT, 0, BLOCKS)
    taker = FetchTaker(source.peer(source.address(BLOCKS), FORMAT), FORMAT)
    slot = source.claim(7)
    header = frame(source, slot, (4,))
    source.release(slot)
    with pytest.raises(HandoverFailed, match="gave the blocks up"):
        taker.land(store, header, (0,), WHOLE, GOING_ON)
    source.claim(8)  # the slot's next owner does not vouch for its last one's blocks
    with pytest.raises(HandoverFailed, match="gave the blocks up"):
        taker.land(store, header, (0,), WHOLE, GOING_ON)


def test_blocks_that_the_source_does_not_have_are_refused(driver: HostDriver, source: CudaMemory) -> None:
    store = DeviceStore(torch.zeros(SIZE, dtype=torch.uint8), FORMAT, 0, BLOCKS)
    taker = FetchTaker(source.peer(source.address(BLOCKS), FORMAT), FORMAT)
    header = FrameHeader(
        7, 1, 0, 1, 0, 1, piece_bytes(FORMAT, WHOLE), bytes(8), array("q", [BLOCKS]).tobytes(), source.claim(7)
    )
    with pytest.raises(HandoverFailed, match="does not have"):
        taker.land(store, header, (0,), WHOLE, GOING_ON)
    assert not store.memory.any()


def test_a_pool_that_is_smaller_than_it_says_is_refused(driver: HostDriver, source: CudaMemory) -> None:
    with pytest.raises(TransportFailed, match="smaller"):
        source.peer(source.address(BLOCKS + 1), FORMAT)
    assert driver.open_now == 0


def test_a_pool_that_cannot_be_opened_is_a_transport_that_fails(driver: HostDriver, source: CudaMemory) -> None:
    driver.refuse = True
    with pytest.raises(TransportFailed, match="PEER_ACCESS"):
        source.peer(source.address(BLOCKS), FORMAT)


@pytest.mark.parametrize("address", ["", "nonsense", "ab:6@/proc/1/fd/3:0:" + "0" * 16, "/proc/1/fd/3:6:" + "0" * 16])
def test_what_is_no_address_is_refused(driver: HostDriver, address: str) -> None:
    with pytest.raises(TransportFailed):
        PeerCudaMemory(driver, address, FORMAT)


def test_an_owner_who_is_gone_is_not_taken_for_who_has_its_numbers(driver: HostDriver, source: CudaMemory) -> None:
    address = source.address(BLOCKS)
    with pytest.raises(TransportFailed, match="another"):
        source.peer(address[:-16] + f"{int(address[-16:], 16) ^ 1:016x}", FORMAT)
    assert driver.open_now == 0
