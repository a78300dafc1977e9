"""Operations over a converted pool against the base's own over a float pool that holds the same values."""

from __future__ import annotations

import pytest
import torch

from baton.kernels.converted import ConvertedKvOps
from baton.kernels.native import NativeOps, load_library
from baton.kernels.ops import Heads, Ops, Rows
from baton.kernels.quantised import LARGEST, TYPES, dequantise, quantise, split_rows
from baton.kernels.reference import TorchOps

from .test_native import BLOCK, batch, random

HEADS = Heads(queries=6, keys=2, dim=32)
TABLE = random(128, 2, 16, seed=3)
PARTS = ((20, 1), (100, 1), (16, 16), (37, 6), (40, 40))


@pytest.fixture(params=["torch", "native"])
def base(request: pytest.FixtureRequest) -> Ops:
    if request.param == "torch":
        return TorchOps()
    library = load_library()
    if library is None:
        pytest.skip("there is no C compiler")
    return NativeOps(library, threads=2)


def empty(blocks: int, dtype: torch.dtype) -> torch.Tensor:
    """A pool of zeros, in the form that the operations take."""
    if dtype not in LARGEST:
        return torch.zeros(blocks, 2, HEADS.keys, BLOCK, HEADS.dim, dtype=dtype)
    return torch.zeros(blocks, 2, HEADS.keys, BLOCK * (HEADS.dim + 4), dtype=torch.uint8)


def values(kv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a pool says, in float32."""
    if dtype not in LARGEST:
        return kv.float()
    elements, scales = split_rows(kv, dtype, HEADS.dim)
    assert scales is not None
    return dequantise(elements, scales)


def qkv_of(rows: Rows) -> torch.Tensor:
    return random(rows.row_starts[-1], (HEADS.queries + 2 * HEADS.keys) * HEADS.dim)


@pytest.mark.parametrize("name", [name for name in TYPES if name != "float32"])
def test_a_step_is_the_base_over_converted_values(base: Ops, name: str) -> None:
    dtype, ops = TYPES[name], ConvertedKvOps(base, TYPES[name])
    rows, blocks = batch(PARTS)
    exact, kv = torch.zeros(blocks, 2, HEADS.keys, BLOCK, HEADS.dim), empty(blocks, dtype)
    expected, found = qkv_of(rows), qkv_of(rows)
    base.rotate_and_store(expected, HEADS, TABLE, rows, exact)
    ops.rotate_and_store(found, HEADS, TABLE, rows, kv)
    stored = dequantise(*quantise(exact, dtype)) if dtype in LARGEST else exact.to(dtype).float()
    assert torch.equal(found, expected)
    assert torch.equal(values(kv, dtype), stored)
    assert not torch.equal(stored, exact)
    assert torch.equal(ops.attention(found, HEADS, rows, kv), base.attention(expected, HEADS, rows, stored))
    assert ops.name == base.name


def test_what_other_blocks_hold_does_not_matter(base: Ops) -> None:
    ops = ConvertedKvOps(base, torch.int8)
    rows, blocks = batch(PARTS)
    kv, qkv = empty(blocks, torch.int8), qkv_of(rows)
    ops.rotate_and_store(qkv, HEADS, TABLE, rows, kv)
    expected = ops.attention(qkv, HEADS, rows, kv)
    foreign = torch.ones(blocks, dtype=torch.bool)
    foreign[rows.tables] = False
    assert foreign.sum() == 3
    kv[foreign] = 0xFF  # scales of NaN
    assert torch.equal(ops.attention(qkv, HEADS, rows, kv), expected)


def test_the_result_has_the_type_of_the_computation() -> None:
    ops = ConvertedKvOps(TorchOps(), torch.int8)
    rows, blocks = batch([(20, 20)])
    kv, qkv = empty(blocks, torch.int8), qkv_of(rows).bfloat16()
    ops.rotate_and_store(qkv, HEADS, TABLE, rows, kv)
    found = ops.attention(qkv, HEADS, rows, kv)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
