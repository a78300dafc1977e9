"""Whole workers whose KV lies in device memory, or what takes its place here: tensors, over a driver that has host
memory. With a GPU: `tests/gpu/test_kvtransfer.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from baton.common.errors import TransportFailed
from baton.common.types import Role
from baton.engine.kv_pool import KvPool, cpu_allocator
from baton.kvtransfer.cuda_ipc import CudaMemory
from baton.kvtransfer.device_store import DeviceStore
from baton.kvtransfer.transport import Mark
from baton.router.service import Router
from baton.worker import compute
from tests.house import House
from tests.kvtransfer.stores import FORMAT
from tests.kvtransfer.test_cuda_ipc import HostDriver
from tests.toy import BLOCK_SIZE, LAYERS, ToyEngine, oracle, request
from tests.toy import FORMAT as TOY
from tests.worker.asking import answered, ask, ready

PROMPT = list(range(40, 61))


def device_toy(driver: HostDriver, store: Callable[..., DeviceStore] = DeviceStore) -> ToyEngine:
    """A toy whose pool is a tensor that peers can open."""
    engine = ToyEngine()
    blocks = engine.num_blocks
    pool = CudaMemory(driver, LAYERS * blocks * TOY.block_bytes)
    engine.pool.lie_in(pool.memory.numpy())
    engine.store, engine.shared = store(pool.memory, TOY, 0, blocks), pool  # type: ignore[assignment]
    return engine


@pytest.mark.parametrize("transport", ["cuda-ipc", "tcp", "grpc"])
async def test_each_transport_carries(house: House, router: Router, transport: str) -> None:
    driver = HostDriver()
    prefill = await house.worker("prefill-0", Role.PREFILL, device_toy(driver))
    await house.worker("decode-0", Role.DECODE, device_toy(driver), transport=transport)
    for seed in range(4):
        prompt = [seed, *PROMPT]
        await answered(router, str(seed), prompt, 12)
    assert {name for _, _, name in prefill.plane.outlet._lanes} == {transport}
    await house.balanced()


async def test_between_a_device_and_a_host_it_goes_by_socket(house: House, router: Router) -> None:
    prefill = await house.worker("prefill-0", Role.PREFILL, device_toy(HostDriver()))
    await house.worker("decode-0", Role.DECODE)
    await answered(router, "a", PROMPT, 12)
    assert {name for _, _, name in prefill.plane.outlet._lanes} == {"tcp"}


async def test_memory_that_cannot_be_opened_gives_way_to_a_socket(house: House, router: Router) -> None:
    driver = HostDriver()
    prefill = await house.worker("prefill-0", Role.PREFILL, device_toy(driver))
    await house.worker("decode-0", Role.DECODE, device_toy(driver))
    driver.refuse = True
    await answered(router, "a", PROMPT, 12)
    assert "tcp" in {name for _, _, name in prefill.plane.outlet._lanes}
    await house.balanced()


class LateStore(DeviceStore):
    """Of a device that is behind: what has been computed is there when its mark is waited for, and not before."""

    def __init__(self, memory: torch.Tensor, *shape: object) -> None:
        self.waited = 0
        super().__init__(memory, *shape)  # type: ignore[arg-type]

    def mark(self) -> Mark:
        content = self.memory.clone()
        self.memory.zero_()

        def catch_up() -> None:
            self.waited += 1
            self.memory.copy_(torch.where(content != 0, content, self.memory))

        return catch_up


async def test_what_the_device_has_not_computed_yet_is_waited_for(house: House, router: Router) -> None:
    """The toy's runner computes at once; here its pool looks empty until somebody waits for a mark."""
    driver = HostDriver()
    engine = device_toy(driver, LateStore)
    await house.worker("prefill-0", Role.PREFILL, engine)
    await house.worker("decode-0", Role.DECODE, device_toy(driver), transport="tcp")
    prompt = PROMPT[: BLOCK_SIZE * 2]
    await ready(router)
    got = await ask(router, request("a", prompt, 12))
    assert isinstance(engine.store, LateStore) and engine.store.waited >= LAYERS
    assert got[1:] == oracle([*prompt, got[0]], 11)  # the first token was sampled from a pool that looked empty


def test_a_pool_on_cuda_is_exported_if_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = HostDriver()
    monkeypatch.setattr(compute, "CudaDriver", lambda device: driver)
    memory = compute.PoolMemory()
    flat = memory.allocator(torch.device("cuda", 0))(4096)
    assert isinstance(memory.shared, CudaMemory) and memory.shared.memory is flat

    def unavailable(device: torch.device) -> HostDriver:
        raise TransportFailed("no CUDA driver")

    monkeypatch.setattr(compute, "CudaDriver", unavailable)
    monkeypatch.setattr(compute, "device_allocator", lambda device: cpu_allocator)
    alone = compute.PoolMemory()
    assert alone.allocator(torch.device("cuda", 0))(4096).numel() == 4096
    assert alone.shared is None


def test_a_pool_without_host_memory_has_a_device_store() -> None:
    pool = KvPool(FORMAT, 0, 4, cpu_allocator)
    pool.memory = None
    store = compute.store_of(pool, checked=False)
    assert isinstance(store, DeviceStore) and not store.checked and store.num_blocks == 4
