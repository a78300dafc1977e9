"""Pools against a plain model that knows tokens and no blocks: whatever the block sizes, ranks and types of the two
ends, what was a token's KV in the source is its KV in the target, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from baton.common.kv_format import SCALE_BYTES, KvFormat
from baton.kvtransfer.convert import convert
from baton.kvtransfer.host_store import HostStore
from baton.kvtransfer.layout import as_kept, cut, piece_bytes, routes

LAYERS, HEAD_DIM, SPARE = 3, 8, 3
Bytes = NDArray[np.uint8]


def store(form: KvFormat, rank: int, num_blocks: int) -> HostStore:
    memory = np.full(LAYERS * num_blocks * form.block_bytes, 0xEE, np.uint8)
    return HostStore(memory, form, rank, num_blocks, convert)


def token_kv(held: HostStore, layer: int, blocks: Sequence[int], token: int) -> Bytes:
    """Element bytes of one token, and its scale's, as they lie in the pool: a view [2, heads, bytes], twice."""
    form = held.format
    pool = held.memory.reshape(LAYERS, held.num_blocks, 2, form.heads_per_rank, form.row_bytes)
    slot, rows = token % form.block_size, pool[layer, blocks[token // form.block_size]]
    elements = rows[..., slot * form.token_bytes : (slot + 1) * form.token_bytes]
    scales = form.block_size * form.token_bytes + slot * SCALE_BYTES
    return np.concatenate((elements, rows[..., scales : scales + SCALE_BYTES if form.quantised else scales]), axis=-1)


def put_token(held: HostStore, layer: int, blocks: Sequence[int], token: int, value: Bytes) -> None:
    form = held.format
    pool = held.memory.reshape(LAYERS, held.num_blocks, 2, form.heads_per_rank, form.row_bytes)
    slot, rows = token % form.block_size, pool[layer, blocks[token // form.block_size]]
    rows[..., slot * form.token_bytes : (slot + 1) * form.token_bytes] = value[..., : form.token_bytes]
    if form.quantised:
        scales = form.block_size * form.token_bytes + slot * SCALE_BYTES
        rows[..., scales : scales + SCALE_BYTES] = value[..., form.token_bytes :]


def random_kv(form: KvFormat, tokens: int, rng: np.random.Generator) -> Bytes:
    """[tokens, 2, heads of the model, bytes of one token with its scale]."""
    shape = (tokens * 2 * form.num_kv_heads, HEAD_DIM * 4)
    plain = rng.standard_normal((shape[0], HEAD_DIM)).astype(np.float32).view(np.uint8).reshape(shape)
    rows = plain if form.dtype == "float32" else convert(plain, "float32", form.dtype, 1, HEAD_DIM)
    return rows.reshape(tokens, 2, form.num_kv_heads, -1)


def as_in(target: KvFormat, source: KvFormat, kv: Bytes) -> Bytes:
    """The same KV of one token after another in the target's type."""
    if source.dtype == target.dtype:
        return kv
    rows = convert(np.ascontiguousarray(kv).reshape(-1, kv.shape[-1]), source.dtype, target.dtype, 1, HEAD_DIM)
    return rows.reshape(*kv.shape[:-1], -1)


TPS = st.sampled_from((1, 2, 4))
SIZES = st.sampled_from((1, 3, 4, 6, 8, 16))
TYPES = st.sampled_from(("float32", "bfloat16", "int8", "float8_e4m3"))
NARROWER = {
    "float32": ("float32", "bfloat16", "int8", "float8_e4m3"),
    "bfloat16": ("bfloat16", "int8", "float8_e4m3"),
    "int8": ("int8",),
    "float8_e4m3": ("float8_e4m3",),
}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[KvFormat, KvFormat]:
    heads, dtype = draw(st.sampled_from((1, 2, 4))), draw(TYPES)
    source = KvFormat(LAYERS, heads, HEAD_DIM, draw(SIZES), dtype, draw(TPS))
    other = draw(st.sampled_from(NARROWER[dtype]))
    same = draw(st.booleans())
    return source, KvFormat(LAYERS, heads, HEAD_DIM, source.block_size if same else draw(SIZES), other, draw(TPS))


@settings(max_examples=120, deadline=None)
@given(pairs(), st.integers(1, 40), st.integers(0, 4), st.integers(0, 10**6), st.booleans())
def test_each_token_keeps_its_kv(
    forms: tuple[KvFormat, KvFormat], tokens: int, skip: int, seed: int, fetched: bool
) -> None:
    """By pack and unpack, or fetched where rows are kept alike; the first `skip` target blocks do not travel."""
    source, target = forms
    rng, start = np.random.default_rng(seed), seed % LAYERS
    layers = range(start, min(LAYERS, start + 1 + seed // LAYERS % LAYERS))
    theirs = -(-tokens // source.block_size)
    ours = -(-tokens // target.block_size)
    skip = min(skip, ours - 1)
    from_blocks = rng.permutation(theirs + SPARE)[:theirs].tolist()
    to_blocks = rng.permutation(ours + SPARE)[:ours].tolist()
    kv = {layer: random_kv(source, tokens, rng) for layer in layers}
    givers = [store(source, rank, theirs + SPARE) for rank in range(source.tp)]
    for giver in givers:
        mine = source.heads(giver.rank)
        for layer, token in product(layers, range(tokens)):
            put_token(giver, layer, from_blocks, token, kv[layer][token][:, mine.start : mine.stop])
    takers = [store(target, rank, ours + SPARE) for rank in range(target.tp)]
    before = [taker.memory.copy() for taker in takers]
    part, landing = cut(from_blocks, source.block_size, target.block_size, skip, ours), to_blocks[skip:]
    for route in routes(source, target):
        giver, taker = givers[route.source_rank], takers[route.target_rank]
        if fetched and as_kept(source, target):
            sums = giver.checksums(layers, part.blocks, route)
            peer = (giver.memory, source, giver.num_blocks)
            landed = taker.fetch(*peer, layers, part.blocks, landing, route)
        else:
            pieces = len(layers) * part.count
            data = bytearray(pieces * piece_bytes(target, route))
            sums = giver.pack(layers, part, route, target, memoryview(data))
            landed = taker.unpack(layers, landing, route, memoryview(data))
            size = len(data) // pieces
            assert [xxhash.xxh3_64_intdigest(data[i * size : (i + 1) * size]) for i in range(pieces)] == [*sums]
        assert np.array_equal(sums, landed)
    expected = {layer: as_in(target, source, kv[layer]) for layer in layers}
    for taker, old in zip(takers, before, strict=True):
        mine = target.heads(taker.rank)
        for layer, token in product(layers, range(skip * target.block_size, tokens)):
            got = token_kv(taker, layer, to_blocks, token)
            assert np.array_equal(got, expected[layer][token][:, mine.start : mine.stop]), (layer, token)
        blocks = (LAYERS, taker.num_blocks, -1)
        now, then = taker.memory.reshape(blocks), old.reshape(blocks)
        for layer in range(LAYERS):
            written = landing if layer in layers else []
            assert np.array_equal(np.delete(now[layer], written, axis=0), np.delete(then[layer], written, axis=0))


@pytest.mark.parametrize("blocks", [[5], [0, 5], [-1]])
def test_what_a_peer_does_not_have_cannot_be_fetched(blocks: list[int]) -> None:
    form = KvFormat(LAYERS, 2, HEAD_DIM, 4, "float32")
    peer, own = store(form, 0, 5), store(form, 0, 8)
    before = own.memory.copy()
    (route,) = routes(form, form)
    with pytest.raises(IndexError):
        layer = range(LAYERS - 1, LAYERS) if -1 not in blocks else range(1)
        own.fetch(peer.memory, form, 5, layer, blocks, range(len(blocks)), route)
    assert np.array_equal(own.memory, before)
