"""Greedy output equals transformers' token for token, whatever way it takes through the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.e2e.cluster import BRIEF, OUTPUT, Answer, Cluster, connected, running
from tests.e2e.prompts import ALL, CHAT, CODE, LONG, SHORT, UNICODE, Prompt
from tests.e2e.reference import Judge

EVERY_KIND: list[Prompt] = [SHORT[3], UNICODE[0], UNICODE[6], CODE[1], CHAT[0], CHAT[5], LONG[2], LONG[6]]
pytestmark = pytest.mark.timeout(300)

CHUNK = 64
"""Of the pair and of the colocated worker: longer prompts are computed in pieces."""


def check(judge: Judge, prompts: Sequence[Prompt], answers: Sequence[Answer], length: int = OUTPUT) -> None:
    """All complete, the prompt as the reference's tokenizer has it, every token its choice."""
    pairs = [(judge.encode(prompt), tuple(answer.tokens)) for prompt, answer in zip(prompts, answers, strict=True)]
    for (prompt, output), answer in zip(pairs, answers, strict=True):
        assert len(output) == length
        assert answer.finish_reason == "length"
        assert (answer.usage["prompt_tokens"], answer.usage["completion_tokens"]) == (len(prompt), length)
    judge.check(pairs)


def test_the_prompts_are_varied(judge: Judge) -> None:
    lengths = [len(judge.encode(prompt)) for prompt in ALL]
    assert len(ALL) >= 32
    assert min(lengths) == 1
    assert sum(length > 2 * CHUNK for length in lengths) >= 8


@pytest.mark.parametrize("prompt", [SHORT[3], CHAT[0], LONG[0]], ids=["short", "chat", "long"])
def test_the_judge_agrees_with_generate(judge: Judge, prompt: Prompt) -> None:
    tokens = judge.encode(prompt)
    output = judge.generate(tokens, OUTPUT // 2)
    judge.check([(tokens, output)])
    changed = (*output[:20], (output[20] + 1) % 1000, *output[21:])
    assert judge.verdict(tokens, changed).wrong[0] == 20


async def test_16_at_once(pair: Cluster, judge: Judge) -> None:
    """All prompts, those longer than a prefill chunk among them."""
    check(judge, ALL, await pair.ask_all(ALL))


async def test_alone(pair: Cluster, judge: Judge) -> None:
    check(judge, EVERY_KIND, [await pair.ask(prompt, max_tokens=BRIEF) for prompt in EVERY_KIND], BRIEF)


async def test_from_the_prefix_cache(pair: Cluster, judge: Judge) -> None:
    """What was asked before finds all of its full blocks but the last token's; the decode worker's are not sent."""
    long = [prompt for prompt in ALL if len(judge.encode(prompt)) > 32]
    await pair.ask_all(long, max_tokens=1)
    skipped = await pair.metric("baton_handover_skipped_blocks_total")
    answers = await pair.ask_all(long, max_tokens=BRIEF)
    check(judge, long, answers, BRIEF)
    for prompt, answer in zip(long, answers, strict=True):
        length = len(judge.encode(prompt))
        assert answer.cached == (length - 1) // 16 * 16
    assert await pair.metric("baton_handover_skipped_blocks_total") > skipped


async def test_colocated(judge: Judge, tmp_path: Path) -> None:
    flags = ("--colocated", "1", "--threads", "1", "--max-batch-tokens", str(CHUNK), "--kv-memory", "256MiB")
    with running(tmp_path, *flags) as serve:
        async with connected(serve) as cluster:
            check(judge, ALL, await cluster.ask_all(ALL, max_tokens=BRIEF), BRIEF)
            check(judge, EVERY_KIND[:3], [await cluster.ask(prompt) for prompt in EVERY_KIND[:3]])
            again = await cluster.ask_all(LONG, max_tokens=BRIEF)
            check(judge, LONG, again, BRIEF)
            assert min(answer.cached for answer in again) >= 64
            assert await cluster.metric("baton_handovers_total") == 0
            await cluster.quiet()
