"""The kernels that take each row by itself against the torch reference, and what Triton makes of them for a Hopper
GPU at the shapes of Llama-3.1-8B."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from baton.kernels.ops import Heads, Rows
from baton.kernels.quantised import LARGEST, TYPES, quantise, split_rows
from baton.kernels.reference import TorchOps

from .hopper import DEVICE, compile_for_hopper
from .test_native import BLOCK, batch, random

pytest.importorskip("triton")
from baton.kernels import row_kernels as kernels

REFERENCE = TorchOps()
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)
STEP = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Relative error: one step of the type, since a sum in another order may be rounded to the other side."""


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected, rtol=STEP[expected.dtype], atol=1e-5)


@each_float
@pytest.mark.parametrize(("count", "width"), [(1, 64), (5, 90), (3, 576)])
def test_add_norm(count: int, width: int, dtype: torch.dtype) -> None:
    x, residual = random(count, width).to(dtype) * 3, random(count, width, seed=2).to(dtype)
    gain = random(width, seed=1).to(dtype)
    total = x.to(DEVICE, copy=True)
    found = kernels.add_norm(total, residual.to(DEVICE), gain.to(DEVICE), 1e-5)
    expected, expected_total = REFERENCE.add_norm(x, residual, gain, 1e-5)
    assert torch.equal(total.cpu(), expected_total)
    near(found, expected)


@each_float
@pytest.mark.filterwarnings("ignore:overflow encountered")  # in the interpreter's exponential
@pytest.mark.parametrize(("count", "width"), [(1, 16), (3, 1034)])
def test_silu_mul(count: int, width: int, dtype: torch.dtype) -> None:
    gate_up = (random(count, 2 * width) * 20).to(dtype)
    gate_up[0, :4] = torch.tensor([-1e4, -88.0, 88.0, 1e4])
    near(kernels.silu_mul(gate_up.to(DEVICE)), REFERENCE.silu_mul(gate_up))


def on_device(rows: Rows) -> Rows:
    tensors = {
        name: value.to(DEVICE) for name in Rows.__slots__ if isinstance(value := getattr(rows, name), torch.Tensor)
    }
    return replace(rows, **tensors)


def empty(blocks: int, heads: Heads, dtype: torch.dtype) -> torch.Tensor:
    if dtype in LARGEST:
        return torch.zeros(blocks, 2, heads.keys, BLOCK * (heads.dim + 4), dtype=torch.uint8)
    return torch.zeros(blocks, 2, heads.keys, BLOCK, heads.dim, dtype=dtype)


