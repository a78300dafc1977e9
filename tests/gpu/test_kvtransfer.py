"""The handover where KV lies on a GPU: kernels, store, marks, memory shared between processes, whole requests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from baton.bench.engine.agreement import generate, sequence
from baton.bench.gpu_kvtransfer import LLAMA_8B, Pair
from baton.common.config import EngineConfig, HandoverConfig
from baton.common.errors import TransportFailed
from baton.engine.runner import build_engine
from baton.kernels import pack
from baton.kvtransfer.cuda_driver import CudaDriver
from baton.kvtransfer.cuda_ipc import CudaMemory
from baton.kvtransfer.layout import Cut, Route, piece_bytes

from ..kernels.segments import memory, read, scattered, unsigned, xxh3
from ..kvtransfer.stores import FORMAT, WHOLE, same_pools
from ..tiny import make_checkpoint
from .two_workers import hand_over

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
BLOCKS = 10


# --- kernels ---


def test_there_are_kernels():
    """Or everything below would pass by plain torch."""
    assert pack.compiled()


@pytest.mark.parametrize("programs", [1, 7, 16, 132])
@pytest.mark.parametrize(
    ("segments", "size"),
    [(1, 256), (1, 320), (2, 128), (2, 1024), (1, 1088), (3, 704), (2, 2560), (2, 32768), (2, 100)],
)
def test_kernels_copy_and_sum(segments, size, programs):
    pieces = 40
    room = pieces * segments + 3
    source, target = memory(room * size), memory(room * size, seed=1)
    here, there = (scattered(pieces, segments, size, room, seed) for seed in (2, 3))
    expected = target.clone()
    pack.copy(source, here, expected, there, size)
    ours, theirs = source.to(DEVICE), target.to(DEVICE)
    sums = pack.copy(ours, here, theirs, there, size, programs=programs)
    assert torch.equal(theirs.cpu(), expected)
    assert unsigned(sums) == xxh3(read(source, here, size))
    assert unsigned(pack.checksums(ours, here, size, programs=programs)) == unsigned(sums)
    theirs = target.to(DEVICE)
    pack.copy(ours, here, theirs, there, size, checked=False, programs=programs)
    assert torch.equal(theirs.cpu(), expected)


# --- the store ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("route", [WHOLE, Route(0, 1, 1, 0, 2)])
def test_packs_and_unpacks_what_a_host_store_does(dtype, route):
    kept = replace(FORMAT, dtype=dtype)
    host, device = same_pools(kept, BLOCKS, DEVICE)
    part, blocks = Cut((7, 2, 5), 0, 3), (1, 8, 3)
    data, other = (store.buffer(3 * piece_bytes(kept, route)) for store in (host, device))
    sums = host.pack(range(1, 2), part, route, kept, data)
    assert np.array_equal(device.pack(range(1, 2), part, route, kept, other), sums)
    assert data == other
    staged = torch.empty(len(data), dtype=torch.uint8, device=DEVICE)
    assert np.array_equal(device.pack(range(1, 2), part, route, kept, staged), sums)
    assert np.array_equal(device.checksums(range(1, 2), part.blocks, route), sums)
    for source in (other, other.toreadonly(), staged):
        assert np.array_equal(device.unpack(range(1), blocks, route, source), sums)
    host.unpack(range(1), blocks, route, data)
    assert np.array_equal(host.memory, device.memory.cpu().numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3"])
@pytest.mark.parametrize(("size", "part"), [(8, Cut((7, 2), 8, 3)), (32, Cut((7, 2, 5, 1), 0, 2))])
def test_cuts_and_converts_as_a_host_store_does(dtype, size, part):
    host, device = same_pools(FORMAT, BLOCKS, DEVICE)
    target, route = replace(FORMAT, block_size=size, dtype=dtype), Route(0, 0, 1, 0, 2)
    data, other = (store.buffer(part.count * piece_bytes(target, route)) for store in (host, device))
    assert np.array_equal(
        host.pack(range(1, 2), part, route, target, data), device.pack(range(1, 2), part, route, target, other)
    )
    assert data == other


def test_what_is_on_its_way_into_the_pool_is_waited_for():
    _, store = same_pools(FORMAT, BLOCKS, DEVICE)
    data = store.buffer(piece_bytes(FORMAT, WHOLE))
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # clock cycles: a fifth of a second in the engine's stream
    store.memory.fill_(7)
    computed = store.mark()
    store.pack(range(1), Cut((3,), 0, 1), WHOLE, FORMAT, data)
    assert set(data) != {7}, "the store's own stream waits for the engine's"
    computed()
    store.pack(range(1), Cut((3,), 0, 1), WHOLE, FORMAT, data)
    assert set(data) == {7}


# --- between two processes ---


@pytest.fixture(scope="module")
def pair():
    pair = Pair(replace(LLAMA_8B, num_layers=2), 64, DEVICE)
    yield pair
    pair.close()


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("transport", ["cuda-ipc", "tcp"])
def test_each_transport_carries(pair, transport, checked):
    pair._pool.kv.flat.zero_()
    assert not pair.arrived(40)
    pair.handover(transport, 40, HandoverConfig(checksums=checked))
    assert pair.arrived(40)
    assert not pair.arrived(41)


def test_nccl_does_not_serve_two_ranks_on_one_gpu(pair):
    """Should it ever, `process-group` can be tested here, and the transports after it are not reached any more."""
    assert pair.nccl()
    pair.handover("tcp", 4, HandoverConfig())  # the others go on


def test_a_handle_that_is_none_is_refused():
    with pytest.raises(TransportFailed):
        CudaDriver(torch.device(DEVICE)).open(bytes(range(64)))


def test_a_pool_that_is_smaller_than_it_says_is_refused(pair):
    """What a source that lies exports is not read beyond its end, which would break the context of who reads."""
    shared, address = pair._pool.memory.shared, pair._source.ask("address")
    assert isinstance(shared, CudaMemory)
    shared.peer(address, pair.format).close()
    with pytest.raises(TransportFailed, match="smaller"):
        shared.peer(address.replace(":64@", ":65@"), pair.format)


# --- whole requests ---


@pytest.mark.parametrize("transport", ["cuda-ipc", "tcp", "grpc"])
def test_requests_are_handed_over(tmp_path, transport):
    path = make_checkpoint(tmp_path)
    prompts = [[3 + (7 * i + j) % 300 for j in range(20 + 40 * i)] for i in range(5)]
    config = EngineConfig(model=str(path), device="cuda", dtype="float32", kv_memory=64 << 20, max_batch_tokens=64)
    engine = build_engine(config, lambda share: None)
    owners = [sequence(i, prompt, 256) for i, prompt in enumerate(prompts)]
    expected = [[sampled.token for sampled in one] for one in generate(engine, owners, 16, chunk=64)]
    assert hand_over(path, "cuda", transport, prompts, 16) == (expected, [transport])
