"""The compiled operations against the torch reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from baton.kernels.converted import ConvertedKvOps
from baton.kernels.native import NativeOps, load_library, supports
from baton.kernels.ops import Heads, Rows
from baton.kernels.reference import TorchOps
from baton.kernels.select import select_ops

BLOCK = 16
REFERENCE = TorchOps()


@pytest.fixture(scope="module")
def native() -> NativeOps:
    library = load_library()
    if library is None:
        pytest.skip("there is no C compiler")
    return NativeOps(library, threads=2)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(parts: Sequence[tuple[int, int]], block_size: int = BLOCK) -> tuple[Rows, int]:
    """Rows for sequences of (length, rows that are new), on blocks in random order; and the number of blocks."""
    held = [-(-length // block_size) for length, _ in parts]
    order = torch.randperm(sum(held) + 3, generator=torch.Generator().manual_seed(1)).tolist()
    positions, slots, starts, tables = [], [], [0], []
    for i, (length, count) in enumerate(parts):
        blocks = [order.pop() for _ in range(held[i])]
        tables += blocks
        positions += range(length - count, length)
        slots += [blocks[p // block_size] * block_size + p % block_size for p in range(length - count, length)]
        starts.append(starts[-1] + count)
    rows = Rows(
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        starts=torch.tensor(starts, dtype=torch.int32),
        lengths=torch.tensor([length for length, _ in parts], dtype=torch.int32),
        tables=torch.tensor(tables, dtype=torch.int32),
        table_starts=torch.tensor([0, *itertools.accumulate(held)], dtype=torch.int32),
        singles=sum(count == 1 for _, count in parts),
        row_starts=tuple(starts),
        row_lengths=tuple(length for length, _ in parts),
    )
    return rows, sum(held) + 3


def pool(rows: Rows, blocks: int, heads: Heads, block_size: int = BLOCK) -> torch.Tensor:
    """Random K and V where sequences have tokens, NaN everywhere else."""
    kv = torch.full((blocks, 2, heads.keys, block_size, heads.dim), float("nan"))
    for i, length in enumerate(rows.row_lengths):
        table = rows.tables[rows.table_starts[i] :]
        for p in range(length):
            kv[table[p // block_size], :, :, p % block_size] = random(2, heads.keys, heads.dim, seed=p + 9 * i)
    return kv


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 16, 33])
@pytest.mark.parametrize(("features", "depth"), [(1, 1), (48, 64), (100, 90), (50, 513), (301, 1100)])
def test_linear(native: NativeOps, count: int, features: int, depth: int) -> None:
    x, weight = random(count, depth), random(features, depth, seed=1)
    packed = native.pack(weight)
    product = x.double() @ weight.double().T
    for bias in (None, random(features, seed=2)):
        expected = product if bias is None else product + bias
        found = native.linear(x, packed, features, bias)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * depth**0.5)
    indices = torch.tensor([0, features - 1, features // 2])
    assert torch.equal(native.rows(packed, indices), weight[indices])


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("width", [16, 90, 576])
def test_norm_and_silu(native: NativeOps, count: int, width: int) -> None:
    x, gain = random(count, width) * 3, random(width, seed=1)
    residual = random(count, width, seed=3)
    found, total = native.add_norm(x.clone(), residual, gain, 1e-5)
    expected, expected_total = REFERENCE.add_norm(x.clone(), residual, gain, 1e-5)
    assert torch.equal(total, expected_total)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gate_up = random(count, 2 * width, seed=2) * 20
    torch.testing.assert_close(native.silu_mul(gate_up), REFERENCE.silu_mul(gate_up), rtol=1e-5, atol=1e-6)


def test_silu_at_the_ends_of_the_range(native: NativeOps) -> None:
    gate = torch.tensor([[-1e4, -104.0, -88.0, -87.0, -1e-30, 0.0, 1e-30, 87.0, 88.0, 1e4]])
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1)
    torch.testing.assert_close(native.silu_mul(gate_up), REFERENCE.silu_mul(gate_up), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize(("queries", "keys", "dim"), [(3, 1, 64), (4, 4, 16), (8, 2, 48)])
def test_rotate_and_store(native: NativeOps, queries: int, keys: int, dim: int, gains: bool) -> None:
    rows, blocks = batch([(20, 1), (16, 16), (37, 6)])
    heads = Heads(queries, keys, dim)
    if gains:
        heads = Heads(queries, keys, dim, 0, random(dim, seed=5), random(dim, seed=6), 1e-6)
    table, qkv = random(64, 2, dim // 2, seed=2), random(23, (queries + 2 * keys) * dim)
    found, expected = qkv.clone(), qkv.clone()
    kv, expected_kv = torch.zeros(2, blocks, 2, keys, BLOCK, dim).unbind()
    native.rotate_and_store(found, heads, table, rows, kv)
    REFERENCE.rotate_and_store(expected, heads, table, rows, expected_kv)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kv, expected_kv, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 5, 16, 40])
@pytest.mark.parametrize(
    ("queries", "keys", "dim"), [(1, 1, 16), (3, 1, 64), (9, 3, 64), (8, 1, 128), (4, 4, 32), (40, 1, 16), (2, 1, 256)]
)
def test_attention(native: NativeOps, queries: int, keys: int, dim: int, window: int) -> None:
    decodes = [(length, 1) for length in (1, 2, 15, 16, 17, 31, 32, 33, 100)]
    rows, blocks = batch([*decodes, (7, 7), (16, 16), (70, 70), (50, 3), (64, 17), (33, 32)])
    heads = Heads(queries, keys, dim, window)
    kv = pool(rows, blocks, heads)
    qkv = random(rows.row_starts[-1], (queries + 2 * keys) * dim) * 2
    expected = REFERENCE.attention(qkv, heads, rows, kv)
    torch.testing.assert_close(native.attention(qkv, heads, rows, kv), expected, rtol=1e-4, atol=1e-5)


def test_attention_with_larger_blocks(native: NativeOps) -> None:
    rows, blocks = batch([(1, 1), (90, 1), (77, 20)], block_size=32)
    heads = Heads(6, 2, 32)
    kv = pool(rows, blocks, heads, block_size=32)
    qkv = random(rows.row_starts[-1], 10 * 32)
    expected = REFERENCE.attention(qkv, heads, rows, kv)
    torch.testing.assert_close(native.attention(qkv, heads, rows, kv), expected, rtol=1e-4, atol=1e-5)


def test_a_row_has_the_same_bits_in_every_batch(native: NativeOps) -> None:
    """The last row of a sequence, computed alone and as the end of chunks of every size."""
    heads, length = Heads(6, 2, 64), 75
    whole, blocks = batch([(length, length)])
    kv = pool(whole, blocks, heads)
    qkv = random(length, 10 * 64)
    expected = native.attention(qkv, heads, whole, kv)
    weight = native.pack(random(100, 384, seed=4))
    product = native.linear(expected, weight, 100)
    for count in (1, 2, 5, 10, 11, 32, 74):
        part, _ = batch([(length, count)])
        found = native.attention(qkv[-count:].contiguous(), heads, part, kv)
        assert torch.equal(found, expected[-count:])
        assert torch.equal(native.linear(found, weight, 100), product[-count:])


def test_without_a_compiler_torch_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert load_library.__wrapped__() is None
    monkeypatch.setattr("shutil.which", lambda name: "/bin/false")
    assert load_library.__wrapped__() is None
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    monkeypatch.setattr("baton.kernels.select.load_library", lambda: None)
    cpu, kind, heads = torch.device("cpu"), torch.float32, Heads(9, 3, 64)
    assert select_ops(cpu, kind, kind, heads, 16).name == "torch"
    with pytest.raises(ValueError, match="no deterministic operations"):
        select_ops(cpu, kind, kind, heads, 16, deterministic=True)


def test_the_name_is_the_same_for_any_number_of_threads(native: NativeOps) -> None:
    library = load_library()
    assert library is not None
    assert NativeOps(library, threads=1).name == native.name
    assert native.name.startswith("native-")


def test_operations_are_chosen_by_rule(native: NativeOps) -> None:
    cpu, heads = torch.device("cpu"), Heads(9, 3, 64)
    exact, half = torch.float32, torch.bfloat16
    for deterministic in (False, True):
        assert select_ops(cpu, exact, exact, heads, 16, deterministic).name == native.name
        converted = select_ops(cpu, exact, torch.int8, heads, 16, deterministic)
        assert isinstance(converted, ConvertedKvOps)
        assert converted.name == native.name
    for dtype, shape in ((half, heads), (exact, Heads(9, 3, 8))):
        assert select_ops(cpu, dtype, dtype, shape, 16).name == "torch"
        with pytest.raises(ValueError, match="no deterministic operations"):
            select_ops(cpu, dtype, dtype, shape, 16, deterministic=True)


def test_shapes_that_the_compiled_attention_refuses() -> None:
    assert supports(9, 3, 64, 16)
    assert not supports(9, 3, 8, 16)
    assert not supports(9, 3, 64, 8)
    assert not supports(9, 3, 512, 16)
    assert not supports(65, 1, 64, 16)
