"""Device memory between processes of one machine: the target's kernels copy straight out of the source's pool, within
one GPU or over NVLink.

What `shm.py` does for host memory, but for two things. The slots that vouch for blocks cannot lie in device memory,
where looking at them would take a kernel: they are in host memory beside it. And CUDA has no handle that only permits
reading: that the peer's pool is not written to rests on the target's code, which holds the cluster's token, and not on
the hardware. The other direction, where it matters that a source which wakes up late can do no harm, stays safe: no
source ever opens its target's pool.

A copy that counts has been waited for before its slot is looked at, and a source clears the slot before it launches
anything that writes to the blocks; so the order on the two hosts is the order on the devices.
"""

from __future__ import annotations

import re
from typing import Protocol

import torch

from ..common.errors import TransportFailed
from ..common.kv_format import KvFormat
from .shm import PeerMemory, SharedMemory

_ADDRESS = re.compile(r"([0-9a-f]{128}):([0-9]{1,18})@(.+)")


class Driver(Protocol):
    """See `cuda_driver.CudaDriver`."""

    def allocate(self, size: int) -> torch.Tensor: ...

    def export(self, memory: torch.Tensor) -> bytes: ...

    def open(self, handle: bytes) -> torch.Tensor: ...

    def close(self, memory: torch.Tensor) -> None: ...


class CudaMemory:
    """See `fetched.Shared`. `memory`: `size` bytes, zeroed, on the driver's device. Made once, for a process's life.
    Raises `TransportFailed` where the device has no room, or does not share memory."""

    transport = "cuda-ipc"

    def __init__(self, driver: Driver, size: int) -> None:
        self.memory = driver.allocate(size)
        self._driver = driver
        self._handle = driver.export(self.memory)
        self._slots = SharedMemory(0)

    def address(self, num_blocks: int) -> str:
        return f"{self._handle.hex()}:{num_blocks}@{self._slots.address(0)}"

    def claim(self, handover_id: int) -> int:
        return self._slots.claim(handover_id)

    def release(self, slot: int) -> None:
        self._slots.release(slot)

    def peer(self, address: str, format: KvFormat) -> PeerCudaMemory:
        return PeerCudaMemory(self._driver, address, format)


class PeerCudaMemory:
    """See `fetched.Peer`. Somebody else's `CudaMemory`. Raises `TransportFailed` where it cannot be opened, or is not
    what its owner says."""

    def __init__(self, driver: Driver, address: str, format: KvFormat) -> None:
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise TransportFailed(f"{address!r} is no pool in device memory")
        self.num_blocks = int(match[2])
        size = format.num_layers * self.num_blocks * format.block_bytes
        self._slots = PeerMemory(match[3], format)  # first: a stamp that is not the owner's shows who is gone
        self._driver = driver
        self._opened: torch.Tensor | None = driver.open(bytes.fromhex(match[1]))
        self.memory = self._opened[:size]
        if self.memory.numel() < size:
            self.close()
            raise TransportFailed("the peer's pool is smaller than it says")

    def kept(self, slot: int, handover_id: int) -> bool:
        return self._slots.kept(slot, handover_id)

    def close(self) -> None:
        """Idempotent. `memory` must not be read any more."""
        opened, self._opened = self._opened, None
        if opened is not None:
            self._driver.close(opened)
