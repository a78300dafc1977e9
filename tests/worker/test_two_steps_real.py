"""A real model under both loops: the same tokens, with the same log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from baton.common.clock import ManualClock
from baton.common.config import EngineConfig, HandoverConfig
from baton.common.hashing import BlockHasher
from baton.common.messages import Submit, TokenOut
from baton.common.types import Request, Role, SamplingParams
from baton.engine.block_table import BlockTable
from baton.engine.loop import EngineLoop
from baton.engine.mailbox import FromRouter, Inbox, Mail, Outbox, RouterJoined
from baton.engine.role import Context, Limits
from baton.engine.runner import build_engine
from baton.worker.cast import Cast
from tests.tiny import make_checkpoint
from tests.toy import endpoint

NOBODY: Any = Mock()
BLOCKS = 26
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
ALIKE = SamplingParams(max_tokens=40, temperature=0.9, seed=7, ignore_eos=True)
PARAMS = [
    GREEDY,
    ALIKE,
    replace(ALIKE, top_k=9, top_p=0.8, min_p=0.02),
    replace(GREEDY, logprobs=3),
    replace(ALIKE, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.4, logprobs=0),
    replace(GREEDY, repetition_penalty=1.2, max_tokens=70),
    replace(ALIKE, logit_bias=((5, 4.0), (9, 4.0)), ignore_eos=False, min_tokens=12, stop_token_ids=(5,)),
    replace(GREEDY, max_tokens=1),
    replace(GREEDY, max_tokens=2),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")


@dataclass(frozen=True)
class Served:
    answers: dict[int, list[TokenOut]]
    preemptions: int


def serve(checkpoint: Path, overlap: bool) -> Served:
    """All of them on a colocated worker whose pool is too small, prompts in chunks."""
    block = 3 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, tokens, elements, bytes
    config = EngineConfig(
        model=str(checkpoint), device="cpu", threads=1, kv_memory=BLOCKS * block, max_batch_tokens=24, max_model_len=200
    )
    engine, inbox, mail = build_engine(config, lambda share: None), Inbox(), list[Mail]()
    limits = Limits(
        vocab_size=engine.vocab_size, eos_ids=engine.eos_ids, max_model_len=200, max_batch_tokens=24, max_running=16,
        max_waiting=99,
    )  # fmt: skip
    context = Context(
        endpoint=endpoint("w"), table=BlockTable(BLOCKS, BlockHasher(16)), outbox=Outbox(), limits=limits,
        handover=HandoverConfig(),
    )  # fmt: skip
    roles = Cast(context, NOBODY, NOBODY).play(Role.COLOCATED)
    loop = EngineLoop(context, roles, engine.runner, inbox, ManualClock(1.0), mail.append, overlap)
    inbox.post(RouterJoined("router"))
    for number, params in enumerate(PARAMS):
        prompt = tuple(3 + (31 * number + 7 * i * i) % 300 for i in range(9 + 8 * number))
        inbox.post(FromRouter("router", Submit(number, 1, Request(str(number), prompt, len(prompt), params))))
        loop.step()
    while loop.step():
        pass
    tokens = [t for each in mail for report in each.reports.values() for t in report.tokens]
    assert sum(len(report.failed) for each in mail for report in each.reports.values()) == 0
    answers = {number: [t for t in tokens if t.ticket == number] for number in range(len(PARAMS))}
    return Served(answers, loop.inspect().preemptions)


def test_a_real_model_says_the_same_under_both_loops(checkpoint: Path) -> None:
    plain, overlapped = serve(checkpoint, False), serve(checkpoint, True)
    assert overlapped.answers == plain.answers
    for number, params in enumerate(PARAMS):
        for token in plain.answers[number]:
            assert (token.logprob is None) == (params.logprobs is None)
            if token.logprob is not None and params.logprobs:  # of a greedy one: its own token is the best
                assert token.logprob.top[0] == (token.token, token.logprob.logprob)
    assert (
        all(len(plain.answers[n]) == p.max_tokens for n, p in enumerate(PARAMS) if p.ignore_eos)
        and plain.preemptions > 0 < overlapped.preemptions
    )
