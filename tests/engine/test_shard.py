"""Shards: put together they are the model, and each computes its own queries over keys that it has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.common.errors import InvalidRequest
from baton.engine.model_config import ModelConfig, Rope
from baton.engine.shard import Axis, Shard, shard


def model(heads: int, kv_heads: int, inner: int = 24, vocabulary: int = 50, dim: int = 4) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=vocabulary, hidden_size=16, intermediate_size=inner, num_layers=2,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, rms_eps=1e-5, rope=Rope(1e4), windows=(0, 0),
        max_position_embeddings=64, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, tied=False,
        eos_ids=frozenset(),
    )  # fmt: skip


@st.composite
def divided(draw: st.DrawFn) -> tuple[ModelConfig, list[Shard]]:
    """A model and all its shards; KV heads may be fewer than ranks."""
    tp = draw(st.sampled_from([1, 2, 3, 4, 8]))
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 8, 16) if n % tp == 0 or tp % n == 0]))
    group = draw(st.sampled_from([n for n in range(1, 17) if kv_heads * n % tp == 0]))
    vocabulary, dim = draw(st.integers(1, 200)), draw(st.integers(1, 8))
    config = model(kv_heads * group, kv_heads, tp * draw(st.integers(1, 9)), vocabulary, dim)
    return config, [shard(config, tp, rank) for rank in range(tp)]


def joined(axes: list[Axis]) -> list[int]:
    return [place for axis in axes for place in axis.part]


@given(divided())
def test_the_parts_of_every_split_axis_are_the_whole(case: tuple[ModelConfig, list[Shard]]) -> None:
    config, shards = case
    assert joined([s.queries for s in shards]) == list(range(config.num_heads * config.head_dim))
    assert joined([s.inner for s in shards]) == list(range(config.intermediate_size))
    assert joined([s.vocabulary for s in shards]) == list(range(config.vocab_size))
    for part in shards:
        assert part.hidden == Axis(config.hidden_size, range(config.hidden_size))
        assert part.config.num_heads * config.head_dim == len(part.queries.part)
        assert part.config.num_kv_heads * config.head_dim == len(part.keys.part)
        assert part.config.intermediate_size == len(part.inner.part)
        assert part.vocabulary.part.start == min(part.rank * part.vocabulary_rows, config.vocab_size)
        assert len(part.vocabulary.part) <= part.vocabulary_rows


@given(divided())
def test_each_query_head_finds_its_kv_head_in_its_own_shard(case: tuple[ModelConfig, list[Shard]]) -> None:
    config, shards = case
    group = config.num_heads // config.num_kv_heads
    for part in shards:
        queries = [place // config.head_dim for place in part.queries.part[:: config.head_dim]]
        keys = [place // config.head_dim for place in part.keys.part[:: config.head_dim]]
        local_group = len(queries) // len(keys)
        assert [keys[i // local_group] for i in range(len(queries))] == [query // group for query in queries]
    assert set(joined([s.keys for s in shards])) == set(range(config.num_kv_heads * config.head_dim))


def test_fewer_kv_heads_than_ranks_are_copied_to_neighbours() -> None:
    config = model(heads=8, kv_heads=2)
    assert [list(shard(config, 4, rank).keys.part) for rank in range(4)] == [[*range(4)]] * 2 + [[*range(4, 8)]] * 2


def test_one_rank_holds_the_model_as_it_is() -> None:
    config = model(heads=9, kv_heads=3)
    assert shard(config).config == config
    assert shard(config).vocabulary_rows == config.vocab_size


@pytest.mark.parametrize(
    ("config", "tp", "says"),
    [
        (model(9, 3), 2, "9 query heads do not divide among 2 ranks"),
        (model(12, 3), 4, "3 KV heads do not divide among 4 ranks"),
        (model(4, 4, inner=26), 4, "26 inner features do not divide among 4 ranks"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(config: ModelConfig, tp: int, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        shard(config, tp, 0)
    assert caught.value.param == "tp"
