"""The deterministic matrix product against torch's, and against itself: a row's bits are its own."""

from __future__ import annotations

import pytest
import torch

from .hopper import DEVICE, compile_for_hopper
from .test_native import random

pytest.importorskip("triton")
from baton.kernels import matmul_kernels as kernels


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return kernels.matmul(x.to(DEVICE), weight.to(DEVICE), None if bias is None else bias.to(DEVICE)).cpu()


@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str
)
@pytest.mark.parametrize(("count", "features", "depth"), [(0, 64, 64), (1, 1, 1), (5, 100, 90), (130, 65, 160)])
def test_the_product(count: int, features: int, depth: int, dtype: torch.dtype, step: float) -> None:
    x, weight, bias = (
        random(count, depth).to(dtype),
        random(features, depth, seed=1).to(dtype),
        random(features).to(dtype),
    )
    for plus in (None, bias):
        expected = x.double() @ weight.double().T + (0.0 if plus is None else plus.double())
        found = product(x, weight, plus)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=step, atol=1e-6 * depth)


def test_rows_are_many_groups_of_tiles() -> None:
    """More tiles of rows than share a group, the last group not full."""
    x, weight = random(kernels.TILE_ROWS * 9 + 1, 16), random(kernels.TILE_FEATURES + 1, 16, seed=1)
    torch.testing.assert_close(product(x, weight), x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    x, weight = random(200, 160).to(dtype), random(70, 160, seed=1).to(dtype)
    whole = product(x, weight)
    for rows in (slice(0, 1), slice(150, 151), slice(3, 8), slice(60, 190), slice(199, 200)):
        assert torch.equal(product(x[rows].contiguous(), weight), whole[rows])


def test_it_is_compiled_for_matrix_units_without_spills() -> None:
    """The matrix units take what asynchronous copies of 16 bytes have brought."""
    pointers = dict.fromkeys(("x", "weight", "bias", "out"), "*bf16")
    built = compile_for_hopper(
        "matmul_kernels", "_matmul", pointers | dict.fromkeys(("rows", "features", "depth"), "i32"),
        {"ROWS": kernels.TILE_ROWS, "FEATURES": kernels.TILE_FEATURES, "DEPTH": 64, "GROUP": 8, "WIDEN": False},
        ["features", "depth"], num_warps=kernels.WARPS, num_stages=kernels.STAGES,
    )  # fmt: skip
    assert built.spilled == 0
    assert "wgmma.mma_async" in built.ptx
    assert set(built.accesses("cp.async")) == {16}
    assert 2 * built.shared <= 227 << 10
