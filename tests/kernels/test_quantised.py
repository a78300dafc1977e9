"""Eight bits with scales: how far off they are, what they do at the edges, and how rows of them are converted."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.kernels.convert import convert_rows
from baton.kernels.quantised import LARGEST, TYPES, dequantise, quantise, split_rows

FLOATS = ("float32", "bfloat16", "float16")
QUANTISED = ("int8", "float8_e4m3")
EACH = pytest.mark.parametrize("name", QUANTISED)
FEW = settings(max_examples=150, deadline=None)

vectors = st.lists(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=8, max_size=8), min_size=1, max_size=6)


def random(*shape: int) -> torch.Tensor:
    """Values of very different size from token to token."""
    generator = torch.Generator().manual_seed(sum(shape))
    size = torch.randint(-20, 20, (*shape[:-1], 1), generator=generator).float().exp2()
    return torch.randn(*shape, generator=generator) * size


def packed(values: torch.Tensor, name: str) -> torch.Tensor:
    """Rows [N, row bytes] that hold values [N, tokens, D], put together by hand."""
    if name in FLOATS:
        return values.to(TYPES[name]).flatten(1).view(torch.uint8)
    elements, scales = quantise(values, TYPES[name])
    return torch.cat((elements.flatten(1).view(torch.uint8), scales.view(torch.uint8)), dim=1)


def unpacked(rows: torch.Tensor, name: str, head_dim: int) -> torch.Tensor:
    elements, scales = split_rows(rows, TYPES[name], head_dim)
    return elements.float() if scales is None else dequantise(elements, scales)


@EACH
@FEW
@given(vectors)
def test_error_bounds(name: str, lists: list[list[float]]) -> None:
    values = torch.tensor(lists)
    elements, scales = quantise(values, TYPES[name])
    assert elements.dtype == TYPES[name]
    assert scales.shape == values.shape[:-1]
    assert scales.dtype == torch.float32
    largest = values.abs().amax(-1)
    assert torch.allclose(scales * LARGEST[TYPES[name]], largest, rtol=1e-6, atol=1e-35)
    error = (dequantise(elements, scales) - values).abs()
    step = scales[:, None]
    bound = step / 2 if name == "int8" else torch.maximum(values.abs() / 16, step / 1024)
    assert (error <= bound * 1.0001 + largest[:, None] * 1e-6).all()


@EACH
def test_zeros_stay_zeros(name: str) -> None:
    elements, scales = quantise(torch.zeros(3, 16), TYPES[name])
    assert (scales > 0).all()
    assert not dequantise(elements, scales).any()


@EACH
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(name: str, broken: float) -> None:
    values = torch.ones(2, 8)
    values[1, 3] = broken
    found = dequantise(*quantise(values, TYPES[name]))
    assert torch.equal(found[0], values[0])
    assert not found[1].isfinite().any()


@EACH
def test_a_token_does_not_depend_on_its_neighbours(name: str) -> None:
    values = random(40, 64)
    elements, scales = quantise(values, TYPES[name])
    alone, scale = quantise(values[7], TYPES[name])
    assert torch.equal(alone.view(torch.uint8), elements[7].view(torch.uint8))
    assert torch.equal(scale, scales[7])


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("source", TYPES)
def test_converted_rows_are_what_a_pool_of_that_type_stores(source: str, target: str) -> None:
    rows = packed(random(9, 16, 64), source)
    expected = rows if source == target else packed(unpacked(rows, source, 64), target)
    assert torch.equal(convert_rows(rows, source, target, 16, 64), expected)


@pytest.mark.parametrize(("count", "tokens", "head_dim"), [(0, 16, 64), (70, 16, 64), (3, 300, 128), (2, 1, 40_000)])
def test_any_number_and_size_of_rows(count: int, tokens: int, head_dim: int) -> None:
    rows = packed(random(count, tokens, head_dim), "float32")
    assert torch.equal(
        convert_rows(rows, "float32", "int8", tokens, head_dim), packed(random(count, tokens, head_dim), "int8")
    )


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted where Linux lists them")
def test_a_transfer_thread_starts_no_team() -> None:
    rows = packed(random(300, 16, 64), "float32")
    counts: list[int] = []

    def convert() -> None:
        for source, target in (("float32", "int8"), ("int8", "bfloat16"), ("bfloat16", "float8_e4m3")):
            before = len(list(Path("/proc/self/task").iterdir()))
            converted = convert_rows(convert_rows(rows, "float32", source, 16, 64), source, target, 16, 64)
            counts.append(len(list(Path("/proc/self/task").iterdir())) - before)
            assert len(converted) == 300

    thread = threading.Thread(target=convert)
    thread.start()
    thread.join(timeout=30)
    assert counts == [0, 0, 0]
