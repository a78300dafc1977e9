"""The attention kernels against plain torch, and how their work is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.kernels.ops import Heads, Rows
from baton.kernels.quantised import LARGEST, TYPES, dequantise, quantise, split_rows
from baton.kernels.reference import TorchOps, verify
from tests.kernels.hopper import DEVICE

pytest.importorskip("triton")
from baton.kernels import attention, attention_kernels
from baton.kernels.attention import Config

SMALL = Config(rows=32, values=512, warps=4, stages=2)
"""Tiles of sixteen tokens, the fewest there can be: short sequences have several."""

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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFILL", "UNIFORM", "SPLIT", "SPLIT_WIDE"):
        monkeypatch.setattr(attention, name, SMALL)


def attend(
    heads: Heads, rows: Rows, qkv: torch.Tensor, kv: torch.Tensor, kv_dtype: torch.dtype = torch.float32,
    deterministic: bool = False,
) -> torch.Tensor:  # fmt: skip
    query = qkv.view(len(qkv), -1, heads.dim)[:, : heads.queries]
    return attention.attend(query, heads, rows, kv, kv_dtype, deterministic).flatten(1)


MIXED = [(1, 1), (16, 1), (53, 1), (5, 5), (16, 16), (21, 21), (50, 3), (33, 17)]
"""Lengths, and rows that are new: running requests first, then prompts, whole and in chunks."""


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "window"),
    [(1, 1, 16, 0), (3, 1, 16, 20), (8, 2, 32, 0), (8, 2, 16, 5), (8, 1, 16, 20), (2, 2, 64, 1)],
)
@pytest.mark.usefixtures("small")
def test_mixed_batch(queries: int, keys: int, dim: int, window: int) -> None:
    """Windows of less and of more than a tile; 1, 3, 4 and 8 query heads for a KV head; NaN in what is not theirs."""
    heads, rows = Heads(queries, keys, dim, window), batch(MIXED)
    kv = pool(rows, heads)
    qkv = random(rows.row_starts[-1], (queries + 2 * keys) * dim, seed=1)
    expected = TorchOps().attention(qkv, heads, rows, kv)
    for deterministic in (False, True):
        found = attend(heads, rows, qkv, kv, deterministic=deterministic)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.usefixtures("small")
def test_pools(dtype: torch.dtype, block_size: int) -> None:
    """Of every type, in blocks of less, as much and more than a tile has tokens."""
    heads, rows = Heads(4, 2, 16), batch([(53, 1), (21, 21), (50, 3)], block_size)
    kept, values = stored(pool(rows, heads, block_size), dtype)
    qkv = random(rows.row_starts[-1], 8 * 16, seed=1)
    expected = TorchOps().attention(qkv, heads, rows, values)
    torch.testing.assert_close(attend(heads, rows, qkv, kept, dtype), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small")
def test_half_precision(dtype: torch.dtype) -> None:
    heads, rows = Heads(4, 2, 16), batch([(53, 1), (21, 21)])
    kv, qkv = pool(rows, heads), random(22, 8 * 16, seed=1)
    expected = TorchOps().attention(qkv, heads, rows, kv)
    found = attend(heads, rows, qkv.to(dtype), kv.to(dtype), dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


PARENTS = [None, 0, 0, 1, 1, 2, 5, 3]


def tree() -> list[int]:
    """For each token of a draft, the bits of itself and its ancestors."""
    bits: list[int] = []
    for i, parent in enumerate(PARENTS):
        bits.append(1 << i | (0 if parent is None else bits[parent]))
    return bits


@pytest.mark.parametrize(("programs", "window"), [(1, 0), (3, 9), (3, 20), (40, 0)])
@pytest.mark.parametrize("bits", [None, tree()], ids=["chain", "tree"])
def test_drafts(bits: list[int] | None, programs: int, window: int) -> None:
    """Two tiles of rows; one program, some, and more than there are tiles; a sequence much longer than the others; one
    without tokens, which pads the batch of a graph."""
    heads, rows = Heads(10, 2, 16, window), batch([(8, 8), (0, 0), (16, 8), (90, 8), (0, 0)])
    kv, query = pool(rows, heads), random(5, 8, 10, 16, seed=1)
    trees = None if bits is None else torch.tensor([bits] * 5, device=DEVICE)
    out = torch.full_like(query, NAN)
    found = attention.verify(
        query, heads, rows, kv, torch.float32, trees=trees, out=out, config=SMALL, programs=programs
    )
    assert found is out
    torch.testing.assert_close(found, verify(query, heads, rows, kv, trees), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("programs", [2, 30])
def test_many_sequences_and_many_pieces(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More sequences than a program looks at at once, and more pieces of one than are merged at once."""
    monkeypatch.setattr(attention, "_CHUNK", 2)
    heads, rows = Heads(2, 1, 16), batch([(200, 1), (3, 1), (17, 1), (0, 0), (20, 1)])
    kv, query = pool(rows, heads), random(5, 2, 16, seed=1)
    kv[rows.tables[40], 0] *= 8  # pieces of very different weight
    expected = verify(query[:, None], heads, rows, kv)[:, 0]
    found = attention.decode(query, heads, rows, kv, torch.float32, config=SMALL, programs=programs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_draft_of_64_tokens() -> None:
    """The last one's bit is the sign."""
    heads, rows = Heads(1, 1, 16), batch([(70, 64)])
    kv, query = pool(rows, heads), random(1, 64, 1, 16, seed=1)
    chain = torch.tensor([[(1 << i + 1) - 1 for i in range(63)] + [-1]], device=DEVICE)
    found = attention.verify(query, heads, rows, kv, torch.float32, trees=chain, config=SMALL)
    torch.testing.assert_close(found, verify(query, heads, rows, kv), rtol=1e-4, atol=1e-4)


def test_drafts_must_lie_one_behind_the_other() -> None:
    heads, rows = Heads(1, 1, 16), batch([(8, 4), (8, 4)])
    with pytest.raises(ValueError):
        attention.verify(random(2, 5, 1, 16)[:, :4], heads, rows, pool(rows, heads), torch.float32)


def test_what_is_not_finite_stays_visible() -> None:
    """A sequence's own NaN, and no other's."""
    heads, rows = Heads(2, 1, 16), batch([(40, 1), (40, 1)])
    kv, query = pool(rows, heads), random(2, 2, 16, seed=1)
    kv[rows.tables[int(rows.table_starts[1])], 0, 0, 2] = NAN
    for programs in (1, 3):
        found = attention.decode(query, heads, rows, kv, torch.float32, config=SMALL, programs=programs)
        assert found[0].isfinite().all()
        assert found[1].isnan().all()


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.usefixtures("small")
def test_deterministic(window: int) -> None:
    """The same bits alone, in a crowd, as a prompt at once, in chunks, and token by token."""
    heads, length = Heads(4, 2, 16, window), 37
    crowd = batch([(53, 1), (length, 1), (21, 21), (length, 10), (length, length)])
    kv = pool(crowd, heads)
    begin = crowd.table_starts.tolist()
    held = begin[2] - begin[1]
    for i in (3, 4):
        kv[crowd.tables[begin[i] : begin[i] + held]] = kv[crowd.tables[begin[1] : begin[1] + held]]
    own, last = random(length, 8 * 16, seed=1), crowd.row_starts[4]
    qkv = random(crowd.row_starts[-1], 8 * 16, seed=2)
    qkv[1], qkv[crowd.row_starts[3] : last], qkv[last:] = own[-1], own[-10:], own
    found = attend(heads, crowd, qkv, kv, deterministic=True)
    assert torch.equal(found[1], found[-1])
    assert torch.equal(found[crowd.row_starts[3] : last], found[-10:])
    alone = batch([(length, length)])
    alone = replace(alone, tables=crowd.tables[begin[1] : begin[2]])
    assert torch.equal(attend(heads, alone, own, kv, deterministic=True), found[last:])


# --- how work is cut, by the kernels' own arithmetic ---


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 40))
def test_every_tile_is_done_once(tiles: list[int], programs: int) -> None:
    """Walk as `split` walks; then look for the pieces where `merge` looks."""
    share, owner = attention_kernels.share.fn, attention_kernels.owner.fn
    total, slots = sum(tiles), programs + len(tiles)
    programs = min(programs, total)
    firsts = [sum(tiles[:i]) for i in range(len(tiles) + 1)]
    pieces: dict[int, tuple[int, int, int]] = {}  # by slot: sequence, first tile, one behind the last
    for program in range(programs):
        tile, end = share(total, program, programs), share(total, program + 1, programs)
        assert tile < end
        sequence = max(i for i in range(len(tiles)) if firsts[i] <= tile)
        while tile < end:
            stop = min(end, firsts[sequence + 1])
            if stop > tile:
                assert program + sequence not in pieces
                pieces[program + sequence] = (sequence, tile, stop)
            tile, sequence = stop, sequence + 1
    assert all(slot < slots for slot in pieces)
    for sequence, count in enumerate(tiles):
        if count:
            first, last = firsts[sequence], firsts[sequence + 1]
            begin = owner(total, first, programs)
            merged = [pieces[p + sequence] for p in range(begin, owner(total, last - 1, programs) + 1)]
            assert [piece[1] for piece in merged] == [first, *(piece[2] for piece in merged[:-1])]
            assert merged[-1][2] == last
            assert {piece[0] for piece in merged} == {sequence}
    assert sum(piece[2] - piece[1] for piece in pieces.values()) == total


@given(st.integers(1, 200), st.integers(1, 8), st.sampled_from([0, 1, 7, 16, 50]))
def test_the_first_tile_is_the_first_that_is_seen(length: int, queries: int, window: int) -> None:
    queries = min(queries, length)
    oldest = max(0, length - queries + 1 - window) if window else 0
    assert attention_kernels.first_tile.fn(length, queries, window, 16) == oldest // 16


@pytest.mark.parametrize(
    ("heads", "fits"),
    [
        (Heads(32, 8, 128), True), (Heads(9, 3, 64), True), (Heads(8, 1, 256), True), (Heads(4, 2, 16), True),
        (Heads(32, 8, 96), False), (Heads(8, 1, 512), False), (Heads(71, 1, 64), False), (Heads(8, 3, 64), False),
    ],
)  # fmt: skip
def test_supports(heads: Heads, fits: bool) -> None:
    assert attention.supports(heads, torch.bfloat16, torch.bfloat16) == fits
    assert attention.supports(heads, torch.float32, torch.float32) == (fits and heads.dim <= 128)
    assert attention.supports(heads, torch.bfloat16, torch.int8) == (fits and heads.dim >= 32)
