from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baton.common.errors import InvalidRequest
from baton.common.kv_format import ITEM_BYTES, QUANTISED, KvFormat
from baton.engine.kv_pool import KvPool, cpu_allocator, type_name
from baton.kernels.quantised import LARGEST, TYPES

FORMAT = KvFormat(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
EVERY_TYPE = pytest.mark.parametrize("dtype", ITEM_BYTES)


def pool(format: KvFormat = FORMAT, blocks: int = 10) -> KvPool:
    """A pool whose elements are small whole numbers, exact in every type, and its scales others."""
    made = KvPool(format, 0, blocks, cpu_allocator)
    generator = torch.Generator().manual_seed(0)
    for view in (*made.layers, *made.scales):
        view.copy_(torch.randint(-8, 9, view.shape, generator=generator))
    return made


def values(pool: KvPool, layer: int) -> torch.Tensor:
    """What the pool says: elements times scales."""
    elements = pool.layers[layer].float()
    return elements * pool.scales[layer][..., None] if pool.scales else elements


def test_sizes() -> None:
    assert FORMAT.block_bytes == 2 * 2 * 4 * 8 * 4
    assert FORMAT.bytes_per_token == 3 * 2 * 2 * 8 * 4
    assert FORMAT.blocks_in(3 * FORMAT.block_bytes * 7 + 5) == 7
    with pytest.raises(InvalidRequest, match="holds no block"):
        FORMAT.blocks_in(3 * FORMAT.block_bytes - 1)
    made = pool()
    assert made.layers[0].shape == (10, 2, 2, 4, 8)
    assert (len(made.layers), made.num_blocks) == (3, 10)


@EVERY_TYPE
def test_rows_lie_where_the_format_says(dtype: str) -> None:
    format = replace(FORMAT, dtype=dtype, tp=2)
    made = pool(format)
    assert made.layers[0].shape == (10, 2, 1, 4, 8)
    assert made.memory is not None
    assert made.memory.shape == (3 * 10 * format.block_bytes,)
    layer, block, half = 2, 7, 1
    start = (layer * 10 + block) * format.block_bytes + half * format.row_bytes
    row = made.memory[start : start + format.row_bytes].tobytes()
    elements = made.layers[layer][block, half].contiguous().view(torch.uint8).numpy().tobytes()
    scales = made.scales[layer][block, half].numpy().tobytes() if format.quantised else b""
    assert row == elements + scales
    assert made.kv[layer].shape == ((10, 2, 1, format.row_bytes) if format.quantised else (10, 2, 1, 4, 8))


def test_types_have_their_names() -> None:
    assert {type_name(kind): kind for kind in TYPES.values()} == TYPES
    assert {name: kind.itemsize for name, kind in TYPES.items()} == ITEM_BYTES
    assert {name for name, kind in TYPES.items() if kind in LARGEST} == QUANTISED


@EVERY_TYPE
@pytest.mark.parametrize("value", [float("nan"), 3.0])
def test_fill_touches_only_its_blocks(dtype: str, value: float) -> None:
    made, other = pool(replace(FORMAT, dtype=dtype)), pool(replace(FORMAT, dtype=dtype))
    rest = [0, 1, 2, 4, 6, 7, 8, 9]
    made.fill([3, 5], value)
    for layer in range(3):
        filled = values(made, layer)
        assert torch.equal(filled[[3, 5]].nan_to_num(-1.0), torch.full((2, 2, 2, 4, 8), value).nan_to_num(-1.0))
        assert torch.equal(filled[rest], values(other, layer)[rest])


def test_memory_comes_from_the_allocator(tmp_path: Path) -> None:
    def shared(size: int) -> torch.Tensor:
        return torch.from_file(str(tmp_path / "pool"), shared=True, size=size, dtype=torch.uint8)

    made = KvPool(FORMAT, 0, 5, shared)
    made.fill([4], 1.0)
    content = (tmp_path / "pool").read_bytes()
    assert len(content) == 5 * 3 * FORMAT.block_bytes
    assert (
        content[4 * FORMAT.block_bytes : 5 * FORMAT.block_bytes]
        == made.layers[0][4].contiguous().view(torch.uint8).numpy().tobytes()
    )
