"""The engine with its KV in another type than it computes in: near the engine with float KV, and as true to itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.common.errors import InvalidRequest
from baton.engine.plan import Sampled, Slice, StepPlan
from baton.engine.runner import Engine
from baton.kernels.convert import convert_rows

from ..tiny import make_checkpoint
from .test_model import advance, prompts, sequence, start

FURTHEST = {"int8": 0.2, "float8_e4m3": 0.8, "bfloat16": 0.15}
"""Largest difference of a log-probability from float KV, in a random model, which forgives less than a trained one."""
EACH = pytest.mark.parametrize("kv_dtype", FURTHEST)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")


def kept(engine: Engine, blocks: list[int], count: int) -> list[torch.Tensor]:
    """Elements and scales of the first `count` tokens that `blocks` hold, layer by layer."""
    pool = engine.pool
    found = [layer[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :count].float() for layer in pool.layers]
    return found + [layer[blocks].permute(1, 2, 0, 3).flatten(2, 3)[:, :, :count] for layer in pool.scales]


def logprobs(engine: Engine, tokens: list[int]) -> dict[int, float]:
    """Of the likeliest tokens after `tokens`: a prefill and one decode."""
    owner = sequence(tokens, 1, logprobs=20)
    advance(engine, [(owner, len(tokens) - 1)])
    (found,) = engine.runner.run(StepPlan(1, [Slice(owner, len(tokens) - 1, 1)]))
    assert isinstance(found, Sampled)
    assert found.logprob is not None
    return dict(found.logprob.top)


@EACH
def test_near_the_engine_with_float_kv(checkpoint: Path, kv_dtype: str) -> None:
    exact, engine = start(checkpoint), start(checkpoint, kv_dtype=kv_dtype)
    for tokens in prompts(5, 60, 200):
        expected, found = logprobs(exact, tokens), logprobs(engine, tokens)
        shared = expected.keys() & found.keys()
        assert len(shared) >= 12
        assert 0 < max(abs(expected[token] - found[token]) for token in shared) < FURTHEST[kv_dtype]


@EACH
def test_chunks_batches_and_decodes_keep_the_same_bits(checkpoint: Path, kv_dtype: str) -> None:
    engine = start(checkpoint, kv_dtype=kv_dtype)
    if engine.runner.operations == "torch":
        pytest.skip("only the compiled operations promise this")
    tokens, other = prompts(90, 70)
    whole, chunked, stepped = sequence(tokens, 1), sequence(tokens, 21), sequence(tokens[:60], 41)
    stepped.tokens = list(tokens)
    advance(engine, [(whole, 90)])
    for count in (1, 30, 7, 52):
        advance(engine, [(sequence(other, 61), 40), (chunked, count)])
    advance(engine, [(stepped, 60)])
    for _ in range(30):
        advance(engine, [(sequence(other, 81), 1), (stepped, 1)])
    expected = kept(engine, whole.blocks, 90)
    for again in (chunked, stepped):
        assert again.tokens == whole.tokens
        for found, wanted in zip(kept(engine, again.blocks, 90), expected, strict=True):
            assert torch.equal(found, wanted)


@EACH
def test_what_free_blocks_hold_does_not_matter(checkpoint: Path, kv_dtype: str) -> None:
    engine = start(checkpoint, kv_dtype=kv_dtype)
    (tokens,) = prompts(37)
    clean, dirty = sequence(tokens, 1), sequence(tokens, 1)
    for each in (clean, dirty):
        while len(each.tokens) < 60:
            advance(engine, [(each, each.missing)])
        engine.pool.fill(range(engine.num_blocks), float("nan"))
    assert dirty.tokens == clean.tokens


@EACH
def test_converted_rows_are_those_that_the_engine_computes(checkpoint: Path, kv_dtype: str) -> None:
    """In the first layer, whose keys and values depend on no attention over what was kept before."""
    exact, engine = start(checkpoint), start(checkpoint, kv_dtype=kv_dtype)
    (tokens,) = prompts(80)
    owner = sequence(tokens, 1)
    rows = []
    for each in (exact, engine):
        advance(each, [(sequence(tokens, 1), 80)])
        content = bytearray(each.pool.gather(0, owner.blocks[:5]))
        rows.append(torch.frombuffer(content, dtype=torch.uint8).view(-1, each.format.row_bytes))
    assert torch.equal(convert_rows(rows[0], "float32", kv_dtype, 16, engine.format.head_dim), rows[1])


def test_the_pool_holds_more_tokens(checkpoint: Path) -> None:
    exact, engine = start(checkpoint), start(checkpoint, kv_dtype="int8")
    assert engine.format.dtype == engine.pool.format.dtype == "int8"
    assert engine.num_blocks / exact.num_blocks == pytest.approx(64 / 20, abs=0.01)  # 16 floats, or bytes and a scale
    assert engine.runner.operations == exact.runner.operations


def test_an_unknown_type_is_named(checkpoint: Path) -> None:
    with pytest.raises(InvalidRequest, match="int3"):
        start(checkpoint, kv_dtype="int3")
