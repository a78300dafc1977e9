"""The store over a tensor against the store over an array: the same bytes and sums, by another way. On a CPU here; on
a GPU in `tests/gpu/test_kvtransfer.py`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from baton.common.errors import TransportFailed
from baton.kvtransfer import device_store
from baton.kvtransfer.device_store import DeviceStore
from baton.kvtransfer.layout import Cut, Route, piece_bytes
from tests.kvtransfer.stores import FORMAT, WHOLE, same_pools, values

BLOCKS = 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("route", [WHOLE, Route(0, 1, 1, 0, 2)])
def test_packs_and_unpacks_what_a_host_store_does(dtype: str, route: Route) -> None:
    kept = replace(FORMAT, dtype=dtype)
    host, device = same_pools(kept, BLOCKS)
    part, blocks = Cut((7, 2, 5), 0, 3), (1, 8, 3)
    data, other = (store.buffer(3 * piece_bytes(kept, route)) for store in (host, device))
    sums = host.pack(range(1, 2), part, route, kept, data)
    assert np.array_equal(device.pack(range(1, 2), part, route, kept, other), sums)
    assert data == other and sums.all()
    assert np.array_equal(device.checksums(range(1, 2), part.blocks, route), sums)
    for store in (host, device):
        assert np.array_equal(store.unpack(range(1), blocks, route, other.toreadonly()), sums)
    assert np.array_equal(host.memory, device.memory.numpy())


def test_packs_into_and_unpacks_from_the_device() -> None:
    host, device = same_pools(FORMAT, BLOCKS)
    size = 2 * piece_bytes(FORMAT, WHOLE)
    expected = host.buffer(size)
    sums = host.pack(range(1), Cut((4, 9), 0, 2), WHOLE, FORMAT, expected)
    staged = torch.empty(size, dtype=torch.uint8)
    assert np.array_equal(device.pack(range(1), Cut((4, 9), 0, 2), WHOLE, FORMAT, staged), sums)
    assert staged.numpy().data == expected
    assert np.array_equal(device.unpack(range(1, 2), (0, 1), WHOLE, staged), sums)
    host.unpack(range(1, 2), (0, 1), WHOLE, expected)
    assert np.array_equal(host.memory, device.memory.numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("size", "part"), [(8, Cut((7, 2), 8, 3)), (32, Cut((7, 2, 5, 1), 0, 2)), (16, Cut((3,), 0, 1))]
)
def test_cuts_and_converts_as_a_host_store_does(dtype: str, size: int, part: Cut) -> None:
    host, device = same_pools(FORMAT, BLOCKS)
    target = replace(FORMAT, block_size=size, dtype=dtype)
    route = Route(0, 0, 1, 0, 2)
    data, other = (store.buffer(part.count * piece_bytes(target, route)) for store in (host, device))
    sums = host.pack(range(1, 2), part, route, target, data)
    assert np.array_equal(device.pack(range(1, 2), part, route, target, other), sums)
    assert data == other


def test_quantised_rows_are_cut_with_their_scales() -> None:
    kept = replace(FORMAT, dtype="int8")
    host, device = same_pools(kept, BLOCKS)
    target = replace(kept, block_size=8)
    data, other = (store.buffer(3 * piece_bytes(target, WHOLE)) for store in (host, device))
    assert np.array_equal(
        host.pack(range(1), Cut((7, 2), 8, 3), WHOLE, target, data),
        device.pack(range(1), Cut((7, 2), 8, 3), WHOLE, target, other),
    )
    assert data == other


def test_fetches_out_of_a_peers_pool() -> None:
    host, device = same_pools(FORMAT, BLOCKS)
    peer = values(FORMAT, 20, seed=5)
    route = Route(0, 0, 1, 0, 3)
    sums = host.fetch(peer, FORMAT, 20, range(1, 2), (19, 3), (2, 6), route)
    assert np.array_equal(device.fetch(torch.from_numpy(peer), FORMAT, 20, range(1, 2), (19, 3), (2, 6), route), sums)
    assert np.array_equal(host.memory, device.memory.numpy())
    with pytest.raises(IndexError):
        device.fetch(torch.from_numpy(peer), FORMAT, 20, range(1, 2), (20,), (2,), route)


def test_unchecked_sums_are_zero() -> None:
    memory = torch.from_numpy(values(FORMAT, BLOCKS))
    store = DeviceStore(memory, FORMAT, 0, BLOCKS, checked=False)
    data = store.buffer(piece_bytes(FORMAT, WHOLE))
    assert not store.pack(range(1), Cut((4,), 0, 1), WHOLE, FORMAT, data).any()
    assert not store.checksums(range(1), (4,), WHOLE).any()
    assert not store.unpack(range(1), (5,), WHOLE, data).any()
    layers = memory.view(FORMAT.num_layers, BLOCKS, -1)
    assert torch.equal(layers[0, 5], layers[0, 4])


def test_a_new_store_leaves_the_pool_as_it_is() -> None:
    memory = torch.from_numpy(values(FORMAT, BLOCKS))
    before = memory.clone()
    DeviceStore(memory, FORMAT, 0, BLOCKS)
    assert torch.equal(memory, before)


def test_a_device_that_fails_is_a_transport_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    _, device = same_pools(FORMAT, BLOCKS)

    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(device_store.pack, "checksums", broken)
    with pytest.raises(TransportFailed, match="illegal memory access"):
        device.checksums(range(1), (1,), WHOLE)


def test_a_device_that_does_not_get_to_a_mark_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never:
        asked = 0

        def query(self) -> bool:
            self.asked += 1
            return False

    monkeypatch.setattr(device_store, "PATIENCE_S", 0.01)
    event = Never()
    with pytest.raises(TransportFailed, match="mark"):
        device_store._wait(event)  # type: ignore[arg-type]
    assert event.asked > 1
