"""Tensor parallelism against a single rank, token for token. The ranks are threads here: a group of gloo's, a stream of
commands, and shards of their own are all that makes them ranks. `tests/worker/test_ranks.py` has them as processes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.common.config import EngineConfig, WorkerConfig
from baton.common.errors import InvalidRequest, WorkerLost
from baton.common.types import Role
from baton.engine.follower import Followers
from baton.engine.plan import Sampled, StepPlan
from baton.engine.runner import Engine, build_engine
from baton.engine.sequence import Sequence
from baton.worker.rank import follow
from baton.worker.ranks import RankConfig

from ..tiny import make_checkpoint
from .test_model import prompts, sequence, start

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases, untied head, odd vocabulary": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "vocab_size": 301},
    ),
    "norms of queries and keys": ("qwen3", {}),
    "one KV head, sliding window": ("mistral", {"num_key_value_heads": 1, "sliding_window": 24}),
}


@contextlib.contextmanager
def parallel(path: Path, tp: int, **settings: Any) -> Iterator[Engine]:
    """An engine of `tp` ranks, whose followers run on threads of this process."""
    defaults = {"model": str(path), "threads": tp, "device": "cpu", "kv_memory": 4 << 20, "max_batch_tokens": 64}
    config = EngineConfig(**(defaults | settings | {"tp": tp}))
    followers = Followers(tp - 1)

    def run(rank: int) -> None:
        with contextlib.suppress(WorkerLost):
            follow(
                RankConfig(
                    worker=WorkerConfig(name="test", role=Role.COLOCATED, engine=config), epoch=1, rank=rank,
                    parent=os.getpid(), address=followers.address, token=followers.token, meeting=followers.meeting,
                    timeout_s=followers.timeout_s,
                )
            )  # fmt: skip

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(1, tp)]
    for thread in threads:
        thread.start()
    try:
        yield build_engine(config, lambda share: None, followers=followers)
    finally:
        followers.close()
        for thread in threads:
            thread.join(10.0)
        assert not any(thread.is_alive() for thread in threads)


def step(engine: Engine, *parts: tuple[Sequence, int]) -> list[Sampled | None]:
    """Compute so many tokens of each sequence; what is sampled is appended."""
    plan = StepPlan(99)
    for owner, count in parts:
        plan.add(owner, count)
    results = list(engine.runner.launch(plan).results())
    for (owner, count), result in zip(parts, results, strict=True):
        owner.launched += count
        owner.tokens += [result.token] if result else []
    return results


def talk(engine: Engine) -> list[Sampled | None]:
    """What is sampled in some steps that mix prefill chunks and decodes, with the best log-probabilities."""
    running = [sequence(tokens, 1 + 20 * i, i, logprobs=5) for i, tokens in enumerate(prompts(1, 16, 37, 70))]
    first, second, third, fourth = running
    steps = [[(first, 1), (fourth, 33)], [(second, 16), (first, 1), (fourth, 37), (third, 5)], [(third, 10)]]
    found: list[Sampled | None] = []
    while len(first.tokens) < 25:
        parts = steps.pop(0) if steps else [(each, each.missing) for each in running]
        found += step(engine, *parts)
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_together_compute_what_one_computes(tmp_path: Path, name: str) -> None:
    arch, overrides = VARIANTS[name]
    path = make_checkpoint(tmp_path, arch, **overrides)
    alone = start(path)
    expected = talk(alone)
    for tp in (2, 4):
        with parallel(path, tp) as engine:
            found = talk(engine)
            assert (engine.fingerprint, engine.vocab_size) == (alone.fingerprint, alone.vocab_size)
            assert engine.format.tp == tp
        for ours, single in zip(found, expected, strict=True):
            assert (ours is None) == (single is None)
            if ours and single:
                assert ours.token == single.token
                assert ours.logprob and single.logprob
                assert [token for token, _ in ours.logprob.top] == [token for token, _ in single.logprob.top]
                probabilities = [value for _, value in single.logprob.top]
                assert [value for _, value in ours.logprob.top] == pytest.approx(probabilities, abs=1e-3)


def test_deterministic_ranks_compute_the_same_bits_in_every_batch(tmp_path: Path) -> None:
    """Four add up: with two, any order is the same."""
    path = make_checkpoint(tmp_path, "llama")
    mine, other = prompts(30, 40)
    alone, crowded = (sequence(mine, first, logprobs=5) for first in (1, 21))
    crowd = sequence(other, 41)
    with parallel(path, 4, deterministic=True) as engine:
        assert engine.fingerprint != start(path, deterministic=True).fingerprint
        expected = [step(engine, (alone, count))[0] for count in (30, 1, 1)]
        found = [step(engine, (crowded, 30), (crowd, 20))[0]]
        found += [step(engine, (crowd, count), (crowded, 1))[1] for count in (20, 1)]
    assert found == expected


def test_what_does_not_divide_is_refused_before_anybody_is_waited_for(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    followers = Followers(2)
    with contextlib.closing(followers), pytest.raises(InvalidRequest, match="4 query heads do not divide among 3"):
        build_engine(EngineConfig(model=str(path), tp=3), lambda share: None, followers=followers)
