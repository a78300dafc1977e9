"""The engine with its KV in another type than it computes in: near the engine with float KV. That it is as true to
itself, `test_runner.py` shows for every type."""

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


def logprobs(engine: Engine, tokens: list[int]) -> dict[int, float]:
    """Of the likeliest tokens after `tokens`: a prefill and one decode."""
    owner = sequence(tokens, 1, logprobs=20)
    advance(engine, [(owner, len(tokens) - 1)])
    (found,) = engine.runner.launch(StepPlan(1, [Slice.of(owner, len(tokens) - 1, 1)])).results()
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
def test_converted_rows_are_those_that_the_engine_computes(checkpoint: Path, kv_dtype: str) -> None:
    """In the first layer, whose keys and values depend on no attention over what was kept before."""
    exact, engine = start(checkpoint), start(checkpoint, kv_dtype=kv_dtype)
    (tokens,) = prompts(80)
    owner = sequence(tokens, 1)
    rows = []
    for each in (exact, engine):
        advance(each, [(sequence(tokens, 1), 80)])
        first_layer = each.pool.flat.view(each.format.num_layers, each.num_blocks, -1)[0]
        rows.append(first_layer[owner.blocks[:5].tolist()].view(-1, each.format.row_bytes))
    assert torch.equal(convert_rows(rows[0], "float32", kv_dtype, 16, engine.format.head_dim), rows[1])


def test_the_pool_holds_more_tokens(checkpoint: Path) -> None:
    exact, engine = start(checkpoint), start(checkpoint, kv_dtype="int8")
    assert engine.format.dtype == engine.pool.format.dtype == "int8"
    assert engine.num_blocks / exact.num_blocks == pytest.approx(64 / 20, abs=0.01)  # 16 floats, or bytes and a scale
    assert engine.runner.operations == exact.runner.operations


def test_an_unknown_type_is_named(checkpoint: Path) -> None:
    with pytest.raises(InvalidRequest, match="int3"):
        start(checkpoint, kv_dtype="int3")
