from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.common.errors import HandoverFailed, InvalidRequest
from baton.engine.kv_pool import KvLayout, KvPool, cpu_allocator

LAYOUT = KvLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype=torch.float32)


def pool(layout: KvLayout = LAYOUT, blocks: int = 10) -> KvPool:
    made = KvPool(layout, blocks, cpu_allocator)
    for i, layer in enumerate(made.layers):
        layer.copy_(torch.randn(layer.shape, generator=torch.Generator().manual_seed(i)))
    return made


def test_sizes() -> None:
    assert LAYOUT.block_bytes == 2 * 2 * 4 * 8 * 4
    assert LAYOUT.bytes_per_token == 3 * 2 * 2 * 8 * 4
    assert LAYOUT.blocks_in(3 * LAYOUT.block_bytes * 7 + 5) == 7
    with pytest.raises(InvalidRequest, match="holds no block"):
        LAYOUT.blocks_in(3 * LAYOUT.block_bytes - 1)
    made = pool()
    assert made.layers[0].shape == (10, 2, 2, 4, 8)
    assert (made.num_layers, made.num_blocks, made.block_bytes) == (3, 10, LAYOUT.block_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_gathered_scatters_into_other_blocks_of_another_pool(dtype: torch.dtype) -> None:
    layout = KvLayout(3, 2, 8, 4, dtype)
    source, target = pool(layout), KvPool(layout, 12, cpu_allocator)
    for layer in range(3):
        data = source.gather(layer, [7, 0, 3])
        assert data.nbytes == 3 * layout.block_bytes
        target.scatter(layer, [1, 11, 2], bytes(data))
        assert torch.equal(target.layers[layer][[1, 11, 2]], source.layers[layer][[7, 0, 3]])
        assert not target.layers[layer][[0, 3, 4, 5, 6, 7, 8, 9, 10]].any()


def test_a_block_is_one_run_of_bytes() -> None:
    made = pool()
    assert bytes(made.gather(1, [4])) == made.layers[1][4].contiguous().view(torch.uint8).numpy().tobytes()


def test_gather_is_a_copy() -> None:
    made = pool()
    before = bytes(data := made.gather(0, [2]))
    made.fill([2], 1.0)
    assert bytes(data) == before


def test_nothing_gathers_and_scatters() -> None:
    made = pool()
    made.scatter(0, [], made.gather(0, []))


@pytest.mark.parametrize("extra", [-1, 1, -LAYOUT.block_bytes])
def test_scatter_refuses_another_length(extra: int) -> None:
    made = pool()
    before = made.layers[0].clone()
    with pytest.raises(HandoverFailed):
        made.scatter(0, [1, 2], bytes(2 * LAYOUT.block_bytes + extra))
    assert torch.equal(made.layers[0], before)


def test_fill_touches_only_its_blocks() -> None:
    made = pool()
    made.fill([3, 5], float("nan"))
    for layer in made.layers:
        assert layer[[3, 5]].isnan().all()
        assert not layer[[0, 1, 2, 4, 6, 7, 8, 9]].isnan().any()


def test_memory_comes_from_the_allocator(tmp_path: Path) -> None:
    def shared(size: int) -> torch.Tensor:
        return torch.from_file(str(tmp_path / "pool"), shared=True, size=size, dtype=torch.uint8)

    made = KvPool(LAYOUT, 5, shared)
    made.fill([4], 1.0)
    content = (tmp_path / "pool").read_bytes()
    assert len(content) == 5 * 3 * LAYOUT.block_bytes
    assert content[4 * LAYOUT.block_bytes : 5 * LAYOUT.block_bytes] == bytes(made.gather(0, [4]))
