"""The attention kernels against plain torch, how their work is cut, and what Triton makes of them for a Hopper GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.kernels.ops import Heads, Rows
from baton.kernels.quantised import LARGEST, dequantise, quantise, split_rows
from baton.kernels.reference import TorchOps, verify
from tests.kernels.hopper import DEVICE, compile_for_hopper

pytest.importorskip("triton")
from baton.kernels import attention, attention_kernels
from baton.kernels.attention import Config

SMALL = Config(rows=16, key_bytes=1024, warps=4, stages=2)
"""Sixteen tokens of 16 float32 values: sequences of few tokens have many tiles."""

NAN = float("nan")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def batch(parts: Sequence[tuple[int, int]], block_size: int = 4) -> Rows:
    """Rows for sequences of (length, rows that are new), on blocks in random order."""
    held = [-(-length // block_size) for length, _ in parts]
    order = torch.randperm(sum(held) + 3, generator=torch.Generator().manual_seed(1))
    starts = torch.tensor([0, *(count for _, count in parts)]).cumsum(0).int()
    positions = torch.cat([torch.arange(length - count, length) for length, count in parts])
    return Rows(
        positions=positions.to(DEVICE),
        slots=torch.zeros_like(positions).to(DEVICE),  # nothing is stored here
        starts=starts.to(DEVICE),
        lengths=torch.tensor([length for length, _ in parts], dtype=torch.int32).to(DEVICE),
        tables=order[: sum(held)].int().to(DEVICE),
        table_starts=torch.tensor([0, *held]).cumsum(0).int().to(DEVICE),
        singles=sum(count == 1 for _, count in parts),
        row_starts=tuple(starts.tolist()),
        row_lengths=tuple(length for length, _ in parts),
    )


def pool(rows: Rows, heads: Heads, block_size: int = 4) -> torch.Tensor:
    """Random K and V where sequences have tokens, NaN everywhere else: [blocks, 2, G, block_size, D] float32."""
    blocks = len(rows.tables) + 3
    kv = random(blocks, 2, heads.keys, block_size, heads.dim, seed=5)
    used = torch.zeros(blocks, block_size, dtype=torch.bool, device=DEVICE)
    for length, begin in zip(rows.row_lengths, rows.table_starts.tolist(), strict=False):
        for p in range(length):
            used[rows.tables[begin + p // block_size], p % block_size] = True
    return kv.masked_fill_(~used[:, None, None, :, None], NAN)


def stored(kv: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool as it is kept in `dtype`, and the float32 values that this keeps."""
    if dtype not in LARGEST:
        return kv.to(dtype), kv.to(dtype).float()
    *outer, block_size, dim = kv.shape
    kept = torch.zeros(*outer, block_size * (dim + 4), dtype=torch.uint8, device=kv.device)
    elements, scales = split_rows(kept, dtype, dim)
    assert scales is not None
    new_elements, new_scales = quantise(kv, dtype)
    elements.copy_(new_elements)
    scales.copy_(new_scales)
    return kept, dequantise(elements, scales)


MIXED = [(1, 1), (16, 1), (17, 1), (90, 1), (5, 5), (16, 16), (33, 33), (70, 3), (40, 17), (64, 32)]


@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize(("queries", "keys", "dim"), [(1, 1, 16), (3, 1, 16), (8, 2, 32), (8, 1, 16), (2, 2, 64)])
def test_mixed_batch(queries: int, keys: int, dim: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of one row and of many, prompts whole and in chunks, windows of less and more than a tile."""
    for name in ("PREFILL", "UNIFORM", "SPLIT"):
        monkeypatch.setattr(attention, name, SMALL)
    heads, rows = Heads(queries, keys, dim, window), batch(MIXED)
    kv = pool(rows, heads)
    qkv = random(rows.row_starts[-1], (queries + 2 * keys) * dim, seed=1)
    expected = TorchOps().attention(qkv, heads, rows, kv)
    query = qkv.view(len(qkv), -1, dim)[:, :queries]
    for deterministic in (False, True):
        found = attention.attend(query, heads, rows, kv, torch.float32, deterministic)
        torch.testing.assert_close(found.flatten(1), expected, rtol=1e-4, atol=1e-4)


DRAFTS = [(8, 8), (30, 8), (16, 8), (90, 8), (33, 8)]


@pytest.mark.parametrize("window", [0, 9, 40])
@pytest.mark.parametrize("programs", [1, 3, 50])
@pytest.mark.parametrize("tree", [False, True])
def test_drafts(tree: bool, programs: int, window: int) -> None:
    """A chain and a tree, over any number of programs; more rows than one tile has."""
    heads, rows = Heads(6, 2, 16, window), batch(DRAFTS)
    kv, query = pool(rows, heads), random(5, 8, 6, 16, seed=1)
    parents = [None, 0, 0, 1, 1, 2, 5, 3]
    bits: list[int] = []
    for i, parent in enumerate(parents):
        bits.append(1 << i | (0 if parent is None else bits[parent]))
    trees = torch.tensor([bits] * 5, device=DEVICE) if tree else None
    expected = verify(query, heads, rows, kv, trees)
    found = attention.verify(query, heads, rows, kv, torch.float32, trees=trees, config=SMALL, programs=programs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