def rotate(
    qkv: torch.Tensor, heads: Heads, table: torch.Tensor, rows: Rows, kv: torch.Tensor, kept: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [T, H D] and the pool, by the kernel."""
    there, pool = (tensor.to(DEVICE, copy=True) for tensor in (qkv, kv))
    gains = {
        name: None if (gain := getattr(heads, name)) is None else gain.to(DEVICE) for name in ("query_gain", "key_gain")
    }
    kernels.rotate_and_store(there, replace(heads, **gains), table.to(DEVICE), on_device(rows), pool, kept)
    return there[:, : heads.queries * heads.dim].cpu(), pool.cpu()


@each_float
@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize(("queries", "keys", "dim"), [(3, 1, 64), (4, 4, 16), (32, 8, 16)])
def test_rotate_and_store(queries: int, keys: int, dim: int, gains: bool, dtype: torch.dtype) -> None:
    rows, blocks = batch([(20, 1), (37, 6)])
    heads = Heads(queries, keys, dim)
    if gains:
        heads = Heads(queries, keys, dim, 0, random(dim, seed=5).to(dtype), random(dim, seed=6).to(dtype), 1e-6)
    table, qkv = random(64, 2, dim // 2, seed=2), random(7, (queries + 2 * keys) * dim).to(dtype)
    found, pool = rotate(qkv, heads, table, rows, empty(blocks, heads, dtype), dtype)
    wide = replace(heads, query_gain=heads.query_gain.float(), key_gain=heads.key_gain.float()) if gains else heads
    expected, kv = qkv.float(), empty(blocks, heads, torch.float32)
    REFERENCE.rotate_and_store(expected, wide, table, rows, kv)
    near(found, expected[:, : queries * dim].to(dtype))
    near(pool, kv.to(dtype))
    assert torch.equal(pool[:, 1], kv[:, 1].to(dtype))  # values are copied


@each_float
@pytest.mark.parametrize("name", ["int8", "float8_e4m3", "bfloat16"])
def test_a_pool_of_another_type_gets_the_bits_that_conversion_gives(name: str, dtype: torch.dtype) -> None:
    kept = TYPES[name]
    rows, blocks = batch([(20, 1), (37, 6)])
    heads, table = Heads(6, 2, 32), random(64, 2, 16, seed=2)
    qkv = (random(7, 10 * 32) * torch.logspace(-30, 3, 7)[:, None]).to(dtype)
    qkv[4, -32:] = 0.0
    pools = [rotate(qkv, heads, table, rows, empty(blocks, heads, each), each)[1] for each in (dtype, kept)]
    at = rows.slots // BLOCK, slice(None), slice(None), rows.slots % BLOCK
    values = pools[0][at]  # [T, 2, G, D], as the kernel computed them
    if kept not in LARGEST:
        assert torch.equal(pools[1][at], values.to(kept))
        return
    elements, scales = split_rows(pools[1], kept, heads.dim)
    expected, expected_scales = quantise(values, kept)
    assert scales is not None
    assert torch.equal(elements[at].view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales[at], expected_scales)
    assert (pools[1] != 0).sum() <= 7 * 4 * 36  # and nothing else is written


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("name", ["int8", "float8_e4m3"])
def test_what_is_not_finite_stays_visible(name: str) -> None:
    rows, blocks = batch([(16, 16)])
    heads, kv = Heads(1, 1, 16), empty(blocks, Heads(1, 1, 16), TYPES[name])
    qkv = random(16, 3 * 16)
    qkv[3, 47], qkv[5, 32] = float("nan"), float("inf")
    _, pool = rotate(qkv, heads, random(64, 2, 8), rows, kv, TYPES[name])
    _, scales = split_rows(pool[rows.slots[0] // BLOCK, 1, 0], TYPES[name], 16)
    assert scales is not None
    assert scales.isfinite().logical_not().nonzero().flatten().tolist() == [3, 5]


def test_a_row_of_padding_is_not_stored() -> None:
    rows, blocks = batch([(20, 4)])
    heads, kv = Heads(2, 1, 16), empty(blocks, Heads(2, 1, 16), torch.float32)
    slots = rows.slots.clone()
    slots[2:] = -1
    qkv = random(4, 4 * 16)
    _, pool = rotate(qkv, heads, random(64, 2, 8), replace(rows, slots=slots), kv, torch.float32)
    assert (pool != 0).any(-1).sum() == 2 * 2


LLAMA = {"QUERIES": 32, "KEYS": 8, "DIM": 128, "BLOCK_SIZE": 16, "HEADS": kernels._HEADS}


@pytest.mark.parametrize("pool", ["bf16", "i8", "fp8e4nv"])
def test_rotation_is_compiled_without_spills_and_with_wide_accesses(pool: str) -> None:
    scaled = pool != "bf16"
    pointers = {"qkv": "*bf16", "query_gain": "*bf16", "key_gain": "*bf16", "table": "*fp32", "positions": "*i64"}
    built = compile_for_hopper(
        "row_kernels", "_rotate_and_store",
        pointers | {"slots": "*i64", "kv": f"*{pool}", "eps": "fp32"},
        LLAMA | {"LARGEST": 127.0 if scaled else None}, num_warps=4,
    )  # fmt: skip
    assert built.spilled == 0
    assert ("div.rn.f32" in built.ptx) == scaled  # the exact division, as torch does it
    assert built.accesses("ld").count(16) >= 2 + 4 + 4  # of the heads, the gains and the table
    assert built.accesses("st").count(16) == (2 if scaled else 4)


def test_norm_and_activation_are_compiled_without_spills_and_with_wide_accesses() -> None:
    pointers = dict.fromkeys(("x", "residual", "gain", "out"), "*bf16")
    built = [
        compile_for_hopper(
            "row_kernels",
            "_add_norm",
            pointers | {"eps": "fp32", "width": "i32"},
            {"BLOCK": 4096},
            ["width"],
            num_warps=8,
        ),
        compile_for_hopper(
            "row_kernels",
            "_silu_mul",
            {"gate_up": "*bf16", "out": "*bf16", "width": "i32"},
            {"BLOCK": 1024},
            ["width"],
            num_warps=4,
        ),
    ]
    for kernel in built:
        assert kernel.spilled == 0
        assert {*kernel.accesses("st"), *kernel.accesses("ld")} == {16}
