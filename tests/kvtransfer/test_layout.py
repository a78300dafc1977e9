import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.common.errors import FingerprintMismatch, InvalidRequest
from baton.common.kv_format import KvFormat
from baton.kvtransfer.layout import count_frames, cut, frames, in_payload, in_pool, piece_bytes, routes, tokens_of

TPS = (1, 2, 4, 8)
HEADS = (1, 2, 4, 8, 16)


def form(tp: int, heads: int, block_size: int = 4, dtype: str = "bfloat16") -> KvFormat:
    return KvFormat(num_layers=2, num_kv_heads=heads, head_dim=8, block_size=block_size, dtype=dtype, tp=tp)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("target_tp", TPS)
@pytest.mark.parametrize("source_tp", TPS)
def test_every_target_rank_gets_every_head_that_it_keeps_once(source_tp: int, target_tp: int, heads: int) -> None:
    source, target = form(source_tp, heads), form(target_tp, heads)
    plan = routes(source, target)
    for rank in range(target_tp):
        got = {}
        for route in (r for r in plan if r.target_rank == rank):
            for i in range(route.heads):
                place = route.target_head + i
                assert place not in got, "a head came twice"
                got[place] = source.heads(route.source_rank)[route.source_head + i]  # IndexError: not its own
        assert [got[i] for i in range(target.heads_per_rank)] == list(target.heads(rank))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("target_tp", TPS)
@pytest.mark.parametrize("source_tp", TPS)
def test_copies_of_a_head_share_the_work(source_tp: int, target_tp: int, heads: int) -> None:
    source, target = form(source_tp, heads), form(target_tp, heads)
    plan = routes(source, target)
    pairs = [(r.source_rank, r.target_rank) for r in plan]
    assert len(pairs) == len(set(pairs)), "a frame names its route by the two ranks"
    for head in range(heads):
        holders = [r for r in range(source_tp) if head in source.heads(r)]
        sent = dict.fromkeys(holders, 0)
        for route in plan:
            own = source.heads(route.source_rank)
            if head in (own[route.source_head + i] for i in range(route.heads)):
                sent[route.source_rank] += 1
        if source_tp > heads:  # each rank holds one head: those who hold the same one send it equally often
            assert max(sent.values()) - min(sent.values()) <= 1


def test_three_ranks_of_three_heads() -> None:
    assert [r.heads for r in routes(form(1, 3), form(3, 3))] == [1, 1, 1]


def test_formats_of_different_models_are_refused() -> None:
    with pytest.raises(FingerprintMismatch):
        routes(form(1, 2), form(1, 4))
    with pytest.raises(InvalidRequest):
        form(3, 4)


@given(
    st.sampled_from(TPS), st.sampled_from(TPS), st.sampled_from(HEADS), st.integers(1, 6), st.integers(0, 1), st.data()
)  # fmt: skip
def test_pieces_carry_the_heads_to_their_place(
    source_tp: int, target_tp: int, heads: int, count: int, layer: int, data: st.DataObject
) -> None:
    """Move every route's pieces by the offsets, and look for each head's row where its rank keeps it."""
    source, target, num = form(source_tp, heads), form(target_tp, heads), 9
    theirs = data.draw(st.lists(st.integers(0, num - 1), min_size=count, max_size=count, unique=True))
    ours = data.draw(st.lists(st.integers(0, num - 1), min_size=count, max_size=count, unique=True))

    def row(block: int, kv: int, head: int) -> bytes:  # content that names its place
        return bytes([layer, block, kv, head]) * (source.row_bytes // 4)

    pools = [np.zeros(2 * num * source.block_bytes, dtype=np.uint8) for _ in range(source_tp)]
    for rank, pool in enumerate(pools):
        shaped = pool.reshape(2, num, 2, source.heads_per_rank, source.row_bytes)
        for block in range(num):
            for kv in (0, 1):
                for i, head in enumerate(source.heads(rank)):
                    shaped[layer, block, kv, i] = np.frombuffer(row(block, kv, head), np.uint8)
    for rank in range(target_tp):
        pool = np.zeros(2 * num * target.block_bytes, dtype=np.uint8)
        written = np.zeros_like(pool)
        for route in (r for r in routes(source, target) if r.target_rank == rank):
            half = piece_bytes(target, route) // 2
            sources = in_pool(source, num, range(layer, layer + 1), theirs, route.source_head, route.heads)
            targets = in_pool(target, num, range(layer, layer + 1), ours, route.target_head, route.heads)
            for a, b in zip(sources.offsets().flat, targets.offsets().flat, strict=True):
                pool[b : b + half] = pools[route.source_rank][a : a + half]
                written[b : b + half] += 1
        shaped = pool.reshape(2, num, 2, target.heads_per_rank, target.row_bytes)
        for a, b in zip(theirs, ours, strict=True):
            for kv in (0, 1):
                for i, head in enumerate(target.heads(rank)):
                    assert shaped[layer, b, kv, i].tobytes() == row(a, kv, head)
        assert written.max() == 1 and written.sum() == count * target.block_bytes  # once, and nothing else


@given(st.integers(1, 48), st.integers(1, 48), st.integers(1, 300), st.data())
def test_cuts_name_every_token_of_the_target_blocks(
    source_size: int, target_size: int, tokens: int, data: st.DataObject
) -> None:
    blocks = data.draw(st.permutations(range(-(-tokens // source_size))))
    end = -(-tokens // target_size)
    first = data.draw(st.integers(0, end - 1))
    last = data.draw(st.integers(first + 1, end))
    part = cut(blocks, source_size, target_size, first, last)
    assert part.count == last - first
    block, slot = tokens_of(part, source_size, target_size)
    assert len(block) == part.count * target_size
    for i in range(part.count * target_size):
        token = first * target_size + i
        if token < tokens:
            assert (block[i], slot[i]) == (blocks[token // source_size], token % source_size)
        assert 0 <= slot[i] < source_size and block[i] in blocks


@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 200), st.integers(1, 6), st.integers(1, 30), st.data()
)  # fmt: skip
def test_frames_are_all_pieces_once_and_as_many_as_counted(
    source_size: int, target_size: int, tokens: int, layers: int, most: int, data: st.DataObject
) -> None:
    end = -(-tokens // target_size)
    first = data.draw(st.integers(0, end - 1))
    part = cut(range(-(-tokens // source_size)), source_size, target_size, first, end)
    found = list(frames(range(2, 2 + layers), part, source_size, target_size, most))
    assert len(found) == count_frames(layers, part.count, most)
    pieces = [(layer, i + j) for those, i, some in found for layer in those for j in range(some.count)]
    assert sorted(pieces) == [(layer, i) for layer in range(2, 2 + layers) for i in range(part.count)]
    for those, i, some in found:
        assert len(those) * some.count <= most
        expected = cut(range(-(-tokens // source_size)), source_size, target_size, first + i, first + i + some.count)
        assert (list(some.blocks), some.offset) == (list(expected.blocks), expected.offset)


def test_payload_offsets_follow_each_other() -> None:
    assert in_payload(3, 10).offsets().tolist() == [[0, 5], [10, 15], [20, 25]]
